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
    "training.server.final_rate=1.0",
    "training.server.eps=1e-3",
    "model=causal-lm",
    "model.max_length=64",
    "data=records",
    "data.text='{text}'",
    "data.unit=conv",
    "data.description='customer turns of MultiDoGO, six business units'",
    "adapter=lora",
    "federation=branches",
    "federation.partition.column=domain",
    "federation.quorum=6",
    "training.rounds=30",
    "training.local_steps=1",
    "training.learning_rate=2.0",
    "training.server.name=adam",
    "training.server.learning_rate=0.02",
    "privacy.unit=person",
    "privacy.records_per_person=8",
    "privacy.delta=1e-5",
    "privacy.clip_norm=0.5",
    "privacy.sampling_rate=0.1",
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
