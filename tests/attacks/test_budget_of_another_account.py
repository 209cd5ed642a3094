"""Attack: what a site's records have cost stands in an account, a run or a word that the audit does not look at.

Stopped by an audit of every account, declared or not, by the accountant that decides at the site.
"""

import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fedllm.privacy.ledger
from fedllm.audit.evidence import assess
from fedllm.audit.model import Audit, Site
from fedllm.audit.report import render_html
from fedllm.cli.main import app
from fedllm.privacy.accounting import counted
from fedllm.privacy.ledger import PrivacyLedger
from tests.attacks.audits import federation_of, hand_in
from tests.fedllm.audit.evidence import DELTA, Federation, make_plan

SITES, X = ("busan", "incheon", "seoul"), "busan"
EARLIER = make_plan("e" * 32, rounds=30, noise_multiplier=0.8)


def of(audit: Audit) -> Site:
    return next(site for site in audit.sites if site.name == X)


@pytest.fixture
def three(tmp_path: Path) -> Federation:
    """A federation one of whose sites has spent far more than the 4 that it permits now."""
    federation = Federation(tmp_path, sites=SITES)
    ledger = PrivacyLedger(federation.place(X), math.inf, DELTA, federation.identities[X])
    for round_ in range(1, 31):
        ledger.release(ledger.reserve(EARLIER.run, round_, "request", EARLIER.mechanism.event(2)), b"reply")
    return federation


def test_a_site_that_declines_is_still_over_its_budget(three: Federation) -> None:
    audit = assess(three.run("run", make_plan(rounds=1), declines=[X]))
    assert audit.verdict == "exceeded"
    assert (of(audit).charged or 0) > 4
    assert of(audit).run == 0
    assert audit.finding("budget").evidence[0].startswith(f"{X}, site: PLD ε ")


def test_an_account_that_nobody_declared_is_the_sites(three: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ledgers of earlier versions, where every data set had an account."""
    three.ledger(X)
    with monkeypatch.context() as patch:
        patch.setattr(fedllm.privacy.ledger, "_account", lambda db, data_set: "renamed")
        run = three.run("run", make_plan(rounds=1))
    audit = assess(run)
    finding = audit.finding("charged_before_release")
    assert finding.status == "fails"
    assert "account renamed, not declared before" in finding.evidence[0]
    assert [account.name for account in of(audit).accounts] == ["site"]
    assert (of(audit).charged or 0) > 4


def test_every_declared_account_is_on_the_first_screen_and_its_budget_checked(
    three: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    three.ledger(X).file.declare_disjoint("customers", frozenset(), three.identities[X])
    with monkeypatch.context() as patch:
        patch.setattr(
            fedllm.privacy.ledger, "_account",
            lambda db, data_set: (fedllm.privacy.ledger._declared(db) or [data_set])[0],
        )  # fmt: skip
        run = three.run("run", make_plan(rounds=1))
    audit = assess(run)
    assert audit.finding("charged_before_release").status == "holds"
    assert audit.finding("epsilon").status == "holds"
    assert audit.verdict == "exceeded"
    accounts = {account.name: (account.declared, account.charged) for account in of(audit).accounts}
    assert accounts["site"] == (False, of(audit).charged)
    assert accounts["customers"] == (True, of(audit).run)
    for language in ("en", "ko"):
        first = render_html(audit, "ko" if language == "ko" else "en").partition("<h2>")[0]
        assert "customers" in first


def test_several_plans_are_held_against_the_budget_as_the_site_does(tmp_path: Path) -> None:
    """Their PLD fits, and the site's own ledger, which goes by RDP, would not have admitted them."""
    federation = Federation(tmp_path, sites=SITES, budget=math.inf)
    federation.run("first", make_plan("e" * 32, rounds=3))
    run = federation.run("second", make_plan(rounds=3, noise_multiplier=2.1))
    ledger = federation.ledger(X)
    federation.budget = round(ledger.spent().epsilon + 0.02, 3)
    federation.export(run)
    audit = assess(run)
    assert audit.verdict == "exceeded"
    [account] = of(audit).accounts
    assert account.decides == "RDP"
    assert account.counted == pytest.approx(counted(ledger.events(), DELTA, federation.budget, one_plan=False))
    assert of(audit).left == 0


def test_what_has_no_bound_is_within_no_budget(tmp_path: Path) -> None:
    federation = Federation(tmp_path, sites=SITES, budget=math.inf)
    federation.run("first", make_plan("e" * 32, rounds=1, mode="off", noise_multiplier=None))
    audit = assess(federation.run("second", make_plan(rounds=1)))
    assert audit.finding("protected").status == "holds"
    assert audit.verdict == "exceeded"


def test_a_bound_that_is_unknown_is_printed_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation, run = federation_of(tmp_path, SITES, rounds=1)
    folder = hand_in(run, federation.head_office)
    audit = assess(folder)
    unbound = audit.model_copy(update={"accountants": audit.accountants.model_copy(update={"pld": None})})
    monkeypatch.setattr("fedllm.audit.bundle.verify", lambda *_: (unbound, ()))
    keys = str(federation.write_trust(tmp_path / "keys"))
    assert "epsilon at most ∞" in CliRunner().invoke(app, ["audit", "verify", str(folder), "--trust", keys]).output
