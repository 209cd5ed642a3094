"""Attack: one site's ledger has so many accounts, or mechanisms, that nobody ends with composing what they cost.

Stopped by bounds on what is composed, which hold before it begins: of accounts, of the points of a PLD, of CPU time.
"""

import shutil
from pathlib import Path

import pytest

from fedllm.audit import evidence
from fedllm.audit.evidence import assess
from fedllm.crypto.hash_chain import End, close_export, make_entry, open_entry
from fedllm.crypto.identity import Identity
from fedllm.errors import LedgerError
from fedllm.privacy import accounting
from fedllm.privacy.accounting import AccountingEvent, spent
from fedllm.privacy.ledger import LedgerFile
from fedllm.privacy.ledger_place import MOST_ACCOUNTS
from tests.attacks.audits import federation_of
from tests.attacks.ledgers import Branch
from tests.attacks.test_bad_ledger_line import BAD, CHARGE, GOOD, the_others_are_as_before
from tests.fedllm.audit.evidence import Federation


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Path]:
    return federation_of(tmp_path_factory.mktemp("federation"), (BAD, GOOD), rounds=1)


@pytest.fixture
def two(made: tuple[Federation, Path], tmp_path: Path) -> tuple[Federation, Path]:
    shutil.copytree(made[1], tmp_path / "run")
    return made[0], tmp_path / "run"


def declare(run: Path, signer: Identity, accounts: int) -> None:
    """Declare so many data sets disjoint, each charged once for a mechanism of its own."""
    path = run / "ledgers" / f"{BAD}.jsonl"
    *lines, end = path.read_text("utf-8").splitlines()
    last = open_entry(lines[-1])
    for number in range(accounts):
        charge = {**CHARGE, "account": f"a{number}", "round": number, "noise_multiplier": 2 + number / 1000}
        for kind, body in (("disjoint", {"account": f"a{number}"}), ("reserved", charge)):
            lines.append(make_entry(last.number + 1, last.digest, kind, last.at, body, signer))
            last = open_entry(lines[-1])
    closed = close_export(lines, End(**open_entry(end).body), last.at, signer)
    path.write_text("".join(f"{line}\n" for line in closed), "utf-8")


def test_more_accounts_than_anybody_has_are_no_evidence(two: tuple[Federation, Path]) -> None:
    federation, run = two
    before = assess(run)
    declare(run, federation.identities[BAD], MOST_ACCOUNTS)
    after = the_others_are_as_before(run, before)
    assert after.sites[0].ledger == "broken"
    assert f"more than {MOST_ACCOUNTS} accounts" in after.finding("ledger_chain").evidence[0]


def test_the_clock_is_looked_at_after_every_account(
    two: tuple[Federation, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, run = two
    before = assess(run)
    declare(run, federation.identities[BAD], 20)
    seen, bounded = list[int](), evidence._MOST_SECONDS_ONCE
    honest = evidence.spent

    def slow(events: list[AccountingEvent], *rest: float) -> accounting.PrivacySpent:
        seen.append(len(events))
        return honest(events[:1], *rest)

    monkeypatch.setattr(evidence, "spent", slow)
    monkeypatch.setattr(evidence.time, "process_time", lambda: len(seen) * bounded / 4)
    found = evidence._examined(run, evidence._read_record(run / "record.jsonl", evidence._Checks()), ())
    assert found[0].ledger is None
    assert any("seconds of CPU" in text for text in found[0].checks._seen["epsilon"]["fails"])
    assert len(seen) < 15
    monkeypatch.undo()
    assert assess(run).sites[1] == before.sites[1]


def test_many_costly_mechanisms_are_bounded_by_rdp_before_one_distribution_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a distribution was made")

    monkeypatch.setattr(accounting, "_step_pld", never)
    events = tuple(AccountingEvent(1e-4, 0.6 + number / 500, 1000) for number in range(256))
    assert accounting._too_large(events, 2.0**-14)


def test_ordinary_mechanisms_are_composed() -> None:
    cost = spent([AccountingEvent(0.01, 1.0 + number / 100, 100) for number in range(3)], 1e-5)
    assert not cost.by_rdp_alone
    assert cost.epsilon < cost.epsilon_rdp


def test_an_owner_is_told_at_the_site(branch: Branch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedllm.privacy.ledger.MOST_ACCOUNTS", 3)
    branch.open()
    ledger, data = LedgerFile(branch.office.ledger.file), frozenset[bytes]()
    ledger.declare_disjoint("one", data, branch.office.identity)
    ledger.declare_disjoint("two", data, branch.office.identity)
    with pytest.raises(LedgerError, match="no audit reads more than 3"):
        ledger.declare_disjoint("three", data, branch.office.identity)
    assert ledger.accounts()[-1] != "three"
