"""What travels: the trainable tensors of an adapter as one flat float32 vector, tied to the adapter's description."""

from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from fedllm.canonical import digest_of
from fedllm.errors import SpecMismatch


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
    frozen: str  # SHA-256 over the adapter's frozen tensors (A, where only B is trained)
    scaling: float  # LoRA alpha / rank
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
