"""The messages between the server and a site: one frozen type each, to bytes and back.

A frame is MAGIC, the length of the header (uint32, big endian), the header (UTF-8 JSON) and the payload, which is the
rest. Hostile or damaged bytes raise MessageError and nothing else.
"""

import hashlib
import json
from typing import Annotated, ClassVar, Literal, TypeVar, overload

from pydantic import AfterValidator, Field, ValidationError

from fedllm.canonical import digest_of
from fedllm.crypto.hash_chain import LedgerHead
from fedllm.errors import MessageError
from fedllm.plan import RunPlan
from fedllm.shown import shows
from fedllm.values import MAX_HOLDERS, MAX_ROUNDS, MAX_SITES, Frozen, Name, Names, Printable

MAGIC = b"FLM1"
ENVELOPE_RECORD, ENVELOPE_KEY = "fedllm", "message"  # where the transport's envelope holds a message: record and key
MAX_STATEMENT = 16_384  # characters
_MAX_HEADER = 1 << 20
_NOTHING, _LITTLE = 0, 1 << 20  # bytes of a payload: none; secrets of secure aggregation, and requests for them
_VECTOR = 1 << 36  # bytes: as much as a site may permit (resources.max_message_mb); its length is checked by its reader

# Why a site takes no part. The code is all that the server learns; the particulars stay in the site's own log. None of
# them is a function of a record; behind each stands what it is a function of.
Reason = Literal[
    "budget",  # the privacy budget does not admit the round: plan, policy, ledger
    "policy",  # the plan asks for something that the site does not permit: plan, policy; or the self-check failed
    "data",  # the plan does not fit what the owner has declared of the records: plan, declaration
    "model",  # the base model or adapter cannot be loaded, or needs more memory than there is: plan, model, machine
    "training",  # training gave no finite update: the noised update, which is paid for
    "ledger",  # the ledger cannot be used, or the round was charged for another request: ledger, request, disk
    "message",  # the request was not understood: request
    "masks",  # its secrets of the round are lost or do not fit, it needs new keys: request, what it was sent before
    "internal",  # a fault of software or disk that no record has a part in, before or after training
]


Hex32 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Digest = Annotated[Printable, Field(max_length=64)]  # to compare with
Hex64 = Annotated[str, Field(pattern="^[0-9a-f]{128}$")]
Round = Annotated[int, Field(ge=1, le=MAX_ROUNDS + 1)]  # and the closing exchange


class Message(Frozen):
    """Base of all messages; `payload` travels behind the JSON header."""

    KIND: ClassVar[str] = ""
    LONGEST: ClassVar[int] = _NOTHING  # payload, bytes
    payload: bytes = b""

    def to_bytes(self) -> bytes:
        """Return the frame."""
        header = {"kind": self.KIND, **self.model_dump(mode="json", exclude={"payload"})}
        encoded = json.dumps(header, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        return MAGIC + len(encoded).to_bytes(4, "big") + encoded + self.payload


class Prepare(Message):
    """The server announces a run; nothing is trained yet."""

    KIND: ClassVar[str] = "prepare"
    plan: RunPlan
    session: Hex32 | None = None  # of secure aggregation, if the plan asks for it
    # of all sites, name to identity; what a site makes of it is its own affair
    roster: dict[Name, Annotated[Printable, Field(max_length=200)]] = Field({}, max_length=MAX_SITES)


class Ready(Message):
    """The site admits the plan, and has loaded the model; the payload is its AdvertiseKeys, if there is a session."""

    KIND: ClassVar[str] = "ready"
    LONGEST = _LITTLE
    site: Name
    plan_digest: Digest
    spec_digest: Digest


def _of_an_entry(head: LedgerHead) -> LedgerHead:
    if head.number < 0 or not shows(head.digest):
        raise ValueError("no entry of a ledger")
    return head


SeenHead = Annotated[LedgerHead, AfterValidator(_of_an_entry)]  # by the server: a ledger without it was cut or put back


class RoundBegun(Frozen):
    """Whom the server asks in a round, and the entry of its run log that says so; every site signs for both."""

    roster: str = Field(pattern="^[0-9a-f]{64}$")  # fedllm.protocol.spending_statement.roster_digest
    number: int = Field(ge=0, lt=2**63)  # of the entry
    digest: str = Field(pattern="^[0-9a-f]{64}$")


class TrainRequest(Message):
    """One round: train from the adapter in the payload (float32[d]).

    With noise in shares, the payload is two parts (`pack`): the adapter, and a MaskRequest.
    """

    KIND: ClassVar[str] = "train"
    LONGEST = _VECTOR
    plan: RunPlan
    round: Round
    spec_digest: Digest
    head: SeenHead | None  # None: nothing was seen yet
    begun: RoundBegun

    def task(self, adapter: bytes) -> str:
        """Return the digest, 64 hex, of what is the same for all sites of a round; `adapter` is of the payload."""
        begun, start = self.begun.model_dump(), hashlib.sha256(adapter).hexdigest()
        return digest_of([self.plan.digest, self.round, self.spec_digest, begun, start])


class TrainReply(Message):
    """The site's update (the payload), and its signed word on it and on what it has spent so far on these records.

    All that is said of the update is in the statement. With noise in shares, the payload is two parts (`pack`): Masked,
    and Shares of the next round, or nothing.
    """

    KIND: ClassVar[str] = "update"
    LONGEST = _VECTOR
    statement: Printable = Field(max_length=MAX_STATEMENT)  # fedllm.protocol.spending_statement


class SecAggRequest(Message):
    """A request of secure aggregation, in the payload, in the run of a plan: the answer is a message of its own."""

    KIND: ClassVar[str] = "secure"
    LONGEST = 2 * _LITTLE
    plan: RunPlan
    round: Round


class Declined(Message):
    """The site takes no part in the round, or in the run: an ordinary reply, not an error."""

    KIND: ClassVar[str] = "declined"
    site: Name
    reason: Reason


# ---- secure aggregation (fedllm.secagg): keys, digests and signatures in hexadecimal, bulk in the payload ------------


class AdvertisedKey(Frozen):
    """The X25519 key that a site takes shares with, for as long as its process lives."""

    site: Name
    key: Hex32
    signature: Hex64


class SignedMaskKey(Frozen):
    """The public part of what a site deals out for one round."""

    site: Name
    key: Hex32  # X25519: its pairwise masks of this round
    commitment: Hex32  # to the seed of its own mask
    signature: Hex64


class Signed(Frozen):
    """A site's signature under the round's list of survivors."""

    site: Name
    signature: Hex64


class _UnderTerms(Message):
    """Base of all messages of secure aggregation."""

    context: Hex32  # digest of the session's parameters


class _OfRound(_UnderTerms):
    """Base of those that belong to a round."""

    round: Round
    joins: Hex32  # digest of the list of advertised keys


class AdvertiseKeys(_UnderTerms):
    """Site: takes part in secure aggregation with this key, under these parameters (round 0 of Bonawitz et al.)."""

    KIND: ClassVar[str] = "secagg-join"
    join: AdvertisedKey


class ShareKeysRequest(_UnderTerms):
    """The server: share the secrets of a round among these sites."""

    KIND: ClassVar[str] = "secagg-share"
    round: Round
    joins: Annotated[tuple[AdvertisedKey, ...], Field(max_length=MAX_HOLDERS)]  # empty: those of the request before


class KeyShares(_OfRound):
    """Site: its signed mask key; the payload seals a pair of shares to every other site, in their order."""

    KIND: ClassVar[str] = "secagg-shares"
    LONGEST = _LITTLE
    dealing: SignedMaskKey


class MaskedInputRequest(_OfRound):
    """The server: these sites shared their secrets; the payload is what they sealed to the receiver, in their order."""

    KIND: ClassVar[str] = "secagg-mask"
    LONGEST = _LITTLE
    dealings: Annotated[tuple[SignedMaskKey, ...], Field(max_length=MAX_HOLDERS)]


class MaskedInput(_OfRound):
    """Site: its masked vector, uint32[d], little-endian."""

    KIND: ClassVar[str] = "secagg-masked"
    LONGEST = _VECTOR
    site: Name


class ConsistencyCheck(_OfRound):
    """The server: these sites uploaded, and those that shared secrets but did not upload dropped out."""

    KIND: ClassVar[str] = "secagg-unmask"
    common: Hex32  # digest of what all of them were asked for
    survivors: Names
    dropped: Names


class ConsistencySignature(_OfRound):
    """Site: will reveal shares for this list of survivors, and in this round for no other."""

    KIND: ClassVar[str] = "secagg-consent"
    consent: Signed


class UnmaskingRequest(_OfRound):
    """The server: enough survivors have signed the list."""

    KIND: ClassVar[str] = "secagg-reveal"
    consents: Annotated[tuple[Signed, ...], Field(max_length=MAX_HOLDERS)]


class UnmaskingShares(_OfRound):
    """Site: one share of 32 bytes for every participant, in their order."""

    KIND: ClassVar[str] = "secagg-revealed"
    LONGEST = _LITTLE
    site: Name
    claim: Hex32  # digest of the list of survivors that this answers
    surplus: Annotated[tuple[Hex32, ...], Field(max_length=16)]  # seeds of noise that the sum does not need


_A = TypeVar("_A", bound=Message)
_B = TypeVar("_B", bound=Message)
_C = TypeVar("_C", bound=Message)
_KINDS: dict[str, type[Message]] = {
    kind.KIND: kind
    for kind in (
        Prepare, Ready, TrainRequest, TrainReply, SecAggRequest, Declined, AdvertiseKeys, ShareKeysRequest, KeyShares,
        MaskedInputRequest, MaskedInput, ConsistencyCheck, ConsistencySignature, UnmaskingRequest, UnmaskingShares,
    )
}  # fmt: skip


def pack(*parts: bytes) -> bytes:
    """Return parts as one payload: each after its length (uint64, big endian)."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def unpack(payload: bytes, parts: int) -> list[bytes]:
    """Return the parts of a payload; raises MessageError if it is not exactly so many."""
    found, position = [], 0
    for _ in range(parts):
        length = int.from_bytes(payload[position : position + 8], "big")
        if position + 8 + length > len(payload):
            raise MessageError(f"a payload of {len(payload)} bytes is not the {parts} parts that were expected")
        found.append(payload[position + 8 : position + 8 + length])
        position += 8 + length
    if position != len(payload):
        raise MessageError(f"{len(payload) - position} bytes are left over after {parts} parts")
    return found


@overload
def from_bytes(data: bytes, first: type[_A], second: type[_B], /) -> _A | _B: ...


@overload
def from_bytes(data: bytes, first: type[_A], second: type[_B], third: type[_C], /) -> _A | _B | _C: ...


def from_bytes(data: bytes, *kinds: type[Message]) -> Message:
    """Parse a frame that must be of one of these kinds; raises MessageError on anything else."""
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
    if not issubclass(kind, kinds):
        raise MessageError(f"unexpected message kind={kind.KIND}, expected {' or '.join(k.KIND for k in kinds)}")
    if "payload" in header:
        raise MessageError("malformed message header (payload)")
    if len(data) - 8 - length > kind.LONGEST:
        raise MessageError(
            f"{len(data) - 8 - length} bytes of payload in a {kind.KIND} message, expected {kind.LONGEST}"
        )
    try:
        message = kind.model_validate_json(body)
    except (ValidationError, RecursionError) as error:
        where = error.errors()[0]["loc"] if isinstance(error, ValidationError) else "nesting"
        raise MessageError(f"malformed {kind.KIND} message at {where}") from None
    return message.model_copy(update={"payload": data[8 + length :]})
