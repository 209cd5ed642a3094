"""What a deployed round costs beyond training: fedllm, the stock Flower arrangement, and the floor under both.

python -m simulations.benchmarks.deployment --out runs/deployment

Two offices and a head office on loopback, over TLS, with node authentication; all three arrangements run on the same
SuperLink and SuperNodes, one after the other. Stock: the ClientApp loads model and adapter for every message, trains
one plain step and sends A and B in float32. fedllm: the site service keeps the model, takes one DP step, and sends B in
float16, signed and sealed. Floor: apps that send a few bytes back. The first round of each is left out.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

from client import office as site_folder
from fedllm.errors import FederationError
from fedllm.plan import ModelConfig
from fedllm.training.model import load_reader
from server import federation
from server.superlink import Control
from simulations.benchmarks.stock import RESULT, ROUNDS, SETTINGS

OFFICES, RECORDS, BATCH, TOKENS = ("one", "two"), 200, 8, 64
_FEDLLM = (sys.executable, "-m", "fedllm.cli")
# name -> hidden size, layers, MLP size
MODELS = {"1M": (128, 4, 352), "103M": (1024, 8, 2816)}


@dataclass(frozen=True)
class Row:
    """One arrangement on one model."""

    model: str
    arrangement: str
    seconds: list[float]  # of each round but the first
    training: list[float]  # of the slowest site in each of these rounds
    memory_mb: float  # all processes of one office together, at most
    up: float  # bytes from one site in one round
    down: float

    @property
    def beyond(self) -> list[float]:
        """Seconds of each round that were not training."""
        return [a - b for a, b in zip(self.seconds, self.training, strict=True)]


def main(
    out: Annotated[Path, typer.Option("--out", help="An empty folder for keys, models and results.")],
    models: Annotated[str, typer.Option("--models", help="Comma-separated, of 1M and 103M.")] = "1M,103M",
) -> None:
    """Measure seconds a round beyond training, memory of an office, bytes of a round."""
    out.mkdir(parents=True)
    out = out.absolute()
    rows = [row for name in models.split(",") for row in _measure(name, out / name)]
    table = Table(title=f"{len(OFFICES)} offices on loopback, rounds 2 to {ROUNDS}: median (least to most)")
    for heading in ("model", "arrangement", "s a round", "training", "beyond training", "beyond / floor",
                    "office, MB", "up, kB", "down, kB"):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        floor = next(r for r in rows if r.model == row.model and r.arrangement == "floor")
        cells = [_spread(row.seconds), _spread(row.training), _spread(row.beyond)]
        ratio = f"{median(row.beyond) / median(floor.beyond):.2f}"
        sizes = [f"{row.memory_mb:.0f}", f"{row.up / 1e3:.1f}", f"{row.down / 1e3:.1f}"]
        table.add_row(row.model, row.arrangement, *cells, ratio, *sizes)
    console = Console(width=140)
    console.print(table)
    with (out / "results.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=140).print(table)


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _measure(size: str, folder: Path) -> list[Row]:
    from simulations.benchmarks.stock_training import adapter_shapes, make_model

    folder.mkdir(mode=0o700)
    model = folder / "model"
    make_model(model, *MODELS[size])
    settings = {
        "model": str(model), "batch": BATCH, "tokens": TOKENS, "nodes": len(OFFICES), "stock": False,
        "adapter": adapter_shapes(str(model)),
    }  # fmt: skip
    place = folder / "settings.json"
    place.write_text(json.dumps(settings), "utf-8")
    head, homes = _provision(folder, model)
    environment = {**os.environ, SETTINGS: str(place), "OMP_NUM_THREADS": "1"}
    programs = [
        subprocess.Popen(
            [*_FEDLLM, *command, "--home", str(home)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        for command, home in ((("server", "start"), head.folder), *((("site", "start"), home) for home in homes))
    ]  # fmt: skip
    control = Control(head)
    try:
        while not control.reachable():
            time.sleep(1)
        rows = []
        for name in ("floor", "stock"):
            place.write_text(json.dumps({**settings, "stock": name == "stock"}), "utf-8")
            with _Memory(programs[1].pid, without="serve") as memory:  # the site service has no part in these
                rows.append(_flower(size, name, folder / name, control, memory))
        with _Memory(programs[1].pid) as memory:
            rows.append(_ours(size, head.folder, homes, model, environment, memory))
        return rows
    finally:
        for program in programs:
            program.terminate()
        for program in programs:
            program.wait(60)


def _provision(folder: Path, model: Path) -> tuple[federation.HeadOffice, list[Path]]:
    import socket

    ports = []
    for _ in range(2):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            ports.append(found.getsockname()[1])
    values = {"name": "benchmark", "host": "127.0.0.1", "listen": "127.0.0.1", "fleet_port": ports[0],
              "control_port": ports[1]}  # fmt: skip
    (folder / "federation.yaml").write_text(json.dumps(values), "utf-8")
    head = federation.init_federation(folder / "federation.yaml", folder / "head-office")
    homes = []
    for name in OFFICES:
        home = folder / name
        made = site_folder.init_office(home, name)
        words = "branch office counter form deposit transfer exchange limit "
        lines = [json.dumps({"text": f"{number} {words * 8}"}) for number in range(RECORDS)]
        (home / "records.jsonl").write_text("\n".join(lines), "utf-8")
        settings = {
            "name": name,
            "data": {"train": "records.jsonl", "text": "{text}", "size": RECORDS},
            # rounds are timed: updates leave when they are ready, and not at the 5 s of a real office
            "policy": {"epsilon": 1000.0, "delta": 1e-5, "min_units": 1, "reply_quantum": 0.0},
            "models": {str(model): str(model)},
            "resources": {"threads": 1},
        }
        (home / "site.yaml").write_text(json.dumps(settings), "utf-8")
        grant = federation.admit(head.folder, made.join_file.read_bytes(), made.identity.public.fingerprint)
        site_folder.install(home, grant.read_bytes(), head.identity.public.fingerprint)
        office = site_folder.Office.open(home)
        config = ModelConfig(source=str(model))
        office.declare({str(model): load_reader(config).digest}, {str(model): office.files_digest(config)})
        homes.append(home)
    return federation.HeadOffice.open(head.folder), homes


def _flower(size: str, name: str, folder: Path, control: Control, memory: "_Memory") -> Row:
    folder.mkdir()
    apps = "simulations.benchmarks.stock"
    number = control.start(str(folder), f"{apps}:server", f"{apps}:{name}_client")
    while control.state(number) in ("pending", "running"):
        time.sleep(2)
    if not (folder / RESULT).exists():
        raise FederationError(f"the {name} run failed; see {control.office.folder / 'log' / 'superlink.log'}")
    rounds: list[dict[str, Any]] = json.loads((folder / RESULT).read_text("utf-8"))[1:]
    training = [max((site.get("training", 0.0) for site in each["sites"]), default=0.0) for each in rounds]
    bytes_ = float(rounds[0]["sites"][0].get("bytes", 0.0))
    return Row(size, name, [each["seconds"] for each in rounds], training, memory.peak_mb, bytes_, bytes_)


def _ours(size: str, head: Path, homes: list[Path], model: Path, environment: dict[str, str], memory: "_Memory") -> Row:
    values = {
        "name": "ours", "model": "causal-lm", "model.source": model, "model.max_length": TOKENS, "data": "heldout",
        "data.text": "'{text}'", "privacy.unit": "record", "privacy.units_per_site": RECORDS,
        "privacy.sampling_rate": BATCH / RECORDS, "privacy.noise_multiplier": 1.0, "training.rounds": ROUNDS,
        "federation.quorum": len(OFFICES), "data.samples": 0,
    }  # fmt: skip
    command = [*_FEDLLM, "submit", *(f"{key}={value}" for key, value in values.items()), "--home", str(head)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    lines = (head / "runs" / "ours" / "metrics.jsonl").read_text("utf-8").splitlines()
    rounds = [json.loads(line) for line in lines][2:]
    answered = re.compile(r"answered with (\d+) bytes after ([\d.]+) s")
    by_site = []
    for home in homes:
        found = answered.findall((home / "log" / "service.log").read_text("utf-8"))
        by_site.append([float(seconds) for size_, seconds in found if int(size_) > 2000][-len(rounds) :])
    training = [max(seconds) for seconds in zip(*by_site, strict=True)]
    up, down = (median(each[key] for each in rounds) / len(homes) for key in ("bytes_up", "bytes_down"))
    return Row(size, "fedllm", [each["seconds"] for each in rounds], training, memory.peak_mb, up, down)


class _Memory:
    """The most memory that a process and all below it held at one time, those with `without` as a word left out."""

    def __init__(self, pid: int, without: str = "") -> None:
        self._top, self._over, self._without = psutil.Process(pid), threading.Event(), without
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_mb = 0.0

    def __enter__(self) -> "_Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            total = 0
            for process in [self._top, *self._top.children(recursive=True)]:
                try:
                    total += 0 if self._without in process.cmdline() else process.memory_info().rss
                except psutil.Error:
                    continue
            self.peak_mb = max(self.peak_mb, total / 2**20)


if __name__ == "__main__":
    typer.run(main)
