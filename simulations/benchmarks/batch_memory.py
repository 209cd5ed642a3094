"""Memory and speed of a DP step against its batch: micro-batches keep the first constant, whatever is sampled.

python -m simulations.benchmarks.batch_memory --size 5M --batches 64,256,1024,4096

Each row is a process of its own. Memory is the most that it holds during a step, above its libraries. With
`--micro-batch 0` the whole batch is one pass, which says from what batch on a larger one brings no speed.
"""

import json
import subprocess
import sys
import time
import warnings
from typing import Annotated

import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

from simulations.benchmarks.bench import machine
from simulations.benchmarks.step import ATTENTION, fedllm_step, peak_mb, records


def measure(
    size: Annotated[str, typer.Option(help="As in simulations.benchmarks.step.")] = "5M",
    dtype: Annotated[str, typer.Option()] = "float32",
    batches: Annotated[str, typer.Option(help="Comma-separated.")] = "64,256,1024,4096",
    micro_batch: Annotated[int, typer.Option(min=0, help="Records of a pass; 0: all.")] = 64,
    tokens: Annotated[int, typer.Option(min=2)] = 64,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    checkpointing: Annotated[str, typer.Option(help="Comma-separated: no, yes.")] = "no,yes",
    steps: Annotated[int, typer.Option(min=1, help="Of which the fastest counts.")] = 2,
    alone: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure steps on batches of several sizes."""
    if alone:
        warnings.simplefilter("ignore")
        torch.set_num_threads(threads)
        before = psutil.Process().memory_info().rss / 2**20
        data = records(size, int(batches), tokens, 1.0)
        step = fedllm_step(
            size, getattr(torch, dtype), *data, ATTENTION, checkpointing=checkpointing == "yes", micro_batch=micro_batch
        )
        seconds = []

        def timed() -> None:
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)

        peak = peak_mb(timed, warm=0, steps=steps)
        print(json.dumps([peak - before, min(seconds)]))
        return
    table = Table(title=f"one DP step, {size} {dtype}, {tokens} tokens, {threads} threads, passes of {micro_batch}")
    for column in ("recomputing", "batch", "MB", "seconds", "units/s", "tokens/s"):
        table.add_column(column, justify="right")
    for recomputing in checkpointing.split(","):
        for batch in batches.split(","):
            done = subprocess.run(
                [sys.executable, "-m", "simulations.benchmarks.batch_memory", "--alone", "--size", size, "--dtype",
                 dtype, "--batches", batch, "--micro-batch", str(micro_batch), "--tokens", str(tokens), "--threads",
                 str(threads), "--steps", str(steps), "--checkpointing", recomputing],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            peak, best = json.loads(done.stdout.splitlines()[-1])
            speed = int(batch) / best
            table.add_row(recomputing, batch, f"{peak:.0f}", f"{best:.2f}", f"{speed:.1f}", f"{speed * tokens:.0f}")
    Console(width=120).print(table)
    print(machine())


if __name__ == "__main__":
    typer.run(measure)
