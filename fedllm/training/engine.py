"""One DP-SGD step on an adapter: per-unit gradients, clip, noise. The only importer of Opacus.

Per-unit gradients need no hooks: every privacy unit gets its own leaf, a view of the same weights expanded along a
new first axis, and plain autograd then returns one gradient a unit. Opacus's DPOptimizer clips, scales and steps;
noise and coins come from the run's Mechanism and the operating system.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn import functional as F

from fedllm.errors import ModelError
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import Randomness
from fedllm.training.adapter import AdapterModel
from fedllm.training.data import Batch, Unit, batches
from fedllm.training.losses import unit_losses


class _PerUnitLinear(nn.Module):
    """A linear layer that, inside `per_unit`, gives every privacy unit weights of its own to differentiate."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.leaves: dict[str, Tensor] = {}  # [units, *shape] by parameter name, while in `per_unit`
        self.unit_of_row: Tensor | None = None  # [N]

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b; x is [N, ..., in], row n belonging to unit `unit_of_row[n]`."""
        if self.unit_of_row is None:
            return F.linear(x, self.weight, self.bias)
        if x.shape[0] != len(self.unit_of_row):
            raise ModelError(
                f"a trainable layer saw {x.shape[0]} rows for {len(self.unit_of_row)} records: the model mixes records "
                "before this layer, so a record's gradient cannot be bounded. Leave the layer out of adapter.targets."
            )
        x_NTI = x.reshape(x.shape[0], -1, x.shape[-1])
        y_NTO = torch.bmm(x_NTI, self.leaves["weight"].index_select(0, self.unit_of_row).transpose(1, 2))
        if "bias" in self.leaves:
            y_NTO = y_NTO + self.leaves["bias"].index_select(0, self.unit_of_row).unsqueeze(1)
        return y_NTO.reshape(*x.shape[:-1], self.out_features)


class _Optimizer(DPOptimizer):  # type: ignore[misc]  # opacus is untyped
    """Opacus's DPOptimizer with noise from the Mechanism and its source instead of a torch generator."""

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

    def clip_and_accumulate(self) -> None:
        """Add up the units' gradients, each scaled to L2 norm `clip_norm` at most over all parameters together.

        Overrides Opacus's for its norms: in float32 the norm of a very long row comes out too small, so the clip too
        weak. Here they are taken in float64.
        """
        squares = [
            torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64).square() for g in self.grad_samples
        ]
        norms = torch.stack(squares).sum(0).sqrt()
        factors = (self.max_grad_norm / norms.clamp(min=1e-30)).clamp(max=1.0).float()
        for p, gradients in zip(self.params, self.grad_samples, strict=True):
            clipped = torch.einsum("u,u...->...", factors, gradients)
            p.summed_grad = clipped if p.summed_grad is None else p.summed_grad + clipped

    def add_noise(self) -> None:
        """Set p.grad to the clipped sum plus noise, float32.

        Added in float64 and rounded once: noise rounded to float32 first would lie on a lattice of its own, and small
        results would betray the sum beneath.
        """
        for p in self.params:
            noise = torch.from_numpy(self.mechanism.noise(p.numel(), self._source)).to(p.device).view_as(p)
            p.grad = (p.summed_grad.double() + noise).to(p.dtype)


class Engine:
    """Takes DP-SGD steps on one adapter model, and leaves the model usable for everything else."""

    def __init__(self, adapter: AdapterModel) -> None:
        """Give every trainable layer of `adapter` per-unit gradients.

        Raises ModelError where a trainable tensor does not belong to a linear layer.
        """
        self._adapter = adapter
        model: nn.Module = adapter.model
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and child.weight.requires_grad:
                    setattr(parent, name, _PerUnitLinear(child))
        self._layers = [layer for layer in model.modules() if isinstance(layer, _PerUnitLinear)]
        covered = {p for layer in self._layers for p in layer.parameters()}
        orphans = [name for name, p in adapter.trainable.items() if p not in covered]
        if orphans:
            raise ModelError(
                f"trainable tensors outside linear layers have no per-unit gradient: {', '.join(orphans[:5])}. "
                "Choose adapter.targets among linear layers."
            )
        self._check_separation()

    def _check_separation(self) -> None:
        """Raise ModelError where one record's text changes another's gradient: no clip would bound it then.

        Measured once, on public tokens, with as many records as tokens, so that swapped axes cannot hide.
        """
        n, device = 4, self._adapter.device
        ids = torch.arange(3, 3 + n * n, device=device).view(n, n)
        other = ids.clone()
        other[0] = ids[0].flip(0) + 1
        units = torch.arange(n, device=device)
        classifies = self._adapter.classifies
        first, second = (
            self.unit_gradients(Batch(i, torch.ones_like(i), torch.zeros_like(units) if classifies else i, units, n))
            for i in (ids, other)
        )
        for a, b in zip(first, second, strict=True):
            if not torch.allclose(a[1:], b[1:], rtol=1e-3, atol=1e-3 * float(a.abs().max())):
                raise ModelError(
                    "the model mixes the records of a batch, so that a record's gradient cannot be bounded. Use "
                    "another model, or leave the mixing layers out of adapter.targets."
                )

    def optimizer(
        self, optimizer: torch.optim.Optimizer, mechanism: Mechanism, expected_units: float, source: Randomness
    ) -> DPOptimizer:
        """Wrap a torch optimiser over the adapter's parameters; `source` gives the noise."""
        return _Optimizer(optimizer, mechanism, expected_units, source)

    def step(self, optimizer: DPOptimizer, units: Sequence[Unit], micro_batch: int) -> None:
        """Take one step on the Poisson-sampled `units`; an empty batch is a step of noise alone.

        `micro_batch` bounds the records of one forward pass and does not change the result: whole units are clipped
        and summed pass by pass, and noise is added once.
        """
        optimizer.zero_grad()
        for p in optimizer.params:
            p.grad_sample = torch.zeros((0, *p.shape), device=p.device)
        optimizer.clip_and_accumulate()  # the empty sum, so that an empty batch needs no case of its own
        for batch in batches(units, micro_batch, self._adapter.tokenizer.pad_token_id, self._adapter.device):
            for p, gradients in zip(
                optimizer.params, self.unit_gradients(batch, optimizer.mechanism.private), strict=True
            ):
                p.grad_sample = gradients
            optimizer.clip_and_accumulate()
        optimizer.add_noise()
        optimizer.scale_grad()
        optimizer.original_optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def unit_gradients(self, batch: Batch, private: bool = True) -> list[Tensor]:
        """Return the gradient of each unit's own loss, float32[units, *shape] for each trainable parameter.

        A unit whose gradient is not finite contributes zero: a NaN would pass any clip. That there was one is private
        and is not reported, unless nothing is protected: then it raises ModelError.
        """
        with self._per_unit(batch) as leaves:
            unit_losses(self._adapter, batch).sum().backward()  # type: ignore[no-untyped-call]
            gradients = [
                torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.to(torch.float32)
                for leaf in (leaves[p] for p in self._adapter.trainable.values())
            ]
        finite = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0).isfinite()
        if not bool(finite.all()):
            if not private:
                raise ModelError("the gradient of a record is NaN or infinite. Lower training.learning_rate.")
            gradients = [g.where(finite.view(-1, *[1] * (g.ndim - 1)), torch.zeros_like(g)) for g in gradients]
        return gradients

    @contextmanager
    def _per_unit(self, batch: Batch) -> Iterator[dict[nn.Parameter, Tensor]]:
        leaves: dict[nn.Parameter, Tensor] = {}
        try:
            for layer in self._layers:
                layer.unit_of_row = batch.unit_of_row
                for name, p in layer.named_parameters():
                    leaf = p.detach().expand(batch.units, *p.shape).requires_grad_(p.requires_grad)
                    layer.leaves[name] = leaves[p] = leaf
            yield leaves
        finally:
            for layer in self._layers:
                layer.unit_of_row = None
                layer.leaves.clear()
