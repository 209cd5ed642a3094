"""Processes are killed with kill -9, at both ends and mid-round: a run goes on or is resumed, and no spend is lost."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from fedllm.cli import main as cli
from server import federation as head_folder
from server.events import RoundStarted
from tests.deployment.conftest import Federation
from tests.deployment.harness import ALONE, FEDLLM, Branch, HeadOffice, until

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
    done = CliRunner().invoke(cli.app, ["site", "resume", "--home", str(branch.home)])  # here: it spares the imports
    assert what in done.output, done.output
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
    # round 2: the relay, and the server's certificate is exchanged
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


# ---- in every phase of a round with masked sums ----------------------------------------------------------------------


def pin_present_keys(branches: dict[str, Branch]) -> None:
    """Let the sites pin each other's keys anew where some were replaced, as their people would."""
    keys = {name: branch.office.identity.public.fingerprint for name, branch in branches.items()}
    for name, branch in branches.items():
        peers = {other: key for other, key in keys.items() if other != name}
        if branch.settings["policy"]["peers"] != peers:
            branch.settings["policy"]["peers"] = peers
            starts = branch.program.text().count("is ready")
            branch.write_settings()  # it starts anew by itself
            branch.program.says("is ready", starts)


@pytest.fixture(scope="module", name="gate")
def _gate(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where one of the sites can be held: it is started so that it can."""
    federation.ready()
    pin_present_keys(federation.branches)
    place, program = tmp_path_factory.mktemp("gate"), federation.branches[ALONE].program
    program.stop()
    program.command = [sys.executable, "-m", "tests.deployment.gated", str(place)]
    program.started("is ready")
    yield place
    program.stop()
    program.command = FEDLLM
    program.started("is ready")


@pytest.mark.soak
@pytest.mark.parametrize("phase", ["prepare", "deal", "train", "train-answered", "reveal", "reveal-answered"])
@pytest.mark.parametrize("victim", ["daemon", "relay", "site", "run"])
def test_whatever_is_killed_in_whichever_phase_is_answered_as_before_or_given_up(
    federation: Federation, gate: Path, victim: str, phase: str
) -> None:
    federation.ready()
    head, branches, name = federation.head, federation.branches, f"{victim}-{phase}"
    office, everyone = branches[ALONE], sorted(federation.branches)
    assert office.relay is not None
    hold = gate / f"hold-{phase}"
    (gate / f"at-{phase}").unlink(missing_ok=True)
    hold.touch()
    head.begin(name, 2, **{
        "privacy": "distributed", "privacy.colluding_sites": 0, "federation.quorum": 2 if victim == "site" else 3,
        "federation.round_timeout": 180, "privacy.sampling_rate": 1.0, "privacy.noise_multiplier": 4.0,
    })  # fmt: skip
    run = head.plan(name).run
    try:
        until((gate / f"at-{phase}").exists, what=f"{phase} at {ALONE}")
        if victim == "run":
            head.run_process(name).kill()
        else:
            program = {"daemon": head.program, "relay": office.relay, "site": office.program}[victim]
            program.kill()
            if victim == "site":
                hold.unlink()
            program.started({"daemon": "ready:", "relay": "the relay listens", "site": "is ready"}[victim])
    finally:
        hold.unlink(missing_ok=True)
    ended = head.ended(name)
    if victim in ("daemon", "relay"):  # the same request was asked again, and answered once
        assert ended.state == "completed", ended
        assert [record.answered for record in head.rounds(name)[1:]] == [everyone] * 2
        assert all(branch.ledger(run) == {1: "RELEASED", 2: "RELEASED"} for branch in branches.values())
    if ended.state == "stopped":
        assert victim in ("run", "site")
        federation.ready()
        head.resume(name)
        ended = head.ended(name)
    assert ended.state == "completed", ended
    assert [record.round for record in head.rounds(name)] == [0, 1, 2]
    known = head.sites(name)
    for site, branch in branches.items():
        charged = branch.ledger(run)  # holds a round at most once
        assert set(charged) <= {1, 2}
        assert known[site].charged >= len(charged)
        assert (known[site].epsilon or 0.0) >= (branch.spent(run) if charged else 0.0) - 1e-9


# ---- a full disk -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full(process: psutil.Process) -> Iterator[None]:
    """Let every write of a process fail as on a full disk."""
    before = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(psutil.Error):
            process.rlimit(psutil.RLIMIT_FSIZE, before)


@pytest.mark.soak
def test_a_full_disk_at_an_office_costs_it_a_round_and_nothing_else(federation: Federation) -> None:
    federation.ready()
    head, branches = federation.head, federation.branches
    gangnam = branches["seoul-gangnam"]
    others = sorted(set(branches) - {gangnam.name})
    [process] = gangnam.program.processes()
    with full(process):
        head.begin("full-office", 1, **{"federation.quorum": 2, "federation.round_timeout": 240})
        assert head.ended("full-office").state == "completed"
    run = head.plan("full-office").run
    assert head.rounds("full-office")[1].answered == others
    assert gangnam.ledger(run) == {}
    assert not gangnam.program.ended
    head.begin("room-again", 1, **{"federation.quorum": 3, "federation.round_timeout": 240})
    assert head.ended("room-again").state == "completed"
    assert gangnam.ledger(head.plan("room-again").run) == {1: "RELEASED"}


@pytest.mark.soak
def test_a_full_disk_at_head_office_ends_a_run_which_is_resumed(federation: Federation) -> None:
    federation.ready()
    head, office = federation.head, federation.branches[ALONE]
    head.begin("full-head", 2, **SLOW_ROUNDS, **{"federation.quorum": 3})
    run = head.plan("full-head").run
    office.caught(run, 1)
    process = head.run_process("full-head")
    with full(process):
        until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, what="the end of the run")
    ended = head.ended("full-head")
    assert ended.state == "stopped"
    head.resume("full-head")
    assert head.ended("full-head").state == "completed"
    assert all(branch.ledger(run) == {1: "RELEASED", 2: "RELEASED"} for branch in federation.branches.values())
