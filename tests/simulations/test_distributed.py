"""Noise in shares: the federation trains as one pooled trainer would, and the server reads nothing but sums."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import server.run
from client.site import Site
from fedllm.audit.bundle import verify, write_audit
from fedllm.audit.summary import RunSummary
from fedllm.audit.trust import Trust
from fedllm.config import SimulationConfig
from fedllm.crypto.hash_chain import open_entry
from fedllm.errors import ConfigError
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import spent_at_sites
from fedllm.privacy.distributed_noise import rounded_normals
from fedllm.privacy.ledger import LedgerFile
from fedllm.privacy.randomness import SeededRandomness
from fedllm.privacy.split import Split
from fedllm.protocol.messages import (
    ConsistencyCheck,
    ConsistencySignature,
    Declined,
    MaskedInput,
    SecAggRequest,
    TrainReply,
    TrainRequest,
    UnmaskingShares,
    from_bytes,
    unpack,
)
from fedllm.secagg import Participant, participant
from fedllm.training.model_context import open_context
from fedllm.training.server_optimizer import ServerOptimizer
from server.checkpoint import load_checkpoint
from server.events import Event
from server.run_record import RECORD_FILE, key_in
from simulations.simulate import KEYS, simulate
from simulations.sites import simulated_data
from tests.fedllm.audit.test_evidence import failing, lie
from tests.simulations.conftest import Configure, merge

BRANCHES = ("busan", "daegu", "jeju", "강남")
SHARED: dict[str, Any] = {
    "data": {"samples": 0},
    "privacy": {"mode": "distributed", "noise_multiplier": 4.0},  # its losses are quickly composed
    "training": {"rounds": 2, "local_steps": 1, "wire": "float16"},
    "federation": {"quorum": None, "round_timeout": 60.0},
}
Handle = Callable[..., bytes]


@pytest.fixture(autouse=True)
def _no_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots and summaries are not what is tested here."""
    monkeypatch.setattr(server.run, "write_outputs", lambda *_: None)


def changed(**changes: dict[str, Any]) -> dict[str, Any]:
    return {key: {**SHARED.get(key, {}), **changes.get(key, {})} for key in {*SHARED, *changes}}


def run(config: SimulationConfig, observe: Callable[[Event], None] = lambda _: None) -> RunSummary:
    return simulate(config, lambda *_: None, observe)


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    """The bodies of a record's rounds."""
    entries = map(open_entry, (folder / RECORD_FILE).read_text("utf-8").splitlines())
    return [entry.body for entry in entries if entry.kind == "round"]


def verdict(folder: Path) -> str:
    """What an audit of the run finds, without its pages and signature."""
    return write_audit(folder, folder / "audit", pages=()).audit.verdict


def adapter_of(folder: Path) -> NDArray[np.float32]:
    return load_checkpoint(folder / "checkpoint.safetensors").adapter


def pooled(config: SimulationConfig, plan: RunPlan) -> tuple[NDArray[np.float32], float]:
    """One trainer who holds all records, with the sites' own coins and noise: DP-SGD in float64, nothing rounded.

    All sites are there, so nothing of their noise but the part without a seed stays.

    Returns the adapter and the largest that rounding to quanta may have moved a coordinate of one step's gradient.
    """
    context = open_context(plan.model, plan.adapter, plan.seed, "cpu")
    engine, adapter, distributed, data = context.engine, context.adapter, plan.distributed, simulated_data(config)
    assert distributed is not None
    optimizer = ServerOptimizer(plan.training.server, adapter.initial)
    worst = 0.0
    for number in range(1, plan.training.rounds + 1):
        total = np.zeros(adapter.spec.dimension)
        drawn_units = 0
        for name in data.names:
            units = data.records(name, plan.model).units(plan, Split(0.0, bytes(32)), "training")
            source = SeededRandomness(plan.privacy.insecure_seed or 0, name, number)
            noise = rounded_normals(source, total.size, distributed._std(distributed._parts[0]))
            source.words(4 * len(distributed._parts[1:]))  # the seeds of the others
            drawn = distributed.mechanism.sample(len(units), source)
            adapter.load(optimizer.value)
            total += engine.clipped_sum([units[i] for i in drawn], distributed.mechanism, 8).numpy()
            total += noise * distributed.quantum
            drawn_units += len(drawn)
        lost = np.sqrt(total.size) / 2 / distributed.scale * plan.privacy.clip_norm
        worst = max(worst, drawn_units * (distributed.quantum / 2 + lost) / (len(data.names) * plan.expected_units))
        gradient = total / (len(data.names) * plan.expected_units)
        delta = -(plan.training.learning_rate * gradient).astype(np.float32)
        optimizer.step(delta, (number - 1) / plan.training.rounds)
    return optimizer.value, worst


@pytest.mark.parametrize("sites", [2, 8, pytest.param(32, marks=pytest.mark.slow)])
def test_the_federation_trains_as_one_pooled_trainer_would(tmp_path: Path, configure: Configure, sites: int) -> None:
    """With the same coins and noise: the same adapter, up to the stated rounding of gradients to quanta."""
    config = configure(tmp_path, **changed(
        privacy={"insecure_seed": 11, "noise_multiplier": 0.6, "colluding_sites": 0 if sites == 2 else 1,
                 "sampling_rate": 0.6, "unit": "record", "units_per_site": max(2, 80 // sites)},
        federation={"partition": {"by": "iid", "sites": sites, "column": None}},
        site={"min_units": 1},
    ))  # fmt: skip
    done = run(config)
    assert not done.stopped
    expected, worst = pooled(config, done.plan)
    start = open_context(done.plan.model, done.plan.adapter, done.plan.seed, "cpu").adapter.initial
    found = adapter_of(done.folder)
    assert np.abs(expected - start).max() > 0.01, "there was something to learn"
    # every round's error, and what a gradient at a slightly other adapter adds to it
    bound = 4 * done.plan.training.rounds * done.plan.training.learning_rate * worst + 1e-6
    assert np.abs(found - expected).max() <= bound
    assert bound < 1e-3 * np.abs(expected - start).max()


def test_a_run_is_audited_and_verified(tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "weasyprint", None)  # PDFs take longer than all else here
    done = run(configure(tmp_path, audit={"report": True}, **SHARED))
    assert done.plan.quorum == 3, "two thirds of four sites"
    audit, _ = verify(done.folder / "audit", Trust.read(done.folder / KEYS))
    assert (audit.verdict, audit.claim.mode, audit.claim.quorum) == ("within", "distributed", 3)
    assert audit.accountants.share_alone is not None
    assert audit.accountants.pld is not None
    assert audit.accountants.share_alone > audit.accountants.pld
    (two, epsilon_of_two), *_ = audit.accountants.several_sites
    assert two == 2
    expected = spent_at_sites([(done.plan.mechanism.event(done.plan.steps), two)], done.plan.privacy.delta)
    assert epsilon_of_two == pytest.approx(expected.epsilon, abs=1e-6)
    assert expected.epsilon > 1.9 * audit.accountants.pld, "a person at two sites moves the one sum up to twice as far"
    for body in rounds_of(done.folder):
        assert body["trimmed"] == 4, "everybody was there, and gave the noise away that is not needed"
        assert body["noise_multiplier"] == pytest.approx(done.plan.mechanism.noise_multiplier)
    for language, word in (("", "masks its sum"), (".ko", "합계를 마스킹합니다")):
        assert word in (done.folder / "audit" / f"audit{language}.html").read_text("utf-8")

    head_office, distributed = key_in(done.folder), done.plan.distributed
    assert distributed is not None
    for trimmed in (None, -1, 2, 5):  # fewer than the quorum, or more than answered: the sum could not have been read

        def overstate(bodies: list[dict[str, Any]], trimmed: int | None = trimmed) -> None:
            for body in bodies:
                if body["kind"] == "round":
                    body |= {
                        "trimmed": trimmed,
                        "noise_multiplier": distributed.noise_multiplier(4, max(trimmed or 0, 0), 1),
                    }

        lie(done.folder, head_office, overstate)
        # metrics, if the noise that they state is another
        assert failing(done.folder) - {"metrics"} == {"countersigned", "rounds"}, "sites have signed the record's place"


def replies_of(monkeypatch: pytest.MonkeyPatch, fail: Callable[[str, object], bool]) -> list[tuple[str, TrainReply]]:
    """Let sites vanish where `fail` says so of a site and its request; return the replies that the server gets."""
    honest = Site.handle
    replies: list[tuple[str, TrainReply]] = []

    def handle(self: Site, request: bytes, *rest: Any) -> bytes:
        try:
            message: Any = from_bytes(request, TrainRequest, SecAggRequest)
        except Exception:
            message = None
        if isinstance(message, SecAggRequest):
            try:
                message = from_bytes(message.payload, ConsistencyCheck, ConsistencyCheck)
            except Exception:
                message = None
        if fail(self.name, message):
            raise RuntimeError("vanished")
        answer = honest(self, request, *rest)
        if isinstance(message, TrainRequest):
            reply = from_bytes(answer, TrainReply, Declined)
            if isinstance(reply, TrainReply):
                replies.append((self.name, reply))
        return answer

    monkeypatch.setattr(Site, "handle", handle)
    return replies


@pytest.mark.parametrize("kind", [TrainRequest, ConsistencyCheck])
def test_sites_may_vanish_down_to_the_quorum(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    replies_of(monkeypatch, lambda name, message: name == "jeju" and isinstance(message, kind))
    done = run(configure(tmp_path, **SHARED))
    assert not done.stopped
    bodies = rounds_of(done.folder)
    for body in bodies:
        assert body["counts"]
        assert ("jeju" in body["answered"]) == (kind is ConsistencyCheck)
    # a share has 3 units of noise, 2 where all four survive; one may collude, with a share of the most
    assert [body["trimmed"] for body in bodies] == [3, 3]
    kept = 3 + 3 if kind is TrainRequest else 2 + 2 + 2
    assert bodies[0]["noise_multiplier"] == pytest.approx(done.plan.mechanism.noise_multiplier * np.sqrt(kept / 6))
    assert verdict(done.folder) == "within"


def test_who_gives_back_wrong_shares_is_on_record_and_not_asked_again_and_the_round_counts(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Participant.unmask

    def unmask(self: Participant, request: ConsistencyCheck) -> ConsistencySignature | UnmaskingShares:
        answer = honest(self, request)
        if self.join.join.site == "busan" and isinstance(answer, UnmaskingShares):
            return answer.model_copy(update={"payload": bytes(byte ^ 1 for byte in answer.payload)})
        return answer

    monkeypatch.setattr(Participant, "unmask", unmask)
    done = run(configure(tmp_path, **SHARED))
    assert not done.stopped
    first, second = rounds_of(done.folder)
    assert first["counts"]
    assert second["counts"]
    assert set(first["answered"]) == set(BRANCHES)
    assert list(first["failed"]) == ["busan"]
    assert "wrong shares" in first["failed"]["busan"]
    assert set(second["answered"]) == {*BRANCHES} - {"busan"}
    assert verdict(done.folder) == "within"


def test_below_the_quorum_the_sum_stays_closed_and_the_spend_stands(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, message: object) -> bool:
        return isinstance(message, ConsistencyCheck) and message.round == 1 and name in ("jeju", "busan")

    replies_of(monkeypatch, fail)
    done = run(configure(tmp_path, **SHARED))
    assert not done.stopped
    first, second = rounds_of(done.folder)
    assert not first["counts"]
    assert "unmask" in first["lost"]
    assert first["adapter_after"] == first["adapter_before"]
    assert second["counts"]
    for name in BRANCHES:
        charges = LedgerFile(done.folder / "sites" / name / "ledger.db").charges()
        assert len(charges) == 2, "the lost round was paid for"
    assert verdict(done.folder) == "within"


def test_a_run_ends_before_all_is_spent_for_nothing(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies_of(monkeypatch, lambda name, message: isinstance(message, ConsistencyCheck) and name in ("jeju", "busan"))
    done = run(configure(tmp_path, **changed(training={"rounds": 6})))
    assert "3 rounds in a row were lost" in done.stopped
    assert [body["counts"] for body in rounds_of(done.folder)] == [False] * 3


def test_a_site_that_was_started_again_joins_anew(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[int] = []

    honest = Site.handle

    def handle(self: Site, request: bytes, *rest: Any) -> bytes:
        if self.name == "daegu" and not forgotten:
            try:
                message = from_bytes(request, TrainRequest, TrainRequest)
            except Exception:
                message = None
            if message is not None and message.round == 2:
                forgotten.append(2)
                assert self._masks is not None
                self._masks._members.clear()  # as a new process would have none
        return honest(self, request, *rest)

    monkeypatch.setattr(Site, "handle", handle)
    done = run(configure(tmp_path, **changed(training={"rounds": 4})))
    bodies = rounds_of(done.folder)
    assert ["daegu" in body["answered"] for body in bodies] == [True, False, True, True]
    assert bodies[1]["declined"] == {"daegu": "masks"}
    ledger = LedgerFile(done.folder / "sites" / "daegu" / "ledger.db").charges()
    assert len(ledger) == 3, "it paid nothing for the round that it could not mask"


def test_a_resumed_run_gives_the_interrupted_round_up(tmp_path: Path, configure: Configure) -> None:
    changes = changed(training={"rounds": 4})
    with pytest.raises(StopHereError):
        run(configure(tmp_path, **changes), stop_in(2))
    done = run(configure(tmp_path, resume=True, **changes))
    assert not done.stopped
    bodies = rounds_of(done.folder)
    assert [(body["round"], body["counts"]) for body in bodies] == [(1, True), (2, False), (3, True), (4, True)]
    assert "started again" in bodies[1]["lost"]
    for state in done.sites.values():
        assert state["charged"] == 4, "also of the round that was given up"
        assert state["epsilon"] <= done.plan.privacy.epsilon
    assert verdict(done.folder) == "within"


class StopHereError(Exception):
    """The server ends without a word."""


def stop_in(number: int) -> Callable[[Event], None]:
    def stop(event: Event) -> None:
        if type(event).__name__ == "SiteAnswered" and event.round == number:
            raise StopHereError

    return stop


def test_a_run_outlives_lost_rounds_and_many_ends_of_head_office(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, message: object) -> bool:
        return isinstance(message, ConsistencyCheck) and message.round == 3 and name in ("jeju", "busan")

    replies_of(monkeypatch, fail)
    changes = changed(training={"rounds": 6})
    for number, resume in ((2, False), (4, True), (5, True)):
        with pytest.raises(StopHereError):
            run(configure(tmp_path, resume=resume, **changes), stop_in(number))
    done = run(configure(tmp_path, resume=True, **changes))
    assert not done.stopped
    bodies = rounds_of(done.folder)
    assert [(body["round"], body["counts"]) for body in bodies] == [
        (1, True), (2, False), (3, False), (4, False), (5, False), (6, True)
    ]  # fmt: skip
    assert verdict(done.folder) == "within"


def test_a_run_that_went_back_to_the_checkpoint_before_asks_for_no_round_twice(
    tmp_path: Path, configure: Configure
) -> None:
    changes = changed(training={"rounds": 5})
    with pytest.raises(StopHereError):
        run(configure(tmp_path, **changes), stop_in(3))
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])  # a damaged disk: the one before is taken
    done = run(configure(tmp_path, resume=True, **changes))
    assert not done.stopped
    last = {body["round"]: body["counts"] for body in rounds_of(done.folder)}
    assert last == {1: True, 2: False, 3: False, 4: True, 5: True}


def test_a_run_that_lost_three_rounds_goes_on_when_resumed(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = {"jeju", "busan"}
    replies_of(monkeypatch, lambda name, message: isinstance(message, ConsistencyCheck) and name in away)
    changes = changed(training={"rounds": 5})
    assert "in a row" in run(configure(tmp_path, **changes)).stopped
    away.clear()
    done = run(configure(tmp_path, resume=True, **changes))
    assert not done.stopped
    assert [body["counts"] for body in rounds_of(done.folder)] == [False] * 3 + [True] * 2, "nothing more was lost"
    assert verdict(done.folder) == "within"


def test_a_round_that_nobody_paid_for_is_asked_for_again_until_somebody_did(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = {"jeju", "busan", "daegu", "강남"}
    honest = Site.handle

    def handle(self: Site, request: bytes, *rest: Any) -> bytes:
        if request[8:40].startswith(b'{"kind":"train"') and self.name in refusing:
            return Declined(site=self.name, reason="message").to_bytes()
        return honest(self, request, *rest)

    monkeypatch.setattr(Site, "handle", handle)
    changes = changed(training={"rounds": 2})
    assert "0 sites" in run(configure(tmp_path, **changes)).stopped
    refusing.clear()
    with pytest.raises(StopHereError):  # now the sites pay for round 1, and the server ends
        run(configure(tmp_path, resume=True, **changes), stop_in(1))
    done = run(configure(tmp_path, resume=True, **changes))
    assert not done.stopped
    last = {body["round"]: body["counts"] for body in rounds_of(done.folder)}
    assert last == {1: False, 2: True}
    for name in BRANCHES:  # the server knows who paid for round 1, though no checkpoint named anybody when it ended
        assert len(LedgerFile(done.folder / "sites" / name / "ledger.db").charges()) == 2
        assert done.sites[name]["charged"] == 2


def test_a_quorum_that_was_raised_on_the_way_holds(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = changed(training={"rounds": 3})
    with pytest.raises(StopHereError):
        run(configure(tmp_path, **changes), stop_in(2))
    replies_of(monkeypatch, lambda name, message: isinstance(message, TrainRequest) and name == "jeju")
    done = run(configure(tmp_path, resume=True, **merge(changes, {"federation": {"quorum": 4}})))
    bodies = rounds_of(done.folder)
    assert [body["counts"] for body in bodies] == [True, False, False]
    assert bodies[-1]["adapter_after"] == bodies[-1]["adapter_before"]
    assert verdict(done.folder) == "within"


@pytest.mark.parametrize("masks", [True, False])
def test_what_a_site_uploads_is_not_its_sum(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, masks: bool
) -> None:
    """The highest four bits of masked uploads are uniform; without masks they show the small numbers beneath."""
    if not masks:
        monkeypatch.setattr(participant, "add_mask", lambda *_: None)
    replies = replies_of(monkeypatch, lambda *_: False)
    run(configure(tmp_path, **SHARED))
    assert len(replies) == 2 * len(BRANCHES)
    uploads = [from_bytes(unpack(reply.payload, 2)[0], MaskedInput, MaskedInput).payload for _, reply in replies]
    seen = np.bincount(np.frombuffer(b"".join(uploads), "<u4") >> 28, minlength=16)
    expected = seen.sum() / 16
    assert expected > 20
    tail = np.log(1e9)  # false alarm: 1e-9 (Laurent and Massart 2000, lemma 1, 15 degrees of freedom)
    uniform = ((seen - expected) ** 2 / expected).sum() < 15 + 2 * np.sqrt(15 * tail) + 2 * tail
    assert uniform == masks


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"local_steps": 2}}, "local_steps=1"),
        ({"training": {"optimizer": "adam"}}, "optimizer=sgd"),
        ({"training": {"momentum": 0.5}}, "momentum=0"),
        ({"federation": {"quorum": 2}}, "needs a quorum of 3 to 4"),
        ({"privacy": {"colluding_sites": 3}}, "too few"),
        ({"federation": {"weights": {"jeju": 2.0}}}, "all weigh 1"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    tmp_path: Path, configure: Configure, changes: dict[str, dict[str, Any]], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run(configure(tmp_path, **changed(**changes)))
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_a_site_that_knows_no_other_site_declines(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Site.__init__

    def alone(self: Site, *arguments: Any, **named: Any) -> None:
        honest(self, *arguments, **{**named, "peers": None})

    monkeypatch.setattr(Site, "__init__", alone)
    done = run(configure(tmp_path, **SHARED))
    assert "declined (policy)" in done.stopped
