"""Metrics of units are the model's own, unit by unit, and no company changes a bit of them."""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedllm.config import AdapterConfig, DataConfig, ModelConfig
from fedllm.errors import ModelError, SpecMismatch
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.metrics import layout_of
from fedllm.privacy.randomness import OsRandomness
from fedllm.training import unit_metrics as module
from fedllm.training.adapter import AdapterModel, attach, generated
from fedllm.training.data import IGNORE, Batch, Example, PrivacyUnit, Tokeniser, build_units, collate, read_table
from fedllm.training.engine import Engine
from fedllm.training.evaluation import Evaluator
from fedllm.training.losses import record_losses
from fedllm.training.model import load_base
from fedllm.values import parse
from tests.fedllm.training.conftest import conv1d

CASES = ["llama", "gpt2", "gemma2", "untied", "bert-native", "bert-mean", "llama-native"]

Open = Callable[..., AdapterModel]
MakeConfig = Callable[[str], ModelConfig]
MakeUnits = Callable[..., list[PrivacyUnit]]
RandomVector = Callable[[AdapterModel], NDArray[np.float32]]

_engines: "weakref.WeakKeyDictionary[AdapterModel, Engine]" = weakref.WeakKeyDictionary()


def unit_metrics(
    adapter: AdapterModel, vector: NDArray[np.float32], units: Sequence[PrivacyUnit], micro_batch: int = 64
) -> NDArray[np.float64]:
    engine = _engines.get(adapter) or _engines.setdefault(adapter, Engine(adapter))
    return module.unit_metrics(engine, vector, units, micro_batch)


def slow_metrics(adapter: AdapterModel, unit: PrivacyUnit) -> list[float]:
    """Return a unit's metrics from plain logits of each record, unpadded."""
    rows = []
    for record in unit:
        ids = torch.from_numpy(record.input_ids)[None]
        with torch.no_grad():
            scores = adapter.logits(ids, torch.ones_like(ids))[0].double()
        if adapter.classifies:
            label = int(record.labels)
            rows.append([float(int(scores.argmax()) == label), float(-scores.log_softmax(-1)[label])])
            continue
        places = [t for t in range(1, len(record.labels)) if record.labels[t] != IGNORE]
        losses = [float(-scores[t - 1].log_softmax(-1)[int(record.labels[t])]) for t in places]
        right = all(int(scores[t - 1].argmax()) == int(record.labels[t]) for t in places)
        rows.append([sum(losses) / len(losses), float(right)])
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@conv1d
@pytest.mark.parametrize("case", CASES)
def test_a_units_metrics_are_the_mean_over_its_records(
    open_adapter: Open, model_config: MakeConfig, make_units: MakeUnits, random_vector: RandomVector, case: str
) -> None:
    adapter, units = open_adapter(case), make_units(case)
    vector = random_vector(adapter)
    found = unit_metrics(adapter, vector, units)
    adapter.load(vector)
    assert found == pytest.approx(np.array([slow_metrics(adapter, unit) for unit in units]), rel=1e-4, abs=1e-6)
    assert found.shape == (len(units), len(layout_of(model_config(case), adapter.vocabulary).names))


@conv1d
@pytest.mark.parametrize(
    ("case", "options"),
    [
        *((case, {}) for case in CASES),
        ("llama", {"dtype": "bfloat16"}),
        ("llama", {"quantize": "int8"}),
        *(("llama", {"method": method, "train": "B", "tokens": 4}) for method in ("prompt", "prefix", "ptuning")),
    ],
)
def test_company_changes_no_bit(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, case: str, options: dict[str, Any]
) -> None:
    if "method" in options:
        options = {**options, "rank": 8, "alpha": 16.0}
    adapter, units = open_adapter(case, **options), make_units(case, sizes=(1, 3, 1, 2, 1, 1, 1))
    vector = random_vector(adapter)
    together = unit_metrics(adapter, vector, units)
    assert np.isfinite(together).all()
    assert np.array_equal(unit_metrics(adapter, vector, units[::-1])[::-1], together)
    for unit, own in zip(units, together, strict=True):
        assert np.array_equal(unit_metrics(adapter, vector, [unit])[0], own)


def test_how_many_units_are_held_at_a_time_changes_no_bit(
    open_adapter: Open, make_units: MakeUnits, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, units = open_adapter("llama"), make_units(sizes=(1, 3, 1, 2, 1, 1, 1))
    units.append(units[0])  # the same once more
    together = unit_metrics(adapter, adapter.initial, units)
    monkeypatch.setattr(module, "_UNITS", 2)
    assert np.array_equal(unit_metrics(adapter, adapter.initial, units), together)


def test_the_loss_is_the_one_that_is_trained(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector
) -> None:
    adapter, units = open_adapter("llama"), make_units(sizes=(1, 1, 1))
    vector = random_vector(adapter)
    found = unit_metrics(adapter, vector, units)
    adapter.load(vector)
    for unit, (loss, _) in zip(units, found, strict=True):
        batch = collate([unit], 0, adapter.device, len(unit[0].input_ids))
        assert loss == pytest.approx(float(record_losses(adapter, batch).detach()[0]), rel=1e-5)


@pytest.mark.parametrize("at_a_time", [1, 259, 259 * 3])
def test_a_long_answers_logits_are_taken_a_few_at_a_time(
    open_adapter: Open, make_units: MakeUnits, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    adapter, units = open_adapter("llama"), make_units()
    whole = unit_metrics(adapter, adapter.initial, units)
    monkeypatch.setattr(module, "_LOGITS", at_a_time)
    assert unit_metrics(adapter, adapter.initial, units) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_exact_match_is_that_of_greedy_decoding_on_the_demo(method: str) -> None:
    """Of answers that the model itself gives, whole or with one token exchanged."""
    model = ModelConfig(source="pkg://simulations.demo/base", max_length=96, dtype="float32")
    data = DataConfig(train="unused", prompt="Q: {question}\nA:", text=" {answer}")
    adapter = attach(load_base(model, "cpu"), model, parse(AdapterConfig, {"method": method}), 0)
    tokeniser = Tokeniser(adapter.tokenizer, model, data, adapter.vocabulary)
    table = read_table("pkg://simulations.demo/data/heldout.jsonl", "test")
    units, expected = [], []
    for number in range(8):
        prompt = tokeniser.prompt_ids(table[number], number)
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            answer = generated(
                adapter.model,
                ids,
                torch.ones_like(ids),
                max_new_tokens=8,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )[0].tolist()
        for place in (None, number):
            told = list(answer)
            if place is not None:
                told[place] = (told[place] + 1) % adapter.vocabulary
            labels = [IGNORE] * len(prompt) + told
            units.append((Example(np.array(prompt + told), np.array(labels)),))
            expected.append(float(place is None))
    assert unit_metrics(adapter, adapter.initial, units)[:, 1].tolist() == expected


def test_a_model_that_knows_its_answers_by_heart_matches_them_exactly_and_evaluation_agrees(
    open_adapter: Open, model_config: MakeConfig
) -> None:
    rows = [{"question": "one", "answer": "abc"}, {"question": "two", "answer": "xyz"}]
    data = DataConfig(train="unused", prompt="{question} ", text="{answer}", samples=4)
    adapter, config = open_adapter("untied", rank=8, alpha=16.0), model_config("untied")
    tokeniser, engine = Tokeniser(adapter.tokenizer, config, data), Engine(adapter)
    units = build_units(rows, tokeniser, None, 1)
    optimizer = engine.optimizer(
        torch.optim.Adam([adapter.flat], lr=0.02), Mechanism(1.0, 0.0, 1.0), 2.0, OsRandomness()
    )
    for _ in range(60):
        engine.step(optimizer, units, 8)
    table = [*rows, {"question": "one", "answer": "abd"}]
    vector = adapter.vector()
    found = unit_metrics(adapter, vector, build_units(table, tokeniser, None, 1))
    assert found[:, 1].tolist() == [1.0, 1.0, 0.0]
    assert Evaluator(adapter, table, tokeniser, data, 2).exact_match(vector)[0] == pytest.approx(found[:, 1].mean())


def classified(label: int) -> Example:
    return Example(np.array([5, 6, 7]), np.asarray(label))


@pytest.mark.parametrize("case", ["bert-mean", "bert-native", "llama-native"])
def test_with_more_than_five_labels_the_first_five_count_too(
    model_config: MakeConfig, random_vector: RandomVector, case: str
) -> None:
    labels = ("a", "b", "c", "d", "e", "f", "g")
    config = model_config(case).model_copy(update={"labels": labels, "dtype": "float32"})
    adapter = attach(load_base(config, "cpu"), config, AdapterConfig(rank=2), 0)
    found = unit_metrics(adapter, random_vector(adapter), [(classified(label),) for label in range(7)])
    assert found.shape == (7, len(layout_of(config, adapter.vocabulary).names))
    assert found[:, 0].sum() == 1
    assert found[:, 2].sum() == 5
    by_loss = found[found[:, 1].argsort()]  # of one text: the likelier a class, the smaller its loss
    assert by_loss[:, 0].tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert by_loss[:, 2].tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert unit_metrics(adapter, adapter.initial, []).shape == (0, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_makes_the_unit_the_worst(
    open_adapter: Open, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    adapter = open_adapter("bert-mean")
    answers = iter([[bad, 1, 1], [9.0, 0, 0], [9.0, 0, 0]])
    monkeypatch.setattr(module, "logits", lambda *_: torch.tensor([next(answers)]))
    units = [(classified(0), classified(0)), (classified(0),)]
    found = unit_metrics(adapter, adapter.initial, units, micro_batch=1)
    assert np.isnan(found[0]).all()
    assert found[1, 0] == 1


def test_an_adapter_that_is_not_finite_is_the_worst(open_adapter: Open, make_units: MakeUnits) -> None:
    adapter, units = open_adapter("llama"), make_units()
    found = unit_metrics(adapter, np.full_like(adapter.initial, np.nan), units)
    assert found.shape == (len(units), 2)
    assert np.isnan(found).all()
    assert np.isfinite(unit_metrics(adapter, adapter.initial, units)).all()


def test_units_without_a_label_or_that_fail_are_left_out_and_change_nothing_for_others(
    open_adapter: Open, make_units: MakeUnits, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, units = open_adapter("llama"), make_units()
    right = unit_metrics(adapter, adapter.initial, units)
    silent = Example(np.arange(3, 9), np.full(6, IGNORE))
    some = [(), *units[:2], (silent,), (silent, *units[2]), *units[3:]]
    assert np.array_equal(unit_metrics(adapter, adapter.initial, some), right)
    honest, sick = module.labelled_states, torch.from_numpy(units[1][-1].input_ids)

    def fails(adapter: AdapterModel, batch: Batch) -> Any:
        if any(torch.equal(ids[: len(sick)], sick) for ids in batch.input_ids):
            raise RuntimeError("out of memory")
        return honest(adapter, batch)

    monkeypatch.setattr(module, "labelled_states", fails)
    assert np.array_equal(unit_metrics(adapter, adapter.initial, units), np.delete(right, 1, axis=0))


def test_a_model_that_fails_is_an_error(
    open_adapter: Open, make_units: MakeUnits, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = open_adapter("llama")

    def fails(*_: Any) -> Any:
        raise ModelError("no such layer")

    monkeypatch.setattr(module, "labelled_states", fails)
    with pytest.raises(ModelError, match="no such layer"):
        unit_metrics(adapter, adapter.initial, make_units())
    with pytest.raises(SpecMismatch):
        unit_metrics(adapter, adapter.initial[:-1], make_units())


@pytest.mark.parametrize(("case", "metrics"), [("llama", 2), ("bert-mean", 2)])
def test_no_unit_makes_no_row(open_adapter: Open, case: str, metrics: int) -> None:
    adapter = open_adapter(case)
    assert unit_metrics(adapter, adapter.initial, []).shape == (0, metrics)
