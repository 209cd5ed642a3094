"""Attack: a round is used, or used again, under a charge that does not pay for it: that of a ledger that is older than
the answer, that of another account, or one that stated another split of the units.

Stopped by the reservation: what was open before a restart, for other records or with other sides is charged anew. What
is lost counts on every account, and what was open before a restart is never given back.
"""

import math
from pathlib import Path

import pytest

from fedllm.crypto.identity import Identity
from fedllm.errors import BudgetExceeded, LedgerError
from fedllm.privacy.accounting import AccountingEvent
from fedllm.privacy.ledger import EVERYTHING, LedgerFile, Loss, PrivacyLedger, fingerprint, restart
from fedllm.privacy.ledger_place import LedgerPlace
from tests.attacks.ledgers import DELTA, EVENT, Branch

OWNER = Identity.generate()
SCORE = 2.0  # noise multiplier


def open_(folder: Path, data_set: str = "site", share: float = 0.1) -> PrivacyLedger:
    place = LedgerPlace(folder / "ledger.db", folder / "ledger.anchor", data_set)
    return PrivacyLedger(place, 30.0, DELTA, OWNER, share=share)


@pytest.mark.parametrize("copied", [1, 2], ids=["first try", "retry"])
def test_a_round_that_is_open_in_an_older_ledger_is_not_answered_twice_for_one_charge(
    branch: Branch, copied: int
) -> None:
    """Nothing but the release is lost, which is no charge: the owner rightly states that no charge is lost."""
    path, ledger = branch.office.ledger.file, branch.open()
    given = {ledger.reserve("first", 1, "request", EVENT).coins for _ in range(copied)}
    backup = path.read_bytes()
    ledger.release(ledger.reserve("first", 1, "request", EVENT), b"one answer")
    path.write_bytes(backup)
    branch.owner("restart", "--lost", "nothing")
    ledger = branch.open()
    again = ledger.reserve("first", 1, "request", EVENT)
    assert again.reply is None
    assert again.coins not in given, "another sample"
    assert ledger.events() == [EVENT] * 2, "and paid for"
    retry = ledger.reserve("first", 1, "request", EVENT)
    assert retry.coins == again.coins, "what is charged since the restart may be retried"
    ledger.release(retry, b"another answer")
    assert ledger.events() == [EVENT] * 2
    ledger.file.verify([branch.office.identity.public])


def test_what_was_open_before_a_restart_is_not_given_back(branch: Branch) -> None:
    path, ledger = branch.office.ledger.file, branch.open()
    reservation = ledger.reserve("first", 1, "request", EVENT)
    ledger.reserve("first", 2, "request", EVENT)
    backup = path.read_bytes()
    ledger.release(reservation, b"reply")
    path.write_bytes(backup)
    branch.owner("restart", "--lost", "nothing")
    for round_ in (1, 2):
        with pytest.raises(LedgerError, match="before this ledger was restarted"):
            branch.owner("abort", "first", round_)
    ledger = branch.open()
    assert ledger.events() == [EVENT] * 2
    ledger.reserve("first", 1, "request", EVENT)  # charged since: that one can be given back
    branch.owner("abort", "first", 1)
    assert branch.open().events() == [EVENT] * 2
    with pytest.raises(LedgerError, match="aborted"):
        branch.open().reserve("first", 1, "request", EVENT)
    branch.open().file.verify([branch.office.identity.public])


@pytest.mark.parametrize("declared", ["before", "after"])
def test_what_is_lost_counts_on_every_account(tmp_path: Path, declared: str) -> None:
    """The owner of a lost ledger states what a run cost, and the records that paid for it are on another account."""
    ledger = open_(tmp_path)
    if declared == "before":
        ledger.file.declare_disjoint("2026", fingerprint([b"x"]), OWNER)
    backup = (tmp_path / "ledger.db").read_bytes()
    if declared == "after":
        ledger.file.declare_disjoint("2026", fingerprint([b"x"]), OWNER)
    own = open_(tmp_path, "2026")
    own.release(own.reserve("first", 1, "request", EVENT), b"reply")
    assert (own.account, ledger.events()) == ("2026", [])
    (tmp_path / "ledger.db").write_bytes(backup)
    restart(LedgerPlace(tmp_path / "ledger.db", tmp_path / "ledger.anchor"), OWNER, [Loss("first", EVENT)])
    if declared == "after":
        LedgerFile(tmp_path / "ledger.db", tmp_path / "ledger.anchor").declare_disjoint(
            "2026", fingerprint([b"x"]), OWNER
        )
    for data_set in ("site", "2026"):
        again = open_(tmp_path, data_set)
        assert again.account == data_set
        assert again.events() == again.events("evaluation") == [EVENT]
        assert again.file.spent(data_set, DELTA) == again.spent()
        with pytest.raises(BudgetExceeded):
            again.reserve("second", 1, "request", AccountingEvent(1.0, 0.1, 50))
        again.reserve(f"second {data_set}", 1, "request", EVENT)
        assert again.events() == [EVENT] * 2
    again.file.verify([OWNER.public])


def test_where_nobody_knows_what_is_lost_no_account_has_a_budget(tmp_path: Path) -> None:
    open_(tmp_path)
    (tmp_path / "ledger.db").unlink()
    restart(LedgerPlace(tmp_path / "ledger.db", tmp_path / "ledger.anchor"), OWNER, [EVERYTHING])
    open_(tmp_path).file.declare_disjoint("2026", fingerprint([b"x"]), OWNER)
    for data_set in ("site", "2026"):
        assert open_(tmp_path, data_set).spent().epsilon == math.inf
        with pytest.raises(BudgetExceeded):
            open_(tmp_path, data_set).check("second", EVENT)


def test_a_retry_on_records_of_another_account_is_paid_for_by_that(tmp_path: Path) -> None:
    ledger = open_(tmp_path)
    first = ledger.reserve("first", 1, "request", EVENT)  # the site dies
    ledger.file.declare_disjoint("2026", fingerprint([b"x"]), OWNER)
    own = open_(tmp_path, "2026")  # and its settings name other records
    assert own.reserve("first", 1, "request", EVENT).coins != first.coins
    assert own.events() == ledger.events() == [EVENT]
    assert ledger.reserve("first", 1, "request", EVENT).coins not in (first.coins, b"")  # and back
    assert ledger.events() == [EVENT] * 2
    ledger.file.verify([OWNER.public])


def test_a_retry_after_units_have_changed_sides_is_paid_for_on_both(tmp_path: Path) -> None:
    """A unit that evaluated, and trains by now, would have paid for the score alone."""
    ledger = open_(tmp_path)
    first = ledger.reserve("first", 1, "request", EVENT, SCORE)
    assert (len(ledger.events()), len(ledger.events("evaluation"))) == (1, 1)
    later = open_(tmp_path, share=0.3)
    again = later.reserve("first", 1, "request", EVENT, SCORE)
    assert again.coins != first.coins
    scored = AccountingEvent(1.0, SCORE, 1)
    assert later.events("evaluation") == [scored, EVENT, scored]
    assert later.events() == [EVENT, EVENT, scored]
    assert later.reserve("first", 1, "request", EVENT, SCORE).coins == again.coins
    later.file.verify([OWNER.public])
