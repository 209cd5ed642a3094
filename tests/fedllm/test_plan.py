"""A configuration is refused, with the name of the offending key, before anything is loaded; a plan has one digest."""

import copy
import json
import math
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedllm.config import DataConfig, PartitionConfig, PrivacyConfig, SimulationConfig
from fedllm.errors import ConfigError
from fedllm.plan import RunPlan
from fedllm.privacy.randomness import OsRandomness
from fedllm.values import Frozen, parse
from tests.conftest import SHOWN

Values = dict[str, Any]
Make = Callable[..., RunPlan]
MakeValues = Callable[..., Values]
Path_ = tuple[str, ...]
T = TypeVar("T", bound=Frozen)


@pytest.fixture(scope="session")
def simulation_values(plan_values: MakeValues) -> MakeValues:
    """Return a function that gives a valid SimulationConfig as plain data, with every key."""
    plan = plan_values()
    values: Values = {
        "name": "첫 실행",
        "output": "runs",
        "seed": 3,
        "resume": False,
        "model": plan["model"],
        "data": {
            "train": "train.jsonl",
            "train_split": "train",
            "heldout": "heldout.jsonl",
            "heldout_split": "test",
            "heldout_limit": 64,
            "prompt": "문의: {question}\n답변: ",
            "text": "{answer}",
            "chat": False,
            "label": None,
            "unit": "customer_id",
            "description": "records",
            "samples": 3,
        },
        "adapter": plan["adapter"],
        "privacy": {**plan["privacy"], "unit": "person"},
        "training": plan["training"],
        "federation": {
            "backend": "in-process",
            "partition": {"by": "iid", "column": None, "sites": 4, "alpha": 0.5},
            "quorum": 2,
            "round_timeout": 60.0,
            "weights": {"서울": 2.0},
            "cpus_per_site": 1.0,
            "gpus_per_site": 0.0,
        },
        "site": {"epsilon": 8.0, "budgets": {"부산": 4.0}, "min_units": 2, "micro_batch": 8, "device": "cpu"},
    }

    every_key = parse(SimulationConfig, values).model_dump(mode="json")

    def make(changes: Values | None = None) -> Values:
        result = copy.deepcopy(every_key)
        for key, value in (changes or {}).items():
            set_at(result, tuple(key.split(".")), value)
        return result

    return make


def set_at(values: Values, path: Path_, value: object) -> None:
    for part in path[:-1]:
        values = values[part]
    values[path[-1]] = value


def get_at(values: Values, path: Path_) -> Any:
    for part in path:
        values = values[part]
    return values


def sections(kind: type[Frozen], path: Path_ = ()) -> Iterator[tuple[Path_, type[Frozen]]]:
    """Yield every nested model of a configuration with its path."""
    yield path, kind
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Frozen):
            yield from sections(field.annotation, (*path, name))


def fields(kind: type[Frozen]) -> list[Path_]:
    """Return the path of every field that is not itself a model."""
    inner = {path for path, _ in sections(kind)}
    return [
        (*path, name) for path, model in sections(kind) for name in model.model_fields if (*path, name) not in inner
    ]


def dotted(path: Path_) -> str:
    return ".".join(path)


SECTIONS = [path for path, _ in sections(SimulationConfig)]
FIELDS = fields(SimulationConfig)
PLAN_FIELDS = fields(RunPlan)


@pytest.mark.parametrize("path", FIELDS, ids=dotted)
def test_a_misspelt_key_is_refused_with_the_right_one(simulation_values: MakeValues, path: Path_) -> None:
    misspelt = (*path[:-1], path[-1] + "x")
    with pytest.raises(ConfigError) as error:
        parse(SimulationConfig, simulation_values({dotted(misspelt): 1}))
    assert f"{dotted(misspelt)}: unknown key; did you mean {path[-1]}?" in str(error.value)


@pytest.mark.parametrize("path", SECTIONS, ids=dotted)
def test_a_key_like_no_other_is_refused_with_the_known_ones(simulation_values: MakeValues, path: Path_) -> None:
    with pytest.raises(ConfigError) as error:
        parse(SimulationConfig, simulation_values({dotted((*path, "zzqq")): 1}))
    assert f"{dotted((*path, 'zzqq'))}: unknown key; known keys: " in str(error.value)
    kind = dict(sections(SimulationConfig))[path]
    for name in kind.model_fields:
        assert name in str(error.value)


def refusal(values: Values) -> str:
    """Return why a configuration is refused, or "" where it is accepted."""
    try:
        parse(SimulationConfig, values)
    except ConfigError as error:
        return str(error)
    return ""


def wrong_types(value: object) -> list[object]:
    """Return values of types that the field of a valid `value` cannot accept, however well they might convert."""
    if isinstance(value, bool):
        return [1, 0, "true", "false", None, [], {}]
    if isinstance(value, int):
        return [str(value), value + 0.5, True, [value], {"a": value}]
    if isinstance(value, float):
        return [str(value), "nan", True, [value], {"a": value}, math.nan, math.inf, -math.inf]
    if isinstance(value, str):
        return [8, 8.5, True, [value], {"a": value}]
    if isinstance(value, list):
        return ["8", 8, True, {"a": 1}, [None], [{}]]
    if isinstance(value, dict):
        return ["8", 8, [1], None, {"a": "8"}, {"a": None}, {"a": math.nan}, {"a": math.inf}, {"a": True}]
    return [["unexpected"], {"unexpected": 1}]


@pytest.mark.parametrize("path", FIELDS, ids=dotted)
def test_a_value_of_another_type_is_refused_and_never_converted(simulation_values: MakeValues, path: Path_) -> None:
    for wrong in wrong_types(get_at(simulation_values(), path)):
        if (path, wrong) == (("data", "columns"), {"a": "8"}):
            continue  # names of columns, where other mappings hold numbers
        assert dotted(path) in refusal(simulation_values({dotted(path): wrong})), wrong


@pytest.mark.parametrize("path", SECTIONS[1:], ids=dotted)
def test_a_section_that_is_missing_or_no_mapping_is_refused(simulation_values: MakeValues, path: Path_) -> None:
    for wrong in (None, 1, "local", [], True):
        with pytest.raises(ConfigError) as error:
            parse(SimulationConfig, simulation_values({dotted(path): wrong}))
        assert dotted(path) in str(error.value)


IMPOSSIBLE: list[tuple[str, object]] = [
    ("name", ""), ("name", "a/b"), ("name", "a\\b"), ("name", "."), ("name", ".."), ("name", "x" * 201),
    ("name", "nul\0"), ("seed", -1), ("seed", 2**64), ("seed", 10**400),
    ("model.source", ""), ("model.max_length", 7), ("model.task", "regression"), ("model.pooling", "max"),
    ("model.labels", ["a", "b"]), ("model.pooling", "mean"),
    ("data.train", ""), ("data.text", ""), ("data.heldout_limit", 0), ("data.samples", -1), ("data.unit", None),
    ("adapter.rank", 0), ("adapter.rank", -1), ("adapter.alpha", 0.0), ("adapter.train", "A"),
    ("adapter.targets", "all"), ("adapter.targets", []), ("adapter.layers", [-1]), ("adapter.layers", []),
    ("privacy.mode", "distributed-ish"), ("privacy.unit", "site-ish"), ("privacy.records_per_person", 0),
    ("privacy.epsilon", 0.0), ("privacy.epsilon", -1.0), ("privacy.delta", 0.0), ("privacy.delta", 1.0),
    ("privacy.delta", 0.005), ("privacy.clip_norm", 0.0), ("privacy.clip_norm", -1.0),
    ("privacy.clipping", "adaptive"),
    ("privacy.sampling_rate", 0.0), ("privacy.sampling_rate", 1.0001), ("privacy.sampling_rate", -0.1),
    ("privacy.units_per_site", 0), ("privacy.units_per_site", 10**400), ("privacy.noise_multiplier", 0.0),
    ("privacy.noise_multiplier", -1.0),
    ("training.rounds", 0), ("training.local_steps", 0), ("training.learning_rate", 0.0), ("training.momentum", 1.0),
    ("training.momentum", -0.1), ("training.optimizer", "lamb"), ("training.wire", "float64"),
    ("training.server.learning_rate", 0.0), ("training.server.momentum", 1.0), ("training.server.eps", 0.0),
    ("training.server.betas", [0.9, 1.0]), ("training.server.betas", [-0.1, 0.9]), ("training.server.betas", [0.9]),
    ("training.server.name", "sgdm"),
    ("training.server.final_rate", 0.0), ("training.server.final_rate", 1.1),
    ("federation.backend", "threads"), ("federation.quorum", 0), ("federation.round_timeout", 0.0),
    ("federation.gate", -0.1), ("federation.gate", 101.0),
    ("federation.weights", {"a": 0.0}), ("federation.weights", {"a": -1.0}), ("federation.cpus_per_site", 0.0),
    ("federation.gpus_per_site", -1.0), ("federation.partition.by", "random"), ("federation.partition.sites", 0),
    ("federation.partition.sites", None), ("federation.partition.alpha", 0.0),
    ("site.epsilon", 0.0), ("site.epsilon", -1.0), ("site.budgets", {"a": 0.0}), ("site.budgets", {"a": -2.0}),
    ("site.budgets", {"강남": 1.0, "\u1100\u1161\u11bc\u1102\u1161\u11b7": 2.0}),
    ("site.min_units", 0), ("site.micro_batch", 0),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE, ids=lambda part: str(part)[:40])
def test_an_impossible_value_is_refused_by_name(simulation_values: MakeValues, key: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse(SimulationConfig, simulation_values({key: value}))
    assert key.rpartition(".")[2] in str(error.value)


def test_a_site_is_named_in_either_spelling_of_hangul(simulation_values: MakeValues) -> None:
    decomposed = unicodedata.normalize("NFD", "강남")
    changes: Values = {"site.budgets": {decomposed: 4.0}, "federation.weights": {f" {decomposed}": 2.0}}
    config = parse(SimulationConfig, simulation_values(changes))
    assert config.budget("강남") == 4.0
    assert config.federation.weights == {"강남": 2.0}


CLASSIFIER: Values = {
    "model.task": "classification", "model.labels": ["긍정", "부정"], "data.prompt": None, "data.label": "label"
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({**CLASSIFIER, "model.labels": []}, "model.labels"),
        ({**CLASSIFIER, "model.labels": ["only"]}, "model.labels"),
        ({**CLASSIFIER, "model.labels": ["a", "b", "a"]}, "model.labels"),
        ({**CLASSIFIER, "data.label": None}, "data.label"),
        ({**CLASSIFIER, "data.prompt": "{q}"}, "data.prompt"),
        ({**CLASSIFIER, "data.chat": True}, "data.chat"),
        ({"federation.partition.by": "natural"}, "partition.column"),
        ({"federation.partition.by": "dirichlet"}, "partition.column"),
        ({"federation.partition.by": "dirichlet", "federation.partition.column": "c",
          "federation.partition.sites": None}, "partition.sites"),
        ({"privacy.delta": 0.01, "privacy.units_per_site": 100}, "delta"),
        ({"federation.gate": 0.1, "data.heldout": None}, "data.heldout"),
    ],
)  # fmt: skip
def test_values_that_contradict_each_other_are_refused_by_name(
    simulation_values: MakeValues, changes: Values, named: str
) -> None:
    with pytest.raises(ConfigError) as error:
        parse(SimulationConfig, simulation_values(changes))
    assert named in str(error.value)


def test_a_classifier_that_is_complete_is_accepted(simulation_values: MakeValues) -> None:
    assert parse(SimulationConfig, simulation_values({**CLASSIFIER, "model.pooling": "mean"})).model.pooling == "mean"


def test_all_mistakes_are_named_at_once(simulation_values: MakeValues) -> None:
    changes = {"privacy.epsilonn": 1, "privacy.clip_norm": -1.0, "training.rounds": "10", "site.micro_batch": 0}
    with pytest.raises(ConfigError) as error:
        parse(SimulationConfig, simulation_values(changes))
    for key in changes:
        assert key in str(error.value)
    assert len(str(error.value).splitlines()) == len(changes)


@pytest.mark.parametrize("key", ["privacy.noise_multiplier", "privacy.units_per_site"])
def test_a_plan_that_leaves_open_what_is_charged_is_refused(plan_values: MakeValues, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        parse(RunPlan, plan_values({key: None}))


def test_a_plan_without_noise_needs_no_calibration(make_plan: Make) -> None:
    assert make_plan({"privacy.mode": "off", "privacy.noise_multiplier": None}).mechanism.noise_multiplier == 0


def test_a_value_cannot_be_changed_after_it_was_checked(make_plan: Make) -> None:
    plan = make_plan()
    with pytest.raises(ValidationError, match="frozen"):
        plan.privacy.clip_norm = 100.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        plan.seed = 1  # type: ignore[misc]


def test_an_integer_is_a_float_but_a_float_is_no_integer(plan_values: MakeValues) -> None:
    assert parse(RunPlan, plan_values({"privacy.epsilon": 8})).digest == parse(RunPlan, plan_values()).digest
    with pytest.raises(ConfigError, match=r"training\.rounds"):
        parse(RunPlan, plan_values({"training.rounds": 5.0}))


@pytest.mark.parametrize("strange", [b"bytes", Path("x"), 10**5000, "\ud800"], ids=type)
def test_what_yaml_can_hold_but_json_cannot_is_a_config_error(plan_values: MakeValues, strange: object) -> None:
    with pytest.raises(ConfigError):
        parse(RunPlan, plan_values({"run": strange}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(path=st.sampled_from([*FIELDS, *SECTIONS[1:]]), value=JSON)
def test_any_value_anywhere_gives_a_configuration_or_a_config_error(
    simulation_values: MakeValues, path: Path_, value: object
) -> None:
    values = simulation_values({dotted(path): value})
    if not refusal(values):
        config = parse(SimulationConfig, values)
        assert parse(SimulationConfig, config.model_dump()) == config


@given(JSON.filter(lambda value: isinstance(value, dict)))
def test_any_mapping_gives_a_plan_or_a_config_error(values: Values) -> None:
    with pytest.raises(ConfigError):
        parse(RunPlan, values)


def test_a_configuration_survives_being_written_and_read(simulation_values: MakeValues) -> None:
    config = parse(SimulationConfig, simulation_values())
    assert parse(SimulationConfig, config.model_dump()) == config
    assert parse(SimulationConfig, config.model_dump(mode="json")) == config
    assert parse(SimulationConfig, json.loads(config.model_dump_json(indent=2))) == config


POSITIVE = st.floats(min_value=1e-6, max_value=1e6)
PLAN_CHANGES = st.fixed_dictionaries(
    {
        "run": st.text(SHOWN, min_size=1, max_size=20),
        "seed": st.integers(0, 2**31),
        "privacy.epsilon": POSITIVE,
        "privacy.delta": st.floats(min_value=1e-12, max_value=1e-6),
        "privacy.clip_norm": POSITIVE,
        "privacy.clipping": st.sampled_from(["flat", "automatic"]),
        "privacy.sampling_rate": st.floats(min_value=1e-6, max_value=1),
        "privacy.units_per_site": st.integers(1, 100_000),
        "privacy.noise_multiplier": st.floats(min_value=0.01, max_value=1e6),
        "training.rounds": st.integers(1, 10_000),
        "training.local_steps": st.integers(1, 100),
        "adapter.targets": st.just("all-linear") | st.lists(st.text(SHOWN, max_size=6), min_size=1, max_size=3),
        "adapter.layers": st.none() | st.lists(st.integers(0, 40), min_size=1, max_size=3),
    }
)


@given(changes=PLAN_CHANGES)
def test_a_plan_and_its_digest_survive_being_written_and_read(plan_values: MakeValues, changes: Values) -> None:
    plan = parse(RunPlan, plan_values(changes))
    again = parse(RunPlan, json.loads(plan.model_dump_json()))
    assert again == plan
    assert again.digest == plan.digest
    assert plan.steps == plan.training.rounds * plan.training.local_steps
    assert plan.expected_units == pytest.approx(plan.privacy.sampling_rate * plan.privacy.units_per_site)


def replaced(model: T, path: Path_, value: object) -> T:
    """Return a copy of `model` with one field replaced, unchecked."""
    if len(path) > 1:
        value = replaced(getattr(model, path[0]), path[1:], value)
    return model.model_copy(update={path[0]: value})


def another(value: object) -> object:
    """Return a slightly different value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return math.nextafter(value, math.inf)
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return (*value, "x") if not value or isinstance(value[0], str) else (*value[:-1], another(value[-1]))
    return 1


def test_the_digest_sees_every_field(make_plan: Make) -> None:
    digests = {make_plan().digest}
    for path in PLAN_FIELDS:
        plan = make_plan()  # its digest was never read
        value: object = plan
        for part in path:
            value = getattr(value, part)
        value = (("a", "b"),) if path == ("groups",) else another(value)  # of an empty list none knows what it holds
        digest = replaced(plan, path, value).digest
        assert digest not in digests, f"{dotted(path)} does not change the digest as a field of its own"
        digests.add(digest)
    assert len(digests) == 1 + len(PLAN_FIELDS)


def test_a_changed_copy_has_a_digest_of_its_own(make_plan: Make) -> None:
    plan = make_plan()
    before = plan.digest  # a cached value must not travel into the copy
    assert plan.model_copy(update={"run": "another"}).digest != before


def test_the_digest_is_the_same_in_every_process(plan_values: MakeValues, make_plan: Make) -> None:
    code = (
        "import json, sys; from fedllm.plan import RunPlan; from fedllm.values import parse; "
        "print(parse(RunPlan, json.loads(sys.stdin.buffer.read())).digest)"
    )
    reordered = dict(reversed(plan_values().items()))
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(reordered).encode(), env=environment, capture_output=True,
        check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.decode().strip() == make_plan().digest


@pytest.mark.parametrize(
    ("changes", "protects", "noisy"),
    [
        ({}, True, True),
        ({"privacy.mode": "off"}, False, False),
        ({"privacy.insecure_seed": 0}, False, True),
        ({"privacy.mode": "off", "privacy.insecure_seed": 0}, False, False),
    ],
)
def test_a_plan_may_be_called_private_only_with_noise_that_nobody_can_predict(
    make_plan: Make, changes: Values, protects: bool, noisy: bool
) -> None:
    plan = make_plan(changes)
    assert plan.privacy.protects is protects
    assert plan.mechanism.private is noisy


def test_the_noise_of_an_averaged_update_is_known(make_plan: Make) -> None:
    """Within 5 %: 20 deviations of the estimate from 80,000 draws."""
    source, zero = OsRandomness(), np.zeros(80_000)
    training = {"training.learning_rate": 0.7, "training.optimizer": "sgd", "training.momentum": 0.0}

    plan = make_plan({"privacy.mode": "local", "training.local_steps": 3, **training})
    rate = plan.training.learning_rate / plan.expected_units
    shares = (0.5, 0.3, 0.2)
    drawn = sum(
        share * sum(rate * plan.mechanism.release(zero, source) for _ in range(plan.training.local_steps))
        for share in shares
    )
    assert plan.noise_std(shares, 0) == pytest.approx(np.std(drawn), rel=0.05)

    distributed = {"privacy.mode": "distributed", "training.local_steps": 1, "sites": 5, "quorum": 4, **training}
    plan = make_plan(distributed)
    assert plan.distributed is not None
    for survivors, trimmed in ((4, 4), (5, 5), (5, 4), (5, 0)):
        total = np.zeros(zero.size, np.uint32)
        for site in range(survivors):
            upload, seeds = plan.distributed.upload(zero, source)
            total += upload
            if site < trimmed:
                given = [seeds[k] for k in plan.distributed.revealed_seeds(survivors)]
                total -= plan.distributed.surplus(given, survivors, zero.size)
        found = rate * np.std(plan.distributed.decode(total)) / survivors
        assert plan.noise_std([1 / survivors] * survivors, trimmed) == pytest.approx(found, rel=0.05)

    assert make_plan({"privacy.mode": "off", **training}).noise_std([1.0], 0) == 0


@pytest.mark.parametrize(
    "changes",
    [{"training.optimizer": "adam"}, {"training.momentum": 0.5}, {"training.server.name": "sgd"}],
)
def test_a_correction_for_noise_of_unknown_size_is_refused(make_plan: Make, changes: dict[str, Any]) -> None:
    known = {
        "training.optimizer": "sgd", "training.momentum": 0.0, "training.server.name": "adam",
        "training.server.noise_corrected": True,
    }  # fmt: skip
    make_plan(known)
    with pytest.raises(ConfigError, match="noise_corrected"):
        make_plan({**known, **changes})


def test_the_mechanism_charges_for_the_clip_noise_and_rate_of_the_plan(make_plan: Make) -> None:
    plan = make_plan()
    assert plan.mechanism.noise_std == 1.25 * 0.5
    event = plan.mechanism.event(plan.steps)
    assert (event.sampling_rate, event.noise_multiplier, event.steps) == (0.1, 1.25, 10)


def test_noise_that_is_off_is_charged_as_no_privacy(make_plan: Make) -> None:
    plan = make_plan({"privacy.mode": "off"})  # the multiplier 1.25 of the plan is not used, so not charged either
    assert plan.mechanism.event(1).noise_multiplier == 0


def test_a_delta_that_protects_nobody_is_refused(plan_values: MakeValues) -> None:
    with pytest.raises(ConfigError, match="delta"):
        parse(PrivacyConfig, {**plan_values()["privacy"], "delta": 1 / 200})
    assert parse(PrivacyConfig, {**plan_values()["privacy"], "delta": 1 / 201})


@pytest.mark.parametrize("kind", [DataConfig, PartitionConfig])
def test_an_error_outside_any_section_names_its_key(kind: type[Frozen]) -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        parse(kind, {"nonsense": 1})
