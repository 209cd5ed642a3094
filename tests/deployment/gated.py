"""`fedllm site start`, whose site waits where a test holds it: python -m tests.deployment.gated GATE site start ...

The phases of a round are prepare, deal, train and reveal. In the folder GATE a file `hold-PHASE` holds what is asked
before the site sees it, and `hold-PHASE-answered` holds its answer; `at-...` says that something waits there.
"""

import sys
import threading
import time
from pathlib import Path

from client.site import Site
from fedllm.cli import main as cli
from fedllm.protocol.messages import (
    ConsistencyCheck,
    Prepare,
    SecAggRequest,
    ShareKeysRequest,
    TrainRequest,
    UnmaskingRequest,
    from_bytes,
)

_gate = Path(sys.argv.pop(1))
_handle = Site.handle


def _phase(request: bytes) -> str:
    message = from_bytes(request, Prepare, TrainRequest, SecAggRequest)
    if isinstance(message, SecAggRequest):
        step = from_bytes(message.payload, ShareKeysRequest, ConsistencyCheck, UnmaskingRequest)
        return "deal" if isinstance(step, ShareKeysRequest) else "reveal"
    return "prepare" if isinstance(message, Prepare) else "train"


def _wait(where: str) -> None:
    if (hold := _gate / f"hold-{where}").exists():
        (_gate / f"at-{where}").touch()
        while hold.exists():
            time.sleep(0.01)


def _gated(site: Site, request: bytes, stop: threading.Event | None = None) -> bytes:
    phase = _phase(request)
    _wait(phase)
    answer = _handle(site, request, stop)
    _wait(f"{phase}-answered")
    return answer


if __name__ == "__main__":
    Site.handle = _gated  # type: ignore[method-assign]
    cli.main()
