"""All records of all sites are checked before the first round: none is lost, and no site with it, unsaid."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.records import SiteRecords
from fedllm.config import ModelConfig, SimulationConfig
from fedllm.errors import ConfigError, DataError
from simulations.simulate import _said_of_sizes
from simulations.sites import SimulatedData, simulated_data

Configure = Callable[..., SimulationConfig]


@pytest.fixture
def read(tmp_path: Path, configure: Configure) -> Callable[..., SimulatedData]:
    """Return a function that reads lines of a file as the records of a simulation."""

    def make(lines: list[Any], **data: Any) -> SimulatedData:
        path = tmp_path / "x.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return simulated_data(configure(tmp_path, data={"train": str(path), "heldout": None, **data}))

    return make


@pytest.fixture
def model(configure: Configure, tmp_path: Path) -> ModelConfig:
    return configure(tmp_path).model


def record(number: int, **values: Any) -> dict[str, Any]:
    return {"branch": "abc"[number % 3], "customer_id": number, "question": "q", "answer": "a", **values}


def records_of(data: SimulatedData, model: ModelConfig) -> dict[str, SiteRecords]:
    return {name: data.records(name, model) for name in data.names}


def test_every_bad_record_is_named_with_file_and_line_and_none_takes_its_site_along(
    read: Callable[..., SimulatedData], model: ModelConfig
) -> None:
    lines = [
        record(0), "", record(1, answer=None), record(2, answer="  "), "{bad", record(4, answer=["a"]),
        record(5, branch=None), record(6, customer_id=float("nan")), *map(record, range(7, 20)),
    ]  # fmt: skip
    data = read(lines)
    with pytest.raises(DataError) as refusal:
        data.check(model)
    text = str(refusal.value)
    assert "6 of 20 records cannot be used" in text
    assert "data.max_bad=6" in text
    for line, words in ((3, "answer is empty"), (4, "answer is empty"), (5, "not JSON"), (6, "answer holds a list"),
                        (7, "branch is empty"), (8, "customer_id is empty")):  # fmt: skip
        assert f"x.jsonl, line {line}: {words}" in text
    with pytest.raises(DataError):
        read(lines, max_bad=5).check(model)
    data = read(lines, max_bad=6)
    assert len(data.check(model)) == 6
    assert sorted(data.names) == ["a", "b", "c"]
    used = sum(len(records) for site in records_of(data, model).values() for records in site.groups[model.source])
    assert used == 20 - 6


def test_records_none_of_which_can_be_used_are_refused_at_once(read: Callable[..., SimulatedData]) -> None:
    with pytest.raises(DataError, match=r"2 of 2 records cannot be used"):
        read([record(0, branch=""), "{"], max_bad=2)


def test_many_bad_records_are_counted_and_the_first_are_named(
    read: Callable[..., SimulatedData], model: ModelConfig
) -> None:
    with pytest.raises(DataError, match=r"(?s)300 of 301 records.*\.\.\. and 200 more") as refusal:
        read([record(0), *(record(number, answer="") for number in range(300))]).check(model)
    assert str(refusal.value).count("\n") < 110


def test_one_person_and_one_site_has_one_name_however_it_is_spelled(
    read: Callable[..., SimulatedData], model: ModelConfig
) -> None:
    spelled = [1, 1.0, "1", " 1 ", "1.0"]
    data = read([record(0, customer_id=value, branch=value) for value in spelled])
    assert data.unit_counts() == {"1": 1}
    assert not data.check(model)


def test_sizes_of_sites_are_told_before_anything_is_trained(tmp_path: Path, configure: Configure) -> None:
    config = configure(tmp_path, privacy={"delta": 0.01, "units_per_site": 20}, site={"min_units": 5})
    small, weak = _said_of_sizes(config, {"a": 4, "b": 20})
    assert "1 of 2 sites have fewer than 5 units and take no part: a (4)" in small
    assert "weak protection among the 20 units of b" in weak
    assert not _said_of_sizes(config, {"a": 8})
    with pytest.raises(ConfigError, match=r"privacy\.delta=0\.01 is no protection among the 100 units of a"):
        _said_of_sizes(config, {"a": 100, "b": 20})
