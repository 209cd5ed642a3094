"""One federation of three offices for many tests; others that break things make their own."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deployment.harness import BRANCHES, Branch, HeadOffice, records_of, stop_all


@dataclass
class Federation:
    """Head office and three offices, all running."""

    head: HeadOffice
    branches: dict[str, Branch]


def found_federation(folder: Path) -> Federation:
    """Provision a federation; nothing runs yet."""
    head = HeadOffice(folder)
    branches = {}
    for name, branch in BRANCHES.items():
        branches[name] = Branch(folder, name, records_of(branch, folder / f"{branch}.jsonl"))
        branches[name].join(head)
    return Federation(head, branches)


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = found_federation(tmp_path_factory.mktemp("f"))
    programs = [*(branch.program for branch in made.branches.values()), made.head.program]
    try:
        made.head.start()
        for branch in made.branches.values():
            branch.start()
        yield made
    finally:
        stop_all(programs)
