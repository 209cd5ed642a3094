"""Membership inference on a finished simulation: what one attack found, beside what the claim allows, for people."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedllm.audit.model import Risk
from fedllm.audit.report import text_of
from fedllm.audit.summary import drawing, templates
from fedllm.values import Frozen

CONFIDENCE = 0.95  # of each interval
RATES = (0.01, 0.001)  # of false positives, at which true positives are reported
_POINTS = 200  # of the ROC that are kept, beside the first hundred
_BLUE, _ORANGE, _RED, _GREY = "#2563a8", "#c2571a", "#b3261e", "#8a8f98"

Interval = tuple[float, float]


class Area(Frozen):
    """Area under a ROC curve: how often a member's score is above a non-member's; 0.5 is guessing."""

    auc: float
    interval: Interval


class Hits(Frozen):
    """True positives where at most a share `fpr` of the non-members is accused."""

    fpr: float
    tpr: float
    interval: Interval
    bound: float | None  # largest true positive rate that the run's events allow; None if it claims nothing


class Target(Frozen):
    """What was attacked, and what the run claims."""

    name: str
    run: str
    round: int  # after which the adapter was taken
    sites: int
    unit: Literal["record", "person"]  # that the claim protects; what is attacked is always a record
    members: int  # records that were tried
    members_there: int  # records that the sites trained on
    others: int  # records that no site trained on, and that were tried
    others_there: int
    left_out: int  # of these, what equals a record that trained
    public: bool = True  # they are the held-out set's; else of the sites' units that evaluate
    epsilon: float | None  # None if the run claims nothing
    delta: float
    events: tuple[tuple[float, float, int], ...]  # sampling rate, noise multiplier, steps


class Attack(Frozen):
    """The outcome, as attack.json holds it. Exact figures about real records: it is for who holds them."""

    simulation_only: Literal[True] = True
    target: Target
    found: Area
    auc_bound: float | None
    control: Area  # by the loss before training, which knows no member
    hits: tuple[Hits, ...]
    roc: tuple[tuple[float, float], ...]  # false and true positive rate
    curve: tuple[tuple[float, float], ...]  # the largest that the events allow; none if the run claims nothing

    @property
    def succeeds(self) -> bool:
        """Whether members are told from non-members better than by chance."""
        return self.found.interval[0] > 0.5 or any(hits.interval[0] > hits.fpr for hits in self.hits)

    @property
    def differs(self) -> bool:
        """Whether members and non-members differ by more than chance before any training."""
        return not self.control.interval[0] <= 0.5 <= self.control.interval[1]

    @property
    def above(self) -> bool:
        """Whether the attack is above what the events allow."""
        lowest = [(self.found.interval[0], self.auc_bound), *((hits.interval[0], hits.bound) for hits in self.hits)]
        return any(bound is not None and low > bound for low, bound in lowest)


def attack_of(
    target: Target, before: tuple[NDArray[np.float32], NDArray[np.float32]],
    after: tuple[NDArray[np.float32], NDArray[np.float32]], risk: Risk,
) -> Attack:  # fmt: skip
    """Return the outcome, from the losses of members and of non-members, float32[N] each, before and after training.

    A record's score is the loss before minus the loss after: the log-likelihood ratio of the two models, for each
    labelled token (Mireshghallah et al. 2022). So a record that is easy anyhow does not pass for a member.
    """
    members, others = (a.astype(np.float64) - b for a, b in zip(before, after, strict=True))
    curve = risk.curve if target.epsilon is not None else ()
    return Attack(
        target=target,
        found=area(members, others),
        auc_bound=_area_below(curve),
        control=area(-before[0], -before[1]),
        hits=tuple(
            Hits(fpr=rate, tpr=tpr, interval=interval, bound=dict(curve)[rate] if curve else None)
            for rate in RATES
            for tpr, interval in [true_positives(rate, members, others)]
        ),
        roc=roc(members, others),
        curve=curve,
    )


# ---- figures ---------------------------------------------------------------------------------------------------------


def area(members: NDArray[np.floating], others: NDArray[np.floating]) -> Area:
    """Return the area under the ROC curve of scores float[N] and float[M], a tie counting one half.

    The interval is method 5 of Newcombe (2006), Statistics in Medicine 25, 559: it inverts Hanley and McNeil's
    variance, so it has a width at 0 and 1 as well. It takes the records as independent of one another.
    """
    ordered = np.sort(others)
    below, not_above = (np.searchsorted(ordered, members, side=side) for side in ("left", "right"))
    auc = float((below + not_above).mean() / (2 * len(others)))
    pairs, mean = len(members) * len(others), (len(members) + len(others)) / 2 - 1
    z2 = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2

    def far(true: float) -> bool:
        variance = true * (1 - true) / pairs * (1 + mean * ((1 - true) / (2 - true) + true / (1 + true)))
        return (auc - true) ** 2 > z2 * variance

    return Area(auc=auc, interval=(_edge(far, auc, 0.0), _edge(far, auc, 1.0)))


def true_positives(rate: float, members: NDArray[np.floating], others: NDArray[np.floating]) -> tuple[float, Interval]:
    """Return the share of members above a threshold that at most a share `rate` of non-members is above.

    The interval is for the share at the threshold that is right for all non-members there could be. How many of these
    are above that, of M, is Binomial(M, rate), which bounds the threshold by two order statistics; the members above a
    threshold are binomial as well (Clopper and Pearson 1934). It assumes no distribution of the scores, and takes the
    records as independent of one another.
    """
    from scipy import special, stats

    tail = (1 - CONFIDENCE) / 4  # two sides, two causes
    fewest, most = (int(stats.binom.ppf(q, len(others), rate)) for q in (tail, 1 - tail))
    n = len(members)
    tried = _hits(int(rate * len(others) + 1e-9), members, others)
    low, high = _hits(fewest - 1, members, others), _hits(most, members, others)
    return tried / n, (
        float(special.betaincinv(low, n - low + 1, tail)) if low else 0.0,
        float(special.betaincinv(high + 1, n - high, 1 - tail)) if high < n else 1.0,
    )


def roc(members: NDArray[np.floating], others: NDArray[np.floating]) -> tuple[tuple[float, float], ...]:
    """Return points of the ROC curve: what share of members is found if so many non-members are accused at most."""
    counts = np.unique(
        np.concatenate([np.arange(min(100, len(others))), np.linspace(0, len(others), _POINTS).astype(int)])
    )
    return tuple((int(k) / len(others), _hits(int(k), members, others) / len(members)) for k in counts)


def _hits(accused: int, members: NDArray[np.floating], others: NDArray[np.floating]) -> int:
    """Return how many members are above the lowest threshold that at most `accused` non-members are above."""
    if accused < 0:
        return 0
    if accused >= len(others):
        return len(members)
    threshold = np.partition(others, len(others) - 1 - accused)[len(others) - 1 - accused]
    return int((members > threshold).sum())


def _area_below(curve: Sequence[tuple[float, float]]) -> float | None:
    """Return an upper bound on the area under a curve that never falls; None if there is no curve."""
    if not curve:
        return None
    return min(1.0, sum((b - a) * hits for (a, _), (b, hits) in itertools.pairwise(curve)))


def _edge(far: Callable[[float], bool], near: float, end: float) -> float:
    """Return where between `near`, which is not far, and `end` what is far begins."""
    if not far(end):
        return end
    while abs(end - near) > 1e-9:
        middle = (near + end) / 2
        near, end = (near, middle) if far(middle) else (middle, end)
    return end


# ---- for people ------------------------------------------------------------------------------------------------------


def write_attack(attack: Attack, folder: Path) -> None:
    """Write attack.json, a picture and a page in English and Korean into `folder`; raises OSError."""
    folder.mkdir(exist_ok=True, mode=0o700)
    (folder / "attack.json").write_text(attack.model_dump_json(indent=1) + "\n", "utf-8")
    pages = templates()
    for language, suffix in (("en", ""), ("ko", ".ko")):
        page = pages.get_template(f"attack.{language}.md.j2").render(a=attack, t=attack.target)
        (folder / f"attack{suffix}.md").write_text(page, "utf-8")
        with drawing():
            figure = _plot(attack, partial(text_of, "ko" if language == "ko" else "en"))
            figure.savefig(folder / f"attack{suffix}.png", dpi=160, bbox_inches="tight")


def _plot(attack: Attack, say: partial[str]) -> Figure:
    """The ROC beside the curve of the events: whole, and on logarithmic axes where few are accused."""
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    for axes, scale in zip(figure.subplots(1, 2), ("linear", "log"), strict=True):
        least = 0.0 if scale == "linear" else 5e-4
        if attack.curve:
            rates, bound = zip(*attack.curve, strict=True)
            axes.plot(rates, bound, color=_BLUE, label=say("attack.bound", epsilon=f"{attack.target.epsilon:.3g}"))
        rates, found = zip(*attack.roc, strict=True)
        axes.step(rates, found, where="post", color=_ORANGE, label=say("attack.found", auc=f"{attack.found.auc:.3f}"))
        for hits in attack.hits:
            low, high = (abs(edge - hits.tpr) for edge in hits.interval)
            axes.errorbar([hits.fpr], [hits.tpr], [[low], [high]], color=_ORANGE, capsize=2, marker=".")
        chance = [max(least, 1e-9), 1.0]
        axes.plot(chance, chance, color=_GREY, linestyle="--", linewidth=1, label=say("plot.guess"))
        axes.set(xlabel=say("plot.fpr"), ylabel=say("attack.tpr"), xscale=scale, yscale=scale)
        axes.set(xlim=(least, 1), ylim=(least, 1.02 if scale == "linear" else 1.1))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    figure.axes[0].legend(frameon=False, loc="lower right")
    figure.suptitle(say("attack.brand"), color=_RED, size=12)  # no bold: the Korean font has none
    return figure
