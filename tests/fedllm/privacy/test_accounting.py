"""Epsilon: against published vectors, an independent library, and the laws that any privacy accountant obeys."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant

from fedllm.errors import ConfigError, FedllmError, PrivacyError
from fedllm.privacy import accounting
from fedllm.privacy.accounting import OLD_GRID, AccountingEvent, calibrate, grid_of, overrun, spent, spent_at_sites
from tests.conftest import SOAK

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[2] / "vectors" / "accounting.json").read_text("utf-8"))
PLD_TOLERANCE: float = VECTORS["tolerance"]["pld"]
RDP_TOLERANCE: float = VECTORS["tolerance"]["rdp_relative"]
PRV_MINUS_PLD: list[float] = VECTORS["tolerance"]["opacus_prv_minus_pld"]
SINGLE: list[dict[str, Any]] = VECTORS["single"]
COMPOSED, K_SITES = VECTORS["composed"]
DELTA = 1e-5
GRID = 2e-3  # two accountants on grids of 1e-3 may differ by rounding

# Cheap to account for: an accountant's time grows with the spread of the privacy loss.
sampling_rates = st.sampled_from([0.01, 0.05, 0.1])
noises = st.sampled_from([1.5, 3.0])
step_counts = st.integers(1, 60)
events = st.builds(AccountingEvent, sampling_rates, noises, step_counts)


def event_of(vector: dict[str, Any]) -> AccountingEvent:
    return AccountingEvent(vector["q"], vector["noise_multiplier"], vector["steps"])


def name_of(vector: dict[str, Any]) -> str:
    return f"q={vector['q']}-sigma={vector['noise_multiplier']}-T={vector['steps']}"


@pytest.mark.parametrize("vector", SINGLE, ids=name_of)
def test_one_event_costs_what_the_vector_says(vector: dict[str, Any]) -> None:
    result = spent([event_of(vector)], vector["delta"])
    assert result.epsilon == pytest.approx(vector["pld"], abs=PLD_TOLERANCE)
    assert result.epsilon_rdp == pytest.approx(vector["rdp"], rel=RDP_TOLERANCE)
    assert result.delta == vector["delta"]


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")  # opacus, where q is 1
@pytest.mark.filterwarnings("ignore:Optimal order is the (largest|smallest) alpha:UserWarning")
@pytest.mark.parametrize("vector", SINGLE, ids=name_of)
def test_the_accountants_of_opacus_agree(vector: dict[str, Any]) -> None:
    history = [(vector["noise_multiplier"], vector["q"], vector["steps"])]
    ours = spent([event_of(vector)], vector["delta"])
    rdp = RDPAccountant()
    rdp.history = history
    assert ours.epsilon_rdp == pytest.approx(rdp.get_epsilon(vector["delta"]), rel=0.02)  # its orders differ
    prv = PRVAccountant()
    prv.history = history
    upper = prv.get_epsilon(vector["delta"])
    assert upper == pytest.approx(vector["opacus_prv_upper"], abs=1e-3)
    assert PRV_MINUS_PLD[0] <= upper - vector["pld"] <= PRV_MINUS_PLD[1]
    assert upper - ours.epsilon == pytest.approx(upper - vector["pld"], abs=PLD_TOLERANCE)


def test_two_different_events_compose_to_what_the_vector_says() -> None:
    composed = [AccountingEvent(*event) for event in COMPOSED["events"]]
    result = spent(composed, COMPOSED["delta"])
    assert result.epsilon == pytest.approx(COMPOSED["pld"], abs=PLD_TOLERANCE)
    assert result.epsilon_rdp == pytest.approx(COMPOSED["rdp"], rel=RDP_TOLERANCE)


@pytest.mark.parametrize(("k", "expected"), list(zip(K_SITES["k"], K_SITES["pld"], strict=True)))
def test_a_person_in_k_sites_pays_k_times(k: int, expected: float) -> None:
    event = AccountingEvent(*K_SITES["event"])
    assert spent([event] * k, K_SITES["delta"]).epsilon == pytest.approx(expected, abs=PLD_TOLERANCE)


def test_epsilons_are_never_added_up() -> None:
    parts = [AccountingEvent(*event) for event in COMPOSED["events"]]
    whole = spent(parts, DELTA).epsilon
    assert whole < sum(spent([part], DELTA).epsilon for part in parts)
    assert whole > max(spent([part], DELTA).epsilon for part in parts)


@settings(max_examples=4)
@given(st.lists(events, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_the_order_and_the_grouping_of_events_do_not_matter(history: list[AccountingEvent], coins: Any) -> None:
    pieces = [
        AccountingEvent(event.sampling_rate, event.noise_multiplier, steps)
        for event in history
        for steps in (event.steps // 2, event.steps - event.steps // 2)
    ]
    coins.shuffle(pieces)
    assert spent(pieces, DELTA) == spent(history, DELTA)


def test_a_thousand_rounds_cost_as_much_as_one_event_of_a_thousand_steps() -> None:
    one = AccountingEvent(0.01, 1.0, 1)
    assert spent([one] * 1000, DELTA) == spent([AccountingEvent(0.01, 1.0, 1000)], DELTA)


@settings(max_examples=4)
@given(events, st.integers(1, 100))
def test_more_steps_never_cost_less(event: AccountingEvent, more: int) -> None:
    longer = AccountingEvent(event.sampling_rate, event.noise_multiplier, event.steps + more)
    assert spent([longer], DELTA).epsilon >= spent([event], DELTA).epsilon
    assert spent([longer], DELTA).epsilon_rdp >= spent([event], DELTA).epsilon_rdp


@settings(max_examples=4)
@given(events, events)
def test_one_more_event_never_costs_less(a: AccountingEvent, b: AccountingEvent) -> None:
    both = spent([a, b], DELTA).epsilon
    assert both >= spent([a], DELTA).epsilon
    assert both >= spent([b], DELTA).epsilon


@settings(max_examples=4)
@given(noises, step_counts, st.sampled_from([1.01, 2.0]))
def test_a_higher_sampling_rate_never_costs_less(noise: float, steps: int, factor: float) -> None:
    low, high = (spent([AccountingEvent(q, noise, steps)], DELTA) for q in (0.05, 0.05 * factor))
    assert high.epsilon >= low.epsilon - GRID
    assert high.epsilon_rdp >= low.epsilon_rdp


@settings(max_examples=4)
@given(sampling_rates, noises, step_counts, st.sampled_from([1.01, 2.0]))
def test_more_noise_never_costs_more(q: float, noise: float, steps: int, factor: float) -> None:
    little, much = (spent([AccountingEvent(q, n, steps)], DELTA) for n in (noise, noise * factor))
    assert much.epsilon <= little.epsilon + GRID
    assert much.epsilon_rdp <= little.epsilon_rdp


@pytest.mark.parametrize(("q", "noise"), [(0.001, 1.0), (0.01, 2.0), (0.002, 4.0)])
def test_the_step_at_which_the_accounting_grid_changes_costs_something_too(q: float, noise: float) -> None:
    before, after = (spent([AccountingEvent(q, noise, steps)], DELTA).epsilon for steps in (5_000, 5_001))
    assert after >= before


@settings(max_examples=4)
@given(st.lists(events, min_size=1, max_size=2))
def test_rdp_is_an_upper_bound_of_pld(history: list[AccountingEvent]) -> None:
    result = spent(history, DELTA)
    assert result.epsilon_rdp >= result.epsilon - GRID


@pytest.mark.parametrize(
    ("q", "noise", "steps"),
    [
        (0.001, 5.0, 5000),
        (0.001, 5.0, 500),
        (0.001, 5.0, 50),
        (0.01, 10.0, 1000),
        (0.001, 2.0, 5000),
        (0.05, 20.0, 500),
        (1.0, 50.0, 50),
    ],
)
def test_a_small_epsilon_is_accounted_as_exactly_as_a_large_one(q: float, noise: float, steps: int) -> None:
    event = AccountingEvent(q, noise, steps)
    fine = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-5)
    fine.compose(SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(noise)), steps))
    exact = float(fine.get_epsilon(DELTA))
    result = spent([event], DELTA)
    assert result.epsilon == pytest.approx(exact, rel=5e-3)
    assert result.epsilon_rdp >= result.epsilon


# Small and large losses, rare and frequent ones; the last two are rare and large, the costliest to compose.
ACCOUNTED = [
    (1e-5, (0.05, 0.51, 9)), (1e-5, (0.05, 20.0, 500)), (1e-9, (0.5, 1.0, 30)), (1e-5, (1.0, 50.0, 50)),
    (1e-5, (1.0, 0.3, 1)), (1e-7, (0.002, 0.8, 1)), (1e-5, (0.001, 0.6, 5000)), (1e-5, (0.002, 0.3, 100)),
]  # fmt: skip


@pytest.mark.parametrize(("delta", "event"), ACCOUNTED)
def test_the_grid_costs_less_than_half_a_percent_and_never_helps(delta: float, event: tuple[float, float, int]) -> None:
    events = [AccountingEvent(*event)]
    result = spent(events, delta)
    assert result.grid == grid_of(events, delta)
    finer = spent(events, delta, result.grid / 4).epsilon
    assert finer - 1e-9 <= result.epsilon <= 1.005 * finer


def test_the_grid_is_the_same_at_every_end_whatever_was_accounted_before() -> None:
    """A pure function of events and delta: a power of two, whatever their order and grouping."""
    events = [AccountingEvent(0.05, 0.8, 3), AccountingEvent(0.01, 1.0, 100)]
    grid = spent(events, DELTA).grid
    assert grid is not None
    assert math.frexp(grid)[0] == 0.5
    regrouped = [events[1], *[AccountingEvent(0.05, 0.8, 1)] * 3]
    assert spent(regrouped, DELTA).grid == grid == grid_of(events, DELTA)


def test_figures_of_earlier_versions_are_computed_on_their_own_grid() -> None:
    old = spent([AccountingEvent(0.05, 0.8, 100)], DELTA, OLD_GRID)
    assert (old.grid, OLD_GRID) == (1e-4, 1e-4)
    fine = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-4)
    fine.compose(SelfComposedDpEvent(PoissonSampledDpEvent(0.05, GaussianDpEvent(0.8)), 100))
    assert old.epsilon == pytest.approx(float(fine.get_epsilon(DELTA)), rel=1e-9)


@pytest.mark.parametrize("budget", [0.3, 1.0, 3.0, 8.0])
@pytest.mark.parametrize(("q", "noise"), [(0.01, 1.0), (1.0, 20.0), (0.05, 0.6)])
def test_plans_that_may_depend_on_each_other_are_gated_by_orders_fixed_beforehand(
    budget: float, q: float, noise: float
) -> None:
    """The gate never admits more than RDP over all orders would, and costs at most as much again."""
    admitted = [n for n in range(1, 400, 7) if overrun([AccountingEvent(q, noise, n)], DELTA, budget, False) is None]
    freely = [n for n in range(1, 400, 7) if spent([AccountingEvent(q, noise, n)], DELTA).epsilon_rdp <= budget]
    assert set(admitted) <= set(freely)
    for n in freely:
        cost = overrun([AccountingEvent(q, noise, n)], DELTA, budget, one_plan=False)
        assert cost is None or cost <= 2 * budget


def test_the_gate_of_dependent_plans_is_the_filter_of_one_order_at_its_part_of_delta() -> None:
    """By hand: the least of three orders' bounds, each at a third of delta (Canonne, Kamath and Steinke 2020)."""
    event, budget = AccountingEvent(1.0, 5.0, 60), 6.0  # too much
    best = 2 * math.log(1 / DELTA) / budget
    bounds = []
    for share in (0.15, 0.3, 0.6):
        alpha = round(1 + best * share, 1)
        rdp = event.steps * alpha / (2 * event.noise_multiplier**2)
        bounds.append(rdp + math.log1p(-1 / alpha) - math.log(DELTA / 3 * alpha) / (alpha - 1))
    assert overrun([event], DELTA, budget, one_plan=False) == pytest.approx(min(bounds), rel=0.02)


@pytest.mark.parametrize(("noise", "steps"), [(100.0, 1_000_000), (1_000.0, 1_000_000)])
def test_steps_that_lose_less_than_the_grid_can_tell_are_not_billed_a_cell_each(noise: float, steps: int) -> None:
    """Billed on the grid of 1e-4, these cost more by PLD than by RDP, which cannot be."""
    result = spent([AccountingEvent(0.001, noise, steps)], DELTA)
    assert 0 < result.epsilon <= result.epsilon_rdp


@pytest.mark.parametrize("noise", [1e-300, 1e-160, 1e-9, 1e-3])
def test_next_to_no_noise_costs_an_epsilon_without_use_and_warns_of_nothing(noise: float) -> None:
    for q in (1.0, 0.5):
        result = spent([AccountingEvent(q, noise, 3)], DELTA)
        assert result.by_rdp_alone
        assert result.epsilon == result.epsilon_rdp > 100


@pytest.mark.parametrize("history", [[], [AccountingEvent(0.1, 1.0, 0)], [AccountingEvent(0.0, 1.0, 10)]])
def test_what_touches_nobody_costs_nothing(history: Sequence[AccountingEvent]) -> None:
    result = spent(history, DELTA)
    assert (result.epsilon, result.epsilon_rdp) == (0.0, 0.0)


@pytest.mark.parametrize("others", [[], [AccountingEvent(0.01, 4.0, 10)]], ids=["alone", "with-noisy-ones"])
def test_a_single_step_without_noise_is_no_privacy_at_all(others: list[AccountingEvent]) -> None:
    result = spent([*others, AccountingEvent(0.01, 0.0, 1), *others], DELTA)
    assert result.epsilon == math.inf
    assert result.epsilon_rdp == math.inf


def test_a_smaller_delta_costs_more() -> None:
    event = AccountingEvent(0.05, 1.0, 100)
    epsilons = [spent([event], delta).epsilon for delta in (1e-8, 1e-6, 1e-4)]
    assert epsilons == sorted(epsilons, reverse=True)
    assert len(set(epsilons)) == 3


@pytest.mark.parametrize(
    "impossible",
    [
        AccountingEvent(0.1, 1.0, -10),
        AccountingEvent(-0.1, 1.0, 10),
        AccountingEvent(1.5, 1.0, 10),
        AccountingEvent(math.nan, 1.0, 10),
        AccountingEvent(0.1, math.nan, 10),
        AccountingEvent(0.1, -1.0, 10),
    ],
    ids=repr,
)
def test_an_event_that_cannot_have_happened_never_lowers_the_bill(impossible: AccountingEvent) -> None:
    honest = AccountingEvent(0.1, 1.0, 20)
    bill = spent([honest], DELTA).epsilon
    try:
        result = spent([honest, impossible], DELTA)
    except (FedllmError, ValueError):
        return
    assert result.epsilon >= bill


@pytest.mark.parametrize(
    ("epsilon", "delta", "q", "steps"),
    [(8.0, 1e-5, 0.08, 60), (1.0, 1e-5, 0.05, 20), (0.05, 1e-5, 0.002, 400), (3.0, 1e-6, 1.0, 5)],
)
def test_calibrated_noise_meets_the_target_and_wastes_less_than_half_a_percent(
    epsilon: float, delta: float, q: float, steps: int
) -> None:
    noise = calibrate(epsilon, delta, q, steps)
    reached = spent([AccountingEvent(q, noise, steps)], delta).epsilon
    assert 0.995 * epsilon <= reached <= epsilon


@pytest.mark.parametrize("vector", SINGLE, ids=name_of)
def test_calibration_finds_the_noise_of_the_vectors_again(vector: dict[str, Any]) -> None:
    noise = calibrate(vector["pld"], vector["delta"], vector["q"], vector["steps"])
    assert noise == pytest.approx(vector["noise_multiplier"], rel=5e-3)


@settings(max_examples=200 if SOAK else 6)
@given(
    st.sampled_from([0.3, 1.0, 3.0, 8.0, 20.0]),
    st.sampled_from([1e-5, 1e-7]),
    st.sampled_from([0.002, 0.02, 0.2, 1.0]),
    st.sampled_from([1, 30, 1000]),
)
def test_calibration_is_tight_over_a_grid_of_targets(epsilon: float, delta: float, q: float, steps: int) -> None:
    noise = calibrate(epsilon, delta, q, steps)
    assert 0.995 * epsilon <= spent([AccountingEvent(q, noise, steps)], delta).epsilon <= epsilon


def test_a_run_with_calibrated_noise_stays_in_budget_in_every_round() -> None:
    noise = calibrate(1.0, DELTA, 0.05, 20)
    for rounds in (1, 10, 19, 20):
        assert spent([AccountingEvent(0.05, noise, 1)] * rounds, DELTA).epsilon <= 1.0


def test_calibration_gives_everyone_the_same_noise() -> None:
    first = calibrate(3.0, 1e-6, 1.0, 5)
    calibrate.cache_clear()
    assert calibrate(3.0, 1e-6, 1.0, 5) == first


def test_a_target_that_no_noise_can_meet_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.epsilon"):
        calibrate(1e-9, 1e-12, 1.0, 1)


DEMO = AccountingEvent(0.1, 0.6029, 9)  # what one site of the demo is charged


@pytest.mark.parametrize(("k", "expected"), [(1, 7.996), (2, 17.25), (3, 27.11), (8, 82.66)])
def test_a_person_in_k_sites_with_one_noise_pays_what_the_vector_says(k: int, expected: float) -> None:
    """Computed with dp-accounting 0.6.0, `from_mixture_gaussian_mechanism`, on grids of 1e-2 and 1e-4."""
    result = spent_at_sites([(DEMO, k)], DELTA)
    assert result.epsilon == pytest.approx(expected, abs=PLD_TOLERANCE)
    assert result.epsilon < result.epsilon_rdp < 1.5 * result.epsilon
    finer = accounting._spent((accounting._AtSites(0.1, 0.6029, 9, k),), DELTA, 2.0**-8) if k in (2, 3) else result
    assert finer.epsilon <= result.epsilon <= 1.0001 * finer.epsilon


@settings(max_examples=4)
@given(events, events)
def test_a_person_in_one_site_pays_the_same_whose_noise_it_is(a: AccountingEvent, b: AccountingEvent) -> None:
    assert spent_at_sites([(a, 1), (b, 1)], DELTA) == spent([a, b], DELTA)


@settings(max_examples=3)
@given(noises, step_counts, st.integers(1, 5))
def test_where_everybody_is_drawn_k_sites_move_the_sum_k_times_as_far(noise: float, steps: int, k: int) -> None:
    expected = spent([AccountingEvent(1.0, noise / k, steps)], DELTA)
    assert spent_at_sites([(AccountingEvent(1.0, noise, steps), k)], DELTA) == expected


@settings(max_examples=4)
@given(events, st.integers(1, 4), st.integers(1, 50))
def test_more_sites_or_steps_never_cost_less(event: AccountingEvent, k: int, more: int) -> None:
    longer = AccountingEvent(event.sampling_rate, event.noise_multiplier, event.steps + more)
    cost, at_more, of_more = (spent_at_sites([pair], DELTA) for pair in ((event, k), (event, k + 1), (longer, k)))
    for higher in (at_more, of_more):
        assert higher.epsilon >= cost.epsilon - GRID
        assert higher.epsilon_rdp >= cost.epsilon_rdp
    assert at_more.epsilon > spent([event] * (k + 1), DELTA).epsilon, "noise of each site's own protects more"


@settings(max_examples=4)
@given(events, st.integers(2, 4))
def test_a_person_in_k_sites_pays_no_more_than_if_the_sum_moved_k_times_at_every_draw(
    event: AccountingEvent, k: int
) -> None:
    drawn = 1 - (1 - event.sampling_rate) ** k
    longest = spent([AccountingEvent(drawn, event.noise_multiplier / k, event.steps)], DELTA)
    result = spent_at_sites([(event, k)], DELTA)
    assert result.epsilon <= longest.epsilon + GRID
    assert result.epsilon <= result.epsilon_rdp <= longest.epsilon_rdp


def test_training_at_some_sites_and_evaluation_at_others_compose_in_any_order() -> None:
    pairs = [(DEMO, 2), (AccountingEvent(1.0, 8.0, 5), 3), (AccountingEvent(0.1, 0.6029, 1), 2)]
    whole = spent_at_sites(pairs, DELTA)
    assert whole == spent_at_sites(pairs[::-1], DELTA)
    assert whole == spent_at_sites([(AccountingEvent(0.1, 0.6029, 10), 2), pairs[1]], DELTA)
    assert all(whole.epsilon > spent_at_sites([pair], DELTA).epsilon for pair in pairs)
    assert whole.epsilon < whole.epsilon_rdp


@pytest.mark.parametrize("k", [2, 50, 5000])
@pytest.mark.parametrize(("q", "noise", "steps"), [
    (0.1, 1e-300, 3), (0.1, 1e-6, 3), (0.1, 0.01, 1000), (1e-9, 1e-3, 10), (1e-9, 1e9, 1000), (1 - 2**-53, 1.0, 3),
    (0.5, 1e9, 1), pytest.param(1e-5, 0.3, 10_000_000, marks=pytest.mark.soak),
])  # fmt: skip
def test_a_person_in_k_sites_has_a_bound_whatever_the_numbers(q: float, noise: float, steps: int, k: int) -> None:
    result = spent_at_sites([(AccountingEvent(q, noise, steps), k)], DELTA)
    assert 0 <= result.epsilon <= result.epsilon_rdp


def test_too_many_sites_are_bounded_by_rdp_before_a_distribution_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a distribution was made")

    monkeypatch.setattr(accounting, "_mixture_pld", never)
    assert accounting._too_large((accounting._AtSites(1e-4, 0.6, 1000, 1000),), 2.0**-14)


def test_without_noise_or_touching_nobody_k_sites_change_nothing() -> None:
    assert spent_at_sites([(AccountingEvent(0.1, 0.0, 1), 2)], DELTA).epsilon == math.inf
    assert spent_at_sites([(AccountingEvent(0.0, 1.0, 9), 2), (AccountingEvent(0.1, 1.0, 0), 3)], DELTA).epsilon == 0
    assert spent_at_sites([], DELTA).epsilon == 0


@pytest.mark.parametrize("k", [0, -1, True, 2.0, 5001, math.nan])
def test_what_is_no_number_of_sites_is_refused(k: Any) -> None:
    with pytest.raises(PrivacyError, match="expected a count from 1 to 5000"):
        spent_at_sites([(DEMO, k)], DELTA)
