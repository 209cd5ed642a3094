"""Adapters are scored on the sites' own records, in the exchanges of training and one more; no public set is needed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import server.rounds
import server.run
from client.own_scores import OwnScore, own_scores
from client.site import Site
from fedllm.audit.bundle import verify, write_audit
from fedllm.audit.evidence import file_name
from fedllm.audit.summary import RunSummary
from fedllm.audit.trust import Trust
from fedllm.config import SimulationConfig
from fedllm.crypto.hash_chain import open_entry
from fedllm.errors import ConfigError, FedllmError
from fedllm.privacy.accounting import spent_at_sites
from fedllm.privacy.ledger import PrivacyLedger
from fedllm.privacy.metrics import Layout
from fedllm.privacy.split import SIDES
from fedllm.protocol.messages import TrainRequest, from_bytes
from server.checkpoint import load_checkpoint
from server.run_record import RECORD_FILE, key_in
from simulations.simulate import KEYS, simulate
from tests.fedllm.audit.test_evidence import failing, lie
from tests.simulations.conftest import BRANCHES, Configure, Records, merge

SCORED: dict[str, Any] = {
    "data": {"samples": 0, "heldout": None},
    "evaluation": {"every": 2, "noise_multiplier": 1.2},
    "site": {"evaluation_share": 0.5, "min_units": 1},
    "federation": {"round_timeout": 60.0, "quorum": None},
}
MODES: dict[str, dict[str, Any]] = {
    "distributed": {
        "privacy": {"mode": "distributed", "noise_multiplier": 4.0, "sampling_rate": 0.4},
        "training": {"rounds": 3, "local_steps": 1, "wire": "float16"},
    },
    "local": {},
    "off": {"privacy": {"mode": "off", "noise_multiplier": None}, "evaluation": {"every": 2, "noise_multiplier": None}},
}


@pytest.fixture(autouse=True)
def _no_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots and summaries are not what is tested here."""
    monkeypatch.setattr(server.run, "write_outputs", lambda *_: None)


def scored(configure: Configure, folder: Path, mode: str, **changes: Any) -> SimulationConfig:
    return configure(folder, **merge(merge(SCORED, MODES[mode]), changes))


def run(config: SimulationConfig) -> RunSummary:
    return simulate(config, lambda *_: None, lambda _: None)


def entries(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = map(open_entry, (folder / RECORD_FILE).read_text("utf-8").splitlines())
    return [entry.body for entry in found if entry.kind == kind]


def exact(folder: Path) -> dict[int, OwnScore]:
    """What the sites know together: the scores of all their units, by round."""
    every = [own_scores(folder / "sites" / file_name(branch) / "ledger.db") for branch in BRANCHES]
    pooled = {}
    for scores in zip(*every, strict=True):
        units = sum(score.units for score in scores)
        means = {n: sum(s.units * s.metrics[n] for s in scores if s.units) / units for n in ("loss", "exact_match")}
        pooled[scores[0].round] = OwnScore("", scores[0].round, units, means)
    return pooled


@pytest.mark.parametrize("mode", MODES)
def test_every_score_is_that_of_the_sites_units_with_the_noise_that_was_charged(
    tmp_path: Path, configure: Configure, mode: str
) -> None:
    done = run(scored(configure, tmp_path, mode))
    assert not done.stopped
    plan, truth = done.plan, exact(done.folder)
    assert (plan.scores, sorted(truth)) == (3, [0, 2, 3])
    told = {r["round"]: r["at_sites"] for r in done.records if r["at_sites"]}
    assert sorted(told) == [0, 2, 3]
    layout = Layout(("loss", "exact_match"), entries(done.folder, "plan")[0]["most_loss"])
    factor = 4 if mode == "local" else 1.5  # every site's own noise; or that of colluding sites, too
    for number, score in truth.items():
        assert all(value is not None for value in told[number]["units"])
        count, low, high = told[number]["units"]
        assert abs(count - score.units) <= max(1e-3, 5 * factor * 1.2 / layout._roots[0])
        if mode == "off":
            assert (low, high) == (count, count)
            for name in layout.names:
                assert abs(told[number][name][0] - score.metrics[name]) < 1e-5
    for charge in entries(done.folder, "closing")[0]["answered"]:
        assert charge in BRANCHES
    assert all(r["loss"] is None for r in done.records), "there is no public held-out set"


def test_a_run_with_scores_is_audited_and_every_number_of_them_computed_again(
    tmp_path: Path, configure: Configure, without_pdfs: None
) -> None:
    done = run(scored(configure, tmp_path, "distributed", audit={"report": True, "canaries": 4}))
    folder = done.folder / "audit"
    audit, _ = verify(folder, Trust.read(done.folder / KEYS), ())
    assert audit.verdict == "within"
    assert [score.round for score in audit.scores] == [0, 2, 3]
    assert audit.attack is not None
    assert (audit.attack.sites, audit.attack.canaries) == (4, 16)
    events = {side: done.plan.cost(done.plan.exchanges, side) for side in SIDES}
    at_two = []
    for j in range(3):
        pairs = [(e, j) for e in events["training"]] + [(e, 2 - j) for e in events["evaluation"]]
        at_two.append(spent_at_sites([(e, k) for e, k in pairs if k], done.plan.privacy.delta).epsilon)
    assert dict(audit.accountants.several_sites)[2] == pytest.approx(max(at_two)), "on either side at each"
    for site in audit.sites:
        [account] = site.accounts
        assert account.charged == max(account.training or 0, account.evaluation or 0)
        assert min(account.training or 0, account.evaluation or 0) > 0


def _more(scores: dict[str, Any]) -> None:
    scores["total"][0] += 5.0


def _less_noise(scores: dict[str, Any]) -> None:
    scores["noise_std"] /= 2


def _none(scores: dict[str, Any]) -> None:
    scores.clear()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, configure: Configure) -> Path:
    """The folder of a run that has ended; copy it before you change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.run, "write_outputs", lambda *_: None)
        return run(scored(configure, tmp_path_factory.mktemp("shared"), "distributed")).folder


@pytest.mark.parametrize(
    ("kind", "change"),
    [("round", _more), ("closing", _more), ("closing", _less_noise), ("round", _none), ("closing", _none)],
)
def test_a_score_that_was_altered_is_found(
    tmp_path: Path, shared: Path, kind: str, change: Callable[[dict[str, Any]], None]
) -> None:
    """By the server itself, who can sign whatever it likes: what it says contradicts what it said elsewhere."""
    folder = Path(shutil.copytree(shared, tmp_path / shared.name))
    assert "metrics" not in failing(folder)

    def altered(bodies: list[dict[str, Any]]) -> None:
        body = next(body for body in bodies if body["kind"] == kind and "scores" in body)
        change(body["scores"])
        if not body["scores"]:  # it was not good enough to be told: metrics do not tell it either
            del body["scores"]
            path, hidden = folder / "metrics.jsonl", body.get("round", 4) - 1
            lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            lines[hidden]["at_sites"] = {}
            path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")

    lie(folder, key_in(folder), altered)
    assert "metrics" in failing(folder)


def test_scores_that_nobody_paid_for_are_found(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites whose software leaves them out of the ledger: in the audit, their charges are not the plan's."""
    honest = PrivacyLedger.reserve

    def free(self: PrivacyLedger, run: str, round: int, request: str, event: Any, evaluation: Any = None) -> Any:
        return honest(self, run, round, request, event)

    monkeypatch.setattr(PrivacyLedger, "reserve", free)
    done = run(scored(configure, tmp_path, "local"))
    audit = write_audit(done.folder, done.folder / "audit", pages=()).audit
    assert audit.finding("charged_before_release").status == "fails"
    assert audit.verdict == "unverifiable"


def test_the_best_adapter_is_kept(tmp_path: Path, configure: Configure) -> None:
    """Training that goes astray at the end: without noise, so that the best is certain."""
    config = scored(
        configure, tmp_path, "off", evaluation={"every": 1},
        training={"rounds": 3, "keep": "best", "learning_rate": 4.0},
    )  # fmt: skip
    done = run(config)
    losses = {r["round"]: r["at_sites"]["loss"][0] for r in done.records}
    best = min(losses, key=lambda number: losses[number])
    state = load_checkpoint(done.folder / "checkpoint.safetensors")
    assert (state.best_round, state.round) == (best, 3)
    assert state.best is not None
    assert np.array_equal(state.best, state.adapter) == (best == 3)
    [end] = entries(done.folder, "end")
    assert end.get("kept", 3) == best
    write_audit(done.folder, done.folder / "audit", pages=())
    assert not {"rounds", "metrics"} & failing(done.folder)

    def another(bodies: list[dict[str, Any]]) -> None:
        """The server says that it kept an adapter of which nobody has heard."""
        bodies[-1] |= {"kept": best, "kept_adapter": "f" * 64}

    lie(done.folder, key_in(done.folder), another)
    assert "rounds" in failing(done.folder)


@pytest.mark.parametrize(("mode", "every"), [("distributed", 1), ("local", 1), ("local", 2)])
def test_a_round_that_the_gate_takes_back_keeps_its_score_in_record_and_audit(
    tmp_path: Path, configure: Configure, records: Records, monkeypatch: pytest.MonkeyPatch, mode: str, every: int
) -> None:
    """It is the score of the adapter that the round started from; the audit holds the metrics against it.

    And it is no word on the round itself, which left the adapter as it was. What the held-out set says is scripted:
    under fresh noise a round might be better that ought to be taken back.
    """
    losses = iter([1.0, 2.0, 0.5, 0.9])  # of the base model, and after each round
    monkeypatch.setattr(server.run, "_score", lambda *_: {"loss": next(losses)})
    config = scored(
        configure, tmp_path, mode, data={"heldout": str(records.heldout)}, evaluation={"every": every},
        federation={"gate": 1e-6}, training={"rounds": 3},
    )  # fmt: skip
    done = run(config)
    assert not done.stopped
    assert [body["round"] for body in entries(done.folder, "round") if body.get("lost")] == [1, 3]
    exchanges, scored_rounds = {1: ([1, 2, 3], [0, 1, 2, 3]), 2: ([1, 3], [0, 2, 3])}[every]
    assert [body["round"] for body in entries(done.folder, "round") if "scores" in body] == exchanges
    assert [line["round"] for line in done.records if line["at_sites"]] == scored_rounds
    audit = write_audit(done.folder, done.folder / "audit", pages=()).audit
    assert not [f for f in audit.findings if f.status == "fails"]
    assert not {"rounds", "metrics"} & failing(done.folder)


def test_training_ends_when_scores_no_longer_improve_and_nothing_is_refunded(
    tmp_path: Path, configure: Configure
) -> None:
    config = scored(
        configure, tmp_path, "off", evaluation={"every": 1, "patience": 2},
        training={"rounds": 9, "learning_rate": 1e-9},
    )  # fmt: skip
    done = run(config)
    assert not done.stopped
    assert 2 <= len(entries(done.folder, "round")) < 9
    assert len(entries(done.folder, "closing")) == 1
    again = run(config.model_copy(update={"resume": True}))
    assert (again.records, len(entries(done.folder, "closing"))) == (done.records, 1), "it is over"
    audit = write_audit(done.folder, done.folder / "audit", pages=()).audit
    assert {f.code for f in audit.findings if f.status == "fails"} == {"protected", "plan_target", "budget"}


class _Killed(BaseException):
    """Stands for kill -9 of the server."""


@pytest.mark.parametrize("mode", ["distributed", "local"])
@pytest.mark.parametrize(
    "when", ["before the sites were asked", "before it was noted", "after it was noted", "round 3"]
)
def test_a_run_that_was_killed_while_scores_came_in_is_whole_when_it_is_resumed(
    tmp_path: Path, configure: Configure, mode: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = scored(configure, tmp_path, mode)
    name = "_ask" if when.startswith("before the sites") else "_note_sites"
    honest = getattr(server.rounds.Coordinator, name)

    def dies(self: Any, *arguments: Any) -> Any:
        if self.round == (2 if when == "round 3" else 3) and (name != "_ask" or arguments[0] == 4):
            if "after" in when or when == "round 3":  # the metrics say it, and the record does not
                honest(self, *arguments)
            raise _Killed
        return honest(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(server.rounds.Coordinator, name, dies)
        with pytest.raises(_Killed):
            run(config)
    resumed = config.model_copy(update={"resume": True})
    done = run(resumed)
    assert not done.stopped
    ledger = done.folder / "sites" / file_name("busan") / "ledger.db"
    assert len([score for score in own_scores(ledger) if score.round == 3]) <= 1
    assert mode == "distributed" or sorted(r["round"] for r in done.records if r["at_sites"]) == [0, 2, 3]
    audit = write_audit(done.folder, done.folder / "audit", pages=()).audit
    assert not [f for f in audit.findings if f.status == "fails"]


def test_a_site_that_answers_no_more_leaves_the_run_without_its_last_score(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Site.handle

    def gone(self: Site, request: bytes, stop: Any = None) -> bytes:
        if b'"kind":"train"' in request[:40] and from_bytes(request, TrainRequest, TrainRequest).round == 4:
            raise FedllmError("gone")
        return honest(self, request, stop)

    monkeypatch.setattr(Site, "handle", gone)
    done = run(scored(configure, tmp_path, "local"))
    assert not done.stopped
    assert not done.records[-1]["at_sites"]
    [closing] = entries(done.folder, "closing")
    assert (closing["answered"], len(closing["failed"])) == ({}, 4)
    assert write_audit(done.folder, done.folder / "audit", pages=()).audit.verdict == "within"


def test_groups_have_scores_of_their_own_that_are_added_up(tmp_path: Path, configure: Configure) -> None:
    done = run(scored(
        configure, tmp_path, "distributed", privacy={"colluding_sites": 0, "unit": "record"},
        federation={"groups": 3, "partition": {"by": "iid", "sites": 6, "column": None}},
        training={"rounds": 1, "local_steps": 1},
    ))  # fmt: skip
    assert not done.stopped, done.stopped
    assert [r["round"] for r in done.records if r["at_sites"]] == [0, 1]
    assert write_audit(done.folder, done.folder / "audit", pages=()).audit.verdict == "within"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"evaluation": {"every": None, "patience": 2, "noise_multiplier": None}}, "belong to scores"),
        ({"evaluation": {"every": None, "noise_multiplier": None}, "training": {"keep": "best"}}, "there are none"),
        ({"evaluation": {"every": 0}}, "every"),
        ({"audit": {"canaries": -1}}, "canaries"),
        ({"site": {"evaluation_share": 0.6}}, "evaluation_share"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(
    tmp_path: Path, configure: Configure, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        scored(configure, tmp_path, "local", **changes)


def test_what_a_site_knows_of_itself_survives_a_line_that_was_cut(tmp_path: Path, configure: Configure) -> None:
    done = run(scored(configure, tmp_path, "off"))
    ledger = done.folder / "sites" / "busan" / "ledger.db"
    path = ledger.with_name("scores.jsonl")
    before = own_scores(ledger)
    path.write_bytes(path.read_bytes() + b'{"run": "' + json.dumps("x").encode())
    assert own_scores(ledger) == before
    assert path.stat().st_mode & 0o077 == 0, "for its owner's eyes alone"
