"""Head office's daemon and a site's link as threads of a test."""

import asyncio
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client.link import LinkState, SiteLink, read_state
from client.office import Office, init_office, install
from client.service import way
from fedllm.files import locked, write_secret
from server import daemon, federation

_WAIT = 120.0  # seconds: for a machine that is busy


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def short_folder() -> Iterator[Path]:
    """Make a folder whose path leaves room for the name of a socket."""
    place = Path(tempfile.mkdtemp(prefix="fd"))
    try:
        yield place
    finally:
        shutil.rmtree(place)


def make_head(place: Path, **more: object) -> Path:
    """Make head office's folder, on loopback."""
    values = {"name": "x", "host": "127.0.0.1", "listen": "127.0.0.1", "port": free_port(), **more}
    (place / "federation.yaml").write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
    return federation.init_federation(place / "federation.yaml", place / "head").folder


def make_member(head: Path, folder: Path, name: str = "a") -> Path:
    """Make a site's folder and have it admitted."""
    made = init_office(folder, name).folder
    admit(head, made)
    return made


def admit(head: Path, folder: Path) -> Office:
    """Have a site's newest keys admitted, and install the grant."""
    site = Office.open(folder)
    fingerprint = federation.HeadOffice.open(head).identity.public.fingerprint
    heard = site.keys[-1].identity.public.fingerprint
    return install(folder, federation.admit(head, site.join_file.read_bytes(), heard).read_bytes(), fingerprint)


@contextmanager
def _looping(work: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> Iterator[None]:
    """Run a coroutine in a thread, and set the event that it gets to end it."""
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            loop.run_until_complete(work(stop))
        except BaseException as error:
            import traceback; traceback.print_exc()
            failed.append(error)
        finally:
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        if not loop.is_closed():
            loop.call_soon_threadsafe(stop.set)
        thread.join(_WAIT)
        assert not thread.is_alive()
    assert failed == []


def until(found: Callable[[], bool]) -> None:
    """Wait for something that will be."""
    limit = time.monotonic() + _WAIT
    while not found():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


@contextmanager
def daemon_of(head: Path) -> Iterator[daemon.Daemon]:
    """Serve head office's port and socket, and hold its folder as the daemon does."""
    office = federation.HeadOffice.open(head)
    made, ready = daemon.Daemon(head), threading.Event()

    async def serve(stop: asyncio.Event) -> None:
        control, port = await daemon._open_socket(made, office.socket), await daemon._open_port(made, office)
        ready.set()
        while not stop.is_set():
            await asyncio.sleep(0.02)
            made.look_at_roster()
        await port.stop(0)
        await control.stop(0)
        office.socket.unlink(missing_ok=True)

    (head / "run").mkdir(0o700, exist_ok=True)
    with locked(head / "run"), _looping(serve):
        assert ready.wait(_WAIT)
        yield made


@contextmanager
def link_of(folder: Path, handle: Callable[[bytes, threading.Event], bytes] | None = None) -> Iterator[SiteLink]:
    """Keep a site's link, and hold its folder as the site's process does."""
    office = Office.open(folder)
    write_secret(office.link_state_file, b"")
    link = SiteLink(*way(office), handle or (lambda request, stop: request[::-1]), 1 << 20, office.link_state_file)

    async def run(stop: asyncio.Event) -> None:
        await link.run(stop)
        await link.drained(1.0)

    with locked(office.ledger_file.parent), _looping(run):
        yield link


def link_says(folder: Path, found: Callable[[LinkState], bool]) -> None:
    """Wait until the state of a site's link is as expected."""
    file = Office.open(folder).link_state_file

    def is_so() -> bool:
        state = read_state(file)
        return state is not None and found(state)

    until(is_so)
