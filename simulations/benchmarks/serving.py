"""Speed of `fedllm serve`, over TLS with a token, beside transformers' own server and a bare `generate`.

OMP_NUM_THREADS=1 python -m simulations.benchmarks.serving --model MODELS/stories260k/hf --model simulations/demo/base

Every server answers the same questions, greedily, in the same run: in each round one after another, so that whatever
else the machine does meets all of them. Clients are threads that ask one question after another over a
connection that stands already.
A ratio is that of two servers in the same round; of all rounds its median is given, with the least and the largest.
"""

import http.client
import json
import os
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedllm.config import ModelConfig, TextConfig
from fedllm.crypto.certificates import make_ca, make_server_certificate
from fedllm.crypto.identity import Identity
from fedllm.release.loading import Release, load_release
from fedllm.release.manifest import Base, Manifest, Privacy, Training, sign_release
from fedllm.release.tokens import TOKENS, add_token
from fedllm.training.model import load_base
from fedllm.values import HEAD_OFFICE
from simulations.benchmarks.bench import machine

_HOST, _PATIENCE = "127.0.0.1", 300.0  # seconds
_OPENINGS = ("Once upon a time", "One day a little", "The big red", "Tom and his")
_THINGS = ("dog", "bird", "tree", "boat", "girl", "ball", "sun", "cat")


@dataclass(frozen=True)
class _Server:
    """A server that runs, and how to reach it."""

    name: str
    port: int
    model: str
    context: ssl.SSLContext | None = None
    token: str = ""

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection."""
        if self.context is None:
            return http.client.HTTPConnection(_HOST, self.port, timeout=_PATIENCE)
        return http.client.HTTPSConnection(_HOST, self.port, timeout=_PATIENCE, context=self.context)

    def ask(self, connection: http.client.HTTPConnection, question: str, most: int) -> tuple[str, int]:
        """Return the answer to a question, and its tokens."""
        body = {"model": self.model, "prompt": question, "max_tokens": most, "temperature": 0.0}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = json.loads(connection.getresponse().read())
        return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]


def _release(source: Path, place: Path) -> tuple[Path, Path]:
    """Make a release of a model as it is, signed by nobody in particular; return it and the file of keys."""
    folder, keys = place / "release", place / "keys.txt"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.md"))
    folder.chmod(0o755)
    signer = Identity.load_or_create(place / "identity")
    keys.write_text(f"{HEAD_OFFICE} {signer.public.fingerprint}\n", "utf-8")
    digest = load_base(ModelConfig(source=str(folder), max_length=64), "cpu").digest
    manifest = Manifest(
        made="2026-01-01 00:00", program="benchmark", name="model", form="merged", task="causal-lm",
        base=Base(source=source.name, revision=None, digest=digest), max_length=256,
        training=Training(run="0" * 32, plan="0" * 64, record="0" * 64, adapter="0" * 64, signer="nobody"),
        privacy=Privacy(mode="local", unit="record", epsilon=0.0, delta=1e-6, seeded=False, verdict="within",
                        audit="0" * 64),
        reading=TextConfig(text="{text}"), signer="", files={},
    )  # fmt: skip
    sign_release(folder, manifest, signer)
    return folder, keys


@contextmanager
def _started(command: list[str], log: Path, ready: Callable[[], bool]) -> Iterator[None]:
    """Run a server until the block ends."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            until = time.monotonic() + _PATIENCE
            while not ready():
                if process.poll() is not None or time.monotonic() > until:
                    raise typer.BadParameter(f"{' '.join(command)} does not start:\n{log.read_text()}")
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(server: _Server) -> bool:
    """Whether a server answers."""
    try:
        connection = server.connect()
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def _ours(folder: Path, keys: Path, place: Path, port: int) -> tuple[list[str], _Server]:
    ca = make_ca("benchmark", 1)
    pair = make_server_certificate(ca, [_HOST], 1)
    for name, content in (("ca.pem", ca.certificate), ("cert.pem", pair.certificate), ("key.pem", pair.key)):
        (place / name).write_bytes(content)
    token = add_token(place / "home" / TOKENS, "benchmark")
    command = [
        sys.executable, "-m", "fedllm.cli", "serve", str(folder), "--trust", str(keys), "--home", str(place / "home"),
        "--tls-cert", str(place / "cert.pem"), "--tls-key", str(place / "key.pem"), "--port", str(port),
    ]  # fmt: skip
    context = ssl.create_default_context(cafile=str(place / "ca.pem"))
    return command, _Server("fedllm serve", port, "model", context, token)


def _theirs(folder: Path, port: int, batches: bool) -> tuple[list[str], _Server]:
    # on a CPU it would take most of the machine's memory for keys and values; this is more than is used here
    batching = ["--continuous-batching", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "1024"]
    command = [
        str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--device", "cpu", "--port", str(port),
        *(batching if batches else []),
    ]  # fmt: skip
    name = "transformers serve" + (" --continuous-batching" if batches else "")
    return command, _Server(name, port, str(folder))


def _rate(server: _Server, clients: int, questions: list[str], most: int) -> tuple[float, dict[str, str]]:
    """Have so many clients ask all questions between them; return tokens a second, and the answers."""

    connections = [server.connect() for _ in range(clients)]
    for connection in connections:
        connection.connect()

    def client(number: int) -> list[tuple[str, str, int]]:
        mine = questions[number::clients]
        return [(question, *server.ask(connections[number], question, most)) for question in mine]

    with ThreadPoolExecutor(clients) as pool:
        begin = time.monotonic()
        found = [one for some in pool.map(client, range(clients)) for one in some]
        took = time.monotonic() - begin
    return sum(tokens for *_, tokens in found) / took, {question: text for question, text, _ in found}


def _bare(release: Release, clients: int, questions: list[str], most: int) -> tuple[float, dict[str, str]]:
    """Call `generate` on so many questions at once; return tokens a second, and the answers."""
    import torch

    tokenizer, model = release.tokenizer, release.model
    tokenizer.padding_side = "left"
    count, texts, begin = 0, dict[str, str](), time.monotonic()
    for start in range(0, len(questions), clients):
        some = questions[start : start + clients]
        inputs = tokenizer(some, return_tensors="pt", padding=True)
        with torch.inference_mode():
            made = model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=most,
                do_sample=False, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        answers: Any = made[:, inputs["input_ids"].shape[1] :]
        ends = model.generation_config.eos_token_id
        for question, answer in zip(some, answers.tolist(), strict=True):
            last = next((i for i, token in enumerate(answer) if token in ends), len(answer) - 1)
            count += last + 1
            texts[question] = tokenizer.decode(answer[: last + 1], skip_special_tokens=True)
    return count / (time.monotonic() - begin), texts


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _measure(console: Console, model: Path, counts: list[int], rounds: int, most: int, port: int) -> None:
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        place = Path(temporary)
        folder, keys = _release(model, place)
        started = [_ours(folder, keys, place, port), _theirs(folder, port + 1, True), _theirs(folder, port + 2, False)]
        for number, (command, server) in enumerate(started):
            console.print(f"$ {' '.join(command[-len(command) :])}".replace(temporary, "DIR"), soft_wrap=True)
            stack.enter_context(_started(command, place / f"{number}.log", partial(_answers, server)))
        from fedllm.audit.trust import Trust
        from fedllm.release.manifest import verify_release

        release = load_release(folder, verify_release(folder, Trust.read(keys)), "cpu")
        ends = release.model.generation_config.eos_token_id
        release.model.generation_config.eos_token_id = [ends] if isinstance(ends, int) else ends
        servers = [server for _, server in started]
        names = ["generate", *(server.name for server in servers)]
        console.print(f"\n{model.name}: tokens a second, median of {rounds} rounds (least to most)\n")
        console.print(
            f"| clients | {' | '.join(names)} | fedllm serve / transformers' batching | answers that differ |"
        )
        console.print(f"| ---: |{' ---: |' * (len(names) + 2)}")
        for clients in counts:
            total = max(4, 2 * clients)
            questions = [f"{_OPENINGS[i % 4]} {_THINGS[i // 4 % 8]} {i}" for i in range(total)]
            rates: dict[str, list[float]] = {name: [] for name in names}
            wrong = 0
            for number in range(rounds + 1):  # the first one warms up
                speed, right = _bare(release, clients, questions, most)
                found = {"generate": speed}
                for server in servers:
                    some = questions if server is not servers[2] else questions[:4]  # answered one after another
                    found[server.name], texts = _rate(server, clients, some, most)
                    wrong += sum(texts[q] != right[q] for q in questions) if server is servers[0] else 0
                if number:
                    for name, value in found.items():
                        rates[name].append(value)
            ratios = [a / b for a, b in zip(rates[names[1]], rates[names[2]], strict=True)]
            cells = [_spread(rates[name], ".0f") for name in names]
            asked = (rounds + 1) * total
            console.print(
                f"| {clients} | {' | '.join(cells)} | {_spread(ratios, '.2f')} | {wrong} of {asked} |", soft_wrap=True
            )


def main(
    model: Annotated[list[Path], typer.Option(exists=True, file_okay=False, help="Folder of a causal model.")],
    clients: Annotated[str, typer.Option(help="Numbers of clients, comma-separated.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    tokens: Annotated[int, typer.Option(min=1, help="Of every answer, at the most.")] = 64,
    port: Annotated[int, typer.Option(help="The first of three that are free.")] = 18443,
) -> None:
    """Tokens a second at several numbers of clients."""
    console = Console(width=250)
    for source in model:
        _measure(console, source, list(map(int, clients.split(","))), rounds, tokens, port)
        console.print()
    console.print(machine(), soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
