"""Between courier and site service: one request and one answer as streams of chunks, on a unix socket (gRPC)."""

from collections.abc import Iterable, Iterator

import grpc

SERVICE, METHOD = "fedllm.Site", "Handle"
CHUNK = 1 << 20  # bytes; gRPC's own limit for one message is 4 MiB


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

    Waits at most `timeout` seconds; if this process ends or the time is up, the service gives the request up. Raises
    grpc.RpcError where there is no answer.
    """
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        return join(method(chunks(request), timeout=timeout))
