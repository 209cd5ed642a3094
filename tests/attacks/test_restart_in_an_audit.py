"""Attack: a site loses its ledger on purpose, states a loss of nothing, and its audit looks as clean as before.

Stopped by the signed entry: an audit counts what was stated, and says that nobody can verify it.
"""

from dataclasses import replace
from pathlib import Path

import pytest

import fedllm.privacy.ledger
from fedllm.audit.evidence import assess
from fedllm.privacy.accounting import spent
from fedllm.privacy.ledger import Loss, fingerprint, restart
from tests.fedllm.audit.evidence import Federation, make_plan

SITE = "incheon"


@pytest.mark.parametrize("stated", [True, False])
def test_an_audit_counts_what_was_stated_and_does_not_call_it_verified(tmp_path: Path, stated: bool) -> None:
    federation = Federation(tmp_path)
    first, second = make_plan("a" * 32), make_plan("b" * 32)
    federation.run("first", first)
    identity, place = federation.identities[SITE], federation.place(SITE)
    place.file.unlink()
    event = first.mechanism.event(first.training.local_steps)
    lost = [Loss(first.run, replace(event, steps=event.steps * first.training.rounds))] if stated else []
    restart(place, identity, lost)
    ledger = federation.ledger(SITE).file
    ledger.declare_disjoint("2026", fingerprint([b"x"]), identity)
    ledger.confirm_clock(identity)
    audit = assess(federation.run("second", second), federation.trust)
    finding = next(finding for finding in audit.findings if finding.code == "ledger_complete")
    assert (finding.status, len(finding.evidence)) == ("unverified", 1)
    assert f"{SITE}, #1: restarted" in finding.evidence[0]
    charged = {site.name: site.charged for site in audit.sites}
    others = {value for name, value in charged.items() if name != SITE}
    assert len(others) == 1
    assert (charged[SITE] in others) == stated
    assert audit.verdict != "within"


def test_an_audit_counts_what_is_lost_on_every_account_and_gives_nothing_back_that_was_open(tmp_path: Path) -> None:
    """Of a site's own software, such as an earlier one, which gave back what an older ledger had open."""
    federation = Federation(tmp_path)
    first, second = make_plan("a" * 32), make_plan("b" * 32)
    identity, place, event = federation.identities[SITE], federation.place(SITE), first.event(1)
    ledger = federation.ledger(SITE)
    ledger.file.declare_disjoint("2026", fingerprint([b"x"]), identity)
    ledger.reserve("open", 1, "request", event)
    place.anchor.unlink()
    restart(place, identity, [Loss(first.run, event)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedllm.privacy.ledger, "_before_restart", lambda *_: False)
        federation.ledger(SITE).abort("open", 1)
    assert federation.ledger(SITE).events() == [event]
    audit = assess(federation.run("second", second), federation.trust)
    accounts = {account.name: account for site in audit.sites if site.name == SITE for account in site.accounts}
    steps = event.steps * second.training.rounds
    own = replace(event, steps=steps + 2 * event.steps)
    assert accounts["site"].charged == pytest.approx(spent([own], first.privacy.delta).epsilon, abs=1e-6)
    assert accounts["2026"].charged == pytest.approx(spent([event], first.privacy.delta).epsilon, abs=1e-6)
    epsilon = next(finding for finding in audit.findings if finding.code == "epsilon")
    assert epsilon.status == "fails", "what the site stated is too little"
