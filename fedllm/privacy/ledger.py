"""A site's durable record of spent privacy: reserved on disk before training reads a record, never freed by a crash.

One SQLite file a site. An entry is RESERVED when the site commits to a round, and RELEASED together with the reply
that left the site. A crash in between leaves RESERVED, which counts as spent. Because the reply is stored in the
same transaction that marks it released, RESERVED also proves that nothing has left the site but the time it took: its
owner may abort it, and a round that was released is answered with the very bytes of the first time.

A reservation fixes which records its round samples: 32 bytes of sampling randomness (`coins`), sealed to the site's own
keys until the reply is stored, and overwritten then. A round that was reserved and did not end may be run once more,
with the same ones, so that it times the same sample again; after that it is charged anew, for new ones. So it is
where another account would use its records, or where training and evaluation have units of another split by now.

Budget belongs to the site. All its data sets share one account, unless its owner has declared one of them disjoint
from all others, by name, in a signed entry: by parallel composition it then has a budget of its own. What the data
sets hold is compared all the same, and a contradiction is told to the owner; it never changes an answer.

A ledger that is lost, or older than its anchor, goes on once its owner has stated what is lost (`restart`). That counts
on every account, since a ledger that is lost tells nobody whose charges it held. And what was open before may have left
the site since: it is never given back, and is charged anew if it is asked for again.

An account has two sides, training and evaluation, and a privacy unit is on one of them (fedllm.privacy.split). Share
and key of the split are fixed when the account is first used, and stand in the chain; whatever is charged before, or
after one of them has changed, counts on both sides. The budget holds on each, and what was spent is the larger.

Every change is also an entry of a hash chain, signed by the site (fedllm.crypto.hash_chain), in the same transaction.
The tables are what the site works with; the chain is what it can show. How many entries a round makes does not depend
on records, and no entry says how long training took: a release bears the time of its reservation.
An anchor in another place names the newest entry (fedllm.privacy.ledger_place).

The journal is a rollback journal, not a write-ahead log: after every commit all that was charged is in the one file.
"""

import contextlib
import hashlib
import math
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from fedllm.canonical import canonical
from fedllm.crypto.hash_chain import End, LedgerHead, close_export, make_entry, open_entry, read_chain
from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.crypto.primitives import random_bytes
from fedllm.errors import BudgetExceeded, ChainError, CryptoError, LedgerError, PrivacyError
from fedllm.privacy.accounting import AccountingEvent, PrivacySpent, overrun, spent
from fedllm.privacy.elapsed import Evidence, Moment, Period, this_moment
from fedllm.privacy.ledger_place import (
    BEFORE,
    MOST_ACCOUNTS,
    SITE,
    LedgerPlace,
    advance_anchor,
    check_path,
    one_at_a_time,
    read_anchor,
    write_anchor,
)
from fedllm.privacy.split import KEY, SHARE, SIDES, Side, Split

_APPLICATION = 0x464C4D31  # "FLM1", in the file's header
_SCHEMA_VERSION = 4
_NO_BACKUP = (
    "If it is damaged, a backup may lack the latest charges. Look for the newest copy there is; docs/deployment.md, "
    "Backup, says what to do with it, or without one: fedllm ledger restart"
)
_WAY_OUT = (
    "Was a backup put back, or a mount forgotten? Put the newest ledger there is in its place. If that is lost, its "
    "owner states what the lost entries cost: fedllm ledger restart --help (in a simulation: remove the site's folder)."
)
_SCHEMA = """
CREATE TABLE entry (
    id INTEGER PRIMARY KEY,
    account TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    charge INTEGER NOT NULL,            -- 1, 2 ...: a round may be charged again
    request TEXT NOT NULL,              -- SHA-256 of the request: plan, round and adapter state
    sampling_rate REAL NOT NULL,
    noise_multiplier REAL NOT NULL,
    steps INTEGER NOT NULL,
    evaluation REAL,                    -- noise multiplier of a score on the evaluation units; NULL: there is none
    both INTEGER NOT NULL,              -- whether all of it counts on both sides
    state TEXT NOT NULL CHECK (state IN ('RESERVED', 'RELEASED', 'ABORTED', 'LOST')),
    reserved_at REAL NOT NULL,          -- seconds since the epoch, UTC
    tries INTEGER NOT NULL DEFAULT 0,   -- how often its coins were given out
    coins BLOB,                         -- sealed; until the round is released, aborted or charged anew
    reply BLOB,                         -- what was released; kept for two rounds of the run
    UNIQUE (run, round, charge)
);
CREATE INDEX entry_account ON entry (account);
CREATE TABLE member (                   -- what an account's data sets hold, as hashes, to find contradictions
    account TEXT NOT NULL,
    hash BLOB NOT NULL,
    PRIMARY KEY (account, hash)
) WITHOUT ROWID;
CREATE INDEX member_hash ON member (hash);
CREATE TABLE chain (                    -- fedllm.crypto.hash_chain: every change of `entry`, signed
    number INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    digest TEXT NOT NULL,
    line TEXT NOT NULL
);
CREATE TABLE split (                    -- the owner's secret: fedllm.privacy.split
    key BLOB NOT NULL
);
CREATE TABLE clock (                    -- fedllm.privacy.elapsed: of this start of the machine, one row
    clock REAL NOT NULL,
    boot TEXT NOT NULL,
    count REAL NOT NULL,
    seen REAL NOT NULL                  -- the latest time that was believed
);
"""
_HASH = 16  # bytes of a member's hash
_COINS = 32  # bytes of sampling randomness
_TRIES = 2  # that one charge pays for
_PATIENCE = 30.0  # seconds to wait for another process
_DAY = 86_400.0
_MAX_NAME = 64
_EVENT = ("request", "sampling_rate", "noise_multiplier", "steps", "evaluation")

DataSet: TypeAlias = frozenset[bytes]  # hashes of what a data set holds, to compare it with others


def fingerprint(members: Iterable[bytes]) -> DataSet:
    """Return the data set that holds `members`: its records and, if they are known, its persons, each as bytes.

    The order does not matter. Hashes stay in the site's ledger, which protects them as it protects the records.
    """
    return frozenset(hashlib.sha256(member).digest()[:_HASH] for member in members)


@dataclass(frozen=True)
class Reservation:
    """A round that is paid for."""

    run: str
    round: int
    reply: bytes | None  # the released reply, if this round was answered before
    coins: bytes = field(default=b"", repr=False)  # 32 bytes that fix its sample; b"" if there is a reply


@dataclass(frozen=True)
class Charge:
    """One round that an account paid for, or would have."""

    account: str
    run: str
    round: int
    event: AccountingEvent
    evaluation: float | None  # noise multiplier of the score in it, if there is one
    state: str  # RESERVED, RELEASED, ABORTED or LOST: charged in a ledger that is lost
    reserved_at: float  # seconds since the epoch, UTC


@dataclass(frozen=True)
class Loss:
    """What a lost ledger, or the lost end of one, had charged: as its owner states it."""

    run: str
    event: AccountingEvent


EVERYTHING = Loss("unknown", AccountingEvent(1.0, 0.0, 1))  # nobody knows: no budget is large enough


class LedgerFile:
    """A ledger's file, whatever accounts are in it.

    Raises LedgerError wherever the file cannot be read, written or trusted.
    """

    def __init__(self, path: Path, anchor: Path | None = None, create: bool = False) -> None:
        """Open the ledger at `path`; if there was never one and `create` is set, make it (mode 0600).

        With `anchor` it has to contain what that names, now and in every transaction. A copy has none.
        """
        self.path, self._anchor = path, anchor
        check_path(path)
        if anchor is not None:
            with one_at_a_time(anchor):
                self._begin(anchor, create)
        try:
            damaged = path.stat().st_size < 512  # SQLite would take a file cut to nothing for a new, empty one
            owner = path.stat().st_uid
        except OSError as error:
            raise LedgerError(f"cannot open the privacy ledger {path}: {error}. Check its permissions.") from error
        if owner != os.geteuid():  # what is written beside the file would shut its owner out
            raise LedgerError(f"the privacy ledger {path} belongs to user {owner}: run this as its owner.")
        if damaged:
            raise LedgerError(f"the privacy ledger {path} is cut short. {_NO_BACKUP}")
        with self._connected() as db:
            program = db.execute("PRAGMA application_id").fetchone()[0]
            version = db.execute("PRAGMA user_version").fetchone()[0]
        if program != _APPLICATION:
            raise LedgerError(f"{path} is no privacy ledger. {_NO_BACKUP}")
        if version != _SCHEMA_VERSION:
            raise LedgerError(
                f"{path} has ledger schema {version}, expected {_SCHEMA_VERSION}: another fedllm wrote it. Move it "
                "away and keep it; then state what it has charged: fedllm ledger restart --help"
            )
        with self.transaction() as db:
            charges, entries, newest = db.execute(
                "SELECT (SELECT count(*) FROM entry), count(*), max(number) + 1 FROM chain"
            ).fetchone()
            kinds = dict(db.execute("SELECT kind, count(*) FROM chain GROUP BY kind"))
        if charges != kinds.get("reserved", 0) + kinds.get("lost", 0) or entries != (newest or 0):
            raise LedgerError(f"the privacy ledger {path} holds {charges} charges, and its chain others. {_NO_BACKUP}")

    def _begin(self, anchor: Path, create: bool) -> None:
        """Compare what is there with what the anchor says was there, and make a ledger if there was never one."""
        known = read_anchor(anchor)
        try:
            there = self.path.exists()
        except OSError as error:
            raise LedgerError(f"cannot open the privacy ledger {self.path}: {error}. Check its permissions.") from error
        if there and known is None:
            raise LedgerError(
                f"the privacy ledger {self.path} has lost its anchor {anchor}, so that nobody can tell whether it is "
                f"the newest. {_WAY_OUT}"
            )
        if there:
            return
        if known is not None and known.number >= 0:
            raise LedgerError(
                f"the privacy ledger {self.path} is missing: it had at least {known.number + 1} entries. {_WAY_OUT}"
            )
        if not create:
            raise LedgerError(f"{self.path}: there is no ledger yet; nothing was spent")
        if known is None:  # first: a ledger without an anchor is refused
            write_anchor(anchor, BEFORE)
        _create(self.path)

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        try:
            where = f"{self.path.absolute().as_uri()}?mode=rw"  # a file that is gone is not made anew
            with closing(sqlite3.connect(where, timeout=_PATIENCE, isolation_level=None, uri=True)) as db:
                yield db
        except sqlite3.Error as error:
            raise LedgerError(
                f"the privacy ledger {self.path} cannot be used ({error}); nothing was released. "
                f"Check disk and permissions. {_NO_BACKUP}"
            ) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One immediate transaction, committed to disk at the end and rolled back on any error.

        When it ends, the anchor names the newest entry.
        """
        known: LedgerHead | None = None
        with self._connected() as db:
            db.execute("PRAGMA journal_mode = DELETE")
            db.execute("PRAGMA synchronous = EXTRA")  # the journal's end is on disk, too
            db.execute("PRAGMA secure_delete = ON")
            db.execute("BEGIN IMMEDIATE")
            try:
                if self._anchor is not None:
                    known = self._anchored(db, self._anchor)
                yield db
                newest = _head(db)
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")
        if self._anchor is not None and known is not None and known.number < newest.number:
            advance_anchor(self._anchor, newest)

    def _anchored(self, db: sqlite3.Connection, anchor: Path) -> LedgerHead:
        known = read_anchor(anchor)
        if known is None:
            raise LedgerError(f"the privacy ledger {self.path} has lost its anchor {anchor}. {_WAY_OUT}")
        if known != BEFORE and not _knows(db, known):
            raise LedgerError(
                f"the privacy ledger {self.path} lacks entry {known.number}, which it had before: it is older than its "
                f"anchor, or another one. {_WAY_OUT}"
            )
        return known

    def accounts(self) -> list[str]:
        """Return the names of all accounts that were charged or declared, in the order of their first charge."""
        with self.transaction() as db:
            charged = [str(row[0]) for row in db.execute("SELECT account FROM entry GROUP BY account ORDER BY min(id)")]
            return list(dict.fromkeys([*charged, *_declared(db)]))

    def account_of(self, data_set: str) -> str:
        """Return the account that pays for a data set: its own if it was declared disjoint, or else the site's."""
        with self.transaction() as db:
            return _account(db, data_set)

    def events(self, account: str, since: float = -math.inf, side: Side = "training") -> list[AccountingEvent]:
        """Return every event charged to a side of an account, in order, released or not.

        `since`, seconds since the epoch, leaves out what was charged before.
        """
        with self.transaction() as db:
            rows = db.execute(
                "SELECT sampling_rate, noise_multiplier, steps, evaluation, both FROM entry "
                "WHERE (account = ? OR state = 'LOST') AND state != 'ABORTED' AND reserved_at >= ? ORDER BY id",
                (account, since),
            )
            return [event for row in rows for event in on_side(side, AccountingEvent(*row[:3]), row[3], bool(row[4]))]

    def split(self, account: str) -> Split | None:
        """Return the split of an account's units as it stands; None if none was made."""
        with self.transaction() as db:
            row = db.execute("SELECT key FROM split").fetchone()
            stated = _stated_split(db, account)
        return None if row is None or stated is None else Split(float(stated["share"]), row[0])

    def sided(self, account: str) -> bool:
        """Whether training and evaluation are charged to different units: else both count everything."""
        with self.transaction() as db:
            return _sided(db, account)

    def spent(self, account: str, delta: float) -> PrivacySpent:
        """Return the privacy loss of an account: that of its costlier side."""
        return costlier(spent(self.events(account, side=side), delta) for side in SIDES)

    def budget(self) -> tuple[float, float] | None:
        """Return the epsilon and delta that the chain stated last; None before any was stated."""
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
                "SELECT account, run, round, sampling_rate, noise_multiplier, steps, evaluation, state, reserved_at "
                "FROM entry ORDER BY id"
            )
            return [Charge(row[0], row[1], row[2], AccountingEvent(*row[3:6]), row[6], row[7], row[8]) for row in rows]

    def head(self) -> LedgerHead:
        """Return the newest entry of the chain."""
        with self.transaction() as db:
            return _head(db)

    def knows(self, head: LedgerHead) -> bool:
        """Whether the chain holds an entry that somebody has seen before: a restored backup lacks the latest."""
        with self.transaction() as db:
            return _knows(db, head)

    def abort(self, run: str, round: int, signer: Identity) -> None:
        """Give a reserved round back to the budget: the owner's decision, for a round that will not be repeated.

        RESERVED proves that nothing was released (see above), and from here on nothing can be: the round is refused.
        It proves nothing of a ledger that was restarted since. Raises LedgerError if there is no such reservation.
        """
        with self.transaction() as db:
            rows = db.execute(
                "SELECT id, account, charge, state FROM entry WHERE run = ? AND round = ? AND state != 'LOST' "
                "ORDER BY charge DESC",
                (run, round),
            ).fetchall()
            if not rows or rows[0][3] != "RESERVED":
                raise LedgerError(
                    f"round={round} of run={run} is not reserved; only what was not released can be given back"
                )
            rows = [row for row in rows if not _before_restart(db, run, round, row[2])]
            if not rows:
                raise LedgerError(
                    f"round={round} of run={run} was reserved before this ledger was restarted: what is lost may say "
                    "that it was released. So it counts as spent."
                )
            for number, account, charge, _ in reversed(rows):
                db.execute("UPDATE entry SET state = 'ABORTED', coins = NULL WHERE id = ?", (number,))
                _note(db, "aborted", {"account": account, "run": run, "round": round, "charge": charge}, signer)

    def declare_disjoint(self, name: str, data: DataSet, signer: Identity) -> None:
        """Give the data set `name` a budget of its own: its owner declares that nobody in it is in any other.

        Raises LedgerError if the name cannot be, or was declared before, or the site has too many accounts.
        """
        if name in ("", SITE) or name != canonical(name) or len(name) > _MAX_NAME:
            raise LedgerError(
                f"data set {name[:_MAX_NAME]!r}: expected a name of 1 to {_MAX_NAME} characters, other than {SITE!r}, "
                "without spaces at its ends or characters that do not show"
            )
        with self.transaction() as db:
            if name in _declared(db):
                raise LedgerError(f"data set {name!r} was declared disjoint before: it has its own account already")
            if 1 + len(_declared(db)) >= MOST_ACCOUNTS:
                raise LedgerError(
                    f"data set {name!r} would be one account too many: no audit reads more than {MOST_ACCOUNTS} of a "
                    f"site. Leave its name out: it then shares the site's account"
                )
            _compare(db, name, data)
            _note(db, "disjoint", {"account": name}, signer)

    def overlaps(self, name: str, data: DataSet) -> dict[str, int]:
        """Return with which other accounts' data sets `data` shares records or persons, and how many hashes of them."""
        with self.transaction() as db:
            rows = db.execute("SELECT account, hash FROM member WHERE account != ?", (name,))
            return dict(Counter(str(account) for account, each in rows if each in data))

    def look_at_clock(self) -> float:
        """Note what the clock says, as evidence for later; return the seconds by which it is ahead of evidence."""
        with self.transaction() as db:
            return _look_at_clock(db)

    def confirm_clock(self, signer: Identity) -> None:
        """Believe the clock as it is now: its owner says that it is right."""
        with self.transaction() as db:
            _look_at_clock(db, believe=True)
            _note(db, "clock", {}, signer)

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

    def export(self, end: End, signer: Identity) -> list[str]:
        """Return the chain as it is handed in for the audit of a run: its end says, signed, that it is all of it.

        Who receives it cannot cut it, nor hand in an older one. See `fedllm.crypto.hash_chain.close_export`.
        """
        with self.transaction() as db:
            lines = [str(row[0]) for row in db.execute("SELECT line FROM chain ORDER BY number")]
            return close_export(lines, end, _now(db) // 60 * 60, signer)

    def verify(self, signers: Iterable[PublicIdentity] | None = None) -> LedgerHead:
        """Check the chain, and that the tables say what it says; return its head.

        Raises ChainError that names the first entry that was altered, removed, exchanged, or never signed.
        """
        entries = read_chain(self.lines(), str(self.path), signers)
        said: dict[tuple[str, int, int], tuple[Any, ...]] = {}
        splits = SplitsSeen()
        for entry in entries:
            body = entry.body
            splits.see(entry.kind, body)
            key = (str(body.get("run")), int(body.get("round", 0)), int(body.get("charge", 0)))
            if entry.kind in ("reserved", "lost"):
                state = "RESERVED" if entry.kind == "reserved" else "LOST"
                both = int(not splits.sided(body["account"]))
                said[key] = (body["account"], *(body[name] for name in _EVENT), both, state, entry.number)
            elif entry.kind in ("released", "aborted") and key in said:
                said[key] = (*said[key][:-2], entry.kind.upper(), entry.number)
        with self.transaction() as db:
            rows = db.execute(
                "SELECT run, round, charge, account, request, sampling_rate, noise_multiplier, steps, evaluation, "
                "both, state FROM entry"
            ).fetchall()
            damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise ChainError(f"{self.path}: the file is damaged ({damage}). {_NO_BACKUP}")
        found = {tuple(row[:3]): tuple(row[3:]) for row in rows}
        for key, (*values, number) in said.items():
            if found.get(key) != tuple(values):
                raise ChainError(
                    f"{self.path}, entry {number}: round {key[1]} of run {key[0]} was signed as "
                    f"{values[-1]} and is not what the table holds. The file was altered."
                )
        extra = sorted(set(found) - set(said))
        if extra:
            raise ChainError(
                f"{self.path}: round {extra[0][1]} of run {extra[0][0]} is in the table and was never signed"
            )
        if not entries:  # killed between file and first entry: there is nothing yet to vouch for
            return BEFORE
        return LedgerHead(entries[-1].number, entries[-1].digest)


def restart(place: LedgerPlace, signer: Identity, lost: Sequence[Loss]) -> LedgerHead:
    """Take what there is at `place`, or a new ledger, from now on: its owner states what is `lost` to it.

    An older ledger that is still there goes on, so that what it holds is not stated twice. Returns the newest entry.
    Raises LedgerError if the ledger is whole, or what is there is none.
    """
    try:
        LedgerFile(place.file, place.anchor)
    except LedgerError:
        pass  # whatever it is that remains wrong is said below
    else:
        raise LedgerError(f"the privacy ledger {place.file} is whole; there is nothing to restart")
    with one_at_a_time(place.anchor):
        known = read_anchor(place.anchor)
        if not place.file.exists():
            _create(place.file)
        file = LedgerFile(place.file)
        with file.transaction() as db:
            _take_over(db, signer)
            anchor = None if known is None else {"number": known.number, "digest": known.digest}
            _note(db, "restarted", {"anchor": anchor}, signer)
            for loss in lost:
                _enter(db, SITE, loss.run, 0, "lost", loss.event, signer)
            newest = _head(db)
        write_anchor(place.anchor, newest)
    return newest


class PrivacyLedger:
    """The budget of one account at one site.

    Raises LedgerError wherever the file cannot be read, written or trusted; nothing is trained then.
    """

    def __init__(
        self, place: LedgerPlace, epsilon: float, delta: float, signer: Identity, period: Period | None = None,
        share: float = SHARE, rule: str = "", key: bytes | None = None,
    ) -> None:  # fmt: skip
        """Open or create the ledger at `place` with a budget of `epsilon` at `delta` for each account.

        `share` of the privacy units evaluate; `rule` names what a unit is told from others by; `key` is the split's
        if none is there yet, else it is drawn.
        """
        if not (epsilon >= 0 and 0 < delta < 1):  # refuses NaN too
            raise LedgerError(f"budget epsilon={epsilon!r} at delta={delta!r}: expected epsilon >= 0 and 0 < delta < 1")
        self.file = LedgerFile(place.file, place.anchor, create=True)
        self._signer, self._period = signer, period
        self.epsilon, self.delta = epsilon, delta
        with self.file.transaction() as db:
            _take_over(db, signer)
            self._state_budget(db)
            self.account = _account(db, place.data_set)
            self.split = self._state_split(db, share, rule, key)

    def _state_split(self, db: sqlite3.Connection, share: float, rule: str, key: bytes | None) -> Split:
        """Put the split into the chain if it is new, or not what it was; return it."""
        row = db.execute("SELECT key FROM split").fetchone()
        if row is None:
            row = (random_bytes(KEY) if key is None else key,)
            db.execute("INSERT INTO split VALUES (?)", row)
        split = Split(share, row[0])
        body = {"account": self.account, "share": share, "rule": rule, "key": split.key_digest}
        if _stated_split(db, self.account) != body:
            _note(db, "split", body, self._signer)
        return split

    def _state_budget(self, db: sqlite3.Connection) -> None:
        """Put the budget into the chain if it is new: who reads the chain sees what was permitted, and when."""
        budget = {"epsilon": self.epsilon if math.isfinite(self.epsilon) else None, "delta": self.delta}
        row = db.execute("SELECT line FROM chain WHERE kind = 'budget' ORDER BY number DESC LIMIT 1").fetchone()
        if row is None or open_entry(row[0]).body != budget:
            _note(db, "budget", budget, self._signer)

    def compare(self, data: DataSet) -> list[str]:
        """Note what this account's data set holds; return the other accounts whose data sets share some of it.

        For the owner's eyes: the account stays the one that was declared, so that no answer depends on it.
        """
        with self.file.transaction() as db:
            return _compare(db, self.account, data)

    def reserve(
        self, run: str, round: int, request: str, event: AccountingEvent, evaluation: float | None = None
    ) -> Reservation:
        """Charge `event` for a round, or find that it is already charged. On return the charge is on disk.

        `evaluation` is the noise multiplier of a score on the evaluation units, charged in the same transaction.

        The same request again, while nothing has left the site, has the same sampling randomness once more; after that
        it is charged anew. Raises BudgetExceeded, charging nothing, if the budget does not admit the event, and
        LedgerError if the round was charged for another request.
        """
        with self.file.transaction() as db:
            row = db.execute(
                "SELECT id, request, state, reply, tries, coins, account, both, charge FROM entry WHERE run = ? "
                "AND round = ? AND state != 'LOST' ORDER BY charge DESC LIMIT 1",
                (run, round),
            ).fetchone()
            if row is not None:
                number, charged_for, state, reply, tries, sealed, *charged, charge = row
                if charged_for != request:
                    raise LedgerError(
                        f"round={round} of run={run} was charged for another request. A round is trained once; "
                        "resume from the coordinator's last checkpoint or start a new run."
                    )
                if state == "ABORTED":
                    raise LedgerError(f"round={round} of run={run} was aborted by its owner. Start a new run.")
                if state == "RELEASED" and reply is None:
                    raise LedgerError(
                        f"round={round} of run={run} was answered, and later rounds too, so its reply is no longer "
                        "kept. The server must resume from a later checkpoint, or start a new run."
                    )
                if state == "RELEASED":
                    return Reservation(run, round, reply)
                same = charged == [self.account, not _sided(db, self.account)]
                again = tries < _TRIES and same and not _before_restart(db, run, round, charge)
                coins = self._unsealed(sealed) if again else None
                if coins is not None:
                    db.execute("UPDATE entry SET tries = tries + 1 WHERE id = ?", (number,))
                    return Reservation(run, round, None, coins)
                db.execute("UPDATE entry SET coins = NULL WHERE id = ?", (number,))
            self._check(db, run, event, evaluation)
            # the server may go back one round, to the checkpoint before a damaged one: two replies are kept
            db.execute("UPDATE entry SET reply = NULL WHERE run = ? AND round < ?", (run, round - 1))
            return Reservation(run, round, None, self.charge(db, run, round, request, event, evaluation))

    def _unsealed(self, sealed: bytes | None) -> bytes | None:
        """Return the sampling randomness of a reservation; None if it can no longer be read, as with new keys."""
        try:
            return None if sealed is None else self._signer.open(sealed, [self._signer.public])[0]
        except CryptoError:
            return None

    def answered(self, run: str, round: int) -> bool:
        """Whether a round was answered or aborted before, so that it is answered as it was, or not at all."""
        with self.file.transaction() as db:
            row = db.execute(
                "SELECT 1 FROM entry WHERE run = ? AND round = ? AND state IN ('RELEASED', 'ABORTED')", (run, round)
            ).fetchone()
        return row is not None

    def charge(
        self, db: sqlite3.Connection, run: str, round: int, request: str, event: AccountingEvent,
        evaluation: float | None = None,
    ) -> bytes:  # fmt: skip
        """Enter a charge, whatever the budget (`reserve` asks first), and return its sampling randomness."""
        number = _enter(db, self.account, run, round, request, event, self._signer, evaluation)
        coins = random_bytes(_COINS)
        sealed = self._signer.seal(coins, self._signer.public)
        db.execute("UPDATE entry SET tries = 1, coins = ? WHERE id = ?", (sealed, number))
        return coins

    def _check(self, db: sqlite3.Connection, run: str, event: AccountingEvent, evaluation: float | None = None) -> None:
        ahead = _look_at_clock(db, believe=self._period is None)
        if ahead:  # a later time would free what this period has spent
            raise LedgerError(
                f"the clock has gone ahead by {ahead / _DAY:.3g} days more than this machine can have been running or "
                "off. Set it right (timedatectl). If it is right, the machine was off for long, or the clock was wrong "
                "before: fedllm ledger clock"
            )
        both = not _sided(db, self.account)
        over = recent = None
        try:
            for side in SIDES:
                more = on_side(side, event, evaluation, both)
                plans = {*_plans(db, self.account, side), *((run, e.sampling_rate, e.noise_multiplier) for e in more)}
                events = [*_summed(db, self.account, side), *more]
                over = _more(over, overrun(events, self.delta, self.epsilon, len(plans) <= 1))
                if self._period is not None:  # several plans may lie in it, so RDP decides
                    since = _now(db) - self._period.days * _DAY
                    events = [*_summed(db, self.account, side, since), *more]
                    recent = _more(recent, overrun(events, self.delta, self._period.epsilon, one_plan=False))
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

    def check(self, run: str, event: AccountingEvent, evaluation: float | None = None) -> None:
        """Raise BudgetExceeded if the budget admits no such event and `run` has nothing to repeat either."""
        with self.file.transaction() as db:
            known = db.execute("SELECT 1 FROM entry WHERE run = ? AND state != 'LOST'", (run,)).fetchone()
            if known is None:
                self._check(db, run, event, evaluation)

    def commit(self, run: str, commitment: str) -> bool:
        """Note what the site commits to before a run's first charge; whether the chain holds this commitment."""
        with self.file.transaction() as db:
            for (line,) in db.execute("SELECT line FROM chain WHERE kind = 'canaries'"):
                body = open_entry(line).body
                if body["run"] == run:
                    return bool(body["commitment"] == commitment)
            if db.execute("SELECT 1 FROM entry WHERE run = ?", (run,)).fetchone() is not None:
                return False
            _note(db, "canaries", {"run": run, "commitment": commitment}, self._signer)
        return True

    def release(self, reservation: Reservation, reply: bytes) -> None:
        """Mark a round as released, keep its reply and forget what fixed its sample. Only then may `reply` leave."""
        with self.file.transaction() as db:
            row = db.execute(
                "SELECT id, account, charge, state, reserved_at FROM entry WHERE run = ? AND round = ? "
                "AND state != 'LOST' ORDER BY charge DESC LIMIT 1",
                (reservation.run, reservation.round),
            ).fetchone()
            if row is None or row[3] != "RESERVED":
                raise LedgerError(f"round={reservation.round} of run={reservation.run} has no open reservation.")
            db.execute("UPDATE entry SET state = 'RELEASED', coins = NULL, reply = ? WHERE id = ?", (reply, row[0]))
            answer = hashlib.sha256(reply).hexdigest()
            which = {"account": row[1], "run": reservation.run, "round": reservation.round, "charge": row[2]}
            # the time of the reservation, not the present one: the server sees digests of entries, and would learn
            # from them when training ended
            _note(db, "released", {**which, "reply": answer}, self._signer, at=row[4])

    def abort(self, run: str, round: int) -> None:
        """Give a reserved round back to the budget, as LedgerFile.abort."""
        self.file.abort(run, round, self._signer)

    def events(self, side: Side = "training") -> list[AccountingEvent]:
        """Return every event charged to a side of this account, in order, released or not."""
        return self.file.events(self.account, side=side)

    def spent(
        self, delta: float | None = None, also: Sequence[AccountingEvent] = (), evaluation: float | None = None
    ) -> PrivacySpent:
        """Return the privacy loss of everything charged to this account, at `delta` or else the budget's.

        It is that of the costlier side. `also` and `evaluation` count what is not charged yet.
        """
        delta, both = self.delta if delta is None else delta, not self.file.sided(self.account)

        def more(side: Side) -> list[AccountingEvent]:
            charges = [*((event, None) for event in also), (AccountingEvent(0.0, 0.0, 0), evaluation)]
            return [event for charge in charges for event in on_side(side, *charge, both)]

        return costlier(spent([*self.events(side), *more(side)], delta) for side in SIDES)


def on_side(side: Side, event: AccountingEvent, evaluation: float | None, both: bool) -> list[AccountingEvent]:
    """Return what a charge costs the units of one side: its training, or the score in it, or both.

    A score reads every evaluation unit: nothing is sampled.
    """
    score = [] if evaluation is None else [AccountingEvent(1.0, evaluation, 1)]
    training = [event] if event.steps else []
    return [*training, *score] if both else training if side == "training" else score


def costlier(sides: Iterable[PrivacySpent]) -> PrivacySpent:
    """Return the larger of what sides have spent; by RDP, too, whichever side that is of."""
    found = list(sides)
    most = max(found, key=lambda each: each.epsilon)
    return replace(most, epsilon_rdp=max(each.epsilon_rdp for each in found))


@dataclass
class SplitsSeen:
    """What the entries of a chain say of the splits of its accounts, seen one after the other."""

    _splits: dict[str, int] = field(default_factory=dict)
    _restarted: bool = False  # before any split: a key may be lost

    def see(self, kind: str, body: Mapping[str, Any]) -> None:
        """Take in an entry."""
        if kind == "split":
            account = str(body["account"])
            self._splits[account] = self._splits.get(account, 0) + 1
        elif kind == "restarted":
            self._restarted = True

    def sided(self, account: str) -> bool:
        """Whether every unit has had one side from the first charge to the account on: else both count everything."""
        return self._splits.get(account, 0) == 1 and not self._restarted


def _stated_split(db: sqlite3.Connection, account: str) -> dict[str, Any] | None:
    """Return what the chain said last of an account's split; None if nothing yet."""
    lines = db.execute("SELECT line FROM chain WHERE kind = 'split' ORDER BY number DESC")
    return next((body for (line,) in lines if (body := open_entry(line).body)["account"] == account), None)


def _sided(db: sqlite3.Connection, account: str) -> bool:
    seen = SplitsSeen()
    for kind, line in db.execute("SELECT kind, line FROM chain WHERE kind IN ('split', 'restarted') ORDER BY number"):
        seen.see(kind, open_entry(line).body)
    return seen.sided(account)


def _plans(db: sqlite3.Connection, account: str, side: Side) -> set[tuple[str, float, float]]:
    """Return the plans that a side was charged for: each by its run, its sampling rate and its noise."""
    rows = db.execute(
        "SELECT DISTINCT run, sampling_rate, noise_multiplier, steps, evaluation, both FROM entry "
        "WHERE (account = ? OR state = 'LOST') AND state != 'ABORTED'",
        (account,),
    )
    return {
        (run, event.sampling_rate, event.noise_multiplier)
        for run, q, noise, steps, evaluation, both in rows
        for event in on_side(side, AccountingEvent(q, noise, steps), evaluation, bool(both))
    }


def _before_restart(db: sqlite3.Connection, run: str, round: int, charge: int) -> bool:
    """Whether a round's charge stands before the ledger was restarted: nobody knows what became of it since."""
    restarted = db.execute("SELECT max(number) FROM chain WHERE kind = 'restarted'").fetchone()[0]
    if restarted is None:
        return False
    lines = db.execute("SELECT line FROM chain WHERE kind = 'reserved' AND number > ?", (restarted,))
    bodies = (open_entry(line).body for (line,) in lines)
    return all((body["run"], body["round"], body["charge"]) != (run, round, charge) for body in bodies)


def _more(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else max(a, b)


def _summed(db: sqlite3.Connection, account: str, side: Side, since: float = -math.inf) -> list[AccountingEvent]:
    """Return what a side was charged, equal events as one: a round's check must not grow with the ledger's age."""
    rows = db.execute(
        "SELECT sampling_rate, noise_multiplier, sum(steps), min(steps) < 0 OR sum(typeof(steps) != 'integer') "
        "FROM entry WHERE (account = ? OR state = 'LOST') AND state != 'ABORTED' AND reserved_at >= ? AND (both OR ?) "
        "GROUP BY sampling_rate, noise_multiplier",
        (account, since, side == "training"),
    )
    # a row that cannot be must not vanish in a sum: it becomes an event that is refused
    found = [AccountingEvent(rate, noise, -1 if damaged else steps) for rate, noise, steps, damaged in rows]
    rows = db.execute(
        "SELECT evaluation, count(*) FROM entry WHERE (account = ? OR state = 'LOST') AND state != 'ABORTED' "
        "AND reserved_at >= ? AND (both OR ?) AND evaluation IS NOT NULL GROUP BY evaluation",
        (account, since, side == "evaluation"),
    )
    return [*found, *(AccountingEvent(1.0, noise, scores) for noise, scores in rows)]


def _enter(
    db: sqlite3.Connection, account: str, run: str, round: int, request: str, event: AccountingEvent, signer: Identity,
    evaluation: float | None = None,
) -> int:  # fmt: skip
    """Enter a charge, RESERVED or, for the `request` "lost", LOST; return its row."""
    last = db.execute("SELECT max(charge) FROM entry WHERE run = ? AND round = ?", (run, round)).fetchone()[0]
    which = {"account": account, "run": run, "round": round, "charge": (last or 0) + 1}
    values = {
        "request": request, "sampling_rate": event.sampling_rate, "noise_multiplier": event.noise_multiplier,
        "steps": event.steps, "evaluation": evaluation,
    }  # fmt: skip
    kind = "lost" if request == "lost" else "reserved"
    added = db.execute(
        "INSERT INTO entry (account, run, round, charge, request, sampling_rate, noise_multiplier, steps, evaluation, "
        "both, state, reserved_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*which.values(), *values.values(), not _sided(db, account), kind.upper(), _now(db)),
    )
    _note(db, kind, {**which, **values}, signer)
    return int(added.lastrowid or 0)


def _declared(db: sqlite3.Connection) -> list[str]:
    rows = db.execute("SELECT line FROM chain WHERE kind = 'disjoint' ORDER BY number")
    return [str(open_entry(line).body["account"]) for (line,) in rows]


def _account(db: sqlite3.Connection, data_set: str) -> str:
    return data_set if data_set in _declared(db) else SITE


def _compare(db: sqlite3.Connection, account: str, data: DataSet) -> list[str]:
    db.executemany("INSERT OR IGNORE INTO member (account, hash) VALUES (?, ?)", [(account, each) for each in data])
    rows = db.execute(
        "SELECT DISTINCT b.account FROM member a JOIN member b ON a.hash = b.hash "
        "WHERE a.account = ? AND b.account != a.account ORDER BY b.account",
        (account,),
    )
    return [str(row[0]) for row in rows]


def _head(db: sqlite3.Connection) -> LedgerHead:
    row = db.execute("SELECT number, digest FROM chain ORDER BY number DESC LIMIT 1").fetchone()
    return BEFORE if row is None else LedgerHead(int(row[0]), str(row[1]))


def _knows(db: sqlite3.Connection, head: LedgerHead) -> bool:
    row = db.execute("SELECT digest FROM chain WHERE number = ?", (head.number,)).fetchone()
    return row is not None and row[0] == head.digest


def _last_line(db: sqlite3.Connection) -> str | None:
    row = db.execute("SELECT line FROM chain ORDER BY number DESC LIMIT 1").fetchone()
    return None if row is None else str(row[0])


def _take_over(db: sqlite3.Connection, signer: Identity) -> None:
    """Begin the chain, or go on with it."""
    line = _last_line(db)
    if line is None:
        _note(db, "opened", {}, signer)
    elif open_entry(line).signer != signer.public and not _may_sign(db, signer.public):
        # the keys of before are lost; who trusts the new ones trusts that this is the ledger they were found with
        _note(db, "key", {"identity": signer.public.to_text()}, signer)


def _may_sign(db: sqlite3.Connection, identity: PublicIdentity) -> bool:
    lines = db.execute("SELECT line FROM chain WHERE kind IN ('opened', 'key')").fetchall()
    entries = [open_entry(line) for (line,) in lines]
    return any(identity.to_text() == entry.body.get("identity") or identity == entry.signer for entry in entries)


def _note(db: sqlite3.Connection, kind: str, body: dict[str, Any], signer: Identity, at: float | None = None) -> None:
    """Append an entry to the chain, of now or `at`, to the minute."""
    before = _head(db)
    number = before.number + 1
    line = make_entry(number, before.digest, kind, (_now(db) if at is None else at) // 60 * 60, body, signer)
    db.execute(
        "INSERT INTO chain (number, kind, digest, line) VALUES (?, ?, ?, ?)",
        (number, kind, open_entry(line).digest, line),
    )


def _now(db: sqlite3.Connection) -> float:
    """Return the time, never before that of the last entry or of the evidence: a clock that goes back frees nothing."""
    last, evidence, now = db.execute("SELECT max(reserved_at) FROM entry").fetchone()[0], _evidence(db), this_moment()
    return max(now.clock, last or 0.0, evidence.at_least(now) if evidence is not None else 0.0)


def _evidence(db: sqlite3.Connection) -> Evidence | None:
    row = db.execute("SELECT clock, boot, count, seen FROM clock").fetchone()
    return None if row is None else Evidence(Moment(*row[:3]), row[3])


def _look_at_clock(db: sqlite3.Connection, believe: bool = False) -> float:
    """Note what the clock says; return the seconds by which it has gone ahead of the evidence, which then stays.

    `believe` takes the clock as it is.
    """
    now, known = this_moment(), _evidence(db)
    if known is None or believe:
        known = Evidence(now, now.clock)
    ahead = known.unexplained(now)
    if not ahead:
        after = known.after(now)
        db.execute("DELETE FROM clock")
        db.execute(
            "INSERT INTO clock VALUES (?, ?, ?, ?)",
            (after.first.clock, after.first.boot, after.first.count, after.seen),
        )
    return ahead


def _create(path: Path) -> None:
    """Make an empty ledger and put it in place as a whole, unless another process was faster; raises LedgerError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600))
        try:
            with closing(sqlite3.connect(temporary, isolation_level=None)) as db:
                db.execute("PRAGMA synchronous = FULL")
                db.execute(f"PRAGMA application_id = {_APPLICATION}")
                db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
                db.executescript(_SCHEMA)
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            temporary.unlink()
    except (OSError, sqlite3.Error) as error:
        raise LedgerError(f"cannot make the privacy ledger {path}: {error}. Check its permissions.") from error
