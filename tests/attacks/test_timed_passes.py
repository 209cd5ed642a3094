"""Attack: the server learns how long a site trains, from round after round that it gives up, or from times it is told.

Stopped by fixed coins, by answers that leave at multiples of policy.reply_quantum, by policy.max_noise_multiplier, so
that no reading is free, and by a ledger whose entries bear no time but a request's; wholly by policy.record_seconds.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client.site
import fedllm.privacy.ledger
from client.policy import SitePolicy, widest
from client.records import Declared
from fedllm.config import TextConfig
from fedllm.errors import Cancelled
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import AccountingEvent, spent
from fedllm.privacy.elapsed import Moment
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import OsRandomness
from fedllm.protocol.messages import TrainReply
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
                now[0] = 1_800_000_059.0 + number * 600  # the server chooses when it asks
                replies.append(victim.train(plan, number))
        told.append((replies, victim.site.open_ledger().file.lines()))
    assert told[0] == told[1]


# ---- readings that are paid for --------------------------------------------------------------------------------------

DEFAULTS = SitePolicy(epsilon=8.0)
RATE = DEFAULTS.max_sampling_rate


def readings(noise: float, most: int) -> int:
    """Return how many rounds of one step a budget of epsilon 8 admits, `most` at the most."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        fits = spent([AccountingEvent(RATE, noise, middle)], DEFAULTS.delta).epsilon <= DEFAULTS.epsilon
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def units_by_times(units: int, rounds: int, quantum: float) -> float:
    """Return the server's estimate of `units` from when `rounds` answers leave: it knows how long a record takes.

    It lengthens each round, by what is public, so that an answer is late where more are drawn than it expects; the
    machine's times vary with nothing else. (Robbins and Monro 1951, averaged: Polyak and Juditsky 1992.)
    """
    mechanism, a_record = Mechanism(1.0, 10.0, RATE), 0.001  # seconds
    expected, seen = 0.8 * units * RATE, list[float]()
    for number in range(1, rounds + 1):
        drawn = len(mechanism.sample(units, OsRandomness()))
        took = quantum + (drawn - expected) * a_record
        late = took + client.site._until_departure(took, quantum) > 1.5 * quantum
        expected += 2.5 * (units * RATE * (1 - RATE)) ** 0.5 * number**-0.6 * (late - 0.5) * 2
        seen.append(expected)
    return float(np.mean(seen[rounds // 3 :])) / RATE


def test_no_reading_is_free(tiny_llama: Path) -> None:
    """With noise of 100,000 clip norms a round cost nothing, and could be timed for ever."""
    assert readings(1e5, 100_000) == 100_000
    assert 1_000 < readings(DEFAULTS.max_noise_multiplier, 100_000) < 1_200


def test_what_all_readings_of_a_budget_tell_of_the_number_of_units() -> None:
    """docs/threat-model.md states it: a whole budget of epsilon 8 tells 1,000 units to about one or two."""
    rounds, units = readings(DEFAULTS.max_noise_multiplier, 100_000), 1000
    errors = [units_by_times(units, rounds, 5.0) - units for _ in range(12)]
    assert 0.4 < np.sqrt(np.mean(np.square(errors))) < 4
    few = [units_by_times(units, rounds // 100, 5.0) - units for _ in range(12)]
    assert np.sqrt(np.mean(np.square(few))) > 4


def test_with_record_seconds_every_answer_leaves_after_one_quantum(tiny_llama: Path) -> None:
    """Whatever a plan asks for, and with twice as many units as their owner has declared."""
    policy = widest(8.0, 1e-3, reply_quantum=0.5, record_seconds=0.01)
    for rate, steps, unit in ((0.5, 1, "record"), (1e-4, 100, "record"), (0.05, 7, "person"), (1.0, 1, "record")):
        privacy = {"sampling_rate": rate, "unit": unit, "records_per_person": 4, "delta": 1e-5}
        plan = plan_of(tiny_llama, privacy=privacy, training={"local_steps": steps})
        quantum = policy.quantum(plan, 500)
        for units in (0, 250, 500, 1000):
            for _ in range(20):
                drawn = sum(len(plan.mechanism.sample(units, OsRandomness())) for _ in range(steps))
                took = drawn * (4 if unit == "person" else 1) * policy.record_seconds
                assert took + client.site._until_departure(took, quantum) == pytest.approx(quantum)


def test_without_record_seconds_the_quantum_is_the_owners_alone(tiny_llama: Path) -> None:
    assert DEFAULTS.quantum(plan_of(tiny_llama), 10**9) == DEFAULTS.reply_quantum == 5.0
