"""federation.groups: sums of several groups, each with a noise of its own, of which the median counts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import server.run
from client.secagg_client import SecAggClient
from fedllm.audit.evidence import assess
from fedllm.config import SimulationConfig
from fedllm.errors import ConfigError
from fedllm.privacy.ledger import LedgerFile
from fedllm.protocol.messages import ConsistencyCheck, TrainRequest
from server.run_record import key_in
from tests.fedllm.audit.test_evidence import failing, lie
from tests.simulations.conftest import Configure
from tests.simulations.test_distributed import StopHereError, replies_of, rounds_of, run, stop_in, verdict

SITES = 12


@pytest.fixture(autouse=True)
def _no_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots and summaries are not what is tested here."""
    monkeypatch.setattr(server.run, "write_outputs", lambda *_: None)


def grouped(configure: Configure, output: Path, groups: int | None = 3, **changes: Any) -> SimulationConfig:
    return configure(
        output,
        **{
            "data": {"samples": 0},
            "privacy": {"mode": "distributed", "noise_multiplier": 4.0},
            "training": {"rounds": 2, "local_steps": 1, "wire": "float16"},
            "federation": {
                "partition": {"by": "iid", "column": None, "sites": SITES}, "quorum": None, "round_timeout": 60.0,
                "groups": groups, "processes": 1, **changes.pop("federation", {}),
            },
            **changes,
        },
    )  # fmt: skip


def poison(monkeypatch: pytest.MonkeyPatch, sites: set[str]) -> None:
    """Let these sites upload what no training gives."""
    honest = SecAggClient.mask

    def mask(self: SecAggClient, plan: Any, request: Any, task: str, vector: Any, seeds: Any) -> tuple[bytes, bytes]:
        return honest(self, plan, request, task, vector + np.uint32(2**27 * (self._site in sites)), seeds)

    monkeypatch.setattr(SecAggClient, "mask", mask)


def test_every_group_has_a_sum_and_a_noise_of_its_own(tmp_path: Path, configure: Configure) -> None:
    done = run(grouped(configure, tmp_path))
    assert not done.stopped
    plan = done.plan
    assert [len(group) for group in plan.groups] == [4, 4, 4]
    assert sorted(name for group in plan.groups for name in group) == sorted(done.sites)
    assert (plan.sites, plan.quorum, plan.poisoned_sites) == (4, 3, 1)
    for number, body in enumerate(rounds_of(done.folder), start=1):
        assert body["counts"]
        assert (set(body["sums"]), body["refused"], body["closed"]) == ({"1", "2", "3"}, {}, {})
        assert all(trimmed >= 3 for trimmed in body["sums"].values())
        assert body["noise_multiplier"] == done.records[number]["noise_multiplier"] >= plan.mechanism.noise_multiplier
    for name, state in done.sites.items():
        assert state["charged"] == len(LedgerFile(done.folder / "sites" / name / "ledger.db").charges()) == 2
        assert state["epsilon"] <= plan.privacy.epsilon
    assert verdict(done.folder) == "within"
    claim = assess(done.folder).claim
    assert (claim.groups, claim.poisoned_sites, claim.sites) == (3, 1, 4)


def test_a_group_with_a_poisoned_site_is_left_out_and_the_round_counts(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {"site-02"})
    done = run(grouped(configure, tmp_path))
    assert not done.stopped
    (where,) = (str(k) for k, group in enumerate(done.plan.groups, start=1) if "site-02" in group)
    for record, body in zip(done.records[1:], rounds_of(done.folder), strict=True):
        assert body["counts"]
        assert set(body["refused"]) == {where} == set(record["without"])
        assert "A site is poisoned" in body["refused"][where]
        assert len(body["answered"]) == SITES, "all have paid, and signed"
    assert verdict(done.folder) == "within"


def test_more_poisoned_sites_than_were_counted_with_lose_the_round(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {"site-02", "site-03"})
    done = run(grouped(configure, tmp_path))
    for body in rounds_of(done.folder):
        assert not body["counts"]
        assert "1 groups can be used" in body["lost"]
        assert body["adapter_before"] == body["adapter_after"]
    assert verdict(done.folder) == "within"


@pytest.mark.parametrize(("vanished", "counts"), [(1, True), (2, False)])
def test_a_group_goes_on_down_to_its_own_quorum(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, vanished: int, counts: bool
) -> None:
    """With three groups and one poisoned site none can be missed: the sums of two would tell nobody which is right."""
    gone = {"site-00", "site-03"} if vanished == 2 else {"site-00"}
    replies_of(monkeypatch, lambda name, message: name in gone and isinstance(message, TrainRequest))
    done = run(grouped(configure, tmp_path))
    assert {"site-00", "site-03"} <= set(done.plan.groups[0])
    assert [body["counts"] for body in rounds_of(done.folder)] == [counts] * len(rounds_of(done.folder))
    if counts:
        assert all(body["sums"]["1"] == 3 for body in rounds_of(done.folder))
        assert verdict(done.folder) == "within"


def test_a_group_that_stays_closed_is_missed_where_enough_are_left(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, message: object) -> bool:
        return isinstance(message, ConsistencyCheck) and message.round == 1 and name in ("site-00", "site-04")

    replies_of(monkeypatch, fail)
    done = run(grouped(configure, tmp_path, groups=4, privacy={
        "mode": "distributed", "noise_multiplier": 4.0, "colluding_sites": 0
    }))  # fmt: skip
    first, second = rounds_of(done.folder)
    assert (first["counts"], set(first["sums"]), set(first["closed"])) == (True, {"2", "3", "4"}, {"1"})
    assert (second["counts"], second["closed"]) == (True, {})
    assert verdict(done.folder) == "within"


def test_a_round_that_the_gate_refuses_is_within_an_audit(tmp_path: Path, configure: Configure) -> None:
    """Four steps of noise alone: about half of them make the held-out loss worse."""
    training = {"rounds": 4, "local_steps": 1, "wire": "float16", "learning_rate": 1.0}
    done = run(grouped(configure, tmp_path, training=training, federation={"gate": 0.0}))
    bodies = rounds_of(done.folder)
    assert {body["counts"] for body in bodies} == {not body.get("lost") for body in bodies}
    losses = [record["loss"] for record in done.records]
    assert losses == sorted(losses, reverse=True), "no adapter was ever handed out that is worse than one before"
    assert verdict(done.folder) == "within"


def test_a_run_with_groups_is_resumed(tmp_path: Path, configure: Configure) -> None:
    training = {"rounds": 3, "local_steps": 1, "wire": "float16"}
    with pytest.raises(StopHereError):
        run(grouped(configure, tmp_path, training=training), stop_in(2))
    with pytest.raises(ConfigError, match="groups"):
        run(grouped(configure, tmp_path, training=training, groups=None, resume=True))
    done = run(grouped(configure, tmp_path, training=training, resume=True))
    assert [body["counts"] for body in rounds_of(done.folder)] == [True, False, True]
    assert verdict(done.folder) == "within"


@pytest.mark.parametrize("lie_", ["moved", "missing", "overstated", "outvoted"])
def test_an_audit_finds_that_groups_were_not_what_the_plan_says(
    tmp_path: Path, configure: Configure, lie_: str
) -> None:
    done = run(grouped(configure, tmp_path))
    head_office = key_in(done.folder)

    def change(bodies: list[dict[str, Any]]) -> None:
        for body in bodies:
            if body["kind"] == "plan" and lie_ == "moved":
                first, second, third = body["plan"]["groups"]
                body["plan"]["groups"] = [[second[0], *first[1:]], [first[0], *second[1:]], third]
            if body["kind"] == "round" and lie_ == "missing":
                del body["sums"]["2"]
            if body["kind"] == "round" and lie_ == "overstated":
                body["sums"]["2"] = 5
            if body["kind"] == "round" and lie_ == "outvoted":
                body["refused"] = dict.fromkeys(("2", "3"), "poisoned")
                body["sums"] = {"1": body["sums"]["1"]}

    lie(done.folder, head_office, change)
    assert ("plan" if lie_ == "moved" else "rounds") in failing(done.folder)


@pytest.mark.parametrize(
    ("groups", "changes", "why"),
    [
        (2, {}, "at least 3 groups"),
        (4, {"federation": {"poisoned_sites": 2}}, "at least 5 groups"),
        (5, {}, "5 groups|each needs its quorum|too few"),
        (3, {"federation": {"quorum": 5}}, "each needs its quorum of 5"),
        (3, {"privacy": {"mode": "local", "noise_multiplier": 4.0}}, "privacy=distributed"),
        (3, {"training": {"server": {"name": "adam", "noise_corrected": True}, "local_steps": 1}}, "noise_corrected"),
    ],
)
def test_groups_that_defend_nothing_are_refused(
    tmp_path: Path, configure: Configure, groups: int, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        run(grouped(configure, tmp_path, groups=groups, **changes))
