"""Two parties add their vectors only if everything that gives the vectors a meaning agrees."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.adapter_vector import AdapterSpec, TensorSpec
from fedllm.canonical import digest_of
from fedllm.errors import MessageError, SpecMismatch

SPEC = AdapterSpec(
    base="b" * 64,
    frozen="f" * 64,
    scaling=2.0,
    tensors=(TensorSpec("layer.0.B", (2, 3)), TensorSpec("layer.1.B", (4,)), TensorSpec("head", (1, 5))),
)
NAMES = st.text(min_size=1, max_size=8)
TENSORS = st.lists(
    st.builds(TensorSpec, NAMES, st.lists(st.integers(1, 4), max_size=3).map(tuple)),
    max_size=5,
    unique_by=lambda tensor: tensor.name,
).map(tuple)


@given(TENSORS)
def test_splitting_keeps_every_value_in_its_place(tensors: tuple[TensorSpec, ...]) -> None:
    spec = replace(SPEC, tensors=tensors)
    vector = np.arange(spec.dimension, dtype=np.float32)
    views = spec.split(vector)
    assert [(name, view.shape) for name, view in views.items()] == [(t.name, t.shape) for t in tensors]
    flat = [value for view in views.values() for value in view.reshape(-1).tolist()]
    assert flat == vector.tolist()


def test_the_parts_are_views_of_the_vector() -> None:
    vector = np.zeros(SPEC.dimension, np.float32)
    SPEC.split(vector)["layer.1.B"][:] = 1
    assert vector.tolist() == [0] * 6 + [1] * 4 + [0] * 5


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(14, np.float32),
        np.zeros(16, np.float32),
        np.zeros((1, 15), np.float32),
        np.zeros(15, np.float64),
        np.zeros(15, np.int32),
        np.zeros(0, np.float32),
    ],
    ids=lambda vector: f"{vector.dtype}{list(vector.shape)}",
)
def test_a_vector_of_another_adapter_is_refused(vector: np.ndarray) -> None:
    for refuse in (SPEC.check, SPEC.split):
        with pytest.raises(SpecMismatch, match=r"float32\[15\]"):
            refuse(vector)


def test_a_spec_mismatch_is_handled_wherever_a_bad_message_is() -> None:
    assert issubclass(SpecMismatch, MessageError)


CHANGED = {
    "base": replace(SPEC, base="c" * 64),
    "frozen": replace(SPEC, frozen="0" * 64),
    "scaling": replace(SPEC, scaling=math.nextafter(2.0, 3.0)),
    "tensor name": replace(SPEC, tensors=(TensorSpec("layer.0.A", (2, 3)), *SPEC.tensors[1:])),
    "tensor shape of equal size": replace(SPEC, tensors=(TensorSpec("layer.0.B", (3, 2)), *SPEC.tensors[1:])),
    "tensor shape flattened": replace(SPEC, tensors=(TensorSpec("layer.0.B", (6,)), *SPEC.tensors[1:])),
    "tensor order": replace(SPEC, tensors=SPEC.tensors[::-1]),
    "tensor left out": replace(SPEC, tensors=SPEC.tensors[:-1]),
}


@pytest.mark.parametrize("change", CHANGED)
def test_the_digest_tells_apart(change: str) -> None:
    assert CHANGED[change].digest != SPEC.digest


def test_no_two_of_the_changed_specs_share_a_digest() -> None:
    assert len({spec.digest for spec in CHANGED.values()}) == len(CHANGED)


def test_equal_specs_have_equal_digests() -> None:
    assert replace(SPEC).digest == SPEC.digest
    assert len(SPEC.digest) == 64


@given(TENSORS, TENSORS)
def test_digests_are_equal_just_where_the_tensors_are(a: tuple[TensorSpec, ...], b: tuple[TensorSpec, ...]) -> None:
    assert (replace(SPEC, tensors=a).digest == replace(SPEC, tensors=b).digest) == (a == b)


@given(st.dictionaries(NAMES, st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)))
def test_the_order_of_keys_does_not_change_a_digest(values: dict[str, object]) -> None:
    assert digest_of(dict(reversed(values.items()))) == digest_of(values)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_digest_of_what_json_cannot_say_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        digest_of({"value": bad})
