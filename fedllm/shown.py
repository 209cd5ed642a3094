"""Text that others wrote, where people read it: in logs and on a terminal it may not begin a line or hide one."""

import logging
import unicodedata
from collections.abc import Sequence


def shows(text: str) -> bool:
    """Whether every character has a width of its own, and none controls a terminal, a line or the order of others."""
    return text.isprintable() or all(sign.isprintable() or unicodedata.category(sign) == "Zs" for sign in text)


def escaped(text: str) -> str:
    """Return `text` as one line, in which every character that does not show is an escape."""
    return "".join(sign if shows(sign) else sign.encode("unicode_escape").decode() for sign in text)


def escaped_lines(text: str, between: str = "\n") -> str:
    """Return `text` line by line as `escaped`."""
    return between.join(map(escaped, text.split("\n")))


def with_interval(name: str, estimate: Sequence[float]) -> str:
    """Return what the sites' evaluation records say of a metric: estimate, and in brackets the 95 % interval.

    Accuracy is a share, as on the held-out set; exact match percent, as there; loss in nats; `units` a number.
    """
    if name == "exact_match":
        value, low, high = (f"{100 * each:.1f}" for each in estimate)
        return f"{value} % ({low}–{high})"
    value, low, high = (f"{each:.0f}" if name == "units" else f"{each:.3f}" for each in estimate)
    return f"{value} ({low}–{high})"


class LogLines(logging.Formatter):
    """A log in which what does not begin with a time goes on with the entry above, a traceback included."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return an entry."""
        return escaped_lines(super().format(record), "\n    ")
