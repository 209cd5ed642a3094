"""One DP step on a base of 100M parameters in float32, in 8 bits and in 4: bytes and time, side by side in one process.

python -m simulations.benchmarks.quantise

The base is a Llama of random weights with a vocabulary of 32,000, written to a folder and loaded as any other. The
three take turns, so that whatever else the machine does falls on all of them; a ratio is taken within each turn.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedllm.config import AdapterConfig, ModelConfig
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import OsRandomness
from fedllm.training.adapter import attach
from fedllm.training.data import Example
from fedllm.training.engine import Engine
from fedllm.training.model import linear_layers, load_base
from fedllm.training.quantised import QuantisedLinear
from simulations.benchmarks.bench import machine

_VOCABULARY = 32_000
_MECHANISM = Mechanism(clip_norm=1.0, noise_multiplier=1.0, sampling_rate=0.1)


def _make(folder: Path, layers: int) -> None:
    """Write the base: at 12 layers, 85M parameters in linear layers and 25M in the embedding."""
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCABULARY, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers,
            num_attention_heads=12, num_key_value_heads=12, tie_word_embeddings=True, pad_token_id=0,
        )
    ).save_pretrained(folder)  # fmt: skip
    words = Tokenizer(models.BPE(vocab={"<pad>": 0, **{f"w{k}": k for k in range(1, _VOCABULARY)}}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="w2").save_pretrained(folder)


def _held(layer: Any) -> int:
    """Return the bytes that a linear layer's weights take."""
    held = layer.buffers() if isinstance(layer, QuantisedLinear) else [layer.weight]
    return sum(part.numel() * part.element_size() for part in held)


def measure(
    tokens: Annotated[str, typer.Option(help="Of a record, comma-separated.")] = "64,128,256",
    batch: Annotated[int, typer.Option(min=1, help="Records of a step.")] = 4,
    turns: Annotated[int, typer.Option(min=1, help="Steps of each.")] = 9,
    layers: Annotated[int, typer.Option(min=1, help="Blocks of the base.")] = 12,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of what is not quantised.")] = "float32",
) -> None:
    """Measure bytes and steps."""
    torch.set_num_threads(threads)
    lora = AdapterConfig(rank=8, alpha=16.0, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    engines: dict[str, tuple[Engine, Any]] = {}
    memory = Table("quantize", "linear weights, MB", "/ none", "whole base, MB", "/ none")
    whole: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        _make(Path(folder), layers)
        for kind in ("none", "int8", "nf4"):
            config: Any = {"source": folder, "quantize": kind, "dtype": dtype, "max_length": 256, "compile": "off"}
            model = ModelConfig(**config)
            base = load_base(model, "cpu")
            adapter = attach(base, model, lora, 0)
            inner = adapter.model.get_base_model()
            linear = sum(_held(inner.get_submodule(f"{name}")) for name in linear_layers(inner) if "lora_" not in name)
            held = [*inner.named_parameters(), *inner.named_buffers()]
            total = sum(part.numel() * part.element_size() for name, part in held if "lora_" not in name)
            whole += [linear / 1e6, total / 1e6]
            memory.add_row(
                kind, f"{whole[-2]:.1f}", f"{whole[-2] / whole[0]:.3f}", f"{whole[-1]:.1f}",
                f"{whole[-1] / whole[1]:.3f}",
            )  # fmt: skip
            engine = Engine(adapter)
            optimizer = torch.optim.AdamW([adapter.flat], lr=1e-4)
            engines[kind] = (engine, engine.optimizer(optimizer, _MECHANISM, float(batch), OsRandomness()))
    steps = Table("tokens", "quantize", "wall, s", "/ none (quartiles)", "CPU, s", "/ none (quartiles)")
    for length in map(int, tokens.split(",")):
        rng = np.random.default_rng(0)
        units = [(Example(ids, ids),) for ids in rng.integers(3, _VOCABULARY, (batch, length))]
        seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in engines}
        for turn in range(turns + 1):
            for kind, (engine, optimizer) in engines.items():
                began = time.perf_counter(), time.process_time()
                engine.step(optimizer, units, batch)
                if turn:  # the first warms up
                    seconds[kind].append((time.perf_counter() - began[0], time.process_time() - began[1]))
        plain = np.array(seconds["none"])
        for kind, found in seconds.items():
            own = np.array(found)
            middle, quartiles = np.median(own, axis=0), np.quantile(own / plain, [0.25, 0.5, 0.75], axis=0)
            low, half, high = quartiles
            cells = [f"{half[k]:.2f} ({low[k]:.2f} to {high[k]:.2f})" for k in (0, 1)]
            steps.add_row(str(length), kind, f"{middle[0]:.2f}", cells[0], f"{middle[1]:.2f}", cells[1])
    console = Console(width=120)
    console.print(memory, steps)
    print(machine())


if __name__ == "__main__":
    typer.run(measure)
