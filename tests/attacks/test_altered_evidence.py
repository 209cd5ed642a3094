"""Attack: the server alters evidence that is its own to write: plan, metrics, other sites' ledgers.

Stopped by `fedllm audit verify`: every file is compared with what the sites have signed.
"""

import copy
import json
import shutil
from pathlib import Path

import pytest

from fedllm.audit.bundle import verify
from fedllm.audit.evidence import assess
from fedllm.errors import ChainError
from tests.attacks.audits import append, federation_of, hand_in, sign
from tests.fedllm.audit.evidence import Federation, make_plan

SITES = ("seoul", "busan", "jeju")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Path]:
    return federation_of(tmp_path_factory.mktemp("federation"), SITES)


@pytest.fixture
def three(made: tuple[Federation, Path], tmp_path: Path) -> tuple[Federation, Path]:
    """A federation of its own, with what was made once."""
    federation = copy.copy(made[0])
    federation.folder = tmp_path
    shutil.copytree(made[0].folder, tmp_path, dirs_exist_ok=True)
    return federation, tmp_path / "run"


def failing(run: Path) -> set[str]:
    return {finding.code for finding in assess(run).findings if finding.status == "fails"}


@pytest.mark.parametrize("change", [
    {"answered": ["busan", "seoul"]}, {"answered": ["busan", "jeju", "seoul", "ulsan"]},
    {"declined": {"jeju": "budget"}}, {"round": 2},
])  # fmt: skip
def test_metrics_of_other_sites_or_rounds_are_found(three: tuple[Federation, Path], change: dict[str, object]) -> None:
    federation, run = three
    folder = hand_in(run, federation.head_office)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    lines[1].update(change)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")
    sign(folder, federation.head_office)
    with pytest.raises(ChainError, match="metrics"):
        verify(folder, federation.trust)


@pytest.mark.parametrize("privacy", [{"noise_multiplier": 2.5}, {"epsilon": 8.0}, {"unit": "record"}, {"delta": 1e-6}])
def test_another_plan_beside_the_record_is_found(three: tuple[Federation, Path], privacy: dict[str, object]) -> None:
    federation, run = three
    folder = hand_in(run, federation.head_office)
    unit = str(privacy.pop("unit", "person"))
    (folder / "plan.json").write_text(make_plan(rounds=2, unit=unit, **privacy).model_dump_json(), "utf-8")
    sign(folder, federation.head_office)
    with pytest.raises(ChainError, match="plan"):
        verify(folder, federation.trust)


def test_ledgers_that_changed_places_are_found(three: tuple[Federation, Path]) -> None:
    _, run = three
    ledgers = run / "ledgers"
    (ledgers / "seoul.jsonl").rename(ledgers / "x")
    (ledgers / "busan.jsonl").rename(ledgers / "seoul.jsonl")
    (ledgers / "x").rename(ledgers / "busan.jsonl")
    assert "ledger_chain" in failing(run)


def test_one_ledger_for_two_sites_is_found(three: tuple[Federation, Path]) -> None:
    _, run = three
    shutil.copy(run / "ledgers" / "seoul.jsonl", run / "ledgers" / "jeju.jsonl")
    assert "ledger_chain" in failing(run)


def test_charges_of_other_runs_count_and_are_no_contradiction(three: tuple[Federation, Path]) -> None:
    federation, run = three
    before = assess(run)
    ledger = federation.ledger("jeju")
    ledger.release(ledger.reserve("another run", 1, "request", make_plan().mechanism.event(2)), b"reply")
    federation.export(run)
    after = assess(run)
    assert after.verdict == "within"
    assert (after.sites[1].name, after.sites[2].name) == ("jeju", "seoul")
    assert (after.sites[1].spent or 0) > (before.sites[1].spent or 0)
    assert after.sites[1].run == before.sites[1].run


def test_a_round_charged_twice_or_released_twice_is_found(three: tuple[Federation, Path]) -> None:
    federation, run = three
    plan = make_plan(rounds=2)
    event = plan.mechanism.event(2)
    charge = {"account": "d", "run": plan.run, "round": 1, "charge": 1, "request": "r",
              "sampling_rate": event.sampling_rate, "noise_multiplier": event.noise_multiplier,
              "steps": event.steps}  # fmt: skip
    for _ in range(2):
        append(run, "jeju", federation.identities["jeju"], "reserved", charge)
    finding = assess(run).finding("ledger_chain")
    assert finding.status == "fails"
    assert "charged twice" in finding.evidence[0]
