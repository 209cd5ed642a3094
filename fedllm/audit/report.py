"""The audit report that people read: audit.html and audit.json, in English or Korean.

The page is self-contained: no script, no remote asset, plots inline, and the glyphs it needs embedded. The same audit
gives the same page, byte for byte, wherever the same software renders it.
"""

import base64
import contextlib
import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import as_file, files
from typing import Any, Literal

import matplotlib as mpl
from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

import fedllm
from fedllm.audit.accountants import CROSS_CHECKS
from fedllm.audit.model import Audit, Finding, Site, SiteScore
from fedllm.shown import with_interval

Language = Literal["en", "ko"]
LANGUAGES: tuple[Language, ...] = ("en", "ko")

_PAGE, _WORDS, _EVIDENCE = "audit.html.j2", "words.json", "evidence.ko.json"  # in templates/
_FONT = files("fedllm.audit") / "fonts" / "NotoSansKR.otf"
_BLUE, _ORANGE, _GREY, _GREEN = "#1f5fa8", "#c2571a", "#767b84", "#2c7a4b"
_BARS = 8  # on the first screen
_ATTENTION = 7  # findings on the first screen
_SCORES = 12  # rows of the table of scores
_TOGETHER = 100  # sites that are listed together; more come in groups, which open one by one
_GROUP = 50  # sites of one
_LINES = 100  # sites whose charges are drawn
METRICS = ("accuracy", "loss", "exact_match", "top_5", "units")  # of a score at the sites, as they are shown

_CROSSWALK = (  # law, number, item, what the record shows
    ("law.act", "1", "law.safety", "law.safety.shows"),
    ("law.act", "3", "law.keeping", "law.keeping.shows"),
    ("law.pipa", "1", "law.pipa.purpose", "law.purpose.shows"),
    ("law.pipa", "2", "law.items", "law.none"),
    ("law.pipa", "3", "law.use", "law.use.shows"),
    ("law.pipa", "4", "law.recipient", "law.recipient.shows"),
    ("law.pipa", "5", "law.period", "law.period.shows"),
    ("law.pipa", "6", "law.other", "law.none"),
    ("law.30", "a", "law.controller", "law.none"),
    ("law.30", "b", "law.purpose", "law.purpose.shows"),
    ("law.30", "c", "law.categories", "law.none"),
    ("law.30", "d", "law.recipients", "law.recipient.shows"),
    ("law.30", "e", "law.transfer", "law.none"),
    ("law.30", "f", "law.erasure", "law.none"),
    ("law.30", "g", "law.measures", "law.measures.shows"),
    ("law.35", "a", "law.description", "law.description.shows"),
    ("law.35", "b", "law.necessity", "law.necessity.shows"),
    ("law.35", "c", "law.risks", "law.risks.shows"),
    ("law.35", "d", "law.address", "law.measures.shows"),
)
_GLOSSARY = ("epsilon", "unit", "ledger", "pld", "poisson", "adapter", "advantage", "interval", "canary")


@dataclass(frozen=True)
class Section:
    """A further section of the report, before the checks."""

    title: Mapping[Language, str]
    body: Callable[[Audit, Language], str]  # text, which is escaped, or HTML as markupsafe.Markup


def renderer() -> str:
    """Return what decides the bytes of a page beside the audit itself."""
    texts = b"".join((files("fedllm.audit") / "templates" / name).read_bytes() for name in (_PAGE, _WORDS, _EVIDENCE))
    texts += b"".join(f"{name} {each.by}".encode() for name, each in CROSS_CHECKS.items())
    made_of = (f"{package} {version(package)}" for package in ("matplotlib", "jinja2", "fonttools"))
    return " ".join((fedllm.__version__, hashlib.sha256(texts).hexdigest()[:8], *made_of))


def render_html(audit: Audit, language: Language, sections: Sequence[Section] = ()) -> str:
    """Return the report as one page of HTML; `sections` are yours, and nobody who verifies the report has them."""
    say = partial(text_of, language)
    environment = Environment(
        loader=PackageLoader("fedllm.audit"), undefined=StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        number=number, interval=with_interval, digest=_digest, evidence=_in_korean if language == "ko" else str
    )
    page = environment.get_template(_PAGE).render(
        a=audit, t=say, language=language, sections=sections,
        renderer=" + ".join((renderer(), *(each.title["en"] for each in sections))),
        groups=_groups(audit), lines=_LINES,
        by_name=sorted(enumerate(audit.sites), key=lambda numbered: numbered[1].name),
        bars=_bars(audit), why=_why(audit, say),
        attention=_attention(audit), attention_limit=_ATTENTION, right=_cases(50 + 50 * audit.risk.advantage),
        unit=say(f"unit.{audit.claim.unit}"), protects=_protects(audit),
        tpr=say(f"risk.tpr.{audit.claim.unit}", tpr=_cases(100 * audit.risk.tpr_at_1_percent)),
        several=_several(audit, say), coalition=_coalition(audit, say), crosswalk=_CROSSWALK, glossary=_GLOSSARY,
        plots=_plots(audit, say), change=_change(audit), cross_checks=CROSS_CHECKS, find=partial(_find, audit, say),
        tried=_tried(audit), scores=_shown_scores(audit), metrics=_scored(audit),
    )  # fmt: skip
    return page.replace("/*FONT*/", font_face(page))


def to_json(audit: Audit) -> bytes:
    """Return audit.json."""
    return (audit.model_dump_json(indent=1) + "\n").encode()


# ---- words and figures -----------------------------------------------------------------------------------------------


@cache
def _words() -> dict[str, tuple[str, str]]:
    words: dict[str, tuple[str, str]] = json.loads((files("fedllm.audit") / "templates" / _WORDS).read_text("utf-8"))
    return words


def text_of(language: Language, key: str, **values: object) -> str:
    """Return a text; `values` fill it in. A `key` with an unknown end, as the server may send, is "other"."""
    texts = _words().get(key) or _words()[f"{key.partition('.')[0]}.other"]
    return texts[LANGUAGES.index(language)].format(**values)


@cache
def _evidence() -> list[tuple[re.Pattern[str], str]]:
    pairs = json.loads((files("fedllm.audit") / "templates" / _EVIDENCE).read_text("utf-8"))
    return [(re.compile(english), korean) for english, korean in pairs]


def _in_korean(evidence: str) -> str:
    """Return a finding's evidence with the words of fedllm.audit.evidence in Korean; what others wrote stays."""
    for english, korean in _evidence():
        evidence = english.sub(korean, evidence)
    return evidence


def number(value: float | None, digits: int = 3) -> str:
    """Format an epsilon; None is one without bound."""
    return "∞" if value is None or math.isinf(value) else f"{value:.{digits}g}"


def _digest(text: str) -> Markup:
    """Let a digest break anywhere in eight places."""
    return Markup("<wbr>").join(escape(text[i : i + 8]) for i in range(0, len(text), 8))


def _cases(percent: float) -> str:
    """Round a share of 100 up, so that the reader is never told too little."""
    return f"{min(100, math.ceil(percent - 1e-9))}"


def _why(audit: Audit, say: partial[str]) -> str:
    known = sum(site.budget_known for site in audit.sites)
    if audit.verdict == "within" and known < len(audit.sites):
        return say("why.within_plan", known=known, total=len(audit.sites))
    return say(f"why.{audit.verdict}")


def _protects(audit: Audit) -> str:
    if audit.finding("protected").status == "fails":
        return "protects.nothing"
    if _tried(audit) == "contradicted":
        return "protects.contradicted"
    return "protects.unverifiable" if audit.verdict == "unverifiable" else f"protects.{audit.claim.unit}"


def _attention(audit: Audit) -> list[Finding]:
    """Return what failed, then what is unverified."""
    return [f for status in ("fails", "unverified") for f in audit.findings if f.status == status]


def _limit(site: Site, audit: Audit) -> float:
    """Return what a site's bar is measured against."""
    return site.budget if site.budget is not None else audit.claim.epsilon


def _share(value: float | None, limit: float) -> float:
    return 1.0 if value is None else value / limit if limit else float(value > 0)


def _bars(audit: Audit) -> dict[str, Any]:
    """Return the costliest sites with the widths of their bars in percent."""
    ranked = _costliest_first(audit)
    shown = ranked[:_BARS]
    rows = []
    for site in shown:
        limit = _limit(site, audit)
        spent, charged = (min(100 * _share(value, limit), 100.0) for value in (site.spent, site.charged))
        held = [site.charged, *(account.counted for account in site.accounts)]
        over = any(value is None or value > limit + 1e-3 for value in held)
        left = site.left if site.left is not None or site.charged is None else max(0.0, limit - site.charged)
        rows.append({"site": site, "limit": limit, "spent": f"{spent:.2f}", "left": left, "over": over,
                     "reserved": f"{max(0.0, charged - spent):.2f}"})  # fmt: skip
    others = sorted(math.inf if site.charged is None else site.charged for site in ranked[_BARS:])
    return {"rows": rows, "others": others}


def _costliest_first(audit: Audit) -> list[Site]:
    return sorted(audit.sites, key=lambda site: -_share(site.charged, _limit(site, audit)))


@dataclass(frozen=True)
class _Group:
    """Sites that are listed together."""

    sites: Sequence[tuple[int, Site]]  # with their numbers in the audit
    first: int  # places by what they have charged, from 1
    last: int

    @property
    def high(self) -> float | None:
        """The largest epsilon that is charged, None without bound."""
        return max((site.charged for _, site in self.sites), key=_unbounded)

    @property
    def low(self) -> float | None:
        """The least."""
        return min((site.charged for _, site in self.sites), key=_unbounded)


def _unbounded(epsilon: float | None) -> float:
    return math.inf if epsilon is None else epsilon


def _groups(audit: Audit) -> list[_Group]:
    """Return all sites as one group, by name; where they are many, in groups: those in trouble, then the costliest."""
    if len(audit.sites) <= _TOGETHER:
        return [_Group(list(enumerate(audit.sites)), 1, len(audit.sites))]
    number = {site.name: index for index, site in enumerate(audit.sites)}
    ranked = sorted(_costliest_first(audit), key=lambda site: site.ledger == "verified")
    numbered = [(number[site.name], site) for site in ranked]
    return [
        _Group(numbered[i : i + _GROUP], i + 1, min(i + _GROUP, len(numbered))) for i in range(0, len(numbered), _GROUP)
    ]


def _several(audit: Audit, say: partial[str]) -> str:
    return "; ".join(say("claim.k.figure", k=k, epsilon=number(e)) for k, e in audit.accountants.several_sites)


def _coalition(audit: Audit, say: partial[str]) -> str:
    """Say what the server can bound with the help of more sites than the plan names."""
    accountants = audit.accountants
    figures = "; ".join(say("claim.coalition.figure", k=k, epsilon=number(e)) for k, e in accountants.coalitions)
    most = accountants.coalitions[-1][0] if figures else audit.claim.colluding_sites
    key = "claim.coalition.text" if figures else "claim.coalition.none"
    return say(key, figures=figures, most=most, alone=number(accountants.share_alone))


def _tried(audit: Audit) -> Literal["unplanned", "unopened", "contradicted", "could", "could_not", "off"]:
    """Return what became of the attack: whether it contradicted the claim, and if not, whether it could have."""
    attack = audit.attack
    if attack is None:
        return "unopened" if audit.claim.canaries else "unplanned"
    if attack.claim is None:
        return "off"
    if max(attack.black.lower, attack.white.lower) > attack.claim:
        return "contradicted"
    return "could" if attack.ceiling > attack.claim else "could_not"


def _find(audit: Audit, say: partial[str], finding: Finding) -> str:
    """Return what a finding says, the outcome of an attack with its figures."""
    attack = audit.attack
    if finding.code != "empirical" or _tried(audit) == "unplanned":
        return say(f"find.{finding.code}")
    if attack is None:
        return say("find.empirical.unopened")
    proved = number(max(attack.black.lower, attack.white.lower))
    key = f"find.empirical.{_tried(audit)}"
    return say(key, proved=proved, ceiling=number(attack.ceiling), claim=number(attack.claim))


def _scored(audit: Audit) -> list[str]:
    """Return the metrics that the sites' scores have, the most telling first."""
    names = {name for score in audit.scores for name in score.metrics}
    return [name for name in METRICS if name in names]


def _shown_scores(audit: Audit) -> list[SiteScore]:
    """Return scores for a table: the first, the last, that of the adapter that was kept, and some between."""
    scores = audit.scores
    if len(scores) <= _SCORES:
        return list(scores)
    chosen = {round(i * (len(scores) - 1) / (_SCORES - 1)) for i in range(_SCORES)}
    return [score for i, score in enumerate(scores) if i in chosen or score.round == audit.kept]


def _measure(audit: Audit) -> Literal["accuracy", "loss"]:
    return "accuracy" if audit.utility and audit.utility[-1].accuracy is not None else "loss"


def _change(audit: Audit) -> tuple[str, str] | None:
    """Return the held-out measurement before, and of the adapter that the run ended with; None if there is none."""
    values = [getattr(step, _measure(audit)) for step in audit.utility]
    if not values or None in values:
        return None
    kept = next((i for i, step in enumerate(audit.utility) if step.round == audit.kept), -1)
    return number(values[0]), number(values[kept])


# ---- plots -----------------------------------------------------------------------------------------------------------


@cache
def add_font() -> None:
    """Let matplotlib draw Korean with the font of this package, Noto Sans KR."""
    with as_file(_FONT) as path:
        font_manager.fontManager.addfont(path)


@contextlib.contextmanager
def drawing_inline() -> Iterator[None]:
    """Draw what stands in a page: texts as outlines, Korean included, and the same bytes every time."""
    add_font()
    style: dict[Any, Any] = {
        "font.family": ["Noto Sans KR", "DejaVu Sans"], "font.size": 9, "axes.unicode_minus": False,
        "svg.fonttype": "path", "svg.hashsalt": "fedllm", "text.parse_math": False, "axes.spines.top": False,
        "axes.spines.right": False, "axes.edgecolor": _GREY, "path.simplify": True,
    }  # fmt: skip
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def _plots(audit: Audit, say: partial[str]) -> dict[str, Markup]:
    with drawing_inline():
        plots = {"tradeoff": inline(_plot_tradeoff(audit, say), "tradeoff", say("tradeoff"))}
        if audit.timeline:
            plots["timeline"] = inline(_plot_timeline(audit, say), "timeline", say("timeline"))
        if _change(audit) is not None:
            plots["utility"] = inline(_plot_utility(audit, say), "utility", say("utility"))
        if audit.scores and _scored(audit)[0] != "units":
            plots["scores"] = inline(_plot_scores(audit, say), "scores", say("scores"))
    return plots


def inline(figure: Figure, name: str, label: str) -> Markup:
    """Return a figure as an SVG element, its ids made its own so that several fit on one page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return Markup(svg)  # noqa: S704  # matplotlib escapes texts, and they are drawn as outlines


def _axes(height: float = 2.9) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(color="#e6e8ec", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _plot_timeline(audit: Audit, say: partial[str]) -> Figure:
    figure, axes = _axes()
    finite = [point for point in audit.timeline if point.epsilon is not None]
    many = len(audit.sites) > 12
    drawn = {site.name for site in _costliest_first(audit)[:_LINES]}
    for site in audit.sites:
        if site.name not in drawn:
            continue
        points = [point for point in finite if point.site == site.name]
        xs, ys = [point.charge for point in points], [point.epsilon or 0.0 for point in points]
        axes.step(xs, ys, where="post", color=_GREY, linewidth=0.6 if many else 0.9, alpha=0.6)
        for mine, colour in ((False, _ORANGE), (True, _BLUE)):
            chosen = [point for point in points if (point.run == audit.run.name) == mine]
            if chosen:
                axes.plot([p.charge for p in chosen], [p.epsilon or 0.0 for p in chosen], ".", color=colour,
                          markersize=3 if many else 5)  # fmt: skip
    axes.plot([], [], ".", color=_BLUE, label=say("plot.this"))
    if any(point.run != audit.run.name for point in finite):
        axes.plot([], [], ".", color=_ORANGE, label=say("plot.other"))
    # several runs are held against the budget, for the plan's target is of this run alone
    budgets = {site.budget for site in audit.sites}
    limit = next(iter(budgets)) if len(budgets) == 1 else None
    if limit is not None:
        label = say("plot.budget", epsilon=number(limit))
        axes.axhline(limit, color=_GREY, linestyle="-", linewidth=1, label=label)
    if all(point.run == audit.run.name for point in finite) and limit != audit.claim.epsilon:
        target = say("plot.target", epsilon=number(audit.claim.epsilon))
        axes.axhline(audit.claim.epsilon, color=_GREY, linestyle="--", linewidth=1, label=target)
    axes.set(xlabel=say("plot.charges"), ylabel=say("plot.epsilon"))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(frameon=False, loc="outside upper left", ncols=4)  # within the axes it may hide a line
    return figure


def _plot_tradeoff(audit: Audit, say: partial[str]) -> Figure:
    figure, axes = _axes(3.4)
    rates, hits = zip(*audit.risk.curve, strict=True)
    axes.fill_between(rates, rates, hits, color=_BLUE, alpha=0.12, linewidth=0)
    axes.plot(rates, hits, color=_BLUE, label=say("plot.bound"))
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1, label=say("plot.guess"))
    tpr = audit.risk.tpr_at_1_percent
    axes.plot([0.01], [tpr], "o", color=_ORANGE, markersize=5)
    axes.annotate(
        f"1 % → {100 * tpr:.3g} %",
        (0.01, tpr),
        textcoords="offset points",
        xytext=(64, 8),
        color=_ORANGE,
        arrowprops={"arrowstyle": "-", "color": _ORANGE, "linewidth": 0.6, "shrinkB": 4},
    )
    axes.set(xlabel=say("plot.fpr"), ylabel=say("plot.tpr"), xlim=(-0.01, 1), ylim=(0, 1.02))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(frameon=False, loc="lower right")
    return figure


def _plot_utility(audit: Audit, say: partial[str]) -> Figure:
    figure, axes = _axes(2.5)
    measure = _measure(audit)
    values: Sequence[float] = [getattr(step, measure) for step in audit.utility]
    rounds = [step.round for step in audit.utility]
    axes.plot(rounds, values, color=_GREEN, marker="." if len(rounds) < 60 else "")
    axes.set(xlabel=say("plot.round"), ylabel=say(f"plot.{measure}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _plot_scores(audit: Audit, say: partial[str]) -> Figure:
    figure, axes = _axes(2.5)
    name = _scored(audit)[0]
    draw_scores(axes, {score.round: score.metrics[name] for score in audit.scores if name in score.metrics}, say)
    if audit.kept is not None:
        axes.axvline(audit.kept, color=_GREY, linestyle="--", linewidth=1, label=say("plot.kept"))
    axes.set(xlabel=say("plot.round"), ylabel=say(f"metric.{name}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(frameon=False, loc="outside upper left", ncols=2)
    return figure


def draw_scores(axes: Axes, scores: Mapping[int, Sequence[float]], say: partial[str]) -> None:
    """Draw scores at the sites: by round an estimate, as a line, and the ends of its interval, as a band."""
    estimates, lows, highs = zip(*scores.values(), strict=True)
    axes.fill_between(list(scores), lows, highs, color=_GREEN, alpha=0.15, linewidth=0)
    marker = "." if len(scores) < 60 else ""
    axes.plot(list(scores), estimates, color=_GREEN, marker=marker, label=say("plot.at_sites"))


def font_face(page: str) -> str:
    """Return the CSS that embeds the glyphs of `page`; signs that the font lacks come from the reader's system."""
    options = Options()
    options.layout_features = ["kern"]
    options.hinting = False
    options.flavor = "woff"
    font = TTFont(io.BytesIO(_FONT.read_bytes()), recalcTimestamp=False)
    subsetter = Subsetter(options)
    subsetter.populate(unicodes=sorted({ord(sign) for sign in page} | {0x20}))
    subsetter.subset(font)
    font.flavor = "woff"
    buffer = io.BytesIO()
    font.save(buffer)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'@font-face{{font-family:"Report";src:url(data:font/woff;base64,{data}) format("woff")}}'
