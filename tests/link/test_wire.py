"""The line between a site and the server: what somebody on it sees, and what happens where it goes dead."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

import client.link
from client.link import read_state
from server import daemon as server_daemon
from server.grpc_grid import GrpcGrid
from tests.link.conftest import House, Loop, Site, until
from tests.link.test_exchange import LIMIT, ask, reply

SECRET = b"a record of Kim, and of nobody else"


class Line:
    """Forwards a port to another, writes down every byte, and can go dead without a word."""

    def __init__(self, to: int) -> None:
        self._to, self.seen, self.dead, self.count = to, bytearray(), threading.Event(), 0
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while not self._over.is_set():
            ready, _, _ = select.select([self._listener], [], [], 0.05)
            if ready:
                near, _ = self._listener.accept()
                self.count += 1
                far = socket.create_connection(("127.0.0.1", self._to))
                self._threads.append(threading.Thread(target=self._carry, args=(near, far, self.dead)))
                self._threads[-1].start()

    def _carry(self, near: socket.socket, far: socket.socket, dead: threading.Event) -> None:
        other = {near: far, far: near}
        with near, far, contextlib.suppress(OSError):
            while not self._over.is_set():
                if dead.is_set():
                    time.sleep(0.05)
                    continue
                for each in select.select(list(other), [], [], 0.05)[0]:
                    if not (data := each.recv(1 << 16)):
                        return
                    self.seen += data
                    other[each].sendall(data)

    def die(self) -> None:
        """Carry nothing more on the connections there are; new ones work."""
        self.dead.set()
        self.dead = threading.Event()

    def end(self) -> None:
        self._over.set()
        for each in self._threads:
            each.join()
        self._listener.close()


@pytest.fixture
def line(house: House) -> Iterator[Line]:
    found = Line(house.port)
    yield found
    found.end()


@pytest.fixture
def site(house: House, loop: Loop, line: Line) -> Iterator[Site]:
    found = Site(house, house.admit("busan"), loop)
    found.may_answer.set()
    yield found
    found.stop()


def test_whoever_listens_sees_neither_what_is_said_nor_who_says_it(house: House, site: Site, line: Line) -> None:
    site.start(address=f"127.0.0.1:{line.port}")
    with GrpcGrid(house.office.socket, LIMIT) as grid:
        assert reply(grid, ask(grid, house, "busan", SECRET)) == b"to " + SECRET
    assert len(line.seen) > 2000
    for word in (SECRET, b"Kim", b"busan", b"fedllm", b"Connect", b"CERTIFICATE"):
        assert word not in line.seen


@pytest.mark.parametrize("seconds", [2, pytest.param(10, marks=pytest.mark.soak)])
def test_a_line_that_is_dead_without_a_word_is_noticed_at_both_ends_and_replaced(
    house: House, site: Site, line: Line, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """As after a sleep, or where a firewall has forgotten the connection; 10 s is the interval in the product."""
    if seconds < 10:
        quick = {"grpc.keepalive_time_ms": 1000 * seconds, "grpc.keepalive_timeout_ms": 1000,
                 "grpc.http2.ping_timeout_ms": 1000, "grpc.http2.min_ping_interval_without_data_ms": 500}  # fmt: skip
        for module, name in ((client.link, "OPTIONS"), (server_daemon, "_PORT")):
            monkeypatch.setattr(module, name, list({**dict(getattr(module, name)), **quick}.items()))
        house.stop()
        house.start()
    site.start(address=f"127.0.0.1:{line.port}")
    until(lambda: house.connected() == ["busan"], "the connection")
    [first] = list(house.daemon._links.values())
    began = time.monotonic()
    line.die()
    until(lambda: [each for each in list(house.daemon._links.values()) if each is not first], "another")
    assert time.monotonic() - began < 25, "noticed within 20 s, and then it connects again"
    with GrpcGrid(house.office.socket, LIMIT) as grid:
        assert reply(grid, ask(grid, house, "busan", b"x")) == b"to x"


def test_a_request_under_way_survives_a_line_that_breaks(house: House, site: Site, line: Line) -> None:
    site.may_answer.clear()
    site.start(address=f"127.0.0.1:{line.port}")
    with GrpcGrid(house.office.socket, LIMIT) as grid:
        id_ = ask(grid, house, "busan", b"slow")
        until(lambda: site.asked, "the request")
        for link in list(house.daemon._links.values()):
            house.loops[0].loop.call_soon_threadsafe(link.end, server_daemon._Code.UNAVAILABLE, "a test")
        until(lambda: read_state(site.state).state == "connecting" or line.count > 1)  # type: ignore[union-attr]
        site.may_answer.set()
        assert reply(grid, id_) == b"to slow"
    assert site.asked == [b"slow"]
