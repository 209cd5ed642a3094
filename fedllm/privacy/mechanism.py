"""The Poisson-subsampled Gaussian mechanism: coins, sensitivity, noise and accounting event from one object."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm.privacy.accounting import AccountingEvent
from fedllm.privacy.randomness import Randomness, float_safe_normals, uniforms


@dataclass(frozen=True)
class Mechanism:
    """One release: the sum of the sampled units' clipped vectors, plus Gaussian noise.

    Adding or removing one unit moves the sum by at most `clip_norm`, so the noise and the accounting event that are
    made here cannot disagree with the clip (Abadi et al. 2016, section 3). `noise_multiplier=0` is the non-private
    mechanism: it clips nothing and its event has infinite epsilon.
    """

    clip_norm: float  # L2, gradient units
    noise_multiplier: float  # noise standard deviation / clip_norm
    sampling_rate: float  # probability of each unit, independently, in each step

    @property
    def private(self) -> bool:
        """Whether any noise is added at all."""
        return self.noise_multiplier > 0

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on every coordinate, gradient units."""
        return self.noise_multiplier * self.clip_norm if self.private else 0.0

    def event(self, steps: int) -> AccountingEvent:
        """Return what `steps` releases cost."""
        return AccountingEvent(self.sampling_rate, self.noise_multiplier, steps)

    def sample(self, units: int, source: Randomness) -> NDArray[np.int64]:
        """Return the indices of the units that enter one step: each of `units`, independently, with probability q.

        The result may be empty; an empty batch is a step like any other.
        """
        return np.flatnonzero(uniforms(source, units) < self.sampling_rate)

    def noise(self, dimension: int, source: Randomness) -> NDArray[np.float64]:
        """Return float64[dimension] of noise for one clipped sum."""
        if not self.private:
            return np.zeros(dimension)
        return float_safe_normals(source, dimension) * self.noise_std
