"""`import fedllm` for programs: what the command line does, as values; and a plain error for every mistake."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.errors import CheckpointError, ConfigError, FedllmError, FolderError
from fedllm.privacy import accounting


def test_what_the_package_offers_is_what_it_names() -> None:
    for name in fedllm.__all__:
        assert getattr(fedllm, name).__doc__
    assert not hasattr(fedllm, "simulate_all")


# ---- what a training costs -------------------------------------------------------------------------------------------


def test_epsilon_is_what_the_accountants_say() -> None:
    cost = fedllm.epsilon(delta=1e-5, sampling_rate=0.01, noise_multiplier=2.0, steps=10, event=[(1, 20.0, 1)])
    events = [accounting.AccountingEvent(1, 20.0, 1), accounting.AccountingEvent(0.01, 2.0, 10)]
    assert cost.events == tuple(events)
    assert (cost.epsilon, cost.epsilon_rdp) == (
        accounting.spent(events, 1e-5).epsilon, accounting.spent(events, 1e-5).epsilon_rdp,
    )  # fmt: skip
    assert cost.cross_checks["prv"].epsilon == pytest.approx(cost.epsilon, abs=0.01)
    assert 0 < cost.advantage < cost.epsilon
    with pytest.raises(dataclasses.FrozenInstanceError):
        cost.epsilon = 0.0  # type: ignore[misc]


def test_without_noise_epsilon_is_infinite_and_says_why() -> None:
    cost = fedllm.epsilon(1e-5, event=[(0.5, 0, 1)])
    assert math.isinf(cost.epsilon)
    assert "no bound" in cost.reasons["pld"]


def test_calibrated_noise_is_at_the_target() -> None:
    found = fedllm.calibrate(epsilon=4.0, delta=1e-5, sampling_rate=1, steps=2)
    assert 0.995 * 4 <= found.epsilon <= 4
    assert fedllm.epsilon(1e-5, 1, found.noise_multiplier, 2).epsilon == found.epsilon


@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"sampling_rate": 0.1}, {"event": [(0.1, 1)]}, {"event": 3}, {"event": ["0.1,1,3"]},
        *({"delta": bad} for bad in (0, 1, math.nan, "1e-5", None, True)),
        *({"event": [bad]} for bad in ((2, 1, 3), (0.1, -1, 3), (0.1, 1, 0), (0.1, 1, 1.5), ("q", 1, 3), (0, 1, []))),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_about_epsilon_is_one_plain_sentence(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        fedllm.epsilon(**{"delta": 1e-5, **arguments})
    assert 20 < len(str(error.value)) < 300


@pytest.mark.parametrize(
    "change", [{"epsilon": 0}, {"epsilon": 51}, {"epsilon": "8"}, {"delta": 2}, {"sampling_rate": 0}, {"steps": 2.0}]
)
def test_a_mistake_about_a_target_is_one_plain_sentence(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        fedllm.calibrate(**{"epsilon": 8, "delta": 1e-5, "sampling_rate": 0.1, "steps": 2, **change})


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("privacy.epsilon=3", "expected a list"),
        (3, "expected a list"),
        ([3], "expected a list"),
        (None, "expected a list"),
        (["privacy.epsilon"], "not an override"),
        (["privacy.epsilon=none"], "privacy.epsilon='none'"),
        (["privacy.epsilom=3"], "did you mean epsilon?"),
        ({"privacy": {"epsilon": 3}}, "model: a value is needed"),
        ({"model": "demo"}, "model='demo'"),
        ({"model": Path("x")}, "neither text nor number"),
    ],
)
def test_a_mistake_about_a_simulation_is_a_plain_error(settings: Any, words: str) -> None:
    with pytest.raises(FedllmError) as error:
        fedllm.simulate(settings)
    assert words in str(error.value)
    assert "pydantic" not in str(error.value)


def test_a_folder_of_choices_that_is_none_is_a_plain_error() -> None:
    for folder in ("/dev/null", 3):
        with pytest.raises(ConfigError, match=r"config.dir"):
            fedllm.simulate([], config_dir=folder)  # type: ignore[arg-type]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The files of a finished run that `load_run` looks into."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"privacy": {"delta": 1e-5}}')
    records = [{"round": n, "epsilon": spent, "private": False} for n, spent in enumerate((0.0, 2.5, None))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return tmp_path


def test_a_run_is_its_folder_and_what_its_rounds_measured(finished: Path) -> None:
    run = fedllm.load_run(str(finished))
    assert (run.folder, run.adapter, run.audit) == (finished, finished / "adapter", finished / "audit")
    assert [each["round"] for each in run.metrics] == [0, 1, 2]
    assert (run.epsilon, run.delta, run.private) == (math.inf, 1e-5, False)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
@pytest.mark.parametrize("text", ["", "[]", "{", "{}", "\xff"])
def test_a_damaged_file_of_a_run_is_named(finished: Path, name: str, text: str) -> None:
    (finished / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="damaged"):
        fedllm.load_run(finished)


def test_a_folder_without_a_finished_run_is_said_so(finished: Path) -> None:
    with pytest.raises(FolderError, match="holds no finished run"):
        fedllm.load_run(finished / "nowhere")
    with pytest.raises(ConfigError, match="path=3"):
        fedllm.load_run(3)  # type: ignore[arg-type]
    (finished / "metrics.jsonl").unlink()
    with pytest.raises(FolderError, match=r"metrics\.jsonl"):
        fedllm.load_run(finished)
