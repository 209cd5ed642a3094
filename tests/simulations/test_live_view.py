"""What a person sees while a federation runs: names and faults of sites are text, whatever is in them."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fedllm.cli.live_view import Screen
from fedllm.config import SimulationConfig
from fedllm.plan import RunPlan
from server.events import Phase, RoundMetrics, RoundStarted, SiteAnswered

HOSTILE = ["[/]", "[/b]", "[bold]", "[red]x[/red]", "\\[", "[link=http://x]", "강남[/본점]", "a\nb", "[" * 50]


def _plan(config: SimulationConfig) -> RunPlan:
    privacy = config.privacy.model_copy(update={"units_per_site": 10})
    return RunPlan(
        run="r", seed=0, model=config.model, adapter=config.adapter, privacy=privacy, training=config.training
    )


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
