"""Losses that keep records apart: a mean over the tokens of one record, never over a batch."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedllm.training.data import IGNORE, Batch

_LOGITS = 1 << 22  # logits that are in memory at a time: 16 MiB of float32, a third-level cache


class Scores(Protocol):
    """A model that says how likely a text, or a class, is: an adapter in training, or a release."""

    @property
    def split(self) -> tuple[Callable[..., Any], nn.Module] | None:
        """Transformer and output head, where the second after the first is all there is to the model."""

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return [N, T, vocabulary] of the text's own tokens, or [N, classes]."""


def token_losses(adapter: Scores, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of every labelled token and the row it belongs to, float32[M] and int64[M] (causal LM).

    The output head, a large part of a small model's work, runs only where there is a label, and over one record at a
    time: how a product is rounded depends on its number of rows, so that must not be the number of everybody's labels.
    """
    head, states_MD, targets_M, rows_M = labelled_states(adapter, batch)
    counts = torch.bincount(rows_M, minlength=len(batch.labels)).tolist()
    own = zip(torch.split(states_MD, counts), torch.split(targets_M, counts), strict=True)
    return torch.cat([_own_losses(head, *each) for each in own]), rows_M


def labelled_states(adapter: Scores, batch: Batch) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Return the output head, and of every labelled token, row by row, what the head is given, the token, the row.

    [M, D], int64[M], int64[M]. Where a model does more after its head, the states are its logits, and the head does
    nothing.
    """
    targets_NT = batch.labels[:, 1:]
    rows, columns = (targets_NT != IGNORE).nonzero(as_tuple=True)
    head: nn.Module = nn.Identity()
    if adapter.split is None:
        states_NTD = logits(adapter, batch)
    else:
        transformer, head = adapter.split
        states: Any = transformer(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        states_NTD = states.last_hidden_state[:, -targets_NT.shape[1] - 1 :]  # without virtual tokens
    return head, states_NTD[rows, columns], targets_NT[rows, columns], rows


def _own_losses(head: nn.Module, states_MD: Tensor, targets_M: Tensor) -> Tensor:
    """Return the loss of every labelled token of one record, float32[M]."""
    if isinstance(head, nn.Linear):
        return head_losses(states_MD, head.weight, head.bias, targets_M)
    return F.cross_entropy(head(states_MD).float(), targets_M, reduction="none")


def head_losses(states_MD: Tensor, weight: Tensor, bias: Tensor | None, targets_M: Tensor) -> Tensor:
    """Return the cross-entropy of a frozen linear output head, float32[M], without ever holding logits[M, V].

    Equal to cross_entropy(linear(states, weight, bias), targets, reduction="none") and its gradient by the states.
    """
    losses: Tensor = _HeadLosses.apply(states_MD, weight, bias, targets_M)  # type: ignore[no-untyped-call]
    return losses


class _HeadLosses(torch.autograd.Function):
    """The logits of a few tokens at a time; the gradient by the states is taken while they are at hand."""

    @staticmethod
    def forward(ctx: Any, states_MD: Tensor, weight: Tensor, bias: Tensor | None, targets_M: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        losses_M = torch.empty(len(states_MD), device=states_MD.device)
        gradient_MD = torch.empty_like(states_MD) if wanted else None
        many = max(1, _LOGITS // len(weight))
        for first in range(0, len(states_MD), many):
            here = slice(first, first + many)
            logits = F.linear(states_MD[here], weight, bias).float()
            target = targets_M[here, None]
            top = torch.logsumexp(logits, dim=1, keepdim=True)
            losses_M[here] = (top - logits.gather(1, target)).squeeze(1)
            if gradient_MD is not None:  # softmax - one-hot, times the weights
                softmax = logits.sub_(top).exp_()
                softmax.scatter_add_(1, target, softmax.new_full(target.shape, -1.0))
                torch.mm(softmax.to(weight.dtype), weight, out=gradient_MD[here])
        ctx.gradient_MD = gradient_MD
        return losses_M

    @staticmethod
    def backward(ctx: Any, *upstream_M: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient: Tensor = ctx.gradient_MD
        return gradient * upstream_M[0][:, None].to(gradient.dtype), None, None, None


def record_losses(adapter: Scores, batch: Batch) -> Tensor:
    """Return float32[N]: each record's mean loss over its own labelled tokens, or its classification loss.

    A mean over the tokens of the batch would couple records: one more record would change the others' gradients.
    """
    if batch.labels.ndim == 1:
        return F.cross_entropy(logits(adapter, batch).float(), batch.labels, reduction="none")
    losses_M, rows_M = token_losses(adapter, batch)
    return _mean_by(rows_M, losses_M, len(batch.labels))


def unit_losses(adapter: Scores, batch: Batch) -> Tensor:
    """Return float32[units]: the mean over each unit's records in the batch."""
    return _mean_by(batch.unit_of_row, record_losses(adapter, batch), batch.units)


def logits(adapter: Scores, batch: Batch) -> Tensor:
    """Return the model's logits, [N, T, vocabulary] or [N, classes]."""
    return adapter.logits(batch.input_ids, batch.attention_mask)


def _mean_by(group: Tensor, values: Tensor, groups: int) -> Tensor:
    """Return the mean of `values` in each group, float32[groups]; 0 for a group without any."""
    sums = torch.zeros(groups, device=values.device).index_add(0, group, values)
    return sums / torch.bincount(group, minlength=groups).clamp(min=1)
