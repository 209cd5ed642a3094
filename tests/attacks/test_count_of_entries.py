"""Attack: the server counts a site's ledger entries, which every statement names, and sees when its records changed.

Stopped by the entries themselves: none is about records, so that a plan makes the same number whatever they are.
"""

from pathlib import Path

import pytest

from client.site import Site
from fedllm.crypto.hash_chain import open_entry
from fedllm.privacy.ledger import LedgerFile, fingerprint
from tests.bug_zoo.invariants import office_of
from tests.client.test_site import Loader, Office


class Changed(Loader):
    """Other records: more of them, fewer, or some of the same."""

    def __init__(self, units: int, members: list[bytes]) -> None:
        super().__init__(units)
        self.data_set = fingerprint(members)


CHANGES = {
    "the same": lambda: Changed(24, [b"a", b"b"]),
    "one more": lambda: Changed(25, [b"a", b"b", b"c"]),
    "one of them": lambda: Changed(23, [b"a"]),
    "others": lambda: Changed(24, [b"x", b"y"]),
}


def kinds(office: Office) -> list[str]:
    return [open_entry(line).kind for line in LedgerFile(office.ledger.file).lines()]


def restarted(office: Office, loader: Loader) -> Site:
    office.loader = loader
    return office.restart()


@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_makes_the_same_entries_whatever_the_records(tmp_path: Path, tiny_llama: Path, change: str) -> None:
    office = office_of(tmp_path, tiny_llama)
    restarted(office, Changed(24, [b"a", b"b"]))
    office.prepare()
    office.train(1)
    restarted(office, CHANGES[change]())
    office.train(2)
    assert kinds(office) == ["opened", "budget", "split", "reserved", "released", "reserved", "released"]
