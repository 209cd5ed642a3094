"""What a person sees while a federation runs: names and faults of sites are text, whatever is in them."""

import io
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from fedllm.audit.model import Attack, Empirical
from fedllm.audit.summary import RunSummary
from fedllm.cli.live_view import Screen
from fedllm.config import SimulationConfig
from fedllm.plan import RunPlan
from server.events import Phase, RoundMetrics, RoundStarted, SiteAnswered

HOSTILE = ["[/]", "[/b]", "[bold]", "[red]x[/red]", "\\[", "[link=http://x]", "강남[/본점]", "a\nb", "[" * 50]


def _plan(config: SimulationConfig) -> RunPlan:
    privacy = config.privacy.model_copy(update={"units_per_site": 10})
    return RunPlan(
        run="r", seed=0, model=config.model, adapter=config.adapter, privacy=privacy, training=config.training,
        evaluation=config.evaluation,
    )  # fmt: skip


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "log file"])
@pytest.mark.parametrize("text", HOSTILE)
def test_no_name_and_no_fault_of_a_site_disturbs_the_screen(
    tmp_path: Path, configure: Callable[..., SimulationConfig], text: str, terminal: bool
) -> None:
    """What a site says of itself comes over the network: it must not end the run."""
    output = io.StringIO()
    config = configure(tmp_path, model={"source": f"models/{' '.join(text.split())}"})
    console = Console(file=output, force_terminal=terminal, width=200, color_system=None)
    with Screen(console) as screen:
        screen.announce(_plan(config), [text, "busan"])
        screen.observe(RoundMetrics(0, True, 0.0, 1.0, 2.7, None))
        screen.observe(RoundStarted(1, [text, "busan"]))
        screen.observe(SiteAnswered(1, text, True))
        screen.observe(SiteAnswered(1, "busan", False, f"site={text}, expected busan"))
        screen.observe(RoundMetrics(1, True, 1.5, 0.9, 2.5, None, answered=[text], failed={"busan": text}))
    shown = output.getvalue()
    assert "round 1/3" in shown or terminal
    assert text.split("\n", maxsplit=1)[0] in shown


def test_the_screen_says_what_the_round_cost(tmp_path: Path, configure: Callable[..., SimulationConfig]) -> None:
    output = io.StringIO()
    with Screen(Console(file=output, width=200)) as screen:
        screen.announce(_plan(configure(tmp_path)), ["서울", "busan"])
        screen.observe(RoundMetrics(1, True, 1.25, 0.9, 2.46, None, answered=["서울"], seconds=1.0))
        screen.observe(RoundMetrics(2, False, None, 0.9, None, 0.75))
    assert "서울, busan" in output.getvalue()
    assert "perplexity 2.46 · epsilon 1.25" in output.getvalue()
    assert "accuracy 0.750 · NOT PRIVATE" in output.getvalue()


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "log file"])
def test_the_speed_of_training_is_for_the_eyes_alone(
    tmp_path: Path, configure: Callable[..., SimulationConfig], terminal: bool
) -> None:
    """How many tokens were sampled is private: the screen rounds it, and a log that may be kept does not have it."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=200, color_system=None)
    counts = iter([(0, 0.0), (123_456, 10.0)])
    with Screen(console) as screen:
        screen.announce(_plan(configure(tmp_path)), ["서울", "busan"], lambda: next(counts))
        screen.observe(RoundMetrics(0, True, 0.0, 0.9, 2.46, None))
        screen.observe(RoundMetrics(1, True, 1.25, 0.9, 2.46, None, answered=["서울"], clipped=0.25))
    assert ("12,000 tokens/s" in output.getvalue()) == terminal
    assert "25% of held-out gradients clipped" in output.getvalue()


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "log file"])
def test_what_is_done_outside_the_rounds_is_on_the_screen(
    tmp_path: Path, configure: Callable[..., SimulationConfig], terminal: bool
) -> None:
    """From the first moment, before there is a plan, to the report."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=200, color_system=None)

    def new() -> str:
        """What a watcher has been shown since the last look."""
        if terminal:
            screen._live.refresh()
        text = output.getvalue()
        output.seek(0)
        output.truncate()
        return text

    with Screen(console) as screen:
        screen.say("loading [/libraries]")
        assert "loading [/libraries]" in new()
        screen.observe(Phase("reading"))
        assert "reading" in new()
        screen.announce(_plan(configure(tmp_path)), ["busan"])
        screen.observe(RoundStarted(1, ["busan"]))
        new()
        assert "reading" not in new(), "it is over"
        screen.observe(RoundMetrics(1, True, 1.25, 0.9, 2.46, None, answered=["busan"], seconds=1.0))
        screen.observe(Phase("closing"))
        assert "closing" in new()


AT_SITES = {"units": [839.1, 835.7, 842.4], "loss": [0.2214, 0.1472, 0.3283], "exact_match": [0.3845, 0.3521, 0.418]}


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "log file"])
@pytest.mark.parametrize("perplexity", [2.46, None], ids=["held-out set", "none"])
def test_what_the_sites_say_of_a_round_is_shown_when_it_comes_in(
    tmp_path: Path, configure: Callable[..., SimulationConfig], terminal: bool, perplexity: float | None
) -> None:
    """It comes with the next exchange: then a log says that alone, and the screen all that is known of the round."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=200, color_system=None)
    record = RoundMetrics(1, True, 1.25, None, perplexity, None, answered=["busan"], seconds=1.0)
    with Screen(console) as screen:
        screen.announce(_plan(configure(tmp_path)), ["서울", "busan"])
        screen.observe(record)
        screen.observe(RoundStarted(2, ["busan"]))
        screen.observe(replace(record, at_sites=AT_SITES))
        shown = screen._figures.plain
        screen.observe(RoundMetrics(2, True, 1.5, None, perplexity, None, answered=["busan"], at_sites=AT_SITES))
    said = "at the sites loss 0.221 (0.147–0.328)"
    assert said in shown
    assert "epsilon 1.25" in shown
    assert ("perplexity" in shown) == (perplexity is not None)
    if not terminal:
        lines = [line for line in output.getvalue().splitlines() if line.startswith("round")]
        assert lines[1] == f"round 1/3 · {said}"
        assert f"{said} · epsilon 1.50" in lines[2]


def test_before_anything_is_sent_the_screen_says_what_is_scored_and_attacked(
    tmp_path: Path, configure: Callable[..., SimulationConfig]
) -> None:
    output = io.StringIO()
    plan = _plan(configure(tmp_path, evaluation={"every": 1, "epsilon": 1.5, "noise_multiplier": 9.0}))
    with Screen(Console(file=output, width=200)) as screen:
        screen.announce(plan.model_copy(update={"canaries": 40, "guesses": 7}), ["busan"])
    assert "4 scores on records that never train, epsilon 1.5 for all of them" in output.getvalue()
    assert "40 canaries at each site; guesses by each of 2 attacks: 7" in output.getvalue()


def test_the_closing_table_has_the_sites_scores_before_and_after(
    tmp_path: Path, configure: Callable[..., SimulationConfig]
) -> None:
    """Also with no held-out set, and of the adapter that was kept."""
    output = io.StringIO()
    config = configure(tmp_path, evaluation={"every": 1, "noise_multiplier": 9.0, "patience": 1})
    scores: list[dict[str, list[float]]] = [
        {**AT_SITES, "loss": [0.6, 0.5, 0.7]}, AT_SITES, {**AT_SITES, "loss": [0.3, 0.2, 0.4]}
    ]  # fmt: skip
    records = [asdict(RoundMetrics(n, True, float(n), at_sites=said)) for n, said in enumerate(scores)]
    summary = RunSummary("run", tmp_path, _plan(config), config.data, records, {}, {}, "", 1.0, 2.0, kept=1)
    Screen(Console(file=output, width=200)).summarise(summary, 1.0)
    shown = output.getvalue()
    assert re.search(r"loss at the sites +│ +0.600 \(0.500–0.700\) │ +0.221 \(0.147–0.328\)", shown)
    assert "held-out" not in shown
    assert "The adapter is that of round 1" in shown
    assert "Ended after round 2: scores at the sites no longer improved." in shown


@pytest.mark.parametrize(
    ("lower", "ceiling", "claim", "said"),
    [
        (0.0, 2.5, 8.0, "The claim of 8 is not contradicted: with so few guesses it could not have been."),
        (0.5, 2.5, 1.0, "The claim of 1 is not contradicted."),
        (1.5, 2.5, 1.0, "The claim of 1 is contradicted."),
        (1.5, 2.5, None, "No noise was added, so there is no claim that it could contradict."),
    ],
)
def test_the_closing_screen_says_what_the_attack_came_to(
    tmp_path: Path, configure: Callable[..., SimulationConfig], lower: float, ceiling: float, claim: float | None,
    said: str,
) -> None:  # fmt: skip
    output, config = io.StringIO(), configure(tmp_path)
    black, white = Attack(right=9, lower=0.0), Attack(right=11, lower=lower)
    attack = Empirical(sites=8, canaries=128, guesses=16, black=black, white=white, ceiling=ceiling, claim=claim)
    records = [asdict(RoundMetrics(0, True, 0.0))]
    summary = RunSummary("run", tmp_path, _plan(config), config.data, records, {}, {}, "", 1.0, 2.0, attack=attack)
    Screen(Console(file=output, width=300)).summarise(summary, 1.0)
    shown = output.getvalue()
    proves = f"epsilon {lower:.2f}" if lower else "nothing"
    assert f"Attack on 128 canaries: 9 and 11 of 16 guesses right, which proves {proves}" in shown
    assert said in shown
