"""Attack: head office learns how long a site trains, from round after round that it gives up, or from times it is told.

Stopped by fixed coins, by answers that leave at multiples of policy.reply_quantum, and by a ledger whose entries bear
no time but that of a request.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client.site
import fedllm.privacy.ledger
from client.records import Declared
from fedllm.errors import Cancelled
from fedllm.messages import TrainReply
from fedllm.plan import RunPlan, TextConfig
from fedllm.privacy.elapsed import Moment
from fedllm.privacy.mechanism import Mechanism
from fedllm.training.data import Row
from tests.attacks.office import Victim, fix_randomness, plan_of, read, request

ROWS: list[Row] = [{"question": f"q{i}", "answer": f"a{i}", "who": f"p{i}"} for i in range(64)]


def victim_in(folder: Path, base: Path, **policy: Any) -> Victim:
    text = TextConfig(prompt="{question}", text="{answer}")
    return Victim(folder, base, ROWS, text, Declared(64, "record"), policy)


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Who is drawn, pass by pass."""
    drawn, honest = list[list[int]](), Mechanism.sample

    def sample(self: Mechanism, units: int, source: Any) -> Any:
        drawn.append(honest(self, units, source).tolist())
        return np.asarray(drawn[-1], dtype=np.int64)

    monkeypatch.setattr(Mechanism, "sample", sample)
    return drawn


def give_up(victim: Victim, plan: RunPlan, patch: pytest.MonkeyPatch) -> None:
    stop, honest = threading.Event(), client.site.train_round

    def train_round(*arguments: Any) -> Any:
        honest(*arguments)
        raise Cancelled("nobody waits for the answer any more")

    with patch.context() as here:
        here.setattr(client.site, "train_round", train_round)
        with pytest.raises(Cancelled):
            victim.site.handle(request(plan), stop)


def test_a_round_that_is_given_up_times_the_same_sample_again(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, samples: list[list[int]]
) -> None:
    """61 requests were 61 samples for one charge: their times added up to who is there."""
    victim, plan = victim_in(tmp_path, tiny_llama), plan_of(tiny_llama)
    give_up(victim, plan, monkeypatch)
    assert isinstance(read(victim.train(plan)), TrainReply)
    first, again = samples
    assert first == again
    assert 0 < len(first) < 64
    assert isinstance(read(victim.train(plan, 2)), TrainReply)
    assert samples[2] != first, "another round has coins of its own"
    assert len(victim.site.open_ledger().events()) == 2


def test_a_round_that_was_answered_is_never_computed_again(
    tmp_path: Path, tiny_llama: Path, samples: list[list[int]]
) -> None:
    victim, plan = victim_in(tmp_path, tiny_llama), plan_of(tiny_llama)
    first = victim.train(plan)
    assert victim.train(plan) == first
    assert len(samples) == 1


def test_the_coins_are_the_reservations_and_the_noise_is_not(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, samples: list[list[int]]
) -> None:
    monkeypatch.setattr(fedllm.privacy.ledger, "random_bytes", bytes)
    replies = [read(victim_in(tmp_path / name, tiny_llama).train(plan_of(tiny_llama))) for name in ("a", "b")]
    assert samples[0] == samples[1]
    assert replies[0].payload != replies[1].payload


def test_how_long_records_were_used_is_rounded_up_and_covered_by_the_lock(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two record sets, of which one takes 40 % longer: their replies leave at the same time, and so does a refusal."""
    left, honest = dict[str, float](), client.site.train_round
    for name, took in (("few", 5.0), ("many", 7.0)):
        now = [0.0]

        def train_round(*arguments: Any, took: float = took, now: list[float] = now) -> Any:
            now[0] += took
            return honest(*arguments)

        def sleep(seconds: float, now: list[float] = now) -> None:
            now[0] += seconds

        victim = victim_in(tmp_path / name, tiny_llama, reply_quantum=10.0)
        asked = request(plan_of(tiny_llama))
        with monkeypatch.context() as here:
            here.setattr(client.site, "train_round", train_round)
            here.setattr(client.site.time, "monotonic", lambda now=now: now[0])
            here.setattr(client.site.time, "sleep", sleep)
            victim.site.handle(asked)
        left[name] = now[0]
    assert left == {"few": 10.0, "many": 10.0}


def test_nothing_that_is_signed_says_when_training_ended(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statements name digests of ledger entries, and a stamp of the minute in which a round was released told it."""
    fix_randomness(monkeypatch)
    honest, told = client.site.train_round, list[Any]()
    for name, took in (("few", 1.0), ("many", 200.0)):
        now = [1_800_000_059.0]  # the minute is about to turn

        def train_round(*arguments: Any, took: float = took, now: list[float] = now) -> Any:
            now[0] += took
            return honest(*arguments)

        victim, plan = victim_in(tmp_path / name, tiny_llama), plan_of(tiny_llama)
        replies = list[bytes]()
        with monkeypatch.context() as here:
            here.setattr(client.site, "train_round", train_round)
            here.setattr(fedllm.privacy.ledger, "this_moment", lambda now=now: Moment(now[0], "0f0e", now[0]))
            for number in (1, 2, 3):
                now[0] = 1_800_000_059.0 + number * 600  # head office chooses when it asks
                replies.append(victim.train(plan, number))
        told.append((replies, victim.site.open_ledger().file.lines()))
    assert told[0] == told[1]
