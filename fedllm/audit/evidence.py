"""From a folder of evidence to an audit: every signature, chain and epsilon is checked again. Needs no torch.

record.jsonl          the server's run log (server.run_record says what is in it)
plan.json             the plan that the sites were sent
metrics.jsonl         what the server measured after each round, on public data
ledgers/SITE.jsonl    a site's ledger, by `fedllm ledger export`
"""

import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import fedllm
from fedllm.audit.model import (
    INTEGRITY,
    Account,
    Accountants,
    Attack,
    Audit,
    Claim,
    Code,
    CrossCheck,
    Empirical,
    Finding,
    Point,
    Run,
    Site,
    SiteScore,
    Status,
    Utility,
    Verdict,
)
from fedllm.audit.risk import risk_of
from fedllm.audit.trust import Trust
from fedllm.canonical import canonical_json, read_json
from fedllm.crypto.hash_chain import EXPORT, End, Entry, read_chain
from fedllm.crypto.identity import PublicIdentity
from fedllm.errors import ChainError, CryptoError, PrivacyError
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import OLD_GRID, AccountingEvent, PrivacySpent, spent, spent_at_sites
from fedllm.privacy.accounting import counted as counted_by
from fedllm.privacy.canaries import Opening, pooled
from fedllm.privacy.distributed_noise import DistributedMechanism
from fedllm.privacy.ledger import SplitsSeen, costlier, on_side
from fedllm.privacy.ledger_place import MOST_ACCOUNTS, SITE
from fedllm.privacy.metrics import Layout, metric_names
from fedllm.privacy.split import SIDES, Side
from fedllm.processes import without_main
from fedllm.protocol.spending_statement import Statement, open_statement, roster_digest
from fedllm.shown import escaped
from fedllm.values import HEAD_OFFICE, is_head_office

RECORD, PLAN, METRICS, LEDGERS = "record.jsonl", "plan.json", "metrics.jsonl", "ledgers"
_TOLERANCE_PLD = 1e-3  # between two computations of the same PLD, on whatever machines
_TOLERANCE_RDP = 5e-3  # relative
_SAME = 1e-9  # relative, between two computations of a square root
_TOLERANCE_CROSS = 0.01  # between PLD and another numerical method
_SHOWN = 12  # pieces of evidence of one finding
_LONGEST = 500  # characters of one: it may quote what somebody has signed
# What one site has signed must not keep everybody's report waiting: more is no evidence.
_MOST_BYTES = 1 << 28  # of a ledger
_MOST_KINDS = 256  # of mechanisms in a ledger, each a distribution to compose
_MOST_SECONDS = 600.0  # of CPU, for the figures of one site's statements
_MOST_SECONDS_ONCE = 60.0  # to compose its accounts once: a timeline and an account's figures cost some 30 times that
_POINTS = 24  # of a site's timeline
_MANY = 4096  # statements; fewer are checked before other processes have started
_M = TypeVar("_M", bound=BaseModel)


def file_name(site: str) -> str:
    """Return a file name of its own for every site, readable if the site's name allows."""
    for sign in "%/\\\0":
        site = site.replace(sign, f"%{ord(sign):02X}")
    site = site.replace(".", "%2E", 1) if site.startswith(".") else site
    return site if len(site.encode()) <= 200 else hashlib.sha256(site.encode()).hexdigest()


# ---- what is in the files --------------------------------------------------------------------------------------------


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


_Name = Annotated[str, Field(max_length=500)]
_Round = Annotated[int, Field(ge=0, lt=2**63)]


class _PlanBody(_Body):
    plan: dict[str, Any]
    plan_digest: str
    versions: dict[str, str]
    sites: dict[str, str]
    spec_digest: str = ""
    adapter: str
    most_loss: float = Field(1.0, gt=0)


class _Scores(_Body):
    total: list[float]
    noise_std: float = Field(ge=0)
    factor: float = Field(gt=0, le=1)


class _RoundBody(_Body):
    round: _Round
    counts: bool
    answered: dict[str, str]
    declined: dict[str, str]
    failed: dict[str, str]
    adapter_before: str
    adapter_after: str
    lost: str = ""
    noise_multiplier: float | None = None
    trimmed: int | None = None
    sums: dict[str, int] = {}
    refused: dict[str, str] = {}
    closed: dict[str, str] = {}
    bytes_up: int | None = None
    bytes_down: int | None = None
    scores: _Scores | None = None


class _ClosingBody(_Body):
    answered: dict[str, str]
    declined: dict[str, str]
    failed: dict[str, str]
    lost: str
    adapter: str
    trimmed: int | None = None
    sums: dict[str, int] = {}
    scores: _Scores | None = None


class _BegunBody(_Body):
    round: _Round
    sites: list[str]


class _MarkBody(_Body):  # resumed, end
    round: int
    adapter: str
    stopped: str = ""
    kept: int | None = None
    kept_adapter: str = ""


class _Reserved(_Body):  # or lost, with an earlier ledger
    account: _Name
    run: _Name
    round: _Round
    charge: _Round  # 1, 2 ...: a round may be charged again
    sampling_rate: float
    noise_multiplier: float
    steps: int
    evaluation: float | None = None

    @property
    def event(self) -> AccountingEvent:
        return AccountingEvent(self.sampling_rate, self.noise_multiplier, self.steps)


class _Disjoint(_Body):  # or split
    account: _Name


class _Canaries(_Body):
    run: _Name
    commitment: str = Field(max_length=64)


class _Settled(_Body):  # released, aborted
    run: _Name
    round: _Round
    charge: _Round


class _Budget(_Body):
    epsilon: float | None
    delta: float = Field(gt=0, lt=1)


class _Metrics(_Body):  # a server.events.RoundMetrics
    model_config = ConfigDict(extra="forbid")

    round: int
    loss: float | None
    perplexity: float | None
    accuracy: float | None
    answered: list[str]
    declined: dict[str, str]
    private: bool | None = None
    epsilon: float | None = None
    failed: dict[str, str] | None = None
    noise_multiplier: float | None = None
    without: dict[str, str] = {}
    lost: str = ""
    update_norm: float = 0.0
    bytes_up: int | None = None
    bytes_down: int | None = None
    seconds: float = 0.0
    clipped: float | None = None
    at_sites: dict[str, list[float]] = {}


def _as(kind: type[_M], content: object, where: str) -> _M:
    """Read one body; raises ChainError."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ChainError(f"{where}: {key}: {first['msg']}") from None


class _Checks:
    """Collects findings."""

    def __init__(self) -> None:
        self._seen: dict[Code, dict[Status, list[str]]] = {
            code: {status: [] for status in get_args(Status)} for code in get_args(Code)
        }
        self._counts: Counter[tuple[Code, Status]] = Counter()

    def note(self, code: Code, status: Status | bool, evidence: str) -> None:
        """Add a piece of evidence; a bool says whether something holds."""
        known: Status = status if isinstance(status, str) else "holds" if status else "fails"
        self._counts[code, known] += 1
        evidence = escaped(evidence[: _LONGEST + 1])
        if len(self._seen[code][known]) < _SHOWN:
            self._seen[code][known].append(evidence if len(evidence) <= _LONGEST else f"{evidence[:_LONGEST]}…")

    def add(self, other: "_Checks") -> None:
        """Take over what was noted elsewhere."""
        self._counts += other._counts
        for code, seen in other._seen.items():
            for status, texts in seen.items():
                here = self._seen[code][status]
                here += texts[: _SHOWN - len(here)]

    def findings(self) -> tuple[Finding, ...]:
        """One for each code; a single contradiction makes it fail, a single gap leaves it unverified."""
        found = []
        for code, seen in self._seen.items():
            status: Status = "fails" if seen["fails"] else "unverified" if seen["unverified"] else "holds"
            if not seen[status]:
                status = "unverified"  # nothing was there to be looked at
            texts = seen[status]
            more = self._counts[code, status] - len(texts)
            found.append(Finding(code=code, status=status, evidence=tuple(texts), more=more))
        return tuple(found)


@dataclass
class _Record:
    """The server's record."""

    entries: list[Entry]
    plan: RunPlan
    body: _PlanBody
    rounds: list[_RoundBody] = field(default_factory=list)  # that count and were not superseded
    attempts: list[tuple[int, _RoundBody]] = field(default_factory=list)  # all there ever were, by entry
    begun: dict[int, _BegunBody] = field(default_factory=dict)  # by entry
    became: dict[int, int] = field(default_factory=dict)  # begun: the round's entry; none if the run was resumed
    end: _MarkBody | None = None
    closing: _ClosingBody | None = None
    scores: dict[int, _Scores] = field(default_factory=dict)  # of the adapter after a round
    adapter: dict[int, str] = field(default_factory=dict)  # digest after a round
    done: int = 0  # the last round
    open: int | None = None  # the `begun` that has no round yet: whoever was asked may have answered

    @property
    def last(self) -> End:
        """What the sites hand in their ledgers for."""
        return End(self.plan.run, self.entries[-1].number, self.entries[-1].digest)

    @property
    def sites(self) -> list[str]:
        """Every name that appears as a site's, sorted."""
        names = set(self.body.sites).union(*(begun.sites for begun in self.begun.values()))
        for _, body in self.attempts:
            names |= set(body.answered) | set(body.declined)
            names |= {name for name in body.failed if not name.startswith("node ")}
        return sorted(names)

    @property
    def layout(self) -> Layout:
        """How metrics lie in a score."""
        return Layout(metric_names(len(self.plan.model.labels)), self.body.most_loss)


@dataclass
class _Charge:
    number: int  # of the entry
    at: float
    body: _Reserved
    account: str  # the site's, if its own was not declared before
    both: bool  # whether all of it counts on both sides
    lost: bool  # with an earlier ledger, as its owner states
    released: bool = False
    aborted: int | None = None  # the entry that gave it back

    def events(self, side: Side) -> list[AccountingEvent]:
        """Return what it costs the units of one side."""
        return on_side(side, self.body.event, self.body.evaluation, self.both)


@dataclass
class _Ledger:
    """A site's ledger, from its export."""

    name: str
    entries: list[Entry]
    export: Entry | None = None  # the site's word that there are no more
    charges: list[_Charge] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)  # entries: what was before is lost
    disjoint: dict[str, int] = field(
        default_factory=dict
    )  # accounts beside the site's, by the entry that declares them
    budget: _Budget | None = None
    splits: SplitsSeen = field(default_factory=SplitsSeen)
    commitments: dict[str, tuple[int, str]] = field(default_factory=dict)  # by run: the entry, and what it says

    @property
    def signer(self) -> PublicIdentity:
        """Who signed last, and so vouches for all entries."""
        return (self.export or self.entries[-1]).signer

    def of(self, run: str) -> list[_Charge]:
        return [charge for charge in self.charges if charge.body.run == run]

    @property
    def accounts(self) -> list[str]:
        """Every account: the site's own, and those that its owner declared."""
        return [SITE, *self.disjoint]

    def on(self, account: str) -> list[_Charge]:
        """Return what was charged to an account; what is lost was charged to all, as nobody knows to which."""
        return [charge for charge in self.charges if charge.account == account or charge.lost]

    def live(self, account: str) -> list[_Charge]:
        """Return what counts against an account's budget."""
        return [charge for charge in self.on(account) if charge.aborted is None]

    def restarted_since(self, charge: _Charge) -> bool:
        """Whether the ledger was restarted after a charge: what became of it since may be lost."""
        return any(number > charge.number for number in self.restarts)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode().splitlines()
    except (OSError, ValueError) as error:
        raise ChainError(f"{path.name} cannot be read ({error})") from None


def _head(name: str, entries: Sequence[Entry]) -> str:
    last = entries[-1]
    return f"{name} #0–#{last.number}, SHA-256 {last.digest[:16]}…, {last.signer.fingerprint}"


def _read_record(path: Path, checks: _Checks) -> _Record:
    """Read the record; raises ChainError if its chain or its plan cannot be used at all."""
    try:
        entries = read_chain(_lines(path), RECORD)
    except CryptoError as error:
        raise ChainError(f"{RECORD}: {error}") from None
    if not entries or entries[0].kind != "plan":
        raise ChainError(f"{RECORD}, entry 0: expected the plan")
    body = _as(_PlanBody, entries[0].body, f"{RECORD}, entry 0")
    try:
        plan = RunPlan.model_validate_json(json.dumps(body.plan))
    except ValidationError as error:
        raise ChainError(f"{RECORD}, entry 0: no plan ({error.errors()[0]['msg']})") from None
    checks.note("record_chain", True, _head(RECORD, entries))
    checks.note("plan", plan.digest == body.plan_digest, f"{RECORD} #0: {body.plan_digest[:16]}…")
    record = _Record(entries, plan, body)
    record.adapter[0] = body.adapter
    for before, entry in pairwise(entries):
        where = f"{RECORD} #{entry.number}"
        if entry.at < before.at:
            checks.note("rounds", False, f"{where}: {_time(entry.at)} < {_time(before.at)}")
        if entry.kind in ("begun", "end") and record.open is not None:
            checks.note("rounds", False, f"{where}: {entry.kind}, and #{record.open}, begun, has no round")
        if entry.kind == "round":
            _add_round(record, entry, where, checks)
        elif entry.kind in ("resumed", "end"):
            _add_mark(record, entry, where, checks)
        elif entry.kind == "closing":
            _add_closing(record, entry, where, checks)
        elif entry.kind == "begun":
            record.begun[entry.number] = _as(_BegunBody, entry.body, where)
            record.open = entry.number
        elif entry.kind != "key":
            checks.note("rounds", False, f"{where}: {entry.kind}?")
    checks.note("rounds", "holds" if record.end else "unverified", f"{RECORD}: {'end' if record.end else 'no end'}")
    return record


def _add_round(record: _Record, entry: Entry, where: str, checks: _Checks) -> None:
    step, plan, done = _as(_RoundBody, entry.body, where), record.plan, record.done
    record.attempts.append((entry.number, step))
    record.end = None
    if record.open is not None:
        asked = record.begun[record.open].round
        checks.note("rounds", asked == step.round, f"{where}: {step.round}, #{record.open} began {asked}")
        record.became[record.open] = entry.number
        record.open = None
    after = step.adapter_after if step.counts else step.adapter_before
    right = step.round == done + 1 and step.adapter_before == record.adapter[done] and step.adapter_after == after
    checks.note("rounds", right, f"{where}: {done} → {step.round}, {step.adapter_before[:16]}…")
    if step.counts and not plan.enough(step.answered, plan.quorum):  # as the sites were promised
        checks.note("rounds", False, f"{where}: {len(step.answered)} < {plan.quorum}")
    if step.counts and plan.distributed is not None:
        _check_noise(step, plan, plan.distributed, where, checks)
    _add_scores(record, step, step.round, step.scores, where, checks)
    if step.counts or step.lost:
        record.rounds.append(step)
        record.done = step.round
        record.adapter[step.round] = step.adapter_after


def _add_closing(record: _Record, entry: Entry, where: str, checks: _Checks) -> None:
    """Take in the exchange after the last round: it trains nothing."""
    closing = _as(_ClosingBody, entry.body, where)
    number = record.plan.training.rounds + 1
    if record.open is not None:
        checks.note("rounds", record.begun[record.open].round == number, f"{where}: #{record.open}, {number}")
        record.became[record.open] = entry.number
        record.open = None
    once = record.closing is None or record.closing.adapter != closing.adapter  # a run that went back closes again
    right = once and record.plan.closes and closing.adapter == record.adapter[record.done]
    checks.note("rounds", right, f"{where}: {record.done}, {closing.adapter[:16]}…")
    step = _RoundBody(
        round=number, counts=False, answered=closing.answered, declined=closing.declined, failed=closing.failed,
        adapter_before=closing.adapter, adapter_after=closing.adapter, lost=closing.lost, trimmed=closing.trimmed,
        sums=closing.sums,
    )  # fmt: skip
    record.attempts.append((entry.number, step))
    record.closing = closing
    _add_scores(record, step, record.done + 1, closing.scores, where, checks)


def _add_scores(
    record: _Record, step: _RoundBody, before: int, scores: _Scores | None, where: str, checks: _Checks
) -> None:
    """Take in what a round, from 1, or the closing exchange says of the adapter that it starts from."""
    plan, layout, shared = record.plan, record.layout, record.plan.distributed_scores
    if scores is None:
        closed = step.round > plan.training.rounds and not step.lost
        if (step.counts or closed) and plan.score_noise(step.round) is not None:
            checks.note("metrics", False, f"{where}: scores?")  # was it not good enough to be told?
        return
    if shared is None:
        noise, factor = plan.score_mechanism.noise_std * math.sqrt(len(step.answered)), 1.0
    else:
        sums, known = _sums(step, plan)
        factor = shared.clip_before_rounding(layout.dimension)
        noise = math.hypot(*(shared.noise_std(*sum_) for sum_ in sums)) if known else math.nan
    right = plan.score_noise(step.round) is not None and len(scores.total) == layout.dimension
    right = right and abs(scores.noise_std - noise) <= _SAME * noise and abs(scores.factor - factor) <= _SAME
    checks.note("metrics", right, f"{where}: σ {scores.noise_std:.4g} = {noise:.4g}")
    if right:
        record.scores[before - 1] = scores


def _add_mark(record: _Record, entry: Entry, where: str, checks: _Checks) -> None:
    mark, done = _as(_MarkBody, entry.body, where), record.done
    back = max(0, mark.round)
    known = back in record.adapter and mark.adapter == record.adapter[back]
    right = known and (entry.kind == "resumed" or back == done) and back <= done
    checks.note("rounds", right, f"{where}: {entry.kind}, {back}, {mark.adapter[:16]}…")
    record.end = mark if entry.kind == "end" else None
    record.open = None
    if right:
        record.done = back
        record.rounds = [step for step in record.rounds if step.round <= back]
        if record.closing is None or record.closing.adapter != mark.adapter:  # its exchange is superseded
            record.scores = {round_: scores for round_, scores in record.scores.items() if round_ < back}
    if entry.kind == "end":
        _check_kept(record, mark, where, checks)


def _check_kept(record: _Record, mark: _MarkBody, where: str, checks: _Checks) -> None:
    """Check that the adapter that a run ended with is one of its rounds', and the best of those that have a score."""
    plan, kept = record.plan, record.done if mark.kept is None else mark.kept
    best = plan.training.keep == "best"
    if mark.kept is not None:
        right = best and 0 <= kept <= record.done and mark.kept_adapter == record.adapter.get(kept)
        checks.note("rounds", right, f"{where}: {kept}, {mark.kept_adapter[:16]}…")
    if best:  # a server that was started again may not know the last score any more
        tables = {number: _read_scores(record, scores) for number, scores in record.scores.items()}
        worse = [number for number, each in tables.items() if record.layout.better(each, tables.get(kept, {}))]
        checks.note("metrics", "unverified" if worse else "holds", f"{where}: {kept} {'<' if worse else '≥'} {worse}")
    if plan.closes and not mark.stopped and record.closing is None:
        checks.note("metrics", "unverified", f"{where}: closing?")


def _answered_of(step: _RoundBody, plan: RunPlan) -> dict[str, int]:
    """Return how many sites of each group answered, by its number in the plan, from 1, as text."""
    return {str(k): len(set(group) & set(step.answered)) for k, group in enumerate(plan.groups, start=1)}


def _sums(step: _RoundBody, plan: RunPlan) -> tuple[list[tuple[int, int]], bool]:
    """Return, of every sum that was used, how many sites are in it and from how many excess noise was removed.

    Also whether all of that can be: a sum opens with as many reveals as the quorum, and each that counts has its seeds.
    """
    if plan.groups:
        groups = _answered_of(step, plan)
        sums = [(groups[k], trimmed) for k, trimmed in step.sums.items() if k in groups]
    else:
        sums = [(len(step.answered), -1 if step.trimmed is None else step.trimmed)]
    return sums, bool(sums) and all(plan.quorum <= trimmed <= many for many, trimmed in sums)


def _check_noise(
    step: _RoundBody, plan: RunPlan, distributed: DistributedMechanism, where: str, checks: _Checks
) -> None:
    """Compare the noise that a round of noise in shares is said to have had with what its answers make of it."""
    if groups := _answered_of(step, plan):
        # each was unmasked, refused or not unmasked, and those that were used outvote the others
        listed = [*step.sums, *step.refused, *step.closed]
        whole = sorted(listed) == sorted(groups) and plan.outvotes(len(step.sums), len(step.refused))
        whole = whole and all(groups[k] >= plan.quorum for k in (*step.sums, *step.refused))
        checks.note("rounds", whole, f"{where}: {len(step.sums)} + {len(step.refused)} / {len(groups)}")
    sums, known = _sums(step, plan)
    fits = [(many, trimmed if known else many) for many, trimmed in sums if many >= plan.quorum]
    noise = min((distributed.noise_multiplier(*sum_, plan.privacy.colluding_sites) for sum_ in fits), default=math.inf)
    stated = step.noise_multiplier if known else None
    right = stated is not None and abs(stated - noise) < _SAME * noise
    checks.note("rounds", right, f"{where}: {_text(step.noise_multiplier)} = {noise:.4g}")


def _read_ledger(path: Path, name: str, listed: str | None, checks: _Checks) -> _Ledger | None:
    """Read a site's export; None, and a finding that fails, if it cannot be used.

    `listed` is the identity that the server's roster names; in a simulation there is no roster.
    """
    file = f"{LEDGERS}/{path.name}"
    try:
        signers = None if listed is None else [PublicIdentity.from_text(listed)]
        if path.stat().st_size > _MOST_BYTES:
            raise ChainError(f"{file}: more than {_MOST_BYTES} bytes")
        entries = read_chain(_lines(path), file, signers)
        ledger = _Ledger(name, entries)
        if entries and entries[-1].kind == EXPORT:  # no part of the ledger itself
            ledger.export = entries.pop()
        if not entries:
            raise ChainError(f"{file}: empty")
        open_: dict[tuple[str, int, int], _Charge] = {}
        for entry in ledger.entries:
            _apply(ledger, open_, entry, f"{file}, entry {entry.number}")
        kinds = {(charge.body.sampling_rate, charge.body.noise_multiplier) for charge in ledger.charges}
        kinds |= {(1.0, charge.body.evaluation) for charge in ledger.charges if charge.body.evaluation is not None}
        if len(kinds) > _MOST_KINDS:
            raise ChainError(f"{file}: charges of {len(kinds)} mechanisms, at most {_MOST_KINDS} are composed")
    except (ChainError, CryptoError) as error:
        checks.note("ledger_chain", False, str(error))
        return None
    checks.note("ledger_chain", True, _head(file, ledger.entries))
    return ledger


def _apply(ledger: _Ledger, charges: dict[tuple[str, int, int], _Charge], entry: Entry, where: str) -> None:
    """Add an entry to what the ledger holds; raises ChainError if it contradicts an earlier one."""
    if entry.kind in ("reserved", "lost"):
        body = _as(_Reserved, entry.body, where)
        try:
            body.event.check()
            AccountingEvent(1.0, 1.0 if body.evaluation is None else body.evaluation, 1).check()
        except PrivacyError as error:
            raise ChainError(f"{where}: {error}") from None
        key = (body.run, body.round, body.charge)
        if key in charges:
            raise ChainError(f"{where}: round {body.round} of run {body.run} is charged twice")
        account = body.account if body.account in ledger.disjoint else SITE
        both = not ledger.splits.sided(account)
        charges[key] = _Charge(entry.number, entry.at, body, account, both, entry.kind == "lost")
        ledger.charges.append(charges[key])
    elif entry.kind in ("released", "aborted"):
        settled = _as(_Settled, entry.body, where)
        charge = charges.get((settled.run, settled.round, settled.charge))
        if charge is None or charge.released or charge.aborted is not None:
            raise ChainError(f"{where}: {entry.kind}, but round {settled.round} of run {settled.run} is not reserved")
        if entry.kind == "released":
            charge.released = True
        elif not ledger.restarted_since(charge):  # else it may have been released, and stays spent
            charge.aborted = entry.number
    else:
        _note_entry(ledger, entry, where)


def _note_entry(ledger: _Ledger, entry: Entry, where: str) -> None:
    """Add an entry that charges nothing."""
    if entry.kind == "budget":
        ledger.budget = _as(_Budget, entry.body, where)
    elif entry.kind == "disjoint":
        ledger.disjoint.setdefault(_as(_Disjoint, entry.body, where).account, entry.number)
        if len(ledger.accounts) > MOST_ACCOUNTS:
            raise ChainError(f"{where}: more than {MOST_ACCOUNTS} accounts, and every one is composed")
    elif entry.kind == "split":
        ledger.splits.see(entry.kind, _as(_Disjoint, entry.body, where).model_dump())
    elif entry.kind == "restarted":
        ledger.splits.see(entry.kind, {})
        ledger.restarts.append(entry.number)
    elif entry.kind == "canaries":
        canaries = _as(_Canaries, entry.body, where)
        ledger.commitments.setdefault(canaries.run, (entry.number, canaries.commitment))
    elif entry.kind not in ("opened", "key", "clock"):
        raise ChainError(f"{where}: {entry.kind}?")


# ---- the audit -------------------------------------------------------------------------------------------------------


def names_and_end(folder: Path) -> tuple[list[str], End]:
    """Return the names of a run's sites, and what they hand in their ledgers for.

    Raises ChainError if the run's record cannot be read.
    """
    record = _read_record(folder / RECORD, _Checks())
    return record.sites, record.last


@dataclass(frozen=True)
class Outcome:
    """What a run came to, as the server's record states it."""

    plan: RunPlan
    spec: str  # digest of the adapter's shape, and of the base
    adapter: str  # digest of the adapter that it ended with
    signers: tuple[PublicIdentity, ...]  # of the record; the last one vouches for all of it
    head: str  # digest of the record's last entry
    stopped: str  # why it ended early, or ""


def outcome(folder: Path) -> Outcome:
    """Return what the run in a folder came to. Raises ChainError if its record cannot be read, or has no end."""
    record = _read_record(folder / RECORD, _Checks())
    last, end = record.entries[-1], record.end
    if end is None or last.kind != "end":
        raise ChainError(f"{RECORD} has no end: the run goes on, or was interrupted. Let it end, or resume it")
    return Outcome(
        record.plan, record.body.spec_digest, end.kept_adapter if end.kept is not None else end.adapter,
        tuple(dict.fromkeys(entry.signer for entry in record.entries)), last.digest, end.stopped,
    )  # fmt: skip


def assess(
    folder: Path, trust: Trust | None = None, made: str = "", signer: str = "",
    cross_checks: Mapping[str, CrossCheck] = MappingProxyType({}), absent: Collection[str] = (),
) -> Audit:  # fmt: skip
    """Check the evidence in `folder` and return what was found.

    `made` and `signer` are put into the audit as they are; `cross_checks` compute epsilon by other methods; who is
    `absent` and has signed nothing leaves no gap. Raises ChainError if there is no readable record: then there is
    nothing to report on.
    """
    checks = _Checks()
    record = _read_record(folder / RECORD, checks)
    plan = record.plan
    _check_plan(folder / PLAN, record, checks)
    ledgers: dict[str, _Ledger | None] = {}
    statements: dict[str, _Signed] = {}
    for evidence in _examined(folder, record, absent):
        checks.add(evidence.checks)
        statements[evidence.name] = evidence.statements
        if evidence.exported:
            ledgers[evidence.name] = evidence.ledger
    utility = _check_metrics(folder / METRICS, record, statements, checks)
    _check_keys(record, ledgers, statements, trust, checks)
    _check_rosters(record, checks)
    _check_strangers(folder / LEDGERS, record, checks)
    sites = tuple(_site(name, record, ledgers, statements[name], checks) for name in record.sites)
    accountants, risk_events = _accountants(record, ledgers, sites, cross_checks, checks)
    privacy = plan.privacy
    checks.note("protected", privacy.protects, f"{PLAN}: mode={privacy.mode}, insecure_seed={privacy.insecure_seed}")
    checks.note("site_software", "unverified", f"{PLAN}: sampling_rate={privacy.sampling_rate:g}")
    checks.note("unit", "unverified", f"{PLAN}: unit={privacy.unit}")
    alone = privacy.mode != "distributed"
    checks.note("peers", "holds" if alone else "unverified", f"{PLAN}: mode={privacy.mode}, sites={plan.sites}")
    checks.note("one_site_a_person", "unverified", f"{RECORD}: {len(sites)}")
    attack = _attacked(record, ledgers, statements, checks)
    findings = checks.findings()
    end = record.end
    return Audit(
        made=made,
        program=fedllm.__version__,
        signer=signer,
        verdict=_verdict(findings),
        run=Run(
            name=plan.run,
            plan_digest=plan.digest,
            head_office=record.entries[-1].signer.fingerprint,
            began=_time(record.entries[0].at),
            ended=_time(record.entries[-1].at) if end else None,
            stopped=end.stopped if end else "",
            rounds=sum(step.counts for step in record.rounds),
            rounds_planned=plan.training.rounds,
            entries=len(record.entries),
            head=record.entries[-1].digest,
            versions=record.body.versions,
        ),
        claim=Claim(
            mode=privacy.mode,
            unit=privacy.unit,
            records_per_person=privacy.records_per_person,
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            sampling_rate=privacy.sampling_rate,
            clipping=privacy.clipping,
            clip_norm=privacy.clip_norm,
            noise_multiplier=plan.mechanism.noise_multiplier,
            sites=plan.sites,
            quorum=plan.quorum,
            colluding_sites=privacy.colluding_sites,
            groups=len(plan.groups),
            poisoned_sites=plan.poisoned_sites,
            local_steps=plan.training.local_steps,
            units_per_site=privacy.units_per_site or 0,
            seeded=privacy.insecure_seed is not None,
            base_model=plan.model.source
            + (f" @ {plan.model.revision}" if plan.model.revision else "")
            + (f" (model.quantize={plan.model.quantize})" if plan.model.quantize != "none" else ""),
            task=plan.model.task,
            scores=plan.scores,
            score_epsilon=plan.score_epsilon if plan.scores else 0.0,
            score_noise=plan.score_mechanism.noise_multiplier,
            canaries=plan.canaries,
            adapter_method=plan.adapter.title,
            adapter_rank=plan.adapter.rank if plan.adapter.has_matrices else 0,
            wire=plan.training.wire,
        ),
        sites=sites,
        findings=findings,
        accountants=accountants,
        risk=risk_of(risk_events, accountants.pld if privacy.protects else None, accountants.grid),
        timeline=tuple(
            point
            for site in sites
            if (ledger := ledgers.get(site.name)) is not None
            for point in _points(ledger, site, plan)
        ),
        utility=utility,
        scores=tuple(
            SiteScore(round=round_, metrics=_read_scores(record, scores))
            for round_, scores in sorted(record.scores.items())
            if round_ <= record.done
        ),
        kept=end.kept if end else None,
        attack=attack,
    )


def _verdict(findings: Iterable[Finding]) -> Verdict:
    status = {finding.code: finding.status for finding in findings}
    if any(status[code] == "fails" for code in INTEGRITY) or status["keys"] == "fails":
        return "unverifiable"
    if "fails" in (status["protected"], status["plan_target"], status["budget"], status["empirical"]):
        return "exceeded"
    needed: tuple[Code, ...] = ("ledger_chain", "ledger_complete", "charged_before_release", "epsilon", "statements")
    return "unverifiable" if any(status[code] != "holds" for code in needed) else "within"


def _time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return "?"


def _finite(value: float) -> float | None:
    return round(value, 9) if value < float("inf") else None


def _check_plan(path: Path, record: _Record, checks: _Checks) -> None:
    try:
        stated = read_json(path.read_bytes())
        same = canonical_json(stated) == canonical_json(record.body.plan)
    except (OSError, ValueError, RecursionError):
        same = False
    checks.note("plan", same, f"{path.name} = {RECORD} #0")


def _check_metrics(
    path: Path, record: _Record, statements: Mapping[str, "_Signed"], checks: _Checks
) -> tuple[Utility, ...]:
    """Compare whatever the log or a site has signed for; what the server measured stays its word."""
    try:
        read = [_as(_Metrics, read_json(line), f"{METRICS} {n}") for n, line in enumerate(_lines(path), start=1)]
    except (ChainError, ValueError, RecursionError) as error:
        checks.note("metrics", "unverified" if not path.exists() else "fails", str(error))
        return ()
    rounds: dict[int, _RoundBody] = {step.round: step for step in record.rounds}
    least = dict.fromkeys(
        rounds, 0.0
    )  # epsilon of a round: the last statements of it are those of the round that stands
    for name, signed in statements.items():
        last = {statement.round: statement.epsilon for statement, _ in signed}
        for round_, epsilon in last.items():
            if round_ in rounds and name in rounds[round_].answered:
                least[round_] = max(least[round_], _number(epsilon))
    start = _RoundBody(
        round=0, counts=False, answered={}, declined={}, failed={}, adapter_before="", adapter_after="", bytes_up=0,
        bytes_down=0,
    )  # fmt: skip
    for number, line in enumerate(read):
        step = rounds.get(number, start if number == 0 else None)
        right = line.round == number and step is not None and _measured(line, step, record.plan)
        right = right and _number(line.epsilon) >= least.get(number, 0.0)
        said = _read_scores(record, record.scores[number]) if number in record.scores else {}
        right = right and _same_scores(line.at_sites, said)
        checks.note("metrics", right, f"{METRICS}, {number}")
    checks.note("metrics", len(read) == len(rounds) + 1, f"{METRICS}: 0–{len(read) - 1}; {RECORD}: {len(rounds)}")
    return tuple(
        Utility(round=line.round, loss=line.loss, perplexity=line.perplexity, accuracy=line.accuracy) for line in read
    )


def _read_scores(record: _Record, scores: _Scores) -> dict[str, tuple[float, float, float]]:
    found = record.layout.read(np.array(scores.total), scores.noise_std, scores.factor).table
    return {name: (value, low, high) for name, (value, low, high) in found.items()}


def _same_scores(stated: Mapping[str, Sequence[float]], known: Mapping[str, Sequence[float]]) -> bool:
    return stated.keys() == known.keys() and all(
        abs(a - b) <= _SAME * max(1.0, abs(b)) for name in known for a, b in zip(stated[name], known[name], strict=True)
    )


def _measured(line: _Metrics, step: _RoundBody, plan: RunPlan) -> bool:
    """Whether a line of metrics says what the log says of its round; lines of earlier versions say less."""
    return (
        line.answered == sorted(step.answered)
        and line.declined == step.declined
        and line.failed in (None, step.failed)
        and line.lost == step.lost
        and line.without == ({} if step.lost else step.refused | step.closed)
        and line.noise_multiplier == (None if step.lost else step.noise_multiplier)
        and line.private in (None, plan.privacy.protects)
        and all(a is None or b is None or a == b for a, b in ((line.bytes_up, step.bytes_up),
                                                              (line.bytes_down, step.bytes_down)))
    )  # fmt: skip


_Signed = list[tuple[Statement, PublicIdentity]]


@dataclass(frozen=True)
class _SiteEvidence:
    """All that is needed to examine one site."""

    name: str
    path: Path  # of its ledger's export
    listed: str | None  # the identity that the server's roster names; in a simulation there is no roster
    plan: RunPlan
    absent: bool  # as the reader knows
    last: End  # of the record
    answers: tuple[tuple[int, int, str, str], ...]  # entry of the record, round, adapter before it, statement
    # what the site may have signed for: entries of the record that ask it, each with round, digest, roster's digest
    begun: Mapping[int, tuple[int, str, str]]


@dataclass(frozen=True)
class _SiteChecks:
    """What was found of one site."""

    name: str
    exported: bool
    ledger: _Ledger | None
    statements: _Signed
    checks: _Checks


def _examined(folder: Path, record: _Record, absent: Collection[str]) -> list[_SiteChecks]:
    """Examine every site; on all cores if there are many signatures to check."""
    answers: dict[str, list[tuple[int, int, str, str]]] = {name: [] for name in record.sites}
    for number, step in record.attempts:
        for name, line in step.answered.items():
            answers[name].append((number, step.round, step.adapter_before, line))
    begun = {n: (each.round, record.entries[n].digest, roster_digest(each.sites)) for n, each in record.begun.items()}
    papers = []
    asks = {number: frozenset(each.sites) for number, each in record.begun.items()}
    for name, own in answers.items():
        asked = {number: said for number, said in begun.items() if name in asks[number]}
        path, listed = folder / LEDGERS / f"{file_name(name)}.jsonl", record.body.sites.get(name)
        papers.append(_SiteEvidence(name, path, listed, record.plan, name in absent, record.last, tuple(own), asked))
    workers = min(len(os.sched_getaffinity(0)), len(papers))
    if workers < 2 or sum(len(own) for own in answers.values()) < _MANY:
        return [_examine(each) for each in papers]
    # a fork would copy locks that threads hold
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool, without_main():
        return list(pool.map(_examine, papers))


def _examine(papers: _SiteEvidence) -> _SiteChecks:
    """Check everything that a site has signed."""
    checks = _Checks()
    exported = papers.path.exists()
    ledger = None
    if exported:
        ledger = _read_ledger(papers.path, papers.name, papers.listed, checks)
    elif papers.answers or not papers.absent:
        checks.note("ledger_chain", "unverified", f"{LEDGERS}/{papers.path.name}: missing; export --end {papers.last}")
    statements = _check_statements(papers, checks)
    if ledger is not None:
        _check_site(ledger, papers, statements, checks)
        try:
            _check_epsilons(ledger, papers.plan, statements, checks)
        except PrivacyError as error:
            checks.note("epsilon", False, f"{LEDGERS}/{papers.path.name}: {error}")
            ledger = None
    return _SiteChecks(papers.name, exported, ledger, statements, checks)


def _check_statements(papers: _SiteEvidence, checks: _Checks) -> _Signed:
    """Open a site's statements; those that are not about their round, or not signed, are left out and noted."""
    found: _Signed = []
    plan, digest = papers.plan, papers.plan.digest
    for number, round_, adapter, line in papers.answers:
        where = f"{RECORD} #{number}, {papers.name}"
        try:
            statement, signer = open_statement(line)
        except CryptoError as error:
            checks.note("statements", False, f"{where}: {error}")
            continue
        about = (statement.site, statement.run, statement.plan, statement.round, statement.delta, statement.adapter)
        right = about == (papers.name, plan.run, digest, round_, plan.privacy.delta, adapter)
        checks.note("statements", right, f"{where}: {signer.fingerprint}" if right else f"{where}: {about}")
        if right:
            found.append((statement, signer))
        said, at = (statement.round, statement.record_digest, statement.roster), statement.record_number
        agreed = at < number and papers.begun.get(at) == said
        # a site of an earlier version signs neither
        status: Status | bool = agreed if statement.roster or statement.record_digest else "unverified"
        checks.note("countersigned", status, f"{where}: {RECORD} #{at} {statement.record_digest[:16]}…")
    return found


def _check_site(ledger: _Ledger, papers: _SiteEvidence, statements: _Signed, checks: _Checks) -> None:
    """Compare a site's ledger with what it signed: nothing missing, paid before release, all of it in the record."""
    plan = papers.plan
    signers = {entry.signer for entry in ledger.entries}
    for number in ledger.restarts:  # what was lost is its owner's word
        checks.note("ledger_complete", "unverified", f"{ledger.name}, #{number}: restarted")
    # nobody but the site can say that its ledger has no more entries: an export without that, or an older one, may be
    # cut, if the server holds no statement on what it lacks
    whole = ledger.export is not None and ledger.export.body == asdict(papers.last)
    checks.note(
        "ledger_complete", "holds" if whole else "unverified",
        f"{ledger.name}: #{len(ledger.entries) - 1}, {'export' if whole else 'no export'} --end {papers.last}",
    )  # fmt: skip
    charges = {charge.body.round: charge for charge in ledger.of(plan.run)}
    for statement, signer in statements:
        where = f"{ledger.name}, {statement.round}"
        number = statement.ledger_number
        there = number < len(ledger.entries) and ledger.entries[number].digest == statement.ledger_digest
        checks.note("ledger_complete", there, f"{where}: #{number} {statement.ledger_digest[:16]}…")
        if signer not in signers:
            checks.note("statements", False, f"{where}: {signer.fingerprint} never signed the ledger")
        charge = charges.get(statement.round)
        paid = charge is not None and charge.number <= number and charge.aborted is None and _as_planned(charge, plan)
        checks.note("charged_before_release", paid, f"{where}: #{charge.number if charge else '-'} ≤ #{number}")
        if charge is not None:  # what left the site was noted before it left: its absence is a cut tail
            gone = not charge.released and ledger.restarted_since(charge)
            checks.note("ledger_complete", "unverified" if gone else charge.released, f"{where}: released")
    signed = {statement.round for statement, _ in statements}
    asked = {round_ for round_, _, _ in papers.begun.values()}
    for charge in ledger.charges:
        text = f"{ledger.name}, #{charge.number}"
        if charge.body.account not in (SITE, charge.account):  # every data set had an account in earlier versions
            checks.note("charged_before_release", False, f"{text}: account {charge.body.account}, not declared before")
        if charge.body.run == plan.run and not charge.lost and not _as_planned(charge, plan):  # it saw another plan
            expected = (plan.event(max(1, charge.body.round)), plan.score_noise(max(1, charge.body.round)))
            checks.note(
                "charged_before_release", False,
                f"{text}: {charge.body.event}, {charge.body.evaluation} ≠ {expected[0]}, {expected[1]}",
            )  # fmt: skip
    for charge in ledger.of(plan.run):
        if charge.released:  # an answer may be lost on its way; who was never asked has none to lose
            known = charge.body.round
            status: Status = "holds" if known in signed else "unverified" if known in asked else "fails"
            checks.note("answers_recorded", status, f"{ledger.name}, {known}: #{charge.number}, released")


def _as_planned(charge: _Charge, plan: RunPlan) -> bool:
    """Whether a charge is what its exchange of a plan costs: for those who train, and for those who evaluate."""
    number = charge.body.round
    return (
        1 <= number <= plan.exchanges
        and charge.body.event == plan.event(number)
        and charge.body.evaluation == plan.score_noise(number)
    )


def _check_epsilons(ledger: _Ledger, plan: RunPlan, statements: _Signed, checks: _Checks) -> None:
    """Compute what each statement says was spent from the charges that the ledger held at that time.

    Raises PrivacyError if the charges are such that nobody can compute with them.
    """
    began = time.process_time()
    for account in ledger.accounts:
        costlier(spent(_events(ledger.on(account), side), plan.privacy.delta) for side in SIDES)
        if time.process_time() - began > _MOST_SECONDS_ONCE:
            raise PrivacyError(f"its charges take more than {_MOST_SECONDS_ONCE:g} seconds of CPU to compose once")
    paid = {charge.body.round: charge.account for charge in ledger.of(plan.run)}
    for account in ledger.accounts:
        stated = [statement for statement, _ in statements if paid.get(statement.round, SITE) == account]
        _check_account(ledger, account, plan, stated, began, checks)


def _events(charges: Iterable[_Charge], side: Side) -> list[AccountingEvent]:
    """Return what charges cost the units of one side, equal events as one."""
    steps: Counter[tuple[float, float]] = Counter()
    for charge in charges:
        for event in charge.events(side):
            steps[event.sampling_rate, event.noise_multiplier] += event.steps
    return [AccountingEvent(q, s, n) for (q, s), n in sorted(steps.items())]


def _check_account(
    ledger: _Ledger, account: str, plan: RunPlan, statements: Sequence[Statement], began: float, checks: _Checks
) -> None:
    charges = ledger.on(account)
    changes = [(charge.number, charge, 1) for charge in charges]
    changes += [(charge.aborted, charge, -1) for charge in charges if charge.aborted is not None]
    changes.sort(key=lambda change: change[0])
    steps: dict[Side, Counter[tuple[float, float]]] = {side: Counter() for side in SIDES}
    position = 0
    for statement in sorted(statements, key=lambda each: each.ledger_number):
        if time.process_time() - began > _MOST_SECONDS:
            raise PrivacyError(f"its charges take more than {_MOST_SECONDS:g} seconds of CPU to compose")
        while position < len(changes) and changes[position][0] <= statement.ledger_number:
            _, charge, sign = changes[position]
            for side in SIDES:
                for event in charge.events(side):
                    steps[side][event.sampling_rate, event.noise_multiplier] += sign * event.steps
            position += 1
        sides = [[AccountingEvent(q, s, n) for (q, s), n in own.items()] for own in steps.values()]
        grid = OLD_GRID if statement.grid is None else None
        known = costlier(_spent(events, plan.privacy.delta, grid) for events in sides)
        right = _states(statement, known) and statement.grid in (None, known.grid)
        where = f"{ledger.name}, {statement.round}: ε {_text(statement.epsilon)} (RDP {_text(statement.epsilon_rdp)})"
        computed = f"ε {known.epsilon:.4g} (RDP {known.epsilon_rdp:.4g})"
        checks.note("epsilon", right, f"{where} {'=' if right else '≠'} {computed}")


def _states(statement: Statement, known: PrivacySpent) -> bool:
    pairs = ((statement.epsilon, known.epsilon, _TOLERANCE_PLD), (statement.epsilon_rdp, known.epsilon_rdp, 0.0))
    return all(_near(stated, computed, absolute) for stated, computed, absolute in pairs)


def _near(stated: float | None, computed: float, absolute: float) -> bool:
    if stated is None or computed == float("inf"):
        return stated is None and computed == float("inf")
    return abs(stated - computed) <= (absolute or _TOLERANCE_RDP * max(computed, 1e-9))


def _text(value: float | None) -> str:
    return "∞" if value is None else f"{value:.4g}"


def _spent(events: Sequence[AccountingEvent], delta: float, grid: float | None = None) -> PrivacySpent:
    """Return what `spent` does, and no bound at all if it has no answer: one site's ledger stops no report."""
    try:
        return spent(events, delta, grid)
    except PrivacyError:
        return PrivacySpent(math.inf, math.inf, delta)


def _check_keys(
    record: _Record,
    ledgers: Mapping[str, _Ledger | None],
    statements: Mapping[str, _Signed],
    trust: Trust | None,
    checks: _Checks,
) -> None:
    """Compare who signed with the roster in the record, with one another, and with the keys that the reader holds."""
    holders = [(HEAD_OFFICE, record.entries[-1].signer)]
    for name in record.sites:
        if is_head_office(name):  # its key would pass for the server's
            checks.note("keys", False, f"{name}: the server's name, and a site's")
            continue
        ledger = ledgers.get(name)
        listed = record.body.sites.get(name)
        for statement, signer in statements[name]:
            if not ledger and listed is not None and signer.to_text() != listed:
                checks.note("statements", False, f"{name}, {statement.round}: {signer.fingerprint}, not of the roster")
        if ledger:  # its last signature covers all entries before
            holders.append((name, ledger.signer))
        elif statements[name]:
            holders.append((name, statements[name][-1][1]))
    first: dict[PublicIdentity, str] = {}
    for name, identity in holders:
        if first.setdefault(identity, name) != name:  # one party would count as two
            checks.note("keys", False, f"{name} = {first[identity]}: {identity.fingerprint}")
        elif trust is None:
            checks.note("keys", "unverified", f"{name}: {identity.fingerprint}")
        else:
            checks.note("keys", trust.knows(name, identity), f"{name}: {identity.fingerprint}")


def _check_rosters(record: _Record, checks: _Checks) -> None:
    """Check that the record says of everybody who was asked in a round what came of it, and of nobody else."""
    expected = sum(map(len, record.plan.groups)) or record.plan.sites
    if len(record.sites) < expected:
        checks.note("countersigned", "unverified", f"{RECORD}: {len(record.sites)} / {expected}")
    ended = {became: record.begun[begun] for begun, became in record.became.items()}
    for number, step in record.attempts:
        begun, named = ended.get(number), {*step.answered, *step.declined, *step.failed}
        if begun is None:
            # the server was started again, and does not know; an earlier version kept no record of whom a round asks
            if named or not step.lost:
                checks.note("countersigned", "unverified", f"{RECORD} #{number}")
            continue
        wrong = (set(step.answered) - set(begun.sites)) | (set(begun.sites) - named)
        if wrong:
            checks.note("countersigned", False, f"{RECORD} #{number}: {', '.join(sorted(wrong))}")
    for number, begun in record.begun.items():
        if number not in record.became and not _asked_again(record, number, begun):
            text = f"{RECORD} #{number}: {begun.round}, {', '.join(begun.sites)}"
            checks.note("countersigned", "unverified", text)


def _asked_again(record: _Record, number: int, begun: _BegunBody) -> bool:
    """Whether a later round speaks of everybody whom a round asked that the server did not end.

    With noise in shares a round that nobody knows the end of is lost, and names nobody.
    """
    later = [step for n, step in record.attempts if n > number and step.round == begun.round]
    return any(step.lost or set(begun.sites) <= {*step.answered, *step.declined, *step.failed} for step in later)


def _check_strangers(folder: Path, record: _Record, checks: _Checks) -> None:
    expected = {f"{file_name(name)}.jsonl" for name in record.sites}
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.name not in expected:
            checks.note("ledger_chain", False, f"{LEDGERS}/{path.name}: no site of this run")


def _site(
    name: str, record: _Record, ledgers: Mapping[str, _Ledger | None], statements: _Signed, checks: _Checks
) -> Site:  # fmt: skip
    """Return a site's account, and note whether it is within the plan and its budget."""
    plan, delta = record.plan, record.plan.privacy.delta
    ledger = ledgers.get(name)
    reasons = sorted({step.declined[name] for _, step in record.attempts if name in step.declined})
    budget = ledger.budget if ledger else None
    limit = budget.epsilon if budget is not None else None
    accounts = [_account(ledger, each, delta) for each in ledger.accounts] if ledger else []
    if ledger is not None:  # disjoint accounts do not add up: nobody is in two of them
        most = max(accounts, key=lambda each: (_number(each.charged), _number(each.counted)))
        released, charged, rdp = (_number(each) for each in (most.spent, most.charged, most.charged_rdp))
        own: dict[Side, float] = {
            side: max(
                _spent(_events([c for c in ledger.live(each) if c.body.run == plan.run], side), delta).epsilon
                for each in ledger.accounts
            )
            for side in SIDES
        }
        run = max(own.values())
    else:  # only what the site has signed elsewhere is known
        last = max((s for s, _ in statements), key=lambda s: (s.round, s.ledger_number), default=None)
        released = charged = run = _number(last.epsilon) if last else 0.0
        own = {"training": run, "evaluation": 0.0}
        rdp = _number(last.epsilon_rdp) if last else 0.0
    if ledger is not None or statements:
        for side in SIDES:
            target = plan.privacy.epsilon if side == "training" else plan.score_epsilon
            right = own[side] <= target + _TOLERANCE_PLD
            text = f"{name}: ε {_text(_finite(own[side]))}"
            checks.note("plan_target", right, f"{text} {'≤' if right else '>'} {target:g}")
    if budget is None:
        checks.note("budget", "unverified", f"{name}: -")
    for account in accounts:
        if budget is None:
            continue
        counted = _number(account.counted)
        within = counted < math.inf and counted <= _number(limit) + _TOLERANCE_PLD
        text = f"ε {_text(account.counted)} {'≤' if within else '>'} {_text(limit)}"
        checks.note("budget", within, f"{name}, {account.name}: {account.decides} {text} (δ {budget.delta:g})")
    signer = ledger.signer if ledger else statements[-1][1] if statements else None
    broken = name in ledgers and ledger is None
    return Site(
        name=name,
        fingerprint=signer.fingerprint if signer else "",
        answered=sum(name in step.answered for _, step in record.attempts),
        declined=sum(name in step.declined for _, step in record.attempts),
        failed=sum(name in step.failed for _, step in record.attempts),
        reasons=tuple(reasons),
        ledger="verified" if ledger else "broken" if broken else "missing",
        entries=len(ledger.entries) if ledger else 0,
        head=ledger.entries[-1].digest if ledger else "",
        spent=_finite(released),
        charged=_finite(charged),
        charged_rdp=_finite(rdp),
        run=_finite(run),
        budget=limit,
        budget_known=budget is not None,
        left=_finite(max(0.0, limit - max((_number(each.counted) for each in accounts), default=charged)))
        if limit is not None
        else None,
        accounts=tuple(accounts),
    )


def _account(ledger: _Ledger, name: str, delta: float) -> Account:
    """Return what an account has spent, and what its budget is held against.

    That is what the site's own ledger decides by (`accounting.counted`), at the budget's delta.
    """
    live, budget = ledger.live(name), ledger.budget
    sides = {side: _spent(_events(live, side), delta) for side in SIDES}
    total = costlier(sides.values())
    plans = {
        side: len({(c.body.run, e.sampling_rate, e.noise_multiplier) for c in live for e in c.events(side)})
        for side in SIDES
    }
    counted = total.epsilon
    if budget is not None and budget.epsilon is not None:
        try:
            counted = max(
                counted_by(_events(live, side), budget.delta, budget.epsilon, plans[side] <= 1) for side in SIDES
            )
        except PrivacyError:
            counted = math.inf
    return Account(
        name=name,
        declared=name in ledger.disjoint,
        spent=_finite(max(_spent(_events([c for c in live if c.released], side), delta).epsilon for side in SIDES)),
        training=_finite(sides["training"].epsilon),
        evaluation=_finite(sides["evaluation"].epsilon),
        charged=_finite(total.epsilon),
        charged_rdp=_finite(total.epsilon_rdp),
        counted=_finite(counted),
        decides="PLD" if max(plans.values()) <= 1 else "RDP",
    )


def _attacked(
    record: _Record, ledgers: Mapping[str, _Ledger | None], statements: Mapping[str, _Signed], checks: _Checks
) -> Empirical | None:
    """Open what the sites committed to, count the right guesses again, and hold what they prove against the claim.

    An opening counts if the site's ledger holds the commitment before the run's first charge.
    """
    plan, openings = record.plan, list[Opening]()
    for name, signed in statements.items():
        ledger = ledgers.get(name)
        closing = plan.training.rounds + 1
        text = next((s.canaries for s, _ in signed if s.round == closing and s.canaries), "")
        if not plan.canaries or ledger is None:
            continue
        ends = [charge.number for charge in ledger.of(plan.run) if charge.body.round == closing and charge.released]
        later = max((charge.number for charge in ledger.of(plan.run) if charge.body.round < closing), default=-1)
        if ends and (ends[-1] < later or closing not in {s.round for s, _ in signed}):
            # the server asked before the last round, for an attack on another adapter, or hides what was opened
            checks.note("empirical", "unverified", f"{name}: #{ends[-1]} (#{later}), {closing}")
        if not text:
            continue
        number, committed = ledger.commitments.get(plan.run, (math.inf, ""))
        first = min((charge.number for charge in ledger.of(plan.run)), default=-1)
        try:
            if not number < first:
                raise CryptoError(f"#{number}: no commitment before the first charge, #{first}")
            opening = Opening.from_text(text)
            opening.check(plan.run, name, plan.canaries, plan.guesses, committed)
        except CryptoError as error:
            checks.note("statements", False, f"{name}: {error}")
            continue
        openings.append(opening)
    if not openings:
        checks.note("empirical", "unverified", "-")
        return None
    found = pooled(openings, plan.guesses, plan.privacy.delta)
    claim = plan.privacy.epsilon if plan.mechanism.private else None
    ceiling = max(found.black.ceiling, found.white.ceiling)
    proved = max(found.black.lower, found.white.lower)
    text = f"{len(openings)} / {len(record.sites)}: ε ≥ {proved:.4g} (≤ {ceiling:.4g}), {_text(claim)}"
    status: Status = "holds" if found.could_have(math.inf if claim is None else claim) else "unverified"
    checks.note("empirical", "fails" if claim is not None and found.contradicts(claim) else status, text)
    return Empirical(
        sites=len(openings),
        canaries=found.canaries,
        guesses=found.white.guesses,
        black=Attack(right=found.black.right, lower=found.black.lower),
        white=Attack(right=found.white.right, lower=found.white.lower),
        ceiling=ceiling,
        claim=claim,
    )


def _costliest(site: Site) -> str:
    """Return the account whose figures are the site's."""
    return max(site.accounts, key=lambda each: (_number(each.charged), _number(each.counted))).name


def _number(epsilon: float | None) -> float:
    return float("inf") if epsilon is None else float(epsilon)


def _accountants(
    record: _Record,
    ledgers: Mapping[str, _Ledger | None],
    sites: Sequence[Site],
    cross_checks: Mapping[str, CrossCheck],
    checks: _Checks,
) -> tuple[Accountants, list[AccountingEvent]]:
    """Return what the costliest site's events cost by several methods, and the events."""
    plan, delta = record.plan, record.plan.privacy.delta
    worst = max(sites, key=lambda site: _number(site.charged), default=None)
    ledger = ledgers.get(worst.name) if worst else None
    step = plan.mechanism.event(plan.training.local_steps)
    if worst is not None and ledger is not None:
        live = ledger.live(_costliest(worst))
        events = max((_events(live, side) for side in SIDES), key=lambda each: _spent(each, delta).epsilon)
    else:
        events = (
            [AccountingEvent(step.sampling_rate, step.noise_multiplier, step.steps * worst.answered)] if worst else []
        )
    # other runs may have added their noise another way: what depends on that is of this run alone
    alive = [charge for charge in ledger.of(plan.run) if charge.aborted is None] if ledger else []
    own = _events(alive, "training") if ledger else events
    # where units have no side of their own, all of it is in the other
    scores = [] if any(charge.both for charge in alive) else _events(alive, "evaluation")
    cost = _spent(events, delta)
    finite = cost.epsilon < math.inf
    estimates = {name: each.estimate(events, delta).epsilon if finite else None for name, each in cross_checks.items()}
    checks.note("accountants", cost.epsilon_rdp >= cost.epsilon - _TOLERANCE_CROSS,
                f"RDP {_text(_finite(cost.epsilon_rdp))} ≥ PLD {_text(_finite(cost.epsilon))}")  # fmt: skip
    for name, other in estimates.items():
        if other is not None:
            near = abs(other - cost.epsilon) <= _TOLERANCE_CROSS or not cost.exact
            text = f"|{name.upper()} {other:.4g} - PLD {cost.epsilon:.4g}| {'≤' if near else '>'} 0.01"
            checks.note("accountants", near, text)
    several = [k for k in (2, 3) if k <= len(sites)] if events else []
    return (
        Accountants(
            site=worst.name if worst else "",
            events=tuple((event.sampling_rate, event.noise_multiplier, event.steps) for event in events),
            delta=delta,
            grid=cost.grid,
            pld=_finite(cost.epsilon),
            rdp=_finite(cost.epsilon_rdp),
            prv=estimates.pop("prv", None),
            cross_checks=estimates,
            planned=_finite(_spent([plan.mechanism.event(plan.steps)], delta).epsilon),
            several_sites=tuple((k, _finite(_at_sites(own, scores, k, plan))) for k in several),
            coalitions=tuple(
                (k, _finite(max(_spent(_weaker(each, plan, k), delta).epsilon for each in (own, scores))))
                for k in _coalitions(plan)
            ),
            share_alone=_finite(
                max(
                    _spent(_left(each, 1 / (plan.sites - plan.privacy.colluding_sites)), delta).epsilon
                    for each in (own, scores)
                )
            )
            if plan.distributed is not None
            else None,
        ),
        events,
    )


def _at_sites(training: Sequence[AccountingEvent], scores: Sequence[AccountingEvent], k: int, plan: RunPlan) -> float:
    """Return the epsilon of a person whose records are at k sites, each of which took part as the events say.

    The person's records train at some sites and evaluate at the others, as the keys of the sites decide; this is the
    worst of all cases. If each site adds noise of its own, the events of all sites compose; if there is one noise for
    all, each step is one sum into which so many sites may draw the person.
    """
    cases = range(k + 1) if scores else (k,)
    return max(_at_trained(training, j, scores, k - j, plan) for j in cases)


def _at_trained(
    training: Sequence[AccountingEvent], trained: int, scores: Sequence[AccountingEvent], scored: int, plan: RunPlan
) -> float:
    delta = plan.privacy.delta
    if plan.distributed is None:
        return _spent([*list(training) * trained, *list(scores) * scored], delta).epsilon
    pairs = [*((event, trained) for event in training), *((event, scored) for event in scores)]
    try:
        return spent_at_sites([(event, many) for event, many in pairs if many], delta).epsilon
    except PrivacyError:
        return math.inf


def _coalitions(plan: RunPlan) -> list[int]:
    """Return the sizes of coalitions larger than named for which the masks still hold: 2 t > n + k."""
    if plan.distributed is None:
        return []
    most = min(plan.quorum - 2, 2 * plan.quorum - plan.sites - 1)
    sizes = list(range(plan.privacy.colluding_sites + 1, most + 1))
    return sizes if len(sizes) <= 4 else [*sizes[:3], sizes[-1]]


def _weaker(events: Sequence[AccountingEvent], plan: RunPlan, colluding: int) -> list[AccountingEvent]:
    """Return the events as the server and so many sites see them, who know their own shares of the noise."""
    return _left(events, (plan.quorum - colluding) / (plan.quorum - plan.privacy.colluding_sites))


def _left(events: Sequence[AccountingEvent], variance: float) -> list[AccountingEvent]:
    """Return the events with so large a share of the noise's variance."""
    return [AccountingEvent(e.sampling_rate, e.noise_multiplier * math.sqrt(variance), e.steps) for e in events]


def _points(ledger: _Ledger, site: Site, plan: RunPlan) -> list[Point]:
    """Return the spending of a site's costliest account over its charges, at no more than a few of them."""
    charges = ledger.live(_costliest(site))
    last = len(charges) - 1
    chosen = sorted({round(last * i / (_POINTS - 1)) for i in range(_POINTS)}) if charges else []
    return [
        Point(
            site=ledger.name,
            at=_time(charges[i].at),
            run=charges[i].body.run,
            round=charges[i].body.round,
            charge=i + 1,
            epsilon=_finite(max(_spent(_events(charges[: i + 1], side), plan.privacy.delta).epsilon for side in SIDES)),
        )
        for i in chosen
    ]
