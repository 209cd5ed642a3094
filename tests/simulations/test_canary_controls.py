"""The attack on a run finds what it must find, and accuses no honest run."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import fedllm.privacy.canaries
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import calibrate
from fedllm.privacy.canaries import Result, pooled, usual_guesses
from fedllm.privacy.one_run import CONFIDENCE
from fedllm.privacy.randomness import Randomness, SeededRandomness
from fedllm.training import trainer
from fedllm.training.data import IGNORE, Example, PrivacyUnit
from fedllm.training.model_context import open_context
from fedllm.values import parse
from simulations.benchmarks.canaries import from_the_system, train
from tests.bug_zoo.faults import no_noise, shared_step_without_its_share
from tests.conftest import save_llama

CLAIM, DELTA = 2.0, 1e-5
RATE, ROUNDS = 0.5, 4
SITES = {"local": 2, "off": 2, "distributed": 3}  # each other site adds noise of its own, or is in the same sum
RECORDS = 20  # of a site
FALSE_ALARM = 1e-6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama wide enough that 200 canaries do not get into each other's way: in 16 dimensions they would."""
    return save_llama(
        tmp_path_factory.mktemp("wide-llama"), hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        initializer_range=0.1,
    )  # fmt: skip


def records(seed: int) -> list[PrivacyUnit]:
    generator = np.random.default_rng(seed)
    texts = [generator.integers(3, 250, size=int(generator.integers(8, 16))) for _ in range(RECORDS)]
    return [(Example(ids, np.where(np.arange(len(ids)) < 4, IGNORE, ids)),) for ids in texts]


def plan_of(base: Path, mode: str, noise_multiplier: float | None) -> RunPlan:
    many = SITES[mode]
    return parse(RunPlan, {
        "run": "control", "seed": 3, "sites": many, "quorum": many, "adapter": {},
        "model": {"source": str(base), "max_length": 32},
        "privacy": {"mode": mode, "unit": "record", "delta": DELTA, "clip_norm": 0.1, "sampling_rate": RATE,
                    "units_per_site": 40, "noise_multiplier": noise_multiplier},
        "training": {"rounds": ROUNDS, "local_steps": 1, "learning_rate": 1.0, "momentum": 0.0, "wire": "float32",
                     "server": {"name": "sgd", "learning_rate": 1.0, "momentum": 0.0}},
    })  # fmt: skip


@pytest.fixture
def attacked(base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that attacks a run whose coins and noise come from a seed; with seed=None from the system."""

    def attack(mode: str, noise: float | None, canaries: int = 160, seed: int | None = 0) -> Result:
        """`noise`: times what the claim needs; None: no privacy."""
        plan = plan_of(base, mode, None if noise is None else noise * calibrate(CLAIM, DELTA, RATE, ROUNDS))
        source: Any = from_the_system
        if seed is not None:
            monkeypatch.setattr(fedllm.privacy.canaries, "random_bytes", random.Random(seed).randbytes)

            def source(what: str, site: int, round_: int) -> Randomness:
                return SeededRandomness(seed, what, site, round_)

        context = open_context(plan.model, plan.adapter, plan.seed, "cpu")
        guesses = usual_guesses(canaries, RATE, ROUNDS)
        sites = [records(number) for number in range(SITES[mode])]
        return pooled(train(plan, context, sites, canaries, guesses, source)[1], guesses, DELTA)

    return attack


def test_without_privacy_the_attack_proves_most_of_what_it_can(attacked: Callable[..., Result]) -> None:
    result = attacked("off", None)
    assert result.white.lower >= result.white.ceiling / 2
    assert result.could_have(CLAIM)
    assert result.contradicts(CLAIM)


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_a_run_without_its_noise_is_contradicted(
    attacked: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The bug zoo's faults: the clip holds, the charge is right, and nothing is added."""
    if mode == "local":
        no_noise(monkeypatch)
    else:
        shared_step_without_its_share(monkeypatch)
        faulty = trainer.distributed_step  # which takes its coins from where noise would come from
        monkeypatch.setattr(trainer, "distributed_step", lambda *parts: faulty(*parts[:-1]))
    result = attacked(mode, 1.0)
    assert result.white.lower >= result.white.ceiling / 2
    assert result.contradicts(CLAIM)


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_a_run_with_a_tenth_of_its_noise_is_contradicted(attacked: Callable[..., Result], mode: str) -> None:
    result = attacked(mode, 0.1)
    assert result.white.lower > CLAIM
    assert result.contradicts(CLAIM)


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_an_honest_run_is_not_contradicted(attacked: Callable[..., Result], mode: str) -> None:
    result = attacked(mode, 1.0)
    assert result.could_have(CLAIM)
    assert not result.contradicts(CLAIM)


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_honest_runs_are_contradicted_no_more_often_than_stated(attacked: Callable[..., Result], mode: str) -> None:
    """Of 200 runs, at most as many as a chance of 5 % each allows."""
    alarms = sum(attacked(mode, 1.0, canaries=80, seed=None).contradicts(CLAIM) for _ in range(200))
    assert alarms <= stats.binom.isf(FALSE_ALARM, 200, 1 - CONFIDENCE)
