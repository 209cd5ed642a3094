"""How well an adapter answers each privacy unit, one by one: what `fedllm.privacy.metrics` adds up and protects."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedllm.errors import ModelError, first_line
from fedllm.privacy.metrics import TOP, metric_names
from fedllm.training.adapter import AdapterModel
from fedllm.training.data import Batch, Example, PrivacyUnit, passes
from fedllm.training.engine import Engine
from fedllm.training.losses import labelled_states, logits
from fedllm.training.model import made_up

_log = logging.getLogger("fedllm.site")
_LOGITS = 1 << 22  # that are in memory at a time
_UNITS = 1024  # the same; no result depends on it

_Metrics = dict[str, float]  # by name; none of a record that has no label


@torch.inference_mode()
def unit_metrics(
    engine: Engine, vector: NDArray[np.float32], units: Sequence[PrivacyUnit], micro_batch: int
) -> NDArray[np.float64]:
    """Return float64[n, m], the metrics of each of n units under the adapter float32[d], a unit's values in a row.

    Columns are in the order of `fedllm.privacy.metrics.metric_names`. A unit's values are the mean over its records:
    loss in nats (of a text, the mean over its labelled tokens); whether the right class is the first (accuracy) or
    among the first five (top_5); whether every labelled token is the most likely one after those before it
    (exact_match), which is to say that greedy decoding gives just these. They are NaN if a record's loss is not finite.

    How a product is rounded depends on the shapes of tensors, and where two tokens are nearly as likely, the last bit
    decides which is the first: a unit's value could turn over as somebody else comes or goes, and the sum would move by
    more than one unit's norm. So records are computed in the passes of training, whose company changes no bit.

    A unit that has no record with a label is left out, and so is one that fails. Raises ModelError if it is the model
    that fails, and SpecMismatch if the vector has another shape.
    """
    adapter = engine.adapter
    rows = list[NDArray[np.float64]]()
    with adapter.lock:
        adapter.load(vector)
        public = made_up(adapter.vocabulary, 2)[None].to(adapter.device)  # tells how many classes there are
        names = metric_names(adapter.logits(public, torch.ones_like(public)).shape[-1] if adapter.classifies else 0)
        for first in range(0, len(units), _UNITS):
            some = units[first : first + _UNITS]
            found = iter(_record_metrics(engine, [record for unit in some for record in unit], micro_batch))
            for unit in some:
                own = [next(found) for _ in unit]
                values = [each for each in own if each]
                if values and None not in own:
                    rows.append(np.mean([[each[name] for name in names] for each in values], axis=0))
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(names))


def _record_metrics(engine: Engine, records: Sequence[Example], micro_batch: int) -> list[_Metrics | None]:
    """Return the metrics of each record: none of one that has no label, None of one that fails."""
    found = dict[int, _Metrics | None]()
    units = [(record,) for record in records]
    for some, width in passes(units, lambda width: engine.rows(width, micro_batch), engine.adapter.positions):
        try:
            values: list[_Metrics | None] = [*_pass_metrics(engine, some, width, micro_batch)]
        except ModelError:  # it is the model, and would be so for any record
            raise
        except Exception as error:  # of torch or of the machine
            _log.warning(
                "a pass of %d records failed (%s); they are evaluated one by one", len(some), first_line(error)
            )
            values = [_alone(engine, unit, width, micro_batch) for unit in some]
        found.update(zip((id(record) for (record,) in some), values, strict=True))
    return [found[id(record)] for record in records]


def _alone(engine: Engine, unit: PrivacyUnit, width: int, micro_batch: int) -> _Metrics | None:
    try:
        return _pass_metrics(engine, [unit], width, micro_batch)[0]
    except Exception as error:
        _log.warning("a unit is not evaluated: %s", first_line(error))
        return None


def _pass_metrics(engine: Engine, units: Sequence[PrivacyUnit], width: int, micro_batch: int) -> list[_Metrics]:
    measure = _class_metrics if engine.adapter.classifies else _text_metrics
    found = engine.in_pass(lambda batch: measure(engine.adapter, batch), units, width, micro_batch)[: len(units)]
    return [values if np.isfinite(values.get("loss", 0)) else dict.fromkeys(values, np.nan) for values in found]


def _class_metrics(adapter: AdapterModel, batch: Batch) -> list[_Metrics]:
    scores_NC = logits(adapter, batch).float()
    top_NK = scores_NC.topk(min(TOP, scores_NC.shape[1])).indices
    return [
        {
            "accuracy": float(scores.argmax() == label),
            "loss": float(F.cross_entropy(scores[None], label[None])),
            f"top_{TOP}": float((top == label).any()),
        }
        for scores, top, label in zip(scores_NC, top_NK, batch.labels, strict=True)
    ]


def _text_metrics(adapter: AdapterModel, batch: Batch) -> list[_Metrics]:
    head, states_MD, targets_M, rows_M = labelled_states(adapter, batch)
    counts = torch.bincount(rows_M, minlength=len(batch.labels)).tolist()
    own = zip(torch.split(states_MD, counts), torch.split(targets_M, counts), strict=True)
    return [_own_metrics(head, adapter.vocabulary, *each) for each in own]


def _own_metrics(head: nn.Module, vocabulary: int, states_MD: Tensor, targets_M: Tensor) -> _Metrics:
    """Return the metrics of one record, of what the head is given and the tokens; none where there are no tokens."""
    if not len(targets_M):
        return {}
    loss, right = 0.0, True
    many = max(1, _LOGITS // vocabulary)
    for states, targets in zip(torch.split(states_MD, many), torch.split(targets_M, many), strict=True):
        scores: Any = head(states).float()
        loss += float(F.cross_entropy(scores, targets, reduction="sum"))
        right = right and bool((scores.argmax(-1) == targets).all())
    return {"loss": loss / len(targets_M), "exact_match": float(right)}
