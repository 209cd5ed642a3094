"""What a file is depends on its content and on settings, not on how its name is spelled."""

import csv
import json
import unicodedata
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedllm.config import FileConfig
from fedllm.errors import ConfigError, DataError
from fedllm.training.data import read_rows, read_table
from fedllm.values import parse

ROWS = [{"question": "한도를 올리려면?", "answer": "앱에서 신청하세요."}, {"question": "왜?", "answer": "네"}]


def how(**values: Any) -> FileConfig:
    return parse(FileConfig, values)


def both(path: Path, files: FileConfig | None = None) -> list[dict[str, Any]]:
    """Read a file as a table and as a researcher's rows, which must agree."""
    files = files or FileConfig()
    table = list(read_table(str(path), "train", files))
    assert list(read_rows(str(path), "train", files, alone=False)) == table
    return table


def at_a_site(path: Path, files: FileConfig | None = None) -> list[Any]:
    return list(read_rows(str(path), "train", files or FileConfig()))


def csv_of(path: Path, separator: str = ",", encoding: str = "utf-8") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def lines_of(path: Path, encoding: str = "utf-8") -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding)
    return path


@pytest.mark.parametrize("name", ["DATA.CSV", "data.JSONL", "Data.Json", "data.Parquet"])
def test_the_ending_of_a_name_may_be_in_capitals(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "DATA.CSV":
        csv_of(path)
    elif name == "data.Parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        lines_of(path)
    assert both(path) == ROWS


def test_json_may_be_a_list_an_object_or_an_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    for text, rows in (
        (json.dumps(ROWS, indent=1), ROWS),
        (json.dumps(ROWS[0], indent=1), ROWS[:1]),
        ("\n" + "\n".join(json.dumps(row) for row in ROWS), ROWS),
    ):
        path.write_text(text, "utf-8")
        assert both(path) == rows
    path.write_text(json.dumps(ROWS[0]) + "\n{bad\n", "utf-8")
    with pytest.raises(DataError, match=r"train\.json, line 2: not JSON"):
        read_table(str(path), "train")
    with pytest.raises(DataError, match=r"Write \.jsonl.*need only be renamed"):
        at_a_site(path)


def test_a_long_cell_is_read_in_csv_as_in_jsonl(tmp_path: Path) -> None:
    long = "가" * 200_000
    (tmp_path / "train.csv").write_text(f"question,answer\n{long},b\n", "utf-8")
    assert both(tmp_path / "train.csv") == at_a_site(tmp_path / "train.csv") == [{"question": long, "answer": "b"}]


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_another_separator_is_named_and_read_once_it_is_set(tmp_path: Path, separator: str) -> None:
    path = csv_of(tmp_path / "train.csv", separator)
    setting = "tab" if separator == "\t" else separator
    for read in (both, at_a_site):
        with pytest.raises(DataError, match=rf"data\.separator='?\{setting}" if setting != "tab" else "separator=tab"):
            read(path)
        assert read(path, how(separator=setting)) == ROWS


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
@pytest.mark.parametrize("encoding", ["cp949", "utf-16"])
def test_another_encoding_is_named_and_read_once_it_is_set(tmp_path: Path, suffix: str, encoding: str) -> None:
    path = tmp_path / f"train{suffix}"
    (csv_of(path, encoding=encoding) if suffix == ".csv" else lines_of(path, encoding)).touch()
    with pytest.raises(DataError, match=rf"not UTF-8\. Set data\.encoding={encoding}"):
        read_table(str(path), "train")
    assert both(path, how(encoding=encoding)) == ROWS
    if encoding == "cp949" and suffix != ".json":
        assert at_a_site(path, how(encoding=encoding)) == ROWS
    else:
        with pytest.raises(DataError, match="would spoil the others"):
            at_a_site(path, how(encoding=encoding))


@pytest.mark.parametrize("encoding", ["cp949", "utf-8", "latin-1", "shift_jis", "gb18030"])
def test_no_bytes_of_one_record_change_how_another_is_read(tmp_path: Path, encoding: str) -> None:
    """At a site. Also not by what ends a line, a cell or a text elsewhere."""
    good = '{"a": "x"}'.encode(encoding)
    for damage in (b"\xff\xfe", b"\x81", b'{"a": "', b'"', b"\x1b$B", b"\0", "\u2028\x85\r".encode()):
        (tmp_path / "train.jsonl").write_bytes(good + b"\n" + damage + b"\n" + good + b"\n")
        (tmp_path / "train.csv").write_bytes(b"a,b\nx,y\n" + damage + b",\nx,y\n")
        for name, row in (("train.jsonl", {"a": "x"}), ("train.csv", {"a": "x", "b": "y"})):
            found = at_a_site(tmp_path / name, how(encoding=encoding))
            assert len(found) == 3
            assert (found[0], found[2]) == (row, row)


def test_every_row_knows_its_place(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}\n')
    (tmp_path / "train.csv").write_text('a,b\n"x\ny",1\n\nz,2\n')
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "train.parquet")
    places = {
        name: [row.place for row in read_rows(str(tmp_path / name), "train", alone=False)]
        for name in ("train.jsonl", "train.csv", "train.parquet")
    }
    assert [place.rpartition("/")[2] for found in places.values() for place in found] == [
        "train.jsonl, line 2", "train.jsonl, line 4", "train.csv, line 2 (record 1)", "train.csv, line 5 (record 2)",
        "train.parquet, record 1", "train.parquet, record 2",
    ]  # fmt: skip


def test_a_bad_row_of_a_csv_is_an_error_in_its_own_place(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(b"a,b\n1,2\n3\n\xff,5\n6,7\n")
    found = list(read_rows(str(path), "train", alone=False))
    assert [isinstance(row, DataError) for row in found] == [False, True, True, False]
    assert "line 3 (record 2): expected 2 fields" in str(found[1])
    assert "line 4 (record 3): not UTF-8" in str(found[2])


def test_columns_have_one_spelling(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "질문")
    (tmp_path / "train.csv").write_text(f' question ,"{decomposed}"\na,b\n', "utf-8")
    assert both(tmp_path / "train.csv") == at_a_site(tmp_path / "train.csv") == [{"question": "a", "질문": "b"}]
    (tmp_path / "train.jsonl").write_text(json.dumps({" q": 1, "q ": 2}))
    (found,) = at_a_site(tmp_path / "train.jsonl")
    assert isinstance(found, DataError)
    pq.write_table(pa.Table.from_pylist([{" question": "a", decomposed: "b"}]), tmp_path / "train.parquet")
    assert both(tmp_path / "train.parquet") == [{"question": "a", "질문": "b"}]


def test_the_names_of_classes_are_read_and_not_their_numbers(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    table.to_parquet(str(tmp_path / "train.parquet"))
    rows = [{"text": t, "label": name} for t, name in (("a", "pos"), ("b", "neg"), ("c", None))]
    assert both(tmp_path / "train.parquet") == at_a_site(tmp_path / "train.parquet") == rows


def test_a_name_or_value_given_twice_is_refused_and_not_dropped(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"a": 1, "a": 2}\n{"a": 3}\n')
    first, second = at_a_site(tmp_path / "train.jsonl")
    assert isinstance(first, DataError)
    assert "a key is given twice" in str(first)
    assert second == {"a": 3}
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "train.parquet")
    for read in (both, at_a_site):
        with pytest.raises(DataError, match="two columns have one name"):
            read(tmp_path / "train.parquet")


def test_an_index_column_without_a_name_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(",question\n0,q\n1,r\n")
    assert both(tmp_path / "train.csv") == at_a_site(tmp_path / "train.csv")


@pytest.mark.parametrize(
    ("first", "kind"),
    [(b"PK\x03\x04", "xlsx"), (b"\xd0\xcf\x11\xe0", "xls"), (b"\x1f\x8b", "gzip"), (b"PAR1", "Parquet")],
)
def test_what_only_calls_itself_text_is_named_as_what_it_is(tmp_path: Path, first: bytes, kind: str) -> None:
    for name in ("train.csv", "train.json", "train.jsonl"):
        (tmp_path / name).write_bytes(first + b'\x14\0,;\t\n{"a": 1}\n')
        with pytest.raises(DataError, match=rf"{kind}.* by another name"):
            read_table(str(tmp_path / name), "train")
    damaged, good = at_a_site(tmp_path / "train.jsonl")  # there, it is one record that begins so
    assert isinstance(damaged, DataError)
    assert good == {"a": 1}


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.xlsx", "Save the sheet as CSV UTF-8"), ("a.csv.gz", "Unpack it"), ("a.tsv", r"data\.separator=tab")],
)
def test_a_kind_of_file_that_is_not_read_has_its_remedy(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"expected \.jsonl.*{words}"):
        at_a_site(tmp_path / name)


def test_a_line_is_not_read_by_itself_where_an_encoding_goes_on_over_lines(tmp_path: Path) -> None:
    path = lines_of(tmp_path / "train.jsonl", "iso2022_kr")
    assert both(path, how(encoding="iso2022_kr")) == ROWS
    with pytest.raises(DataError, match="would spoil the others"):
        at_a_site(path, how(encoding="iso2022_kr"))


def test_the_encoding_is_named_whatever_another_has_made_of_the_rest(tmp_path: Path) -> None:
    """EUC-KR lacks some syllables that CP949 has."""
    path = tmp_path / "train.csv"
    path.write_bytes("질문,답변\n한글,똠방각하 펲시\n".encode("cp949"))
    (found,) = at_a_site(path, how(encoding="euc-kr"))
    with pytest.raises(DataError, match=r"line 2.*Set data\.encoding=cp949"):
        both(path, how(encoding="euc-kr"))
    assert "Set data.encoding=cp949" in str(found)


@pytest.mark.parametrize(
    "values", [{"encoding": "nope"}, {"encoding": "rot13"}, {"separator": ""}, {"separator": ",,"}]
)
def test_an_unknown_way_of_writing_is_refused(values: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        how(**values)
