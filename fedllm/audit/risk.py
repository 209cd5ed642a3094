"""What (epsilon, delta) means for an attacker who has to tell whether somebody's records were used."""

from collections.abc import Sequence

import numpy as np

from fedllm.audit.model import Risk
from fedllm.privacy.accounting import AccountingEvent, deltas

_RATES = tuple(float(rate) for rate in np.unique(np.round(np.concatenate([
    [0.0, 0.001, 0.01, 1.0], np.geomspace(1e-4, 0.1, 16), np.linspace(0.1, 1.0, 37)]), 6)))  # fmt: skip


def risk_of(events: Sequence[AccountingEvent], epsilon: float | None, grid: float | None) -> Risk:
    """Return the trade-off between an attacker's errors after `events`, which cost `epsilon` on that `grid`.

    Every point (epsilon, delta) of the privacy profile bounds the type II error at a type I error a by
    f(a) = max(0, 1 - delta - e^epsilon a, e^-epsilon (1 - delta - a)), and the largest such bound holds (Dong, Roth and
    Su 2022, Proposition 2.5 and Section 2.3). Some fifty points instead of all make the bound weaker, never wrong. The
    advantage, the largest gap between true and false positive rate, is delta at epsilon 0: the total variation.
    """
    if epsilon is None:
        points, profile = np.zeros(1), np.ones(1)
    else:
        points = np.concatenate([[0.0], np.geomspace(1e-3, min(max(1.5 * epsilon, 0.1), 150.0), 50)])
        profile = np.clip(deltas(events, points.tolist(), grid), 0.0, 1.0)
    rates = np.asarray(_RATES)[:, None]
    bounds = np.maximum(1 - profile - np.exp(points) * rates, np.exp(-points) * (1 - profile - rates))
    hits = 1 - np.clip(bounds.max(axis=1), 0.0, 1.0)
    curve = tuple((rate, round(float(hit), 6)) for rate, hit in zip(_RATES, hits, strict=True))
    return Risk(advantage=round(float(profile[0]), 6), tpr_at_1_percent=dict(curve)[0.01], curve=curve)
