"""Attack: one line of one site's ledger stops everybody's report, or keeps it waiting for ever.

Stopped by the plan's ranges, which hold in evidence too, and by bounded work: the line is a finding about its site.
"""

import base64
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedllm.audit.bundle import verify
from fedllm.audit.evidence import assess
from fedllm.audit.model import Audit
from fedllm.crypto.hash_chain import ENTRY_TYPE, EXPORT, make_entry, open_entry
from fedllm.crypto.identity import Identity
from fedllm.crypto.signed_documents import sign_envelope
from fedllm.errors import ChainError, PrivacyError
from fedllm.privacy.accounting import MAX_STEPS, AccountingEvent
from tests.attacks.audits import append, federation_of, hand_in
from tests.fedllm.audit.evidence import Federation

BAD, GOOD = "branch-1", "branch-2"
HUGE = 10**4000
CHARGE = {"account": "d", "run": "another", "round": 1, "charge": 1, "request": "r", "sampling_rate": 0.1,
          "noise_multiplier": 2.0, "steps": 1}  # fmt: skip
IMPOSSIBLE: dict[str, Any] = {
    "steps": [-1, 10**30, HUGE, MAX_STEPS + 1, 1.5, True, None, "1", math.nan],
    "sampling_rate": [2, -0.1, math.nan, math.inf, HUGE, 5e-324, "0.1", None, 1 + 1e-9],
    "noise_multiplier": [-1, math.nan, math.inf, -math.inf, HUGE, 1e300, "2", None],
    "round": [-1, 2**63, HUGE, 1.5, None],
    "run": ["x" * 1_000_000, 1, None],
    "account": ["x" * 1_000_000, [], None],
}
CASES = [(key, value) for key, values in IMPOSSIBLE.items() for value in values]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Path]:
    return federation_of(tmp_path_factory.mktemp("federation"), (BAD, GOOD), rounds=1)


@pytest.fixture(scope="module")
def before(made: tuple[Federation, Path]) -> Audit:
    """What an audit says before anybody adds a line."""
    audit = assess(made[1])
    assert audit.verdict == "within"
    return audit


@pytest.fixture
def two(made: tuple[Federation, Path], tmp_path: Path) -> tuple[Federation, Path]:
    """The federation, and a copy of its run."""
    shutil.copytree(made[1], tmp_path / "run")
    return made[0], tmp_path / "run"


def add_raw(run: Path, signer: Identity, kind: str, body: object, at: object = None) -> None:
    """Add an entry as no honest program would write it: with numbers that JSON does not have."""
    path = run / "ledgers" / f"{BAD}.jsonl"
    *lines, end = path.read_text("utf-8").splitlines()
    last = open_entry(lines[-1])
    fields = {"number": last.number + 1, "previous": last.digest, "kind": kind, "at": last.at if at is None else at,
              "body": body, "signer": signer.public.to_text()}  # fmt: skip
    payload = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digest = hashlib.sha256(payload.encode()).hexdigest()
    closed = make_entry(last.number + 2, digest, EXPORT, last.at, open_entry(end).body, signer)
    lines += [sign_envelope(payload.encode(), ENTRY_TYPE, signer), closed]
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def the_others_are_as_before(run: Path, before: Audit) -> Audit:
    """Check that the good site's account is what it was, that the bad one is named, and return the audit."""
    after = assess(run)
    assert after.sites[1] == before.sites[1]
    assert after.sites[1].ledger == "verified"
    failed = [finding for finding in after.findings if finding.status == "fails"]
    assert failed
    assert all(BAD in text and GOOD not in text for finding in failed for text in finding.evidence)
    assert len(after.model_dump_json()) < 60_000
    assert after.verdict == "unverifiable"
    return after


@pytest.mark.parametrize(("key", "value"), CASES, ids=lambda value: repr(value)[:20])
def test_a_charge_that_cannot_be_is_a_finding_about_its_site(
    two: tuple[Federation, Path], before: Audit, key: str, value: object
) -> None:
    federation, run = two
    add_raw(run, federation.identities[BAD], "reserved", {**CHARGE, key: value})
    after = the_others_are_as_before(run, before)
    assert after.sites[0].ledger == "broken"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("budget", {"epsilon": 1.0, "delta": 5e-324}),
        ("budget", {"epsilon": HUGE, "delta": 1e-5}),
        ("budget", {"epsilon": math.nan, "delta": math.nan}),
        ("budget", {"epsilon": -1.0, "delta": 1e-5}),
        ("x" * 1_000_000, {}),
        ("released", {**CHARGE, "round": 7}),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_any_other_bad_entry_is_a_finding_about_its_site(
    two: tuple[Federation, Path], before: Audit, kind: str, body: dict[str, Any]
) -> None:
    federation, run = two
    add_raw(run, federation.identities[BAD], kind, body)
    after = assess(run)
    assert after.sites[1] == before.sites[1]
    assert after.verdict != "within"
    assert len(after.model_dump_json()) < 60_000


@pytest.mark.parametrize("at", [HUGE, math.nan, math.inf, -1e300, 1e18])
def test_a_time_that_cannot_be_stops_no_report(two: tuple[Federation, Path], before: Audit, at: object) -> None:
    federation, run = two
    add_raw(run, federation.identities[BAD], "reserved", CHARGE, at)
    assert assess(run).sites[1] == before.sites[1]


def test_many_kinds_of_charges_are_not_composed_for_ever(two: tuple[Federation, Path], before: Audit) -> None:
    federation, run = two
    for number in range(300):
        charge = {**CHARGE, "round": number, "noise_multiplier": 2 + number / 1000}
        append(run, BAD, federation.identities[BAD], "reserved", charge)
    the_others_are_as_before(run, before)


def test_a_charge_whose_distribution_would_fill_the_memory_is_bounded_by_rdp(
    two: tuple[Federation, Path], before: Audit
) -> None:
    federation, run = two
    for number, (rate, noise) in enumerate([(1e-9, 0.54), (1e-6, 0.5), (1.0, 400.0), (1e-9, 0.08)]):
        charge = {**CHARGE, "account": "site", "round": number, "sampling_rate": rate, "noise_multiplier": noise}
        append(run, BAD, federation.identities[BAD], "reserved", {**charge, "steps": MAX_STEPS})
    after = assess(run)
    assert after.sites[1] == before.sites[1]
    assert after.verdict == "exceeded"
    assert after.finding("budget").evidence[0].startswith(BAD)


@pytest.mark.parametrize("changes", [{"epsilon": HUGE}, {"epsilon_rdp": math.inf}, {"ledger_number": HUGE}])
def test_a_statement_with_numbers_that_cannot_be_is_none(changes: dict[str, Any]) -> None:
    from dataclasses import asdict

    from fedllm.errors import CryptoError
    from fedllm.protocol.spending_statement import STATEMENT_TYPE, Statement, open_statement

    signer = Identity.generate()
    statement = Statement("site", "run", "p", 1, 1.0, 1.0, 1e-5, 1, "d", "u", "r", 1, "d")
    fields = {**asdict(statement), "signer": signer.public.to_text(), **changes}
    payload = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    with pytest.raises(CryptoError, match="unknown form"):
        open_statement(sign_envelope(payload.encode(), STATEMENT_TYPE, signer))


def test_a_report_with_a_bad_ledger_is_written_all_the_same_and_says_whose(two: tuple[Federation, Path]) -> None:
    federation, run = two
    append(run, BAD, federation.identities[BAD], "reserved", {**CHARGE, "steps": -1})
    folder = hand_in(run, federation.head_office)
    with pytest.raises(ChainError, match=rf"ledger_chain: ledgers/{BAD}\.jsonl, entry \d+: .*steps=-1"):
        verify(folder, federation.trust)


@pytest.mark.parametrize(("key", "value"), [c for c in CASES if c[0] in ("steps", "sampling_rate", "noise_multiplier")],
                         ids=lambda value: repr(value)[:20])  # fmt: skip
def test_the_accountant_itself_refuses_what_cannot_be(key: str, value: Any) -> None:
    with pytest.raises(PrivacyError, match="impossible accounting event"):
        AccountingEvent(**{"sampling_rate": 0.1, "noise_multiplier": 2.0, "steps": 1, key: value}).check()


def test_lines_that_are_no_entries_are_a_finding(two: tuple[Federation, Path], before: Audit) -> None:
    _, run = two
    path = run / "ledgers" / f"{BAD}.jsonl"
    good = path.read_text("utf-8")
    deep = base64.b64encode(b"[" * 100_000).decode()
    for bad in ("\n", "{}", "\x00", "[" * 100_000, json.dumps({"payload": deep, "payloadType": ENTRY_TYPE})):
        path.write_text(good + bad + "\n", "utf-8")
        the_others_are_as_before(run, before)
    path.write_bytes(b"\xff\xfe")
    the_others_are_as_before(run, before)
