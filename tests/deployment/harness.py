"""A server and sites as real processes: `fedllm server start`, `fedllm site start`, `fedllm submit`."""

import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from client import office as site_folder
from client.relay import export_relay_folder
from fedllm.cli.hydra_config import compose, validate
from fedllm.config import DeploymentConfig, ModelConfig
from fedllm.errors import FederationError
from fedllm.files import is_locked
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import AccountingEvent, spent
from fedllm.privacy.ledger import LedgerFile
from fedllm.training.model import load_reader
from server import deployment, federation
from server.checkpoint import CONFIG, SiteState, load_checkpoint, read_as
from server.events import CHECKPOINT, PLAN, Event, RoundMetrics
from server.grpc_grid import look

FEDLLM = [sys.executable, "-m", "fedllm.cli"]
DELTA = 1e-5
_DEMO = Path(__file__).parents[2] / "simulations" / "demo" / "data" / "train.jsonl"
BRANCHES = {"seoul-gangnam": "seoul-gangnam", "busan-haeundae": "busan-haeundae", "서울-마포": "seoul-mapo"}
ALONE = "busan-haeundae"  # the one site that takes part in the suite


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
        with contextlib.suppress(OSError):  # an address of another network namespace: any port is free there
            found.bind((host, 0))
            return int(found.getsockname()[1])
        found.bind(("", 0))
        return int(found.getsockname()[1])


def until(come_about: Callable[[], Any], seconds: float = 600.0, what: str = "it", pause: float = 0.1) -> Any:
    """Wait until something is true and return it."""
    deadline = time.monotonic() + seconds
    while not (found := come_about()):
        assert time.monotonic() < deadline, f"{what} did not come about in {seconds:.0f} s"
        time.sleep(pause)
    return found


@dataclass
class Program:
    """A `fedllm` command that runs until it is stopped; `prefix` runs it elsewhere, such as in a namespace."""

    arguments: Sequence[str]
    log: Path
    prefix: Sequence[str] = ()
    env: dict[str, str] = field(default_factory=dict)
    command: Sequence[str] = tuple(FEDLLM)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, *self.command, *self.arguments], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", **self.env},
            )  # fmt: skip

    def started(self, ready: str) -> None:
        """Start it, and wait until it says so."""
        before = self.text().count(ready)
        self.start()
        self.says(ready, before)

    def says(self, words: str, before: int = 0) -> None:
        """Wait until it has said words more often than `before`."""
        until(lambda: self.text().count(words) > before or self.ended, what=f"{words!r} in {self.log}")
        assert self.text().count(words) > before, self.text()[-3000:]

    @property
    def ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def processes(self) -> list[psutil.Process]:
        """The process of this program and its children, but for what runs by itself: a daemon's runs."""
        if self.process is None or self.ended:
            return []
        found = []
        with contextlib.suppress(psutil.Error):
            mine = psutil.Process(self.process.pid)
            for each in [mine, *mine.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    if os.getsid(each.pid) == os.getsid(self.process.pid):
                        found.append(each)
        return found

    def kill(self) -> None:
        """kill -9."""
        found = self.processes()
        assert found, f"{self.arguments} has ended already"
        for each in found:
            with contextlib.suppress(psutil.Error):
                each.kill()
        assert self.process is not None
        self.process.wait(60)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Stop its clock."""
        found = self.processes()
        for each in found:
            each.suspend()
        try:
            yield
        finally:
            for each in found:
                with contextlib.suppress(psutil.Error):
                    each.resume()

    def tell_to_stop(self) -> None:
        """End it as an operator would."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def stop(self) -> None:
        """End it as an operator would, and make sure of it."""
        everything = self.processes()
        self.tell_to_stop()
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        for each in everything:
            with contextlib.suppress(psutil.Error):
                each.kill()
        if self.process is not None:
            self.process.wait(30)

    def text(self) -> str:
        return self.log.read_text("utf-8") if self.log.exists() else ""


def stop_all(programs: Sequence[Program]) -> None:
    """End programs, all at the same time."""
    for program in programs:
        program.tell_to_stop()
    for program in programs:
        program.stop()


def fedllm(*arguments: str, prefix: Sequence[str] = (), timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run a `fedllm` command to its end."""
    return subprocess.run(
        [*prefix, *FEDLLM, *arguments], capture_output=True, text=True, timeout=timeout, check=False,
        stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
    )  # fmt: skip


class HeadOffice:
    """The server: its folder and its long-running program."""

    def __init__(self, folder: Path, host: str = "127.0.0.1", prefix: Sequence[str] = (), **settings: Any) -> None:
        self.home, self.host, self._prefix = folder / "head-office", host, prefix
        values = {"name": "한빛은행", "host": host, "listen": host, "port": free_port(host), **settings}
        file = folder / "federation.yaml"
        file.write_text(json.dumps(values, ensure_ascii=False), "utf-8")  # JSON is YAML
        self.office = federation.init_federation(file, self.home)
        self.port, self.socket = self.office.config.port, self.office.socket
        self.program = Program(["server", "start", "--home", str(self.home)], folder / "server.log", prefix)

    @property
    def fingerprint(self) -> str:
        return self.office.identity.public.fingerprint

    def start(self) -> None:
        self.program.started("ready: sites connect")

    def connected(self) -> set[str]:
        """The sites that are connected, as the daemon says."""
        with contextlib.suppress(FederationError):
            return {each.site for each in look(self.socket).connected}
        return set()

    def refused(self) -> dict[str, str]:
        """The sites that were refused, and why, as the daemon says."""
        return {each.site: each.text for each in look(self.socket).refused}

    def stop(self) -> None:
        """End the daemon and what runs are left."""
        self.program.stop()
        for folder in deployment.known_runs(self.home):
            if is_locked(folder) and (number := deployment.read_status(folder).process):
                with contextlib.suppress(psutil.Error):
                    psutil.Process(number).kill()

    def run_process(self, name: str) -> psutil.Process:
        """The process of a run that is under way."""
        until(lambda: self.status(name).process, what=f"the process of {name}")
        return psutil.Process(self.status(name).process)

    def begin(self, name: str, rounds: int, **more: Any) -> None:
        """What `fedllm submit --detach` does, sooner: the libraries are loaded here already."""
        self._hand_over(config_of(name, rounds, **more))

    def resume(self, name: str, **federation_settings: Any) -> None:
        """What `fedllm submit --resume NAME --detach` does, and the server may wait longer or shorter."""
        config = read_as(self.run(name) / CONFIG, DeploymentConfig)
        federated = config.federation.model_copy(update=federation_settings)
        self._hand_over(config.model_copy(update={"resume": True, "federation": federated}))

    def _hand_over(self, config: DeploymentConfig) -> None:
        deployment.prepare(self.home, config)
        deployment.hand_over(self.run(config.name), self.socket)

    def events(self, name: str) -> list[Event]:
        """What `fedllm submit` shows of the part of the run that was handed over last."""
        return deployment.events(self.run(name) / deployment.PROGRESS, 0)[0]

    def ended(self, name: str, seconds: float = 900) -> deployment.Status:
        """Wait until a run is over and its process gone, and return what became of it."""

        def over() -> bool:
            return not is_locked(self.run(name)) and not deployment.settle(self.run(name)).open

        until(over, seconds, f"the end of {name}", pause=0.3)
        return self.status(name)

    def plan(self, name: str) -> RunPlan:
        return read_as(self.run(name) / PLAN, RunPlan)

    def sites(self, name: str) -> dict[str, SiteState]:
        """What the server knows of the sites, from its last checkpoint."""
        return load_checkpoint(self.run(name) / CHECKPOINT).sites

    def follow(self, name: str) -> "subprocess.Popen[str]":
        """What an operator starts who wants to see a run to its end."""
        return subprocess.Popen(
            [*self._prefix, *FEDLLM, "status", name, "--follow", "--home", str(self.home)], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "300"},
        )  # fmt: skip

    def submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return fedllm("submit", *arguments, "--home", str(self.home), prefix=self._prefix)

    def run(self, name: str) -> Path:
        return deployment.runs(self.home) / name

    def rounds(self, name: str) -> list[RoundMetrics]:
        """The rounds that have been completed, round 0 being the base model."""
        path = self.run(name) / "metrics.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return [RoundMetrics(**json.loads(line)) for line in lines]

    def status(self, name: str) -> deployment.Status:
        return deployment.read_status(self.run(name))


class Branch:
    """A site: its folder and its long-running program, or two where a relay makes the connection."""

    def __init__(
        self, folder: Path, name: str, records: Path, prefix: Sequence[str] = (), model: Path | None = None,
        relayed: bool = False, **policy: Any,
    ) -> None:  # fmt: skip
        self.name, self.home = name, folder / f"site-{name}"
        site_folder.init_office(self.home, name)
        self.program = Program(["site", "start", "--home", str(self.home)], folder / f"{name}.log", prefix)
        self.relay_home = folder / f"relay-{name}"
        relay = Program(["site", "relay", str(self.relay_home)], folder / f"relay-{name}.log", prefix)
        self.relay = relay if relayed else None
        base = "pkg://simulations.demo/base"
        settings = {
            "name": name,
            "data": {
                "train": str(records), "prompt": "Q: {question}\nA:", "text": " {answer}", "unit": "customer_id",
                "size": 60,
            },
            "policy": {
                "epsilon": 20.0, "delta": DELTA, "unit": "person", "min_units": 20, "reply_quantum": 0.0,
                "max_sampling_rate": 1.0, **policy
            },
            "models": {base: base} if model is None else {str(model): str(model)},
            "resources": {"threads": 1},
        }  # fmt: skip
        if relayed:
            settings["socket"] = str(folder / f"run-{name}" / "link.sock")
        self.settings = settings
        self.write_settings()

    def write_settings(self) -> None:
        (self.home / "site.yaml").write_text(json.dumps(self.settings, ensure_ascii=False), "utf-8")
        (self.home / "site.yaml").chmod(0o600)
        office = site_folder.Office.open(self.home)  # as `fedllm site check` does
        models = {name: ModelConfig(source=name) for name in self.settings["models"]}
        office.declare(
            {name: load_reader(office.model(model)).digest for name, model in models.items()},
            {name: office.files_digest(model) for name, model in models.items()},
        )

    def join(self, head: HeadOffice) -> None:
        """Be admitted and install the grant."""
        office = site_folder.Office.open(self.home)
        grant = federation.admit(head.home, office.join_file.read_bytes(), office.identity.public.fingerprint)
        self.install(grant.read_bytes(), head.fingerprint)

    def install(self, grant: bytes, heard: str | None = None) -> None:
        """Install a grant, and hand the relay its folder."""
        office = site_folder.install(self.home, grant, heard)
        if self.relay is not None:
            export_relay_folder(office, self.relay_home)

    @property
    def office(self) -> site_folder.Office:
        """The folder as it is now."""
        return site_folder.Office.open(self.home)

    @property
    def programs(self) -> list[Program]:
        return [each for each in (self.program, self.relay) if each is not None]

    def start(self) -> None:
        if self.relay is not None:
            self.relay.started("the relay listens")
        self.program.start()

    def start_again(self) -> None:
        """Start the site alone, and wait until it is ready."""
        self.program.started("is ready")

    @property
    def log(self) -> str:
        """What the site has said, through all starts."""
        path = self.home / "log" / "site.log"
        return path.read_text("utf-8") if path.exists() else ""

    def ledger(self, run: str) -> dict[int, str]:
        """The rounds of a run that were charged, and whether their answer was RELEASED or only RESERVED."""
        path = self.home / "data" / "ledger.db"
        if not path.exists():
            return {}
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as db:
            rows = db.execute("SELECT round, state FROM entry WHERE run = ? ORDER BY id", (run,)).fetchall()
        assert len({number for number, _ in rows}) == len(rows), "a round was charged twice"
        return dict(rows)

    def spent(self, run: str) -> float:
        """The epsilon of a run, from the site's own ledger."""
        path = self.home / "data" / "ledger.db"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as db:
            rows = db.execute(
                "SELECT sampling_rate, noise_multiplier, steps FROM entry WHERE run = ?", (run,)
            ).fetchall()
        return spent([AccountingEvent(*row) for row in rows], DELTA).epsilon

    def caught(self, run: str, round_: int, seconds: float = 600) -> None:
        """Wait until a round is paid for, and records are being used for it."""
        using = self.home / "data" / "unfinished.json"
        until(lambda: round_ in self.ledger(run), seconds, f"round {round_} at {self.name}", pause=0.02)
        until(
            lambda: using.exists() or self.ledger(run)[round_] == "RELEASED", 60, f"round {round_} at {self.name}",
            pause=0.01,
        )  # fmt: skip

    def charged(self) -> list[AccountingEvent]:
        """What the site's own ledger says was paid for."""
        path = self.home / "data" / "ledger.db"
        return [charge.event for charge in LedgerFile(path).charges()] if path.exists() else []


def records_of(branch: str, path: Path, persons: int = 60) -> Path:
    """Write the embedded records of one branch, of so many persons."""
    chosen: dict[str, list[str]] = {}
    for line in _DEMO.read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["branch"] == branch and (row["customer_id"] in chosen or len(chosen) < persons):
            chosen.setdefault(row["customer_id"], []).append(line)
    path.write_text("".join(line + "\n" for lines in chosen.values() for line in lines), "utf-8")
    path.chmod(0o600)
    return path


def settings(name: str, rounds: int, **more: Any) -> list[str]:
    """The arguments of `fedllm submit` for a small run."""
    values = {
        "name": name, "experiment": "demo-offices", "training.rounds": rounds, "privacy.units_per_site": 60,
        "privacy.noise_multiplier": 1.0, "data.heldout_limit": 20, "data.samples": 1, **more,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def config_of(name: str, rounds: int, **more: Any) -> DeploymentConfig:
    """What `fedllm submit` makes of `settings`."""
    return validate(DeploymentConfig, compose("deployment", settings(name, rounds, **more), None))
