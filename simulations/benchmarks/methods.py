"""One data set, every adapter method: trained values, bytes of an update, CPU time and score.

One trainer holds all records, which is what sites with distributed noise come to; no network, no evaluation in between.

python -m simulations.benchmarks.methods demo
python -m simulations.benchmarks.methods banking77 --data DATA/banking77 --model MODELS/all-MiniLM-L6-v2
"""

import json
import math
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from rich.console import Console

from fedllm.config import AdapterConfig, DataConfig, ModelConfig
from fedllm.privacy.accounting import calibrate
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import OsRandomness
from fedllm.training.data import Drawn, PrivacyUnit, Tokeniser, build_units, read_table
from fedllm.training.evaluation import Evaluator, Score, open_evaluator
from fedllm.training.model_context import ModelContext, open_context
from fedllm.values import parse
from simulations.benchmarks.bench import EpsilonOption, machine, parse_epsilons

_DELTA = 1e-5
_RECORDS = 4  # of a person, at the most


class Task(Enum):
    """What is learned."""

    demo = "demo"
    banking77 = "banking77"


_CLIP = {Task.demo: 0.4, Task.banking77: 0.5}
# Learning rates of Adam: a step moves a value by about as much. docs/benchmarks.md says which were compared.
_RATES = {
    Task.demo: {
        "lora": 0.12, "rslora": 0.04, "dora": 0.12, "ia3": 0.12, "prompt": 0.12, "prefix": 0.5, "ptuning": 0.03,
    },
    Task.banking77: {"lora": 0.5, "rslora": 0.5, "dora": 0.5, "ia3": 0.1, "prompt": 0.1, "ptuning": 0.1},
}  # fmt: skip


def main(
    task: Task,
    data: Annotated[Path | None, typer.Option(help="Folder of the data set, for banking77.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of the base model, for banking77.")] = None,
    epsilon: EpsilonOption = "8,3",
    methods: Annotated[str | None, typer.Option(help="Comma-separated. Default: all that go with the model.")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate, instead of each method's own.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="DP steps.")] = 8,
    sampling: Annotated[float, typer.Option(help="Sampling rate.")] = 0.03,
    heldout: Annotated[int, typer.Option(help="Held-out records that are scored.")] = 200,
) -> None:
    """Train every method for a few DP steps, and print a table."""
    console = Console(width=200)
    console.print("| method | rate | epsilon | trained values | bytes of an update | before | after | CPU s a step |")
    console.print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for method in methods.split(",") if methods else _RATES[task]:
        base, texts = _demo(heldout) if task is Task.demo else _banking77(data, model, heldout)
        # small beside the new layer's, as in experiment=encoder
        small = task is Task.banking77 and method in ("lora", "rslora", "dora")
        context = open_context(
            base, parse(AdapterConfig, {"method": method, "alpha": 0.3 if small else 16.0}), 0, "cpu"
        )
        units = _units(base, texts, context)
        evaluator = cast(Evaluator, open_evaluator(base, texts, context.adapter, 64))  # both tasks name a held-out set
        chosen = rate or _RATES[task][method]
        for target in parse_epsilons(epsilon):
            noise = 0.0 if target is None else calibrate(target, _DELTA, sampling, steps)
            before = evaluator.score(context.adapter.initial)
            context.adapter.load(context.adapter.initial)
            mechanism = Mechanism(_CLIP[task], noise, sampling)
            seconds = _train(context, units, mechanism, chosen, steps)
            after = evaluator.score(context.adapter.vector())
            values = context.adapter.spec.dimension
            console.print(
                f"| {method} | {chosen:g} | {'off' if target is None else f'{target:g}'} | {values:,} | {2 * values:,} "
                f"| {_metric(before)} | {_metric(after)} | {seconds / steps:.1f} |",
                soft_wrap=True,
            )
    console.print(f"\n{machine()}", soft_wrap=True)


def _demo(heldout: int) -> tuple[ModelConfig, DataConfig]:
    data = {
        "train": "pkg://simulations.demo/data/train.jsonl", "heldout": "pkg://simulations.demo/data/heldout.jsonl",
        "prompt": "Q: {question}\nA:", "text": " {answer}", "unit": "customer_id", "heldout_limit": heldout,
    }  # fmt: skip
    return ModelConfig(source="pkg://simulations.demo/base", max_length=96), parse(DataConfig, data)


def _banking77(data: Path | None, model: Path | None, heldout: int) -> tuple[ModelConfig, DataConfig]:
    if data is None or model is None:
        raise typer.BadParameter("banking77 needs --data and --model")
    values = {
        "source": str(model), "task": "classification", "pooling": "mean", "max_length": 64, "dtype": "float32",
        "labels": json.loads((data / "labels.json").read_text("utf-8")),
    }  # fmt: skip
    files = {"train": str(data / "train.jsonl"), "heldout": str(data / "test.jsonl"), "heldout_limit": heldout}
    return parse(ModelConfig, values), parse(DataConfig, {**files, "text": "{text}", "label": "label"})


def _units(model: ModelConfig, data: DataConfig, context: ModelContext) -> tuple[PrivacyUnit, ...]:
    tokeniser = Tokeniser(context.adapter.tokenizer, model, data, context.adapter.vocabulary)
    return build_units(read_table(data.train, data.train_split, data), tokeniser, data.unit, _RECORDS)


def _train(
    context: ModelContext, units: tuple[PrivacyUnit, ...], mechanism: Mechanism, rate: float, steps: int
) -> float:
    """Take DP steps of Adam, the rate falling to a tenth by a cosine; return the CPU seconds."""
    began, source = time.process_time(), OsRandomness()
    adam = torch.optim.Adam([context.adapter.flat], lr=rate, betas=(0.9, 0.99))
    optimizer = context.engine.optimizer(adam, mechanism, mechanism.sampling_rate * len(units), source)
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        context.engine.step(optimizer, Drawn(units, mechanism.sample(len(units), source)), 64)
    return time.process_time() - began


def _metric(score: Score) -> str:
    return f"{score.perplexity:.3f}" if score.accuracy is None else f"{score.accuracy:.3f}"


if __name__ == "__main__":
    typer.run(main)
