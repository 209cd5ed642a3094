"""Held-out scores are the model's own, whatever the batches, and no diverged adapter gets one."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedllm.config import DataConfig, ModelConfig
from fedllm.errors import ModelError
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import OsRandomness
from fedllm.training.adapter import AdapterModel
from fedllm.training.data import Tokeniser, build_units
from fedllm.training.engine import Engine
from fedllm.training.evaluation import Evaluator

Open = Callable[..., AdapterModel]
MakeConfig = Callable[[str], ModelConfig]
RandomVector = Callable[[AdapterModel], NDArray[np.float32]]
ROWS = [
    {"question": "q", "answer": "short"},
    {"question": "한도를 올리려면 어떻게", "answer": "앱에서"},
    {"question": "a longer question than that?", "answer": "an answer"},
    {"question": "", "answer": "x"},
    {"question": "hardly an answer", "answer": "."},
]
LABELLED = [
    {"text": "good " * n, "label": label} for n, label in enumerate(("긍정", "부정", "중립", "긍정", "긍정"), 1)
]
CAUSAL = DataConfig(train="unused", prompt="{question} ", text="{answer}", samples=3)
CLASSIFICATION = DataConfig(train="unused", text="{text}", label="label")


def evaluator_of(
    adapter: AdapterModel, config: ModelConfig, rows: Sequence[dict[str, Any]] = ROWS, data: DataConfig = CAUSAL,
    micro_batch: int = 2,
) -> Evaluator:  # fmt: skip
    table = list(rows)
    return Evaluator(adapter, table, Tokeniser(adapter.tokenizer, config, data), data, micro_batch)


@pytest.mark.parametrize("case", ["llama", "gemma2", "untied"])
def test_perplexity_is_that_of_the_models_own_loss(
    open_adapter: Open, model_config: MakeConfig, random_vector: RandomVector, case: str
) -> None:
    adapter, config = open_adapter(case), model_config(case)
    vector = random_vector(adapter)
    score = evaluator_of(adapter, config).score(vector)
    adapter.load(vector)
    total = count = 0.0
    tokeniser = Tokeniser(adapter.tokenizer, config, CAUSAL)
    for number, row in enumerate(ROWS):
        record = tokeniser(row, number)
        labels = torch.from_numpy(record.labels)[None]
        with torch.no_grad():
            loss = adapter.model(input_ids=torch.from_numpy(record.input_ids)[None], labels=labels).loss
        labelled = int((labels[0, 1:] != -100).sum())
        total += float(loss) * labelled
        count += labelled
    assert score.loss == pytest.approx(total / count, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert score.accuracy is None


@pytest.mark.parametrize("case", ["bert-native", "bert-mean", "llama-native"])
def test_accuracy_is_the_share_of_records_that_are_right(
    open_adapter: Open, model_config: MakeConfig, random_vector: RandomVector, case: str
) -> None:
    adapter, config = open_adapter(case), model_config(case)
    vector = random_vector(adapter)
    score = evaluator_of(adapter, config, LABELLED, CLASSIFICATION).score(vector)
    adapter.load(vector)
    losses, right = [], 0
    for row in LABELLED:
        ids = torch.tensor(adapter.tokenizer(row["text"])["input_ids"])[None]
        with torch.no_grad():
            logits = adapter.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
        index = config.labels.index(row["label"])
        losses.append(float(torch.logsumexp(logits, 0) - logits[index]))
        right += int(logits.argmax()) == index
    assert score.accuracy == right / len(LABELLED)
    assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert score.perplexity is None


@pytest.mark.parametrize(("case", "rows", "data"), [("llama", ROWS, CAUSAL), ("bert-mean", LABELLED, CLASSIFICATION)])
def test_padding_and_batches_do_not_change_a_score(
    open_adapter: Open, model_config: MakeConfig, random_vector: RandomVector, case: str, rows: Any, data: DataConfig
) -> None:
    adapter, config = open_adapter(case), model_config(case)
    vector = random_vector(adapter)
    scores = [evaluator_of(adapter, config, rows, data, micro_batch).score(vector) for micro_batch in (1, 2, 3, 100)]
    for score in scores[1:]:
        assert score.loss == pytest.approx(scores[0].loss, rel=1e-5)
        assert score.accuracy == scores[0].accuracy


def test_padding_and_batches_do_not_change_an_answer(
    open_adapter: Open, model_config: MakeConfig, random_vector: RandomVector
) -> None:
    adapter, config = open_adapter("llama"), model_config("llama")
    vector = random_vector(adapter)
    data = CAUSAL.model_copy(update={"samples": len(ROWS)})
    answers = [
        [sample.answer[:3] for sample in evaluator_of(adapter, config, ROWS, data, micro_batch).exact_match(vector)[1]]
        for micro_batch in (1, 2, 100)  # a larger batch may go on for longer, so the beginnings are compared
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(("case", "rows", "data"), [("llama", ROWS, CAUSAL), ("bert-mean", LABELLED, CLASSIFICATION)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_adapter_that_is_not_finite_gets_an_error_and_no_score(
    open_adapter: Open, model_config: MakeConfig, case: str, rows: Any, data: DataConfig, bad: float
) -> None:
    adapter = open_adapter(case)
    evaluator = evaluator_of(adapter, model_config(case), rows, data)
    with pytest.raises(ModelError, match="diverged"):
        evaluator.score(np.full_like(adapter.initial, bad))
    assert math.isfinite(evaluator.score(adapter.initial).loss)


def test_a_score_is_of_the_given_values_and_not_of_those_in_the_model(
    open_adapter: Open, model_config: MakeConfig, random_vector: RandomVector
) -> None:
    adapter = open_adapter("llama")
    evaluator = evaluator_of(adapter, model_config("llama"))
    first = evaluator.score(adapter.initial)
    other = evaluator.score(random_vector(adapter))
    assert other.loss != first.loss
    assert evaluator.score(adapter.initial) == first


def test_a_model_that_knows_its_answers_by_heart_matches_them_exactly(
    open_adapter: Open, model_config: MakeConfig
) -> None:
    rows = [{"question": "one", "answer": "abc"}, {"question": "two", "answer": "xyz"}]
    adapter, config = open_adapter("untied", rank=8, alpha=16.0), model_config("untied")
    evaluator = evaluator_of(adapter, config, rows)
    rate, _ = evaluator.exact_match(adapter.initial)
    assert rate == 0.0

    engine = Engine(adapter)
    adapter.load(adapter.initial)
    units = build_units(rows, Tokeniser(adapter.tokenizer, config, CAUSAL), None, 1)
    optimizer = engine.optimizer(
        torch.optim.Adam([adapter.flat], lr=0.02), Mechanism(1.0, 0.0, 1.0), 2.0, OsRandomness()
    )
    for _ in range(60):
        engine.step(optimizer, units, 8)
    rate, samples = evaluator.exact_match(adapter.vector())
    shown = {(sample.prompt, sample.expected, sample.answer) for sample in samples}
    assert shown == {("one ", "abc", "abc"), ("two ", "xyz", "xyz")}
    assert rate == 1.0
    assert evaluator.score(adapter.vector()).loss < 1.0  # of ln 259 = 5.6


@pytest.mark.parametrize("wanted", [0, 1, 2, 5, 9])
def test_as_many_samples_are_shown_as_asked_for(open_adapter: Open, model_config: MakeConfig, wanted: int) -> None:
    adapter = open_adapter("llama")
    data = CAUSAL.model_copy(update={"samples": wanted})
    _, samples = evaluator_of(adapter, model_config("llama"), ROWS, data).exact_match(adapter.initial)
    assert len(samples) == min(wanted, len(ROWS))
    assert len({(sample.prompt, sample.expected) for sample in samples}) == len(samples)


def test_only_a_prompted_language_model_answers(open_adapter: Open, model_config: MakeConfig) -> None:
    assert evaluator_of(open_adapter("llama"), model_config("llama")).generates
    plain = DataConfig(train="unused", text="{answer}")
    assert not evaluator_of(open_adapter("llama"), model_config("llama"), ROWS, plain).generates
    case = "bert-mean"
    assert not evaluator_of(open_adapter(case), model_config(case), LABELLED, CLASSIFICATION).generates


def test_a_prompt_as_long_as_the_model_leaves_room_for_an_answer(open_adapter: Open, model_config: MakeConfig) -> None:
    adapter = open_adapter("llama")  # 128 positions
    rows = [{"question": "q" * 300, "answer": "a" * 10}, {"question": "q", "answer": "a" * 300}]
    rate, _ = evaluator_of(adapter, model_config("llama"), rows).exact_match(adapter.initial)
    assert rate == 0.0


def test_evaluation_leaves_the_engine_able_to_train(open_adapter: Open, model_config: MakeConfig) -> None:
    adapter, config = open_adapter("llama"), model_config("llama")
    engine = Engine(adapter)
    evaluator = evaluator_of(adapter, config)
    before = evaluator.score(adapter.initial)
    units = build_units(ROWS, Tokeniser(adapter.tokenizer, config, CAUSAL), None, 1)
    optimizer = engine.optimizer(torch.optim.SGD([adapter.flat], lr=0.5), Mechanism(1.0, 0.0, 1.0), 5.0, OsRandomness())
    for _ in range(5):
        engine.step(optimizer, units, 8)
    assert evaluator.score(adapter.vector()).loss < before.loss
