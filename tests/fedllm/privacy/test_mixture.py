"""A person at several sites with one noise: against dp-accounting's mixture, closed forms and the case of one site."""

import math
from itertools import product

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy.integrate import quad

from fedllm.privacy import accounting
from fedllm.privacy.mixture import Mixture

EPSILONS = [0.0, 0.1, 1.0, 5.0, 20.0]
SITES = [(0.1, 0.6029, 2), (0.01, 1.0, 3), (0.9, 10.0, 2), (0.002, 0.8, 5), (1 - 1e-9, 2.0, 3)]


@pytest.mark.parametrize(("q", "noise", "k"), SITES)
def test_its_privacy_loss_is_that_of_the_mixture_of_dp_accounting(q: float, noise: float, k: int) -> None:
    chances = [math.comb(k, j) * q**j * (1 - q) ** (k - j) for j in range(k + 1)]
    theirs = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        noise, list(range(k + 1)), chances, value_discretization_interval=0.125
    )
    ours = accounting._mixture_pld(Mixture(q, noise, k), 0.125)
    for steps in (1, 4):
        found = ours.self_compose(steps).get_delta_for_epsilon(EPSILONS)
        assert found == pytest.approx(theirs.self_compose(steps).get_delta_for_epsilon(EPSILONS), rel=1e-8, abs=1e-15)


@pytest.mark.parametrize(("q", "noise"), [(0.1, 0.6029), (0.01, 1.0), (0.5, 20.0), (1e-4, 0.3)])
def test_one_site_alone_is_the_subsampled_gaussian(q: float, noise: float) -> None:
    alone = Mixture(q, noise, 1)
    orders = accounting._RDP_ORDERS
    found, expected = alone.renyi(orders), accounting._step_rdp(q, noise)
    assert (found >= 0).all()
    whole = [i for i, order in enumerate(orders) if order == int(order) and math.isfinite(found[i])]
    assert len(whole) > 20
    assert found[whole] == pytest.approx(expected[whole], rel=1e-9, abs=1e-14)
    finite = np.isfinite(found)  # at other orders, where its series ends early, dp-accounting's is only a bound
    assert (found[finite] <= expected[finite] * (1 + 1e-9) + 1e-14).all()
    ours, theirs = accounting._mixture_pld(alone, 0.01), accounting._step_pld(q, noise, 0.01)
    assert ours.get_delta_for_epsilon(EPSILONS) == pytest.approx(
        theirs.get_delta_for_epsilon(EPSILONS), rel=1e-8, abs=1e-15
    )


@pytest.mark.parametrize(("q", "noise", "k"), [*SITES, (0.3, 0.1, 2), (0.05, 3.0, 40)])
def test_its_renyi_divergence_has_the_closed_form_of_whole_orders(q: float, noise: float, k: int) -> None:
    """E_Q (P/Q)^a, for a whole a, is that of exp(sum of the products of a draws of j, in pairs, / s^2)."""
    chances = [math.comb(k, j) * q**j * (1 - q) ** (k - j) for j in range(k + 1)]
    found = Mixture(q, noise, k).renyi([2, 3])
    two = [
        math.log(chances[a] * chances[b]) + a * b / noise**2
        for a, b in product(range(k + 1), repeat=2) if chances[a] * chances[b] > 0
    ]  # fmt: skip
    three = [
        math.log(chances[a] * chances[b] * chances[c]) + (a * b + a * c + b * c) / noise**2
        for a, b, c in product(range(k + 1), repeat=3) if chances[a] * chances[b] * chances[c] > 0
    ]  # fmt: skip
    assert found[0] == pytest.approx(np.logaddexp.reduce(two), rel=1e-9)
    assert found[1] == pytest.approx(np.logaddexp.reduce(three) / 2, rel=1e-9)


@pytest.mark.parametrize("order", [1.1, 1.7, 4.5])
@pytest.mark.parametrize(("q", "noise", "k"), SITES)
def test_its_renyi_divergence_is_the_integral_of_the_definition(q: float, noise: float, k: int, order: float) -> None:
    chances = [math.comb(k, j) * q**j * (1 - q) ** (k - j) for j in range(k + 1)]

    def moment(x: float, power: float) -> float:
        loss = math.log(math.fsum(p * math.exp((j * x - j * j / 2) / noise**2) for j, p in enumerate(chances)))
        return math.exp(power * loss - (x / noise) ** 2 / 2) / noise / math.sqrt(2 * math.pi)

    ends = (-15 * noise - 5 * k, 15 * noise + 5 * k)
    largest = max(quad(moment, *ends, (a,), limit=500, epsabs=0, epsrel=1e-12)[0] for a in (order, 1 - order))
    assert Mixture(q, noise, k).renyi([order])[0] == pytest.approx(math.log(largest) / (order - 1), rel=1e-6, abs=1e-12)


def test_orders_that_would_take_too_long_are_left_out() -> None:
    assert np.isinf(Mixture(0.1, 1e-4, 3).renyi([1.1, 2.0])).all()
    found = Mixture(0.1, 0.6, 8).renyi([2.0, 1e6])
    assert np.isfinite(found[0])
    assert np.isinf(found[1])


def test_divergences_fall_with_epsilon_and_are_probabilities() -> None:
    for removed in (True, False):
        found = Mixture(0.1, 0.6029, 3).deltas(np.linspace(-2.0, 60.0, 500), removed)
        assert ((found >= 0) & (found <= 1)).all()
        assert (np.diff(found) <= 0).all()
