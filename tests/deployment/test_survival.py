"""Processes are killed with kill -9, at both ends and mid-round: a run goes on or is resumed, and no spend is lost."""

import pytest

from client.office import Office
from server.rounds import RoundStarted
from tests.deployment.conftest import Federation
from tests.deployment.harness import ALONE, Branch, HeadOffice, fedllm, until

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(1800)]

SERVICE, SUPERNODE, COURIER = "site serve", "bin/flower-supernode", "bin/flwr-clientapp"
SERVERAPP, SUPERLINK = "bin/flwr-serverapp", "bin/flower-superlink"


def in_round(branch: Branch, run: str, number: int, kill: str) -> None:
    """Kill a process of an office while it trains a round that is paid for."""
    branch.caught(run, number)
    with branch.program.held(SERVICE):
        assert branch.ledger(run)[number] == "RESERVED", "the round was over too soon to be interrupted"
        branch.program.kill(kill)
    if kill == SERVICE:  # it was killed while it used records: it answers again when its owner says so
        done = fedllm("site", "resume", "--home", str(branch.home))
        assert f"round {number} of run {run}" in done.stdout, done.stdout + done.stderr


def begun(head: HeadOffice, name: str, number: int) -> None:
    """Wait until a round has begun."""
    until(
        lambda: any(isinstance(e, RoundStarted) and e.round == number for e in head.events(name)),
        600, f"round {number} of {name}",
    )  # fmt: skip


def test_a_run_survives_kill_9_at_both_ends_and_a_round_is_paid_for_once(federation: Federation) -> None:
    federation.ready()
    head, office = federation.head, federation.branches[ALONE]
    head.begin("survival-short", 1, **{
        "federation.quorum": 1, "federation.round_timeout": 600, "training.local_steps": 12,
        "privacy.noise_multiplier": 4.0,
    })  # fmt: skip
    run = head.plan("survival-short").run
    office.caught(run, 1)
    starts = office.service_log.count("answers on")
    with office.program.held(SERVICE):
        head.program.kill(SERVERAPP)
        office.program.kill(SERVICE)
    ended = head.ended("survival-short")
    assert (ended.state, "ended from outside" in ended.text) == ("stopped", True)
    assert [record.round for record in head.rounds("survival-short")] == [0]
    until(lambda: office.service_log.count("answers on") > starts, what="a new site service")

    head.resume("survival-short")
    assert head.ended("survival-short").state == "completed"
    assert [record.answered for record in head.rounds("survival-short")] == [[], [ALONE]]
    assert office.ledger(run) == {1: "RELEASED"}
    known = head.sites("survival-short")[ALONE]
    assert known.charged == 1
    assert (known.epsilon or 0.0) >= office.spent(run) - 1e-9


@pytest.mark.soak
def test_a_run_survives_the_end_of_every_process(federation: Federation) -> None:
    federation.ready()
    head, branches = federation.head, federation.branches
    gangnam, busan, mapo = branches.values()
    everyone = sorted(branches)
    head.begin("survival", 5, **{
        "federation.quorum": 1, "federation.round_timeout": 25, "training.local_steps": 12,
        "privacy.noise_multiplier": 4.0,
    })  # fmt: skip
    run = head.plan("survival").run

    # round 1: a site service; its supervisor starts it again, and the next courier waits for it
    in_round(gangnam, run, 1, SERVICE)
    # round 2: a SuperNode, and the courier of another office; it takes Flower about a minute to get over either
    begun(head, "survival", 2)
    in_round(busan, run, 2, SUPERNODE)
    in_round(mapo, run, 2, COURIER)
    # round 3: the ServerApp
    begun(head, "survival", 3)
    rounds = head.rounds("survival")
    assert set(rounds[1].failed) == {gangnam.name}
    assert set(rounds[2].failed) == {busan.name, mapo.name}
    assert rounds[2].answered == [gangnam.name]
    gangnam.caught(run, 3)
    head.program.kill(SERVERAPP)
    said = fedllm("status", "survival", "--home", str(head.home))
    assert "stopped" in said.stdout
    assert "ended from outside" in said.stdout

    # it goes on from its last checkpoint, and now waits until everybody is back
    head.resume("survival", quorum=3, round_timeout=180)
    follower = head.follow("survival")
    # round 4: the SuperLink
    begun(head, "survival", 4)
    for branch in branches.values():
        branch.caught(run, 4)
    head.restarted(lambda: head.program.kill(SUPERLINK))
    assert head.ended("survival").state == "stopped"
    assert "fedllm submit --resume survival" in follower.communicate(timeout=120)[1]
    assert follower.returncode == 1

    # the offices find the new SuperLink by themselves
    done = head.submit("--resume", "survival")
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = head.rounds("survival")
    assert [record.round for record in rounds] == [0, 1, 2, 3, 4, 5]
    assert [record.answered for record in rounds[3:]] == [everyone] * 3

    known = head.sites("survival")
    for name, branch in branches.items():
        charged = branch.ledger(run)  # holds a round at most once
        assert sorted(charged) == [1, 2, 3, 4, 5]
        assert all(charged[record.round] == "RELEASED" for record in rounds if name in record.answered)
        assert known[name].charged == 5
        assert (known[name].epsilon or 0.0) >= branch.spent(run) - 1e-9
    assert gangnam.ledger(run)[1] == "RESERVED"  # paid for, and nothing left the office: its service was killed
    # mapo's service may have handed its answer to the courier that was killed: RELEASED or not, round 2 is paid for


def pin_present_keys(branches: dict[str, Branch]) -> None:
    """Let the offices pin each other's keys anew where some were replaced, as their people would."""
    keys = {name: Office.open(branch.home).identity.public.fingerprint for name, branch in branches.items()}
    for name, branch in branches.items():
        peers = {other: key for other, key in keys.items() if other != name}
        if branch.settings["policy"]["peers"] != peers:
            branch.settings["policy"]["peers"] = peers
            branch.write_settings()
            starts = branch.service_log.count("answers on")
            branch.program.kill(SERVICE)  # it reads its settings at the start
            until(lambda b=branch, n=starts: b.service_log.count("answers on") > n, 120, f"the service of {name}")


@pytest.mark.soak
def test_shared_noise_survives_the_end_of_an_office_and_of_head_office(federation: Federation) -> None:
    """A sum is opened without the office that died, which joins anew; a round cut short by head office is given up."""
    federation.ready()
    head, branches = federation.head, federation.branches
    pin_present_keys(branches)
    everyone, gangnam = sorted(branches), next(iter(branches.values()))
    others = [name for name in everyone if name != gangnam.name]
    head.begin("survival-shared", 5, **{
        "privacy": "distributed", "privacy.colluding_sites": 0, "federation.quorum": 2, "federation.round_timeout": 25,
        "privacy.sampling_rate": 1.0, "privacy.noise_multiplier": 4.0,
    })  # fmt: skip
    run = head.plan("survival-shared").run

    # round 1: an office dies with its secrets, after it has paid and before it has sent anything
    in_round(gangnam, run, 1, SERVICE)
    begun(head, "survival-shared", 2)
    first = head.rounds("survival-shared")[1]
    assert (first.answered, list(first.failed), first.lost) == (others, [gangnam.name], "")
    assert first.noise_multiplier == pytest.approx(4.0)  # shares were sized for two

    # round 2 is dealt among the others, and then the office joins anew. Round 3: head office dies with its secrets,
    # after an office has paid; resumed, it asks nobody for that round again
    gangnam.caught(run, 3)
    head.program.kill(SERVERAPP)
    until(lambda: "stopped" in fedllm("status", "survival-shared", "--home", str(head.home)).stdout, 60, "the end")
    done = head.submit("--resume", "survival-shared")
    assert done.returncode == 0, done.stdout + done.stderr

    rounds = head.rounds("survival-shared")
    assert [record.round for record in rounds] == [0, 1, 2, 3, 4, 5]
    assert rounds[2].answered == others
    assert "started again" in rounds[3].lost
    assert [record.answered for record in rounds[4:]] == [everyone] * 2
    known = head.sites("survival-shared")
    for name, branch in branches.items():
        charged = branch.ledger(run)  # holds a round at most once
        assert set(charged) >= {1, 4, 5} | ({2} if branch is not gangnam else {3})
        assert known[name].charged >= len(charged)
        assert (known[name].epsilon or 0.0) >= branch.spent(run) - 1e-9
    assert gangnam.ledger(run)[1] == "RESERVED"
