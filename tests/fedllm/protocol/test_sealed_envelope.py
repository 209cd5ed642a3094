"""Sealed envelopes: what they are bound to is read by the receiver alone, and hostile bytes are one kind of error."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.crypto.identity import Identity
from fedllm.errors import CryptoError, MessageError
from fedllm.protocol import sealed_envelope
from fedllm.protocol.sealed_envelope import Binding, digest, open_sealed, seal
from tests.conftest import SHOWN

HEAD, SITE, STRANGER = Identity.generate(), Identity.generate(), Identity.generate()
BOUND = Binding(direction="to-site", run="시험-run", plan="0" * 64, round=3, number=7)


def raw(plain: bytes, sender: Identity = HEAD) -> bytes:
    """What a sender with the right key could seal: anything."""
    return sender.seal(plain, SITE.public)


def framed(header: bytes, payload: bytes = b"payload") -> bytes:
    return len(header).to_bytes(4, "big") + header + payload


bindings = st.builds(
    Binding, direction=st.sampled_from(["to-site", "to-head-office"]), run=st.text(SHOWN, min_size=1, max_size=50),
    plan=st.text(SHOWN, max_size=70), round=st.integers(0, 2**63), number=st.integers(0, 2**63),
    request=st.text(SHOWN, max_size=70),
)  # fmt: skip


@given(bindings, st.binary(max_size=5000))
def test_what_is_sealed_is_opened_with_its_binding_and_sender(binding: Binding, payload: bytes) -> None:
    sealed = seal(payload, binding, HEAD, SITE.public)
    assert open_sealed(sealed, SITE, [STRANGER.public, HEAD.public]) == (binding, payload, HEAD.public)


def test_the_transport_learns_nothing_but_the_size() -> None:
    sealed = seal(b"payload", BOUND, HEAD, SITE.public)
    for secret in (b"payload", b"run", b"to-site", "시험".encode(), HEAD.public.signing, SITE.public.signing,
                   HEAD.public.sealing, SITE.public.sealing):  # fmt: skip
        assert secret not in sealed
    longer = seal(b"payload!", BOUND, HEAD, SITE.public)
    assert len(longer) == len(sealed) + 1
    assert seal(b"payload", BOUND, HEAD, SITE.public) != sealed


@pytest.mark.parametrize(("receiver", "senders"), [(SITE, [STRANGER]), (SITE, []), (STRANGER, [HEAD]), (SITE, [SITE])])
def test_a_wrong_sender_or_receiver_opens_nothing(receiver: Identity, senders: list[Identity]) -> None:
    with pytest.raises(CryptoError):
        open_sealed(seal(b"payload", BOUND, HEAD, SITE.public), receiver, [sender.public for sender in senders])


@given(st.binary(max_size=300))
def test_bytes_of_anybody_are_refused(data: bytes) -> None:
    with pytest.raises(CryptoError):
        open_sealed(data, SITE, [HEAD.public])


@given(st.data())
def test_a_change_of_any_bit_is_noticed(data: st.DataObject) -> None:
    sealed = bytearray(seal(b"payload", BOUND, HEAD, SITE.public))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CryptoError):
        open_sealed(bytes(sealed), SITE, [HEAD.public])


@given(st.integers(0, 400))
def test_a_part_is_refused(length: int) -> None:
    sealed = seal(b"payload", BOUND, HEAD, SITE.public)
    with pytest.raises(CryptoError):
        open_sealed(sealed[: min(length, len(sealed) - 1)], SITE, [HEAD.public])


@given(st.binary(max_size=300))
def test_bytes_of_a_known_sender_are_an_envelope_or_malformed(plain: bytes) -> None:
    with pytest.raises(MessageError):
        open_sealed(raw(plain), SITE, [HEAD.public])


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*Binding.model_fields, "more"]), _json) | _json)
def test_a_header_of_a_known_sender_is_a_binding_or_malformed(header: object) -> None:
    try:
        found, payload, _ = open_sealed(raw(framed(json.dumps(header).encode())), SITE, [HEAD.public])
    except MessageError:
        return
    assert payload == b"payload"
    assert Binding.model_validate(found.model_dump()) == found


HEADER = BOUND.model_dump_json().encode()


@pytest.mark.parametrize(
    "plain",
    [
        b"",
        b"\0\0\0",
        b"\xff\xff\xff\xff" + HEADER,
        (len(HEADER) + 1).to_bytes(4, "big") + HEADER,
        framed(b" " * (1 << 14) + HEADER),
        framed(b"\xff\xfe"),
        framed(b"[" * 8000),
        framed(HEADER.replace(b'"round":3', b'"round":-1')),
        framed(HEADER.replace(b'"round":3', b'"round":NaN')),
        framed(HEADER.replace(b"to-site", b"to-nobody")),
        framed(HEADER[:-1] + b',"more":1}'),
        framed(HEADER[:-1]),
    ],
    ids=["empty", "cut", "huge", "one too many", "long", "not UTF-8", "deep", "negative", "NaN", "direction", "unknown",
         "open"],
)  # fmt: skip
def test_a_malformed_envelope_of_a_known_sender_is_one_clear_error(plain: bytes) -> None:
    with pytest.raises(MessageError, match="malformed envelope"):
        open_sealed(raw(plain), SITE, [HEAD.public])


def test_an_answer_quotes_its_request_as_it_was_sealed() -> None:
    first, second = (seal(b"payload", BOUND, HEAD, SITE.public) for _ in range(2))
    assert digest(first) != digest(second), "two requests with the same words are two requests"
    assert digest(first) == digest(bytes(first))
    assert len(digest(first)) == 64


def test_the_header_may_be_as_long_as_a_run_and_a_plan_can_be() -> None:
    long = BOUND.model_copy(update={"run": "가" * 200, "plan": "f" * 64, "request": "f" * 64})
    assert open_sealed(seal(b"", long, HEAD, SITE.public), SITE, [HEAD.public])[0] == long
    assert sealed_envelope._MAX_HEADER > 4 * 1000
