"""The ledger's commands, as an owner and a privacy officer use them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.office import Office, init_office
from fedllm.cli.main import app
from fedllm.config import EvaluationConfig
from fedllm.crypto.hash_chain import read_chain
from fedllm.errors import ChainError, FedllmError
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import AccountingEvent, counted
from fedllm.privacy.elapsed import Period
from fedllm.privacy.ledger import PrivacyLedger
from fedllm.values import parse
from tests.fedllm.privacy.budgets import for_several_plans

EVENT = AccountingEvent(0.5, 1.5, 2)


def run(*arguments: object) -> str:
    """Run a command; its error is raised, as `main` would print it."""
    result = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def plan(rounds: int = 4, **privacy: object) -> RunPlan:
    values = {
        "run": "planned", "seed": 1, "model": {"source": "base"}, "adapter": {"rank": 4},
        "privacy": {"sampling_rate": 0.5, "units_per_site": 100, "noise_multiplier": 1.5, **privacy},
        "training": {"rounds": rounds, "local_steps": 2},
    }  # fmt: skip
    return parse(RunPlan, values)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A site with records and a model's name, and with two rounds in its ledger: one released, one open."""
    folder = tmp_path / "site"
    init_office(folder, "busan")
    rows = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(120)]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "base").mkdir()
    settings = (folder / "site.yaml").read_text("utf-8").replace("models: {}", "models: {base: base}")
    (folder / "site.yaml").write_text(settings, "utf-8")
    return folder


def open_ledger(home: Path, period: Period | None = None) -> PrivacyLedger:
    from client.service import read_data_set

    office = Office.open(home)
    ledger = PrivacyLedger(office.ledger, 8.0, 1e-5, office.identity, period)
    ledger.compare(read_data_set(office))
    return ledger


@pytest.fixture
def spent_home(home: Path) -> Path:
    ledger = open_ledger(home)
    ledger.release(ledger.reserve("first", 1, "request", EVENT), b"reply")
    ledger.reserve("first", 2, "request", EVENT)
    return home


def test_before_anything_was_spent_there_is_nothing_to_show(home: Path) -> None:
    for command in ("show", "verify"):
        with pytest.raises(FedllmError, match="nothing was spent"):
            run("ledger", command, "--home", home)


def test_show_tells_what_was_spent_reserved_and_left(spent_home: Path) -> None:
    said = run("ledger", "show", "--home", spent_home)
    assert "1 released" in said
    assert "1 reserved" in said
    assert "open: round 2 of run first" in said
    assert "budget of 8" in said
    assert "account" in run("ledger", "show", "--file", spent_home / "data" / "ledger.db")


def test_a_ledger_is_read_without_the_libraries_of_training(spent_home: Path) -> None:
    code = """
import sys
from fedllm.cli.main import main
try:
    main()
finally:
    print("loaded:", *sorted({name.partition('.')[0] for name in sys.modules}))
"""
    command = [sys.executable, "-c", code, "ledger", "show", "--home", str(spent_home)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shown, _, loaded = done.stdout.rpartition("loaded:")
    assert "1 released" in shown, done.stderr
    assert not set(loaded.split()) & {"torch", "transformers", "datasets", "flwr", "hydra", "matplotlib", "opacus"}


def test_verify_finds_the_first_bad_entry_of_a_ledger_and_of_an_export(spent_home: Path, tmp_path: Path) -> None:
    office = Office.open(spent_home)
    assert "sound: 6 entries" in run("ledger", "verify", "--home", spent_home)
    assert "sound: 6 entries" in run("ledger", "verify", "--file", office.ledger_file)
    to = tmp_path / "busan.jsonl"
    run("ledger", "export", to, "--home", spent_home)
    assert "sound: 6 entries" in run("ledger", "verify", "--file", to, "--key", office.identity.public.to_text())
    with pytest.raises(ChainError, match="not trusted"):
        run("ledger", "verify", "--file", to, "--key", "ab" * 64)
    lines = to.read_text("utf-8").splitlines()
    to.write_text("\n".join([*lines[:3], *lines[4:]]), "utf-8")
    with pytest.raises(ChainError, match="entry 3:"):
        run("ledger", "verify", "--file", to)


def test_an_export_holds_no_record_and_no_count_of_records(spent_home: Path, tmp_path: Path) -> None:
    to = tmp_path / "busan.jsonl"
    run("ledger", "export", to, "--home", spent_home)
    said = str([entry.body for entry in read_chain(to.read_text("utf-8").splitlines(), "export")])
    assert "q1" not in said
    assert not re.search("(?<![0-9a-f])120(?![0-9a-f])", said), "digests are drawn by chance, and may hold it"
    with pytest.raises(FedllmError, match="Nothing was overwritten"):
        run("ledger", "export", to, "--home", spent_home)


def test_what_is_shown_as_left_is_what_another_plan_may_cost(home: Path) -> None:
    """The ledger decides by RDP at a few fixed orders, which counts more than the best order does."""
    ledger = open_ledger(home)
    for number, noise in enumerate((1.5, 1.6)):
        ledger.reserve(f"plan {number}", 1, "request", AccountingEvent(0.5, noise, 2))
    held = counted(ledger.events(), 1e-5, 8.0, one_plan=False)
    assert held > ledger.spent().epsilon_rdp
    assert f" {8 - held:.4g} " in run("ledger", "show", "--home", home)


def test_an_export_for_an_audit_ends_with_the_sites_word_that_it_is_all(spent_home: Path, tmp_path: Path) -> None:
    end = f"first:7:{'a' * 64}"
    to = tmp_path / "export.jsonl"
    for wrong in ("first", "first:7:", f"first:x:{'a' * 64}", f":7:{'a' * 64}", f"first:7:{'A' * 64}"):
        with pytest.raises(FedllmError, match="RUN:NUMBER:DIGEST"):
            run("ledger", "export", to, "--home", spent_home, "--end", wrong)
    ledger = open_ledger(spent_home).file
    before = ledger.lines()
    run("ledger", "export", to, "--home", spent_home, "--end", end)
    *lines, last = read_chain(to.read_text("utf-8").splitlines(), "export")
    assert ledger.lines() == before, "its end is no part of the ledger"
    assert [entry.number for entry in lines] == list(range(len(before)))
    assert (last.kind, last.body) == ("export", {"run": "first", "number": 7, "digest": "a" * 64})
    assert last.signer == Office.open(spent_home).identity.public
    assert "sound" in run("ledger", "verify", "--file", to)
    with pytest.raises(FedllmError, match="leave one of the two out"):
        run("ledger", "export", tmp_path / "x", "--file", spent_home / "data" / "ledger.db", "--end", end)


def test_an_open_round_is_given_back_and_a_released_one_is_not(spent_home: Path) -> None:
    assert "aborted: round 2" in run("ledger", "abort", "first", 2, "--home", spent_home)
    assert open_ledger(spent_home).events() == [EVENT]
    for round_ in (1, 2):
        with pytest.raises(FedllmError, match="not reserved"):
            run("ledger", "abort", "first", round_, "--home", spent_home)
    run("ledger", "verify", "--home", spent_home)


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_a_forecast_says_what_a_plan_would_spend_and_how_much_fits(home: Path, tmp_path: Path, form: str) -> None:
    file = tmp_path / f"plan.{form}"
    values = plan(rounds=40).model_dump(mode="json")
    file.write_text(json.dumps(values, indent=2 if form == "json" else None), "utf-8")
    fresh = run("ledger", "forecast", file, "--home", home)
    assert "policy: admits the plan" in fresh
    assert not (home / "data" / "ledger.db").exists(), "a forecast writes nothing"
    ledger = open_ledger(home)
    for round_ in range(1, 4):
        ledger.reserve("first", round_, "request", EVENT)
    before = ledger.file.lines()
    later = run("ledger", "forecast", file, "--home", home)

    def fit(said: str) -> int:
        return int(said.partition("budget of 8: ")[2].split()[0])

    assert 0 < fit(later) < fit(fresh) < 40
    assert ledger.file.lines() == before
    for round_ in range(1, fit(later) + 1):
        ledger.reserve("planned", round_, "request", plan().mechanism.event(2))
    with pytest.raises(FedllmError, match="budget"):  # the forecast was right to the round
        ledger.reserve("planned", fit(later) + 1, "request", plan().mechanism.event(2))


def test_a_forecast_counts_what_the_period_admits(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(plan(rounds=9).model_dump_json(), "utf-8")
    limit = for_several_plans([EVENT] * 3, 1e-5)
    settings = (home / "site.yaml").read_text("utf-8")
    written = settings.replace("  min_units: 100", f"  period: {{days: 30, epsilon: {limit!r}}}\n  min_units: 100")
    assert written != settings
    (home / "site.yaml").write_text(written, "utf-8")
    said = run("ledger", "forecast", file, "--home", home)
    assert f"rounds that fit now, with at most {limit:g} in 30 days: 3 of 9" in said
    ledger = open_ledger(home, Period(days=30, epsilon=limit))
    ledger.reserve("first", 1, "request", EVENT)
    assert "in 30 days: 2 of 9" in run("ledger", "forecast", file, "--home", home)
    for round_ in (1, 2):
        ledger.reserve("planned", round_, "request", EVENT)
    with pytest.raises(FedllmError, match="last 30 days"):  # it was right to the round
        ledger.reserve("planned", 3, "request", EVENT)
    assert "in 30 days: 0 of 9" in run("ledger", "forecast", file, "--home", home)


@pytest.mark.parametrize(("noise", "said"), [(9.0, "9 of 9, and the"), (0.7, "9 of 9, but not the")])
def test_a_forecast_says_whether_the_closing_score_fits(home: Path, tmp_path: Path, noise: float, said: str) -> None:
    """Two scores, after the first round and after the last: at the smaller noise the budget is enough for one alone."""
    file = tmp_path / "plan.json"
    scores = EvaluationConfig(every=9, noise_multiplier=noise)
    file.write_text(
        plan(rounds=9, noise_multiplier=4.0).model_copy(update={"evaluation": scores}).model_dump_json(), "utf-8"
    )
    assert f"budget of 8: {said} closing score" in run("ledger", "forecast", file, "--home", home)


def test_a_forecast_for_a_ledger_file_needs_no_office(spent_home: Path, tmp_path: Path) -> None:
    file, copy = tmp_path / "plan.json", tmp_path / "copy.db"
    file.write_text(plan(rounds=40).model_dump_json(), "utf-8")
    copy.write_bytes((spent_home / "data" / "ledger.db").read_bytes())
    at_home = run("ledger", "forecast", file, "--home", spent_home).splitlines()
    elsewhere = run("ledger", "forecast", file, "--file", copy).splitlines()
    assert elsewhere[:-1] == at_home[:-1], "the ledger itself states budget and delta"
    assert "not known" in elsewhere[-1]
    assert "budget of 8" in run("ledger", "show", "--file", copy)
    limits = tmp_path / "policy.yaml"
    limits.write_text("epsilon: 8\nmin_sites: 3\n", "utf-8")
    with pytest.raises(FedllmError, match=r"policy: refused: quorum=1 .*min_sites of 3"):
        run("ledger", "forecast", file, "--file", copy, "--policy", limits)
    limits.write_text("epsilon: 6\n", "utf-8")
    said = run("ledger", "forecast", file, "--file", copy, "--policy", limits)
    assert "budget of 6: " in said
    assert "policy: admits the plan" in said
    limits.write_text("epsilom: 6\n", "utf-8")
    with pytest.raises(FedllmError, match="did you mean epsilon"):
        run("ledger", "forecast", file, "--file", copy, "--policy", limits)


def test_a_forecast_says_that_the_policy_refuses(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(plan(delta=1e-3).model_dump_json(), "utf-8")
    with pytest.raises(FedllmError, match=r"policy: refused: privacy\.delta"):
        run("ledger", "forecast", file, "--home", home)
