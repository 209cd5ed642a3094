"""Flower's SuperNode as an office runs it, from a folder that holds a node key, head office's address and no record."""

import json
import os
import socket
import ssl
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
from fedllm.supervisor import Child

_SETTINGS, _KEY, _CA = "courier.json", "node", "ca.pem"
_PATIENCE = 45.0  # seconds without a connection, while head office can be reached, until the SuperNode is started anew
_HANDSHAKE = 5.0  # seconds


class Courier(Frozen):
    """What the courier's side of an office knows."""

    host: str
    port: int
    socket: str  # of the site service


def hand_out(office: Office, folder: Path) -> None:
    """Write the courier's folder: all that a SuperNode needs, and nothing that opens a message or a record."""
    host, _, port = office.superlink.rpartition(":")
    courier = Courier(host=host.strip("[]"), port=int(port), socket=str(office.socket))
    write_secret(folder / _KEY, read_secret(office.node_key_file))
    write_secret(folder / _CA, read_secret(office.ca_file))
    write_secret(folder / _SETTINGS, courier.model_dump_json(indent=2).encode() + b"\n")


def read_courier(folder: Path) -> Courier:
    """Read a courier's folder; raises FolderError."""
    check_private(folder)
    try:
        return Courier.model_validate_json(read_secret(folder / _SETTINGS))
    except ValidationError:
        raise FolderError(
            f"{folder / _SETTINGS} is damaged. Make it again, as the site's user: fedllm site courier {folder}"
        ) from None


def supernode(folder: Path, log: Path, refresh: Callable[[], None] = lambda: None) -> Child:
    """Return the SuperNode's process, which is started again when its folder changes or it has lost head office.

    `refresh` brings the folder up to date, and is called before every look at it.
    """

    def made_of() -> tuple[bytes, ...]:
        refresh()
        return tuple(read(folder / name) for name in (_SETTINGS, _KEY, _CA))

    return Child(
        "SuperNode",
        partial(_command, folder),
        log,
        {
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_HOME": str(folder / "flower"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # for Flower's own tools
        },
        made_of=made_of,
        ails=_Watch(folder).ails,
    )


def _command(folder: Path) -> Sequence[str]:
    courier = read_courier(folder)
    host = f"[{courier.host}]" if ":" in courier.host else courier.host
    return [
        str(Path(sys.executable).parent / "flower-supernode"),
        "--superlink", f"{host}:{courier.port}",
        "--root-certificates", str(folder / _CA),
        "--auth-supernode-private-key", str(folder / _KEY),
        "--host", "127.0.0.1", "--port", str(_free_port()),
        "--isolation", "subprocess",
        "--node-config", f"{SOCKET}={json.dumps(courier.socket, ensure_ascii=False)}",
    ]  # fmt: skip


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def reach(courier: Courier, ca: Path) -> None:
    """Shake hands with head office's SuperLink as the SuperNode would; raises OSError with what is wrong."""
    context = ssl.create_default_context(cafile=str(ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((courier.host, courier.port), timeout=_HANDSHAKE) as plain,
        context.wrap_socket(plain, server_hostname=courier.host) as secured,
    ):
        if secured.selected_alpn_protocol() != "h2":
            raise OSError("the other end speaks TLS, but not gRPC")


class _Watch:
    """Notices a SuperNode that has given up while head office can be reached (flwr 1.39: an expired certificate)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._alone_since: float | None = None

    def ails(self, pid: int) -> str | None:
        """Return why the SuperNode must be started again, None where it need not."""
        courier = read_courier(self._folder)
        if _connected(pid, courier.port):
            self._alone_since = None
            return None
        try:
            reach(courier, self._folder / _CA)
        except OSError:  # to start again would not help; the SuperNode itself tries on
            self._alone_since = None
            return None
        now = time.monotonic()
        self._alone_since = self._alone_since or now
        if now - self._alone_since < _PATIENCE:
            return None
        self._alone_since = None
        return "head office can be reached, but it does not connect"


def _connected(pid: int, port: int) -> bool:
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return False
    return any(c.status == psutil.CONN_ESTABLISHED and c.raddr and c.raddr.port == port for c in connections)
