"""Frozen linear layers whose weights are kept in 8 or 4 bits. The only importer of bitsandbytes.

Every pass has the weights in the type of what they are multiplied with, one layer at a time, and multiplies as any
linear layer does: nothing but the weights is rounded, and a record's result depends on that record alone. LLM.int8
(Dettmers et al. 2022) is not used: it computes the columns in which any record of a batch has a large value with other
arithmetic, so that one record changes the results of all.
"""

import importlib.util
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fedllm.errors import ModelError

Quantisation = Literal["int8", "nf4"]
_BLOCK = 64  # values of nf4 with one scale: that of bitsandbytes and transformers
_MISSING = "model.quantize=nf4 needs bitsandbytes. Run: pip install 'fedllm[quantize]'"
_AT_ONCE = 1 << 22  # values that are quantised at once; a multiple of the block


class _Product(torch.autograd.Function):
    """x W^T; the backward pass makes W again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x_NTI: Tensor, codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.shape = shape
        y_NTO = F.linear(x_NTI, _values(codes, scales, shape, x_NTI.dtype))
        return y_NTO.mul_(scales) if codes.dtype == torch.int8 else y_NTO

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (y_NTO,) = upstream
        codes, scales = ctx.saved_tensors
        weight_OI = _values(codes, scales, ctx.shape, y_NTO.dtype)
        if codes.dtype == torch.int8:
            y_NTO = (y_NTO * scales).to(y_NTO.dtype)
        return y_NTO @ weight_OI, None, None, None


class QuantisedLinear(nn.Linear):
    """A frozen linear layer in 8 or 4 bits.

    `int8`: whole numbers from -127 to 127, with a scale for each output (row-wise absmax). `nf4`: the 16 values of
    NormalFloat (Dettmers et al. 2023), with a scale for each 64 weights. Scales are float32, and never narrowed.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight_OI: Tensor, bias: nn.Parameter | None, kind: Quantisation) -> None:
        """Raises ModelError if a weight is not finite, or nf4 is not installed."""
        nn.Module.__init__(self)  # that of nn.Linear makes float32 weights
        self.out_features, self.in_features = weight_OI.shape
        self.register_parameter("bias", bias)
        codes, scales = (_int8 if kind == "int8" else _nf4)(weight_OI.detach().float().cpu())
        if not scales.isfinite().all():
            raise ModelError("the model has weights that are NaN or infinite, expected finite ones. Is its file sound?")
        # buffers: whatever gives the parameters another type leaves them alone
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights as they are multiplied, float32[O, I]; made anew, and not to be written to."""
        values = _values(self.codes, self.scales, (self.out_features, self.in_features), torch.float32)
        return values * self.scales[:, None] if self.codes.dtype == torch.int8 else values

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b; x is [..., in]."""
        y: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, self.codes, self.scales, (self.out_features, self.in_features)
        )
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return f"{self.in_features}, {self.out_features}, codes={self.codes.dtype}"


def quantise(model: nn.Module, names: Iterable[str], kind: Quantisation) -> None:
    """Put quantised layers in the place of the named ones, one by one: two copies never exist of more than one.

    Raises ModelError if nf4 is not installed, or a weight is not finite.
    """
    for name in names:
        layer: Any = model.get_submodule(name)
        parent, _, last = name.rpartition(".")
        weight = layer.weight.T.contiguous() if isinstance(layer, Conv1D) else layer.weight
        setattr(model.get_submodule(parent), last, QuantisedLinear(weight, layer.bias, kind))


def round_weights(model: nn.Module, names: Iterable[str], kind: Quantisation) -> None:
    """Give the named layers the weights that `quantise` would have them multiply by, in place.

    Raises ModelError as `quantise` does.
    """
    for name in names:
        layer: Any = model.get_submodule(name)
        turned = isinstance(layer, Conv1D)
        weight_OI = QuantisedLinear(layer.weight.T.contiguous() if turned else layer.weight, None, kind).weight
        layer.weight.data = weight_OI.T.contiguous() if turned else weight_OI


def quiet_bitsandbytes() -> None:
    """Let it not say that kernels nobody needs cannot be fetched from a hub, nor of each layer how it computes."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def missing_for_nf4() -> str:
    """Return what must be installed for nf4, with the command; empty if nothing."""
    return "" if importlib.util.find_spec("bitsandbytes") else _MISSING


@contextmanager
def unseen() -> Iterator[None]:
    """Hide bitsandbytes from PEFT, which would import it wherever it is installed: two seconds in every process."""
    name = "bitsandbytes"
    hidden = name not in sys.modules and sys.modules.setdefault(name, cast(ModuleType, None)) is None
    try:
        yield
    finally:
        if hidden:
            del sys.modules[name]
            for asked in ("is_bnb_available", "is_bnb_4bit_available"):  # PEFT remembers what it found
                getattr(sys.modules["peft.import_utils"], asked).cache_clear()


def _int8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8[O, I] and float32[O]."""
    scales_O = weight_OI.abs().amax(dim=1) / 127
    return (weight_OI / scales_O.clamp(min=1e-30)[:, None]).round_().to(torch.int8), scales_O


def _nf4(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return uint8[n / 2, 1], two values each, and float32[n / 64]: of the n weights in a row, filled up by zeros."""
    flat = weight_OI.reshape(-1)
    pieces = torch.split(F.pad(flat, (0, -len(flat) % _BLOCK)), _AT_ONCE)
    # a scale for each block, and none for the scales: its error would be of nobody's use
    parts = [_functional().quantize_4bit(part, blocksize=_BLOCK, quant_type="nf4") for part in pieces]
    return torch.cat([codes for codes, _ in parts]), torch.cat([state.absmax for _, state in parts])


def _values(codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the weights, dtype[O, I]; in 8 bits, before each row is multiplied by its scale."""
    if codes.dtype == torch.int8:
        return codes.to(dtype)  # exact, in bfloat16 too
    # block by block: bitsandbytes 0.50 on CPU is wrong where a row is a multiple of 16 values and not of 64
    library, blocks = _functional(), (len(scales), _BLOCK)
    state = library.QuantState(absmax=scales, shape=blocks, dtype=dtype, blocksize=_BLOCK, quant_type="nf4")
    values: Tensor = library.dequantize_4bit(codes, state)
    return values.view(-1)[: shape[0] * shape[1]].view(shape)


def _functional() -> Any:
    """Return bitsandbytes' functions; raises ModelError if it is not installed."""
    quiet_bitsandbytes()
    try:
        from bitsandbytes import functional
    except ImportError:
        raise ModelError(_MISSING) from None
    return functional
