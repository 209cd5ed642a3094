"""How good an adapter is on the public held-out set: perplexity, exact match, accuracy, sample answers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fedllm.config import HeldoutConfig, ModelConfig
from fedllm.errors import ModelError
from fedllm.privacy.mechanism import Mechanism
from fedllm.training.adapter import AdapterModel, answered
from fedllm.training.chat import answer_end
from fedllm.training.data import (
    Batch,
    Example,
    PrivacyUnit,
    Row,
    Tokeniser,
    batches,
    build_units,
    check_named,
    collate,
    columns_of,
    naming,
    passes,
    read_table,
)
from fedllm.training.engine import Engine
from fedllm.training.losses import logits, record_losses, token_losses

_FEW = 16  # held-out records whose gradients are measured after a round
_T = TypeVar("_T")


@dataclass(frozen=True)
class Score:
    """Quality on the held-out set; a value that does not apply is None."""

    loss: float  # nats: per labelled token (causal LM) or per record (classification)
    perplexity: float | None = None  # causal LM: exp(loss)
    accuracy: float | None = None  # classification: share of records


@dataclass(frozen=True)
class Sample:
    """One held-out question and what the model answers."""

    prompt: str
    expected: str
    answer: str


class Evaluator:
    """Evaluates adapters on one public held-out set."""

    def __init__(
        self, adapter: AdapterModel, rows: Sequence[Row], tokeniser: Tokeniser, data: HeldoutConfig, micro_batch: int
    ):
        self._adapter, self._rows, self._tokeniser, self._data = adapter, rows, tokeniser, data
        self._micro_batch = micro_batch
        self.units: tuple[PrivacyUnit, ...] = build_units(rows, tokeniser, None, 1)
        self._classification = not self.units[0][0].labels.ndim
        self.generates = not self._classification and (data.prompt is not None or data.messages is not None)
        self._end = answer_end(adapter.tokenizer, data.chats)

    @torch.inference_mode()
    def score(self, vector: NDArray[np.float32]) -> Score:
        """Score the adapter float32[d]; raises ModelError if the loss is not finite."""
        adapter = self._adapter
        total = count = right = 0.0
        with adapter.lock:
            adapter.load(vector)
            for batch in batches(self.units, self._micro_batch, adapter.tokenizer.pad_token_id, adapter.device):
                if self._classification:
                    scores = logits(adapter, batch).float()
                    total += float(F.cross_entropy(scores, batch.labels, reduction="sum"))
                    count += batch.units
                    right += float((scores.argmax(-1) == batch.labels).sum())
                else:
                    losses, _ = token_losses(adapter, batch)
                    total += float(losses.sum())
                    count += len(losses)
        loss = total / max(count, 1)
        if not math.isfinite(loss):
            raise ModelError(f"held-out loss is {loss}: the adapter has diverged. Lower the learning rates.")
        if self._classification:
            return Score(loss, accuracy=right / count)
        return Score(loss, perplexity=math.exp(min(loss, 700.0)))

    def clipped_share(self, engine: Engine, vector: NDArray[np.float32], mechanism: Mechanism) -> float | None:
        """Return the share of held-out records, of at most 16, whose gradient `mechanism` would shorten."""
        few = spread(self.units, _FEW)
        with self._adapter.lock:
            self._adapter.load(vector)
            return engine.clipped_share(few, mechanism, min(self._micro_batch, _FEW))

    @torch.inference_mode()
    def exact_match(self, vector: NDArray[np.float32]) -> tuple[float, list[Sample]]:
        """Answer every held-out prompt greedily.

        Returns the share of answers that equal the expected text, and the first `data.samples` of them.
        """
        samples: list[Sample] = []
        order = sorted(range(len(self._rows)), key=lambda i: len(self.units[i][0].input_ids))
        answers: dict[int, str] = {}
        with self._adapter.lock:
            self._adapter.load(vector)
            for start in range(0, len(order), self._micro_batch):
                rows = order[start : start + self._micro_batch]
                answers.update(zip(rows, self._generate(rows), strict=True))
        right = 0
        for i, row in enumerate(self._rows):
            prompt, expected = self._tokeniser.question(row, i)
            right += answers[i] == expected
            samples.append(Sample(prompt, expected, answers[i]))
        return right / len(samples), spread(samples, self._data.samples)

    def _generate(self, numbers: Sequence[int]) -> list[str]:
        # room to go on where the expected answer ends
        new_tokens = max(len(self._tokeniser.answer_ids(self._rows[i], i)) for i in numbers) + 8
        room = max(1, self._adapter.positions - new_tokens)
        prompts = [self._tokeniser.prompt_ids(self._rows[i], i)[-room:] for i in numbers]
        return answered(self._adapter.model, self._adapter.tokenizer, self._end, prompts, new_tokens)


def losses_of(
    adapter: AdapterModel, vector: NDArray[np.float32], records: Sequence[Example], micro_batch: int
) -> NDArray[np.float32]:
    """Return every record's own loss under the adapter float32[d], float32[N] in nats: see `record_losses`."""
    with adapter.lock:
        adapter.load(vector)
        each = partial(record_losses, adapter)
        return each_record(each, records, lambda _: micro_batch, adapter.tokenizer.pad_token_id, adapter.device)


@torch.inference_mode()
def each_record(
    found: Callable[[Batch], Tensor], records: Sequence[Example], rows: Callable[[int], int], pad_id: int,
    device: torch.device,
) -> NDArray[np.float32]:  # fmt: skip
    """Return what is `found` for every record, [N, ...] as float32; a pass has at most `rows(width)` of them."""
    order = sorted(range(len(records)), key=lambda i: len(records[i].input_ids))  # as `passes` has them
    cut = passes([(records[i],) for i in order], rows)
    values = torch.cat([found(collate(some, pad_id, device, width)).float().cpu() for some, width in cut]).numpy()
    sorted_back = np.empty_like(values)
    sorted_back[order] = values
    return sorted_back


def spread(things: Sequence[_T], n: int) -> list[_T]:
    """Return `n` things, evenly spread over all."""
    n = min(n, len(things))
    return [things[i * len(things) // n] for i in range(n)]


def open_evaluator(
    model: ModelConfig, data: HeldoutConfig, adapter: AdapterModel, micro_batch: int
) -> Evaluator | None:
    """Return what evaluates on the configured held-out set; None if there is none. Raises DataError naming the file."""
    if data.heldout is None:
        return None
    rows = read_table(data.heldout, data.heldout_split, data)
    with naming(data.heldout):
        check_named(columns_of(rows), data)
    if data.heldout_limit is not None:
        rows = spread(rows, data.heldout_limit)  # files are often sorted
    tokeniser = Tokeniser(adapter.tokenizer, model, data, adapter.vocabulary)
    with naming(data.heldout):
        return Evaluator(adapter, rows, tokeniser, data, micro_batch)
