"""`fedllm doctor`, of the place of a served model: tokens, release, certificate, and whether it answers."""

import json
import socket
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ValidationError

from fedllm.audit.trust import Trust
from fedllm.crypto.certificates import read_certificates
from fedllm.errors import FolderError
from fedllm.files import check_private, read, read_secret
from fedllm.ops.health_checks import (
    CheckResult,
    access,
    certificate,
    clock,
    failure,
    ok,
    run_checks,
    versions,
    warning,
)
from fedllm.release.manifest import verify_release
from fedllm.release.tokens import TOKENS, read_tokens
from fedllm.values import Frozen

SERVING = "serving.json"
_PATIENCE = 5.0  # seconds
_RENEW = "install a new certificate in its place, such as that of a new grant; a running server takes it up"


class Serving(Frozen):
    """What was served last from a place, as the process wrote it down."""

    release: str
    trust: str
    url: str
    pid: int
    certificate: str | None
    key: str | None


def examine(folder: Path) -> list[CheckResult]:
    """Look at the place of a served model; changes nothing."""
    found = run_checks(
        lambda: access(folder, [folder / name for name in (TOKENS, SERVING)]), lambda: _tokens(folder / TOKENS)
    )
    file = folder / SERVING
    if not file.exists():
        return [*found, warning("serving: nothing was served from here yet. Start it: fedllm serve DEST --trust KEYS")]
    try:
        served = Serving.model_validate_json(read_secret(file))
    except (ValidationError, FolderError):
        return [*found, failure(f"{file} cannot be used. Start the server again: it writes it anew.")]
    return [
        *found,
        *run_checks(
            lambda: _release(served), lambda: _certificate(served), lambda: _answers(served), lambda: clock(None, ""),
            versions,
        ),
    ]  # fmt: skip


def _tokens(file: Path) -> list[CheckResult]:
    tokens = read_tokens(file)
    if not tokens:
        return [warning("tokens: nobody has one. Unless client certificates are demanded: fedllm serve token add NAME")]
    return [ok(f"tokens: of {', '.join(sorted(tokens))}")]


def _release(served: Serving) -> list[CheckResult]:
    manifest = verify_release(Path(served.release), Trust.read(Path(served.trust)))
    privacy = manifest.privacy
    text = f"release: {manifest.name} in {served.release} verifies, every file"
    if not privacy.private:
        return [warning(f"{text}; it is NOT PRIVATE")]
    return [ok(f"{text}; {privacy.said} for a {privacy.unit}")]


def _certificate(served: Serving) -> list[CheckResult]:
    if served.certificate is None or served.key is None:
        return [warning("certificate: none; the line is plaintext, on loopback only")]
    facts = read_certificates(read(Path(served.certificate)))[0]
    found = [certificate("the certificate to serve with", facts, _RENEW)]
    try:
        check_private(Path(served.key))
    except FolderError as error:
        found.append(warning(str(error)))
    return found


def _answers(served: Serving) -> list[CheckResult]:
    """Ask for the server's health, as a client without a name."""
    parts = urlsplit(served.url)
    host, port = parts.hostname or "", parts.port or 0
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # that is where it listens
    try:
        line: socket.socket = socket.create_connection((host, port), timeout=_PATIENCE)
    except OSError as error:
        alive = Path(f"/proc/{served.pid}").exists()
        text = f"serving: nothing answers at {served.url} ({error.strerror or error})"
        remedy = "Look at its log." if alive else "Start it: fedllm serve DEST --trust KEYS"
        return [(failure if alive else warning)(f"{text}. {remedy}")]
    with line:
        if served.certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is compared instead
            try:
                line = context.wrap_socket(line)
            except OSError as error:
                return [failure(f"serving: {served.url} does not speak TLS 1.3 ({error}). Is it another program?")]
            shown = ssl.DER_cert_to_PEM_cert(line.getpeercert(binary_form=True) or b"")
            own = read_certificates(read(Path(served.certificate)))[0]
            if read_certificates(shown.encode())[0].fingerprint != own.fingerprint:
                return [failure(f"serving: {served.url} shows another certificate than {served.certificate}.")]
        with line:
            return [_health(served, line)]


def _health(served: Serving, line: socket.socket) -> CheckResult:
    try:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b""
        while (piece := line.recv(4096)) and len(answer) < 1 << 16:
            answer += piece
    except ssl.SSLError:
        return ok(f"serving: {served.url} speaks TLS 1.3 with the expected certificate, and demands one of clients")
    except OSError as error:
        return failure(f"serving: {served.url} breaks off ({error}). Look at its log.")
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " in head.split(b"\r\n")[0] and json.loads(body or b"{}").get("status") == "ok":
        return ok(f"serving: {served.url} answers" + (", over TLS 1.3" if served.certificate else ""))
    return failure(f"serving: {served.url} does not answer as it should. Start it again, and look at its log.")
