"""The messages between head office and a site: one frozen type each, to bytes and back.

A frame is MAGIC, the length of the header (uint32, big endian), the header (UTF-8 JSON) and the payload, which is the
rest. Hostile or damaged bytes raise MessageError and nothing else.
"""

import json
from typing import ClassVar, Literal, TypeVar

from pydantic import Field, ValidationError

from fedllm.codec import WireDtype
from fedllm.errors import MessageError
from fedllm.plan import Frozen, RunPlan

MAGIC = b"FLM1"
RECORD, KEY = "fedllm", "message"  # where the transport's envelope holds a message: record and key
MAX_NAME = 200  # characters of a site's name
MAX_STATEMENT = 16_384  # characters
_MAX_HEADER = 1 << 20

# Why a site takes no part. The code is all that head office learns; the particulars stay in the site's own log.
Reason = Literal[
    "budget",  # the privacy budget does not admit the round
    "policy",  # the plan asks for something that the site does not permit
    "data",  # the records cannot be used
    "model",  # the base model or adapter cannot be loaded
    "training",  # training gave no finite update
    "ledger",  # the ledger cannot be used, or the round was charged for another request
    "message",  # the request was not understood
    "internal",  # a fault in the site's software
]


class Message(Frozen):
    """Base of all messages; `payload` travels behind the JSON header."""

    KIND: ClassVar[str] = ""
    payload: bytes = b""

    def to_bytes(self) -> bytes:
        """Return the frame."""
        header = {"kind": self.KIND, **self.model_dump(mode="json", exclude={"payload"})}
        encoded = json.dumps(header, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        return MAGIC + len(encoded).to_bytes(4, "big") + encoded + self.payload


class Prepare(Message):
    """Head office announces a run; nothing is trained yet."""

    KIND: ClassVar[str] = "prepare"
    plan: RunPlan


class Ready(Message):
    """The site admits the plan, and has loaded model and records."""

    KIND: ClassVar[str] = "ready"
    site: str = Field(min_length=1, max_length=MAX_NAME)
    plan_digest: str
    spec_digest: str


class LedgerHead(Frozen):
    """The entry of the site's ledger that head office saw last: a ledger without it was cut or put back."""

    number: int = Field(ge=0)
    digest: str = Field(max_length=64)


class TrainRequest(Message):
    """One round: train from the adapter in the payload (float32[d])."""

    KIND: ClassVar[str] = "train"
    plan: RunPlan
    round: int = Field(ge=1)
    spec_digest: str
    head: LedgerHead | None  # None: nothing was seen yet


class TrainReply(Message):
    """The site's update (the payload), what it has spent so far on these records, and its signed word on both."""

    KIND: ClassVar[str] = "update"
    site: str = Field(min_length=1, max_length=MAX_NAME)
    plan_digest: str
    round: int = Field(ge=1)
    spec_digest: str
    dtype: WireDtype
    epsilon: float | None = Field(ge=0)  # PLD; None where no noise was added
    epsilon_rdp: float | None = Field(ge=0)
    delta: float
    statement: str = Field(max_length=MAX_STATEMENT)  # fedllm.statement


class Declined(Message):
    """The site takes no part in the round, or in the run: an ordinary reply, not an error."""

    KIND: ClassVar[str] = "declined"
    site: str = Field(min_length=1, max_length=MAX_NAME)
    reason: Reason


_A = TypeVar("_A", bound=Message)
_B = TypeVar("_B", bound=Message)
_KINDS: dict[str, type[Message]] = {kind.KIND: kind for kind in (Prepare, Ready, TrainRequest, TrainReply, Declined)}


def from_bytes(data: bytes, first: type[_A], second: type[_B]) -> _A | _B:
    """Parse a frame that must be of one of two kinds; raises MessageError on anything else."""
    if data[:4] != MAGIC or len(data) < 8:
        raise MessageError("not a fedllm message: wrong first bytes. Do both ends run the same version?")
    length = int.from_bytes(data[4:8], "big")
    if length > min(_MAX_HEADER, len(data) - 8):
        raise MessageError(f"truncated message: header of {length} bytes announced, {len(data) - 8} bytes left")
    try:
        header = json.loads(data[8 : 8 + length].decode())
        kind = _KINDS[header.pop("kind")]
        body = json.dumps(header)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MessageError(f"malformed message header ({type(error).__name__})") from None
    if not issubclass(kind, (first, second)):
        raise MessageError(f"unexpected message kind={kind.KIND}, expected {first.KIND} or {second.KIND}")
    if "payload" in header:
        raise MessageError("malformed message header (payload)")
    try:
        message = kind.model_validate_json(body)
    except (ValidationError, RecursionError) as error:
        where = error.errors()[0]["loc"] if isinstance(error, ValidationError) else "nesting"
        raise MessageError(f"malformed {kind.KIND} message at {where}") from None
    return message.model_copy(update={"payload": data[8 + length :]})
