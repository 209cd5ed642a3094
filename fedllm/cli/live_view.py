"""What the terminal shows while a federation runs, and at its end."""

import logging
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedllm.shown import escaped_lines, with_interval

if TYPE_CHECKING:
    from fedllm.audit.model import Empirical
    from fedllm.audit.summary import RunSummary
    from fedllm.plan import RunPlan
    from server.events import Event, RoundMetrics

_site_logger = logging.getLogger("fedllm.site")


class _ConsoleHandler(logging.Handler):
    """Shows why a site declines. In a simulation the sites are the researcher's own; the server never sees this."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line, without a traceback: that is in the sites' log."""
        self._console.print(Text(escaped_lines(record.getMessage()), style="yellow"))


class Screen:
    """A live view of the rounds; on a pipe or in a log, one line a round."""

    def __init__(self, console: Console) -> None:
        self._console, self._before = console, (0, 0.0)
        self._trained: Callable[[], tuple[int, float]] | None = None
        count = TextColumn("{task.completed:.0f}/{task.total:.0f}")
        left = (TextColumn("left"), TimeRemainingColumn())
        self._rounds = Progress(
            TextColumn("[bold]rounds[/bold]"), BarColumn(36), count, TimeElapsedColumn(), *left, console=console
        )
        last = TextColumn("{task.fields[last]}")
        self._sites = Progress(TextColumn("[bold]sites [/bold]"), BarColumn(36), count, last, console=console)
        doing = TextColumn("{task.description}", markup=False)
        self._phase = Progress(SpinnerColumn(), doing, TimeElapsedColumn(), console=console)
        self._phase_task = self._phase.add_task("", visible=False)
        self._round_task = self._rounds.add_task("", start=False, total=0, visible=False)
        self._site_task = self._sites.add_task("", start=False, total=0, visible=False, last="")
        self._figures = Text()
        self._round, self._pace = -1, ""  # of the round that was shown last
        shown = Group(self._figures, self._rounds, self._sites, self._phase)
        self._live = Live(shown, console=console, refresh_per_second=8, transient=True)
        self._plan: RunPlan | None = None
        self._log = _ConsoleHandler(console)

    def __enter__(self) -> "Screen":
        _site_logger.addHandler(self._log)
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _site_logger.removeHandler(self._log)
        self._live.stop()

    def say(self, text: str) -> None:
        """Show what is being done outside the rounds, and since when."""
        self._phase.reset(self._phase_task, description=text, visible=True)
        if not self._console.is_terminal:
            self._console.print(f"{text} ...", markup=False, highlight=False, soft_wrap=True)

    def announce(
        self, plan: "RunPlan", sites: list[str], trained: Callable[[], tuple[int, float]] | None = None
    ) -> None:
        """Show what is about to run; `trained` tells the tokens and seconds of the training done so far."""
        self._plan, self._trained = plan, trained
        privacy = plan.privacy
        lines = Table.grid(padding=(0, 2))
        quantised = f", {plan.model.quantize}" if plan.model.quantize != "none" else ""
        lines.add_row("model", Text(plan.model.source + quantised))
        lines.add_row("adapter", plan.adapter.summary)
        lines.add_row(
            "sites", Text(", ".join(sites[:10]) + (f" and {len(sites) - 10} more" if len(sites) > 10 else ""))
        )
        steps = plan.training.local_steps
        lines.add_row("rounds", f"{plan.training.rounds}, {steps} local step{'s' if steps > 1 else ''} each")
        if privacy.mode == "off":
            lines.add_row("privacy", "[bold red]NOT PRIVATE[/bold red]: no noise is added")
        else:
            lines.add_row(
                "privacy",
                f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g} for every {privacy.unit}, "
                f"noise multiplier {privacy.noise_multiplier:g}, Poisson rate {privacy.sampling_rate:g}",
            )
            if privacy.mode == "distributed":
                lines.add_row(
                    "", f"distributed noise: the server sees the sum of at least {plan.quorum} sites, and "
                    f"{privacy.colluding_sites} of them may collude with it"
                )  # fmt: skip
            if plan.groups:
                lines.add_row(
                    "", f"{len(plan.groups)} groups of sites, each with a sum and noise of its own: the median counts, "
                    f"and {plan.poisoned_sites} sites may be poisoned"
                )  # fmt: skip
            if not privacy.protects:
                lines.add_row("", "[bold red]NOT PRIVATE[/bold red]: sampling and noise come from a seed")
        if plan.scores:
            epsilon = f", epsilon {plan.score_epsilon:g}" if privacy.mode != "off" else ""
            lines.add_row("at the sites", f"{plan.scores} scores on records that never train{epsilon} for all of them")
        if plan.canaries:
            lines.add_row(
                "attack", f"{plan.canaries} canaries at each site; guesses by each of 2 attacks: {plan.guesses}"
            )
        self._console.print(Panel(lines, title="fedllm", title_align="left", border_style="blue", expand=False))
        for progress, task, total in (
            (self._rounds, self._round_task, plan.training.rounds), (self._sites, self._site_task, len(sites)),
        ):  # fmt: skip
            progress.update(task, total=total, visible=True)
            progress.start_task(task)

    def observe(self, event: "Event") -> None:
        """Follow the run."""
        from server.events import Phase, RoundStarted, SiteAnswered  # late: nothing shall wait for it

        if isinstance(event, Phase):
            self.say(event.text)
            return
        self._phase.update(self._phase_task, visible=False)
        if isinstance(event, RoundStarted):
            self._sites.update(self._site_task, completed=0, total=len(event.sites), last="")
        elif isinstance(event, SiteAnswered):
            self._sites.update(self._site_task, advance=1, last=escape(event.site))
            if not event.used:
                note = f"round {event.round}: {event.site} took no part ({event.detail})"
                self._console.print(Text(note, style="yellow"))
        else:
            self._rounds.update(self._round_task, completed=event.round)
            again = event.round == self._round  # what the sites say of it has come in
            if not again:
                self._round, self._pace = event.round, self._speed()
            self._figures.plain = self._line(event) + self._pace
            if not self._console.is_terminal:
                self._console.print(self._line(event, only_sites=again), highlight=False, soft_wrap=True)

    def _line(self, record: "RoundMetrics", only_sites: bool = False) -> str:
        total = self._plan.training.rounds if self._plan else 0
        said = score_of(record)
        at_sites = [f"at the sites {said}"] if said else []
        parts = [f"round {record.round}/{total}"]
        if only_sites:
            return " · ".join(parts + at_sites)
        if record.perplexity is not None:
            parts.append(f"held-out perplexity {record.perplexity:.2f}")
        if record.accuracy is not None:
            parts.append(f"held-out accuracy {record.accuracy:.3f}")
        parts += at_sites
        parts.append("NOT PRIVATE" if not record.private else f"epsilon {record.epsilon:.2f}")
        if record.clipped is not None:
            parts.append(f"{record.clipped:.0%} of held-out gradients clipped")
        if record.lost:
            parts.append(f"lost: {record.lost}")
        elif record.round:
            parts += [f"without the sum of group {', '.join(sorted(record.without))}"] if record.without else []
            parts.append(f"{len(record.answered)} sites in {record.seconds:.1f} s")
        return " · ".join(parts)

    def _speed(self) -> str:
        """Training tokens a second since the last round, to two digits.

        For the screen of a simulation only, and in no file or message: how many tokens were sampled is private.
        """
        tokens, seconds = self._trained() if self._trained else (0, 0.0)
        new, took = tokens - self._before[0], seconds - self._before[1]
        self._before = (tokens, seconds)
        return f" · {float(f'{new / took:.2g}'):,.0f} tokens/s" if new and took else ""

    def summarise(self, summary: "RunSummary", seconds: float) -> None:
        """Print the closing tables, and how long the whole command took."""
        if summary.after["round"]:
            self._results(summary)
        self._console.print(_site_table(summary))
        if summary.attack is not None:
            self._console.print(_attack(summary.attack), highlight=False)
        for prompt, expected, first, last in summary.samples:
            question = prompt.strip().replace("\n", " ")
            sample = Table.grid(padding=(0, 1))
            sample.add_row("[bold]question[/bold]", Text(question))
            sample.add_row("before", Text(first or "(nothing)", style="yellow"))
            sample.add_row("after", Text(last or "(nothing)", style="green" if last == expected else "yellow"))
            if last != expected:
                sample.add_row("expected", Text(expected))
            self._console.print(sample, "")
        if not summary.private:
            self._console.print("[bold red]NOT PRIVATE[/bold red]: do not publish this adapter.")
        self._console.print(
            f"{seconds:.0f} s, {summary.peak_memory_mb:.0f} MB at most. Everything is in ",
            end="",
            highlight=False,
        )
        self._console.print(f"{summary.folder}/", style="bold", highlight=False, soft_wrap=True)

    def _results(self, summary: "RunSummary") -> None:
        before, kept = summary.before, summary.kept_record
        results = Table(title="Results", title_justify="left")
        results.add_column("")
        for heading in ("before", "after"):
            results.add_column(heading, justify="right")
        if before["perplexity"] is not None:
            results.add_row("held-out perplexity", f"{before['perplexity']:.2f}", f"{kept['perplexity']:.2f}")
        if before["accuracy"] is not None:
            results.add_row("held-out accuracy", f"{before['accuracy']:.3f}", f"{kept['accuracy']:.3f}")
        if summary.exact_match:
            results.add_row("held-out exact match", *(f"{100 * share:.1f} %" for share in summary.exact_match))
        for name, *shown in summary.at_sites:
            results.add_row(f"{_metric(name)} at the sites", *shown)
        epsilon = summary.epsilon
        results.add_row("epsilon", *(("∞", "∞") if epsilon is None else ("0", f"{epsilon:.2f}")))
        self._console.print(results)
        if summary.at_sites:
            self._console.print("At the sites: in brackets the 95 % interval, of noise and sampling.", highlight=False)
        if summary.out_of_patience:
            self._console.print(
                f"Ended after round {summary.after['round']}: scores at the sites no longer improved.", highlight=False
            )
        if summary.kept is not None:
            self._console.print(
                f"The adapter is that of round {summary.kept}, which had the best score at the sites.", highlight=False
            )


def score_of(record: "RoundMetrics") -> str:
    """Return the most telling metric of a round's score at the sites, with its interval; "" if it has none."""
    name = next((name for name in record.at_sites if name != "units"), None)
    return "" if name is None else f"{_metric(name)} {with_interval(name, record.at_sites[name])}"


def _metric(name: str) -> str:
    return name.replace("_", " ")


def _attack(attack: "Empirical") -> str:
    """Return what the attack on the run came to, as the report says at length."""
    black, white = attack.black, attack.white
    guessed = f"Attack on {attack.canaries} canaries: {black.right} and {white.right} of {attack.guesses} guesses right"
    most = max(black.lower, white.lower)
    proved = f"{guessed}, which proves {f'epsilon {most:.2f}' if most else 'nothing'}"
    if attack.claim is None:
        return f"{proved}. No noise was added, so there is no claim that it could contradict."
    verdict = "contradicted" if most > attack.claim else "not contradicted"
    able = "" if attack.ceiling > attack.claim else ": with so few guesses it could not have been"
    return f"{proved}; all right would prove {attack.ceiling:.2f}. The claim of {attack.claim:g} is {verdict}{able}."


def _site_table(summary: "RunSummary") -> Table:
    table = Table(title="Sites", title_justify="left")
    table.add_column("site")
    for heading in ("rounds", "epsilon spent", "budget", "sent"):
        table.add_column(heading, justify="right")
    table.add_column("remarks")
    for name, site in summary.sites.items():
        remarks = [f"declined: {site['reason']}"] if site["reason"] else []
        remarks += [f"missed {site['failed']}"] if site["failed"] else []
        private = site["epsilon"] is not None
        table.add_row(
            Text(name),
            str(site["rounds"]),
            f"{site['epsilon']:.2f}" if private else "∞",
            f"{summary.budgets[name]:g}" if private and name in summary.budgets else "-",
            f"{site['bytes_up'] / 1e6:.2f} MB",
            ", ".join(remarks),
        )
    return table
