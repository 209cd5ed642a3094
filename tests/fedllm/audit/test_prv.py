"""Opacus' PRV accountant, as it is asked here, against the vectors and against the PLD."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedllm.audit.prv import epsilon_prv, prv
from fedllm.privacy.accounting import AccountingEvent, spent

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[2] / "vectors" / "accounting.json").read_text("utf-8"))
LOW, HIGH = VECTORS["tolerance"]["opacus_prv_minus_pld"]
SINGLE = [([AccountingEvent(v["q"], v["noise_multiplier"], v["steps"])], v["pld"]) for v in VECTORS["single"]]
PAIR, SITES = VECTORS["composed"]
COMPOSED = [([AccountingEvent(*event) for event in PAIR["events"]], PAIR["pld"])]
COMPOSED += [([AccountingEvent(*SITES["event"])] * k, pld) for k, pld in zip(SITES["k"], SITES["pld"], strict=True)]
DELTA = 1e-5


@pytest.mark.parametrize(("events", "pld"), SINGLE + COMPOSED)
def test_prv_is_as_far_from_the_pld_of_the_vectors_as_they_say(events: list[AccountingEvent], pld: float) -> None:
    third = prv(events, DELTA)
    assert third.upper is not None
    assert LOW <= third.upper - pld <= HIGH
    assert third.estimate is not None
    assert abs(third.estimate - spent(events, DELTA).epsilon) <= 0.01
    assert third.estimate < third.upper
    assert epsilon_prv(events, DELTA) == third.estimate


@pytest.mark.parametrize("vector", VECTORS["single"], ids=lambda v: f"q={v['q']}")
def test_the_upper_bound_is_the_one_that_opacus_publishes(vector: dict[str, Any]) -> None:
    third = prv([AccountingEvent(vector["q"], vector["noise_multiplier"], vector["steps"])], DELTA)
    assert third.upper == pytest.approx(vector["opacus_prv_upper"], abs=1e-3)


def test_where_opacus_is_missing_or_cannot_tell_it_is_said_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prv([], DELTA).reason
    monkeypatch.setitem(sys.modules, "opacus", None)
    third = prv([AccountingEvent(0.1, 1.0, 1)], DELTA)
    assert (third.estimate, third.upper, third.reason) == (None, None, "Opacus is not installed")


def test_opacus_is_asked_without_torch_and_is_whole_for_whoever_imports_it_later() -> None:
    code = """
import sys
from fedllm.audit.prv import prv
from fedllm.privacy.accounting import AccountingEvent
mine = prv([AccountingEvent(0.01, 1.0, 10)], 1e-5).upper
assert mine is not None
assert not {"torch", "opacus"} & set(sys.modules), "loaded"
from opacus.accountants import PRVAccountant
theirs = PRVAccountant()
theirs.history = [(1.0, 0.01, 10)]
assert round(theirs.get_epsilon(1e-5), 9) == mine
import opacus
opacus.PrivacyEngine
"""
    subprocess.run([sys.executable, "-c", code], check=True)
