"""Attack: the server moves a site to another group, or sums it with sites of another, to isolate what it sends.

Stopped by the plan, which says for the whole run who is in one sum with whom: a site takes no other for its peer.
"""

from collections.abc import Mapping

import pytest

from client.secagg_client import SecAggClient
from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.errors import ConfigError, MessageError, PrivacyError, SecAggError
from fedllm.plan import RunPlan
from fedllm.protocol.messages import (
    AdvertisedKey,
    AdvertiseKeys,
    KeyShares,
    Prepare,
    SecAggRequest,
    ShareKeysRequest,
    from_bytes,
)
from fedllm.values import parse
from server.secagg_server import Groups

GROUPS = (("a1", "a2", "a3"), ("b1", "b2", "b3"), ("c1", "c2", "c3"))
NAMES = [name for group in GROUPS for name in group]


def plan_of(groups: tuple[tuple[str, ...], ...]) -> RunPlan:
    return parse(RunPlan, {
        "run": "run", "seed": 0, "sites": 3, "quorum": 3, "groups": groups, "poisoned_sites": 1,
        "model": {"source": "none"}, "adapter": {},
        "privacy": {"mode": "distributed", "units_per_site": 100, "noise_multiplier": 1.0}, "training": {"rounds": 3},
    })  # fmt: skip


class Offices:
    """Nine sites that know each other's keys, and the server, which has their joins to a session."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self.identities = {name: Identity.generate() for name in NAMES}
        self.roster: dict[str, PublicIdentity] = {name: each.public for name, each in self.identities.items()}
        self.masks = {name: SecAggClient(name, self.identity_of(name), lambda _: self.roster) for name in NAMES}
        assert plan.distributed is not None
        self.head = Groups(plan, plan.distributed, 16, 0, self.roster)
        self.joins: dict[str, AdvertisedKey] = {}
        self.context = ""
        for name in NAMES:
            self.join(name)

    def identity_of(self, name: str):  # type: ignore[no-untyped-def]
        return lambda: self.identities[name]

    def join(self, name: str) -> None:
        data = self.masks[name].join(from_bytes(self.head.question, Prepare, Prepare))
        self.head.join(name, data)
        join = from_bytes(data, AdvertiseKeys, AdvertiseKeys)
        self.joins[name], self.context = join.join, join.context

    def ask(self, questions: Mapping[str, bytes], _: int = 0) -> list[tuple[str, bytes | str]]:
        return [
            (name, self.masks[name].answer(from_bytes(data, SecAggRequest, SecAggRequest)))
            for name, data in questions.items()
        ]

    def deal(self, name: str, among: list[str]) -> KeyShares:
        joins = tuple(self.joins[each] for each in sorted(among))
        step = ShareKeysRequest(context=self.context, round=1, joins=joins)
        answer = self.masks[name].answer(SecAggRequest(plan=self.plan, round=1, payload=step.to_bytes()))
        return from_bytes(answer, KeyShares, KeyShares)


def test_in_its_own_group_a_site_deals() -> None:
    offices = Offices(plan_of(GROUPS))
    assert offices.deal("a1", ["a1", "a2", "a3"]).dealing.site == "a1"
    masking, failed = offices.head.deal(1, NAMES, offices.ask)
    assert (sorted(masking), failed) == (NAMES, {})


@pytest.mark.parametrize("among", [
    ["a1", "b2", "b3"],  # another group, in which it takes a place
    ["a1", "a2", "b3"],  # its own, with a stranger
    ["a1", "a2", "a3", "b1"],  # its own, and one more
    NAMES,  # all as one
])  # fmt: skip
def test_a_site_deals_to_nobody_of_another_group(among: list[str]) -> None:
    with pytest.raises(SecAggError):
        Offices(plan_of(GROUPS)).deal("a1", among)


def test_a_site_that_no_group_names_takes_no_part() -> None:
    offices = Offices(plan_of(GROUPS))
    stranger = SecAggClient("d1", offices.identity_of("a1"), lambda _: offices.roster)
    with pytest.raises(PrivacyError, match="in none of them"):  # a site says "policy"
        stranger.join(from_bytes(offices.head.question, Prepare, Prepare))
    with pytest.raises(MessageError, match="in no group"):
        offices.head.join("d1", b"")


def test_other_groups_are_another_plan_which_knows_nothing_of_what_was_dealt() -> None:
    offices = Offices(plan_of(GROUPS))
    moved = plan_of((("b1", "a2", "a3"), ("a1", "b2", "b3"), GROUPS[2]))
    assert moved.digest != offices.plan.digest
    step = ShareKeysRequest(context=offices.context, round=2, joins=())
    with pytest.raises(SecAggError, match="not joined"):
        offices.masks["a1"].answer(SecAggRequest(plan=moved, round=2, payload=step.to_bytes()))


@pytest.mark.parametrize("groups", [
    (("a1", "a2", "a3"), ("a1", "b2", "b3"), GROUPS[2]),  # one site in two sums
    (("a1", "a2"), GROUPS[1], GROUPS[2]),  # too few to hide among
    (GROUPS[0], GROUPS[1]),  # too few to outvote anybody
])  # fmt: skip
def test_a_plan_whose_groups_are_none_is_refused(groups: tuple[tuple[str, ...], ...]) -> None:
    with pytest.raises(ConfigError, match="groups"):
        plan_of(groups)
