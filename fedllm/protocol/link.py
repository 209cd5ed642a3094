"""The link's frames (link.proto, beside this file) as both ends use them: parts of payloads, and gRPC's settings."""

import asyncio
import hashlib
import signal
import time
from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from fedllm.errors import MessageError
from fedllm.protocol.link_pb2 import Part
from fedllm.shown import escaped

VERSION = 1
LINK = "fedllm.link.Link"
CONNECT = f"/{LINK}/Connect"
CONTROL = "fedllm.link.Control"
ID = 32  # bytes of a request's id
PART = 1 << 20  # bytes of a payload in one frame
_FRAME = PART + (1 << 16)  # bytes of a frame at most
AHEAD = 4  # parts that may wait for a slow reader before gRPC's own flow control holds its writer back

# A peer that is gone without a word is noticed in the sum of both, in seconds; also while nothing is sent.
_PING, _PATIENCE = 10, 8
# From which a request was read may be any site: HELLO is the time in which it must say so.
HELLO = 20.0  # seconds

OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", _FRAME),
    ("grpc.max_send_message_length", _FRAME),
    ("grpc.keepalive_time_ms", 1000 * _PING),
    ("grpc.keepalive_timeout_ms", 1000 * _PATIENCE),
    ("grpc.http2.ping_timeout_ms", 1000 * _PATIENCE),  # a minute by default, and the longer of the two counts
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),  # as many as it takes
]

SERVER_OPTIONS: list[tuple[str, int]] = [
    *OPTIONS,
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 500 * _PING),  # as often as the other end's pings may come
]

_Frame = TypeVar("_Frame", bound=Message)


def read(kind: type[_Frame], data: bytes) -> _Frame:
    """Return a frame; raises MessageError if it is malformed."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise MessageError(f"{len(data)} bytes that are no frame of the link") from None


def request_id(payload: bytes) -> bytes:
    """Return the id of a request, 32 bytes: the same request, asked again, has the same."""
    return hashlib.sha256(payload).digest()


def parts(id_: bytes, payload: bytes) -> Iterator[Part]:
    """Cut a payload into its parts, at least one."""
    view = memoryview(payload)
    for start in range(0, max(1, len(payload)), PART):
        yield Part(id=id_, size=len(payload), data=bytes(view[start : start + PART]))


class Payload:
    """A payload of which parts arrive."""

    def __init__(self, first: Part, limit: int) -> None:
        """Raise MessageError if it is to be longer than `limit` bytes."""
        if first.size > limit:
            raise MessageError(f"a payload of {first.size} bytes, and at most {limit} are taken")
        self.size, self._data = first.size, bytearray()

    def add(self, part: Part) -> bytes | None:
        """Take the next part; returns the payload when it is whole. Raises MessageError if they do not fit."""
        self._data += part.data
        if part.size != self.size or len(self._data) > self.size or not (part.data or self.size == 0):
            raise MessageError("parts of a payload that do not fit together")
        return bytes(self._data) if len(self._data) == self.size else None


def plain(text: str) -> str:
    """Return what the other end says in a form that may be shown: one line of printable signs, 300 at most."""
    return escaped(text[:300])


def told_to_end() -> asyncio.Event:
    """Return what SIGTERM and SIGINT set from now on, in the running loop."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def milliseconds() -> int:
    """Return this machine's clock, milliseconds since 1970 UTC."""
    return time.time_ns() // 1_000_000
