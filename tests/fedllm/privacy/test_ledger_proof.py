"""What the ledger can show and withstand: overlapping data, aborts, its chain, and death at any moment."""

import math
import os
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fedllm.privacy.ledger as module
from fedllm.crypto.hash_chain import LedgerHead, make_entry, open_entry, read_chain
from fedllm.crypto.identity import Identity
from fedllm.errors import BudgetExceeded, ChainError, LedgerError
from fedllm.privacy import ledger_place
from fedllm.privacy.accounting import spent
from fedllm.privacy.ledger import DataSet, LedgerFile, PrivacyLedger, Reservation, fingerprint
from tests.conftest import SOAK
from tests.fedllm.privacy.test_ledger import AFFORDABLE, BUDGET, DELTA, EVENT, SIGNER, place_of

STRANGER = Identity.generate()


def records(first: int, last: int) -> DataSet:
    return fingerprint(f"record {number}".encode() for number in range(first, last))


def open_ledger(
    path: Path, data_set: str = "site", epsilon: float = BUDGET, signer: Identity = SIGNER
) -> PrivacyLedger:
    return PrivacyLedger(place_of(path, data_set), epsilon, DELTA, signer)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site" / "ledger.db"


def exhaust(ledger: PrivacyLedger) -> None:
    for round_ in range(1, AFFORDABLE + 1):
        ledger.release(ledger.reserve("run", round_, "request", EVENT), b"reply")


# ---- data sets -------------------------------------------------------------------------------------------------------


def test_whatever_its_data_set_is_called_a_site_has_one_budget(path: Path) -> None:
    exhaust(open_ledger(path))
    again = open_ledger(path, "another name")
    again.compare(records(0, 5))
    for run in ("run", "another run"):
        with pytest.raises(BudgetExceeded):
            again.reserve(run, AFFORDABLE + 1, "request", EVENT)
    assert again.events() == [EVENT] * AFFORDABLE


def test_a_data_set_that_was_declared_disjoint_has_a_budget_of_its_own(path: Path) -> None:
    ledger = open_ledger(path)
    exhaust(ledger)
    ledger.file.declare_disjoint("부산 2026", records(0, 9), SIGNER)
    other = open_ledger(path, "부산 2026")
    other.reserve("other", 1, "request", EVENT)
    assert (other.events(), ledger.events()) == ([EVENT], [EVENT] * AFFORDABLE)
    assert ledger.file.accounts() == ["site", "부산 2026"]
    with pytest.raises(BudgetExceeded):
        open_ledger(path, "부산 2025").check("other still", EVENT)  # nobody declared that one
    declared = [open_entry(line) for line in ledger.file.lines() if open_entry(line).kind == "disjoint"]
    assert [(entry.body, entry.signer) for entry in declared] == [({"account": "부산 2026"}, SIGNER.public)]
    ledger.file.verify([SIGNER.public])


@pytest.mark.parametrize("name", ["", "site", " a", "a\u200b", "a" * 65, "1.0"])
def test_a_name_that_could_be_taken_for_another_is_not_declared(path: Path, name: str) -> None:
    ledger = open_ledger(path)
    with pytest.raises(LedgerError, match="expected a name"):
        ledger.file.declare_disjoint(name, records(0, 9), SIGNER)
    ledger.file.declare_disjoint("a", records(0, 9), SIGNER)
    with pytest.raises(LedgerError, match="declared disjoint before"):
        ledger.file.declare_disjoint("a", records(0, 9), SIGNER)


def test_what_contradicts_a_declaration_is_told_and_changes_nothing_that_leaves_the_site(path: Path) -> None:
    ledger = open_ledger(path)
    assert ledger.compare(records(0, 9)) == []
    assert ledger.file.overlaps("b", records(8, 20)) == {"site": 1}
    ledger.file.declare_disjoint("b", records(8, 20), SIGNER)
    open_ledger(path, "b")
    before = ledger.file.lines()
    assert open_ledger(path, "b").compare(records(8, 20)) == ["site"]
    assert open_ledger(path, "b").compare(records(50, 60)) == ["site"], "what was seen once stays seen"
    assert open_ledger(path).compare(records(0, 3)) == ["b"]
    assert ledger.file.lines() == before
    assert open_ledger(path, "b").account == "b"


def test_a_round_that_was_answered_is_not_answered_anew_from_another_account(path: Path) -> None:
    ledger = open_ledger(path)
    ledger.release(ledger.reserve("run", 1, "request", EVENT), b"reply")
    ledger.file.declare_disjoint("b", records(0, 9), SIGNER)
    assert open_ledger(path, "b").reserve("run", 1, "request", EVENT).reply == b"reply"


def test_the_chain_says_what_was_permitted_and_no_more_than_it_may(path: Path) -> None:
    exhaust(open_ledger(path))
    open_ledger(path)  # the same budget is not said again
    open_ledger(path, epsilon=math.inf)
    entries = [open_entry(line) for line in LedgerFile(path).lines()]
    assert [e.body for e in entries if e.kind == "budget"] == [
        {"epsilon": BUDGET, "delta": DELTA},
        {"epsilon": None, "delta": DELTA},
    ]
    assert [e.kind for e in entries if e.kind not in ("reserved", "released")] == [
        "opened", "budget", "split", "budget",
    ]  # fmt: skip
    assert all(entry.at % 60 == 0 for entry in entries), "to the second it would tell how long a round took"
    known = {"account", "run", "round", "charge", "request", "sampling_rate", "noise_multiplier", "steps", "reply",
             "epsilon", "delta", "evaluation", "share", "rule", "key"}  # fmt: skip
    assert {key for entry in entries for key in entry.body} == known


# ---- aborted rounds --------------------------------------------------------------------------------------------------


def test_an_aborted_round_is_given_back_and_never_run(path: Path) -> None:
    ledger = open_ledger(path)
    for round_ in range(1, AFFORDABLE + 1):
        reservation = ledger.reserve("run", round_, "request", EVENT)
    ledger.abort("run", AFFORDABLE)
    assert ledger.events() == [EVENT] * (AFFORDABLE - 1)
    with pytest.raises(LedgerError, match="no open reservation"):  # so that its reply is never sent
        ledger.release(reservation, b"reply")
    for request in ("request", "another"):
        with pytest.raises(LedgerError):
            ledger.reserve("run", AFFORDABLE, request, EVENT)
    ledger.reserve("run", AFFORDABLE + 1, "request", EVENT)  # its budget is free for another
    with pytest.raises(BudgetExceeded):
        ledger.reserve("run", AFFORDABLE + 2, "request", EVENT)
    assert [charge.state for charge in ledger.file.charges()].count("ABORTED") == 1
    ledger.file.verify([SIGNER.public])


def test_only_what_is_reserved_can_be_aborted(path: Path) -> None:
    ledger = open_ledger(path)
    ledger.release(ledger.reserve("run", 1, "request", EVENT), b"reply")
    ledger.reserve("run", 2, "request", EVENT)
    ledger.abort("run", 2)
    for run, round_ in (("run", 1), ("run", 2), ("run", 3), ("another", 1)):
        with pytest.raises(LedgerError, match="not reserved"):
            ledger.abort(run, round_)
    assert ledger.events() == [EVENT]


# ---- what `verify` finds ---------------------------------------------------------------------------------------------


@pytest.fixture
def written(path: Path) -> PrivacyLedger:
    """A ledger with entries of every kind."""
    ledger = open_ledger(path, epsilon=math.inf)
    for round_ in (1, 2):
        ledger.release(ledger.reserve("run", round_, "request", EVENT), b"reply")
    ledger.reserve("run", 3, "request", EVENT)
    ledger.abort("run", 3)
    ledger.reserve("run", 4, "request", EVENT, 3.0)
    return ledger


def edit(path: Path, *statements: str, values: tuple[Any, ...] = ()) -> None:
    with closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.execute(statement, values)
        db.commit()


def test_a_sound_ledger_is_verified(written: PrivacyLedger) -> None:
    head = written.file.verify([SIGNER.public])
    assert head == written.file.head()
    assert written.file.knows(head)
    assert [open_entry(line).kind for line in written.file.lines()] == [
        "opened", "budget", "split", "reserved", "released", "reserved", "released", "reserved", "aborted", "reserved",
    ]  # fmt: skip


TABLE_EDITS = {
    "a cheaper event": "UPDATE entry SET noise_multiplier = 9.0 WHERE round = 1",
    "fewer steps": "UPDATE entry SET steps = 0 WHERE round = 2",
    "another rate": "UPDATE entry SET sampling_rate = 0.01 WHERE round = 2",
    "another request": "UPDATE entry SET request = 'x' WHERE round = 2",
    "given back": "UPDATE entry SET state = 'ABORTED' WHERE round = 1",
    "open again": "UPDATE entry SET state = 'RESERVED', reply = NULL WHERE round = 2",
    "removed": "DELETE FROM entry WHERE round = 1",
    "another run": "UPDATE entry SET run = 'y' WHERE round = 1",
    "another round": "UPDATE entry SET round = 99 WHERE round = 1",
    "another account": "UPDATE entry SET account = 'z' WHERE round = 1",
    "another score": "UPDATE entry SET evaluation = 9.0 WHERE round = 1",
    "no score": "UPDATE entry SET evaluation = NULL WHERE round = 4",
    "on both sides": "UPDATE entry SET both = 1 WHERE round = 1",
    "emptied": "DELETE FROM entry",
    "another charge": "UPDATE entry SET charge = 2 WHERE round = 1",
    "given out as lost": "UPDATE entry SET state = 'LOST' WHERE round = 1",
    "never signed": "INSERT INTO entry SELECT 99, account, run, 98, charge, request, sampling_rate, noise_multiplier, "
    "steps, evaluation, both, state, reserved_at, tries, coins, reply FROM entry WHERE round = 1",
}


@pytest.mark.parametrize("change", TABLE_EDITS)
def test_an_edit_of_the_table_is_found(written: PrivacyLedger, path: Path, change: str) -> None:
    edit(path, TABLE_EDITS[change])
    with pytest.raises(ChainError, match=str(path)):
        written.file.verify([SIGNER.public])


@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("change", ["removed", "altered", "signed by a stranger"])
def test_an_edit_of_the_chain_is_found_and_the_entry_named(
    written: PrivacyLedger, path: Path, number: int, change: str
) -> None:
    copy, entry = LedgerFile(path), open_entry(written.file.lines()[number])  # without the anchor, as an auditor has it
    if change == "removed":
        edit(path, "DELETE FROM chain WHERE number = ?", values=(number,))
    elif change == "altered":
        edit(path, "UPDATE chain SET line = replace(line, 'payload', 'paybad') WHERE number = ?", values=(number,))
    else:
        line = make_entry(entry.number, entry.previous, entry.kind, entry.at, entry.body, STRANGER)
        edit(path, "UPDATE chain SET line = ? WHERE number = ?", values=(line, number))
    if change == "removed" and number == 9:  # the newest: the table still knows what it said
        with pytest.raises(ChainError, match="never signed"):
            copy.verify([SIGNER.public])
        return
    with pytest.raises(ChainError, match=f"entry {number}:") as error:
        copy.verify([SIGNER.public])
    assert str(path) in str(error.value)


def test_a_cut_tail_is_found_by_the_head_that_others_keep(written: PrivacyLedger, path: Path) -> None:
    """Table and chain cut alike look sound; who was shown a later head knows better, and so does the anchor."""
    head = written.file.head()
    edit(path, "DELETE FROM chain WHERE number = 9", "DELETE FROM entry WHERE round = 4")
    assert LedgerFile(path).verify([SIGNER.public]).number == 8
    assert not LedgerFile(path).knows(head)
    with pytest.raises(LedgerError, match="lacks entry 9"):
        written.file.verify([SIGNER.public])


def test_a_backup_that_was_put_back_does_not_know_what_came_after_it(written: PrivacyLedger, path: Path) -> None:
    backup, before = path.read_bytes(), written.file.head()
    written.reserve("run", 5, "request", EVENT)
    after = written.file.head()
    path.write_bytes(backup)
    assert LedgerFile(path).knows(before)
    assert not LedgerFile(path).knows(after)
    assert not LedgerFile(path).knows(LedgerHead(10**9, after.digest))


@pytest.mark.parametrize("table", ["entry", "chain"])
def test_a_file_whose_tables_were_torn_apart_is_not_opened(written: PrivacyLedger, path: Path, table: str) -> None:
    edit(path, f"DELETE FROM {table} WHERE rowid = (SELECT min(rowid) + 3 FROM {table})")
    with pytest.raises(LedgerError, match="its chain others"):
        LedgerFile(path)


@given(st.integers(0, 9), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_of_the_export_is_found(written: PrivacyLedger, number: int, data: st.DataObject) -> None:
    lines = written.file.lines()
    line = bytearray(lines[number].encode())
    line[data.draw(st.integers(0, len(line) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    lines[number] = line.decode("utf-8", "replace")
    with pytest.raises(ChainError, match=f"entry {number}:"):
        read_chain(lines, "export", [SIGNER.public])


def test_new_keys_take_the_ledger_over(written: PrivacyLedger, path: Path) -> None:
    successor = Identity.generate()
    for _ in range(2):  # what was interrupted may be done again
        written.file.hand_over(SIGNER, successor)
    ledger = open_ledger(path, "site", math.inf, successor)
    ledger.reserve("run", 7, "request", EVENT)
    written.release(Reservation("run", 4, None), b"reply")  # by the keys of before, in a service not yet started anew
    for trusted in ([SIGNER.public], [successor.public], None):
        ledger.file.verify(trusted)
    kinds = [open_entry(line).kind for line in ledger.file.lines()]
    assert (kinds.count("key"), kinds[-2:]) == (1, ["reserved", "released"])


def test_a_ledger_whose_keys_were_lost_goes_on_and_says_so(written: PrivacyLedger, path: Path) -> None:
    ledger = open_ledger(path, "site", math.inf, STRANGER)
    ledger.reserve("run", 7, "request", EVENT)
    assert open_entry(ledger.file.lines()[10]).kind == "key"
    ledger.file.verify([STRANGER.public])
    with pytest.raises(ChainError, match="entry 10: signed by"):
        ledger.file.verify([SIGNER.public])


# ---- where the ledger lies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph"])
def test_a_network_file_system_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    open_ledger(path)
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path} {kind} rw 0 0\n", "utf-8")
    monkeypatch.setattr(ledger_place, "_MOUNTS", mounts)
    for place in (path, tmp_path / "new" / "folder" / "ledger.db"):
        with pytest.raises(LedgerError, match="network file system"):
            open_ledger(place)
        assert place == path or not place.exists()
    mounts.write_text(f"server:/x / {kind} rw 0 0\n/dev/sda {tmp_path} ext4 rw 0 0\n", "utf-8")
    open_ledger(path)


def test_a_clock_that_goes_backwards_frees_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = open_ledger(path)
    ledger.reserve("run", 1, "request", EVENT)
    first = ledger.file.charges()[0].reserved_at
    monkeypatch.setattr(time, "time", lambda: first - 1e7)
    ledger.reserve("run", 2, "request", EVENT)
    assert first <= ledger.file.charges()[1].reserved_at < first + 3600
    times = [open_entry(line).at for line in ledger.file.lines()]
    assert times == sorted(times)


def test_a_ledger_that_another_process_holds_is_a_ledger_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = open_ledger(path)
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="locked"):
            ledger.reserve("run", 1, "request", EVENT)
    assert ledger.events() == []
    ledger.reserve("run", 1, "request", EVENT)


def test_a_ledger_of_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_ledger(path).reserve("run", 1, "request", EVENT)
    user = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(LedgerError, match="belongs to user"):
        open_ledger(path)


# ---- death at every step ---------------------------------------------------------------------------------------------

ROUNDS = 4
LEAST_POINTS = 200


def take_rounds(path: Path, say: Callable[[bytes], None]) -> None:
    """A site's part in a run: what it says is done is on disk."""
    ledger = open_ledger(path, epsilon=100.0)
    for round_ in range(1, ROUNDS + 1):
        reservation = ledger.reserve("run", round_, f"request {round_}", EVENT)
        say(b"c")
        if reservation.reply is None:
            ledger.release(reservation, b"reply %d" % round_)
        say(b"r")


class Countdown:
    """Kills the process before the n-th statement or change of a file, whichever comes."""

    def __init__(self, patch: pytest.MonkeyPatch, kill_at: int) -> None:
        self.kill_at, self.count, self.connect = kill_at, 0, sqlite3.connect
        patch.setattr(module.sqlite3, "connect", self)
        for name in ("fsync", "link", "unlink", "rename", "replace", "open"):
            self.watch(patch, name)

    def __call__(self, *arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = self.connect(*arguments, **options)
        connection.set_trace_callback(self.step)
        return connection

    def watch(self, patch: pytest.MonkeyPatch, name: str) -> None:
        """Count calls of a function of `os`, which pathlib calls, too."""
        honest = getattr(os, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            self.step()
            return honest(*arguments, **options)

        patch.setattr(os, name, counted)

    def step(self, _: str = "") -> None:
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_at(path: Path, number: int) -> bytes:
    """Run `take_rounds` in a process that dies at its n-th step; return what it had said."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Countdown(pytest.MonkeyPatch(), number)
            take_rounds(path, lambda word: os.write(writable, word) and None)
        finally:
            os._exit(0)
    os.close(writable)
    os.waitpid(child, 0)
    said = os.read(readable, 1000)
    os.close(readable)
    return said


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory: a process is killed here, not the machine, so nothing has to wait for a disk."""
    distributed = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=distributed if os.access(distributed, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # os.fork, Python 3.12
@pytest.mark.slow
def test_a_site_that_dies_at_any_step_has_paid_for_all_it_may_have_done_and_goes_on(memory: Path) -> None:
    """Also where only the one file is left, as a copy or a backup has it, and the anchor still accepts it."""
    spent([EVENT], DELTA)  # once, for all children
    with pytest.MonkeyPatch.context() as patch:
        counter = Countdown(patch, 0)
        take_rounds(memory / "whole" / "site" / "ledger.db", lambda _: None)
    assert counter.count >= LEAST_POINTS
    for number in range(1, counter.count + 1, 1 if SOAK else 3):
        path = memory / str(number) / "site" / "ledger.db"
        said = killed_at(path, number)
        charged, released = said.count(b"c"), said.count(b"r")
        if path.exists() and not path.with_name("ledger.db-journal").exists():
            copy = memory / str(number) / "copy.db"
            copy.write_bytes(path.read_bytes())
            assert len(LedgerFile(copy).charges()) >= charged, number
        ledger = open_ledger(path, epsilon=100.0)
        charges = ledger.file.charges()
        assert charged <= len(charges) <= charged + 1, number
        assert [charge.state for charge in charges[:released]] == ["RELEASED"] * released, number
        assert ledger.events() == [EVENT] * len(charges), number
        ledger.file.verify([SIGNER.public])
        if released:  # the last that was said to be done
            again = ledger.reserve("run", released, f"request {released}", EVENT)
            assert again.reply == b"reply %d" % released, number
        for round_ in range(released + 1, ROUNDS + 1):
            reservation = ledger.reserve("run", round_, f"request {round_}", EVENT)
            if reservation.reply is None:
                ledger.release(reservation, b"reply %d" % round_)
        assert ledger.events() == [EVENT] * ROUNDS, number
        ledger.file.verify([SIGNER.public])
