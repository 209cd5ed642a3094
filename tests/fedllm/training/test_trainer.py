"""A round at a site: its own coins and noise in every step, and an update that is what the optimiser did."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from fedllm.errors import ModelError, SpecMismatch
from fedllm.plan import RunPlan
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import OsRandomness, SeededRandomness
from fedllm.training.adapter import AdapterModel
from fedllm.training.data import PrivacyUnit, batches
from fedllm.training.engine import Engine
from fedllm.training.trainer import train_round

FALSE_ALARM = 1e-6
Open = Callable[..., AdapterModel]
Make = Callable[..., RunPlan]
MakeUnits = Callable[..., list[PrivacyUnit]]
RandomVector = Callable[[AdapterModel], NDArray[np.float32]]

SGD = {"training.optimizer": "sgd", "training.momentum": 0.0, "training.learning_rate": 0.5, "training.local_steps": 1}


class Everyone:
    """Coins that draw everyone, and noise of zero."""

    private = False

    def words(self, n: int) -> NDArray[np.uint64]:
        return np.zeros(n, dtype=np.uint64)


@pytest.fixture
def adapter(open_adapter: Open) -> AdapterModel:
    return open_adapter("llama", train="B")


@pytest.fixture
def engine(adapter: AdapterModel) -> Engine:
    return Engine(adapter)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_update_is_the_difference_that_training_made(
    adapter: AdapterModel, engine: Engine, make_units: MakeUnits, make_plan: Make, random_vector: RandomVector,
    optimizer: str,
) -> None:  # fmt: skip
    plan = make_plan({"training.optimizer": optimizer, "privacy.sampling_rate": 0.6})
    start = random_vector(adapter)
    adapter.load(adapter.initial)  # wherever another site left the shared model
    update = train_round(adapter, engine, make_units(), plan, start, OsRandomness(), 4)
    assert update.dtype == np.float32
    assert update.shape == start.shape
    assert np.array_equal(adapter.vector() - start, update)
    assert (update != 0).mean() > 0.9  # on the grid of released values a few may be 0


def test_the_update_of_one_step_is_the_clipped_mean_over_the_public_number_of_units(
    adapter: AdapterModel, engine: Engine, make_units: MakeUnits, make_plan: Make, random_vector: RandomVector
) -> None:
    plan = make_plan({**SGD, "privacy.clip_norm": 0.01})
    units, start = make_units(sizes=(1, 2, 1)), random_vector(adapter)
    adapter.load(start)
    total = np.zeros(adapter.spec.dimension)
    for unit in units:
        (batch,) = batches([unit], 100, 0, torch.device("cpu"))
        gradient = engine.unit_gradients(batch)[0].double().numpy()
        total += gradient * min(1.0, 0.01 / float(np.linalg.norm(gradient)))
    update = train_round(adapter, engine, units, plan, start, Everyone(), 4)
    assert plan.expected_units == pytest.approx(0.1 * 200)  # and not 3
    half_a_cell = plan.mechanism.grid / 2  # a release lies on a public grid
    assert update == pytest.approx(
        -0.5 * total / plan.expected_units, abs=0.5 * half_a_cell / plan.expected_units + 3e-8
    )


@pytest.mark.parametrize("steps", [1, 4])
def test_every_step_adds_noise_of_its_own(adapter: AdapterModel, engine: Engine, make_plan: Make, steps: int) -> None:
    plan = make_plan({**SGD, "training.local_steps": steps, "privacy.clip_norm": 2.0, "privacy.noise_multiplier": 10.0})
    update = train_round(adapter, engine, [], plan, np.zeros_like(adapter.initial), OsRandomness(), 4)
    scale = 0.5 * 10.0 * 2.0 / plan.expected_units * np.sqrt(steps)
    statistic = float(np.sum((update.astype(np.float64) / scale) ** 2))
    degrees = adapter.spec.dimension
    assert stats.chi2.ppf(FALSE_ALARM / 2, degrees) <= statistic <= stats.chi2.isf(FALSE_ALARM / 2, degrees)


def test_every_step_draws_a_poisson_batch_of_its_own(
    adapter: AdapterModel, engine: Engine, make_units: MakeUnits, make_plan: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan({"training.local_steps": 40, "privacy.sampling_rate": 0.3})
    units = make_units(sizes=(1,) * 8)
    drawn: list[tuple[int, ...]] = []

    def keep(_: object, batch: Sequence[PrivacyUnit], __: int) -> None:
        drawn.append(tuple(next(i for i, unit in enumerate(units) if unit is member) for member in batch))

    monkeypatch.setattr(engine, "step", keep)
    train_round(adapter, engine, units, plan, adapter.initial, OsRandomness(), 4)
    assert len(drawn) == 40
    assert len(set(drawn)) > 10  # a fixed or shuffled partition of the records would repeat
    total = sum(map(len, drawn))
    assert stats.binom.ppf(FALSE_ALARM / 2, 320, 0.3) <= total <= stats.binom.isf(FALSE_ALARM / 2, 320, 0.3)


def test_what_is_drawn_and_added_is_what_the_plan_is_charged_for(
    adapter: AdapterModel, engine: Engine, make_units: MakeUnits, make_plan: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan()
    seen: list[tuple[Mechanism, float]] = []
    wrap = engine.optimizer

    def keep(optimizer: torch.optim.Optimizer, mechanism: Mechanism, expected: float, source: OsRandomness) -> object:
        seen.append((mechanism, expected))
        return wrap(optimizer, mechanism, expected, source)

    monkeypatch.setattr(engine, "optimizer", keep)
    train_round(adapter, engine, make_units(), plan, adapter.initial, OsRandomness(), 4)
    assert seen == [(plan.mechanism, plan.expected_units)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_seeded_round_can_be_repeated_bit_for_bit_after_any_other(
    adapter: AdapterModel, engine: Engine, make_units: MakeUnits, make_plan: Make, optimizer: str
) -> None:
    plan = make_plan({"training.optimizer": optimizer, "training.local_steps": 3, "privacy.insecure_seed": 1})
    start, units = adapter.initial, make_units()

    def go(scope: int) -> bytes:
        return train_round(adapter, engine, units, plan, start, SeededRandomness(1, "site", scope), 4).tobytes()

    first = go(1)
    assert go(2) != first
    assert go(1) == first  # no momentum, coin or noise of the other round has outlived it


def test_no_global_seed_makes_the_noise_of_a_private_round_repeat(
    adapter: AdapterModel, engine: Engine, make_units: MakeUnits, make_plan: Make
) -> None:
    updates = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # the point is that the global state has no effect
        updates.append(train_round(adapter, engine, make_units(), make_plan(), adapter.initial, OsRandomness(), 4))
    assert (updates[0] != updates[1]).mean() > 0.99


def test_training_leaves_the_global_generators_alone(
    adapter: AdapterModel, engine: Engine, make_units: MakeUnits, make_plan: Make
) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    train_round(adapter, engine, make_units(), make_plan(), adapter.initial, OsRandomness(), 4)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("changes", [{"learning_rate": 3e38}, {"learning_rate": 1e38}])
def test_training_that_diverges_is_an_error_and_not_an_update(
    adapter: AdapterModel, engine: Engine, make_units: MakeUnits, make_plan: Make, changes: dict[str, float]
) -> None:
    plan = make_plan({**SGD, "privacy.clip_norm": 1e6, "training.local_steps": 3})
    plan = plan.model_copy(update={"training": plan.training.model_copy(update=changes)})  # no plan may ask for that
    with pytest.raises(ModelError, match="diverged"):
        train_round(adapter, engine, make_units(), plan, adapter.initial, OsRandomness(), 4)


def test_a_start_of_another_adapter_is_refused(
    adapter: AdapterModel, engine: Engine, make_units: MakeUnits, make_plan: Make
) -> None:
    with pytest.raises(SpecMismatch):
        train_round(adapter, engine, make_units(), make_plan(), adapter.initial[:-1], OsRandomness(), 4)


def test_a_run_without_noise_is_the_plain_mean_gradient(
    adapter: AdapterModel, engine: Engine, make_units: MakeUnits, make_plan: Make, random_vector: RandomVector
) -> None:
    plan = make_plan({**SGD, "privacy.mode": "off", "privacy.clip_norm": 1e-6, "privacy.sampling_rate": 1.0,
                      "privacy.units_per_site": 4})  # fmt: skip
    start, units = random_vector(adapter), make_units(sizes=(1, 2, 1, 1))
    first, second = (train_round(adapter, engine, units, plan, start, OsRandomness(), size) for size in (1, 100))
    assert np.linalg.norm(first) > 1e-3
    assert np.linalg.norm(first - second) <= 1e-5 * np.linalg.norm(first)
