"""What a site knows of adapters on its own records, exactly: a file for its owner, which nobody else is told of."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedllm.errors import FolderError
from fedllm.files import read_secret

_log = logging.getLogger("fedllm.site")
_FILE = "scores.jsonl"


@dataclass(frozen=True)
class OwnScore:
    """How good the adapter after a round is on the site's evaluation units, without noise."""

    run: str
    round: int  # 0: as the run began
    units: int  # that were scored
    metrics: Mapping[str, float] = field(default_factory=dict)  # means, by name; none without units


def note_score(ledger: Path, score: OwnScore) -> None:
    """Append a score beside a ledger. Without room for it there is a line in the log, and nothing else changes."""
    try:
        number = os.open(ledger.with_name(_FILE), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        with os.fdopen(number, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(score), ensure_ascii=False) + "\n")
    except OSError as error:
        _log.warning("the score was not noted: %s", error.strerror)


def own_scores(ledger: Path) -> list[OwnScore]:
    """Return what was noted beside a ledger, by run in the order of their first score, then by round.

    A line that was cut is left out, and of two on one round the later one counts. Raises FolderError if the file cannot
    be read.
    """
    path = ledger.with_name(_FILE)
    if not path.exists():
        return []
    found: dict[str, dict[int, OwnScore]] = {}
    for line in read_secret(path).decode("utf-8", "replace").splitlines():
        try:
            score = OwnScore(**json.loads(line))
            found.setdefault(str(score.run), {})[int(score.round)] = score
        except (ValueError, TypeError):
            continue
    if not found and path.stat().st_size:
        raise FolderError(f"{path} holds no score that can be read. Move it away: it is for this site's own eyes alone")
    return [rounds[number] for rounds in found.values() for number in sorted(rounds)]
