"""How much time has passed, by evidence that setting the clock does not change.

The machine counts seconds since it was started, also while it sleeps, and every start has an id of its own. Within one
start the clock may not run ahead of that count; between two starts it may be ahead by as long as a machine is off.
"""

import time
from dataclasses import dataclass
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_COUNT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_CORRECTION = 3600.0  # seconds by which a clock may be put right
_OFF = 3 * 86_400.0  # seconds that a machine may have been off, or not been looked at before it was started anew


@dataclass(frozen=True)
class Moment:
    """A time by the clock, and by the count."""

    clock: float  # seconds since the epoch, UTC
    boot: str  # which start of the machine
    count: float  # seconds since that start


def this_moment() -> Moment:
    """Return what clock and count say now."""
    try:
        boot = _BOOT.read_text("ascii").strip()
    except (OSError, ValueError):
        boot = ""  # another system: a count that went back tells starts apart
    return Moment(time.time(), boot, time.clock_gettime(_COUNT))


def unexplained(first: Moment, seen: float, now: Moment) -> float:
    """Return the seconds by which the clock has gone ahead of the evidence; 0 where it has not.

    `first` was taken in the start of the machine in which the clock was last looked at, `seen` is what it said then.
    """
    if now.boot == first.boot and now.count >= first.count:
        ahead, permitted = (now.clock - first.clock) - (now.count - first.count), _CORRECTION
    else:
        ahead, permitted = now.clock - seen - now.count, _OFF
    return ahead if ahead > permitted else 0.0
