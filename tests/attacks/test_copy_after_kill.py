"""Attack: `kill -9` during a run, then `ledger.db` is copied or moved alone. With a write-ahead log: no charge in it.

Stopped by the journal mode: after every commit the one file holds everything.
"""

import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fedllm.privacy.ledger import LedgerFile
from tests.attacks.ledgers import EVENT, Branch


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # os.fork, Python 3.12
def test_a_copy_of_the_one_file_has_every_charge(branch: Branch, tmp_path: Path) -> None:
    branch.open()
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ledger = branch.open()
            for round_ in (1, 2):
                ledger.reserve("first", round_, "request", EVENT)
            os.write(writable, b"charged")
            signal.pause()
        finally:
            os._exit(0)
    os.close(writable)
    assert os.read(readable, 7) == b"charged"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(readable)
    path = branch.office.ledger.file
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    copy = tmp_path / "copy.db"
    copy.write_bytes(path.read_bytes())
    assert [charge.event for charge in LedgerFile(copy).charges()] == [EVENT] * 2
    LedgerFile(copy).verify([branch.office.identity.public])


def test_a_ledger_with_a_write_ahead_log_does_not_stay_so(branch: Branch) -> None:
    """Another program may have opened it, and left it in that mode."""
    branch.spend(1)
    path = branch.office.ledger.file
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
    branch.open().reserve("first", 2, "request", EVENT)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
