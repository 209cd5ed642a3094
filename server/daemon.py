"""The server's daemon: keeps the sites' streams, carries over them what runs ask, and starts the runs' processes.

It opens no message and loads no model. Sites come in at one port, over mutual TLS 1.3; the server's own commands and
runs by a unix socket that its user alone may open. What it holds in memory is bounded, whatever a peer does: a few
parts of a megabyte for each connection.
"""

import asyncio
import contextlib
import logging
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import grpc
import grpc.aio

import fedllm
from fedllm.crypto import certificates
from fedllm.errors import ConfigError, CryptoError, FedllmError, MessageError
from fedllm.files import make_socket, stamp
from fedllm.protocol.link import (
    AHEAD,
    CONTROL,
    HELLO,
    LINK,
    SERVER_OPTIONS,
    VERSION,
    milliseconds,
    plain,
    read,
    told_to_end,
)
from fedllm.protocol.link_pb2 import (
    Answer,
    Cancel,
    Connected,
    End,
    FromSite,
    Hello,
    Nothing,
    Part,
    Refusal,
    Refused,
    Request,
    Run,
    Sites,
    ToSite,
    Welcome,
)
from fedllm.values import address
from server.federation import HeadOffice
from server.roster import Roster, RosterEntry

_log = logging.getLogger("fedllm.server")
_LOOK = 1.0  # seconds between looks at roster and certificates
_HANDSHAKE = 10_000  # milliseconds in which a connection must have shown its certificate
_REFUSALS_KEPT = 100
_GRACE = 1.0  # seconds for streams when the port is closed
_PORT = [
    *SERVER_OPTIONS,
    ("grpc.server_handshake_timeout_ms", _HANDSHAKE),
    ("grpc.max_concurrent_streams", 2),  # of a connection: one is needed
    ("grpc.max_metadata_size", 8192),
]
_Code = grpc.StatusCode
_Context = grpc.aio.ServicerContext[bytes, bytes]


class _Over(Exception):
    """A site's connection has ended."""


class _Link:
    """One site's stream."""

    def __init__(self, member: RosterEntry, key: str, address: str) -> None:
        self.site, self.key, self.address = member.site, key, address
        self.since, self.software, self.ahead = milliseconds(), "", 0
        self.outgoing: asyncio.Queue[ToSite] = asyncio.Queue(AHEAD)
        self.answers: dict[bytes, asyncio.Queue[Part | Refusal | None]] = {}
        self.ended: asyncio.Future[tuple[grpc.StatusCode, str]] = asyncio.get_running_loop().create_future()

    def end(self, code: grpc.StatusCode, text: str) -> None:
        """End the stream, and say why."""
        if not self.ended.done():
            self.ended.set_result((code, text))

    async def send(self, frame: ToSite) -> None:
        """Send a frame as soon as the site takes it; raises _Over."""
        if not self.ended.done():
            await self.outgoing.put(frame)
        if self.ended.done():
            raise _Over

    async def write(self, context: _Context) -> None:
        """Write what is to be sent, for ever."""
        while True:
            await context.write((await self.outgoing.get()).SerializeToString())

    async def read(self, context: _Context) -> None:
        """Hand the site's answers to whoever asked, until it ends the stream; raises MessageError."""
        while isinstance(data := await context.read(), bytes):
            frame = read(FromSite, data)
            kind = frame.WhichOneof("frame")
            if kind not in ("answer", "refusal"):
                raise MessageError(f"a frame of kind {kind}, expected an answer")
            found: Part | Refusal = frame.answer if kind == "answer" else frame.refusal
            if (answer := self.answers.get(found.id)) is not None:  # else nobody waits for it any more
                await answer.put(found)

    def expect(self, id_: bytes) -> asyncio.Queue[Part | Refusal | None]:
        """Return where the answer to a request arrives; whoever asked the same before gets none."""
        self.forget(id_)
        self.answers[id_] = asyncio.Queue(AHEAD)
        return self.answers[id_]

    def forget(self, id_: bytes) -> None:
        """Expect the answer no more."""
        if (answer := self.answers.pop(id_, None)) is not None:
            _give_up(answer)

    def close(self) -> None:
        """Tell everybody who waits for this site."""
        self.end(_Code.UNAVAILABLE, "the connection has ended")
        for id_ in list(self.answers):
            self.forget(id_)
        while not self.outgoing.empty():  # whoever waits to send wakes up
            self.outgoing.get_nowait()


def _give_up(answer: asyncio.Queue[Part | Refusal | None]) -> None:
    """Wake up whoever fills or reads a queue."""
    while not answer.empty():
        answer.get_nowait()
    answer.put_nowait(None)


class Daemon:
    """What is connected, and who may be."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._links: dict[str, _Link] = {}
        self._refused: dict[str, Refused] = {}
        self._roster = Roster.load(home / "roster.json")
        self._runs: list[subprocess.Popen[bytes]] = []

    # ---- the port ----------------------------------------------------------------------------------------------------

    async def connect(self, _: object, context: _Context) -> None:
        """Keep a site's stream."""
        try:  # first: a stream that is ended before the other end has said something tells it no reason
            async with asyncio.timeout(HELLO):
                first: object = await context.read()
        except TimeoutError:
            await context.abort(_Code.DEADLINE_EXCEEDED, f"no hello within {HELLO:.0f} s")
        member, key = await self._admit(context)
        try:
            hello = read(FromSite, first).hello if isinstance(first, bytes) else Hello()
        except MessageError as error:
            await self._refuse(context, member.site, _Code.INVALID_ARGUMENT, str(error))
        if hello.version != VERSION:
            text = f"version {hello.version} of the link, and the server speaks {VERSION}. Install the same fedllm"
            await self._refuse(context, member.site, _Code.FAILED_PRECONDITION, text)
        link = _Link(member, key, context.peer())
        link.software, link.ahead = plain(hello.software)[:40], hello.clock - link.since
        if (before := self._links.get(link.site)) is not None:
            text = f"{link.site} has connected again from {link.address}: the newest connection counts"
            _log.warning("%s", text)
            before.end(_Code.ABORTED, text)
        self._links[link.site] = link
        _log.info("%s is connected from %s", link.site, link.address)
        welcome = Welcome(software=fedllm.__version__, clock=milliseconds())
        await context.write(ToSite(welcome=welcome).SerializeToString())
        try:
            await self._keep(link, context)
        finally:
            link.close()
            if self._links.get(link.site) is link:
                del self._links[link.site]
            _log.info("%s has gone: %s", link.site, link.ended.result()[1])

    async def _keep(self, link: _Link, context: _Context) -> None:
        """Read and write until the stream is over."""
        reading, writing = asyncio.create_task(link.read(context)), asyncio.create_task(link.write(context))
        try:
            await asyncio.wait((reading, writing, link.ended), return_when=asyncio.FIRST_COMPLETED)
            failed = reading.exception() if reading.done() and not reading.cancelled() else None
            if isinstance(failed, MessageError):
                link.end(_Code.INVALID_ARGUMENT, str(failed))
            link.end(_Code.UNAVAILABLE, "it has ended the connection")
        finally:
            for task in (reading, writing):
                task.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)
        code, text = link.ended.result()
        end = ToSite(end=End(text=text, displaced=code is _Code.ABORTED))
        with contextlib.suppress(TimeoutError, grpc.aio.UsageError, grpc.aio.InternalError):
            async with asyncio.timeout(_GRACE):  # whoever is writing hears nothing but frames
                await context.write(end.SerializeToString())
                while isinstance(await context.read(), bytes):
                    pass
        await context.abort(code, text)

    async def _admit(self, context: _Context) -> tuple[RosterEntry, str]:
        """Return the roster entry that a connection's certificate belongs to, and its key; or end the connection."""
        shown: dict[str, Any] = dict(context.auth_context())  # property -> values, bytes
        name = plain(shown.get("x509_common_name", (b"?",))[0].decode("utf-8", "replace"))
        try:
            key = certificates.certified_key(shown.get("x509_pem_cert", (b"",))[0])
        except CryptoError:
            key = ""
        member = self._roster.of_link_key(key)
        if member is None:
            text = "no site of the roster has this certificate's key: it was retired, or never admitted"
            await self._refuse(context, name, _Code.UNAUTHENTICATED, text)
        if member.revoked_at is not None:
            await self._refuse(context, member.site, _Code.PERMISSION_DENIED, _revoked(member))
        return member, key

    async def _refuse(self, context: _Context, site: str, code: grpc.StatusCode, text: str) -> NoReturn:
        before = self._refused.pop(site, None)
        times = before.times + 1 if before is not None else 1
        if before is None or before.text != text:
            _log.warning("%s (%s) is refused: %s", site, context.peer(), text)
        self._refused[site] = Refused(site=site, text=text, at=milliseconds(), times=times)
        while len(self._refused) > _REFUSALS_KEPT:
            del self._refused[next(iter(self._refused))]
        await context.abort(code, text)

    def look_at_roster(self) -> None:
        """Read the roster anew, and end the streams of those who are no longer in it."""
        self._roster = Roster.load(self._home / "roster.json")
        for link in list(self._links.values()):
            member = self._roster.of_link_key(link.key)
            if member is None:
                link.end(_Code.UNAUTHENTICATED, "this key of the site was retired")
            elif member.revoked_at is not None:
                link.end(_Code.PERMISSION_DENIED, _revoked(member))

    # ---- the socket --------------------------------------------------------------------------------------------------

    async def ask(self, _: object, context: _Context) -> None:
        """Carry one request to a site, and its answer back."""
        asked = Request.FromString(await context.read())
        link, id_ = self._links.get(asked.site), asked.part.id
        if self._roster.find(asked.site) is None:  # it will not come back
            await _say_last(context, Answer(refused=f"{asked.site} is not in the roster"))
            return
        if link is None:
            await _say_last(context, Answer(gone=f"{asked.site} is not connected"))
            return
        answer = link.expect(id_)
        over = asyncio.Event()
        sending = asyncio.create_task(_send(link, asked, context, over))
        left = -1
        try:
            while left:
                match await answer.get():
                    case Part() as part:
                        left = (part.size if left < 0 else left) - len(part.data)
                        await context.write(Answer(part=part).SerializeToString())
                    case found:
                        left = 0
                        over.set()
                        gone = Answer(gone=f"the connection to {link.site} has ended")
                        why = gone if found is None else Answer(refused=plain(found.text))
                        await _say_last(context, why, sending)
        except grpc.aio.InternalError:  # whoever asked is gone a moment before this is cancelled
            raise asyncio.CancelledError from None
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            if link.answers.get(id_) is answer:
                link.forget(id_)
                if left and not link.outgoing.full():  # full: the site takes nothing, and notices when it does
                    link.outgoing.put_nowait(ToSite(cancel=Cancel(id=id_)))

    async def look(self, _: bytes, context: _Context) -> bytes:
        """Tell who is connected, and who was refused."""
        del context
        connected = [
            Connected(site=each.site, address=each.address, software=each.software, since=each.since, ahead=each.ahead)
            for each in self._links.values()
        ]
        return Sites(connected=connected, refused=self._refused.values()).SerializeToString()

    async def start(self, request: bytes, context: _Context) -> bytes:
        """Start the process of a run, which goes on if this daemon ends."""
        name = Run.FromString(request).name
        command = [sys.executable, "-m", "fedllm.cli", "server", "run", "--home", str(self._home), "--", name]
        log = self._home / "log" / "runs.log"
        try:
            log.parent.mkdir(mode=0o700, exist_ok=True)
            with log.open("ab") as file:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                )
        except OSError as error:
            await context.abort(_Code.INTERNAL, f"the run's process cannot be started: {error}")
        self._runs.append(process)
        _log.info("run %s: process %d", name, process.pid)
        return Nothing().SerializeToString()

    def look_at_runs(self) -> None:
        """Let go of processes that have ended."""
        self._runs = [each for each in self._runs if each.poll() is None]


def _revoked(member: RosterEntry) -> str:
    return f"{member.site} was revoked on {member.revoked_at:%Y-%m-%d}; the server may admit it anew, with new keys"


async def _say_last(context: _Context, frame: Answer, reading: "asyncio.Task[None] | None" = None) -> None:
    """Say why there is no answer, and wait until it was heard, and until whoever reads has ended: two may not."""
    await context.write(frame.SerializeToString())
    if reading is not None:
        await reading
    while isinstance(await context.read(), bytes):
        pass


async def _send(link: _Link, first: Request, context: _Context, over: asyncio.Event) -> None:
    """Send a request's parts to a site as they come in, until it is `over`."""
    part, left = first.part, first.part.size
    with contextlib.suppress(_Over):
        while True:
            left -= len(part.data)
            await link.send(ToSite(request=part))
            data = await context.read() if left > 0 and not over.is_set() else b""
            if over.is_set() or not data or not isinstance(data, bytes):
                return
            part = Request.FromString(data).part


# ---- serving ---------------------------------------------------------------------------------------------------------


def _server(service: str, handlers: Any, options: list[tuple[str, int]]) -> grpc.aio.Server:
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    return server


async def _open_port(daemon: Daemon, office: HeadOffice) -> grpc.aio.Server:
    server = _server(LINK, {"Connect": grpc.stream_stream_rpc_method_handler(daemon.connect)}, _PORT)
    authorities = b"".join(pair.certificate for pair in office.authorities)
    credentials = grpc.ssl_server_credentials(
        [(office.server.key, office.server.certificate)], authorities, require_client_auth=True
    )
    listen, port = office.config.listen, office.config.port
    try:
        server.add_secure_port(address(listen, port), credentials)
        await server.start()
    except RuntimeError:
        raise ConfigError(
            f"listen={listen}, port={port} in federation.yaml: cannot be opened. Is another program there? "
            f"ss -ltnp 'sport = :{port}'"
        ) from None
    return server


async def _open_socket(daemon: Daemon, socket: Path) -> grpc.aio.Server:
    unary = grpc.unary_unary_rpc_method_handler
    ask: Any = grpc.stream_stream_rpc_method_handler(daemon.ask)
    server = _server(CONTROL, {"Ask": ask, "Look": unary(daemon.look), "Start": unary(daemon.start)}, SERVER_OPTIONS)
    make_socket(socket, server.add_insecure_port)  # two daemons at once are kept out by the folder's lock
    await server.start()
    return server


async def serve(home: Path, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; raises FedllmError if that cannot begin."""
    _allow_many_connections()
    stop = told_to_end()
    office = HeadOffice.open(home)
    pairs = (office.server_certificate_file, office.ca_file)
    roster, keys = stamp(office.roster_file), stamp(*pairs)
    daemon = Daemon(home)
    socket = office.socket
    control, port = await _open_socket(daemon, socket), await _open_port(daemon, office)
    said = ""
    say(office.readiness())
    try:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _LOOK)
            daemon.look_at_runs()
            try:  # and if it fails, again
                if (now := stamp(office.roster_file)) != roster:
                    daemon.look_at_roster()
                    roster = now
                if (now := stamp(*pairs)) != keys:  # sites connect again, and what runs have asked is asked again
                    office = HeadOffice.open(home)
                    await port.stop(_GRACE)
                    port = await _open_port(daemon, office)
                    keys = now
                    say(f"the port shows its new certificate. {office.readiness()}")
                said = ""
            except (FedllmError, OSError) as error:
                if str(error) != said:
                    _log.warning("%s", error)
                said = str(error)
    finally:
        await port.stop(_GRACE)
        await control.stop(_GRACE)
        socket.unlink(missing_ok=True)


def _allow_many_connections() -> None:
    """Ask for as many open files as this user may have: one is needed for each connection."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
