"""A real daemon on a real port, in a thread of the test; sites are what each test makes them."""

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

os.environ.update({"GRPC_SSL_CIPHER_SUITES": "ECDHE-RSA-AES256-GCM-SHA384"})  # TLS 1.3 alone, as `server start` sets it

from client.link import SiteLink, outside
from fedllm.crypto import certificates
from fedllm.crypto.certificates import Certificate
from fedllm.crypto.identity import Identity
from fedllm.files import write_secret
from fedllm.protocol.enrolment import now
from fedllm.protocol.link import CONNECT, OPTIONS, VERSION, milliseconds
from fedllm.protocol.link_pb2 import FromSite, Hello
from server import daemon as server_daemon
from server import federation
from server.federation import HeadOffice
from server.grpc_grid import look
from server.roster import Roster, RosterEntry


def until(come_about: Callable[[], Any], what: str = "it", seconds: float = 60.0) -> Any:
    """Wait until something is true and return it."""
    deadline = time.monotonic() + seconds
    while not (found := come_about()):
        assert time.monotonic() < deadline, f"{what} did not come about in {seconds:.0f} s"
        time.sleep(0.01)
    return found


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def do(self, work: Awaitable[Any], seconds: float = 60.0) -> Any:
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, seconds), self.loop).result()

    def begin(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def end(self) -> None:
        async def cancel() -> None:
            mine = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in mine:
                task.cancel()
            await asyncio.gather(*mine, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(cancel(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@dataclass
class House:
    """The server: its folder, its daemon, and the files of sites' keys."""

    folder: Path
    loops: list[Loop] = field(default_factory=list)
    stops: list[asyncio.Event] = field(default_factory=list)
    host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        with socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET) as free:
            free.bind((self.host, 0))
            self.port = free.getsockname()[1]
        settings = self.folder / "federation.yaml"
        values = {"name": "test", "host": self.host, "listen": self.host, "port": self.port}
        settings.write_text(json.dumps(values), "utf-8")
        self.home = federation.init_federation(settings, self.folder / "h").folder

    @property
    def office(self) -> HeadOffice:
        return HeadOffice.open(self.home)

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def start(self) -> None:
        """Start the daemon; it stands in this process so that a test can look into it."""
        loop, office = Loop(), self.office

        async def begin() -> None:
            self.daemon = server_daemon.Daemon(self.home)
            self.control = await server_daemon._open_socket(self.daemon, office.socket)
            self.server = await server_daemon._open_port(self.daemon, office)

        loop.do(begin())
        self.loops.append(loop)

    def stop(self) -> None:
        loop = self.loops.pop()

        async def end() -> None:
            await self.server.stop(0)
            await self.control.stop(0)

        loop.do(end())
        loop.end()

    def admit(self, site: str, authority: Certificate | None = None, days: int = 30, known: bool = True) -> Path:
        """Return the file of a key that has a certificate, in the roster where it is `known`."""
        key = certificates.make_key()
        line, place = certificates.key_line(key), self.folder / f"{site}-{len(list(self.folder.glob(site + '-*.pem')))}"
        write_secret(place, key)
        issued = certificates.certify(authority or self.office.authorities[-1], line, site, days)
        write_secret(place.with_suffix(".pem"), issued)
        if known:
            member = RosterEntry(
                site=site, identity=Identity.generate().public.to_text(), link_key=line, serving_key=line,
                admitted_at=now(),
            )  # fmt: skip
            self.change(*self.office.roster.members, member)
        return place

    def change(self, *members: RosterEntry) -> None:
        write_secret(self.office.roster_file, Roster(members=members).model_dump_json().encode())
        if hasattr(self, "daemon"):
            self.loops[0].loop.call_soon_threadsafe(self.daemon.look_at_roster)

    def connected(self) -> list[str]:
        return sorted(each.site for each in look(self.office.socket).connected)

    def refused(self) -> dict[str, str]:
        return {each.site: each.text for each in look(self.office.socket).refused}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    found = House(tmp_path)
    found.start()
    yield found
    while found.loops:
        found.stop()


@pytest.fixture
def loop() -> Iterator[Loop]:
    found = Loop()
    yield found
    found.end()


class Peer:
    """A site that does what a test says, frame by frame, with a real certificate."""

    def __init__(self, house: House, key: Path, loop: Loop) -> None:
        self._loop = loop
        _, credentials, self.explain = outside(house.address, house.office.ca_file, key)

        async def open_() -> None:
            self.channel = grpc.aio.secure_channel(house.address, credentials(), OPTIONS)
            self.stream: Any = self.channel.stream_stream(CONNECT)()

        loop.do(open_())

    def send(self, frame: FromSite | bytes) -> None:
        self._loop.do(self.stream.write(frame if isinstance(frame, bytes) else frame.SerializeToString()))

    def read(self) -> bytes | None:
        """Return the next frame, None at the end of the stream."""
        found = self._loop.do(self.stream.read())
        return found if isinstance(found, bytes) else None

    def hello(self, version: int = VERSION, clock: int | None = None) -> bytes | None:
        frame = Hello(version=version, software="test", clock=milliseconds() if clock is None else clock)
        self.send(FromSite(hello=frame))
        return self.read()

    def end(self) -> tuple[grpc.StatusCode, str]:
        """Return how the server ended the stream."""

        async def over() -> tuple[grpc.StatusCode, str]:
            with contextlib.suppress(grpc.aio.AioRpcError):
                while isinstance(await self.stream.read(), bytes):
                    pass
            return await self.stream.code(), await self.stream.details()

        return self._loop.do(over())

    def close(self) -> None:
        self._loop.do(self.channel.close())


@dataclass
class Site:
    """A real link, behind it a site that a test steers."""

    house: House
    key: Path
    loop: Loop
    asked: list[bytes] = field(default_factory=list)
    may_answer: threading.Event = field(default_factory=threading.Event)
    given_up: threading.Event = field(default_factory=threading.Event)

    def handle(self, request: bytes, stop: threading.Event) -> bytes:
        self.asked.append(request)
        while not self.may_answer.wait(0.01):
            if stop.is_set():
                self.given_up.set()
                raise server_daemon.MessageError("given up")
        return b"to " + request

    def start(self, limit: int = 1 << 28, address: str = "") -> None:
        self.state = self.key.with_suffix(".json")

        async def begin() -> None:
            self.stop_event = asyncio.Event()
            way = outside(address or self.house.address, self.house.office.ca_file, self.key)
            self.link = SiteLink(*way, self.handle, limit, self.state)
            self.running = asyncio.create_task(self.link.run(self.stop_event))

        self.loop.do(begin())

    def stop(self) -> None:
        async def end() -> None:
            self.stop_event.set()
            await self.running
            await self.link.drained(5)

        self.may_answer.set()
        self.loop.do(end())
