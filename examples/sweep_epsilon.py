"""How much quality does privacy cost? Train at several epsilons and plot the held-out loss.

python examples/sweep_epsilon.py --epsilon 1 3 8 -- training.rounds=9

What follows `--` are overrides for every run, as for `fedllm simulate`.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

import fedllm


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 3.0, 8.0])
    parser.add_argument("--plot", type=Path, default=Path("sweep.svg"))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()

    runs = []
    for epsilon in options.epsilon:
        run = fedllm.simulate(
            [f"name=epsilon-{epsilon:g}", f"privacy.epsilon={epsilon}", "audit.report=false", *options.overrides]
        )
        print(f"epsilon {run.epsilon:.2f}: held-out loss {run.metrics[-1]['loss']:.3f} nats, {run.folder}")
        runs.append(run)

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([run.epsilon for run in runs], [run.metrics[-1]["loss"] for run in runs], marker="o", label="trained")
    axes.axhline(runs[0].metrics[0]["loss"], linestyle="--", color="grey", label="base model")
    axes.set(xlabel=f"epsilon at delta {runs[0].delta:g}", ylabel="held-out loss (nats)")
    axes.legend()
    figure.savefig(options.plot)


if __name__ == "__main__":
    main()
