"""Attack: the server uses answers that its record does not show, and cuts the ledger of the site that gave them.

Stopped by the site's signed word on where its ledger ends, given for this run, and by rounds that have to be complete.
"""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedllm.audit.bundle import verify
from fedllm.audit.evidence import assess
from fedllm.cli.main import app
from fedllm.crypto.hash_chain import Entry
from fedllm.errors import ChainError
from fedllm.plan import RunPlan
from tests.attacks.audits import EIGHT, Liar, append, cut, federation_of, hand_in
from tests.fedllm.audit.evidence import Federation, make_plan

X = "branch-4"
FOUR = EIGHT[:4]


def weak(plan: RunPlan) -> RunPlan:
    return plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"noise_multiplier": 0.6})})


def refused(federation: Federation, run: Path, *options: str) -> str:
    """Hand a run's audit in and return what its verification says, which ends with 1."""
    folder = hand_in(run, federation.head_office)
    keys = federation.write_trust(run / "keys.txt")
    done = CliRunner().invoke(app, ["audit", "verify", str(folder), "--trust", str(keys), *options])
    assert done.exit_code == 1, done.output
    return f"{done.output} {done.exception}"


def failing(run: Path) -> set[str]:
    return {finding.code for finding in assess(run).findings if finding.status == "fails"}


@pytest.mark.parametrize("kept", ["nothing", "first round"])
def test_a_site_that_is_called_failed_and_whose_ledger_is_cut_is_missed(tmp_path: Path, kept: str) -> None:
    """It trained with a third of the noise that was promised; what is left of its ledger is genuine."""
    federation, plan = Liar(tmp_path, sites=FOUR, budget=1e6), make_plan(rounds=3)
    first = 0 if kept == "nothing" else 1
    run = federation.lie(
        plan, hidden=lambda site, round_: site == X and round_ > first,
        other=lambda site, round_: weak(plan) if site == X and round_ > first else None,
    )  # fmt: skip

    def keep(entry: Entry) -> bool:
        return entry.kind in ("opened", "budget", "split") or (
            entry.body.get("round") == first and entry.kind in ("reserved", "released")
        )

    cut(run, X, keep)
    audit = assess(run)
    assert audit.verdict == "unverifiable"
    assert audit.finding("ledger_complete").status == "unverified"
    assert f"no export --end {plan.run}:" in audit.finding("ledger_complete").evidence[0]
    assert "cannot verify" in refused(federation, run, "--allow-unverified")


def test_a_ledger_that_is_cut_after_the_run_is_missed_as_well(tmp_path: Path) -> None:
    federation, run = federation_of(tmp_path, FOUR, rounds=1)
    ledger = federation.ledger(X)
    ledger.release(ledger.reserve("another", 1, "request", make_plan().mechanism.event(2)), b"reply")
    federation.export(run)
    assert assess(run).verdict == "within"
    cut(run, X, lambda entry: entry.body.get("run") != "another" and entry.kind != "export")
    assert assess(run).verdict == "unverifiable"


def test_an_export_for_another_run_or_an_earlier_end_does_not_do(tmp_path: Path) -> None:
    federation, run = federation_of(tmp_path, FOUR, rounds=1)
    later = federation.run("later", make_plan("e" * 32, rounds=1))
    shutil.copy(run / "ledgers" / f"{X}.jsonl", later / "ledgers")
    audit = assess(later)
    assert audit.verdict == "unverifiable"


def test_nothing_follows_the_end_of_an_export(tmp_path: Path) -> None:
    federation, run = federation_of(tmp_path, FOUR[:2], rounds=1)
    path = run / "ledgers" / f"{FOUR[0]}.jsonl"
    end = path.read_text("utf-8").splitlines()[-1]
    append(run, FOUR[0], federation.identities[FOUR[0]], "clock", {})
    path.write_text(path.read_text("utf-8") + end + "\n", "utf-8")
    assert "ledger_chain" in failing(run)


def test_a_site_that_signed_nothing_is_named_as_absent_or_the_audit_fails(tmp_path: Path) -> None:
    federation, run = federation_of(tmp_path, FOUR, rounds=1)
    run = Federation.run(federation, "second", make_plan("e" * 32, rounds=1), declines=[X])
    (run / "ledgers" / f"{X}.jsonl").unlink()
    folder = hand_in(run, federation.head_office)
    with pytest.raises(ChainError, match=f"nothing here is signed by {X}"):
        verify(folder, federation.trust)
    audit, _ = verify(folder, federation.trust, [X])
    assert audit.verdict == "within"


def test_a_round_that_was_begun_and_never_recorded_is_found(tmp_path: Path) -> None:
    federation = Liar(tmp_path, sites=FOUR)
    run = federation.lie(make_plan(rounds=2), unrecorded=1)
    finding = assess(run).finding("rounds")
    assert finding.status == "fails"
    assert finding.evidence == ("record.jsonl #4: end, and #3, begun, has no round",)
    assert "rounds: " in refused(federation, run)


def test_a_site_that_was_asked_by_an_entry_of_its_own_is_found(tmp_path: Path) -> None:
    federation = Liar(tmp_path, sites=FOUR)
    run = federation.lie(make_plan(rounds=1), twice=X)
    assert "rounds" in failing(run)
    finding = assess(run).finding("countersigned")
    assert any(X in text for text in finding.evidence)


def test_a_charge_for_another_plan_is_found_without_a_statement(tmp_path: Path) -> None:
    federation, plan = Liar(tmp_path, sites=FOUR, budget=1e6), make_plan(rounds=2)
    run = federation.lie(
        plan, hidden=lambda site, round_: (site, round_) == (X, 2),
        other=lambda site, round_: weak(plan) if (site, round_) == (X, 2) else None,
    )  # fmt: skip
    finding = assess(run).finding("charged_before_release")
    assert finding.status == "fails"
    assert finding.evidence[0].startswith(f"{X}, #")
    assert "noise_multiplier=0.6" in finding.evidence[0]
    assert "charged_before_release" in refused(federation, run)


def test_an_answer_that_was_lost_is_told_and_no_error_only_if_asked_for(tmp_path: Path) -> None:
    federation = Liar(tmp_path, sites=FOUR)
    run = federation.lie(make_plan(rounds=1), hidden=lambda site, round_: site == X)
    said = refused(federation, run)
    assert f"unverified: answers_recorded: {X}, 1" in said
    assert "gaps" in said
    keys = str(federation.write_trust(run / "keys.txt"))
    command = ["audit", "verify", str(run / "audit"), "--trust", keys, "--allow-unverified"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output


def test_a_clock_that_runs_backwards_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fedllm.audit import evidence

    real = evidence.make_entry
    monkeypatch.setattr(evidence, "make_entry", lambda number, last, kind, at, body, signer: real(
        number, last, kind, 4e9 - 1e8 * number, body, signer))  # fmt: skip
    _, run = federation_of(tmp_path, FOUR[:2], rounds=1)
    assert failing(run) == {"rounds"}
