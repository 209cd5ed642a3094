"""A small language model learns the customers' language of six business units, each conversation protected.

python -m simulations.benchmarks.multidogo --data DATA/multidogo --model MODELS/stories260k
"""

from pathlib import Path

import typer
from rich.console import Console

from simulations.benchmarks.bench import (
    Benchmark,
    DataOption,
    EpsilonOption,
    Mode,
    ModelOption,
    ModeOption,
    OutOption,
    OverrideArgument,
    SeedsOption,
    run,
)

SETTINGS = (
    "experiment=tiny-lm",
    "model=causal-lm",
    "model.max_length=64",
    "data=records",
    "data.text='{text}'",
    "data.unit=conv",
    "data.description='customer turns of MultiDoGO, six business units'",
    "data.heldout_limit=2000",
    "federation=branches",
    "federation.partition.column=domain",
    "privacy.unit=person",
    "privacy.records_per_person=8",
    "privacy.delta=1e-5",
)


def main(
    data: DataOption,
    model: ModelOption,
    epsilon: EpsilonOption = "off,8",
    seeds: SeedsOption = 1,
    mode: ModeOption = Mode.local,
    out: OutOption = Path("runs/multidogo"),
    overrides: OverrideArgument = None,
) -> None:
    """Held-out perplexity before, after with differential privacy, and after without."""
    sources = (f"model.source={model}", f"data.train={data / 'train.jsonl'}", f"data.heldout={data / 'test.jsonl'}")
    benchmark = Benchmark("multidogo", "perplexity", 2, SETTINGS + sources)
    run(benchmark, epsilon, seeds, out, overrides or [], Console(), mode)


if __name__ == "__main__":
    typer.run(main)
