"""From many updates to one."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


def weighted_mean(updates: Mapping[str, NDArray[np.float32]], weights: Mapping[str, float]) -> NDArray[np.float32]:
    """Return the mean of the sites' updates, float32[d]; a site that `weights` does not name weighs 1.

    FedAvg (McMahan et al. 2017) with public weights instead of record counts. Summed in float64 in the order of the
    sites' names, so that the result does not depend on who answered first.
    """
    names = sorted(updates)
    total = np.zeros_like(updates[names[0]], dtype=np.float64)
    for name in names:
        total += weights.get(name, 1.0) * updates[name].astype(np.float64)
    return np.asarray(total / sum(weights.get(name, 1.0) for name in names), dtype=np.float32)
