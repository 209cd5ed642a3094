"""Processes are killed with kill -9, at both ends and mid-round: a run goes on or is resumed, and no spend is lost."""

import pytest

from server import federation as head_folder
from server.rounds import RoundStarted
from tests.deployment.conftest import Federation
from tests.deployment.harness import ALONE, Branch, HeadOffice, fedllm, until

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(1800)]

SLOW_ROUNDS = {"training.local_steps": 8, "privacy.noise_multiplier": 4.0}  # there is time to interrupt them


def begun(head: HeadOffice, name: str, number: int) -> None:
    """Wait until a round has begun."""
    until(
        lambda: any(isinstance(e, RoundStarted) and e.round == number for e in head.events(name)),
        600, f"round {number} of {name}",
    )  # fmt: skip


def resume_site(branch: Branch, what: str) -> None:
    """Start a site again that was killed while it used records, as its owner would."""
    done = fedllm("site", "resume", "--home", str(branch.home))
    assert what in done.stdout, done.stdout + done.stderr
    branch.start_again()


def test_a_run_survives_kill_9_of_every_process_and_every_round_is_paid_for_once(federation: Federation) -> None:
    federation.ready()
    head, office = federation.head, federation.branches[ALONE]
    assert office.relay is not None
    name, answered = "survival", office.log.count("answered with")
    head.begin(name, 3, **SLOW_ROUNDS, **{"federation.quorum": 1})
    run = head.plan(name).run
    # round 1: the daemon; the run's process goes on without it
    office.caught(run, 1)
    with office.program.held():
        head.program.kill()
        head.start()
    # round 2: the relay, and head office's certificate is exchanged
    office.caught(run, 2)
    with office.program.held():
        office.relay.kill()
        head_folder.rotate_server_certificate(head.home)
        head.program.says("the port shows its new certificate")
        office.relay.started("the relay listens")
    # round 3: the run's process and the site
    office.caught(run, 3)
    with office.program.held():
        assert office.ledger(run) == {1: "RELEASED", 2: "RELEASED", 3: "RESERVED"}
        head.run_process(name).kill()
        office.program.kill()
    resume_site(office, f"round 3 of run {run}")
    ended = head.ended(name)
    assert (ended.state, "ended from outside" in ended.text) == ("stopped", True)
    assert [record.round for record in head.rounds(name)] == [0, 1, 2]
    assert office.log.count("answered with") == answered + 3, "each request was handled once"

    head.resume(name)
    assert head.ended(name).state == "completed"
    assert [record.answered for record in head.rounds(name)] == [[], [ALONE], [ALONE], [ALONE]]
    assert office.ledger(run) == {1: "RELEASED", 2: "RELEASED", 3: "RELEASED"}
    known = head.sites(name)[ALONE]
    assert known.charged == 3
    assert (known.epsilon or 0.0) >= office.spent(run) - 1e-9
