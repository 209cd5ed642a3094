"""A chain tells of every change to it: whatever is edited, removed, inserted, exchanged or signed by somebody else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.crypto.hash_chain import START, make_entry, open_entry, read_chain
from fedllm.crypto.identity import Identity
from fedllm.crypto.signed_documents import open_envelope, sign_envelope
from fedllm.errors import ChainError, CryptoError
from fedllm.protocol.spending_statement import Statement, open_statement, sign_statement, update_digest

SIGNER, SUCCESSOR, STRANGER = Identity.generate(), Identity.generate(), Identity.generate()


def append(lines: list[str], kind: str, body: dict[str, object], signer: Identity = SIGNER) -> None:
    previous = open_entry(lines[-1]).digest if lines else START
    lines.append(make_entry(len(lines), previous, kind, 1.5 * len(lines), body, signer))


def chain(length: int = 5, signer: Identity = SIGNER) -> list[str]:
    lines: list[str] = []
    for number in range(length):
        append(lines, "note", {"number": number, "text": "예산", "value": 1e-5, "nothing": None}, signer)
    return lines


CHAIN = chain()


def test_a_chain_comes_back_as_it_was_written() -> None:
    entries = read_chain(CHAIN, "x", [SIGNER.public])
    assert [entry.number for entry in entries] == [0, 1, 2, 3, 4]
    assert entries[3].body == {"number": 3, "text": "예산", "value": 1e-5, "nothing": None}
    assert {entry.signer for entry in entries} == {SIGNER.public}
    assert read_chain([], "x") == []
    assert all("\n" not in line for line in CHAIN)


@given(st.integers(0, len(CHAIN) - 1), st.data())
def test_any_flipped_bit_of_any_entry_is_found_and_the_entry_named(position: int, data: st.DataObject) -> None:
    line = bytearray(CHAIN[position].encode())
    line[data.draw(st.integers(0, len(line) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    altered = [*CHAIN[:position], line.decode("utf-8", "replace"), *CHAIN[position + 1 :]]
    with pytest.raises(ChainError, match=f"record, entry {position}:"):
        read_chain(altered, "record", [SIGNER.public])


CHANGES = {
    "the first removed": (CHAIN[1:], 0),
    "one removed": (CHAIN[:2] + CHAIN[3:], 2),
    "one twice": (CHAIN[:2] + CHAIN[1:], 2),
    "two exchanged": ([*CHAIN[:2], CHAIN[3], CHAIN[2], CHAIN[4]], 2),
    "the other way round": (CHAIN[::-1], 0),
    "one of another chain": ([*CHAIN[:2], chain(4)[2], *CHAIN[3:]], None),
    "an empty line": ([*CHAIN[:2], "", *CHAIN[2:]], 2),
    "written anew by a stranger": ([*CHAIN[:3], *chain(5, STRANGER)[3:]], 3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_other_change_is_found_too(change: str) -> None:
    lines, position = CHANGES[change]
    if position is None:
        assert read_chain(lines, "x"), "the very same entry is no change"
        return
    with pytest.raises(ChainError, match=f"entry {position}:"):
        read_chain(lines, "x")


def test_a_cut_tail_is_found_by_who_knows_a_later_digest() -> None:
    assert [entry.number for entry in read_chain(CHAIN[:3], "x")] == [0, 1, 2], "which is why others keep the head"


def test_a_whole_chain_by_somebody_else_is_found_by_who_knows_the_signer() -> None:
    with pytest.raises(ChainError, match="not trusted"):
        read_chain(chain(3, STRANGER), "x", [SIGNER.public])
    assert len(read_chain(chain(3, STRANGER), "x")) == 3


def test_a_key_hands_over_to_its_successor_and_both_readers_believe_it() -> None:
    lines = chain(2)
    append(lines, "key", {"identity": SUCCESSOR.public.to_text()})
    with pytest.raises(ChainError, match="not trusted"):
        read_chain(lines, "x", [SUCCESSOR.public])  # it has not said yet that it takes this over
    append(lines, "note", {}, SUCCESSOR)
    for trusted in ([SIGNER.public], [SUCCESSOR.public], [STRANGER.public, SUCCESSOR.public], None):
        assert len(read_chain(lines, "x", trusted)) == 4
    with pytest.raises(ChainError, match="not trusted"):
        read_chain(lines, "x", [STRANGER.public])


def test_a_key_that_nobody_handed_over_to_is_believed_by_those_alone_who_trust_it() -> None:
    lines = chain(2)
    append(lines, "key", {"identity": SUCCESSOR.public.to_text()}, SUCCESSOR)
    append(lines, "note", {}, SUCCESSOR)
    assert len(read_chain(lines, "x", [SUCCESSOR.public])) == 4
    for trusted in ([SIGNER.public], [STRANGER.public], None):
        with pytest.raises(ChainError, match="entry 2: signed by"):
            read_chain(lines, "x", trusted)


@pytest.mark.parametrize("identity", ["", "zz", "00" * 63, None, 5])
def test_a_key_entry_without_a_key_is_a_chain_error(identity: object) -> None:
    lines = chain(1)
    append(lines, "key", {"identity": identity})
    with pytest.raises(ChainError, match="entry 1:"):
        read_chain(lines, "x")


@given(st.text(max_size=60))
def test_text_that_is_no_entry_is_one_clear_error(text: str) -> None:
    for read in (open_entry, open_statement):
        with pytest.raises(CryptoError):
            read(text)


@pytest.mark.parametrize(
    "payload",
    [b"", b"[]", b"{}", b"null", b'{"number": 0}', b"\xff", b'{"signer": 1}', b"[" * 100_000],
)
def test_a_signed_payload_of_unknown_form_is_one_clear_error(payload: bytes) -> None:
    for read, kind in (
        (open_entry, "application/vnd.fedllm.entry+json"),
        (open_statement, "application/vnd.fedllm.statement+json"),
    ):
        with pytest.raises(CryptoError):
            read(sign_envelope(payload, kind, SIGNER))


def test_an_envelope_is_read_in_the_one_form_it_was_signed_in() -> None:
    """What is written anew is not what was signed, even where it means the same."""
    line = sign_envelope(b"payload", "type", SIGNER)
    assert open_envelope(line, "type") == (b"payload", SIGNER.public)
    fields = json.loads(line)
    variants = [
        json.dumps(fields), line + " ", json.dumps(fields, separators=(",", ":"), sort_keys=True).replace("=", ""),
        line.replace(SIGNER.public.to_text(), SIGNER.public.to_text().upper()),
    ]  # fmt: skip
    for variant in variants:
        with pytest.raises(CryptoError):
            open_envelope(variant, "type")
    with pytest.raises(CryptoError, match="another kind"):
        open_envelope(line, "another type")


def test_nobody_can_put_another_sealing_key_beside_the_signing_key() -> None:
    mixed = SIGNER.public.signing.hex() + STRANGER.public.sealing.hex()
    with pytest.raises(CryptoError):
        open_entry(CHAIN[0].replace(SIGNER.public.to_text(), mixed))


STATEMENT = Statement(
    "서울", "run", "p" * 64, 3, 1.5, 1.75, 1e-5, 12, "d" * 64, update_digest(b"update"), "e" * 64, 7, "f" * 64
)


def test_a_statement_comes_back_as_it_was_signed() -> None:
    line = sign_statement(STATEMENT, SIGNER)
    assert open_statement(line) == (STATEMENT, SIGNER.public)
    assert line == sign_statement(STATEMENT, SIGNER), "the same words have the same signature"
    with pytest.raises(CryptoError, match="another kind"):
        open_entry(line)


@given(st.data())
def test_any_flipped_bit_of_a_statement_is_found(data: st.DataObject) -> None:
    line = bytearray(sign_statement(STATEMENT, SIGNER).encode())
    line[data.draw(st.integers(0, len(line) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CryptoError):
        open_statement(line.decode("utf-8", "replace"))
