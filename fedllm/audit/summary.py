"""What a finished run leaves in its folder: adapter, model card, plots, and a summary in English and Korean."""

import contextlib
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from transformers import GenerationConfig

import fedllm
from fedllm.audit.model import Empirical
from fedllm.audit.report import METRICS, add_font, draw_scores, text_of
from fedllm.config import HeldoutConfig
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import spent
from fedllm.shown import with_interval
from fedllm.training.adapter import AdapterModel, check_saved
from fedllm.training.chat import answer_end

_OFF_SCALE = 1e6  # an epsilon above says no more, and a site may claim any: drawing 1e308 overflows
_BLUE, _ORANGE, _RED, _GREY = "#2563a8", "#c2571a", "#b3261e", "#8a8f98"


@dataclass(frozen=True)
class RunSummary:
    """All that the outputs say about a run; everything in it is public."""

    name: str
    folder: Path
    plan: RunPlan
    data: HeldoutConfig
    records: list[dict[str, Any]]  # one a round, round 0 being the base model
    sites: dict[str, dict[str, Any]]
    budgets: dict[str, float]  # epsilon that each simulated site permits; a deployed one does not tell
    stopped: str  # why the run ended early; "" if it did not
    seconds: float  # of this process, from the reading of the data to the last round
    peak_memory_mb: float
    kept: int | None = None  # the round of the adapter that the run ended with, if it was not the last
    attack: Empirical | None = None  # on the run; None if its report is not written yet, or has none
    exact_match: tuple[float, float] | None = None  # before, after
    samples: list[tuple[str, str, str, str]] = field(default_factory=list)  # prompt, expected, before, after

    @property
    def private(self) -> bool:
        """Whether the run may be called private."""
        return self.plan.privacy.protects

    @property
    def before(self) -> dict[str, Any]:
        """The record of the base model."""
        return self.records[0]

    @property
    def after(self) -> dict[str, Any]:
        """The record of the last completed round."""
        return self.records[-1]

    @property
    def kept_record(self) -> dict[str, Any]:
        """The record of the round whose adapter the run ended with."""
        return self.after if self.kept is None else self.records[self.kept]

    @property
    def out_of_patience(self) -> bool:
        """Whether the run ended early because scores at the sites no longer improved."""
        early = self.after["round"] < self.plan.training.rounds and not self.stopped
        return early and self.plan.evaluation.patience is not None

    @property
    def at_sites(self) -> list[tuple[str, str, str]]:
        """Metric, before and after with intervals, by the sites' evaluation records; none if they were not scored."""
        scores = [record["at_sites"] for record in (self.before, self.kept_record)]
        names = sorted({name for score in scores for name in score}, key=METRICS.index)
        return [
            (name, *(with_interval(name, score[name]) if name in score else "-" for score in scores)) for name in names
        ]

    @property
    def epsilon(self) -> float | None:
        """The largest epsilon that any site has spent, the closing exchange included; None if no noise was added."""
        values = [self.after["epsilon"], *(site["epsilon"] for site in self.sites.values())]
        return None if None in values else max(values)

    @property
    def score_epsilon(self) -> float:
        """Epsilon by PLD, at most, of all scores so far, for those who evaluate."""
        closing = self.plan.evaluation.every is not None  # has one, also where training ended early
        scores = self.plan.scores_in(self.after["round"]) + closing
        return spent([self.plan.score_mechanism.event(scores)], self.plan.privacy.delta).epsilon

    @property
    def planned_epsilon(self) -> float:
        """Epsilon of the whole plan by PLD; math.inf if no noise is added."""
        return spent([self.plan.mechanism.event(self.plan.steps)], self.plan.privacy.delta).epsilon

    @property
    def epsilon_rdp(self) -> float | None:
        """The largest epsilon by RDP that any site has spent: an upper bound by another method."""
        values = [site["epsilon_rdp"] for site in self.sites.values()]
        return None if None in values else max(values, default=0.0)

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the software that shaped the result."""
        packages = ("flwr", "torch", "transformers", "peft", "opacus", "dp-accounting")
        return {"python": sys.version.split()[0], "fedllm": fedllm.__version__, **{p: version(p) for p in packages}}


def write_outputs(summary: RunSummary, adapter: AdapterModel, final: NDArray[np.float32]) -> None:
    """Write the `final` adapter float32[d], its model card, plots and summaries into the run's folder."""
    pages = templates()
    folder = summary.folder
    adapter.save(final, folder / "adapter", summary.plan.model.source)
    check_saved(folder / "adapter", adapter, final, summary.plan.model)
    ends = () if adapter.classifies else answer_end(adapter.tokenizer, summary.data.chats).tokens
    if ends:
        generation = GenerationConfig(eos_token_id=list(ends), pad_token_id=adapter.tokenizer.pad_token_id)
        generation.save_pretrained(folder / "adapter")
    card = pages.get_template("card.md.j2").render(
        s=summary, plan=summary.plan, ends=ends, pad=adapter.tokenizer.pad_token_id
    )
    (folder / "adapter" / "README.md").write_text(card, "utf-8")
    for language in ("en", "ko"):
        text = pages.get_template(f"summary.{language}.md.j2").render(s=summary, plan=summary.plan)
        (folder / ("summary.md" if language == "en" else "summary.ko.md")).write_text(text, "utf-8")
    with drawing():
        for language, suffixes in (("en", ("svg", "png")), ("ko", ("ko.svg",))):
            say = partial(text_of, "ko" if language == "ko" else "en")
            for name, figure in (("rounds", _plot_rounds(summary, say)), ("sites", _plot_sites(summary, say))):
                for suffix in suffixes:
                    figure.savefig(folder / f"{name}.{suffix}", dpi=160, bbox_inches="tight")


def templates() -> Environment:
    """Return the templates of this package's Markdown pages."""
    environment = Environment(  # noqa: S701  # Markdown, not HTML
        loader=PackageLoader("fedllm.audit"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        number=_number, cell=_cell, reason=lambda code: text_of("ko", f"reason.{code}"),
        metric=lambda name, language: text_of(language, f"metric.{name}"),
    )  # fmt: skip
    return environment


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw in this package's style, Korean included."""
    add_font()
    style: dict[Any, Any] = {
        "font.family": ["DejaVu Sans", "Noto Sans KR"],
        "font.size": 9,
        "svg.fonttype": "none",
        "text.parse_math": False,  # a site's name may hold $
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # a name in another script
        yield


def _number(value: float | None, digits: int = 4) -> str:
    """Format a figure; None is an epsilon without bound."""
    if value is None or math.isinf(value):
        return "∞"
    return f"{value:.{digits}g}"


def _cell(text: str) -> str:
    """Make text safe inside a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _brand(figure: Figure, summary: RunSummary, say: partial[str]) -> None:
    if not summary.private:
        figure.text(0.5, 1.0, say("picture.brand"), ha="center", va="bottom", color=_RED, weight="bold", size=13)


def _plot_rounds(summary: RunSummary, say: partial[str]) -> Figure:
    """Quality on the held-out set and at the sites, and epsilon, by round."""
    figure = Figure(figsize=(8.4, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    rounds = [record["round"] for record in summary.records]
    scored = any("accuracy" in record["at_sites"] for record in summary.records)
    key = "accuracy" if summary.after["accuracy"] is not None or scored else "loss"
    values = [record[key] for record in summary.records]
    if values[0] is not None:
        left.plot(rounds, values, color=_BLUE, marker="o", markersize=3, label=say("picture.heldout"))
        for at in (0, -1):
            left.annotate(f"{values[at]:.3g}", (rounds[at], values[at]), textcoords="offset points", xytext=(0, 6),
                          ha="center", color=_BLUE)  # fmt: skip
        left.margins(y=0.15)
    scores = {record["round"]: record["at_sites"][key] for record in summary.records if key in record["at_sites"]}
    if scores:
        draw_scores(left, scores, say)
        if summary.kept is not None:
            left.axvline(summary.kept, color=_GREY, linestyle="--", linewidth=1, label=say("plot.kept"))
    if scores or values[0] is not None:
        left.legend(frameon=False, loc="best", fontsize=8)
    else:
        left.text(0.5, 0.5, say("picture.nothing"), ha="center", color=_GREY, transform=left.transAxes)
    left.set(xlabel=say("plot.round"), title=say(f"metric.{key}"))
    _epsilon_axis(right, summary, rounds, say)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _brand(figure, summary, say)
    return figure


def _epsilon_axis(axes: Axes, summary: RunSummary, rounds: list[int], say: partial[str]) -> None:
    privacy = summary.plan.privacy
    title = say("picture.spent", delta=f"{privacy.delta:g}")
    axes.set(xlabel=say("plot.round"), ylabel=say("col.epsilon"), title=title)
    values = [record["epsilon"] for record in summary.records]
    if None in values:
        axes.text(0.5, 0.5, say("picture.off"), ha="center", color=_RED, transform=axes.transAxes)
        return
    values = [min(value, _OFF_SCALE) for value in values]
    axes.step(rounds, values, where="post", color=_ORANGE)
    axes.axhline(privacy.epsilon, color=_GREY, linestyle="--", linewidth=1)
    target = say("picture.target", epsilon=f"{privacy.epsilon:g}")
    axes.annotate(target, (rounds[0], privacy.epsilon), textcoords="offset points", xytext=(2, 3), color=_GREY)
    axes.set_ylim(0, max(privacy.epsilon, *values) * 1.15)


def _plot_sites(summary: RunSummary, say: partial[str]) -> Figure:
    """One row a site: a bar of epsilon spent, and how the site took part."""
    names = list(summary.sites)
    figure = Figure(figsize=(8.4, 1.1 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    spending = [summary.sites[name]["epsilon"] for name in names]
    budgets = [summary.budgets.get(name, math.nan) for name in names]
    rows = range(len(names))
    if None not in spending:
        axes.barh(rows, budgets, color="#e7e9ee", height=0.62)
        shown = [min(epsilon, _OFF_SCALE) for epsilon in spending]
        axes.barh(rows, shown, color=_ORANGE, height=0.62)
        known = [budget for budget in budgets if not math.isnan(budget)] or [summary.plan.privacy.epsilon, *shown]
        axes.set_xlim(0, max(known) * 1.02)
    else:
        axes.barh(rows, [1] * len(names), color="#f6dedc", height=0.62)
        axes.set_xlim(0, 1.02)
        axes.set_xticks([])
    axes.set_yticks(list(rows), names)
    axes.invert_yaxis()
    axes.set(xlabel=say("col.epsilon"), title=say("picture.sites"))
    for row, name in enumerate(names):
        site = summary.sites[name]
        sent = f"{site['bytes_up'] / 1e6:.2f}"
        notes = say("picture.site", epsilon=_number(site["epsilon"], 3), rounds=site["rounds"], sent=sent)
        if site["declined"]:
            notes += say("picture.declined", reason=say(f"reason.{site['reason']}"))
        if site["failed"]:
            notes += say("picture.missed", count=site["failed"])
        axes.annotate(notes, (1.02, row), xycoords=("axes fraction", "data"), va="center", annotation_clip=False)
    _brand(figure, summary, say)
    return figure
