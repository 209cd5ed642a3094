"""One data set into many sites; flwr-datasets divides where chance does. A person is in one site, unless by nature."""

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from fedllm.config import PartitionConfig
from fedllm.errors import ConfigError, DataError
from fedllm.training.data import Row, person

_Key = TypeVar("_Key", bound=Hashable)


def partition(rows: Sequence[Row], config: PartitionConfig, unit: str | None, seed: int) -> dict[str, list[int]]:
    """Return the row numbers of each site, by the site's name.

    `unit` names the column of the person, and whole persons are dealt out; only a natural partition may find one
    person at two sites, as a customer of both. No row lacks a person, or the value that it is divided by. `seed` is
    public. Raises ConfigError or DataError if the data cannot be cut as asked.
    """
    keys = [person(row[config.column]) if config.column else "" for row in rows]
    if config.by == "natural":
        return dict(sorted(_rows_by(keys).items()))
    persons: Iterable[Hashable] = [person(row[unit]) for row in rows] if unit else range(len(rows))
    groups = list(_rows_by(persons).values())

    from datasets import Dataset  # late: they take a second, which the demo has no need of
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, Partitioner

    units = Dataset.from_dict({"unit": list(range(len(groups))), "key": [keys[owned[0]] for owned in groups]})

    sites = int(config.sites or 0)
    if sites > len(groups):
        raise ConfigError(f"partition.sites={sites}, but there are only {len(groups)} privacy units")
    partitioner: Partitioner
    if config.by == "iid":
        partitioner = IidPartitioner(num_partitions=sites)
        units = units.shuffle(seed=seed)
    else:
        partitioner = DirichletPartitioner(
            num_partitions=sites, partition_by="key", alpha=config.alpha, min_partition_size=0, seed=seed
        )
    partitioner.dataset = units
    result = {}
    try:
        for number in range(partitioner.num_partitions):
            part = partitioner.load_partition(number)
            result[f"site-{number:02d}"] = sorted(row for i in part["unit"] for row in groups[i])
    except ValueError as error:
        raise DataError(f"the data cannot be cut by {config.by}: {error}") from error
    return result


def _rows_by(keys: Iterable[_Key]) -> dict[_Key, list[int]]:
    """Return the row numbers of each key, in the order in which keys come first; a row has one key."""
    found: dict[_Key, list[int]] = {}
    for row, key in enumerate(keys):
        found.setdefault(key, []).append(row)
    return found
