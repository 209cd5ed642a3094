"""Ten thousand sites: what a sparse graph of masks would stand, and what noise stays. Nothing is trained.

python -m simulations.benchmarks.scale

The design is in docs/scale.md. *Graph*: each of n sites has k neighbours, drawn at random after all keys are known
(Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020), which hold its shares at a
threshold t; a fraction of the sites colludes with the server, another drops out. For each k the smallest t that is
safe, and the odds to fail: bounds over all sites from the hypergeometric distribution, and counted in drawn graphs.
*Noise*: the shares of fedllm.privacy.distributed_noise are drawn and added up for sites in groups, with dropouts.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import hypergeom

from fedllm.errors import ConfigError
from fedllm.privacy.distributed_noise import DistributedMechanism
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import OsRandomness
from fedllm.values import MAX_HOLDERS
from simulations.benchmarks.bench import machine

_GRAPHS = 20  # drawn for each row
_COORDINATES = 64
_QUORUM = 2 / 3


@dataclass(frozen=True)
class Odds:
    """How likely a round over a sparse graph fails, log2 of bounds over all sites."""

    threshold: int
    opened: float  # the server, with who colludes, gets both secrets' worth of shares of some site
    apart: float  # honest survivors fall into parts, whose sums would open one by one
    stuck: float  # fewer than `threshold` neighbours of some site are left, and the round is lost


def odds(sites: int, degree: int, colluding: int, gone: int, threshold: int) -> Odds:
    """Bound the three ways to fail by a sum over the sites.

    A site's neighbours are `degree` of the other sites, drawn without replacement. A list of survivors is not signed
    by all here, so an honest neighbour may be told another list than the next: a site is opened if half of its honest
    neighbours and all that collude reach the threshold, which is avoided with 2 t > k + (colluding neighbours).
    """
    bad = hypergeom(sites - 1, colluding, degree)
    opened = float(bad.logsf(2 * threshold - degree - 1))  # P(2 t - k <= colluding neighbours)
    lost = hypergeom(sites - 1, gone, degree)
    stuck = float(lost.logsf(degree - threshold))  # P(k - lost < t)
    alone = hypergeom(sites - 1, colluding + gone, degree)
    # A part of one site is by far the likeliest: all its neighbours collude or are gone.
    apart = float(alone.logsf(degree - 1))
    return Odds(threshold, *((math.log(sites) + value) / math.log(2) for value in (opened, apart, stuck)))


def best(sites: int, degree: int, colluding: int, gone: int, security: float) -> Odds:
    """Return the odds at the smallest threshold that keeps `security` bits, or at the largest there is."""
    for threshold in range(degree // 2 + 1, degree + 1):
        found = odds(sites, degree, colluding, gone, threshold)
        if found.opened <= -security:
            return found
    return found


def graph(sites: int, degree: int, coins: np.random.Generator) -> NDArray[np.int64]:
    """Return int64[sites, degree]: neighbours in a ring of the sites in random order, `degree` / 2 on each side."""
    order = coins.permutation(sites)
    place = np.empty(sites, np.int64)
    place[order] = np.arange(sites)
    steps = np.concatenate([np.arange(1, degree // 2 + 1), -np.arange(1, degree // 2 + 1)])
    found: NDArray[np.int64] = order[(place[:, None] + steps) % sites]
    return found


def counted(
    sites: int, degree: int, colluding: int, gone: int, threshold: int, coins: np.random.Generator
) -> tuple[int, int, int]:
    """Draw a graph, and return how many sites were opened, parts beyond the first, and sites that were stuck."""
    near = graph(sites, degree, coins)
    who = coins.permutation(sites)
    colludes, left = np.zeros(sites, np.bool_), np.ones(sites, np.bool_)
    colludes[who[:colluding]] = True
    left[who[colluding : colluding + gone]] = False
    honest = ~colludes & left
    opened = int(((2 * threshold - degree <= colludes[near].sum(1)) & honest).sum())
    stuck = int((left[near].sum(1) < threshold).sum())
    kept = honest[:, None] & honest[near]
    first, second = np.nonzero(kept)
    edges = coo_array((np.ones(len(first), np.int8), (first, near[first, second])), shape=(sites, sites))
    _, label = connected_components(edges, directed=False)
    return opened, len(np.unique(label[honest])) - 1, stuck


def _graphs(sites: int, shares: list[float], dropped: list[float], degrees: list[int], security: float) -> Table:
    table = Table(title=f"{sites:,} sites, log2 of the odds that a round fails; counted in {_GRAPHS} graphs each")
    for heading in ("collude", "dropped", "k", "t", "a site opened", "falls apart", "round lost", "counted"):
        table.add_column(heading, justify="right")
    coins = np.random.default_rng(0)  # a simulation: nobody is protected by these
    for share in shares:
        for fraction in dropped:
            for degree in degrees:
                colluding, gone = round(share * sites), round(fraction * sites)
                found = best(sites, degree, colluding, gone, security)
                seen = np.array(
                    [counted(sites, degree, colluding, gone, found.threshold, coins) for _ in range(_GRAPHS)]
                )
                table.add_row(
                    f"{share:.1%}", f"{fraction:.0%}", str(degree), str(found.threshold),
                    *(f"{value:.0f}" for value in (found.opened, found.apart, min(0.0, found.stuck))),
                    " / ".join(str(int((column > 0).sum())) for column in seen.T),
                )  # fmt: skip
    return table


def _noise(sites: int, sizes: list[int], dropped: list[float]) -> Table:
    """Draw what all sites of all groups add, take off what is excess, and compare with one mechanism over all."""
    table = Table(title=f"{sites:,} sites in groups, noise of the sum of all groups over that of one mechanism")
    for heading in (
        "sites a group",
        "groups",
        "dropped",
        "groups lost",
        "planned",
        "drawn",
        "a unit's noise, relative",
    ):
        table.add_column(heading, justify="right")
    mechanism, coins = Mechanism(clip_norm=1.0, noise_multiplier=1.0, sampling_rate=0.1), np.random.default_rng(0)
    for size in sizes:
        groups, quorum = sites // size, math.ceil(_QUORUM * size)
        shared = DistributedMechanism(mechanism, size, quorum, colluding=max(1, size // 100), expected_units=10)
        for fraction in dropped:
            there = [size - int(n) for n in coins.multivariate_hypergeometric([size] * groups, round(fraction * sites))]
            kept = [n for n in there if n >= quorum]
            planned = math.sqrt(sum(shared.noise_multiplier(n, n, known=0) ** 2 for n in kept))
            total = sum((_left(shared, n) for n in kept), np.zeros(_COORDINATES))
            drawn = math.sqrt(float(np.mean((total * shared.quantum) ** 2)))
            table.add_row(
                f"{size:,}", str(groups), f"{fraction:.0%}", str(groups - len(kept)), f"{planned:.2f}",
                f"{drawn:.2f} ± {drawn / math.sqrt(2 * _COORDINATES):.2f}", f"{planned / sum(kept) * sites:.2f}",
            )  # fmt: skip
    return table


def _left(shared: DistributedMechanism, survivors: int) -> NDArray[np.float64]:
    """Return float64[coordinates], quanta: the noise of a group of which so many are there, excess taken off."""
    total, source = np.zeros(_COORDINATES), OsRandomness()
    for _ in range(survivors):
        share = shared.share(_COORDINATES, source)
        seeds = [share.seeds[index] for index in shared.revealed_seeds(survivors)]
        total += share.noise - shared.surplus(seeds, survivors, _COORDINATES).view(np.int32)
    return total


def _words() -> Table:
    """How large an adapter 32 bits hold, which is what the number of sites in one sum runs into first."""
    table = Table(title="the largest adapter that one sum in 32 bits holds, values (noise multiplier 1)")
    for heading in ("sites in one sum", "10 units a site and round", "100 units"):
        table.add_column(heading, justify="right")
    for sites in (100, MAX_HOLDERS, 10_000, 100_000, 1_000_000):
        table.add_row(f"{sites:,}", *(f"{_largest(sites, units):,}" for units in (10, 100)))
    return table


def _largest(sites: int, units: int) -> int:
    mechanism = Mechanism(clip_norm=1.0, noise_multiplier=1.0, sampling_rate=0.1)
    try:
        shared = DistributedMechanism(mechanism, sites, math.ceil(_QUORUM * sites), max(1, sites // 100), units)
    except ConfigError:
        return 0
    fits, beyond = 0, 1 << 40
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        try:
            shared.clip_before_rounding(middle)
            fits = middle
        except ConfigError:
            beyond = middle
    return fits


def main(
    sites: Annotated[int, typer.Option("--sites", min=1000, help="How many.")] = 10_000,
    security: Annotated[
        float, typer.Option("--security", help="Bits: odds of at most 2^-this that a site opens.")
    ] = 40,
) -> None:
    """Print the three tables."""
    console = Console(width=140)
    console.print(_graphs(sites, [0.001, 0.01, 0.1], [0.05, 0.1, 0.2], [64, 128, 256], security))
    console.print(_noise(sites, [100, 500, 1000], [0.0, 0.05, 0.1, 0.2]))
    console.print(_words())
    console.print(machine(), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
