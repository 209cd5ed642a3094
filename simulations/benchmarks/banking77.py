"""A sentence encoder learns to tell 77 banking intents, at eight branches with different mixes of customers.

python -m simulations.benchmarks.banking77 --data DATA/banking77 --model MODELS/all-MiniLM-L6-v2
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
    "experiment=encoder",
    "model=classifier",
    "model.pooling=mean",
    "model.max_length=64",
    "data=records",
    "data.text='{text}'",
    "data.label=label",
    "data.description='BANKING77: questions of bank customers, 77 intents'",
    "federation=dirichlet",
    "federation.partition.column=label",
    "federation.partition.sites=8",
    "federation.partition.alpha=0.5",
    "site.min_units=1",
    "privacy.unit=record",
    "privacy.delta=1e-5",
)
PUBLIC = (
    "adapter.alpha=1.0",
    "training.rounds=12",
    "training.local_steps=10",
    "training.learning_rate=100.0",
    "training.server.learning_rate=1.0",
    "training.server.momentum=0.3",
    "privacy.sampling_rate=0.05",
)


def main(
    data: DataOption,
    model: ModelOption,
    epsilon: EpsilonOption = "off,8",
    seeds: SeedsOption = 1,
    mode: ModeOption = Mode.local,
    out: OutOption = Path("runs/banking77"),
    overrides: OverrideArgument = None,
) -> None:
    """Test accuracy with differential privacy and without."""
    sources = (
        f"model.source={model}",
        f"model.labels={data / 'labels.json'}",
        f"data.train={data / 'train.jsonl'}",
        f"data.heldout={data / 'test.jsonl'}",
    )
    benchmark = Benchmark("banking77", "accuracy", 3, SETTINGS + sources, public=PUBLIC)
    run(benchmark, epsilon, seeds, out, overrides or [], Console(), mode)


if __name__ == "__main__":
    typer.run(main)
