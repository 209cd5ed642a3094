"""Attack: the server sends start values whose parts cancel: gradients are what rounding left, and tell of others.

Stopped by passes whose shape is the same whoever is drawn, by exact sums, and by a self-check of both on the model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedllm.adapter_vector import AdapterSpec
from fedllm.config import AdapterConfig, ModelConfig
from fedllm.privacy.mechanism import Mechanism
from fedllm.training.adapter import attach
from fedllm.training.data import IGNORE, Example, PrivacyUnit
from fedllm.training.engine import Engine
from fedllm.training.model import load_base
from tests.sharing import once

VOCABULARY = 32_000


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Two blocks of a realistic width under a realistic vocabulary, where libraries choose their kernels by shape."""

    def make(folder: Path) -> None:
        state = torch.random.get_rng_state()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, tie_word_embeddings=True,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        torch.random.set_rng_state(state)
        PreTrainedTokenizerFast.from_pretrained(tiny_llama).save_pretrained(folder)

    return once(tmp_path_factory, "last-bits", make)


def cancelling(spec: AdapterSpec) -> NDArray[np.float32]:
    """Values of up to 1e4: pairs of rank-one maps in the first block that cancel exactly, but for rounding."""
    rng = np.random.default_rng(1)
    values = (rng.standard_normal(spec.dimension) * 0.01).astype(np.float32)
    parts, first = {}, 0
    for tensor in spec.tensors:
        size = int(np.prod(tensor.shape))
        parts[tensor.name] = values[first : first + size].reshape(tensor.shape)
        first += size
    a_RI, b_OR = (next(p for n, p in parts.items() if f"layers.0.mlp.down_proj.lora_{x}" in n) for x in "AB")
    for k in range(0, len(a_RI), 2):
        row, column = rng.integers(-300, 300, a_RI.shape[1]), rng.integers(-900, 900, len(b_OR))
        a_RI[k], a_RI[k + 1], b_OR[:, k], b_OR[:, k + 1] = row, 3 * row, 3 * column, -column
    return values


@pytest.mark.parametrize(
    ("task", "persons", "threads", "longest", "quantize"),
    [
        ("causal-lm", False, 1, 8, "none"),
        ("causal-lm", True, 2, 40, "nf4"),
        ("classification", True, 8, 40, "int8"),
        *(
            pytest.param(task, persons, threads, longest, quantize, marks=pytest.mark.soak)
            for task in ("causal-lm", "classification")
            for persons in (False, True)
            for threads in (1, 2, 3, 8)
            for longest in (8, 14, 40, 96, 300)
            for quantize in (("none", "int8", "nf4") if threads in (2, 8) and longest in (14, 300) else ("none",))
        ),
    ],
)
def test_one_unit_more_moves_the_sum_by_its_own_part_and_not_by_the_last_bits_of_others(
    base: Path, task: Any, persons: bool, threads: int, longest: int, quantize: Any
) -> None:
    labels = ("a", "b", "c") if task == "classification" else ()
    model = ModelConfig(
        source=str(base), task=task, labels=labels, max_length=longest, dtype="float32", quantize=quantize
    )
    config = AdapterConfig(rank=16, train="AB", alpha=640.0, targets="all-linear")
    adapter = attach(load_base(model, "cpu"), model, config, 0)
    engine, rng = Engine(adapter), np.random.default_rng(0)

    def record() -> Example:
        ids = rng.integers(3, VOCABULARY, int(rng.integers(longest - 4, longest + 1)))
        if labels:
            return Example(ids, np.asarray(int(rng.integers(0, 3))))
        return Example(ids, np.where(np.arange(len(ids)) < rng.integers(1, len(ids)), IGNORE, ids))

    def unit() -> PrivacyUnit:
        return tuple(record() for _ in range(int(rng.integers(1, 4)) if persons else 1))

    units, mechanism = [unit() for _ in range(12)], Mechanism(1.0, 1.0, 0.5)
    adapter.load(cancelling(adapter.spec))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _each_adds_its_own(lambda some: engine.clipped_sum(some, mechanism, 64), units)
    finally:
        torch.set_num_threads(before)


def _each_adds_its_own(total: Callable[[list[PrivacyUnit]], torch.Tensor], units: list[PrivacyUnit]) -> None:
    alone = [total([unit]) for unit in units]
    assert all(0.5 < float(part.norm()) <= 1 for part in alone)
    for first, last in ((0, len(units)), (1, len(units)), (0, 2), (0, 3), (0, 5), (3, 4)):
        for some in (list(range(first, last)), list(range(first, last))[::-1]):
            assert torch.equal(total([units[k] for k in some]), torch.stack([alone[k] for k in some]).sum(0))
