"""Events of a run (Phase, RoundStarted, SiteAnswered) for a screen or a log, and RoundMetrics: metrics.jsonl."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedllm.errors import CheckpointError
from fedllm.protocol.messages import Reason
from server.checkpoint import write_atomically

CHECKPOINT, METRICS, PLAN = "checkpoint.safetensors", "metrics.jsonl", "plan.json"


@dataclass(frozen=True)
class RoundMetrics:
    """What one round did; everything in it is public. Round 0 is the base model."""

    round: int
    private: bool  # False brands the run NOT PRIVATE: no noise, or noise that a seed predicts
    epsilon: float | None  # the largest any site has spent so far; None if no noise was added
    loss: float | None = None  # held-out, nats; None without a held-out set
    perplexity: float | None = None
    accuracy: float | None = None
    answered: list[str] = field(default_factory=list)
    declined: dict[str, Reason] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # site or node -> what was wrong
    # noise in shares: of this round's sum, or of that of its groups which has the least; colluding sites left out
    noise_multiplier: float | None = None
    without: dict[str, str] = field(default_factory=dict)  # group, from 1, whose sum was not used -> why
    lost: str = ""  # why the round was not applied, though the sites have paid for it: not unmasked, bound or gate
    update_norm: float = 0.0  # L2 of the averaged update
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    # what the sites' own evaluation records say of this round's adapter: units, and metrics, each with its estimate and
    # the ends of a 95 % interval; {} if it was not scored
    at_sites: dict[str, list[float]] = field(default_factory=dict)
    clipped: float | None = None  # fraction of (some) held-out records whose gradient is longer than clip_norm


@dataclass(frozen=True)
class SiteAnswered:
    """A site's answer to the current round has come in."""

    round: int
    site: str
    used: bool
    detail: str = ""


@dataclass(frozen=True)
class RoundStarted:
    """A round begins with these sites."""

    round: int
    sites: list[str]


@dataclass(frozen=True)
class Phase:
    """What is being done outside the rounds, in words for the screen."""

    text: str


Event = Phase | RoundStarted | SiteAnswered | RoundMetrics


def read_records(path: Path) -> list[RoundMetrics]:
    """Read metrics, leaving out a last line that was cut short; raises CheckpointError if another is damaged."""
    records = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Restore it from a backup.") from error
    for number, line in enumerate(lines, start=1):
        try:
            records.append(RoundMetrics(**json.loads(line.decode())))
        except (ValueError, TypeError):
            if number < len(lines):
                raise CheckpointError(f"{path}, line {number}: damaged. Restore it from a backup.") from None
    return records


def write_records(path: Path, records: list[RoundMetrics]) -> None:
    lines = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
    write_atomically(path, lines.encode())
