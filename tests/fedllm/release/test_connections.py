"""Connections to a served model, as sockets: who sends nothing more holds none."""

import asyncio
from typing import Any

import pytest
import uvicorn
from starlette.responses import PlainTextResponse

from fedllm.release import serve


async def _answered(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("refused", 401)(scope, receive, send)


async def _after(sent: bytes, drip: bytes) -> bytes:
    """Send, then `drip` again and again until the server closes the connection; returns what it said."""
    opened = serve.listen("127.0.0.1", 0)
    config = uvicorn.Config(
        _answered, http=serve._Protocol, ws="none", lifespan="off", log_config=None, timeout_keep_alive=0.5
    )  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve([opened]))
    reader, writer = await asyncio.open_connection(*opened.getsockname())
    try:
        writer.write(sent)
        said = asyncio.create_task(reader.read())
        async with asyncio.timeout(60):
            while not said.done():
                writer.write(drip)
                await asyncio.wait({said}, timeout=0.05)
        return said.result()
    except ConnectionError:
        return b""
    finally:
        writer.close()
        server.should_exit = True
        await serving
        opened.close()


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
