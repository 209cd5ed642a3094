"""From many updates to one."""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray


def public_shares(names: Iterable[str], weights: Mapping[str, float]) -> dict[str, float]:
    """Return what each of these sites counts in their mean, in the order of names; one not in `weights` weighs 1."""
    found = {name: weights.get(name, 1.0) for name in sorted(names)}
    total = sum(found.values())
    return {name: weight / total for name, weight in found.items()}


def weighted_mean(updates: Mapping[str, NDArray[np.float32]], weights: Mapping[str, float]) -> NDArray[np.float32]:
    """Return the mean of the sites' updates, float32[d], by `public_shares`.

    FedAvg (McMahan et al. 2017) with public weights instead of record counts. Summed in float64 in the order of the
    sites' names, so that the result does not depend on who answered first.
    """
    shares = public_shares(updates, weights)
    return np.asarray(sum(share * updates[name].astype(np.float64) for name, share in shares.items()), dtype=np.float32)
