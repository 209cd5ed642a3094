"""One federation for many tests: of three offices in the soak, of one in the suite. Others make their own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from server import federation
from server.superlink import Control
from tests.conftest import SOAK
from tests.deployment.harness import ALONE, BRANCHES, Branch, HeadOffice, records_of, stop_all, until


@dataclass
class Federation:
    """Head office and three offices. Only those of `admitted` take part: all of them, or one."""

    head: HeadOffice
    branches: dict[str, Branch]
    admitted: dict[str, Branch]

    def ready(self) -> None:
        """Wait until every office is connected and its service answers."""
        control = Control(federation.HeadOffice.open(self.head.home))
        everyone = dict.fromkeys(self.admitted, True)
        until(lambda: control.connected() == everyone, 600, "the connection of every office", pause=2.0)
        for branch in self.admitted.values():
            until(lambda branch=branch: "answers on" in branch.service_log, 600, f"the service of {branch.name}")


def found_federation(folder: Path, admitted: Sequence[str]) -> Federation:
    """Provision a federation; nothing runs yet."""
    head = HeadOffice(folder)
    branches = {}
    for name, branch in BRANCHES.items():
        branches[name] = Branch(folder, name, records_of(branch, folder / f"{branch}.jsonl"))
        if name in admitted:
            branches[name].join(head)
    for branch in branches.values():  # as the offices told each other
        others = (each for each in branches.values() if each is not branch)
        branch.settings["policy"]["peers"] = {each.name: each.office.identity.public.fingerprint for each in others}
        branch.settings["policy"]["colluding_sites"] = 0  # of three offices one may drop out only if none colludes
        branch.write_settings()
    return Federation(head, branches, {name: branches[name] for name in admitted})


@pytest.fixture(scope="session", name="federation")
def _federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = found_federation(tmp_path_factory.mktemp("f"), list(BRANCHES) if SOAK else [ALONE])
    programs = [*(branch.program for branch in made.admitted.values()), made.head.program]
    try:
        made.head.start()
        for branch in made.admitted.values():
            branch.start()
        yield made
    finally:
        stop_all(programs)
