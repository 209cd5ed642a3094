"""An evaluation for people: one page in English or Korean, without scripts, plots and fonts inline."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache, partial
from importlib.resources import files
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from fedllm.audit.report import LANGUAGES, Language, drawing_inline, font_face, inline, number
from fedllm.release.evaluate import LESS_IS_BETTER, OWN, Answer, Estimate, Estimates, Evaluation, Metric, tells
from fedllm.training.evaluation import spread

_PAGE, _WORDS = "evaluation.html.j2", "evaluation.json"  # in templates/
_SHOWN = 100  # records of each group on the page
_COLOURS = {"base": "#767b84", "adapter": "#1f5fa8", "merged": "#2c7a4b", "student": "#c2571a"}
_SHARES = ("exact_match", "accuracy", "macro_f1")

Group = Literal["differ", "wrong", "right"]
GROUPS: tuple[Group, ...] = ("differ", "wrong", "right")


@dataclass(frozen=True)
class _Card:
    """A record as the page shows it."""

    group: Group
    answer: Answer
    marked: list[Markup]  # what each model said


def render_html(evaluation: Evaluation, language: Language) -> str:
    """Return the page; everything that records or models say in it is escaped."""
    say = partial(text_of, language)
    environment = Environment(
        loader=PackageLoader("fedllm.release"), undefined=StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    groups = _groups(evaluation.answers)
    cards = [card for group in GROUPS for card in groups[group]]
    with drawing_inline():
        names = [shown(language, model.name) for model in evaluation.models]
        scores = [model.scores for model in evaluation.models]
        colours = [_COLOURS[model.kind] for model in evaluation.models]
        plots = {"models": inline(_plot(names, scores, colours, language), "models", say("scores"))}
        if evaluation.prompts:
            plots["prompts"] = inline(
                _plot([shown(language, prompt.name) for prompt in evaluation.prompts],
                      [prompt.scores for prompt in evaluation.prompts],
                      [_COLOURS["adapter"]] * len(evaluation.prompts), language),
                "prompts", say("prompts"),
            )  # fmt: skip
    page = environment.get_template(_PAGE).render(
        e=evaluation, t=say, language=language, headline=_headline(evaluation, language), plots=plots,
        metrics=list(evaluation.models[0].scores), less=LESS_IS_BETTER, number=number,
        value=partial(with_ends, language=language), change=partial(_change, language), outcome=_outcome,
        shown=partial(shown, language), best=best_of(evaluation, language), groups=GROUPS,
        sizes={group: sum(_group(answer) == group for answer in evaluation.answers) for group in GROUPS},
        cards=cards,
    )  # fmt: skip
    return page.replace("/*FONT*/", font_face(page))


# ---- words and figures -----------------------------------------------------------------------------------------------


@cache
def _words() -> dict[str, tuple[str, str]]:
    words: dict[str, tuple[str, str]] = json.loads((files("fedllm.release") / "templates" / _WORDS).read_text("utf-8"))
    return words


def text_of(language: Language, key: str, **values: object) -> str:
    """Return a text; `values` fill it in."""
    return _words()[key][LANGUAGES.index(language)].format(**values)


def shown(language: Language, name: str) -> str:
    """Return the name of a model or prompt in a language; what the user named stays."""
    if name == OWN:
        return text_of(language, "own")
    kind, *rest = name.split(" ", 1)
    return " ".join((text_of(language, f"kind.{kind}"), *rest)) if f"kind.{kind}" in _words() else name


def with_ends(metric: Metric, estimate: Estimate, language: Language = "en") -> str:
    """Return a score with its interval: shares in percent."""
    value, low, high = (_figure(metric, each) for each in estimate)
    return f"{value}{' %' if metric in _SHARES else ''} ({low}–{high})"


def _figure(metric: Metric, value: float) -> str:
    if metric in _SHARES:
        return f"{100 * value:.1f}"
    if metric == "chrf":
        return f"{value:.1f}"
    # perplexities are above 1: what is small is a difference of two
    return f"{value:.4f}" if 0 < abs(value) < 0.1 else f"{value:.2f}" if abs(value) < 1000 else f"{value:,.3g}"


def _change(language: Language, metric: Metric, difference: Estimate) -> str:
    """Return a difference with its interval, each with its sign; shares in points of a percent."""
    value, low, high = (
        ("+" if each > 0 else "−" if each < 0 else "") + _figure(metric, abs(each)) for each in difference
    )
    if metric in _SHARES:
        value = text_of(language, "points", value=value)
    return text_of(language, "from_to", value=value, low=low, high=high)


def _outcome(metric: Metric, difference: Estimate) -> Literal["better", "worse", "unclear"]:
    if not tells(difference):
        return "unclear"
    return "better" if (difference[0] > 0) != (metric in LESS_IS_BETTER) else "worse"


def verdict(language: Language, metric: Metric, difference: Estimate) -> str:
    """Return what a difference says, with its figures."""
    said = text_of(language, f"verdict.{_outcome(metric, difference)}")
    return f"{text_of(language, f'metric.{metric}')} {_change(language, metric, difference)}: {said}"


def best_of(evaluation: Evaluation, language: Language) -> str | None:
    """Return which prompt is best and by how much; None if none were compared."""
    best = evaluation.best
    if best is None:
        return None
    scores = next(prompt.scores for prompt in evaluation.prompts if prompt.name == best.name)
    return text_of(
        language, "best", best=shown(language, best.name), second=shown(language, best.second),
        metric=text_of(language, f"metric.{best.metric}"), x=with_ends(best.metric, scores[best.metric]),
        difference=_change(language, best.metric, best.difference),
        verdict=text_of(language, f"verdict.{_outcome(best.metric, best.difference)}"),
    )  # fmt: skip


def _headline(evaluation: Evaluation, language: Language) -> tuple[str, str, str]:
    """Return the outcome of the first difference by its first metric, in a word, in large letters and in figures."""
    say = partial(text_of, language)
    metric: Metric = next(iter(evaluation.models[0].scores))
    name = say(f"metric.{metric}")
    if not evaluation.differences:
        value = with_ends(metric, evaluation.models[0].scores[metric])
        return "unclear", say("headline.alone", metric=name, value=value), shown(language, evaluation.models[0].name)
    first = evaluation.differences[0]
    outcome = _outcome(metric, first.scores[metric])
    a, b = (shown(language, each) for each in (first.name, first.against))
    x, y = (with_ends(metric, evaluation.model(each).scores[metric]) for each in (first.name, first.against))
    difference = _change(language, metric, first.scores[metric])
    large = say(f"headline.{outcome}", a=a, b=b)
    return outcome, large[:1].upper() + large[1:], say(
        "headline.why", metric=name, x=x, y=y, difference=difference
    )  # fmt: skip


# ---- answers ---------------------------------------------------------------------------------------------------------


def _group(answer: Answer) -> Group:
    return "right" if all(answer.right) else "differ" if any(answer.right) else "wrong"


def _groups(answers: Sequence[Answer]) -> dict[Group, list[_Card]]:
    """Return the records that the page shows, by group."""
    by_group: dict[Group, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_group[_group(answer)].append(answer)
    return {
        group: [
            _Card(group, each, [_marked(said, each.expected) for said in each.answers])
            for each in spread(by_group[group], _SHOWN)
        ]
        for group in GROUPS
    }


def _marked(answer: str, expected: str) -> Markup:
    """Return an answer in which the words are marked that the expected one does not have at that place."""
    words, right = answer.split(" "), expected.split(" ")
    pieces = list[Markup]()
    for what, begin, end, _, _ in SequenceMatcher(None, words, right, autojunk=False).get_opcodes():
        text = escape(" ".join(words[begin:end]))
        if begin < end:
            pieces.append(text if what == "equal" else Markup("<mark>{}</mark>").format(text))
    return Markup(" ").join(pieces)


# ---- plots -----------------------------------------------------------------------------------------------------------


def _plot(names: Sequence[str], scores: Sequence[Estimates], colours: Sequence[str], language: Language) -> Figure:
    """Draw each metric in a panel of its own: a dot and its interval for each name, the first on top."""
    metrics = list(scores[0])
    figure = Figure(figsize=(7.2, 0.9 + 0.34 * len(names)), layout=ConstrainedLayoutEngine(w_pad=0.1))
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        scale = 100 if metric in _SHARES else 1
        for place, (estimates, colour) in enumerate(zip(scores, colours, strict=True)):
            value, low, high = (scale * each for each in estimates[metric])
            axes.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt", alpha=0.55)
            axes.plot([value], [place], "o", color=colour, markersize=6)
        axes.grid(axis="x", color="#e6e8ec", linewidth=0.6)
        axes.set_axisbelow(True)
        best = "arrow.down" if metric in LESS_IS_BETTER else "arrow.up"
        unit = " (%)" if metric in _SHARES else ""
        axes.set_title(f"{text_of(language, f'metric.{metric}')}{unit}", fontsize=9, loc="left")
        axes.set_xlabel(text_of(language, best), fontsize=8, color="#555b66")
        ends = [scale * end for estimates in scores for end in estimates[metric][1:]]
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if metric in LESS_IS_BETTER and max(ends) > 20 * min(ends):
            axes.set_xscale("log")
        elif metric not in LESS_IS_BETTER:
            axes.set_xlim(-0.04 * (max(ends) or 1), 1.06 * (max(ends) or 1))
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(names)), [_short(name) for name in names])
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:13]}…{name[-13:]}"
