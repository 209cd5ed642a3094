"""The one-run audit proves what the paper says it proves, and never more than the truth."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedllm.errors import ConfigError
from fedllm.privacy.one_run import CONFIDENCE, epsilon_lower_bound, p_value

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[2] / "vectors" / "one_run_audit.json").read_text("utf-8"))
audits = st.integers(1, 400).flatmap(
    lambda m: st.integers(0, m).flatmap(lambda r: st.tuples(st.just(m), st.just(r), st.integers(0, r)))
)
log_deltas = st.sampled_from([1e-12, 1e-6, 1e-4, 1e-2, 0.5])


def slow_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 term by term, as it is written."""
    share = 1 / (1 + math.exp(-epsilon))
    slope = 0.0
    for i in range(1, v + 1):
        slope = max(slope, float(stats.binom.cdf(v - 1, r, share) - stats.binom.cdf(v - i - 1, r, share)) / i)
    return min(1.0, float(stats.binom.sf(v - 1, r, share)) + 2 * m * delta * slope)


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda v: f"{v['v']}-of-{v['r']}-of-{v['m']}")
def test_the_bound_is_what_the_vector_says(vector: dict[str, Any]) -> None:
    bound = epsilon_lower_bound(vector["m"], vector["r"], vector["v"], vector["delta"])
    assert bound == pytest.approx(vector["eps_lower"], abs=VECTORS["tolerance"])


@given(audits, st.floats(0, 8), log_deltas)
def test_the_p_value_is_that_of_the_theorem(audit: tuple[int, int, int], epsilon: float, delta: float) -> None:
    assert p_value(*audit, epsilon, delta) == pytest.approx(slow_p_value(*audit, epsilon, delta), rel=1e-9, abs=1e-12)


@given(audits, st.floats(0, 8), st.floats(0, 2), log_deltas)
def test_what_is_refuted_stays_refuted_for_every_smaller_epsilon(
    audit: tuple[int, int, int], epsilon: float, less: float, delta: float
) -> None:
    if p_value(*audit, epsilon, delta) < 1 - CONFIDENCE:
        assert p_value(*audit, max(0.0, epsilon - less), delta) < 1 - CONFIDENCE


@given(audits, log_deltas)
def test_better_guesses_prove_more_and_a_larger_delta_less(audit: tuple[int, int, int], delta: float) -> None:
    m, r, v = audit
    bound = epsilon_lower_bound(m, r, v, delta)
    assert bound >= 0
    assert epsilon_lower_bound(m, r, max(0, v - 1), delta) <= bound <= epsilon_lower_bound(m, r, r, delta)
    assert epsilon_lower_bound(m, r, v, min(0.9, 2 * delta)) <= bound


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("guesses", [1, 10, 200])
def test_the_bound_exceeds_the_true_epsilon_with_no_more_than_the_stated_chance(epsilon: float, guesses: int) -> None:
    """Exactly, over everything that can happen, where canaries are protected by randomised response."""
    truth = 1 / (1 + math.exp(-epsilon))
    wrong = sum(
        float(stats.binom.pmf(v, guesses, truth))
        for v in range(guesses + 1)
        if epsilon_lower_bound(guesses, guesses, v, 1e-12) > epsilon
    )
    assert wrong <= 1 - CONFIDENCE


def test_guessing_proves_nothing() -> None:
    """The null control: half of the guesses right."""
    assert epsilon_lower_bound(10_000, 10_000, 5_000, 1e-5) == 0.0
    assert epsilon_lower_bound(10_000, 0, 0, 1e-5) == 0.0
    assert epsilon_lower_bound(10_000, 100, 0, 1e-5) == 0.0


def test_even_a_perfect_attack_has_a_ceiling() -> None:
    for m in (10, 1_000, 100_000):
        ceiling = epsilon_lower_bound(m, m, m, 1e-9)
        assert ceiling <= math.log(m / -math.log(0.05))  # where share^m is 0.05
    assert epsilon_lower_bound(10, 10, 10, 1e-9) < epsilon_lower_bound(1_000, 1_000, 1_000, 1e-9)


def test_a_perfect_attack_proves_three_and_a_half_with_a_hundred_guesses_and_six_with_a_thousand() -> None:
    for guesses, ceiling in ((100, 3.5), (1_000, 5.8)):
        assert epsilon_lower_bound(1_000, guesses, guesses, 1e-6) == pytest.approx(ceiling, abs=0.05)


def test_more_confidence_proves_less() -> None:
    bounds = [epsilon_lower_bound(200, 100, 90, 1e-5, confidence) for confidence in (0.9, 0.95, 0.975, 0.999)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[1] == epsilon_lower_bound(200, 100, 90, 1e-5)
    assert p_value(200, 100, 90, bounds[2] + 1e-5, 1e-5) >= 0.025 > p_value(200, 100, 90, bounds[2], 1e-5)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, math.nan])
def test_a_confidence_that_is_none_is_refused(confidence: float) -> None:
    with pytest.raises(ConfigError, match="confidence="):
        epsilon_lower_bound(10, 5, 5, 1e-5, confidence)


def test_a_large_audit_takes_no_longer_than_its_square_root() -> None:
    m = 10**8
    bound = epsilon_lower_bound(m, m, int(0.7310585786 * m), 1e-12)  # the share at epsilon 1
    assert 0.99 < bound < 1.0
    assert epsilon_lower_bound(m, m, m, 1e-12) > 15


@pytest.mark.parametrize(
    ("audit", "names"),
    [
        ((0, 0, 0, 1e-5), "canaries"),
        ((10**9, 1, 1, 1e-5), "canaries"),
        ((10, 11, 5, 1e-5), "guesses"),
        ((10, -1, 0, 1e-5), "guesses"),
        ((10, 5, 6, 1e-5), "right"),
        ((10, 5, -1, 1e-5), "right"),
        ((10, 5, 5, 0.0), "delta"),
        ((10, 5, 5, 1.0), "delta"),
        ((10, 5, 5, np.nan), "delta"),
    ],
)
def test_an_audit_that_cannot_be_is_refused(audit: tuple[int, int, int, float], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        epsilon_lower_bound(*audit)
