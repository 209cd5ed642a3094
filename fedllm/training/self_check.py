"""Invariants without which the stated privacy does not hold, checked on the real engine before any record is used.

Every check has a name, runs on the model, engine, mechanism and training loop that will see the records, and is given
public made-up tokens. The adapter's values are put back afterwards. If checks compare with chance, all of them
together fail a correct implementation with a chance of 1e-9 at most: their bounds are exact tail bounds, not quantiles
of an approximation. docs/privacy.md lists which fault each of them finds.
"""

import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fedllm.canonical import digest_of
from fedllm.errors import Cancelled, PrivacyError
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import AccountingEvent, overrun
from fedllm.privacy.distributed_noise import DistributedMechanism
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import Randomness, SeededRandomness, normals, uniforms
from fedllm.training import engine, trainer
from fedllm.training.adapter import AdapterModel
from fedllm.training.data import IGNORE, Example, PrivacyUnit
from fedllm.training.engine import Engine
from fedllm.training.precision import SAME_SUM
from fedllm.training.quantised import QuantisedLinear
from fedllm.training.unit_metrics import unit_metrics

_ROUNDED = 0.05  # fraction of the clip norm that rounding to quanta may take, and some more
_TAIL = math.log(1e9 * 2 * 100)  # -log of the chance of one tail of one comparison; fewer than 100 beside loops
_DRAWS = 1 << 16  # of noise, at the least: its deviation is known to 2 percent then
_UNITS, _STEPS = 256, 512  # of the sampling
_STEPS_OF_EXCESS = 15  # in so many, at most, the excess noise of a share is divided: fedllm.privacy.distributed_noise
_SIZES, _LONGEST = (1, 2, 1, 1), (7, 7, 7, 12)  # of the made-up units: records, and tokens of a record
_ALONE = "With micro_batch=1 every record is computed alone"
_LARGE = 100.0  # activation; LLM.int8 treats columns apart from 6
_POISON, _FIRST = 3, 4  # token of the unit whose gradient is not finite; first token of all others


class _Zeros:
    """Words that are all zero: normals of zero, and sampling that draws every unit. What is left is the clipped sum."""

    private = False

    def words(self, n: int) -> NDArray[np.uint64]:
        return np.zeros(n, dtype=np.uint64)


class _Recorded:
    """A source that keeps its words, and gives them again once `replay` is set."""

    def __init__(self, source: Randomness) -> None:
        self.private, self.replay = source.private, False
        self._source, self._kept = source, list[NDArray[np.uint64]]()

    def words(self, n: int) -> NDArray[np.uint64]:
        if self.replay:
            words = self._kept.pop(0) if self._kept else np.zeros(0, dtype=np.uint64)
            return words if len(words) == n else np.zeros(n, dtype=np.uint64)  # another number was drawn: found below
        self._kept.append(self._source.words(n))
        return self._kept[-1]


class _Witness(torch.optim.Optimizer):
    """An optimiser that keeps the gradient it is given and changes nothing."""

    def __init__(self, flat: nn.Parameter) -> None:
        super().__init__([flat], {})
        self._flat, self.seen = flat, list[Tensor]()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen.append(self._flat.grad.detach().double().clone() if self._flat.grad is not None else torch.zeros(0))


class _Listener:
    """Stands in for engine and adapter, and keeps what the training loop hands to the engine."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.batches: list[list[int]] = []
        self.given: tuple[Mechanism, float] | None = None

    def clipped_sum(
        self, units: Sequence[int], mechanism: Mechanism, _: int, distributed: DistributedMechanism | None = None
    ) -> Tensor:
        self.batches.append(list(units))
        self.given = (mechanism, distributed.expected_units if distributed is not None else math.nan)
        raise Cancelled("all that matters of a step was heard")

    def optimizer(self, _: object, mechanism: Mechanism, expected_units: float, __: object) -> "_Listener":
        self.given = (mechanism, expected_units)
        return self

    def load(self, _: object) -> None:
        pass

    def draw_noise(self) -> None:
        pass

    def step(self, _: object, units: Sequence[int], __: int) -> None:
        self.batches.append(list(units))


@dataclass
class Subject:
    """What is checked, with made-up units and what a slow and plain computation says of them."""

    adapter: AdapterModel
    engine: Engine
    plan: RunPlan
    randomness: Callable[[], Randomness]  # the source of a round, made as the site makes it
    micro_batch: int

    @property
    def mechanism(self) -> Mechanism:
        """The plan's."""
        return self.plan.mechanism

    @cached_property
    def tight(self) -> Mechanism:
        """The plan's mechanism with a clip norm that every unit exceeds, so that the clip is seen to act."""
        return replace(self.mechanism, clip_norm=0.5 * min(float(g.norm()) for g in self.gradients))

    @property
    def bound(self) -> float:
        """Relative distance at which two computations of one sum still agree."""
        wide = all(p.dtype == torch.float32 for p in self.adapter.model.parameters())
        return SAME_SUM[torch.float32 if wide else torch.bfloat16]

    @cached_property
    def start(self) -> NDArray[np.float32]:
        """Adapter values at which no gradient vanishes, float32[d].

        LoRA's lie around 0; factors and virtual tokens are of a size, around which these lie.
        """
        drawn = (normals(SeededRandomness(0, "public"), self.adapter.spec.dimension) * 0.05).astype(np.float32)
        return drawn + self.adapter.initial if self.engine.alone else drawn

    @cached_property
    def _source(self) -> Randomness:
        return SeededRandomness(1, "public")

    def _drawn(self, low: int, high: int, n: int) -> NDArray[np.int64]:
        return low + np.floor(uniforms(self._source, n) * (high - low)).astype(np.int64)

    @cached_property
    def units(self) -> list[PrivacyUnit]:
        """Units of one and of several records of made-up tokens: all of one batch but the last, which is longer."""
        drawn = self._drawn

        def record(longest: int) -> Example:
            ids = drawn(_FIRST, self.adapter.vocabulary, int(drawn(longest - 3, longest + 1, 1)[0]))
            if self.adapter.classifies:
                return Example(ids, drawn(0, len(self.plan.model.labels), 1).reshape(()))
            return Example(ids, np.where(np.arange(len(ids)) < len(ids) // 3, IGNORE, ids))

        return [tuple(record(longest) for _ in range(size)) for size, longest in zip(_SIZES, _LONGEST, strict=True)]

    @cached_property
    def gradients(self) -> list[Tensor]:
        """The gradient of every unit at `start`, float32[d]: one record at a time, unpadded, by plain autograd."""
        self.adapter.load(self.start)
        return [self._gradient(unit) for unit in self.units]

    def _gradient(self, unit: PrivacyUnit) -> Tensor:
        parameters = list(self.adapter.trainable.values())
        total = torch.zeros_like(self.adapter.flat, requires_grad=False)
        for record in unit:
            ids = torch.from_numpy(record.input_ids).to(self.adapter.device)[None]
            labels = torch.from_numpy(np.atleast_1d(record.labels)).to(self.adapter.device)
            logits = self.adapter.logits(ids, torch.ones_like(ids)).float()
            if self.adapter.classifies:
                loss = F.cross_entropy(logits, labels)
            else:
                loss = F.cross_entropy(logits[0, :-1], labels[1:], ignore_index=IGNORE)
            parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            total += torch.cat([part.reshape(-1).float() for part in parts]) / len(unit)
        return total

    def slow_sum(self, mechanism: Mechanism) -> Tensor:
        """The clipped sum over all units, float64[d], by the formulas of the papers."""
        total = torch.zeros_like(self.gradients[0], dtype=torch.float64)
        for gradient in self.gradients:
            norm, factor = float(gradient.double().norm()), 1.0
            if mechanism.private and mechanism.clipping == "flat":  # Abadi et al. 2016
                factor = min(1.0, mechanism.clip_norm / max(norm, 1e-30))
            elif mechanism.private:  # Bu et al. 2022
                factor = mechanism.clip_norm / (norm + 0.01)
            total += factor * gradient.double()
        return total

    @cached_property
    def whole(self) -> Tensor:
        """The engine's sum over all units, tightly clipped, float64[d]."""
        return self.sum(self.units, self.tight)

    def sum(self, units: Sequence[PrivacyUnit], mechanism: Mechanism, micro_batch: int | None = None) -> Tensor:
        """The engine's clipped sum at `start`, float64[d]."""
        self.adapter.load(self.start)
        return self.engine.clipped_sum(units, mechanism, micro_batch or self.micro_batch)

    def step(
        self, units: Sequence[PrivacyUnit], mechanism: Mechanism, source: Randomness, expected: float = 1.0,
        micro_batch: int | None = None,
    ) -> Tensor:  # fmt: skip
        """What a step of the engine at `start` hands to the optimiser, float64[d]."""
        self.adapter.load(self.start)
        witness = _Witness(self.adapter.flat)
        optimizer = self.engine.optimizer(witness, mechanism, expected, source)
        self.engine.step(optimizer, units, micro_batch or self.micro_batch)
        return witness.seen[0] if len(witness.seen) == 1 else torch.full_like(self.adapter.flat.detach(), math.nan)

    def alike(self, width: int, shortest: int, number: int) -> list[PrivacyUnit]:
        """Return made-up units of one record each: of `shortest` to `width` tokens, but of `width` only if all are."""
        classes, units = len(self.plan.model.labels), list[PrivacyUnit]()
        for k in range(number):
            length = shortest + k % max(1, width - shortest)
            ids = self._drawn(_FIRST, self.adapter.vocabulary, length)
            labels = np.where(np.arange(length) < min(1 + k, length - 1), IGNORE, ids)
            units.append((Example(ids, np.asarray(k % classes) if self.adapter.classifies else labels),))
        return units

    @cached_property
    def cancelling(self) -> NDArray[np.float32]:
        """Adapter values at which gradients are little but rounding, float32[d]: large ones, in pairs that cancel.

        The server could send such values, to see in full what elsewhere is a last bit.
        """
        values = normals(SeededRandomness(4, "public"), self.adapter.spec.dimension)
        sizes = {tensor.name: tensor.shape for tensor in self.adapter.spec.tensors}
        cut = np.split(values, np.cumsum([math.prod(shape) for shape in sizes.values()])[:-1])
        parts = {name: part.reshape(shape) for (name, shape), part in zip(sizes.items(), cut, strict=True)}
        pair = next((name for name in parts if "lora_A" in name and name.replace("lora_A", "lora_B") in parts), None)
        values *= 30 if pair is None else 0.01  # B alone, with a fixed A, cannot cancel
        if pair is not None:
            a_RI, b_OR = parts[pair], parts[pair.replace("lora_A", "lora_B")]
            even, odd = slice(0, len(a_RI) // 2 * 2, 2), slice(1, None, 2)
            a_RI[even], b_OR[:, even] = np.rint(a_RI[even] * 3e4), np.rint(b_OR[:, even] * 9e4)
            a_RI[odd], b_OR[:, odd] = 3 * a_RI[even], -b_OR[:, even]
            b_OR[:, even] *= 3
        return values.astype(np.float32)

    def differ(self, a: Tensor, b: Tensor) -> float:
        """Relative L2 distance, NaN or above 0 if only one of them is zero."""
        return float((a - b).norm() / b.norm().clamp(min=1e-300))


def clip_bounds_every_unit(s: Subject) -> str:
    """One unit more or less moves the sum by at most the clip norm, over all trainable tensors together."""
    rounding = 1 + len(s.units) * s.bound
    for mechanism, whole in ((s.tight, s.whole), (s.mechanism, s.sum(s.units, s.mechanism))):
        for absent in range(len(s.units)):
            others = s.units[:absent] + s.units[absent + 1 :]
            moved = float((whole - s.sum(others, mechanism)).norm())
            if not moved <= mechanism.clip_norm * rounding:
                return f"one unit moves the sum by {moved / mechanism.clip_norm:.6g} clip norms, expected at most 1"
    return ""


def clip_holds_at_every_length(s: Subject) -> str:
    """Rows of no length to the longest, and such as are not finite: none enters a sum longer than the plan's clip."""
    clip, distributed = s.plan.privacy.clip_norm, s.plan.distributed  # by the plan, not by the mechanism
    direction = normals(SeededRandomness(3, "public"), s.adapter.spec.dimension)
    direction /= np.linalg.norm(direction)
    for length in (0.0, 1e-30, clip / 2, clip, 2 * clip, 1e30, math.inf, math.nan):
        row = torch.from_numpy((direction * length).astype(np.float32)).to(s.adapter.device)[None]
        for kind in (None,) if distributed is None else (None, distributed):
            entered = engine.clip_and_sum(row, s.mechanism, kind)
            found = float(entered.norm()) / (clip if kind is None else kind.scale)
            if not found <= 1:
                return f"a row of length {length:.3g} enters the sum with a length of {found:.17g} clip norms"
    return ""


def sum_equals_the_slow_loop(s: Subject) -> str:
    """The engine's sum is that of one unit at a time by plain autograd, clipped by the formula of the paper."""
    for mechanism, found in ((s.tight, s.whole), (s.mechanism, s.sum(s.units, s.mechanism))):
        slow = s.slow_sum(mechanism)
        apart = s.differ(found, slow)
        if not apart <= s.bound:
            return (
                f"the sum differs from that of a slow loop by {apart:.3g} of it, expected at most {s.bound:g}; most in "
                f"{s.adapter.most_apart(found, slow)}"
            )
    return ""


def micro_batch_changes_nothing(s: Subject) -> str:
    """How many records are computed at a time changes neither the sum nor its clip."""
    for size in (1, 3):
        apart = s.differ(s.sum(s.units, s.tight, size), s.whole)
        if not apart <= s.bound:
            return f"micro_batch={size} changes the sum by {apart:.3g} of it, expected at most {s.bound:g}"
    return ""


def order_changes_nothing(s: Subject) -> str:
    """A sum does not depend on the order of its terms; with dropout, or units that mix, it would."""
    apart = s.differ(s.sum(s.units[::-1], s.tight), s.whole)
    return "" if apart <= s.bound else f"the order of the units changes the sum by {apart:.3g} of it"


def company_changes_no_bit(s: Subject) -> str:
    """What a unit adds to the sum is the same to the last bit, whoever else is drawn and wherever it stands.

    The sum is compared, and passes of every width that the plan allows, at values that the server might choose; in the
    same passes, what evaluation finds in each unit.
    """
    alone = [s.sum([unit], s.tight) for unit in s.units]
    if not torch.equal(s.whole, torch.stack(alone).sum(0)):
        return f"the sum differs, in its last bits, from what the units add one by one. {_ALONE}"
    longest = s.plan.model.max_length
    shapes = [(width, shortest, s.engine.rows(width, s.micro_batch)) for width, shortest in s.engine.shapes(longest)]
    for width, shortest, rows in shapes:
        last = width == shapes[-1][0]
        for start in (s.cancelling, s.start) if last else (s.cancelling,):
            s.adapter.load(start)
            for least in {shortest, min(width, longest)} if last else {shortest}:
                units = s.alike(width, least, rows)
                if rows > 3 and s.plan.privacy.unit == "person":
                    units[:2] = [units[0] + units[1]]
                if (last or rows > 1) and not _keeps_bits(s, start, units, width, thorough=last):
                    return (
                        f"in a pass of {rows} records of {width} tokens, the last bits of a unit's gradient, or of its "
                        f"metrics, depend on its place or its company. {_ALONE}"
                    )
    return ""


def _keeps_bits(s: Subject, start: NDArray[np.float32], units: list[PrivacyUnit], width: int, thorough: bool) -> bool:
    """Whether every unit has the same gradient alone, in every place, and with 1, 2, 3, half or all of the others.

    And the same metrics, in reverse and alone.
    """
    if s.plan.evaluation.every is not None:
        metrics = unit_metrics(s.engine, start, units, s.micro_batch)
        for order in (slice(None, None, -1), slice(1)):
            found = unit_metrics(s.engine, start, units[order], s.micro_batch)
            if not np.array_equal(found, metrics[order], equal_nan=True):
                return False
    many = len(units)
    expected = s.engine.pass_gradients(units, width, s.micro_batch).nan_to_num()
    places = [list(range(many))[::-1], [0], *([*range(k, many), *range(k)] for k in range(many if thorough else 0))]
    places += [list(range(many - k, many)) for k in {1, 2, 3, 4, many // 2} if thorough and 0 < k < many]
    return all(
        torch.equal(s.engine.pass_gradients([units[k] for k in order], width, s.micro_batch).nan_to_num(),
                    expected[order])
        for order in places
    )  # fmt: skip


def large_activation_stays_its_units_own(s: Subject) -> str:
    """A value far above all others in one unit, in a frozen layer, changes no bit of another unit's gradient.

    Kernels of 8 bits may choose by the largest value of a batch which columns to compute otherwise (LLM.int8).
    """
    width = s.engine.shapes(s.plan.model.max_length)[-1][0]
    rows = s.engine.rows(width, s.micro_batch)
    if rows == 1:  # a pass of its own: there is nobody else in it
        return ""
    units = s.alike(width, width, rows)
    s.adapter.load(s.start)
    expected = s.engine.pass_gradients(units, width, s.micro_batch)
    with _outlier(s.adapter.model, (rows, rows * width)) as planted:
        found = s.engine.pass_gradients(units, width, s.micro_batch)
    if not planted or torch.equal(found[0], expected[0]):
        return "a large activation could not be planted in the first unit of a pass"
    if torch.equal(found[1:], expected[1:]):
        return ""
    apart = max(s.differ(mine, right) for mine, right in zip(found[1:], expected[1:], strict=True))
    return f"an activation of {_LARGE:g} in one unit changes another unit's gradient, by {apart:.3g} of its length"


def unit_that_is_not_finite_counts_zero(s: Subject) -> str:
    """A NaN passes every clip: such a unit contributes nothing, and the others what they did."""
    healthy = s.units[0][0]
    sick = replace(healthy, input_ids=np.where(np.arange(len(healthy.input_ids)) == 1, _POISON, healthy.input_ids))
    with _poisoned(s.adapter.model) as met:
        alone = s.sum([(healthy, sick)], s.tight)
        together = s.sum([*s.units, (sick,)], s.tight)
    if not met:  # a compiled model may not call the hook; then nothing was learned
        return ""
    if alone.any():
        return f"a unit of NaN gradient contributes a vector of norm {float(alone.norm()):.3g}, expected 0"
    apart = s.differ(together, s.whole)
    return "" if apart <= s.bound else f"a unit of NaN gradient changes what others contribute, by {apart:.3g} of it"


def empty_batch_is_a_noisy_step(s: Subject) -> str:
    """Which steps had nobody in them is a secret too: each is taken, and with its noise."""
    released = s.step([], s.mechanism, s.randomness())
    share = float((released != 0).double().mean()) if released.isfinite().all() else 0.0
    return "" if share > 0.5 else f"a step of nobody releases noise on {share:.1%} of the coordinates"


def noise_has_the_charged_deviation(s: Subject) -> str:
    """Noise of deviation noise_multiplier * clip_norm, once a step, on every tensor, whoever is in the batch."""
    privacy = s.plan.privacy
    deviation = float(privacy.noise_multiplier or 0.0) * privacy.clip_norm  # by the plan, not by the mechanism
    source, spec = s.randomness(), s.adapter.spec
    times = min(32, max(2, math.ceil(_DRAWS / spec.dimension)))
    crowd = s.step(s.units, s.mechanism, source, micro_batch=1) - s.sum(s.units, s.mechanism, 1)
    for batch, noises in (("5 records", [crowd]), ("nobody", [s.step([], s.mechanism, source) for _ in range(times)])):
        squares = torch.stack(noises).div(deviation).square().sum(0)
        parts = [squares, *torch.split(squares, [math.prod(t.shape) for t in spec.tensors])]
        for part in parts:
            degrees, found = part.numel() * len(noises), float(part.sum())
            if not _as_wide_as_noise(found, degrees, len(parts)):
                return (
                    f"noise of {math.sqrt(max(found, 0) / degrees):.4g} times the charged deviation on "
                    f"{part.numel()} coordinates of a batch of {batch}"
                )
    return ""


def noise_is_fresh(s: Subject) -> str:
    """No noise comes twice: not in the next step, not in a round that is repeated, not after a restart."""
    first, second = s.randomness(), s.randomness()
    if not (first.private and second.private):
        return "coins and noise come from a seed, expected the operating system"
    zero = np.zeros(s.adapter.spec.dimension)
    draws = [s.mechanism.release(zero, source) / s.mechanism.noise_std for source in (first, first, second)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        if _alike(draws[a], draws[b]):
            return "two releases share their noise: the difference of the sums beneath can be read off"
    return ""


def release_lies_on_the_grid(s: Subject) -> str:
    """The last bits of a float give away the sum beneath the noise, unless all values lie on one public grid."""
    optimizer = s.engine.optimizer(_Witness(s.adapter.flat), s.mechanism, 1.0, s.randomness())
    (flat,) = optimizer.params
    sums = normals(SeededRandomness(2, "public"), s.adapter.spec.dimension) * (s.mechanism.clip_norm / 3)
    flat.summed_grad = torch.from_numpy(sums).to(s.adapter.device)
    try:
        optimizer.add_noise()
        cells = flat.grad.double() / s.mechanism.grid
    finally:
        flat.grad = flat.summed_grad = None
    off = int((cells != cells.round()).sum())
    return "" if not off else f"{off} of {cells.numel()} released coordinates lie between the points of the public grid"


def divisor_is_public(s: Subject) -> str:
    """A sum is divided by the plan's expected units, whoever is in the batch."""
    privacy = s.plan.privacy
    expected = privacy.sampling_rate * (privacy.units_per_site or 0)
    listener = _listen(s, 1, 1)
    if listener.given != (s.mechanism, expected):
        return f"training uses {listener.given}, expected the plan's mechanism and a divisor of {expected:g}"
    # next to no noise, on a grid that is finer by as much
    quiet = replace(s.tight, noise_multiplier=1e-9) if s.mechanism.private else s.mechanism
    for units, total in ((s.units[:1], s.sum(s.units[:1], quiet)), (s.units, s.whole)):
        apart = s.differ(s.step(units, quiet, _Zeros(), expected) * expected, total)
        if not apart <= 1e-5:  # the same arithmetic on both sides
            return f"a step of {len(units)} units is {apart:.3g} away from its sum divided by {expected:g}"
    return ""


def sampling_is_poisson(s: Subject) -> str:
    """Each unit enters each step independently, at the plan's rate: no shuffled, cycled or fixed batches."""
    rate = s.plan.privacy.sampling_rate
    batches = _listen(s, _UNITS, _STEPS).batches
    if len(batches) != _STEPS or any(len(set(batch)) != len(batch) for batch in batches):
        return f"{len(batches)} batches in {_STEPS} steps, or a unit twice in one"
    drawn = np.zeros((_STEPS, _UNITS), dtype=bool)
    for step, batch in enumerate(batches):
        drawn[step, batch] = True
    sizes, every = drawn.sum(axis=1), int(drawn.sum())
    after, beside = drawn[0::2] & drawn[1::2], drawn[:, 0::2] & drawn[:, 1::2]
    wrong = (
        (
            _unlikely(every, drawn.size, rate),
            f"units are drawn at a rate of {every / drawn.size:.4g}, and {rate:g} is charged for",
        ),
        (
            any(_unlikely(int(times), _STEPS, rate, _UNITS) for times in drawn.sum(axis=0)),
            "some units are drawn more often than others",
        ),
        (
            _unlikely(int(after.sum()), after.size, rate**2),
            "who is in a batch depends on who was in the one before: not a Poisson sample",
        ),
        (
            _unlikely(int(beside.sum()), beside.size, rate**2),
            "units are not drawn independently of each other: not a Poisson sample",
        ),
        (
            _unlikely(int((sizes[0::2] == sizes[1::2]).sum()), _STEPS // 2, _equal_sizes(_UNITS, rate)),
            f"the size of a batch varies by {sizes.std():.3g}, not as that of a Poisson sample",
        ),
    )
    return next((what for found, what in wrong if found), "")


def charge_is_the_mechanism(s: Subject) -> str:
    """What is charged is what is done: the plan's rate, noise and steps; and all of it costs no more than promised."""
    plan, privacy = s.plan, s.plan.privacy
    rounds = plan.training.rounds
    steps = plan.training.local_steps
    true = AccountingEvent(privacy.sampling_rate, float(privacy.noise_multiplier or 0.0), steps)
    charged = plan.mechanism.event(steps)
    if charged != true:
        return f"a round is charged as {charged}, and is {true}"
    if plan.steps != rounds * steps:
        return f"the plan counts {plan.steps} steps, and has {rounds} rounds of {steps}"
    over = overrun([true] * rounds if rounds < 100 else [replace(true, steps=rounds * steps)], privacy.delta,
                privacy.epsilon, one_plan=True)  # fmt: skip
    return "" if over is None else f"the whole plan costs epsilon {over:.4g}, and promises {privacy.epsilon:g}"


def weights_change_as_the_optimiser_says(s: Subject) -> str:
    """The model's own tensors change by what the optimiser makes of the release; all others stay as they are.

    Wrapping a model can leave an adapter that trains one tensor and computes with another (meta-pytorch/opacus 820).
    Two rounds of two steps: momentum belongs to a round, and to nothing without noise.
    """
    training, adapter = s.plan.training, s.adapter
    rate = min(training.learning_rate, 1.0)  # a rate at which training overflows is for training to report
    plan = _with(s.plan, local_steps=2, learning_rate=rate)
    frozen = {n: p for n, p in adapter.model.named_parameters() if n not in adapter.trainable}
    held = [m for m in adapter.model.modules() if isinstance(m, QuantisedLinear)]  # whose weights are no parameters
    still = [*frozen.values(), *(values for layer in held for values in layer.buffers())]
    before = [(p.data_ptr(), p._version) for p in still]
    small = {name: p.detach().clone() for name, p in frozen.items() if "lora_" in name}
    for _ in range(2):
        source = _Recorded(s.randomness())
        update = trainer.train_round(adapter, s.engine, s.units, plan, s.start, source, s.micro_batch)
        named = [p.detach().reshape(-1) for n, p in adapter.model.named_parameters() if n not in frozen]
        weights = torch.cat(named).cpu().double().numpy()
        source.replay = True
        right = _replayed(s, plan, source)
        rounding, moved = 1e-6 * float(np.linalg.norm(right)), float(np.linalg.norm(right - s.start))
        for what, off in (("weights", weights - right), ("update", update - (right - s.start))):
            if not np.linalg.norm(off) <= 1e-3 * moved + rounding:
                return (
                    f"the {what} of a round lie {np.linalg.norm(off):.3g} away from what the optimiser makes of the "
                    f"releases, which move them by {moved:.3g}"
                )
    if before != [(p.data_ptr(), p._version) for p in still]:
        return "a frozen tensor of the model was written to"
    if any(not torch.equal(value, frozen[name]) for name, value in small.items()):
        return "a frozen part of the adapter changed"
    return ""


Check = Callable[[Subject], str]  # returns what is wrong, or ""


def sum_in_quanta_is_within_the_clip(s: Subject) -> str:
    """With noise in shares: whole numbers, near the plain sum, and moved by one unit no further than the clip norm."""
    if s.plan.distributed is None:
        return ""

    def in_quanta(units: Sequence[PrivacyUnit], distributed: DistributedMechanism) -> Tensor:
        s.adapter.load(s.start)
        return s.engine.clipped_sum(units, distributed.mechanism, s.micro_batch, distributed)

    for plain, mechanism in ((s.whole, s.tight), (s.sum(s.units, s.mechanism), s.mechanism)):
        distributed = replace(s.plan.distributed, mechanism=mechanism)
        whole = in_quanta(s.units, distributed)
        if not torch.equal(whole, whole.round()):
            return "the sum is not one of whole quanta"
        apart = float((whole * distributed.quantum - plain).norm())
        most = s.bound * float(plain.norm()) + _ROUNDED * len(s.units) * mechanism.clip_norm
        if not apart <= most:
            return f"in quanta the sum differs by {apart:.3g}, expected at most {most:.3g}"
        for absent in range(len(s.units)):
            moved = float((whole - in_quanta(s.units[:absent] + s.units[absent + 1 :], distributed)).norm())
            if not moved <= distributed.scale * (1 + len(s.units) * s.bound):
                norms = moved / distributed.scale
                return f"one unit moves the sum in quanta by {norms:.6g} clip norms, expected at most 1"
    return ""


def share_has_its_deviation(s: Subject) -> str:
    """With noise in shares: those of the fewest honest sites add up to what is charged for, and none comes twice."""
    distributed, privacy = s.plan.distributed, s.plan.privacy
    if distributed is None:
        return ""
    sites, quorum, colluding = s.plan.sites, s.plan.quorum, privacy.colluding_sites  # by the plan, not the mechanism
    source, d = s.randomness(), s.adapter.spec.dimension
    times = min(32, max(2, math.ceil(_DRAWS / d)))
    shares = [distributed.upload(np.zeros(d), origin) for origin in (*[source] * times, s.randomness())]
    one = (
        float(privacy.noise_multiplier or 0.0)
        * distributed.scale
        / math.sqrt((sites - colluding) * (quorum - colluding))
    )
    for present in sorted({quorum, quorum + 1, (quorum + sites) // 2, sites - 1, sites}):
        if not quorum <= present <= sites:
            continue
        surplus = np.stack(
            [distributed.surplus([x[k] for k in distributed.revealed_seeds(present)], present, d) for _, x in shares]
        )
        # excess noise is made in steps of a fifteenth: of what could go, less than a step may stay
        stays = -(-(sites - quorum) // _STEPS_OF_EXCESS) - 1 if quorum < present < sites else 0
        left, off = np.stack([upload for upload, _ in shares]) - surplus, present - quorum
        parts = [("is left", left, sites - colluding - off, stays), ("may be taken off", surplus, off - stays, stays)]
        for what, words, units, more in parts:
            draws = words.view(np.int32) / one
            found = float((draws**2).mean())
            near = min(max(found, units, 0), units + more)
            if not (found == 0 if near == 0 else _as_wide_as_noise(draws.size * found / near, draws.size)):
                wide = math.sqrt(found / max(units, 1))
                return f"what {what} of a share, of {present} sites, has {wide:.4g} times the deviation counted on"
            if near and privacy.protects and any(_alike(*(draws[[0, k]] / math.sqrt(near))) for k in (1, -1)):
                return f"what {what} of a share, of {present} sites, comes twice"
    return ""


def upload_is_a_sum_with_its_share(s: Subject) -> str:
    """With noise in shares: a step uploads the sum over those it drew, with noise; with other randomness, others."""
    distributed = s.plan.distributed
    if distributed is None:
        return ""
    uploads = []
    for _ in range(2):
        source = _Recorded(s.randomness())
        uploads.append(trainer.distributed_step(s.adapter, s.engine, s.units, s.plan, s.start, source, s.micro_batch))
        source.replay = True
        share = distributed.share(s.adapter.spec.dimension, source)
        drawn = [s.units[i] for i in distributed.mechanism.sample(len(s.units), source)]
        s.adapter.load(s.start)
        total = s.engine.clipped_sum(drawn, s.mechanism, s.micro_batch, distributed).cpu().numpy()
        expected, seeds = distributed.noised(total, share), share.seeds
        if not np.array_equal(uploads[-1][0], expected) or uploads[-1][1] != seeds:
            return "what a step uploads is not the sum over the units it drew, with its share of the noise"
    if s.plan.privacy.protects and np.array_equal(uploads[0][0], uploads[1][0]):
        return "two steps upload the same"
    return ""


CHECKS: dict[str, Check] = {
    check.__name__.replace("_", "-"): check
    for check in (
        clip_bounds_every_unit, clip_holds_at_every_length, sum_equals_the_slow_loop, micro_batch_changes_nothing,
        order_changes_nothing, company_changes_no_bit, large_activation_stays_its_units_own,
        unit_that_is_not_finite_counts_zero, empty_batch_is_a_noisy_step,
        noise_has_the_charged_deviation, noise_is_fresh, release_lies_on_the_grid, divisor_is_public,
        sampling_is_poisson, charge_is_the_mechanism,
        weights_change_as_the_optimiser_says, sum_in_quanta_is_within_the_clip, share_has_its_deviation,
        upload_is_a_sum_with_its_share,
    )
}  # fmt: skip
# These say something only if noise is added.
_OF_NOISE = {
    "clip-bounds-every-unit", "clip-holds-at-every-length", "company-changes-no-bit",
    "large-activation-stays-its-units-own", "unit-that-is-not-finite-counts-zero",
    "empty-batch-is-a-noisy-step", "noise-has-the-charged-deviation", "noise-is-fresh", "release-lies-on-the-grid",
    "charge-is-the-mechanism",
}  # fmt: skip


def names(plan: RunPlan) -> list[str]:
    """Return the checks that a plan must pass; if noise is left out or seeded on purpose, some say nothing."""
    left_out = set() if plan.mechanism.private else _OF_NOISE
    return [name for name in CHECKS if name not in left_out and (plan.privacy.protects or name != "noise-is-fresh")]


def self_check(subject: Subject) -> None:
    """Raise PrivacyError at the first invariant that does not hold. The adapter's values are put back."""
    with subject.adapter.lock:
        before = subject.adapter.vector()
        try:
            for name in names(subject.plan):
                check(name, subject)
        finally:
            subject.adapter.load(before)


def check(name: str, subject: Subject) -> None:
    """Raise PrivacyError, which names the invariant, if it does not hold."""
    wrong = CHECKS[name](subject)
    if wrong:
        raise PrivacyError(
            f"self-check {name}: {wrong}. No record was used and nothing was charged. Is the installation the one of "
            "constraints.txt, and the model a plain transformer? Then please report this."
        )


_passed: "weakref.WeakKeyDictionary[Engine, set[str]]" = weakref.WeakKeyDictionary()
_checking = threading.Lock()


def self_check_once(subject: Subject) -> None:
    """Run `self_check` unless this engine has passed it for this plan: sites of one process share their engine."""
    key = _remembered_by(subject)
    with _checking:
        if key in _passed.get(subject.engine, set()):
            return
        self_check(subject)
        _passed.setdefault(subject.engine, set()).add(key)


def _remembered_by(subject: Subject) -> str:
    """Return a digest of every value that was checked. Python's hash() is none: 513.0 and 1 + 2^-52 have the same."""
    return digest_of([subject.plan.digest, subject.micro_batch, subject.engine.compiled, torch.get_num_threads()])


def _with(plan: RunPlan, **training: Any) -> RunPlan:
    return plan.model_copy(update={"training": plan.training.model_copy(update=training)})


def _replayed(s: Subject, plan: RunPlan, source: Randomness) -> NDArray[np.float64]:
    """Return the weights float64[d] after the steps of a round whose sampling and noise `source` gives again."""
    right = nn.Parameter(torch.from_numpy(s.start.copy()).to(s.adapter.device))
    optimizer, mechanism = _plain_optimizer(plan, right), s.mechanism
    for _ in range(plan.training.local_steps):
        noise = mechanism.noise(s.adapter.spec.dimension, source)
        drawn = [s.units[i] for i in mechanism.sample(len(s.units), source)]
        s.adapter.load(right.detach().cpu().numpy())
        clipped = s.engine.clipped_sum(drawn, mechanism, s.micro_batch)
        released = mechanism.noised(clipped.cpu().numpy(), noise)
        right.grad = torch.from_numpy(released).to(right) / plan.expected_units
        optimizer.step()
    return right.detach().cpu().double().numpy()


def _plain_optimizer(plan: RunPlan, parameter: nn.Parameter) -> torch.optim.Optimizer:
    """Return a fresh torch optimiser as the plan names it, made here and not by the training loop."""
    if plan.training.optimizer == "adam":
        return torch.optim.Adam([parameter], lr=plan.training.learning_rate)
    return torch.optim.SGD([parameter], lr=plan.training.learning_rate, momentum=plan.training.momentum)


def _listen(s: Subject, units: int, steps: int) -> _Listener:
    """Return what the real training loop asks of an engine in `steps` steps over units 0, 1, 2 ..."""
    listener, source = _Listener(), s.randomness()
    engine, numbers = cast(Engine, listener), cast(Any, range(units))
    if s.plan.distributed is None:
        plan = _with(s.plan, local_steps=steps)
        trainer.train_round(s.adapter, engine, numbers, plan, s.start, source, s.micro_batch)
        return listener
    # of one coordinate: noise in shares, which nobody looks at here, would take most of the self-check's time
    adapter, start = cast(AdapterModel, listener), s.start[:1]
    for _ in range(steps):
        with suppress(Cancelled):
            trainer.distributed_step(adapter, engine, numbers, s.plan, start, source, s.micro_batch)
    return listener


def _as_wide_as_noise(squares: float, degrees: int, comparisons: int = 1) -> bool:
    """Whether a sum of squares of so many standard normals may be this, in each of some comparisons.

    Tails of the chi-square distribution: Laurent and Massart 2000, lemma 1.
    """
    t = _TAIL + math.log(comparisons)
    wide = 2 * math.sqrt(degrees * t)
    return degrees - wide <= squares <= degrees + wide + 2 * t


def _alike(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    """Whether two draws of standard normals are dependent; products have lighter tails than squares."""
    return np.array_equal(a, b) or abs(float(a @ b)) > 2 * math.sqrt(len(a) * _TAIL) + 2 * _TAIL


def _unlikely(successes: int, trials: int, probability: float, comparisons: int = 1) -> bool:
    """Whether a binomial count is too far out to be chance, by Chernoff's bound exp(-n KL(found || p))."""
    found, p = successes / trials, probability
    if p >= 1:
        return found < 1
    terms = [(found, p), (1 - found, 1 - p)]
    divergence = sum(a * math.log(a / b) for a, b in terms if a > 0)
    return trials * divergence > _TAIL + math.log(comparisons)


def _equal_sizes(units: int, rate: float) -> float:
    """Return the chance that two Poisson samples have the same size."""
    if rate >= 1:
        return 1.0
    k = range(units + 1)
    choose = [math.lgamma(units + 1) - math.lgamma(i + 1) - math.lgamma(units - i + 1) for i in k]
    log = [c + i * math.log(rate) + (units - i) * math.log1p(-rate) for i, c in zip(k, choose, strict=True)]
    return min(1.0, sum(math.exp(2 * value) for value in log))


def _embedding(model: nn.Module) -> nn.Embedding | None:
    return next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)


@contextmanager
def _outlier(model: nn.Module, rows: tuple[int, ...]) -> Iterator[list[bool]]:
    """Let the first record have a large activation at the entrance of every frozen linear layer of the base.

    `rows` are how many of them a layer is given that sees records. Yields a list that is empty until one has run.
    """
    met: list[bool] = []

    def plant(_: nn.Module, x: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if x[0].shape[0] not in rows:  # what the records share, as relative positions are
            return None
        met.append(True)
        states = x[0].clone()
        states[0, ..., 0] = _LARGE
        return (states, *x[1:])

    layers = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    hooks = [layer.register_forward_pre_hook(plant) for layer in layers]
    try:
        yield met
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _poisoned(model: nn.Module) -> Iterator[list[bool]]:
    """Let one token's embedding be NaN; yields a list that is empty as long as the model has not met it."""
    met: list[bool] = []

    def poison(_: nn.Module, ids: tuple[Tensor, ...], states: Tensor) -> Tensor:
        if (ids[0] == _POISON).any():
            met.append(True)
        return states.masked_fill((ids[0] == _POISON)[..., None], math.nan)

    embedding = _embedding(model)
    hook = embedding.register_forward_hook(poison) if embedding is not None else None
    try:
        yield met
    finally:
        if hook is not None:
            hook.remove()
