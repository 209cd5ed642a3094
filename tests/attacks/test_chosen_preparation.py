"""Attack: the server chooses how long a site prepares a round, until the end of training lies at a quantum's edge.

Stopped by a clock that starts where records begin to be used, and, with policy.record_seconds, by a quantum that also
holds what a round takes beside its records.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import client.site
from client.records import Declared
from fedllm.config import TextConfig
from fedllm.plan import RunPlan
from fedllm.privacy.mechanism import Mechanism
from fedllm.protocol.messages import TrainReply
from fedllm.training.data import Batch, Row
from fedllm.training.engine import Engine
from tests.attacks.office import Victim, context, plan_of, read

TOKEN, NUMBER, CHANGE = 1e-4, 1e-2, 5e-3  # seconds: for a padded token, a number of noise, a number that is sent
RECORD = 8 * 16 * TOKEN  # a pass of one record, which are padded to 16 tokens here
DECLARED = 64


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only work moves: passes of any text, noise, and what is done with the noised vector."""
    clock = [0.0]

    def takes(owner: Any, name: str, seconds: Any) -> None:
        honest = getattr(owner, name)

        def slow(*arguments: Any, **named: Any) -> Any:
            clock[0] += seconds(*arguments)
            return honest(*arguments, **named)

        monkeypatch.setattr(owner, name, slow)

    def gradients(_: Engine, batch: Batch) -> float:
        return batch.input_ids.numel() * TOKEN

    takes(Engine, "_gradients", gradients)
    takes(Mechanism, "noise", lambda _, dimension, source: dimension * NUMBER)
    takes(client.site.adapter_vector, "encode", lambda vector, wire: vector.size * CHANGE)
    monkeypatch.setattr(client.site.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(client.site.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    return clock


def victim(folder: Path, base: Path, units: int, self_check: bool = True, **policy: Any) -> Victim:
    rows: list[Row] = [{"question": f"q{i:04}", "answer": f"a{i:04}", "who": f"p{i}"} for i in range(units)]
    text = TextConfig(prompt="{question}", text="{answer}")
    limits = {"reply_quantum": 0.1, "record_seconds": RECORD, "epsilon": 1e6, **policy}
    return Victim(folder, base, rows, text, Declared(DECLARED, "record"), limits, self_check=self_check)


Held = Callable[[Victim, RunPlan], float]


@pytest.fixture
def held(now: list[float], monkeypatch: pytest.MonkeyPatch) -> Held:
    """Return how long after a site began to use records its answer leaves, seconds."""
    began, honest = list[float](), client.site.train_round

    def train_round(*arguments: Any) -> Any:
        if arguments[2][0]:  # no stand-in for records
            began.append(now[0])
        return honest(*arguments)

    monkeypatch.setattr(client.site, "train_round", train_round)

    def ask(site: Victim, plan: RunPlan) -> float:
        assert isinstance(read(site.train(plan)), TrainReply)
        return round(now[0] - began[-1], 6)

    return ask


@pytest.mark.parametrize("record_seconds", [0.0, RECORD])
def test_however_long_the_preparation_every_answer_leaves_after_the_same_time(
    tmp_path: Path, tiny_llama: Path, held: Held, record_seconds: float
) -> None:
    """Neither the self-check of a new run moves the edge, nor the noise of three steps or what is encoded."""
    limits = {"record_seconds": record_seconds, "reply_quantum": 0.1 if record_seconds else 50.0}
    left = set[float]()
    for units, longest in ((40, 16), (120, 24)):
        plan = plan_of(
            tiny_llama, run=f"{longest} {record_seconds}", model={"max_length": longest},
            privacy={"units_per_site": DECLARED, "epsilon": 1e5}, training={"local_steps": 3},
        )  # fmt: skip
        left.add(held(victim(tmp_path / str(units), tiny_llama, units, **limits), plan))
    assert len(left) == 1, left
    assert record_seconds or left == {50.0}
    assert context(plan).adapter.spec.dimension * NUMBER > 0.1, "else the noise would fit into reply_quantum"


def test_a_round_that_overruns_its_quantum_is_in_the_log(
    tmp_path: Path, tiny_llama: Path, held: Held, now: list[float], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(
        Engine, "_clipped", lambda self, *_: now.__setitem__(0, now[0] + 9.0) or torch.zeros(len(self.adapter.flat))
    )
    site = victim(tmp_path, tiny_llama, 64, record_seconds=1e-9, self_check=False)
    held(site, plan_of(tiny_llama, privacy={"epsilon": 1e5}))
    assert "Raise policy.record_seconds" in caplog.text


def test_what_a_round_takes_beside_its_records_is_measured_on_none(
    tmp_path: Path, tiny_llama: Path, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of distributed noise too, where masks for every other site come after the sum."""
    monkeypatch.setattr(client.site, "add_mask", lambda *_: now.__setitem__(0, now[0] + 1.0))
    site = victim(tmp_path, tiny_llama, 4)
    monkeypatch.setattr(type(site.records), "units", lambda *_: pytest.fail("a record was looked at"))
    plan = plan_of(
        tiny_llama, sites=4, privacy={"mode": "distributed", "colluding_sites": 0, "epsilon": 1e5},
    )  # fmt: skip
    session = client.site.PlanSession("victim", plan, site.site.open_ledger(), site.records, 8, context)
    start = np.zeros(context(plan).adapter.spec.dimension, np.float32)
    assert session.seconds_aside(1, start) == pytest.approx(2 * 4 * 1.0)
