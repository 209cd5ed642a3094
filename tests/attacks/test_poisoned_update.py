"""Attack: one site of twelve sends a poisoned update: scaled, with its sign flipped, or learned from flipped labels.

Stopped by the public bound on what honest sites can send, where it is beyond; within the bound **steers the model**,
unless `federation.groups` (the median of several sums) or `federation.gate` (the held-out loss) is on: both are off by
default. What is left of the training in each case is measured here, and in docs/threat-model.md.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import client.site
from fedllm.errors import MessageError
from fedllm.privacy.distributed_noise import DistributedMechanism
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import OsRandomness
from server.aggregate import Bound, bound_of_sum, median
from tests.attacks.test_isolated_sum import Offices
from tests.server.test_rounds import FakeSite, Federation, Vector, make_plan, task_identity  # noqa: F401  # a fixture

SITES, UNITS, D = 12, 40.0, 2000
SHARED = DistributedMechanism(Mechanism(0.5, 1.0, 0.1), SITES, 8, 1, UNITS)
POISONS = {"scaled": 200.0, "sign-flipped": -1.0, "label-flipped": 0.0}


def learned(seed: int, direction: int = 0) -> NDArray[np.float64]:
    """A clipped sum in whole quanta: half of every unit's gradient is common to all, along one of two directions."""
    noise = np.random.default_rng(seed).normal(size=D)
    common = np.where(np.arange(D) % 2 * direction, -1, 1) * UNITS / 2 / math.sqrt(D)
    return np.rint((common + math.sqrt(UNITS) / 2 * noise / np.linalg.norm(noise)) * SHARED.scale)


def opened(sums: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """What the server reads: the sum of all sites with its noise; the last uploads what it likes, and no noise."""
    *honest, last = sums
    total = (last.astype(np.int64) % 2**32).astype(np.uint32)
    for clipped in honest:
        upload, seeds = SHARED.upload(clipped, OsRandomness())
        total += upload
        total -= SHARED.surplus([seeds[k] for k in SHARED.revealed_seeds(SITES)], SITES, D)
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
    honest = client.site.distributed_step

    def step(*arguments):  # type: ignore[no-untyped-def]
        vector, seeds = honest(*arguments)
        asked.append(1)
        return (vector + np.uint32(2**28) if len(asked) == 3 else vector), seeds

    monkeypatch.setattr(client.site, "distributed_step", step)
    task = offices.task(offices.context.adapter.initial)
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


# ---- what is left of the training --------------------------------------------------------------------------------

CLIP, NOISE, ROUNDS, RATE, GATE, DIM = 1.0, 1.0, 30, 0.05, 0.1, 200
TARGET = np.full(
    DIM, DIM**-0.5
)  # what honest records teach; the held-out loss is the squared distance from it, 1 at first
START = np.zeros(DIM)
Sum = NDArray[np.float64]


@dataclass(frozen=True)
class Training:
    """Twelve sites in so many groups, on a quadratic problem; with the real noise, bound and median."""

    groups: int
    gate: bool
    poison: str
    sites: int = SITES

    @property
    def distributed(self) -> DistributedMechanism:
        size = self.sites // self.groups
        return DistributedMechanism(Mechanism(CLIP, NOISE, 0.1), size, -(-3 * size // 4), 1, UNITS)

    def loss(self, w: Sum) -> float:
        return float(np.sum((w - TARGET) ** 2))

    def learned(self, w: Sum, target: Sum, rng: np.random.Generator) -> Sum:
        """The sum of a site's clipped gradients, each of its own record."""
        records = target + rng.normal(size=(int(UNITS), DIM)) / math.sqrt(DIM)
        gradients = w - records
        return np.asarray((gradients * np.minimum(1, CLIP / np.linalg.norm(gradients, axis=1))[:, None]).sum(axis=0))

    def sent(self, w: Sum, site: int, rng: np.random.Generator, bound: Bound) -> Sum:
        """What a site sends; the last site is the poisoned one, and adds no noise either."""
        if site < self.sites - 1 or self.poison == "none":
            return self.learned(w, TARGET, rng)
        if self.poison == "label-flipped":
            return self.learned(w, -TARGET, rng)
        if self.poison == "as far as the bound lets":  # by its guess of the others' sum
            others = (self.distributed.sites - 1) * float(np.linalg.norm(self.learned(w, TARGET, rng)))
            return TARGET * (0.9 * bound.length + others)
        return self.learned(w, TARGET, rng) * {"scaled": 200.0, "sign-flipped": -1.0}[self.poison]

    def opened(self, w: Sum, rng: np.random.Generator) -> list[Sum]:
        """Return the steps that the sums of the groups say, those left out that are beyond the bound."""
        distributed, steps = self.distributed, []
        bound = bound_of_sum(distributed, distributed.sites, distributed.sites)
        for group in range(self.groups):
            total = np.zeros(DIM, np.uint32)
            for site in range(group, self.sites, self.groups):
                clipped = np.rint(self.sent(w, site, rng, bound) / distributed.quantum)
                if site == self.sites - 1 and self.poison != "none":
                    total += (clipped.astype(np.int64) % 2**32).astype(np.uint32)
                    continue
                upload, seeds = distributed.upload(clipped, OsRandomness())
                total += upload - distributed.surplus(
                    [seeds[k] for k in distributed.revealed_seeds(distributed.sites)], distributed.sites, DIM
                )
            try:
                bound.check(decoded := distributed.decode(total))
                steps.append(-RATE * decoded / (distributed.sites * UNITS))
            except MessageError:
                continue
        return steps

    def run(self) -> tuple[float, int]:
        """Return the held-out loss at the end, and how many rounds were paid for and not applied."""
        rng, w, lowest, lost = np.random.default_rng(0), START, 1.0, 0
        for _ in range(ROUNDS):
            steps = self.opened(w, rng)
            usable = self.groups - len(steps) <= 1 if self.groups > 1 else bool(steps)
            after = w + median([step.astype(np.float32) for step in steps]) if usable else w
            if not usable or (self.gate and not self.loss(after) <= (1 + GATE) * lowest):
                lost += 1
                continue
            w, lowest = after, min(lowest, self.loss(after))
        return self.loss(w), lost


GROUPS_AND_GATES = list(itertools.product((1, 3), (False, True)))
# held-out loss after 30 rounds, and how many of them were lost: one sum, with a gate, three groups, with a gate
MEASURED = {
    "none": [(0.072, 0), (0.072, 0), (0.073, 0), (0.073, 0)],
    "scaled": [(1.0, 30), (1.0, 30), (0.072, 0), (0.072, 0)],
    "as far as the bound lets": [(18.0, 0), (1.0, 30), (0.11, 0), (0.11, 0)],
    "sign-flipped": [(0.118, 0), (0.118, 0), (0.104, 0), (0.104, 0)],
    "label-flipped": [(0.136, 0), (0.136, 0), (0.109, 0), (0.109, 0)],
}


@pytest.mark.parametrize("poison", MEASURED)
def test_what_is_left_of_the_training(poison: str) -> None:
    """The table of docs/threat-model.md; one sum of all sites, and a poisoned site among them, may end far off."""
    for (groups, gate), (loss, lost) in zip(GROUPS_AND_GATES, MEASURED[poison], strict=True):
        found = Training(groups, gate, poison).run()
        assert found == (pytest.approx(loss, rel=0.1), lost), (groups, gate)


@pytest.mark.parametrize(("groups", "sites", "times"), [(3, 12, 2.22), (3, 36, 2.07), (5, 20, 3.01)])
def test_what_groups_cost_in_noise(groups: int, sites: int, times: float) -> None:
    """sqrt(G) for a whole noise in each of G groups; 1.16 and 1.20 for a median of 3 and 5, at most 1.25.

    And sqrt(n / (n - 1)) more noise in a sum of n sites, of which one may collude and its share is not counted on.
    """

    def noise(many: int) -> float:
        distributed, steps = Training(many, False, "none", sites).distributed, []
        for _ in range(many):
            total = np.zeros(D, np.uint32)
            for _ in range(distributed.sites):
                upload, seeds = distributed.upload(np.zeros(D), OsRandomness())
                total += upload - distributed.surplus(
                    [seeds[k] for k in distributed.revealed_seeds(distributed.sites)], distributed.sites, D
                )
            steps.append((distributed.decode(total) / distributed.sites).astype(np.float32))
        return float(np.std(median(steps)))

    assert noise(groups) / noise(1) == pytest.approx(times, rel=0.1)
