"""Privacy units are sampled by Mechanism.sample, and by nothing else: a shuffled or weighted loader is refused.

Shuffled batches that are accounted for as Poisson samples overstate privacy several times over (Chua et al. 2024,
arXiv 2403.17673), and a weighted unit is drawn more often than it is charged for.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import ConfigError
from fedllm.plan import RunPlan
from fedllm.values import parse

ROOT = Path(__file__).parents[3]
WHERE_RECORDS_ARE = ["fedllm/training", "fedllm/privacy", "client"]
OTHER_SAMPLERS = {
    # torch and opacus: shuffled, weighted, of fixed size, or with coins that are not the operating system's
    "DataLoader", "DPDataLoader", "RandomSampler", "SequentialSampler", "BatchSampler", "WeightedRandomSampler",
    "SubsetRandomSampler", "DistributedSampler", "UniformWithReplacementSampler",
    "DistributedUniformWithReplacementSampler", "random_split",
    # numpy, random and datasets
    "shuffle", "permutation", "permuted", "choice", "choices", "sample_from", "train_test_split", "randperm",
}  # fmt: skip


def other_samplers(source: str) -> Iterator[str]:
    """Yield every use of another sampler in a module's source: by name, attribute, import or keyword."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [alias.name.rpartition(".")[2] for alias in node.names]
        elif isinstance(node, ast.keyword) and node.arg in ("shuffle", "weights", "replacement"):
            names = ["shuffle"]
        yield from (f"line {getattr(node, 'lineno', 0)}: {name}" for name in names if name in OTHER_SAMPLERS)


@pytest.mark.parametrize("folder", WHERE_RECORDS_ARE)
def test_no_shuffled_or_weighted_loader_exists_where_records_are(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert not [f"{file.relative_to(ROOT)}, {use}" for file in files for use in other_samplers(file.read_text("utf-8"))]


@pytest.mark.parametrize(
    "line",
    [
        "from torch.utils.data import DataLoader",
        "loader = torch.utils.data.DataLoader(units)",
        "from opacus.data_loader import DPDataLoader as Loader",
        "sampler = WeightedRandomSampler(weights, 8)",
        "random.shuffle(units)",
        "order = generator.permutation(len(units))",
        "units = dataset.shuffle(seed=0)",
        "load(units, shuffle=True)",
        "batch = rng.choice(units, 8)",
    ],
)
def test_the_search_for_other_samplers_finds(line: str) -> None:
    assert list(other_samplers(f"def f():\n    {line}\n"))


def test_one_place_draws_the_units_of_a_step() -> None:
    """Training asks the mechanism, whose rate is the one that is charged for."""
    calls = [
        (file.relative_to(ROOT).as_posix(), ast.unparse(node.func))
        for folder in WHERE_RECORDS_ARE
        for file in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "sample"
    ]
    assert calls
    assert {name for _, name in calls} <= {"mechanism.sample", "self.mechanism.sample", "distributed.mechanism.sample"}


@pytest.mark.parametrize("key", ["sampler", "shuffle", "weights", "sampling", "batch_size"])
@pytest.mark.parametrize("group", ["privacy", "training"])
def test_a_plan_that_asks_for_another_sampler_is_refused(
    plan_values: Callable[..., dict[str, Any]], group: str, key: str
) -> None:
    values = plan_values()
    values[group][key] = "shuffled"
    with pytest.raises(ConfigError, match=f"{group}.{key}"):
        parse(RunPlan, values)
