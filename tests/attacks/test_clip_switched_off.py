"""Attack: a plan whose numbers switch the clip off, so that a unit moves the sum by more than is charged for.

Stopped three times: by bounds on every number of a plan, by a self-check that knows plans by all their values, and,
where the sum is made, by measuring every row as it enters.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fedllm.errors import ConfigError, MessageError, PrivacyError
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import AccountingEvent
from fedllm.privacy.mechanism import Mechanism
from fedllm.protocol.messages import _KINDS, MAGIC, Declined, Prepare, from_bytes
from fedllm.training import self_check
from fedllm.training.engine import clip_and_sum
from fedllm.values import parse
from tests.bug_zoo.invariants import plan_of
from tests.client.test_site import NAME, Office, read

LOCAL: dict[str, Any] = {
    "run": "attack", "seed": 3, "quorum": 3, "sites": 4,
    "model": {"source": "m", "max_length": 32},
    "adapter": {"rank": 2, "alpha": 16.0, "targets": "all-linear", "layers": [0]},
    "privacy": {
        "mode": "local", "unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0, "sampling_rate": 0.05,
        "units_per_site": 200, "noise_multiplier": 1.5,
    },
    "training": {"rounds": 4, "local_steps": 1},
}  # fmt: skip
SHARED = {**LOCAL, "privacy": {**LOCAL["privacy"], "mode": "distributed"}}
PLANS = {"local": LOCAL, "automatic": {**LOCAL, "privacy": {**LOCAL["privacy"], "clipping": "automatic"}},
         "distributed": SHARED}  # fmt: skip


def whole(values: dict[str, Any]) -> dict[str, Any]:
    """Return a plan with all its defaults, as it travels; one that is null is written as a number would be."""
    return parse(RunPlan, values).model_dump(mode="json")


def numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where a plan has a number."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers(item, (*path, index))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


FIELDS = [*numbers(whole(LOCAL)), ("privacy", "insecure_seed")]
EXTREMES = [
    "0", "-0.0", "0.0", "5e-324", "2.2e-308", repr(2.0**-1037), repr(2.0**-61), "1e-100", "1e-45", "1e-38", "1e-12",
    "1e-9", "1e-6", repr(1 + 2.0**-52), "1", "2", "513.0", "1e6", "1e9", "1e38", "1e100", repr(2.0**61),
    repr(2.0**1023), "1e308", repr(sys.float_info.max), "1e309", "NaN", "Infinity", "-Infinity", "-1", "-1e308",
    str(2**31), str(2**53 + 1), str(2**61 - 1), str(2**63), str(2**64), str(10**40), str(10**308), str(10**400), "true",
]  # fmt: skip


def announced(values: dict[str, Any], changes: dict[tuple[Any, ...], str]) -> bytes:
    """Return the message that announces a plan, numbers written as the server likes."""
    header = json.loads(json.dumps({"kind": "prepare", "plan": values, "session": None, "roster": {}}))
    for index, path in enumerate(changes):
        place = header["plan"]
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = f"@{index}@"
    text = json.dumps(header)
    for index, written in enumerate(changes.values()):
        text = text.replace(f'"@{index}@"', written)
    return MAGIC + len(text.encode()).to_bytes(4, "big") + text.encode()


# rows whose norm is nothing, next to nothing, ordinary, as large as float32 holds, and not a number
ROWS = torch.cat([
    torch.full((1, 33), value) for value in (0.0, 1e-45, 1e-30, 1e-3, 0.1, 1.0, 1e10, 3e38, math.inf, math.nan)
])  # fmt: skip
ROWS = torch.cat([ROWS, -2 * ROWS[5:8], torch.eye(33)[:2] * 1e5, torch.linspace(-1, 1, 33)[None]])


def expect_refused_or_within_the_clip(frame: bytes) -> bool:
    """Return whether the plan was accepted; fails where one unit moves its sums by more than the clip."""
    try:
        plan = from_bytes(frame, Prepare, Prepare).plan
    except MessageError:
        return False
    mechanism = plan.mechanism
    assert mechanism.clip_norm == plan.privacy.clip_norm
    assert sys.float_info.min < mechanism.noise_std < math.inf
    mechanism.event(plan.steps).check()
    for row in ROWS.split(1):
        assert float(clip_and_sum(row, mechanism).norm()) <= plan.privacy.clip_norm
    if (distributed := plan.distributed) is not None:
        try:
            distributed.clip_before_rounding(33)
        except ConfigError:
            return False  # before anything is charged
        assert sys.float_info.min < distributed.quantum < math.inf
        for row in ROWS.split(1):
            entered = clip_and_sum(row, mechanism, distributed)
            assert torch.equal(entered, entered.round())
            assert float(entered.norm()) <= distributed.scale, "quanta in a clip norm"
    return True


@pytest.mark.parametrize("mode", PLANS)
@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_an_extreme_number_is_refused_or_does_not_touch_the_clip(mode: str, path: tuple[Any, ...]) -> None:
    values = whole(PLANS[mode])
    assert expect_refused_or_within_the_clip(announced(values, {}))
    accepted = [
        extreme for extreme in EXTREMES if expect_refused_or_within_the_clip(announced(values, {path: extreme}))
    ]
    assert not set(accepted) & {"NaN", "Infinity", "-Infinity", "1e309", "1e308", str(10**400), "true", "-1"}


@given(
    mode=st.sampled_from(list(PLANS)),
    changes=st.dictionaries(
        st.sampled_from(FIELDS),
        st.sampled_from(EXTREMES)
        | st.floats(allow_nan=False, allow_infinity=False).map(repr)
        | st.floats(1e-6, 1e6).map(repr)
        | st.integers(-1023, 1023).map(lambda k: repr(2.0**k))
        | st.integers(0, 10_000).map(str),
        min_size=1, max_size=4,
    ),
)  # fmt: skip
def test_no_numbers_together_switch_the_clip_off(mode: str, changes: dict[tuple[Any, ...], str]) -> None:
    expect_refused_or_within_the_clip(announced(whole(PLANS[mode]), changes))


def parts(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every part of a JSON schema with where it is."""
    definitions = schema.get("$defs", {})

    def walk(part: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if "$ref" in part:
            part = definitions[part["$ref"].rpartition("/")[2]]
        yield path, part
        for name, inner in part.get("properties", {}).items():
            yield from walk(inner, f"{path}.{name}")
        for key in ("anyOf", "prefixItems"):
            for inner in part.get(key, []):
                yield from walk(inner, path)
        for key in ("items", "additionalProperties", "propertyNames"):
            if isinstance(part.get(key), dict):
                yield from walk(part[key], f"{path}[{key}]")

    return walk(schema, path)


@pytest.mark.parametrize("kind", [RunPlan, *_KINDS.values()], ids=lambda kind: kind.__name__)
def test_every_number_of_a_plan_and_every_length_of_a_message_has_a_bound(kind: Any) -> None:
    unbounded = []
    for path, part in parts(TypeAdapter(kind).json_schema(), kind.__name__):
        of_plan = kind is RunPlan or ".plan." in path
        known = "enum" in part or "const" in part
        ends = [{"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}]
        if part.get("type") in ("number", "integer"):
            bounded = all(end & set(part) for end in ends) or (part["type"] == "number" and not of_plan)
        elif part.get("type") == "string":
            bounded = known or "maxLength" in part or str(part.get("pattern", "")).startswith("^[0-9a-f]{")
        elif part.get("type") == "array":
            bounded = "maxItems" in part
        elif part.get("type") == "object":
            bounded = "properties" in part or "maxProperties" in part
        else:
            continue
        if not bounded and not path.endswith(".payload"):  # its bytes are counted by from_bytes
            unbounded.append((path, part))
    assert unbounded == []


def test_twins_of_one_hash_are_checked_one_by_one(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """513.0 and 1 + 2^-52 are the same to Python's hash(); what was never checked must not pass for the other."""
    clips = [513.0, 1 + 2.0**-52]
    assert hash(clips[0]) == hash(clips[1])
    seen: list[float] = []
    monkeypatch.setattr(self_check, "self_check", lambda subject: seen.append(subject.plan.privacy.clip_norm))
    office = Office(tmp_path, plan_of(tiny_llama))
    for clip in clips * 2:
        office.plan = plan_of(tiny_llama, clip_norm=clip)
        office.prepare()
    assert sorted(set(seen)) == sorted(clips)


def test_a_site_does_not_understand_a_plan_with_a_clip_norm_near_zero(tmp_path: Path, tiny_llama: Path) -> None:
    office = Office(tmp_path, plan_of(tiny_llama))
    plan = office.plan.model_dump(mode="json")
    reply = read(office.site.handle(announced(plan, {("privacy", "clip_norm"): repr(2.0**-1037)})))
    assert reply == Declined(site=NAME, reason="message")
    assert office.events() == []


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan, 1e300, 10.0, 1.0 + 1e-6, -2.0])
@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_where_factors_are_wrong_a_row_beyond_the_clip_enters_as_zeros_and_the_others_as_they_are(
    monkeypatch: pytest.MonkeyPatch, mode: str, wrong: float
) -> None:
    plan = parse(RunPlan, PLANS[mode])
    rows = torch.randn(20, 33, generator=torch.Generator().manual_seed(0)) * 5
    honest = plan.mechanism.factors(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64))
    others = torch.arange(20) != 11
    expected = clip_and_sum(rows[others], plan.mechanism, plan.distributed)

    def faulty(self: Mechanism, norms: torch.Tensor) -> torch.Tensor:
        return torch.where(others, honest, honest * wrong)

    monkeypatch.setattr(Mechanism, "factors", faulty)
    found = clip_and_sum(rows, plan.mechanism, plan.distributed)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0.5])
def test_a_sum_that_is_not_of_whole_quanta_is_not_uploaded(value: float) -> None:
    distributed = parse(RunPlan, SHARED).distributed
    assert distributed is not None
    with pytest.raises(PrivacyError, match="whole quanta"):
        distributed.upload(np.array([1.0, value, 3.0]), self_check._Zeros())


def test_events_of_equal_numbers_cost_the_same_however_they_are_written() -> None:
    """What is remembered of costs is found by ==, which takes 1, 1.0 and True for one another, and 0.0 for -0.0."""
    from fedllm.privacy.accounting import spent

    for one, other in (((1.0, 2.0, 3), (1, 2, 3)), ((-0.0, 1.0, 3), (0.0, 1.0, 3)), ((0.5, -0.0, 1), (0.5, 0.0, 1))):
        assert spent([AccountingEvent(*one)], 1e-5) == spent([AccountingEvent(*other)], 1e-5)
