"""Losses that keep records apart: a mean over the tokens of one record, never over a batch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedllm.training.adapter import AdapterModel
from fedllm.training.data import IGNORE, Batch


def token_losses(adapter: AdapterModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of every labelled token and the row it belongs to, float32[M] and int64[M] (causal LM).

    The output head, a large part of a small model's work, runs only where there is a label.
    """
    targets_NT = batch.labels[:, 1:]
    rows, columns = (targets_NT != IGNORE).nonzero(as_tuple=True)
    if adapter.split is None:
        logits_MV = logits(adapter, batch)[rows, columns]
    else:
        transformer, head = adapter.split
        states: Any = transformer(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        logits_MV = head(states.last_hidden_state[rows, columns])
    return F.cross_entropy(logits_MV.float(), targets_NT[rows, columns], reduction="none"), rows


def record_losses(adapter: AdapterModel, batch: Batch) -> Tensor:
    """Return float32[N]: each record's mean loss over its own labelled tokens, or its classification loss.

    A mean over the tokens of the batch would couple records: one more record would change the others' gradients.
    """
    if batch.labels.ndim == 1:
        return F.cross_entropy(logits(adapter, batch).float(), batch.labels, reduction="none")
    losses_M, rows_M = token_losses(adapter, batch)
    return _mean_by(rows_M, losses_M, len(batch.labels))


def unit_losses(adapter: AdapterModel, batch: Batch) -> Tensor:
    """Return float32[units]: the mean over each unit's records in the batch."""
    return _mean_by(batch.unit_of_row, record_losses(adapter, batch), batch.units)


def logits(adapter: AdapterModel, batch: Batch) -> Tensor:
    """Return the model's logits, [N, T, vocabulary] or [N, classes]."""
    output: Any = adapter.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    result: Tensor = output.logits
    return result


def _mean_by(group: Tensor, values: Tensor, groups: int) -> Tensor:
    """Return the mean of `values` in each group, float32[groups]; 0 for a group without any."""
    sums = torch.zeros(groups, device=values.device).index_add(0, group, values)
    return sums / torch.bincount(group, minlength=groups).clamp(min=1)
