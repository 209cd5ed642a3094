"""Both ends with their folders: the server's daemon and a site's link, as threads of a test."""

import asyncio
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client.link import LinkState, SiteLink, read_state
from client.office import Office, init_office, install
from client.service import way
from fedllm.files import locked, write_secret
from server import daemon, federation
from tests.link.conftest import Loop, until


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
    """Make the server's folder, on loopback."""
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
def _looping() -> Iterator[Loop]:
    loop = Loop()
    try:
        yield loop
    finally:
        loop.end()


@contextmanager
def daemon_of(head: Path) -> Iterator[None]:
    """Serve the server's port and socket, look at its roster, and hold its folder as the daemon does."""
    office, made = federation.HeadOffice.open(head), daemon.Daemon(head)

    async def begin() -> tuple[Any, Any]:
        return await daemon._open_socket(made, office.socket), await daemon._open_port(made, office)

    async def look() -> None:
        while True:
            made.look_at_roster()
            await asyncio.sleep(0.02)

    async def end(*servers: Any) -> None:
        for each in servers:
            await each.stop(0)

    (head / "run").mkdir(0o700, exist_ok=True)
    with locked(head / "run"), _looping() as loop:
        servers = loop.do(begin())
        loop.begin(look())
        yield
        loop.do(end(*servers))


@contextmanager
def link_of(folder: Path) -> Iterator[None]:
    """Keep a site's link, and hold its folder as the site's process does."""
    office = Office.open(folder)
    write_secret(office.link_state_file, b"")
    link = SiteLink(*way(office), lambda request, stop: request[::-1], 1 << 20, office.link_state_file)

    async def end(stop: asyncio.Event, running: Any) -> None:
        stop.set()
        await asyncio.wrap_future(running)
        await link.drained(1.0)

    with locked(office.ledger_file.parent), _looping() as loop:
        stop = asyncio.Event()
        running = loop.begin(link.run(stop))
        yield
        loop.do(end(stop, running))


def link_says(folder: Path, found: Callable[[LinkState], bool]) -> None:
    """Wait until the state of a site's link is as expected."""
    file = Office.open(folder).link_state_file
    until(lambda: (state := read_state(file)) is not None and found(state), "what the link is to say", 120)
