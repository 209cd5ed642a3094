"""The round loop: ask, wait, check, average, step, evaluate, checkpoint."""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedllm import codec
from fedllm.crypto import PublicIdentity
from fedllm.delta import AdapterSpec
from fedllm.errors import CheckpointError, CryptoError, FedllmError, MessageError, ModelError, QuorumLost
from fedllm.messages import (
    KEY,
    RECORD,
    Declined,
    LedgerHead,
    Masked,
    Prepare,
    Ready,
    Reason,
    TrainReply,
    TrainRequest,
    from_bytes,
    pack,
    unpack,
)
from fedllm.plan import MAX_START, QuorumConfig, RunPlan
from fedllm.privacy.accounting import spent
from fedllm.statement import open_statement, update_digest
from server.aggregate import bound_of_update, public_shares, weighted_mean
from server.channel import Channel, PlainChannel, arrived
from server.checkpoint import Checkpoint, SiteState, load_checkpoint, save_checkpoint, write_atomically
from server.heads import Heads
from server.masks import Ask, Groups, Masks
from server.record import RunRecord, adapter_digest

if TYPE_CHECKING:
    from fedllm.training.server_optimizer import ServerOptimizer

CHECKPOINT, METRICS, PLAN = "checkpoint.safetensors", "metrics.jsonl", "plan.json"

# After these a site is not asked again in this run; after the others it may do better next time.
_FINAL: frozenset[Reason] = frozenset({"budget", "policy", "data", "model", "ledger"})
# These come before the site charges itself.
_UNCHARGED: frozenset[Reason] = frozenset({"budget", "policy", "model", "message", "ledger", "masks"})
_LEDGER_HINT = "(ledger): cannot be used, or lacks entries that were seen before; the site's own log says what to do."
_POLL, _POLL_MAX = 0.005, 0.05  # seconds between looks at the transport's inbox
_ARRIVAL = 0.5  # seconds between looks who has come
_PATIENCE = 15.0  # seconds for latecomers at the start of a run, where the quorum is there
_DEALS = 3  # attempts to have a round's secrets dealt
_LOST_IN_A_ROW = 3  # rounds that were paid for and not applied, after which the run ends
_PAUSE_MAX = 5.0  # seconds between looks for sites that may come back


@dataclass(frozen=True)
class RoundRecord:
    """What one round did; everything in it is public. Round 0 is the base model."""

    round: int
    private: bool  # False brands the run NOT PRIVATE: no noise, or noise that a seed predicts
    epsilon: float | None  # the largest any site has spent so far; None where no noise was added
    loss: float | None = None  # held-out, nats; None without a held-out set
    perplexity: float | None = None
    accuracy: float | None = None
    answered: list[str] = field(default_factory=list)
    declined: dict[str, Reason] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # site or node -> what was wrong
    # noise in shares: of this round's sum, or of that of its groups which has the least; colluding sites left out
    noise_multiplier: float | None = None
    without: dict[str, str] = field(default_factory=dict)  # group, from 1, whose sum was not used -> why
    lost: str = ""  # why the round was not applied, though the sites have paid for it: closed sum, bound or gate
    update_norm: float = 0.0  # L2 of the averaged delta
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    clipped: float | None = None  # share of (some) held-out records whose gradient is longer than clip_norm


@dataclass(frozen=True)
class SiteAnswered:
    """A site's answer to the current round has come in."""

    round: int
    site: str
    used: bool
    detail: str = ""


@dataclass(frozen=True)
class RoundStarted:
    """A round begins with these sites."""

    round: int
    sites: list[str]


@dataclass(frozen=True)
class Phase:
    """What is being done outside the rounds, in words for whoever watches."""

    text: str


@dataclass(frozen=True)
class _Answer:
    """A site's update, its statement checked."""

    reply: TrainReply
    size: int  # bytes of the whole message
    signer: str
    head_number: int  # of the site's ledger
    head_digest: str


@dataclass(frozen=True)
class _Sum:
    """What the updates of a round say together."""

    step: NDArray[np.float32] | None = None  # [d]; None where they are too few, or their sum stays closed
    lost: str = ""  # why the sum stays closed
    noise_std: float = 0.0  # of the step, where it is known
    noise_multiplier: float | None = None
    without: Mapping[str, str] = field(default_factory=dict)
    entry: Mapping[str, Any] = field(default_factory=dict)  # what the record says of the sum


Event = Phase | RoundStarted | SiteAnswered | RoundRecord
Score = Callable[[NDArray[np.float32]], Mapping[str, float | None]]


class Coordinator:
    """Runs one plan over a Flower grid, from the start or from its last checkpoint."""

    def __init__(
        self,
        plan: RunPlan,
        federation: QuorumConfig,
        spec: AdapterSpec,
        start: NDArray[np.float32],
        folder: Path,
        score: Score,
        observe: Callable[[Event], None],
        expected_sites: int,
        record: RunRecord,
        heads: Heads | None = None,
        roster: Mapping[str, PublicIdentity] | None = None,
    ) -> None:
        """`score` evaluates an adapter float32[d] on public data; `folder` receives checkpoints and metrics.

        `heads` holds what was seen of the sites' ledgers in other runs; None where they have ledgers for this run only.
        `roster` names the sites that may take part where their noise comes in shares.
        """
        self._plan, self._federation, self._spec = plan, federation, spec
        self._quorum = max(plan.quorum, federation.quorum or 1)  # with groups, of each
        self._folder, self._score, self._observe = folder, score, observe
        self._expected_sites, self._record, self._heads = expected_sites, record, heads
        self._known: dict[str, LedgerHead] = {}  # of the sites' ledgers, when the round began
        self._begun: dict[int, set[str]] = {}  # with noise in shares: who may have paid for which rounds
        self._lost_in_a_row = 0
        self._repeated = 0  # up to this round, a site may answer as it did before a crash
        self._optimizer = self._optimizer_from(start)
        self.sites: dict[str, SiteState] = {}
        self.records: list[RoundRecord] = []
        self._site_of_node: dict[int, str] = {}
        self._dropped: set[int] = set()
        self._forgetful: set[str] = set()  # sites that stated less than before in the present round
        self._forgotten: set[int] = set()  # nodes whose sites lost their secrets, and are to join anew
        self._evaluating: tuple[int, Future[Mapping[str, float | None]]] | None = None  # of records[that]
        shared = plan.shared
        kind = Groups if plan.groups else Masks
        self._masks = kind(plan, shared, spec.dimension, roster or {}) if shared is not None else None
        self._bound = bound_of_update(plan, spec.dimension)

    def _optimizer_from(self, value: NDArray[np.float32]) -> "ServerOptimizer":
        from fedllm.training.server_optimizer import ServerOptimizer  # torch: not for those who only read records

        return ServerOptimizer(self._plan.training.server, value)

    @property
    def _least(self) -> int:
        """Sites without which no round can count."""
        return self._quorum * self._plan.least_groups

    @property
    def round(self) -> int:
        """The last completed round."""
        return self.records[-1].round if self.records else -1

    @property
    def adapter(self) -> NDArray[np.float32]:
        """The global adapter after the last completed round, float32[d]."""
        return self._optimizer.value

    def resume(self) -> None:
        """Continue from the folder's checkpoint; raises CheckpointError where it belongs to another plan."""
        checkpoint = load_checkpoint(self._folder / CHECKPOINT)
        if checkpoint.plan_digest != self._plan.digest:
            raise CheckpointError(f"the checkpoint in {self._folder} belongs to another plan")
        self._spec.check(checkpoint.adapter)
        self._optimizer = self._optimizer_from(checkpoint.adapter)
        self._optimizer.restore(checkpoint.optimizer)
        self.sites = dict(checkpoint.sites)
        self.records = [r for r in _read_records(self._folder / METRICS) if r.round <= checkpoint.round]
        if self.round != checkpoint.round:
            raise CheckpointError(
                f"{self._folder / METRICS} does not reach round {checkpoint.round} of the checkpoint. Restore it from "
                "a backup, or start a new run."
            )
        _write_records(self._folder / METRICS, self.records)
        begun = self._record.resume(self._plan, self.round, self.adapter)
        self._begun = begun if self._masks is not None else {}
        self._repeated = self.round + 2  # the round that was under way, and one more after a damaged checkpoint

    def run(self, grid: Grid, channel: Channel | None = None) -> None:
        """Run all rounds that are left; without a `channel`, bytes travel as they are and every node is welcome.

        A round's adapter is evaluated beside the next round, or with a gate (`federation.gate`) before it counts.
        Raises QuorumLost, after everything so far is on disk, where too few sites are left to go on.
        """
        self._evaluation = ThreadPoolExecutor(1, "evaluation")
        try:
            self._run(grid, channel or PlainChannel(grid))
        finally:  # whoever tells a run to end does not wait for an evaluation
            self._evaluation.shutdown(wait=False, cancel_futures=True)

    def _run(self, grid: Grid, channel: Channel) -> None:
        if not self.records:
            epsilon = 0.0 if self._plan.mechanism.private else None
            self._record.begin(self._plan, self._spec.digest, self.adapter)
            self._finish(RoundRecord(0, self._plan.privacy.protects, epsilon))
        elif self.records[-1].loss is None:  # it ended before this was known
            self._evaluate()
        self._observe(Phase("waiting for the sites"))
        self._await_nodes(channel)
        try:
            for number in range(self.round + 1, max(self._begun, default=0) + 1):
                # sites may have paid for it, and have forgotten the secrets that it was masked with
                asked = self._begun.get(number, set())
                for site in asked:  # in the first round there is no checkpoint yet that names them
                    self.sites.setdefault(site, SiteState())
                self._charge({}, {}, {}, number, asked, False)
                self._lose(number, "head office was started again", {}, {}, {}, time.monotonic())
            for number in range(self.round + 1, self._plan.training.rounds + 1):
                self._round(grid, channel, number)
        except QuorumLost as error:
            self._note_scores()
            self._note_end(str(error))
            self._save()  # what the sites spent in the unfinished round is part of the record
            raise
        self._note_scores()
        self._note_end("")

    def _await_nodes(self, channel: Channel) -> None:
        """Wait for all sites; where the quorum is there, or the first round waits for it, only a little."""
        began = time.monotonic()
        while (online := len(channel.nodes())) < self._expected_sites:
            waited = time.monotonic() - began
            little = online >= self._least or channel.sites_may_come_back
            if waited > self._federation.round_timeout or (little and waited > _PATIENCE):
                return
            time.sleep(_ARRIVAL)

    def _round(self, grid: Grid, channel: Channel, number: int) -> None:
        began = time.monotonic()
        declined: dict[str, Reason] = {}
        failed: dict[str, str] = {}
        nodes, masking = self._gather(grid, channel, number, declined, failed)
        asked = [self._site_of_node[n] for n in nodes]
        self._check_quorum(number, asked, declined, failed)
        self._observe(RoundStarted(number, asked))
        common = TrainRequest(
            plan=self._plan, round=number, spec_digest=self._spec.digest, head=None,
            begun=self._record.begin_round(number, asked), payload=codec.encode(self.adapter, "float32"),
        )  # fmt: skip
        requests = self._requests(nodes, common, masking)
        updates, replies = self._collect(grid, channel, number, requests, declined, failed)
        found = self._aggregate(grid, channel, common, updates)
        delta, lost = found.step, found.lost
        if all(declined.get(site) in _UNCHARGED for site in asked):
            lost = ""  # nobody has paid for anything
        before, after, scores = adapter_digest(self.adapter), self.adapter, dict[str, float | None]()
        if delta is not None:
            after, scores, lost = self._step(number, delta, found.noise_std)
        counts = delta is not None and not lost
        self._charge(replies, declined, failed, number, set(asked), counts)
        for site in self._forgetful:  # after a resume it is used again only if it can account for all it may have paid
            self.sites[site] = replace(self.sites[site], stated=self.sites[site].epsilon_rdp or 0.0)
        self._forgetful.clear()
        entry: dict[str, Any] = {
            "round": number,
            "counts": counts,
            "answered": {site: answer.reply.statement for site, answer in sorted(replies.items())},
            "declined": dict(declined),
            "failed": dict(failed),
            "adapter_before": before,
            "adapter_after": before,
            "bytes_up": sum(answer.size for answer in replies.values()),
            "bytes_down": sum(map(len, requests.values())),
        }
        if counts and found.noise_multiplier is not None:
            entry |= {"noise_multiplier": found.noise_multiplier, **found.entry}
        if lost:
            self._lose(number, lost, entry, declined, failed, began)
            self._lost_in_a_row += 1
            if self._lost_in_a_row >= _LOST_IN_A_ROW:
                raise QuorumLost(
                    f"round {number}: {lost} {_LOST_IN_A_ROW} rounds in a row were lost. Find out why, then resume."
                )
            return
        if delta is None:
            self._record.note("round", entry)
            self._check_quorum(number, updates, declined, failed)
            return
        self._lost_in_a_row = 0
        if not (np.abs(after) <= MAX_START).all():  # nor is NaN
            raise ModelError(
                f"round {number}: the adapter is not finite, or a value is beyond {MAX_START:g}: training diverged. "
                "Lower the learning rates."
            )
        self._finish(
            RoundRecord(
                round=number,
                private=self._plan.privacy.protects,
                epsilon=self._epsilon(),
                **cast(dict[str, Any], scores),
                answered=sorted(updates),
                declined=declined,
                failed=failed,
                noise_multiplier=found.noise_multiplier,
                without=dict(found.without),
                update_norm=float(np.linalg.norm(delta.astype(np.float64))),
                bytes_up=sum(answer.size for answer in replies.values()),
                bytes_down=sum(map(len, requests.values())),
                seconds=time.monotonic() - began,
            ),
            {**entry, "adapter_after": adapter_digest(self.adapter)},
        )

    def _step(
        self, number: int, delta: NDArray[np.float32], noise_std: float
    ) -> tuple[NDArray[np.float32], dict[str, float | None], str]:
        """Apply the averaged delta float32[d] and return the adapter float32[d].

        With a gate, also its scores, and why the step was taken back where it was. The limit is a share above the
        lowest loss so far, and not above the last: small steps cannot add up to more.
        """
        gate, before, state = self._federation.gate, self.adapter, self._optimizer.state()
        after = self._optimizer.step(delta, (number - 1) / self._plan.training.rounds, noise_std)
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

    def _gather(
        self, grid: Grid, channel: Channel, number: int, declined: dict[str, Reason], failed: dict[str, str]
    ) -> tuple[list[int], dict[str, bytes]]:
        """Return the nodes that take part in a round, and what secure aggregation asks of each of their sites.

        A site that lost its secrets joins anew, and then all deal again.
        """
        nodes, masking = list[int](), dict[str, bytes]()
        for _ in range(_DEALS):
            failed.clear()
            nodes, online = self._ready(grid, channel, declined, failed)
            for node, site in self._site_of_node.items():
                if node not in online and node not in self._dropped:
                    failed[site] = "offline or still busy"
            names = [self._site_of_node[n] for n in nodes]
            if self._masks is None or not self._enough(names):
                return nodes, {}
            try:
                masking, undealt = self._masks.deal(number, names, self._asker(grid, channel, number))
            except FedllmError as error:
                raise QuorumLost(f"round {number}: no secrets could be dealt. {error}") from None
            failed.update(undealt)
            self._forgotten |= {n for n in nodes if self._site_of_node[n] in undealt}
            nodes = [n for n in nodes if self._site_of_node[n] in masking]
            if self._enough(masking):
                break
        return nodes, masking

    def _collect(
        self, grid: Grid, channel: Channel, number: int, requests: Mapping[int, bytes],
        declined: dict[str, Reason], failed: dict[str, str],
    ) -> tuple[dict[str, NDArray[np.float32] | Masked], dict[str, _Answer]]:  # fmt: skip
        """Ask the sites for their updates, and return those that can be used, by site."""
        updates: dict[str, NDArray[np.float32] | Masked] = {}
        replies: dict[str, _Answer] = {}
        for node, data in self._exchange(grid, channel, requests, "train", number):
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
                    update = self._check(reply, site, number)
                    answer = self._check_statement(reply, self.sites[site], channel.identities(node), len(data))
                    if self._forgot(reply, site, number):  # to ask again would cost it budget for nothing
                        self._forgetful.add(site)
                        self._dropped.add(node)
                        raise MessageError(
                            f"epsilon_rdp={reply.epsilon_rdp:.4g}, and {self.sites[site].stated:.4g} before. "
                            "Is its ledger lost?"
                        )
                    updates[site], replies[site] = update, answer
            except MessageError as error:
                failed[site] = str(error)
            self._observe(SiteAnswered(number, site, site in updates, declined.get(site) or failed.get(site, "")))
        return updates, replies

    def _aggregate(
        self, grid: Grid, channel: Channel, common: TrainRequest, updates: Mapping[str, NDArray[np.float32] | Masked]
    ) -> _Sum:
        """Return what the updates say together."""
        plan, masks, number = self._plan, self._masks, common.round
        if not self._enough(updates):
            return _Sum(lost=f"{len(updates)} sites answered, {self._needed}." if masks is not None else "")
        shares = public_shares(updates, self._federation.weights)
        if masks is None:
            plain = cast(Mapping[str, NDArray[np.float32]], updates)
            return _Sum(weighted_mean(plain, self._federation.weights), noise_std=plan.noise_std(shares.values(), 0))
        uploads, task = cast(Mapping[str, Masked], updates), common.task(common.payload)
        try:
            if isinstance(masks, Groups):
                together = masks.step(number, task, uploads, self._asker(grid, channel, number))
                return _Sum(
                    together.step, noise_multiplier=together.noise_multiplier,
                    without=together.refused | together.closed,
                    entry={"sums": together.trimmed, "refused": together.refused, "closed": together.closed},
                )  # fmt: skip
            step, trimmed = masks.step(number, task, uploads, self._asker(grid, channel, number))
        except FedllmError as error:
            return _Sum(lost=str(error))
        noise = masks.noise_multiplier(len(uploads), trimmed)
        return _Sum(step, "", plan.noise_std(shares.values(), trimmed), noise, entry={"trimmed": trimmed})

    def _enough(self, sites: Collection[str]) -> bool:
        return self._plan.enough(sites, self._quorum)

    @property
    def _needed(self) -> str:
        groups = self._plan.least_groups
        return f"federation.quorum={self._quorum}" + (f" in each of {groups} groups" if self._plan.groups else "")

    def _lose(
        self, number: int, why: str, entry: Mapping[str, Any], declined: dict[str, Reason], failed: dict[str, str],
        began: float,
    ) -> None:  # fmt: skip
        """Note a round that is not applied: what the sites paid for it stands, and the adapter stays as it is."""
        digest = adapter_digest(self.adapter)
        nothing = {
            "round": number, "answered": {}, "declined": {}, "failed": {}, "bytes_up": 0, "bytes_down": 0,
            "adapter_before": digest, "adapter_after": digest,
        }  # fmt: skip
        body = {**nothing, **entry, "counts": False, "lost": why}
        self._note_scores()  # they are also this round's
        last = self.records[-1]
        record = replace(
            last, round=number, lost=why, answered=sorted(body["answered"]), declined=declined, failed=failed,
            noise_multiplier=None, without={}, update_norm=0.0, bytes_up=body["bytes_up"],
            bytes_down=body["bytes_down"], epsilon=self._epsilon(), seconds=time.monotonic() - began,
        )  # fmt: skip
        self._finish(record, body)

    def _epsilon(self) -> float | None:
        """Return the largest epsilon that any site has spent; None where no noise was added."""
        epsilons = [state.epsilon for state in self.sites.values()]
        return max((e for e in epsilons if e is not None), default=0.0) if None not in epsilons else None

    def _asker(self, grid: Grid, channel: Channel, number: int) -> Ask:
        """Return how secure aggregation reaches sites."""

        def ask(requests: Mapping[str, bytes], enough: int) -> Iterator[tuple[str, bytes | str]]:
            nodes = {node: requests[site] for node, site in self._site_of_node.items() if site in requests}
            for node, data in self._exchange(grid, channel, nodes, "query", number, enough):
                yield self._site_of_node[node], data

        return ask

    def _ready(
        self, grid: Grid, channel: Channel, declined: dict[str, Reason], failed: dict[str, str]
    ) -> tuple[list[int], set[int]]:
        """Return the nodes that can take part now, and all that are online.

        Below the quorum, waits for sites that may come (back), as long as a round may take.
        """
        deadline, pause = time.monotonic() + self._federation.round_timeout, _POLL
        while True:
            self._prepare(grid, channel, declined, failed)
            online = set(channel.nodes())
            nodes = [n for n in self._site_of_node if n in online and n not in self._dropped]
            may_come = self._expected_sites - len(self._dropped) if channel.sites_may_come_back else 0
            enough = self._enough([self._site_of_node[n] for n in nodes])
            if enough or may_come < self._least or time.monotonic() > deadline:
                return nodes, online
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE_MAX)
            failed.clear()

    def _prepare(self, grid: Grid, channel: Channel, declined: dict[str, Reason], failed: dict[str, str]) -> None:
        """Announce the plan to nodes that have not heard of it, and learn which site is behind each."""
        known = channel.nodes()
        for node in self._forgotten:
            self._site_of_node.pop(node, None)
        self._forgotten.clear()
        new = [n for n in known if n not in self._site_of_node and n not in self._dropped]
        question = self._masks.question if self._masks is not None else Prepare(plan=self._plan).to_bytes()
        for node, data in self._exchange(grid, channel, dict.fromkeys(new, question), "query", 0):
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
            if here and set(here) & set(channel.nodes()):
                failed[f"node {node}"] = f"claims to be {reply.site}, which is here already"
                self._dropped.add(node)
            elif isinstance(reply, Declined):
                declined[reply.site] = reply.reason
                self._dropped.add(node)
                state = self.sites.get(reply.site, SiteState())
                self.sites[reply.site] = replace(state, declined=state.declined + 1, reason=reply.reason)
            elif reply.plan_digest != self._plan.digest or reply.spec_digest != self._spec.digest:
                failed[reply.site] = "prepared another plan or adapter"
                self._dropped.add(node)
            else:
                for old in here:  # it came back under a new node
                    del self._site_of_node[old]
                self._site_of_node[node] = reply.site
                self.sites.setdefault(reply.site, SiteState())

    def _exchange(
        self, grid: Grid, channel: Channel, payloads: Mapping[int, bytes], message_type: str, round_: int,
        enough: int | None = None,
    ) -> Iterator[tuple[int, bytes | str]]:  # fmt: skip
        """Send every node its payload and yield (node, answer) as answers come in; text says why there is none.

        Once `enough` have answered, the others have little time left.
        """
        timeout = self._federation.round_timeout
        waiting: dict[str, int] = {}
        for node, payload in payloads.items():
            content = RecordDict({RECORD: ConfigRecord({KEY: channel.seal(node, round_, payload)})})
            waiting.update(dict.fromkeys(grid.push_messages([Message(content, node, message_type, ttl=timeout)]), node))
        deadline, pause = time.monotonic() + timeout, _POLL
        answered = set()
        while waiting and time.monotonic() < deadline:
            self._note_scores(wait=False)
            replies = list(grid.pull_messages(list(waiting)))
            for reply in replies:
                node = waiting.pop(reply.metadata.reply_to_message_id)
                answered.add(node)
                if len(answered) == enough:
                    deadline = min(deadline, time.monotonic() + _PATIENCE)
                yield node, "a fault at the site" if reply.has_error() else _open(channel, node, reply.content)
            pause = _POLL if replies else min(1.5 * pause, _POLL_MAX)
            time.sleep(pause if waiting else 0)
        for node in payloads:
            if node not in answered:
                yield node, "no answer in time"

    def _check(self, reply: TrainReply, site: str, number: int) -> NDArray[np.float32] | Masked:
        """Return the update float32[d] or the masked upload; raises MessageError where it is not to this round."""
        expected: dict[str, object] = {
            "site": site,
            "plan_digest": self._plan.digest,
            "round": number,
            "spec_digest": self._spec.digest,
            "dtype": self._plan.training.wire if self._masks is None else "uint32",
            "delta": self._plan.privacy.delta,
        }
        for name, value in expected.items():
            if getattr(reply, name) != value:
                raise MessageError(f"{name}={getattr(reply, name)}, expected {value}")
        if self._plan.mechanism.private and (reply.epsilon is None or reply.epsilon_rdp is None):
            raise MessageError("epsilon is missing, though the plan adds noise")
        if self._masks is not None:
            return self._masks.read(site, number, *unpack(reply.payload, 2))
        update = codec.decode(reply.payload, self._plan.training.wire, self._spec.dimension)
        if self._bound is not None:
            self._bound.check(update)
        return update

    def _requests(self, nodes: list[int], common: TrainRequest, masking: Mapping[str, bytes]) -> dict[int, bytes]:
        """Return the request of a round to each node, with the last that is known of its site's ledger, in any run.

        `common` is what they all are asked for; `masking` what secure aggregation asks of each site, empty where there
        is none.
        """
        self._known = self._heads.read() if self._heads is not None else {}
        for site, state in self.sites.items():
            if state.head_number > (self._known[site].number if site in self._known else -1):
                self._known[site] = LedgerHead(number=state.head_number, digest=state.head_digest)
        return {
            node: common.model_copy(
                update={
                    "head": self._known.get(site := self._site_of_node[node]),
                    "payload": pack(common.payload, masking[site]) if masking else common.payload,
                }
            ).to_bytes()
            for node in nodes
        }

    def _check_statement(
        self, reply: TrainReply, before: SiteState, signers: tuple[PublicIdentity, ...] | None, size: int
    ) -> _Answer:
        """Check what the site signed against its reply and its past; raises MessageError.

        `signers` may sign for the site; where they are not known, whoever signed first goes on signing.
        """
        try:
            statement, signer = open_statement(reply.statement)
        except CryptoError as error:
            raise MessageError(f"statement: {error}") from None
        if signers is None:
            signers = (PublicIdentity.from_text(before.identity),) if before.identity else (signer,)
        if signer not in signers:
            raise MessageError(f"statement: signed by {signer.fingerprint}, who may not sign for {reply.site}")
        expected: dict[str, object] = {
            "site": reply.site,
            "run": self._plan.run,
            "plan": reply.plan_digest,
            "round": reply.round,
            "epsilon": reply.epsilon,
            "epsilon_rdp": reply.epsilon_rdp,
            "delta": reply.delta,
            "update": update_digest(reply.payload),
        }
        for name, value in expected.items():
            if getattr(statement, name) != value:
                raise MessageError(f"statement: {name}={getattr(statement, name)}, and the reply says {value}")
        said = {(begun.roster, begun.number, begun.digest) for begun in self._record.began(reply.round)}
        if (statement.roster, statement.record_number, statement.record_digest) not in said:
            raise MessageError(
                f"statement: entry {statement.record_number} of the run record, which begins no round {reply.round}"
            )
        head = (statement.ledger_number, statement.ledger_digest)
        if head[0] <= before.head_number and head != (before.head_number, before.head_digest):
            raise MessageError(f"statement: {_went_back(head[0], before.head_number)}")
        known = self._known.get(reply.site)
        if known is not None and reply.round > self._repeated and head[0] <= known.number:
            raise MessageError(f"statement: {_went_back(head[0], known.number)}")
        return _Answer(reply, size, signer.to_text(), *head)

    def _forgot(self, reply: TrainReply, site: str, number: int) -> bool:
        """Whether a site states less epsilon than before; a round that is repeated may be answered as it was then."""
        before, private = self.sites[site], self._plan.mechanism.private
        return private and (reply.epsilon_rdp or 0.0) < before.stated - 1e-9 and number > before.last_charged

    def _charge(
        self,
        replies: dict[str, _Answer],
        declined: dict[str, Reason],
        failed: dict[str, str],
        number: int,
        asked: set[str],
        counts: bool,
    ) -> None:
        """Note what the sites spent; a round that does not count was paid for all the same, and may be repeated."""
        for site, before in self.sites.items():
            state = before
            if site in replies:
                answer = replies[site]
                reply = answer.reply
                state = replace(state, epsilon=reply.epsilon, epsilon_rdp=reply.epsilon_rdp, reason="")
                state = replace(state, stated=reply.epsilon_rdp or 0.0, identity=answer.signer)
                state = replace(state, head_number=answer.head_number, head_digest=answer.head_digest)
                if counts:
                    state = replace(state, rounds=state.rounds + 1, bytes_up=state.bytes_up + answer.size)
            elif site in failed:
                state = replace(state, failed=state.failed + 1)
            elif site in declined:
                state = replace(state, declined=state.declined + 1, reason=declined[site])
            may_have_paid = site in asked and declined.get(site) not in _UNCHARGED
            if may_have_paid and number > state.last_charged:
                state = replace(state, charged=state.charged + 1, last_charged=number)
            self.sites[site] = self._at_least_charged(state)
        if self._heads is not None:
            self._heads.note({s: LedgerHead(number=a.head_number, digest=a.head_digest) for s, a in replies.items()})

    def _at_least_charged(self, state: SiteState) -> SiteState:
        """Raise a site's epsilon to what the rounds that it may have paid for cost: an answer can get lost."""
        if not self._plan.mechanism.private or not state.charged or state.epsilon is None:
            return replace(state, epsilon=None, epsilon_rdp=None) if state.charged else state
        event = self._plan.mechanism.event(state.charged * self._plan.training.local_steps)
        least = spent([event], self._plan.privacy.delta)
        rdp = max(state.epsilon_rdp or 0.0, least.epsilon_rdp)
        return replace(state, epsilon=max(state.epsilon, least.epsilon), epsilon_rdp=rdp)

    def _check_quorum(
        self, number: int, sites: Collection[str], declined: dict[str, Reason], failed: dict[str, str]
    ) -> None:
        if self._enough(sites):
            return
        reasons = [f"{site} declined ({reason})" for site, reason in sorted(declined.items())]
        reasons += [f"{site}: {what}" for site, what in sorted(failed.items())]
        earlier = {site: state.reason for site, state in self.sites.items() if state.reason and site not in declined}
        reasons += [f"{site} declined ({reason})" for site, reason in earlier.items()]
        hint = f" {_LEDGER_HINT}" if "ledger" in {*declined.values(), *(s.reason for s in self.sites.values())} else ""
        raise QuorumLost(
            f"round {number}: {len(sites)} sites, {self._needed}. "
            f"{'; '.join(reasons) or 'no site answered'}. The adapter of round {self.round} is kept.{hint}"
        )

    def _finish(self, record: RoundRecord, entry: dict[str, Any] | None = None) -> None:
        """Make the round durable: metrics and run record first, so that a checkpoint never runs ahead of them."""
        self._note_scores()
        self.records.append(record)
        _write_records(self._folder / METRICS, self.records)
        if entry is not None:
            self._record.note("round", entry)
        self._save()
        if record.lost or record.loss is not None:
            self._observe(record)
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
        _write_records(self._folder / METRICS, self.records)
        self._observe(self.records[at])

    def _note_end(self, stopped: str) -> None:
        body = {"round": self.round, "stopped": stopped, "adapter": adapter_digest(self.adapter)}
        self._record.note("end", body)

    def _save(self) -> None:
        state = Checkpoint(self.round, self._plan.digest, self.adapter, self._optimizer.state(), self.sites)
        save_checkpoint(self._folder / CHECKPOINT, state)


def _went_back(now: int, before: int) -> str:
    return f"its ledger stands at entry {now}, and stood at {before} before. Was it restored from an old backup?"


def _open(channel: Channel, node: int, content: RecordDict) -> bytes | str:
    """Return the answer in a transport's envelope; text says why it cannot be used."""
    record = content.config_records.get(RECORD)
    value = record.get(KEY) if record is not None else None
    try:
        return channel.open(node, value if isinstance(value, bytes) else b"")
    except (MessageError, CryptoError) as error:
        return str(error)


def _read_records(path: Path) -> list[RoundRecord]:
    """Read metrics, leaving out a last line that was cut short; raises CheckpointError where another is damaged."""
    records = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Restore it from a backup.") from error
    for number, line in enumerate(lines, start=1):
        try:
            records.append(RoundRecord(**json.loads(line.decode())))
        except (ValueError, TypeError):
            if number < len(lines):
                raise CheckpointError(f"{path}, line {number}: damaged. Restore it from a backup.") from None
    return records


def _write_records(path: Path, records: list[RoundRecord]) -> None:
    lines = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
    write_atomically(path, lines.encode())
