"""A site: the only place where records, budget and adapter meet. Bytes in, bytes out."""

import hashlib
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from client.masks import Masks, Peers
from client.policy import SitePolicy
from fedllm import codec
from fedllm.chain import Head
from fedllm.crypto import Identity
from fedllm.errors import (
    BudgetExceeded,
    Cancelled,
    ConfigError,
    DataError,
    FedllmError,
    LedgerError,
    MasksError,
    MessageError,
    ModelError,
    PrivacyError,
    SpecMismatch,
)
from fedllm.messages import (
    MAX_NAME,
    Declined,
    MaskRequest,
    Message,
    Prepare,
    Ready,
    Reason,
    Secure,
    TrainReply,
    TrainRequest,
    from_bytes,
    pack,
    unpack,
)
from fedllm.plan import MAX_START, RunPlan
from fedllm.privacy.ledger import DataSet, PrivacyLedger
from fedllm.privacy.ledger_place import LedgerPlace
from fedllm.privacy.randomness import OsRandomness, Randomness, SeededRandomness
from fedllm.statement import Statement, sign_statement, update_digest
from fedllm.training.data import Unit
from fedllm.training.self_check import Subject, self_check_once
from fedllm.training.trainer import shared_step, train_round
from fedllm.training.workspace import Workspace

_log = logging.getLogger("fedllm.site")

# Head office learns the code on the right and nothing else; the text of the error stays in the site's log.
_REASONS: tuple[tuple[type[Exception], Reason], ...] = (
    (BudgetExceeded, "budget"),
    (MasksError, "masks"),
    (PrivacyError, "policy"),
    (DataError, "data"),
    (ConfigError, "data"),
    (SpecMismatch, "model"),
    (ModelError, "training"),
    (LedgerError, "ledger"),
    (MessageError, "message"),
)


_LOOK = 0.2  # seconds between looks whether anybody still waits


def _check(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Cancelled("nobody waits for the answer any more")


class Records(Protocol):
    """A site's records as they were when they were read."""

    @property
    def data_set(self) -> DataSet:
        """What they hold, to compare it with other data sets."""
        ...

    def units(self, plan: RunPlan, workspace: Workspace) -> tuple[Unit, ...]:
        """Return them tokenised for a plan, grouped by privacy unit."""
        ...


@dataclass
class _Open:
    """What a site has open for one plan."""

    plan_digest: str
    records: Records
    ledger: PrivacyLedger
    units: tuple[Unit, ...] | None = None


class Site:
    """One branch office. Safe to call from several threads; requests are handled one at a time."""

    def __init__(
        self,
        name: str,
        policy: SitePolicy,
        ledger: LedgerPlace,
        identity: Callable[[], Identity],
        workspace: Callable[[RunPlan], Workspace],
        records: Callable[[], Records],
        micro_batch: int,
        peers: Peers | None = None,
    ) -> None:
        """`records` reads the records, once for every plan; `identity` signs the ledger at `ledger`.

        `peers` says whom this site believes to be another site; without it, it takes no part in noise in shares.
        """
        if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
            raise ConfigError(
                f"site name {name[:40]!r}: expected 1 to {MAX_NAME} printable characters, found {len(name)}"
            )
        self.name = name
        self._policy, self._ledger, self._micro_batch = policy, ledger, micro_batch
        self._identity, self._open_workspace, self._read_records = identity, workspace, records
        self._open: _Open | None = None
        self._masks = Masks(name, identity, peers) if peers is not None else None
        self._lock = threading.Lock()

    def handle(self, request: bytes, stop: threading.Event | None = None) -> bytes:
        """Answer one message from head office; whatever goes wrong becomes a Declined reply.

        Raises only Cancelled, where `stop` was set before there was an answer: the round stays charged, nothing has
        been released, and the same request may be made again.
        """
        while not self._lock.acquire(timeout=_LOOK):
            _check(stop)
        try:
            _check(stop)
            message = from_bytes(request, Prepare, TrainRequest, Secure)
            if isinstance(message, Prepare):
                return self._prepare(message).to_bytes()
            if isinstance(message, Secure):
                self._policy.admit(message.plan)
                return self._shared(message.plan).answer(message)
            return self._train(message, stop)
        except Cancelled:
            raise
        except Exception as error:
            return self._decline(error)
        finally:
            self._lock.release()

    def _decline(self, error: Exception) -> bytes:
        """Log what happened, with all particulars, and return the reply that tells only a code."""
        reason: Reason = next((code for kind, code in _REASONS if isinstance(error, kind)), "internal")
        if isinstance(error, FedllmError):
            _log.warning("%s declines (%s): %s", self.name, reason, error)
        else:  # a traceback may quote records: it stays here
            _log.error("%s declines: a fault in the site's software", self.name, exc_info=error)
        return Declined(site=self.name, reason=reason).to_bytes()

    def _prepare(self, request: Prepare) -> Message:
        plan = request.plan
        self._policy.admit(plan)
        # before a record is read for anything but to know which data set it is
        self._opened(plan).ledger.check(plan.run, plan.mechanism.event(plan.training.local_steps))
        self._self_check(plan, 1)
        self._policy.check_units(len(self._units(plan)))
        spec = self._workspace(plan).adapter.spec
        join = b""
        if plan.shared is not None:
            plan.shared.clip_before_rounding(spec.dimension)  # refuses what 32 bits are too few for
            join = self._shared(plan).join(request)
        return Ready(site=self.name, plan_digest=plan.digest, spec_digest=spec.digest, payload=join)

    def _train(self, request: TrainRequest, stop: threading.Event | None) -> bytes:
        plan = request.plan
        self._policy.admit(plan)
        if request.round > plan.training.rounds:
            raise MessageError(f"round={request.round} of a plan of {plan.training.rounds} rounds")
        workspace = self._workspace(plan)
        spec = workspace.adapter.spec
        if request.spec_digest != spec.digest:
            raise SpecMismatch("head office's adapter is another one. Do base model, seed and versions agree?")
        payload, mask = request.payload, None
        if plan.shared is not None:
            payload, asked = unpack(request.payload, 2)
            mask = from_bytes(asked, MaskRequest, MaskRequest)
            if mask.round != request.round:
                raise MessageError(f"masks of round={mask.round} in a request of round={request.round}")
        start = codec.decode(payload, "float32", spec.dimension, MAX_START)
        fingerprint = hashlib.sha256(plan.digest.encode() + request.round.to_bytes(8, "big") + request.payload)

        # The charge is on disk before a record enters anything whose result leaves the site. A round that was released
        # before is answered as before.
        event = plan.mechanism.event(plan.training.local_steps)
        ledger = self._opened(plan).ledger
        if request.head is not None and not ledger.file.knows(Head(request.head.number, request.head.digest)):
            raise LedgerError(
                f"the ledger lacks entry {request.head.number}, which it had signed for head office. Was it restored "
                "from an old backup? What was spent since is not in it, so no round is trained on these records. Put "
                "back the newest ledger there is. If all of them lack the entry: state what the runs since then have "
                "spent (`fedllm ledger restart --help`), and head office runs `fedllm server new-ledger` (or, in a "
                "simulation, removes heads.json)."
            )
        self._self_check(plan, request.round)  # before the charge: an engine that fails it costs nothing
        if mask is not None and not ledger.answered(plan.run, request.round):
            self._shared(plan).check(plan, mask)
        reservation = ledger.reserve(plan.run, request.round, fingerprint.hexdigest(), event)
        if reservation.reply is not None:
            return reservation.reply
        try:
            reply = self._update(request, workspace, start, mask, stop)
        except Cancelled:
            raise  # given up for a reason that no record had a part in
        except Exception as error:
            # A refusal here may depend on the noisy result, so it is the round's release: no second try is free.
            reply = self._decline(error)
        ledger.release(reservation, reply)
        return reply

    def _update(
        self,
        request: TrainRequest,
        workspace: Workspace,
        start: NDArray[np.float32],
        mask: MaskRequest | None,
        stop: threading.Event | None,
    ) -> bytes:
        """Train a round that is paid for and return the reply."""
        plan = request.plan
        units = self._units(plan)
        self._policy.check_units(len(units))
        source = self._randomness(plan, request.round)
        parts = (workspace.adapter, workspace.engine, units, plan, start, source, self._micro_batch)
        if mask is not None:
            task = request.task(codec.encode(start, "float32"))
            payload = pack(*self._shared(plan).mask(plan, mask, task, *shared_step(*parts)))
        else:
            delta = train_round(*parts, stop)
            try:
                payload = codec.encode(delta.astype(np.float32), plan.training.wire)
            except MessageError as error:
                raise ModelError(f"the update cannot be sent: {error}") from None
        ledger = self._opened(plan).ledger
        spent, head = ledger.spent(plan.privacy.delta), ledger.file.head()
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
        )
        return TrainReply(
            site=self.name,
            plan_digest=plan.digest,
            round=request.round,
            spec_digest=request.spec_digest,
            dtype=plan.training.wire if mask is None else "uint32",
            epsilon=statement.epsilon,
            epsilon_rdp=statement.epsilon_rdp,
            delta=spent.delta,
            statement=sign_statement(statement, self._identity()),
            payload=payload,
        ).to_bytes()

    def _shared(self, plan: RunPlan) -> Masks:
        if self._masks is None or plan.shared is None:
            raise PrivacyError(
                f"privacy.mode={plan.privacy.mode}: this site has no list of the other sites' identities to aggregate "
                "with (policy.peers)"
            )
        return self._masks

    def _opened(self, plan: RunPlan) -> _Open:
        """Return records and ledger of a plan, reading the records again for another plan: they may have changed."""
        if self._open is None or self._open.plan_digest != plan.digest:
            records = self._read_records()
            policy = self._policy
            ledger = PrivacyLedger(self._ledger, policy.epsilon, policy.delta, self._identity(), policy.period)
            shared = ledger.compare(records.data_set)
            if shared:  # for the owner: no answer may depend on it
                _log.warning(
                    "%s: these records share some with what was charged to %s, although %s was declared disjoint",
                    self.name, ", ".join(shared), ledger.account,
                )  # fmt: skip
            self._open = _Open(plan.digest, records, ledger)
        return self._open

    def _workspace(self, plan: RunPlan) -> Workspace:
        try:
            return self._open_workspace(plan)
        except ModelError as error:
            raise SpecMismatch(str(error)) from error

    def _self_check(self, plan: RunPlan, round_: int) -> None:
        """Raise PrivacyError where the engine breaks an invariant on made-up text.

        Head office may ask for it; it cannot spare an office what the office's own policy asks for.
        """
        if plan.privacy.self_check or self._policy.self_check:
            workspace = self._workspace(plan)
            self_check_once(
                Subject(
                    workspace.adapter, workspace.engine, plan, lambda: self._randomness(plan, round_), self._micro_batch
                )
            )

    def _units(self, plan: RunPlan) -> tuple[Unit, ...]:
        opened = self._opened(plan)
        if opened.units is None:
            opened.units = opened.records.units(plan, self._workspace(plan))
        return opened.units

    def _randomness(self, plan: RunPlan, round_: int) -> Randomness:
        if plan.privacy.protects:
            return OsRandomness()
        seed = plan.privacy.insecure_seed if plan.privacy.insecure_seed is not None else plan.seed
        return SeededRandomness(seed, self.name, round_)
