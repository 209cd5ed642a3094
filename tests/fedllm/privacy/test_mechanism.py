"""Coins and noise have exactly the distribution that is charged for.

Statistical tests compare with exact distributions, and their thresholds follow from ALL_FALSE_ALARMS, the chance that
a correct implementation fails any of them: it is divided among the tests, and within a test among its comparisons
(Bonferroni). Those with a seed pass or fail for ever.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from fedllm.errors import PrivacyError
from fedllm.privacy.accounting import spent
from fedllm.privacy.mechanism import Clipping, Mechanism
from fedllm.privacy.randomness import OsRandomness, Randomness, SeededRandomness

ALL_FALSE_ALARMS = 1e-9
FALSE_ALARM = ALL_FALSE_ALARMS / 25  # as many as draw from the operating system, or more
SOURCES: list[Randomness] = [OsRandomness(), SeededRandomness(0, "tests")]
by_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)


def expect_binomial(successes: int, trials: int, probability: float, comparisons: int = 1) -> None:
    """Fail where `successes` lies in the tails of the exact binomial distribution."""
    tail = FALSE_ALARM / comparisons / 2
    low, high = stats.binom.ppf(tail, trials, probability), stats.binom.isf(tail, trials, probability)
    assert low <= successes <= high, f"{successes} of {trials}, expected {low:.0f} to {high:.0f} (p={probability})"


def expect_variance(values: NDArray[np.float64], variance: float, comparisons: int = 1) -> None:
    """Fail where the mean square of centred normal values lies in the tails of its chi-square distribution."""
    tail = FALSE_ALARM / comparisons / 2
    statistic = float(np.sum(values**2) / variance)
    assert stats.chi2.ppf(tail, len(values)) <= statistic <= stats.chi2.isf(tail, len(values))


def draw_batches(mechanism: Mechanism, source: Randomness, units: int, steps: int) -> NDArray[np.bool_]:
    """Return bool[steps, units]: who was drawn."""
    drawn = np.zeros((steps, units), dtype=bool)
    for step in range(steps):
        drawn[step, mechanism.sample(units, source)] = True
    return drawn


@by_source
@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_every_unit_enters_a_step_with_the_stated_probability(source: Randomness, rate: float) -> None:
    drawn = draw_batches(Mechanism(1.0, 1.0, rate), source, 50, 2_000)
    expect_binomial(int(drawn.sum()), drawn.size, rate)
    for unit in range(50):
        expect_binomial(int(drawn[:, unit].sum()), 2_000, rate, comparisons=50)


@by_source
def test_units_are_drawn_independently_of_each_other(source: Randomness) -> None:
    rate = 0.3
    drawn = draw_batches(Mechanism(1.0, 1.0, rate), source, 40, 2_000)
    for distance in (1, 7, 20):  # pairs that share no unit, so that all joint draws are independent
        first = [unit for unit in range(40 - distance) if (unit // distance) % 2 == 0]
        both = drawn[:, first] & drawn[:, [unit + distance for unit in first]]
        expect_binomial(int(both.sum()), both.size, rate**2, comparisons=3)


@by_source
def test_steps_are_drawn_independently_of_each_other(source: Randomness) -> None:
    rate = 0.3
    drawn = draw_batches(Mechanism(1.0, 1.0, rate), source, 40, 2_000)
    both = drawn[0::2] & drawn[1::2]
    expect_binomial(int(both.sum()), both.size, rate**2)


@by_source
def test_the_size_of_a_batch_is_binomial_and_not_fixed(source: Randomness) -> None:
    units, rate, steps = 100, 0.1, 4_000
    sizes = draw_batches(Mechanism(1.0, 1.0, rate), source, units, steps).sum(axis=1)
    values = range(2, 20)
    for size in values:
        expect_binomial(int((sizes <= size).sum()), steps, float(stats.binom.cdf(size, units, rate)), len(values))


@by_source
def test_a_batch_may_be_empty_as_often_as_it_should(source: Randomness) -> None:
    mechanism, steps = Mechanism(1.0, 1.0, 0.1), 2_000
    empty = sum(len(mechanism.sample(10, source)) == 0 for _ in range(steps))
    expect_binomial(empty, steps, 0.9**10)


@by_source
def test_a_rate_of_one_draws_everyone(source: Randomness) -> None:
    assert Mechanism(1.0, 1.0, 1.0).sample(10_000, source).tolist() == list(range(10_000))


@by_source
@given(units=st.integers(0, 50), rate=st.floats(0, 1, exclude_min=True))
def test_a_batch_never_holds_a_unit_twice(source: Randomness, units: int, rate: float) -> None:
    drawn = Mechanism(1.0, 1.0, rate).sample(units, source)
    assert sorted(set(drawn.tolist())) == drawn.tolist()
    assert all(0 <= unit < units for unit in drawn)


@by_source
@pytest.mark.parametrize(("clip_norm", "noise_multiplier"), [(1.0, 1.0), (0.1, 2.5), (40.0, 0.3)])
def test_noise_is_normal_with_the_stated_deviation(
    source: Randomness, clip_norm: float, noise_multiplier: float
) -> None:
    noise = Mechanism(clip_norm, noise_multiplier, 0.5).noise(30_000, source)
    scale = noise_multiplier * clip_norm
    expect_variance(noise, scale**2)
    assert abs(noise.mean()) <= stats.norm.isf(FALSE_ALARM / 2) * scale / math.sqrt(len(noise))
    assert stats.kstest(noise, stats.norm(scale=scale).cdf).pvalue > FALSE_ALARM
    # the tails too, which Kolmogorov-Smirnov hardly sees
    for deviations in (2.0, 3.0, 4.0):
        beyond = int((np.abs(noise) > deviations * scale).sum())
        expect_binomial(beyond, len(noise), 2 * float(stats.norm.sf(deviations)), comparisons=3)


@by_source
def test_the_deviation_of_the_noise_is_right_to_half_a_percent(source: Randomness) -> None:
    expect_variance(Mechanism(0.5, 3.0, 0.5).noise(1_000_000, source), 1.5**2)


def expect_independent(x: NDArray[np.float64], y: NDArray[np.float64], comparisons: int = 1) -> None:
    """Fail where standard normal x and y are related: by correlation, by sign or by size. Each test is exact.

    By size too, because a pair that shares a radius is uncorrelated and has unrelated signs.
    """
    assert stats.pearsonr(x, y).pvalue > FALSE_ALARM / comparisons / 3
    expect_binomial(int((np.sign(x) == np.sign(y)).sum()), len(x), 0.5, 3 * comparisons)
    quartile = stats.norm.isf(0.25)
    both_large = (np.abs(x) > quartile) & (np.abs(y) > quartile)
    expect_binomial(int(both_large.sum()), len(x), 0.25, 3 * comparisons)


@by_source
def test_noise_is_independent_between_coordinates(source: Randomness) -> None:
    n = 40_000
    noise = Mechanism(2.0, 0.5, 0.5).noise(n, source)  # standard deviation 1
    # neighbours, halves and quarters: where draws made together end up side by side or blocks apart
    pairs = [(noise[:-1:2], noise[1::2]), (noise[: n // 2], noise[n // 2 :])]
    pairs += [(noise[: n // 4], noise[n // 4 : n // 2]), (noise[: n // 4], noise[3 * n // 4 :])]
    pairs += [(noise[: n // 2], noise[n // 2 :][::-1])]
    for x, y in pairs:
        expect_independent(x, y, len(pairs))


@by_source
def test_noise_is_independent_between_steps(source: Randomness) -> None:
    mechanism, n, steps = Mechanism(2.0, 0.5, 0.5), 10_000, 4
    noises = [mechanism.noise(n, source) for _ in range(steps)]
    pairs = [(a, b) for a in range(steps) for b in range(a)]
    for a, b in pairs:
        expect_independent(noises[a], noises[b], len(pairs) + 1)
        assert not np.intersect1d(noises[a], noises[b]).size
    # with any relation between them, the noise of all steps together would not be what is charged for
    expect_variance(np.sum(noises, axis=0), steps, len(pairs) + 1)


@pytest.mark.parametrize(
    "sources",
    [[OsRandomness() for _ in range(4)], [SeededRandomness(0, f"site-{site}") for site in range(4)]],
    ids=["OsRandomness", "SeededRandomness"],
)
def test_noise_is_independent_between_sites(sources: list[Randomness]) -> None:
    mechanism, n = Mechanism(2.0, 0.5, 0.5), 10_000
    noises = [mechanism.noise(n, source) for source in sources]
    pairs = [(a, b) for a in range(len(sources)) for b in range(a)]
    for a, b in pairs:
        expect_independent(noises[a], noises[b], len(pairs) + 1)
    expect_variance(np.sum(noises, axis=0), len(sources), len(pairs) + 1)


@pytest.mark.parametrize(
    "sources",
    [[OsRandomness(), OsRandomness()], [SeededRandomness(0, "a"), SeededRandomness(0, "b")]],
    ids=["OsRandomness", "SeededRandomness"],
)
def test_sites_draw_their_batches_independently_of_each_other(sources: list[Randomness]) -> None:
    rate = 0.3
    first, second = (draw_batches(Mechanism(1.0, 1.0, rate), source, 50, 1_000) for source in sources)
    expect_binomial(int((first & second).sum()), first.size, rate**2)


@by_source
def test_the_size_of_a_batch_varies_as_that_of_a_poisson_sample(source: Randomness) -> None:
    """Variance N q (1 - q); a shuffled batch has none, and sampling with replacement has more where q is large."""
    units, rate, steps = 100, 0.4, 4_000
    sizes = draw_batches(Mechanism(1.0, 1.0, rate), source, units, steps).sum(axis=1)
    mean, variance = units * rate, units * rate * (1 - rate)
    fourth = float(stats.binom(units, rate).stats(moments="k")) + 3  # of the standardised size
    standard_error = math.sqrt((fourth - 1) / steps)
    found = float(np.mean((sizes - mean) ** 2)) / variance
    assert abs(found - 1) <= 1.3 * stats.norm.isf(FALSE_ALARM / 2) * standard_error  # 1.3: not quite normal in the tail


@by_source
@given(dimension=st.integers(0, 9))
def test_noise_has_the_dimension_that_was_asked_for(source: Randomness, dimension: int) -> None:
    noise = Mechanism(1.0, 1.0, 0.5).noise(dimension, source)
    assert noise.shape == (dimension,)
    assert noise.dtype == np.float64
    assert np.isfinite(noise).all()


@given(
    clip_norm=st.floats(1e-6, 1e6),
    noise_multiplier=st.floats(1e-3, 1e3),
    rate=st.floats(0, 1, exclude_min=True),
    steps=st.integers(1, 1000),
)
def test_what_is_added_and_what_is_charged_cannot_disagree(
    clip_norm: float, noise_multiplier: float, rate: float, steps: int
) -> None:
    mechanism = Mechanism(clip_norm, noise_multiplier, rate)
    event = mechanism.event(steps)
    assert mechanism.noise_std == event.noise_multiplier * clip_norm
    assert (event.sampling_rate, event.steps) == (rate, steps)
    assert mechanism.private


@given(
    clip_norm=st.floats(1e-6, 1e6), norms=st.lists(st.floats(0, 1e30), max_size=5),
    clipping=st.sampled_from(["flat", "automatic"]),
)  # fmt: skip
def test_no_vector_is_longer_than_the_clip_norm_once_clipped(
    clip_norm: float, norms: list[float], clipping: Clipping
) -> None:
    lengths = np.asarray(norms)
    factors = Mechanism(clip_norm, 1.0, 0.5, clipping).factors(lengths)
    clipped = factors * lengths
    assert np.isfinite(factors).all()
    assert (factors > 0).all()
    assert (clipped <= clip_norm).all()
    if clipping == "flat":
        assert (factors[lengths <= clip_norm * (1 - 1e-9)] == 1.0).all()
    else:  # AUTO-S: arXiv 2206.07136, equation 4.1
        assert clipped == pytest.approx(clip_norm * lengths / (lengths + 0.01), rel=2e-9)


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, 2.0**-1037, 1e-101, 1e101, 1e308, math.inf, math.nan])
def test_numbers_that_floats_cannot_compute_with_make_no_mechanism(value: float) -> None:
    with pytest.raises(PrivacyError, match="clip_norm"):
        Mechanism(value, 1.0, 0.5)
    if value:
        with pytest.raises(PrivacyError, match="noise_multiplier"):
            Mechanism(1.0, value, 0.5)


def test_the_way_of_clipping_changes_neither_noise_nor_price() -> None:
    flat, automatic = Mechanism(0.7, 1.3, 0.2), Mechanism(0.7, 1.3, 0.2, "automatic")
    assert automatic.event(9) == flat.event(9)
    assert (automatic.noise_std, automatic.grid) == (flat.noise_std, flat.grid)


def test_without_privacy_nothing_is_clipped_in_any_way() -> None:
    for clipping in ("flat", "automatic"):
        assert Mechanism(1e-3, 0.0, 0.5, clipping).factors(np.asarray([0.0, 1.0, 1e9])).tolist() == [1.0] * 3


@by_source
def test_the_non_private_mechanism_adds_nothing_and_says_so(source: Randomness) -> None:
    mechanism = Mechanism(1.0, 0.0, 0.5)
    assert not mechanism.private
    assert mechanism.noise_std == 0.0
    assert mechanism.noise(5, source).tolist() == [0.0] * 5
    assert spent([mechanism.event(1)], 1e-5).epsilon == math.inf
