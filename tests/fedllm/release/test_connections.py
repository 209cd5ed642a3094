"""Connections to a served model, as sockets: who sends nothing more holds none."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.responses import PlainTextResponse

from fedllm.crypto.certificates import make_ca, make_server_certificate
from fedllm.files import replace_file
from fedllm.release import serve


async def _answered(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("refused", 401)(scope, receive, send)


@asynccontextmanager
async def _serving(room: int = 100) -> AsyncIterator[tuple[str, int]]:
    """Serve at a free port; gives the address."""
    opened = serve.listen("127.0.0.1", 0)
    config = uvicorn.Config(
        _answered,
        http=serve._Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        timeout_keep_alive=1,
        limit_concurrency=room,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve([opened]))
    try:
        yield opened.getsockname()
    finally:
        server.should_exit = True
        await serving
        opened.close()


async def _after(sent: bytes, drip: bytes) -> bytes:
    """Send, then `drip` again and again until the server closes the connection; returns what it said."""
    async with _serving() as place:
        reader, writer = await asyncio.open_connection(*place)
        writer.write(sent)
        said = asyncio.create_task(reader.read())
        try:
            async with asyncio.timeout(60):
                while not said.done():
                    writer.write(drip)
                    await asyncio.wait({said}, timeout=0.05)
            return said.result()
        except ConnectionError:
            return b""
        finally:
            writer.close()


@pytest.mark.parametrize(
    ("sent", "drip"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n", b"X: y\r\n"),  # a head without end
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),  # a body without end
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 999999\r\n\r\n", b"x"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 999999\r\n\r\nx", b""),
        (b"", b""),
    ],
)
def test_a_client_without_a_token_holds_no_connection(
    sent: bytes, drip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_HEAD_PATIENCE", 0.3)
    asyncio.run(_after(sent, drip))


@pytest.mark.parametrize("said", [b"", b"GET", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx"])
def test_clients_that_hold_every_place_without_asking_lock_nobody_out(said: bytes) -> None:
    async def whole() -> bytes:
        async with _serving(room=4) as place:
            held = [await asyncio.open_connection(*place) for _ in range(12)]
            for _, writer in held:
                writer.write(said)
            await asyncio.sleep(0)
            reader, writer = await asyncio.open_connection(*place)
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            async with asyncio.timeout(60):
                found = await reader.read()
            for _, each in (*held, (reader, writer)):
                each.close()
            return found

    assert asyncio.run(whole()).startswith(b"HTTP/1.1 401")


def test_a_certificate_that_does_not_fit_its_key_leaves_the_one_that_is_in_use(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    authority = make_ca("office", 9)
    first, second = (make_server_certificate(authority, ["localhost"], 9) for _ in range(2))
    certificate.write_bytes(first.certificate)
    key.write_bytes(first.key)
    held = serve._Certificate(certificate, key, None)
    replace_file(certificate, second.certificate)  # as a renewal that was cut off in its middle
    held.renew()
    assert _shown(held.context) == ssl.PEM_cert_to_DER_cert(first.certificate.decode())
    replace_file(key, second.key)
    held.renew()
    assert _shown(held.context) == ssl.PEM_cert_to_DER_cert(second.certificate.decode())


def _shown(context: ssl.SSLContext) -> bytes | None:
    """Return the certificate that a server's context shows, after a whole handshake in memory."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    client = trusting.wrap_bio(back, there)
    server = context.wrap_bio(there, back, server_side=True)
    for side in (client, server, client, server):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return client.getpeercert(binary_form=True)
