"""The Poisson-subsampled Gaussian mechanism: sampling, sensitivity, noise and accounting event from one object."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import PrivacyError
from fedllm.privacy.accounting import AccountingEvent
from fedllm.privacy.randomness import Randomness, float_safe_normals, uniforms

Clipping = Literal["flat", "automatic"]

_GAMMA = 0.01  # gradient units; stability constant of automatic clipping, as its authors chose it
_GRID_BITS = 10  # few, so that a cell of the grid holds very many values of the noise
_SHORTER = 1 - 1e-9  # than the clip: norm and factor are computed in floats, and the result must not exceed it by a bit
_EXTREME = 1e100  # between its inverse and it, no product or quotient of two numbers and no square leaves float64


@dataclass(frozen=True)
class Mechanism:
    """One release: the sum of the sampled units' clipped vectors, plus Gaussian noise.

    Adding or removing one unit moves the sum by at most `clip_norm`, so the noise and the accounting event that are
    made here cannot disagree with the clip (Abadi et al. 2016, section 3). `noise_multiplier=0` is the non-private
    mechanism: it clips nothing and its event has infinite epsilon. How a vector is shortened (`clipping`) changes
    neither bound nor price.
    """

    clip_norm: float  # L2, gradient units
    noise_multiplier: float  # noise standard deviation / clip_norm
    sampling_rate: float  # probability of each unit, independently, in each step
    clipping: Clipping = "flat"

    def __post_init__(self) -> None:
        """Raise PrivacyError if clip or noise are numbers that floats cannot compute with: neither would hold."""
        for name, value in (("clip_norm", self.clip_norm), ("noise_multiplier", self.noise_multiplier or 1.0)):
            if not 1 / _EXTREME <= value <= _EXTREME:  # nor is NaN
                raise PrivacyError(f"{name}={value:g}: expected a number between {1 / _EXTREME:g} and {_EXTREME:g}")

    @property
    def private(self) -> bool:
        """Whether any noise is added at all."""
        return self.noise_multiplier > 0

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on every coordinate, gradient units."""
        return self.noise_multiplier * self.clip_norm if self.private else 0.0

    def factors(self, norms: Any) -> Any:
        """Return by what each unit's vector is multiplied; norms and result are float64[units], of torch or numpy.

        flat: min(1, C / |g|), so that |factor * g| <= C. automatic: C / (|g| + 0.01), so that |factor * g| < C: every
        vector is brought to almost that length, and C needs no tuning (Bu et al. 2022, arXiv 2206.07136, AUTO-S).
        The non-private mechanism clips nothing.
        """
        if not self.private:
            return norms * 0.0 + 1.0
        clip = self.clip_norm * _SHORTER
        if self.clipping == "automatic":
            return clip / (norms + _GAMMA)
        return clip / norms.clip(min=clip)

    def event(self, steps: int) -> AccountingEvent:
        """Return what `steps` releases cost."""
        return AccountingEvent(self.sampling_rate, self.noise_multiplier, steps)

    def sample(self, units: int, source: Randomness) -> NDArray[np.int64]:
        """Return the indices of the units that enter one step: each of `units`, independently, with probability q.

        The result may be empty; an empty batch is a step like any other.
        """
        return np.flatnonzero(uniforms(source, units) < self.sampling_rate)

    @property
    def grid(self) -> float:
        """Spacing of the values that may be released: a power of two between `noise_std` / 2048 and / 1024.

        Public, and the same whatever the records are. 0 if no noise is added: then there is nothing to protect.
        """
        if not self.private:
            return 0.0
        _, exponent = math.frexp(self.noise_std)  # noise_std is in [2^(exponent - 1), 2^exponent)
        return math.ldexp(1.0, exponent - 1 - _GRID_BITS)

    def release(self, clipped_sum: NDArray[np.floating], source: Randomness) -> NDArray[np.float64]:
        """Return float64[d]: the sum of clipped vectors with fresh noise, as `noised`."""
        return self.noised(clipped_sum, self.noise(clipped_sum.size, source))

    def noised(self, clipped_sum: NDArray[np.floating], noise: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return float64[d]: the sum of clipped vectors, plus noise, rounded to the public grid.

        Sum and noise are floats, and which floats their sum can be depends on the sum: its last bits give it away
        (Mironov 2012; Haney et al. 2022, arXiv 2207.13793). On a grid that is the same for every sum they are gone.
        To round is post-processing, so it costs no privacy; it adds less than 10^-7 to the variance, and up to 8192
        `noise_std` a float32 holds the result exactly. docs/privacy.md says what remains.
        """
        total = np.asarray(clipped_sum, dtype=np.float64) + noise
        return np.rint(total / self.grid) * self.grid if self.private else total

    def noise(self, dimension: int, source: Randomness) -> NDArray[np.float64]:
        """Return float64[dimension] of noise for one clipped sum; it is drawn before any record is looked at."""
        if not self.private:
            return np.zeros(dimension)
        return float_safe_normals(source, dimension) * self.noise_std
