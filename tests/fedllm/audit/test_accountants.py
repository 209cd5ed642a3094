"""A cross-check is one entry of a table: whoever adds one finds it in the figures, the pages and the verification."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedllm.audit.accountants import CROSS_CHECKS
from fedllm.audit.bundle import verify, write_audit
from fedllm.audit.evidence import assess
from fedllm.audit.model import CrossCheck, Estimate
from fedllm.cli.main import app
from fedllm.errors import ChainError
from fedllm.privacy.accounting import AccountingEvent, spent
from tests.fedllm.audit.conftest import Audited, any_pdf


def again(events: Sequence[AccountingEvent], delta: float) -> Estimate:
    """Another accountant: the PLD, a little off."""
    return Estimate(spent(events, delta).epsilon + 0.001)


ADDED = {"again": CrossCheck("Example", again)}


@pytest.fixture(scope="module")
def folder(audited: Audited, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audit with a cross-check that this product has not."""
    out = tmp_path_factory.mktemp("added") / "audit"
    pages = [("audit", "en"), ("audit.ko", "ko")]
    with any_pdf(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(CROSS_CHECKS, "again", ADDED["again"])
        write_audit(audited.run, out, pages, signer=audited.federation.head_office, cross_checks=ADDED)
    return out


def test_an_added_accountant_is_in_the_figures_and_on_the_pages(folder: Path) -> None:
    stated = json.loads((folder / "audit.json").read_text("utf-8"))["accountants"]
    assert stated["cross_checks"]["again"] == pytest.approx(stated["pld"] + 0.001, abs=1e-6)
    assert stated["prv"] is None
    assert "AGAIN (Example), a cross-check" in (folder / "audit.html").read_text("utf-8")
    assert "AGAIN (Example), 교차 검증" in (folder / "audit.ko.html").read_text("utf-8")


def test_whoever_has_it_compares_it_and_whoever_has_not_is_told_so(
    audited: Audited, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust = audited.federation.trust
    _, left = verify(folder, trust)
    assert any("accountants.again" in line for line in left)
    monkeypatch.setitem(CROSS_CHECKS, "again", ADDED["again"])
    audit, left = verify(folder, trust)
    assert not any("accountants" in line or "html" in line for line in left)
    assert audit.accountants.estimates["again"] is not None
    monkeypatch.setitem(CROSS_CHECKS, "again", CrossCheck("Example", lambda *_: Estimate(0.1)))
    with pytest.raises(ChainError, match=r"accountants\.again states"):
        verify(folder, trust)


def test_one_that_contradicts_the_pld_is_a_finding(audited: Audited) -> None:
    found = assess(audited.run, cross_checks={"far": CrossCheck("Example", lambda *_: Estimate(9.0))})
    finding = found.finding("accountants")
    assert finding.status == "fails"
    assert "|FAR 9 - PLD" in finding.evidence[0]
    assert found.verdict == "unverifiable"


def test_it_answers_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CROSS_CHECKS, "again", ADDED["again"])
    command = ["privacy", "epsilon", "--event", "0.01,1,10", "--delta", "1e-5"]
    text = CliRunner().invoke(app, command).output
    assert "an estimate by Example" in text
    values = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert values["again_estimate"] == pytest.approx(values["pld"] + 0.001)
    assert {"prv", "prv_estimate"} <= set(values)


def test_without_further_accountants_an_audit_is_what_it_always_was(audited: Audited) -> None:
    assert "cross_checks" not in json.loads(audited.written.audit.model_dump_json())["accountants"]
