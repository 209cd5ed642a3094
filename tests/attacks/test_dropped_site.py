"""Attack: the server leaves a site out of record, metrics and ledgers, after the fact: the costliest, say.

Stopped by the countersignatures of all other sites, and by the reader's keys: each must be there, or named as absent.
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedllm.audit.bundle import verify
from fedllm.audit.evidence import assess
from fedllm.audit.trust import HEAD_OFFICE, Trust
from fedllm.cli.main import app
from fedllm.errors import ChainError
from tests.attacks.audits import EIGHT, federation_of, hand_in, rewrite
from tests.fedllm.audit.evidence import Federation, make_plan

GONE = EIGHT[3]
Change = Callable[[list[dict[str, Any]]], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Path]:
    return federation_of(tmp_path_factory.mktemp("federation"))


@pytest.fixture
def eight(made: tuple[Federation, Path], tmp_path: Path) -> tuple[Federation, Path]:
    """A federation of its own, with what was made once."""
    federation = copy.copy(made[0])
    federation.folder = tmp_path
    shutil.copytree(made[0].folder, tmp_path, dirs_exist_ok=True)
    return federation, tmp_path / "run"


def without(name: str, begun: bool = True) -> Change:
    """Return what takes a site out of every entry of a record."""

    def change(bodies: list[dict[str, Any]]) -> None:
        for body in bodies:
            for key in ("answered", "declined", "failed"):
                body.get(key, {}).pop(name, None)
            if begun and "sites" in body:
                roster = body["sites"]
                body["sites"] = (
                    {n: key for n, key in roster.items() if n != name}
                    if isinstance(roster, dict)
                    else [n for n in roster if n != name]
                )

    return change


def forget(run: Path, name: str) -> None:
    """Take a site out of metrics and ledgers."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    for line in lines:
        line["answered"] = [each for each in line["answered"] if each != name]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")
    (run / "ledgers" / f"{name}.jsonl").unlink(missing_ok=True)


def failing(run: Path, trust: Trust | None = None) -> set[str]:
    return {finding.code for finding in assess(run, trust).findings if finding.status == "fails"}


def test_a_site_that_is_left_out_everywhere_is_missed_by_all_others(eight: tuple[Federation, Path]) -> None:
    """Whether or not the reader has ever heard of it: the others have signed for the roster of every round."""
    federation, run = eight
    rewrite(run / "record.jsonl", federation.head_office, without(GONE))
    forget(run, GONE)
    audit = assess(run)
    finding = audit.finding("countersigned")
    assert audit.verdict == "unverifiable"
    assert finding.status == "fails"
    assert len(finding.evidence) + finding.more == 14, "seven sites, two rounds"
    folder = hand_in(run, federation.head_office)
    known = {name: [identity.public.to_text()] for name, identity in federation.identities.items() if name != GONE}
    for trust in (federation.trust, Trust({HEAD_OFFICE: [federation.head_office.public.to_text()], **known})):
        with pytest.raises(ChainError, match="countersigned"):
            verify(folder, trust)


def test_a_site_that_is_left_out_of_its_answers_only_is_missed_too(eight: tuple[Federation, Path]) -> None:
    federation, run = eight
    rewrite(run / "record.jsonl", federation.head_office, without(GONE, begun=False))
    forget(run, GONE)
    assert "countersigned" in failing(run)


def test_a_site_that_the_others_were_never_told_of_is_missed_by_who_has_its_key(tmp_path: Path) -> None:
    """The server lies from the beginning, to all of them: nothing in the evidence can show it, but a phone call."""
    federation = Federation(tmp_path, sites=EIGHT)
    secret = Federation(tmp_path, sites=[n for n in EIGHT if n != GONE], head_office=federation.head_office)
    secret.identities = {name: federation.identities[name] for name in secret.sites}
    run = secret.run("run", make_plan(rounds=1))
    folder = hand_in(run, federation.head_office)
    with pytest.raises(ChainError, match=f"nothing here is signed by {GONE}"):
        verify(folder, federation.trust)
    keys = str(federation.write_trust(tmp_path / "keys.txt"))
    command = ["audit", "verify", str(folder), "--trust", keys]
    assert CliRunner().invoke(app, command).exit_code == 1
    done = CliRunner().invoke(app, [*command, "--absent", GONE])
    assert done.exit_code == 0, done.output
    assert "7 sites" in done.output
    with pytest.raises(ChainError, match=f"{EIGHT[0]} took part"):
        verify(folder, federation.trust, [GONE, EIGHT[0]])


def test_its_ledger_speaks_for_a_site_that_the_record_does_not_name(tmp_path: Path) -> None:
    """It was told another roster than the others, and its statements were put away; somebody still has its ledger."""
    federation, run = federation_of(tmp_path, EIGHT[:3], rounds=1)
    rewrite(run / "record.jsonl", federation.head_office, without(EIGHT[2]))
    assert "ledger_chain" in failing(run), "a ledger of no site of this run"


def test_answers_that_are_called_lost_after_the_fact_are_found(eight: tuple[Federation, Path]) -> None:
    """Every later round has countersigned the entry that it follows."""
    federation, run = eight

    def change(bodies: list[dict[str, Any]]) -> None:
        body = next(body for body in bodies if body["kind"] == "round")
        del body["answered"][GONE]
        body["failed"][GONE] = "no answer in time"

    rewrite(run / "record.jsonl", federation.head_office, change)
    assert "countersigned" in failing(run)


def test_an_answer_that_really_was_lost_is_shown_and_no_contradiction(eight: tuple[Federation, Path]) -> None:
    federation, run = eight

    def change(bodies: list[dict[str, Any]]) -> None:
        body = [body for body in bodies if body["kind"] == "round"][-1]
        del body["answered"][GONE]
        body["failed"][GONE] = "no answer in time"

    rewrite(run / "record.jsonl", federation.head_office, change)
    forgotten = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    forgotten[-1]["answered"].remove(GONE)
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in forgotten), "utf-8")
    federation.export(run)
    audit = assess(run)
    finding = audit.finding("answers_recorded")
    assert failing(run) == set()
    assert audit.verdict == "within"
    assert finding.status == "unverified"
    assert finding.evidence[0].startswith(f"{GONE}, 2: ")


def test_a_release_that_the_record_never_asked_for_is_found(eight: tuple[Federation, Path]) -> None:
    """A round beside the record: the server asked one site once more, and kept that to itself."""
    federation, run = eight
    plan = make_plan(rounds=3)
    ledger = federation.ledger(GONE)
    ledger.release(ledger.reserve(plan.run, 3, "request", plan.mechanism.event(2)), b"reply")
    federation.export(run)
    assert "answers_recorded" in failing(run)


def test_a_record_that_ends_before_the_ledgers_do_is_found(eight: tuple[Federation, Path]) -> None:
    federation, run = eight

    def change(bodies: list[dict[str, Any]]) -> None:
        del bodies[3:]
        bodies.append({"kind": "end", "round": 1, "stopped": "", "adapter": f"{1:064x}"})

    rewrite(run / "record.jsonl", federation.head_office, change)
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()[:2]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    assert failing(run) == {"answers_recorded"}


@pytest.mark.parametrize("what", ["twice", "missing"])
def test_a_round_that_was_not_begun_as_it_ended_is_found(eight: tuple[Federation, Path], what: str) -> None:
    federation, run = eight

    def change(bodies: list[dict[str, Any]]) -> None:
        last = max(i for i, body in enumerate(bodies) if body["kind"] == "begun")
        if what == "missing":
            del bodies[last]
        else:
            bodies.insert(last + 1, {"kind": "begun", "round": 2, "sites": list(EIGHT[:7])})

    rewrite(run / "record.jsonl", federation.head_office, change)
    assert "countersigned" in failing(run)


def test_one_office_under_two_names_is_found(tmp_path: Path) -> None:
    """It would count as two honest sites, also where the reader was given one key for both."""
    federation = Federation(tmp_path, sites=EIGHT[:3])
    federation.identities[EIGHT[1]] = federation.identities[EIGHT[0]]
    run = federation.run("run", make_plan(rounds=1))
    finding = assess(run, federation.trust).finding("keys")
    assert finding.status == "fails"
    assert finding.evidence[0].startswith(f"{EIGHT[1]} = {EIGHT[0]}: ")
