"""How good an adapter is on records that nobody may see: bounded metrics of every unit, and a noised sum of them, read.

Every evaluation unit has one vector, of L2 norm 1 at most. Its first coordinate counts the unit; there is one more for
each metric x, which is cut to its range and centred, y = 2 x / range - 1, so that |y| <= 1:

    (a_0, a_1 y_1, ..., a_m y_m),  a_0^2 + ... + a_m^2 = 1.

The vectors are added up, and the sum is released with Gaussian noise of standard deviation s on each coordinate, by
every site for itself or by all together. Of n units, it says of the mean of a metric, as a share of its range,

    1/2 + (S_j / a_j) / (2 S_0 / a_0), whose noise has the variance (s / 2 n)^2 (1 / a_j^2 + y^2 / a_0^2),

y being the mean. So centred metrics are worth it: the count's noise, which is in all of them, adds nothing at y = 0.

**Weights.** Names are in the order of their importance, and each metric's variance at its worst, |y| = 1, counts four
times as much as that of the one after. The sum of 4^-j (1 / a_j^2 + 1 / a_0^2), j = 1..m, is least (Lagrange) where
a_j^2 is in proportion to 2^-j, and a_0^2 to the root of the sum of 4^-j. That gives the squares

    two metrics: count .427, .382, .191;  three: count .396, .345, .173, .086.

Of 1,000 units and with s = 9.45 (five Gaussian releases at epsilon 1, delta 1e-6), accuracy has a standard deviation of
at most 1.10 points, loss 1.4 % of its range, top-5 1.8 points.

**Grid.** Coordinates are whole multiples of 2^-30, so that up to 2^23 units add up without any rounding in float64, in
every order: what a unit adds to the sum is a function of that unit alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedllm.privacy.distributed_noise import DistributedMechanism

TOP = 5  # classes among which top_5 looks for the right one
_ONE = 2.0**30  # a norm of 1, in steps of the grid
_Z = 1.959963984540054  # standard deviations that 95 % of a normal lie within


@dataclass(frozen=True)
class Estimate:
    """What is known of a quantity: its estimate, and an interval that holds the truth in 95 % of releases."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """One evaluation, as it was released."""

    units: Estimate  # how many units were scored; of these very units, so without sampling
    metrics: Mapping[str, Estimate | None]  # by name; loss in nats, others 0 to 1. None: too few units to tell anything

    @property
    def table(self) -> dict[str, list[float]]:
        """Estimate, low and high end by name, of what could be told; `units` first."""
        told = {"units": self.units, **{name: each for name, each in self.metrics.items() if each is not None}}
        return {name: [each.value, each.low, each.high] for name, each in told.items()}


class Labelled(Protocol):
    """A model as the configuration describes it."""

    @property
    def labels(self) -> Sequence[str]:
        """Its labels if it classifies, else none."""


def metric_names(labels: int) -> tuple[str, ...]:
    """Return the metrics of a classifier of so many labels, or of a causal language model (0), in their order."""
    if not labels:
        return "loss", "exact_match"
    return ("accuracy", "loss", f"top_{TOP}") if labels > TOP else ("accuracy", "loss")


def layout_of(model: Labelled, vocabulary: int) -> "Layout":
    """Return how the metrics of `model` lie in a vector; `vocabulary` is the number of tokens, for a language model.

    Loss is cut at what guessing costs: the logarithm of how many there are to choose from, and for a classifier twice
    that, since it is wrong with confidence more easily.
    """
    labels = len(model.labels)
    return Layout(metric_names(labels), 2 * math.log(labels) if labels else math.log(vocabulary))


@dataclass(frozen=True)
class Layout:
    """Which metrics a vector holds, and what each of them counts."""

    names: tuple[str, ...]  # the most important first
    most_loss: float  # nats, public: where a unit's loss is cut

    @property
    def dimension(self) -> int:
        """The length of a vector: the count, and the metrics."""
        return 1 + len(self.names)

    @cached_property
    def _ranges(self) -> NDArray[np.float64]:
        """[m]: the largest value of each metric; the smallest is 0."""
        return np.array([self.most_loss if name == "loss" else 1.0 for name in self.names])

    @cached_property
    def _roots(self) -> NDArray[np.float64]:
        """[1+m]: a_0 .. a_m, whole steps of the grid; the squares add up to a little less than 1."""
        halves = 0.5 ** np.arange(1, self.dimension)
        squares = np.array([math.sqrt(float(halves @ halves)), *halves])
        return _on_grid(np.sqrt(squares / squares.sum()) * (1 - 1e-9))

    def cut(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return float64[n, m] of values within the range of their metric; NaN is the worst that it can be."""
        worst = [self.most_loss if name == "loss" else 0.0 for name in self.names]
        return np.clip(np.where(np.isnan(values), worst, values), 0.0, self._ranges)

    def vectors(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return float64[n, 1+m], a vector of norm 1 at most for each unit; `values` float64[n, m] are any floats."""
        cut = self.cut(values)
        centred = np.column_stack([np.ones(len(cut)), 2.0 * (cut / self._ranges) - 1.0])
        return _within(_on_grid(centred * self._roots), 1.0)

    def clipped_sum(
        self, values: NDArray[np.float64], distributed: DistributedMechanism | None = None
    ) -> NDArray[np.float64]:
        """Return the sum of the units' vectors, float64[1+m]: exact, whatever their order. `values`: float64[n, m].

        With `distributed` each vector is shortened by its `clip_before_rounding` and rounded to whole quanta, in which
        the sum is: `read` is told the same factor.
        """
        vectors = self.vectors(values)
        if distributed is not None:
            times = distributed.clip_before_rounding(self.dimension) / distributed.quantum
            vectors = _within(np.rint(vectors * times), distributed.scale)
        total: NDArray[np.float64] = vectors.sum(axis=0)
        return total

    def better(self, table: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> bool:
        """Whether one score's `table` is better than another's, by the most important metric; any beats none."""
        name = self.names[0]
        if name not in table or name not in other:
            return name in table
        return table[name][0] < other[name][0] if name == "loss" else table[name][0] > other[name][0]

    def spread(self, units: float, noise_std: float) -> NDArray[np.float64]:
        """Return the standard deviation of the noise in each metric's mean over so many units, at most: float64[m].

        Nats for loss, 0 to 1 for others. `noise_std` is that of every coordinate, where a unit's norm is at most 1.
        """
        a = self._roots
        worst: NDArray[np.float64] = self._ranges * (noise_std / 2 / units) * np.sqrt(a[1:] ** -2 + a[0] ** -2)
        return worst

    def read(self, total: NDArray[np.float64], noise_std: float, factor: float = 1.0) -> Score:
        """Return what a noised sum of vectors, float64[1+m], says of the population that the units were drawn from.

        `noise_std` is the noise's standard deviation on each coordinate of `total`, `factor` what every vector was
        multiplied by before it was added. A metric is None if not even the interval of the count excludes zero.
        """
        sums, noise = total / factor / self._roots, noise_std / factor / self._roots
        count, reach = float(sums[0]), _Z * float(noise[0])
        units = Estimate(max(0.0, count), max(0.0, count - reach), max(0.0, count + reach))
        found: dict[str, Estimate | None] = dict.fromkeys(self.names)
        if count > reach:
            for name, most, y_sum, y_noise in zip(self.names, self._ranges, sums[1:], noise[1:], strict=True):
                parts = _mean(float(y_sum), float(y_noise), count, float(noise[0]))
                found[name] = Estimate(*(float(most) * (1 + y) / 2 for y in parts))
        return Score(units, found)


def _on_grid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values rounded to the grid, towards zero: no vector becomes longer."""
    return np.trunc(values * _ONE) / _ONE


def _within(vectors: NDArray[np.float64], limit: float) -> NDArray[np.float64]:
    """Return vectors, float64[n, d], with zeros for one that is not shorter than `limit`, or not a number.

    This is where the sensitivity is made, so here it is measured, whatever went before.
    """
    return np.where((np.linalg.norm(vectors, axis=1) < limit)[:, None], vectors, 0.0)


def _mean(y_sum: float, y_noise: float, count: float, count_noise: float) -> tuple[float, float, float]:
    """Return the mean of values in [-1, 1], of which noised sum and noised count are known, and its 95 % interval.

    Were the population's mean y, then y_sum - y count would have mean 0 and the variance y_noise^2 + y^2 count_noise^2
    + count (1 - y^2). The interval holds those y at which it is within 1.96 deviations: between the roots of a
    quadratic (Fieller 1954 for the ratio, Wilson 1927 for the sampling). (1 - y)(1 + y) is the variance of values that
    are -1 or 1, and the largest possible of others (Bhatia and Davis 2000): for loss, and for means over several
    records, the interval is conservative. A sum beyond what so many units can have is cut first, which takes it nearer
    to every possible mean.
    """
    y_sum = min(max(y_sum, -count), count)
    y = y_sum / count
    square = count * (count + _Z**2) - (_Z * count_noise) ** 2  # > 0, as count > _Z count_noise
    middle = y_sum * count
    constant = y_sum**2 - _Z**2 * (y_noise**2 + count)
    root = math.sqrt(max(0.0, middle**2 - square * constant))
    return y, max(-1.0, min(y, (middle - root) / square)), min(1.0, max(y, (middle + root) / square))
