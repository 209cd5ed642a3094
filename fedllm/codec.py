"""Flat float vectors to bytes and back: little-endian float32 or float16, nothing else on the wire."""

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import MessageError

WireDtype = Literal["float32", "float16"]

_NUMPY: dict[WireDtype, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


def encode(vector: NDArray[np.float32], dtype: WireDtype) -> bytes:
    """Encode float32[d] in 4*d (float32) or 2*d (float16, rounded to nearest) bytes.

    Raises MessageError where a value is not finite, or does not fit float16.
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
