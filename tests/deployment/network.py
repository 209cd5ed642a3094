"""A network of namespaces, joined by a bridge, whose links can be cut, silenced, slowed down and made poor."""

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self, TypeVar

T = TypeVar("T")
HEAD = "head"


def do(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


class Network:
    """Namespaces joined by a bridge; everything is named after this process and removed at the end."""

    def __init__(self, addresses: Mapping[str, str]) -> None:
        self.addresses = addresses
        self._tag = f"fl{os.getpid()}"
        self._made: list[str] = []

    def __enter__(self) -> Self:
        try:
            wan = self._namespace("wan")
            do("ip", "-n", wan, "link", "add", "name", "lan", "type", "bridge")
            do("ip", "-n", wan, "link", "set", "lan", "up")
            for name, address in self.addresses.items():
                home = self._namespace(name)
                do("ip", "-n", wan, "link", "add", "name", name, "type", "veth", "peer", "name", "eth0", "netns", home)
                do("ip", "-n", home, "address", "add", f"{address}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    do("ip", "-n", home, "link", "set", device, "up")
                self.heal(name)
                self.plug(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(self._made):  # what is inside goes with it
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=60)

    def _namespace(self, name: str) -> str:
        do("ip", "netns", "add", f"{self._tag}-{name}")
        self._made.append(f"{self._tag}-{name}")
        return f"{self._tag}-{name}"

    def prefix(self, name: str) -> list[str]:
        """Put before a command, it runs in the namespace."""
        return ["ip", "netns", "exec", f"{self._tag}-{name}"]

    def unplug(self, name: str) -> None:
        """Pull the cable: the other end notices."""
        do("ip", "-n", f"{self._tag}-wan", "link", "set", name, "down")

    def plug(self, name: str) -> None:
        do("ip", "-n", f"{self._tag}-wan", "link", "set", name, "up")

    def silence(self, name: str) -> None:
        """Let all packets vanish; neither end is told."""
        do("ip", "-n", f"{self._tag}-wan", "link", "set", name, "nomaster")

    def heal(self, name: str) -> None:
        do("ip", "-n", f"{self._tag}-wan", "link", "set", name, "master", "lan")

    def slow_down(self, name: str, rate: str) -> bool:
        """Limit a link in both directions; False where this kernel cannot."""
        limit = ["root", "tbf", "rate", rate, "burst", "16kb", "latency", "500ms"]
        try:
            do(*self.prefix(name), "tc", "qdisc", "add", "dev", "eth0", *limit)
            do(*self.prefix("wan"), "tc", "qdisc", "add", "dev", name, *limit)
        except (OSError, subprocess.CalledProcessError):
            return False
        return True

    def forget(self, name: str) -> bool:
        """Drop at the server, for ever, what belongs to a site's present connections, as a firewall does that has
        forgotten them; new ones pass. False where there is no nft."""
        if shutil.which("nft") is None:
            return False
        head = self.prefix(HEAD)
        ports = self.ports_to_head(name)
        assert ports
        do(*head, "nft", "add table inet gone; add chain inet gone in { type filter hook input priority 0; }")
        for port in ports:
            do(*head, "nft", f"add rule inet gone in ip saddr {self.addresses[name]} tcp sport {port} drop")
        return True

    def sockets(self, name: str, *options: str) -> list[str]:
        return do(*self.prefix(name), "ss", *options).splitlines()

    def ports_to_head(self, name: str) -> set[int]:
        """The local ports of a site's connections to the server."""
        lines = [line.split() for line in self.sockets(name, "-Htn")]
        return {
            int(line[3].rpartition(":")[2]) for line in lines if self.addresses[HEAD] in line[4]
        }  # it may be ::ffff:

    def inside(self, name: str, call: Callable[[], T]) -> T:
        """Call a function in a thread that lives in the namespace; its sockets stay there."""
        found: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                with Path(f"/run/netns/{self._tag}-{name}").open("rb") as place:
                    if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), 0) != 0:
                        raise OSError(ctypes.get_errno(), "setns")
                found.append(call())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return found[0]


def why_not() -> str | None:
    """Why there can be no network here, None where there can."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    missing = [tool for tool in ("ip", "ss") if shutil.which(tool) is None]
    if missing:
        return f"{missing[0]} is not installed (package iproute2)"
    probe = f"fl{os.getpid()}-probe"
    try:
        do("ip", "netns", "add", probe)
        do("ip", "-n", probe, "link", "add", "name", "one", "type", "veth", "peer", "name", "two")
        do("ip", "-n", probe, "link", "add", "name", "lan", "type", "bridge")
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        return f"this machine permits no network namespaces with bridges: {said}"
    finally:
        subprocess.run(["ip", "netns", "delete", probe], check=False, capture_output=True, timeout=60)
    return None
