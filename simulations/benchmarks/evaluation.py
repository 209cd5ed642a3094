"""Private evaluation: the noise of a score over sites' own records, and how often its interval holds the truth.

python -m simulations.benchmarks.evaluation --data DATA --model MODELS/stories260k

A linear layer on frozen embeddings is learnt without privacy: what is measured here is the measuring. `unit_metrics`
scores the units of the test split once. In every simulated release 1,000 of them are drawn anew, with replacement, and
dealt out to sites; these add up their vectors and release the sum by the product's own arithmetic, which for noise in
shares is that of `simulations.benchmarks.probe`. There are two truths: the mean over all units of the split, from which
the 1,000 were drawn, and the mean over those 1,000.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from fedllm.config import AdapterConfig, DataConfig, ModelConfig, PrivacyConfig
from fedllm.plan import default_quorum
from fedllm.privacy.accounting import calibrate
from fedllm.privacy.distributed_noise import DistributedMechanism
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.metrics import Layout, Score, layout_of
from fedllm.privacy.randomness import OsRandomness
from fedllm.training.data import Drawn, Tokeniser, build_units, read_table
from fedllm.training.model_context import open_context
from fedllm.training.unit_metrics import unit_metrics
from fedllm.values import parse
from simulations.benchmarks.bench import Mode, ModelOption, machine
from simulations.benchmarks.probe import embeddings

_EPSILON, _DELTA, _EVALUATIONS = 1.0, 1e-6, 5
_UNITS = 1000  # in all
_TRAINING = 6000  # records, at the most
_RECORDS = 8  # of a unit, at the most
Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Task:
    folder: str
    label: str  # column
    unit: str | None  # column; None: every record is one
    pool: int  # units of the test split that are scored, at the most


_TASKS = (
    _Task("banking77", "label", None, 3080),
    _Task("multidogo", "domain", None, 1500),
    _Task("multidogo", "domain", "conv", 500),
)


def _learnt(x_ND: Array, y_N: NDArray[np.int64], classes: int) -> Array:
    """Return the weights of softmax regression, float64[C, D], after 300 steps of Adam on all records."""
    w_CD, mean, square = np.zeros((3, classes, x_ND.shape[1]))
    for step in range(1, 301):
        scores = x_ND @ w_CD.T
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(y_N)), y_N] -= 1
        gradient = p.T @ x_ND / len(y_N)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
        w_CD = w_CD - 0.5 * mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.99**step)) + 1e-8)
    return w_CD


def _scored(task: _Task, data: Path, source: Path) -> tuple[Layout, Array]:
    """Return the layout and the metrics of the test split's units, float64[n, m]."""
    train, test = (read_table(str(data / task.folder / f"{part}.jsonl"), part) for part in ("train", "test"))
    labels = tuple(sorted({row[task.label] for row in train}))
    generator = np.random.default_rng(0)
    some = [train[i] for i in generator.permutation(len(train))[:_TRAINING]]
    y = np.array([labels.index(row[task.label]) for row in some])
    weights = _learnt(embeddings(source, [row["text"] for row in some], labels), y, len(labels))
    model = parse(ModelConfig, {
        "source": str(source), "task": "classification", "pooling": "mean", "max_length": 64, "labels": list(labels),
    })  # fmt: skip
    context = open_context(model, AdapterConfig(), 0, "cpu")
    adapter = context.adapter
    parts = adapter.spec.split(adapter.initial)
    head = next(name for name in parts if "classifier" in name)
    vector = np.concatenate([(weights if name == head else part).ravel() for name, part in parts.items()])
    text = DataConfig(train="unused", text="{text}", label=task.label)
    units = build_units(test, Tokeniser(adapter.tokenizer, model, text, adapter.vocabulary), task.unit, _RECORDS)
    chosen = Drawn(units, generator.permutation(len(units))[: task.pool])
    return layout_of(model, adapter.vocabulary), unit_metrics(context.engine, vector.astype(np.float32), chosen, 64)


def _release(layout: Layout, sites: list[Array], mode: Mode, mechanism: Mechanism) -> Score:
    """Return what one release of the metrics of all sites' units says; `sites` hold float64[n, m] each."""
    source = OsRandomness()
    if mode is Mode.local:
        noised = [mechanism.release(layout.clipped_sum(values), source) for values in sites]
        return layout.read(np.sum(noised, axis=0), mechanism.noise_std * len(sites) ** 0.5)
    n, colluding = len(sites), 1 if len(sites) > 2 else 0
    quorum = default_quorum(PrivacyConfig(mode="distributed", colluding_sites=colluding), n)
    distributed = DistributedMechanism(mechanism, n, quorum, colluding, _UNITS / n)
    kept, total = distributed.revealed_seeds(n), np.zeros(layout.dimension, np.uint32)
    for values in sites:
        upload, seeds = distributed.upload(layout.clipped_sum(values, distributed), source)
        total += upload - distributed.surplus([seeds[k] for k in kept], n, layout.dimension)
    noise = np.hypot(distributed.noise_multiplier(n, n, 0) * mechanism.clip_norm, distributed.rounding_std(n))
    return layout.read(distributed.decode(total), float(noise), distributed.clip_before_rounding(layout.dimension))


def _row(layout: Layout, pool: Array, k: int, mode: Mode, mechanism: Mechanism, releases: int) -> str:
    """Return the cells that tell how `releases` simulated releases by k sites went."""
    generator, population = np.random.default_rng(k), pool.mean(axis=0)
    errors, widths = np.empty((2, releases, len(layout.names)))
    of_population, of_units = np.empty((2, releases, len(layout.names)), bool)
    for i in range(releases):
        drawn = pool[generator.integers(len(pool), size=_UNITS)]
        score = _release(layout, np.array_split(drawn, k), mode, mechanism)
        for j, (own, truth) in enumerate(zip(drawn.mean(axis=0), population, strict=True)):
            found = score.metrics[layout.names[j]]
            if found is None:
                raise typer.BadParameter(f"{k} sites: the count of {_UNITS} units drowns in the noise")
            errors[i, j], widths[i, j] = found.value - own, (found.high - found.low) / 2
            of_population[i, j], of_units[i, j] = found.low <= truth <= found.high, found.low <= own <= found.high
    noise, width = errors.std(axis=0), widths.mean(axis=0)
    held, held_units = of_population.mean(axis=0), of_units.mean(axis=0)
    return (
        f"{100 * noise[0]:.2f} | {100 * width[0]:.2f} | {held[0]:.1%} | {held_units[0]:.1%} | {noise[1]:.3f} "
        f"| {width[1]:.3f} | {held[1]:.1%}"
    )


def main(
    data: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of banking77 and multidogo.")],
    model: ModelOption,
    sites: Annotated[str, typer.Option(help="Numbers of sites, comma-separated.")] = "2,8,32",
    releases: Annotated[int, typer.Option(min=2, help="Simulated releases of each.")] = 500,
) -> None:
    """Noise and coverage of private scores of 1,000 units."""
    console = Console(width=200)
    sigma = calibrate(_EPSILON, _DELTA, 1.0, _EVALUATIONS)
    mechanism = Mechanism(1.0, sigma, 1.0)
    console.print(f"noise multiplier {sigma:g} for {_EVALUATIONS} releases at epsilon {_EPSILON:g}, delta {_DELTA:g}\n")
    heads = (
        "data", "unit", "sites", "mode", "accuracy: noise, points", "interval, ± points", "holds the population's",
        "holds the units'", "loss: noise, nats", "interval, ± nats", "holds the population's",
    )  # fmt: skip
    for task in _TASKS:
        layout, pool = _scored(task, data, model)
        means = ", ".join(f"{name} {mean:.3f}" for name, mean in zip(layout.names, pool.mean(axis=0), strict=True))
        console.print(f"{task.folder}, by {task.unit or 'record'}: {len(pool)} units, {means}\n", soft_wrap=True)
        console.print(f"| {' | '.join(heads)} |\n| --- | --- | ---: | --- |{' ---: |' * 7}", soft_wrap=True)
        for mode in (Mode.distributed, Mode.local):
            for k in map(int, sites.split(",")):
                cells = _row(layout, pool, k, mode, mechanism, releases)
                console.print(
                    f"| {task.folder} | {task.unit or 'record'} | {k} | {mode.value} | {cells} |", soft_wrap=True
                )
        console.print()
    console.print(machine(), soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
