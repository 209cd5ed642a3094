"""Vectors of bounded metrics: never longer than 1, added up exactly, and read with intervals that hold the truth."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedllm.privacy.distributed_noise import DistributedMechanism
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.metrics import Estimate, Layout, layout_of
from fedllm.privacy.randomness import OsRandomness

SIGMA = 9.45  # of five Gaussian releases at epsilon 1 and delta 1e-6 together
NAMES = [("accuracy", "loss"), ("accuracy", "loss", "top_5"), ("loss", "exact_match")]
LAYOUTS = [Layout(names, most_loss) for names in NAMES for most_loss in (0.1, math.log(151_936))]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Model:
    labels: tuple[str, ...]


@st.composite
def values_of(draw: st.DrawFn, layout: Layout, least: int = 0) -> Array:
    """Any floats at all, often at the edges of what a metric can be."""
    number = (
        st.sampled_from([0.0, 1.0, 0.5, layout.most_loss, -0.0, math.nan, math.inf, -math.inf, 1e308]) | st.floats()
    )
    rows = draw(st.lists(st.lists(number, min_size=len(layout.names), max_size=len(layout.names)), min_size=least))
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(layout.names))


def shares(layout: Layout, units: float = 250.0) -> DistributedMechanism:
    return DistributedMechanism(Mechanism(1.0, SIGMA, 1.0), 4, 3, 1, units)


@pytest.mark.parametrize(
    ("labels", "names", "most_loss"),
    [
        (0, ("loss", "exact_match"), math.log(512)),
        (2, ("accuracy", "loss"), 2 * math.log(2)),
        (5, ("accuracy", "loss"), 2 * math.log(5)),
        (6, ("accuracy", "loss", "top_5"), 2 * math.log(6)),
    ],
)
def test_the_layout_follows_from_the_public_model(labels: int, names: tuple[str, ...], most_loss: float) -> None:
    layout = layout_of(Model(tuple("abcdef"[:labels])), 512)
    assert (layout.names, layout.dimension) == (names, 1 + len(names))
    assert layout.most_loss == pytest.approx(most_loss)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@given(data=st.data())
def test_no_vector_is_longer_than_one_whatever_the_values_are(layout: Layout, data: st.DataObject) -> None:
    values = data.draw(values_of(layout))
    vectors = layout.vectors(values)
    assert vectors.shape == (len(values), layout.dimension)
    steps = [[int(value) for value in row] for row in vectors * 2.0**30]
    assert all(sum(step * step for step in row) <= 4**30 for row in steps)  # in exact arithmetic
    assert np.array_equal(np.array(steps).reshape(vectors.shape) / 2.0**30, vectors), "not on the grid"
    assert (vectors[:, 0] > 0.6).all(), "a unit is not counted"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@given(data=st.data())
def test_a_sum_is_exact_in_every_order_and_one_unit_moves_it_by_its_vector(layout: Layout, data: st.DataObject) -> None:
    values = data.draw(values_of(layout, least=1))
    total = layout.clipped_sum(values)
    assert np.array_equal(layout.clipped_sum(values[data.draw(st.permutations(range(len(values))))]), total)
    assert np.array_equal(total - layout.clipped_sum(values[1:]), layout.vectors(values[:1])[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@given(data=st.data())
def test_in_shares_the_sum_is_whole_quanta_and_one_unit_moves_it_by_the_clip(
    layout: Layout, data: st.DataObject
) -> None:
    values, distributed = data.draw(values_of(layout, least=1)), shares(layout)
    total = layout.clipped_sum(values, distributed)
    assert np.array_equal(total, np.rint(total))
    assert np.array_equal(layout.clipped_sum(values[::-1], distributed), total)
    own = [int(step) for step in total - layout.clipped_sum(values[1:], distributed)]
    assert own[0] > 0.6 * distributed.scale
    assert sum(step * step for step in own) <= distributed.scale**2


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("bad", [1.5, math.nan])
def test_a_vector_that_came_out_too_long_or_not_a_number_is_left_out(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], bad: float
) -> None:
    layout, values = Layout(names, 2.0), np.zeros((3, len(names)))
    right = layout.clipped_sum(values)
    monkeypatch.setattr("fedllm.privacy.metrics._on_grid", lambda a: a * np.array([1.0, bad, 1.0])[: len(a), None])
    assert np.allclose(layout.clipped_sum(values), right * 2 / 3)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_values_that_are_no_number_are_the_worst(layout: Layout) -> None:
    worst = [layout.most_loss if name == "loss" else 0.0 for name in layout.names]
    missing = np.full((1, len(worst)), math.nan)
    assert np.array_equal(layout.vectors(missing), layout.vectors(np.array([worst])))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("mode", ["alone", "in shares"])
def test_a_sum_without_noise_reads_as_the_mean(layout: Layout, mode: str) -> None:
    uniform = np.random.default_rng(0).random((300, len(layout.names)))
    values = uniform * [layout.most_loss if name == "loss" else 1.0 for name in layout.names]
    distributed = shares(layout) if mode == "in shares" else None
    total, factor = layout.clipped_sum(values, distributed), 1.0
    if distributed is not None:
        total, factor = total * distributed.quantum, distributed.clip_before_rounding(layout.dimension)
    score = layout.read(total, 0.0, factor)
    assert score.units.value == pytest.approx(300, rel=1e-4 if distributed else 1e-12)
    assert score.units.low == score.units.value == score.units.high
    for name, truth in zip(layout.names, values.mean(axis=0), strict=True):
        found = score.metrics[name]
        assert found is not None
        assert found.value == pytest.approx(truth, rel=1e-5)
        assert found.low < truth < found.high, "the units are a sample"


def noised(layout: Layout, values: Array, generator: np.random.Generator, noise_std: float = SIGMA) -> Array:
    return layout.clipped_sum(values) + generator.normal(0.0, noise_std, layout.dimension)


def coverage(layout: Layout, draw: Callable[[np.random.Generator], Array], truth: Array, name: str) -> float:
    """Return in which share of 1,000 releases the interval of a metric holds the truth."""
    generator, held = np.random.default_rng(1), 0
    for _ in range(1000):
        found = layout.read(noised(layout, draw(generator), generator), SIGMA).metrics[name]
        assert found is not None
        assert found.low <= found.value <= found.high
        held += found.low <= truth[layout.names.index(name)] <= found.high
    return held / 1000


@pytest.mark.parametrize(("units", "p"), [(100, 0.5), (300, 0.9), (1000, 0.5), (1000, 0.88), (5000, 0.05)])
def test_the_interval_of_accuracy_holds_the_populations_mean_in_95_percent_of_releases(units: int, p: float) -> None:
    layout = Layout(NAMES[0], 2.0)

    def draw(generator: np.random.Generator) -> Array:
        return np.column_stack([generator.random(units) < p, generator.random(units)])

    assert 0.93 <= coverage(layout, draw, np.array([p, 0.5]), "accuracy") <= 0.97
    assert coverage(layout, draw, np.array([p, 0.5]), "loss") >= 0.93


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_at_the_edge_the_interval_holds_the_truth_as_well(p: float) -> None:
    layout = Layout(NAMES[2], 5.0)
    assert coverage(layout, lambda _: np.full((400, 2), p), np.array([p, p]), "exact_match") >= 0.95


def test_the_count_has_an_interval_of_its_noise_alone() -> None:
    layout, generator = Layout(NAMES[1], 4.0), np.random.default_rng(2)
    values, held = np.zeros((700, 3)), 0
    for _ in range(1000):
        units = layout.read(noised(layout, values, generator), SIGMA).units
        held += units.low <= 700 <= units.high
    assert 0.93 <= held / 1000 <= 0.97


def test_too_few_units_tell_nothing_of_a_metric() -> None:
    layout = Layout(NAMES[1], 4.0)
    score = layout.read(layout.clipped_sum(np.ones((20, 3))), SIGMA)
    assert set(score.metrics) == set(layout.names)
    assert set(score.metrics.values()) == {None}
    assert score.units.value == pytest.approx(20)
    assert score.units.low == 0.0
    none = layout.read(np.array([-30.0, 1.0, 2.0, 3.0]), SIGMA)
    assert none.units == Estimate(0.0, 0.0, 0.0)
    assert set(none.metrics.values()) == {None}
    assert set(layout.read(np.zeros(4), 0.0).metrics.values()) == {None}, "no unit, no noise"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@given(data=st.data())
def test_whatever_the_noise_says_the_interval_holds_the_value_and_lies_in_the_range(
    layout: Layout, data: st.DataObject
) -> None:
    coordinate = st.floats(-1e9, 1e9)
    total = data.draw(st.lists(coordinate, min_size=layout.dimension, max_size=layout.dimension))
    score = layout.read(np.array(total), data.draw(st.floats(0, 1e6)), data.draw(st.floats(0.5, 2)))
    assert 0 <= score.units.low <= score.units.value <= score.units.high
    for name, found in score.metrics.items():
        most = layout.most_loss if name == "loss" else 1.0
        if found is not None:
            assert 0 <= found.low <= found.value <= found.high <= most


@pytest.mark.parametrize("names", NAMES)
def test_the_noise_of_1000_units_at_epsilon_1_is_what_the_module_says(names: tuple[str, ...]) -> None:
    spread = Layout(names, 1.0).spread(1000, SIGMA)
    assert np.all(spread <= [0.0111, 0.0137, 0.0178][: len(names)])
    assert spread[0] <= 0.015  # what was aimed at, whatever the accuracy is


@pytest.mark.parametrize("p", [0.02, 0.5, 0.98])
def test_the_noise_of_a_mean_is_what_spread_says_at_most(p: float) -> None:
    layout, generator = Layout(NAMES[1], 4.0), np.random.default_rng(3)
    values = np.zeros((1000, 3))
    values[: int(1000 * p), 0] = 1.0
    found = [layout.read(noised(layout, values, generator), SIGMA).metrics["accuracy"] for _ in range(1000)]
    std = float(np.std([each.value for each in found if each is not None]))
    assert std <= 1.08 * layout.spread(1000, SIGMA)[0]
    a = layout.vectors(values[-1:])[0]  # accuracy 0 there: y = -1
    expected = SIGMA / 2000 * math.sqrt(a[1] ** -2 + (2 * p - 1) ** 2 * a[0] ** -2)
    if p == 0.5:  # far from the edge, where values are cut
        assert std == pytest.approx(expected, rel=0.08)


def test_other_weights_make_the_weighted_variance_no_smaller() -> None:
    layout, generator = Layout(NAMES[1], 1.0), np.random.default_rng(4)

    def cost(squares: Array) -> float:
        return float((0.25 ** np.arange(1, 4)) @ (1 / squares[1:] + 1 / squares[0]))

    chosen = cost(layout.vectors(np.zeros((1, 3)))[0] ** 2)
    others = (layout.vectors(np.zeros((1, 3)))[0] ** 2) * generator.uniform(0.5, 2, (500, 4))
    assert all(cost(other / other.sum()) > chosen * (1 - 1e-6) for other in others)


def test_sites_with_shares_of_the_noise_are_read_as_one() -> None:
    layout, distributed = Layout(NAMES[1], 4.0), shares(Layout(NAMES[1], 4.0))
    values = np.random.default_rng(5).random((1000, 3))
    total = np.zeros(layout.dimension, np.uint32)
    for site in np.array_split(values, 4):
        upload, seeds = distributed.upload(layout.clipped_sum(site, distributed), OsRandomness())
        kept = [seeds[k] for k in distributed.revealed_seeds(4)]
        total += upload - distributed.surplus(kept, 4, layout.dimension)
    factor = distributed.clip_before_rounding(layout.dimension)
    found = layout.read(distributed.decode(total), distributed.mechanism.noise_std, factor).metrics["accuracy"]
    assert found is not None
    assert abs(found.value - values[:, 0].mean()) < 7 * layout.spread(1000, SIGMA)[0]
