"""Attack: the ledger's file is gone, because its mount is missing or its container was made anew. Full budget again?

Stopped by the anchor beside the keys (fedllm.privacy.ledger_place), which the ledger has to contain.
"""

import math
import shutil
from pathlib import Path

import pytest

import client.service
from client.doctor import check
from fedllm.crypto.hash_chain import open_entry
from fedllm.errors import BudgetExceeded, FedllmError, LedgerError
from fedllm.privacy.ledger_place import BEFORE, read_anchor, write_anchor
from tests.attacks.ledgers import BUDGET, EVENT, PLAN, Branch


@pytest.mark.parametrize("gone", ["file", "folder", "while it runs"])
def test_a_ledger_that_is_missing_is_refused_and_not_made_anew(branch: Branch, gone: str) -> None:
    branch.spend(1)
    running = branch.open()
    path = branch.office.ledger.file
    path.unlink() if gone != "folder" else shutil.rmtree(path.parent)
    with pytest.raises(LedgerError, match=r"missing: it had at least 5 entries\..*ledger restart"):
        branch.open()
    with pytest.raises(LedgerError):
        running.reserve("first", 2, "request", EVENT)
    with pytest.raises(LedgerError, match="missing"):
        client.service._open_ledger(branch.office)
    assert not path.exists()
    for look in ("show", "verify", "disjoint b"):
        with pytest.raises(FedllmError):
            branch.owner(*look.split())
    assert any("is missing" in finding.text for finding in check(branch.folder) if not finding.right)


def test_a_ledger_without_its_anchor_is_refused(branch: Branch) -> None:
    branch.spend(1)
    running = branch.open()
    branch.office.ledger.anchor.unlink()
    with pytest.raises(LedgerError, match=r"lost its anchor.*ledger restart"):
        branch.open()
    with pytest.raises(LedgerError, match="lost its anchor"):
        running.reserve("first", 2, "request", EVENT)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"number": "3", "digest": ""}', b"\xff", b'{"number": -5, "digest": ""}']
)
def test_an_anchor_that_cannot_be_read_is_refused(branch: Branch, content: bytes) -> None:
    branch.spend(1)
    branch.office.ledger.anchor.write_bytes(content)
    with pytest.raises(LedgerError, match="no anchor"):
        branch.open()


def test_a_site_that_died_while_its_ledger_was_made_starts_anew(branch: Branch) -> None:
    """Nothing was spent yet: the anchor says so, and the ledger is not there or empty."""
    place = branch.office.ledger
    write_anchor(place.anchor, BEFORE)
    branch.spend(1)
    write_anchor(place.anchor, BEFORE)  # died before the anchor followed: it may be behind, and catches up
    branch.open()
    assert read_anchor(place.anchor) == branch.open().file.head()


def test_the_owner_states_what_was_lost_and_it_counts(branch: Branch) -> None:
    branch.spend(2)
    branch.office.ledger.file.unlink()
    for wrong in ("x", "plan.json=0", "plan.json=-1", f"{branch.plan_file()}=1e3", "gone.json=3"):
        with pytest.raises(FedllmError):
            branch.owner("restart", "--lost", wrong)
    said = branch.owner("restart", "--lost", f"{branch.plan_file()}=2")
    assert "fedllm server new-ledger busan" in said
    ledger = branch.open()
    assert sum(event.steps for event in ledger.events()) == 2 * EVENT.steps
    ledger.reserve("first", 3, "request", EVENT)
    with pytest.raises(BudgetExceeded):
        ledger.reserve("another", 1, "request", EVENT)
    entries = [open_entry(line) for line in ledger.file.lines()]
    assert [entry.kind for entry in entries] == ["opened", "restarted", "lost", "budget", "split", "reserved"]
    assert entries[1].body["anchor"]["number"] == 6
    assert entries[2].body["run"] == PLAN.run
    ledger.file.verify([branch.office.identity.public])
    assert "restarted" not in branch.owner("show")
    assert "1 lost" in branch.owner("show")
    with pytest.raises(LedgerError, match="whole"):
        branch.owner("restart", "--lost", "nothing")


def test_where_nobody_knows_what_was_lost_nothing_more_is_trained(branch: Branch) -> None:
    branch.spend(1)
    branch.office.ledger.file.unlink()
    branch.owner("restart", "--lost", "everything")
    ledger = branch.open()
    assert ledger.spent().epsilon == math.inf
    with pytest.raises(BudgetExceeded):
        ledger.check("another", EVENT)


def test_new_keys_beside_the_newest_ledger_go_on_with_it(branch: Branch, tmp_path: Path) -> None:
    """The keys were lost and with them the anchor: the owner says that nothing else was."""
    branch.spend(2)
    after = Branch(tmp_path / "again")
    shutil.copytree(branch.folder / "data", after.folder / "data", dirs_exist_ok=True)
    with pytest.raises(LedgerError, match="lost its anchor"):
        after.open()
    after.owner("restart", "--lost", "nothing")
    ledger = after.open()
    assert ledger.events() == [EVENT] * 2
    assert ledger.spent().epsilon_rdp < BUDGET
    ledger.file.verify([after.office.identity.public])
