"""The engine on a GPU: which self-checks pass, how far its sums are from a CPU's, and seconds and memory of a step.

python -m simulations.benchmarks.gpu

Models have random weights. A check counts as it does at a site: the first that does not hold refuses the plan.
"""

import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
import typer
from transformers import BertConfig, BertModel

from fedllm.config import AdapterConfig, ModelConfig
from fedllm.errors import FedllmError, first_line
from fedllm.plan import RunPlan
from fedllm.privacy.randomness import OsRandomness
from fedllm.training.adapter import attach
from fedllm.training.data import Example
from fedllm.training.engine import Engine
from fedllm.training.model import BaseModel, MeanPooledClassifier, linear_layers, pick_device
from fedllm.training.quantised import quantise
from fedllm.training.self_check import Subject, self_check
from fedllm.values import parse
from simulations.benchmarks.bench import machine
from simulations.benchmarks.step import ATTENTION, SIZES, base_model, no_text, peft_step, records

_LARGE = "1B"  # on the GPU alone
_ENCODER = "encoder"  # of 22M parameters, with a head
_BERT = {"vocab_size": 30_522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
         "intermediate_size": 1536, "pad_token_id": 0}  # fmt: skip
_MICRO_BATCH = 64


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    size: str = "5M"
    method: str = "lora"
    dtype: str = "float32"
    quantize: str = "none"
    compile: str = "off"
    mode: str = "local"
    unit: str = "record"

    @property
    def name(self) -> str:
        """What is special about it."""
        return ", ".join([self.size, self.dtype, *(
            str(value) for key, value in vars(self).items()
            if key not in ("size", "dtype") and value != getattr(Case, key)
        )]).replace(", on", ", compiled")  # fmt: skip


def opened(case: Case, device: str, tokens: int) -> Subject:
    """Return a model with its engine, set up as for a plan; raises FedllmError where that cannot be."""
    classifies = case.size == _ENCODER
    model = parse(ModelConfig, {
        "source": "benchmark", "dtype": case.dtype, "quantize": case.quantize, "compile": case.compile,
        "max_length": tokens, **({"task": "classification", "labels": ["a", "b", "c"]} if classifies else {}),
    })  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device if case.size == _LARGE else "cpu"):  # the same weights wherever it will run, or quickly
        network: Any = base_model(case.size) if not classifies else MeanPooledClassifier(
            BertModel(BertConfig(**_BERT), add_pooling_layer=False), 3
        )  # fmt: skip
    if case.quantize != "none":
        quantise(network, linear_layers(network), model.quantize)  # type: ignore[arg-type]
    vocabulary = _BERT["vocab_size"] if classifies else SIZES[case.size][-1]
    base = BaseModel(network.eval().to(device), no_text(), "0" * 64, 512 if classifies else 2_048, vocabulary)
    matrices = {"rank": 8, "alpha": 16.0, "train": "AB"} if case.method in ("lora", "dora") else {}
    chosen: dict[str, Any] = {} if case.method in ("prompt", "prefix", "ptuning") or classifies else {
        "targets": ATTENTION
    }  # fmt: skip
    config = parse(AdapterConfig, {"method": case.method, **matrices, **chosen})
    shared = {"sites": 4, "quorum": 3} if case.mode == "distributed" else {}
    plan = parse(RunPlan, {
        "run": "benchmark", "seed": 0, "model": model.model_dump(), "adapter": config.model_dump(),
        "training": {"rounds": 1, "local_steps": 1},
        "privacy": {"mode": case.mode, "unit": case.unit, "units_per_site": 1_000, "noise_multiplier": 1.0}, **shared,
    })  # fmt: skip
    adapter = attach(base, model, config, 0)
    engine = Engine(adapter)
    engine.set_up(plan, checkpointing=False)
    return Subject(adapter, engine, plan, OsRandomness, _MICRO_BATCH)


def checked(case: Case, device: str, tokens: int) -> list[str]:
    """Return cells: what the self-check says, its seconds, and how far a clipped sum is from that of a CPU."""
    began = time.perf_counter()
    try:
        subject = opened(case, device, tokens)
        subject.engine.rehearse(_MICRO_BATCH, tokens)
        ready = time.perf_counter()
        self_check(subject)
        seconds = f"{time.perf_counter() - ready:.0f}"
        there = opened(replace(case, compile="off"), "cpu", tokens)
        apart = subject.differ(subject.whole.cpu(), there.sum(there.units, subject.tight))
        return ["passes", seconds, f"{apart:.1e}"]
    except FedllmError as error:
        return [first_line(error), f"{time.perf_counter() - began:.0f}", "-"]


def stepped(case: Case, device: str, batch: int, tokens: int, turns: int) -> list[str]:
    """Return cells: records of a pass, the median of a DP step's seconds, and the most GPU memory that it held, MB."""
    try:
        subject = opened(case, device, tokens)
    except FedllmError as error:
        return [first_line(error), "-", "-"]
    adam = torch.optim.AdamW([subject.adapter.flat], lr=1e-4)
    optimizer = subject.engine.optimizer(adam, subject.mechanism, float(batch), OsRandomness())
    units = [(Example(ids.numpy(), ids.numpy()),) for ids in records(case.size, batch, tokens, 1.0)[0]]
    step = partial(subject.engine.step, optimizer, units, _MICRO_BATCH)
    seconds, memory = timed(step, device, turns)
    return [str(subject.engine.rows(tokens, _MICRO_BATCH)), seconds, memory]


def plain(size: str, device: str, batch: int, tokens: int, turns: int) -> list[str]:
    """Return cells for PEFT's own step, without privacy, all records in one pass."""
    ids, labels = (part.to(device) for part in records(size, batch, tokens, 1.0))
    return [str(batch), *timed(peft_step(size, torch.float32, ids, labels, ATTENTION), device, turns)]


def timed(step: Callable[[], None], device: str, turns: int) -> tuple[str, str]:
    """Return the median of a step's seconds, after one that warms up, and the most MB of GPU memory in them."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    step()
    seconds = []
    for _ in range(turns):
        began = time.perf_counter()
        step()
        if device != "cpu":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    held = torch.cuda.max_memory_allocated(device) / 1e6 if device != "cpu" else math.nan
    return f"{statistics.median(seconds):.3f}", f"{held:.0f}"


CHECKS = [
    *(Case("5M", method, dtype)
      for method in ("lora", "dora", "ia3", "prompt", "prefix", "ptuning") for dtype in ("float32", "bfloat16")),
    *(Case("5M", mode=mode, unit="person") for mode in ("local", "distributed")),
    *(Case("5M", dtype=dtype, compile="on") for dtype in ("float32", "bfloat16")),
    *(Case("5M", dtype=dtype, quantize=kind) for kind in ("int8", "nf4") for dtype in ("float32", "bfloat16")),
    *(Case("encoder", dtype=dtype) for dtype in ("float32", "bfloat16")),
    *(Case("135M", dtype=dtype) for dtype in ("float32", "bfloat16")),
    Case("135M", dtype="bfloat16", compile="on"),
]  # fmt: skip
_PLAIN = [Case(size, dtype=dtype) for size in ("5M", "135M") for dtype in ("float32", "bfloat16")]
STEPS = [  # with where each runs, but for the device
    *((case, "") for case in _PLAIN),
    *((Case("135M", dtype="bfloat16", quantize=kind), "") for kind in ("int8", "nf4")),
    *((Case(_LARGE, dtype="bfloat16", quantize=kind), "") for kind in ("none", "int8", "nf4")),
    *((Case("5M", method), "") for method in ("dora", "ia3")),
    (Case("5M", compile="on"), ""),
    *((case, "cpu") for case in _PLAIN),
    (Case("135M", compile="on"), ""),
]


def measure(
    device: Annotated[str, typer.Option()] = "cuda",
    checks: Annotated[bool, typer.Option()] = True,
    steps: Annotated[bool, typer.Option()] = True,
    batch: Annotated[int, typer.Option(min=1, help="Records of a step.")] = 64,
    tokens: Annotated[int, typer.Option(min=8, help="Of a record.")] = 128,
    turns: Annotated[int, typer.Option(min=1, help="Steps of each.")] = 5,
    only: Annotated[str, typer.Option(help="Cases whose name has this.")] = "",
) -> None:
    """Check and time."""
    warnings.simplefilter("ignore")
    pick_device(device)

    def row(*cells: str) -> None:
        print(f"| {' | '.join(cells)} |", flush=True)

    if checks:
        row("case", "self-check", "seconds", "sum, from a CPU's")
        for case in CHECKS:
            if only in case.name:
                row(case.name, *checked(case, device, tokens))
    if steps:
        row("step", "on", "records of a pass", "seconds", "GPU, MB")
        for size in ("5M", "135M"):
            if only in f"{size}, float32":
                row(f"{size}, float32, PEFT's own", device, *plain(size, device, batch, tokens, turns))
        for case, where in STEPS:
            if only in case.name:
                row(case.name, where or device, *stepped(case, where or device, batch, tokens, turns))
    if device != "cpu":
        print(torch.cuda.get_device_name(device))
    print(machine())


if __name__ == "__main__":
    typer.run(measure)
