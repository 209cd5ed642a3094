"""What all benchmarks share: run the command line once per epsilon and seed, measure the process, make the tables."""

import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from fedllm.config import SimulationConfig
from fedllm.training.data import IGNORE, Tokeniser, build_units, read_table, render
from fedllm.values import parse
from server.checkpoint import CONFIG

_RESULT = "benchmark.json"


class Mode(Enum):
    """Who adds the noise."""

    local = "local"
    distributed = "distributed"
    pooled = "pooled"


_MODES = {
    Mode.local: ("privacy=local",),
    Mode.distributed: ("privacy=distributed", "federation.quorum=null"),
    Mode.pooled: (
        "privacy=local", "federation.partition.by=iid", "federation.partition.sites=1", "federation.quorum=1",
    ),
}  # fmt: skip
_PACKAGES = ("fedllm", "flwr", "torch", "transformers", "peft", "opacus", "dp-accounting")

# The options that every benchmark has.
DataOption = Annotated[
    Path, typer.Option("--data", exists=True, file_okay=False, help="Folder of the data set; see docs/benchmarks.md.")
]
ModelOption = Annotated[Path, typer.Option("--model", exists=True, file_okay=False, help="Folder of the base model.")]
EpsilonOption = Annotated[
    str, typer.Option("--epsilon", help="Comma-separated privacy budgets; `off` is the run without privacy.")
]
ModeOption = Annotated[
    Mode, typer.Option("--mode", help="Noise of every site's own, noise in shares, or one trainer who holds all data.")
]
SeedsOption = Annotated[int, typer.Option("--seeds", min=1, help="Runs for each epsilon, with seeds 0, 1, ...")]
OutOption = Annotated[
    Path, typer.Option("--out", help="Folder for the runs and results.md; runs that are complete are not repeated.")
]
OverrideArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[OVERRIDES]...", help="Further KEY=VALUE for every run.")
]


@dataclass(frozen=True)
class Measurement:
    """One finished run, as seen from outside and as its own records state it."""

    epsilon: float | None  # target; None: privacy=off
    seed: int
    before: float  # the benchmark's metric on the held-out set, base model
    after: float
    spent: float | None  # largest epsilon of any site, from the run's metrics; None: no noise was added
    noise_multiplier: float | None
    rounds: int
    passes: float  # how often each record was used, on average
    wall_s: float  # of the whole process, imports and outputs included
    cpu_s: float  # user and system
    peak_mb: float
    stopped: bool  # ended before its last round


@dataclass(frozen=True)
class Benchmark:
    """A configuration on one data set, and the metric that tells how good it is."""

    name: str
    metric: str  # a key of metrics.jsonl
    digits: int  # of the metric
    overrides: tuple[str, ...]  # of every run
    private: tuple[str, ...] = ()  # only with privacy
    public: tuple[str, ...] = ()  # only without


@dataclass(frozen=True)
class Text:
    """How much a run reads."""

    tokens: int  # of all training records that count
    bits: float  # a byte of held-out text, for each nat a token; truncated records left out

    @classmethod
    def of(cls, folder: Path) -> "Text":
        """Count what the run in `folder` read."""
        config = parse(SimulationConfig, json.loads((folder / CONFIG).read_text("utf-8")))
        data = config.data
        tokenizer = AutoTokenizer.from_pretrained(config.model.source, trust_remote_code=False)
        tokenise = Tokeniser(tokenizer, config.model, data)
        unit = data.unit if config.privacy.unit == "person" else None
        units = build_units(read_table(data.train, data.train_split), tokenise, unit, config.privacy.records_per_person)
        tokens = size = 0
        for number, row in enumerate(read_table(data.heldout or data.train, data.heldout_split)):
            record = tokenise(row, number)
            if len(record.input_ids) < config.model.max_length:
                tokens += int((record.labels != IGNORE).sum())
                size += len(render(data.text or "", row, number).encode())
        return cls(sum(len(r.input_ids) for each in units for r in each), tokens / size / math.log(2))


def run(
    benchmark: Benchmark, epsilons: str, seeds: int, out: Path, extra: Sequence[str], console: Console,
    mode: Mode = Mode.local,
) -> None:  # fmt: skip
    """Make every run that is not complete yet, print the table, and write it to `out`/results.md."""
    targets = parse_epsilons(epsilons)
    measurements = measure(benchmark, targets, range(seeds), out, extra, console, mode)
    read = Text.of(out / _name(mode, targets[0], 0))
    _print_table(benchmark, measurements, read, console)
    text = markdown(benchmark, measurements, read)
    (out / "results.md").write_text(text, "utf-8")
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def measure(
    benchmark: Benchmark, targets: Sequence[float | None], seeds: Iterable[int], out: Path, extra: Sequence[str],
    console: Console, mode: Mode,
) -> list[Measurement]:  # fmt: skip
    """Make every run that is not complete yet, and return what is known of all."""
    out.mkdir(parents=True, exist_ok=True)
    return [
        _one(benchmark, target, seed, _name(mode, target, seed), out, extra, console, mode)
        for target, seed in itertools.product(targets, seeds)
    ]


def _name(mode: Mode, target: float | None, seed: int) -> str:
    return f"{'off' if target is None else f'{mode.value}-eps{target:g}'}-seed{seed}"


def parse_epsilons(text: str) -> list[float | None]:
    """Read a list such as `off,8,3`; None stands for off."""
    try:
        values = [None if part.strip() == "off" else float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--epsilon={text}: expected numbers and `off`, separated by commas") from None
    if any(value is not None and not value > 0 for value in values):
        raise typer.BadParameter(f"--epsilon={text}: a privacy budget is positive")
    return values


def _one(
    benchmark: Benchmark, target: float | None, seed: int, name: str, out: Path, extra: Sequence[str], console: Console,
    mode: Mode,
) -> Measurement:  # fmt: skip
    folder = out / name
    overrides = [f"name={name}", f"output={out}", f"seed={seed}", *benchmark.overrides]
    if target is None:
        overrides += ["privacy=off", *benchmark.public]
    else:
        overrides += [*benchmark.private, *_MODES[mode], f"privacy.epsilon={target:g}"]
    overrides += extra
    result = folder / _RESULT
    if result.exists():
        saved = json.loads(result.read_text("utf-8"))
        if saved["overrides"] != overrides:
            raise typer.BadParameter(f"{folder} holds a run with other settings. Choose another --out.")
        console.print(f"{name}: complete, taken from {folder}", markup=False)
        return Measurement(**saved["measurement"])

    command = [sys.executable, "-m", "fedllm.cli", "simulate", *overrides]
    console.print("$ fedllm simulate " + shlex.join(overrides), markup=False, highlight=False, soft_wrap=True)
    began = time.monotonic()
    process = subprocess.Popen(command)
    try:
        _, status, usage = os.wait4(process.pid, 0)  # unlike Popen.wait, tells the memory of this child alone
    except BaseException:
        process.terminate()
        raise
    wall = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise typer.Exit(process.returncode)
    peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    measurement = read_run(
        folder, benchmark.metric, target, seed, wall, usage.ru_utime + usage.ru_stime, peak_bytes / 2**20
    )
    result.write_text(json.dumps({"overrides": overrides, "measurement": asdict(measurement)}, indent=2), "utf-8")
    return measurement


def read_run(
    folder: Path, metric: str, target: float | None, seed: int, wall_s: float, cpu_s: float, peak_mb: float
) -> Measurement:
    """Take a run's figures from its own records, metrics.jsonl and plan.json in `folder`."""
    records: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    scored = [record for record in records if record[metric] is not None]
    return Measurement(
        epsilon=target,
        seed=seed,
        before=scored[0][metric],
        after=scored[-1][metric],
        spent=records[-1]["epsilon"],
        noise_multiplier=plan["privacy"]["noise_multiplier"] if target is not None else None,
        rounds=records[-1]["round"],
        passes=records[-1]["round"] * plan["training"]["local_steps"] * plan["privacy"]["sampling_rate"],
        wall_s=wall_s,
        cpu_s=cpu_s,
        peak_mb=peak_mb,
        stopped=records[-1]["round"] < plan["training"]["rounds"],
    )


_COLUMNS: Mapping[str, str] = {
    "target epsilon": "target",
    "epsilon spent": "spent",
    "noise multiplier": "noise",
    "before": "before",
    "after": "after",
    "bits a byte": "bits",
    "runs": "runs",
    "wall time": "wall",
    "CPU time": "cpu",
    "tokens / CPU s": "tokens",
    "peak memory": "memory",
}


def rows(benchmark: Benchmark, measurements: Sequence[Measurement], read: Text) -> list[dict[str, str]]:
    """Return one row of cells for each target, by `_COLUMNS`; several seeds become mean ± spread.

    Tokens are those trained on, over the time of the whole process, evaluation included.
    """
    result = []
    for target in dict.fromkeys(m.epsilon for m in measurements):
        group = [m for m in measurements if m.epsilon == target]

        def cell(value: Callable[[Measurement], float], digits: int, group: Sequence[Measurement] = group) -> str:
            values = [value(m) for m in group]
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 and len(set(values)) > 1 else ""
            return f"{mean(values):.{digits}f}{spread}"

        spent = [m.spent for m in group if m.spent is not None]
        noise = sorted({m.noise_multiplier for m in group if m.noise_multiplier is not None})
        result.append(
            {
                "target": "off (NOT PRIVATE)" if target is None else f"{target:g}",
                "spent": f"{max(spent):.2f}" if spent else "∞",
                "noise": ", ".join(f"{value:g}" for value in noise) or "-",
                "before": cell(lambda m: m.before, benchmark.digits),
                "after": cell(lambda m: m.after, benchmark.digits)
                + (" (stopped early)" if any(m.stopped for m in group) else ""),
                "bits": cell(lambda m: math.log(m.after) * read.bits, 3) if benchmark.metric == "perplexity" else "-",
                "runs": str(len(group)),
                "wall": cell(lambda m: m.wall_s / 60, 1) + " min",
                "cpu": cell(lambda m: m.cpu_s / 60, 1) + " min",
                "tokens": f"{mean(m.passes * read.tokens / m.cpu_s for m in group):,.0f}",
                "memory": f"{max(m.peak_mb for m in group):.0f} MB",
            }
        )
    return result


def markdown(benchmark: Benchmark, measurements: Sequence[Measurement], read: Text) -> str:
    """Return the table and the machine as Markdown."""
    lines = [
        f"{benchmark.name}: held-out {benchmark.metric}",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + " ---: |" * len(_COLUMNS),
        *(
            "| " + " | ".join(row[key] for key in _COLUMNS.values()) + " |"
            for row in rows(benchmark, measurements, read)
        ),
        "",
        machine(),
        "",
    ]
    return "\n".join(lines)


def _print_table(benchmark: Benchmark, measurements: Sequence[Measurement], read: Text, console: Console) -> None:
    table = Table(title=f"{benchmark.name}: held-out {benchmark.metric}", title_justify="left", box=SIMPLE_HEAD)
    shown = {
        heading: key for heading, key in _COLUMNS.items() if key not in ("noise", "bits", "tokens")
    }  # fits 80 columns
    for heading in shown:
        table.add_column(heading.replace(" ", "\n"), justify="right", overflow="fold")
    for row in rows(benchmark, measurements, read):
        table.add_row(*(row[key] for key in shown.values()))
    console.print(table)


def machine() -> str:
    """Describe processor and software in one line."""
    model = "unknown processor"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model n")]
        model = names[0] if names else model
    threads = os.environ.get("OMP_NUM_THREADS")
    software = ", ".join(f"{package} {version(package)}" for package in _PACKAGES)
    return (
        f"{model}, {os.cpu_count()} cores, {f'{threads} thread(s)' if threads else 'all cores used'}; "
        f"Python {sys.version.split()[0]}, {software}."
    )
