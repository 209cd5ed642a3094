"""One noisy sum that a person enters through several sites: hockey-stick and Renyi divergences of a mixture.

Each of k sites draws the person with probability q, independently, and adds at most one clip norm. So the sum moves by
j clip norms at most, j ~ Binomial(k, q), and P, the mixture of N(j, s^2), with Q = N(0, s^2) dominates what is released
(Choquette-Choo et al. 2024, "Privacy Amplification for Matrix Mechanisms", arXiv 2310.15526, Corollary 4.7). In short:
where an event has probability b under the noise alone, a shift by a vector v gives it at most Phi(Phi^-1(b) + |v|/s)
and at least Phi(Phi^-1(b) - |v|/s), and on the line half-lines attain that for all shifts at once. A longer shift only
raises the one and lowers the other: gradients that are shorter, or do not point the same way, cost less.

dp-accounting has this mixture as well (`from_mixture_gaussian_mechanism`, which the tests compare with), but looks for
every cell of the grid by bisection in Python: a minute, on the grid of a long run, for what takes a second here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

# scipy is imported where it is used: see `fedllm.privacy.accounting`.

_TAIL = 10.0  # deviations; a Gaussian has less than e^-50 beyond, and so much may be cut off
_LOG_CUT = -50.0
_MOST_VALUES = 2**24  # of functions that are integrated: a third of a second

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Mixture:
    """P and Q above. Their privacy loss log P/Q is a convex function of the sum that grows from k log(1 - q) on."""

    sampling_rate: float  # q, in (0, 1)
    noise_multiplier: float  # s, in clip norms; above 0
    sites: int  # k, at least 2

    @cached_property
    def _shifts(self) -> _Floats:
        return np.arange(self.sites + 1, dtype=np.float64)

    @cached_property
    def _log_chances(self) -> _Floats:
        q, j = self.sampling_rate, self._shifts[1:]
        ways = np.concatenate(([0.0], np.cumsum(np.log((self.sites + 1 - j) / j))))
        chances = ways + self._shifts * math.log(q) + self._shifts[::-1] * math.log1p(-q)
        whole: _Floats = chances - np.logaddexp.reduce(chances)
        return whole

    def _log_below(self, sums: _Floats) -> _Floats:
        """Return the logarithm of the probability of the noise, in Q, to be below each of `sums`."""
        from scipy.special import log_ndtr

        below: _Floats = log_ndtr(sums / self.noise_multiplier)
        return below

    @cached_property
    def _ends(self) -> tuple[float, float, float]:
        """The lowest sum that counts, and the highest under Q and under P."""
        tail = _TAIL * self.noise_multiplier
        low, high = tail, tail + self.sites
        for _ in range(30):
            middle = (low + high) / 2
            log_above = np.logaddexp.reduce(self._log_chances + self._log_below(self._shifts - middle))
            low, high = (middle, high) if log_above > _LOG_CUT else (low, middle)
        return -tail, tail, high

    @property
    def bounds(self) -> tuple[float, float, float]:
        """The privacy losses log P/Q at the lowest sum that counts, and at the highest under Q and under P."""
        low, high_q, high_p = self._losses(np.array(self._ends))
        return float(low), float(high_q), float(high_p)

    @property
    def values(self) -> float:
        """How many values, times k + 1, are computed before those of the cells of a grid: to be bounded first."""
        return (self.sites + 1) * self._table

    @property
    def _table(self) -> float:
        low, _, high = self._ends
        return 2 + 2 * self.sites * (high - low) / self.noise_multiplier**2  # between two, the loss grows by 1/2

    def _parts(self, sums: _Floats) -> tuple[_Floats, _Floats]:
        """Return the logarithm of the largest of the k + 1 parts of P/Q, [n], and all divided by it, [n, k + 1]."""
        parts = self._log_chances + self._shifts * (sums[:, None] - self._shifts / 2) / self.noise_multiplier**2
        largest = parts.max(axis=1)
        return largest, np.exp(parts - largest[:, None])

    def _losses(self, sums: _Floats) -> _Floats:
        largest, parts = self._parts(sums)
        losses: _Floats = largest + np.log(parts.sum(axis=1))
        return losses

    def _sums(self, losses: _Floats) -> _Floats:
        """Return where the loss takes each value, or the nearest end.

        By Newton's method from the right, which stays on that side of a convex function. With e as the distance, and
        u = e k / 2 s^2, each step at least squares u, for the second derivative of the loss is at most k / s^2 times
        the first. The table begins it with 1/4, so that five steps end below 1e-19.
        """
        low, _, high = self._ends
        table = np.linspace(low, high, math.ceil(self._table))
        sums = table[np.minimum(np.searchsorted(self._losses(table), losses), len(table) - 1)]
        for _ in range(5):
            largest, parts = self._parts(sums)
            whole = parts.sum(axis=1)
            slope = np.maximum(parts @ self._shifts / whole / self.noise_multiplier**2, np.finfo(float).tiny)
            with np.errstate(over="ignore"):  # where the loss is flat, and an end the nearest
                sums = np.clip(sums - (largest + np.log(whole) - losses) / slope, low, high)
        return sums

    def deltas(self, epsilons: _Floats, removed: bool) -> _Floats:
        """Return the hockey-stick divergence at ascending `epsilons`: of P from Q if `removed`, else of Q from P.

        The best event is that the loss is above epsilon, which is a half-line of sums.
        """
        sums = self._sums(epsilons if removed else -epsilons)
        sign = -1.0 if removed else 1.0
        with_her = np.logaddexp.reduce(
            self._log_chances + self._log_below(sign * (sums[:, None] - self._shifts)), axis=1
        )
        without = self._log_below(sign * sums)
        upper, lower = (with_her, without) if removed else (without, with_her)
        deltas = np.clip(np.exp(upper) - np.exp(epsilons + lower), 0.0, 1.0)
        falling: _Floats = np.maximum.accumulate(deltas[::-1])[::-1]  # but for the last digits
        return falling

    def renyi(self, orders: Sequence[float]) -> _Floats:
        """Return the larger of the two Renyi divergences at each order; infinite at orders that would take too long.

        Both are log E_Q (P/Q)^a / (order - 1), with a = order or a = 1 - order. The integral is a sum over equidistant
        points: the error falls as e^(-2 pi d / h) in their distance h, d being the width of the strip in which the
        function is analytic. The zeros of P/Q, a polynomial in e^(x/s^2), have imaginary parts of pi s^2 or more: those
        of the polynomial without Gaussian factors are real and negative, and factors e^(-c j^2) keep them so (Polya and
        Schur 1914). The function rises up to min(0, a k) and falls from max(0, a k) on, at least as a Gaussian does.
        """
        s, k = self.noise_multiplier, self.sites
        step = min(s / 4, s**2 / 4)
        most = _MOST_VALUES // (2 * len(orders) + 16 * k) // 2  # points on either side
        reached = [order for order in orders if (order * k + 12 * s) / step <= most]
        found = np.full(len(orders), np.inf)
        if not reached:
            return found
        half = math.ceil((max(reached) * k + 12 * s) / step)
        sums = step * np.arange(-half, half + 1, dtype=np.float64)
        losses = self._losses(sums)
        weights = math.log(step / s / math.sqrt(2 * math.pi)) - (sums / s) ** 2 / 2
        for i, order in enumerate(orders):
            if order in reached:
                found[i] = max(_log_sum(a * losses + weights) for a in (order, 1 - order)) / (order - 1)
        return found


def _log_sum(logarithms: _Floats) -> float:
    largest = float(logarithms.max())
    return largest + math.log(float(np.exp(logarithms - largest).sum()))
