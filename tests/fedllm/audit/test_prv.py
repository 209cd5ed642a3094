"""Opacus' PRV accountant, as it is asked here, against the vectors and against the PLD."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedllm.audit.prv import prv
from fedllm.privacy.accounting import AccountingEvent, spent

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[2] / "vectors" / "accounting.json").read_text("utf-8"))
LOW, HIGH = VECTORS["tolerance"]["opacus_prv_minus_pld"]
SINGLE = [
    ([AccountingEvent(v["q"], v["noise_multiplier"], v["steps"])], v["pld"], v["opacus_prv_upper"])
    for v in VECTORS["single"]
]
PAIR, SITES = VECTORS["composed"]
COMPOSED = [
    ([AccountingEvent(*event) for event in PAIR["events"]], PAIR["pld"], None),
    ([AccountingEvent(*SITES["event"])] * SITES["k"][-1], SITES["pld"][-1], None),
]
DELTA = 1e-5


@pytest.mark.parametrize(("events", "pld", "published"), SINGLE + COMPOSED)
def test_prv_is_as_far_from_the_pld_of_the_vectors_as_they_say_and_bounded_as_opacus_publishes(
    events: list[AccountingEvent], pld: float, published: float | None
) -> None:
    third = prv(events, DELTA)
    assert third.upper is not None
    assert LOW <= third.upper - pld <= HIGH
    assert third.epsilon is not None
    assert abs(third.epsilon - spent(events, DELTA).epsilon) <= 0.01
    assert third.epsilon < third.upper
    if published is not None:
        assert third.upper == pytest.approx(published, abs=1e-3)


def test_where_opacus_is_missing_or_cannot_tell_it_is_said_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prv([], DELTA).reason
    monkeypatch.setitem(sys.modules, "opacus", None)
    third = prv([AccountingEvent(0.1, 1.0, 1)], DELTA)
    assert (third.epsilon, third.upper, third.reason) == (None, None, "Opacus is not installed")


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
