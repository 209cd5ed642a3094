"""What a sequence of noisy steps costs: epsilon at delta, by dp-accounting.

Adjacency is add-or-remove-one privacy unit and sampling is Poisson, throughout. The PLD value is the published one;
RDP is computed beside it as an upper bound by another method (RDP >= PLD holds where float64 is exact enough for both).
"""

import logging
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import ConfigError, PrivacyError, first_line
from fedllm.privacy.mixture import Mixture
from fedllm.values import MAX_SITES

# dp_accounting is imported where it is used: a process that only carries messages imports this module, and never
# accounts.

_RDP_ORDERS = tuple(1 + x / 10 for x in range(1, 110)) + tuple(range(12, 64)) + (72, 96, 128, 192, 256, 512)
_FINEST, _COARSEST = 2.0**-20, 2.0**-6  # grids of the privacy loss
OLD_GRID = 1e-4  # of every figure that names no grid: of reports and statements of earlier versions
_LEAST_NOISE = 0.1  # that calibration gives: in a full batch it meets an epsilon of 93
_MOST_NOISE = 10_000.0
_COARSER = 8  # grid, for a first look at a noise multiplier
_NO_NOISE = 1e-6  # less cannot be computed with, and counts as none
_HOPELESS = 100.0  # above this epsilon the RDP bound stands alone: the PLD says no more, and needs memory without end
_HOPELESS_AT_SITES = 500.0  # the same for somebody at several sites, whose RDP bound is further above
_MOST_POINTS = 2**23  # of a PLD, for the same reason: a rare and huge loss on a fine grid
_ROUNDING, _ONCE = 2.0**-51, 64  # of delta, for each step and for each kind of step: see `_rounding`
_INEXACT = 1e-5  # of mass that float64 may add to a PLD on a fine grid; beyond, it may be above RDP
MAX_STEPS = 10_000_000  # of one event
_LEAST_RATE, _MOST_NOISE_MULTIPLIER = 1e-9, 1e9  # 0 is an event as well: nobody is drawn, nothing is added
_one_at_a_time = threading.Lock()  # all sites of a process ask for the same cost at once: one computes, the others wait


@dataclass(frozen=True)
class AccountingEvent:
    """`steps` releases of a Poisson-subsampled Gaussian."""

    sampling_rate: float  # probability that a privacy unit enters one step
    noise_multiplier: float  # standard deviation of the noise / L2 sensitivity; 0 means no privacy
    steps: int

    def check(self) -> None:
        """Raise PrivacyError if there can be no such event, or none whose cost can be computed.

        The bounds hold for everybody who accounts: a site before it charges, and a reader of what a site has signed.
        """
        numbers = all(
            isinstance(value, int | float) and not isinstance(value, bool)
            for value in (self.sampling_rate, self.noise_multiplier, self.steps)
        )
        if (
            not numbers
            or not isinstance(self.steps, int)
            or not (self.sampling_rate == 0 or _LEAST_RATE <= self.sampling_rate <= 1)
            or not 0 <= self.noise_multiplier <= _MOST_NOISE_MULTIPLIER
            or not 0 <= self.steps <= MAX_STEPS
        ):
            raise PrivacyError(
                f"impossible accounting event: sampling_rate={self.sampling_rate!r:.40} must be 0 or in "
                f"[{_LEAST_RATE:g}, 1], noise_multiplier={self.noise_multiplier!r:.40} in "
                f"[0, {_MOST_NOISE_MULTIPLIER:g}], steps={self.steps!r:.40} a count up to {MAX_STEPS}"
            )


@dataclass(frozen=True)
class _AtSites(AccountingEvent):
    """The same for a unit at several sites that share one noise: each draws it independently."""

    sites: int

    @property
    def mixture(self) -> Mixture:
        return Mixture(self.sampling_rate, self.noise_multiplier, self.sites)


@dataclass(frozen=True)
class PrivacySpent:
    """Privacy loss of everything released so far."""

    epsilon: float  # PLD (RDP where that is the lower of the two bounds, or stands alone); math.inf without noise
    epsilon_rdp: float
    delta: float
    grid: float | None = None  # of the privacy loss, where there is a PLD
    exact: bool = True  # False where float64 is too coarse for another accountant to agree

    @property
    def by_rdp_alone(self) -> bool:
        """Whether `epsilon` is the RDP bound: it is too large, or delta too small, for a PLD in float64."""
        return 0 < self.epsilon == self.epsilon_rdp


def spent(events: Sequence[AccountingEvent], delta: float, grid: float | None = None) -> PrivacySpent:
    """Compose `events` and return the privacy loss at `delta`, on the grid that follows from both, or on `grid`.

    A PLD is rounded up onto its grid, so it is an upper bound on any; what float64 may be in error by is taken off
    delta first. Raises PrivacyError where an event is impossible, or the two accountants contradict each other.
    """
    composed = _merged(events)
    with _one_at_a_time, _computing():
        return _spent(composed, delta, grid)


def spent_at_sites(events: Sequence[tuple[AccountingEvent, int]], delta: float) -> PrivacySpent:
    """Return what somebody has lost whose records are at k sites that share one noise; pairs of an event and its k.

    In a step, each of the k sites draws the person with the event's sampling rate, independently of the others, and
    adds at most one clip norm to the sum. The event's noise multiplier is that of the one noise, relative to one clip
    norm. `fedllm.privacy.mixture` has the pair of distributions that dominates; such pairs compose, even if a step
    depends on what those before released (Zhu, Dong and Wang 2022, Theorem 10). With k = 1 throughout, that is what
    `spent` returns. Raises PrivacyError as that does, and if a k is not a number of sites.
    """
    for _, sites in events:
        if isinstance(sites, bool) or not isinstance(sites, int) or not 1 <= sites <= MAX_SITES:
            raise PrivacyError(f"a person's records are at {sites!r:.40} sites; expected a count from 1 to {MAX_SITES}")
    composed = _merged([event for event, _ in events], [sites for _, sites in events])
    with _one_at_a_time, _computing():
        return _spent(composed, delta, None)


@contextmanager
def _computing() -> Iterator[None]:
    """Raise PrivacyError if the accountants fail at numbers that are far from all that people use."""
    try:
        yield
    except (ArithmeticError, ValueError, MemoryError) as error:
        raise PrivacyError(f"the privacy loss cannot be computed: {first_line(error)}") from error


def overrun(events: Sequence[AccountingEvent], delta: float, budget: float, one_plan: bool) -> float | None:
    """Return what `events` cost if that is more than `budget`, else None: PLD for one plan, RDP for several.

    A plan is fixed before anything is released, so its PLD is a valid filter. A later plan may depend on what earlier
    ones released: see `_adaptive_rdp`. Whether there is a later one may depend on it as well. Divide the transcripts by
    that: each part is of a process that one of the two gates filters at delta, so together they are (budget, 2 delta)
    differentially private; a site with a single plan, and one whose budget RDP alone filters, at delta. Costs a
    millisecond if RDP, an upper bound, admits the events already.
    """
    if one_plan:
        composed = _merged(events)
        noisy = all(event.noise_multiplier > 0 for event in composed)
        with _one_at_a_time, _computing():
            if composed and noisy and _epsilon_rdp(composed, delta) <= budget:
                return None
    cost = counted(events, delta, budget, one_plan)
    return None if cost <= budget else cost


def counted(events: Sequence[AccountingEvent], delta: float, budget: float, one_plan: bool) -> float:
    """Return the epsilon of `events` that decides whether a `budget` at `delta` admits them; see `overrun`."""
    composed = _merged(events)
    with _one_at_a_time, _computing():
        if one_plan or not composed or any(event.noise_multiplier <= 0 for event in composed):
            return _spent(composed, delta, None).epsilon
        return _adaptive_rdp(composed, delta, budget)


def _adaptive_rdp(events: Sequence[AccountingEvent], delta: float, budget: float) -> float:
    """Return an epsilon that gates events of which each may depend on what those before it released.

    At one order that is fixed beforehand, the sum of Renyi divergences is a valid filter (Feldman and Zrnic 2021,
    Theorem 4.3). The minimum over all orders is not covered by that: the order that admits the last release may depend
    on what was released. So a few orders are fixed, as a function of the budget, and each has its part of delta.
    Divide the transcripts by the order that admits the last release. On each part they are those of the process that
    is filtered at this order alone, whose hockey-stick divergence at epsilon is at most that part of delta; the
    divergence of the whole is at most the sum of the parts.
    """
    # Of one Gaussian that costs the whole budget the best order is 1 + 2 log(1/delta) / epsilon; subsampling lowers it.
    best = 2 * math.log(1 / delta) / min(max(budget, 0.01), 100.0)
    distance = np.log(np.asarray(_RDP_ORDERS) - 1)
    chosen = sorted({int(np.argmin(np.abs(distance - math.log(best * share)))) for share in (0.15, 0.3, 0.6)})
    total = _summed_rdp(events)
    part = delta / len(chosen)
    return min(float(_rdp().compute_epsilon([_RDP_ORDERS[i]], total[i : i + 1], part)[0]) for i in chosen)


def deltas(events: Sequence[AccountingEvent], epsilons: Sequence[float], grid: float | None) -> list[float]:
    """Return a delta at each of `epsilons` that `events` together satisfy, by PLD on `grid` and rounded up.

    1.0 throughout if no noise was added, or so little that there is no PLD (`grid` is None).
    """
    composed = _merged(events)
    with _one_at_a_time, _computing():
        return list(_deltas(composed, tuple(epsilons), grid))


@lru_cache(maxsize=64)
def _deltas(events: tuple[AccountingEvent, ...], epsilons: tuple[float, ...], grid: float | None) -> tuple[float, ...]:
    if not events:
        return (0.0,) * len(epsilons)
    if grid is None or any(event.noise_multiplier <= 0 for event in events):
        return (1.0,) * len(epsilons)
    if _too_large(events, grid):
        return (1.0,) * len(epsilons)
    found = _composed(events, grid).get_delta_for_epsilon(list(epsilons))
    return tuple(min(1.0, max(0.0, float(delta)) + _rounding(events)) for delta in found)


def _merged(events: Sequence[AccountingEvent], at: Iterable[int] = repeat(1)) -> tuple[AccountingEvent, ...]:
    """Check events and put equal ones together: their order does not matter. A unit is `at` so many sites."""
    merged: dict[tuple[float, float, int], int] = {}
    for event, sites in zip(events, at, strict=False):
        event.check()
        q, noise = event.sampling_rate, event.noise_multiplier
        key = (q, noise / sites, 1) if q == 1 else (q, noise, sites)  # all k draw it: a Gaussian that moves by k
        merged[key] = merged.get(key, 0) + event.steps
    return tuple(
        AccountingEvent(q, s, n) if k == 1 else _AtSites(q, s, n, k)
        for (q, s, k), n in sorted(merged.items())
        if n and q
    )


@lru_cache(maxsize=4096)
def _spent(events: tuple[AccountingEvent, ...], delta: float, grid: float | None) -> PrivacySpent:
    if not events:
        return PrivacySpent(0.0, 0.0, delta)
    if any(event.noise_multiplier <= 0 for event in events):
        return PrivacySpent(math.inf, math.inf, delta)
    rdp = _epsilon_rdp(events, delta)
    if not rdp <= (_HOPELESS_AT_SITES if any(isinstance(event, _AtSites) for event in events) else _HOPELESS):
        return PrivacySpent(rdp, rdp, delta)
    grid = grid or grid_of(events, delta)
    if _too_large(events, grid):
        return PrivacySpent(rdp, rdp, delta)
    rounding = _rounding(events)
    if rounding > delta / 2:
        return PrivacySpent(rdp, rdp, delta, grid, exact=False)
    pld = float(_composed(events, grid).get_epsilon_for_delta(delta - rounding))
    # Both are upper bounds, the smaller one holds. Rounding up costs at most half a percent; on the old grid, more
    # where a step loses less than a cell. Among very many steps, or at a very small delta, so do the last digits.
    exact = sum(event.steps for event in events) * 2.0**-52 / grid < _INEXACT and rounding < 0.01 * delta
    if rdp < 0.99 * pld - 0.01 and grid != OLD_GRID and exact:
        raise PrivacyError(
            f"the accountants contradict each other: PLD {pld:.4g}, RDP {rdp:.4g} (which can only be larger). Nothing "
            "was released. Check the versions against constraints.txt."
        )
    return PrivacySpent(min(pld, rdp), rdp, delta, grid, exact)


def _rounding(events: tuple[AccountingEvent, ...]) -> float:
    """Return by how much float64 may have made the delta of a composed PLD of `events` too small, at any epsilon.

    The library composes n equal steps as the n-th power of a Fourier transform. Whatever is rounded before that is in
    error by a part of itself, and so is what it adds to delta: grid and cut tails are rounded up, by more. But the
    transform f of a step is rounded to the last digits of 1, not of delta, by some r_k at frequency k, and the power
    multiplies that by n. Of the N cells in the result, delta adds up those of a range, with weights from 0 to 1 that
    grow, so that frequency k has a weight of at most N / (pi |k|) in the sum: delta is in error by at most
    n (|r_0| + 2 sum_k |f_k|^(n-1) |r_k| / (pi k)). The power leaves the N / (2 pi S) lowest frequencies, or a few
    times as many, for a result whose deviation is S cells, and it has up to some 30 S: up to about 15 of them count,
    and the sum is at most 3 n max |r|. In a transform that adds halves to a whole, the errors of the last two additions
    make up nearly all of r: about 2^-53. If all of them have that size and one sign, that makes 1.5 n 2^-52.

    Of 2^-52 n, at most 0.5 was seen (against the closed form of the Gaussian, and where delta has to be 0), and 2 is
    allowed for: whoever asks for a plan may search for one whose errors have the same sign. The transform back, and
    those that put two kinds of steps together, add some last digits of 1 once for each kind.
    `tests/attacks/test_rounding_of_epsilon.py` has the measurements.
    """
    return _ROUNDING * sum(event.steps + _ONCE for event in events)


def grid_of(events: Sequence[AccountingEvent], delta: float) -> float:
    """Return the grid of the privacy loss on which `events`, none of them without noise, are composed.

    A power of two, the same wherever it is computed. To round a loss onto a grid of h and keep its mean (Doroshenko et
    al. 2022) adds at most h^2/4 to the variance of each step, so h is a fiftieth of a step's standard deviation: that
    of a Gaussian with the same Renyi divergence. Where rare steps lose much, that is finer than epsilon can tell, and h
    is then as coarse as changes epsilon by a few parts in ten thousand.
    """
    steps = sum(event.steps for event in events)
    orders = np.asarray(_RDP_ORDERS)
    with np.errstate(invalid="ignore"):
        variance = sum(e.steps * float(np.min(2 * _event_rdp(e) / orders)) for e in events)
    fine = max(0.02 * math.sqrt(variance / steps), 0.005 * _epsilon_rdp(events, delta) / math.sqrt(steps))
    return 2.0 ** math.floor(math.log2(min(max(fine, _FINEST), _COARSEST)))


def _too_large(events: Sequence[AccountingEvent], grid: float) -> bool:
    """Whether the PLD of `events` needs memory or time without end: rare, huge losses on a fine grid, very many kinds.

    What it takes is bounded before it is taken: some 20 seconds to make all steps, about as much to compose them.
    """
    from dp_accounting.pld.common import compute_self_convolve_bounds

    lengths, sizes, values = [], [], 0.0
    for event in events:
        if isinstance(event, _AtSites):
            low, _, high = event.mixture.bounds
            lengths.append((high - low) / grid)
            values += event.mixture.values + event.sites * lengths[-1]
            continue
        q, x = event.sampling_rate, 10 / event.noise_multiplier + 0.5 / event.noise_multiplier**2  # tails of e^-50
        rest = math.log1p(-q) if q < 1 else -math.inf
        span = float(np.logaddexp(rest, math.log(q) + x) - np.logaddexp(rest, math.log(q) - x))
        lengths.append(span / grid)
    if max(lengths) > _MOST_POINTS / 8 or sum(lengths) + values > _MOST_POINTS / 2:
        return True
    if len(events) == 1 and lengths[0] * events[0].steps <= _MOST_POINTS:
        return False
    for event in events:
        pld = _event_pld(event, grid)
        for step in (pld._pmf_remove, pld._pmf_add):  # it offers no other way to ask before it allocates
            low, high = compute_self_convolve_bounds(step.to_dense_pmf()._probs, event.steps, 1e-15)
            if high - low > _MOST_POINTS:
                return True
            sizes.append(high - low)
    # one after another they are put together with all those before
    return bool(sum(sizes) + len(sizes) * math.hypot(*sizes) > 32 * _MOST_POINTS)


def _composed(events: tuple[AccountingEvent, ...], grid: float) -> Any:
    """Return the privacy loss distribution of all `events` together."""
    parts = [_event_pld(event, grid).self_compose(event.steps) for event in events]
    composed = parts[0]
    for part in parts[1:]:
        composed = composed.compose(part)
    return composed


def _event_pld(event: AccountingEvent, grid: float) -> Any:
    """Return the privacy loss distribution of one step of `event`."""
    if isinstance(event, _AtSites):
        return _mixture_pld(event.mixture, grid)
    return _step_pld(event.sampling_rate, event.noise_multiplier, grid)


@lru_cache(maxsize=64)
def _mixture_pld(mixture: Mixture, grid: float) -> Any:
    """Return the same for a person at several sites, both directions of add-or-remove-one (Doroshenko et al. 2022)."""
    from dp_accounting.pld import pld_pmf, privacy_loss_distribution

    low, high_q, high_p = mixture.bounds
    parts = []
    for removed, first, last in ((True, low, high_p), (False, -high_q, -low)):
        cells = np.arange(math.floor(first / grid), math.ceil(last / grid) + 1)
        deltas = mixture.deltas(cells.astype(np.float64) * grid, removed)
        parts.append(pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(grid, int(cells[0]), int(cells[-1]), deltas))
    return privacy_loss_distribution.PrivacyLossDistribution(*parts)


@lru_cache(maxsize=64)
def _step_pld(sampling_rate: float, noise_multiplier: float, grid: float) -> Any:
    """Return the privacy loss distribution of one step, add-or-remove-one (Doroshenko et al. 2022)."""
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=grid, sampling_prob=sampling_rate, use_connect_dots=True
    )


def _rdp() -> Any:
    """Return the library's Renyi accounting; it would report each order left out, and the others stay valid."""
    from dp_accounting import rdp

    logging.getLogger("absl").setLevel(logging.ERROR)
    return rdp


def _epsilon_rdp(events: Sequence[AccountingEvent], delta: float) -> float:
    return float(_rdp().compute_epsilon(_RDP_ORDERS, _summed_rdp(events), delta)[0])


def _summed_rdp(events: Sequence[AccountingEvent]) -> NDArray[np.float64]:
    """Renyi divergences add up over the steps (Mironov 2017, Proposition 1), so that one step of a kind is enough."""
    total = np.zeros(len(_RDP_ORDERS))
    for event in events:
        total += event.steps * _event_rdp(event)
    return total


def _event_rdp(event: AccountingEvent) -> NDArray[np.float64]:
    """Return the Renyi divergence of one step of `event` at every order."""
    if isinstance(event, _AtSites):
        return _mixture_rdp(event.mixture)
    return _step_rdp(event.sampling_rate, event.noise_multiplier)


@lru_cache(maxsize=1024)
def _mixture_rdp(mixture: Mixture) -> NDArray[np.float64]:
    """Return the same for a person at several sites.

    If that takes too long: as if the sum moved by k clip norms whenever a site draws the person, which costs more.
    """
    drawn = -math.expm1(mixture.sites * math.log1p(-mixture.sampling_rate))
    longest = _step_rdp(drawn, mixture.noise_multiplier / mixture.sites)
    if mixture.noise_multiplier < _NO_NOISE:
        return longest
    return np.maximum(np.minimum(longest, mixture.renyi(_RDP_ORDERS)), 0.0)


@lru_cache(maxsize=1024)
def _step_rdp(sampling_rate: float, noise_multiplier: float) -> NDArray[np.float64]:
    """Return the Renyi divergence of one step at every order, add-or-remove-one."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent

    accountant = _rdp().RdpAccountant(orders=_RDP_ORDERS, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    if noise_multiplier < _NO_NOISE:
        return np.full(len(_RDP_ORDERS), np.inf)
    with np.errstate(all="ignore"):  # with little noise it is infinite, or not a number, at some orders
        accountant.compose(PoissonSampledDpEvent(sampling_rate, GaussianDpEvent(noise_multiplier)))
    step: NDArray[np.float64] = np.asarray(accountant._rdp)  # it offers no other way to what it computed
    # It grows with the order, so if it could not be computed, its value at a higher order is an upper bound. It is
    # never below 0, but for the last digit of a step that costs nearly nothing.
    return np.maximum(np.minimum.accumulate(np.where(np.isnan(step), np.inf, step)[::-1])[::-1], 0.0)


@lru_cache(maxsize=256)
def calibrate(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Return a noise multiplier whose epsilon after `steps` is at most `epsilon`, and (up to 50) above 0.998 of it.

    It is 0.1 if that is enough or more than enough. Starts where RDP, an upper bound, meets the target.
    Raises ConfigError if no noise multiplier up to 10,000 meets the target.
    """

    def by_rdp(noise: float) -> float:
        return _epsilon_rdp((AccountingEvent(sampling_rate, noise, steps),), delta)

    def by_pld(noise: float, coarser: int) -> float:
        events = (AccountingEvent(sampling_rate, noise, steps),)
        with _one_at_a_time:
            return _spent(events, delta, coarser * grid_of(events, delta)).epsilon

    if by_pld(_LEAST_NOISE, _COARSER) <= epsilon:
        return _LEAST_NOISE
    low, high = _LEAST_NOISE, _MOST_NOISE
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if by_rdp(middle) > epsilon else (low, middle)
    reached = by_pld(high, 1)
    if reached > epsilon:
        raise ConfigError(
            f"privacy.epsilon={epsilon:g} cannot be met in {steps} steps at sampling rate {sampling_rate:g} and "
            f"delta {delta:g}. Ask for fewer rounds, a lower sampling rate or a larger epsilon."
        )
    for coarser in (_COARSER, 1):  # an upper bound on any grid; the fine one shows what is left to spare
        reached = by_pld(high, coarser)
        low, above = _LEAST_NOISE, math.inf  # `high` meets the target with `reached`, `low` misses it with `above`
        while reached < 0.998 * epsilon and high > (1 + 1e-5) * low:
            # In logarithms epsilon is nearly linear in the noise; a step too far is one from the other side.
            slope = 1.0 if above == math.inf else math.log(above / reached) / math.log(high / low)
            guess = high * (reached / (0.999 * epsilon)) ** (1 / max(slope, 0.1))
            if not low < guess < high:
                guess = math.sqrt(low * high)
            cost = by_pld(guess, coarser)
            if cost > epsilon:
                low, above = guess, cost
            else:
                high, reached = guess, cost
    noise = math.ceil(high * 1e4) / 1e4  # rounded up: never less noise
    while by_pld(noise, 1) > epsilon:  # on a grid of its own
        noise = round(noise + 1e-4, 4)
    return noise
