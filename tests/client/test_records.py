"""Records are read one by one, tokenised at once, and cut to a plan as the tokenizer itself would cut them."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from client.records import Declared, SiteRecords, load_records
from fedllm.config import ModelConfig, PrivacyConfig, TextConfig
from fedllm.errors import DataError
from fedllm.privacy.split import Split
from fedllm.training.data import Row, Tokeniser, Tokens, cell, is_missing, read_rows
from fedllm.training.model import Reader, load_reader
from tests.conftest import byte_tokenizer

ROWS: list[Row] = [{"q": f"question {i}", "a": f"answer {i}", "who": f"p{i % 3}"} for i in range(7)]
TEXT = TextConfig(prompt="{q} ", text="{a}")
ALL = Split(0.0, bytes(32))  # train


@pytest.fixture(scope="module")
def reader(tiny_llama: Path) -> Reader:
    return load_reader(ModelConfig(source=str(tiny_llama)))


def load(reader: Reader, rows: Sequence[Row | DataError], declared: Declared) -> SiteRecords:
    return load_records(rows, TEXT, "who", declared, {"m": reader})


def plan(limit: int = 64, cap: int = 8) -> Any:
    privacy = PrivacyConfig(unit="person", records_per_person=cap)
    return SimpleNamespace(model=ModelConfig(source="m", max_length=limit), privacy=privacy)


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize(
    "bad",
    [b"{", b'"open', b"1,2,3,4,5", b"\xff\xfe", b'"a"b,c,d', b"[1]", b'{"q": ' + b"9" * 5000 + b"}", b"[" * 90_000,
     b"x" * 200_000],
    ids=["cut", "open quote", "fields", "encoding", "quotes", "list", "digits", "nesting", "long"],
)  # fmt: skip
def test_a_line_that_cannot_be_read_is_one_record_and_no_other_changes(tmp_path: Path, suffix: str, bad: bytes) -> None:
    """An open quote took all the lines after it along."""
    path = tmp_path / f"train{suffix}"
    header = [b"q,a,who"] if suffix == ".csv" else []
    lines = [",".join(row.values()).encode() if header else json.dumps(row).encode() for row in ROWS]
    path.write_bytes(b"\n".join([*header, *lines[:3], bad, *lines[3:]]))
    found = list(read_rows(str(path), "train"))
    assert isinstance(found[3], DataError)
    assert f"line {4 + len(header)}" in str(found[3])
    assert found[:3] + found[4:] == ROWS


def test_one_record_does_not_change_the_type_of_anothers_cell(tmp_path: Path) -> None:
    """A hole in a column of whole numbers makes floats of all of them, in Parquet as in a table in memory."""
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"x": pa.array([1000.0, None, 7.5])}), path)
    assert [cell(row["x"]) for row in read_rows(str(path), "train") if isinstance(row, dict)] == ["1000", "None", "7.5"]
    lines = tmp_path / "train.jsonl"
    lines.write_text('{"x": 1000}\n{"x": 1.5}\n{"x": "text"}\n{}\n')
    assert list(read_rows(str(lines), "train")) == [{"x": 1000}, {"x": 1.5}, {"x": "text"}, {}]


@pytest.mark.parametrize("name", ["train.json", "train.txt", "gone.jsonl"])
def test_files_that_cannot_be_read_record_by_record_are_refused(tmp_path: Path, name: str) -> None:
    if "gone" not in name:
        (tmp_path / name).write_text("[{}]")
    with pytest.raises(DataError):
        list(read_rows(str(tmp_path / name), "train"))


# ---- tokens ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.dictionaries(st.sampled_from(["q", "a"]), st.text(max_size=9) | st.none(), max_size=2), max_size=9))
def test_many_records_at_once_are_what_each_is_alone(reader: Reader, rows: list[Row]) -> None:
    tokeniser = Tokeniser(reader.tokenizer, ModelConfig(source="m", max_length=16), TEXT, reader.vocabulary)
    together = [told(one) for one in tokeniser.read(rows)]
    assert together == [told(one) for number, row in enumerate(rows) for one in tokeniser.read([row], number)]


class Picky(Tokeniser):
    """One whose tokenizer panics on a 3."""

    def _code(self, text: str | list[str]) -> Any:
        if "3" in (text if isinstance(text, str) else "".join(text)):
            raise BaseException("a panic, which is no Exception")
        return super()._code(text)


def test_where_a_batch_fails_only_those_records_do_that_fail_alone(reader: Reader) -> None:
    model = ModelConfig(source="m", max_length=64)
    picky = list(Picky(reader.tokenizer, model, TEXT).read(ROWS))
    plain = list(Tokeniser(reader.tokenizer, model, TEXT).read(ROWS))
    assert isinstance(picky[3], DataError)
    assert "record 4" in str(picky[3])
    assert [told(one) for one in picky[:3] + picky[4:]] == [told(one) for one in plain[:3] + plain[4:]]


def told(one: Tokens | DataError) -> object:
    return str(one) if isinstance(one, DataError) else (one.given.tolist(), one.learned.tolist(), one.label)


ENDS = [(1, 1), (1, 0), (0, 1), (0, 0), (2, 1)]  # special tokens before and after a text


@given(
    text=st.text(max_size=40).filter(lambda text: not is_missing(text)),
    limit=st.integers(8, 30),
    ends=st.sampled_from(ENDS),
)
def test_a_text_to_classify_is_cut_as_its_tokenizer_cuts_it(text: str, limit: int, ends: tuple[int, int]) -> None:
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(["<s>"] * ends[0] + ["$A"] + ["</s>"] * ends[1]), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    model = ModelConfig(source="m", task="classification", labels=("x", "y"), max_length=512)
    tokeniser = Tokeniser(tokenizer, model, TextConfig(text="{q}", label="label"))
    (tokens,) = tokeniser.read([{"q": text, "label": "y"}])
    whole = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
    if not whole:
        assert isinstance(tokens, DataError)
        return
    assert isinstance(tokens, Tokens)
    record = tokens.record(limit, ("z", "y", "x"))
    assert record.input_ids.tolist() == whole
    assert int(record.labels) == 1


def test_a_token_that_the_model_does_not_know_is_no_fault_of_the_others(reader: Reader) -> None:
    known = max(max(reader.tokenizer(f"{row['q']} {row['a']}")["input_ids"]) for row in ROWS)
    beyond = next(text for text in "\n\x7f한" if max(reader.tokenizer(text)["input_ids"]) > known)
    small = Reader(reader.tokenizer, reader.positions, known + 1, reader.digest)
    found = load(small, [*ROWS, {"q": f"a{beyond}", "a": "a", "who": "p1"}], Declared(3, "person"))
    assert [f"the model knows {known + 1}" in str(error) for error in found.wrong["m"]] == [True]
    assert [len(unit) for unit in found.units(plan(), ALL, "training")] == [3, 2, 2]


# ---- units -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [1, 2, 9])
def test_units_are_cut_to_the_plan(reader: Reader, cap: int) -> None:
    units = load(reader, ROWS, Declared(3, "person")).units(plan(12, cap), ALL, "training")
    assert [len(unit) for unit in units] == [min(cap, size) for size in (3, 2, 2)]
    assert [len(unit) for unit in units[1:]] == [min(cap, 2)] * 2
    assert all(len(record.input_ids) == 12 for unit in units for record in unit)


def test_a_record_that_cannot_be_used_keeps_its_place_and_so_does_everybody_else(reader: Reader) -> None:
    """The coins of the others are by their place: a record that were left out would shift them."""
    rows: list[Row | DataError] = [ROWS[0], {"q": None, "a": "a", "who": "p9"}, DataError("line 3"), *ROWS[1:]]
    by_record, by_person = Declared(9, "record"), Declared(3, "person")
    for declared, sizes in ((by_record, [1, 0, 0, 1, 1, 1, 1, 1, 1]), (by_person, [3, 0, 0, 2, 2])):
        found = load(reader, rows, declared)
        assert [len(unit) for unit in found.units(plan(), ALL, "training")] == sizes
        assert len(found.wrong["m"]) == 2
        assert found.data_set == load(reader, [*ROWS, rows[1]], declared).data_set


def test_a_record_nested_too_deeply_to_be_written_down_is_no_fault_of_the_others(reader: Reader) -> None:
    deep: Any = {}
    for _ in range(5000):
        deep = {"x": deep}
    found = load(reader, [*ROWS, {"q": "q", "a": "a", "who": "p0", "more": deep}], Declared(7, "record"))
    assert len(found.wrong["m"]) == 1
    assert sum(len(unit) for unit in found.units(plan(), ALL, "training")) == 7
