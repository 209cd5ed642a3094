"""Canaries that stand out, and scores that are what their formulas say."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedllm.config import ModelConfig
from fedllm.privacy.mechanism import Mechanism
from fedllm.training.adapter import AdapterModel
from fedllm.training.canary_attack import black_scores, drawn_in_a_round, make_canaries, white_scores
from fedllm.training.data import IGNORE, PrivacyUnit, collate
from fedllm.training.engine import Engine
from fedllm.training.losses import unit_losses

Open = Callable[..., AdapterModel]
MakeUnits = Callable[..., list[PrivacyUnit]]
RandomVector = Callable[[AdapterModel], NDArray[np.float32]]
SEED = bytes(range(32))
CLIP = 0.05


def loss_of(adapter: AdapterModel, unit: PrivacyUnit) -> torch.Tensor:
    batch = collate([unit], 0, torch.device("cpu"), max(len(record.input_ids) for record in unit))
    return unit_losses(adapter, batch)[0]


def gradient_of(adapter: AdapterModel, unit: PrivacyUnit) -> NDArray[np.float64]:
    parts = torch.autograd.grad(loss_of(adapter, unit), list(adapter.trainable.values()))
    return np.concatenate([part.flatten().double().numpy() for part in parts])


@pytest.mark.parametrize("case", ["llama", "bert-native"])
def test_canaries_are_what_their_seed_says(model_config: Callable[[str], ModelConfig], case: str) -> None:
    config = model_config(case)
    units = make_canaries(SEED, 200, config, 259)
    again, others = make_canaries(SEED, 200, config, 259), make_canaries(SEED[::-1], 200, config, 259)
    for unit, same in zip(units, again, strict=True):
        assert len(unit) == 1
        assert np.array_equal(unit[0].input_ids, same[0].input_ids)
        assert np.array_equal(unit[0].labels, same[0].labels)
    texts = [tuple(unit[0].input_ids) for unit in [*units, *others]]
    assert len(set(texts)) == 400
    assert {len(text) for text in texts} == {8}, "the least that model.max_length can be"
    tokens = np.array(texts)
    assert tokens.dtype == np.int64
    assert tokens.min() >= 0
    assert 250 < tokens.max() < 259
    labels = [unit[0].labels for unit in units]
    if config.task == "classification":
        assert {int(label) for label in labels} == {0, 1, 2}
        assert all(label.shape == () for label in labels)
    else:
        learned = [(label != IGNORE).tolist() for label in labels]
        assert learned == [[False] * 7 + [True]] * 200
        assert all(label[-1] == text[-1] for label, text in zip(labels, texts, strict=False))


def test_no_canaries_are_none(open_adapter: Open, model_config: Callable[[str], ModelConfig]) -> None:
    adapter = open_adapter("llama")
    zeros = np.zeros_like(adapter.initial)
    assert make_canaries(SEED, 0, model_config("llama"), 259) == []
    assert white_scores(Engine(adapter), adapter, zeros, zeros, [], Mechanism(CLIP, 1.0, 0.5), 8).shape == (0,)
    assert black_scores(adapter, zeros, zeros, [], 8).shape == (0,)


@pytest.mark.parametrize("case", ["llama", "untied", "qwen2"])
def test_a_canarys_gradient_is_long_and_its_own(
    open_adapter: Open, model_config: Callable[[str], ModelConfig], random_vector: RandomVector,
    make_units: MakeUnits, case: str,
) -> None:  # fmt: skip
    """A clip that shortens most records shortens every canary to its full length, too; and few lie in one direction."""
    adapter = open_adapter(case)
    adapter.load(random_vector(adapter))
    canaries = np.array([gradient_of(adapter, unit) for unit in make_canaries(SEED, 40, model_config(case), 259)])
    records = np.array([gradient_of(adapter, unit) for unit in make_units(case, sizes=(1,) * 40)])
    lengths = np.linalg.norm(canaries, axis=1)
    assert np.median(lengths) > 1.5 * np.median(np.linalg.norm(records, axis=1))
    directions = canaries / lengths[:, None]
    along = (directions @ directions.T)[~np.eye(40, dtype=bool)]
    assert np.sqrt(np.mean(along**2)) < 0.35  # in about 100 dimensions that such small models have for it


@pytest.mark.parametrize("case", ["llama", "bert-mean"])
@pytest.mark.parametrize(
    "mechanism",
    [Mechanism(CLIP, 1.0, 0.5), Mechanism(CLIP, 1.0, 0.5, "automatic"), Mechanism(CLIP, 0.0, 0.5)],
    ids=["flat", "automatic", "off"],
)
def test_a_white_score_is_the_step_along_the_clipped_descent(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, case: str, mechanism: Mechanism
) -> None:
    """In the order of the units, whatever their lengths and records."""
    adapter, units = open_adapter(case), make_units(case, sizes=(1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1))
    start = random_vector(adapter)
    step = np.random.default_rng(1).normal(size=start.size).astype(np.float32)
    adapter.load(start)
    expected = []
    for unit in units:
        own = gradient_of(adapter, unit)
        expected.append(-float(own @ step) * float(mechanism.factors(np.linalg.norm(own))))
    adapter.load(adapter.initial)
    found = white_scores(Engine(adapter), adapter, start, step, units, mechanism, 4)
    assert found.dtype == np.float64
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_unit_without_a_finite_gradient_scores_nothing(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = open_adapter("llama")
    engine, units, start = Engine(adapter), make_units(sizes=(1,) * 5), random_vector(adapter)
    mechanism = Mechanism(CLIP, 1.0, 0.5)
    honest = white_scores(engine, adapter, start, start, units, mechanism, 8)
    gradients = engine.pass_gradients

    def spoilt(*arguments: object) -> torch.Tensor:
        own = gradients(*arguments)  # type: ignore[arg-type]
        own[1], own[3] = torch.nan, torch.inf
        return own

    monkeypatch.setattr(engine, "pass_gradients", spoilt)
    found = white_scores(engine, adapter, start, start, units, mechanism, 8)
    assert found.tolist() == [honest[0], 0.0, honest[2], 0.0, honest[4]]


def test_one_round_in_which_a_unit_stands_out_outweighs_many_in_which_nobody_does() -> None:
    """Of 2,000 runs of nine rounds at q = 0.1, the sum of scores is surer of fewer of those that are in."""
    generator, rate, units = np.random.default_rng(0), 0.1, 2000
    coins = generator.integers(0, 2, units)
    rounds = 3.0 * coins * (generator.random((9, units)) < rate) + generator.normal(size=(9, units))
    sums = rounds.sum(axis=0)
    weighed = np.sum([drawn_in_a_round(scores, rate) for scores in rounds], axis=0)
    right = [coins[np.argsort(-scores)[:300]].mean() for scores in (sums, weighed)]
    assert right[1] > right[0] + 0.05


def test_where_everybody_is_drawn_the_scores_add_up() -> None:
    scores = np.random.default_rng(0).normal(3, 7, 50)
    assert np.array_equal(np.argsort(drawn_in_a_round(scores, 1.0)), np.argsort(scores))
    z = (scores - scores.mean()) / scores.std()
    assert drawn_in_a_round(scores, 1.0) == pytest.approx(2 * z - 2)
    for nothing in (np.zeros(0), np.zeros(1), np.full(4, 2.5)):
        assert drawn_in_a_round(nothing, 0.5).tolist() == [0.0] * len(nothing)
    assert np.isfinite(drawn_in_a_round(np.array([1e76, -1e76, *[0.0] * 500]), 1.0)).all()


@pytest.mark.parametrize("case", ["llama", "bert-native"])
def test_a_black_score_is_what_the_loss_fell_by(
    open_adapter: Open, model_config: Callable[[str], ModelConfig], random_vector: RandomVector, case: str
) -> None:
    adapter = open_adapter(case)
    units, end = make_canaries(SEED, 11, model_config(case), 259), random_vector(adapter)
    losses = []
    for values in (adapter.initial, end):
        adapter.load(values)
        losses.append(np.array([float(loss_of(adapter, unit).detach()) for unit in units]))
    found = black_scores(adapter, adapter.initial, end, units, 4)
    assert found.dtype == np.float64
    assert found == pytest.approx(losses[0] - losses[1], rel=1e-4, abs=1e-5)
