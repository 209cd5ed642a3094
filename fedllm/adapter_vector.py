"""An adapter as one flat vector: which tensor lies where, its digest, and its bytes on the wire."""

import hashlib
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedllm.canonical import digest_of
from fedllm.errors import MessageError, SpecMismatch


@dataclass(frozen=True)
class TensorSpec:
    """One trainable tensor."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)


@dataclass(frozen=True)
class AdapterSpec:
    """Everything on which two parties must agree before their adapter vectors may be added."""

    base: str  # SHA-256 over the base model's weights
    frozen: str  # SHA-256 over the adapter's frozen tensors (A, if only B is trained)
    scaling: float  # of LoRA: alpha / rank, alpha / sqrt(rank) of rsLoRA; 1 of other methods
    tensors: tuple[TensorSpec, ...]  # trainable, in the order of the flat vector

    @property
    def dimension(self) -> int:
        """Length of the flat vector."""
        return sum(tensor.size for tensor in self.tensors)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form."""
        return digest_of(asdict(self))

    def split(self, vector: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Return views of float32[dimension] by tensor name, each in its shape."""
        self.check(vector)
        views, start = {}, 0
        for tensor in self.tensors:
            views[tensor.name] = vector[start : start + tensor.size].reshape(tensor.shape)
            start += tensor.size
        return views

    def check(self, vector: NDArray[np.float32]) -> None:
        """Raise SpecMismatch unless `vector` is float32[dimension]."""
        if vector.shape != (self.dimension,) or vector.dtype != np.float32:
            raise SpecMismatch(
                f"expected float32[{self.dimension}] for this adapter, found {vector.dtype}{list(vector.shape)}"
            )


def adapter_digest(adapter: NDArray[np.float32]) -> str:
    """Return what records, statements and requests call an adapter float32[d]: SHA-256, hex, little endian."""
    return hashlib.sha256(np.ascontiguousarray(adapter, "<f4").data).hexdigest()


WireDtype = Literal["float32", "float16"]

_NUMPY: dict[WireDtype, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


def encode(vector: NDArray[np.float32], dtype: WireDtype) -> bytes:
    """Encode float32[d] in 4*d (float32) or 2*d (float16, rounded to nearest) bytes.

    Raises MessageError if a value is not finite, or does not fit float16.
    """
    if vector.ndim != 1:
        raise MessageError(f"expected a flat vector, found shape={vector.shape}")
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which is refused below
        encoded = vector.astype(_NUMPY[dtype])
    if not np.isfinite(encoded).all():
        raise MessageError(
            f"the vector holds values that are not finite in {dtype} (largest magnitude "
            f"{np.max(np.abs(vector), initial=0):.3g}). Lower the learning rate, or send float32."
        )
    return bytes(encoded.tobytes())


def decode(data: bytes, dtype: WireDtype, dimension: int, largest: float = math.inf) -> NDArray[np.float32]:
    """Decode float32[dimension]; raises MessageError on a wrong length, or a value not finite or beyond +-`largest`."""
    expected = dimension * _NUMPY[dtype].itemsize
    if len(data) != expected:
        raise MessageError(f"expected {expected} bytes for {dimension} values of {dtype}, found {len(data)}")
    vector = np.frombuffer(data, dtype=_NUMPY[dtype]).astype(np.float32)
    if not np.isfinite(vector).all():
        raise MessageError("the vector holds NaN or infinite values")
    if (found := float(np.max(np.abs(vector), initial=0))) > largest:
        raise MessageError(f"the vector holds a value of magnitude {found:.3g}, expected {largest:g} at most")
    return vector
