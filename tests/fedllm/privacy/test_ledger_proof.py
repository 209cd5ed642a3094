"""What the ledger can show and withstand: overlapping data, aborts, its chain, and death at any moment."""

import math
import os
import signal
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fedllm.privacy.ledger as module
from fedllm.chain import make_entry, open_entry, read_chain
from fedllm.crypto import Identity
from fedllm.errors import BudgetExceeded, ChainError, LedgerError
from fedllm.privacy.accounting import spent
from fedllm.privacy.ledger import DataSet, Head, LedgerFile, PrivacyLedger, Reservation, fingerprint
from tests.fedllm.privacy.test_ledger import AFFORDABLE, BUDGET, DELTA, EVENT, SIGNER

STRANGER = Identity.generate()


def records(first: int, last: int) -> DataSet:
    return fingerprint(f"record {number}".encode() for number in range(first, last))


def open_ledger(path: Path, data: DataSet, epsilon: float = BUDGET, signer: Identity = SIGNER) -> PrivacyLedger:
    return PrivacyLedger(path, data, epsilon, DELTA, signer)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def exhaust(ledger: PrivacyLedger) -> None:
    for round_ in range(1, AFFORDABLE + 1):
        ledger.release(ledger.reserve("run", round_, "request", EVENT), b"reply")


# ---- data sets -------------------------------------------------------------------------------------------------------

SAME = {
    "the same": records(0, 100),
    "in another order": fingerprint(f"record {number}".encode() for number in reversed(range(100))),
    "every record twice": fingerprint(f"record {number % 100}".encode() for number in range(200)),
    "extended": records(0, 150),
    "shortened": records(0, 10),
    "one record in common": records(99, 300),
}


@pytest.mark.parametrize("change", SAME)
def test_a_data_set_that_shares_a_record_buys_no_budget(path: Path, change: str) -> None:
    exhaust(open_ledger(path, records(0, 100)))
    again = open_ledger(path, SAME[change])
    for run in ("run", "another run"):
        with pytest.raises(BudgetExceeded):
            again.reserve(run, AFFORDABLE + 1, "request", EVENT)
    assert again.events() == [EVENT] * AFFORDABLE
    assert again.spent().epsilon == BUDGET


def test_a_person_in_both_data_sets_makes_them_share_their_budget(path: Path) -> None:
    exhaust(open_ledger(path, fingerprint([b"record 1", b"person A"])))
    with pytest.raises(BudgetExceeded):
        open_ledger(path, fingerprint([b"record 2", b"person A"])).check("another", EVENT)


def test_disjoint_data_sets_have_budgets_of_their_own(path: Path) -> None:
    exhaust(open_ledger(path, records(0, 100)))
    exhaust(open_ledger(path, records(100, 200)))
    merged = open_ledger(path, records(50, 150))  # of both: it has lost what each of them has
    assert len(merged.events()) == 2 * AFFORDABLE
    with pytest.raises(BudgetExceeded):
        merged.check("merged", EVENT)


def test_a_later_charge_to_a_data_set_counts_for_those_it_overlaps(path: Path) -> None:
    first, second = open_ledger(path, records(0, 100)), open_ledger(path, records(50, 150))
    first.reserve("run", 1, "request", EVENT)
    second.reserve("run", 1, "request", EVENT)
    assert first.events() == second.events() == [EVENT] * 2


def test_overlapping_data_sets_cannot_overdraw_the_budget_together(path: Path) -> None:
    sets = [records(0, 100), records(99, 200)]
    barrier = threading.Barrier(8, timeout=60)  # lest one that fails leaves the others waiting

    def spend(number: int) -> bool:
        ledger = open_ledger(path, sets[number % 2])
        barrier.wait()
        try:
            return ledger.reserve("run", number, "request", EVENT).reply is None
        except BudgetExceeded:
            return False

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(spend, range(8))) == AFFORDABLE
    assert open_ledger(path, sets[0]).spent().epsilon == BUDGET


def test_a_data_set_has_another_name_in_every_ledger(tmp_path: Path) -> None:
    """An export names it: who guesses the records could otherwise see whether the guess is right."""
    data, names = records(0, 100), set()
    for number in range(2):
        ledger = open_ledger(tmp_path / f"{number}.db", data)
        names |= set(ledger.file.data_sets())
        assert data.fingerprint not in "".join(str(open_entry(line).body) for line in ledger.file.lines())
    assert len(names) == 2


def test_the_chain_says_what_was_permitted_and_no_more_than_it_may(path: Path) -> None:
    exhaust(open_ledger(path, records(0, 100)))
    open_ledger(path, records(0, 100))  # the same budget is not said again
    open_ledger(path, records(0, 100), epsilon=math.inf)
    entries = [open_entry(line) for line in LedgerFile(path).lines()]
    assert [e.body for e in entries if e.kind == "budget"] == [
        {"epsilon": BUDGET, "delta": DELTA},
        {"epsilon": None, "delta": DELTA},
    ]
    assert [e.kind for e in entries if e.kind not in ("reserved", "released")] == ["opened", "budget", "data", "budget"]
    assert all(entry.at % 60 == 0 for entry in entries), "to the second it would tell how long a round took"
    known = {"dataset", "run", "round", "request", "sampling_rate", "noise_multiplier", "steps", "reply", "overlaps",
             "epsilon", "delta"}  # fmt: skip
    assert {key for entry in entries for key in entry.body} == known


# ---- aborted rounds --------------------------------------------------------------------------------------------------


def test_an_aborted_round_is_given_back_and_never_run(path: Path) -> None:
    ledger = open_ledger(path, records(0, 9))
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
    ledger = open_ledger(path, records(0, 9))
    ledger.release(ledger.reserve("run", 1, "request", EVENT), b"reply")
    ledger.reserve("run", 2, "request", EVENT)
    ledger.abort("run", 2)
    for run, round_ in (("run", 1), ("run", 2), ("run", 3), ("another", 1)):
        with pytest.raises(LedgerError, match="not reserved"):
            ledger.abort(run, round_)
    with pytest.raises(LedgerError, match="not reserved"):
        open_ledger(path, records(20, 30)).abort("run", 2)
    assert ledger.events() == [EVENT]


# ---- what `verify` finds ---------------------------------------------------------------------------------------------


@pytest.fixture
def written(path: Path) -> PrivacyLedger:
    """A ledger with entries of every kind."""
    ledger = open_ledger(path, records(0, 9), epsilon=math.inf)
    for round_ in (1, 2):
        ledger.release(ledger.reserve("run", round_, "request", EVENT), b"reply")
    ledger.reserve("run", 3, "request", EVENT)
    ledger.abort("run", 3)
    ledger.reserve("run", 4, "request", EVENT)
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
        "opened", "budget", "data", "reserved", "released", "reserved", "released", "reserved", "aborted", "reserved",
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
    "another data set": "UPDATE entry SET dataset = 'z' WHERE round = 1",
    "emptied": "DELETE FROM entry",
    "never signed": "INSERT INTO entry SELECT 99, dataset, run, 98, request, sampling_rate, noise_multiplier, steps, "
    "state, reserved_at, reply FROM entry WHERE round = 1",
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
    entry = open_entry(written.file.lines()[number])
    if change == "removed":
        edit(path, "DELETE FROM chain WHERE number = ?", values=(number,))
    elif change == "altered":
        edit(path, "UPDATE chain SET line = replace(line, 'payload', 'paybad') WHERE number = ?", values=(number,))
    else:
        line = make_entry(entry.number, entry.previous, entry.kind, entry.at, entry.body, STRANGER)
        edit(path, "UPDATE chain SET line = ? WHERE number = ?", values=(line, number))
    if change == "removed" and number == 9:  # the newest: the table still knows what it said
        with pytest.raises(ChainError, match="never signed"):
            written.file.verify([SIGNER.public])
        return
    with pytest.raises(ChainError, match=f"entry {number}:") as error:
        written.file.verify([SIGNER.public])
    assert str(path) in str(error.value)


def test_a_cut_tail_is_found_by_the_head_that_others_keep(written: PrivacyLedger, path: Path) -> None:
    """Table and chain cut alike look sound; who was shown a later head knows better."""
    head = written.file.head()
    edit(path, "DELETE FROM chain WHERE number = 9", "DELETE FROM entry WHERE round = 4")
    assert written.file.verify([SIGNER.public]).number == 8
    assert not written.file.knows(head)


def test_a_backup_that_was_put_back_does_not_know_what_came_after_it(written: PrivacyLedger, path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    backup = path.read_bytes()
    before = written.file.head()
    written.reserve("run", 5, "request", EVENT)
    after = written.file.head()
    path.write_bytes(backup)
    assert LedgerFile(path).knows(before)
    assert not LedgerFile(path).knows(after)
    open_ledger(path, records(0, 9), epsilon=math.inf).reserve("other", 5, "request", EVENT)
    assert not LedgerFile(path).knows(after), "nor after it has gone on another way"
    assert not LedgerFile(path).knows(Head(10**9, after.digest))


@given(st.integers(0, 9), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
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
    ledger = open_ledger(path, records(0, 9), math.inf, successor)
    ledger.reserve("run", 7, "request", EVENT)
    written.release(Reservation("run", 4, None), b"reply")  # by the keys of before, in a service not yet started anew
    for trusted in ([SIGNER.public], [successor.public], None):
        ledger.file.verify(trusted)
    kinds = [open_entry(line).kind for line in ledger.file.lines()]
    assert (kinds.count("key"), kinds[-2:]) == (1, ["reserved", "released"])


def test_a_ledger_whose_keys_were_lost_goes_on_and_says_so(written: PrivacyLedger, path: Path) -> None:
    ledger = open_ledger(path, records(0, 9), math.inf, STRANGER)
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
    open_ledger(path, records(0, 9))
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path} {kind} rw 0 0\n", "utf-8")
    monkeypatch.setattr(module, "_MOUNTS", mounts)
    for place in (path, tmp_path / "new" / "folder" / "ledger.db"):
        with pytest.raises(LedgerError, match="network file system"):
            open_ledger(place, records(0, 9))
        assert place == path or not place.exists()
    mounts.write_text(f"server:/x / {kind} rw 0 0\n/dev/sda {tmp_path} ext4 rw 0 0\n", "utf-8")
    open_ledger(path, records(0, 9))


def test_a_clock_that_goes_backwards_frees_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = open_ledger(path, records(0, 9))
    ledger.reserve("run", 1, "request", EVENT)
    first = ledger.file.charges()[0].reserved_at
    monkeypatch.setattr(time, "time", lambda: first - 1e7)
    ledger.reserve("run", 2, "request", EVENT)
    assert [charge.reserved_at for charge in ledger.file.charges()] == [first, first]
    times = [open_entry(line).at for line in ledger.file.lines()]
    assert times == sorted(times)


def test_a_ledger_that_another_process_holds_is_a_ledger_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = open_ledger(path, records(0, 9))
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="locked"):
            ledger.reserve("run", 1, "request", EVENT)
    assert ledger.events() == []
    ledger.reserve("run", 1, "request", EVENT)


def test_a_ledger_of_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_ledger(path, records(0, 9)).reserve("run", 1, "request", EVENT)
    user = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(LedgerError, match="belongs to user"):
        open_ledger(path, records(0, 9))


# ---- death at every step ---------------------------------------------------------------------------------------------

DATA = records(0, 20)


def take_rounds(path: Path, rounds: int, say: Callable[[bytes], None]) -> None:
    """A site's part in a run: what it says is done is on disk."""
    ledger = open_ledger(path, DATA, epsilon=100.0)
    for round_ in range(1, rounds + 1):
        reservation = ledger.reserve("run", round_, f"request {round_}", EVENT)
        say(b"c")
        if reservation.reply is None:
            ledger.release(reservation, b"reply %d" % round_)
        say(b"r")


class Countdown:
    """Stands for sqlite3.connect: kills the process before the n-th statement."""

    def __init__(self, kill_at: int) -> None:
        self.kill_at, self.count, self.connect = kill_at, 0, sqlite3.connect

    def __call__(self, *arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = self.connect(*arguments, **options)
        connection.set_trace_callback(self.step)
        return connection

    def step(self, _: str) -> None:
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_at(path: Path, rounds: int, number: int) -> bytes:
    """Run `take_rounds` in a process that dies at its n-th statement; return what it had said."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            module.sqlite3.connect = Countdown(number)  # type: ignore[assignment]
            take_rounds(path, rounds, lambda word: os.write(writable, word) and None)
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
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # os.fork, Python 3.12
@pytest.mark.parametrize("rounds", [3, pytest.param(7, marks=pytest.mark.soak)])  # from the third, replies are dropped
def test_a_site_that_dies_at_any_statement_has_paid_for_all_it_may_have_done_and_goes_on(
    memory: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    spent([EVENT], DELTA)  # once, for all children
    counter = Countdown(0)
    with monkeypatch.context() as patch:
        patch.setattr(module.sqlite3, "connect", counter)
        take_rounds(memory / "whole.db", rounds, lambda _: None)
    assert counter.count >= 28 * rounds
    for number in range(1, counter.count + 1):
        path = memory / f"{number}.db"
        said = killed_at(path, rounds, number)
        ledger = open_ledger(path, DATA, epsilon=100.0)
        charges = ledger.file.charges()
        charged, released = said.count(b"c"), said.count(b"r")
        assert charged <= len(charges) <= charged + 1, number
        assert [charge.state for charge in charges[:released]] == ["RELEASED"] * released, number
        assert ledger.events() == [EVENT] * len(charges), number
        ledger.file.verify([SIGNER.public])
        if released:  # the last that was said to be done
            again = ledger.reserve("run", released, f"request {released}", EVENT)
            assert again.reply == b"reply %d" % released, number
        for round_ in range(released + 1, rounds + 1):
            reservation = ledger.reserve("run", round_, f"request {round_}", EVENT)
            if reservation.reply is None:
                ledger.release(reservation, b"reply %d" % round_)
        assert ledger.events() == [EVENT] * rounds, number
        ledger.file.verify([SIGNER.public])
