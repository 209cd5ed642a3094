"""`fedllm serve` on the command line: its short form, its refusals, its service files, and its doctor."""

import json
import os
import pwd
import socket
import ssl
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedllm.cli import serve as command
from fedllm.cli.main import app
from fedllm.crypto.certificates import make_ca, make_server_certificate
from fedllm.errors import ConfigError, FedllmError, ReleaseError
from fedllm.files import write_secret
from fedllm.release.doctor import SERVING, examine
from fedllm.release.tokens import TOKENS, add_token
from tests.fedllm.ops.test_service_files import settings
from tests.fedllm.release.conftest import Released, tiny_release  # noqa: F401  # a fixture

ME = pwd.getpwuid(os.geteuid()).pw_name


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["serve", *words])


def test_a_release_is_served_with_and_without_the_word_run_and_tokens_are_commands(tmp_path: Path) -> None:
    for words in (("DEST", "--trust", "keys"), ("run", "DEST", "--trust", "keys"), ("--trust", "keys", "DEST")):
        found = run(*words)
        assert isinstance(found.exception, ConfigError), found.output
        assert "the line is encrypted by a certificate" in str(found.exception)
    home = str(tmp_path / "home")
    added = run("token", "add", "desk", "--home", home)
    assert added.exit_code == 0
    assert added.output.startswith("fedllm-")
    assert run("token", "list", "--home", home).output.startswith("desk  since ")
    assert "refused" in run("token", "revoke", "desk", "--home", home).output
    assert "nobody has a token" in run("token", "list", "--home", home).output
    for words in ((), ("--help",), ("token", "--help"), ("run", "--help"), ("units", "--help")):
        assert "Usage:" in run(*words).output


def test_a_missing_library_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "uvicorn" else name)
    found = run("DEST", "--trust", "keys", "--plaintext")
    assert str(found.exception) == "uvicorn missing here. Install what serving needs: pip install 'fedllm[serve]'"


def test_what_does_not_verify_promises_too_little_or_has_no_tokens_is_refused_before_it_is_loaded(
    tiny_release: Released,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedllm.release.loading.load_release", lambda *_: pytest.fail("it was loaded"))
    for name, value in command._QUIET.items():  # the command sets them for good
        monkeypatch.setenv(name, value)
    words = [str(tiny_release.folder), "--trust", str(tiny_release.trust), "--home", str(tmp_path), "--plaintext"]
    found = run(*words)
    assert "nobody has a token" in str(found.exception)
    found = run(*words, "--max-epsilon", "1")
    assert isinstance(found.exception, ReleaseError)
    assert "--max-epsilon=1 permits less" in str(found.exception)
    found = run(*words, "--host", "0.0.0.0")
    assert "not its loopback" in str(found.exception)
    others = tmp_path / "others.txt"
    others.write_text(f"head-office {'AB' * 20}\n")
    found = run(str(tiny_release.folder), "--trust", str(others), "--plaintext")
    assert "not a key that you trust as head-office" in str(found.exception)
    for ways in (("--plaintext", "--office", "x"), ("--tls-cert", "x", "--plaintext"), ()):
        found = run(str(tiny_release.folder), "--trust", str(tiny_release.trust), *ways)
        assert "One of them" in str(found.exception)


def test_the_service_has_a_user_of_its_own_and_sees_no_records(tmp_path: Path) -> None:
    to, site = tmp_path / "units", tmp_path / "site"
    done = run(
        "units", "/srv/release", "--trust", "/srv/keys", "--tls-cert", "/srv/c.pem", "--tls-key", "/srv/k.pem", "--to",
        str(to), "--user", "daemon", "--hide", str(site), "--port", "8500",
    )  # fmt: skip
    assert done.exit_code == 0, done.exception
    assert "sudo -u daemon fedllm serve token add NAME --home /var/lib/fedllm-serve" in done.output
    assert sorted(path.name for path in to.iterdir()) == ["Dockerfile", "compose.yaml", "fedllm-serve.service"]
    unit = settings(to / "fedllm-serve.service")
    assert unit["User"] == ["daemon"]
    assert unit["ReadWritePaths"] == ["/var/lib/fedllm-serve"]
    assert unit["InaccessiblePaths"] == [f"-{site}"]
    assert (unit["LimitCORE"], unit["MemorySwapMax"], unit["NoNewPrivileges"]) == (["0"], ["0"], ["yes"])
    assert "serve run /srv/release --trust /srv/keys --tls-cert /srv/c.pem --tls-key /srv/k.pem" in unit["ExecStart"][0]
    import yaml

    (container,) = yaml.safe_load((to / "compose.yaml").read_text())["services"].values()
    assert container["ports"] == ["8500:8500"]
    assert "/srv/release:/srv/release:ro" in container["volumes"]
    assert not [volume for volume in container["volumes"] if str(site) in volume]
    assert '"$(echo /install/fedllm-*.whl)[serve]"' in (to / "Dockerfile").read_text()


@pytest.fixture
def place(tmp_path: Path, tiny_release: Released) -> Path:  # noqa: F811
    """A place from which a release was served, by a process that is gone."""
    home, ca = tmp_path / "home", make_ca("house", 400)
    add_token(home / TOKENS, "desk")
    pair = make_server_certificate(ca, ["127.0.0.1"], 300)
    write_secret(tmp_path / "key.pem", pair.key)
    (tmp_path / "cert.pem").write_bytes(pair.certificate)
    note(home, tiny_release, tmp_path, 1)
    return home


def note(home: Path, released: Released, files: Path, port: int) -> None:
    noted = {
        "release": str(released.folder), "trust": str(released.trust), "url": f"https://127.0.0.1:{port}",
        "pid": 2**22 + 1, "certificate": str(files / "cert.pem"), "key": str(files / "key.pem"),
    }  # fmt: skip
    write_secret(home / SERVING, json.dumps(noted).encode())


def found(home: Path, level: str) -> str:
    return "\n".join(one.text for one in examine(home) if one.level == level)


def test_the_doctor_looks_at_tokens_release_certificate_and_process(place: Path, tiny_release: Released) -> None:  # noqa: F811
    assert found(place, "ERROR") == ""
    said = found(place, "ok")
    assert "tokens: of desk" in said
    assert "tiny in" in said
    assert "epsilon 2.5" in said
    assert "the certificate to serve with ends on" in said
    assert "nothing answers at https://127.0.0.1:1" in found(place, "warning")
    done = CliRunner().invoke(app, ["doctor", "--home", str(place)])
    assert done.exit_code == 0, done.output

    (place / TOKENS).chmod(0o644)
    (place.parent / "key.pem").chmod(0o644)
    assert "tokens.json has mode 644" in found(place, "ERROR")
    assert "key.pem has mode 644" in found(place, "warning")
    (place / SERVING).write_bytes(b"{}")
    assert "Start the server again" in found(place, "ERROR")


def test_the_doctor_asks_the_server_that_runs_and_knows_its_certificate(place: Path, tiny_release: Released) -> None:  # noqa: F811
    files = place.parent
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files / "cert.pem", files / "key.pem")
    body = b'{"status":"ok"}'

    def answer(opened: socket.socket, text: bytes) -> None:
        plain, _ = opened.accept()
        with context.wrap_socket(plain, server_side=True) as line:
            line.recv(1000)
            line.sendall(text)

    for text, expected in (
        (b"HTTP/1.1 200 OK\r\n\r\n" + body, "answers, over TLS 1.3"),
        (b"HTTP/1.1 503 No\r\n\r\n{}", "does not answer as it should"),
    ):
        with socket.create_server(("127.0.0.1", 0)) as opened:
            thread = threading.Thread(target=answer, args=(opened, text))
            thread.start()
            note(place, tiny_release, files, opened.getsockname()[1])
            results = examine(place)
            thread.join()
        assert [one for one in results if expected in one.text], results


def test_a_place_without_anything_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FedllmError, match="nor a served model's"):
        raise CliRunner().invoke(app, ["doctor", "--home", str(tmp_path)]).exception or AssertionError
