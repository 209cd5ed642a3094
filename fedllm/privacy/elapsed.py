"""How much time has passed, by evidence that setting the clock does not change.

The machine counts seconds since it was started, also while it sleeps, and every start has an id of its own. Within one
start the clock may not run ahead of that count; between two starts it may be ahead by as long as a machine is off.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field, field_validator

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_COUNT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_CORRECTION = 3600.0  # seconds by which a clock may be put right
_OFF = 3 * 86_400.0  # seconds that a machine may have been off, or not been looked at before it was started anew
SHORTEST_PERIOD = 7.0  # days: what a start with the clock ahead may free, three days' worth, is less than half of it


class Period(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """What may be spent in any `days` at a stretch, beside the whole budget."""

    days: float = Field(gt=0, le=36_500)
    """Length of the period in days, at least 7. A period needs both of its settings."""
    epsilon: float = Field(gt=0)
    """The most that all runs of any such period may cost."""

    @field_validator("days")
    @classmethod
    def _long_enough(cls, days: float) -> float:
        if days < SHORTEST_PERIOD:
            raise ValueError(
                f"expected at least {SHORTEST_PERIOD:g} days, found {days:g}: a machine may be off for three, so that "
                "a start with the clock ahead could free all that a shorter period has spent"
            )
        return days


@dataclass(frozen=True)
class Moment:
    """A time by the clock, and by the count."""

    clock: float  # seconds since the epoch, UTC
    boot: str  # which start of the machine
    count: float  # seconds since that start


def this_moment() -> Moment:
    """Return what clock and count say now."""
    try:
        boot = _BOOT.read_text("utf-8").strip()
    except (OSError, ValueError):
        boot = ""  # another system: a count that went back tells starts apart
    return Moment(time.time(), boot, time.clock_gettime(_COUNT))


@dataclass(frozen=True)
class Evidence:
    """What is known of the time: the first look in a start of the machine, and the latest time that was believed."""

    first: Moment
    seen: float

    def at_least(self, now: Moment) -> float:
        """Return the time that it is at the least, whatever the clock says."""
        return max(self.seen, self._counted(now))

    def unexplained(self, now: Moment) -> float:
        """Return the seconds by which the clock has gone ahead; 0 if it has not, or by no more than it may."""
        ahead = now.clock - self._counted(now)  # from the first look: corrections do not add up
        return ahead if ahead > (_CORRECTION if self._same_start(now) else _OFF) else 0.0

    def after(self, now: Moment) -> "Evidence":
        """Return what is known once the clock was believed `now`."""
        return Evidence(self.first if self._same_start(now) else now, max(self.at_least(now), now.clock))

    def _counted(self, now: Moment) -> float:
        if self._same_start(now):
            return self.first.clock + (now.count - self.first.count)
        return self.seen + now.count

    def _same_start(self, now: Moment) -> bool:
        return now.boot == self.first.boot and now.count >= self.first.count
