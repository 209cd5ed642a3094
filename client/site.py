"""A site: the only place where records, budget and adapter meet. Bytes in, bytes out.

**What a site answers depends on its records only through a noised, charged release.** This file is where that is kept:

- Records are read and tokenised before anybody asks (client.records). No request reads, compares or counts them.
- Everything that may be refused is refused in `_prepare`, and in `_train` above the charge, by what is public there:
  plan, policy, declaration, ledger, model.
- Records are used in `_used` and nowhere else, with the sampling randomness (`coins`) that the reservation fixed. What
  it needs of ledger and state is taken before, so nothing is left to fail there but arithmetic: a unit that fails
  counts zero (the engine), and a result that is not finite is a property of the noised vector. If something fails all
  the same, or the process is killed, the site answers nothing at all until its owner acts: one bit, once
  (`Unfinished`).
- Whatever used records leaves at a multiple of the policy's `quantum` after the site began to use them, and until then
  nothing else is answered. All that comes before takes as long as machine and request make it. Nor does what is signed
  say when training ended.
"""

import contextlib
import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from client.canaries import SiteCanaries
from client.own_scores import OwnScore, note_score
from client.policy import SitePolicy
from client.records import Declared
from client.secagg_client import Peers, SecAggClient
from client.unfinished import Unfinished
from fedllm import adapter_vector
from fedllm.crypto.hash_chain import LedgerHead
from fedllm.crypto.identity import Identity
from fedllm.errors import (
    BudgetExceeded,
    Cancelled,
    ConfigError,
    DataError,
    Diverged,
    FedllmError,
    FolderError,
    Halted,
    LedgerError,
    MessageError,
    ModelError,
    PrivacyError,
    SecAggError,
    SpecMismatch,
)
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import PrivacySpent
from fedllm.privacy.ledger import DataSet, PrivacyLedger
from fedllm.privacy.ledger_place import LedgerPlace
from fedllm.privacy.metrics import metric_names
from fedllm.privacy.randomness import Beside, KeyedRandomness, OsRandomness, Randomness, SeededRandomness
from fedllm.privacy.split import Side, Split
from fedllm.protocol.messages import (
    Declined,
    MaskedInputRequest,
    Message,
    Prepare,
    Ready,
    Reason,
    SecAggRequest,
    TrainReply,
    TrainRequest,
    from_bytes,
    pack,
    unpack,
)
from fedllm.protocol.spending_statement import Statement, sign_statement, update_digest
from fedllm.secagg.masking import add_mask
from fedllm.training.data import Joined, PrivacyUnit
from fedllm.training.model_context import ModelContext
from fedllm.training.self_check import Subject, self_check_once
from fedllm.training.trainer import Scored, distributed_step, score, train_round
from fedllm.values import MAX_START, check_name

_log = logging.getLogger("fedllm.site")

# The server learns the code on the right and nothing else; the text of the error stays in the site's log. None of
# them depends on a record: see fedllm.protocol.messages.Reason for what each is a function of.
_REASONS: tuple[tuple[type[Exception], Reason], ...] = (
    (BudgetExceeded, "budget"),
    (SecAggError, "masks"),
    (PrivacyError, "policy"),
    (DataError, "data"),
    (ConfigError, "data"),
    (SpecMismatch, "model"),
    (ModelError, "training"),
    (LedgerError, "ledger"),
    (MessageError, "message"),
)


_LOOK = 0.2  # seconds between looks whether anybody still waits


def _until_departure(elapsed: float, quantum: float) -> float:
    """Return the seconds until a whole number of quanta, at least one, has passed."""
    return quantum * max(1, math.ceil(elapsed / quantum)) - elapsed if quantum > 0 else 0.0


def _check(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Cancelled("nobody waits for the answer any more")


class Records(Protocol):
    """A site's records as they were when it was started."""

    @property
    def declared(self) -> Declared:
        """What their owner says of them."""
        ...

    @property
    def data_set(self) -> DataSet:
        """What they hold, to compare it with other data sets."""
        ...

    @property
    def rule(self) -> str:
        """What tells their privacy units from one another."""
        ...

    def units(self, plan: RunPlan, split: Split, side: Side) -> Sequence[PrivacyUnit]:
        """Return those of one side by privacy unit, as a plan cuts them; a unit that cannot be used is empty."""
        ...


@dataclass(frozen=True)
class PlanSession:
    """What a request of an admitted plan is answered with."""

    site: str
    plan: RunPlan
    ledger: PrivacyLedger
    records: Records
    micro_batch: int
    open_context: Callable[[RunPlan], ModelContext]

    @cached_property
    def context(self) -> ModelContext:
        """Model, adapter and engine, set up for the plan; raises SpecMismatch if this site does not have them."""
        try:
            return self.open_context(self.plan)
        except ModelError as error:
            raise SpecMismatch(str(error)) from error

    def units(self, side: Side) -> Sequence[PrivacyUnit]:
        """Return the records of one side by privacy unit: for `Site._used` alone."""
        return self.records.units(self.plan, self.ledger.split, side)

    def self_check(self, round_: int) -> None:
        """Try the engine on made-up text; PrivacyError if it breaks an invariant, SpecMismatch for want of memory."""
        adapter, engine = self.context.adapter, self.context.engine
        try:
            engine.rehearse(self.micro_batch, self.plan.model.max_length)
        except ModelError as error:
            raise SpecMismatch(str(error)) from error
        self_check_once(Subject(adapter, engine, self.plan, lambda: self.randomness(round_), self.micro_batch))

    def seconds_aside(self, round_: int, start: NDArray[np.float32]) -> float:
        """Return twice what a round of such a plan takes beside its records: noise, coins, optimiser, encoding, masks.

        Measured in one step on as many empty units as are declared, and again as many.
        """
        plan, source = self.plan, self.randomness(round_)
        once = plan.model_copy(update={"training": plan.training.model_copy(update={"local_steps": 1})})
        nobody: Sequence[PrivacyUnit] = [()] * (2 * self.records.declared.size)
        parts = (self.context.adapter, self.context.engine, nobody, once, start, source, self.micro_batch)
        began = time.monotonic()
        if plan.distributed is None:
            delta = train_round(*parts)
            stepped = time.monotonic()
            update_digest(adapter_vector.encode(delta.astype(np.float32), "float32"))
        else:
            share, _ = distributed_step(*parts)
            stepped = time.monotonic()
            for _ in range(plan.distributed.sites):
                add_mask(share, bytes(32), 1)
        return 2 * (plan.training.local_steps * (stepped - began) + time.monotonic() - stepped)

    def randomness(self, round_: int) -> Randomness:
        """Return the source of a round's noise."""
        privacy = self.plan.privacy
        if privacy.protects:
            return OsRandomness()
        seed = self.plan.seed if privacy.insecure_seed is None else privacy.insecure_seed
        return SeededRandomness(seed, self.site, round_)


@dataclass(frozen=True)
class _Canaries:
    """A site's part in the attack on a run, in one exchange."""

    units: Sequence[PrivacyUnit] = ()  # that train with its records
    opening: str = ""  # in the closing exchange


class Site:
    """One site. Safe to call from several threads; requests are handled one at a time."""

    def __init__(
        self,
        name: str,
        policy: SitePolicy,
        ledger: LedgerPlace,
        identity: Callable[[], Identity],
        context: Callable[[RunPlan], ModelContext],
        records: Records,
        micro_batch: int,
        peers: Peers | None = None,
        self_check: bool = True,
        split_key: bytes | None = None,
    ) -> None:
        """`identity` signs the ledger at `ledger`; `records` are read already.

        `peers` says whom this site believes to be another site; without it, it takes no part in noise in shares.
        `self_check`: check the engine before any record is used, also if the plan does not ask for it. `split_key` is
        that of a new ledger, drawn by it if there is none.
        """
        check_name(name)
        self.name = name
        self._policy, self._ledger, self._micro_batch = policy, ledger, micro_batch
        self._identity, self._open_context, self._records = identity, context, records
        self._opened: PrivacyLedger | None = None
        self._unfinished = Unfinished(ledger.file)
        self._masks = SecAggClient(name, identity, peers) if peers is not None else None
        self._lock = threading.Lock()
        self._self_check, self._split_key = self_check, split_key

    def handle(self, request: bytes, stop: threading.Event | None = None) -> bytes:
        """Answer one message from the server; whatever goes wrong becomes a Declined reply.

        Raises Cancelled if `stop` was set before there was an answer: the round stays charged, nothing has been
        released, and the same request may be made again. Raises Halted if the site failed while it used records.
        """
        while not self._lock.acquire(timeout=_LOOK):
            _check(stop)
        with contextlib.ExitStack() as leaving:  # with the lock held: when it is free, too, says how long it took
            leaving.callback(self._lock.release)
            try:
                _check(stop)
                self._unfinished.check()
                return self._answer(request, lambda q: leaving.callback(self._wait, time.monotonic(), q), stop)
            except (Cancelled, Halted):
                raise
            except Exception as error:
                return self._declined(error).to_bytes()

    def _answer(self, request: bytes, hold_back: Callable[[float], object], stop: threading.Event | None) -> bytes:
        message = from_bytes(request, Prepare, TrainRequest, SecAggRequest)
        plan = message.plan
        self._admit(plan)
        if isinstance(message, SecAggRequest):
            return self._distributed(plan).answer(message)
        ledger = self.open_ledger()
        self._policy.check_run(plan, both=not ledger.file.sided(ledger.account))
        session = PlanSession(self.name, plan, ledger, self._records, self._micro_batch, self._open_context)
        if isinstance(message, Prepare):
            return self._prepare(message, session).to_bytes()
        return self._train(message, session, hold_back, stop)

    def _wait(self, began: float, quantum: float) -> None:
        elapsed = time.monotonic() - began
        _log.info("%s: %.2f s, of quanta of %.2f s", self.name, elapsed, quantum)
        if elapsed > quantum and self._policy.record_seconds:
            _log.warning(
                "%s: a round took longer than its quantum, which shows. Raise policy.record_seconds", self.name
            )
        time.sleep(_until_departure(elapsed, quantum))

    def open_ledger(self) -> PrivacyLedger:
        """Open the ledger, unless it is; a site service does so before it answers anybody."""
        if self._opened is None:
            policy = self._policy
            ledger = PrivacyLedger(
                self._ledger, policy.epsilon, policy.delta, self._identity(), policy.period, policy.evaluation_share,
                self._records.rule, self._split_key,
            )  # fmt: skip
            shared = ledger.compare(self._records.data_set)
            if shared:  # for the owner: no answer may depend on it
                _log.warning(
                    "%s: these records share some with what was charged to %s, although %s was declared disjoint",
                    self.name, ", ".join(shared), ledger.account,
                )  # fmt: skip
            self._opened = ledger
        return self._opened

    def _declined(self, error: Exception) -> Declined:
        """Log what happened, with all particulars, and return the reply that tells only a code."""
        reason: Reason = next((code for kind, code in _REASONS if isinstance(error, kind)), "internal")
        if isinstance(error, FedllmError):
            _log.warning("%s declines (%s): %s", self.name, reason, error)
        else:  # a traceback may quote records: it stays here
            _log.error("%s declines: a fault in the site's software", self.name, exc_info=error)
        return Declined(site=self.name, reason=reason)

    def _admit(self, plan: RunPlan) -> None:
        """Raise PrivacyError or DataError if a plan does not fit policy and declaration; looks at no record."""
        self._policy.admit(plan)
        self._records.declared.admit(plan)
        self._policy.check_units(self._records.declared.size)

    def _prepare(self, request: Prepare, session: PlanSession) -> Message:
        plan = session.plan
        session.ledger.check(plan.run, plan.event(1), plan.score_noise(1))
        self._check_engine(session, 1)
        spec = session.context.adapter.spec
        join = b""
        if plan.distributed is not None:
            plan.distributed.clip_before_rounding(spec.dimension)  # refuses what 32 bits are too few for
            join = self._distributed(plan).join(request)
        return Ready(site=self.name, plan_digest=plan.digest, spec_digest=spec.digest, payload=join)

    def _train(
        self,
        request: TrainRequest,
        session: PlanSession,
        hold_back: Callable[[float], object],
        stop: threading.Event | None,
    ) -> bytes:
        """Answer a round; `hold_back` starts the clock: the answer leaves at a multiple of the seconds it is given."""
        plan, ledger = session.plan, session.ledger
        if request.round > plan.exchanges:
            raise MessageError(f"round={request.round} of a plan of {plan.training.rounds} rounds")
        spec = session.context.adapter.spec
        if request.spec_digest != spec.digest:
            raise SpecMismatch("the server's adapter is another one. Do base model, seed and versions agree?")
        payload, mask = request.payload, None
        if plan.distributed is not None and request.round <= plan.masked_exchanges:
            payload, asked = unpack(request.payload, 2)
            mask = from_bytes(asked, MaskedInputRequest, MaskedInputRequest)
            if mask.round != request.round:
                raise MessageError(f"masks of round={mask.round} in a request of round={request.round}")
        start = adapter_vector.decode(payload, "float32", spec.dimension, MAX_START)
        fingerprint = hashlib.sha256(plan.digest.encode() + request.round.to_bytes(8, "big") + request.payload)

        # The charge is on disk before a record enters anything whose result leaves the site. A round that was released
        # before is answered as before.
        event, score_noise = plan.event(request.round), plan.score_noise(request.round)
        if request.head is not None and not ledger.file.knows(request.head):
            raise LedgerError(
                f"the ledger lacks entry {request.head.number}, which it had signed for the server. Was it restored "
                "from an old backup? What was spent since is not in it, so no round is trained on these records. Put "
                "back the newest ledger there is. If all of them lack the entry: state what the runs since then have "
                "spent (`fedllm ledger restart --help`), and the server runs `fedllm server new-ledger` (or, in a "
                "simulation, removes heads.json)."
            )
        self._check_engine(session, request.round)  # before the charge: an engine that fails it costs nothing
        canaries, aside = _Canaries(), 0.0
        if not ledger.answered(plan.run, request.round):
            ledger.spent(plan.privacy.delta, [event], score_noise)  # what cannot be computed is not charged either
            if mask is not None:
                self._distributed(plan).check(plan, mask)
            aside = session.seconds_aside(request.round, start) if self._policy.record_seconds else 0.0
            canaries = self._canaries(request, session, start)
        reservation = ledger.reserve(plan.run, request.round, fingerprint.hexdigest(), event, score_noise)
        if reservation.reply is not None:
            return reservation.reply
        spent, head = ledger.spent(plan.privacy.delta), ledger.file.head()

        hold_back(self._policy.quantum(plan, self._records.declared.size, aside))
        self._unfinished.begin(plan.run, request.round)
        try:
            used = self._used(request, session, start, mask, canaries.units, reservation.coins, stop)
            reply = (
                used if isinstance(used, Declined) else self._reply(request, start, used, spent, head, canaries.opening)
            )
        except Cancelled:
            self._unfinished.end()
            raise  # given up for a reason that no record had a part in
        except Exception as error:  # its text may quote records: it stays here
            _log.error("%s stops: a fault while records were used", self.name, exc_info=error)
            raise Halted("a fault while records were used. The log says which; then: fedllm site resume") from error
        self._unfinished.end()
        answer = reply.to_bytes()
        ledger.release(reservation, answer)
        return answer

    def _used(
        self,
        request: TrainRequest,
        session: PlanSession,
        start: NDArray[np.float32],
        mask: MaskedInputRequest | None,
        canaries: Sequence[PrivacyUnit],
        coins: bytes,
        stop: threading.Event | None,
    ) -> bytes | Declined:
        """Use the records: return the noised payload of a round that is paid for, or why there can be none.

        That the payload is not finite, or too large to be sent, is a property of the noised vector, and no second try
        is free. The noise is drawn before a record is looked at.
        """
        plan, context, trains = session.plan, session.context, request.round <= session.plan.training.rounds
        source = session.randomness(request.round)
        own_coins: Randomness = source
        if source.private:  # canaries have coins of their own: which records are drawn does not depend on them
            of_canaries = KeyedRandomness(coins, b"fedllm canary sample v1")
            own_coins = Beside(of_canaries, len(canaries), KeyedRandomness(coins, b"fedllm poisson sample v1"))
        scored: Scored | None = None
        if plan.score_noise(request.round) is not None:
            scored = score(context.engine, session.units("evaluation"), plan, start, source, session.micro_batch)
            self._note_score(request, scored)
        # canaries first: where they stand, and so their coins, must not depend on how many records there are
        units = Joined(canaries, session.units("training")) if trains else ()
        training = (context.adapter, context.engine, units, plan, start, source, session.micro_batch)
        try:
            if mask is not None:
                vectors, seeds = list[NDArray[np.uint32]](), list[tuple[str, ...]]()
                if trains:
                    vector, own = distributed_step(*training, own_coins)
                    vectors.append(vector)
                    seeds.append(own)
                if scored is not None:
                    vectors.append(scored.share)
                    seeds.append(scored.seeds)
                task = request.task(adapter_vector.encode(start, "float32"))
                return pack(*self._distributed(plan).mask(plan, mask, task, np.concatenate(vectors), seeds))
            update = b""
            if trains:
                delta = train_round(*training, stop, own_coins)
                try:
                    update = adapter_vector.encode(delta.astype(np.float32), plan.training.wire)
                except MessageError as error:
                    raise Diverged(f"the update cannot be sent: {error}") from None
            return update if scored is None else pack(update, scored.released)
        except (Diverged, SecAggError) as error:
            return self._declined(error)

    def _note_score(self, request: TrainRequest, scored: Scored) -> None:
        """Tell the owner, and nobody else, how good the adapter is on the site's own records, exactly."""
        names, number = metric_names(len(request.plan.model.labels)), request.round - 1
        means = dict(zip(names, scored.values.mean(axis=0).tolist(), strict=True)) if len(scored.values) else {}
        said = ", ".join(f"{name} {mean:.4g}" for name, mean in means.items())
        _log.info("%s: round %d on %d units of its own: %s", self.name, number, len(scored.values), said)
        note_score(self._ledger.file, OwnScore(request.plan.run, number, len(scored.values), means))

    def _canaries(self, request: TrainRequest, session: PlanSession, start: NDArray[np.float32]) -> "_Canaries":
        """Take a step of the attack on the run, which no record has a part in; return what trains in this round.

        Where the attack was given up, training goes on without it.
        """
        plan, batch = session.plan, session.micro_batch
        if not plan.canaries:
            return _Canaries()
        # a run that is not paid for leaves nothing behind: no entry of the ledger, no file
        session.ledger.check(plan.run, plan.event(request.round), plan.score_noise(request.round))
        own = SiteCanaries(self._ledger.file.parent, plan.run, self.name)
        try:
            if not session.ledger.commit(plan.run, own.begin(plan.canaries)):
                raise FolderError(
                    "the canaries are not those that were committed to. The attack on this run is given up"
                )
            if request.round > plan.training.rounds:
                return _Canaries(opening=own.opening(start, plan.guesses, session.context, plan, batch).to_text())
            own.saw(request.round, start, session.context, plan, batch)
            return _Canaries(own.members(session.context, plan))
        except FolderError as error:
            _log.warning("%s: %s", self.name, error)
            return _Canaries()

    def _reply(
        self, request: TrainRequest, start: NDArray[np.float32], payload: bytes, spent: PrivacySpent, head: LedgerHead,
        canaries: str,
    ) -> TrainReply:  # fmt: skip
        plan = request.plan
        statement = Statement(
            site=self.name,
            run=plan.run,
            plan=plan.digest,
            round=request.round,
            epsilon=spent.epsilon if math.isfinite(spent.epsilon) else None,
            epsilon_rdp=spent.epsilon_rdp if math.isfinite(spent.epsilon_rdp) else None,
            delta=spent.delta,
            ledger_number=head.number,
            ledger_digest=head.digest,
            update=update_digest(payload),
            grid=spent.grid,
            roster=request.begun.roster,
            record_number=request.begun.number,
            record_digest=request.begun.digest,
            canaries=canaries,
            adapter=adapter_vector.adapter_digest(start),
        )
        return TrainReply(statement=sign_statement(statement, self._identity()), payload=payload)

    def _distributed(self, plan: RunPlan) -> SecAggClient:
        if self._masks is None or plan.distributed is None:
            raise PrivacyError(
                f"privacy.mode={plan.privacy.mode}: this site has no list of the other sites' identities to aggregate "
                "with (policy.peers)"
            )
        return self._masks

    def _check_engine(self, session: PlanSession, round_: int) -> None:
        """The server may ask for the check; it cannot switch off what the site's own settings ask for."""
        if session.plan.privacy.self_check or self._self_check:
            session.self_check(round_)
