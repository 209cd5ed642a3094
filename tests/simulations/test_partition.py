"""Every record at one site, every person whole."""

import unicodedata
from collections import defaultdict
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.config import PartitionConfig
from fedllm.errors import ConfigError
from fedllm.values import parse
from simulations.partition import partition

_KEYS = st.sampled_from(["서울 강남", "부산", "busan", "a/b", "..", "제주특별자치도", "Ünï", "1", "[/b]"])
_TABLES = st.lists(st.tuples(_KEYS, st.integers(0, 12)), min_size=1, max_size=40)


def cut(**values: Any) -> PartitionConfig:
    return parse(PartitionConfig, values)


def table(rows: list[tuple[str, int]]) -> Dataset:
    return Dataset.from_dict({"branch": [key for key, _ in rows], "person": [f"p{person}" for _, person in rows]})


def all_rows(sites: dict[str, list[int]]) -> list[int]:
    return sorted(row for rows in sites.values() for row in rows)


@given(_TABLES, st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_natural_partition_has_a_site_for_every_key_with_just_its_rows(
    rows: list[tuple[str, int]], by_person: bool
) -> None:
    sites = partition(table(rows), cut(by="natural", column="branch"), "person" if by_person else None, 0)
    expected = defaultdict(list)
    for number, (key, _) in enumerate(rows):
        expected[key].append(number)
    assert sites == expected


@given(_TABLES, st.sampled_from(["iid", "dirichlet"]), st.integers(1, 8), st.integers(0, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_dealt_out_records_are_at_one_site_each_and_persons_stay_whole(
    rows: list[tuple[str, int]], by: str, number: int, seed: int, data: st.DataObject
) -> None:
    unit = data.draw(st.sampled_from(["person", None]))
    units = len({person for _, person in rows}) if unit else len(rows)
    number = min(number, units)
    config = cut(by=by, sites=number, column="branch" if by == "dirichlet" else None)
    sites = partition(table(rows), config, unit, seed)
    assert all_rows(sites) == list(range(len(rows)))
    assert len(sites) == number
    if unit:
        for person in {person for _, person in rows}:
            homes = {name for name, owned in sites.items() if any(rows[row][1] == person for row in owned)}
            assert len(homes) == 1, f"p{person} is at {homes}"
    assert sites == partition(table(rows), config, unit, seed), "the same seed gives the same sites"


@pytest.mark.parametrize("by", ["iid", "dirichlet"])
def test_another_seed_gives_other_sites(by: str) -> None:
    rows = [("b", i) for i in range(100)]
    config = cut(by=by, sites=4, column="branch")
    assert partition(table(rows), config, None, 0) != partition(table(rows), config, None, 1)


def test_iid_sites_are_of_one_size() -> None:
    sites = partition(table([("b", i) for i in range(103)]), cut(by="iid", sites=5), None, 0)
    assert sorted(map(len, sites.values())) == [20, 20, 21, 21, 21]


def test_a_small_alpha_makes_sites_that_differ() -> None:
    rows = [(("a", "b", "c", "d")[i % 4], i) for i in range(400)]
    sites = partition(table(rows), cut(by="dirichlet", sites=4, alpha=0.05, column="branch"), None, 1)
    shares = [
        max(sum(rows[r][0] == key for r in owned) for key in "abcd") / len(owned) for owned in sites.values() if owned
    ]
    even = partition(table(rows), cut(by="dirichlet", sites=4, alpha=1000.0, column="branch"), None, 1)
    assert max(shares) > 0.8
    assert all(len(owned) == pytest.approx(100, abs=25) for owned in even.values())


def test_names_of_branches_are_kept_as_they_are_written_but_for_white_space() -> None:
    names = ["서울 강남", "부산/해운대", "..", "two  words", "a\nb", "제주"]
    sites = partition(Dataset.from_dict({"branch": names}), cut(by="natural", column="branch"), None, 0)
    assert sites == {" ".join(name.split()): [number] for number, name in enumerate(names)}


def test_one_branch_is_one_site_however_its_name_is_spelt() -> None:
    """As one person is one person: else two sites would each take the whole budget for the same people."""
    spelt = ["제주", unicodedata.normalize("NFD", "제주"), " 제주 ", "제주\n"]
    sites = partition(Dataset.from_dict({"branch": spelt}), cut(by="natural", column="branch"), None, 0)
    assert sites == {"제주": [0, 1, 2, 3]}


def test_keys_that_are_numbers_name_sites_too() -> None:
    sites = partition(Dataset.from_dict({"branch": [7, 8, 7]}), cut(by="natural", column="branch"), None, 0)
    assert sites == {"7": [0, 2], "8": [1]}


def test_one_person_may_be_a_customer_of_two_branches() -> None:
    sites = partition(table([("서울", 1), ("부산", 1)]), cut(by="natural", column="branch"), "person", 0)
    assert sites == {"서울": [0], "부산": [1]}


@pytest.mark.parametrize(("by", "unit", "limit"), [("iid", None, 6), ("iid", "person", 3), ("dirichlet", "person", 3)])
def test_more_sites_than_units_are_refused(by: str, unit: str | None, limit: int) -> None:
    rows = [("b", i // 2) for i in range(6)]
    config = cut(by=by, sites=limit + 1, column="branch")
    with pytest.raises(ConfigError, match=rf"partition.sites={limit + 1}.*only {limit}"):
        partition(table(rows), config, unit, 0)
