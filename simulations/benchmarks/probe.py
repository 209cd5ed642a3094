"""What noise in shares is worth: a linear classifier on frozen embeddings, with noise of one trainer, of all, of each.

python -m simulations.benchmarks.probe --data DATA/banking77 --model MODELS/all-MiniLM-L6-v2

*pooled* is DP-SGD by one trusted trainer who holds all records. *distributed* is the product's own arithmetic:
per-record gradients rounded to quanta, `DistributedMechanism.upload` at every site, the sum modulo 2^32,
`DistributedMechanism.decode` (the masks of secure aggregation cancel exactly, so they are left out), with the default
quorum of two thirds, all sites there, excess noise removed; one site may collude (none of two). *local* adds each
site's own noise, by `Mechanism.release`. Coins and noise come from the operating system; a seed deals the records out
to sites.

The learning rate is chosen for each target epsilon, mode and number of sites on records kept back from the training
split, once; *distributed* takes the one of *pooled*.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console

from fedllm.config import ModelConfig, PrivacyConfig
from fedllm.plan import default_quorum
from fedllm.privacy.accounting import calibrate
from fedllm.privacy.distributed_noise import DistributedMechanism
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import OsRandomness
from fedllm.training.data import read_table
from fedllm.training.model import load_base
from simulations.benchmarks.bench import DataOption, ModelOption, machine

_DELTA, _CLIP, _KEPT_BACK = 1e-5, 1.0, 1500
_RATES = (8.0, 16.0, 32.0, 64.0)  # of an embedding of length 1
Array = NDArray[np.float64]
Labels = NDArray[np.int64]
Noise = Callable[[Sequence[NDArray[np.int64]], Array], Array]  # the records drawn at each site, weights -> noised sum


def embeddings(model: Path, texts: Sequence[str], labels: tuple[str, ...]) -> Array:
    """Return mean-pooled token states of length 1, float64[n, d]."""
    base = load_base(
        ModelConfig(source=str(model), task="classification", labels=labels, pooling="mean", max_length=64), "cpu"
    )
    seen: list[torch.Tensor] = []
    network: Any = base.model
    network.classifier.register_forward_hook(lambda _, x, __: seen.append(x[0]))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    with torch.no_grad():
        for start in range(0, len(order), 64):
            batch = base.tokenizer(
                [texts[i] for i in order[start : start + 64]], padding=True, truncation=True, max_length=64,
                return_tensors="pt",
            )  # fmt: skip
            network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    result = np.empty((len(texts), seen[0].shape[1]))
    result[order] = torch.cat(seen).double().numpy()
    return result


class _Probe:
    """Softmax regression by DP-SGD; a record's gradient is (p - y) x^T."""

    def __init__(self, x_ND: Array, y_N: Labels, classes: int) -> None:
        self.x_ND, self.y_N, self.classes = x_ND, y_N, classes

    def residuals(self, rows: NDArray[np.int64], w_CD: Array) -> Array:
        """Return p - y, clipped so that each record's gradient has L2 norm `_CLIP` at most, float64[rows, C]."""
        logits = self.x_ND[rows] @ w_CD.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(rows)), self.y_N[rows]] -= 1
        norms = np.linalg.norm(p, axis=1) * np.linalg.norm(self.x_ND[rows], axis=1)
        shorter: Array = p * np.minimum(1.0, _CLIP / np.maximum(norms, 1e-30))[:, None]
        return shorter

    def clipped_sum(self, rows: NDArray[np.int64], w_CD: Array) -> Array:
        return np.asarray(self.residuals(rows, w_CD).T @ self.x_ND[rows])

    def sum_in_quanta(self, rows: NDArray[np.int64], w_CD: Array, distributed: DistributedMechanism) -> Array:
        """Return the sum of the records' rounded gradients, float64[C D] of whole numbers."""
        factor = distributed.clip_before_rounding(w_CD.size) / _CLIP / distributed.quantum
        total, one = np.zeros(w_CD.shape), np.empty(w_CD.shape)
        for r_C, x_D in zip(self.residuals(rows, w_CD) * factor, self.x_ND[rows], strict=True):
            np.multiply(r_C[:, None], x_D, out=one)
            total += np.rint(one, out=one)
        return total.ravel()

    def train(self, sites: Sequence[NDArray[np.int64]], noise: Noise, rate: float, q: float, steps: int) -> Array:
        """Return weights after `steps` steps of plain SGD; the divisor is the public expected batch."""
        mechanism, source = Mechanism(_CLIP, 1.0, q), OsRandomness()
        w_CD = np.zeros((self.classes, self.x_ND.shape[1]))
        expected = q * sum(map(len, sites))
        for _ in range(steps):
            drawn = [rows[mechanism.sample(len(rows), source)] for rows in sites]
            w_CD -= rate * noise(drawn, w_CD).reshape(w_CD.shape) / expected
        return w_CD

    def accuracy(self, w_CD: Array) -> float:
        return float(((self.x_ND @ w_CD.T).argmax(1) == self.y_N).mean())


def _noise(mode: str, probe: _Probe, sites: int, expected: float, mechanism: Mechanism) -> Noise:
    source = OsRandomness()
    if mode == "local":

        def each(drawn: Sequence[NDArray[np.int64]], w_CD: Array) -> Array:
            parts = [mechanism.release(probe.clipped_sum(rows, w_CD).ravel(), source) for rows in drawn]
            return np.asarray(np.sum(parts, axis=0))

        return each
    if mode == "pooled":

        def pooled(drawn: Sequence[NDArray[np.int64]], w_CD: Array) -> Array:
            return mechanism.release(probe.clipped_sum(np.concatenate(drawn), w_CD).ravel(), source)

        return pooled
    colluding = 1 if sites > 2 else 0
    quorum = default_quorum(PrivacyConfig(mode="distributed", colluding_sites=colluding), sites)
    distributed = DistributedMechanism(mechanism, sites, quorum, colluding, expected)

    def together(drawn: Sequence[NDArray[np.int64]], w_CD: Array) -> Array:
        uploads = [distributed.upload(probe.sum_in_quanta(rows, w_CD, distributed), source) for rows in drawn]
        total = np.zeros(w_CD.size, np.uint32)
        kept = distributed.revealed_seeds(sites)
        for upload, seeds in uploads:
            total += upload - distributed.surplus([seeds[k] for k in kept], sites, total.size)
        return distributed.decode(total)

    return together


def measure(
    data: DataOption,
    model: ModelOption,
    epsilons: Annotated[str, typer.Option(help="Comma-separated.")] = "1,3,8",
    sites: Annotated[str, typer.Option(help="Numbers of sites, comma-separated.")] = "2,8,32",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    sampling_rate: Annotated[float, typer.Option(min=0.001, max=1)] = 0.2,
) -> None:
    """Test accuracy of a probe by mode, epsilon and number of sites."""
    train, test = (read_table(str(data / f"{part}.jsonl"), part) for part in ("train", "test"))
    names = tuple(sorted({row["label"] for row in train}))
    number = {name: i for i, name in enumerate(names)}
    both = embeddings(model, [row["text"] for row in (*train, *test)], names)
    y = np.array([number[row["label"]] for row in (*train, *test)])
    order = np.random.default_rng(0).permutation(len(train))
    kept, rest = order[:_KEPT_BACK], order[_KEPT_BACK:]
    tune = _Probe(both[rest], y[rest], len(names)), _Probe(both[kept], y[kept], len(names))
    full = (
        _Probe(both[: len(train)], y[: len(train)], len(names)),
        _Probe(both[len(train) :], y[len(train) :], len(names)),
    )

    def one(probes: tuple[_Probe, _Probe], mode: str, k: int, sigma: float, rate: float, seed: int) -> float:
        learner, judge = probes
        dealt = np.array_split(np.random.default_rng(seed).permutation(len(learner.y_N)), k)
        mechanism = Mechanism(_CLIP, sigma, sampling_rate)
        noise = _noise(mode, learner, k, sampling_rate * len(learner.y_N) / k, mechanism)
        return judge.accuracy(learner.train(dealt, noise, rate, sampling_rate, steps))

    modes = ("pooled", "local", "distributed")
    print(f"| epsilon | noise multiplier | sites | {' | '.join(modes)} |")
    print("|---:|---:|---:|" + "---:|" * len(modes))
    for epsilon in map(float, epsilons.split(",")):
        sigma = calibrate(epsilon, _DELTA, sampling_rate, steps)
        rates: dict[str, float] = {}
        for k in map(int, sites.split(",")):
            found: dict[str, list[float]] = {}
            for mode in modes:
                if mode == "local" or "pooled" not in rates:
                    rates[mode] = max(_RATES, key=lambda r: one(tune, mode, k, sigma, r, 0))
                rate = rates[mode if mode in ("pooled", "local") else "pooled"]
                found[mode] = [one(full, mode, k, sigma, rate, seed) for seed in range(seeds)]
            cells = [f"{np.mean(each):.3f} ± {np.std(each, ddof=1) if seeds > 1 else math.nan:.3f}"
                     for each in found.values()]  # fmt: skip
            print(f"| {epsilon:g} | {sigma:g} | {k} | {' | '.join(cells)} |", flush=True)
    Console().print(machine(), highlight=False)


if __name__ == "__main__":
    typer.run(measure)
