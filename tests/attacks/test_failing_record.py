"""Attack: the server plants, or hopes for, a record on which the site fails, and watches what becomes of the round.

Stopped by the engine: a unit that fails counts zero, and nobody else's part changes. After any other fault while
records are used the site is silent until its owner acts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import client.site
from client.records import Declared
from client.unfinished import Unfinished
from fedllm import adapter_vector
from fedllm.config import TextConfig
from fedllm.errors import Halted
from fedllm.plan import RunPlan
from fedllm.protocol.messages import TrainReply
from fedllm.training.data import Batch, Row
from fedllm.training.engine import Engine
from tests.attacks.office import Victim, context, fix_randomness, plan_of, read

TEXT = TextConfig(prompt="{question}", text="{answer}")
SIGN = 5  # the token of #, in the tiny model
Patch = pytest.MonkeyPatch


def rows(last: str, records: int = 1) -> list[Row]:
    """Return the records of twelve people, and those of one more."""
    people: list[Row] = [{"question": f"q{i}", "answer": f"a{i}", "who": f"p{i}"} for i in range(12)]
    return [*people, *({"question": last, "answer": f"{i}", "who": "last"} for i in range(records))]


def update(victim: Victim, plan: RunPlan) -> np.ndarray[Any, Any]:
    reply = read(victim.train(plan))
    assert isinstance(reply, TrainReply)
    return adapter_vector.decode(reply.payload, "float32", context(plan).adapter.spec.dimension)


def fails_on_the_sign(patch: Patch, error: Callable[[], BaseException]) -> None:
    """Let every pass fail that holds a record with the sign, as one that needs too much memory does."""
    honest = Engine._gradients

    def gradients(self: Engine, batch: Batch) -> torch.Tensor:
        if SIGN in batch.input_ids:
            raise error()
        return honest(self, batch)

    patch.setattr(Engine, "_gradients", gradients)


@pytest.mark.parametrize("unit", ["record", "person"])
@pytest.mark.parametrize(
    "error",
    [MemoryError, lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"), lambda: KeyError("record")],
    ids=["memory", "torch", "software"],
)
def test_a_unit_that_fails_is_a_zero_vector_and_nobody_elses_part_changes(
    tmp_path: Path, tiny_llama: Path, monkeypatch: Patch, unit: Any, error: Callable[[], BaseException]
) -> None:
    """To leave out the whole pass would move the sum by as many clip norms as there are units in it."""
    fix_randomness(monkeypatch)
    plan = plan_of(tiny_llama, privacy={"unit": unit, "sampling_rate": 1.0, "noise_multiplier": 3.0})
    declared = Declared(13, unit)
    without = update(Victim(tmp_path / "a", tiny_llama, rows("?")[:12], TEXT, declared), plan)
    well = update(Victim(tmp_path / "b", tiny_llama, rows("#"), TEXT, declared), plan)
    fails_on_the_sign(monkeypatch, error)
    failing = update(Victim(tmp_path / "c", tiny_llama, rows("#"), TEXT, declared), plan)
    assert np.array_equal(failing, without)
    assert not np.array_equal(well, without), "else nothing was shown"


def test_a_person_of_very_many_records_takes_no_more_memory_than_one_pass(
    tmp_path: Path, tiny_llama: Path, monkeypatch: Patch
) -> None:
    """records_per_person=1000000, and a large person is an answer of another kind than a small one."""
    widest, honest = list[int](), Engine._gradients

    def gradients(self: Engine, batch: Batch) -> torch.Tensor:
        widest.append(len(batch.input_ids))
        return honest(self, batch)

    plan = plan_of(tiny_llama, privacy={"unit": "person", "records_per_person": 1_000_000, "sampling_rate": 1.0,
                                        "noise_multiplier": 3.0})  # fmt: skip
    monkeypatch.setattr(Engine, "_gradients", gradients)
    for records in (1, 500):
        victim = Victim(tmp_path / str(records), tiny_llama, rows("q", records), TEXT, Declared(13, "person"))
        update(victim, plan)
    assert max(widest) <= 8
    assert len(widest) > 60


def test_the_widest_pass_is_tried_before_the_charge(tmp_path: Path, tiny_llama: Path, monkeypatch: Patch) -> None:
    """A pass that does not fit is refused for every site alike, whatever its records."""

    def gradients(self: Engine, batch: Batch) -> torch.Tensor:
        if batch.input_ids.shape == (8, 32):
            raise MemoryError("no room")
        return honest(self, batch)

    honest = Engine._gradients
    monkeypatch.setattr(Engine, "_gradients", gradients)
    plan = plan_of(tiny_llama, model={"max_length": 31}, privacy={"self_check": True, "clip_norm": 0.9})
    for number, last in enumerate(("q", "q" * 10_000)):
        victim = Victim(tmp_path / str(number), tiny_llama, rows(last), TEXT, Declared(13, "record"))
        reply = victim.prepare(plan)
        assert b'"reason":"model"' in reply
        assert victim.site.open_ledger().events() == []


def test_a_fault_while_records_are_used_is_one_bit_and_no_more(
    tmp_path: Path, tiny_llama: Path, monkeypatch: Patch
) -> None:
    """Whatever is asked afterwards, of whatever plan, gets nothing: no second question rides on it."""
    monkeypatch.setattr(client.site, "train_round", lambda *_: 1 / 0)
    victim = Victim(tmp_path, tiny_llama, rows("q"), TEXT, Declared(13, "record"))
    for ask in (victim.train, victim.train, victim.prepare):
        for number in range(2):
            with pytest.raises(Halted):
                ask(plan_of(tiny_llama, run=f"run {number}"))
    assert len(victim.site.open_ledger().events()) == 1
    monkeypatch.undo()
    Unfinished(tmp_path / "ledger.db").end()
    assert isinstance(read(victim.train(plan_of(tiny_llama, run="after"))), TrainReply)
