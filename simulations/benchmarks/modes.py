"""What noise in shares is worth on a real federation: one trusted trainer, noise in shares, noise of every site's own.

python -m simulations.benchmarks.modes --data DATA/multidogo --model MODELS/stories260k

The base, data and settings of `multidogo`, conversations dealt out at random. Each is an ordinary run of `fedllm
simulate`; one that is complete is not made again.
"""

from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import typer
from rich.console import Console

from simulations.benchmarks import multidogo
from simulations.benchmarks.bench import (
    Benchmark,
    DataOption,
    Mode,
    ModelOption,
    OverrideArgument,
    machine,
    measure,
    parse_epsilons,
)

_SETTINGS = (
    *(s for s in multidogo.SETTINGS if not s.startswith(("federation", "data.heldout_limit"))),
    "federation=iid",
    "data.heldout_limit=1000",
)


def main(
    data: DataOption,
    model: ModelOption,
    epsilon: Annotated[str, typer.Option(help="Comma-separated privacy budgets.")] = "1,3,8",
    sites: Annotated[str, typer.Option(help="Numbers of sites, comma-separated.")] = "2,8,32",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds 0, 1, ...")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for the runs and results.md.")] = Path("runs/modes"),
    overrides: OverrideArgument = None,
) -> None:
    """Held-out perplexity by epsilon, number of sites, and who adds the noise."""
    sources = (f"model.source={model}", f"data.train={data / 'train.jsonl'}", f"data.heldout={data / 'test.jsonl'}")
    console, counts = Console(), [int(k) for k in sites.split(",")]
    lines = ["| epsilon | sites | pooled | distributed | local |", "| ---: | ---: | ---: | ---: | ---: |"]
    found: dict[tuple[float | None, int, Mode], list[float]] = defaultdict(list)
    targets = parse_epsilons(epsilon)
    for seed in range(seeds):  # all of one before the next, so that a table can be had early
        for mode, k in [(Mode.pooled, 1), *((m, k) for m in (Mode.distributed, Mode.local) for k in counts)]:
            deal = (f"federation.partition.sites={k}", f"privacy.colluding_sites={0 if k <= 2 else 1}")
            benchmark = Benchmark("multidogo", "perplexity", 2, (*_SETTINGS, *sources, *deal))
            for m in measure(benchmark, targets, [seed], out / f"{k}-sites", overrides or [], console, mode):
                found[m.epsilon, k, mode].append(m.after)
    for target in targets:
        for k in counts:
            cells = [found[target, 1, Mode.pooled], found[target, k, Mode.distributed], found[target, k, Mode.local]]
            texts = [f"{mean(c):.2f} ± {stdev(c):.2f}" if len(c) > 1 else f"{c[0]:.2f}" for c in cells]
            lines.append(f"| {'off' if target is None else f'{target:g}'} | {k} | {' | '.join(texts)} |")
    text = "\n".join([*lines, "", machine(), ""])
    (out / "results.md").write_text(text, "utf-8")
    console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
