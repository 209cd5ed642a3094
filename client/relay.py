"""A relay: a process of another user, which makes the connection for a site process that has no network.

It reads no frame that it carries. Its folder holds what opens the connection, and nothing that opens a message.
"""

import asyncio
import contextlib
import grp
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from pydantic import ValidationError

import fedllm
from client.link import Stream, outside
from client.office import Office
from fedllm.errors import ConfigError, FolderError, MessageError
from fedllm.files import check_private, make_socket, read, read_secret, write_secret
from fedllm.protocol.link import (
    CONNECT,
    LINK,
    OPTIONS,
    SERVER_OPTIONS,
    Payload,
    milliseconds,
    parts,
    plain,
    request_id,
    told_to_end,
)
from fedllm.protocol.link import read as parse
from fedllm.protocol.link_pb2 import End, FromSite, ToSite, Welcome
from fedllm.values import Frozen

_log = logging.getLogger("fedllm.site")
SETTINGS, KEY, CERTIFICATE, CA = "relay.json", "link", "link.pem", "ca.pem"
_LIMIT = 1 << 36  # bytes of an answer
_DISPLACED = "the site has connected to the relay again: the newest connection counts"


class RelaySettings(Frozen):
    """What the relay's side of a site knows."""

    address: str  # HOST:PORT of the server
    socket: str  # where the site process comes in
    group: str | None = None  # that may, beside the relay's user


def export_relay_folder(office: Office, folder: Path) -> None:
    """Write the relay's folder: all that it needs, and nothing that opens a message or a record."""
    if office.socket is None:
        raise ConfigError("site.yaml: a relay needs socket, such as /run/fedllm/link.sock, and socket_group")
    own = RelaySettings(address=office.address, socket=str(office.socket), group=office.config.socket_group)
    link = office.in_use.link_file
    write_secret(folder / KEY, read_secret(link))
    write_secret(folder / CERTIFICATE, read(link.with_suffix(".pem")))
    write_secret(folder / CA, read(office.ca_file))
    write_secret(folder / SETTINGS, own.model_dump_json(indent=2).encode() + b"\n")


def read_relay(folder: Path) -> RelaySettings:
    """Read a relay's folder; raises FolderError."""
    check_private(folder)
    try:
        return RelaySettings.model_validate_json(read_secret(folder / SETTINGS))
    except ValidationError:
        raise FolderError(
            f"{folder / SETTINGS} is damaged. Make it again, as the site's user: fedllm site export-relay {folder}"
        ) from None


class _Relay:
    """One connection of the site process, and one to the server, at a time."""

    def __init__(self, folder: Path, settings: RelaySettings) -> None:
        self._address, self._credentials, self._explain = outside(settings.address, folder / CA, folder / KEY)
        self._present: asyncio.Future[None] | None = None
        self._said = ""

    async def connect(self, _: object, context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
        """Carry frames both ways until one end is over; the other is then told what the first one said."""
        if self._present is not None and not self._present.done():
            self._present.set_result(None)
        displaced = self._present = asyncio.get_running_loop().create_future()
        async with grpc.aio.secure_channel(self._address, self._credentials(), OPTIONS) as channel:
            stream: Stream = channel.stream_stream(CONNECT)()
            out = asyncio.create_task(_pump(context.read, stream.write))
            back = asyncio.create_task(_pump(stream.read, context.write))
            try:
                await asyncio.wait((out, back, displaced), return_when=asyncio.FIRST_COMPLETED)
                error = back.exception() if back.done() else None
                error = error or (out.exception() if out.done() else None)
            finally:
                for task in (out, back):
                    task.cancel()
                await asyncio.gather(out, back, return_exceptions=True)
        if displaced.done():
            end = ToSite(end=End(text=_DISPLACED, displaced=True))
            with contextlib.suppress(grpc.aio.UsageError, grpc.aio.InternalError):
                await context.write(end.SerializeToString())
            await context.abort(grpc.StatusCode.ABORTED, _DISPLACED)
        if isinstance(error, grpc.aio.AioRpcError):
            text = plain(error.details() or error.code().name)
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                text = await asyncio.to_thread(self._explain) or text
            if text != self._said:
                _log.warning("not connected: %s", text)
            self._said = text
            await context.abort(error.code(), text)
        self._said = ""


def ask(socket: Path, group: str | None, request: bytes, seconds: float) -> bytes:
    """Hand one request to the site's process, as the server's end of the link, and return the answer.

    For a Flower ClientApp, in whose place a relay would be. Raises MessageError if the site gives no answer, and
    TimeoutError if it does not connect or answer in time.
    """
    return asyncio.run(asyncio.wait_for(_ask(socket, group, request), seconds))


async def _ask(socket: Path, group: str | None, request: bytes) -> bytes:
    found: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def connect(_: object, context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
        try:
            answer = await _exchange(context, request)
        except MessageError as error:
            if not found.done():
                found.set_exception(error)
        else:
            if not found.done():
                found.set_result(answer)

    server = _server(connect)
    _bind(server, socket, group)
    await server.start()
    try:
        return await found
    finally:
        await server.stop(1.0)
        with contextlib.suppress(OSError):
            socket.unlink()


async def _exchange(context: "grpc.aio.ServicerContext[bytes, bytes]", request: bytes) -> bytes:
    id_, payload = request_id(request), None
    welcome = ToSite(welcome=Welcome(software=fedllm.__version__, clock=milliseconds()))
    await context.read()  # the hello, of whoever may open the socket
    await context.write(welcome.SerializeToString())
    for part in parts(id_, request):
        await context.write(ToSite(request=part).SerializeToString())
    while isinstance(data := await context.read(), bytes):
        frame = parse(FromSite, data)
        if frame.WhichOneof("frame") == "refusal" and frame.refusal.id == id_:
            raise MessageError(frame.refusal.text)
        if frame.WhichOneof("frame") == "answer" and frame.answer.id == id_:
            payload = payload or Payload(frame.answer, _LIMIT)
            if (whole := payload.add(frame.answer)) is not None:
                return whole
    raise MessageError("the site's process has ended the connection")


async def _pump(take: Callable[[], Awaitable[Any]], give: Callable[[bytes], Awaitable[Any]]) -> None:
    """Carry frames one way, each when the one before it was taken."""
    while isinstance(frame := await take(), bytes):
        await give(frame)


async def serve(folder: Path) -> None:
    """Relay until SIGTERM or SIGINT; raises FedllmError if that cannot begin."""
    stop = told_to_end()
    settings = read_relay(folder)
    relay, socket = _Relay(folder, settings), Path(settings.socket)
    server = _server(relay.connect)
    _bind(server, socket, settings.group)
    await server.start()
    _log.info("the relay listens on %s", socket)
    await stop.wait()
    await server.stop(1.0)
    with contextlib.suppress(OSError):
        socket.unlink()


def _server(connect: Callable[[object, Any], Awaitable[None]]) -> grpc.aio.Server:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    handlers: Any = {"Connect": grpc.stream_stream_rpc_method_handler(connect)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(LINK, handlers),))
    return server


def _bind(server: grpc.aio.Server, socket: Path, group: str | None) -> None:
    """Make the socket for this user, and a group if one is named; raises ConfigError if it cannot be made."""
    try:
        number = grp.getgrnam(group).gr_gid if group else None
    except KeyError:
        raise ConfigError(f"socket_group={group}: there is no such group on this machine") from None
    make_socket(socket, server.add_insecure_port, number)
