"""One federation for many tests: of three sites in the soak, of one in the suite. Others make their own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import SOAK
from tests.deployment.harness import ALONE, BRANCHES, Branch, HeadOffice, records_of, stop_all, until


@dataclass
class Federation:
    """The server and three sites. Only those of `admitted` take part: all of them, or one."""

    head: HeadOffice
    branches: dict[str, Branch]
    admitted: dict[str, Branch]

    def ready(self) -> None:
        """Wait until every site is connected."""
        until(lambda: self.head.connected() == set(self.admitted), 600, "the connection of every site")


def found_federation(folder: Path, admitted: Sequence[str]) -> Federation:
    """Provision a federation; nothing runs yet."""
    head = HeadOffice(folder)
    branches = {}
    for name, branch in BRANCHES.items():
        # the one of the suite, and one of the soak's
        branches[name] = Branch(folder, name, records_of(branch, folder / f"{branch}.jsonl"), relayed=name == ALONE)
        if name in admitted:
            branches[name].join(head)
    for branch in branches.values():  # as the sites told each other
        others = (each for each in branches.values() if each is not branch)
        branch.settings["policy"]["peers"] = {each.name: each.office.identity.public.fingerprint for each in others}
        branch.settings["policy"]["colluding_sites"] = 0  # of three sites one may drop out only if none colludes
        branch.write_settings()
    return Federation(head, branches, {name: branches[name] for name in admitted})


@pytest.fixture(scope="session", name="federation")
def _federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = found_federation(tmp_path_factory.mktemp("f"), list(BRANCHES) if SOAK else [ALONE])
    try:
        made.head.start()
        for branch in made.admitted.values():
            branch.start()
        yield made
    finally:
        stop_all([program for branch in made.admitted.values() for program in branch.programs])
        made.head.stop()
