"""The watch over a SuperNode: one that has given up while head office can be reached is started again."""

import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest

from client import supernode
from client.supernode import Courier
from fedllm import crypto
from fedllm.crypto import Certificate
from fedllm.files import write_secret

_CONNECT = """
import socket, sys, time
held = socket.create_connection(("127.0.0.1", int(sys.argv[1]))) if sys.argv[1] != "0" else None
print("there", flush=True)
time.sleep(600)
"""


class SuperLink:
    """Something that shakes hands as a SuperLink does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.socket.getsockname()[1])
        self.context: ssl.SSLContext | None = None
        self._kept: list[socket.socket] = []
        self._greeting: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self.socket.close()
        self._thread.join(240)
        for each in self._kept:
            with suppress(OSError):
                socket.socket.shutdown(each, socket.SHUT_RDWR)  # of TCP, whatever TLS is at
        for thread in self._greeting:
            thread.join(240)
        for each in self._kept:
            each.close()
        self._kept.clear()

    def show(self, server: Certificate) -> None:
        file = self._folder / "server.pem"
        file.write_bytes(server.certificate + server.key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        context.set_alpn_protocols(["h2"])
        self.context = context

    def _answer(self) -> None:
        while True:
            try:
                found, _ = self.socket.accept()
            except OSError:
                return
            if self.context is not None:
                found = self.context.wrap_socket(found, server_side=True, do_handshake_on_connect=False)
            self._kept.append(found)
            if isinstance(found, ssl.SSLSocket):
                self._greeting.append(threading.Thread(target=_greet, args=(found,)))
                self._greeting[-1].start()


def _greet(found: ssl.SSLSocket) -> None:
    with suppress(OSError):  # those who only connect stay connected
        found.do_handshake()


@contextmanager
def process(port: int) -> Iterator[int]:
    """A process with a connection to `port`; 0: with none."""
    with subprocess.Popen([sys.executable, "-c", _CONNECT, str(port)], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "there\n"
        try:
            yield running.pid
        finally:
            running.kill()


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[SuperLink]:
    made = SuperLink(tmp_path)
    yield made
    if made.socket.fileno() >= 0:
        made.close()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedllm.reach._PATIENCE", 240.0)  # seconds: the machine may be busy


@pytest.fixture
def authority() -> Certificate:
    return crypto.make_ca("연합", 10)


@pytest.fixture
def folder(tmp_path: Path, superlink: SuperLink, authority: Certificate) -> Path:
    place = tmp_path / "courier"
    write_secret(place / supernode.CA, authority.certificate)
    courier = Courier(host="127.0.0.1", port=superlink.port, socket="/run/none.sock")
    write_secret(place / supernode.SETTINGS, courier.model_dump_json().encode())
    return place


def good(authority: Certificate) -> Certificate:
    return crypto.make_server_certificate(authority, ["127.0.0.1"], 5)


def expired(authority: Certificate, monkeypatch: pytest.MonkeyPatch) -> Certificate:
    with monkeypatch.context() as past:
        past.setattr(crypto, "_BACKDATE", timedelta(days=9))
        return crypto.make_server_certificate(authority, ["127.0.0.1"], -2)


def test_a_supernode_that_gave_up_on_an_expired_certificate_is_started_again_once_that_is_renewed(
    folder: Path, superlink: SuperLink, authority: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supernode, "_PATIENCE", 0.0)
    watch = supernode._Watch(folder)
    with process(0) as pid:
        superlink.show(expired(authority, monkeypatch))
        assert [watch.ails(pid) for _ in range(2)] == [None, None], "to start it again would not help"
        superlink.show(good(authority))
        assert watch.ails(pid) == "head office can be reached, but it does not connect"


def test_it_has_time_to_connect_by_itself(
    folder: Path, superlink: SuperLink, authority: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    superlink.show(good(authority))
    clock = [100.0]
    monkeypatch.setattr("client.supernode.time.monotonic", lambda: clock[0])
    watch = supernode._Watch(folder)
    with process(0) as alone, process(superlink.port) as connected:
        assert watch.ails(alone) is None
        clock[0] += supernode._PATIENCE - 1
        assert watch.ails(alone) is None
        assert watch.ails(connected) is None  # and from here on it would count anew
        clock[0] += 2
        assert watch.ails(alone) is None
        clock[0] += supernode._PATIENCE
        assert watch.ails(alone)
        assert watch.ails(alone) is None, "after a new start it has its time again"


def test_nothing_ails_a_supernode_whose_head_office_is_away(
    folder: Path, superlink: SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supernode, "_PATIENCE", 0.0)
    watch = supernode._Watch(folder)
    superlink.close()
    with process(0) as pid:
        assert [watch.ails(pid) for _ in range(2)] == [None, None]


def test_a_courier_at_work_is_seen_among_the_children_of_its_supernode(tmp_path: Path) -> None:
    courier = tmp_path / "flwr-clientapp"
    courier.write_text("import time; time.sleep(600)")
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, {str(courier)!r}])
print("there", flush=True)
sys.stdin.readline()
child.kill(); child.wait()
print("gone", flush=True)
sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as node:
        assert node.stdin is not None
        assert node.stdout is not None
        assert node.stdout.readline() == "there\n"
        assert supernode._carries(node.pid)
        print(file=node.stdin, flush=True)
        assert node.stdout.readline() == "gone\n"
        assert not supernode._carries(node.pid)
    assert not supernode._carries(node.pid)
