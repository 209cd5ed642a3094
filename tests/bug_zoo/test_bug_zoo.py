"""Every planted fault is found by the invariant that names it, and the honest code passes the same invariant."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from client.site import PlanSession
from fedllm.errors import PrivacyError
from fedllm.training import self_check
from fedllm.training.adapter import attach
from fedllm.training.engine import Engine
from fedllm.training.model import load_base
from fedllm.training.self_check import Subject
from tests.bug_zoo.faults import SELF_CHECK, TESTS_ONLY, Fault
from tests.bug_zoo.invariants import INVARIANTS, plan_of

ROOT = Path(__file__).parents[2]
Open = Callable[..., Subject]


@pytest.fixture
def open_subject(tiny_llama: Path) -> Open:
    """Return a function that gives a fresh subject, whose randomness is what a site uses."""

    def make(classifies: bool = False, **changes: Any) -> Subject:
        plan = plan_of(tiny_llama, classifies=classifies, **changes)
        adapter = attach(load_base(plan.model, "cpu"), plan.model, plan.adapter, plan.seed)
        session = cast(Any, SimpleNamespace(site="zoo", plan=plan))
        return Subject(adapter, Engine(adapter), plan, lambda: PlanSession.randomness(session, 1), 8)

    return make


@pytest.mark.parametrize("fault", SELF_CHECK, ids=lambda fault: fault.name)
def test_the_self_check_finds(open_subject: Open, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    fault.inject(monkeypatch)
    subject = open_subject(
        fault.classifies, distributed=fault.distributed, quantize=fault.quantize, method=fault.method
    )
    fault.spoil(subject)
    with pytest.raises(PrivacyError, match=f"^self-check {fault.invariant}: .* nothing was charged") as refused:
        self_check.check(fault.invariant, subject)
    assert "{" not in str(refused.value), "a name was left where its value belongs"
    with pytest.raises(PrivacyError, match=r"^self-check "):
        self_check.self_check(subject)


@pytest.mark.parametrize("fault", TESTS_ONLY, ids=lambda fault: fault.name)
def test_the_tests_find(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    (tmp_path / "honest").mkdir()
    (tmp_path / "faulty").mkdir()
    assert INVARIANTS[fault.invariant](tmp_path / "honest", tiny_llama) == ""
    fault.inject(monkeypatch)
    assert INVARIANTS[fault.invariant](tmp_path / "faulty", tiny_llama) != ""


@pytest.mark.parametrize(
    ("classifies", "changes"),
    [
        (False, {}),
        (True, {}),
        (False, {"sampling_rate": 1.0, "noise_multiplier": 4.0}),
        (False, {"sampling_rate": 0.003}),
        (False, {"quantize": "int8"}),
        (True, {"quantize": "nf4"}),
        (False, {"noise_multiplier": 0.01, "epsilon": 1e9}),
        (False, {"noise_multiplier": 1e5, "clip_norm": 1e-6}),
        (False, {"clip_norm": 1e6}),
        (True, {"distributed": True, "clip_norm": 1e-6}),
        (False, {"distributed": True, "clip_norm": 1e6}),
        (False, {"learning_rate": 1e6}),
        (True, {"optimizer": "adam", "momentum": 0.0}),
        (False, {"clipping": "automatic"}),
        (False, {"mode": "off", "noise_multiplier": None}),
        (False, {"insecure_seed": 1}),
        (False, {"distributed": True}),
        (True, {"distributed": True, "clipping": "automatic"}),
        (False, {"distributed": True, "insecure_seed": 1}),
    ],
    ids=str,
)
def test_the_honest_code_passes_whatever_the_plan(
    open_subject: Open, classifies: bool, changes: dict[str, Any]
) -> None:
    subject = open_subject(classifies, **changes)
    self_check.self_check(subject)


def test_every_invariant_has_a_fault_that_it_finds() -> None:
    rare = {"order-changes-nothing"}  # see test_a_model_with_dropout_is_found
    assert {fault.invariant for fault in SELF_CHECK} == set(self_check.CHECKS) - rare
    assert {fault.invariant for fault in TESTS_ONLY} == set(INVARIANTS)


def test_a_model_with_dropout_is_found(open_subject: Open) -> None:
    """Its sum would depend on coins that nobody accounts for."""
    subject = open_subject()
    for layer in subject.adapter.model.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.5
        layer.train()
    with pytest.raises(PrivacyError, match=r"^self-check order-changes-nothing"):
        self_check.check("order-changes-nothing", subject)


def test_the_documentation_lists_every_fault_with_its_invariant_and_where_it_runs() -> None:
    text = (ROOT / "docs" / "privacy.md").read_text("utf-8")
    rows = re.findall(r"^\| (.+?) \| `([a-z-]+)` \| (.+?) \|$", text, re.MULTILINE)
    expected = [(fault.name, fault.invariant, "self-check") for fault in SELF_CHECK]
    expected += [(fault.name, fault.invariant, "tests") for fault in TESTS_ONLY]
    assert [row for row in rows if row[2] in ("self-check", "tests")] == expected


@pytest.mark.parametrize(("sites", "quorum"), [(50, 34), (200, 134), (1000, 667)])
def test_where_excess_noise_comes_in_steps_the_honest_code_passes(open_subject: Open, sites: int, quorum: int) -> None:
    subject = open_subject(distributed=True, sites=sites, quorum=quorum)
    self_check.check("share-has-its-deviation", subject)
    self_check.check("upload-is-a-sum-with-its-share", subject)


@pytest.mark.parametrize(
    "fault",
    [fault for fault in SELF_CHECK if fault.invariant == "share-has-its-deviation"],
    ids=lambda fault: fault.name,
)
def test_where_excess_noise_comes_in_steps_the_same_faults_are_found(
    open_subject: Open, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    fault.inject(monkeypatch)
    with pytest.raises(PrivacyError, match=r"^self-check share-has-its-deviation"):
        self_check.check(fault.invariant, open_subject(distributed=True, sites=50, quorum=34))
