"""Attack: the server watches when a site leaves and when it is back: in between it has read and tokenised all records.

Stopped by a site that connects 1, 2, 4, 8 ... quanta after it began to read: a number of doublings, and no time.
"""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client import service
from client.link import SiteLink
from client.office import Office
from tests.link.ends import make_head, make_member, short_folder


class Silent:
    """Stands where the site is."""

    def open_ledger(self) -> None:
        """There is none."""

    def handle(self, *_: Any) -> bytes:
        return b""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(signal, "SIGTERM", signal.SIGUSR1)  # pytest's own are left alone
    monkeypatch.setattr(signal, "SIGINT", signal.SIGUSR2)
    with short_folder() as place:
        yield make_member(make_head(place), place / "site")


def starts(folder: Path, reading: float, patch: pytest.MonkeyPatch) -> float:
    """Return how long after its process began a site connects whose records take so long to read, seconds."""
    now, left = [100.0], list[float]()

    def open_site(office: Office) -> Silent:
        now[0] += reading
        return Silent()

    async def answer(*arguments: Any) -> bool:
        left.append(now[0] + arguments[-1] - 100.0)
        return False

    with patch.context() as here:
        here.setattr(service.time, "monotonic", lambda: now[0])
        here.setattr(service, "open_site", open_site)
        here.setattr(service, "_answer", answer)
        assert service.run(Office.open(folder)) is False
    return left[0]


def test_when_a_site_is_there_again_does_not_tell_how_long_its_records_took(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand records take about 0.1 s."""
    assert Office.open(folder).policy.reply_quantum == 5.0, "where the owner has said nothing"
    assert {starts(folder, reading, monkeypatch) for reading in (0.1, 0.2, 4.9)} == {5.0}
    assert {starts(folder, reading, monkeypatch) for reading in (11.0, 19.0)} == {20.0}


def test_a_site_does_not_connect_before_that(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = folder / "site.yaml"
    text = settings.read_text("utf-8")
    settings.write_text(text.replace("  # reply_quantum: 5 ", "  reply_quantum: 0.5 "), "utf-8")
    connected = list[float]()

    async def run(self: SiteLink, stop: Any) -> None:
        connected.append(time.monotonic())

    monkeypatch.setattr(service, "open_site", lambda office: Silent())
    monkeypatch.setattr(SiteLink, "run", run)
    began = time.monotonic()
    assert service.run(Office.open(folder)) is False
    assert connected[0] - began >= 0.5
