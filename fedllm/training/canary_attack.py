"""Canaries as training data, and the scores of two attacks on them: black-box by loss, white-box by gradient.

A canary is random text, of which a language model learns the last token alone: its gradient is then long, so that the
clip leaves it its full length, and shares its direction with no other's. docs/benchmarks.md has what was compared. What
is computed here depends on the seed and on released adapters alone, for canaries that are in as for those that are out.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedllm.config import ModelConfig
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import KeyedRandomness
from fedllm.training.adapter import AdapterModel
from fedllm.training.data import IGNORE, Example, PrivacyUnit, collate, padded
from fedllm.training.engine import Engine
from fedllm.training.losses import unit_losses

_LENGTH = 8  # tokens of a canary, as many as every model.max_length admits

_STRENGTH = 2.0  # deviations by which a canary that was drawn is supposed to stand out


def make_canaries(seed: bytes, n: int, model: ModelConfig, vocabulary: int) -> list[PrivacyUnit]:
    """Return `n` units of one record each, of 8 tokens of `vocabulary`, as 32 bytes of seed say.

    A language model learns the last token after the others, a classifier one of its labels: random, all of them.
    """
    source = KeyedRandomness(seed, b"fedllm canaries v1")
    tokens = (source.words(n * _LENGTH) % np.uint64(vocabulary)).astype(np.int64).reshape(n, _LENGTH)
    if model.task == "classification":
        classes = (source.words(n) % np.uint64(len(model.labels))).astype(np.int64)
        return [(Example(ids, np.asarray(label)),) for ids, label in zip(tokens, classes, strict=True)]
    labels = np.where(np.arange(_LENGTH) < _LENGTH - 1, IGNORE, tokens)
    return [(Example(ids, own),) for ids, own in zip(tokens, labels, strict=True)]


def white_scores(
    engine: Engine,
    adapter: AdapterModel,
    start: NDArray[np.float32],
    step: NDArray[np.float32],
    units: Sequence[PrivacyUnit],
    mechanism: Mechanism,
    micro_batch: int,
) -> NDArray[np.float64]:
    """Return float64[n]: how far a step, float32[d] from `start`, went along each unit's own descent.

    That is minus the inner product of the step with the unit's gradient at `start`, clipped as the mechanism does. The
    rounds together tell units that trained from others (Andrew et al. 2023, arXiv 2302.03098; Nasr et al. 2023, arXiv
    2302.07956). It costs one gradient a unit. A unit without a finite gradient adds nothing to an adapter, and
    scores 0.
    """
    width = padded(_longest(units), adapter.positions)
    rows = engine.rows(width, micro_batch)
    scores = []
    with adapter.lock:
        adapter.load(start)
        along = torch.from_numpy(step.astype(np.float64)).to(adapter.device)
        for first in range(0, len(units), rows):
            gradients = engine.pass_gradients(units[first : first + rows], width, micro_batch).double()
            scores.append(-(gradients @ along) * mechanism.factors(torch.linalg.vector_norm(gradients, dim=1)))
    found = torch.cat(scores).cpu().numpy() if scores else np.zeros(0)
    return np.where(np.isfinite(found), found, 0.0)


def drawn_in_a_round(scores: NDArray[np.float64], rate: float) -> NDArray[np.float64]:
    """Return float64[n], what a round's white scores say for each unit: the log of a likelihood ratio, to be added up.

    A unit that is in was drawn in this round with probability `rate`, 0 < rate <= 1, and its score is then some
    deviations higher: log(1 - q + q exp(s z - s^2 / 2)) for a score z in deviations, s = 2. With q = 1 that orders as
    the sum of scores does; with a small q, one round in which a unit stands out counts for more than many in which
    it was not drawn, where others' gradients decide.
    """
    deviation = float(scores.std()) if len(scores) else 0.0
    if deviation == 0.0:
        return np.zeros(len(scores))
    z = np.clip((scores - scores.mean()) / deviation, -5, 5)
    return np.asarray(np.log1p(rate * np.expm1(_STRENGTH * z - _STRENGTH**2 / 2)))


def black_scores(
    adapter: AdapterModel,
    start: NDArray[np.float32],
    end: NDArray[np.float32],
    units: Sequence[PrivacyUnit],
    micro_batch: int,
) -> NDArray[np.float64]:
    """Return float64[n]: each unit's loss under the adapter `start`, less that under `end`, nats; float32[d] each."""
    with adapter.lock, torch.inference_mode():
        before, after = (_losses(adapter, values, units, micro_batch) for values in (start, end))
        return before - after


def _losses(
    adapter: AdapterModel, values: NDArray[np.float32], units: Sequence[PrivacyUnit], micro_batch: int
) -> NDArray[np.float64]:
    adapter.load(values)
    pad, width = adapter.tokenizer.pad_token_id, _longest(units)
    found = [
        unit_losses(adapter, collate(units[first : first + micro_batch], pad, adapter.device, width))
        for first in range(0, len(units), micro_batch)
    ]
    return torch.cat(found).double().cpu().numpy() if found else np.zeros(0)


def _longest(units: Sequence[PrivacyUnit]) -> int:
    return max((len(record.input_ids) for unit in units for record in unit), default=1)
