"""Flower's SuperLink as head office runs it: its process, the nodes that it lets in, and the runs handed to it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fedllm.errors import FederationError
from fedllm.files import LOCK, in_use, read, write_secret
from fedllm.reach import ONLY_TLS_1_3
from fedllm.supervisor import Child
from server.federation import HeadOffice, Roster

HOME = "FEDLLM_HOME"  # tells the ServerApp, which the SuperLink starts, where head office's folder is
RUNS = "runs"  # folder of the runs' folders
TICKET = "ticket"  # key of a Flower run's configuration: what tells the ServerApp which run is meant
CONTROL_HOST = "127.0.0.1"  # whoever reaches the Control API runs code on every node, and it asks for no password
_CONNECTION = "head-office"
_TIMEOUT = 60  # seconds for one command of Flower's
_IN_USE = "already in use"

# All that travels to the nodes: the names of the two apps, which are installed there. No file is bundled.
_BUNDLE = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedllm-run"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedllm"
fab-include = ["pyproject.toml"]

[tool.flwr.app.components]
serverapp = "{server}"
clientapp = "{client}"

[tool.flwr.app.config]
ticket = ""
"""

RunState = Literal["pending", "running", "completed", "failed", "stopped"]


def environment(home: Path) -> dict[str, str]:
    """Return what Flower's processes of head office need: quiet, at home in our folder, nothing fetched at run time."""
    return {
        **ONLY_TLS_1_3,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(home / "flower"),
        HOME: str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # Flower starts its own tools
    }


def superlink(office: HeadOffice) -> Child:
    """Return the SuperLink's process, which is started again when its certificate changes and no run is at work."""
    folder, config = office.folder, office.config
    (folder / "flower").mkdir(mode=0o700, exist_ok=True)
    command = [
        str(Path(sys.executable).parent / "flower-superlink"),
        "--ssl-ca-certfile", str(office.ca_file),
        "--ssl-certfile", str(office.server_certificate_file),
        "--ssl-keyfile", str(office.server_key_file),
        "--enable-supernode-auth",
        "--database", str(folder / "flower" / "state.db"),
        "--host", CONTROL_HOST, "--port", str(config.control_port),
        "--fleet-api-address", f"{_bracketed(config.listen)}:{config.fleet_port}",
        "--isolation", "subprocess",
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    return Child(
        "SuperLink", lambda: command, folder / "log" / "superlink.log", environment(folder),
        made_of=partial(read, office.server_certificate_file), busy=lambda _: in_progress(folder),
    )  # fmt: skip


def in_progress(home: Path) -> bool:
    """Whether the process of any run is at work."""
    return any(in_use(lock.parent) for lock in (home / RUNS).glob(f"*/{LOCK}"))


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


class Control:
    """Head office's hand on its SuperLink, through Flower's own command line."""

    def __init__(self, office: HeadOffice) -> None:
        self.office = office
        self._flower = office.folder / "flower"
        self._nodes = self._flower / "nodes.json"  # node key -> the SuperLink's number for it

    def sync(self, roster: Roster) -> list[str]:
        """Register the roster's node keys, unregister all others, and return what was done, a line each.

        Raises FederationError where the SuperLink cannot be reached.
        """
        wanted = {key: member.site for member in roster.active for key in member.node_keys}
        known = self._known()
        done = []
        for key in sorted(set(known) - set(wanted)):
            if known[key] is not None:
                self._flwr("supernode", "unregister", str(known[key]), _CONNECTION, may_fail="not found")
            del known[key]
            self._remember(known)
            done.append("a node that is no longer in the roster was unregistered")
        for key in sorted(set(wanted) - set(known)):
            file = self._flower / "node.pub"
            write_secret(file, key.encode() + b"\n")
            answer = self._flwr("supernode", "register", str(file), _CONNECTION, may_fail=_IN_USE)
            known[key] = answer.get("node-id")
            self._remember(known)
            done.append(f"{wanted[key]} may connect")
        return done

    def _known(self) -> dict[str, Any]:
        # Another database knows no node: its identity is that of the file
        if not self._nodes.exists():
            return {}
        state: dict[str, Any] = json.loads(read(self._nodes))
        return state["nodes"] if state["database"] == self._database() else {}

    def _remember(self, nodes: Mapping[str, Any]) -> None:
        write_secret(self._nodes, json.dumps({"database": self._database(), "nodes": nodes}).encode())

    def _database(self) -> int:
        try:
            return (self._flower / "state.db").stat().st_ino
        except OSError:
            return 0

    def start(self, ticket: str, server: str = "server.app:app", client: str = "client.app:app") -> str:
        """Hand a run, which its process will know by `ticket`, to the SuperLink and return Flower's number for it.

        `server` and `client` name the apps, which are installed where they run.
        """
        bundle = self._flower / "bundle"
        write_secret(bundle / "pyproject.toml", _BUNDLE.format(server=server, client=client).encode())
        override = self._flower / "run.toml"
        write_secret(override, f"{TICKET} = {json.dumps(ticket)}\n".encode())
        answer = self._flwr("run", str(bundle), _CONNECTION, "--run-config", str(override))
        return str(answer["run-id"])

    def state(self, number: str) -> RunState:
        """Return what has become of a run; raises FederationError where the SuperLink cannot tell."""
        runs = self._flwr("list", _CONNECTION, "--run-id", number)["runs"]
        status = str(runs[0]["status"])
        if status.startswith("finished"):
            outcome = status.partition(":")[2]
            return "completed" if outcome == "completed" else "stopped" if outcome == "stopped" else "failed"
        return "running" if status == "running" else "pending"

    def stop(self, number: str) -> None:
        """End a run where it is; its checkpoint is kept."""
        self._flwr("stop", number, _CONNECTION)

    def connected(self) -> dict[str | None, bool]:
        """Return the sites of all registered nodes, None for a node of another's, and whether one is online.

        Raises FederationError where the SuperLink cannot be reached.
        """
        roster, known = Roster.load(self.office.roster_file), self._known()
        members = {str(number): roster.site_of_node_key(key) for key, number in known.items()}
        unnumbered = members.get("None")  # was registered before nodes.json was written
        found: dict[str | None, bool] = {}
        for node in self._flwr("supernode", "list", _CONNECTION)["nodes"]:
            if node["status"] == "unregistered":
                continue
            member = members.get(str(node["node-id"]), unnumbered)
            site = member.site if member is not None else None
            found[site] = found.get(site, False) or node["status"] == "online"
        return found

    def reachable(self) -> bool:
        """Whether the SuperLink answers."""
        try:
            self._flwr("supernode", "list", _CONNECTION)
        except FederationError:
            return False
        return True

    def _flwr(self, *arguments: str, may_fail: str | None = None) -> dict[str, Any]:
        """Run one of Flower's commands; raises FederationError where it fails with another reason than `may_fail`."""
        settings = (
            f'[superlink]\ndefault = "{_CONNECTION}"\n[superlink.{_CONNECTION}]\n'
            f'address = "{CONTROL_HOST}:{self.office.config.control_port}"\n'
            f"root-certificates = {json.dumps(str(self.office.ca_file))}\n"
            'federation = "@none/default"\n'
        )
        write_secret(self._flower / "config.toml", settings.encode())
        command = [str(Path(sys.executable).parent / "flwr"), *arguments, "--format", "json"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT, check=False,
                cwd=self._flower,  # it looks for apps in the present folder, which may be closed to this user
                env={**os.environ, **environment(self.office.folder)},
            )  # fmt: skip
            answer: dict[str, Any] = json.loads(done.stdout)
        except subprocess.TimeoutExpired:
            raise FederationError(f"the SuperLink did not answer in {_TIMEOUT} s. Is the machine overloaded?") from None
        except ValueError:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise FederationError(f"flwr {arguments[0]} failed: {lines[-1] if lines else 'without a word'}") from None
        if not answer.get("success", False):
            said = str(answer.get("error-message", "")).strip()
            if may_fail is not None and may_fail in said:
                return {}
            if "unavailable" in said:
                raise FederationError("the SuperLink does not answer. Is it running? fedllm server start")
            raise FederationError(f"flwr {arguments[0]} failed: {said.splitlines()[-1] if said else 'no reason given'}")
        return answer
