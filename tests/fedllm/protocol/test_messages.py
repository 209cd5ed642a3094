"""Whatever bytes arrive, parsing gives a valid message or a MessageError."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm import adapter_vector
from fedllm.crypto.hash_chain import LedgerHead
from fedllm.errors import MessageError
from fedllm.plan import RunPlan
from fedllm.protocol.messages import (
    MAGIC,
    MAX_STATEMENT,
    Declined,
    Message,
    Prepare,
    Ready,
    RoundBegun,
    TrainReply,
    TrainRequest,
    from_bytes,
)
from tests.conftest import SHOWN

Make = Callable[..., RunPlan]
KINDS: tuple[type[Message], ...] = (Prepare, Ready, TrainRequest, TrainReply, Declined)
DIGEST = "d" * 64
SITE = "서울-강남 지점 | 1호"


def message_of(kind: type[Message], plan: RunPlan, payload: bytes = b"") -> Message:
    """Return a valid message of a kind; some have no payload."""
    payload = payload[: kind.LONGEST]
    messages: dict[type[Message], Message] = {
        Prepare: Prepare(plan=plan, payload=payload),
        Ready: Ready(site=SITE, plan_digest=DIGEST, spec_digest=DIGEST, payload=payload),
        TrainRequest: TrainRequest(
            plan=plan, round=3, spec_digest=DIGEST, head=LedgerHead(4, DIGEST),
            begun=RoundBegun(roster=DIGEST, number=5, digest=DIGEST), payload=payload,
        ),
        TrainReply: TrainReply(statement="{}", payload=payload),
        Declined: Declined(site=SITE, reason="budget", payload=payload),
    }  # fmt: skip
    return messages[kind]


def parse_any(data: bytes) -> Message:
    """Parse a message of whatever kind; raises MessageError where it is of none."""
    return from_bytes(data, Message, Message)


def frame(header: bytes, payload: bytes = b"", length: int | None = None) -> bytes:
    return MAGIC + (len(header) if length is None else length).to_bytes(4, "big") + header + payload


def header_of(message: Message) -> dict[str, Any]:
    data = message.to_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[4:8], "big")])
    return header


def as_frame(header: object, payload: bytes = b"") -> bytes:
    return frame(json.dumps(header).encode(), payload)


def expect_message_or_error(data: bytes) -> None:
    """Anything but a message or a MessageError fails the test."""
    try:
        message = parse_any(data)
    except MessageError:
        return
    assert type(message) in KINDS
    assert parse_any(message.to_bytes()) == message


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.KIND)
@given(payload=st.binary(max_size=40))
def test_every_message_arrives_as_it_was_sent(make_plan: Make, kind: type[Message], payload: bytes) -> None:
    message = message_of(kind, make_plan(), payload)
    assert parse_any(message.to_bytes()) == message


@given(site=st.text(SHOWN, min_size=1, max_size=200))
def test_a_site_may_have_any_name_that_shows(site: str) -> None:
    message = Declined(site=site, reason="data")
    assert from_bytes(message.to_bytes(), Ready, Declined) == message


def test_a_plan_keeps_its_digest_on_the_way(make_plan: Make) -> None:
    plan = make_plan(
        {"model.task": "classification", "model.labels": ["긍정", "부정"], "adapter.targets": "all-linear"}
    )
    received = from_bytes(Prepare(plan=plan).to_bytes(), Prepare, TrainRequest)
    assert received.plan == plan
    assert received.plan.digest == plan.digest


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.KIND)
def test_a_message_cut_anywhere_is_an_error_or_shows_in_its_payload(make_plan: Make, kind: type[Message]) -> None:
    payload = adapter_vector.encode(np.ones(3, np.float32), "float32")
    message = message_of(kind, make_plan(), payload)
    whole = message.to_bytes()
    begin_payload = len(whole) - len(message.payload)
    for length in range(begin_payload):
        with pytest.raises(MessageError):
            parse_any(whole[:length])
    for length in range(begin_payload, len(whole)):
        cut = parse_any(whole[:length])
        with pytest.raises(MessageError):
            adapter_vector.decode(cut.payload, "float32", 3)


@given(data=st.data())
def test_flipped_bytes_give_a_message_or_a_message_error(make_plan: Make, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    spoiled = bytearray(message_of(kind, make_plan(), b"payload").to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        spoiled[data.draw(st.integers(0, len(spoiled) - 1))] = data.draw(st.integers(0, 255))
    expect_message_or_error(bytes(spoiled))


@given(st.binary(max_size=100))
def test_random_bytes_are_a_message_error(data: bytes) -> None:
    with pytest.raises(MessageError):
        parse_any(data)


@given(st.binary(max_size=100))
def test_a_random_header_is_a_message_error(header: bytes) -> None:
    with pytest.raises(MessageError):
        parse_any(frame(header))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(header=JSON, kind=st.sampled_from([*(kind.KIND for kind in KINDS), "", "unknown"]) | JSON)
def test_any_json_in_the_header_gives_a_message_or_a_message_error(header: Any, kind: Any) -> None:
    if isinstance(header, dict):
        header = {**header, "kind": kind}
    expect_message_or_error(as_frame(header))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside nested data, inner nodes included."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))


STRANGE = {
    "null": "null", "true": "true", "zero": "0", "minus-one": "-1", "float": "0.5", "minus-zero": "-0.0",
    "1e308": "1e308", "1e999": "1e999", "NaN": "NaN", "Infinity": "-Infinity", "huge-integer": "1" + "0" * 400,
    "digits": "7" * 6000, "empty": '""', "text": '"8"', "surrogate": '"\\ud800"', "nul": '"\\u0000"',
    "list": "[]", "list-of-lists": "[[[]]]", "object": "{}", "deep": "[" * 3000 + "]" * 3000,
}  # fmt: skip


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.KIND)
def test_a_strange_value_in_any_field_gives_a_message_or_a_message_error(
    make_plan: Make, kind: type[Message], strange: str
) -> None:
    header = header_of(message_of(kind, make_plan()))
    for path in leaves(header):
        spoiled = copy.deepcopy(header)
        place = spoiled
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = "@@@"
        text = json.dumps(spoiled).replace('"@@@"', STRANGE[strange])
        try:
            expect_message_or_error(frame(text.encode()))
        except Exception as error:  # name the field: a bare traceback would not
            pytest.fail(f"{kind.KIND}, {'.'.join(map(str, path))}={strange}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.KIND)
def test_text_is_never_read_as_a_number(make_plan: Make, kind: type[Message]) -> None:
    header = header_of(message_of(kind, make_plan()))
    for path in leaves(header):
        spoiled = copy.deepcopy(header)
        place = spoiled
        for part in path[:-1]:
            place = place[part]
        if isinstance(place[path[-1]], int | float):
            place[path[-1]] = str(place[path[-1]])
            with pytest.raises(MessageError):
                parse_any(as_frame(spoiled))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.KIND)
def test_a_message_with_a_field_too_many_or_too_few_is_refused(make_plan: Make, kind: type[Message]) -> None:
    header = header_of(message_of(kind, make_plan()))
    with pytest.raises(MessageError, match=f"malformed {kind.KIND}"):
        parse_any(as_frame({**header, "records": 817}))
    for field in header:
        if field in kind.model_fields and not kind.model_fields[field].is_required():
            continue
        with pytest.raises(MessageError):
            parse_any(as_frame({key: value for key, value in header.items() if key != field}))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.KIND)
def test_a_payload_cannot_hide_in_the_header(make_plan: Make, kind: type[Message]) -> None:
    header = header_of(message_of(kind, make_plan()))
    with pytest.raises(MessageError, match="payload"):
        parse_any(as_frame({**header, "payload": "aGVsbG8="}, b"payload"))


@pytest.mark.parametrize(
    "header", [b"[]", b"1", b"null", b'"kind"', b'["kind"]', b"true", b"", b"\xff\xfe", b"{", b"{}"]
)
def test_a_header_that_is_no_object_is_refused(header: bytes) -> None:
    with pytest.raises(MessageError, match="header"):
        parse_any(frame(header))


@pytest.mark.parametrize("kind", [None, [], {}, 1, True, "Prepare", "__class__", "update "])
def test_an_unknown_kind_is_refused(kind: object) -> None:
    with pytest.raises(MessageError, match="header"):
        parse_any(as_frame({"kind": kind, "site": SITE, "reason": "budget"}))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.KIND)
def test_only_the_two_expected_kinds_are_accepted(make_plan: Make, kind: type[Message]) -> None:
    data = message_of(kind, make_plan()).to_bytes()
    others = [other for other in KINDS if other is not kind]
    with pytest.raises(MessageError, match=f"kind={kind.KIND}"):
        from_bytes(data, others[0], others[1])
    assert from_bytes(data, others[0], kind) == from_bytes(data, kind, others[0])


@pytest.mark.parametrize("opening", [b"[", b'{"kind":', b'{"kind":"prepare","plan":', b'{"kind":"update","site":['])
def test_deep_nesting_is_a_message_error(opening: bytes) -> None:
    tail = opening[-1:] if opening.endswith(b"[") else b'{"a":'
    for depth in (500, 20_000, 200_000):
        header = opening + tail * min(depth, (1 << 20) // len(tail) - len(opening))
        with pytest.raises(MessageError):
            parse_any(frame(header))
    balanced = b'{"kind":"prepare","plan":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(MessageError):
        parse_any(frame(balanced))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.KIND)
def test_a_payload_that_is_too_long_is_refused(
    make_plan: Make, monkeypatch: pytest.MonkeyPatch, kind: type[Message]
) -> None:
    monkeypatch.setattr(kind, "LONGEST", min(kind.LONGEST, 40))
    message = message_of(kind, make_plan(), b"x" * 40)
    assert parse_any(message.to_bytes()) == message
    with pytest.raises(MessageError, match="payload"):
        parse_any(message.to_bytes() + b"x")


def test_an_announced_length_allocates_nothing_and_is_refused() -> None:
    for length in (0xFFFFFFFF, 1 << 20, (1 << 20) + 1, 3):
        with pytest.raises(MessageError, match="truncated"):
            parse_any(frame(b"{}", length=length))


def test_a_header_above_a_mebibyte_is_refused_even_if_it_is_there() -> None:
    header = json.dumps({"kind": "declined", "site": SITE, "reason": "data", "x": "y" * (1 << 20)}).encode()
    with pytest.raises(MessageError):
        parse_any(frame(header))


@pytest.mark.parametrize("first", [b"FLM2", b"flm1", b"\0\0\0\0", b"", b"FLM", b"FLM1", b"FLM1\0\0\0"])
def test_other_first_bytes_are_refused(first: bytes) -> None:
    with pytest.raises(MessageError):
        parse_any(first + b"\0\0\0\x02{}" if len(first) == 4 and first != MAGIC else first)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (TrainRequest, "round", 0),
        (TrainRequest, "round", True),
        (TrainRequest, "head", {"number": -1, "digest": DIGEST}),
        (TrainRequest, "head", {"number": 2**63, "digest": DIGEST}),
        (TrainRequest, "head", {"number": "4", "digest": DIGEST}),
        (TrainRequest, "head", {"number": True, "digest": DIGEST}),
        (TrainRequest, "head", {"number": 4, "digest": DIGEST + "d"}),
        (TrainRequest, "head", {"number": 4, "digest": "\n"}),
        (TrainRequest, "head", {"number": 4, "digest": DIGEST, "site": "busan"}),
        (TrainRequest, "head", {"number": 4}),
        (TrainRequest, "head", [4, DIGEST]),
        (TrainReply, "statement", None),
        (TrainReply, "statement", "x" * (MAX_STATEMENT + 1)),
        (Ready, "site", ""),
        (Ready, "site", "x" * 201),
        (Declined, "reason", "because of the record of Kim Minji"),
        (Declined, "reason", None),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(make_plan: Make, kind: type[Message], field: str, value: Any) -> None:
    header = header_of(message_of(kind, make_plan()))
    with pytest.raises(MessageError, match=f"malformed {kind.KIND}"):
        parse_any(as_frame({**header, field: value}))


def test_a_plan_inside_a_message_is_validated_like_any_other(make_plan: Make) -> None:
    header = header_of(Prepare(plan=make_plan()))
    header["plan"]["privacy"]["noise_multiplier"] = None
    with pytest.raises(MessageError, match="malformed prepare"):
        parse_any(as_frame(header))


def test_a_refusal_tells_its_code_and_nothing_else() -> None:
    assert set(header_of(Declined(site=SITE, reason="data"))) == {"kind", "site", "reason"}
