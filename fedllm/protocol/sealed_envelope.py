"""Sealed envelopes: a message tied to its run, round, direction, plan and request, readable by its receiver alone.

The transport and whoever runs it learn sizes and times. What a message is bound to lies inside the encryption.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, ValidationError

from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.errors import MessageError
from fedllm.values import Frozen, Printable

_LENGTH = 4  # bytes of the header's length
_MAX_HEADER = 1 << 14


class Binding(Frozen):
    """What a message belongs to."""

    direction: Literal["to-site", "to-head-office"]
    run: Printable = Field(min_length=1)
    plan: Printable  # digest
    round: int = Field(ge=0)  # 0: before the first round
    number: int = Field(ge=0)  # of a request: grows from message to message of a run. Of an answer: its request's
    request: Printable = ""  # of an answer: SHA-256 of the sealed request, hex


def seal(
    payload: bytes, binding: Binding, sender: Identity, receiver: PublicIdentity, seed: bytes | None = None
) -> bytes:
    """Return the sealed envelope of a message; with a secret `seed` of this message, the same each time."""
    header = binding.model_dump_json().encode()
    return sender.seal(len(header).to_bytes(_LENGTH, "big") + header + payload, receiver, seed)


def open_sealed(
    sealed: bytes, receiver: Identity, senders: Sequence[PublicIdentity]
) -> tuple[Binding, bytes, PublicIdentity]:
    """Return what an envelope is bound to, its message, and which of `senders` sealed it.

    Raises CryptoError if none of them did, or it is meant for somebody else, and MessageError if what they
    sealed is malformed.
    """
    plain, sender = receiver.open(sealed, senders)
    length = int.from_bytes(plain[:_LENGTH], "big")
    if len(plain) < _LENGTH or length > min(_MAX_HEADER, len(plain) - _LENGTH):
        raise MessageError("malformed envelope: its header is cut short")
    try:
        binding = Binding.model_validate(json.loads(plain[_LENGTH : _LENGTH + length]))
    except (ValidationError, ValueError, RecursionError):
        raise MessageError("malformed envelope header") from None
    return binding, plain[_LENGTH + length :], sender


def digest(sealed: bytes) -> str:
    """Return what an answer quotes of its request."""
    return hashlib.sha256(sealed).hexdigest()
