"""A site's durable record of spent privacy: reserved on disk before training reads a record, never freed by a crash.

One SQLite file a site. An entry is RESERVED when the site commits to a round, and RELEASED together with the reply
that left the site. A crash in between leaves RESERVED, which counts as spent. Because the reply is stored in the
same transaction that marks it released, RESERVED also proves that nothing has left the site: the round may be run
again on the same reservation, its owner may abort it, and a round that was released is answered with the very bytes of
the first time.

Budget belongs to the data. A data set is known by a fingerprint of its content, and one that shares a privacy unit or a
record with another shares its spending: what a unit of this data set has lost is at most what all data sets that
overlap it have cost.

Every change is also an entry of a hash chain, signed by the site (fedllm.chain), in the same transaction. The tables
are what the site works with; the chain is what it can show.
"""

import contextlib
import hashlib
import hmac
import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.chain import START, make_entry, open_entry, read_chain
from fedllm.crypto import Identity, PublicIdentity
from fedllm.errors import BudgetExceeded, ChainError, LedgerError, PrivacyError
from fedllm.privacy.accounting import AccountingEvent, PrivacySpent, fits, spent

_APPLICATION = 0x464C4D31  # "FLM1", in the file's header
_SCHEMA_VERSION = 2
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
    state TEXT NOT NULL CHECK (state IN ('RESERVED', 'RELEASED', 'ABORTED')),
    reserved_at REAL NOT NULL,          -- seconds since the epoch, UTC
    reply BLOB,                         -- what was released; kept for two rounds of the run
    UNIQUE (dataset, run, round)
);
CREATE TABLE member (                   -- what a data set holds, as hashes, to find data sets that overlap
    dataset TEXT NOT NULL,
    hash BLOB NOT NULL,
    PRIMARY KEY (dataset, hash)
) WITHOUT ROWID;
CREATE INDEX member_hash ON member (hash);
CREATE TABLE overlap (                  -- data sets that share a member, both ways, and each with itself
    dataset TEXT NOT NULL,
    other TEXT NOT NULL,
    PRIMARY KEY (dataset, other)
) WITHOUT ROWID;
CREATE TABLE chain (                    -- fedllm.chain: every change of `entry`, signed
    number INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    digest TEXT NOT NULL,
    line TEXT NOT NULL
);
CREATE TABLE secret (key BLOB NOT NULL); -- makes the names of data sets, which leave the site, tell nothing of them
"""
_HASH = 16  # bytes of a member's hash
_MOUNTS = Path("/proc/self/mounts")
_PATIENCE = 30.0  # seconds to wait for another process


@dataclass(frozen=True)
class DataSet:
    """What a site protects, by content and not by name."""

    fingerprint: str
    members: frozenset[bytes] = frozenset()  # hashes of its records and persons; empty: overlaps nothing but itself


def fingerprint(members: Iterable[bytes]) -> DataSet:
    """Return the data set that holds `members`: its records and, where they are known, its persons, each as bytes.

    The order does not matter. Hashes stay in the site's ledger, which protects them as it protects the records.
    """
    hashes = frozenset(hashlib.sha256(member).digest()[:_HASH] for member in members)
    return DataSet(hashlib.sha256(b"".join(sorted(hashes))).hexdigest(), hashes)


@dataclass(frozen=True)
class Period:
    """What may be spent in any `days` at a stretch, beside the whole budget."""

    days: float
    epsilon: float


@dataclass(frozen=True)
class Head:
    """The newest entry of a ledger's chain."""

    number: int
    digest: str


@dataclass(frozen=True)
class Reservation:
    """A round that is paid for."""

    run: str
    round: int
    reply: bytes | None  # the released reply, where this round was answered before


@dataclass(frozen=True)
class Charge:
    """One round that a data set paid for, or would have."""

    dataset: str
    run: str
    round: int
    event: AccountingEvent
    state: str  # RESERVED, RELEASED or ABORTED
    reserved_at: float  # seconds since the epoch, UTC


class LedgerFile:
    """A ledger's file, whatever data sets are in it.

    Raises LedgerError wherever the file cannot be read, written or trusted.
    """

    def __init__(self, path: Path, create: bool = False) -> None:
        """Open the ledger at `path`; where it is missing and `create` is set, make it (mode 0600)."""
        self.path = path
        _refuse_network(path)
        try:
            if create and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                _create(path)
            damaged = path.stat().st_size < 512  # SQLite would take a file cut to nothing for a new, empty one
            owner = path.stat().st_uid
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(f"cannot open the privacy ledger {path}: {error}. Check its permissions.") from error
        if owner != os.geteuid():  # what is written beside the file would shut its owner out
            raise LedgerError(f"the privacy ledger {path} belongs to user {owner}: run this as its owner.")
        if damaged:
            raise LedgerError(f"the privacy ledger {path} is cut short. {_NO_BACKUP}")
        with self.transaction() as db:
            program = db.execute("PRAGMA application_id").fetchone()[0]
            version = db.execute("PRAGMA user_version").fetchone()[0]
        if program != _APPLICATION:
            raise LedgerError(f"{path} is no privacy ledger. {_NO_BACKUP}")
        if version != _SCHEMA_VERSION:
            raise LedgerError(
                f"{path} has ledger schema {version}, expected {_SCHEMA_VERSION}. Use the fedllm that wrote it."
            )

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One immediate transaction, committed to disk at the end and rolled back on any error."""
        try:
            with closing(sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None)) as db:
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
                f"the privacy ledger {self.path} cannot be used ({error}); nothing was released. "
                f"Check disk and permissions. {_NO_BACKUP}"
            ) from error

    def data_sets(self) -> list[str]:
        """Return the fingerprints of all data sets that were ever opened, in the order of their first charge."""
        with self.transaction() as db:
            rows = db.execute(
                "SELECT o.dataset FROM overlap o LEFT JOIN entry e ON e.dataset = o.dataset WHERE o.dataset = o.other "
                "GROUP BY o.dataset ORDER BY min(e.id) IS NULL, min(e.id)"
            )
            return [str(row[0]) for row in rows]

    def events(self, dataset: str, since: float = -math.inf) -> list[AccountingEvent]:
        """Return every event charged to a data set or one that overlaps it, in order, released or not.

        `since`, seconds since the epoch, leaves out what was charged before.
        """
        with self.transaction() as db:
            return _events(db, dataset, since)

    def budget(self) -> tuple[float, float] | None:
        """Return the epsilon and delta that the chain stated last; None before any data set was opened."""
        with self.transaction() as db:
            row = db.execute("SELECT line FROM chain WHERE kind = 'budget' ORDER BY number DESC LIMIT 1").fetchone()
        if row is None:
            return None
        stated = open_entry(row[0]).body
        return (math.inf if stated["epsilon"] is None else float(stated["epsilon"])), float(stated["delta"])

    def charges(self) -> list[Charge]:
        """Return every charge there ever was, in order."""
        with self.transaction() as db:
            rows = db.execute(
                "SELECT dataset, run, round, sampling_rate, noise_multiplier, steps, state, reserved_at "
                "FROM entry ORDER BY id"
            )
            return [Charge(row[0], row[1], row[2], AccountingEvent(*row[3:6]), row[6], row[7]) for row in rows]

    def name_of(self, db: sqlite3.Connection, dataset: DataSet) -> str:
        """Return what this ledger calls a data set.

        Its fingerprint would tell whoever knows all records but one, and guesses that, whether the guess is right.
        """
        key = db.execute("SELECT key FROM secret").fetchone()[0]
        return hmac.new(key, dataset.fingerprint.encode(), "sha256").hexdigest()

    def head(self) -> Head:
        """Return the newest entry of the chain."""
        with self.transaction() as db:
            number, digest = db.execute("SELECT number, digest FROM chain ORDER BY number DESC LIMIT 1").fetchone()
        return Head(int(number), str(digest))

    def knows(self, head: Head) -> bool:
        """Whether the chain holds an entry that somebody has seen before: a restored backup lacks the latest."""
        with self.transaction() as db:
            row = db.execute("SELECT digest FROM chain WHERE number = ?", (head.number,)).fetchone()
        return row is not None and row[0] == head.digest

    def events_of(self, data: DataSet, since: float = -math.inf) -> list[AccountingEvent]:
        """Return every event charged to what overlaps `data`, whether or not that was ever opened; writes nothing.

        `since`, seconds since the epoch, leaves out what was charged before.
        """
        with self.transaction() as db:
            found = {self.name_of(db, data)}
            for each in data.members:
                found |= {str(row[0]) for row in db.execute("SELECT dataset FROM member WHERE hash = ?", (each,))}
            rows = db.execute(
                "SELECT dataset, sampling_rate, noise_multiplier, steps FROM entry "
                "WHERE state != 'ABORTED' AND reserved_at >= ? ORDER BY id",
                (since,),
            )
            return [AccountingEvent(*row[1:]) for row in rows if row[0] in found]

    def abort(self, run: str, round: int, signer: Identity, dataset: str | None = None) -> None:
        """Give a reserved round back to the budget: the owner's decision, for a round that will not be repeated.

        RESERVED proves that nothing was released (see above), and from here on nothing can be: the round is refused.
        Raises LedgerError where there is no such reservation.
        """
        with self.transaction() as db:
            rows = db.execute(
                "SELECT dataset FROM entry WHERE run = ? AND round = ? AND state = 'RESERVED' "
                "AND dataset = coalesce(?, dataset)",
                (run, round, dataset),
            ).fetchall()
            if not rows:
                raise LedgerError(
                    f"round={round} of run={run} is not reserved; only what was not released can be given back"
                )
            for (name,) in rows:
                db.execute(
                    "UPDATE entry SET state = 'ABORTED' WHERE dataset = ? AND run = ? AND round = ?", (name, run, round)
                )
                _note(db, "aborted", {"dataset": name, "run": run, "round": round}, signer)

    def hand_over(self, old: Identity, new: Identity) -> None:
        """Let `new` sign from here on: `old` says so, and `new` vouches for what it takes over."""
        with self.transaction() as db:
            line = _last_line(db)
            if line is not None and open_entry(line).signer != new.public:
                _note(db, "key", {"identity": new.public.to_text()}, old)
                _note(db, "opened", {}, new)

    def lines(self) -> list[str]:
        """Return the chain, an entry a line; it holds no record and no count of records."""
        with self.transaction() as db:
            return [str(row[0]) for row in db.execute("SELECT line FROM chain ORDER BY number")]

    def verify(self, signers: Iterable[PublicIdentity] | None = None) -> Head:
        """Check the chain, and that the tables say what it says; return its head.

        Raises ChainError that names the first entry that was altered, removed, exchanged, or never signed.
        """
        entries = read_chain(self.lines(), str(self.path), signers)
        said: dict[tuple[str, str, int], tuple[Any, ...]] = {}
        for entry in entries:
            key = (str(entry.body.get("dataset")), str(entry.body.get("run")), int(entry.body.get("round", 0)))
            if entry.kind == "reserved":
                said[key] = (*(entry.body[name] for name in _EVENT), "RESERVED", entry.number)
            elif entry.kind in ("released", "aborted") and key in said:
                said[key] = (*said[key][: len(_EVENT)], entry.kind.upper(), entry.number)
        with self.transaction() as db:
            rows = db.execute(
                "SELECT dataset, run, round, request, sampling_rate, noise_multiplier, steps, state FROM entry"
            ).fetchall()
        found = {tuple(row[:3]): tuple(row[3:]) for row in rows}
        for key, (*values, number) in said.items():
            if found.get(key) != tuple(values):
                raise ChainError(
                    f"{self.path}, entry {number}: round {key[2]} of run {key[1]} was signed as "
                    f"{values[-1]} and is not what the table holds. The file was altered."
                )
        extra = sorted(set(found) - set(said))
        if extra:
            raise ChainError(
                f"{self.path}: round {extra[0][2]} of run {extra[0][1]} is in the table and was never signed"
            )
        if not entries:  # killed between file and first entry: there is nothing yet to vouch for
            return Head(-1, START)
        return Head(entries[-1].number, entries[-1].digest)


class PrivacyLedger:
    """The budget of one data set at one site.

    Raises LedgerError wherever the file cannot be read, written or trusted; nothing is trained then.
    """

    def __init__(
        self, path: Path, dataset: DataSet, epsilon: float, delta: float, signer: Identity,
        period: Period | None = None,
    ) -> None:  # fmt: skip
        """Open or create the ledger at `path` (mode 0600) with a budget of `epsilon` at `delta` for `dataset`."""
        if not (epsilon >= 0 and 0 < delta < 1):  # refuses NaN too
            raise LedgerError(f"budget epsilon={epsilon!r} at delta={delta!r}: expected epsilon >= 0 and 0 < delta < 1")
        self.file = LedgerFile(path, create=True)
        self._signer, self._period = signer, period
        self.epsilon, self.delta = epsilon, delta
        with self.file.transaction() as db:
            self._dataset = self.file.name_of(db, dataset)
            self._take_over(db)
            self._state_budget(db)
            if db.execute("SELECT 1 FROM overlap WHERE dataset = ?", (self._dataset,)).fetchone() is None:
                self._register(db, dataset.members)

    def _take_over(self, db: sqlite3.Connection) -> None:
        """Begin the chain, or go on with it."""
        line = _last_line(db)
        if line is None:
            self._note(db, "opened", {})
        elif open_entry(line).signer != self._signer.public and not self._may_sign(db):
            # the keys of before are lost; who trusts the new ones trusts that this is the ledger they were found with
            self._note(db, "key", {"identity": self._signer.public.to_text()})

    def _may_sign(self, db: sqlite3.Connection) -> bool:
        lines = db.execute("SELECT line FROM chain WHERE kind IN ('opened', 'key')").fetchall()
        entries = [open_entry(line) for (line,) in lines]
        own = self._signer.public
        return any(own.to_text() == entry.body.get("identity") or own == entry.signer for entry in entries)

    def _state_budget(self, db: sqlite3.Connection) -> None:
        """Put the budget into the chain where it is new: who reads the chain sees what was permitted, and when."""
        budget = {"epsilon": self.epsilon if math.isfinite(self.epsilon) else None, "delta": self.delta}
        row = db.execute("SELECT line FROM chain WHERE kind = 'budget' ORDER BY number DESC LIMIT 1").fetchone()
        if row is None or open_entry(row[0]).body != budget:
            self._note(db, "budget", budget)

    def _register(self, db: sqlite3.Connection, hashes: Iterable[bytes]) -> None:
        """Note what the data set holds and which others it overlaps: from now on they share their spending."""
        db.executemany("INSERT INTO member (dataset, hash) VALUES (?, ?)", [(self._dataset, each) for each in hashes])
        others = db.execute(
            "SELECT DISTINCT b.dataset FROM member a JOIN member b ON a.hash = b.hash WHERE a.dataset = ?",
            (self._dataset,),
        ).fetchall()
        shared = sorted({str(other) for (other,) in others} - {self._dataset})
        pairs = {(self._dataset, self._dataset)}
        for other in shared:
            pairs |= {(self._dataset, other), (other, self._dataset)}
        db.executemany("INSERT INTO overlap (dataset, other) VALUES (?, ?)", sorted(pairs))
        self._note(db, "data", {"dataset": self._dataset, "overlaps": shared})

    def reserve(self, run: str, round: int, request: str, event: AccountingEvent) -> Reservation:
        """Charge `event` for a round, or find that it is already charged. On return the charge is on disk.

        Raises BudgetExceeded, charging nothing, where the budget does not admit the event, and LedgerError where the
        round was charged for another request.
        """
        with self.file.transaction() as db:
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
                if row[1] == "ABORTED":
                    raise LedgerError(f"round={round} of run={run} was aborted by its owner. Start a new run.")
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
            self.charge(db, run, round, request, event)
        return Reservation(run, round, None)

    def answered(self, run: str, round: int) -> bool:
        """Whether a round was charged before, so that it is answered as it was, or not at all."""
        with self.file.transaction() as db:
            row = db.execute(
                "SELECT 1 FROM entry WHERE dataset = ? AND run = ? AND round = ?", (self._dataset, run, round)
            ).fetchone()
        return row is not None

    def charge(self, db: sqlite3.Connection, run: str, round: int, request: str, event: AccountingEvent) -> None:
        """Enter a charge, whatever the budget: `reserve` asks first."""
        db.execute(
            "INSERT INTO entry (dataset, run, round, request, sampling_rate, noise_multiplier, steps, state, "
            "reserved_at) VALUES (?, ?, ?, ?, ?, ?, ?, 'RESERVED', ?)",
            (
                self._dataset, run, round, request,
                event.sampling_rate, event.noise_multiplier, event.steps, _now(db),
            ),
        )  # fmt: skip
        self._note(
            db, "reserved",
            {
                "dataset": self._dataset, "run": run, "round": round, "request": request,
                "sampling_rate": event.sampling_rate, "noise_multiplier": event.noise_multiplier,
                "steps": event.steps,
            },
        )  # fmt: skip

    def _note(self, db: sqlite3.Connection, kind: str, body: dict[str, Any]) -> None:
        _note(db, kind, body, self._signer)

    def _check(self, db: sqlite3.Connection, run: str, event: AccountingEvent) -> None:
        plans = set(
            db.execute(
                "SELECT DISTINCT run, sampling_rate, noise_multiplier FROM entry "
                "WHERE dataset IN (SELECT other FROM overlap WHERE dataset = ?) AND state != 'ABORTED'",
                (self._dataset,),
            )
        ) | {(run, event.sampling_rate, event.noise_multiplier)}
        try:
            over = fits([*_summed(db, self._dataset), event], self.delta, self.epsilon, len(plans) == 1)
            recent = None
            if self._period is not None:  # several plans may lie in it, so RDP decides
                since = _now(db) - self._period.days * 86_400
                events = [*_summed(db, self._dataset, since), event]
                recent = fits(events, self.delta, self._period.epsilon, one_plan=False)
        except PrivacyError as error:
            raise LedgerError(f"the privacy ledger {self.file.path} cannot be added up: {error}") from None
        if over is not None:
            raise BudgetExceeded(
                f"one more round would bring epsilon to {over:.4g}, above the site's budget of "
                f"{self.epsilon:g} at delta {self.delta:g}."
            )
        if recent is not None and self._period is not None:
            raise BudgetExceeded(
                f"one more round would bring the epsilon of the last {self._period.days:g} days to {recent:.4g}, above "
                f"the {self._period.epsilon:g} that a period may cost. Wait, or raise policy.period."
            )

    def check(self, run: str, event: AccountingEvent) -> None:
        """Raise BudgetExceeded where the budget admits no such event and `run` has nothing to repeat either."""
        with self.file.transaction() as db:
            known = db.execute("SELECT 1 FROM entry WHERE dataset = ? AND run = ?", (self._dataset, run)).fetchone()
            if known is None:
                self._check(db, run, event)

    def release(self, reservation: Reservation, reply: bytes) -> None:
        """Mark a reserved round as released and keep its reply. Only then may `reply` leave the site."""
        with self.file.transaction() as db:
            changed = db.execute(
                "UPDATE entry SET state = 'RELEASED', reply = ? "
                "WHERE dataset = ? AND run = ? AND round = ? AND state = 'RESERVED'",
                (reply, self._dataset, reservation.run, reservation.round),
            ).rowcount
            if changed != 1:
                raise LedgerError(f"round={reservation.round} of run={reservation.run} has no open reservation.")
            answer = hashlib.sha256(reply).hexdigest()
            body = {"dataset": self._dataset, "run": reservation.run, "round": reservation.round, "reply": answer}
            self._note(db, "released", body)

    def abort(self, run: str, round: int) -> None:
        """Give a reserved round of this data set back to the budget, as LedgerFile.abort."""
        self.file.abort(run, round, self._signer, self._dataset)

    def events(self) -> list[AccountingEvent]:
        """Return every event charged to this data set or one that overlaps it, in order, released or not."""
        return self.file.events(self._dataset)

    def spent(self, delta: float | None = None) -> PrivacySpent:
        """Return the privacy loss of everything charged to this data set, at `delta` or else the budget's."""
        return spent(self.events(), self.delta if delta is None else delta)


def _summed(db: sqlite3.Connection, dataset: str, since: float = -math.inf) -> list[AccountingEvent]:
    """Return what `_events` does, equal events as one: a round's check must not grow with the ledger's age."""
    rows = db.execute(
        "SELECT sampling_rate, noise_multiplier, sum(steps), min(steps) < 0 OR sum(typeof(steps) != 'integer') "
        "FROM entry WHERE dataset IN (SELECT other FROM overlap WHERE dataset = ?) AND state != 'ABORTED' "
        "AND reserved_at >= ? GROUP BY sampling_rate, noise_multiplier",
        (dataset, since),
    )
    # a row that cannot be must not vanish in a sum: it becomes an event that is refused
    return [AccountingEvent(rate, noise, -1 if damaged else steps) for rate, noise, steps, damaged in rows]


def _events(db: sqlite3.Connection, dataset: str, since: float = -math.inf) -> list[AccountingEvent]:
    rows = db.execute(
        "SELECT sampling_rate, noise_multiplier, steps FROM entry WHERE dataset IN "
        "(SELECT other FROM overlap WHERE dataset = ?) AND state != 'ABORTED' AND reserved_at >= ? ORDER BY id",
        (dataset, since),
    )
    return [AccountingEvent(*row) for row in rows]


def _last_line(db: sqlite3.Connection) -> str | None:
    row = db.execute("SELECT line FROM chain ORDER BY number DESC LIMIT 1").fetchone()
    return None if row is None else str(row[0])


def _note(db: sqlite3.Connection, kind: str, body: dict[str, Any], signer: Identity) -> None:
    """Append an entry to the chain."""
    row = db.execute("SELECT number, digest FROM chain ORDER BY number DESC LIMIT 1").fetchone()
    number, previous = (0, START) if row is None else (int(row[0]) + 1, str(row[1]))
    # to the minute: what lies between reservation and release would tell how long it took to train
    line = make_entry(number, previous, kind, _now(db) // 60 * 60, body, signer)
    db.execute(
        "INSERT INTO chain (number, kind, digest, line) VALUES (?, ?, ?, ?)",
        (number, kind, open_entry(line).digest, line),
    )


def _now(db: sqlite3.Connection) -> float:
    """Return the time, never before that of the last entry: a clock that goes backwards frees nothing."""
    last = db.execute("SELECT max(reserved_at) FROM entry").fetchone()[0]
    return max(time.time(), last or 0.0)


_EVENT = ("request", "sampling_rate", "noise_multiplier", "steps")


def _refuse_network(path: Path) -> None:
    """Raise LedgerError where the ledger would lie on a network file system, whose locks cannot be relied on."""
    place = path.parent
    while not place.exists():
        place = place.parent
    kind = _file_system(place)
    if kind is not None:
        raise LedgerError(
            f"the privacy ledger {path} would lie on a network file system ({kind}), whose locks are not reliable. "
            "Put it on a local disk."
        )


def _file_system(place: Path) -> str | None:
    """Return the network file system that `place` lies on, None where it is a local one (Linux: /proc/mounts)."""
    try:
        mounts = [line.split()[1:3] for line in _MOUNTS.read_text("utf-8").splitlines()]
    except OSError:
        return None
    here = os.path.realpath(place)
    best = max(
        ((point, kind) for point, kind in mounts if here == point or here.startswith(point.rstrip("/") + "/")),
        key=lambda mount: len(mount[0]), default=("", ""),
    )  # fmt: skip
    network = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "ceph", "lustre", "afs", "glusterfs", "ncpfs")
    return best[1] if best[1].startswith(network) else None


def _create(path: Path) -> None:
    """Make an empty ledger and put it in place as a whole, unless another process was faster."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.new")
    os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600))
    try:
        with closing(sqlite3.connect(temporary, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous = FULL")
            db.execute(f"PRAGMA application_id = {_APPLICATION}")
            db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            db.executescript(_SCHEMA)
            db.execute("INSERT INTO secret (key) VALUES (?)", (os.urandom(32),))
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()
