"""Sums for a privacy officer or researcher. An entry point: it may import anything, and imports late."""

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedllm.errors import ConfigError, PrivacyError

if TYPE_CHECKING:
    from fedllm.audit.model import CrossCheck, Estimate
    from fedllm.privacy.accounting import AccountingEvent, PrivacySpent

privacy_app = typer.Typer(
    help="What a training costs in privacy, the noise that meets a target, and what an attack has proved.",
    no_args_is_help=True,
)
_DeltaOption = Annotated[float, typer.Option("--delta", help="Between 0 and 1; well below one in the number of units.")]
_JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_RateOption = typer.Option("--sampling-rate", help="Probability that a unit enters one step.", show_default=False)
_StepsOption = typer.Option("--steps", help="Number of steps.", show_default=False)
_MOST_STEPS = 1_000_000
_LEAST_NOISE = 1e-6  # less is no noise
_MOST_NOISE = 10_000.0  # as far as calibration looks
_MOST_EPSILON = 50.0  # as far as calibration is exact; more than that promises nothing
_WITHOUT_BOUND = "there is a step without noise, or with next to none: epsilon has no bound"
_AGREEMENT = 0.01  # between PLD and a cross-check


def register(app: typer.Typer) -> None:
    """Add the commands to the main command."""
    app.add_typer(privacy_app, name="privacy")


@privacy_app.command("epsilon")
def epsilon(
    delta: _DeltaOption,
    sampling_rate: Annotated[float | None, _RateOption] = None,
    noise_multiplier: Annotated[
        float | None,
        typer.Option("--noise-multiplier", help="Deviation of the noise / clip norm.", show_default=False),
    ] = None,
    steps: Annotated[int | None, _StepsOption] = None,
    event: Annotated[
        list[str] | None,
        typer.Option(
            "--event",
            metavar="Q,S,T",
            help="Sampling rate, noise multiplier, steps. May be repeated: all compose.",
            show_default=False,
        ),
    ] = None,
    as_json: _JsonOption = False,
) -> None:
    """Print epsilon by independent accountants, and what it means for an attacker.

    Poisson-subsampled Gaussian noise; one unit (record or person) more or less.
    """
    from fedllm.audit.accountants import CROSS_CHECKS
    from fedllm.audit.risk import risk_of
    from fedllm.privacy.accounting import spent

    _check_delta(delta)
    events = [parse_event(text) for text in event or []]
    single = (sampling_rate, noise_multiplier, steps)
    if sampling_rate is not None and noise_multiplier is not None and steps is not None:
        events.append(checked_event(sampling_rate, noise_multiplier, steps))
    elif single != (None, None, None) or not events:
        raise ConfigError("give --sampling-rate, --noise-multiplier and --steps together, or --event Q,S,T, or both.")
    cost = spent(events, delta)
    risk = risk_of(events, cost.epsilon if math.isfinite(cost.epsilon) else None, cost.grid)
    others = {name: _cross_check(name, each, events, cost, delta) for name, each in CROSS_CHECKS.items()}
    reasons = {name: other.reason for name, other in others.items() if other.reason}
    if cost.by_rdp_alone:
        reasons["pld"] = _WITHOUT_BOUND if math.isinf(cost.epsilon) else "above 100 the RDP bound takes its place"
    if as_json:
        _print({
            "pld": _finite(cost.epsilon), "rdp": _finite(cost.epsilon_rdp),
            **{name: other.upper for name, other in others.items()},
            **{f"{name}_estimate": other.epsilon for name, other in others.items()},
            "delta": delta, "advantage": risk.advantage, "tpr_at_1_percent": risk.tpr_at_1_percent, "reasons": reasons,
            "events": [
                {"sampling_rate": e.sampling_rate, "noise_multiplier": e.noise_multiplier, "steps": e.steps}
                for e in events
            ],
        })  # fmt: skip
        return
    for e in events:
        typer.echo(f"{e.steps:,} steps at sampling rate {e.sampling_rate:g}, noise multiplier {e.noise_multiplier:g}")
    typer.echo(f"epsilon at delta {delta:g}, for one unit (record or person) more or less:")
    typer.echo(f"  PLD  {_text(cost.epsilon)}  the number to publish")
    typer.echo(f"  RDP  {_text(cost.epsilon_rdp)}  an upper bound by another method")
    for name, other in others.items():
        by = CROSS_CHECKS[name].by
        if other.upper is not None:
            typer.echo(
                f"  {name.upper()}  {_text(other.upper)}  an upper bound by {by}; its estimate is {other.epsilon:.4f}"
            )
        elif other.epsilon is not None:
            typer.echo(f"  {name.upper()}  {_text(other.epsilon)}  an estimate by {by}")
    for name, reason in reasons.items():
        typer.echo(f"note: {name.upper()}: {reason}")
    typer.echo("An attacker who sees all that was released and has to say whether one unit was in the data:")
    typer.echo(
        f"  says it rightly in at most {_percent(50 + 50 * risk.advantage)} % of cases; guessing is 50 % "
        f"(advantage {_percent(100 * risk.advantage)} %)"
    )
    typer.echo(
        f"  finds at most {_percent(100 * risk.tpr_at_1_percent)} % of those in the data, if 1 % of the others may be "
        "accused wrongly"
    )


@privacy_app.command("calibrate")
def calibrate(
    target: Annotated[float, typer.Option("--epsilon", help="The target, at most 50.", show_default=False)],
    delta: _DeltaOption,
    sampling_rate: Annotated[float, _RateOption],
    steps: Annotated[int, _StepsOption],
    as_json: _JsonOption = False,
) -> None:
    """Print the noise multiplier whose epsilon (PLD) is at the target, or at most 0.5 % below it."""
    from fedllm.privacy.accounting import AccountingEvent, spent
    from fedllm.privacy.accounting import calibrate as least_noise

    _check_delta(delta)
    if not 0 < target <= _MOST_EPSILON:
        raise ConfigError(f"--epsilon {target:g}: expected more than 0 and at most {_MOST_EPSILON:g}.")
    checked_event(sampling_rate, 1.0, steps)
    if sampling_rate == 0:
        raise ConfigError("--sampling-rate 0: nobody's data is used, so there is no noise to choose.")
    noise = least_noise(target, delta, sampling_rate, steps)
    cost = spent([AccountingEvent(sampling_rate, noise, steps)], delta)
    far = cost.epsilon < 0.995 * target
    reason = "so little noise is enough that none lower is looked for" if far else ""
    if as_json:
        _print({
            "noise_multiplier": noise, "pld": _finite(cost.epsilon), "rdp": _finite(cost.epsilon_rdp),
            "epsilon": target, "delta": delta, "sampling_rate": sampling_rate, "steps": steps,
            "reasons": {"noise_multiplier": reason} if far else {},
        })  # fmt: skip
        return
    typer.echo(f"noise multiplier {noise:g}")
    typer.echo(
        f"epsilon {cost.epsilon:.4f} at delta {delta:g} (RDP {cost.epsilon_rdp:.4f}) after {steps:,} steps at sampling "
        f"rate {sampling_rate:g}; the target is {target:g}"
    )
    if far:
        typer.echo(f"note: {reason}")


@privacy_app.command("audit-bound")
def audit_bound(
    canaries: Annotated[int, typer.Option(help="Canaries, each put in by a fair coin.", show_default=False)],
    guesses: Annotated[int, typer.Option(help="Coins that the attacker guessed.", show_default=False)],
    right: Annotated[int, typer.Option(help="Right guesses.", show_default=False)],
    delta: _DeltaOption,
    as_json: _JsonOption = False,
) -> None:
    """Print what an attack on one training run has proved: a lower bound on epsilon, with confidence 95 %.

    The number of guesses must have been fixed before the coins were looked at (Steinke, Nasr and Jagielski 2023).
    """
    from fedllm.privacy.one_run import CONFIDENCE, epsilon_lower_bound

    proved = epsilon_lower_bound(canaries, guesses, right, delta)
    ceiling = epsilon_lower_bound(canaries, guesses, guesses, delta)
    if as_json:
        _print({
            "eps_lower": proved, "ceiling": ceiling, "confidence": CONFIDENCE, "delta": delta,
            "canaries": canaries, "guesses": guesses, "right": right,
        })  # fmt: skip
        return
    typer.echo(f"epsilon is at least {proved:.3f} at delta {delta:g}, with confidence {CONFIDENCE:.0%}")
    typer.echo(f"A perfect attack, right in all {guesses:,} guesses, would have proved {ceiling:.3f}.")
    typer.echo("A bound above the claimed epsilon contradicts the claim. A low one is no pass: the attack may be weak.")


def parse_event(text: str) -> "AccountingEvent":
    """Return the event that `--event` names. Raises ConfigError where it is none."""
    try:
        rate, noise, steps = text.split(",")
        values = float(rate), float(noise), int(steps)
    except ValueError:
        raise ConfigError(
            f"--event {text[:80]!r}: expected sampling rate, noise multiplier and steps, such as 0.01,1.1,1000."
        ) from None
    return checked_event(*values)


def checked_event(sampling_rate: float, noise_multiplier: float, steps: int) -> "AccountingEvent":
    """Return an event that can be accounted for. Raises ConfigError where there is none."""
    from fedllm.privacy.accounting import AccountingEvent

    if not 0 <= sampling_rate <= 1:
        raise ConfigError(f"sampling rate {sampling_rate:g}: expected a probability, from 0 to 1.")
    if noise_multiplier != 0 and not _LEAST_NOISE <= noise_multiplier <= _MOST_NOISE:
        raise ConfigError(
            f"noise multiplier {noise_multiplier:g}: expected {_LEAST_NOISE:g} to {_MOST_NOISE:,.0f}, or 0 for none."
        )
    if not 1 <= steps <= _MOST_STEPS:
        raise ConfigError(f"steps {str(steps)[:20]}: expected 1 to {_MOST_STEPS:,}.")
    return AccountingEvent(sampling_rate, noise_multiplier, steps)


def _cross_check(
    name: str, check: "CrossCheck", events: "Sequence[AccountingEvent]", cost: "PrivacySpent", delta: float
) -> "Estimate":
    """Return what a cross-check says, if it can be asked. Raises PrivacyError if it contradicts the PLD."""
    from fedllm.audit.model import Estimate

    if cost.epsilon == 0:
        return Estimate(0.0, 0.0)
    if cost.by_rdp_alone:
        return Estimate(None, reason="not computed where epsilon is above 100 or has no bound")
    other = check.estimate([event for event in events if event.sampling_rate > 0], delta)
    if other.epsilon is not None and abs(other.epsilon - cost.epsilon) > _AGREEMENT:
        raise PrivacyError(
            f"the accountants contradict each other: PLD {cost.epsilon:.4g}, {name.upper()} {other.epsilon:.4g}. "
            "Believe neither; check the versions against constraints.txt."
        )
    return other


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(f"--delta {delta:g}: expected more than 0 and less than 1.")


def _print(values: dict[str, Any]) -> None:
    typer.echo(json.dumps(values, allow_nan=False))


def _text(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "without bound"


def _percent(value: float) -> str:
    """Return a percentage, never rounded in the reader's favour."""
    return f"{min(100.0, math.ceil(value * 10) / 10):.1f}"


def _finite(value: float) -> float | None:
    """JSON has no infinity: null, and `reasons` says why."""
    return value if math.isfinite(value) else None
