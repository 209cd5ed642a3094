"""Releases side by side on public records: right figures, honest intervals, and a page that shows what was said."""

import hashlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jinja2 import Template
from pyarrow import Table, parquet
from sacrebleu.metrics.chrf import CHRF
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

import conf
from fedllm.audit.trust import Trust
from fedllm.cli.main import app
from fedllm.config import AdapterConfig, HeldoutConfig, ModelConfig, TextConfig
from fedllm.crypto.identity import Identity
from fedllm.errors import ConfigError, DataError, FedllmError, ReleaseError
from fedllm.release import evaluate as work
from fedllm.release.evaluate import OWN, Answer, Evaluation, evaluate, read_records, tells
from fedllm.release.evaluation_page import render_html, text_of
from fedllm.release.loading import load_release
from fedllm.release.manifest import Base, Manifest, digests, manifest_digest, sign_release, verify_release
from fedllm.settings_file import read_settings
from fedllm.training.adapter import attach
from fedllm.training.data import Tokeniser, read_table
from fedllm.training.evaluation import Evaluator
from fedllm.training.model import load_base
from tests.conftest import byte_tokenizer, save_llama
from tests.fedllm.audit.test_report import Page
from tests.fedllm.release.conftest import a_manifest, keys_of
from tests.korean import english_words

Write = Callable[[str, list[dict[str, Any]]], Path]
LABELS = ("긍정", "부정", "중립")
ROWS: list[dict[str, Any]] = [
    {"question": "창구 번호는?", "answer": "3번 창구"},
    {"question": "how long?", "answer": "four days"},
    {"question": "a longer question than the others, is it not?", "answer": "yes"},
    {"question": "", "answer": "no question, and an answer that is longer than the others are"},
]
LABELLED = [{"text": "good " * n, "label": LABELS[n % 2]} for n in range(1, 6)]


@dataclass(frozen=True)
class Place:
    """Some releases that one head office has signed."""

    folder: Path
    key: Path
    keys: Path

    @property
    def trust(self) -> Trust:
        return Trust.read(self.keys)

    def sign(self, folder: Path, base: Path, **changes: Any) -> Path:
        """Sign a folder as a release that was made from a base."""
        task = {"source": str(base), "max_length": 64}
        if "labels" in changes:
            task |= {"task": "classification", "labels": changes["labels"]}
        digest = load_base(ModelConfig(**task), "cpu").digest
        named = Base(source=str(base), revision=None, digest=digest)
        manifest = a_manifest(base, **{"base": named, **changes}) if "labels" not in changes else None
        if manifest is None:
            some = (
                save_llama(self.folder / "unused") if not (self.folder / "unused").exists() else self.folder / "unused"
            )
            manifest = a_manifest(some, task="classification", reading=TextConfig(text="{text}", label="label"),
                                  **{"base": named, **changes})  # fmt: skip
        sign_release(folder, manifest, Identity.read(self.key))
        return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("releases")
    return Place(folder, *keys_of(folder))


@pytest.fixture(scope="session")
def base(place: Place) -> Path:
    return save_llama(place.folder / "base")


@pytest.fixture(scope="session")
def merged(place: Place, base: Path) -> Path:
    return place.sign(save_llama(place.folder / "merged", seed=1), base)


@pytest.fixture(scope="session")
def other(place: Place, base: Path) -> Path:
    return place.sign(save_llama(place.folder / "other", seed=2), base, form="merged", name="other")


@pytest.fixture(scope="session")
def classifier(place: Place) -> Path:
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=0, num_labels=3, id2label=dict(enumerate(LABELS)),
    )  # fmt: skip
    folders = place.folder / "bert", place.folder / "classifier"
    for folder in folders:
        BertForSequenceClassification(config).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return place.sign(folders[1], folders[0], labels=LABELS)


def quiet(_: str) -> None:
    """Say nothing."""


def run(
    place: Place, data: Path, *folders: Path, prompts: Path | None = None, limit: int = 1000, say: work.Say = quiet
) -> Evaluation:
    return evaluate(folders, str(data), place.trust, prompts, limit, say)


@pytest.fixture(scope="session")
def data(place: Place) -> Path:
    path = place.folder / "public.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return path


@pytest.fixture(scope="session")
def prompts(place: Place) -> Path:
    path = place.folder / "prompts.yaml"
    path.write_text('bare: "{question}"\nlong:\n  prompt: "Please answer: {question}\\n"\n', "utf-8")
    return path


@pytest.fixture(scope="session")
def found(place: Place, data: Path, merged: Path, prompts: Path) -> Evaluation:
    """A release beside its base, and two prompts beside its own."""
    return run(place, data, merged, prompts=prompts)


@pytest.fixture
def without_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes most of the time of a page."""
    monkeypatch.setattr("fedllm.release.evaluation_page.font_face", lambda page: "")


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_libraries_and_of_the_models_own_loss(
    place: Place, merged: Path, found: Evaluation
) -> None:
    assert [model.name for model in found.models] == ["base", "merged"]
    release = load_release(merged, verify_release(merged, place.trust))
    model = AutoModelForCausalLM.from_pretrained(merged)
    total = count = 0.0
    for number, row in enumerate(ROWS):
        record = release.tokeniser(row, number)
        labels = torch.from_numpy(record.labels)[None]
        with torch.no_grad():
            loss = float(model(input_ids=torch.from_numpy(record.input_ids)[None], labels=labels).loss)
        labelled = int((labels[0, 1:] != -100).sum())
        total, count = total + loss * labelled, count + labelled
    scores = found.model("merged").scores
    answers = [answer.answers[1] for answer in found.answers]
    expected = [row["answer"] for row in ROWS]
    assert scores["perplexity"][0] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert scores["chrf"][0] == pytest.approx(CHRF().corpus_score(answers, [expected]).score)
    assert scores["exact_match"][0] == np.mean([a == e for a, e in zip(answers, expected, strict=True)])
    assert [answer.expected for answer in found.answers] == expected


def test_answers_are_the_releases_own(place: Place, merged: Path, found: Evaluation) -> None:
    release = load_release(merged, verify_release(merged, place.trust))
    alone = [release.answers(release.prompts([row]), 8)[0] for row in ROWS]
    assert [answer.answers[1][:4] for answer in found.answers] == [answer[:4] for answer in alone]


def test_a_classifiers_scores_are_its_share_of_right_classes_and_the_mean_of_their_f1(
    place: Place, classifier: Path, write_jsonl: Write
) -> None:
    found = run(place, write_jsonl("public.jsonl", LABELLED), classifier)
    release = load_release(classifier, verify_release(classifier, place.trust))
    said = []
    for row in LABELLED:
        ids = torch.tensor(release.tokenizer(row["text"])["input_ids"])[None]
        with torch.no_grad():
            said.append(LABELS[int(release.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.argmax())])
    truth = [row["label"] for row in LABELLED]
    scores = found.models[-1].scores
    assert scores["accuracy"][0] == pytest.approx(np.mean([a == b for a, b in zip(truth, said, strict=True)]))
    assert scores["macro_f1"][0] == pytest.approx(macro_f1(truth, said))
    assert [note.code for note in found.notes] == ["few", "no_record"]
    assert found.notes[1].values == {"labels": "중립"}
    assert [model.kind for model in found.models] == ["base", "merged"]


def macro_f1(truth: Sequence[str], said: Sequence[str]) -> float:
    """By precision and recall, as scikit-learn computes average="macro"."""
    values = []
    for label in {*truth, *said}:
        hits = sum(t == s == label for t, s in zip(truth, said, strict=True))
        precision, recall = hits / max(1, said.count(label)), hits / max(1, truth.count(label))
        values.append(0.0 if hits == 0 else 2 * precision * recall / (precision + recall))
    return float(np.mean(values))


@pytest.mark.parametrize("classes", [2, 5])
def test_macro_f1_leaves_out_only_classes_that_nobody_named(classes: int) -> None:
    random = np.random.default_rng(7)
    for _ in range(20):
        truth = [f"c{i}" for i in random.integers(classes, size=9)]
        said = [f"c{i}" for i in random.integers(classes, size=9)]
        found = made_up(truth, said)
        assert work._measures(found, "classification")["macro_f1"](np.arange(9)) == pytest.approx(macro_f1(truth, said))


def made_up(expected: Sequence[str], answers: Sequence[str], losses: Sequence[float] = ()) -> work._Found:
    """Return what a model might have said."""
    some = np.array(losses or [1.0] * len(expected))
    return work._Found(np.full(len(expected), 4), some, list(expected), list(expected), list(answers))


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    random, hits = np.random.default_rng(1), 0
    for _ in range(200):
        right = random.random(120) < 0.6
        drawn = work._drawn([lambda some, right=right: float(right[some].mean())], 120, 300)
        _, low, high = work._estimate(drawn[:, 0])
        hits += low <= 0.6 <= high
    assert 180 <= hits <= 200  # 95 % of 200, less what chance takes in one of 1000 such tests


def test_two_models_see_the_same_resamples_so_that_equal_ones_do_not_differ() -> None:
    expected = [f"answer {n}" for n in range(40)]
    half = [text if n % 2 else "wrong" for n, text in enumerate(expected)]
    one, same, better = work._drawn_all(
        [made_up(expected, half), made_up(expected, half), made_up(expected, expected)], "causal-lm", 200
    )
    for metric, values in one.items():
        assert (values == same[metric]).all()
    assert tells(work._estimate(better["exact_match"] - one["exact_match"]))


def test_the_same_call_finds_the_same(place: Place, merged: Path, data: Path, found: Evaluation) -> None:
    again = run(place, data, merged)
    assert (again.models, again.differences, again.answers) == (found.models, found.differences, found.answers)


def test_a_release_is_held_against_its_base_and_further_ones_against_the_first(
    place: Place, merged: Path, other: Path, data: Path
) -> None:
    found = run(place, data, merged, other)
    first, second = (f"merged {folder}" for folder in (merged, other))
    assert [model.name for model in found.models] == ["base", first, second]
    assert [(each.name, each.against) for each in found.differences] == [(first, "base"), (second, first)]
    for each in found.differences:
        for metric, (value, low, high) in each.scores.items():
            a, b = (found.model(name).scores[metric][0] for name in (each.name, each.against))
            assert value == pytest.approx(a - b)
            assert low <= high
    assert found.models[1].digest == manifest_digest(merged)
    assert (found.models[1].epsilon, found.models[1].private) == (2.5, True)
    assert found.models[0].private is None


def test_a_base_that_is_not_here_or_is_another_one_is_said(
    place: Place, merged: Path, base: Path, data: Path, tmp_path: Path, without_fonts: None
) -> None:
    lost, bent = tmp_path / "lost", tmp_path / "bent"
    for folder, source in ((lost, base / "none"), (bent, merged)):
        shutil.copytree(merged, folder)
        manifest = verify_release(merged, place.trust)
        named = manifest.base.model_copy(update={"source": str(source)})
        sign_release(folder, manifest.model_copy(update={"base": named}), Identity.read(place.key))
        found = run(place, data, folder)
        assert [note.code for note in found.notes] == ["few", "no_base" if folder == lost else "other_base"]
        assert [model.kind for model in found.models] == ["merged"]
        assert found.differences == ()
        assert "merged" in render_html(found, "en")


def test_a_model_that_is_not_private_or_was_taught_on_the_very_file_is_said(
    place: Place, merged: Path, base: Path, data: Path, tmp_path: Path, without_fonts: None
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(merged, folder)
    claim = verify_release(merged, place.trust).privacy.model_copy(update={"mode": "off", "epsilon": None})
    taught = hashlib.sha256(data.read_bytes()).hexdigest()
    place.sign(folder, base, form="student", teacher="5" * 64, public_data=(taught,), privacy=claim)
    found = run(place, data, folder)
    assert {note.code for note in found.notes} == {"taught", "not_private", "few"}
    for page in (render_html(found, "en"), render_html(found, "ko")):
        assert text_of("en", "claim.none") in page or text_of("ko", "claim.none") in page


def test_bare_texts_have_a_perplexity_and_no_answers(
    place: Place, merged: Path, base: Path, write_jsonl: Write, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(merged, folder)
    place.sign(folder, base, reading=TextConfig(text="{text}"))
    found = run(place, write_jsonl("public.jsonl", [{"text": f"한 문장 {n}"} for n in range(40)]), folder)
    assert list(found.models[0].scores) == ["perplexity"]
    assert (found.answers, found.notes) == ((), ())
    assert text_of("ko", "answers") not in render_html(found, "ko")


CONVERSATIONS = [
    {"messages": [{"role": "user", "content": f"{n}번?"}, {"role": "assistant", "content": f"창구 {n}"}]}
    for n in range(3)
]


def test_a_conversation_is_asked_through_its_template_and_only_its_system_turn_can_be_changed(
    place: Place, merged: Path, base: Path, write_jsonl: Write, tmp_path: Path
) -> None:
    folder, data, prompts = tmp_path / "chat", write_jsonl("public.jsonl", CONVERSATIONS), tmp_path / "prompts.yaml"
    shutil.copytree(merged, folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    place.sign(folder, base, reading=TextConfig(messages="messages"))
    prompts.write_text("kind: {system: 짧게}", "utf-8")
    found = run(place, data, folder, prompts=prompts)
    assert [(answer.prompt, answer.expected) for answer in found.answers] == [
        (f"{n}번?", f"창구 {n}") for n in range(3)
    ]
    assert {prompt.name: prompt.system for prompt in found.prompts} == {OWN: None, "kind": "짧게"}
    one, two = (prompt.scores["perplexity"][0] for prompt in found.prompts)
    assert one != two
    prompts.write_text("short: '{question}'", "utf-8")
    with pytest.raises(ConfigError, match="only `system` can be changed"):
        run(place, data, folder, prompts=prompts)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_an_adapter_of_virtual_tokens_is_scored_and_answers_as_in_training(
    place: Place, base: Path, data: Path, tmp_path: Path, method: Any
) -> None:
    config = ModelConfig(source=str(base), max_length=64)
    adapter = attach(load_base(config, "cpu"), config, AdapterConfig(method=method, tokens=4), 0)
    vector = np.random.default_rng(5).normal(0, 1, adapter.spec.dimension).astype(np.float32)
    folder = tmp_path / "adapter"
    adapter.save(vector, folder, str(base))
    adapter.tokenizer.save_pretrained(folder)
    place.sign(folder, base, form="adapter")
    found = run(place, data, folder)
    reading = HeldoutConfig(prompt="Q: {question}\nA:", text=" {answer}", samples=9)
    table = read_table(str(data), "test")
    trained = Evaluator(adapter, table, Tokeniser(adapter.tokenizer, config, reading), reading, 4)
    assert found.model("adapter").scores["perplexity"][0] == pytest.approx(trained.score(vector).perplexity, rel=1e-4)
    _, samples = trained.exact_match(vector)
    assert [answer.answers[1][:4] for answer in found.answers] == [sample.answer[:4] for sample in samples]


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_are_compared_with_the_releases_own_among_them(found: Evaluation, without_fonts: None) -> None:
    assert {prompt.name: prompt.prompt for prompt in found.prompts} == {
        "bare": "{question}", "long": "Please answer: {question}\n", OWN: "Q: {question}\nA:"
    }  # fmt: skip
    own = next(prompt for prompt in found.prompts if prompt.name == OWN)
    assert own.scores["chrf"][0] == pytest.approx(found.model("merged").scores["chrf"][0])
    assert found.best is not None
    assert (found.best.name, found.best.second, found.best.pairs) == (*(p.name for p in found.prompts[:2]), 3)
    values = [prompt.scores[found.best.metric][0] for prompt in found.prompts]
    assert values == sorted(values, reverse=True)
    assert found.best.difference[0] == pytest.approx(values[0] - values[1])
    for language, page in (("en", render_html(found, "en")), ("ko", render_html(found, "ko"))):
        assert text_of(language, "best.several", pairs=3) in page
        assert "Please answer: {question}" in page


def test_the_best_prompt_is_not_distinguishable_where_the_interval_holds_0() -> None:
    expected = [f"answer {n}" for n in range(60)]

    def right(some: int) -> work._Found:
        return made_up(expected, [text if n < some else "wrong" for n, text in enumerate(expected)])

    reading = TextConfig(prompt="{q}", text="{a}")
    manifest = Manifest.model_construct(task="causal-lm", reading=reading)
    for name, ahead in (("good", 31), ("best", 60)):
        _, best = work._ranked({OWN: right(30), name: right(ahead)}, {name: reading}, manifest)
        assert best is not None
        assert (best.name, best.second, best.metric) == (name, OWN, "exact_match")
        assert tells(best.difference) == (name == "best")
    # with more prompts the interval is wider, for the best of many is ahead by chance
    many = {f"p{n}": right(30) for n in range(6)}
    few = work._ranked({OWN: right(30), "good": right(40)}, {"good": reading}, manifest)[1]
    wide = work._ranked({OWN: right(30), "good": right(40), **many}, dict.fromkeys(["good", *many], reading), manifest)[
        1
    ]
    assert few is not None
    assert wide is not None
    assert wide.pairs == 28
    assert wide.difference[2] - wide.difference[1] > few.difference[2] - few.difference[1]


def test_chrf_decides_where_no_prompt_has_an_exact_match() -> None:
    expected = ["three working days"] * 40
    near, far = made_up(expected, ["three working day"] * 40), made_up(expected, ["nothing"] * 40)
    reading = TextConfig(prompt="{q}", text="{a}")
    manifest = Manifest.model_construct(task="causal-lm", reading=reading)
    _, best = work._ranked({OWN: far, "near": near}, {"near": reading}, manifest)
    assert best is not None
    assert (best.name, best.metric) == ("near", "chrf")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: '{question}'\na: '{answer}'", "line 1: .*a is given twice"),
        ("a: [", "line 1: not YAML"),
        ("", "expected lines of `key: value`"),
        ("a: 3", "prompt 'a': expected a template"),
        ("a: {prompts: x}", "prompt 'a': expected a template"),
        ("a: '{nowhere}'", "prompt 'a': missing column nowhere; the records have question, answer"),
        ("a: '{question'", "prompt 'a': template"),
        ("a: {system: be kind}", "prompt 'a': .*data.system is a turn of a chat"),
        ("as trained: '{question}'", "the release's own prompt has that name"),
        ("\n".join(f"p{n}: '{{question}}'" for n in range(21)), "21 prompts, expected 1 to 20"),
    ],
)
def test_prompts_that_do_not_fit_are_one_clear_error(
    place: Place, merged: Path, data: Path, tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(FedllmError, match=complaint):
        run(place, data, merged, prompts=path)


def test_a_classifier_has_no_prompts_to_compare(
    place: Place, classifier: Path, write_jsonl: Write, prompts: Path
) -> None:
    with pytest.raises(ConfigError, match="answers no prompts"):
        run(place, write_jsonl("public.jsonl", LABELLED), classifier, prompts=prompts)


# ---- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_limit_takes_records_evenly_from_all(tmp_path: Path, suffix: str) -> None:
    rows = [{"question": str(n), "answer": f"a{n}"} for n in range(25)]
    path = tmp_path / f"public.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    elif suffix == "csv":
        path.write_text("question,answer\n" + "\n".join(f"{r['question']},{r['answer']}" for r in rows), "utf-8")
    else:
        parquet.write_table(Table.from_pylist(rows), path)
    reading = TextConfig(prompt="{question}", text="{answer}")
    some, there = read_records(str(path), reading, 10)
    assert ([row["answer"] for row in some], there) == ([f"a{n}" for n in (0, 2, 5, 7, 10, 12, 15, 17, 20, 22)], 25)
    assert len(read_records(str(path), reading, 1000)[0]) == 25


def test_text_too_large_to_be_read_whole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "public.jsonl"
    path.touch()
    os.truncate(path, 2 << 30)  # takes no room
    with pytest.raises(DataError, match=r"2,147,483,648 bytes of text, expected at most .*\.parquet"):
        read_records(str(path), TextConfig(text="{text}"), 10)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"question": "a"}], "missing column answer; the records have question"),
        ([{"question": "a", "answer": ""}], "line 1: answer is empty"),
        ([{"question": "a", "answer": None}], "line 1: answer is empty"),
        ([], "is empty"),
    ],
)
def test_records_that_cannot_be_used_are_one_clear_error(
    place: Place, merged: Path, write_jsonl: Write, rows: list[dict[str, Any]], complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        run(place, write_jsonl("public.jsonl", rows), merged)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "x", "label": "좋음"}, "label '좋음' is not among .* The release knows 긍정, 부정, 중립"),
        ({"text": "x", "label": None}, "label is empty"),
        ({"text": "x"}, "label is empty"),
        ({"text": "", "label": "긍정"}, "text is empty"),
    ],
)
def test_a_class_that_is_none_is_named(
    place: Place, classifier: Path, write_jsonl: Write, row: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(DataError, match=f"line 6: {complaint}"):
        run(place, write_jsonl("public.jsonl", [*LABELLED, row]), classifier)


def test_a_file_that_is_not_there_is_named(place: Place, merged: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        run(place, Path("nowhere.jsonl"), merged)


# ---- releases --------------------------------------------------------------------------------------------------------


def test_a_release_that_was_changed_or_signed_by_others_is_not_evaluated(
    place: Place, merged: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(merged, folder)
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ReleaseError, match=r"config\.json was changed"):
        run(place, data, merged, folder)
    (tmp_path / "others").mkdir()
    _, stranger = keys_of(tmp_path / "others")
    with pytest.raises(ReleaseError, match="not a key that you trust"):
        evaluate([merged], str(data), Trust.read(stranger), None, 10, quiet)


def test_releases_that_share_no_table_are_refused(place: Place, merged: Path, classifier: Path, data: Path) -> None:
    with pytest.raises(ReleaseError, match=r"another task \(classification\)"):
        run(place, data, merged, classifier)
    with pytest.raises(ConfigError, match="named twice"):
        run(place, data, merged, merged / ".." / merged.name)


def test_without_sacrebleu_the_error_says_what_to_install(
    place: Place, merged: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedllm\[evaluate\]'"):
        run(place, data, merged)


# ---- the page and the command ----------------------------------------------------------------------------------------

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(1)"> & </style>'


def with_answers(found: Evaluation, *answers: Answer) -> Evaluation:
    return found.model_copy(update={"answers": answers})


def test_what_records_and_models_say_is_escaped(place: Place, merged: Path, write_jsonl: Write, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text(json.dumps({HOSTILE: HOSTILE + "{question}"}), "utf-8")
    rows = [{"question": HOSTILE, "answer": HOSTILE + str(n)} for n in range(2)]
    found = run(place, write_jsonl("public.jsonl", rows), merged, prompts=prompts)
    said = tuple(
        each.model_copy(update={"answers": (HOSTILE, f"{HOSTILE} {HOSTILE}"), "right": (n == 0, False)})
        for n, each in enumerate(found.answers)
    )
    page = render_html(with_answers(found, *said), "en")
    clean = Page(page)
    assert {"script", "img"}.isdisjoint(clean.tags)
    assert (clean.handlers, clean.links) == ([], [link for link in clean.links if link.startswith("#")])
    assert "<script" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("language", ["en", "ko"])
def test_the_page_stands_alone_and_shows_first_where_models_differ(
    place: Place, found: Evaluation, language: Any
) -> None:
    said = (
        Answer(prompt="첫째", expected="가 나", answers=("가", "다"), right=(False, False)),
        Answer(prompt="둘째", expected="가", answers=("가", "가"), right=(True, True)),
        Answer(prompt="셋째", expected="3번 창구", answers=("12번 창구", "3번 창구"), right=(False, True)),
        Answer(prompt="넷째", expected="가", answers=("", ""), right=(False, False)),
    )
    page = render_html(with_answers(found, *said), language)
    clean = Page(page)
    assert "script" not in clean.tags
    assert all(link.startswith(("#", "data:")) for link in clean.links)
    assert len(clean.ids) == len(set(clean.ids))
    assert page.index("셋째") < page.index("첫째") < page.index("둘째")
    assert 'id="show-differ" checked' in page
    assert "<mark>12번</mark> 창구" in page
    for key, count in (("differ", 1), ("wrong", 2), ("right", 1), ("all", 4)):
        assert f"{text_of(language, f'answers.{key}')} ({count})" in page
    assert text_of(language, "public") in page
    if language == "ko":
        names = ("chrF", "sacrebleu", "Popović", "Efron", "evaluation.every", "long", "bare",
                 *(model.place for model in found.models))  # fmt: skip
        assert english_words(page, names) == set()


def test_a_page_of_many_records_shows_some_of_each_kind(found: Evaluation, without_fonts: None) -> None:
    many = [
        Answer(prompt=f"{kind} {n}", expected="a", answers=("a", "a"), right=(kind != "wrong", kind == "right"))
        for kind in ("right", "wrong", "differ")
        for n in range(150)
    ]
    page = render_html(with_answers(found, *many), "en")
    assert page.count("<article") == 300
    assert text_of("en", "answers.shown", shown=300, records=450) in page


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["release", "evaluate", *map(str, arguments)])


def test_the_command_says_that_records_must_be_public_and_writes_what_was_found(
    place: Place, merged: Path, data: Path, tmp_path: Path, prompts: Path, without_fonts: None
) -> None:
    out = tmp_path / "out"
    before = digests(merged)
    result = invoke(merged, "--data", data, "--trust", place.keys, "--out", out, "--prompts", prompts)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "which you state to be public: no epsilon is counted for scores" in text
    assert text_of("en", "public") in text
    assert "Best prompt:" in text
    assert "merged against base: exact match" in text
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "evaluation.html", "evaluation.ko.html"}
    found = Evaluation.model_validate_json((out / "evaluation.json").read_text("utf-8"))
    assert (found.records, found.records_there, len(found.answers)) == (4, 4, 4)
    assert (out / "evaluation.ko.html").read_text("utf-8") == render_html(found, "ko")
    assert digests(merged) == before
    again = invoke(merged, "--data", data, "--trust", place.keys, "--out", out, "--lang", "ko", "--limit", 2)
    assert again.exit_code == 0
    assert '<html lang="ko">' in (out / "evaluation.html").read_text("utf-8")
    help_text = " ".join(invoke("--help").output.replace("│", " ").split())
    assert "PUBLIC records" in help_text
    assert "evaluation.every" in help_text


def test_nothing_is_written_into_a_release(place: Place, merged: Path, data: Path) -> None:
    before = digests(merged)
    result = invoke(merged, "--data", data, "--trust", place.keys, "--out", merged / "evaluation")
    assert isinstance(result.exception, ReleaseError)
    assert "lies in the release" in str(result.exception)
    assert digests(merged) == before


# ---- lm-evaluation-harness -------------------------------------------------------------------------------------------

TASK = Path(__file__).parents[3] / "examples" / "lm_eval" / "heldout.yaml"


def test_the_harness_asks_as_the_demo_was_trained() -> None:
    task, how = read_settings(TASK), yaml.safe_load((Path(conf.__file__).parent / "data/demo-heldout.yaml").read_text())
    assert Template(task["doc_to_text"]).render(question="몇 번 창구?") == how["prompt"].format(question="몇 번 창구?")
    assert Template(task["doc_to_target"]).render(answer="3번") == how["text"].format(answer="3번").strip()
    assert task["output_type"] == "generate_until"  # what the server can answer


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("lm_eval") is None, reason="lm_eval is not on the path: docs/evaluation.md")
def test_the_harness_asks_a_served_release(place: Place, merged: Path, data: Path, tmp_path: Path) -> None:
    shutil.copy(data, tmp_path / "heldout.jsonl")
    fedllm = [sys.executable, "-m", "fedllm.cli", "serve"]
    ours = {**os.environ, "FEDLLM_HOME": str(tmp_path / "home")}
    said = subprocess.run([*fedllm, "token", "add", "harness"], env=ours, check=True, capture_output=True, text=True)
    token = next(word for word in said.stdout.split() if word.startswith("fedllm-"))
    command = [*fedllm, "run", str(merged), "--trust", str(place.keys), "--plaintext", "--port", "0"]
    with subprocess.Popen(command, env=ours, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = next(line.split()[-1] for line in server.stdout or () if line.startswith("serving"))
            arguments = f"model=tiny,base_url={address}/v1/completions,tokenizer_backend=None,tokenized_requests=False"
            run = [
                "lm_eval", "--model", "local-completions", "--model_args", arguments, "--include_path",
                str(TASK.parent), "--tasks", "fedllm_heldout", "--output_path", "found", "--log_samples",
            ]  # fmt: skip
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            subprocess.run(run, cwd=tmp_path, env={**environment, "OPENAI_API_KEY": token}, check=True, timeout=600)
        finally:
            server.terminate()
    (found,) = (tmp_path / "found").glob("**/results_*.json")
    results = json.loads(found.read_text("utf-8"))["results"]["fedllm_heldout"]
    assert results["exact_match,stripped"] == 0.0
    assert 0 <= results["chrf,stripped"] <= 100
    (samples,) = (tmp_path / "found").glob("**/samples_*.jsonl")
    assert len(samples.read_text("utf-8").splitlines()) == len(ROWS)
