"""The budget of a site is charged before anything is released, and survives crashes, races, repeats and damage."""

import math
import multiprocessing
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.crypto.identity import Identity
from fedllm.errors import BudgetExceeded, FedllmError, LedgerError
from fedllm.privacy.accounting import AccountingEvent, overrun, spent
from fedllm.privacy.ledger import PrivacyLedger, Reservation
from fedllm.privacy.ledger_place import LedgerPlace
from tests.fedllm.privacy.budgets import for_several_plans

ROOT = Path(__file__).parents[3]
DELTA = 1e-5
SIGNER = Identity.generate()
EVENT = AccountingEvent(0.1, 2.0, 1)
UNPROTECTED = AccountingEvent(0.1, 0.0, 1)  # costs everything, and nothing to account for
AFFORDABLE = 5
BUDGET = spent([EVENT] * AFFORDABLE, DELTA).epsilon  # admits five of EVENT in one plan, and not six
BUDGET_RDP = for_several_plans([EVENT] * AFFORDABLE, DELTA)  # the same, for several plans


def place_of(path: Path, data_set: str = "site") -> LedgerPlace:
    """A ledger's place; the anchor lies elsewhere, as beside a site's keys."""
    return LedgerPlace(path, path.parent.parent / f"{path.parent.name}.keys" / "anchor", data_set)


def open_ledger(path: Path, epsilon: float = BUDGET) -> PrivacyLedger:
    return PrivacyLedger(place_of(path), epsilon, DELTA, SIGNER)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site" / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> PrivacyLedger:
    return open_ledger(path)


def test_a_charge_is_on_disk_before_anything_is_released(ledger: PrivacyLedger, path: Path) -> None:
    ledger.reserve("run", 1, "request", EVENT)
    assert open_ledger(path).events() == [EVENT]
    assert open_ledger(path).spent(DELTA).epsilon == spent([EVENT], DELTA).epsilon


def test_the_budget_is_never_overdrawn(ledger: PrivacyLedger) -> None:
    for round_ in range(1, AFFORDABLE + 1):
        ledger.release(ledger.reserve("run", round_, "request", EVENT), b"reply")
    assert ledger.spent(DELTA).epsilon == BUDGET  # the last cent may be spent
    with pytest.raises(BudgetExceeded, match="budget"):
        ledger.reserve("run", AFFORDABLE + 1, "request", EVENT)
    assert ledger.spent(DELTA).epsilon == BUDGET


def test_a_refused_round_costs_nothing_and_a_cheaper_one_may_follow(path: Path) -> None:
    ledger = open_ledger(path, epsilon=spent([EVENT], DELTA).epsilon)
    with pytest.raises(BudgetExceeded):
        ledger.reserve("run", 1, "request", AccountingEvent(0.1, 2.0, 2))
    assert ledger.events() == []
    assert ledger.reserve("run", 1, "another", EVENT).reply is None
    assert ledger.events() == [EVENT]


def test_a_step_without_noise_exceeds_every_budget_but_an_unlimited_one(path: Path) -> None:
    with pytest.raises(BudgetExceeded):
        open_ledger(path, epsilon=1e9).reserve("run", 1, "request", UNPROTECTED)
    open_ledger(path, epsilon=math.inf).reserve("run", 1, "request", UNPROTECTED)
    with pytest.raises(BudgetExceeded):  # and afterwards nothing is left to protect
        open_ledger(path, epsilon=1e9).reserve("run", 2, "request", EVENT)


def test_a_budget_that_is_no_number_admits_nothing(path: Path) -> None:
    with pytest.raises(FedllmError):
        open_ledger(path, epsilon=math.nan).reserve("run", 1, "request", EVENT)


def test_the_budget_is_one_for_all_runs(path: Path) -> None:
    ledger = open_ledger(path, epsilon=BUDGET_RDP)
    for number in range(AFFORDABLE):
        ledger.reserve(f"run {number}", 1, "request", EVENT)
    assert ledger.spent().epsilon_rdp < BUDGET_RDP  # the gate is a little stricter: see accounting.overrun
    with pytest.raises(BudgetExceeded):
        ledger.reserve("another run", 1, "request", EVENT)
    with pytest.raises(BudgetExceeded):
        ledger.reserve("run 0", 2, "request", EVENT)
    assert len(ledger.events()) == AFFORDABLE


def test_a_second_plan_may_have_been_chosen_by_what_the_first_released_so_rdp_decides(ledger: PrivacyLedger) -> None:
    for round_ in range(1, AFFORDABLE):
        ledger.reserve("run", round_, "request", EVENT)
    assert spent([EVENT] * AFFORDABLE, DELTA).epsilon == BUDGET < BUDGET_RDP
    for run, event in (("another run", EVENT), ("run", AccountingEvent(0.1, 2.001, 1))):
        with pytest.raises(BudgetExceeded):  # the PLD of all together would just fit
            ledger.reserve(run, AFFORDABLE, "request", event)
    ledger.reserve("run", AFFORDABLE, "request", EVENT)


def test_a_released_round_is_answered_with_the_same_bytes_and_charged_once(ledger: PrivacyLedger, path: Path) -> None:
    reply = os.urandom(1000) + b"\0"
    ledger.release(ledger.reserve("run", 1, "request", EVENT), reply)
    for opened in (ledger, open_ledger(path)):
        assert opened.reserve("run", 1, "request", EVENT) == Reservation("run", 1, reply)
    assert ledger.events() == [EVENT]


def test_a_replay_is_answered_even_where_the_budget_is_gone(ledger: PrivacyLedger) -> None:
    for round_ in range(1, AFFORDABLE + 1):
        ledger.release(ledger.reserve("run", round_, "request", EVENT), b"reply %d" % round_)
    assert ledger.reserve("run", AFFORDABLE, "request", EVENT).reply == b"reply %d" % AFFORDABLE


@pytest.mark.parametrize("released", [False, True])
def test_the_same_round_of_another_request_is_refused(ledger: PrivacyLedger, released: bool) -> None:
    reservation = ledger.reserve("run", 1, "request", EVENT)
    if released:
        ledger.release(reservation, b"reply")
    with pytest.raises(LedgerError, match="another request"):
        ledger.reserve("run", 1, "altered request", EVENT)
    assert ledger.events() == [EVENT]
    assert ledger.reserve("run", 1, "request", EVENT).reply == (b"reply" if released else None)


def test_a_reserved_round_may_be_run_once_more_and_is_charged_once(ledger: PrivacyLedger) -> None:
    for _ in range(2):
        assert ledger.reserve("run", 1, "request", EVENT).reply is None
    assert ledger.events() == [EVENT]
    ledger.release(Reservation("run", 1, None), b"reply")
    for _ in range(3):
        assert ledger.reserve("run", 1, "request", EVENT).reply == b"reply"
    assert ledger.events() == [EVENT]


def test_the_last_two_replies_are_kept_and_no_released_round_is_ever_run_again(ledger: PrivacyLedger) -> None:
    for round_ in (1, 2, 3):
        ledger.release(ledger.reserve("run", round_, "request", EVENT), b"reply %d" % round_)
    assert ledger.reserve("run", 3, "request", EVENT).reply == b"reply 3"
    assert ledger.reserve("run", 2, "request", EVENT).reply == b"reply 2"
    with pytest.raises(LedgerError, match="round=1"):  # a reservation without a reply would mean: run it again
        ledger.reserve("run", 1, "request", EVENT)
    assert ledger.events() == [EVENT] * 3


def test_of_two_that_run_the_same_round_only_the_first_is_released(path: Path) -> None:
    one, other = open_ledger(path), open_ledger(path)
    first, second = (ledger.reserve("run", 1, "request", EVENT) for ledger in (one, other))
    one.release(first, b"first")
    with pytest.raises(LedgerError, match="no open reservation"):
        other.release(second, b"second")
    assert other.reserve("run", 1, "request", EVENT).reply == b"first"


@pytest.mark.parametrize(
    "forged", [Reservation("run", 2, None), Reservation("another", 1, None), Reservation("run", 1, b"x")], ids=repr
)
def test_nothing_is_released_without_an_open_reservation(ledger: PrivacyLedger, forged: Reservation) -> None:
    with pytest.raises(LedgerError, match="no open reservation"):
        ledger.release(forged, b"reply")
    ledger.release(ledger.reserve("run", 1, "request", EVENT), b"reply")
    with pytest.raises(LedgerError, match="no open reservation"):
        ledger.release(forged, b"another reply")
    assert ledger.reserve("run", 1, "request", EVENT).reply == b"reply"


def test_a_look_ahead_charges_nothing_and_refuses_what_a_reservation_would(ledger: PrivacyLedger) -> None:
    ledger.check("run", EVENT)
    assert ledger.events() == []
    for round_ in range(AFFORDABLE):
        ledger.reserve("run", round_, "request", EVENT)
    with pytest.raises(BudgetExceeded):
        ledger.check("another run", EVENT)
    ledger.check("run", EVENT)  # a run that goes on may still ask for replies of the past
    assert len(ledger.events()) == AFFORDABLE


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "release", "reopen"]),
        st.sampled_from(["run-a", "run-b"]),
        st.integers(1, 3),
        st.sampled_from(["request", "other"]),
    ),
    max_size=12,
)


@given(OPERATIONS)
def test_any_sequence_of_requests_keeps_the_books(operations: list[tuple[str, str, int, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "site" / "ledger.db"
        ledger = open_ledger(path)
        requests: dict[tuple[str, int], str] = {}
        coins: dict[tuple[str, int], list[bytes]] = {}  # as they were given out, twice each at most
        released: dict[tuple[str, int], bytes] = {}
        charged = 0
        for number, (operation, run, round_, request) in enumerate(operations):
            key = (run, round_)
            if operation == "reopen":
                ledger = open_ledger(path)
            elif operation == "release":
                reply = b"reply %d" % number
                try:
                    ledger.release(Reservation(run, round_, None), reply)
                except LedgerError:
                    assert key not in requests or key in released
                else:
                    assert key in requests
                    assert key not in released
                    released[key] = reply
            else:
                try:
                    reservation = ledger.reserve(run, round_, request, EVENT)
                except BudgetExceeded:
                    one_plan = {known for known, _ in requests} <= {run}
                    assert overrun([EVENT] * (charged + 1), DELTA, BUDGET, one_plan) is not None
                except LedgerError:
                    assert requests[key] != request or key in released
                else:
                    assert requests.setdefault(key, request) == request
                    assert reservation.reply == released.get(key)
                    if reservation.reply is None:
                        coins.setdefault(key, []).append(reservation.coins)
                        charged = sum(len(set(given)) for given in coins.values())
            assert ledger.events() == [EVENT] * charged
            assert ledger.spent(DELTA).epsilon <= BUDGET
            for given in coins.values():  # each pair of passes has coins, and a charge, of its own
                assert [given.index(each) for each in given] == [i - i % 2 for i in range(len(given))]
        ledger.file.verify([SIGNER.public])


def test_threads_together_cannot_overdraw_the_budget(path: Path) -> None:
    open_ledger(path)
    barrier = threading.Barrier(8)

    def spend(number: int) -> bool:
        ledger = open_ledger(path)
        barrier.wait()
        try:
            ledger.reserve("run", number, "request", EVENT)
        except BudgetExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        admitted = list(threads.map(spend, range(8)))
    assert sum(admitted) == AFFORDABLE
    assert open_ledger(path).spent(DELTA).epsilon == BUDGET


def test_threads_together_pay_for_every_second_pass(path: Path) -> None:
    barrier = threading.Barrier(6)

    def spend(_: int) -> Reservation:
        barrier.wait()  # all open and reserve at once, on a file that does not exist yet
        return open_ledger(path).reserve("run", 1, "request", EVENT)

    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(spend, range(6)))
    assert {(each.run, each.round, each.reply) for each in found} == {("run", 1, None)}
    assert sorted(Counter(each.coins for each in found).values()) == [2, 2, 2], "one charge pays for two passes"
    assert open_ledger(path).events() == [EVENT] * 3


def test_a_new_ledger_may_be_opened_by_several_at_once(tmp_path: Path) -> None:
    barrier = threading.Barrier(6)

    def open_new(number: int) -> int:
        barrier.wait()
        return len(open_ledger(tmp_path / f"{number // 6}" / "ledger.db").events())

    with ThreadPoolExecutor(6) as threads:
        for start in range(0, 60, 6):
            assert list(threads.map(open_new, range(start, start + 6))) == [0] * 6


def reserve_elsewhere(path: Path, signer: bytes, number: int) -> bool:
    """What a process of its own does: one reservation, if the budget admits it."""
    ledger = PrivacyLedger(place_of(path), BUDGET, DELTA, Identity.from_bytes(signer))
    try:
        return ledger.reserve("run", number, "request", EVENT).reply is None
    except BudgetExceeded:
        return False


def test_processes_together_cannot_overdraw_the_budget(ledger: PrivacyLedger, path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        tasks = [(path, SIGNER.to_bytes(), number) for number in range(12)]
        assert sum(pool.starmap(reserve_elsewhere, tasks, chunksize=1)) == AFFORDABLE
    assert ledger.spent(DELTA).epsilon == BUDGET


# What a process of its own runs; without noise, an event is charged without loading the accountant.
PRELUDE = """
import os, sys, time
from pathlib import Path
from fedllm.errors import FedllmError
from fedllm.privacy.accounting import AccountingEvent
from fedllm.crypto.identity import Identity
from fedllm.privacy.ledger import PrivacyLedger
from fedllm.privacy.ledger_place import LedgerPlace
signer = Identity.from_bytes(sys.argv[2].encode())
event = AccountingEvent(0.1, 2.0, 1)
unprotected = AccountingEvent(0.1, 0.0, 1)
path = Path(sys.argv[1])
place = LedgerPlace(path, path.parent.parent / f"{path.parent.name}.keys" / "anchor")
def report(action):
    try:
        action()
    except FedllmError as error:
        print(type(error).__name__, error)
    else:
        print("done")
"""


def test_a_reservation_outlives_a_killed_process_and_counts_as_spent(path: Path) -> None:
    code = (
        PRELUDE
        + """
PrivacyLedger(place, 100.0, 1e-5, signer).reserve("run", 1, "request", event)
import sqlite3
db = sqlite3.connect(path, isolation_level=None)
db.execute("BEGIN IMMEDIATE")  # and dies amidst the next transaction, too
values = "99, 'site', 'run', 2, 1, 'r', 0.1, 2.0, 1, NULL, 0, 'RESERVED', 0.0, 1, NULL, NULL"
db.execute(f"INSERT INTO entry VALUES ({values})")
print("reserved", flush=True)
time.sleep(600)
"""
    )
    with subprocess.Popen(
        [sys.executable, "-X", "utf8", "-c", code, str(path), SIGNER.to_bytes().decode()],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"reserved\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    ledger = open_ledger(path)
    assert ledger.events() == [EVENT]
    assert ledger.spent(DELTA).epsilon == spent([EVENT], DELTA).epsilon
    again = ledger.reserve("run", 1, "request", EVENT)  # nothing had left the site: it may run again, for nothing
    assert again.reply is None
    ledger.release(again, b"reply")
    assert ledger.events() == [EVENT]


def test_only_the_owner_may_read_the_ledger(ledger: PrivacyLedger, path: Path) -> None:
    ledger.reserve("run", 1, "request", EVENT)
    with closing(sqlite3.connect(path)) as db:  # an open connection keeps the side files in place
        db.execute("SELECT count(*) FROM entry").fetchone()
        files = sorted(path.parent.iterdir())
        assert path in files
        for file in files:
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.fixture
def reachable(tmp_path: Path) -> Iterator[Path]:
    """A folder that every user can reach, unlike pytest's own."""
    del tmp_path
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("read_only", ["file", "folder"])
def test_a_ledger_that_cannot_be_written_is_a_ledger_error_and_loses_nothing(reachable: Path, read_only: str) -> None:
    path = reachable / "site" / "ledger.db"
    open_ledger(path).reserve("run", 1, "request", EVENT)
    before, keys = path.read_bytes(), place_of(path).anchor.parent
    if os.geteuid() == 0:  # the superuser may write anything, so another user tries, who owns it
        for owned in (path, keys, *keys.iterdir()):
            os.chown(owned, 65534, -1)
    path.chmod(0o444 if read_only == "file" else 0o666)
    path.parent.chmod(0o777 if read_only == "file" else 0o555)
    code = (
        PRELUDE
        + """
if os.geteuid() == 0:
    os.seteuid(65534)
report(lambda: PrivacyLedger(place, float("inf"), 1e-5, signer).reserve("run", 2, "request", unprotected))
"""
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code, str(path), SIGNER.to_bytes().decode()],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    path.parent.chmod(0o755)
    for owned in (path, keys, *keys.iterdir()):
        os.chown(owned, os.geteuid(), -1)
    assert done.stdout.startswith("LedgerError")
    assert str(path) in done.stdout
    assert "permissions" in done.stdout or "as its owner" in done.stdout
    assert path.read_bytes() == before
    assert open_ledger(path).events() == [EVENT]


def test_a_full_disk_is_a_ledger_error_and_charges_nothing(path: Path) -> None:
    open_ledger(path).reserve("run", 1, "request", EVENT)
    code = (
        PRELUDE
        + """
import resource
ledger = PrivacyLedger(place, float("inf"), 1e-5, signer)
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
report(lambda: ledger.reserve("run", 2, "request", unprotected))
"""
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code, str(path), SIGNER.to_bytes().decode()],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.startswith("LedgerError")
    assert open_ledger(path).events() == [EVENT]


def test_a_plan_with_hardly_any_noise_cannot_exhaust_the_memory_of_a_site(path: Path) -> None:
    code = (
        PRELUDE
        + """
import resource
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
ledger = PrivacyLedger(place, 100.0, 1e-5, signer)
report(lambda: ledger.reserve("run", 1, "request", AccountingEvent(0.1, 0.001, 1)))
"""
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code, str(path), SIGNER.to_bytes().decode()],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    assert "Exceeded" in done.stdout or "Error" in done.stdout


@pytest.fixture(scope="module")
def several_pages(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the file of a ledger of several pages, which is all of it."""
    path = tmp_path_factory.mktemp("whole") / "ledger.db"
    ledger = open_ledger(path, epsilon=math.inf)
    for round_ in range(40):
        ledger.reserve("run", round_, "request " * 16, UNPROTECTED)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "a copy of the one file is a copy of all"
    data = path.read_bytes()
    assert len(data) > 4 * 4096
    return data


def put(path: Path, content: bytes) -> Path:
    """Put a file where a ledger was."""
    open_ledger(path)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("length", [0, 1, 15, 16, 99, 100, 512, 4095, 4096, 4097, 8192, -4096])
def test_a_truncated_ledger_is_a_ledger_error_and_never_an_empty_budget(
    path: Path, several_pages: bytes, length: int
) -> None:
    put(path, several_pages[:length])
    with pytest.raises(LedgerError) as error:
        open_ledger(path, epsilon=math.inf).reserve("run", 1000, "request", UNPROTECTED)
    assert str(path) in str(error.value)
    assert path.read_bytes() == several_pages[:length]


@pytest.mark.parametrize(
    "content", [b"not a database, but a text of some length\n" * 200, os.urandom(8192), b"\0" * 4096]
)
def test_a_file_that_is_no_database_is_a_ledger_error_and_stays_as_it_is(path: Path, content: bytes) -> None:
    put(path, content)
    with pytest.raises(LedgerError, match="backup"):
        open_ledger(path).events()
    assert path.read_bytes() == content


@pytest.mark.parametrize("version", [1, 99, -1])
def test_a_ledger_of_another_version_is_refused_and_stays_as_it_is(
    ledger: PrivacyLedger, path: Path, version: int
) -> None:
    ledger.reserve("run", 1, "request", EVENT)
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(LedgerError, match=f"schema {version}, expected 4"):
        open_ledger(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 4")
    assert open_ledger(path).events() == [EVENT]


def test_a_database_of_another_program_is_not_taken_over(path: Path) -> None:
    open_ledger(path)
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE customer (name TEXT)")
    with pytest.raises(LedgerError):
        open_ledger(path).events()


@pytest.mark.parametrize("place", ["folder", "below-a-file"])
def test_a_place_where_no_file_can_be_is_a_ledger_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path if place == "folder" else tmp_path / "file" / "ledger.db"
    with pytest.raises(LedgerError, match=r"cannot|no plain file"):
        open_ledger(path)


@pytest.mark.parametrize(
    "damage",
    ["steps = 'many'", "steps = -5", "sampling_rate = 'x'", "sampling_rate = 2.0", "noise_multiplier = -1.0",
     "noise_multiplier = 'x'"],
)  # fmt: skip
def test_a_ledger_with_impossible_entries_admits_nothing(ledger: PrivacyLedger, path: Path, damage: str) -> None:
    for round_ in range(2):
        ledger.reserve("run", round_, "request", EVENT)
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"UPDATE entry SET {damage} WHERE round = 1")
        db.commit()
    with pytest.raises(FedllmError):
        open_ledger(path).reserve("run", 3, "request", EVENT)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM entry").fetchone() == (2,)


def test_a_lost_ledger_file_is_noticed_while_the_site_runs(ledger: PrivacyLedger, path: Path) -> None:
    ledger.reserve("run", 1, "request", EVENT)
    for file in path.parent.iterdir():
        file.unlink()
    with pytest.raises(LedgerError):
        ledger.reserve("run", 2, "request", EVENT)
