"""Between courier and site service: one request and one answer as streams of chunks, on a unix socket (gRPC)."""

import contextlib
import time
from collections.abc import Iterable, Iterator

import grpc

SERVICE, METHOD = "fedllm.Site", "Handle"
CHUNK = 1 << 20  # bytes; gRPC's own limit for one message is 4 MiB
_PATIENCE = 30.0  # seconds for a service that is being started again
_RETRY = [("grpc.initial_reconnect_backoff_ms", 250), ("grpc.max_reconnect_backoff_ms", 1000)]


def chunks(data: bytes) -> Iterator[bytes]:
    """Cut bytes into chunks, at least one."""
    view = memoryview(data)
    for start in range(0, max(1, len(data)), CHUNK):
        yield bytes(view[start : start + CHUNK])


def join(parts: Iterable[bytes], limit: int | None = None) -> bytes:
    """Put chunks together; raises OverflowError as soon as there are more than `limit` bytes."""
    data = bytearray()
    for part in parts:
        data += part
        if limit is not None and len(data) > limit:
            raise OverflowError(f"more than {limit} bytes")
    return bytes(data)


def ask(socket: str, request: bytes, timeout: float) -> bytes:
    """Hand a request to the site service behind a unix socket and return its answer.

    Waits at most `timeout` seconds, and for a service that is not there only a part of it; if this process ends or the
    time is up, the service gives the request up. Raises grpc.RpcError where there is no answer.
    """
    deadline = time.monotonic() + timeout
    with grpc.insecure_channel(f"unix:{socket}", _RETRY) as channel:
        with contextlib.suppress(grpc.FutureTimeoutError):  # the call itself will tell
            grpc.channel_ready_future(channel).result(min(timeout / 2, _PATIENCE))
        method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        return join(method(chunks(request), timeout=max(0.0, deadline - time.monotonic())))
