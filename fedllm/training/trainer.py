"""A site's part of one round: load the adapter, take the planned DP steps, return the difference."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedllm.errors import Cancelled, ConfigError, Diverged
from fedllm.plan import RunPlan
from fedllm.privacy.metrics import layout_of
from fedllm.privacy.randomness import Randomness
from fedllm.training.adapter import AdapterModel
from fedllm.training.data import Drawn, PrivacyUnit
from fedllm.training.engine import Engine
from fedllm.training.unit_metrics import unit_metrics


def train_round(
    adapter: AdapterModel,
    engine: Engine,
    units: Sequence[PrivacyUnit],
    plan: RunPlan,
    start: NDArray[np.float32],
    source: Randomness,
    micro_batch: int,
    stop: threading.Event | None = None,
    coins: Randomness | None = None,
) -> NDArray[np.float32]:
    """Return the update float32[d] of `plan.training.local_steps` steps from `start` on `units`.

    Every step draws its own noise from `source`, then its own Poisson batch from `coins` (without them, from `source`);
    the optimiser begins afresh, so that nothing but the ledger outlives the round. Raises Diverged if the result is
    not finite, and Cancelled, before the next step, if `stop` is set.
    """
    mechanism = plan.mechanism
    with adapter.lock:
        adapter.load(start)
        optimizer = engine.optimizer(_optimizer(adapter, plan), mechanism, plan.expected_units, source)
        for _ in range(plan.training.local_steps):
            if stop is not None and stop.is_set():
                raise Cancelled("nobody waits for the answer any more")
            optimizer.draw_noise()
            drawn = mechanism.sample(len(units), source if coins is None else coins)
            engine.step(optimizer, Drawn(units, drawn), micro_batch)
        end = adapter.vector()
    if not np.isfinite(end).all():
        raise Diverged("training diverged: the adapter is not finite. Lower training.learning_rate.")
    return end - start


def distributed_step(
    adapter: AdapterModel,
    engine: Engine,
    units: Sequence[PrivacyUnit],
    plan: RunPlan,
    start: NDArray[np.float32],
    source: Randomness,
    micro_batch: int,
    coins: Randomness | None = None,
) -> tuple[NDArray[np.uint32], tuple[str, ...]]:
    """Return the site's part of one step of the whole federation, from `start` on a Poisson sample of `units`.

    uint32[d]: its clipped sum in whole quanta with its share of the noise, modulo 2^32; and the seeds of
    parts that may turn out as excess noise. One share alone protects less than was promised: the result must be masked
    before it leaves the site. Raises ConfigError if the plan has no room for such sums.
    """
    distributed = plan.distributed
    if distributed is None:
        raise ConfigError(f"privacy.mode={plan.privacy.mode} has no noise in shares")
    with adapter.lock:
        adapter.load(start)
        share = distributed.share(len(start), source)
        drawn = distributed.mechanism.sample(len(units), source if coins is None else coins)
        total = engine.clipped_sum(Drawn(units, drawn), distributed.mechanism, micro_batch, distributed)
    return distributed.noised(total.cpu().numpy(), share), share.seeds


def score(
    engine: Engine,
    units: Sequence[PrivacyUnit],
    plan: RunPlan,
    vector: NDArray[np.float32],
    source: Randomness,
    micro_batch: int,
) -> "Scored":
    """Return how good the adapter float32[d] is on evaluation units: a noised sum, and the exact one for their owner.

    The noise is drawn before a record is looked at. With noise in shares one share alone protects less than was
    promised: the sum must be masked before it leaves the site.
    """
    layout = layout_of(plan.model, engine.adapter.vocabulary)
    mechanism, shared = plan.score_mechanism, plan.distributed_scores
    if shared is not None:
        share = shared.share(layout.dimension, source)
        values = unit_metrics(engine, vector, units, micro_batch)
        return Scored(layout.cut(values), b"", shared.noised(layout.clipped_sum(values, shared), share), share.seeds)
    noise = mechanism.noise(layout.dimension, source)
    values = unit_metrics(engine, vector, units, micro_batch)
    released = mechanism.noised(layout.clipped_sum(values, None), noise)
    return Scored(layout.cut(values), released.astype("<f8").tobytes(), np.empty(0, np.uint32), ())


@dataclass(frozen=True)
class Scored:
    """What a site makes of an adapter and its evaluation units."""

    values: NDArray[np.float64]  # [units, metrics], exact, each in its range: for their owner alone
    released: bytes  # noise of the site's own: the noised sum, float64[1 + metrics], little endian
    share: NDArray[np.uint32]  # noise in shares: its part of the sum, uint32[1 + metrics], to be masked
    seeds: tuple[str, ...]  # secret: of the noise in it that may turn out as excess


def _optimizer(adapter: AdapterModel, plan: RunPlan) -> torch.optim.Optimizer:
    parameters, training = [adapter.flat], plan.training
    if training.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=training.learning_rate)
    return torch.optim.SGD(parameters, lr=training.learning_rate, momentum=training.momentum)
