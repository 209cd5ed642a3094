"""The wire format of flat vectors loses nothing it does not say it loses, and lets nothing strange in."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fedllm.adapter_vector import WireDtype, decode, encode
from fedllm.errors import MessageError

DTYPES: list[WireDtype] = ["float32", "float16"]
FLOAT16_MAX = 65504.0
FLOAT16_OVERFLOW = 65520.0  # half-way to the next power of two: rounds to infinity


def vectors(limit: float | None = None) -> st.SearchStrategy[NDArray[np.float32]]:
    elements = st.floats(
        min_value=None if limit is None else -limit,
        max_value=limit,
        allow_nan=False,
        allow_infinity=False,
        width=32,
    )
    return hnp.arrays(np.float32, st.integers(0, 40), elements=elements)


def half_ulp_of_float16(value: float) -> float:
    """Return half the gap between the float16 numbers around `value` (IEEE 754 binary16: 10 bits, least 2^-24)."""
    exponent = math.frexp(value)[1] - 1
    return 0.5 * 2.0 ** max(exponent - 10, -24)


@given(vectors())
def test_float32_travels_bit_for_bit(vector: NDArray[np.float32]) -> None:
    received = decode(encode(vector, "float32"), "float32", len(vector))
    assert received.tobytes() == vector.tobytes()
    assert received.dtype == np.float32


@given(vectors(FLOAT16_MAX))
def test_float16_is_off_by_at_most_half_an_ulp(vector: NDArray[np.float32]) -> None:
    received = decode(encode(vector, "float16"), "float16", len(vector))
    for sent, got in zip(vector.tolist(), received.tolist(), strict=True):
        assert abs(sent - got) <= half_ulp_of_float16(sent)


@given(vectors(FLOAT16_MAX))
def test_what_fits_float16_is_not_rounded_twice(vector: NDArray[np.float32]) -> None:
    once = decode(encode(vector, "float16"), "float16", len(vector))
    assert decode(encode(once, "float16"), "float16", len(vector)).tobytes() == once.tobytes()


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("float16", 2)])
def test_a_value_takes_four_bytes_or_two(dtype: WireDtype, width: int) -> None:
    assert len(encode(np.zeros(7, np.float32), dtype)) == 7 * width


def test_bytes_are_little_endian_on_every_machine() -> None:
    assert encode(np.asarray([1.0, -2.0], np.float32), "float32") == bytes.fromhex("0000803f000000c0")
    assert encode(np.asarray([1.0, -2.0], np.float32), "float16") == bytes.fromhex("003c00c0")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_never_sent(dtype: WireDtype, bad: float) -> None:
    with pytest.raises(MessageError, match="not finite"):
        encode(np.asarray([0.0, bad, 1.0], np.float32), dtype)


@given(st.floats(min_value=FLOAT16_OVERFLOW, max_value=2.0**127, width=32), st.booleans())
def test_a_value_beyond_float16_is_refused_and_not_made_infinite(value: float, negative: bool) -> None:
    with pytest.raises(MessageError, match="float32"):
        encode(np.asarray([-value if negative else value], np.float32), "float16")


def test_the_largest_float16_is_sent() -> None:
    vector = np.asarray([FLOAT16_MAX, -FLOAT16_MAX], np.float32)
    assert decode(encode(vector, "float16"), "float16", 2).tolist() == vector.tolist()


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_only_flat_vectors_are_sent(shape: tuple[int, ...]) -> None:
    with pytest.raises(MessageError, match="flat"):
        encode(np.zeros(shape, np.float32), "float32")


@given(st.binary(max_size=64), st.sampled_from(DTYPES), st.integers(0, 20))
def test_any_bytes_give_a_finite_vector_or_a_message_error(data: bytes, dtype: WireDtype, dimension: int) -> None:
    try:
        vector = decode(data, dtype, dimension)
    except MessageError:
        return
    assert vector.shape == (dimension,)
    assert vector.dtype == np.float32
    assert np.isfinite(vector).all()
    assert encode(vector, dtype) == data


@given(vectors(FLOAT16_MAX), st.sampled_from(DTYPES), st.integers(-3, 3).filter(bool))
def test_a_vector_of_another_length_is_refused(vector: NDArray[np.float32], dtype: WireDtype, off: int) -> None:
    with pytest.raises(MessageError, match="bytes"):
        decode(encode(vector, dtype), dtype, len(vector) + off if len(vector) + off >= 0 else len(vector) + 1)


@pytest.mark.parametrize(("dtype", "bad"), [("float32", "0000c07f"), ("float32", "0000807f"), ("float32", "000080ff"),
                                            ("float16", "007e"), ("float16", "007c"), ("float16", "00fc")])  # fmt: skip
def test_nan_and_infinity_from_outside_are_refused(dtype: WireDtype, bad: str) -> None:
    good = encode(np.ones(1, np.float32), dtype)
    with pytest.raises(MessageError, match="NaN"):
        decode(good + bytes.fromhex(bad), dtype, 2)


@given(vectors(FLOAT16_MAX))
def test_a_received_vector_may_be_written_to(vector: NDArray[np.float32]) -> None:
    received = decode(encode(vector, "float32"), "float32", len(vector))
    received += 1  # a read-only view of the message would raise
    assert len(received) == len(vector)
