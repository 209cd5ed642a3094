"""Attack: a plan of so many steps, at so small a delta, that the last digits of float64 make epsilon too small.

Stopped by taking what float64 may be in error by off delta first, and by RDP alone where that is more than half of it.
"""

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import log_ndtr

from fedllm.errors import BudgetExceeded
from fedllm.privacy import accounting
from fedllm.privacy.accounting import AccountingEvent, calibrate, counted, deltas, overrun, spent
from fedllm.privacy.ledger import PrivacyLedger
from tests.attacks.ledgers import BUDGET, Branch

SPARED = AccountingEvent(1.0, 4 * math.sqrt(300_000), 300_000)  # at delta 1e-12: 1.6693, by a PLD in float64 1.5615


def exact_delta(epsilon: float, event: AccountingEvent) -> float:
    """Return the delta of steps that use everybody's records, a single Gaussian (Balle and Wang 2018, Theorem 8)."""
    assert event.sampling_rate == 1
    sigma = event.noise_multiplier / math.sqrt(event.steps)
    upper, lower = (float(log_ndtr(sign / (2 * sigma) - epsilon * sigma)) for sign in (1, -1))
    return math.exp(upper) * -math.expm1(min(epsilon + lower - upper, 0.0))


def exact_epsilon(event: AccountingEvent, delta: float) -> float:
    def excess(epsilon: float) -> float:
        return math.log(max(exact_delta(epsilon, event), 1e-300)) - math.log(delta)

    return float(brentq(excess, 1e-9, 100.0, xtol=1e-12))


@pytest.mark.parametrize("delta", [1e-8, 1e-10, 1e-12])
@pytest.mark.parametrize("steps", [1_000, 100_000, 300_000])
@pytest.mark.parametrize("ratio", [4.0, pytest.param(1.0, marks=pytest.mark.soak)])
def test_no_epsilon_is_below_that_of_the_closed_form(steps: int, delta: float, ratio: float) -> None:
    event = AccountingEvent(1.0, ratio * math.sqrt(steps), steps)
    cost, true = spent([event], delta), exact_epsilon(event, delta)
    assert true <= cost.epsilon <= cost.epsilon_rdp
    assert cost.epsilon <= 1.1 * true
    assert counted([event], delta, true, one_plan=True) == cost.epsilon
    assert overrun([event], delta, true * (1 - 1e-9), one_plan=True) == cost.epsilon


@pytest.mark.parametrize("looked_for", [1, pytest.param(300, marks=pytest.mark.soak)])
def test_who_looks_for_noise_whose_errors_have_one_sign_finds_none_that_is_too_cheap(looked_for: int) -> None:
    coins = random.Random(looked_for)
    for _ in range(looked_for):
        event = AccountingEvent(1.0, coins.uniform(1_500, 3_000), 300_000)
        for delta in (2e-10, 1e-9, 1e-8):
            assert spent([event], delta).epsilon >= exact_epsilon(event, delta)


@pytest.mark.parametrize(("rate", "noise", "steps"), [
    (0.003, 1.0, 300_000), (0.01, 5.0, 100_000), pytest.param(0.001, 0.8, 1_000_000, marks=pytest.mark.soak),
])  # fmt: skip
def test_the_error_is_within_what_is_allowed_for_where_delta_has_to_be_nothing(
    rate: float, noise: float, steps: int
) -> None:
    """Far beyond what the steps can lose (by RDP), whatever a PLD says of delta is its error."""
    events = (AccountingEvent(rate, noise, steps),)
    grid = accounting.grid_of(events, 1e-10)
    nothing = spent(events, 1e-18).epsilon_rdp
    points = np.linspace(nothing, 1.5 * nothing, 200)
    composed = accounting._composed(events, grid)
    errors = np.asarray(composed.get_delta_for_epsilon(points.tolist()))
    assert np.abs(errors).max() < accounting._rounding(events) / 2
    assert min(deltas(events, points.tolist(), grid)) > 0


def test_a_site_refuses_the_plan_that_its_budget_does_not_pay_for(branch: Branch) -> None:
    assert exact_epsilon(SPARED, 1e-12) == pytest.approx(1.66931, abs=1e-5)
    assert overrun([SPARED], 1e-12, 1.6, one_plan=True) is not None
    branch.set(f"epsilon: {BUDGET!r}", "epsilon: 1.6")
    office = branch.office
    ledger = PrivacyLedger(office.ledger, office.policy.epsilon, 1e-12, office.identity)
    with pytest.raises(BudgetExceeded):
        ledger.reserve("many steps", 1, "request", SPARED)
    assert ledger.events() == []


def test_calibrated_noise_meets_the_target_in_truth() -> None:
    for delta in (1e-12, 1e-10):
        noise = calibrate(1.6, delta, 1.0, 300_000)
        assert exact_epsilon(AccountingEvent(1.0, noise, 300_000), delta) <= 1.6


def test_what_an_attacker_gains_is_not_below_the_truth() -> None:
    cost = spent([SPARED], 1e-12)
    assert cost.by_rdp_alone
    points = [0.0, 0.5, 1.0, 1.5, 1.6, 1.7, 2.0]
    found = deltas([SPARED], points, cost.grid)
    assert all(delta >= exact_delta(epsilon, SPARED) for epsilon, delta in zip(points, found, strict=True))
    assert found[0] < 1.001 * exact_delta(0.0, SPARED), "an attacker's advantage"


@pytest.mark.parametrize("of", [lambda e: e.epsilon, lambda e: e.epsilon_rdp], ids=["epsilon", "rdp"])
def test_a_smaller_delta_never_costs_less_across_the_border_to_rdp(of: Callable[..., float]) -> None:
    """Nor do more steps: the border depends on both."""
    costs = [of(spent([SPARED], delta)) for delta in (1e-8, 2.7e-10, 2.6e-10, 1e-10)]
    assert costs == sorted(costs)
    steps = [of(spent([AccountingEvent(1.0, 2191.0, n)], 1e-10)) for n in (112_000, 114_000, 300_000)]
    assert steps == sorted(steps)


def test_figures_at_the_usual_delta_are_what_they_were() -> None:
    """So evidence of earlier versions verifies: an audit lets epsilon differ by 1e-3."""
    for event in (SPARED, AccountingEvent(0.01, 1.0, 1_000)):
        cost = spent([event], 1e-5)
        assert cost.grid is not None
        before = accounting._composed((event,), cost.grid).get_epsilon_for_delta(1e-5)
        assert before <= cost.epsilon <= before + 1e-4
