"""Flower's SuperNode as an office runs it, from a folder that holds a node key, head office's address and no record."""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil
from pydantic import ValidationError

from client.app import SOCKET
from client.office import Office
from fedllm.errors import FolderError
from fedllm.files import check_private, read, read_secret, write_secret
from fedllm.plan import Frozen
from fedllm.reach import ONLY_TLS_1_3, reach
from fedllm.supervisor import Child

SETTINGS, KEY, CA = "courier.json", "node", "ca.pem"
_COURIER = "flwr-clientapp"  # the program in which Flower runs one
_PATIENCE = 45.0  # seconds without a connection, while head office can be reached, until the SuperNode is started anew
_PATIENCE_DEAD = 10.0  # the same with a connection on which nobody answers: TCP may yet find its way again
_RETRANSMISSIONS = 6  # in a row without an answer: 12 s at least (RFC 6298, 5.5: the wait doubles, in Linux from 0.2 s)


class Courier(Frozen):
    """What the courier's side of an office knows."""

    host: str
    port: int
    socket: str  # of the site service


def hand_out(office: Office, folder: Path) -> None:
    """Write the courier's folder: all that a SuperNode needs, and nothing that opens a message or a record."""
    host, _, port = office.superlink.rpartition(":")
    courier = Courier(host=host.strip("[]"), port=int(port), socket=str(office.socket))
    write_secret(folder / KEY, read_secret(office.node_key_file))
    write_secret(folder / CA, read_secret(office.ca_file))
    write_secret(folder / SETTINGS, courier.model_dump_json(indent=2).encode() + b"\n")


def read_courier(folder: Path) -> Courier:
    """Read a courier's folder; raises FolderError."""
    check_private(folder)
    try:
        return Courier.model_validate_json(read_secret(folder / SETTINGS))
    except ValidationError:
        raise FolderError(
            f"{folder / SETTINGS} is damaged. Make it again, as the site's user: fedllm site courier {folder}"
        ) from None


def supernode(folder: Path, log: Path, refresh: Callable[[], None] = lambda: None) -> Child:
    """Return the SuperNode's process, which is started again when its folder changes or it has lost head office.

    `refresh` brings the folder up to date, and is called before every look at it.
    """

    def made_of() -> tuple[bytes, ...]:
        refresh()
        return tuple(read(folder / name) for name in (SETTINGS, KEY, CA))

    return Child(
        "SuperNode",
        partial(_command, folder),
        log,
        {
            **ONLY_TLS_1_3,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_HOME": str(folder / "flower"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # for Flower's own tools
        },
        made_of=made_of,
        busy=_carries,
        ails=_Watch(folder).ails,
    )


def _command(folder: Path) -> Sequence[str]:
    courier = read_courier(folder)
    host = f"[{courier.host}]" if ":" in courier.host else courier.host
    return [
        str(Path(sys.executable).parent / "flower-supernode"),
        "--superlink", f"{host}:{courier.port}",
        "--root-certificates", str(folder / CA),
        "--auth-supernode-private-key", str(folder / KEY),
        "--host", "127.0.0.1", "--port", str(_free_port()),
        "--isolation", "subprocess",
        "--node-config", f"{SOCKET}={json.dumps(courier.socket, ensure_ascii=False)}",
    ]  # fmt: skip


def _carries(pid: int) -> bool:
    """Whether a courier is under way: to start again now would lose its answer."""
    try:
        return any(_COURIER in " ".join(each.cmdline()) for each in psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return False


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class _Watch:
    """Notices a SuperNode that has lost head office though that can be reached.

    Seen with flwr 1.39: an expired certificate makes it give up, and it goes on waiting on a connection that a firewall
    has forgotten.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._alone_since: float | None = None

    def ails(self, pid: int) -> str | None:
        """Return why the SuperNode must be started again, None where it need not."""
        courier = read_courier(self._folder)
        links = _links(pid, courier.port)
        if any(links):
            self._alone_since = None
            return None
        try:
            reach(courier.host, courier.port, self._folder / CA)
        except OSError:  # to start again would not help; the SuperNode itself tries on
            self._alone_since = None
            return None
        now = time.monotonic()
        self._alone_since = self._alone_since or now
        if now - self._alone_since < (_PATIENCE_DEAD if links else _PATIENCE) or (links and _carries(pid)):
            return None
        self._alone_since = None
        what = "its connection is dead" if links else "it does not connect"
        return f"head office can be reached, but {what}"


def connected(pid: int, port: int) -> bool:
    """Whether a process has a connection to a port of another machine, and that answers on it."""
    return any(_links(pid, port))


def _links(pid: int, port: int) -> list[bool]:
    """Return, of every connection of a process to a port of another machine, whether that answers on it.

    What it has opened to another port is counted, too: on the way there may be a proxy (gRPC heeds https_proxy).
    """
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return []
    silent = _silent(pid)
    own = {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}
    return [
        c.laddr.port not in silent
        for c in connections
        if c.status == psutil.CONN_ESTABLISHED and c.raddr and (c.raddr.port == port or c.laddr.port not in own)
    ]


def _silent(pid: int) -> set[int]:
    """Return the local ports of connections whose other end has not answered for long.

    TCP itself holds on to them for a quarter of an hour (tcp(7): tcp_retries2), and Flower sets no shorter limit.
    """
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text("ascii").splitlines()[1:]:
                fields = line.split()  # Linux, networking/proc_net_tcp: 1 local address, 6 retransmissions, both hex
                if int(fields[6], 16) >= _RETRANSMISSIONS:
                    found.add(int(fields[1].rpartition(":")[2], 16))
    return found
