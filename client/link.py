"""A site's stream to the server: it dials out, takes requests in, and sends answers back. Runs nothing it is sent.

Every request has an id, the digest of its bytes. The same request, asked again after a connection was lost, gets the
answer that is under way, or that was given; it is handed to the site once.

**While the site works on a request, nothing leaves.** This loop shares interpreter and cores with the training, so how
soon it says anything tells whether the site still trains, whatever `policy.reply_quantum` says. So requests are handed
over one at a time, and from then until the site returns, which it does at a moment that tells nothing (`Site.handle`):

- no frame is written: answers and refusals wait, and what was to be said before has been said (`_answer`);
- no frame is asked for, as that moves HTTP/2's window, which the other end sees. The one that was asked for before may
  still come; it may be the cancellation of this request (`_listen`);
- no connection is closed, looked into or made (`_connection`).

gRPC's own threads answer pings and take bytes in meanwhile; they wait for cores, not for the interpreter.
"""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import grpc
import grpc.aio
from pydantic import ValidationError

import fedllm
from fedllm.crypto.primitives import random_bytes
from fedllm.errors import Cancelled, FedllmError, MessageError
from fedllm.files import read as read_file
from fedllm.files import read_secret, write_secret
from fedllm.ops.tls_probe import explain_failure, probe_tls
from fedllm.protocol.link import (
    AHEAD,
    CONNECT,
    HELLO,
    ID,
    OPTIONS,
    VERSION,
    Payload,
    milliseconds,
    parts,
    plain,
    read,
    request_id,
)
from fedllm.protocol.link_pb2 import FromSite, Hello, Part, Refusal, ToSite
from fedllm.values import Frozen

_log = logging.getLogger("fedllm.site")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 15.0  # seconds until it connects again; doubled each time, then drawn below that
_LONGEST_NEAR = 1.0  # seconds, of a socket on the same machine
_DISPLACED = 60.0  # seconds where another process has connected with this site's key
_AT_ONCE = 4  # requests that are in hand; more are told to come again
_TOO_MANY = f"{_AT_ONCE} requests are in hand here; ask again later"
_KEPT = 4  # answers that were given last
_CLOCK = 60_000  # milliseconds by which clocks may differ until it is said

Stream = grpc.aio.StreamStreamCall[bytes, bytes]
Handler = Callable[[bytes, threading.Event], bytes]  # a sealed request, and whether anybody still waits


class _Displaced(MessageError):
    """Another process has connected with this site's key."""


class LinkState(Frozen):
    """What the link last knew, for `fedllm doctor`."""

    state: Literal["connecting", "connected"]
    since: int  # milliseconds since 1970 UTC
    text: str = ""  # why it is not connected
    ahead: int = 0  # by how many milliseconds this clock is ahead of the server's


def read_state(path: Path) -> LinkState | None:
    """Return what the link wrote last, None if there is nothing."""
    try:
        return LinkState.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError, ValidationError):
        return None


@dataclass
class _InHand:
    """A request that was taken."""

    stop: threading.Event = field(default_factory=threading.Event)
    begun: bool = False
    answer: bytes | str | None = None  # text says why there is none


class SiteLink:
    """Keeps one connection, and answers what comes in on it."""

    def __init__(
        self,
        target: str,
        credentials: Callable[[], grpc.ChannelCredentials | None],
        explain: Callable[[], str],
        handle: Handler,
        limit: int,
        state: Path,
    ) -> None:
        """`target` is HOST:PORT, or a relay's unix socket, which needs no `credentials`; `limit` is a request's, bytes.

        `handle` is called from a thread, once at a time. `explain` says, in a thread, why there is no connection.
        """
        self._target, self._credentials, self._handle, self._limit = target, credentials, handle, limit
        self._state, self._explain, self._said = state, explain, ""
        self._away = 0  # milliseconds since 1970 UTC: since when it is not connected, 0 while it is
        self._in_hand: dict[bytes, _InHand] = {}
        self._arriving: dict[bytes, Payload] = {}
        self._longest = _LONGEST_NEAR if target.startswith("unix:") else _LONGEST_PAUSE
        self._outgoing: asyncio.Queue[FromSite] | None = None  # of the present connection
        self._thread = ThreadPoolExecutor(1, "site")
        self._turn = asyncio.Lock()  # of the request that is worked on, and answered
        self._voice = asyncio.Lock()  # of who writes a frame, or works so that nobody may
        self._at_rest = asyncio.Event()  # the site works on nothing
        self._at_rest.set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        """Whether a request is in hand."""
        return any(each.answer is None for each in self._in_hand.values())

    async def run(self, stop: asyncio.Event) -> None:
        """Connect, and connect again, until `stop`."""
        pause = _FIRST_PAUSE
        while not stop.is_set():
            began, connection = time.monotonic(), asyncio.create_task(self._connection())
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait((connection, stopped), return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                connection.cancel()
                await asyncio.gather(connection, return_exceptions=True)
                break
            least = await self._why(connection)
            pause = _FIRST_PAUSE if time.monotonic() - began > _LONGEST_PAUSE else min(2 * pause, self._longest)
            await asyncio.wait((stopped,), timeout=max(least, pause * (0.5 + random_bytes(1)[0] / 512)))
            stopped.cancel()
        for each in self._in_hand.values():
            each.stop.set()

    async def drained(self, seconds: float) -> None:
        """Wait for what is in hand, at most so long."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _why(self, connection: "asyncio.Task[None]") -> float:
        """Note why a connection has ended; returns the least pause until the next."""
        error, text = connection.exception(), "the server has ended the connection"
        if isinstance(error, grpc.aio.AioRpcError):
            text = plain(error.details() or error.code().name)
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                text = await asyncio.to_thread(self._explain) or text
        elif isinstance(error, FedllmError | TimeoutError):
            text = str(error) or f"the server says nothing for {HELLO:.0f} s"
        elif error is not None:
            raise error
        if text != self._said:
            _log.warning("not connected: %s", text)
        self._said = text
        self._away = self._away or milliseconds()
        self._note(LinkState(state="connecting", since=self._away, text=text[:1000]))
        return _DISPLACED if isinstance(error, _Displaced) else 0.0

    def _note(self, state: LinkState) -> None:
        try:
            write_secret(self._state, state.model_dump_json().encode())
        except FedllmError as error:
            _log.warning("%s", error)

    async def _connection(self) -> None:
        """Connect, and take requests until the connection is over."""
        credentials = self._credentials()
        channel = (
            grpc.aio.insecure_channel(self._target, OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(self._target, credentials, OPTIONS)
        )
        async with channel:
            stream: Stream = channel.stream_stream(CONNECT)()
            hello = Hello(version=VERSION, software=fedllm.__version__, clock=milliseconds())
            await stream.write(FromSite(hello=hello).SerializeToString())
            async with asyncio.timeout(HELLO):  # not wait_for: it may overlook that this is to end (Python 3.11)
                first = await stream.read()
            if not isinstance(first, bytes):
                raise MessageError("the server has ended the connection")
            welcome = read(ToSite, first)
            if welcome.WhichOneof("frame") != "welcome":
                raise MessageError("the server does not speak this version of the link")
            ahead = milliseconds() - welcome.welcome.clock
            if abs(ahead) > _CLOCK:
                _log.warning("this clock and the server's differ by %d s: timedatectl set-ntp true", abs(ahead) // 1000)
            self._said, self._away = "", 0
            self._note(LinkState(state="connected", since=milliseconds(), ahead=ahead))
            _log.info("connected to the server")
            self._outgoing = outgoing = asyncio.Queue[FromSite](AHEAD)
            tasks = (asyncio.create_task(self._listen(stream)), asyncio.create_task(self._write(outgoing, stream)))
            try:
                await asyncio.wait(tasks[:1])
                await self._come_to_rest()
                await tasks[0]
            finally:
                for task in tasks:
                    task.cancel()
                self._outgoing = None
                self._arriving.clear()
                await asyncio.gather(*tasks, return_exceptions=True)
                while not outgoing.empty():  # whoever waits to send, or for what was sent, wakes up
                    outgoing.get_nowait()
                    outgoing.task_done()

    async def _come_to_rest(self) -> None:
        """Wait until the site works on nothing; what it has not begun with will be asked for again."""
        for id_, each in list(self._in_hand.items()):
            if not each.begun:
                each.stop.set()
                del self._in_hand[id_]
        if self.busy:
            self._away = self._away or milliseconds()
            text = "the connection has ended; it is made anew when the request in hand is answered"
            self._note(LinkState(state="connecting", since=self._away, text=text))
        await self._at_rest.wait()

    async def _listen(self, stream: Stream) -> None:
        """Take frames until the other end ends the stream; raises MessageError."""
        while isinstance(data := await stream.read(), bytes):
            await self._take(read(ToSite, data))
            await self._at_rest.wait()

    async def _take(self, frame: ToSite) -> None:
        kind = frame.WhichOneof("frame")
        if kind == "cancel":
            if (known := self._in_hand.get(frame.cancel.id)) is not None:
                known.stop.set()
            self._arriving.pop(frame.cancel.id, None)
        elif kind == "end":
            raise (_Displaced if frame.end.displaced else MessageError)(plain(frame.end.text))
        elif kind == "request":
            await self._arrive(frame.request)
        else:
            raise MessageError(f"a frame of kind {kind}, expected a request")

    async def _arrive(self, part: Part) -> None:
        """Take a part of a request; raises MessageError where it is none, which ends the connection.

        Waits until a refusal can be sent: whoever reads nothing is not read.
        """
        id_ = part.id
        if len(id_) != ID:
            raise MessageError(f"a request with an id of {len(id_)} bytes, expected {ID}")
        if id_ not in self._arriving:
            size = part.size + sum(each.size for each in self._arriving.values())
            if len(self._arriving) >= _AT_ONCE or (self._arriving and size > self._limit):
                return await self._refuse(id_, _TOO_MANY)
            try:
                self._arriving[id_] = Payload(part, self._limit)
            except MessageError as error:
                return await self._refuse(id_, str(error))
        request = self._arriving[id_].add(part)
        if request is None:
            return None
        del self._arriving[id_]
        if request_id(request) != id_:
            raise MessageError("a request that does not have the digest it came with")
        known = self._in_hand.get(id_)
        if known is None or known.stop.is_set():
            if len(self._tasks) >= _AT_ONCE:
                return await self._refuse(id_, _TOO_MANY)
            known = self._in_hand[id_] = _InHand()
            task = asyncio.create_task(self._answer(id_, known, request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif known.answer is not None:
            await self._send(id_, known.answer)
        return None

    async def _refuse(self, id_: bytes, why: str) -> None:
        _log.warning("refused: %s", why)
        await self._send(id_, why)

    async def _answer(self, id_: bytes, known: _InHand, request: bytes) -> None:
        async with self._turn:
            outgoing = self._outgoing
            if outgoing is not None:
                await outgoing.join()
            async with self._voice:
                if known.stop.is_set() or outgoing is None or outgoing is not self._outgoing:  # nobody waits for it
                    if self._in_hand.get(id_) is known:
                        del self._in_hand[id_]
                    return
                known.begun, began = True, time.monotonic()
                self._at_rest.clear()
                work = asyncio.get_running_loop().run_in_executor(self._thread, self._safely, request, known.stop)
                try:
                    answer = known.answer = await work
                finally:
                    self._at_rest.set()
            if isinstance(answer, bytes):
                _log.info("answered with %d bytes after %.2f s", len(answer), time.monotonic() - began)
            given = [each for each, other in self._in_hand.items() if other.answer is not None and each != id_]
            for old in given[: 1 - _KEPT]:
                del self._in_hand[old]
            if self._in_hand.get(id_) is known:
                await self._send(id_, answer)

    def _safely(self, request: bytes, stop: threading.Event) -> bytes | str:
        """Return the site's answer, or why there is none, which says nothing of records."""
        try:
            return self._handle(request, stop)
        except Cancelled as error:
            _log.warning("given up: %s", error)
            return "given up"
        except FedllmError as error:
            _log.warning("refused: %s", error)
            return "refused; the site's log says why"
        except Exception as error:  # its text may quote anything: it stays here
            _log.error("a fault in the site's software", exc_info=error)
            return "a fault in the site's software; its log says more"

    async def _send(self, id_: bytes, answer: bytes | str) -> None:
        """Send an answer on the present connection; if there is none, it is asked for again."""
        outgoing = self._outgoing
        for frame in _frames(id_, answer):
            if outgoing is None or outgoing is not self._outgoing:
                return
            await outgoing.put(frame)

    async def _write(self, outgoing: "asyncio.Queue[FromSite]", stream: Stream) -> None:
        """Write what is to be sent, for ever."""
        while True:
            frame = await outgoing.get()
            try:
                async with self._voice:
                    await stream.write(frame.SerializeToString())
            finally:
                outgoing.task_done()


def outside(address: str, ca: Path, key: Path) -> tuple[str, Callable[[], grpc.ChannelCredentials], Callable[[], str]]:
    """Return, for SiteLink, how to connect to the server's port, from files: of authorities and of the site's key."""
    certificate = key.with_suffix(".pem")
    host, _, port = address.rpartition(":")

    def credentials() -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(read_file(ca), read_secret(key), read_file(certificate))

    def explain() -> str:
        try:
            probe_tls(host.strip("[]"), int(port), ca, own=(certificate, key))
        except OSError as error:
            return explain_failure(host.strip("[]"), int(port), error)
        return ""

    return address, credentials, explain


def _frames(id_: bytes, answer: bytes | str) -> Iterator[FromSite]:
    if isinstance(answer, str):
        yield FromSite(refusal=Refusal(id=id_, text=answer))
    else:
        yield from (FromSite(answer=part) for part in parts(id_, answer))
