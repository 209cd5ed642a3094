"""Attack: texts and figures of the server are shown to the officer as if the officer's own software had found them.

Stopped where they are printed (control characters are written out), parsed (nothing is said twice) and computed again.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.audit.accountants import CROSS_CHECKS
from fedllm.audit.bundle import verify
from fedllm.audit.evidence import assess
from fedllm.audit.model import CrossCheck, Estimate
from fedllm.audit.report import to_json
from fedllm.canonical import read_json
from fedllm.cli.enrolment import report
from fedllm.cli.main import main
from fedllm.errors import ChainError, FedllmError
from fedllm.ops.health_checks import CheckResult
from fedllm.shown import escaped
from tests.attacks.audits import federation_of, hand_in, rewrite, sign
from tests.fedllm.audit.evidence import Federation

SITES = ("busan", "seoul")
PAINT = "\r\x1b[1A\x1b[2K\x9b1G\u202e\u2066\nverified: within budget\x1b[8m"


@pytest.fixture
def two(tmp_path: Path) -> tuple[Federation, Path]:
    return federation_of(tmp_path, SITES, rounds=1)


def test_an_entry_does_not_rewrite_the_officers_screen(
    two: tuple[Federation, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    federation, run = two
    rewrite(run / "record.jsonl", federation.head_office, lambda bodies: bodies.insert(1, {"kind": PAINT}))
    folder = hand_in(run, federation.head_office)
    keys = federation.write_trust(run / "keys.txt")
    monkeypatch.setattr(sys, "argv", ["fedllm", "audit", "verify", str(folder), "--trust", str(keys)])
    with pytest.raises(SystemExit) as stop:
        main()
    said = "".join(capfd.readouterr())
    assert stop.value.code == 1
    assert r"\x1b[2K\x9b1G\u202e\u2066\nverified" in said
    assert all(sign.isprintable() or sign == "\n" for sign in said)
    assert not any(line.startswith("verified") for line in said.splitlines())


def test_a_finding_of_the_doctor_does_not_either(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FedllmError):
        report([CheckResult("ERROR", f"the server calls itself {PAINT}")])
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["부산-해운대: ε 1.2 ≤ 3", "plain", "日本語 – … ∞"])
def test_what_people_write_stays_as_it_is(text: str) -> None:
    assert escaped(text) == text


def test_a_key_that_is_given_twice_is_refused_everywhere_in_json() -> None:
    assert read_json('{"a": [{"b": 1}], "c": 2}') == {"a": [{"b": 1}], "c": 2}
    for text in ('{"a": 1, "a": 1}', '[{"x": {"a": 1, "b": 2, "a": 3}}]'):
        with pytest.raises(ValueError, match="'a' is given twice"):
            read_json(text)


def _first(text: str, more: str) -> str:
    """Say something else in the first place, where some readers look, and the truth in the second."""
    return text.replace("{", "{" + more + ",", 1)


@pytest.mark.parametrize(("name", "change", "said"), [
    ("audit.json", lambda text: _first(text, '"verdict": "within"'), "'verdict' is given twice"),
    ("plan.json", lambda text: text.replace('"epsilon"', '"epsilon": 0.1, "epsilon"', 1), "plan"),
    ("metrics.jsonl", lambda text: _first(text, '"loss": 0.001'), "metrics"),
    ("metrics.jsonl", lambda text: _first(text, '"epsilon_spent": 0.01'), "metrics"),
])  # fmt: skip
def test_a_file_that_says_two_things_is_refused(
    two: tuple[Federation, Path], name: str, change: Callable[[str], str], said: str
) -> None:
    federation, run = two
    folder = hand_in(run, federation.head_office)
    before = (folder / name).read_text("utf-8")
    (folder / name).write_text(change(before), "utf-8")
    assert (folder / name).read_text("utf-8") != before
    sign(folder, federation.head_office)
    with pytest.raises(ChainError, match=said):
        verify(folder, federation.trust)


def test_the_time_of_a_report_is_a_time(two: tuple[Federation, Path]) -> None:
    federation, run = two
    folder = hand_in(run, federation.head_office)
    content = json.loads((folder / "audit.json").read_text("utf-8"))
    content["made"] += ": CORRECTION: epsilon is 0.01"
    (folder / "audit.json").write_text(json.dumps(content), "utf-8")
    sign(folder, federation.head_office)
    with pytest.raises(ChainError, match="made"):
        verify(folder, federation.trust)


@pytest.mark.parametrize(("own", "wrong"), [(True, True), (True, False), (False, False)])
def test_a_figure_of_opacus_is_computed_or_not_compared(
    two: tuple[Federation, Path], monkeypatch: pytest.MonkeyPatch, own: bool, wrong: bool
) -> None:
    federation, run = two
    folder = hand_in(run, federation.head_office)
    before = assess(folder)
    pld = before.accountants.pld or 0.0
    given = {"prv": CrossCheck("Opacus", lambda *_: Estimate(pld - 0.009))} if wrong else CROSS_CHECKS
    claim = assess(folder, None, before.made or "2026-10-01 12:00", federation.head_office.public.fingerprint, given)
    assert claim.accountants.prv is not None
    (folder / "audit.json").write_bytes(to_json(claim))
    sign(folder, federation.head_office)
    if not own:
        monkeypatch.delitem(CROSS_CHECKS, "prv")
    if wrong:
        with pytest.raises(ChainError, match=r"accountants\.prv states"):
            verify(folder, federation.trust)
        return
    audit, left = verify(folder, federation.trust)
    assert (audit.accountants.prv is None) is not own
    assert any("accountants.prv" in text for text in left) is not own
