"""What a deployed round costs beside the same round in one process: a daemon and three sites with relays on loopback.

    python -m simulations.benchmarks.deployment --out runs/deployment

Three branches of the demo, same records, plan and rounds: once deployed (a daemon, a run's process, three sites, each
with its relay, TLS), once as `fedllm simulate`, in turn. Replies leave when they are ready (policy.reply_quantum: 0).
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import psutil
import typer

from client import office as site_folder
from client.relay import export_relay_folder
from fedllm.config import ModelConfig
from fedllm.training.model import load_reader
from server import federation
from server.grpc_grid import look

BRANCHES = ("seoul-gangnam", "busan-haeundae", "seoul-mapo")
_BASE = "pkg://simulations.demo/base"
_DEMO = Path(__file__).parents[1] / "demo" / "data" / "train.jsonl"
_FEDLLM = (sys.executable, "-m", "fedllm.cli")


def main(
    out: Annotated[Path, typer.Option("--out", help="An empty folder for keys, records and results.")],
    rounds: Annotated[int, typer.Option("--rounds", help="Of each run; the first is left out.")] = 6,
    mode: Annotated[str, typer.Option("--mode", help="distributed or local.")] = "distributed",
) -> None:
    """Measure seconds a round, deployed and in one process, and the memory of a site."""
    out.mkdir(parents=True)
    out = out.absolute()
    lines = [json.loads(line) for line in _DEMO.read_text("utf-8").splitlines()]
    by_branch = {name: [row for row in lines if row["branch"] == name] for name in BRANCHES}
    units = round(median(len({row["customer_id"] for row in rows}) for rows in by_branch.values()))
    head, homes = _provision(out, by_branch, units)
    plan = {
        "experiment": "demo-offices", "training.rounds": rounds, "privacy.mode": mode, "privacy.units_per_site": units,
        "data.samples": 0, "federation.quorum": len(BRANCHES),
    }  # fmt: skip
    commands = [
        *(("site", "relay", str(_relay_of(home))) for home in homes),
        *(("site", "start", "--home", str(home)) for home in homes),
        ("server", "start", "--home", str(head.folder)),
    ]
    programs = [
        subprocess.Popen([*_FEDLLM, *words], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) for words in commands
    ]
    site = [psutil.Process(programs[number].pid) for number in (0, len(homes))]  # the first one's relay and process
    try:
        until = time.monotonic() + 300
        while len(_online(head)) < len(BRANCHES) and time.monotonic() < until:
            time.sleep(0.2)
        waiting = _memory_mb(site)
        with _Memory(site) as memory:
            _run("submit", {"name": "deployed", **plan}, "--home", str(head.folder))
        deployed = _seconds(head.folder / "runs" / "deployed")
    finally:
        for program in programs:
            program.terminate()
        for program in programs:
            program.wait(60)
    together = out / "records.jsonl"
    together.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for rows in by_branch.values() for row in rows), "utf-8"
    )
    _run("simulate", {
        **{key: value for key, value in plan.items() if key != "experiment"}, "name": "simulated",
        "output": str(out), "data.train": str(together), "federation": "branches",
    })  # fmt: skip
    simulated = _seconds(out / "simulated")
    print(f"s a round deployed        {_spread(deployed)}")
    print(f"s a round in one process  {_spread(simulated)}")
    print(f"ratio of the medians      {median(deployed) / median(simulated):.2f}")
    for label, found in (("while it waits", waiting), ("at most", memory.peak_mb)):
        print(f"memory of a site, MB   {sum(found):.0f} {label}, its relay's part {found[0]:.0f}")


def _online(head: federation.HeadOffice) -> Sequence[object]:
    from fedllm.errors import FederationError

    try:
        return list(look(head.socket).connected)
    except FederationError:
        return []


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _run(command: str, values: dict[str, object], *more: str) -> None:
    words = [f"{key}={value}" for key, value in values.items()]
    subprocess.run([*_FEDLLM, command, *words, *more], check=True, stdout=subprocess.DEVNULL)


def _seconds(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["seconds"] for line in lines[2:]]


def _provision(
    folder: Path, by_branch: dict[str, list[dict[str, object]]], units: int
) -> tuple[federation.HeadOffice, list[Path]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        values = {"name": "benchmark", "host": "127.0.0.1", "listen": "127.0.0.1", "port": free.getsockname()[1]}
    (folder / "federation.yaml").write_text(json.dumps(values), "utf-8")
    head = federation.init_federation(folder / "federation.yaml", folder / "head")
    homes = []
    for name, rows in by_branch.items():
        homes.append(home := folder / name)
        site_folder.init_office(home, name)
        (home / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    made = [site_folder.Office.open(home) for home in homes]
    for home, office in zip(homes, made, strict=True):
        peers = {each.name: each.identity.public.fingerprint for each in made if each is not office}
        settings = {
            "name": office.name,
            "data": {
                "train": "records.jsonl", "prompt": "Q: {question}\nA:", "text": " {answer}", "unit": "customer_id",
                "size": units,
            },
            "policy": {
                "epsilon": 100.0, "delta": 1e-5, "unit": "person", "min_units": 1, "reply_quantum": 0.0,
                "max_sampling_rate": 1.0, "peers": peers,
            },
            "models": {_BASE: _BASE}, "resources": {"threads": 1}, "socket": str(home / "link.sock"),
        }  # fmt: skip
        (home / "site.yaml").write_text(json.dumps(settings), "utf-8")
        grant = federation.admit(head.folder, office.join_file.read_bytes(), office.identity.public.fingerprint)
        granted = site_folder.install(home, grant.read_bytes(), head.identity.public.fingerprint)
        export_relay_folder(granted, _relay_of(home))
        model = ModelConfig(source=_BASE)
        granted.declare({_BASE: load_reader(model).digest}, {_BASE: granted.files_digest(model)})
    return federation.HeadOffice.open(head.folder), homes


def _relay_of(home: Path) -> Path:
    return home.with_name(f"{home.name}-relay")


def _memory_mb(processes: Sequence[psutil.Process]) -> list[float]:
    """Return what processes hold, MB, each with all below it."""
    return [sum(each.memory_info().rss for each in (top, *top.children(recursive=True))) / 2**20 for top in processes]


class _Memory:
    """The most memory that processes and all below them held at one time."""

    def __init__(self, processes: Sequence[psutil.Process]) -> None:
        self._processes, self._over = processes, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_mb = [0.0]

    def __enter__(self) -> "_Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            self.peak_mb = max(self.peak_mb, _memory_mb(self._processes), key=sum)


if __name__ == "__main__":
    os.umask(0o077)
    typer.run(main)
