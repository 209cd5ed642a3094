"""The bytes of secure aggregation: the same on every machine, and harmless whatever arrives."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import FedllmError, MessageError
from fedllm.protocol.messages import (
    MAX_HOLDERS,
    ConsistencyCheck,
    MaskedInputRequest,
    Message,
    ShareKeysRequest,
    from_bytes,
)
from fedllm.secagg import unmask
from tests.fedllm.secagg.secagg_federation import KINDS, TASK, VECTORS, Federation, make_vectors, random_vectors, total

STORED: dict[str, Any] = json.loads(VECTORS.read_text("utf-8"))
VALID = [bytes.fromhex(entry["hex"]) for entry in STORED["messages"]]
SAMPLES = {kind: next(m for m in VALID if f'"kind":"{kind.KIND}"'.encode() in m) for kind in KINDS}


def parse(data: bytes) -> Message:
    return from_bytes(data, Message, Message)


def test_the_protocol_gives_the_bytes_of_the_vectors() -> None:
    assert make_vectors() == STORED


def test_the_vectors_hold_every_message() -> None:
    assert {entry["kind"] for entry in STORED["messages"]} == {kind.KIND for kind in KINDS}
    assert {entry["kind"] for entry in STORED["malformed"]} == {kind.KIND for kind in KINDS}


def test_the_sums_of_the_vectors_are_the_sums_of_their_inputs() -> None:
    for entry in STORED["rounds"]:
        columns = zip(*(STORED["inputs"][site] for site in entry["survivors"]), strict=True)
        assert entry["sum"] == [sum(column) % 2**32 for column in columns]


def test_a_valid_message_reads_back_byte_for_byte() -> None:
    for data in VALID:
        assert parse(data).to_bytes() == data


@pytest.mark.parametrize("entry", STORED["malformed"], ids=lambda e: f"{e['kind']}: {e['why']}")
def test_a_malformed_message_is_refused(entry: dict[str, str]) -> None:
    with pytest.raises(MessageError):
        parse(bytes.fromhex(entry["hex"]))


@given(st.sampled_from(KINDS), st.data())
def test_damaged_bytes_are_a_message_or_a_message_error(kind: type[Message], data: st.DataObject) -> None:
    spoiled = bytearray(SAMPLES[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(spoiled) - 1))
        how = data.draw(st.sampled_from(["change", "cut", "add"]))
        if how == "change":
            spoiled[at] = data.draw(st.integers(0, 255))
        elif how == "cut" and len(spoiled) > 9:
            del spoiled[at : at + data.draw(st.integers(1, 8))]
        else:
            spoiled[at:at] = data.draw(st.binary(max_size=8))
        if not spoiled:
            break
    with contextlib.suppress(MessageError):
        parse(bytes(spoiled))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70) | st.just("ab" * 32),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(KINDS), json_values, st.data())
def test_strange_fields_are_a_message_error(kind: type[Message], value: Any, data: st.DataObject) -> None:
    sample = SAMPLES[kind]
    length = int.from_bytes(sample[4:8], "big")
    header = json.loads(sample[8 : 8 + length])
    header[data.draw(st.sampled_from(sorted(header)))] = value
    encoded = json.dumps(header).encode()
    with contextlib.suppress(MessageError):
        parse(sample[:4] + len(encoded).to_bytes(4, "big") + encoded + sample[8 + length :])


@given(st.data())
def test_a_refused_request_changes_nothing(data: st.DataObject) -> None:
    federation, site = Federation(3), "지점-001"
    member, vectors, dealt = federation.members[site], random_vectors(federation.members, 3), federation.share(1)
    changed: dict[str, Any] = {
        "round": data.draw(st.sampled_from([1, 2, 7])),
        "context": data.draw(st.sampled_from([federation.params.context, "0" * 64])),
    }
    asked = federation.masked_input_request(1, dealt, site)
    cut = {"payload": data.draw(st.binary(max_size=200)), "dealings": asked.dealings[: data.draw(st.integers(0, 2))]}
    claim = federation.claim(1, dealt, dealt)
    with pytest.raises(FedllmError):
        member.mask(asked.model_copy(update={**changed, **cut}), TASK, vectors[site])
    with pytest.raises(FedllmError):
        member.unmask(claim)
    uploads = federation.mask(1, dealt, vectors)
    with pytest.raises(FedllmError):
        member.unmask(claim.model_copy(update={**changed, "dropped": ("x",)}))
    reveals = federation.reveals(claim, (), list(uploads))
    unmasked = unmask(federation.cohort, dealt, claim, federation.added(claim.round, uploads), reveals)
    assert unmasked.total_d.tolist() == total(vectors).tolist()


def test_lists_have_a_limit() -> None:
    names = tuple(f"{i}" for i in range(MAX_HOLDERS + 1))
    with pytest.raises(ValueError, match="at most"):
        ConsistencyCheck(context="a" * 64, round=1, joins="b" * 64, common="c" * 64, survivors=names, dropped=())


def test_the_longest_lists_fit_the_header() -> None:
    """Names of 200 characters of three bytes each, at the limit of holders."""
    federation = Federation(2)
    join, dealing = federation.cohort.joins[0], federation.share(1)["지점-001"].dealing
    long = "가" * 196
    joins = tuple(join.model_copy(update={"site": f"{long}{i:04}"}) for i in range(MAX_HOLDERS))
    dealings = tuple(dealing.model_copy(update={"site": f"{long}{i:04}"}) for i in range(MAX_HOLDERS))
    context = federation.params.context
    for message in (
        ShareKeysRequest(context=context, round=1, joins=joins),
        MaskedInputRequest(context=context, round=1, joins=context, dealings=dealings),
    ):
        assert parse(message.to_bytes()) == message
