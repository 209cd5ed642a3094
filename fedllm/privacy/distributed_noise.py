"""One release by many sites: each adds a share of the noise, and only the sum of all is ever seen.

A site's sum of clipped vectors is a vector of integers, counts of a public quantum. To it the site adds a Gaussian draw
rounded to whole quanta, and sends the result modulo 2^32, masked (fedllm.secagg). What the masks leave is the sum over
the sites, with the noise of all of them.

Why that sum is as private as the continuous Gaussian mechanism, and no worse. Let the honest sites' uploads hold m
draws, s the smallest standard deviation of one, in quanta, and S^2 the sum of their variances.

1. A rounded normal is the density f = N(0, s^2) * U sampled at the integers (U uniform on [-1/2, 1/2], * convolution).
2. So by Poisson's summation the characteristic function of a draw at t in [-pi, pi] is F(t) + e(t), where F is that of
   f and |e| <= 2.01 exp(-pi^2 s^2 / 2): F at the other points t + 2 pi k. That of the sum is the product of F + e.
3. The product of F, up to terms of the same size, is that of the density f * ... * f sampled at the integers, which by
   1. is the law of round(Z + V), Z from N(0, S^2) and V a sum of m-1 uniforms, independent of everything.
4. The sum of the clipped vectors is a vector x of integers, and x + round(Z + V) = round(x + Z + V): the Gaussian
   mechanism with variance S^2, followed by steps that look at nothing but its result.

The two laws differ by a total variation of at most (2 K + 1) m |e| + P(beyond K) for every K; with s >= 16, m <= 8192,
10^9 coordinates and rounds, that is below 10^-500, and adds nothing to delta that a float could hold. Vectors are
clipped so that they are within the clip after rounding: the sensitivity is the clip norm, with no term for rounding.

**Excess noise.** N sites may take part, t are promised to be in every sum, c of them may collude. Were every share
sized for t, the sum of all N would carry more noise than was asked for. So a share comes in parts, and once it is
settled that u >= t sites are in the sum, each reveals the seeds of parts that are not needed, which the server removes
again (after Jiang, Wang and Chen, "Dordis", EuroSys 2024, XNoise). In units of the mechanism's variance over (N - c)(t
- c), a share has N - c, of which t - c have no seed; with u survivors each reveals at most u - t of the others. (Where
N - t is above 15, parts come in steps: up to a fifteenth of N - t may stay without need, unless all sites are there.)

Why enough stays, also against a server that tells sites different things. A site reveals seeds once a round,
with the shares it reveals for the one list that it answers; whatever that says, t - c units stay. Let S be the honest
sites whose sum is read. A list with dropouts is answered only if t sites have signed it, and there is one at most.

- Without one, no mask key was given away, so S holds all honest sites of every list that one of S answered: no list has
  more than u = min(N, |S| + c) survivors, and S keeps |S| (N - c - (u - t)) units at least. If |S| + c <= N that is
  (u - c) (N - c - (u - t)), concave in u and (N - c) (t - c) at both ends, t and N; else it is |S| (t - c), still more.
- With one, of u survivors, S is all honest ones of them. The t - c or more that signed it keep N - c - (u - t) units or
  more each, the other u - t of the u - c or more at least t - c: (t - c) (N - c) together. S cannot be others: a site
  that is no survivor of the list has its seed from t - c other honest sites only; and survivors none of whom signed it
  were told to mask with none of the t - c who did, so with fewer than t, which they refuse.

That is the mechanism's variance. What a site reveals is independent of all that stays. Parts that have a seed are as
good as AES-256, as the masks are.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import ConfigError, PrivacyError
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import KeyedRandomness, Randomness

_LEAST_STD = 16.0  # quanta; see above
_REACH = 19.0  # no draw is further out, in standard deviations: sqrt(2 * 256 * ln 2) = 18.84
_BLOCK = 8192  # pairs of draws at a time: their arrays stay in the processor's cache
_COSINE = [(-1) ** k / math.factorial(2 * k) for k in range(9)]  # of the square of an angle
_SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(8)]
_SIGNS = np.array([[1.0, -1.0, -1.0, 1.0], [1.0, 1.0, -1.0, -1.0]])  # of cosine and sine, by quarter of the turn
_STEPS = 15  # 1 + 2 + 4 + 8: in so many the excess noise is divided
_COARSEST = 0.02  # fraction of the clip norm that rounding a unit's vector may take


def rounded_normals(source: Randomness, n: int, std: float) -> NDArray[np.int64]:
    """Return int64[n]: draws from N(0, std^2), each rounded to the nearest integer; none beyond 19 std.

    As if computed from 256-bit uniforms without any rounding error but the last (Box and Muller 1958): in float64
    first, with a bound on the error; the few that are too near to the middle between two integers for that are
    computed again with as many digits as it takes. The total variation distance to the exact law is below n 2^-180.
    """
    result = np.empty(n, np.int64)
    for place, draws in _rounded_normals_by_block(source, n, std):
        result[place] = draws
    return result


def _rounded_normals_by_block(
    source: Randomness, n: int, std: float, further: Callable[[int], Randomness] | None = None
) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Yield n draws, a few thousand at a time, with their places: what they take stays in the cache.

    A pair that is computed again has its further digits from `further`, given its number, or else from `source`. Which
    pairs these are depends on the processor: NumPy's logarithm has other last digits on another one.
    """
    if not 0 < std < 2**31:
        raise PrivacyError(f"std={std:g} of a noise share must be between 0 and 2^31")
    for first in range(0, n, 2 * _BLOCK):
        many = min(2 * _BLOCK, n - first)
        pairs = (many + 1) // 2
        radius_words, angle_words = source.words(2 * pairs).reshape(2, pairs)
        draws, error = _quickly(radius_words, angle_words, std)
        rounded = np.rint(draws)
        draws -= rounded
        apart = np.abs(draws, out=draws)
        unclear = (np.maximum(*apart) + error >= 0.5) | (radius_words == 0)
        for i in np.flatnonzero(unclear):
            digits = source if further is None else further(first // 2 + int(i))
            rounded[:, i] = _exactly(int(radius_words[i]), int(angle_words[i]), digits, std)
        yield slice(first, first + many), rounded.reshape(-1)[:many].astype(np.int64)


def _quickly(
    radius_words: NDArray[np.uint64], angle_words: NDArray[np.uint64], std: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return float64[2, n] of draws before rounding, and by how much a pair may be off, whatever more bits say."""
    u = radius_words.astype(np.float64)
    u += 0.5
    u_error = 0.5 / u  # relative
    u_error += 2.0**-53
    u *= 2.0**-64
    radius = np.log(np.minimum(u, 1.0 - 2.0**-53, out=u), out=u)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    # of log, sqrt, cosine and sine each 4 units in the last place at most; four times what adds up
    error = (4.0 * std) * (radius * 2.0**-48 + u_error / radius)
    draws = _cosine_and_sine(angle_words)
    radius *= std
    draws *= radius
    return draws, error


def _cosine_and_sine(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return float64[2, n]: cosine and sine of the angle (word + 1/2) / 2^64 of a turn, within 2^-51.

    Of what is beyond the nearest quarter turn, at most an eighth, by Taylor's series: its first term left out is below
    5e-17. NumPy's own functions take four times as long, most of it for angles of any size.
    """
    moved = words + np.uint64(1 << 61)
    quarter = (moved >> np.uint64(62)).view(np.int64)
    x = ((moved << np.uint64(2)) ^ np.uint64(1 << 63)).view(np.int64).astype(np.float64)
    x += 2.0
    x *= math.pi / 2 * 2.0**-64
    square = x * x
    found = np.empty((2, len(words)))
    cosine, sine = found
    _series(square, _COSINE, cosine)
    _series(square, _SINE, sine)
    sine *= x
    odd = (quarter & 1).astype(np.bool_)
    cosine[odd], sine[odd] = sine[odd], cosine[odd]
    cosine *= _SIGNS[0][quarter]
    sine *= _SIGNS[1][quarter]
    return found


def _series(x: NDArray[np.float64], coefficients: Sequence[float], out: NDArray[np.float64]) -> None:
    """Write the value of a polynomial at every x, float64[n], to `out` (Horner)."""
    np.multiply(x, coefficients[-1], out=out)
    for coefficient in coefficients[-2:0:-1]:
        out += coefficient
        out *= x
    out += coefficients[0]


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


def _surplus_by_block(seed: str, n: int, std: float) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Yield the part of a share that a seed of 256 bits stands for: the same on every machine, to be taken off."""
    return _rounded_normals_by_block(_keyed(seed), n, std, lambda pair: _keyed(seed, b" pair %d" % pair))


def _keyed(seed: str, place: bytes = b"") -> KeyedRandomness:
    """Return the words that a seed stands for."""
    return KeyedRandomness(bytes.fromhex(seed), b"fedllm surplus noise v2" + place)


@dataclass(frozen=True)
class Share:
    """A site's share of the noise."""

    noise: NDArray[np.int64]  # [d], quanta
    seeds: tuple[str, ...]  # secret, 64 hexadecimal digits each: of the parts that may turn out as excess noise


@dataclass(frozen=True)
class DistributedMechanism:
    """A `Mechanism` whose noise comes in shares of `sites`, of which `quorum` are in every sum that can be read."""

    mechanism: Mechanism  # what the shares of quorum - colluding sites amount to
    sites: int  # N: that may take part
    quorum: int  # t
    colluding: int  # c: sites that may tell the server their shares
    expected_units: float  # at one site, in one round; public

    def __post_init__(self) -> None:
        """Raise PrivacyError if 32 bits do not hold the sum finely enough."""
        if not 0 <= self.colluding < self.quorum <= self.sites:
            raise PrivacyError(
                f"noise in shares: expected 0 <= colluding < quorum <= sites, found colluding={self.colluding}, "
                f"quorum={self.quorum}, sites={self.sites}"
            )
        if not (math.isfinite(self.expected_units) and self.expected_units > 0):
            raise PrivacyError(f"noise in shares: {self.expected_units:g} expected units, expected a positive number")
        least = self._std(min(self._parts))
        if least < _LEAST_STD or self._room < self.scale:
            raise ConfigError(
                f"{self.sites} sites of {self.expected_units:g} expected units leave no room in 32 bits for noise "
                f"shares (standard deviation {least:.3g} steps, at least {_LEAST_STD:g} needed) and for one "
                f"clip norm ({self.scale} steps). Use fewer sites, a lower privacy.sampling_rate, or another epsilon."
            )

    @cached_property
    def _parts(self) -> tuple[int, ...]:
        """Units of variance in the parts of a share: what always stays, then at most four parts that have a seed.

        The latter are 1, 2, 4 and 8 steps of a fifteenth of all, the last as large as is left. No part is larger than
        a step and all smaller parts together, so the largest that fit come to any number, but for less than a step. To
        draw noise again is most of the server's work, and grows with the number of parts.
        """
        left = self.sites - self.quorum
        size, parts = max(1, -(-left // _STEPS)), list[int]()
        while left:
            parts.append(min(size, left))
            left -= parts[-1]
            size *= 2
        return (self.quorum - self.colluding, *sorted(parts, reverse=True))

    def _std(self, units: int) -> float:
        """Return the standard deviation of so many units, quanta."""
        whole = (self.sites - self.colluding) * (self.quorum - self.colluding)
        return self.mechanism.noise_multiplier * self.scale * math.sqrt(units / whole)

    @cached_property
    def scale(self) -> int:
        """Quanta in one clip norm: the largest power of two for which no sum of all sites can pass 2^31.

        A site's sum has room for `expected_units` vectors that all point along one coordinate.
        """
        whole = (self.sites - self.colluding) * (self.quorum - self.colluding)
        noise = _REACH * self.mechanism.noise_multiplier * sum(math.sqrt(units / whole) for units in self._parts)
        return 1 << max(0, int(math.log2(max(1.0, self._reach / (max(1.0, self.expected_units) + noise + 1)))))

    @property
    def quantum(self) -> float:
        """The step of the integers, gradient units."""
        return self.mechanism.clip_norm / self.scale

    @property
    def _room(self) -> int:
        """The largest magnitude of a site's sum before its noise."""
        return self._reach - math.ceil(_REACH * sum(map(self._std, self._parts))) - 1

    @property
    def _reach(self) -> int:
        """The largest magnitude of one site's upload: `sites` of them stay below 2^31."""
        return (2**31 - 1) // self.sites

    def clip_before_rounding(self, dimension: int) -> float:
        """Return the L2 norm, in gradient units, that a unit's vector may have so that rounded it is in the clip.

        To round moves a vector by at most sqrt(d) / 2 quanta. Raises ConfigError if that is too much of the clip.
        """
        lost = math.sqrt(dimension) / 2 / self.scale
        if lost > _COARSEST:
            raise ConfigError(
                f"an adapter of {dimension} values is too large for {self.sites} sites of {self.expected_units:g} "
                "expected units: 32 bits would round its gradients too coarsely. Use a smaller adapter (adapter.rank, "
                "adapter.train=B), fewer sites or a lower privacy.sampling_rate."
            )
        return self.mechanism.clip_norm * (1 - lost) * (1 - 1e-9)  # the norm itself was computed in floats

    def share(self, dimension: int, source: Randomness) -> Share:
        """Draw a site's share of the noise, which is done before any record is looked at."""
        noise = rounded_normals(source, dimension, self._std(self._parts[0]))
        seeds = tuple(source.words(4).tobytes().hex() for _ in self._parts[1:])
        for seed, units in zip(seeds, self._parts[1:], strict=True):
            for place, draws in _surplus_by_block(seed, dimension, self._std(units)):
                noise[place] += draws
        return Share(noise, seeds)

    def noised(self, clipped_sum: NDArray[np.float64], share: Share) -> NDArray[np.uint32]:
        """Return uint32[d], a site's sum of clipped, rounded vectors with its share of the noise, modulo 2^32.

        `clipped_sum` is float64[d] of whole quanta. It is cut to its room first, coordinate by coordinate, which moves
        two sums no further apart.
        """
        noised = np.empty(len(clipped_sum), np.uint32)
        for first in range(0, len(clipped_sum), 2 * _BLOCK):  # else there are four copies of it, of 64 bits
            place = slice(first, first + 2 * _BLOCK)
            part = clipped_sum[place]
            if not np.isfinite(part).all() or not np.array_equal(part, np.rint(part)):
                raise PrivacyError("the clipped sum is not in whole quanta, so its sensitivity is not known")
            cut = np.clip(part, -self._room, self._room).astype(np.int64)
            noised[place] = (cut + share.noise[place]) % 2**32
        return noised

    def upload(
        self, clipped_sum: NDArray[np.float64], source: Randomness
    ) -> tuple[NDArray[np.uint32], tuple[str, ...]]:
        """Return what `noised` does with a fresh share, and the share's secret seeds."""
        share = self.share(clipped_sum.size, source)
        return self.noised(clipped_sum, share), share.seeds

    def revealed_seeds(self, survivors: int) -> tuple[int, ...]:
        """Return which of a share's seeds are not needed if so many sites are in a sum; raises PrivacyError.

        Their parts have survivors - quorum units, or less than a step fewer: see `_parts`.
        """
        left = survivors - self.quorum
        if not 0 <= left <= self.sites - self.quorum:
            raise PrivacyError(f"{survivors} survivors, expected {self.quorum} to {self.sites}")
        chosen = []
        for index, units in enumerate(self._parts[1:]):
            if units <= left:
                chosen.append(index)
                left -= units
        return tuple(chosen)

    def surplus(self, seeds: Sequence[str], survivors: int, dimension: int) -> NDArray[np.uint32]:
        """Return uint32[d], modulo 2^32: the excess noise of a site, drawn again from the seeds that it revealed."""
        total = np.zeros(dimension, np.uint32)
        self.take_off(total, seeds, survivors, threading.Lock())
        return np.negative(total, out=total)

    def take_off(self, total: NDArray[np.uint32], seeds: Sequence[str], survivors: int, turn: "threading.Lock") -> None:
        """Subtract a site's `surplus` from uint32[d], in place; several threads may, who take `turn` for each block."""
        for seed, index in zip(seeds, self.revealed_seeds(survivors), strict=True):
            std = self._std(self._parts[1 + index])
            for place, draws in _surplus_by_block(seed, len(total), std):
                words = (draws % 2**32).astype(np.uint32)
                with turn:
                    total[place] -= words

    def decode(self, total: NDArray[np.uint32]) -> NDArray[np.float64]:
        """Return the sum over the sites in gradient units, float64[d], from uint32[d] modulo 2^32."""
        decoded = total.view(np.int32).astype(np.float64)
        decoded *= self.quantum
        return decoded

    @property
    def most(self) -> float:
        """The largest magnitude of a coordinate of a site's sum before its noise, gradient units."""
        return self._room * self.quantum

    def rounding_std(self, survivors: int) -> float:
        """Return what rounding their draws to whole quanta adds to each coordinate's noise, at most; gradient units."""
        return self.quantum * math.sqrt(survivors * len(self._parts) / 12)

    def noise_std(self, survivors: int, trimmed: int) -> float:
        """Return the deviation of the noise in each coordinate of a sum, rounding included, gradient units."""
        noise = self.mechanism.clip_norm * self.noise_multiplier(survivors, trimmed, known=0)
        return math.hypot(noise, self.rounding_std(survivors))

    def noise_multiplier(self, survivors: int, trimmed: int, known: int) -> float:
        """Return the noise multiplier of a sum for those who know the noise of `known` of its sites.

        Of the `survivors` in it, excess noise was removed of `trimmed`; known are those with the most noise. The
        server may have seeds that came too late to be used: against it, count all as trimmed.
        """
        full = self.sites - self.colluding
        gone = sum(self._parts[1 + index] for index in self.revealed_seeds(survivors)) if trimmed else 0
        kept = sorted([full - gone] * trimmed + [full] * (survivors - trimmed))
        units = sum(kept[: max(0, survivors - known)])
        return self.mechanism.noise_multiplier * math.sqrt(units / (full * (self.quorum - self.colluding)))
