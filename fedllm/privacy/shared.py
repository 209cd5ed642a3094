"""One release by many sites: each adds a share of the noise, and only the sum of all is ever seen.

A site's sum of clipped vectors is a vector of integers, counts of a public quantum. To it the site adds a Gaussian draw
rounded to whole quanta, and sends the result modulo 2^32, masked (fedllm.secagg). What the masks leave is the sum over
the sites, with the noise of all of them.

Why that sum is as private as the continuous Gaussian mechanism, and no worse. Let s be the standard deviation of a
share, in quanta, and h the number of honest sites whose uploads are in the sum.

1. A rounded normal is the density f = N(0, s^2) * U sampled at the integers (U uniform on [-1/2, 1/2], * convolution).
2. So by Poisson's summation the characteristic function of a share at t in [-pi, pi] is F(t) + e(t), where F is that of
   f and |e| <= 2.01 exp(-pi^2 s^2 / 2): F at the other points t + 2 pi k. That of the sum of h shares is (F + e)^h.
3. F^h, up to terms of the same size, is that of the density f * ... * f sampled at the integers, which by 1. is the law
   of round(Z + V), Z from N(0, h s^2) and V a sum of h-1 uniforms, independent of everything.
4. The sum of the clipped vectors is a vector x of integers, and x + round(Z + V) = round(x + Z + V): the Gaussian
   mechanism with variance h s^2, followed by steps that look at nothing but its result.

The two laws differ by a total variation of at most (2 K + 1) h |e| + P(beyond K) for every K; with s >= 16, h <= 512,
10^9 coordinates and rounds, that is below 10^-500, and adds nothing to delta that a float could hold. Vectors are
clipped so that they are within the clip after rounding: the sensitivity is the clip norm, with no term for rounding.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import ConfigError, PrivacyError
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import Randomness

_LEAST_STD = 16.0  # quanta; see above
_REACH = 19.0  # no draw is further out, in standard deviations: sqrt(2 * 256 * ln 2) = 18.84
_COARSEST = 0.02  # share of the clip norm that rounding a unit's vector may take


def rounded_normals(source: Randomness, n: int, std: float) -> NDArray[np.int64]:
    """Return int64[n]: draws from N(0, std^2), each rounded to the nearest integer; none beyond 19 std.

    As if computed from 256-bit uniforms without any rounding error but the last (Box and Muller 1958): in float64
    first, with a bound on the error; the few that are too near to the middle between two integers for that are
    computed again with as many digits as it takes. The total variation distance to the exact law is below n 2^-180.
    """
    if not 0 < std < 2**31:
        raise PrivacyError(f"std={std:g} of a noise share must be between 0 and 2^31")
    pairs = (n + 1) // 2
    words = source.words(2 * pairs)
    radius_words, angle_words = words[:pairs], words[pairs:]
    draws, error = _quickly(radius_words, angle_words, std)
    rounded = np.rint(draws)
    unclear = (0.5 - np.abs(draws - rounded) <= error).any(axis=0) | (radius_words == 0)
    result = rounded.astype(np.int64)
    for i in np.flatnonzero(unclear):
        result[:, i] = _exactly(int(radius_words[i]), int(angle_words[i]), source, std)
    return result.reshape(-1)[:n]


def _quickly(
    radius_words: NDArray[np.uint64], angle_words: NDArray[np.uint64], std: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return float64[2, n] of draws before rounding, and by how much a pair may be off, whatever more bits say."""
    u = (radius_words.astype(np.float64) + 0.5) * 2.0**-64
    u_error = 2.0**-53 + 0.5 / (radius_words.astype(np.float64) + 0.5)  # relative
    radius = np.sqrt(-2.0 * np.log(np.minimum(u, 1.0 - 2.0**-53)))
    angle = (angle_words.astype(np.float64) + 0.5) * (2.0 * np.pi * 2.0**-64)
    # of log, sqrt, cos and sin each 4 units in the last place at most; four times what adds up
    error = 4.0 * std * (radius * 2.0**-48 + u_error / radius)
    draws = np.stack([radius * np.cos(angle), radius * np.sin(angle)]) * std
    return draws, error


def _exactly(radius_word: int, angle_word: int, source: Randomness, std: float) -> tuple[int, int]:
    """Return both draws of a pair from its two words and 192 more bits for each."""
    import mpmath

    more = [int(word) for word in source.words(6)]
    with mpmath.workprec(320):
        u, v = (
            (mpmath.mpf((first << 192) + (a << 128) + (b << 64) + c) + 0.5) / mpmath.mpf(2) ** 256
            for first, (a, b, c) in ((radius_word, more[:3]), (angle_word, more[3:]))
        )
        radius, angle = mpmath.sqrt(-2 * mpmath.log(u)) * mpmath.mpf(std), 2 * mpmath.pi * v
        return int(mpmath.nint(radius * mpmath.cos(angle))), int(mpmath.nint(radius * mpmath.sin(angle)))


@dataclass(frozen=True)
class SharedMechanism:
    """A `Mechanism` whose noise comes in shares, from as few as `honest` sites out of `sites`."""

    mechanism: Mechanism  # what the sum of the `honest` shares amounts to
    sites: int  # that may take part
    honest: int  # the smallest number of sites that follow the protocol and whose shares are in a sum that is unmasked
    expected_units: float  # at one site, in one round; public

    def __post_init__(self) -> None:
        """Raise PrivacyError where 32 bits do not hold the sum finely enough."""
        if not 1 <= self.honest <= self.sites:
            raise PrivacyError(f"honest={self.honest} sites must be between 1 and all {self.sites}")
        if self.share_std < _LEAST_STD or self._room < self.scale:
            raise ConfigError(
                f"{self.sites} sites of {self.expected_units:g} expected units leave no room in 32 bits for noise "
                f"shares (standard deviation {self.share_std:.3g} steps, at least {_LEAST_STD:g} needed) and for one "
                f"clip norm ({self.scale} steps). Use fewer sites, a lower privacy.sampling_rate, or another epsilon."
            )

    @property
    def scale(self) -> int:
        """Quanta in one clip norm: the largest power of two for which no sum of all sites can pass 2^31.

        A site's sum has room for `expected_units` vectors that all point along one coordinate.
        """
        noise = _REACH * self.mechanism.noise_multiplier / math.sqrt(self.honest)
        return 1 << max(0, int(math.log2(max(1.0, self._reach / (max(1.0, self.expected_units) + noise + 1)))))

    @property
    def quantum(self) -> float:
        """The step of the integers, gradient units."""
        return self.mechanism.clip_norm / self.scale

    @property
    def share_std(self) -> float:
        """Standard deviation of one site's noise, quanta."""
        return self.mechanism.noise_multiplier * self.scale / math.sqrt(self.honest)

    @property
    def _room(self) -> int:
        """The largest magnitude of a site's sum before its noise."""
        return self._reach - math.ceil(_REACH * self.share_std) - 1

    @property
    def _reach(self) -> int:
        """The largest magnitude of one site's upload: `sites` of them stay below 2^31."""
        return (2**31 - 1) // self.sites

    def clip_before_rounding(self, dimension: int) -> float:
        """Return the L2 norm, in gradient units, that a unit's vector may have so that rounded it is in the clip.

        To round moves a vector by at most sqrt(d) / 2 quanta. Raises ConfigError where that is too much of the clip.
        """
        lost = math.sqrt(dimension) / 2 / self.scale
        if lost > _COARSEST:
            raise ConfigError(
                f"an adapter of {dimension} values is too large for {self.sites} sites of {self.expected_units:g} "
                "expected units: 32 bits would round its gradients too coarsely. Use a smaller adapter (adapter.rank, "
                "adapter.train=B), fewer sites or a lower privacy.sampling_rate."
            )
        return self.mechanism.clip_norm * (1 - lost) * (1 - 1e-9)  # the norm itself was computed in floats

    def upload(self, clipped_sum: NDArray[np.float64], source: Randomness) -> NDArray[np.uint32]:
        """Return uint32[d]: a site's sum of clipped, rounded vectors, float64[d] of whole quanta, with its noise share.

        The sum is cut to its room first, coordinate by coordinate, which moves two sums no further apart.
        """
        if not np.array_equal(clipped_sum, np.rint(clipped_sum)):
            raise PrivacyError("the clipped sum is not in whole quanta, so its sensitivity is not known")
        noised = np.clip(clipped_sum, -self._room, self._room).astype(np.int64)
        noised += rounded_normals(source, clipped_sum.size, self.share_std)
        return (noised % 2**32).astype(np.uint32)

    def decode(self, total: NDArray[np.uint32]) -> NDArray[np.float64]:
        """Return the sum over the sites in gradient units, float64[d], from uint32[d] modulo 2^32."""
        return total.view(np.int32).astype(np.float64) * self.quantum

    def noise_multiplier(self, honest: int) -> float:
        """Return the noise multiplier of a sum that holds the shares of `honest` sites."""
        return self.mechanism.noise_multiplier * math.sqrt(honest / self.honest)
