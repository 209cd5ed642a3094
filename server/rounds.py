"""The round loop: ask, wait, check, average, step, evaluate, checkpoint."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from fedllm import adapter_vector
from fedllm.adapter_vector import AdapterSpec, adapter_digest
from fedllm.config import QuorumConfig
from fedllm.crypto.hash_chain import LedgerHead
from fedllm.crypto.identity import PublicIdentity
from fedllm.errors import CheckpointError, CryptoError, FedllmError, MessageError, ModelError, QuorumLost
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import spent
from fedllm.privacy.metrics import Layout
from fedllm.protocol.messages import (
    Declined,
    Prepare,
    Ready,
    Reason,
    TrainReply,
    TrainRequest,
    from_bytes,
    pack,
    unpack,
)
from fedllm.protocol.spending_statement import Statement, open_statement, update_digest
from fedllm.values import MAX_START
from server.aggregate import aggregation_rule, bound_of_score, bound_of_update, public_weights
from server.channel import PATIENCE, Channel, arrived
from server.checkpoint import Checkpoint, SiteState, load_checkpoint, save_checkpoint
from server.events import (
    CHECKPOINT,
    METRICS,
    Event,
    Phase,
    RoundMetrics,
    RoundStarted,
    SiteAnswered,
    read_records,
    write_records,
)
from server.ledger_heads import LedgerHeads
from server.run_record import RunLog
from server.secagg_server import Ask, Groups, ScoreSum, SecAggServer

if TYPE_CHECKING:
    from fedllm.training.server_optimizer import ServerOptimizer


# After these a site is not asked again in this run; after the others it may do better next time.
_FINAL: frozenset[Reason] = frozenset({"budget", "policy", "data", "model", "ledger"})
# These come before the site charges itself.
_UNCHARGED: frozenset[Reason] = frozenset({"budget", "policy", "model", "message", "ledger", "masks"})
_LEDGER_HINT = "(ledger): cannot be used, or lacks entries that were seen before; the site's own log says what to do."
_ARRIVAL = 0.5  # seconds between looks who has come
_DEALS = 3  # attempts to have a round's secrets shared
_LOST_IN_A_ROW = 3  # rounds that were paid for and not applied, after which the run ends
_PAUSE, _PAUSE_MAX = 0.005, 5.0  # seconds between looks for sites that may come back


@dataclass(frozen=True)
class _Answer:
    """A site's update, checked with what the site signed of it."""

    update: NDArray[np.float32] | None  # None in the closing exchange, and where masks hide it in the sum
    score: NDArray[np.float64] | None  # [1 + metrics], with noise of the site's own
    line: str  # the statement, as it was signed
    statement: Statement
    signer: str
    size: int  # bytes of the whole message

    @property
    def head(self) -> LedgerHead:
        """Where the site's ledger stood."""
        return LedgerHead(self.statement.ledger_number, self.statement.ledger_digest)


@dataclass(frozen=True)
class RoundOutcome:
    """What the sites of a round answered, and why others did not."""

    number: int
    asked: Sequence[str] = ()  # for an update: they may have paid
    answers: Mapping[str, _Answer] = field(default_factory=dict)  # those that can be used
    declined: Mapping[str, Reason] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)  # site or node -> what was wrong
    forgetful: frozenset[str] = frozenset()  # those that stated less than before
    bytes_down: int = 0

    @property
    def bytes_up(self) -> int:
        """Bytes of all answers."""
        return sum(answer.size for answer in self.answers.values())

    def entry(self, adapter: str) -> dict[str, Any]:
        """Return what the run record says of a round that leaves the adapter of this digest as it is."""
        return {
            "round": self.number,
            "counts": False,
            "answered": {site: answer.line for site, answer in sorted(self.answers.items())},
            "declined": dict(self.declined),
            "failed": dict(self.failed),
            "adapter_before": adapter,
            "adapter_after": adapter,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
        }


@dataclass(frozen=True)
class _Sum:
    """The aggregate of a round's updates."""

    step: NDArray[np.float32] | None = None  # [d]; None if they are too few, or unmasking failed
    lost: str = ""  # why unmasking failed
    scores: ScoreSum | None = None  # of the adapter that the round starts from
    noise_std: float = 0.0  # of the step, if it is known
    noise_multiplier: float | None = None
    without: Mapping[str, str] = field(default_factory=dict)
    entry: Mapping[str, Any] = field(default_factory=dict)  # what the record says of the sum


Score = Callable[[NDArray[np.float32]], Mapping[str, float | None]]


@dataclass(frozen=True)
class PublicModel:
    """What the server has of the model: the adapter that a run starts from, and how good one is on public data."""

    spec: AdapterSpec
    start: NDArray[np.float32]  # [d]
    score: Score  # of an adapter float32[d]
    layout: Layout  # of what sites say of an adapter


class Coordinator:
    """Runs one plan over a channel, from the start or from its last checkpoint."""

    def __init__(
        self,
        plan: RunPlan,
        federation: QuorumConfig,
        model: PublicModel,
        channel: Channel,
        record: RunLog,
        observe: Callable[[Event], None],
        heads: LedgerHeads | None = None,
        roster: Mapping[str, PublicIdentity] | None = None,
    ) -> None:
        """Keep checkpoints and metrics beside the run's `record`.

        `heads` holds what was seen of the sites' ledgers in other runs; None if they have ledgers for this run only.
        `roster` names the sites that may take part, if their noise comes in shares.
        """
        self.plan, self._federation, self._spec, self._score = plan, federation, model.spec, model.score
        self._layout = model.layout
        self._best, self._best_round = model.start, -1  # by scores at the sites
        self._channel, self._record, self.observe, self._heads = channel, record, observe, heads
        self.folder = record.path.parent
        self._quorum = max(plan.quorum, federation.quorum or 1)  # with groups, of each
        self._begun: dict[int, set[str]] = {}  # with noise in shares: who may have paid for which rounds
        self._lost_in_a_row = 0
        self._repeated = 0  # up to this round, a site may answer as it did before a crash
        self._optimizer = self._optimizer_from(model.start)
        self.sites: dict[str, SiteState] = {}
        self.records: list[RoundMetrics] = []
        self._site_of_node: dict[int, str] = {}
        self._dropped: set[int] = set()
        self._forgotten: set[int] = set()  # nodes whose sites lost their secrets, and are to advertise keys anew
        self._evaluation = ThreadPoolExecutor(1, "evaluation")
        self._evaluating: tuple[int, Future[Mapping[str, float | None]]] | None = None  # of records[that]
        distributed = plan.distributed
        kind = Groups if plan.groups else SecAggServer
        metrics = model.layout.dimension
        self._masks = (
            kind(plan, distributed, model.spec.dimension, metrics, roster or {}) if distributed is not None else None
        )
        self._bound = bound_of_update(plan, model.spec.dimension)
        self._rule = aggregation_rule(federation, plan.training)

    def _optimizer_from(self, value: NDArray[np.float32]) -> "ServerOptimizer":
        from fedllm.training.server_optimizer import ServerOptimizer  # torch: not for those who only read records

        return ServerOptimizer(self.plan.training.server, value)

    @property
    def _least(self) -> int:
        """Sites without which no round can count."""
        return self._quorum * self.plan.least_groups

    @property
    def round(self) -> int:
        """The last completed round."""
        return self.records[-1].round if self.records else -1

    @property
    def adapter(self) -> NDArray[np.float32]:
        """The global adapter after the last completed round, float32[d]."""
        return self._optimizer.value

    def resume(self) -> None:
        """Continue from the folder's checkpoint; raises CheckpointError if it belongs to another plan."""
        checkpoint = load_checkpoint(self.folder / CHECKPOINT)
        if checkpoint.plan_digest != self.plan.digest:
            raise CheckpointError(f"the checkpoint in {self.folder} belongs to another plan")
        self._spec.check(checkpoint.adapter)
        self._optimizer = self._optimizer_from(checkpoint.adapter)
        self._optimizer.restore(checkpoint.optimizer)
        self.sites = dict(checkpoint.sites)
        self.records = [r for r in read_records(self.folder / METRICS) if r.round <= checkpoint.round]
        if self.round != checkpoint.round:
            raise CheckpointError(
                f"{self.folder / METRICS} does not reach round {checkpoint.round} of the checkpoint. Restore it from "
                "a backup, or start a new run."
            )
        if checkpoint.best is not None:
            self._best, self._best_round = checkpoint.best, checkpoint.best_round
        write_records(self.folder / METRICS, self.records)
        begun = self._record.resume(self.plan, self.round, self.adapter)
        if not self._closed:  # else the exchange that scored it is on record
            self.records[-1] = replace(self.records[-1], at_sites={})
            write_records(self.folder / METRICS, self.records)
        self._begun = begun if self._masks is not None else {}
        self._repeated = self.round + 2  # the round that was under way, and one more after a damaged checkpoint

    def run(self) -> None:
        """Run all rounds that are left, once.

        A round's adapter is evaluated beside the next round, or with a gate (`federation.gate`) before it counts.
        Raises QuorumLost, after everything so far is on disk, if too few sites are left to go on.
        """
        try:
            self._run()
        finally:  # a run that is told to end does not wait for an evaluation
            self._evaluation.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        if not self.records:
            epsilon = 0.0 if self.plan.mechanism.private else None
            self._record.begin(self.plan, self._spec.digest, self.adapter, self._layout.most_loss)
            self._finish(RoundMetrics(0, self.plan.privacy.protects, epsilon))
        elif self.records[-1].loss is None:  # it ended before this was known
            self._evaluate()
        self.observe(Phase("waiting for the sites"))
        self._await_nodes()
        try:
            last, may_have_closed = self.plan.training.rounds, max(self._begun, default=0) > self.plan.training.rounds
            for number in range(self.round + 1, min(last, max(self._begun, default=0)) + 1):
                # sites may have paid for it, and have forgotten the secrets that it was masked with
                asked = self._begun.get(number, set())
                for site in asked:  # in the first round there is no checkpoint yet that names them
                    self.sites.setdefault(site, SiteState())
                outcome = RoundOutcome(number, sorted(asked))
                self._charge(outcome, counts=False)
                self._lose(outcome, "the server was started again", time.monotonic())
            for number in range(self.round + 1, last + 1):
                if self._closed or self._no_better():
                    break
                self._round(number)
            if self.plan.closes and not (may_have_closed or self._closed):
                self._close(last + 1)
        except QuorumLost as error:
            self._note_scores()
            self._note_end(str(error))
            self._save()  # what the sites spent in the unfinished round is part of the record
            raise
        self._note_scores()
        self._note_end("")

    def _await_nodes(self) -> None:
        """Wait for all sites; where the quorum is there, or the first round waits for it, only a little."""
        began = time.monotonic()
        while (online := len(self._channel.nodes())) < self._channel.expected_sites:
            waited = time.monotonic() - began
            little = online >= self._least or self._channel.sites_may_come_back
            if waited > self._federation.round_timeout or (little and waited > PATIENCE):
                return
            time.sleep(_ARRIVAL)

    def _round(self, number: int) -> None:
        began = time.monotonic()
        outcome, nodes, masking = self._gather(number)
        self._check_quorum(outcome, outcome.asked)
        self.observe(RoundStarted(number, list(outcome.asked)))
        outcome, found = self._ask(number, outcome, nodes, masking)
        self._note_sites(found.scores)
        update, lost = found.step, found.lost
        outcome = self._without_liars(outcome)
        if all(outcome.declined.get(site) in _UNCHARGED for site in outcome.asked):
            lost = ""  # nobody has paid for anything
        entry = {**outcome.entry(adapter_digest(self.adapter)), **_said(found.scores)}
        after, scores = self.adapter, dict[str, float | None]()
        if update is not None:
            after, scores, lost = self._step(number, update, found.noise_std)
        counts = update is not None and not lost
        self._charge(outcome, counts)
        if lost:
            scored = {**found.entry, **_said(found.scores)} if found.scores is not None else {}
            self._lose(outcome, lost, began, scored)
            self._lost_in_a_row += 1
            if self._lost_in_a_row >= _LOST_IN_A_ROW:
                raise QuorumLost(
                    f"round {number}: {lost} {_LOST_IN_A_ROW} rounds in a row were lost. Find out why, then resume."
                )
            return
        if update is None:
            self._record.note("round", entry)
            self._check_quorum(outcome, outcome.answers)
            return
        self._lost_in_a_row = 0
        if not (np.abs(after) <= MAX_START).all():  # nor is NaN
            raise ModelError(
                f"round {number}: the adapter is not finite, or a value is beyond {MAX_START:g}: training diverged. "
                "Lower the learning rates."
            )
        self._finish(
            RoundMetrics(
                round=number,
                private=self.plan.privacy.protects,
                epsilon=self._epsilon(),
                **cast(dict[str, Any], scores),
                answered=sorted(outcome.answers),
                declined=dict(outcome.declined),
                failed=dict(outcome.failed),
                noise_multiplier=found.noise_multiplier,
                without=dict(found.without),
                update_norm=float(np.linalg.norm(update.astype(np.float64))),
                bytes_up=outcome.bytes_up,
                bytes_down=outcome.bytes_down,
                seconds=time.monotonic() - began,
            ),
            {**entry, **found.entry, "counts": True, "adapter_after": adapter_digest(self.adapter)},
        )

    def _ask(
        self, number: int, outcome: RoundOutcome, nodes: list[int], masking: Mapping[str, bytes]
    ) -> tuple[RoundOutcome, _Sum]:
        """Ask the sites for what they compute in an exchange; return the outcome, and what it says together."""
        common = TrainRequest(
            plan=self.plan,
            round=number,
            spec_digest=self._spec.digest,
            head=None,
            begun=self._record.begin_round(number, outcome.asked),
            payload=adapter_vector.encode(self.adapter, "float32"),
        )
        known = self._known_heads()
        requests = _Requests({n: self._site_of_node[n] for n in nodes}, common, masking, known)
        outcome = self._collect(outcome, requests, known)
        return outcome, self._aggregate(common, outcome.answers)

    def _close(self, number: int) -> None:
        """Have the sites score the last adapter, sign for the record as it stands, and open what they guessed.

        What comes of it changes no adapter, so a run whose sites are gone by then is complete without it.
        """
        self.observe(Phase("closing: the sites score the adapter"))
        try:
            outcome, nodes, masking = self._gather(number)
            self._check_quorum(outcome, outcome.asked)
        except QuorumLost as error:
            self._record.note("closing", {**_NO_CLOSING, "lost": str(error), "adapter": adapter_digest(self.adapter)})
            return
        outcome, found = self._ask(number, outcome, nodes, masking)
        outcome = self._without_liars(outcome)
        self._charge(outcome, counts=False)
        self.records[-1] = replace(self.records[-1], epsilon=self._epsilon())
        write_records(self.folder / METRICS, self.records)
        self._note_sites(found.scores)
        body = {key: outcome.entry("")[key] for key in _NO_CLOSING} | dict(found.entry)
        lost = found.lost or ("" if self._enough(outcome.answers) else f"{len(outcome.answers)} answered")
        self._record.note(
            "closing", {**body, "lost": lost, "adapter": adapter_digest(self.adapter), **_said(found.scores)}
        )
        self._save()

    def _note_sites(self, scores: ScoreSum | None) -> None:
        """Add what the sites say of the present adapter to its round, and remember the best."""
        if scores is None:
            return
        said = self._layout.read(scores.total, scores.noise_std, scores.factor).table
        at = len(self.records) - 1
        self.records[at] = replace(self.records[at], at_sites=said)
        write_records(self.folder / METRICS, self.records)
        if self._evaluating is None:  # else it is observed with the held-out score
            self.observe(self.records[at])
        best = next((each.at_sites for each in self.records if each.round == self._best_round), {})
        if self._layout.better(said, best):
            self._best, self._best_round = self.adapter, self.records[at].round

    def _no_better(self) -> bool:
        """Whether so many scores in a row were no better than the best that the plan ends the training."""
        patience = self.plan.evaluation.patience
        since = sum(bool(each.at_sites) and each.round > self._best_round for each in self.records)
        return patience is not None and since >= patience

    @property
    def _closed(self) -> bool:
        """Whether the run was over, with this adapter, before it was resumed."""
        return self._record.closed == adapter_digest(self.adapter)

    @property
    def kept(self) -> tuple[int, NDArray[np.float32]]:
        """The adapter that the run ends with, float32[d], and its round."""
        if self.plan.training.keep == "best" and self._best_round >= 0:
            return self._best_round, self._best
        return self.round, self.adapter

    def _step(
        self, number: int, update: NDArray[np.float32], noise_std: float
    ) -> tuple[NDArray[np.float32], dict[str, float | None], str]:
        """Apply the averaged update float32[d] and return the adapter float32[d].

        With a gate, also its scores, and why the step was taken back, if it was. The limit is a share above the
        lowest loss so far, and not above the last: small steps cannot add up to more.
        """
        gate, before, state = self._federation.gate, self.adapter, self._optimizer.state()
        after = self._optimizer.step(update, (number - 1) / self.plan.training.rounds, noise_std)
        if gate is None:
            return after, {}, ""
        self._note_scores()  # of the round before
        lowest = min(record.loss for record in self.records if record.loss is not None)
        scores = dict(self._evaluation.submit(self._score, after).result())
        loss, limit = cast(float, scores["loss"]), (1 + gate) * lowest  # there is a held-out set: RunConfig
        if loss <= limit:  # nor is NaN
            return after, scores, ""
        self._optimizer = self._optimizer_from(before)
        self._optimizer.restore(state)
        above = f"federation.gate={gate:g} above the lowest so far, {lowest:.4g}"
        return before, {}, f"held-out loss {loss:.4g}, expected {limit:.4g} at most: {above}."

    def _gather(self, number: int) -> tuple[RoundOutcome, list[int], Mapping[str, bytes]]:
        """Return who takes part in a round, by site and by node, and what secure aggregation asks of each site.

        A site that lost its secrets advertises keys anew, and then all share secrets again.
        """
        declined, masking = dict[str, Reason](), cast(Mapping[str, bytes], {})
        for _ in range(_DEALS):
            nodes, refused, failed = self._ready()
            declined |= refused
            names = [self._site_of_node[n] for n in nodes]
            if self._masks is None or number > self.plan.masked_exchanges or not self._enough(names):
                break
            try:
                masking, undealt = self._masks.deal(number, names, self._asker(number))
            except FedllmError as error:
                raise QuorumLost(f"round {number}: no secrets could be shared. {error}") from None
            failed |= undealt
            self._forgotten |= {n for n in nodes if self._site_of_node[n] in undealt}
            nodes = [n for n in nodes if self._site_of_node[n] in masking]
            if self._enough(masking):
                break
        asked = [self._site_of_node[n] for n in nodes]
        return RoundOutcome(number, asked, declined=declined, failed=failed), nodes, masking

    def _collect(self, before: RoundOutcome, requests: "_Requests", known: Mapping[str, LedgerHead]) -> RoundOutcome:
        """Ask the sites for their updates, and return the outcome with what they answered.

        `known` is what was seen of the sites' ledgers before.
        """
        number = before.number
        answers, declined, failed = dict[str, _Answer](), dict(before.declined), dict(before.failed)
        forgetful = set[str]()
        for node, data in self._exchange(requests, "train", number):
            site = self._site_of_node[node]
            try:
                reply = from_bytes(arrived(data), TrainReply, Declined)
                if isinstance(reply, Declined):
                    declined[site] = reply.reason
                    if reply.reason in _FINAL:
                        self._dropped.add(node)
                    if reply.reason == "masks":
                        self._forgotten.add(node)
                else:
                    statement, signer = self._signed(reply, site, number, self._channel.identities(node))
                    self._check_head(statement, known.get(site))
                    if self._forgot(statement):  # to ask again would cost it budget for nothing
                        forgetful.add(site)
                        self._dropped.add(node)
                        raise MessageError(
                            f"epsilon_rdp={statement.epsilon_rdp:.4g}, and {self.sites[site].stated:.4g} before. "
                            "Is its ledger lost?"
                        )
                    update = self._update(
                        reply, site, number
                    )  # the last that can fail: a masked one is in the sum then
                    answers[site] = _Answer(*update, reply.statement, statement, signer.to_text(), len(data))
            except MessageError as error:
                failed[site] = str(error)
            self.observe(SiteAnswered(number, site, site in answers, declined.get(site) or failed.get(site, "")))
        return replace(
            before, answers=answers, declined=declined, failed=failed, forgetful=frozenset(forgetful),
            bytes_down=requests.bytes_made,
        )  # fmt: skip

    def _aggregate(self, common: TrainRequest, answers: Mapping[str, _Answer]) -> _Sum:
        """Return what the answers say together."""
        plan, masks, number = (
            self.plan,
            self._masks if common.round <= self.plan.masked_exchanges else None,
            common.round,
        )
        updates = {site: answer.update for site, answer in answers.items()}
        if not self._enough(updates):
            return _Sum(lost=f"{len(updates)} sites answered, {self._needed}." if masks is not None else "")
        shares = public_weights(updates, self._federation.weights)
        if masks is None:
            scores = [
                ScoreSum(answer.score, plan.score_mechanism.noise_std, 1.0)
                for _, answer in sorted(answers.items())
                if answer.score is not None
            ]
            if number > plan.training.rounds:
                return _Sum(scores=ScoreSum.of(scores))
            plain = cast(Mapping[str, NDArray[np.float32]], updates)
            noise = plan.noise_std(shares.values(), 0) if self._rule.is_mean else 0.0
            return _Sum(
                self._rule.combine(plain, self._federation.weights), noise_std=noise, scores=ScoreSum.of(scores)
            )
        task = common.task(common.payload)
        try:
            if isinstance(masks, Groups):
                together = masks.step(number, task, updates, self._asker(number))
                return _Sum(
                    together.step, noise_multiplier=together.noise_multiplier,
                    without=together.refused | together.closed, scores=together.scores,
                    entry={
                        "noise_multiplier": together.noise_multiplier, "sums": together.trimmed,
                        "refused": together.refused, "closed": together.closed,
                    },
                )  # fmt: skip
            opened = masks.step(number, task, updates, self._asker(number))
        except FedllmError as error:
            return _Sum(lost=str(error))
        entry = {"noise_multiplier": opened.noise_multiplier, "trimmed": opened.trimmed}
        noise = plan.noise_std(shares.values(), opened.trimmed)
        return _Sum(opened.step, "", opened.scores, noise, opened.noise_multiplier, entry=entry)

    def _without_liars(self, outcome: RoundOutcome) -> RoundOutcome:
        """Ask those no more who gave back wrong shares for this round's sum, which is right without these."""
        wrong = {
            site: text for site, text in (self._masks.liars if self._masks else {}).items() if site in outcome.asked
        }
        self._dropped |= {node for node, site in self._site_of_node.items() if site in wrong}
        return replace(outcome, failed={**outcome.failed, **wrong})

    def _enough(self, sites: Collection[str]) -> bool:
        return self.plan.enough(sites, self._quorum)

    @property
    def _needed(self) -> str:
        groups = self.plan.least_groups
        return f"federation.quorum={self._quorum}" + (f" in each of {groups} groups" if self.plan.groups else "")

    def _lose(
        self, outcome: RoundOutcome, why: str, began: float, scored: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """Note a round that is not applied: what the sites paid for it stands, and the adapter stays as it is.

        So does what they said of the adapter that it started from.
        """
        body = {**outcome.entry(adapter_digest(self.adapter)), **scored, "lost": why}
        self._note_scores()  # they are also this round's
        last = self.records[-1]
        record = replace(
            last, round=outcome.number, lost=why, answered=sorted(outcome.answers), declined=dict(outcome.declined),
            failed=dict(outcome.failed), noise_multiplier=None, without={}, update_norm=0.0, bytes_up=outcome.bytes_up,
            bytes_down=outcome.bytes_down, epsilon=self._epsilon(), seconds=time.monotonic() - began, at_sites={},
        )  # fmt: skip
        self._finish(record, body)

    def _epsilon(self) -> float | None:
        """Return the largest epsilon that any site has spent; None if no noise was added."""
        epsilons = [state.epsilon for state in self.sites.values()]
        return max((e for e in epsilons if e is not None), default=0.0) if None not in epsilons else None

    def _asker(self, number: int) -> Ask:
        """Return how secure aggregation reaches sites."""

        def ask(requests: Mapping[str, bytes], enough: int) -> Iterator[tuple[str, bytes | str]]:
            nodes = {node: requests[site] for node, site in self._site_of_node.items() if site in requests}
            for node, data in self._exchange(nodes, "query", number, enough):
                yield self._site_of_node[node], data

        return ask

    def _exchange(
        self, payloads: Mapping[int, bytes], kind: str, number: int, enough: int | None = None
    ) -> Iterator[tuple[int, bytes | str]]:
        """Return what `Channel.exchange` does; scores are noted while nothing comes."""
        for answer in self._channel.exchange(payloads, kind, number, enough):
            if answer is None:
                self._note_scores(wait=False)
            else:
                yield answer

    def _ready(self) -> tuple[list[int], dict[str, Reason], dict[str, str]]:
        """Return the nodes that can take part now, who declined the plan, and what was wrong with others.

        Below the quorum, waits for sites that may come (back), as long as a round may take.
        """
        deadline, pause = time.monotonic() + self._federation.round_timeout, _PAUSE
        declined = dict[str, Reason]()
        while True:
            refused, failed = self._prepare()
            declined |= refused
            online = set(self._channel.nodes())
            here = {n: site for n, site in self._site_of_node.items() if n not in self._dropped}
            nodes = [n for n in here if n in online]
            may_come = self._channel.expected_sites - len(self._dropped) if self._channel.sites_may_come_back else 0
            enough = self._enough([here[n] for n in nodes])
            if enough or may_come < self._least or time.monotonic() > deadline:
                away = {site: "offline or still busy" for n, site in here.items() if n not in online}
                return nodes, declined, failed | away
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE_MAX)

    def _prepare(self) -> tuple[dict[str, Reason], dict[str, str]]:
        """Announce the plan to nodes that have not heard of it, and learn which site is behind each.

        Returns who declined, and which sites or nodes gave no valid answer, and why.
        """
        declined, failed, known = dict[str, Reason](), dict[str, str](), self._channel.nodes()
        for node in self._forgotten:
            self._site_of_node.pop(node, None)
        self._forgotten.clear()
        new = [n for n in known if n not in self._site_of_node and n not in self._dropped]
        question = self._masks.question if self._masks is not None else Prepare(plan=self.plan).to_bytes()
        for node, data in self._exchange(dict.fromkeys(new, question), "query", 0):
            try:
                reply = from_bytes(arrived(data), Ready, Declined)
                if known[node] not in (None, reply.site):
                    raise MessageError(f"claims to be {reply.site}")
                if self._masks is not None and isinstance(reply, Ready):
                    self._masks.join(reply.site, reply.payload)
            except MessageError as error:
                failed[known[node] or f"node {node}"] = f"no valid answer to the plan: {error}"
                continue
            here = [n for n, site in self._site_of_node.items() if site == reply.site and n not in self._dropped]
            if here and set(here) & set(self._channel.nodes()):
                failed[f"node {node}"] = f"claims to be {reply.site}, which is here already"
                self._dropped.add(node)
            elif isinstance(reply, Declined):
                declined[reply.site] = reply.reason
                self._dropped.add(node)
                state = self.sites.get(reply.site, SiteState())
                self.sites[reply.site] = replace(state, declined=state.declined + 1, reason=reply.reason)
            elif reply.plan_digest != self.plan.digest or reply.spec_digest != self._spec.digest:
                failed[reply.site] = "prepared another plan or adapter"
                self._dropped.add(node)
            else:
                for old in here:  # it came back under a new node
                    del self._site_of_node[old]
                self._site_of_node[node] = reply.site
                self.sites.setdefault(reply.site, SiteState())
        return declined, failed

    def _update(
        self, reply: TrainReply, site: str, number: int
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.float64] | None]:
        """Return the update float32[d] and the score, of noise of the site's own; add a masked upload to the others.

        Raises MessageError if it is none of the plan.
        """
        plan, payload, score = self.plan, reply.payload, None
        if self._masks is not None and number <= plan.masked_exchanges:
            self._masks.read(site, number, *unpack(payload, 2))
            return None, None
        if plan.score_noise(number) is not None:
            payload, said = unpack(payload, 2)
            if len(said) != 8 * self._layout.dimension:
                raise MessageError(f"a score of {len(said)} bytes, expected {8 * self._layout.dimension}")
            score = np.frombuffer(said, "<f8").astype(np.float64)
            bound_of_score(plan).check(score)
        if number > plan.training.rounds:
            if payload:
                raise MessageError(f"{len(payload)} bytes of an update in the closing exchange, expected none")
            return None, score
        update = adapter_vector.decode(payload, plan.training.wire, self._spec.dimension)
        if self._bound is not None:
            self._bound.check(update)
        return update, score

    def _known_heads(self) -> dict[str, LedgerHead]:
        """Return the last that is known of the sites' ledgers, in any run."""
        known = self._heads.read() if self._heads is not None else {}
        for site, state in self.sites.items():
            if state.head_number > (known[site].number if site in known else -1):
                known[site] = LedgerHead(state.head_number, state.head_digest)
        return known

    def _signed(
        self, reply: TrainReply, site: str, number: int, signers: tuple[PublicIdentity, ...] | None
    ) -> tuple[Statement, PublicIdentity]:
        """Return what a site signed, and who did; raises MessageError if it is not on this update in this round.

        `signers` may sign for the site; if they are not known, the first signer goes on signing.
        """
        try:
            statement, signer = open_statement(reply.statement)
        except CryptoError as error:
            raise MessageError(f"statement: {error}") from None
        if signers is None:
            before = self.sites[site].identity
            signers = (PublicIdentity.from_text(before),) if before else (signer,)
        if signer not in signers:
            raise MessageError(f"statement: signed by {signer.fingerprint}, who may not sign for {site}")
        expected: dict[str, object] = {
            "site": site,
            "run": self.plan.run,
            "plan": self.plan.digest,
            "round": number,
            "delta": self.plan.privacy.delta,
            "update": update_digest(reply.payload),
            "adapter": adapter_digest(self.adapter),
        }
        for name, value in expected.items():
            if getattr(statement, name) != value:
                raise MessageError(f"statement: {name}={getattr(statement, name)}, expected {value}")
        if self.plan.mechanism.private and None in (statement.epsilon, statement.epsilon_rdp):
            raise MessageError("statement: epsilon is missing, though the plan adds noise")
        said = {(begun.roster, begun.number, begun.digest) for begun in self._record.began(number)}
        if (statement.roster, statement.record_number, statement.record_digest) not in said:
            raise MessageError(
                f"statement: entry {statement.record_number} of the run record, which begins no round {number}"
            )
        return statement, signer

    def _check_head(self, statement: Statement, known: LedgerHead | None) -> None:
        """Raise MessageError if a site's ledger lacks entries that it signed for before, in any run."""
        before, head = self.sites[statement.site], (statement.ledger_number, statement.ledger_digest)
        if head[0] <= before.head_number and head != (before.head_number, before.head_digest):
            raise MessageError(f"statement: {_went_back(head[0], before.head_number)}")
        if known is not None and statement.round > self._repeated and head[0] <= known.number:
            raise MessageError(f"statement: {_went_back(head[0], known.number)}")

    def _forgot(self, statement: Statement) -> bool:
        """Whether a site states less epsilon than before; a round that is repeated may be answered as it was then."""
        before, private = self.sites[statement.site], self.plan.mechanism.private
        less = (statement.epsilon_rdp or 0.0) < before.stated - 1e-9
        return private and less and statement.round > before.last_charged

    def _charge(self, outcome: RoundOutcome, counts: bool) -> None:
        """Note what the sites spent; a round that does not count was paid for all the same, and may be repeated."""
        number, declined = outcome.number, outcome.declined
        for site, before in self.sites.items():
            state = before
            if site in outcome.answers:
                answer = outcome.answers[site]
                said, head = answer.statement, answer.head
                state = replace(
                    state, epsilon=said.epsilon, epsilon_rdp=said.epsilon_rdp, stated=said.epsilon_rdp or 0.0,
                    reason="", identity=answer.signer, head_number=head.number, head_digest=head.digest,
                )  # fmt: skip
                if counts:
                    state = replace(state, rounds=state.rounds + 1, bytes_up=state.bytes_up + answer.size)
            elif site in outcome.failed:
                state = replace(state, failed=state.failed + 1)
            elif site in declined:
                state = replace(state, declined=state.declined + 1, reason=declined[site])
            trains = number <= self.plan.training.rounds
            may_have_paid = trains and site in outcome.asked and declined.get(site) not in _UNCHARGED
            if may_have_paid and number > state.last_charged:
                state = replace(state, charged=state.charged + 1, last_charged=number)
            state = self._at_least_charged(state)
            if site in outcome.forgetful:  # after a resume it is used again only if it can account for all of it
                state = replace(state, stated=state.epsilon_rdp or 0.0)
            self.sites[site] = state
        if self._heads is not None:
            self._heads.note({site: answer.head for site, answer in outcome.answers.items()})

    def _at_least_charged(self, state: SiteState) -> SiteState:
        """Raise a site's epsilon to what the rounds that it may have paid for cost: an answer can get lost."""
        if not self.plan.mechanism.private or not state.charged or state.epsilon is None:
            return replace(state, epsilon=None, epsilon_rdp=None) if state.charged else state
        event = self.plan.mechanism.event(state.charged * self.plan.training.local_steps)
        least = spent([event], self.plan.privacy.delta)
        rdp = max(state.epsilon_rdp or 0.0, least.epsilon_rdp)
        return replace(state, epsilon=max(state.epsilon, least.epsilon), epsilon_rdp=rdp)

    def _check_quorum(self, outcome: RoundOutcome, sites: Collection[str]) -> None:
        if self._enough(sites):
            return
        reasons = [f"{site} declined ({reason})" for site, reason in sorted(outcome.declined.items())]
        reasons += [f"{site}: {what}" for site, what in sorted(outcome.failed.items())]
        earlier = {site: state.reason for site, state in self.sites.items() if state.reason}
        reasons += [f"{site} declined ({reason})" for site, reason in earlier.items() if site not in outcome.declined]
        hint = f" {_LEDGER_HINT}" if "ledger" in {*outcome.declined.values(), *earlier.values()} else ""
        raise QuorumLost(
            f"round {outcome.number}: {len(sites)} sites, {self._needed}. "
            f"{'; '.join(reasons) or 'no site answered'}. The adapter of round {self.round} is kept.{hint}"
        )

    def _finish(self, record: RoundMetrics, entry: dict[str, Any] | None = None) -> None:
        """Make the round durable: metrics and run record first, so that a checkpoint never runs ahead of them."""
        self._note_scores()
        self.records.append(record)
        write_records(self.folder / METRICS, self.records)
        if entry is not None:
            self._record.note("round", entry)
        self._save()
        if record.lost or record.loss is not None:
            self.observe(record)
        else:
            self._evaluate()

    def _evaluate(self) -> None:
        """Begin to evaluate the adapter of the last round."""
        self._evaluating = (len(self.records) - 1, self._evaluation.submit(self._score, self.adapter))

    def _note_scores(self, wait: bool = True) -> None:
        """Add what the evaluation under way has found to its round, which is then over for those who observe it."""
        if self._evaluating is None or not (wait or self._evaluating[1].done()):
            return
        (at, scores), self._evaluating = self._evaluating, None
        self.records[at] = replace(self.records[at], **cast(dict[str, Any], scores.result()))
        write_records(self.folder / METRICS, self.records)
        self.observe(self.records[at])

    def _note_end(self, stopped: str) -> None:
        kept, adapter = self.kept
        body = {"round": self.round, "stopped": stopped, "adapter": adapter_digest(self.adapter)}
        if kept != self.round:
            body |= {"kept": kept, "kept_adapter": adapter_digest(adapter)}
        self._record.note("end", body)

    def _save(self) -> None:
        state = Checkpoint(
            self.round, self.plan.digest, self.adapter, self._optimizer.state(), self.sites,
            self._best if self._best_round >= 0 else None, self._best_round,
        )  # fmt: skip
        save_checkpoint(self.folder / CHECKPOINT, state)


class _Requests(Mapping[int, bytes]):
    """The requests of a round by node, each made when it is looked up: all at once they are a copy of the adapter each.

    `sites` names them by node; `common` is what they all are asked for; `masking` what secure aggregation asks of each
    site, empty if there is none; `known` what was seen of the sites' ledgers.
    """

    def __init__(
        self, sites: Mapping[int, str], common: TrainRequest, masking: Mapping[str, bytes],
        known: Mapping[str, LedgerHead],
    ) -> None:  # fmt: skip
        self._sites, self._common, self._masking, self._known = sites, common, masking, known
        self._sizes: dict[int, int] = {}

    def __getitem__(self, node: int) -> bytes:
        site, payload = self._sites[node], self._common.payload
        update = {
            "head": self._known.get(site),
            "payload": pack(payload, self._masking[site]) if self._masking else payload,
        }
        request = self._common.model_copy(update=update).to_bytes()
        self._sizes[node] = len(request)
        return request

    def __iter__(self) -> Iterator[int]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    @property
    def bytes_made(self) -> int:
        """The size of those that were made, together."""
        return sum(self._sizes.values())


_NO_CLOSING: Mapping[str, Any] = MappingProxyType({"answered": {}, "declined": {}, "failed": {}})


def _said(scores: ScoreSum | None) -> dict[str, Any]:
    """Return what the record says of scores."""
    if scores is None:
        return {}
    total = [float(each) for each in scores.total]
    return {"scores": {"total": total, "noise_std": scores.noise_std, "factor": scores.factor}}


def _went_back(now: int, before: int) -> str:
    return f"its ledger stands at entry {now}, and stood at {before} before. Was it restored from an old backup?"
