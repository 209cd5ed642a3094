"""federation.gate: a round that makes the held-out loss worse than that is paid for, recorded and not applied."""

from pathlib import Path

import numpy as np
import pytest

from fedllm.adapter_vector import adapter_digest
from fedllm.audit.evidence import _Checks, _read_record
from fedllm.errors import QuorumLost
from fedllm.plan import RunPlan
from server.events import RoundMetrics
from server.run_record import RECORD_FILE
from tests.server.test_rounds import (  # noqa: F401  # one is a fixture
    NAMES,
    START,
    FakeSite,
    Federation,
    Killed,
    Vector,
    make_plan,
    record_of,
    score,
    task_identity,
    untimed,
)

BAD = 3  # the round that is poisoned


class Poisoned(FakeSite):
    """Sends what it learned, and in some rounds what takes the adapter far from it."""

    bad: tuple[int, ...] = (BAD,)

    def delta(self, round_: int, start: Vector) -> Vector:
        return np.float32(6) * np.sign(start) if round_ in self.bad else super().delta(round_, start)


def poisoned(folder: Path, plan: RunPlan | None = None, bad: tuple[int, ...] = (BAD,), gate: float | None = 0.1,
             ) -> Federation:  # fmt: skip
    federation = Federation(folder, plan or make_plan(rounds=5), gate=gate)
    site = Poisoned("jeju")
    site.bad = bad
    federation.sites["jeju"] = site
    federation.grid.nodes[list(federation.sites).index("jeju") + 1] = site
    return federation


def losses(federation: Federation) -> list[float]:
    return [line["loss"] for line in federation.metrics()]


def test_without_a_gate_the_poisoned_round_counts(tmp_path: Path) -> None:
    federation = poisoned(tmp_path, gate=None)
    federation.run()
    assert losses(federation)[BAD] > 5 * losses(federation)[BAD - 1]
    assert [line["lost"] for line in federation.metrics()] == [""] * 6


def test_a_gate_that_lets_every_round_pass_changes_nothing(tmp_path: Path) -> None:
    open_, off = poisoned(tmp_path / "open", gate=100.0), poisoned(tmp_path / "off", gate=None)
    with_gate, without = open_.run(), off.run()
    assert with_gate.adapter.tobytes() == without.adapter.tobytes()
    assert untimed(with_gate.records) == untimed(without.records)
    assert [entry.kind for entry in record_of(open_)] == [entry.kind for entry in record_of(off)]


@pytest.mark.parametrize("server", [{}, {"momentum": 0.5}, {"name": "adam", "learning_rate": 0.1}])
def test_a_round_beyond_the_gate_leaves_adapter_and_optimiser_as_they_were(
    tmp_path: Path, server: dict[str, object]
) -> None:
    federation = poisoned(tmp_path / "run", make_plan(rounds=5, server=server))
    before: list[tuple[bytes, dict[str, bytes]]] = []

    def observe(event: object) -> None:
        if isinstance(event, RoundMetrics):
            state = {name: array.tobytes() for name, array in coordinator._optimizer.state().items()}
            before.append((coordinator.adapter.tobytes(), state))

    coordinator = federation.coordinator(observe)
    coordinator.run()
    assert before[BAD] == before[BAD - 1]
    assert before[BAD] != before[BAD + 1]
    lines = federation.metrics()
    assert [bool(line["lost"]) for line in lines] == [number == BAD for number in range(6)]
    assert "federation.gate=0.1" in lines[BAD]["lost"]
    assert lines[BAD]["loss"] == lines[BAD - 1]["loss"], "what the server has is still the adapter of the round before"
    assert all(line["loss"] <= 1.1 * min(losses(federation)[:n] or [line["loss"]]) for n, line in enumerate(lines))


def test_a_round_beyond_the_gate_is_paid_for_and_on_record_and_not_asked_for_again(tmp_path: Path) -> None:
    federation = poisoned(tmp_path, make_plan(rounds=5, mode="local", noise_multiplier=1.0), bad=())
    federation.sites["jeju"].delta = lambda round_, start: (  # type: ignore[method-assign]
        np.full_like(start, 2.0) if round_ == BAD else -0.1 * start
    )  # within the bound of an honest update
    coordinator = federation.run()
    assert [site.rounds for site in federation.sites.values()] == [[1, 2, 3, 4, 5]] * 3
    for state in coordinator.sites.values():
        assert (state.charged, state.rounds, state.failed) == (5, 4, 0)
    bodies = [entry.body for entry in record_of(federation) if entry.kind == "round"]
    assert [body["counts"] for body in bodies] == [number != BAD for number in range(1, 6)]
    refused = bodies[BAD - 1]
    assert refused["adapter_before"] == refused["adapter_after"] == bodies[BAD - 2]["adapter_after"]
    assert sorted(refused["answered"]) == sorted(NAMES), "what they signed is kept"
    assert "held-out loss" in refused["lost"]
    checks = _Checks()
    record = _read_record(federation.folder / RECORD_FILE, checks)
    assert {f.code: f.status for f in checks.findings()}["rounds"] == "holds", "audit verify follows such a run"
    assert [step.round for step in record.rounds] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("ended", [BAD - 1, BAD, BAD + 1])
def test_a_run_with_a_gate_is_resumed_from_any_round(tmp_path: Path, ended: int) -> None:
    whole = poisoned(tmp_path / "whole").run()
    federation = poisoned(tmp_path / "run")

    def die(event: object) -> None:
        if isinstance(event, RoundMetrics) and event.round == ended:
            raise Killed

    coordinator = federation.coordinator(die)
    with pytest.raises(Killed):
        coordinator.run()
    resumed = federation.resume()
    assert resumed.adapter.tobytes() == whole.adapter.tobytes()
    assert [(r.round, r.loss, bool(r.lost)) for r in resumed.records] == [
        (r.round, r.loss, bool(r.lost)) for r in whole.records
    ]


def test_a_head_office_that_is_killed_while_it_judges_judges_again(tmp_path: Path) -> None:
    federation = poisoned(tmp_path)
    coordinator = federation.coordinator()
    honest, judged = coordinator._score, list[bytes]()

    def die(vector: Vector) -> object:
        judged.append(vector.tobytes())
        if len(judged) == 1 + BAD:
            raise Killed
        return honest(vector)

    coordinator._score = die  # type: ignore[assignment]
    with pytest.raises(Killed):
        coordinator.run()
    resumed = federation.resume()
    assert [bool(r.lost) for r in resumed.records] == [number == BAD for number in range(6)]
    assert [site.rounds for site in federation.sites.values()] == [[1, 2, 3, 3, 4, 5]] * 3, "answered as before"


def test_a_run_ends_where_three_rounds_in_a_row_are_beyond_the_gate(tmp_path: Path) -> None:
    federation = poisoned(tmp_path, make_plan(rounds=8), bad=(2, 3, 4, 5))
    with pytest.raises(QuorumLost, match=r"held-out loss .* 3 rounds in a row"):
        federation.run()
    assert [bool(line["lost"]) for line in federation.metrics()] == [False, False, True, True, True]
    federation.sites["jeju"].bad = ()  # type: ignore[attr-defined]
    assert federation.resume().round == 8


def test_small_steps_do_not_add_up_beyond_the_gate(tmp_path: Path) -> None:
    """The limit is measured from the lowest loss so far, so 5 % worse in every round is 5 % once."""
    federation = Federation(tmp_path, make_plan(rounds=8), gate=0.06)
    for site in federation.sites.values():
        site.delta = lambda round_, start: 0.025 * start  # type: ignore[method-assign]  # the loss is its square
    with pytest.raises(QuorumLost):
        federation.run()
    assert max(losses(federation)) <= 1.06 * score(START)["loss"]  # type: ignore[operator]


def test_an_adapter_that_is_not_finite_does_not_pass_a_gate(tmp_path: Path) -> None:
    federation = Federation(tmp_path, make_plan(rounds=1, server={"learning_rate": 1e6}), gate=100.0)
    for site in federation.sites.values():
        site.delta = lambda round_, start: np.full_like(start, 1e35)  # type: ignore[method-assign]
    coordinator = federation.run()
    assert coordinator.records[-1].lost
    assert adapter_digest(coordinator.adapter) == adapter_digest(START)
