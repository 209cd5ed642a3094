"""A Flower Grid over the daemon's streams: messages to the sites that are connected, and their answers.

A node's id is a number made of its site's name. A message is one request on the daemon's socket; where the daemon or
the site's connection goes away meanwhile, the same request is made again until its time is up: the site answers once.
"""

import asyncio
import contextlib
import hashlib
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
from flwr.app import Error, Message

from fedllm.errors import FederationError, MessageError
from fedllm.protocol.link import CONTROL, OPTIONS, Payload, parts, request_id
from fedllm.protocol.link_pb2 import Answer, Nothing, Request, Run, Sites
from server.grid import OneRunGrid, data_of, envelope

_AGAIN = (0.1, 1.0)  # seconds until a request is made again: at random between these
_LONGER, _LONGEST = 1.5, 4.0  # times as long each time, since it is sealed again; times as long at most
_TIMEOUT = 20.0  # seconds for the daemon to answer by itself
_ROOM = 1 << 27  # bytes of requests that are being sent, and again of answers that come in; one of either may be longer
_MORE = 1 << 20  # bytes by which an answer is longer than its request at most; who says more gets no more room
_SLOW = 30.0  # seconds after which one that still travels counts no more: nobody holds up others
_NO_DAEMON = "the server's daemon does not answer. Is it running? fedllm server start"


class _Gone(Exception):
    """The daemon or a site's connection is away."""


def node_of(site: str) -> int:
    """Return the number by which Flower knows a site."""
    return int.from_bytes(hashlib.sha256(site.encode()).digest()[:8], "big") >> 1 or 1


def look(socket: Path) -> Sites:
    """Return who is connected to the daemon; raises FederationError if it does not run."""
    return Sites.FromString(_control(socket, "Look", Nothing().SerializeToString()))


def start(socket: Path, name: str) -> None:
    """Have the daemon start the process of a run; raises FederationError if it cannot."""
    _control(socket, "Start", Run(name=name).SerializeToString())


def _control(socket: Path, method: str, request: bytes) -> bytes:
    with grpc.insecure_channel(f"unix:{socket}", OPTIONS) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{CONTROL}/{method}")
        try:
            return call(request, timeout=_TIMEOUT)
        except grpc.RpcError as error:
            known = isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.INTERNAL
            raise FederationError(str(error.details()) if known else _NO_DAEMON) from None


class _Room:
    """Room for what travels in one direction; who comes first is served first."""

    def __init__(self) -> None:
        self._used, self._turn, self._less = 0, asyncio.Lock(), asyncio.Event()

    async def take(self, size: int) -> Callable[[], None]:
        """Wait for room, and return what gives it back, soon or late; it may be called again."""
        async with self._turn:
            while self._used and self._used + size > _ROOM:
                self._less.clear()
                await self._less.wait()
            self._used += size
        left = [size]

        def give_back() -> None:
            self._used -= left.pop() if left else 0
            self._less.set()

        asyncio.get_running_loop().call_later(_SLOW, give_back)
        return give_back


class GrpcGrid(OneRunGrid):
    """Carries messages by the daemon behind `socket`; use it as a context, whose end gives up what is under way."""

    def __init__(self, socket: Path, limit: int) -> None:
        """No answer may be longer than `limit` bytes."""
        super().__init__()
        self._socket, self._limit = socket, limit
        self._sites: dict[int, str] = {}
        self._making, self._down, self._up = asyncio.Lock(), _Room(), _Room()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="link")
        self._thread.start()
        self._channel = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> grpc.aio.Channel:
        backoff = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]
        return grpc.aio.insecure_channel(f"unix:{self._socket}", [*OPTIONS, *backoff])

    async def _close(self) -> None:
        mine = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in mine:
            task.cancel()
        await asyncio.gather(*mine, return_exceptions=True)
        await self._channel.close()

    def sites(self) -> dict[int, str]:
        """Return the sites that are connected now, none while the daemon is away: it may come back."""
        with contextlib.suppress(FederationError):
            online = [each.site for each in look(self._socket).connected]
            self._sites |= {node_of(site): site for site in online}
            return {node_of(site): site for site in online}
        return {}

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of the sites that are connected now."""
        return list(self.sites())

    def _send(self, message: Message) -> bool:
        asyncio.run_coroutine_threadsafe(self._carry(message), self._loop)
        return True

    async def _carry(self, message: Message) -> None:
        """Make a request until there is an answer, or its time is up; then there is none."""
        metadata, taken = message.metadata, list[Callable[[], None]]()

        def fetched() -> None:
            for give_back in taken:
                self._loop.call_soon_threadsafe(give_back)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(metadata.ttl):
                reply = await self._answer(self._sites[metadata.dst_node_id], message, taken)
                content = reply if isinstance(reply, Error) else envelope(reply)
                self._replied(message, Message(content, reply_to=message), fetched)

    async def _answer(self, site: str, message: Message, taken: list[Callable[[], None]]) -> bytes | Error:
        longer = 1.0
        while True:
            try:
                return await self._ask(site, message, taken)
            except _Gone:
                await asyncio.sleep(longer * random.uniform(*_AGAIN))
                longer = min(_LONGER * longer, _LONGEST)
            except MessageError as error:
                return Error(code=0, reason=str(error))

    async def _ask(self, site: str, message: Message, taken: list[Callable[[], None]]) -> bytes:
        """Return a site's answer; raises _Gone where the daemon or the site's connection is away.

        The request is in memory only until it is sent. `taken` is for the room that the answer takes.
        """

        found: bytes | MessageError | _Gone | None = None
        async with self._making:  # one after another: what is made waits for room
            request: list[bytes] = [await asyncio.to_thread(data_of, message)]
            size = len(request[0])
            sent = await self._down.take(size)

        async def frames() -> AsyncIterator[bytes]:
            data = request.pop()
            for number, part in enumerate(parts(request_id(data), data)):
                if found is not None:
                    return
                yield Request(site="" if number else site, part=part).SerializeToString()
            sent()

        method: Any = self._channel.stream_stream(f"/{CONTROL}/Ask")
        call = method(frames())
        payload: Payload | None = None
        try:
            async for frame in call:  # to its end: if it were cancelled while the daemon ends it, that would fail there
                answer = Answer.FromString(frame)
                match answer.WhichOneof("frame"):
                    case "refused":
                        found = MessageError(answer.refused)
                    case "gone":
                        found = _Gone()
                    case _:
                        if payload is None:
                            payload = Payload(answer.part, self._limit)
                            taken.append(await self._up.take(min(payload.size, size + _MORE)))
                        found = payload.add(answer.part)
        except grpc.aio.AioRpcError:
            found = found or _Gone()
        finally:
            call.cancel()  # if it is not over, the site is told that nobody waits
            sent()
            for give_back in taken if not isinstance(found, bytes) else ():
                give_back()
        if isinstance(found, bytes):
            return found
        raise found or _Gone()
