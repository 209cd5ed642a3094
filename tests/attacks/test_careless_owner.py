"""Attack: a careless owner changes what a unit is told by, or loses a ledger, so that one side's cost is forgotten.

Stopped by the ledger: whatever moves a unit from one side to the other is in the rule that its chain notes, and what
counts on both sides is held against every limit.
"""

import math
from pathlib import Path
from typing import Any

import pytest

from client.policy import widest
from client.records import Declared, load_records
from fedllm.config import TextConfig
from fedllm.errors import ConfigError, PrivacyError
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import spent
from fedllm.privacy.ledger import LedgerFile
from fedllm.privacy.split import Side, Split
from fedllm.protocol.messages import Declined, Message, from_bytes
from fedllm.training.model import load_reader
from fedllm.values import parse
from tests.bug_zoo.test_two_sides import SmallSite, scored

ROWS: list[dict[str, Any]] = [{"who": None, "text": f"record {n}", "note": f"note {n}"} for n in range(40)]


def sides(base: Path, text: TextConfig, unit: Any = "record") -> tuple[list[Side], str]:
    """The sides of units of which nobody knows the person, and the rule that is noted."""
    plan = scored(base, unit)
    reader = {plan.model.source: load_reader(plan.model)}
    records = load_records(ROWS, text, "who", Declared(len(ROWS), unit), reader)
    return [Split(0.5, b"k" * 32).side(each) for each in records.identities], records.rule


def test_a_record_without_its_person_moves_no_side_unless_the_rule_says_so(tiny_llama: Path) -> None:
    before, rule = sides(tiny_llama, TextConfig(text="{text}"))
    after, other = sides(tiny_llama, TextConfig(text="{text} {note}"))
    assert before != after
    assert rule != other
    _, person = sides(tiny_llama, TextConfig(text="{text}"), "person")
    assert sides(tiny_llama, TextConfig(text="{text} {note}"), "person")[1] == person, "such a unit is empty"


def test_the_limit_of_a_run_holds_for_what_counts_on_both_sides(tiny_llama: Path, tmp_path: Path) -> None:
    plan = scored(tiny_llama, mode="local")
    sides_: tuple[Side, ...] = ("training", "evaluation")
    own, both = (
        max(spent(plan.cost(plan.exchanges, side, both), 1e-3).epsilon for side in sides_) for both in (False, True)
    )
    limit = {"epsilon": 100.0, "run_epsilon": (own + both) / 2}
    first = SmallSite(tmp_path, plan, **limit)
    first.answer()
    again = SmallSite(tmp_path, plan.model_copy(update={"run": "another"}), **limit, evaluation_share=0.3)
    refused = from_bytes(again.site.handle(again.request()), Message, Message)
    assert isinstance(refused, Declined)
    assert refused.reason == "policy"
    assert len(LedgerFile(first.file).charges()) == 1
    policy = widest(math.inf, 1e-3, unit="person", run_epsilon=limit["run_epsilon"])
    policy.admit(plan)
    with pytest.raises(PrivacyError, match="run_epsilon"):
        policy.check_run(plan, both=True)


def test_a_plan_whose_scores_32_bits_are_too_coarse_for_is_none() -> None:
    """A site that charged for it would stop when it rounds its sum, until its owner acts."""
    plan: dict[str, Any] = {
        "run": "run", "seed": 0, "model": {"source": "none"}, "adapter": {}, "sites": 3, "quorum": 3,
        "privacy": {
            "mode": "distributed", "units_per_site": 30_000_000, "sampling_rate": 1e-4, "noise_multiplier": 10.0,
            "delta": 1e-9,
        },
        "training": {"rounds": 3, "local_steps": 1},
    }  # fmt: skip
    assert parse(RunPlan, plan)
    with pytest.raises(ConfigError, match="coarsely"):
        parse(RunPlan, plan | {"evaluation": {"every": 1, "noise_multiplier": 10.0}})


@pytest.mark.parametrize("every", [1, 2, 3, 5, 12, 20])
def test_no_rounds_that_were_lost_cost_more_than_what_their_number_is_taken_for(tiny_llama: Path, every: int) -> None:
    plan: RunPlan = scored(tiny_llama, mode="local")
    plan = plan.model_copy(
        update={
            "training": plan.training.model_copy(update={"rounds": 12}),
            "evaluation": plan.evaluation.model_copy(update={"every": every}),
        }
    )
    for many in range(1, 13):
        training, scores = plan.most(many)
        assert training == plan.mechanism.event(many)
        for first in range(1, 14 - many):
            lost = [*range(first, first + many), 13]
            assert sum(plan.score_noise(number) is not None for number in lost) <= scores.steps <= plan.scores
    assert plan.most(99) == plan.cost(plan.exchanges, "training", both=True)
