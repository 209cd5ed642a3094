"""Other ways than a plain line: IPv6, and an HTTP proxy that permits CONNECT."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.link.conftest import House, Loop, Site, until


class Proxy:
    """An HTTP proxy on loopback that does CONNECT (RFC 9110, 9.3.6) and nothing else."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.asked: list[str] = []
        self._threads = [threading.Thread(target=self._serve)]
        self._open: list[socket.socket] = []
        self._threads[0].start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += client.recv(1)
            method, target, _ = head.split(b"\r\n")[0].decode().split()
            assert method == "CONNECT"
            self.asked.append(target)
            host, _, port = target.rpartition(":")
            other = socket.create_connection((host, int(port)))
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            self._open += [client, other]
            for ends in ((client, other), (other, client)):
                self._threads.append(threading.Thread(target=self._carry, args=ends))
                self._threads[-1].start()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(30)
        for each in self._open:
            each.close()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    found = Proxy()
    yield found
    found.close()


def test_a_site_connects_through_an_http_proxy(
    house: House, loop: Loop, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "no_grpc_proxy", "grpc_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", proxy.url)
    site = Site(house, house.admit("office"), loop)
    site.start()
    until(lambda: house.connected() == ["office"], "the connection")
    assert proxy.asked == [house.address]
    site.stop()


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
def test_head_office_and_a_site_meet_over_ipv6(tmp_path: Path, loop: Loop) -> None:
    try:
        house = House(tmp_path, host="::1")
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    house.start()
    try:
        site = Site(house, house.admit("office"), loop)
        site.start()
        until(lambda: house.connected() == ["office"], "the connection")
        site.stop()
    finally:
        house.stop()
