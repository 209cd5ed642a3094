"""A valid configuration, as plain data that a test may spoil."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from fedllm.plan import RunPlan
from fedllm.values import parse

Values = dict[str, Any]

_CHOSEN: Values = {
    "run": "시험-run-1",
    "seed": 7,
    "model": {
        "source": "models/기본",
        "revision": "0123abcd",
        "task": "causal-lm",
        "labels": [],
        "pooling": "native",
        "max_length": 64,
    },
    "adapter": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"], "layers": [0, 1], "train": "B"},
    "privacy": {
        "mode": "local",
        "unit": "record",
        "records_per_person": 3,
        "epsilon": 8.0,
        "delta": 1e-5,
        "clip_norm": 0.5,
        "sampling_rate": 0.1,
        "units_per_site": 200,
        "noise_multiplier": 1.25,
        "insecure_seed": None,
    },
    "training": {
        "rounds": 5,
        "local_steps": 2,
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "momentum": 0.5,
        "server": {"name": "adam", "learning_rate": 0.02, "momentum": 0.1, "betas": [0.9, 0.99], "eps": 1e-3},
        "wire": "float16",
    },
}

# Every key, those that were not chosen above with their defaults.
_PLAN: Values = parse(RunPlan, _CHOSEN).model_dump(mode="json")


def with_values(values: Values, changes: Mapping[str, Any]) -> Values:
    """Return a deep copy of `values` with the dotted keys of `changes` set."""
    result = copy.deepcopy(values)
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = result
        for parent in parents:
            place = place[parent]
        place[last] = value
    return result


@pytest.fixture(scope="session")
def plan_values() -> Callable[..., Values]:
    """Return a function that gives a valid RunPlan as plain data, with dotted keys set as asked."""
    return lambda changes=None: with_values(_PLAN, changes or {})


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., RunPlan]:
    """Return a function that gives a RunPlan, with dotted keys set as asked."""
    return lambda changes=None: parse(RunPlan, with_values(_PLAN, changes or {}))
