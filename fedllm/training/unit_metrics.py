"""How well an adapter answers each privacy unit, one by one: what `fedllm.privacy.metrics` adds up and protects."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from fedllm.errors import ModelError, first_line
from fedllm.privacy.metrics import TOP, metric_names
from fedllm.training.adapter import AdapterModel
from fedllm.training.data import Batch, Example, PrivacyUnit, collate, padded
from fedllm.training.losses import labelled_states, logits
from fedllm.training.model import made_up

_log = logging.getLogger("fedllm.site")
_LOGITS = 1 << 22  # that are in memory at a time


@torch.inference_mode()
def unit_metrics(
    adapter: AdapterModel, vector: NDArray[np.float32], units: Sequence[PrivacyUnit]
) -> NDArray[np.float64]:
    """Return float64[n, m], the metrics of each of n units under the adapter float32[d], a unit's values in a row.

    Columns are in the order of `fedllm.privacy.metrics.metric_names`. A unit's values are the mean over its records:
    loss in nats (of a text, the mean over its labelled tokens); whether the right class is the first (accuracy) or
    among the first five (top_5); whether every labelled token is the most likely one after those before it
    (exact_match), which is to say that greedy decoding gives just these. They are NaN if a record's loss is not finite.

    A unit that has no record with a label is left out, and so is one that fails. Raises ModelError if it is the model
    that fails, and SpecMismatch if the vector has another shape.
    """
    rows = []
    with adapter.lock:
        adapter.load(vector)
        public = made_up(adapter.vocabulary, 2)[None].to(adapter.device)  # tells how many classes there are
        names = metric_names(adapter.logits(public, torch.ones_like(public)).shape[-1] if adapter.classifies else 0)
        for unit in units:
            try:
                found = [each for record in unit if (each := _record_metrics(adapter, record)) is not None]
            except ModelError:  # it is the model, and would be so for any record
                raise
            except Exception as error:  # of torch or of the machine
                _log.warning("a unit is not evaluated: %s", first_line(error))
                continue
            if found:
                rows.append(np.mean([[each[name] for name in names] for each in found], axis=0))
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(names))


def _record_metrics(adapter: AdapterModel, record: Example) -> dict[str, float] | None:
    """Return the metrics of a record by name; None if it has no label.

    It has a pass of its own. How a product is rounded depends on the shapes of tensors and on a record's place in them,
    and where two tokens are nearly as likely, the last bit decides which is the first: in company a unit's value could
    turn over as somebody else comes or goes, and the sum would move by more than one unit's norm.
    """
    width = padded(len(record.input_ids), adapter.positions)  # the shapes that training has tried
    batch = collate([(record,)], adapter.tokenizer.pad_token_id, adapter.device, width)
    values = _class_metrics(adapter, batch) if adapter.classifies else _text_metrics(adapter, batch)
    if values is not None and not np.isfinite(values["loss"]):
        return dict.fromkeys(values, np.nan)
    return values


def _class_metrics(adapter: AdapterModel, batch: Batch) -> dict[str, float]:
    scores_NC = logits(adapter, batch).float()
    top_N = scores_NC.topk(min(TOP, scores_NC.shape[1])).indices[0]
    label = batch.labels[0]
    return {
        "accuracy": float(scores_NC[0].argmax() == label),
        "loss": float(F.cross_entropy(scores_NC, batch.labels)),
        f"top_{TOP}": float((top_N == label).any()),
    }


def _text_metrics(adapter: AdapterModel, batch: Batch) -> dict[str, float] | None:
    head, states_MD, targets_M, _ = labelled_states(adapter, batch)
    if not len(targets_M):
        return None
    loss, right = 0.0, True
    many = max(1, _LOGITS // adapter.vocabulary)
    for states, targets in zip(torch.split(states_MD, many), torch.split(targets_M, many), strict=True):
        scores: Any = head(states).float()
        loss += float(F.cross_entropy(scores, targets, reduction="sum"))
        right = right and bool((scores.argmax(-1) == targets).all())
    return {"loss": loss / len(targets_M), "exact_match": float(right)}
