"""A site's durable record of spent privacy: reserved on disk before training reads a record, never freed by a crash.

One SQLite file a site. An entry is RESERVED when the site commits to a round, and RELEASED together with the reply
that left the site. A crash in between leaves RESERVED, which counts as spent. Because the reply is stored in the
same transaction that marks it released, RESERVED also proves that nothing has left the site: the round may be run
again on the same reservation, and a round that was released is answered with the very bytes of the first time.
"""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import BudgetExceeded, LedgerError, PrivacyError
from fedllm.privacy.accounting import AccountingEvent, PrivacySpent, spent

_APPLICATION = 0x464C4D31  # "FLM1", in the file's header
_SCHEMA_VERSION = 1
_NO_BACKUP = (
    "If it is damaged, a backup may lack the latest charges: do not train on these records again before every later "
    "round has been entered."
)
_SCHEMA = """
CREATE TABLE entry (
    id INTEGER PRIMARY KEY,
    dataset TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    request TEXT NOT NULL,              -- SHA-256 of the request: plan, round and adapter state
    sampling_rate REAL NOT NULL,
    noise_multiplier REAL NOT NULL,
    steps INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('RESERVED', 'RELEASED')),
    reserved_at REAL NOT NULL,          -- seconds since the epoch, UTC
    reply BLOB,                         -- what was released; kept for two rounds of the run
    UNIQUE (dataset, run, round)
);
"""


@dataclass(frozen=True)
class Reservation:
    """A round that is paid for."""

    run: str
    round: int
    reply: bytes | None  # the released reply, where this round was answered before


class PrivacyLedger:
    """The budget of one data set at one site.

    Raises LedgerError wherever the file cannot be read, written or trusted; nothing is trained then.
    """

    def __init__(self, path: Path, dataset: str, epsilon: float, delta: float) -> None:
        """Open or create the ledger at `path` (mode 0600) with a budget of `epsilon` at `delta` for `dataset`."""
        if not (epsilon >= 0 and 0 < delta < 1):  # refuses NaN too
            raise LedgerError(f"budget epsilon={epsilon!r} at delta={delta!r}: expected epsilon >= 0 and 0 < delta < 1")
        self._path, self._dataset = path, dataset
        self.epsilon, self.delta = epsilon, delta
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not path.exists():
                _create(path)
            damaged = path.stat().st_size < 512  # SQLite would take a file cut to nothing for a new, empty one
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(f"cannot open the privacy ledger {path}: {error}. Check its permissions.") from error
        if damaged:
            raise LedgerError(f"the privacy ledger {path} is cut short. {_NO_BACKUP}")
        with self._transaction() as db:
            program = db.execute("PRAGMA application_id").fetchone()[0]
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if program != _APPLICATION:
                raise LedgerError(f"{path} is no privacy ledger. {_NO_BACKUP}")
            if version != _SCHEMA_VERSION:
                raise LedgerError(
                    f"{path} has ledger schema {version}, expected {_SCHEMA_VERSION}. Use the fedllm that wrote it."
                )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One immediate transaction, committed to disk at the end and rolled back on any error."""
        try:
            with closing(sqlite3.connect(self._path, timeout=30, isolation_level=None)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                except BaseException:
                    db.execute("ROLLBACK")
                    raise
                db.execute("COMMIT")
        except sqlite3.Error as error:
            raise LedgerError(
                f"the privacy ledger {self._path} cannot be used ({error}); nothing was released. "
                f"Check disk and permissions. {_NO_BACKUP}"
            ) from error

    def reserve(self, run: str, round: int, request: str, event: AccountingEvent) -> Reservation:
        """Charge `event` for a round, or find that it is already charged. On return the charge is on disk.

        Raises BudgetExceeded, charging nothing, where the budget does not admit the event, and LedgerError where the
        round was charged for another request.
        """
        with self._transaction() as db:
            row = db.execute(
                "SELECT request, state, reply FROM entry WHERE dataset = ? AND run = ? AND round = ?",
                (self._dataset, run, round),
            ).fetchone()
            if row is not None:
                if row[0] != request:
                    raise LedgerError(
                        f"round={round} of run={run} was charged for another request. A round is trained once; "
                        "resume from the coordinator's last checkpoint or start a new run."
                    )
                if row[1] == "RELEASED" and row[2] is None:
                    raise LedgerError(
                        f"round={round} of run={run} was answered, and later rounds too, so its reply is no longer "
                        "kept. Head office must resume from a later checkpoint, or start a new run."
                    )
                return Reservation(run, round, row[2])
            self._check(db, run, event)
            # head office may go back one round, to the checkpoint before a damaged one: two replies are kept
            db.execute(
                "UPDATE entry SET reply = NULL WHERE dataset = ? AND run = ? AND round < ?",
                (self._dataset, run, round - 1),
            )
            db.execute(
                "INSERT INTO entry (dataset, run, round, request, sampling_rate, noise_multiplier, steps, state, "
                "reserved_at) VALUES (?, ?, ?, ?, ?, ?, ?, 'RESERVED', ?)",
                (
                    self._dataset, run, round, request,
                    event.sampling_rate, event.noise_multiplier, event.steps, time.time(),
                ),
            )  # fmt: skip
        return Reservation(run, round, None)

    def _check(self, db: sqlite3.Connection, run: str, event: AccountingEvent) -> None:
        try:
            after = spent([*self._events(db), event], self.delta)
        except PrivacyError as error:
            raise LedgerError(f"the privacy ledger {self._path} cannot be added up: {error}") from None
        plans = set(
            db.execute("SELECT run, sampling_rate, noise_multiplier FROM entry WHERE dataset = ?", (self._dataset,))
        ) | {(run, event.sampling_rate, event.noise_multiplier)}
        # One plan was fixed before anything was released, so its PLD is a valid filter. A later plan may depend on
        # what earlier ones released; then only RDP is (Feldman and Zrnic 2021; Whitehouse et al. 2023).
        epsilon = after.epsilon if len(plans) == 1 else after.epsilon_rdp
        if not epsilon <= self.epsilon:
            raise BudgetExceeded(
                f"one more round would bring epsilon to {epsilon:.4g}, above the site's budget of "
                f"{self.epsilon:g} at delta {self.delta:g}."
            )

    def check(self, run: str, event: AccountingEvent) -> None:
        """Raise BudgetExceeded where the budget admits no such event and `run` has nothing to repeat either."""
        with self._transaction() as db:
            known = db.execute("SELECT 1 FROM entry WHERE dataset = ? AND run = ?", (self._dataset, run)).fetchone()
            if known is None:
                self._check(db, run, event)

    def release(self, reservation: Reservation, reply: bytes) -> None:
        """Mark a reserved round as released and keep its reply. Only then may `reply` leave the site."""
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE entry SET state = 'RELEASED', reply = ? "
                "WHERE dataset = ? AND run = ? AND round = ? AND state = 'RESERVED'",
                (reply, self._dataset, reservation.run, reservation.round),
            ).rowcount
            if changed != 1:
                raise LedgerError(f"round={reservation.round} of run={reservation.run} has no open reservation.")

    def events(self) -> list[AccountingEvent]:
        """Return every event charged to this data set, in order, released or not, over all runs."""
        with self._transaction() as db:
            return self._events(db)

    def _events(self, db: sqlite3.Connection) -> list[AccountingEvent]:
        rows = db.execute(
            "SELECT sampling_rate, noise_multiplier, steps FROM entry WHERE dataset = ? ORDER BY id",
            (self._dataset,),
        )
        return [AccountingEvent(*row) for row in rows]

    def spent(self, delta: float | None = None) -> PrivacySpent:
        """Return the privacy loss of everything charged to this data set, at `delta` or else the budget's."""
        return spent(self.events(), self.delta if delta is None else delta)


def _create(path: Path) -> None:
    """Make an empty ledger and put it in place as a whole, unless another process was faster."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.new")
    os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600))
    try:
        with closing(sqlite3.connect(temporary, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous = FULL")
            db.execute(f"PRAGMA application_id = {_APPLICATION}")
            db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            db.execute(_SCHEMA)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()
