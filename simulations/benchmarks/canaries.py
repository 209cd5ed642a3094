"""What the attack on a run proves: with noise, with less than is claimed, with none; and what its canaries cost.

python -m simulations.benchmarks.canaries forms
python -m simulations.benchmarks.canaries controls
python -m simulations.benchmarks.canaries utility

The embedded demo's model and records at its eight sites, without a network: sites train and guess as they would.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import typer
from numpy.typing import NDArray

from client.canaries import SiteCanaries
from fedllm.config import DataConfig
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import calibrate
from fedllm.privacy.canaries import Opening, Result, pooled, usual_guesses
from fedllm.privacy.randomness import OsRandomness, Randomness, SeededRandomness
from fedllm.training import trainer
from fedllm.training.data import IGNORE, Example, PrivacyUnit, Tokeniser, build_units, read_table
from fedllm.training.evaluation import Evaluator, open_evaluator
from fedllm.training.model_context import ModelContext, open_context, use_threads
from fedllm.training.server_optimizer import ServerOptimizer
from fedllm.values import parse
from simulations.benchmarks.bench import machine

_BATCH = 64  # records of a forward pass, at the most
_DELTA = 1e-5
_RATE, _ROUNDS = 0.1, 9  # the demo's
_RECORDS = 4  # of a person, at the most
_NONE = 1e-4  # of the noise: as good as none

# Where the coins or the noise of a site in a round come from: given which of the two, the site and the round.
Source = Callable[[str, int, int], Randomness]

app = typer.Typer(add_completion=False)


def from_the_system(what: str, site: int, round_: int) -> Randomness:
    """Return the operating system's randomness, as sites use it."""
    return OsRandomness()


def train(
    plan: RunPlan,
    context: ModelContext,
    sites: Sequence[Sequence[PrivacyUnit]],
    canaries: int = 0,
    guesses: int = 0,
    source: Source = from_the_system,
) -> tuple[NDArray[np.float32], list[Opening]]:
    """Return the final adapter float32[d] of a run over `sites`, and what each opens; nothing without canaries."""
    server = ServerOptimizer(plan.training.server, context.adapter.initial)
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(number) for number in range(len(sites) if canaries else 0)]
        own = [SiteCanaries(place, plan.run, f"site-{place.name}") for place in places]
        for site in own:
            site.begin(canaries)
        for round_ in range(1, plan.training.rounds + 1):
            start, units = server.value, [list(records) for records in sites]
            for site, records in zip(own, units, strict=False):
                site.saw(round_, start, context, plan, _BATCH)
                records.extend(site.members(context, plan))
            step = _together if plan.distributed else _apart
            server.step(step(plan, context, units, start, round_, source), (round_ - 1) / plan.training.rounds)
        return server.value, [site.opening(server.value, guesses, context, plan, _BATCH) for site in own]


def _apart(
    plan: RunPlan, context: ModelContext, sites: Sequence[Sequence[PrivacyUnit]], start: NDArray[np.float32],
    round_: int, source: Source,
) -> NDArray[np.float32]:  # fmt: skip
    """Return the mean of the sites' updates, float32[d], each with noise of its own."""
    updates = [
        trainer.train_round(
            context.adapter, context.engine, units, plan, start, source("noise", number, round_), _BATCH,
            coins=source("coins", number, round_),
        )
        for number, units in enumerate(sites)
    ]  # fmt: skip
    return np.asarray(np.mean(updates, axis=0), dtype=np.float32)


def _together(
    plan: RunPlan, context: ModelContext, sites: Sequence[Sequence[PrivacyUnit]], start: NDArray[np.float32],
    round_: int, source: Source,
) -> NDArray[np.float32]:  # fmt: skip
    """Return the step of the sum of all sites, float32[d], without its excess noise."""
    distributed, many = plan.distributed, len(sites)
    if distributed is None:
        raise ValueError("a plan without noise in shares")
    total, kept = np.zeros(len(start), np.uint32), distributed.revealed_seeds(many)
    for number, units in enumerate(sites):
        share, seeds = trainer.distributed_step(
            context.adapter, context.engine, units, plan, start, source("noise", number, round_), _BATCH,
            source("coins", number, round_),
        )  # fmt: skip
        total += share - distributed.surplus([seeds[index] for index in kept], many, len(start))
    step = -plan.training.learning_rate * distributed.decode(total) / (many * plan.expected_units)
    return step.astype(np.float32)


def _demo(people: int | None) -> tuple[list[tuple[PrivacyUnit, ...]], RunPlan, ModelContext, Evaluator]:
    """Return the units of the demo's sites, its plan at epsilon 8, its model, and what scores an adapter."""
    data = parse(DataConfig, {
        "train": "pkg://simulations.demo/data/train.jsonl", "heldout": "pkg://simulations.demo/data/heldout.jsonl",
        "prompt": "Q: {question}\nA:", "text": " {answer}", "unit": "customer_id", "heldout_limit": 400,
    })  # fmt: skip
    rows = read_table(data.train, data.train_split, data)
    branches = sorted({row["branch"] for row in rows})
    plan = parse(RunPlan, {
        "run": "canaries", "seed": 0, "sites": len(branches), "quorum": len(branches), "adapter": {},
        "model": {"source": "pkg://simulations.demo/base", "max_length": 96, "dtype": "float32"},
        "privacy": {
            "mode": "distributed", "unit": "person", "records_per_person": _RECORDS, "epsilon": 8.0, "delta": _DELTA,
            "clip_norm": 0.4, "sampling_rate": _RATE, "units_per_site": people or 1000,
            "noise_multiplier": calibrate(8.0, _DELTA, _RATE, _ROUNDS),
        },
        "training": {
            "rounds": _ROUNDS, "local_steps": 1, "optimizer": "sgd", "learning_rate": 4.0, "momentum": 0.0,
            "server": {"name": "adam", "learning_rate": 0.12, "final_rate": 0.1, "momentum": 0.0, "betas": [0.9, 0.99]},
        },
    })  # fmt: skip
    context = open_context(plan.model, plan.adapter, plan.seed, "cpu")
    tokeniser = Tokeniser(context.adapter.tokenizer, plan.model, data, context.adapter.vocabulary)
    sites = [
        build_units([row for row in rows if row["branch"] == branch], tokeniser, data.unit, _RECORDS)[:people]
        for branch in branches
    ]
    evaluator = cast(Evaluator, open_evaluator(plan.model, data, context.adapter, _BATCH))
    return sites, plan, context, evaluator


def _noised(plan: RunPlan, multiplier: float | None) -> RunPlan:
    """Return the plan with another noise; None: without privacy."""
    changes: dict[str, object] = {"noise_multiplier": multiplier}
    if multiplier is None:
        changes["mode"] = "off"
    return plan.model_copy(update={"privacy": plan.privacy.model_copy(update=changes)})


def _seeded(seed: int) -> Source:
    return lambda what, site, round_: SeededRandomness(seed, what, site, round_)


def _cells(results: Sequence[Result], name: str) -> str:
    attacks = [getattr(result, name) for result in results]
    right = ", ".join(str(attack.right) for attack in attacks)
    return f"{right} | {', '.join(f'{attack.lower:.2f}' for attack in attacks)}"


@app.command()
def forms(
    canaries: Annotated[int, typer.Option(min=2, help="Canaries of each form.")] = 100,
) -> None:
    """Compare canaries by length and by what is learned of them: how long their gradients are, and how alike."""
    use_threads(1)
    sites, plan, context, _ = _demo(canaries)
    context.adapter.load(context.adapter.initial)
    clip, generator = plan.privacy.clip_norm, np.random.default_rng(0)
    records = _directions(context, sites[0])[1]
    print("| tokens | learned | length: 5 % are below | cosine with each other | with records |")
    print("|---:|---|---:|---:|---:|")
    for tokens in (2, 4, 8, 16, 32):
        text = generator.integers(0, context.adapter.vocabulary, (canaries, tokens))
        for learned, first in (("all", 1), ("second half", tokens // 2), ("last", tokens - 1)):
            labels = np.where(np.arange(tokens) < first, IGNORE, text)
            lengths, own = _directions(context, [(Example(*each),) for each in zip(text, labels, strict=True)])
            alike = (own @ own.T)[~np.eye(canaries, dtype=bool)]
            print(f"| {tokens} | {learned} | {np.percentile(lengths, 5) / clip:.0f} clip norms | {_rms(alike):.3f} "
                  f"| {_rms(own @ records.T):.3f} |", flush=True)  # fmt: skip
    print(f"\n{machine()}")


def _directions(context: ModelContext, units: Sequence[PrivacyUnit]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the units' gradients as lengths float64[n] and directions float64[n, d]."""
    width = max(len(record.input_ids) for unit in units for record in unit)
    rows = context.engine.rows(width, _BATCH)
    parts = [
        context.engine.pass_gradients(units[first : first + rows], width, _BATCH).double().numpy()
        for first in range(0, len(units), rows)
    ]
    gradients = np.concatenate(parts)
    lengths = np.linalg.norm(gradients, axis=1)
    return lengths, gradients / lengths[:, None]


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2)))


@app.command()
def controls(
    canaries: Annotated[int, typer.Option(min=1, help="Canaries of a site.")] = 100,
    people: Annotated[int | None, typer.Option(min=1, help="People of a site. Default: all.")] = 300,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each line.")] = 3,
) -> None:
    """Attack runs with the noise that is claimed, with a tenth of it, and without."""
    use_threads(1)
    sites, plan, context, _ = _demo(people)
    guesses = usual_guesses(canaries, _RATE, _ROUNDS)
    print("| claim | noise multiplier | guesses | right, white-box | epsilon at least | right, black-box "
          "| epsilon at least | ceiling | contradicted |")  # fmt: skip
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    eight, two = (calibrate(epsilon, _DELTA, _RATE, _ROUNDS) for epsilon in (8.0, 2.0))
    for claim, what, multiplier in (
        (8.0, "8", eight), (2.0, "2", two), (2.0, "2, noise / 10", two / 10), (2.0, "2, no noise", two * _NONE),
        (math.inf, "none: privacy=off", None),
    ):  # fmt: skip
        results = []
        for seed in range(seeds):
            _, opened = train(_noised(plan, multiplier), context, sites, canaries, guesses, _seeded(seed))
            results.append(pooled(opened, guesses, _DELTA))
        shown = "-" if multiplier is None else f"{multiplier:.4g}"
        refuted = "-" if math.isinf(claim) else f"{sum(result.contradicts(claim) for result in results)} of {seeds}"
        print(f"| {what} | {shown} | {results[0].white.guesses} | {_cells(results, 'white')} "
              f"| {_cells(results, 'black')} | {results[0].white.ceiling:.2f} | {refuted} |", flush=True)  # fmt: skip
    print(f"\n{machine()}")


@app.command()
def utility(
    canaries: Annotated[str, typer.Option(help="Canaries of a site, comma-separated.")] = "32,100",
    seeds: Annotated[int, typer.Option(min=1, help="Pairs of runs: the same noise, and the same records drawn.")] = 4,
) -> None:
    """Held-out loss of the demo with canaries, over that without."""
    use_threads(1)
    sites, plan, context, evaluator = _demo(None)
    losses: dict[int, list[float]] = {}
    seconds: dict[int, list[float]] = {}
    for seed in range(seeds):
        for many in (0, *map(int, canaries.split(","))):
            began = time.process_time()
            guesses = usual_guesses(many, _RATE, _ROUNDS) if many else 0
            final, _ = train(plan, context, sites, many, guesses, _seeded(seed))
            seconds.setdefault(many, []).append(time.process_time() - began)
            losses.setdefault(many, []).append(evaluator.score(final).loss)
            print(f"seed {seed}, {many} canaries: loss {losses[many][-1]:.4f}, {seconds[many][-1]:.0f} s", flush=True)
    print("\n| canaries of a site | held-out loss | over that without | CPU time over that without |")
    print("|---:|---:|---:|---:|")
    for many, found in losses.items():
        ratios, times = (
            [one / other for one, other in zip(each[many], each[0], strict=True)] for each in (losses, seconds)
        )
        print(f"| {many} | {_spread(found)} | {_spread(ratios)} | {_spread(times)} |")
    print(f"\n{machine()}")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    app()
