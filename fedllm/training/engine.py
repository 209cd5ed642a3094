"""The clipped sum of per-unit gradients of an adapter, and the step that follows. The only importer of Opacus.

A privacy unit's gradient is the gradient of its own loss. Every trainable layer multiplies all rows by the same
weights, as ever; only its backward pass differs: it returns one weight gradient a unit, by a batched product of what
autograd holds anyway. They land in one matrix, a row a unit, so that norm, clip and sum are one operation each.
Noise and optimiser come after, and not necessarily here.

An adapter that trains anything else than linear layers (DoRA, IA3, virtual tokens) has its records computed one at a
time, by plain autograd of PEFT's own model: nothing of another record is there then. From some millions of parameters
on, every adapter is computed so, because one record makes an efficient pass (`Engine.rows`).
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.nn import functional as F

from fedllm.errors import Diverged, ModelError, first_line
from fedllm.plan import RunPlan
from fedllm.privacy.distributed_noise import DistributedMechanism
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import Randomness, SeededRandomness, normals
from fedllm.training.adapter import AdapterModel
from fedllm.training.compiling import Blocks, pays
from fedllm.training.data import Batch, Example, PrivacyUnit, batches, collate, padded, passes
from fedllm.training.losses import unit_losses
from fedllm.training.model import made_up, weights

_log = logging.getLogger("fedllm.site")
_TOGETHER = 8  # records of a pass at the most: more gain nothing
_TOKENS = 512  # tokens of a pass that are enough to make it efficient
_LARGE = 1e9  # parameters x tokens x threads from which a record makes an efficient pass by itself
_GPU_TOGETHER, _GPU_TOKENS, _GPU_LARGE = 32, 8192, 1e12  # the same on a GPU; the last of parameters x tokens of a pass
_QUANTUM = 42  # -log2 of the clip norm's share that a clipped row is rounded to; int64 holds 2^21 such rows
_EXACT = 1024  # rows whose sum float64 holds exactly, in quanta, and what was carried over: up to 2^53
_CARRY = 2.0**32  # quanta

_Found = TypeVar("_Found")


class _PerUnitProduct(torch.autograd.Function):
    """x W^T + b, differentiated by every unit's own copy of W and b; the copies are never made."""

    @staticmethod
    def forward(
        ctx: Any, x_NTI: Tensor, weights: Tensor, biases: Tensor | None, weight: Tensor, bias: Tensor | None,
        unit_of_row: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """`weights` [units, O, I] and `biases` [units, O] only say what to differentiate by.

        `unit_of_row` is None if every row is a unit.
        """
        ctx.save_for_backward(x_NTI, weight, unit_of_row)
        ctx.units = len(weights)
        return F.linear(x_NTI, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x_NTI, weight, unit_of_row = ctx.saved_tensors
        (y_NTO,) = upstream
        by_x = y_NTO @ weight if ctx.needs_input_grad[0] else None
        by_weight = torch.bmm(y_NTO.transpose(1, 2), x_NTI)
        by_bias = y_NTO.sum(1) if ctx.needs_input_grad[2] else None
        if unit_of_row is not None:  # a person's records add up
            by_weight = _added(by_weight, unit_of_row, ctx.units)
            by_bias = None if by_bias is None else _added(by_bias, unit_of_row, ctx.units)
        return by_x, by_weight, by_bias, None, None, None


def _added(rows: Tensor, unit_of_row: Tensor, units: int) -> Tensor:
    return rows.new_zeros((units, *rows.shape[1:])).index_add_(0, unit_of_row, rows)


class _PerUnitLinear(nn.Module):
    """A trainable linear layer that, inside `per_unit`, is differentiated unit by unit."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.leaves: dict[str, Tensor] = {}  # [units, *shape] by parameter name, while in `per_unit`
        self.unit_of_row: Tensor | None = None  # [N]
        self.grouped = False  # units have several rows

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b; x is [N, ..., in], row n belonging to unit `unit_of_row[n]`."""
        x = x.to(self.weight.dtype)  # a base in bfloat16
        if self.unit_of_row is None:
            return F.linear(x, self.weight, self.bias)
        if x.shape[0] != len(self.unit_of_row):
            raise ModelError(
                f"a trainable layer saw {x.shape[0]} rows for {len(self.unit_of_row)} records: the model mixes records "
                "before this layer, so a record's gradient cannot be bounded. Leave the layer out of adapter.targets."
            )
        x_NTI = x.reshape(x.shape[0], -1, x.shape[-1])
        y_NTO: Tensor = _PerUnitProduct.apply(  # type: ignore[no-untyped-call]
            x_NTI, self.leaves["weight"], self.leaves.get("bias"), self.weight.detach(),
            None if self.bias is None else self.bias.detach(), self.unit_of_row if self.grouped else None,
        )  # fmt: skip
        return y_NTO.reshape(*x.shape[:-1], self.out_features)


def _quantum(mechanism: Mechanism) -> float:
    """Return to whose multiples clipped rows are rounded, 0 where nothing is clipped; gradient units."""
    return math.ldexp(1.0, math.frexp(mechanism.clip_norm)[1] - _QUANTUM) if mechanism.private else 0.0


def clip_and_sum(gradients: Tensor, mechanism: Mechanism, distributed: DistributedMechanism | None = None) -> Tensor:
    """Scale every row of float32[units, d] as the mechanism clips, and add the rows up: float64[d].

    The norm is over everything trainable together, in float64: in float32 that of a very long row comes out too small,
    so the clip too weak. The mechanism without privacy clips nothing.

    Every row is rounded to quanta, so shortened that it is within the clip afterwards, and the sum is one of int64, in
    any order: what a row adds to it is a function of that row alone, to the last bit. The quanta are those of
    `distributed`, in which the sum is returned, or about 2^-42 of the clip norm.

    **This is where the sensitivity is made, so here it is measured**: a row that is not within the clip as it enters
    the sum, whatever went wrong (a factor that is not finite, too), enters as zeros. Other rows are what they were.
    """
    d = gradients.shape[1]
    quantum, limit, times = 0.0, math.inf, 1.0  # limit in quanta; times: to a row within the clip, in quanta
    if distributed is not None:
        quantum, limit = distributed.quantum, float(distributed.scale)
        times = distributed.clip_before_rounding(d) / mechanism.clip_norm / quantum
    elif mechanism.private:
        quantum = _quantum(mechanism)
        limit = mechanism.clip_norm / quantum
        times = (1 - math.sqrt(d) / limit) / quantum  # to round moves a row by at most sqrt(d) / 2 quanta
    # one by one: how a norm is rounded may depend on how many there are
    norms = torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in gradients])
    total = torch.zeros(d, dtype=torch.int64 if quantum else torch.float64, device=gradients.device)
    for row, factor in zip(gradients, mechanism.factors(norms) * times, strict=True):
        own = row.double() * factor
        if quantum:
            own.round_()
        if bool(torch.linalg.vector_norm(own) <= limit):  # NaN is not
            total += own.to(total.dtype)
    return total.double() * (1.0 if distributed is not None or not quantum else quantum)


def _finite(gradients: Tensor, private: bool) -> Tensor:
    """Return float32[units, d] with zeros for a unit that is not finite; if nothing is protected, raise Diverged."""
    finite = gradients.isfinite().all(dim=1)
    if not bool(finite.all()):
        if not private:
            raise Diverged("the gradient of a record is NaN or infinite. Lower training.learning_rate.")
        gradients[~finite] = 0.0
    return gradients


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    """Compute with so many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Compute equal bits from equal input, as a CPU does anyway.

    On a GPU many threads add to one number, in the backward pass of attention and of indices, in the order in which
    they are ready, unless that is forbidden. Raises ModelError if the model has an operation that does only that.
    """
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    settings.fill_uninitialized_memory = False  # what is not read needs no value
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error).lower():
            raise
        raise ModelError(
            f"the model has an operation that does not repeat its bits on a GPU ({first_line(error)}). Use the CPU."
        ) from error
    finally:
        torch.set_deterministic_debug_mode(before[0])
        settings.fill_uninitialized_memory = before[1]


class _Optimizer(DPOptimizer):  # type: ignore[misc]  # opacus is untyped
    """Opacus's DPOptimizer, with noise from the Mechanism and its source instead of a torch generator."""

    accumulated_iterations = 1  # of a step: the sum over all its units comes at once

    def __init__(
        self, optimizer: torch.optim.Optimizer, mechanism: Mechanism, expected_units: float, source: Randomness
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            # the non-private mechanism clips nothing
            max_grad_norm=mechanism.clip_norm if mechanism.private else float("inf"),
            expected_batch_size=expected_units,  # public: never the number of units really drawn
        )
        self.mechanism, self._source = mechanism, source
        self._drawn: list[NDArray[np.float64]] = []

    def draw_noise(self) -> None:
        """Draw the noise of the next step, before any record is looked at."""
        self._drawn = [self.mechanism.noise(p.numel(), self._source) for p in self.params]

    def add_noise(self) -> None:
        """Set p.grad to the clipped sum plus noise, float32[d], by the mechanism's float-safe release.

        The noise is what `draw_noise` drew for this step, and otherwise fresh; it serves once.
        """
        if not self._drawn:
            self.draw_noise()
        for p, noise in zip(self.params, self._drawn, strict=True):
            released = self.mechanism.noised(p.summed_grad.cpu().numpy(), noise)
            p.grad = torch.from_numpy(released).to(p.device, p.dtype)
        self._drawn = []


class Engine:
    """Takes DP-SGD steps on one adapter model, and leaves the model usable for everything else."""

    def __init__(self, adapter: AdapterModel) -> None:
        """Give every trainable layer of `adapter` per-unit gradients; raises ModelError if the model mixes records."""
        self.adapter = adapter
        model: nn.Module = adapter.model
        linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
        # whether every record is computed by itself, since not all that is trained is weights of linear layers
        self.alone = bool(set(adapter.trainable.values()) - {p for layer in linear for p in layer.parameters()})
        # experts compute the tokens of all records of a pass together, as many as chose each: last bits would mix
        self._experts = any("experts." in name for name, _ in model.named_parameters())
        for parent in list(model.modules()) if not self.alone else ():
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and child.weight.requires_grad:
                    setattr(parent, name, _PerUnitLinear(child))
        self._layers = [layer for layer in model.modules() if isinstance(layer, _PerUnitLinear)]
        self._leaves: dict[nn.Parameter, Tensor] = {}  # while in `per_unit`
        self._blocks = Blocks(model)
        self._longest = adapter.positions  # tokens
        self._rehearsed: set[tuple[int, ...]] = set()
        self._size = weights(model)
        self._compile = "off"  # or auto, which goes on without where it fails, or on
        # For a simulation's screen alone. Both are private: how many tokens were sampled tells of the records.
        self.tokens, self.seconds = 0, 0.0
        if not self.alone:
            self._check_rows()
        self._check_separation()

    def _check_rows(self) -> None:
        """Raise ModelError, with the layers' names, where a trainable layer is not given one row for every record."""
        records, tokens, model = 4, 6, self.adapter.model
        odd: dict[str, tuple[str, int]] = {}  # last name of a layer: its whole name and the rows that it saw
        fine: set[str] = set()
        hooks = []
        for name, layer in model.named_modules():
            if not isinstance(layer, _PerUnitLinear):
                continue
            whole = name.partition(".lora_")[0].removeprefix("base_model.model.")

            def look(_: nn.Module, x: tuple[Tensor, ...], whole: str = whole, adapted: bool = ".lora_" in name) -> None:
                last = whole.rpartition(".")[2]
                if x[0].shape[0] != records:
                    odd.setdefault(last, (whole, x[0].shape[0]))
                elif adapted:
                    fine.add(last)

            hooks.append(layer.register_forward_pre_hook(look))
        try:
            ids = made_up(self.adapter.vocabulary, records * tokens).view(records, tokens).to(self.adapter.device)
            with torch.no_grad():
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
        finally:
            for hook in hooks:
                hook.remove()
        if not odd:
            return
        whole, rows = next(iter(odd.values()))
        why = (
            "the model only reshapes its records there, and a layer must see them one by one"
            if rows == records * tokens
            else "the model mixes its records there, or they share what the layer is given, as relative positions are"
        )
        left = ",".join(sorted(fine - set(odd)))
        raise ModelError(
            f"adapter.targets: {', '.join(sorted(odd))} cannot be trained with a bound for each record: {whole} is "
            f"given {rows} row{'s' * (rows != 1)} for {records} records of {tokens} tokens; {why}. "
            + (f"Give adapter.targets=[{left}]." if left else "Use another model.")
        )

    def _check_separation(self) -> None:
        """Raise ModelError if one record's text changes another's gradient: no clip would bound it then.

        Measured once, on public tokens, with as many records as tokens, so that swapped axes cannot hide.
        """
        n, device = 4, self.adapter.device
        ids = made_up(self.adapter.vocabulary, n * n).view(n, n).to(device)
        other = ids.clone()
        other[0] = ids[0].flip(0) + 1
        units = torch.arange(n, device=device)
        classifies = self.adapter.classifies
        first, second = (
            self.unit_gradients(Batch(i, torch.ones_like(i), torch.zeros_like(units) if classifies else i, units, n))
            for i in (ids, other)
        )
        if not torch.allclose(first[1:], second[1:], rtol=1e-3, atol=1e-3 * float(first.abs().max())):
            row = 1 + int((first[1:] - second[1:]).norm(dim=1).argmax())
            raise ModelError(
                "the model mixes the records of a batch, so that a record's gradient cannot be bounded: another "
                f"record's text changes {self.adapter.most_apart(second[row], first[row])}. Use another model, or "
                "leave the mixing layers out of adapter.targets."
            )

    def set_up(self, plan: RunPlan, checkpointing: bool) -> None:
        """Get ready for a plan, before anything is charged: compile the model if the plan says so or gains by it.

        `checkpointing`: recompute activations in the backward pass. Raises ModelError if model.compile=on and the
        model cannot be compiled.
        """
        if checkpointing and plan.adapter.method == "prefix":
            raise ModelError(
                "site.checkpointing: a block that is computed again would find the keys and values of a prefix twice. "
                "Set site.checkpointing=false, or use another adapter.method."
            )
        self._blocks.checkpointing = checkpointing
        if self.alone:
            _log.info("adapter.method=%s: every record is computed by itself", plan.adapter.method)
        adapter, wish, longest = self.adapter, plan.model.compile, plan.model.max_length
        if self._compile != "off" or wish == "off":
            return
        if wish == "auto" and not pays(self._size, plan.steps * plan.expected_units, longest, adapter.device):
            return
        values = adapter.vector()
        try:
            adapter.load((normals(SeededRandomness(0, "public"), len(values)) * 0.02).astype(np.float32))
            self._blocks.compile(self._gradients, longest, classifies=adapter.classifies)
            _log.info("model.compile: the model is compiled")
        except ModelError as error:
            if wish == "on":
                raise
            _log.warning("%s; training goes on without", error)
        finally:
            adapter.load(values)
        self._compile = wish

    def rehearse(self, micro_batch: int, longest: int) -> None:
        """Compute a pass of every shape that records of a plan can have, once, on made-up tokens.

        Raises ModelError if that fails: so it does before a charge, and whatever the records are.
        """
        # all that decides which shapes there are, and what computes them
        case = (micro_batch, longest, self.compiled, self._blocks.checkpointing, torch.get_num_threads())
        if case in self._rehearsed:
            return
        with self.adapter.lock:
            for width, shortest in self.shapes(longest):
                records = self.rows(width, micro_batch)
                try:
                    for length in sorted({shortest, min(width, longest)}):  # padded, and not
                        ids = made_up(self.adapter.vocabulary, length).numpy()
                        unit = (Example(ids, np.asarray(0) if self.adapter.classifies else ids),)
                        self.pass_gradients([unit] * records, width, micro_batch)
                except Exception as error:  # MemoryError, and what torch raises in its place
                    raise ModelError(
                        f"{records} records of {width} tokens are too many for one pass ({first_line(error)}). Lower "
                        "micro_batch or model.max_length"
                    ) from error
        self._rehearsed.add(case)

    def shapes(self, longest: int) -> list[tuple[int, int]]:
        """Return every width that records of up to `longest` tokens are padded to, and the fewest tokens of each."""
        shortest: dict[int, int] = {}
        for length in range(1, longest + 1):
            shortest.setdefault(padded(length, self._longest), length)
        return list(shortest.items())

    def rows(self, width: int, micro_batch: int) -> int:
        """Return how many records of `width` tokens a pass has: always, whoever is drawn.

        If one record makes an efficient pass, it has a pass to itself, on all threads: nothing depends on other
        records.
        """
        if self.alone or self._experts or self.compiled:
            return 1
        if self.adapter.device.type == "cuda":  # which takes as long for one small record as for many
            most = min(_GPU_TOGETHER, _GPU_TOKENS // width, int(_GPU_LARGE / (self._size * width)))
        elif self._size * width * torch.get_num_threads() >= _LARGE:
            most = 1
        else:
            most = min(_TOGETHER, _TOKENS // width)
        return max(1, min(most, micro_batch))

    @property
    def compiled(self) -> bool:
        """Whether the model runs compiled while it is trained."""
        return self._blocks.compiled

    def optimizer(
        self, optimizer: torch.optim.Optimizer, mechanism: Mechanism, expected_units: float, source: Randomness
    ) -> DPOptimizer:
        """Wrap a torch optimiser of `adapter.flat`; `source` gives the noise."""
        return _Optimizer(optimizer, mechanism, expected_units, source)

    def step(self, optimizer: DPOptimizer, units: Sequence[PrivacyUnit], micro_batch: int) -> None:
        """Take one step on the Poisson-sampled `units`; an empty batch is a step of noise alone."""
        optimizer.zero_grad(set_to_none=True)
        (flat,) = optimizer.params
        flat.summed_grad = self.clipped_sum(units, optimizer.mechanism, micro_batch)
        optimizer.add_noise()
        optimizer.scale_grad()
        optimizer.original_optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def clipped_sum(
        self,
        units: Sequence[PrivacyUnit],
        mechanism: Mechanism,
        micro_batch: int,
        distributed: DistributedMechanism | None = None,
    ) -> Tensor:
        """Return the sum of the units' clipped gradients, float64[d]: all that a step needs to know of the records.

        With `distributed`, it is in whole quanta. Either way the sum is exact, and rounded to float64 once, at the end.

        `micro_batch` bounds the records of one forward pass and does not change the result. Units are cut, computed,
        clipped and added pass by pass, in constant memory. What a unit adds is a function of that unit alone, to the
        last bit: see `pass_gradients`. A unit that fails contributes nothing, and nobody else's part changes.
        """
        with self._norms_kept():
            return self._clipped_sum(units, mechanism, micro_batch, distributed)

    def _clipped_sum(
        self,
        units: Sequence[PrivacyUnit],
        mechanism: Mechanism,
        micro_batch: int,
        distributed: DistributedMechanism | None,
    ) -> Tensor:
        began, held = time.perf_counter(), 0
        total = torch.zeros(self.adapter.flat.numel(), dtype=torch.float64, device=self.adapter.device)
        earlier, carry = torch.zeros_like(total), _CARRY * (1.0 if distributed is not None else _quantum(mechanism))
        for some, width in passes(units, lambda width: self.rows(width, micro_batch), self._longest):
            try:
                part = self._clipped(some, width, mechanism, micro_batch, distributed)
            except ModelError:  # it is the model, and would be so for any record
                raise
            except Exception as error:  # of torch or of the machine
                if not mechanism.private:
                    raise
                part, why = None, first_line(error)
            if part is None:
                part = self._one_by_one(some, width, mechanism, micro_batch, distributed, why)
            if held + len(some) > _EXACT and carry:  # else what a unit adds would depend on those before it
                whole = (total / carry).round_() * carry
                earlier, total, held = earlier + whole, total - whole, 0
            total += part
            held += len(some)
        self.seconds += time.perf_counter() - began
        return earlier + total

    def _clipped(
        self,
        units: Sequence[PrivacyUnit],
        width: int,
        mechanism: Mechanism,
        micro_batch: int,
        distributed: DistributedMechanism | None,
    ) -> Tensor:
        """Return the clipped sum of the units of one pass, or of one unit that takes several."""
        gradients: Tensor | None = None
        whole, rows = sum(map(len, units)), self.rows(width, micro_batch)
        pieces = [units] if len(units) > 1 else [[units[0][i : i + rows]] for i in range(0, whole, rows)]
        for piece in pieces:
            # a unit's loss is the mean over its records
            own = self.pass_gradients(piece, width, micro_batch)
            records = sum(map(len, piece))
            own = own if records == whole else own * (records / whole)
            gradients = own if gradients is None else gradients + own
            self.tokens += sum(len(record.input_ids) for unit in piece for record in unit)
        return clip_and_sum(_finite(cast(Tensor, gradients), mechanism.private), mechanism, distributed)

    def _one_by_one(
        self, units: Sequence[PrivacyUnit], width: int, mechanism: Mechanism, micro_batch: int,
        distributed: DistributedMechanism | None, why: str,
    ) -> Tensor:  # fmt: skip
        """Return the clipped sum of those units that do not fail by themselves."""
        _log.warning("a pass of %d units failed (%s); they are computed one by one", len(units), why)
        total = torch.zeros(self.adapter.flat.numel(), dtype=torch.float64, device=self.adapter.device)
        for unit in units:
            try:
                total += self._clipped([unit], width, mechanism, micro_batch, distributed)
            except Exception as error:
                _log.warning("a unit contributes nothing: %s", first_line(error))
        return total

    def clipped_share(self, units: Sequence[PrivacyUnit], mechanism: Mechanism, micro_batch: int) -> float | None:
        """Return how many of PUBLIC units have a gradient longer than clip_norm, 0 to 1; None if nothing is clipped.

        Never of a site's records: of them even a share would have to be accounted for.
        """
        if not mechanism.private or not units:
            return None
        pad, device = self.adapter.tokenizer.pad_token_id, self.adapter.device
        norms = [self.unit_gradients(batch).norm(dim=1) for batch in batches(units, micro_batch, pad, device)]
        return float((torch.cat(norms) > mechanism.clip_norm).float().mean())

    def unit_gradients(self, batch: Batch, private: bool = True) -> Tensor:
        """Return the gradient of each unit's own loss, float32[units, d], in the order of the flat vector.

        A unit whose gradient is not finite contributes zero: a NaN would pass any clip. That there was one is private
        and is not reported, unless nothing is protected: then it raises Diverged.
        """
        return _finite(self._gradients(batch), private)

    def pass_gradients(self, units: Sequence[PrivacyUnit], width: int, micro_batch: int) -> Tensor:
        """Return the gradient of each unit's own loss, finite or not, float32[units, d]: of what fits one pass."""
        return self.in_pass(self._gradients, units, width, micro_batch)[: len(units)]

    def in_pass(
        self, found: Callable[[Batch], _Found], units: Sequence[PrivacyUnit], width: int, micro_batch: int
    ) -> _Found:
        """Return what is `found` in a pass of units, behind which there may be empty ones.

        Last bits depend on the shapes of tensors, on the number of threads and, with several threads, on a record's
        place. So a pass has always the same number of records, padded with empty ones if there are too few; several
        records are computed by one thread, or on a GPU by algorithms that repeat their bits; the compiler's code serves
        one at a time. `self_check` measures that a record's place and company then change no bit, with the model, the
        processor and the libraries that are there.
        """
        adapter, rows = self.adapter, self.rows(width, micro_batch)
        batch = collate(units, adapter.tokenizer.pad_token_id, adapter.device, width, rows)
        with _threads(torch.get_num_threads() if rows == 1 else 1), _repeatable(adapter.device):
            return found(batch)

    def _gradients(self, batch: Batch) -> Tensor:
        with _repeatable(self.adapter.device):
            return self._own_gradients(batch)

    def _own_gradients(self, batch: Batch) -> Tensor:
        if self.alone:
            return _added(
                torch.stack([self._gradient(batch, row) for row in range(len(batch.unit_of_row))]),
                batch.unit_of_row, batch.units,
            )  # fmt: skip
        with self._per_unit(batch) as leaves:
            parts = torch.autograd.grad(  # zeros for a layer that the loss does not depend on
                unit_losses(self.adapter, batch).sum(), leaves, allow_unused=True, materialize_grads=True
            )
        return torch.cat([part.flatten(1).float() for part in parts], dim=1)

    def _gradient(self, batch: Batch, row: int) -> Tensor:
        """Return what a record adds to the gradient of its unit, float32[d], computed with no other record at hand."""
        here, owner = slice(row, row + 1), batch.unit_of_row[row]
        alone = Batch(batch.input_ids[here], batch.attention_mask[here], batch.labels[here], owner.new_zeros(1), 1)
        with self._blocks.running(alone):
            parts = torch.autograd.grad(
                unit_losses(self.adapter, alone).sum(), list(self.adapter.trainable.values()),
                allow_unused=True, materialize_grads=True,
            )  # fmt: skip
        records = int((batch.unit_of_row == owner).sum())  # a unit's loss is the mean over its records
        return torch.cat([part.reshape(-1).float() for part in parts]) / records

    @contextmanager
    def _norms_kept(self) -> Iterator[None]:
        """Take the norms of DoRA's weights once while the adapter stays as it is, and not for every record.

        They are constants to the gradient (Liu et al. 2024, section 4.3), and of the adapter alone.
        """
        layers = [] if self.compiled else [m for m in self.adapter.model.modules() if isinstance(m, DoraLinearLayer)]

        def once(find: Callable[..., Tensor]) -> Callable[..., Tensor]:
            found = list[Tensor]()

            def kept(**given: Any) -> Tensor:
                if not found:
                    found.append(find(**given).detach())
                return found[0]

            return kept

        try:
            for layer in layers:
                layer.get_lora_weight, layer.get_weight_norm = once(layer.get_lora_weight), once(layer.get_weight_norm)
            yield
        finally:
            for layer in layers:
                del layer.get_lora_weight, layer.get_weight_norm

    @contextmanager
    def _per_unit(self, batch: Batch) -> Iterator[list[Tensor]]:
        """Give every unit weights of its own to differentiate by, [units, *shape] in the order of the flat vector."""
        try:
            for layer in self._layers:
                layer.unit_of_row = batch.unit_of_row
                layer.grouped = batch.units != len(batch.unit_of_row)
                for name, p in layer.named_parameters():
                    leaf = p.detach().expand(batch.units, *p.shape).requires_grad_(p.requires_grad)
                    layer.leaves[name] = self._leaves[p] = leaf
            with self._blocks.running(batch):
                yield [self._leaves[p] for p in self.adapter.trainable.values()]
        finally:
            self._leaves.clear()
            for layer in self._layers:
                layer.unit_of_row = None
                layer.leaves.clear()
