"""The round loop: what misbehaving sites, crashes and lost quorums can do to a run, which is nothing."""

import errno
import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

import server.checkpoint
import server.events
import server.rounds
import server.run_record
from fedllm import adapter_vector
from fedllm.adapter_vector import AdapterSpec, TensorSpec, adapter_digest
from fedllm.config import FederationConfig
from fedllm.crypto.hash_chain import Entry, LedgerHead, read_chain
from fedllm.crypto.identity import Identity
from fedllm.errors import CheckpointError, FederationError, ModelError, QuorumLost
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import spent
from fedllm.privacy.metrics import Layout, metric_names
from fedllm.protocol.messages import (
    ENVELOPE_KEY,
    ENVELOPE_RECORD,
    Declined,
    Prepare,
    Ready,
    RoundBegun,
    TrainReply,
    TrainRequest,
    from_bytes,
)
from fedllm.protocol.spending_statement import Statement, open_statement, roster_digest, sign_statement, update_digest
from fedllm.training.server_optimizer import ServerOptimizer
from fedllm.values import MAX_START, parse
from server.channel import PlainChannel
from server.checkpoint import load_checkpoint
from server.events import CHECKPOINT, METRICS, Event, Phase, RoundMetrics, RoundStarted, SiteAnswered
from server.ledger_heads import HEADS, LedgerHeads
from server.rounds import Coordinator, PublicModel
from server.run_record import RECORD_FILE, RunLog

DIMENSION = 12
SPEC = AdapterSpec("base", "frozen", 2.0, (TensorSpec("a", (4, 2)), TensorSpec("b", (4,))))
START = np.linspace(-1, 1, DIMENSION).astype(np.float32)
NAMES = ("서울-강남", "busan", "jeju")
HEAD_OFFICE = [Identity.generate()]
LAYOUT = Layout(metric_names(0), 1.0)

Vector = NDArray[np.float32]


class Killed(BaseException):
    """Stands for kill -9: nothing in the product may catch it."""


@cache
def identity_of(name: str) -> Identity:
    del name
    return Identity.generate()


@dataclass(frozen=True)
class Draft:
    """What a site is about to sign and send."""

    site: str
    run: str
    plan: str
    round: int
    epsilon: float | None
    epsilon_rdp: float | None
    delta: float
    payload: bytes


class FakeSite:
    """A site without a model: its update depends on name, round and starting point, and on nothing else."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rounds: list[int] = []  # asked to train
        self.prepared = 0
        self.spoil: Callable[[Draft], Any] | None = None
        self.decline_plan: str | None = None
        self.identity = identity_of(name)
        self.heads: list[LedgerHead | None] = []  # that the server sent
        self.base = 0  # entries of its ledger before this run
        self.says: dict[str, Any] = {}  # what its statement says instead of what is so
        self.begun: dict[tuple[str, int], RoundBegun] = {}

    def sign(self, reply: Draft, request: TrainRequest) -> TrainReply:
        entry = self.base + 2 * reply.round  # of a chain with two entries a round
        # a round is answered again as it was before
        begun = self.begun.setdefault((request.plan.digest, request.round), request.begun)
        statement = Statement(
            reply.site, reply.run, reply.plan, reply.round, reply.epsilon, reply.epsilon_rdp, reply.delta, entry,
            f"digest {entry}", update_digest(reply.payload), begun.roster, begun.number, begun.digest,
            hashlib.sha256(request.payload).hexdigest(),
        )  # fmt: skip
        return TrainReply(
            statement=sign_statement(replace(statement, **self.says), self.identity), payload=reply.payload
        )

    def delta(self, round_: int, start: Vector) -> Vector:
        noise = np.random.default_rng([round_, *self.name.encode()]).normal(size=DIMENSION)
        return np.asarray(0.2 * noise - 0.1 * start, np.float32)

    def __call__(self, request: bytes) -> Any:
        message = from_bytes(request, Prepare, TrainRequest)
        if isinstance(message, Prepare):
            self.prepared += 1
            if self.decline_plan is not None:
                return Declined(site=self.name, reason=self.decline_plan).to_bytes()  # type: ignore[arg-type]
            return Ready(site=self.name, plan_digest=message.plan.digest, spec_digest=SPEC.digest).to_bytes()
        self.rounds.append(message.round)
        self.heads.append(message.head)
        plan = message.plan
        private = plan.mechanism.private
        draft = Draft(
            self.name, plan.run, plan.digest, message.round, 0.5 * message.round if private else None,
            0.6 * message.round if private else None, plan.privacy.delta,
            adapter_vector.encode(
                self.delta(message.round, adapter_vector.decode(message.payload, "float32", DIMENSION)),
                plan.training.wire,
            ),
        )  # fmt: skip
        answer = draft if self.spoil is None else self.spoil(draft)
        return self.sign(answer, message).to_bytes() if isinstance(answer, Draft) else answer


class FakeGrid(Grid):
    """Nodes that answer at once, raise, or (by None) never answer."""

    def __init__(self, nodes: Mapping[int, Callable[[bytes], bytes | None]]) -> None:
        self.nodes = dict(nodes)
        self.asked: list[tuple[int, str]] = []
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *_: Any, **__: Any) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            self._waiting[message.metadata.message_id] = message
            self.asked.append((message.metadata.dst_node_id, message.metadata.message_type))
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = []
        for message_id in message_ids:
            if message_id not in self._waiting:
                continue
            message = self._waiting.pop(message_id)
            payload = message.content.config_records[ENVELOPE_RECORD][ENVELOPE_KEY]
            assert isinstance(payload, bytes)
            try:
                answer = self.nodes[message.metadata.dst_node_id](payload)
            except Exception as error:
                replies.append(Message(Error(code=0, reason=type(error).__name__), reply_to=message))
                continue
            if answer is not None:
                content = answer if isinstance(answer, RecordDict) else _envelope(answer)
                replies.append(Message(content, reply_to=message))
        return replies


def _envelope(value: Any) -> RecordDict:
    return RecordDict({ENVELOPE_RECORD: ConfigRecord({ENVELOPE_KEY: value})})


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower reads when a Message is made."""
    for name, value in (("_run_id", 1), ("_task_id", 1), ("_node_id", 0)):
        monkeypatch.setattr(TaskIdentity, name, value)


def make_plan(rounds: int = 4, server: dict[str, Any] | None = None, **privacy: Any) -> RunPlan:
    values = {
        "run": "run",
        "seed": 0,
        "model": {"source": "none"},
        "adapter": {},
        "privacy": {"mode": "off", "units_per_site": 10, "delta": 1e-3, **privacy},
        "training": {"rounds": rounds, "learning_rate": 1.0, "wire": "float32", "server": server or {}},
    }
    return parse(RunPlan, values)


def score(vector: Vector) -> dict[str, float | None]:
    loss = float(np.mean(vector.astype(np.float64) ** 2))
    return {"loss": loss, "perplexity": math.exp(loss)}


class Federation:
    """A server, its folder and its fake sites."""

    def __init__(self, folder: Path, plan: RunPlan, **changes: Any) -> None:
        self.folder, self.plan = folder, plan
        folder.mkdir(parents=True, exist_ok=True)
        self.config = parse(
            FederationConfig,
            {"partition": {"by": "iid", "sites": 3}, "quorum": 2, "round_timeout": 0.2, **changes},
        )
        self.sites = {name: FakeSite(name) for name in NAMES}
        self.grid = FakeGrid(dict(enumerate(self.sites.values(), start=1)))
        self.events: list[Event] = []
        self.heads: LedgerHeads | None = None

    def heads_seen(self) -> dict[str, LedgerHead]:
        assert self.heads is not None
        return self.heads.read()

    def coordinator(self, observe: Callable[[Event], None] | None = None) -> Coordinator:
        channel = PlainChannel(self.grid, self.config.round_timeout, len(self.sites))
        record = RunLog(self.folder / RECORD_FILE, HEAD_OFFICE, {"jeju": "its identity"})
        model = PublicModel(SPEC, START, score, LAYOUT)
        return Coordinator(self.plan, self.config, model, channel, record, observe or self.events.append, self.heads)

    def run(self) -> Coordinator:
        coordinator = self.coordinator()
        coordinator.run()
        return coordinator

    def resume(self) -> Coordinator:
        coordinator = self.coordinator()
        coordinator.resume()
        coordinator.run()
        return coordinator

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / METRICS).read_text("utf-8").splitlines()]


def expected_adapters(federation: Federation, absent: Mapping[int, set[str]] | None = None) -> list[Vector]:
    """FedAvg in plain numpy: the adapter after each round, where `absent` sites of a round give nothing."""
    adapters = [START]
    for round_ in range(1, federation.plan.training.rounds + 1):
        present = [s for n, s in sorted(federation.sites.items()) if n not in (absent or {}).get(round_, set())]
        mean = np.mean([site.delta(round_, adapters[-1]).astype(np.float64) for site in present], axis=0)
        adapters.append(np.float32(adapters[-1] + np.float32(mean)))
    return adapters


def untimed(records: Iterable[RoundMetrics]) -> list[dict[str, Any]]:
    return [{k: v for k, v in vars(record).items() if k != "seconds"} for record in records]


def unweighed(records: Iterable[RoundMetrics]) -> list[dict[str, Any]]:
    """Leave out sizes as well: after a resume the record's entries have longer numbers."""
    return [{k: v for k, v in each.items() if not k.startswith("bytes_")} for each in untimed(records)]


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path / "run", make_plan())


# ---- a run in which all goes well ------------------------------------------------------------------------------------


def test_rounds_average_the_updates_of_all_sites(federation: Federation) -> None:
    coordinator = federation.run()
    np.testing.assert_allclose(coordinator.adapter, expected_adapters(federation)[-1], rtol=1e-6)
    assert coordinator.round == 4
    assert [site.rounds for site in federation.sites.values()] == [[1, 2, 3, 4]] * 3
    assert [site.prepared for site in federation.sites.values()] == [1] * 3
    for state in coordinator.sites.values():
        assert (state.rounds, state.declined, state.failed, state.reason) == (4, 0, 0, "")


def test_metrics_have_one_line_for_the_base_and_one_for_each_round(federation: Federation) -> None:
    coordinator = federation.run()
    lines = federation.metrics()
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[0]["loss"] == score(START)["loss"]
    assert lines[4]["loss"] == score(coordinator.adapter)["loss"]
    assert all(line["private"] is False and line["epsilon"] is None for line in lines), "branded in every line"
    assert [line["answered"] for line in lines[1:]] == [sorted(NAMES)] * 4
    assert untimed(coordinator.records) == [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_the_checkpoint_holds_the_last_round(federation: Federation) -> None:
    coordinator = federation.run()
    checkpoint = load_checkpoint(federation.folder / CHECKPOINT)
    assert (checkpoint.round, checkpoint.plan_digest) == (4, federation.plan.digest)
    assert checkpoint.adapter.tobytes() == coordinator.adapter.tobytes()
    assert checkpoint.sites == coordinator.sites


def test_every_round_is_on_disk_before_it_is_announced(federation: Federation) -> None:
    seen = []

    def observe(event: Event) -> None:
        if isinstance(event, RoundMetrics):
            assert load_checkpoint(federation.folder / CHECKPOINT).round == event.round
            assert federation.metrics()[-1]["round"] == event.round
            seen.append(event.round)

    federation.coordinator(observe).run()
    assert seen == [0, 1, 2, 3, 4]


def test_a_run_that_ended_before_its_last_adapter_was_evaluated_evaluates_it_when_it_is_resumed(
    federation: Federation,
) -> None:
    federation.run()
    complete = federation.metrics()
    cut = [*complete[:-1], {**complete[-1], "loss": None, "perplexity": None, "accuracy": None}]
    (federation.folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in cut), "utf-8")
    federation.resume()
    assert federation.metrics() == complete


@pytest.mark.parametrize("value", [np.nan, np.inf, -2 * MAX_START])
def test_an_adapter_that_no_site_would_start_from_ends_the_run_before_anybody_pays_for_another_round(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(ServerOptimizer, "step", lambda self, *_: np.full(DIMENSION, value, np.float32))
    with pytest.raises(ModelError, match="round 1: the adapter is not finite"):
        federation.run()
    assert all(site.rounds == [1] for site in federation.sites.values())
    assert load_checkpoint(federation.folder / CHECKPOINT).round == 0


def test_public_weights_are_applied(tmp_path: Path) -> None:
    weights = {"busan": 3.0}
    federation = Federation(tmp_path, make_plan(rounds=1), weights=weights)
    deltas = [federation.sites[n].delta(1, START).astype(np.float64) for n in NAMES]
    expected = START + np.average(deltas, axis=0, weights=[1, 3, 1])
    np.testing.assert_allclose(federation.run().adapter, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("server", "reference"),
    [
        ({"name": "sgd", "learning_rate": 0.5, "momentum": 0.9}, "momentum"),
        ({"name": "adam", "learning_rate": 0.1, "betas": [0.8, 0.95], "eps": 0.01}, "adam"),
    ],
    ids=["momentum", "adam"],
)
def test_server_optimisers_follow_their_papers(tmp_path: Path, server: dict[str, Any], reference: str) -> None:
    federation = Federation(tmp_path, make_plan(server=server))
    x, m, v = START.astype(np.float64), np.zeros(DIMENSION), np.zeros(DIMENSION)
    for round_ in range(1, 5):
        g = -np.mean([s.delta(round_, np.float32(x)).astype(np.float64) for s in federation.sites.values()], axis=0)
        if reference == "momentum":
            m = 0.9 * m + g
            x = x - 0.5 * m
        else:
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
            x = x - 0.1 * (m / (1 - 0.8**round_)) / (np.sqrt(v / (1 - 0.95**round_)) + 0.01)
    np.testing.assert_allclose(federation.run().adapter, x, rtol=1e-4, atol=1e-5)


def test_the_largest_stated_epsilon_is_recorded(tmp_path: Path) -> None:
    federation = Federation(tmp_path, make_plan(mode="local", noise_multiplier=1.0))
    federation.sites["jeju"].spoil = lambda reply: replace(reply, epsilon=3.0 + reply.round)
    coordinator = federation.run()
    assert [record.epsilon for record in coordinator.records] == [0.0, 4.0, 5.0, 6.0, 7.0]
    assert all(record.private for record in coordinator.records)
    assert coordinator.sites["busan"].epsilon == 2.0


# ---- sites that misbehave --------------------------------------------------------------------------------------------


def _changed(**values: Any) -> Callable[[Draft], Draft]:
    return lambda reply: replace(reply, **values)


def _raise(reply: Draft) -> bytes:
    raise RuntimeError("a fault of the site")


def _first_value(value: float) -> Callable[[Draft], Draft]:
    poison = np.float32(value).tobytes()
    return lambda reply: replace(reply, payload=poison + reply.payload[4:])


MISBEHAVIOURS: dict[str, Callable[[Draft], Any]] = {
    "raises": _raise,
    "never answers": lambda reply: None,
    "too short": lambda reply: replace(reply, payload=reply.payload[:-4]),
    "too long": lambda reply: replace(reply, payload=reply.payload + bytes(4)),
    "no payload": _changed(payload=b""),
    "NaN": _first_value(math.nan),
    "infinite": _first_value(math.inf),
    "wrong round": lambda reply: replace(reply, round=reply.round + 1),
    "another site's name": _changed(site="busan"),
    "unknown name": _changed(site="nobody"),
    "another plan": _changed(plan="0" * 64),
    "another run": _changed(run="another"),
    "another type": lambda reply: replace(
        reply, payload=adapter_vector.encode(np.zeros(DIMENSION, np.float32), "float16")
    ),
    "garbage": lambda reply: b"\x00\xff" * 50,
    "empty": lambda reply: b"",
    "cut": lambda reply: TrainReply(statement="x", payload=reply.payload).to_bytes()[:20],
    "another kind of message": lambda reply: Ready(site=reply.site, plan_digest="", spec_digest="").to_bytes(),
    "text instead of bytes": lambda reply: _envelope("hello"),
    "an empty envelope": lambda reply: RecordDict(),
    "another envelope": lambda reply: RecordDict({"other": ConfigRecord({"message": b"x"})}),
}


@pytest.mark.parametrize("misbehaviour", MISBEHAVIOURS)
def test_a_site_that_misbehaves_is_counted_as_failed_and_the_others_are_averaged(
    federation: Federation, misbehaviour: str
) -> None:
    spoil = MISBEHAVIOURS[misbehaviour]
    federation.sites["jeju"].spoil = lambda reply: spoil(reply) if reply.round == 2 else reply
    coordinator = federation.run()
    np.testing.assert_allclose(coordinator.adapter, expected_adapters(federation, {2: {"jeju"}})[-1], rtol=1e-6)
    assert coordinator.round == 4
    bad = coordinator.records[2]
    assert (bad.answered, bad.declined, list(bad.failed)) == (["busan", "서울-강남"], {}, ["jeju"])
    assert bad.failed["jeju"], "the record says what was wrong"
    assert [record.failed for record in coordinator.records if record.round != 2] == [{}] * 4
    assert (coordinator.sites["jeju"].rounds, coordinator.sites["jeju"].failed) == (3, 1)
    assert (coordinator.sites["busan"].rounds, coordinator.sites["busan"].failed) == (4, 0)
    assert [line["round"] for line in federation.metrics()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("misbehaviour", "words"), [("raises", "fault"), ("never answers", "no answer in time")])
def test_the_record_says_what_kind_of_failure_it_was(federation: Federation, misbehaviour: str, words: str) -> None:
    federation.sites["jeju"].spoil = MISBEHAVIOURS[misbehaviour]
    assert words in federation.run().records[1].failed["jeju"]


@pytest.mark.parametrize(
    ("values", "what"),
    [({"epsilon": None}, "epsilon"), ({"delta": 0.5}, "delta")],
    ids=["no epsilon", "epsilon at a laxer delta"],
)
def test_an_update_without_an_account_at_the_planned_delta_is_not_used(
    tmp_path: Path, values: dict[str, Any], what: str
) -> None:
    federation = Federation(tmp_path, make_plan(mode="local", noise_multiplier=1.0))
    federation.sites["jeju"].spoil = _changed(**values)
    coordinator = federation.run()
    assert all(what in record.failed.get("jeju", "") for record in coordinator.records[1:])
    assert coordinator.sites["jeju"].rounds == 0


@pytest.mark.parametrize("misbehaviour", ["raises", "never answers", "NaN", "garbage"])
def test_too_many_misbehaving_sites_end_the_run_with_everything_on_disk(
    federation: Federation, misbehaviour: str
) -> None:
    spoil = MISBEHAVIOURS[misbehaviour]
    for name in ("jeju", "busan"):
        federation.sites[name].spoil = lambda reply: spoil(reply) if reply.round == 3 else reply
    coordinator = federation.coordinator()
    with pytest.raises(QuorumLost, match=r"round 3.*quorum=2") as caught:
        coordinator.run()
    assert "jeju" in str(caught.value)
    assert "busan" in str(caught.value)
    assert [line["round"] for line in federation.metrics()] == [0, 1, 2]
    checkpoint = load_checkpoint(federation.folder / CHECKPOINT)
    assert checkpoint.round == 2
    assert checkpoint.adapter.tobytes() == coordinator.adapter.tobytes()
    np.testing.assert_allclose(coordinator.adapter, expected_adapters(federation)[2], rtol=1e-6)


def test_a_run_goes_on_where_it_lost_its_quorum(federation: Federation) -> None:
    for name in ("jeju", "busan"):
        federation.sites[name].spoil = lambda reply: None if reply.round == 3 else reply
    with pytest.raises(QuorumLost):
        federation.run()
    for site in federation.sites.values():
        site.spoil = None
    coordinator = federation.resume()
    np.testing.assert_allclose(coordinator.adapter, expected_adapters(federation)[-1], rtol=1e-6)
    assert [line["round"] for line in federation.metrics()] == [0, 1, 2, 3, 4]
    used = {name: state.rounds for name, state in coordinator.sites.items()}
    assert used == dict.fromkeys(NAMES, 4), "a round whose quorum was lost used no update"


# ---- sites that decline ----------------------------------------------------------------------------------------------


def test_when_all_sites_decline_the_plan_the_run_ends_with_their_reasons(federation: Federation) -> None:
    for site, why in zip(federation.sites.values(), ("budget", "policy", "data"), strict=True):
        site.decline_plan = why
    with pytest.raises(QuorumLost) as caught:
        federation.run()
    for name, why in zip(NAMES, ("budget", "policy", "data"), strict=True):
        assert f"{name} declined ({why})" in str(caught.value)
    checkpoint = load_checkpoint(federation.folder / CHECKPOINT)
    assert checkpoint.round == 0
    assert checkpoint.adapter.tobytes() == START.tobytes()
    assert {name: state.reason for name, state in checkpoint.sites.items()} == {
        "서울-강남": "budget",
        "busan": "policy",
        "jeju": "data",
    }
    assert [line["round"] for line in federation.metrics()] == [0]


@pytest.mark.parametrize("why", ["budget", "policy", "data", "model", "ledger"])
def test_a_site_that_declines_for_good_is_not_asked_again(federation: Federation, why: str) -> None:
    refusal = Declined(site="jeju", reason=why).to_bytes()  # type: ignore[arg-type]
    federation.sites["jeju"].spoil = lambda reply: refusal if reply.round >= 2 else reply
    coordinator = federation.run()
    assert federation.sites["jeju"].rounds == [1, 2]
    assert coordinator.records[2].declined == {"jeju": why}
    absent = {2: {"jeju"}, 3: {"jeju"}, 4: {"jeju"}}
    np.testing.assert_allclose(coordinator.adapter, expected_adapters(federation, absent)[-1], rtol=1e-6)
    state = coordinator.sites["jeju"]
    assert (state.rounds, state.declined, state.reason) == (1, 1, why)


@pytest.mark.parametrize("why", ["training", "message", "internal"])
def test_a_site_that_declines_one_round_is_asked_for_the_next(federation: Federation, why: str) -> None:
    refusal = Declined(site="jeju", reason=why).to_bytes()  # type: ignore[arg-type]
    federation.sites["jeju"].spoil = lambda reply: refusal if reply.round == 2 else reply
    coordinator = federation.run()
    assert federation.sites["jeju"].rounds == [1, 2, 3, 4]
    assert coordinator.sites["jeju"].rounds == 3
    np.testing.assert_allclose(coordinator.adapter, expected_adapters(federation, {2: {"jeju"}})[-1], rtol=1e-6)


def test_the_reasons_of_earlier_rounds_are_named_when_the_quorum_is_lost_later(federation: Federation) -> None:
    for round_, name in ((2, "jeju"), (3, "busan")):
        refusal = Declined(site=name, reason="budget").to_bytes()
        federation.sites[name].spoil = lambda reply, refusal=refusal, round_=round_: (
            refusal if reply.round >= round_ else reply
        )
    with pytest.raises(QuorumLost) as caught:
        federation.run()
    assert str(caught.value).count("declined (budget)") == 2
    assert "round 2 is kept" in str(caught.value)


def test_a_site_that_could_not_be_reached_for_several_rounds_is_used_again(tmp_path: Path) -> None:
    """The server must assume that it paid for them; the site never heard of them, and states what it really spent."""
    federation = Federation(tmp_path, make_plan(rounds=6, mode="local", noise_multiplier=2.0, sampling_rate=0.5))
    event = federation.plan.mechanism.event(1)
    for site in federation.sites.values():
        trained: list[int] = []

        def account(reply: Draft, trained: list[int] = trained) -> Draft | None:
            if reply.site == "jeju" and reply.round in (2, 3, 4):
                return None  # lost on the way there
            trained.append(reply.round)
            cost = spent([event] * len(trained), federation.plan.privacy.delta)
            return replace(reply, epsilon=cost.epsilon, epsilon_rdp=cost.epsilon_rdp)

        site.spoil = account
    coordinator = federation.run()
    assert {r.round for r in coordinator.records[1:] if "jeju" in r.answered} == {1, 5, 6}
    whole = spent([event] * 6, federation.plan.privacy.delta).epsilon
    assert coordinator.sites["busan"].epsilon == whole
    assert coordinator.sites["jeju"].epsilon is not None
    assert coordinator.sites["jeju"].epsilon <= whole, "no round is paid for twice"


def test_a_site_that_lost_its_ledger_is_noticed(tmp_path: Path) -> None:
    federation = Federation(tmp_path, make_plan(mode="local", noise_multiplier=2.0, sampling_rate=0.5))
    event = federation.plan.mechanism.event(1)

    def account(reply: Draft) -> Draft:
        rounds = reply.round if reply.site != "jeju" or reply.round < 3 else reply.round - 2  # begins anew in round 3
        cost = spent([event] * rounds, federation.plan.privacy.delta)
        return replace(reply, epsilon=cost.epsilon, epsilon_rdp=cost.epsilon_rdp)

    for site in federation.sites.values():
        site.spoil = account
    coordinator = federation.run()
    assert "ledger" in coordinator.records[3].failed["jeju"]
    assert coordinator.sites["jeju"].rounds == 2


# ---- who is there ----------------------------------------------------------------------------------------------------


def test_a_site_that_joins_late_is_prepared_and_used(federation: Federation) -> None:
    late = federation.grid.nodes.pop(3)

    def observe(event: Event) -> None:
        if isinstance(event, SiteAnswered) and event.round == 2:
            federation.grid.nodes[3] = late

    coordinator = federation.coordinator(observe)
    coordinator.run()
    assert federation.sites["jeju"].rounds == [3, 4]
    assert federation.sites["jeju"].prepared == 1
    expected = expected_adapters(federation, {1: {"jeju"}, 2: {"jeju"}})[-1]
    np.testing.assert_allclose(coordinator.adapter, expected, rtol=1e-6)
    assert coordinator.sites["jeju"].rounds == 2


def test_a_site_that_goes_offline_is_missed_and_used_again_when_it_returns(federation: Federation) -> None:
    node = federation.grid.nodes[3]

    def observe(event: Event) -> None:
        if isinstance(event, SiteAnswered) and (event.round, event.site) == (1, "jeju"):
            del federation.grid.nodes[3]
        elif isinstance(event, SiteAnswered) and event.round == 2:
            federation.grid.nodes[3] = node

    coordinator = federation.coordinator(observe)
    coordinator.run()
    assert list(coordinator.records[2].failed) == ["jeju"]
    assert federation.sites["jeju"].rounds == [1, 3, 4]
    assert (coordinator.sites["jeju"].rounds, coordinator.sites["jeju"].failed) == (3, 1)


def test_a_site_that_does_not_answer_the_plan_is_asked_again_in_the_next_round(federation: Federation) -> None:
    site = federation.sites["jeju"]

    def answer(request: bytes) -> bytes | None:
        reply: bytes = site(request)
        return reply if site.prepared > 1 else None

    federation.grid.nodes[3] = answer
    coordinator = federation.run()
    assert site.rounds == [2, 3, 4]
    assert coordinator.records[1].failed == {"node 3": "no valid answer to the plan: no answer in time"}


@pytest.mark.parametrize(
    "answer",
    [
        lambda request: b"",
        lambda request: b"garbage" * 9,
        lambda request: Ready(site="eve", plan_digest="0" * 64, spec_digest=SPEC.digest).to_bytes(),
        lambda request: Ready(site="eve", plan_digest=make_plan().digest, spec_digest="0" * 64).to_bytes(),
        lambda request: Ready(site="busan", plan_digest=make_plan().digest, spec_digest=SPEC.digest).to_bytes(),
    ],
    ids=["empty", "garbage", "another plan", "another adapter", "a name that is taken"],
)
def test_a_node_with_a_wrong_answer_to_the_plan_takes_no_part(
    federation: Federation, answer: Callable[[bytes], bytes]
) -> None:
    trained = []

    def node(request: bytes) -> bytes:
        if isinstance(from_bytes(request, Prepare, TrainRequest), TrainRequest):
            trained.append(request)
        return answer(request)

    federation.grid.nodes[4] = node
    coordinator = federation.run()
    assert trained == []
    assert len(coordinator.records[1].failed) == 1
    np.testing.assert_allclose(coordinator.adapter, expected_adapters(federation)[-1], rtol=1e-6)
    assert coordinator.sites["busan"].rounds == 4


def test_a_node_cannot_speak_for_another_site(federation: Federation) -> None:
    """A stranger that declines in busan's name changes nothing in what is recorded of busan."""
    federation.grid.nodes[4] = lambda request: Declined(site="busan", reason="budget").to_bytes()
    coordinator = federation.run()
    state = coordinator.sites["busan"]
    assert (state.rounds, state.declined, state.reason) == (4, 0, "")


def test_the_first_round_waits_for_the_sites_that_are_expected(tmp_path: Path) -> None:
    federation = Federation(tmp_path, make_plan(), round_timeout=20.0)
    late, looks = federation.grid.nodes.pop(3), []
    nodes = federation.grid.get_node_ids

    def get_node_ids() -> list[int]:
        looks.append(1)
        if len(looks) == 5:
            federation.grid.nodes[3] = late
        return nodes()

    federation.grid.get_node_ids = get_node_ids  # type: ignore[method-assign]
    coordinator = federation.run()
    assert coordinator.records[1].answered == sorted(NAMES)


def test_the_observer_is_told_who_is_asked_and_who_answered(federation: Federation) -> None:
    federation.sites["jeju"].spoil = MISBEHAVIOURS["NaN"]
    federation.run()
    started = [event for event in federation.events if isinstance(event, RoundStarted)]
    assert [(event.round, sorted(event.sites)) for event in started] == [(r, sorted(NAMES)) for r in (1, 2, 3, 4)]
    first = [e for e in federation.events if isinstance(e, SiteAnswered) and e.round == 1]
    assert {(e.site, e.used, bool(e.detail)) for e in first} == {
        ("서울-강남", True, False),
        ("busan", True, False),
        ("jeju", False, True),
    }


# ---- crash and resume ------------------------------------------------------------------------------------------------

_OPTIMISERS = {
    "fedavg": {},
    "momentum": {"name": "sgd", "learning_rate": 0.7, "momentum": 0.9},
    "adam": {"name": "adam", "learning_rate": 0.1},
}


@pytest.mark.parametrize(
    "optimizer",
    [*(pytest.param(name, marks=pytest.mark.soak) for name in ("fedavg", "momentum")), "adam", "fedavg, private"],
)
def test_a_run_killed_at_any_event_resumes_to_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    private = {"mode": "local", "noise_multiplier": 1.0} if "private" in optimizer else {}
    plan = make_plan(server=_OPTIMISERS[optimizer.partition(",")[0]], **private)
    whole = Federation(tmp_path / "whole", plan)
    uninterrupted = whole.run()
    events = [event for event in whole.events if not isinstance(event, Phase)]
    assert len(events) == 1 + 4 * 5
    for killed_at in range(len(events)):
        federation = Federation(tmp_path / f"killed-{killed_at}", plan)
        seen: list[Event] = []

        def observe(event: Event, seen: list[Event] = seen, killed_at: int = killed_at) -> None:
            seen += [] if isinstance(event, Phase) else [event]
            if len(seen) == killed_at + 1:
                raise Killed

        with pytest.raises(Killed):
            federation.coordinator(observe).run()
        resumed = federation.resume()
        assert resumed.adapter.tobytes() == uninterrupted.adapter.tobytes(), f"killed at event {killed_at}"
        assert unweighed(resumed.records) == unweighed(uninterrupted.records)
        assert resumed.sites == uninterrupted.sites
        assert [line["round"] for line in federation.metrics()] == [0, 1, 2, 3, 4]


def test_a_run_killed_before_any_write_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(rounds=3, server=_OPTIMISERS["adam"])
    uninterrupted = Federation(tmp_path / "whole", plan).run()
    real = server.checkpoint.write_atomically
    for killed_at in range(3, 9):  # the first three writes make the first checkpoint; before it a run starts over
        federation = Federation(tmp_path / f"killed-{killed_at}", plan)
        writes: list[Path] = []

        def write(path: Path, data: bytes, writes: list[Path] = writes, killed_at: int = killed_at) -> None:
            if len(writes) == killed_at:
                raise Killed
            writes.append(path)
            real(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(server.checkpoint, "write_atomically", write)
            patch.setattr(server.events, "write_atomically", write)
            patch.setattr(server.run_record, "write_atomically", write)
            with pytest.raises(Killed):
                federation.run()
        resumed = federation.resume()
        assert resumed.adapter.tobytes() == uninterrupted.adapter.tobytes(), f"killed before write {killed_at}"
        assert unweighed(resumed.records) == unweighed(uninterrupted.records)
        assert resumed.sites == uninterrupted.sites


def test_a_damaged_checkpoint_costs_one_round_and_no_bits(tmp_path: Path) -> None:
    plan = make_plan(server=_OPTIMISERS["adam"])
    uninterrupted = Federation(tmp_path / "whole", plan).run()
    federation = Federation(tmp_path / "damaged", plan)
    federation.run()
    (federation.folder / CHECKPOINT).write_bytes(b"\0" * 100)
    resumed = federation.resume()
    assert resumed.adapter.tobytes() == uninterrupted.adapter.tobytes()
    assert unweighed(resumed.records) == unweighed(uninterrupted.records)


def test_resuming_a_finished_run_asks_nobody(federation: Federation) -> None:
    finished = federation.run()
    federation.grid.asked.clear()
    resumed = federation.resume()
    assert federation.grid.asked == []
    assert resumed.adapter.tobytes() == finished.adapter.tobytes()
    assert untimed(resumed.records) == untimed(finished.records)


def test_resume_without_a_checkpoint_is_refused(federation: Federation) -> None:
    with pytest.raises(CheckpointError, match="new run"):
        federation.resume()


@pytest.mark.parametrize("change", [{"rounds": 9}, {"delta": 1e-4}, {"server": {"momentum": 0.5}}])
def test_a_checkpoint_of_another_plan_is_refused(federation: Federation, change: dict[str, Any]) -> None:
    federation.run()
    before = {file.name: file.read_bytes() for file in federation.folder.iterdir()}
    federation.plan = make_plan(**change)
    with pytest.raises(CheckpointError, match="another plan"):
        federation.resume()
    assert before == {file.name: file.read_bytes() for file in federation.folder.iterdir()}, "nothing was touched"


def _cuts(line: bytes) -> list[int]:
    """Lengths to cut a line to: some everywhere, and all that split a letter of several bytes."""
    return sorted({*range(1, len(line), 13), *(i for i in range(1, len(line)) if line[i] & 0xC0 == 0x80)})


def test_a_torn_line_after_the_last_round_is_left_out(federation: Federation) -> None:
    """Also where the cut falls between the bytes of a Korean letter."""
    finished = federation.run()
    metrics = federation.folder / METRICS
    whole = metrics.read_bytes()
    torn = whole.splitlines(keepends=True)[-1].replace(b'"round": 4', b'"round": 5')
    for length in _cuts(torn):
        metrics.write_bytes(whole + torn[:length])
        assert unweighed(federation.resume().records) == unweighed(finished.records), f"cut after {length} bytes"
        assert [line["round"] for line in federation.metrics()] == [0, 1, 2, 3, 4]


def test_metrics_that_end_within_the_line_of_the_checkpoint_go_back_a_round_or_say_what_to_do(
    federation: Federation,
) -> None:
    finished = federation.run()
    metrics = federation.folder / METRICS
    whole = metrics.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    checkpoints = {f: f.read_bytes() for f in federation.folder.iterdir() if f.name != METRICS}

    def resume() -> Coordinator | str:
        try:
            return federation.resume()
        except CheckpointError as error:
            return str(error)

    for length in _cuts(last):
        metrics.write_bytes(whole[: len(whole) - len(last) + length])
        for file, data in checkpoints.items():
            file.write_bytes(data)
        result = resume()
        if isinstance(result, str):
            assert METRICS in result
            assert "estore" in result or "new run" in result, "the message says what to do"
        else:
            assert result.adapter.tobytes() == finished.adapter.tobytes()
            assert unweighed(result.records) == unweighed(finished.records)


def test_a_damaged_line_in_the_middle_of_the_metrics_is_not_dropped_in_silence(federation: Federation) -> None:
    federation.run()
    metrics = federation.folder / METRICS
    lines = metrics.read_bytes().splitlines(keepends=True)
    for damaged in (b"{}\n", b"[1, 2]\n", b"\xff\xfe\n", b'{"round": "2"}\n', lines[2][:40] + b"\n"):
        metrics.write_bytes(b"".join([*lines[:2], damaged, *lines[3:]]))
        with pytest.raises(CheckpointError, match=METRICS):
            federation.resume()


def test_metrics_that_are_gone_are_one_clear_error(federation: Federation) -> None:
    federation.run()
    (federation.folder / METRICS).unlink()
    with pytest.raises(CheckpointError, match=METRICS):
        federation.resume()


def test_a_full_disk_ends_the_run_and_nothing_is_lost(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Federation(federation.folder.parent / "whole", federation.plan).run()
    real = server.checkpoint.write_atomically
    writes: list[Path] = []

    def write(path: Path, data: bytes) -> None:
        writes.append(path)
        if len(writes) in (6, 7):
            raise CheckpointError("cannot write: no space left")
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(server.checkpoint, "write_atomically", write)
        patch.setattr(server.events, "write_atomically", write)
        with pytest.raises(CheckpointError, match="no space left"):
            federation.run()
    assert federation.resume().adapter.tobytes() == whole.adapter.tobytes()


# ---- statements ------------------------------------------------------------------------------------------------------

LIES: dict[str, dict[str, Any]] = {
    "another site": {"site": "busan"},
    "another run": {"run": "x"},
    "another plan": {"plan": "0" * 64},
    "another round": {"round": 1},
    "no epsilon": {"epsilon": None},
    "another delta": {"delta": 0.5},
    "another update": {"update": update_digest(b"")},
    "a head that went back": {"ledger_number": 1},
    "the same head, another digest": {"ledger_number": 2},
    "another roster": {"roster": roster_digest(NAMES[:2])},
    "another entry of the record": {"record_number": 1},
    "a record of another digest": {"record_digest": "0" * 64},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_site_that_signs_something_else_than_it_sends_is_not_used(tmp_path: Path, lie: str) -> None:
    federation = Federation(tmp_path, make_plan(mode="local", noise_multiplier=1.0))
    jeju = federation.sites["jeju"]

    def spoil(reply: Draft) -> Draft:
        jeju.says = LIES[lie] if reply.round == 2 else {}
        return reply

    jeju.spoil = spoil
    coordinator = federation.run()
    assert list(coordinator.records[2].failed) == ["jeju"]
    assert coordinator.records[2].failed["jeju"].startswith("statement: ")
    assert coordinator.sites["jeju"].rounds == 3


_unsigned = TrainReply(statement="x", payload=bytes(4 * DIMENSION))


@pytest.mark.parametrize("statement", ["", "{}", "hello", "\ud83d\ude00" * 10])
def test_a_reply_without_a_statement_is_not_used(federation: Federation, statement: str) -> None:
    jeju = federation.sites["jeju"]
    jeju.sign = lambda reply, _: _unsigned.model_copy(update={"statement": statement})  # type: ignore[method-assign]
    coordinator = federation.run()
    assert coordinator.sites["jeju"].rounds == 0
    assert coordinator.round == 4


@pytest.mark.parametrize("resumed", [False, True])
def test_who_signed_first_for_a_site_goes_on_signing(federation: Federation, resumed: bool) -> None:
    jeju, stranger = federation.sites["jeju"], Identity.generate()

    def spoil(reply: Draft) -> Draft:
        if reply.round == 3:
            jeju.identity = stranger
            if resumed:
                raise Killed
        return reply

    jeju.spoil = spoil
    if resumed:
        with pytest.raises(Killed):
            federation.run()
        jeju.spoil = None
        coordinator = federation.resume()
    else:
        coordinator = federation.run()
    assert ["jeju" in record.failed for record in coordinator.records] == [False, False, False, True, True]
    assert "may not sign" in coordinator.records[3].failed["jeju"]


def test_with_a_roster_only_its_identities_may_sign(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {node: (site.identity.public,) for node, site in enumerate(federation.sites.values(), start=1)}
    known[2] = (Identity.generate().public,)  # busan's is another
    monkeypatch.setattr(PlainChannel, "identities", lambda self, node: known[node])
    coordinator = federation.run()
    assert all("may not sign for busan" in record.failed["busan"] for record in coordinator.records[1:])
    assert coordinator.sites["jeju"].rounds == 4


def test_every_site_hears_what_it_signed_for_last(federation: Federation) -> None:
    federation.sites["jeju"].spoil = lambda reply: None if reply.round == 2 else reply
    federation.run()
    numbers = {name: [head.number if head else None for head in site.heads] for name, site in federation.sites.items()}
    assert numbers == {"서울-강남": [None, 2, 4, 6], "busan": [None, 2, 4, 6], "jeju": [None, 2, 2, 6]}


# ---- what other runs saw of a ledger ---------------------------------------------------------------------------------


def heads_in(folder: Path) -> LedgerHeads:
    return LedgerHeads(folder / HEADS)


def next_run(federation: Federation, run: str) -> Federation:
    """Another run of the same sites and the server, in a folder of its own."""
    later = Federation(federation.folder.with_name(run), federation.plan.model_copy(update={"run": run}))
    later.sites, later.grid, later.heads = federation.sites, federation.grid, federation.heads
    return later


@pytest.fixture
def kept(federation: Federation) -> Federation:
    """A federation whose server remembers heads over runs, after one run of four rounds."""
    federation.heads = heads_in(federation.folder.parent)
    federation.run()
    return federation


def test_the_next_run_tells_every_site_what_the_last_one_saw_of_its_ledger(kept: Federation) -> None:
    assert {site: head.number for site, head in kept.heads_seen().items()} == dict.fromkeys(NAMES, 8)
    for site in kept.sites.values():
        site.heads, site.base = [], 8  # the ledgers go on
    next_run(kept, "another").run()
    numbers = {name: [head.number if head else None for head in site.heads] for name, site in kept.sites.items()}
    assert numbers == {name: [8, 10, 12, 14] for name in NAMES}
    assert {head.number for head in kept.heads_seen().values()} == {16}


def test_a_ledger_that_stands_where_it_stood_before_is_not_used_in_another_run(kept: Federation) -> None:
    """What a site of ours refuses by itself; here is one that does not look."""
    for name, site in kept.sites.items():
        site.base = 8 if name != "jeju" else 0  # jeju's is an old backup
    coordinator = next_run(kept, "another").run()
    assert all("stood at 8 before" in record.failed["jeju"] for record in coordinator.records[1:4])
    assert coordinator.sites["busan"].rounds == 4
    assert kept.heads_seen()["jeju"].number == 8, "what it signed for now does not replace what it signed for then"
    assert kept.heads_seen()["busan"].number == 16


def test_an_old_ledger_is_accepted_once_a_person_has_decided_so(kept: Federation) -> None:
    heads = heads_in(kept.folder.parent)
    heads.forget("jeju")
    with pytest.raises(FederationError, match="nothing was seen"):
        heads.forget("jeju")
    for name, site in kept.sites.items():
        site.base = 8 if name != "jeju" else 0
    assert not any(record.failed for record in next_run(kept, "another").run().records)
    assert kept.heads_seen()["jeju"].number == 8


def test_a_round_that_is_answered_as_before_a_crash_is_used_though_another_run_came_between(kept: Federation) -> None:
    first = next_run(kept, "first")
    for site in kept.sites.values():
        site.base = 8

    def die(reply: Draft) -> Draft:
        if reply.round == 3:
            raise Killed
        return reply

    kept.sites["jeju"].spoil = die  # the others have answered round 3 by then, with entries 14
    with pytest.raises(Killed):
        first.run()
    kept.sites["jeju"].spoil = None
    for site in kept.sites.values():
        site.base = 16
    next_run(kept, "between").run()
    for site in kept.sites.values():
        site.base = 8
    resumed = first.resume()
    assert not resumed.records[3].failed, "round 3 is repeated: its answer is of before"
    assert {head.number for head in kept.heads_seen().values()} == {24}


def test_runs_at_once_never_replace_a_newer_head_by_an_older_one(tmp_path: Path) -> None:
    first, second = heads_in(tmp_path), heads_in(tmp_path)
    first.note({"a": LedgerHead(5, "five"), "b": LedgerHead(1, "one")})
    second.note({"a": LedgerHead(4, "four")})
    assert first.read() == {"a": LedgerHead(5, "five"), "b": LedgerHead(1, "one")}
    other = LedgerHeads(tmp_path / HEADS, "elsewhere/")
    other.note({"a": LedgerHead(0, "zero")})
    assert other.read() == {"a": LedgerHead(0, "zero")}
    assert first.read()["a"].number == 5


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '{"a": {"number": -1, "digest": ""}}'], ids=repr)
def test_a_damaged_file_of_heads_stops_the_run_before_any_site_pays(kept: Federation, content: str) -> None:
    (kept.folder.parent / HEADS).write_text(content, "utf-8")
    asked = {name: list(site.rounds) for name, site in kept.sites.items()}
    with pytest.raises(CheckpointError, match=r"heads\.json.*Restore it from a backup"):
        next_run(kept, "another").run()
    assert asked == {name: site.rounds for name, site in kept.sites.items()}


# ---- the run record --------------------------------------------------------------------------------------------------


def record_of(federation: Federation) -> list[Entry]:
    lines = (federation.folder / RECORD_FILE).read_text("utf-8").splitlines()
    return read_chain(lines, "record", [HEAD_OFFICE[0].public])


def test_the_record_tells_the_whole_run_in_signed_entries(federation: Federation) -> None:
    refusal = Declined(site="jeju", reason="training").to_bytes()
    federation.sites["jeju"].spoil = lambda reply: refusal if reply.round == 2 else reply
    coordinator = federation.run()
    entries = record_of(federation)
    assert [entry.kind for entry in entries] == ["plan", *["begun", "round"] * 4, "end"]
    plan = entries[0].body
    assert parse(RunPlan, plan["plan"]).digest == plan["plan_digest"] == federation.plan.digest
    assert plan["spec_digest"] == SPEC.digest
    assert plan["sites"] == {"jeju": "its identity"}
    assert {"python", "fedllm", "flwr"} <= set(plan["versions"])
    adapters = [adapter_digest(START)]
    for number, record in enumerate(coordinator.records[1:], start=1):
        begun, body = entries[2 * number - 1], entries[2 * number].body
        assert begun.body == {"round": number, "sites": sorted(NAMES)}
        assert (body["round"], body["counts"]) == (number, True)
        assert sorted(body["answered"]) == record.answered
        for name, line in body["answered"].items():
            statement, signer = open_statement(line)
            assert (statement.site, statement.round, signer) == (name, number, identity_of(name).public)
            assert (statement.record_number, statement.record_digest) == (begun.number, begun.digest)
            assert statement.roster == roster_digest(NAMES)
        assert (body["declined"], body["failed"]) == (record.declined, record.failed)
        assert (body["bytes_up"], body["bytes_down"]) == (record.bytes_up, record.bytes_down)
        assert body["adapter_before"] == adapters[-1]
        adapters.append(body["adapter_after"])
    assert entries[9].body == {"round": 4, "stopped": "", "adapter": adapter_digest(coordinator.adapter)}
    assert adapters[-1] == adapter_digest(coordinator.adapter)


def test_a_round_that_lost_its_quorum_is_on_record_with_what_was_signed(federation: Federation) -> None:
    for name in ("jeju", "busan"):
        federation.sites[name].spoil = lambda reply: None if reply.round == 3 else reply
    with pytest.raises(QuorumLost):
        federation.run()
    for site in federation.sites.values():
        site.spoil = None
    federation.resume()
    entries = record_of(federation)
    kinds = ["plan", "round", "round", "round", "end", "resumed", "round", "round", "end"]
    assert [entry.kind for entry in entries if entry.kind != "begun"] == kinds
    assert [entry.body["round"] for entry in entries if entry.kind == "begun"] == [1, 2, 3, 3, 4]
    entries = [entry for entry in entries if entry.kind != "begun"]
    lost = entries[3].body
    assert (lost["round"], lost["counts"], list(lost["answered"])) == (3, False, ["서울-강남"])
    assert lost["adapter_before"] == lost["adapter_after"] == entries[5].body["adapter"]
    assert "quorum" in entries[4].body["stopped"]
    assert (entries[5].body["round"], entries[6].body["round"]) == (2, 3)
    again = entries[6].body["answered"]["서울-강남"]
    assert again == lost["answered"]["서울-강남"], "a repeated round is answered as before, and the server accepts it"


def test_a_record_ahead_of_the_checkpoint_keeps_what_was_signed(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[int] = []
    real = server.rounds.save_checkpoint

    def save(path: Path, checkpoint: Any) -> None:
        if checkpoint.round == 2 and not saves:
            saves.append(2)
            raise Killed
        real(path, checkpoint)

    monkeypatch.setattr(server.rounds, "save_checkpoint", save)
    with pytest.raises(Killed):
        federation.run()
    with (federation.folder / RECORD_FILE).open("ab") as file:
        file.write(b'{"payload":"half an en')  # and dies while it writes the next one
    federation.resume()
    entries = [entry for entry in record_of(federation) if entry.kind != "begun"]
    rounds = [(entry.kind, entry.body.get("round")) for entry in entries[1:]]
    assert rounds[:4] == [("round", 1), ("round", 2), ("resumed", 1), ("round", 2)]
    assert entries[2].body["answered"] == entries[4].body["answered"]


DAMAGES: dict[str, Callable[[list[str]], list[str]]] = {
    "an entry altered": lambda lines: [lines[0], lines[1].replace('"sig":"', '"sig":"A'), *lines[2:]],
    "an entry removed": lambda lines: [lines[0], *lines[2:]],
    "cut short of the checkpoint": lambda lines: lines[:4],
    "emptied": lambda lines: [],
    "no text": lambda lines: ["hello"],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_record_that_was_altered_stops_the_run_and_is_left_alone(federation: Federation, damage: str) -> None:
    federation.run()
    path = federation.folder / RECORD_FILE
    path.write_text("".join(line + "\n" for line in DAMAGES[damage](path.read_text("utf-8").splitlines())), "utf-8")
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="record"):
        federation.coordinator().resume()
    assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        federation.coordinator().resume()


def test_the_record_goes_on_under_head_offices_new_identity(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation.run()
    old, new = HEAD_OFFICE[0], Identity.generate()
    monkeypatch.setitem(globals(), "HEAD_OFFICE", [new, old])
    federation.resume()
    lines = (federation.folder / RECORD_FILE).read_text("utf-8").splitlines()
    for trusted in (old, new):
        entries = read_chain(lines, "record", [trusted.public])
        assert [entry.kind for entry in entries[-3:]] == ["key", "resumed", "end"]
        assert entries[-1].signer == new.public


def test_a_record_on_a_full_disk_stops_the_run_and_stays_whole(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(file: int) -> None:
        if os.readlink(f"/proc/self/fd/{file}").endswith(RECORD_FILE) and len(federation.metrics()) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(CheckpointError, match="Free some space"):
            federation.run()
    assert [entry.kind for entry in record_of(federation)] == ["plan", "begun", "round", "begun"]
    assert federation.resume().round == 4
