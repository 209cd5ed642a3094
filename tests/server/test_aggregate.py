"""The mean of the sites' updates: public weights, and the same bits whoever answered first."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from server.aggregate import weighted_mean

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
