"""One data set into many sites, with flwr-datasets. A person's records stay together, so nobody is in two sites."""

from collections import defaultdict
from collections.abc import Sequence

from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, NaturalIdPartitioner, Partitioner

from fedllm.config import PartitionConfig
from fedllm.errors import ConfigError, DataError
from fedllm.training.data import Row, person


def partition(rows: Sequence[Row], config: PartitionConfig, unit: str | None, seed: int) -> dict[str, list[int]]:
    """Return the row numbers of each site, by the site's name.

    `unit` names the column of the person, and whole persons are dealt out; only a natural partition may find one
    person at two sites, as a customer of both. No row lacks a person, or the value that it is divided by. `seed` is
    public. Raises ConfigError or DataError if the data cannot be cut as asked.
    """
    keys = [person(row[config.column]) if config.column else "" for row in rows]
    persons = [person(row[unit]) for row in rows] if unit else range(len(rows))
    rows_of_unit: dict[object, list[int]] = defaultdict(list)
    for row, (key, who) in enumerate(zip(keys, persons, strict=True)):
        rows_of_unit[(key, who) if config.by == "natural" else who].append(row)
    groups = list(rows_of_unit.values())
    units = Dataset.from_dict({"unit": list(range(len(groups))), "key": [keys[owned[0]] for owned in groups]})

    sites = int(config.sites or 0)
    if sites > len(groups):
        raise ConfigError(f"partition.sites={sites}, but there are only {len(groups)} privacy units")
    partitioner: Partitioner
    if config.by == "natural":
        partitioner = NaturalIdPartitioner(partition_by="key")
    elif config.by == "iid":
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
            name = part[0]["key"] if config.by == "natural" else f"site-{number:02d}"
            result[name] = sorted(row for i in part["unit"] for row in groups[i])
    except ValueError as error:
        raise DataError(f"the data cannot be cut by {config.by}: {error}") from error
    return result
