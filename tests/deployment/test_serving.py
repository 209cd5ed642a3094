"""`fedllm serve` as a real process: its line, its clients, its end; nothing that is asked or answered stays."""

import contextlib
import http.client
import json
import os
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedllm.crypto.certificates import certify, key_line, make_ca, make_key, make_server_certificate
from fedllm.release.serve import CHAT, COMPLETIONS, HEALTH, MODELS
from tests.deployment.harness import until
from tests.fedllm.release.conftest import Released
from tests.fedllm.release.served import talking

pytestmark = pytest.mark.deployment
HOST = "127.0.0.1"
SECRET = "계좌번호 110-4711-S3CR3T"
_RUN = "import sys\n{before}\nfrom fedllm.cli.main import main\nsys.argv[0] = 'fedllm'\nmain()"
# Short, so that a test need not wait long for a client that says nothing.
_SHORT = "import fedllm.release.serve as serve\nserve._HEAD_PATIENCE, serve._STALLED = 3.0, 6.0"


@dataclass
class Served:
    """A server, and all that it may write to: `place`."""

    place: Path
    process: subprocess.Popen[bytes]
    port: int
    context: ssl.SSLContext
    token: str = ""

    def connect(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(HOST, self.port, timeout=120, context=self.context)

    def ask(
        self, path: str, body: object = None, token: str | None = None, on: http.client.HTTPConnection | None = None
    ) -> tuple[int, Any]:
        """Return status and answer."""
        connection = on or self.connect()
        headers = {"Authorization": f"Bearer {self.token if token is None else token}"}
        content = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, content, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        if on is None:
            connection.close()
        return answer.status, json.loads(text) if text.startswith("{") else text

    @property
    def log(self) -> str:
        return (self.place / "log").read_text("utf-8")

    def end(self) -> int:
        """Ask it to stop; return its exit code."""
        self.process.terminate()
        return self.process.wait(120)


@dataclass
class House:
    """Certificates and a release, for servers to be started with."""

    place: Path
    released: Released

    def make(self) -> None:
        self.ca = make_ca("house", 2)
        pair = make_server_certificate(self.ca, [HOST], 2)
        for name, content in (("ca.pem", self.ca.certificate), ("cert.pem", pair.certificate), ("key.pem", pair.key)):
            (self.place / name).write_bytes(content)

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.place / "ca.pem"))

    def command(self, home: Path, *more: str) -> list[str]:
        return [
            "serve", str(self.released.folder), "--trust", str(self.released.trust), "--home", str(home), "--tls-cert",
            str(self.place / "cert.pem"), "--tls-key", str(self.place / "key.pem"), *more,
        ]  # fmt: skip

    def start(self, name: str, *more: str, port: int = 0, before: str = _SHORT, tokens: bool = True) -> Served:
        place = self.place / name
        home = place / "home"
        (place / "tmp").mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ, "HOME": str(place), "TMPDIR": str(place / "tmp"), "FEDLLM_TRACEBACK": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        cli = [sys.executable, "-m", "fedllm.cli", "serve", "token", "add", "desk", "--home", str(home)]
        token = (place / "token").read_text() if (place / "token").exists() else ""
        if tokens and not token:
            token = subprocess.run(
                cli, check=True, capture_output=True, text=True, cwd=place, env=environment
            ).stdout.strip()
            (place / "token").write_text(token)
        log = place / "log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", _RUN.format(before=before), *self.command(home, "--port", str(port), *more)],
                stdout=file, stderr=file, cwd=place, env=environment, preexec_fn=_with_cores,
            )  # fmt: skip
        try:
            until(lambda: f"{process.pid}" in _noted(home) or process.poll() is not None, what="the server")
            assert process.poll() is None, log.read_text()
        except BaseException:
            process.kill()
            raise
        return Served(place, process, int(_noted(home).rpartition(":")[2].partition(" ")[0]), self.context(), token)


def _with_cores() -> None:
    """Allow core dumps, as some systems do."""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))


def _noted(home: Path) -> str:
    """Return the process and the address of the server that runs in a place."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((home / "serving.json").read_text())
        return f"{found['pid']} {found['url']}"
    return ""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    made = House(tmp_path_factory.mktemp("serving"), talking(tmp_path_factory))
    made.make()
    return made


@pytest.fixture(scope="module")
def served(house: House) -> Iterator[Served]:
    found = house.start("desk", "--timeout", "60", "--concurrency", "16")
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait()


def chat(content: str = SECRET, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 24, "temperature": 0, **fields}


# ---- the line --------------------------------------------------------------------------------------------------------


def test_only_tls_1_3_is_spoken_and_only_by_the_certificate_of_the_house(served: Served, house: House) -> None:
    assert served.ask(HEALTH) == (200, {"status": "ok"})
    with (
        socket.create_connection((HOST, served.port)) as plain,
        served.context.wrap_socket(plain, server_hostname=HOST) as line,
    ):
        assert line.version() == "TLSv1.3"
    old = house.context()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    stranger = ssl.create_default_context()
    for context, error in ((old, ssl.SSLError), (stranger, ssl.SSLCertVerificationError)):
        with socket.create_connection((HOST, served.port)) as plain, pytest.raises(error):
            context.wrap_socket(plain, server_hostname=HOST)
    connection = http.client.HTTPConnection(HOST, served.port, timeout=60)
    connection.request("GET", MODELS)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        connection.getresponse()


def test_a_token_counts_until_it_is_revoked_and_no_longer(served: Served) -> None:
    home = str(served.place / "home")
    cli = [sys.executable, "-m", "fedllm.cli", "serve", "token"]
    token = subprocess.run(
        [*cli, "add", "window", "--home", home], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert served.ask(MODELS, token=token)[0] == 200
    listed = subprocess.run([*cli, "list", "--home", home], check=True, capture_output=True, text=True).stdout
    assert [line.split()[0] for line in listed.splitlines()] == ["desk", "window"]
    assert token not in listed
    subprocess.run([*cli, "revoke", "window", "--home", home], check=True, capture_output=True)
    assert served.ask(MODELS, token=token)[0] == 401
    assert served.ask(MODELS)[0] == 200
    assert token not in served.log


def test_clients_that_say_nothing_or_half_are_cut_off_and_hold_up_nobody(served: Served) -> None:
    silent = socket.create_connection((HOST, served.port))  # not even a handshake
    half = [served.context.wrap_socket(socket.create_connection((HOST, served.port)), server_hostname=HOST)
            for _ in range(3)]  # fmt: skip
    half[1].sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.token}\r\nContent-Length: 9\r\n\r\n"
    half[2].sendall(head.encode() + b"{")
    assert served.ask(CHAT, chat())[0] == 200
    for line, answer in zip(half, (b"", b"", b"HTTP/1.1 408"), strict=True):
        line.settimeout(120)
        with contextlib.suppress(OSError):
            assert line.recv(12) == answer
        line.close()
    silent.close()


def test_a_client_that_breaks_off_ends_its_answer(served: Served) -> None:
    for stream in (True, False):
        connection = served.connect()
        headers = {"Authorization": f"Bearer {served.token}"}
        before = served.log.count(f"POST {CHAT}")
        body = json.dumps(chat("x" * 8, max_tokens=200, temperature=2, stream=stream))
        connection.request("POST", CHAT, body, headers)
        if stream:
            connection.getresponse().read(100)
        connection.close()
        until(lambda before=before: served.log.count(f"POST {CHAT}") > before, what="a line of the log")
    assert served.ask(HEALTH)[0] == 200


# ---- many clients ----------------------------------------------------------------------------------------------------


def crowd(served: Served, clients: int, seconds: float) -> list[int]:
    """Have clients ask the same questions, one after another, for a while; return how many answers each had."""
    questions = [f"question {number}" for number in range(7)]
    right = {text: served.ask(CHAT, chat(text))[1]["choices"][0]["message"]["content"] for text in questions}
    assert len(set(right.values())) > 3
    over, counts = threading.Event(), [0] * clients

    def client(number: int) -> None:
        connection = served.connect()
        while not over.is_set() or not counts[number]:
            text = questions[(number + counts[number]) % len(questions)]
            status, answer = served.ask(CHAT, chat(text), on=connection)
            assert status == 200, answer
            assert answer["choices"][0]["message"]["content"] == right[text]
            counts[number] += 1
        connection.close()

    with ThreadPoolExecutor(clients) as pool:
        tasks = [pool.submit(client, number) for number in range(clients)]
        time.sleep(seconds)
        over.set()
        for task in tasks:
            task.result()
    return counts


def test_of_many_clients_every_one_is_answered_rightly_and_none_waits_much_longer(served: Served) -> None:
    counts = crowd(served, 40, 4)
    assert min(counts) >= max(counts) / 3 - 1  # first come, first served


@pytest.mark.soak
def test_of_200_clients_for_a_minute_none_loses_an_answer_or_starves(house: House) -> None:
    served = house.start("crowd")
    try:
        counts = crowd(served, 200, 60)
        assert min(counts) >= max(counts) / 3 - 1
        statuses = [line.split()[1] for line in served.log.splitlines() if CHAT in line]
        assert statuses.count("200") == len(statuses) == sum(counts) + 7
        assert served.end() == 0
    finally:
        served.process.kill()
        served.process.wait()


# ---- nothing stays ---------------------------------------------------------------------------------------------------


def written(place: Path) -> Iterator[tuple[Path, bytes]]:
    for path in place.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes()


def expect_nothing_of(place: Path, *texts: str) -> None:
    """Look for texts in everything that was written, as they are and as JSON and logs would write them."""
    forms = {form for text in texts for form in (
        text.encode(), json.dumps(text)[1:-1].encode(), text.encode("utf-16-le"), repr(text)[1:-1].encode()
    )}  # fmt: skip
    found = [f"{form!r} in {path}" for path, content in written(place) for form in forms if form in content]
    assert not found


def test_nothing_that_is_asked_or_answered_is_written_and_a_crash_is_survived(served: Served, house: House) -> None:
    """After answers, streams, errors of every kind, a torn connection, and a crash in the middle of an answer."""
    status, answer = served.ask(CHAT, chat())
    assert status == 200
    said = answer["choices"][0]["message"]["content"]
    assert len(said) > 12
    assert "data: " in served.ask(CHAT, chat(stream=True))[1]
    assert served.ask(COMPLETIONS, {"prompt": SECRET, "max_tokens": 9, "temperature": 1.5})[0] == 200
    late = [{"role": "user", "content": SECRET}, {"role": "system", "content": SECRET}]
    refused: list[tuple[str, object]] = [
        (CHAT, chat(n=2)), (CHAT, chat(**{SECRET: SECRET})), (CHAT, {"messages": late}), (CHAT, chat(SECRET * 100)),
        (CHAT, chat(model=SECRET)), (CHAT, SECRET), (COMPLETIONS, {"prompt": [SECRET, SECRET]}),
        (f"/v1/{SECRET.rpartition('-')[2]}", {}), (CHAT, chat("x" * 300_000 + SECRET)),
    ]  # fmt: skip
    for path, body in refused:
        assert 400 <= served.ask(path, body)[0] < 500
    assert served.ask(MODELS, token=SECRET.rpartition(" ")[2])[0] == 401
    with (
        socket.create_connection((HOST, served.port)) as plain,
        served.context.wrap_socket(plain, server_hostname=HOST) as line,
    ):
        line.sendall(f"{SECRET} no HTTP at all\r\n\r\n".encode())
        assert b"400" in line.recv(100)
    connection = served.connect()
    headers = {"Authorization": f"Bearer {served.token}"}
    connection.request("POST", CHAT, json.dumps(chat(max_tokens=200, temperature=2, stream=True)), headers)
    connection.getresponse().read(10)
    os.kill(served.process.pid, signal.SIGSEGV)
    assert served.process.wait(60) == -signal.SIGSEGV
    connection.close()
    tail = SECRET.rpartition("-")[2]
    expect_nothing_of(served.place, SECRET, tail, said, said[:12])
    assert not [path for path, _ in written(served.place) if "core" in path.name]
    lines = [line for line in served.log.splitlines() if f"200 POST {CHAT} who=desk in=" in line]
    assert lines, served.log

    again = house.start("desk", port=served.port)  # at once, at the same port
    served.process = again.process
    assert served.ask(CHAT, chat())[1]["choices"][0]["message"]["content"] == said
    _ends_with_its_streams(served)
    expect_nothing_of(served.place, SECRET, tail, said, said[:12])


def _ends_with_its_streams(served: Served) -> None:
    """Ask a process to stop while it answers: the answer is whole, the exit code 0."""
    connection = served.connect()
    headers = {"Authorization": f"Bearer {served.token}"}
    connection.request("POST", CHAT, json.dumps(chat(max_tokens=200, temperature=2, stream=True)), headers)
    answer = connection.getresponse()
    begun = answer.read(10)
    served.process.terminate()
    text = (begun + answer.read()).decode()
    assert text.rstrip().endswith("data: [DONE]")
    assert '"finish_reason":"' in text
    assert served.process.wait(120) == 0
    connection.close()
    assert served.log.rstrip().endswith("stopped")


_FAILS = f"""{_SHORT}
from fedllm.release.loading import Release
import fedllm.release.batching as batching
honest = batching.Generator.__init__
def begin(self, release, *rest):
    honest(self, release, *rest)
    forward = type(release.model.model).forward
    def broken(model, *args, input_ids=None, **more):
        if input_ids is not None and 5 in input_ids.flatten().tolist():  # only of a text with a #
            raise RuntimeError("cannot go on with " + release.tokenizer.decode(input_ids.flatten()))
        return forward(model, *args, input_ids=input_ids, **more)
    type(release.model.model).forward = broken
batching.Generator.__init__ = begin
"""


def test_a_client_certificate_lets_in_and_an_error_inside_the_model_ends_the_process_without_its_text(
    house: House,
) -> None:
    ca, key = make_ca("clients", 2), make_key()
    (house.place / "clients.pem").write_bytes(ca.certificate)
    served = house.start("inside", "--client-ca", str(house.place / "clients.pem"), before=_FAILS, tokens=False)
    try:
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
            served.ask(MODELS)
        (house.place / "own.pem").write_bytes(certify(ca, key_line(key), "teller-7", 2))
        (house.place / "own.key").write_bytes(key)
        served.context.load_cert_chain(house.place / "own.pem", house.place / "own.key")
        assert served.ask(CHAT, chat("hello"))[0] == 200
        until(lambda: "who=teller-7" in served.log, what="the line of the log")
        status, answer = served.ask(CHAT, chat("#S3CR3T-8812"))
        assert status == 500
        assert "S3CR3T" not in json.dumps(answer)
        assert served.process.wait(120) == 1  # the service manager starts it again
        assert "the model's thread has failed" in served.log
        expect_nothing_of(served.place, "S3CR3T-8812", "S3CR3T")
    finally:
        served.process.kill()
        served.process.wait()


# ---- what is not served ----------------------------------------------------------------------------------------------


def test_a_release_that_was_changed_is_not_served(house: House, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(house.released.folder, changed)
    with (changed / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    command = house.command(tmp_path / "home")
    command[1] = str(changed)
    done = subprocess.run([sys.executable, "-m", "fedllm.cli", *command], capture_output=True, text=True)
    assert done.returncode == 1
    assert "model.safetensors was changed since it was signed" in done.stderr
    assert not (tmp_path / "home").exists()
