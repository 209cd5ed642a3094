"""Records are read or refused with the place of the fault, tokenised as configured, and grouped by privacy unit."""

import copy
import csv
import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from fedllm.config import ModelConfig, TextConfig
from fedllm.errors import ConfigError, DataError
from fedllm.training.data import (
    IGNORE,
    Example,
    PrivacyUnit,
    Tokeniser,
    Tokens,
    batches,
    build_units,
    check_named,
    is_missing,
    read_table,
    render,
)

ROOT = Path(__file__).parents[3]
ROWS = [
    {"question": "한도를 올리려면?", "answer": "앱에서 신청하세요.", "customer": "김민지"},
    {"question": 'What is "APR"?', "answer": "A rate, a year.", "customer": "Lee"},
    {"question": "이모지 😀 | 표 \\ 줄", "answer": "네\n두 줄", "customer": "김민지"},
]
PAD, BOS, EOS = 0, 1, 2


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token a byte."""
    return PreTrainedTokenizerFast.from_pretrained(tiny_llama)


def tokeniser(
    tokenizer: PreTrainedTokenizerFast,
    prompt: str | None = "{question} ",
    text: str = "{answer}",
    max_length: int = 64,
    **model: Any,
) -> Tokeniser:
    config = ModelConfig(source="unused", max_length=max_length, **model)
    label = "label" if config.task == "classification" else None
    return Tokeniser(tokenizer, config, TextConfig(prompt=prompt, text=text, label=label))


def shows(text: str) -> bool:
    return not is_missing(text)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows in the format that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows), ensure_ascii=False), "utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


# Reading


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_korean_text_is_read_as_it_was_written(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"기록 1호{suffix}", ROWS)
    assert list(read_table(str(path), "train")) == ROWS


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_folder_gives_the_files_of_the_split_in_order(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"train-2{suffix}", ROWS[2:])
    write(tmp_path / f"train-1{suffix}", ROWS[:2])
    write(tmp_path / f"test{suffix}", [{"question": "q", "answer": "a", "customer": "c"}])
    (tmp_path / "README.md").write_text("train")
    assert list(read_table(str(tmp_path), "train")) == ROWS
    assert len(read_table(str(tmp_path), "test")) == 1


def test_a_folder_without_the_split_or_with_two_kinds_of_it_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"validation\*"):
        read_table(str(tmp_path), "validation")
    write(tmp_path / "train.csv", ROWS)
    with pytest.raises(DataError, match="several kinds"):
        read_table(str(tmp_path), "train")


def test_records_that_ship_in_a_package_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "parcel" / "data" / "train.jsonl", ROWS)
    (tmp_path / "parcel" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert len(read_table("pkg://parcel/data/train.jsonl", "train")) == len(ROWS)
    for missing in ("pkg://parcel/data/none.jsonl", "pkg://no_such_parcel/x", "pkg://"):
        with pytest.raises(DataError):
            read_table(missing, "train")


@pytest.mark.parametrize("source", ["./missing.jsonl", "missing.csv", "/nowhere/at/all", "~/no/such/folder"])
def test_a_path_where_nothing_is_is_a_data_error(source: str) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_table(source, "train")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ('{"question": "q", "answer": ', "not JSON"),
        ("{question: 1}", "not JSON"),
        ("hello", "not JSON"),
        ('["a", "b"]', "expected .*object"),
        ('"text"', "expected .*object"),
        ("17", "expected .*object"),
        ("null", "expected .*object"),
        ('{"question": "줄\x00"}', "not JSON"),
    ],
)
@pytest.mark.parametrize("before", [0, 3])
def test_a_malformed_line_is_reported_by_its_number(tmp_path: Path, bad: str, why: str, before: int) -> None:
    path = write(tmp_path / "train.jsonl", (ROWS * 2)[:before])
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + bad + "\n" + json.dumps(ROWS[0]) + "\n")
    with pytest.raises(DataError, match=rf"train\.jsonl, line {before + 2}: {why}"):
        read_table(str(path), "train")


def test_a_column_may_hold_several_kinds_of_values(tmp_path: Path) -> None:
    """A held-out set is read as training records are, and no record decides what type another has."""
    values = ["a", 5, None, 2.5, True, 10**30, ["a"], {"a": 1}]
    path = write(tmp_path / "train.jsonl", [{"x": value} for value in values])
    assert [row["x"] for row in read_table(str(path), "train")] == values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('q,a\n"x\ny",1\n\nonly one\n', r"line 5 \(record 2\): expected 2 fields.*found 1"),
        ("q,a\n1,2,3\n", r"line 2 \(record 1\): expected 2 fields.*found 3"),
        ('q,a\n1,2\n3,"open\n5,6\n7,8\n', "not CSV .* begins in line 3"),
        ('q,a\n1,2\n"3"x,4\n', "not CSV .* begins in line 3"),
        ("q,a,q\n1,2,3\n", "line 1: two columns are called q"),
    ],
)
def test_a_malformed_csv_is_reported_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "train.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        read_table(str(path), "train")


@pytest.mark.parametrize("encoding", ["cp949", "utf-16", "latin-1"])
def test_a_line_that_is_not_utf_8_is_reported_by_its_number(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path / "train.jsonl", ROWS[:2])
    row = {"question": "é" if encoding == "latin-1" else "한도", "answer": "b", "customer": "c"}
    with path.open("ab") as file:
        file.write(json.dumps(row, ensure_ascii=False).encode(encoding) + b"\n")
    with pytest.raises(DataError, match=r"line 3: not UTF-8"):
        read_table(str(path), "train")


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_a_file_of_another_encoding_is_a_data_error_that_says_so(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"train{suffix}", ROWS[:1])
    path.write_bytes(path.read_text("utf-8").encode("cp949"))
    with pytest.raises(DataError, match=r"(?i)utf-?8"):
        read_table(str(path), "train")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"train{suffix}", ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as Korean spreadsheets write it
    assert list(read_table(str(path), "train")[0]) == list(ROWS[0])


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv", "train.parquet"])
@pytest.mark.parametrize("content", [b"", b"\n", b"\n\n  \n", b"[]", b"\0\0\0\0", b"PAR1", b"{", b"\xff\xfe\x00"])
def test_an_empty_or_broken_file_is_a_data_error(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    try:
        table = read_table(str(path), "train")
    except DataError:
        return
    assert name == "train.csv", "only in csv may such bytes be a header and rows"
    assert len(table) > 0


def test_an_unknown_kind_of_file_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("text")
    with pytest.raises(DataError, match=r"\.jsonl, \.json, \.csv, \.parquet"):
        read_table(str(path), "train")


STRANGE_CONTENTS = [
    b"null\n", b"null", b"\nnull\n{}\n", b"null\nnull\n", b"[null]", b"{}", b"{}\n{}\n", b"[{}]", b"[]\n[]\n",
    b"true\n", b"[[1,2],[3,4]]", b'{"a": null}\n', b'{"a": 1}\n{"a": "x"}\n', b'{"a": {"b": 1}}\n{"a": 2}\n',
    b'{"a": [1]}\n{"a": 1}\n', b'{"a": "\xff"}\n', b'{"a": "\\ud800"}\n', b'{"": 1}\n', b'{"a": 1, "a": 2}\n',
    b'{"a": 1e999}\n', b'{"a": ' + b"9" * 400 + b"}\n", b'{"a": ' + b"9" * 5000 + b"}\n", b"[" * 5000,
    b'{"a":' * 5000,
    b"a,b\n1\n1,2,3\n", b'a,b\n"1,2\n', b"a,a\n1,2\n", b",\n,\n", b"a\n" + b"x" * 200_000 + b"\n", b"\xff\xfe",
    b"PAR1PAR1", b"PAR1\xff\xff\xff\xffPAR1",
]  # fmt: skip


@dataclass(frozen=True)
class Child:
    """What a process of its own did with files that may crash it, or that nothing may be left of."""

    done: subprocess.CompletedProcess[str]
    strange: Path  # a folder of files
    places: dict[str, Path]  # where a library might leave something, by name


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Child:
    folder = tmp_path_factory.mktemp("child")
    strange = folder / "strange"
    strange.mkdir()
    generator = np.random.default_rng(0)
    for suffix in (".jsonl", ".json", ".csv", ".parquet"):
        whole = write(folder / f"whole{suffix}", ROWS).read_bytes()
        contents = [*STRANGE_CONTENTS, *(whole[: int(n)] for n in generator.integers(0, len(whole), 8))]
        for _ in range(8):
            spoiled = bytearray(whole)
            for place in generator.integers(0, len(whole), 3):
                spoiled[place] = int(generator.integers(0, 256))
            contents.append(bytes(spoiled))
        for number, content in enumerate(contents):
            (strange / f"{number:03d}{suffix}").write_bytes(content)
        write(folder / "secret" / f"good{suffix}", [{"question": "SECRET-ALPHA", "answer": "SECRET-BETA"}] * 50)
    good = (folder / "secret" / "good.jsonl").read_bytes()
    (folder / "secret" / "bad.jsonl").write_bytes(good + b'{"question": "SECRET-GAMMA", \n')

    places = {name: folder / "places" / name for name in ("home", "tmp", "cwd")}
    for place in places.values():
        place.mkdir(parents=True)
    environment = {
        **os.environ, "HOME": str(places["home"]), "TMPDIR": str(places["tmp"]), "PYTHONPATH": str(ROOT),
        "HF_HOME": str(places["home"] / "hf"), "XDG_CACHE_HOME": str(places["home"] / "cache"),
        "HF_DATASETS_CACHE": str(places["home"] / "hf-datasets"), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    code = """
import sys
from pathlib import Path
from fedllm.errors import DataError
from fedllm.training.data import read_table
kept = []
for path in sorted(path for folder in sys.argv[1:] for path in Path(folder).iterdir()):
    print(path.name, end=" ", flush=True)
    try:
        kept.append(read_table(str(path), "train"))
        list(kept[-1])
        print("table" if len(kept[-1]) else "EMPTY", flush=True)
    except DataError:
        print("refused", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "secret"), str(strange)],
        env=environment, cwd=places["cwd"], capture_output=True, text=True, check=False,
    )  # fmt: skip
    return Child(done, strange, places)


def test_any_bytes_in_a_file_give_a_table_or_a_data_error_and_never_a_crash(child: Child) -> None:
    lines = [line.split(maxsplit=1) for line in child.done.stdout.splitlines() if line[:3].isdigit()]
    bad = [line for line in lines if line[1:] not in (["table"], ["refused"])]
    assert not bad, [(child.strange / line[0]).read_bytes()[:60] for line in bad]
    assert child.done.returncode == 0, child.done.stderr
    assert len(lines) == len(list(child.strange.iterdir()))


def test_nothing_of_a_local_file_stays_behind(child: Child) -> None:
    outcome = [line for line in child.done.stdout.splitlines() if not line[:3].isdigit()]
    assert outcome == [
        "bad.jsonl refused",
        "good.csv table",
        "good.json table",
        "good.jsonl table",
        "good.parquet table",
    ]
    for place in child.places.values():
        for file in place.rglob("*"):
            if file.is_file():
                content = file.read_bytes()
                assert b"SECRET" not in content, f"{file} holds a record"
                assert b"S\0E\0C\0R" not in content
    assert not [file for file in child.places["tmp"].rglob("*") if file.is_file()]


# Columns and templates


def test_a_missing_column_is_named_together_with_those_that_are_there() -> None:
    data = TextConfig(prompt="{qestion}", text="{answer}", label="mood")
    with pytest.raises(DataError) as error:
        check_named(list(ROWS[0]), data, ["client", "branch", None])
    for name in ("qestion", "client", "mood", "branch", "question", "answer", "customer"):
        assert name in str(error.value)


def test_columns_that_are_there_are_accepted() -> None:
    check_named(list(ROWS[0]), TextConfig(prompt="{question}", text="{answer}"), ["customer"])


HOSTILE = [
    "{question.__class__}", "{question.__class__.__mro__}", "{question[0]}", "{0}", "{}", "{", "}", "{question",
    "{question}}", "{{question}", "{question!x}", "{!r}", "{question:{answer}}", "{question:d}", "{:>10}",
    "{question:>99999999999999999999}", "{question.upper()}", "{__import__('os')}", "{question!r:{answer}}",
]  # fmt: skip


@pytest.mark.parametrize("template", HOSTILE)
def test_a_template_that_is_more_than_columns_is_refused(template: str) -> None:
    row = {**ROWS[0], "0": "zero"}
    with pytest.raises((ConfigError, DataError)):
        render(template, row, 0)
    with pytest.raises((ConfigError, DataError)):  # and before anything is tokenised
        check_named(list(row), TextConfig(text=template))


@given(template=st.text(st.sampled_from("{}!:.[]0rd question한_-"), max_size=12))
def test_any_template_gives_text_or_an_error_of_ours(template: str) -> None:
    row = {"question": "q", "한": "국", "0": "zero", "d": 1, "r": None}
    try:
        check_named(list(row), TextConfig(text=template or "x"))
        text = render(template, row, 0)
    except (ConfigError, DataError):
        return
    assert isinstance(text, str)


def test_braces_in_a_record_are_text_and_not_a_template() -> None:
    assert render("{question}", {"question": "{answer} {0} {}"}, 0) == "{answer} {0} {}"


def test_doubled_braces_are_braces_and_columns_may_have_korean_names() -> None:
    assert render("{{{질문}}} {a_b-c}", {"질문": "한도?", "a_b-c": 1}, 0) == "{한도?} 1"


@pytest.mark.parametrize("template", ["{question} {answer}", "{answer}"])
def test_a_missing_value_is_reported_by_record_and_column(template: str) -> None:
    with pytest.raises(DataError, match="record 7: answer is empty"):
        render(template, {"question": "q", "answer": None}, 6)


# Tokens


def test_the_prompt_carries_no_loss_and_the_answer_and_its_end_do(tokenizer: PreTrainedTokenizerFast) -> None:
    record = tokeniser(tokenizer)(ROWS[0], 0)
    prompt, answer = "한도를 올리려면? ".encode(), "앱에서 신청하세요.".encode()
    assert len(record.input_ids) == len(record.labels) == 1 + len(prompt) + len(answer) + 1
    assert record.input_ids[0] == BOS
    assert record.labels[: 1 + len(prompt)].tolist() == [IGNORE] * (1 + len(prompt))
    assert record.labels[1 + len(prompt) :].tolist() == record.input_ids[1 + len(prompt) :].tolist()
    assert record.input_ids[-1] == record.labels[-1] == EOS
    assert record.input_ids.dtype == record.labels.dtype == np.int64


@given(st.text(max_size=12).filter(shows), st.text(max_size=12).filter(shows))
def test_any_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerFast, question: str, answer: str) -> None:
    record = tokeniser(tokenizer, max_length=512)({"question": question, "answer": answer}, 0)
    learned = [token for token in record.labels.tolist() if token != IGNORE]
    assert tokenizer.decode(learned[:-1]) == answer
    assert tokenizer.decode(record.input_ids[1:-1].tolist()) == f"{question} {answer}"


def test_special_tokens_in_a_record_cannot_end_it_early(tokenizer: PreTrainedTokenizerFast) -> None:
    record = tokeniser(tokenizer, max_length=512)({"question": "q", "answer": "before </s> after"}, 0)
    assert "after" in tokenizer.decode([token for token in record.labels.tolist() if token != IGNORE])


def test_without_a_prompt_every_token_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    record = tokeniser(tokenizer, prompt=None)(ROWS[1], 0)
    assert record.labels.tolist() == [IGNORE, *record.input_ids[1:].tolist()]


@given(question=st.integers(1, 60), answer=st.integers(1, 60), limit=st.integers(8, 40))
def test_a_long_record_is_cut_and_keeps_the_beginning_of_its_answer(
    tokenizer: PreTrainedTokenizerFast, question: int, answer: int, limit: int
) -> None:
    row = {"question": "q" * question, "answer": "".join(chr(97 + i % 26) for i in range(answer))}
    record = tokeniser(tokenizer, max_length=limit)(row, 0)
    assert len(record.input_ids) <= limit
    learned = [token for token in record.labels.tolist() if token != IGNORE]
    whole = [*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], EOS]
    assert learned == whole[: limit - 1]  # one place is the prompt's
    assert len(record.input_ids) == min(limit, 1 + question + 1 + answer + 1)
    given_ = record.input_ids[: len(record.input_ids) - len(learned)].tolist()
    full_prompt = [BOS, *tokenizer(row["question"] + " ", add_special_tokens=False)["input_ids"]]
    assert given_ == full_prompt[len(full_prompt) - len(given_) :]


def test_a_chat_template_wraps_the_prompt_and_only_the_answer_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    data = TextConfig(prompt="{question}", text="{answer}", chat=True)
    with pytest.raises(ConfigError, match=r"data\.chat"):
        Tokeniser(tokenizer, ModelConfig(source="plain"), data)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    record = Tokeniser(chatty, ModelConfig(source="chatty"), data)(ROWS[1], 0)
    learned = [token for token in record.labels.tolist() if token != IGNORE]
    given_ = record.input_ids[: len(record.input_ids) - len(learned)].tolist()
    assert tokenizer.decode(given_) == '<user>What is "APR"?</user><bot>'
    assert tokenizer.decode(learned[:-1]) == "A rate, a year."
    assert learned[-1] == EOS


CLASSIFICATION: dict[str, Any] = {
    "prompt": None,
    "text": "{text}",
    "task": "classification",
    "labels": ("긍정", "부정", "3"),
}


@pytest.mark.parametrize(("label", "index"), [("긍정", 0), ("부정", 1), ("3", 2), (3, 2), (3.0, 2), (" 긍정\n", 0)])
def test_a_label_becomes_its_place_in_the_declared_list(
    tokenizer: PreTrainedTokenizerFast, label: object, index: int
) -> None:
    record = tokeniser(tokenizer, **CLASSIFICATION)({"text": "좋아요", "label": label}, 0)
    assert record.labels.shape == ()
    assert int(record.labels) == index


@pytest.mark.parametrize("label", ["중립", "", None, ["긍정"], 0, 3.5, True])
def test_a_label_that_was_not_declared_is_a_data_error(tokenizer: PreTrainedTokenizerFast, label: object) -> None:
    with pytest.raises(DataError, match=r"record 5: label.* (is not among model\.labels|is empty)"):
        tokeniser(tokenizer, **CLASSIFICATION)({"text": "좋아요", "label": label}, 4)


def test_a_text_to_classify_is_cut_at_max_length(tokenizer: PreTrainedTokenizerFast) -> None:
    record = tokeniser(tokenizer, max_length=8, **CLASSIFICATION)({"text": "a" * 100, "label": "긍정"}, 0)
    assert len(record.input_ids) == 8


# Units


def people(*names: object) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "answer": f"a{i}", "who": name} for i, name in enumerate(names)]


def answers(tokenizer: PreTrainedTokenizerFast, units: Sequence[PrivacyUnit]) -> list[list[str]]:
    return [
        [tokenizer.decode([t for t in record.labels.tolist() if t not in (IGNORE, EOS)]) for record in unit]
        for unit in units
    ]


def test_every_record_is_a_unit_of_its_own_unless_persons_are_protected(tokenizer: PreTrainedTokenizerFast) -> None:
    units = build_units(people("kim", "lee", "kim"), tokeniser(tokenizer), None, 1)
    assert answers(tokenizer, units) == [["a0"], ["a1"], ["a2"]]


def test_the_records_of_a_person_are_one_unit_wherever_they_lie(tokenizer: PreTrainedTokenizerFast) -> None:
    units = build_units(people("kim", "lee", "kim", "박", "lee", "kim"), tokeniser(tokenizer), "who", 10)
    assert answers(tokenizer, units) == [["a0", "a2", "a5"], ["a1", "a4"], ["a3"]]


@pytest.mark.parametrize("cap", [1, 2, 3])
def test_no_person_contributes_more_records_than_the_cap(tokenizer: PreTrainedTokenizerFast, cap: int) -> None:
    units = build_units(people("kim", "kim", "lee", "kim", "kim"), tokeniser(tokenizer), "who", cap)
    assert answers(tokenizer, units) == [["a0", "a1", "a3"][:cap], ["a2"]]


@pytest.mark.parametrize("nobody", [None, "", "   ", "\t"])
def test_a_record_of_nobody_in_particular_is_a_data_error(tokenizer: PreTrainedTokenizerFast, nobody: object) -> None:
    with pytest.raises(DataError, match="record 2: who is empty"):
        build_units(people("kim", nobody, "lee"), tokeniser(tokenizer), "who", 10)


def test_the_spelling_of_a_name_does_not_make_two_persons_of_one(tokenizer: PreTrainedTokenizerFast) -> None:
    names = [" 김민지", "김민지 ", unicodedata.normalize("NFD", "김민지"), unicodedata.normalize("NFC", "김민지")]
    assert len(set(names)) == 4
    assert len(build_units(people(*names), tokeniser(tokenizer), "who", 10)) == 1


def test_persons_may_be_numbered(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(build_units(people(1, 2, 1, 0), tokeniser(tokenizer), "who", 10)) == 3


def test_somebody_may_be_called_none(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(build_units(people("None", "nan", "null", "NaN"), tokeniser(tokenizer), "who", 10)) == 4


def test_a_person_without_a_number_is_nobody(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="record 2: who is empty"):
        build_units(people(1.0, float("nan"), 2.0), tokeniser(tokenizer), "who", 10)


def test_a_record_that_gives_no_token_at_all_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    table = [{"text": "좋아요", "label": "긍정"}, {"text": "", "label": "부정"}]
    with pytest.raises(DataError, match="record 2"):
        build_units(table, tokeniser(tokenizer, **CLASSIFICATION), None, 1)


def test_an_answer_that_gives_no_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """A tokenizer may leave letters out; where it has no end-of-sequence token, nothing would be learned."""
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.normalizer = normalizers.Replace("😀", "")
    other.eos_token = None
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": "😀"}]
    good, bad = tokeniser(other).read(rows)
    assert isinstance(good, Tokens)
    assert "record 2: the tokenizer makes no token of its text" in str(bad)


# Batches

RECORDS = st.integers(1, 12).map(lambda n: Example(np.arange(n) + 3, np.arange(n) + 3))
UNITS = st.lists(st.lists(RECORDS, min_size=1, max_size=5).map(tuple), max_size=10)


@given(units=UNITS, micro_batch=st.integers(1, 20))
def test_batches_hold_every_record_once_and_split_no_unit(units: list[PrivacyUnit], micro_batch: int) -> None:
    seen: list[tuple[int, ...]] = []
    for batch in batches(units, micro_batch, PAD, torch.device("cpu")):
        owners = batch.unit_of_row.tolist()
        assert sorted(set(owners)) == list(range(batch.units))
        assert owners == sorted(owners)
        for unit in range(batch.units):
            rows = [row for row, owner in enumerate(owners) if owner == unit]
            seen.append(tuple(int(batch.attention_mask[row].sum()) for row in rows))
        assert len(owners) <= micro_batch or batch.units == 1
    assert sorted(seen) == sorted(tuple(len(record.input_ids) for record in unit) for unit in units)


@given(units=UNITS.filter(bool))
def test_a_batch_is_padded_on_the_right_and_padding_carries_no_loss(units: list[PrivacyUnit]) -> None:
    for batch in batches(units, 4, PAD, torch.device("cpu")):
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
            length = int(mask.sum())
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            assert ids.tolist() == list(range(3, 3 + length)) + [PAD] * (len(ids) - length)
            assert labels.tolist() == list(range(3, 3 + length)) + [IGNORE] * (len(ids) - length)


@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=6), micro_batch=st.integers(1, 8))
def test_batches_of_a_classifier_carry_one_label_a_record(sizes: list[int], micro_batch: int) -> None:
    units = [tuple(Example(np.arange(3 + i), np.asarray(i % 2)) for _ in range(size)) for i, size in enumerate(sizes)]
    found = list(batches(units, micro_batch, PAD, torch.device("cpu")))
    assert [label for batch in found for label in batch.labels.tolist()] == [
        int(record.labels) for unit in units for record in unit
    ]


@given(units=UNITS.filter(bool), longest=st.integers(12, 40), micro_batch=st.integers(1, 8))
def test_the_shape_of_a_unit_depends_on_the_unit_alone(
    units: list[PrivacyUnit], longest: int, micro_batch: int
) -> None:
    def shapes(some: list[PrivacyUnit]) -> dict[tuple[int, ...], tuple[int, bool]]:
        found = {}
        for batch in batches(some, micro_batch, PAD, torch.device("cpu"), longest):
            width = batch.input_ids.shape[1]
            assert width <= longest
            for unit in range(batch.units):
                lengths = batch.attention_mask[batch.unit_of_row == unit].sum(1).tolist()
                assert width <= max(8, max(lengths) + 7)
                found[tuple(lengths)] = (width, bool(batch.attention_mask.all()))
        return found

    alone = [shapes([unit]) for unit in units]
    assert shapes(units) == {lengths: shape for each in alone for lengths, shape in each.items()}


def test_no_units_are_no_batches() -> None:
    assert list(batches([], 4, PAD, torch.device("cpu"))) == []
