"""Attack: one cell of one record is such that Python cannot hold it, and no record of the site can be used any more.

Stopped by reading cells one by one where a column fails: that cell counts as empty, and nobody else's row changes.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from client.records import Declared, load_records
from fedllm.config import ModelConfig, TextConfig
from fedllm.training.data import read_rows
from fedllm.training.model import Reader, load_reader

GOOD = [{"answer": f"a{number}", "cell": None} for number in range(5)]
TEXT = TextConfig(text="{answer}")


def not_utf_8(raw: bytes) -> pa.Array:
    """Text in CP949, as an old exporter writes it into a column that says UTF-8."""
    cells = pa.array([*(row["answer"].encode() for row in GOOD), raw], pa.binary())
    return pa.Array.from_buffers(pa.string(), len(cells), cells.buffers())


CELLS: dict[str, pa.Array] = {
    "year 38505": pa.array([None] * 5 + [2**60], pa.timestamp("us")),
    "the last day of a date32": pa.array([None] * 5 + [2**31 - 1], pa.date32()),
    "an unknown time zone": pa.array([None] * 5 + [0], pa.timestamp("s", "Nowhere/Atlantis")),
    "text within a list": pa.ListArray.from_arrays([0, 0, 0, 0, 0, 0, 1], not_utf_8(b"\xb1\xe8").slice(5)),
}


def rows(folder: Path, **columns: Any) -> list[Any]:
    path = folder / "train.parquet"
    pq.write_table(pa.table(columns), path)
    return list(read_rows(str(path), "train"))


@pytest.mark.parametrize("what", CELLS)
def test_a_cell_that_cannot_be_held_is_empty_and_changes_no_other(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In a column that no template uses, too."""
    found = rows(tmp_path, answer=[row["answer"] for row in GOOD] + ["last"], cell=CELLS[what])
    if what == "text within a list":
        assert [row["cell"] for row in found] == [[]] * 5 + [None]
    else:
        assert found == [*GOOD, {"answer": "last", "cell": None}]
    assert "1 cells of column cell cannot be read" in caplog.text


@pytest.fixture
def tiny_reader(tiny_llama: Path) -> Reader:
    return load_reader(ModelConfig(source=str(tiny_llama)))


def test_a_record_whose_own_text_cannot_be_read_contributes_nothing_and_alone(
    tmp_path: Path, tiny_reader: Reader
) -> None:
    found = rows(tmp_path, answer=not_utf_8(b"\xb1\xe8"))
    loaded = load_records(found, TEXT, None, Declared(6, "record"), {"m": tiny_reader})
    assert [len(unit) for unit in loaded.groups["m"]] == [1] * 5 + [0]
    (error,) = loaded.wrong["m"]
    assert "record 6" in str(error)
