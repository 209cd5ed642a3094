"""Planted faults: ways in which programs of this kind have lost their privacy, each as a patch of the product.

A fault is named for what it does. It names the invariant that must find it: one of the self-check, or one of
invariants.py, which cost more than a start of training can afford.
"""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import client.records
import client.site
import fedllm.privacy.accounting
import fedllm.training.data
import server.checkpoint
from fedllm.privacy import distributed_noise as shared_noise
from fedllm.privacy.accounting import AccountingEvent, calibrate
from fedllm.privacy.distributed_noise import DistributedMechanism
from fedllm.privacy.ledger import LedgerFile, PrivacyLedger, Reservation
from fedllm.privacy.ledger_place import LedgerPlace
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import OsRandomness, Randomness, SeededRandomness
from fedllm.training import engine, losses, model, self_check, trainer
from fedllm.training.data import IGNORE, Batch, PrivacyUnit
from fedllm.training.engine import Engine
from fedllm.training.self_check import Subject

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Fault:
    """`inject` plants it in the product; `spoil` does something to the subject of a self-check instead."""

    name: str
    invariant: str
    inject: Callable[[Patch], None] = lambda patch: None
    spoil: Callable[[Subject], None] = lambda subject: None
    quantize: str = "none"  # shows on a base that is quantised so
    classifies: bool = False  # shows on a model with a classification head
    distributed: bool = False  # shows where noise comes in shares
    method: str = "lora"  # adapter.method of the subject


# ---- the clip --------------------------------------------------------------------------------------------------------


def _clip(vector: Tensor, norm: float) -> Tensor:
    return vector * min(1.0, norm / max(float(vector.double().norm()), 1e-30))


def clip_of_the_mean(patch: Patch) -> None:
    def faulty(gradients: Tensor, mechanism: Mechanism, distributed: object) -> Tensor:
        return _clip(gradients.double().mean(0), mechanism.clip_norm) * len(gradients)

    patch.setattr(engine, "clip_and_sum", faulty)


def _clip_in_parts(patch: Patch, cut: Callable[[list[str]], list[list[int]]]) -> None:
    """Clip groups of tensors apart, each to the whole clip norm."""
    shapes: list[tuple[str, int]] = []
    create = Engine.__init__

    def remember(self: Engine, adapter: Any) -> None:
        create(self, adapter)
        shapes[:] = [(name, p.numel()) for name, p in adapter.trainable.items()]

    def faulty(gradients: Tensor, mechanism: Mechanism, distributed: object) -> Tensor:
        total = torch.zeros(gradients.shape[1], dtype=torch.float64, device=gradients.device)
        starts = np.cumsum([0, *(size for _, size in shapes)])
        for group in cut([name for name, _ in shapes]):
            here = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in group])
            for row in gradients:
                total[here] += _clip(row[here].double(), mechanism.clip_norm)
        return total

    patch.setattr(Engine, "__init__", remember)
    patch.setattr(engine, "clip_and_sum", faulty)


def clip_per_tensor(patch: Patch) -> None:
    _clip_in_parts(patch, lambda names: [[i] for i in range(len(names))])


def head_clipped_apart(patch: Patch) -> None:
    def cut(names: list[str]) -> list[list[int]]:
        adapter = [i for i, name in enumerate(names) if "lora_" in name]
        return [adapter, [i for i in range(len(names)) if i not in adapter]]

    _clip_in_parts(patch, cut)


def clip_per_record(patch: Patch) -> None:
    honest = Engine.clipped_sum

    def faulty(self: Engine, units: Sequence[PrivacyUnit], mechanism: Mechanism, micro_batch: int) -> Tensor:
        return honest(self, [(record,) for unit in units for record in unit], mechanism, micro_batch)

    patch.setattr(Engine, "clipped_sum", faulty)


def _clip_unmeasured(
    gradients: Tensor, mechanism: Mechanism, distributed: DistributedMechanism | None, factor: float
) -> Tensor:
    """The clipped sum whose rows nobody measures as they enter it."""
    own = mechanism.factors(torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64)) * factor
    rows = own[:, None] * gradients.double()
    return rows.sum(0) if distributed is None else (rows / distributed.quantum).round().sum(0)


def nan_through_the_clip(patch: Patch) -> None:
    patch.setattr(torch.Tensor, "isfinite", lambda self: torch.ones_like(self, dtype=torch.bool))
    patch.setattr(engine, "clip_and_sum", lambda gradients, mechanism, distributed=None: _clip_unmeasured(
        gradients, mechanism, distributed, 1.0))  # fmt: skip


def factor_that_overflows(patch: Patch) -> None:
    """At the plan's own clip norm, in quanta; every other mechanism that a check may try is clipped as it should be."""

    def faulty(gradients: Tensor, mechanism: Mechanism, distributed: DistributedMechanism | None = None) -> Tensor:
        over = distributed is not None and mechanism.clip_norm == 0.4
        # room for rounding is left as it should be
        return _clip_unmeasured(gradients, mechanism, distributed, math.inf if over else 0.98)

    patch.setattr(engine, "clip_and_sum", faulty)


def last_micro_batch_twice(patch: Patch) -> None:
    honest = Engine.clipped_sum

    def faulty(self: Engine, units: Sequence[PrivacyUnit], mechanism: Mechanism, micro_batch: int) -> Tensor:
        total = honest(self, units, mechanism, micro_batch)
        if sum(map(len, units)) > micro_batch:
            total = total + honest(self, units[-1:], mechanism, micro_batch)
        return total

    patch.setattr(Engine, "clipped_sum", faulty)


def _few_rows_have_a_kernel_of_their_own(patch: Patch) -> None:
    """As in real libraries, where it shows in products larger than the tiny model's."""
    honest = torch.nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = honest(x, weight, bias)
        return y * (1 + 2.0**-22) if len(x) < 4 else y

    patch.setattr(torch.nn.functional, "linear", linear)


def slices_over_everybodys_tokens(patch: Patch) -> None:
    """As an output head of a large vocabulary was computed: in slices of all labelled tokens of a pass."""

    def faulty(adapter: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        targets = batch.labels[:, 1:]
        rows, columns = (targets != IGNORE).nonzero(as_tuple=True)
        transformer, head = adapter.split
        states = transformer(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        return losses.head_losses(states[rows, columns], head.weight, head.bias, targets[rows, columns]), rows

    patch.setattr(losses, "_LOGITS", 259 * 5)  # of five tokens, so that a record's last one may stand among few
    patch.setattr(losses, "token_losses", faulty)
    _few_rows_have_a_kernel_of_their_own(patch)


def rows_as_many_as_drawn(patch: Patch) -> None:
    honest = engine.collate
    patch.setattr(engine, "collate", lambda units, pad, device, width, rows: honest(units, pad, device, width))
    _few_rows_have_a_kernel_of_their_own(patch)


def last_bits_by_place(patch: Patch) -> None:
    """As element-wise kernels have it that several threads share: another code at the end of each one's part."""
    honest = losses.unit_losses

    def faulty(adapter: Any, batch: Batch) -> Tensor:
        own = honest(adapter, batch)
        return own * (1 + 2.0**-22 * (torch.arange(len(own), device=own.device) % 2))

    patch.setattr(engine, "unit_losses", faulty)


def uncompiled_after_a_failure(patch: Patch) -> None:
    """As if one unit made everybody's gradients another code's."""
    honest = Engine.clipped_sum

    def faulty(self: Engine, units: Sequence[PrivacyUnit], *others: Any) -> Tensor:
        total = honest(self, units, *others)
        return total if len(units) < 2 else total * (1 + 2.0**-22)

    patch.setattr(Engine, "clipped_sum", faulty)


def outlier_columns_of_the_batch(patch: Patch) -> None:
    """LLM.int8 with its default threshold, 6.0: where any record is above it, a column is computed otherwise for all.

    As bitsandbytes has it, layer and kernel, in evaluation mode, in which the base is.
    """
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    def llm_int8(model: Any, names: Sequence[str], kind: str) -> None:
        for name in names:
            layer = model.get_submodule(name)
            faulty = Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None,
                                  has_fp16_weights=False, threshold=6.0)  # fmt: skip
            faulty.weight, faulty.bias = Int8Params(layer.weight.data, requires_grad=False), layer.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, faulty.to("cpu").eval())

    patch.setattr(model, "quantise", llm_int8)


def sum_in_float32(patch: Patch) -> None:
    honest = engine.clip_and_sum

    def faulty(gradients: Tensor, mechanism: Mechanism, distributed: DistributedMechanism | None = None) -> Tensor:
        return honest(gradients, mechanism, distributed).float().double()

    patch.setattr(engine, "clip_and_sum", faulty)


def loss_averaged_over_the_batch(patch: Patch) -> None:
    def faulty(adapter: Any, batch: Batch) -> Tensor:
        return losses.unit_losses(adapter, batch) / len(batch.labels)

    patch.setattr(engine, "unit_losses", faulty)


def automatic_clip_without_its_bound(patch: Patch) -> None:
    """Normalised by the length plus gamma, then scaled by more than the sensitivity that is accounted for."""
    patch.setattr(Mechanism, "factors", lambda self, norms: 1.0 / (norms + 0.01))


# ---- the noise -------------------------------------------------------------------------------------------------------


def no_noise(patch: Patch) -> None:
    def faulty(self: Any) -> None:
        for p in self.params:
            p.grad = p.summed_grad.to(p.dtype)

    patch.setattr(engine._Optimizer, "add_noise", faulty)


def _noise_in_step(patch: Patch, factor: Callable[[Any, Sequence[PrivacyUnit], int], float]) -> None:
    honest = Engine.step

    def faulty(self: Engine, optimizer: Any, units: Sequence[PrivacyUnit], micro_batch: int) -> None:
        right = optimizer.mechanism
        scaled = right.noise_multiplier * factor(optimizer, units, micro_batch)
        optimizer.mechanism = replace(right, noise_multiplier=scaled)
        honest(self, optimizer, units, micro_batch)
        optimizer.mechanism = right

    patch.setattr(Engine, "step", faulty)


def noise_once_per_micro_batch(patch: Patch) -> None:
    def factor(_: Any, units: Sequence[PrivacyUnit], micro_batch: int) -> float:
        return math.sqrt(max(1, math.ceil(sum(map(len, units)) / micro_batch)))

    _noise_in_step(patch, factor)


def noise_scaled_by_the_actual_batch(patch: Patch) -> None:
    _noise_in_step(patch, lambda optimizer, units, _: max(1, len(units)) / optimizer.expected_batch_size)


def noise_of_another_clip_norm(patch: Patch) -> None:
    patch.setattr(Mechanism, "noise_std", property(lambda self: self.noise_multiplier * 1.0))


def noise_divided_by_the_sites(patch: Patch) -> None:
    honest = Mechanism.noise_std.fget  # type: ignore[attr-defined]
    patch.setattr(Mechanism, "noise_std", property(lambda self: honest(self) / math.sqrt(3)))


def noise_on_one_tensor_alone(patch: Patch) -> None:
    honest = Mechanism.noise

    def faulty(self: Mechanism, dimension: int, source: Randomness) -> Any:
        noise = honest(self, dimension, source)
        noise[-dimension // 4 :] = 0.0
        return noise

    patch.setattr(Mechanism, "noise", faulty)


def seeded_noise(patch: Patch) -> None:
    patch.setattr(client.site, "OsRandomness", lambda: SeededRandomness(0))


def generator_restored_on_resume(patch: Patch) -> None:
    """Claims to be private, but every process that opens it goes on from one saved state."""

    class Restored(OsRandomness):
        def __init__(self) -> None:
            self._generator = np.random.default_rng(20240611)

        def words(self, n: int) -> Any:
            return self._generator.integers(0, 2**64, size=n, dtype=np.uint64, endpoint=False)

    patch.setattr(client.site, "OsRandomness", Restored)


def empty_batches_skipped(patch: Patch) -> None:
    honest = Engine.step

    def faulty(self: Engine, optimizer: Any, units: Sequence[PrivacyUnit], micro_batch: int) -> None:
        if units:
            honest(self, optimizer, units, micro_batch)

    patch.setattr(Engine, "step", faulty)


def low_bits_unrounded(patch: Patch) -> None:
    def faulty(self: Mechanism, clipped_sum: Any, noise: Any) -> Any:
        return np.asarray(clipped_sum, dtype=np.float64) + noise

    patch.setattr(Mechanism, "noised", faulty)


# ---- sampling and the divisor ----------------------------------------------------------------------------------------


def shuffled_batches(patch: Patch) -> None:
    """An epoch at a time, as a shuffling loader deals them out."""
    left: list[int] = []
    generator = np.random.default_rng(0)

    def faulty(self: Mechanism, units: int, source: Randomness) -> Any:
        size = max(1, round(self.sampling_rate * units))
        if len(left) < size or max(left, default=0) >= units:
            left[:] = generator.permutation(units).tolist()
        batch, left[:] = left[:size], left[size:]
        return np.asarray(batch)

    patch.setattr(Mechanism, "sample", faulty)


def batches_of_fixed_size(patch: Patch) -> None:
    generator = np.random.default_rng(0)

    def faulty(self: Mechanism, units: int, source: Randomness) -> Any:
        return generator.choice(units, max(1, round(self.sampling_rate * units)), replace=False)

    patch.setattr(Mechanism, "sample", faulty)


def micro_batches_filled_up(patch: Patch) -> None:
    """The last micro-batch is filled with others, so that q is larger than what is charged for."""
    honest = Mechanism.sample

    def faulty(self: Mechanism, units: int, source: Randomness) -> Any:
        drawn = honest(self, units, source)
        others = np.setdiff1d(np.arange(units), drawn)
        return np.concatenate([drawn, others[: -len(drawn) % 8]])

    patch.setattr(Mechanism, "sample", faulty)


def one_batch_for_the_whole_round(patch: Patch) -> None:
    honest, kept = Mechanism.sample, dict[int, Any]()

    def faulty(self: Mechanism, units: int, source: Randomness) -> Any:
        return kept.setdefault(id(source), honest(self, units, source))

    patch.setattr(Mechanism, "sample", faulty)


def divided_by_the_actual_batch(patch: Patch) -> None:
    honest = Engine.step

    def faulty(self: Engine, optimizer: Any, units: Sequence[PrivacyUnit], micro_batch: int) -> None:
        optimizer.expected_batch_size = max(1, len(units))
        honest(self, optimizer, units, micro_batch)

    patch.setattr(Engine, "step", faulty)


def divided_by_the_sites_own_size(patch: Patch) -> None:
    """The optimiser of a round is told q times the number of units that the site has: a secret."""
    honest = trainer.train_round

    def faulty(adapter: Any, its: Any, units: Any, plan: Any, *rest: Any) -> Any:
        privacy = plan.privacy.model_copy(update={"units_per_site": len(units)})
        return honest(adapter, its, units, plan.model_copy(update={"privacy": privacy}), *rest)

    patch.setattr(trainer, "train_round", faulty)


def weighted_by_the_record_count(patch: Patch) -> None:
    honest = trainer.train_round

    def faulty(adapter: Any, its: Any, units: Any, plan: Any, *rest: Any) -> Any:
        return honest(adapter, its, units, plan, *rest) * (len(units) / plan.privacy.units_per_site)

    patch.setattr(trainer, "train_round", faulty)


# ---- the optimiser and the model -------------------------------------------------------------------------------------


def optimiser_outlives_the_round(patch: Patch) -> None:
    honest, kept = trainer._optimizer, dict[int, Any]()
    patch.setattr(trainer, "_optimizer", lambda adapter, plan: kept.setdefault(id(adapter), honest(adapter, plan)))


def momentum_of_gradients_without_noise(patch: Patch) -> None:
    honest = Engine.step

    def faulty(self: Engine, optimizer: Any, units: Sequence[PrivacyUnit], micro_batch: int) -> None:
        bare = self.clipped_sum(units, optimizer.mechanism, micro_batch)
        honest(self, optimizer, units, micro_batch)
        for p, state in optimizer.original_optimizer.state.items():
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"].copy_(bare.to(p) / optimizer.expected_batch_size)

    patch.setattr(Engine, "step", faulty)


def adapter_detached_by_wrapping(subject: Subject) -> None:
    """The optimiser's tensor is not the model's any more (meta-pytorch/opacus 820)."""
    for p in subject.adapter.trainable.values():
        p.data = p.data.clone()


def one_layer_detached_by_wrapping(subject: Subject) -> None:
    last = list(subject.adapter.trainable.values())[-1]
    last.data = last.data.clone()


def frozen_part_trained_without_noise(patch: Patch) -> None:
    honest = Engine.step

    def faulty(self: Engine, optimizer: Any, units: Sequence[PrivacyUnit], micro_batch: int) -> None:
        honest(self, optimizer, units, micro_batch)
        with torch.no_grad():
            for name, p in self.adapter.model.named_parameters():
                if "lora_A" in name and not p.requires_grad:
                    p.add_(1e-3)

    patch.setattr(Engine, "step", faulty)


def gradient_of_the_whole_batch(subject: Subject) -> None:
    """Records that are computed one at a time share a pass, and each gets what all of them give."""
    engine: Any = subject.engine
    honest = engine._gradients
    engine.rows = lambda width, micro_batch: min(4, micro_batch)
    engine._gradients = lambda batch: honest(batch).sum(0, keepdim=True).repeat(batch.units, 1)


# ---- accounting ------------------------------------------------------------------------------------------------------


def rate_times_the_share_of_clients(patch: Patch) -> None:
    def faulty(self: Mechanism, steps: int) -> AccountingEvent:
        return AccountingEvent(self.sampling_rate * 0.5, self.noise_multiplier, steps)

    patch.setattr(Mechanism, "event", faulty)


def a_round_charged_as_one_step(patch: Patch) -> None:
    def faulty(self: Mechanism, steps: int) -> AccountingEvent:
        return AccountingEvent(self.sampling_rate, self.noise_multiplier, 1)

    patch.setattr(Mechanism, "event", faulty)


def noise_calibrated_for_one_round(subject: Subject) -> None:
    plan = subject.plan
    privacy = plan.privacy
    target = 1.0  # of much noise, which is quickly found
    noise = calibrate(target, privacy.delta, privacy.sampling_rate, plan.training.local_steps)
    changes = {"epsilon": target, "noise_multiplier": noise}
    subject.plan = plan.model_copy(update={"privacy": privacy.model_copy(update=changes)})


def new_accountant_every_round(patch: Patch) -> None:
    honest = PrivacyLedger.events
    patch.setattr(PrivacyLedger, "events", lambda self: honest(self)[-1:])


def steps_lost_on_resume(patch: Patch) -> None:
    create, honest = PrivacyLedger.__init__, PrivacyLedger.events

    def faulty(self: PrivacyLedger, *arguments: Any) -> None:
        create(self, *arguments)
        patch.setattr(self, "_forgotten", len(honest(self)), raising=False)

    patch.setattr(PrivacyLedger, "__init__", faulty)
    patch.setattr(PrivacyLedger, "events", lambda self: honest(self)[self._forgotten :])


def charged_only_after_training(patch: Patch) -> None:
    reserve, release = PrivacyLedger.reserve, PrivacyLedger.release
    wanted: dict[tuple[str, int], tuple[Any, ...]] = {}

    def later(self: PrivacyLedger, run: str, round: int, *rest: Any) -> Reservation:
        wanted[run, round] = rest
        return Reservation(run, round, None, os.urandom(32))

    def now(self: PrivacyLedger, reservation: Reservation, reply: bytes) -> None:
        key = (reservation.run, reservation.round)
        release(self, reserve(self, *key, *wanted.pop(key)), reply)

    patch.setattr(PrivacyLedger, "reserve", later)
    patch.setattr(PrivacyLedger, "release", now)


def killed_rounds_given_back(patch: Patch) -> None:
    create = PrivacyLedger.__init__

    def faulty(self: PrivacyLedger, place: LedgerPlace, *arguments: Any) -> None:
        create(self, place, *arguments)
        for charge in LedgerFile(place.file).charges():
            if charge.state == "RESERVED":
                self.abort(charge.run, charge.round)

    patch.setattr(PrivacyLedger, "__init__", faulty)


def released_reply_not_kept(patch: Patch) -> None:
    patch.setattr(PrivacyLedger, "release", lambda self, reservation, reply: None)


def every_second_release_free(patch: Patch) -> None:
    """A round is charged under a key that two rounds share."""
    honest = PrivacyLedger.charge
    count = itertools.count()

    def faulty(self: PrivacyLedger, db: Any, run: str, round: int, request: str, event: AccountingEvent) -> bytes:
        paid = event if next(count) % 2 == 0 else replace(event, steps=0)
        return honest(self, db, run, round, request, paid)

    patch.setattr(PrivacyLedger, "charge", faulty)


def checkpoint_without_the_accountant(patch: Patch) -> None:
    honest = server.checkpoint.asdict

    def faulty(state: Any) -> dict[str, Any]:
        kept: dict[str, Any] = honest(state)
        for key in ("charged", "last_charged", "stated", "epsilon", "epsilon_rdp"):
            kept.pop(key)
        return kept

    patch.setattr(server.checkpoint, "asdict", faulty)


def rounding_errors_not_allowed_for(patch: Patch) -> None:
    fedllm.privacy.accounting._spent.cache_clear()
    patch.setattr(fedllm.privacy.accounting, "_rounding", lambda events: 0.0)


def one_person_under_two_spellings(patch: Patch) -> None:
    patch.setattr(fedllm.training.data, "person", str)


def cap_on_records_ignored(patch: Patch) -> None:
    honest = client.records._Cut.__init__

    def faulty(self: Any, groups: Any, plan: Any) -> None:
        honest(self, groups, plan)
        self._cap = 10**6

    patch.setattr(client.records._Cut, "__init__", faulty)


# ---- noise in shares -------------------------------------------------------------------------------------------------


def shares_for_all_sites(patch: Patch) -> None:
    """Then the sum of the survivors has too little, as soon as somebody drops out or colludes."""
    patch.setattr(DistributedMechanism, "_parts", property(lambda self: (self.quorum - self.colluding,)))


def more_given_away_than_surplus(patch: Patch) -> None:
    """As if nobody had dropped out; the server takes it off."""
    patch.setattr(DistributedMechanism, "revealed_seeds", lambda self, survivors: tuple(range(len(self._parts) - 1)))


def one_site_more_than_there_is(patch: Patch) -> None:
    honest = DistributedMechanism.revealed_seeds
    patch.setattr(
        DistributedMechanism, "revealed_seeds",
        lambda self, u: honest(self, min(self.sites, u + 1) if u > self.quorum else u),
    )  # fmt: skip


def surplus_from_the_same_seeds(patch: Patch) -> None:
    honest = shared_noise._keyed
    patch.setattr(shared_noise, "_keyed", lambda _, place=b"": honest("5a" * 32, place))


def shares_from_a_seed(patch: Patch) -> None:
    honest = shared_noise.rounded_normals
    patch.setattr(shared_noise, "rounded_normals", lambda _, n, std: honest(SeededRandomness(7, "share"), n, std))


def quanta_without_a_clip(patch: Patch) -> None:
    honest = engine.clip_and_sum

    def faulty(gradients: Tensor, mechanism: Mechanism, distributed: DistributedMechanism | None = None) -> Tensor:
        if distributed is None:
            return honest(gradients, mechanism)
        return (gradients.double() / distributed.quantum).round().sum(0)

    patch.setattr(engine, "clip_and_sum", faulty)


def _shared_step(draw: Callable[[int, float, Randomness], Any], with_share: bool) -> Callable[..., Any]:
    def step(adapter: Any, engine: Engine, units: Any, plan: Any, start: Any, source: Randomness, size: int) -> Any:
        distributed = plan.distributed
        with adapter.lock:
            adapter.load(start)
            share = distributed.share(len(start), source)
            drawn = [units[i] for i in draw(len(units), plan.privacy.sampling_rate, source)]
            total = engine.clipped_sum(drawn, distributed.mechanism, size, distributed).numpy()
        return distributed.noised(total, share if with_share else replace(share, noise=0 * share.noise)), share.seeds

    return step


def shared_step_of_a_fixed_size(patch: Patch) -> None:
    def draw(n: int, rate: float, source: Randomness) -> Any:
        return np.argsort(source.words(n))[: round(rate * n)]

    patch.setattr(trainer, "distributed_step", _shared_step(draw, with_share=True))


def shared_step_without_its_share(patch: Patch) -> None:
    """The masks hide it, and the sum of all sites lacks noise."""

    def draw(n: int, rate: float, source: Randomness) -> Any:
        return Mechanism(1.0, 1.0, rate).sample(n, source)

    patch.setattr(trainer, "distributed_step", _shared_step(draw, with_share=False))


# ---- the self-check --------------------------------------------------------------------------------------------------


def checks_remembered_by_hash(patch: Patch) -> None:
    def faulty(subject: Subject) -> str:
        return str(hash((subject.plan, subject.micro_batch)))

    patch.setattr(self_check, "_remembered_by", faulty)


SELF_CHECK = [
    Fault("the mean of a batch is clipped", "sum-equals-the-slow-loop", clip_of_the_mean),
    Fault("a gradient is summed over the batch", "sum-equals-the-slow-loop", spoil=gradient_of_the_whole_batch,
          method="ia3"),
    Fault("every tensor is clipped by itself", "clip-bounds-every-unit", clip_per_tensor),
    Fault("adapter and head are clipped apart", "clip-bounds-every-unit", head_clipped_apart, classifies=True),
    Fault("a person's records are clipped one by one", "clip-bounds-every-unit", clip_per_record),
    Fault("automatic clipping forgets the clip norm", "sum-equals-the-slow-loop", automatic_clip_without_its_bound),
    Fault("a factor of the clip overflows", "clip-holds-at-every-length", factor_that_overflows, distributed=True),
    Fault("NaN goes through the clip", "unit-that-is-not-finite-counts-zero", nan_through_the_clip),
    Fault("the last micro-batch counts twice", "micro-batch-changes-nothing", last_micro_batch_twice),
    Fault("the head's slices hold everybody's tokens", "company-changes-no-bit", slices_over_everybodys_tokens),
    Fault("a pass has as many rows as are drawn", "company-changes-no-bit", rows_as_many_as_drawn),
    Fault("last bits depend on the place in a pass", "company-changes-no-bit", last_bits_by_place),
    Fault("one unit changes the code for all", "company-changes-no-bit", uncompiled_after_a_failure),
    Fault("LLM.int8 takes outlier columns from the whole batch", "large-activation-stays-its-units-own",
          outlier_columns_of_the_batch, quantize="int8"),
    Fault("the sum is rounded", "company-changes-no-bit", sum_in_float32),
    Fault("the loss is averaged over the batch", "micro-batch-changes-nothing", loss_averaged_over_the_batch),
    Fault("no noise is added", "empty-batch-is-a-noisy-step", no_noise),
    Fault("empty batches are skipped", "empty-batch-is-a-noisy-step", empty_batches_skipped),
    Fault("noise is added once per micro-batch", "noise-has-the-charged-deviation", noise_once_per_micro_batch),
    Fault("noise is scaled by the actual batch", "noise-has-the-charged-deviation", noise_scaled_by_the_actual_batch),
    Fault("noise follows another clip norm", "noise-has-the-charged-deviation", noise_of_another_clip_norm),
    Fault("noise is divided by the sites", "noise-has-the-charged-deviation", noise_divided_by_the_sites),
    Fault("some tensors get no noise", "noise-has-the-charged-deviation", noise_on_one_tensor_alone),
    Fault("noise comes from a seed", "noise-is-fresh", seeded_noise),
    Fault("the generator is restored on resume", "noise-is-fresh", generator_restored_on_resume),
    Fault("the low bits are not rounded", "release-lies-on-the-grid", low_bits_unrounded),
    Fault("the sum is divided by the actual batch", "divisor-is-public", divided_by_the_actual_batch),
    Fault("the sum is divided by the site's own size", "divisor-is-public", divided_by_the_sites_own_size),
    Fault("batches are shuffled", "sampling-is-poisson", shuffled_batches),
    Fault("batches have a fixed size", "sampling-is-poisson", batches_of_fixed_size),
    Fault("micro-batches are filled up", "sampling-is-poisson", micro_batches_filled_up),
    Fault("one batch serves a whole round", "sampling-is-poisson", one_batch_for_the_whole_round),
    Fault("q is multiplied by the share of clients", "charge-is-the-mechanism", rate_times_the_share_of_clients),
    Fault("a round is charged as one step", "charge-is-the-mechanism", a_round_charged_as_one_step),
    Fault("noise is calibrated for one round", "charge-is-the-mechanism", spoil=noise_calibrated_for_one_round),
    Fault("the update is weighted by the record count", "weights-change-as-the-optimiser-says",
          weighted_by_the_record_count),
    Fault("the optimiser outlives the round", "weights-change-as-the-optimiser-says", optimiser_outlives_the_round),
    Fault("momentum carries gradients without noise", "weights-change-as-the-optimiser-says",
          momentum_of_gradients_without_noise),
    Fault("wrapping detaches the adapter", "weights-change-as-the-optimiser-says", spoil=adapter_detached_by_wrapping),
    Fault("wrapping detaches one layer", "weights-change-as-the-optimiser-says", spoil=one_layer_detached_by_wrapping),
    Fault("a frozen part is trained without noise", "weights-change-as-the-optimiser-says",
          frozen_part_trained_without_noise),
    Fault("sums in quanta are not clipped", "sum-in-quanta-is-within-the-clip",
          quanta_without_a_clip, distributed=True),
    Fault("shares are sized for all sites", "share-has-its-deviation",
          shares_for_all_sites, distributed=True),
    Fault("a site gives away too much noise", "share-has-its-deviation",
          more_given_away_than_surplus, distributed=True),
    Fault("a site gives noise for one too many", "share-has-its-deviation",
          one_site_more_than_there_is, distributed=True),
    Fault("parts of excess noise have the same seeds", "share-has-its-deviation",
          surplus_from_the_same_seeds, distributed=True),
    Fault("shares come from a seed", "share-has-its-deviation",
          shares_from_a_seed, distributed=True),
    Fault("a step with distributed noise draws a fixed size", "sampling-is-poisson",
          shared_step_of_a_fixed_size, distributed=True),
    Fault("a step with distributed noise sends none", "upload-is-a-sum-with-its-share",
          shared_step_without_its_share, distributed=True),
]  # fmt: skip

TESTS_ONLY = [
    Fault("every round has a new accountant", "budget-composes-over-rounds", new_accountant_every_round),
    Fault("steps are lost on resume", "budget-composes-over-rounds", steps_lost_on_resume),
    Fault("every second release is free", "budget-composes-over-rounds", every_second_release_free),
    Fault("a round is charged after training", "charge-is-on-disk-before-records-are-used",
          charged_only_after_training),
    Fault("killed rounds are given back", "killed-round-stays-charged", killed_rounds_given_back),
    Fault("a released reply is not kept", "one-charge-buys-one-release", released_reply_not_kept),
    Fault("a checkpoint lacks the accountant", "checkpoint-keeps-what-was-charged", checkpoint_without_the_accountant),
    Fault("checks are remembered by hash", "every-plan-is-checked-itself", checks_remembered_by_hash),
    Fault("rounding errors of epsilon are not allowed for", "epsilon-is-not-below-the-truth",
          rounding_errors_not_allowed_for),
    Fault("one person is two units", "a-person-is-one-unit", one_person_under_two_spellings),
    Fault("the cap on records is ignored", "a-person-is-one-unit", cap_on_records_ignored),
]  # fmt: skip
