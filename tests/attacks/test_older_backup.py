"""Attack: a sound but older copy of the ledger is put back, and what was spent since is free again.

Stopped by the anchor, before the server is asked anything, and in a site that runs.
"""

import pytest

from client.doctor import check
from fedllm.errors import BudgetExceeded, LedgerError
from fedllm.privacy.ledger import LedgerFile
from tests.attacks.ledgers import EVENT, ROUNDS, Branch


def test_an_older_ledger_is_refused_at_its_start_and_while_the_site_runs(branch: Branch) -> None:
    branch.spend(1)
    path = branch.office.ledger.file
    backup = path.read_bytes()
    branch.spend()
    running = branch.open()
    path.write_bytes(backup)
    LedgerFile(path).verify([branch.office.identity.public])  # sound in itself
    with pytest.raises(LedgerError, match=r"lacks entry 8.*ledger restart"):
        branch.open()
    with pytest.raises(LedgerError, match="lacks entry 8"):
        running.reserve("second", 1, "request", EVENT)
    assert path.read_bytes() == backup
    assert any("lacks entry 8" in finding.text for finding in check(branch.folder) if not finding.right)


def test_a_ledger_that_went_on_another_way_is_refused(branch: Branch) -> None:
    branch.spend(1)
    place = branch.office.ledger
    backup, anchor = place.file.read_bytes(), place.anchor.read_bytes()
    branch.spend()
    newest = place.anchor.read_bytes()
    place.file.write_bytes(backup)
    place.anchor.write_bytes(anchor)
    ledger = branch.open()  # where both were rolled back, only the server remembers
    for round_ in range(2, ROUNDS + 1):
        ledger.reserve("second", round_, "request", EVENT)
        ledger.reserve("second", round_, "request", EVENT)
        ledger.abort("second", round_)
    assert ledger.file.head().number >= 8
    place.anchor.write_bytes(newest)
    with pytest.raises(LedgerError, match="lacks entry 8"):
        branch.open()


def test_the_owner_states_what_the_older_ledger_lacks_and_it_goes_on(branch: Branch) -> None:
    branch.spend(1)
    path = branch.office.ledger.file
    backup = path.read_bytes()
    branch.spend()
    path.write_bytes(backup)
    branch.owner("restart", "--lost", f"{branch.plan_file()}={ROUNDS - 1}")
    ledger = branch.open()
    assert sum(event.steps for event in ledger.events()) == ROUNDS * EVENT.steps
    with pytest.raises(BudgetExceeded):
        ledger.reserve("second", 1, "request", EVENT)
    ledger.file.verify([branch.office.identity.public])
