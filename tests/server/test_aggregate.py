"""The mean of the sites' updates: public weights, and the same bits whoever answered first."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.stats import binom, chi2, ncx2, norm, poisson

from fedllm.plan import RunPlan
from fedllm.training import self_check
from fedllm.values import parse
from server.aggregate import (
    _ADAM,
    FALSE_ALARM,
    TIMES_NOMINAL,
    Bound,
    _most_units,
    bound_of_update,
    weighted_mean,
)

Updates = dict[str, NDArray[np.float32]]

_VECTORS = arrays(np.float32, 17, elements=st.floats(-1e6, 1e6, width=32))
_UPDATES = st.dictionaries(st.text(min_size=1, max_size=6), _VECTORS, min_size=1, max_size=6)


@given(_UPDATES, st.lists(st.floats(0.01, 100.0), min_size=6, max_size=6))
def test_the_mean_is_that_of_numpy(updates: Updates, weights: list[float]) -> None:
    public = dict(zip(sorted(updates)[::2], weights, strict=False))  # the others weigh 1
    every = [public.get(name, 1.0) for name in updates]
    expected = np.average(np.stack([v.astype(np.float64) for v in updates.values()]), axis=0, weights=every)
    mean = weighted_mean(updates, public)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, expected, rtol=1e-6, atol=1e-6 * max(1.0, float(np.abs(expected).max())))


@given(_UPDATES, st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_change_a_bit(updates: Updates, random) -> None:  # type: ignore[no-untyped-def]
    names = list(updates)
    random.shuffle(names)
    weights = {name: 1.0 + i / 3 for i, name in enumerate(sorted(updates))}
    shuffled = {name: updates[name] for name in names}
    assert weighted_mean(shuffled, weights).tobytes() == weighted_mean(updates, weights).tobytes()


def test_values_that_cancel_in_one_order_only_are_summed_in_one_order() -> None:
    """Floating-point addition is not associative: these three give other bits in other orders."""
    updates = {"a": np.float32([1e8]), "b": np.float32([1.0]), "c": np.float32([-1e8])}
    weights = {"a": 1e9, "b": 1e-9, "c": 1e9}
    means = {weighted_mean({n: updates[n] for n in order}, weights).tobytes() for order in permutations(updates)}
    assert len(means) == 1


def test_a_site_weighs_what_is_declared_and_not_how_many_records_it_has() -> None:
    updates = {"서울": np.float32([1, 0]), "busan": np.float32([0, 1]), "jeju": np.float32([0, 0])}
    np.testing.assert_array_equal(weighted_mean(updates, {}), np.float32([1 / 3, 1 / 3]))
    np.testing.assert_array_equal(weighted_mean(updates, {"서울": 2.0}), np.float32([0.5, 0.25]))
    weighted = weighted_mean(updates, {"absent": 1000.0, "서울": 2.0})
    np.testing.assert_array_equal(weighted, np.float32([0.5, 0.25]))


@pytest.mark.parametrize("weights", [{}, {"only": 0.25}, {"only": 3.0}])
def test_the_mean_of_one_site_is_its_update(weights: dict[str, float]) -> None:
    update = np.random.default_rng(0).normal(size=100).astype(np.float32)
    np.testing.assert_array_equal(weighted_mean({"only": update}, weights), update)


def test_the_updates_are_left_as_they_were() -> None:
    updates = {"a": np.float32([1, 2]), "b": np.float32([3, 4])}
    weighted_mean(updates, {"a": 5.0})
    np.testing.assert_array_equal(updates["a"], np.float32([1, 2]))
    np.testing.assert_array_equal(updates["b"], np.float32([3, 4]))


# ---- what no update can be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 30, 20_000, 5_000_000])
@pytest.mark.parametrize("length", [0.0, 0.1, 3.0, 200.0, 20_000.0])
def test_the_largest_honest_update_is_refused_no_more_often_than_is_said(d: int, length: float) -> None:
    """Against the exact noncentral chi-square and normal distribution; and the limits are not idle either."""
    most, largest = Bound(length, length, 1.0).limits(d)
    of_length = ncx2.sf(most**2, d, length**2) if length else chi2.sf(most**2, d)
    assert of_length <= FALSE_ALARM
    assert 2 * d * norm.sf(largest - length) <= FALSE_ALARM
    assert most**2 - d <= 1.5 * length**2 + 10 * d**0.5 + 1500
    assert largest <= length + 10


@pytest.mark.parametrize("mean", [0.1, 1.0, 30.0, 5000.0])
def test_more_units_than_are_reckoned_with_are_drawn_no_more_often_than_is_said(mean: float) -> None:
    assert poisson.sf(_most_units(mean), TIMES_NOMINAL * mean) <= FALSE_ALARM
    assert binom.sf(_most_units(mean), int(10 * TIMES_NOMINAL * mean), 0.1) <= FALSE_ALARM


@pytest.mark.parametrize("training", [
    {"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adam"}
])  # fmt: skip
def test_the_largest_update_of_local_training_is_within_its_bound(training: dict[str, Any]) -> None:
    """All units pull one way, as many as there may be, in every step; the optimiser is torch's own."""
    values = {
        "run": "run", "seed": 0, "model": {"source": "none"}, "adapter": {},
        "privacy": {"clip_norm": 0.5, "sampling_rate": 0.1, "units_per_site": 200, "noise_multiplier": 1.2},
        "training": {"rounds": 2, "local_steps": 5, "learning_rate": 0.3, **training},
    }  # fmt: skip
    plan, d = parse(RunPlan, values), 40
    bound = bound_of_update(plan, d)
    assert bound is not None
    longest = []
    for noise in (0.0, 1.2):
        parameter = torch.nn.Parameter(torch.zeros(d, dtype=torch.float64))
        optimizer = self_check._plain_optimizer(plan, parameter)
        generator = torch.Generator().manual_seed(0)
        for _ in range(plan.training.local_steps):
            pull = torch.zeros(d, dtype=torch.float64)
            pull[0] = TIMES_NOMINAL * plan.expected_units
            noised = 0.5 * (pull + noise * torch.randn(d, generator=generator, dtype=torch.float64))
            parameter.grad = noised / plan.expected_units
            optimizer.step()
        update = parameter.detach().numpy()
        bound.check(update)
        longest.append(float(np.linalg.norm(update)))
    assert longest[0] <= bound.length
    assert bound.length < 50 * longest[0]


def test_adam_takes_no_longer_step_than_is_said() -> None:
    """Gradients that grow as Cauchy and Schwarz have it worst, after a long time without any."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=1.0, eps=0.0)
    before, worst = 0.0, 0.0
    for step in range(6000):
        parameter.grad = torch.tensor([(0.999 / 0.9) ** max(step - 5800, -200)], dtype=torch.float64)
        optimizer.step()
        worst, before = max(worst, abs(parameter.item() - before)), parameter.item()
    assert 6 < worst <= _ADAM


def test_nothing_bounds_what_was_not_clipped() -> None:
    values = {"run": "run", "seed": 0, "model": {"source": "none"}, "adapter": {},
              "privacy": {"mode": "off", "units_per_site": 200}, "training": {}}  # fmt: skip
    assert bound_of_update(parse(RunPlan, values), 10) is None
