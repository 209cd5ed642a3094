"""Attack: one site of five sends a poisoned update: scaled, with its sign flipped, or learned from flipped labels.

Stopped by the public bound on what honest sites can send, where it is scaled. **The other two are not**: they are as
long as an honest update, and what they do to the model is bounded by that alone. These tests say so.
"""

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import client.site
from fedllm.errors import MessageError
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import OsRandomness
from fedllm.privacy.shared import SharedMechanism
from server.aggregate import bound_of_sum
from tests.attacks.test_isolated_sum import Offices
from tests.server.test_rounds import FakeSite, Federation, Vector, make_plan, task_identity  # noqa: F401  # a fixture

SITES, UNITS, D = 5, 40.0, 2000
SHARED = SharedMechanism(Mechanism(0.5, 1.0, 0.1), SITES, 4, 1, UNITS)
POISONS = {"scaled": 200.0, "sign-flipped": -1.0, "label-flipped": 0.0}


def learned(seed: int, direction: int = 0) -> NDArray[np.float64]:
    """A clipped sum in whole quanta: half of every unit's gradient is common to all, along one coordinate."""
    noise = np.random.default_rng(seed).normal(size=D)
    common = np.zeros(D)
    common[direction] = UNITS / 2
    return np.rint((common + math.sqrt(UNITS) / 2 * noise / np.linalg.norm(noise)) * SHARED.scale)


def opened(sums: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """What head office reads: the sum of all sites with its noise; the last uploads what it likes, and no noise."""
    *honest, last = sums
    total = (last.astype(np.int64) % 2**32).astype(np.uint32)
    for clipped in honest:
        upload, seeds = SHARED.upload(clipped, OsRandomness())
        total += upload
        total -= SHARED.surplus([seeds[k] for k in SHARED.given_away(SITES)], SITES, D)
    return SHARED.decode(total)


@pytest.mark.parametrize("poison", ["none", *POISONS])
def test_a_sum_with_a_scaled_share_is_refused_and_one_with_flipped_signs_or_labels_is_not(poison: str) -> None:
    sums = [learned(site) for site in range(SITES)]
    if poison == "label-flipped":
        sums[-1] = learned(SITES, direction=1)
    elif poison != "none":
        sums[-1] = sums[-1] * POISONS[poison]
    bound = bound_of_sum(SHARED, SITES, SITES)
    if poison == "scaled":
        with pytest.raises(MessageError, match="length="):
            bound.check(opened(sums))
    else:
        bound.check(opened(sums))


def test_a_share_in_one_coordinate_alone_is_refused() -> None:
    sums = [learned(site) for site in range(SITES)]
    sums[-1][7] = SHARED._reach * SITES  # any whole number can be uploaded, modulo 2^32
    with pytest.raises(MessageError, match="expected"):
        bound_of_sum(SHARED, SITES, SITES).check(opened(sums))


def test_masked_sums_of_real_sites_are_refused_where_one_is_poisoned(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offices, asked = Offices(tmp_path, tiny_llama), list[int]()
    honest = client.site.shared_step

    def step(*arguments):  # type: ignore[no-untyped-def]
        vector, seeds = honest(*arguments)
        asked.append(1)
        return (vector + np.uint32(2**28) if len(asked) == 3 else vector), seeds

    monkeypatch.setattr(client.site, "shared_step", step)
    task = offices.task(offices.workspace.adapter.initial)
    uploads = offices.uploads(1, offices.train(dict.fromkeys(offices.sites, task)))
    with pytest.raises(MessageError, match="A site is poisoned"):
        offices.masks.step(1, task.task(task.payload), uploads, offices.ask)


class Poisoned(FakeSite):
    factor = 1.0

    def delta(self, round_: int, start: Vector) -> Vector:
        return np.float32(self.factor) * super().delta(round_, start)


@pytest.mark.parametrize("poison", POISONS)
def test_a_scaled_update_is_left_out_of_the_mean_and_flipped_ones_are_not(tmp_path: Path, poison: str) -> None:
    federation = Federation(tmp_path, make_plan(rounds=1, mode="local", noise_multiplier=1.0))
    site = Poisoned("jeju")
    site.factor = POISONS[poison]
    federation.sites["jeju"] = site
    federation.grid.nodes[list(federation.sites).index("jeju") + 1] = site
    record = federation.run().records[-1]
    if poison == "scaled":
        assert sorted(record.failed) == ["jeju"]
        assert "A site is poisoned" in record.failed["jeju"]
    else:
        assert record.failed == {}
    assert len(record.answered) == 3 - (poison == "scaled")
