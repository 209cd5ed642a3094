"""What a site promises: its records, its budget and its secrets stay where they are."""

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import client.site
from client.policy import widest
from client.records import Declared
from client.site import Site
from client.unfinished import Unfinished
from fedllm import adapter_vector
from fedllm.adapter_vector import WireDtype, adapter_digest
from fedllm.crypto.hash_chain import LedgerHead, open_entry
from fedllm.crypto.identity import Identity
from fedllm.errors import Cancelled, ConfigError, DataError, Diverged, Halted, ModelError
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import AccountingEvent, spent
from fedllm.privacy.elapsed import Period
from fedllm.privacy.ledger import LedgerFile, PrivacyLedger, fingerprint
from fedllm.privacy.ledger_place import LedgerPlace
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.split import Side, Split
from fedllm.protocol.messages import (
    MAGIC,
    Declined,
    Message,
    Prepare,
    Ready,
    RoundBegun,
    TrainReply,
    TrainRequest,
    from_bytes,
)
from fedllm.protocol.spending_statement import Statement, open_statement, update_digest
from fedllm.training import self_check
from fedllm.training.data import Example, PrivacyUnit
from fedllm.training.model_context import ModelContext, open_context
from fedllm.values import parse
from tests.fedllm.privacy.budgets import for_several_plans

SECRET = "Hong-Gildong-8210-4242"  # stands for everything that must not leave a site
NAME = "대구 지점"
IDENTITY = Identity.generate()
BEGUN = RoundBegun(roster="a" * 64, number=1, digest="b" * 64)
DATA = fingerprint([b"what the records hold"])


class Killed(BaseException):
    """Stands for kill -9: nothing in the product may catch it."""


class Loader:
    """The site's records, and how often they were used: what comes before only tells which data set they are."""

    def __init__(self, units: int = 24, error: BaseException | None = None, declared: int | None = None) -> None:
        self.size, self.error, self.calls = units, error, 0
        self.data_set, self.rule = DATA, "by the test"
        self.declared = Declared(units if declared is None else declared, "record")

    def units(self, plan: RunPlan, split: Split, side: Side) -> tuple[PrivacyUnit, ...]:
        """As many on each side."""
        self.calls += 1
        if self.error is not None:
            raise self.error
        generator = np.random.default_rng(7 if side == "training" else 8)
        return tuple(
            (Example(ids := generator.integers(3, 259, size=12), np.where(np.arange(12) < 4, -100, ids)),)
            for _ in range(self.size)
        )


class Office:
    """A site with its ledger and records, and the server's side of the talk."""

    def __init__(self, folder: Path, plan: RunPlan, **changes: Any) -> None:
        self.plan = plan
        self.loader: Loader = changes.pop("loader", None) or Loader(changes.pop("units", 24))
        self.ledger_path = folder / "ledger.db"
        self.ledger = LedgerPlace(self.ledger_path, folder / "keys" / "ledger.anchor")
        self.self_check = changes.pop("self_check", False)  # takes longer than all else here
        self.policy = widest(**{"epsilon": 8.0, "delta": 1e-3, "allow_unprotected": False, **changes})
        self.loader.declared = replace(self.loader.declared, unit=self.policy.unit)
        self.site = self.restart()

    def restart(self) -> Site:
        """The site after its process has ended and begun again: only the ledger is left."""
        self.site = self.make(lambda plan: open_context(plan.model, plan.adapter, plan.seed, "cpu"))
        return self.site

    def make(self, context: Callable[[RunPlan], ModelContext]) -> Site:
        return Site(
            NAME, self.policy, self.ledger, lambda: IDENTITY, context, self.loader, 8, self_check=self.self_check
        )

    def context(self) -> ModelContext:
        return open_context(self.plan.model, self.plan.adapter, self.plan.seed, "cpu")

    def request(self, round_: int = 1, **changes: Any) -> bytes:
        adapter = self.context().adapter
        values = {
            "plan": self.plan,
            "round": round_,
            "spec_digest": adapter.spec.digest,
            "head": None,
            "begun": BEGUN,
            "payload": adapter_vector.encode(adapter.initial, "float32"),
        }
        return TrainRequest(**{**values, **changes}).to_bytes()

    def train(self, round_: int = 1, **changes: Any) -> Message:
        return read(self.site.handle(self.request(round_, **changes)))

    def prepare(self) -> Message:
        return read(self.site.handle(Prepare(plan=self.plan).to_bytes()))

    def events(self) -> list[AccountingEvent]:
        if not self.ledger_path.exists():
            return []
        return [charge.event for charge in LedgerFile(self.ledger_path).charges()]


MakePlan = Callable[..., RunPlan]


def read(reply: bytes) -> Message:
    return from_bytes(reply, Message, Message)


def header(reply: bytes) -> dict[str, Any]:
    length = int.from_bytes(reply[4:8], "big")
    parsed: dict[str, Any] = json.loads(reply[8 : 8 + length])
    return parsed


def reason(message: Message) -> str:
    assert isinstance(message, Declined), f"expected a refusal, found {type(message).__name__}"
    assert message.site == NAME
    return message.reason


def update(message: Message, wire: WireDtype = "float32") -> NDArray[np.float32]:
    assert isinstance(message, TrainReply), f"expected an update, found {message}"
    return adapter_vector.decode(message.payload, wire, len(message.payload) // {"float32": 4, "float16": 2}[wire])


def said(message: Message) -> Statement:
    """What a site signed of its update."""
    assert isinstance(message, TrainReply), f"expected an update, found {message}"
    return open_statement(message.statement)[0]


@pytest.fixture(scope="session")
def make_plan(tiny_llama: Path) -> MakePlan:
    """Return a function that makes a plan for the tiny model; sections are given as dictionaries."""

    def make(
        run: str = "run-1",
        privacy: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        adapter: dict[str, Any] | None = None,
        **more: Any,
    ) -> RunPlan:
        values = {
            "run": run,
            "seed": 3,
            "quorum": 3,
            "model": {"source": str(tiny_llama), "max_length": 32},
            "adapter": adapter or {"rank": 2, "targets": ["q_proj", "v_proj"]},
            "privacy": {
                "mode": "local", "unit": "record", "epsilon": 8.0, "delta": 1e-3, "clip_norm": 1.0,
                "sampling_rate": 0.5, "units_per_site": 24, "noise_multiplier": 1.5, "self_check": False,
                **(privacy or {}),
            },
            "training": {"rounds": 4, "local_steps": 2, "learning_rate": 0.1, "wire": "float32", **(training or {})},
            **more,
        }  # fmt: skip
        return parse(RunPlan, values)

    return make


@pytest.fixture
def office(tmp_path: Path, make_plan: MakePlan) -> Office:
    return Office(tmp_path, make_plan())


# ---- the protocol ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory, make_plan: MakePlan) -> Office:
    """One site for all fuzzed bytes, with a fixed workspace: what a hostile plan may load is not the question."""
    office = Office(tmp_path_factory.mktemp("fuzzed"), make_plan())
    context = office.context()

    def open_only(plan: RunPlan) -> ModelContext:
        if (plan.model, plan.adapter, plan.seed) != (office.plan.model, office.plan.adapter, office.plan.seed):
            raise ModelError("another model")
        return context

    office.site = office.make(open_only)
    return office


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_bytes_get_a_refusal_and_never_an_exception(fuzzed: Office, data: bytes) -> None:
    assert reason(read(fuzzed.site.handle(data))) == "message"
    assert reason(read(fuzzed.site.handle(MAGIC + len(data).to_bytes(4, "big") + data))) == "message"


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_damaged_requests_get_a_parseable_reply(fuzzed: Office, data: st.DataObject) -> None:
    frame = bytearray(fuzzed.request() if data.draw(st.booleans()) else Prepare(plan=fuzzed.plan).to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    frame = frame[: data.draw(st.one_of(st.just(len(frame)), st.integers(0, len(frame))))]
    assert isinstance(read(fuzzed.site.handle(bytes(frame))), Declined | Ready | TrainReply)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["kind", "plan", "round", "spec_digest", "payload", "stray"]), _JSON)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_hostile_headers_get_a_parseable_reply(fuzzed: Office, field: str, value: object) -> None:
    frame = fuzzed.request()
    encoded = json.dumps({**header(frame), field: value}).encode()
    hostile = MAGIC + len(encoded).to_bytes(4, "big") + encoded + frame[8 + int.from_bytes(frame[4:8], "big") :]
    assert isinstance(read(fuzzed.site.handle(hostile)), Declined | TrainReply)


def test_a_plan_within_policy_makes_the_site_ready(office: Office) -> None:
    ready = office.prepare()
    assert isinstance(ready, Ready)
    assert (ready.site, ready.plan_digest) == (NAME, office.plan.digest)
    assert ready.spec_digest == office.context().adapter.spec.digest
    assert office.events() == [], "preparing costs nothing"


def test_a_round_gives_an_update_of_the_planned_form(office: Office) -> None:
    reply = office.train()
    assert isinstance(reply, TrainReply)
    adapter = office.context().adapter
    assert (said(reply).site, said(reply).round, said(reply).plan) == (NAME, 1, office.plan.digest)
    delta = adapter_vector.decode(reply.payload, "float32", adapter.spec.dimension)
    assert np.linalg.norm(delta) > 0


@pytest.mark.parametrize("name", ["", "x" * 201, "\ud800"], ids=["empty", "too long", "lone surrogate"])
def test_a_name_that_no_message_can_carry_is_refused_when_the_site_is_made(tmp_path: Path, name: str) -> None:
    place = LedgerPlace(tmp_path / "ledger.db", tmp_path / "ledger.anchor")
    with pytest.raises(ConfigError, match="name"):
        Site(name, widest(1.0, 1e-5), place, lambda: IDENTITY, None, Loader(), 8)  # type: ignore[arg-type]


# ---- what the site permits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "privacy",
    [{"mode": "off", "noise_multiplier": None}, {"insecure_seed": 1}, {"delta": 2e-3}],
    ids=["no noise", "seeded noise", "delta above the site's"],
)
@pytest.mark.parametrize("step", ["prepare", "train"])
def test_a_plan_beyond_policy_is_declined_before_records_and_ledger_are_touched(
    tmp_path: Path, make_plan: MakePlan, privacy: dict[str, Any], step: str
) -> None:
    office = Office(tmp_path, make_plan(privacy=privacy), epsilon=math.inf)
    assert reason(office.prepare() if step == "prepare" else office.train()) == "policy"
    assert office.loader.calls == 0
    assert not office.ledger_path.exists()


@pytest.mark.parametrize("step", ["prepare", "train"])
@pytest.mark.parametrize(
    "limits",
    [
        {"run_epsilon": 2.0},
        {"max_rank": 1},
        {"train": ("AB",)},
        {"modes": ("off",)},
        {"min_sites": 4},
        {"quantize": ("int8", "nf4")},
    ],
    ids=lambda v: next(iter(v)),
)
def test_every_limit_of_the_policy_holds_before_records_and_ledger_are_touched(
    tmp_path: Path, make_plan: MakePlan, site_log: list[logging.LogRecord], limits: dict[str, Any], step: str
) -> None:
    office = Office(tmp_path, make_plan(), **limits)
    assert reason(office.prepare() if step == "prepare" else office.train()) == "policy"
    assert office.loader.calls == 0
    assert not office.ledger_path.exists()
    assert any(next(iter(limits)) in record.getMessage() or "permits" in record.getMessage() for record in site_log)


@pytest.mark.parametrize(
    ("asked", "limit"),
    [
        ({"canaries": 3, "guesses": 1}, {"canaries": 2}),
        ({"evaluation": {"every": 1, "noise_multiplier": 0.5}}, {"min_noise_multiplier": 0.6}),
        ({"evaluation": {"every": 1, "noise_multiplier": 11.0}}, {"max_noise_multiplier": 10.0}),
        ({"evaluation": {"every": 1, "noise_multiplier": 0.7}}, {"run_epsilon": 10.0}),
    ],
    ids=lambda v: next(iter(v)),
)
def test_limits_hold_for_scores_and_canaries_as_well(
    tmp_path: Path, make_plan: MakePlan, asked: dict[str, Any], limit: dict[str, Any]
) -> None:
    wide = {"epsilon": 100.0}
    assert isinstance(Office(tmp_path / "a", make_plan(), **wide, **limit).prepare(), Ready)
    assert isinstance(Office(tmp_path / "b", make_plan(**asked), **wide).prepare(), Ready)
    assert reason(Office(tmp_path / "c", make_plan(**asked), **wide, **limit).prepare()) == "policy"


def test_a_run_that_is_not_paid_for_leaves_no_canaries(tmp_path: Path, make_plan: MakePlan) -> None:
    """Else a server could fill a ledger with the runs that it asks for, and have the canaries of others forgotten."""
    office = Office(tmp_path, make_plan(canaries=3, guesses=1), epsilon=0.01)
    assert reason(office.train()) == "budget"
    assert "canaries" not in [open_entry(line).kind for line in LedgerFile(office.ledger_path).lines()]
    assert not list(tmp_path.glob("*.canaries*"))


def test_a_site_that_permits_b_alone_trains_no_method_that_trains_all_it_has(
    tmp_path: Path, make_plan: MakePlan
) -> None:
    plan = make_plan(adapter={"method": "ia3"})
    assert reason(Office(tmp_path / "a", plan, train=("B",)).prepare()) == "policy"
    assert isinstance(Office(tmp_path / "b", plan).prepare(), Ready)


def test_virtual_tokens_count_towards_the_length_of_a_record(tmp_path: Path, make_plan: MakePlan) -> None:
    plan = make_plan(adapter={"method": "prefix", "tokens": 8})
    assert reason(Office(tmp_path / "a", plan, max_length=39).prepare()) == "policy"
    assert isinstance(Office(tmp_path / "b", plan, max_length=40).prepare(), Ready)


def test_a_plan_at_the_limits_of_the_policy_is_admitted(tmp_path: Path, make_plan: MakePlan) -> None:
    plan = make_plan()
    whole = spent([plan.mechanism.event(plan.steps)], 1e-3).epsilon
    limits = {"run_epsilon": whole, "max_rank": 2, "train": ("B",), "modes": ("local",), "min_sites": 3}
    assert isinstance(Office(tmp_path, plan, **limits).train(), TrainReply)


def test_a_period_has_a_budget_of_its_own_by_rdp(
    tmp_path: Path, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan()
    event = plan.mechanism.event(plan.training.local_steps)
    period = Period(days=30, epsilon=for_several_plans([event] * 2, 1e-3))
    office = Office(tmp_path, plan, epsilon=100.0, period=period)
    for round_ in (1, 2):
        assert isinstance(office.train(round_), TrainReply)
    assert reason(office.train(3)) == "budget"
    office.plan = make_plan(run="another")
    assert reason(office.prepare()) == "budget", "another run buys no other period"
    office.plan, real, counted = plan, time.time(), time.clock_gettime
    days = 29.0
    monkeypatch.setattr(time, "time", lambda: real + days * 86_400)
    monkeypatch.setattr(time, "clock_gettime", lambda clock: counted(clock) + days * 86_400)
    assert reason(office.train(3)) == "budget"
    monkeypatch.setattr(time, "time", lambda: real - 29 * 86_400)
    assert reason(office.train(3)) == "budget", "a clock that goes backwards frees nothing"
    days = 31.0
    monkeypatch.setattr(time, "time", lambda: real + days * 86_400)
    assert isinstance(office.train(3), TrainReply)


@pytest.mark.parametrize("step", ["prepare", "train"])
def test_an_office_that_protects_persons_declines_a_plan_that_protects_records(
    tmp_path: Path, make_plan: MakePlan, step: str
) -> None:
    office = Office(tmp_path, make_plan(), unit="person")
    assert reason(office.prepare() if step == "prepare" else office.train()) == "policy"
    assert office.loader.calls == 0
    office.plan = make_plan(privacy={"unit": "person"})
    assert isinstance(office.prepare(), Ready)


def test_a_site_may_permit_unprotected_plans(tmp_path: Path, make_plan: MakePlan) -> None:
    plan = make_plan(privacy={"mode": "off", "noise_multiplier": None})
    reply = Office(tmp_path, plan, epsilon=math.inf, allow_unprotected=True).train()
    assert (said(reply).epsilon, said(reply).epsilon_rdp) == (None, None)


@pytest.mark.parametrize("step", ["prepare", "train"])
def test_an_exhausted_budget_is_declined_before_any_record_is_tokenised(
    tmp_path: Path, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    plan = make_plan(run="second")
    event = plan.mechanism.event(plan.training.local_steps)
    budget = spent([event], 1e-3).epsilon * 1.01  # one round, and no other
    office = Office(tmp_path, plan, epsilon=budget)
    PrivacyLedger(office.ledger, budget, 1e-3, IDENTITY).reserve("first", 1, "of another run", event)

    def train_round(*_: object) -> None:
        raise AssertionError("trained without budget")

    monkeypatch.setattr(client.site, "train_round", train_round)
    assert reason(office.prepare() if step == "prepare" else office.train()) == "budget"
    assert office.loader.calls == 0
    assert office.events() == [event], "a refusal costs nothing"


def test_the_budget_ends_a_run_in_the_round_that_would_exceed_it(tmp_path: Path, make_plan: MakePlan) -> None:
    plan = make_plan()
    event = plan.mechanism.event(plan.training.local_steps)
    office = Office(tmp_path, plan, epsilon=spent([event] * 2, 1e-3).epsilon)  # just two rounds, to the last digit
    assert isinstance(office.train(1), TrainReply)
    assert isinstance(office.train(2), TrainReply)
    read_before = office.loader.calls
    office.restart()
    assert reason(office.train(3)) == "budget"
    assert office.loader.calls == read_before
    assert office.events() == [event] * 2


@pytest.mark.parametrize("step", ["prepare", "train"])
@pytest.mark.parametrize(
    ("units", "least"),
    [(0, 1), (5, 6), (11, 12)],
    ids=["empty site", "too few", "less than one expected batch"],
)
def test_too_few_declared_units_are_declined_however_many_there_are(
    tmp_path: Path, make_plan: MakePlan, units: int, least: int, step: str
) -> None:
    office = Office(tmp_path, make_plan(), loader=Loader(1000, declared=units), min_units=least)
    assert reason(office.prepare() if step == "prepare" else office.train()) == "data"


def test_enough_declared_units_are_not_declined_however_few_there_are(tmp_path: Path, make_plan: MakePlan) -> None:
    office = Office(tmp_path, make_plan(), loader=Loader(0, declared=12), min_units=12)
    assert isinstance(office.prepare(), Ready)
    assert isinstance(office.train(), TrainReply)


@pytest.mark.parametrize("step", ["prepare", "train"])
@pytest.mark.parametrize(
    "declared",
    [Declared(24, "record", ("a", "b")), Declared(24, "person")],
    ids=["classification", "persons"],
)
def test_a_plan_that_does_not_fit_the_declaration_is_declined(
    tmp_path: Path, make_plan: MakePlan, declared: Declared, step: str
) -> None:
    office = Office(tmp_path, make_plan())
    office.loader.declared = declared
    assert reason(office.prepare() if step == "prepare" else office.train()) == "data"
    assert office.loader.calls == 0
    assert office.events() == []


# ---- an engine that must not be trusted -----------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("step", ["prepare", "train"])
def test_an_engine_that_fails_the_self_check_is_declined_before_a_charge_and_before_records(
    tmp_path: Path, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, site_log: list[logging.LogRecord],
    step: str, asked: bool,
) -> None:  # fmt: skip
    """Whether the plan asks for it or the site does: the server cannot spare a site the check."""
    monkeypatch.setattr(Mechanism, "noise_std", 1.0)
    office = Office(tmp_path, make_plan(privacy={"clip_norm": 0.3, "self_check": asked}), self_check=not asked)
    assert reason(office.prepare() if step == "prepare" else office.train()) == "policy"
    assert office.loader.calls == 0
    assert office.events() == []
    assert any("self-check noise-has-the-charged-deviation" in record.getMessage() for record in site_log)


def test_a_simulation_may_go_without_the_self_check(
    tmp_path: Path, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.site, "self_check_once", lambda _: pytest.fail("it was not asked for"))
    office = Office(tmp_path, make_plan())
    assert isinstance(office.prepare(), Ready)
    assert isinstance(office.train(), TrainReply)


def test_an_engine_is_checked_once_for_a_plan_and_left_as_it_was(
    tmp_path: Path, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[RunPlan] = []
    honest = self_check.self_check

    def count(subject: self_check.Subject) -> None:
        before = subject.adapter.vector()
        honest(subject)
        assert subject.adapter.vector().tobytes() == before.tobytes()
        checked.append(subject.plan)

    monkeypatch.setattr(self_check, "self_check", count)
    plan = make_plan(privacy={"clip_norm": 0.7, "self_check": True})
    for name in ("a", "b"):  # two sites of one process
        (tmp_path / name).mkdir()
        office = Office(tmp_path / name, plan)
        assert isinstance(office.prepare(), Ready)
        assert isinstance(office.train(1), TrainReply)
        assert isinstance(office.train(2), TrainReply)
    assert checked == [plan]
    office.plan = make_plan(run="another", privacy={"clip_norm": 0.71, "self_check": True})
    assert isinstance(office.train(), TrainReply)
    assert len(checked) == 2


# ---- requests that are wrong ----------------------------------------------------------------------------------------


def _nan(payload: bytes) -> bytes:
    return np.float32("nan").tobytes() + payload[4:]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"spec_digest": "0" * 64}, "model"),
        ({"payload": lambda p: p[:-4]}, "message"),
        ({"payload": lambda p: p + b"\0"}, "message"),
        ({"payload": lambda p: b""}, "message"),
        ({"payload": _nan}, "message"),
        ({"payload": lambda p: np.float32("inf").tobytes() + p[4:]}, "message"),
        ({"round": 5}, "message"),
        ({"round": 1_000_000}, "message"),
    ],
    ids=["other adapter", "short", "long", "empty", "NaN", "infinite", "round beyond the plan", "enormous round"],
)
def test_a_wrong_request_is_declined_and_costs_nothing(office: Office, change: dict[str, Any], expected: str) -> None:
    right = from_bytes(office.request(), TrainRequest, TrainRequest).payload
    values = {key: value(right) if callable(value) else value for key, value in change.items()}
    assert reason(office.train(**values)) == expected
    assert office.loader.calls == 0
    assert not office.ledger_path.exists() or office.events() == []


def test_a_round_is_trained_for_one_request_only(office: Office, make_plan: MakePlan) -> None:
    """Two answers from different starting points would be two releases at the price of one."""
    first = office.train(1)
    assert isinstance(first, TrainReply)
    dimension = office.context().adapter.spec.dimension
    assert reason(office.train(1, payload=adapter_vector.encode(np.ones(dimension, np.float32), "float32"))) == "ledger"
    office.plan = make_plan(privacy={"clip_norm": 2.0})  # the same run and round, another plan
    assert reason(office.train(1)) == "ledger"
    assert len(office.events()) == 1


def test_a_ledger_that_cannot_be_used_stops_the_site_before_records_are_tokenised(office: Office) -> None:
    office.ledger_path.write_bytes(b"not a database" * 400)
    assert reason(office.train()) == "ledger"
    assert office.loader.calls == 0
    assert reason(office.prepare()) == "ledger"


@pytest.fixture
def site_log() -> Iterator[list[logging.LogRecord]]:
    """Everything that goes to the sites' own log."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("fedllm.site")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


# ---- what a refusal tells -------------------------------------------------------------------------------------------


_ERRORS = [
    KeyError(SECRET), ValueError(SECRET), RuntimeError(SECRET), MemoryError(SECRET), RecursionError(SECRET),
    StopIteration(SECRET), AssertionError(SECRET), OSError(5, SECRET),
    UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET),
]  # fmt: skip


@pytest.mark.parametrize("step", ["prepare", "train"])
@pytest.mark.parametrize("error", [DataError(SECRET), ConfigError(SECRET), *_ERRORS], ids=lambda e: type(e).__name__)
def test_a_refusal_tells_a_code_and_the_log_tells_why(
    tmp_path: Path, make_plan: MakePlan, site_log: list[logging.LogRecord], step: str, error: Exception
) -> None:
    office = Office(tmp_path, make_plan())
    request = Prepare(plan=office.plan).to_bytes() if step == "prepare" else office.request()

    def fail(_: RunPlan) -> ModelContext:
        raise error

    reply = office.make(fail).handle(request)
    assert set(header(reply)) == {"kind", "site", "reason"}
    assert reason(read(reply)) == ("data" if isinstance(error, DataError | ConfigError) else "internal")
    assert SECRET.encode() not in reply
    assert len(reply) < 200
    assert any(SECRET in logging.Formatter().format(record) for record in site_log), "the site's log says what failed"


@pytest.mark.parametrize("error", [DataError(SECRET), ModelError(SECRET), *_ERRORS], ids=lambda e: type(e).__name__)
def test_a_site_that_fails_while_it_uses_records_answers_nothing_until_its_owner_acts(
    tmp_path: Path, make_plan: MakePlan, site_log: list[logging.LogRecord], error: Exception
) -> None:
    """One bit, once: a reply with a code, or another try, would be a noise-free answer about the records."""
    office = Office(tmp_path, make_plan(), loader=Loader(error=error))
    with pytest.raises(Halted) as halted:
        office.train()
    assert SECRET not in str(halted.value)
    assert any(SECRET in logging.Formatter().format(record) for record in site_log), "the site's log says what failed"
    office.loader = Loader()
    for request in (office.request(), office.request(2), Prepare(plan=make_plan(run="another")).to_bytes(), b"?"):
        for site in (office.site, office.restart()):
            with pytest.raises(Halted, match="round 1 of run run-1"):
                site.handle(request)
    Unfinished(office.ledger_path).end()
    assert isinstance(office.train(), TrainReply)
    assert len(office.events()) == 1


def test_what_used_records_leaves_at_whole_quanta_and_nothing_is_answered_before(
    tmp_path: Path, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    office, slept, now = Office(tmp_path, make_plan(), reply_quantum=3.0), list[float](), [100.0]

    def sleep(seconds: float) -> None:
        assert office.site._lock.locked(), "another request would learn when the records had been used"
        slept.append(seconds)

    def train_round(*_: Any) -> NDArray[np.float32]:
        now[0] += 4.25
        return np.zeros(office.context().adapter.spec.dimension, np.float32)

    request = office.request()
    monkeypatch.setattr(client.site.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(client.site.time, "sleep", sleep)
    monkeypatch.setattr(client.site, "train_round", train_round)
    office.prepare()
    assert slept == [], "what uses no record is answered at once"
    office.site.handle(request)
    assert slept == [1.75]
    office.site.handle(request)
    assert slept == [1.75], "it was answered before"

    def cancel(*_: Any) -> NDArray[np.float32]:
        now[0] += 1.0
        raise Cancelled("nobody waits")

    monkeypatch.setattr(client.site, "train_round", cancel)
    with pytest.raises(Cancelled):
        office.train(2)
    assert slept == [1.75, 2.0], "who gives up learns no more"


@pytest.mark.parametrize("units", [24, 25, 61])
def test_what_a_reply_says_beside_the_update_does_not_depend_on_the_records(
    tmp_path: Path, make_plan: MakePlan, units: int
) -> None:
    """No record counts, no losses, no timings: the header is a function of the plan and the budget spent."""
    office = Office(tmp_path, make_plan(), units=units)
    reply = office.site.handle(office.request())
    assert set(header(reply)) == {"kind", "statement"}
    assert header(reply)["kind"] == "update"
    cost = spent([office.plan.mechanism.event(2)], 1e-3)
    statement, signer = open_statement(header(reply)["statement"])
    head = LedgerFile(office.ledger_path).head()
    assert signer == IDENTITY.public
    reserved = open_entry(LedgerFile(office.ledger_path).lines()[head.number - 1])  # before the release
    assert statement == Statement(
        NAME, office.plan.run, office.plan.digest, 1, cost.epsilon, cost.epsilon_rdp, 1e-3, reserved.number,
        reserved.digest, update_digest(from_bytes(reply, TrainReply, TrainReply).payload),
        BEGUN.roster, BEGUN.number, BEGUN.digest, adapter_digest(office.context().adapter.initial), grid=cost.grid,
    )  # fmt: skip
    ready = office.site.handle(Prepare(plan=office.plan).to_bytes())
    assert set(header(ready)) == {"kind", "site", "plan_digest", "spec_digest"}


@pytest.mark.parametrize(("wire", "value"), [("float16", 1e6), ("float32", np.inf), ("float32", np.nan)])
def test_an_update_that_cannot_be_sent_is_a_failure_of_training(
    tmp_path: Path, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, wire: str, value: float
) -> None:
    """Not of the message that asked for it: the server must not look for the fault on its own side."""
    office = Office(tmp_path, make_plan(training={"wire": wire}))
    dimension = office.context().adapter.spec.dimension
    monkeypatch.setattr(client.site, "train_round", lambda *_: np.full(dimension, value, np.float32))
    assert reason(office.train()) == "training"
    assert len(office.events()) == 1, "the records were used: the charge stands"


def test_diverged_training_is_declined_and_leaves_the_charge(tmp_path: Path, make_plan: MakePlan) -> None:
    office = Office(tmp_path, make_plan(training={"learning_rate": 1e6, "wire": "float16"}, privacy={"clip_norm": 1e4}))
    assert reason(office.train()) == "training"
    assert len(office.events()) == 1


# ---- charge before release ------------------------------------------------------------------------------------------


def test_the_same_request_twice_gives_the_same_bytes_and_one_charge(office: Office) -> None:
    request = office.request()
    first = office.site.handle(request)
    assert isinstance(read(first), TrainReply)
    assert office.site.handle(request) == first
    office.restart()
    calls = office.loader.calls
    assert office.site.handle(request) == first
    assert office.loader.calls == calls, "a repeated answer needs no records"
    assert len(office.events()) == 1


def test_the_same_request_from_two_threads_is_trained_once(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []
    original = client.site.train_round

    def train_round(*arguments: Any) -> NDArray[np.float32]:
        trained.append(1)
        return original(*arguments)

    monkeypatch.setattr(client.site, "train_round", train_round)
    request, replies = office.request(), []
    start = threading.Barrier(4)

    def ask() -> None:
        start.wait()
        replies.append(office.site.handle(request))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(replies)) == 1
    assert len(replies) == 4
    assert trained == [1]
    assert len(office.events()) == 1


def test_a_refusal_after_training_is_the_answer_of_that_round_for_ever(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether training failed may depend on the records: a free second try would be a second release."""

    def fail(*_: object) -> NDArray[np.float32]:
        raise Diverged("diverged")

    with monkeypatch.context() as patch:
        patch.setattr(client.site, "train_round", fail)
        first = office.site.handle(office.request())
    assert reason(read(first)) == "training"
    assert office.site.handle(office.request()) == first
    assert office.restart().handle(office.request()) == first
    assert len(office.events()) == 1
    assert isinstance(office.train(2), TrainReply), "the next round is another one"


def test_an_old_round_is_not_trained_again_once_its_reply_is_gone(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    for round_ in (1, 2, 3):
        assert isinstance(office.train(round_), TrainReply)

    def train_round(*_: object) -> None:
        raise AssertionError("trained a released round again")

    monkeypatch.setattr(client.site, "train_round", train_round)
    assert reason(office.train(1)) == "ledger"
    assert len(office.events()) == 3


_POINTS = ["load_units", "score", "train_round", "encode", "release"]
SCORES = {"every": 1, "noise_multiplier": 2.0}


def _interrupt(point: str, office: Office, patch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Call `act` where the round has come to `point`."""

    def stop(*_: object, **__: object) -> Any:
        act()

    if point == "load_units":
        office.loader.__class__ = type("Interrupted", (Loader,), {"units": stop})
    elif point in ("score", "train_round"):
        patch.setattr(client.site, point, stop)
    elif point == "encode":
        patch.setattr(client.site.adapter_vector, "encode", stop)
    else:
        patch.setattr(PrivacyLedger, "release", stop)


@pytest.mark.parametrize("point", _POINTS)
def test_a_crash_after_the_charge_leaves_it_and_the_repeated_round_is_not_charged_again(
    office: Office, monkeypatch: pytest.MonkeyPatch, make_plan: MakePlan, point: str
) -> None:
    office.plan = make_plan(evaluation=SCORES)
    request = office.request()

    def crash() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        _interrupt(point, office, patch, crash)
        with pytest.raises(Killed):
            office.site.handle(request)
    assert len(office.events()) == 1, "charged before anything was read"
    office.loader = Loader()
    if point != "release":
        with pytest.raises(Halted):
            office.restart().handle(request)
    Unfinished(office.ledger_path).end()
    reply = office.restart().handle(request)
    assert isinstance(read(reply), TrainReply)
    assert office.site.handle(request) == reply
    assert len(office.events()) == 1


@pytest.mark.parametrize("point", _POINTS)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # os.fork, Python 3.12
def test_a_killed_process_leaves_the_charge_and_no_second_one(
    office: Office, monkeypatch: pytest.MonkeyPatch, make_plan: MakePlan, point: str
) -> None:
    office.plan = make_plan(evaluation=SCORES)
    request = office.request()
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:  # the site's process: it is killed at `point`
        try:

            def wait_for_the_end() -> None:
                os.write(writable, b"here")
                signal.pause()

            _interrupt(point, office, monkeypatch, wait_for_the_end)
            office.site.handle(request)
        finally:
            os._exit(0)
    os.close(writable)
    assert os.read(readable, 4) == b"here", "the round ended before it could be killed"
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    os.close(readable)
    assert len(office.events()) == 1
    if point != "release":
        with pytest.raises(Halted):
            office.restart().handle(request)
    Unfinished(office.ledger_path).end()
    assert isinstance(read(office.restart().handle(request)), TrainReply)
    assert len(office.events()) == 1


# ---- the stated privacy loss ----------------------------------------------------------------------------------------


def test_the_stated_epsilon_composes_over_rounds_and_runs(office: Office, make_plan: MakePlan) -> None:
    event = office.plan.mechanism.event(2)
    for round_ in (1, 2, 3):
        reply = office.train(round_)
        office.restart()
        cost = spent([event] * round_, 1e-3)
        assert (said(reply).epsilon, said(reply).epsilon_rdp) == (cost.epsilon, cost.epsilon_rdp)
    office.plan = make_plan(run="run-2", privacy={"noise_multiplier": 3.0})
    reply = office.train(1)
    assert said(reply).epsilon == spent([event] * 3 + [office.plan.mechanism.event(2)], 1e-3).epsilon


def test_epsilon_is_stated_at_the_delta_of_the_plan(tmp_path: Path, make_plan: MakePlan) -> None:
    """The report prints it beside the plan's delta; at the site's own, laxer delta it would look smaller than it is."""
    plan = make_plan(privacy={"delta": 1e-5})
    reply = Office(tmp_path, plan, delta=1e-2, epsilon=20.0).train()
    assert said(reply).delta == 1e-5
    assert said(reply).epsilon == spent([plan.mechanism.event(2)], 1e-5).epsilon


# ---- randomness -----------------------------------------------------------------------------------------------------


def test_a_private_update_is_different_every_time(tmp_path: Path, make_plan: MakePlan) -> None:
    updates = [update(Office(tmp_path / str(i), make_plan()).train()) for i in range(2)]
    assert not np.array_equal(*updates)


@pytest.mark.parametrize(
    "privacy", [{"mode": "off", "noise_multiplier": None}, {"insecure_seed": 5}], ids=["off", "seeded"]
)
def test_a_run_that_is_not_private_can_be_repeated_to_the_bit(
    tmp_path: Path, make_plan: MakePlan, privacy: dict[str, Any]
) -> None:
    offices = [
        Office(tmp_path / str(i), make_plan(privacy=privacy), epsilon=math.inf, allow_unprotected=True)
        for i in range(2)
    ]
    first, second = (update(office.train(1)) for office in offices)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, update(offices[0].train(2))), "another round draws other coins"


def test_no_seed_reaches_the_coins_of_a_private_plan(
    tmp_path: Path, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seeded(*_: object) -> None:
        raise AssertionError("seeded randomness in a private run")

    monkeypatch.setattr(client.site, "SeededRandomness", seeded)
    assert isinstance(Office(tmp_path, make_plan()).train(), TrainReply)


# ---- giving up -----------------------------------------------------------------------------------------------------


def test_a_round_that_is_given_up_stays_paid_and_is_answered_when_it_is_asked_for_again(
    tmp_path: Path, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    office = Office(tmp_path, make_plan())
    stop, real = threading.Event(), client.site.train_round

    def train_round(*arguments: Any) -> NDArray[np.float32]:
        stop.set()  # nobody waits any more
        return real(*arguments)

    monkeypatch.setattr(client.site, "train_round", train_round)
    with pytest.raises(Cancelled):
        office.site.handle(office.request(), stop)
    assert len(office.events()) == 1, "it stays charged"
    monkeypatch.setattr(client.site, "train_round", real)
    assert np.isfinite(update(office.train())).all()
    assert len(office.events()) == 1, "and is not charged again"


def test_who_waits_for_a_busy_site_can_give_up(tmp_path: Path, make_plan: MakePlan) -> None:
    office = Office(tmp_path, make_plan())
    stop = threading.Event()
    with office.site._lock:
        stop.set()
        with pytest.raises(Cancelled):
            office.site.handle(office.request(), stop)
    assert office.events() == []


# ---- a ledger that was put back ------------------------------------------------------------------------------------


def signed_head(message: Message) -> LedgerHead:
    statement = said(message)
    return LedgerHead(statement.ledger_number, statement.ledger_digest)


def test_the_ledger_that_a_site_signed_for_is_still_there_in_the_next_round(office: Office) -> None:
    first = signed_head(office.train(1))
    second = signed_head(office.train(2, head=first))
    assert second.number > first.number
    assert office.train(2, head=second) == office.train(2), "a repeated round gives the same bytes"
    office.restart()
    assert isinstance(office.train(3, head=second), TrainReply)


@pytest.mark.parametrize("case", ["removed", "older", "never was", "gone on another way"])
def test_a_ledger_without_the_entry_that_was_signed_for_is_refused(office: Office, case: str) -> None:
    office.train(1)
    backup = office.ledger_path.read_bytes()
    head = signed_head(office.train(2))
    if case == "removed":
        for file in office.ledger_path.parent.glob("ledger.db*"):
            file.unlink()
    elif case == "never was":
        head = LedgerHead(head.number, "0" * 64)
    else:
        office.ledger_path.write_bytes(backup)
    office.restart()
    if case == "gone on another way":
        other = office.context().adapter.initial + 1
        office.train(2, payload=adapter_vector.encode(other, "float32"))
    before, calls = office.events(), office.loader.calls
    assert reason(office.train(3, head=head)) == "ledger"
    assert (office.events(), office.loader.calls) == (before, calls)
