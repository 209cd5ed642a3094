"""Attack: the same records, exported once more, differ in a column, a space or a number's spelling. New budget?

Stopped by the account, which is the site's, whatever its records look like. The comparison of records only warns, and
finds the same records under all these spellings.
"""

import unicodedata
from collections.abc import Callable
from typing import Any

import pytest

from client.service import read_data_set
from fedllm.crypto.hash_chain import open_entry
from fedllm.errors import BudgetExceeded, ConfigError
from tests.attacks.ledgers import EVENT, Branch

Row = dict[str, Any]
EXPORTS: dict[str, Callable[[Row], Row]] = {
    "one column more": lambda row: {**row, "exported": "2026-11-02"},
    "an empty column more": lambda row: {**row, "note": None},
    "a space at the end": lambda row: {key: f"{value} " for key, value in row.items()},
    "a space at the end of a column's name": lambda row: {f"{key} " if key == "id" else key: row[key] for key in row},
    "numbers as floats": lambda row: {**row, "id": float(row["id"])},
    "numbers as text of floats": lambda row: {**row, "id": f"{row['id']}.0"},
    "decomposed letters": lambda row: {key: unicodedata.normalize("NFD", str(value)) for key, value in row.items()},
    "invisible characters": lambda row: {**row, "answer": f"\ufeff{row['answer'][:1]}\u200b{row['answer'][1:]}"},
    "other line ends": lambda row: {**row, "question": row["question"].replace("\n", "\r\n")},
    "columns in another order": lambda row: dict(reversed(row.items())),
}


@pytest.mark.parametrize("export", EXPORTS)
def test_records_that_are_exported_once_more_have_no_new_budget(branch: Branch, export: str) -> None:
    branch.write([{**row, "answer": f"é답 {row['answer']}", "question": f"a\nb{row['id']}"} for row in branch.rows()])
    branch.spend()
    before = read_data_set(branch.office)
    branch.write([EXPORTS[export](row) for row in branch.rows()])
    with pytest.raises(BudgetExceeded):
        branch.open().reserve("another", 1, "request", EVENT)
    again = read_data_set(branch.office)
    assert len(before & again) >= 9, "each of the nine records is known again"


@pytest.mark.parametrize("change", ["other records altogether", "a new name in site.yaml"])
def test_what_else_an_owner_changes_has_no_new_budget_either(branch: Branch, change: str) -> None:
    branch.spend()
    if change == "a new name in site.yaml":
        branch.set("  train: records.jsonl", "  train: records.jsonl\n  name: fresh")
    else:
        branch.write([{"id": number, "question": f"new {number}", "answer": "x"} for number in range(20)])
    with pytest.raises(BudgetExceeded):
        branch.open().check("another", EVENT)


def test_a_budget_of_its_own_takes_the_owners_signed_word_and_a_contradiction_is_told(branch: Branch) -> None:
    branch.spend()
    with pytest.raises(ConfigError, match=r"Let site\.yaml name this data set"):
        branch.owner("disjoint", "2026")
    branch.set("  train: records.jsonl", '  train: records.jsonl\n  name: "2026"')
    branch.write([{**row, "exported": "again"} for row in branch.rows()])
    with pytest.raises(AssertionError, match=r"WARNING: 9 records, texts or persons of 2026 .* charged to site, too"):
        branch.owner("disjoint", "2026", said="n\n")  # its exit code says that it was not done
    with pytest.raises(BudgetExceeded):
        branch.open().check("another", EVENT)
    branch.write([{"id": number, "question": f"new {number}", "answer": f"x{number}"} for number in range(20)])
    said = branch.owner("disjoint", "2026", said="y\n")
    assert "WARNING" not in said
    ledger = branch.open()
    ledger.reserve("another", 1, "request", EVENT)
    assert ledger.events() == [EVENT]
    entry = next(open_entry(line) for line in ledger.file.lines() if open_entry(line).kind == "disjoint")
    assert (entry.body, entry.signer) == ({"account": "2026"}, branch.office.identity.public)
    assert "2026" in branch.owner("show")
