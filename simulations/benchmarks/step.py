"""One training step, with privacy and without, on the same batch: seconds and memory, side by side in one process.

python -m simulations.benchmarks.step --sizes 5M,30M,135M --dtypes float32,bfloat16

*peft* is the plain step of a PEFT user: one loss over the batch, one backward pass, AdamW. *hooks* and *ghost* are
Opacus on the same model. *fedllm* is the engine's whole DP step: per-unit gradients, clip, noise from the operating
system, optimiser. *compiled* is with torch.compile, PEFT's model block by block as the engine does it; the time of
compiling is in "start", set-up and the first two steps, and in no step. The arrangements take turns, so that whatever
else the machine does falls on all of them; a ratio is taken within each turn.
"""

import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import psutil
import torch
import torch._dynamo.config as recompiles
import typer
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedllm.config import AdapterConfig, ModelConfig, PrivacyConfig, TrainingConfig
from fedllm.plan import RunPlan
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import OsRandomness
from fedllm.training.adapter import attach
from fedllm.training.compiling import use_private_cache
from fedllm.training.data import IGNORE, Example
from fedllm.training.engine import Engine
from fedllm.training.model import BaseModel
from simulations.benchmarks.bench import machine

Step = Callable[[], None]
# hidden, layers, MLP, heads, key-value heads, vocabulary
SIZES = {
    "5M": (256, 5, 704, 4, 4, 4_096), "30M": (512, 8, 1408, 8, 4, 16_384), "135M": (576, 30, 1536, 9, 3, 49_152),
    "1B": (2048, 22, 5632, 32, 4, 32_000),
}  # fmt: skip
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MECHANISM = Mechanism(clip_norm=1.0, noise_multiplier=1.0, sampling_rate=0.1)


def base_model(size: str) -> LlamaForCausalLM:
    hidden, layers, mlp, heads, kv_heads, vocabulary = SIZES[size]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True, use_cache=False,
        )
    )  # fmt: skip


def records(size: str, batch: int, tokens: int, labelled: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels, int64[batch, tokens]; the last `labelled` of each record carries loss."""
    ids = torch.randint(3, SIZES[size][-1], (batch, tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : tokens - round(labelled * tokens)] = IGNORE
    return ids, labels


def _peft_model(size: str, dtype: torch.dtype, targets: tuple[str, ...] | str) -> Any:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets if isinstance(targets, str) else list(targets))
    return get_peft_model(base_model(size).to(dtype), config)


def _trainable(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def peft_step(
    size: str, dtype: torch.dtype, ids: torch.Tensor, labels: torch.Tensor, targets: Any, compiled: bool = False
) -> Step:
    model = _peft_model(size, dtype, targets).train().to(ids.device)
    for block in model.get_base_model().model.layers if compiled else ():
        block.forward = torch.compile(block.forward, dynamic=True, options={"compile_threads": 1})
    optimizer = torch.optim.AdamW(_trainable(model), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()

    return step


def _record_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return each record's mean loss, float32[N]."""
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none", ignore_index=IGNORE)
    return losses.sum(1) / (targets != IGNORE).sum(1)


def _hooks(size: str, dtype: torch.dtype, ids: torch.Tensor, labels: torch.Tensor, targets: Any) -> Step:
    model = GradSampleModule(_peft_model(size, dtype, targets).train(), loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.AdamW(_trainable(model), lr=1e-4), noise_multiplier=1.0, max_grad_norm=1.0,
        expected_batch_size=len(ids),
    )  # fmt: skip

    def step() -> None:
        optimizer.zero_grad()
        _record_losses(model(input_ids=ids).logits, labels).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _ghost(size: str, dtype: torch.dtype, ids: torch.Tensor, labels: torch.Tensor, targets: Any) -> Step:
    model = GradSampleModuleFastGradientClipping(
        _peft_model(size, dtype, targets).train(), max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="sum"
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.AdamW(_trainable(model), lr=1e-4), noise_multiplier=1.0, max_grad_norm=1.0,
        expected_batch_size=len(ids), loss_reduction="sum",
    )  # fmt: skip

    class Criterion:
        reduction = "sum"

        def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return _record_losses(logits, labels)

    criterion = DPLossFastGradientClipping(model, optimizer, Criterion(), loss_reduction="sum")

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(input_ids=ids).logits, labels).backward()
        optimizer.step()

    return step


def no_text() -> Any:
    """Return a tokenizer of nothing: the engine asks it for its padding only."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>")


def fedllm_step(
    size: str, dtype: torch.dtype, ids: torch.Tensor, labels: torch.Tensor, targets: Any,
    train: Literal["AB", "B"] = "AB", compiled: bool = False, checkpointing: bool = False, micro_batch: int = 0,
) -> Step:  # fmt: skip
    model = ModelConfig(
        source="benchmark", dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
        compile="on" if compiled else "off", max_length=max(8, ids.shape[1]),
    )  # fmt: skip
    lora = AdapterConfig(rank=8, alpha=16.0, targets=targets, train=train)
    adapter = attach(BaseModel(base_model(size).eval(), no_text(), "0" * 64, 2_048, SIZES[size][-1]), model, lora, 0)
    engine = Engine(adapter)
    privacy = PrivacyConfig(units_per_site=1_000, noise_multiplier=1.0)
    plan = RunPlan(run="benchmark", seed=0, model=model, adapter=lora, privacy=privacy, training=TrainingConfig())
    engine.set_up(plan, checkpointing)
    optimizer = engine.optimizer(
        torch.optim.AdamW([adapter.flat], lr=1e-4), _MECHANISM, float(len(ids)), OsRandomness()
    )
    units = [(Example(i.numpy(), target.numpy()),) for i, target in zip(ids, labels, strict=True)]
    return lambda: engine.step(optimizer, units, micro_batch or len(units))


_ARRANGEMENTS: dict[str, Callable[..., Step]] = {
    "peft": peft_step,
    "peft compiled": partial(peft_step, compiled=True),
    "hooks": _hooks,
    "ghost": _ghost,
    "fedllm": fedllm_step,
    "fedllm, B only": partial(fedllm_step, train="B"),
    "fedllm compiled": partial(fedllm_step, compiled=True),
    "fedllm compiled, B only": partial(fedllm_step, train="B", compiled=True),
    "fedllm recomputing": partial(fedllm_step, checkpointing=True),
}


def peak_mb(step: Step, warm: int = 2, steps: int = 3) -> float:
    """Return the most that this process holds during `steps`, after `warm` ones that compile and allocate their own."""
    for _ in range(warm):
        step()
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): begin VmHWM anew; ru_maxrss would remember the parent's
    for _ in range(steps):
        step()
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**10


def _peak_mb_alone(arguments: list[str]) -> float:
    """Return what a process of its own needs for model and steps, above its libraries."""
    done = subprocess.run(
        [sys.executable, "-m", "simulations.benchmarks.step", *arguments], check=True, capture_output=True, text=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure(
    sizes: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(SIZES)}.")] = "5M,30M,135M",
    dtypes: Annotated[str, typer.Option(help="Of the base model, comma-separated.")] = "float32,bfloat16",
    arrangements: Annotated[str, typer.Option(help="Semicolon-separated; peft must be among them.")] = ";".join(
        _ARRANGEMENTS
    ),
    batch: Annotated[int, typer.Option(min=1, help="Records of the batch.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a record.")] = 128,
    labelled: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the tokens that carries loss.")] = 1.0,
    targets: Annotated[str, typer.Option(help="attention (q, k, v, o) or all-linear.")] = "attention",
    turns: Annotated[int, typer.Option(min=1, help="Steps of each arrangement.")] = 9,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    only_memory: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time a training step in every arrangement."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    use_private_cache()
    recompiles.recompile_limit = 64  # of the model in all its arrangements
    chosen: Any = "all-linear" if targets == "all-linear" else ATTENTION
    if only_memory:
        if "compiled" in only_memory:
            torch.compile(lambda x: x + 1)(torch.zeros(2))  # the compiler is a library, too
        before = psutil.Process().memory_info().rss
        step = _ARRANGEMENTS[only_memory](
            sizes, getattr(torch, dtypes), *records(sizes, batch, tokens, labelled), chosen
        )
        print(peak_mb(step) - before / 2**20)
        return
    table = Table(
        title=f"one step, {batch} x {tokens} tokens, {labelled:.0%} labelled, LoRA r=8 on {targets}, "
        f"{threads} threads; median of {turns} turns (quartiles)"
    )
    for column in ("model", "dtype", "step", "seconds", "/ peft", "MB", "/ peft", "start, s"):
        table.add_column(column, justify="left" if column in ("model", "dtype", "step") else "right")
    for size in sizes.split(","):
        for dtype in dtypes.split(","):
            names = arrangements.split(";")
            data = records(size, batch, tokens, labelled)
            steps: dict[str, Step] = {}
            start: dict[str, float] = {}
            for name in names:
                began = time.perf_counter()
                steps[name] = _ARRANGEMENTS[name](size, getattr(torch, dtype), *data, chosen)
                for _ in range(2):
                    steps[name]()
                start[name] = time.perf_counter() - began
            seconds: dict[str, list[float]] = {name: [] for name in names}
            for _ in range(turns):
                for name, step in steps.items():
                    began = time.perf_counter()
                    step()
                    seconds[name].append(time.perf_counter() - began)
            del steps
            memory = {
                name: _peak_mb_alone(
                    ["--only-memory", name, "--sizes", size, "--dtypes", dtype, "--batch", str(batch), "--tokens",
                     str(tokens), "--labelled", str(labelled), "--targets", targets, "--threads", str(threads)]
                )
                for name in names
            }  # fmt: skip
            for name in names:
                ratios = [own / plain for own, plain in zip(seconds[name], seconds["peft"], strict=True)]
                low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
                table.add_row(
                    size, dtype, name, f"{statistics.median(seconds[name]):.3f}",
                    f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{memory[name]:.0f}",
                    f"{memory[name] / memory['peft']:.2f}", f"{start[name]:.0f}",
                )  # fmt: skip
    Console(width=120).print(table)
    print(machine())


if __name__ == "__main__":
    typer.run(measure)
