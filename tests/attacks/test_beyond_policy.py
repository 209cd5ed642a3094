"""Attack: a plan that asks for more than an owner would think of, while the budget admits it.

Stopped by the owner's limits in site.yaml, with defaults for those who name none; refused before records or ledger are
looked at, and with one code for all of them.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from client.policy import SitePolicy, widest
from fedllm.errors import PrivacyError
from fedllm.plan import RunPlan
from fedllm.privacy.mechanism import Mechanism
from fedllm.protocol.messages import Declined, RoundBegun, TrainRequest
from fedllm.training.engine import clip_and_sum
from fedllm.values import parse
from tests.bug_zoo.invariants import plan_of
from tests.client.test_site import NAME, Office, read

DEFAULTS = SitePolicy(epsilon=8.0)
# what is asked for: where in a plan, the most (or least) that an owner who names no limit permits, and a little beyond
BEYOND: dict[str, tuple[str, Any, Any]] = {
    "privacy.delta": ("delta", 1e-5, 1.1e-5),
    "privacy.unit": ("unit", "record", "person"),
    "adapter.rank": ("max_rank", 64, 65),
    "model.max_length": ("max_length", 1024, 1025),
    "privacy.records_per_person": ("max_records_per_person", 64, 65),
    "training.local_steps": ("max_local_steps", 100, 101),
    "privacy.sampling_rate": ("max_sampling_rate", 0.5, 0.51),
    "privacy.noise_multiplier": ("min_noise_multiplier", 0.3, 0.29),
    "privacy.noise_multiplier ": ("max_noise_multiplier", 10.0, 10.1),
}

BEGUN = RoundBegun(roster="a" * 64, number=1, digest="b" * 64)


def asking(base: Path, changes: dict[str, Any]) -> RunPlan:
    """Return a plan that the defaults admit, but for `changes`."""
    values = plan_of(base, delta=1e-5, units_per_site=1000).model_dump(mode="json")
    for key, value in changes.items():
        section, name = key.strip().split(".")
        values[section][name] = value
    return parse(RunPlan, values)


@pytest.mark.parametrize("key", BEYOND)
def test_a_plan_at_every_limit_is_admitted_and_beyond_any_of_them_declined(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    most = {each: limit for each, (_, limit, _) in BEYOND.items()}
    DEFAULTS.admit(asking(tiny_llama, most))
    office = Office(tmp_path, asking(tiny_llama, {key: BEYOND[key][2]}))
    office.policy = DEFAULTS
    office.restart()
    train = TrainRequest(plan=office.plan, round=1, spec_digest="0" * 64, head=None, begun=BEGUN).to_bytes()
    assert office.prepare() == read(office.site.handle(train)) == Declined(site=NAME, reason="policy")
    assert not office.ledger_path.exists()
    assert [key.strip() in message for message in caplog.messages] == [True, True], "the owner can read why"


@pytest.mark.parametrize("key", [key for key in BEYOND if key != "privacy.unit"])
def test_an_owner_may_set_every_limit(tiny_llama: Path, key: str) -> None:
    name, _, beyond = BEYOND[key]
    wider = parse(SitePolicy, {"epsilon": 8.0, name: beyond})
    wider.admit(asking(tiny_llama, {key: beyond}))


@pytest.mark.parametrize("key", BEYOND)
def test_the_widest_policy_has_no_limit_but_its_own(tiny_llama: Path, key: str) -> None:
    plan = asking(tiny_llama, {key: BEYOND[key][2]})
    widest(math.inf, 1e-3, unit=plan.privacy.unit).admit(plan)
    with pytest.raises(PrivacyError, match=r"privacy\.delta"):
        widest(math.inf, 1e-6, unit=plan.privacy.unit).admit(plan)


@pytest.mark.parametrize(("own", "planned"), [("record", "person"), ("person", "record")])
def test_the_unit_of_a_plan_is_that_of_the_office_in_both_directions(tiny_llama: Path, own: str, planned: str) -> None:
    policy = parse(SitePolicy, {"epsilon": 8.0, "unit": own})
    policy.admit(asking(tiny_llama, {"privacy.unit": own}))
    with pytest.raises(PrivacyError, match=f"privacy.unit={planned}"):
        policy.admit(asking(tiny_llama, {"privacy.unit": planned}))


def test_one_record_more_moves_its_person_by_two_clip_norms() -> None:
    """Why a plan of persons does not do for a site that protects records: one clip norm is charged."""
    mechanism, first, second = Mechanism(1.0, 1.0, 0.5), torch.tensor([[3.0, 0.0]]), torch.tensor([[-9.0, 0.0]])
    without = clip_and_sum(first, mechanism)
    with_it = clip_and_sum((first + second) / 2, mechanism)  # a person's loss is the mean over that person's records
    assert float((with_it - without).norm()) == pytest.approx(2.0)
