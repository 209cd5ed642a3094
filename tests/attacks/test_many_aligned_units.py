"""Attack: so many gradients point along one coordinate that a sum in floats rounds: a unit more moves what others add.

Stopped by exact sums over all passes, however many units there are, that are rounded once at the end.
"""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedllm.training.engine
from fedllm.privacy.distributed_noise import DistributedMechanism
from fedllm.privacy.mechanism import Mechanism
from fedllm.training.data import Example, PrivacyUnit
from fedllm.training.engine import Engine
from tests.attacks.office import context, plan_of

UNITS, LARGEST = 6000, 2**42 - 1  # in quanta: 2^53 are passed after 2,048 units
KINDS = [None, DistributedMechanism(Mechanism(1.0, 1.0, 0.5), 4, 3, 0, 1.0)]


@pytest.fixture
def engine(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """One whose units add up to what their first tokens say: quanta below the largest a coordinate can have."""

    def clipped(self: Engine, units: Any, width: int, mechanism: Mechanism, _: int, distributed: Any) -> torch.Tensor:
        quantum = 1.0 if distributed is not None else fedllm.training.engine._quantum(mechanism)
        total = sum(LARGEST - int(unit[0].input_ids[0]) for unit in units)
        return torch.full((self.adapter.flat.numel(),), float(total) * quantum, dtype=torch.float64)

    monkeypatch.setattr(Engine, "_clipped", clipped)
    return context(plan_of(tiny_llama)).engine


def units() -> list[PrivacyUnit]:
    return [(Example(np.asarray([number % 251]), np.asarray([0])),) for number in range(UNITS)]


@pytest.mark.parametrize("distributed", KINDS, ids=["local", "distributed"])
@pytest.mark.parametrize("clip_norm", [1.0, 0.3, 1e-90, 1e90])
def test_the_sum_over_all_passes_is_the_exact_sum_rounded_once(
    engine: Engine, distributed: DistributedMechanism | None, clip_norm: float
) -> None:
    mechanism, some = Mechanism(clip_norm, 1.0, 0.5), units()
    quantum = 1.0 if distributed is not None else fedllm.training.engine._quantum(mechanism)
    for order in (some, some[::-1], some[:3000], some[:2047]):
        exact = sum(LARGEST - int(unit[0].input_ids[0]) for unit in order)
        found = engine.clipped_sum(order, mechanism, 8, distributed)
        assert set(found.tolist()) == {float(Fraction(quantum) * exact)}


def test_what_is_added_before_a_carry_stays_below_what_float64_holds_exactly() -> None:
    """Of any mechanism: a row is within its clip, which has 2^42 quanta at most."""
    module = fedllm.training.engine
    for clip in (1.0, 0.999, 2.0**-0.5, 1e100, 1e-100):
        assert clip / module._quantum(Mechanism(clip, 1.0, 0.5)) <= 2**module._QUANTUM
    assert module._EXACT * 2**module._QUANTUM + module._CARRY <= 2**53
    assert math.frexp(module._CARRY)[0] == 0.5, "a power of two: to divide by it is exact"
