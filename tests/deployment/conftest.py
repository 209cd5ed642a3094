"""One federation of three offices for many tests; others that break things make their own."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from server import federation
from server.superlink import Control
from tests.deployment.harness import BRANCHES, Branch, HeadOffice, records_of, stop_all, until


@dataclass
class Federation:
    """Head office and three offices, all running."""

    head: HeadOffice
    branches: dict[str, Branch]

    def ready(self) -> None:
        """Wait until every office is connected and its service answers."""
        control = Control(federation.HeadOffice.open(self.head.home))
        everyone = dict.fromkeys(self.branches, True)
        until(lambda: control.connected() == everyone, 240, "the connection of every office", pause=0.5)
        for branch in self.branches.values():
            until(lambda branch=branch: "answers on" in branch.service_log, 240, f"the service of {branch.name}")


def found_federation(folder: Path) -> Federation:
    """Provision a federation; nothing runs yet."""
    head = HeadOffice(folder)
    branches = {}
    for name, branch in BRANCHES.items():
        branches[name] = Branch(folder, name, records_of(branch, folder / f"{branch}.jsonl"))
        branches[name].join(head)
    for branch in branches.values():  # as the offices told each other
        others = (each for each in branches.values() if each is not branch)
        branch.settings["policy"]["peers"] = {each.name: each.office.identity.public.fingerprint for each in others}
        branch.settings["policy"]["colluding_sites"] = 0  # of three offices one may drop out only if none colludes
        branch.write_settings()
    return Federation(head, branches)


@pytest.fixture(scope="session", name="federation")
def _federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = found_federation(tmp_path_factory.mktemp("f"))
    programs = [*(branch.program for branch in made.branches.values()), made.head.program]
    try:
        made.head.start()
        for branch in made.branches.values():
            branch.start()
        yield made
    finally:
        stop_all(programs)
