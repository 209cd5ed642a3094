"""One federation of three offices for many tests; others that break things make their own."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deployment.harness import BRANCHES, Branch, HeadOffice, records_of


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
    programs = [made.head.program, *(branch.program for branch in made.branches.values())]
    try:
        made.head.start()
        for branch in made.branches.values():
            branch.start()
        yield made
    finally:
        for program in programs:
            program.stop()
