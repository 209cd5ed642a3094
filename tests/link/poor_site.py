"""A site for test_poor_line.py, in a process of its own: answers every request with as many bytes as were asked for."""

import asyncio
import signal
import sys
import threading
from pathlib import Path

from client.link import SiteLink
from client.service import outside


def answer(request: bytes, stop: threading.Event) -> bytes:
    """Return random-looking bytes: the first 8 of a request say how many."""
    del stop
    return (request[8:] * 2)[: int.from_bytes(request[:8], "big")]


async def run(address: str, ca: Path, key: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await SiteLink(*outside(address, ca, key), answer, 1 << 28, key.with_suffix(".json")).run(stop)


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
