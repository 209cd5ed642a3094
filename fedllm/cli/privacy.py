"""`fedllm privacy`: epsilon, noise and lower bounds, without any run.

An entry point: it may import anything, and imports late so that --help is quick.
"""

import json
import math
from typing import Annotated, Any

import typer

from fedllm import api
from fedllm.errors import ConfigError

privacy_app = typer.Typer(
    help="What a training costs in privacy, the noise that meets a target, and what an attack has proved.",
    no_args_is_help=True,
)
_DeltaOption = Annotated[float, typer.Option("--delta", help="Between 0 and 1; well below one in the number of units.")]
_JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_RateOption = typer.Option("--sampling-rate", help="Probability that a unit enters one step.", show_default=False)
_StepsOption = typer.Option("--steps", help="Number of steps.", show_default=False)


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

    events = [parse_event(text) for text in event or []]
    cost = api.epsilon(delta, sampling_rate, noise_multiplier, steps, events)
    if as_json:
        _print({
            "pld": _finite(cost.epsilon), "rdp": _finite(cost.epsilon_rdp),
            **{name: other.upper for name, other in cost.cross_checks.items()},
            **{f"{name}_estimate": other.epsilon for name, other in cost.cross_checks.items()},
            "delta": delta, "advantage": cost.advantage, "tpr_at_1_percent": cost.tpr_at_1_percent,
            "reasons": dict(cost.reasons),
            "events": [
                {"sampling_rate": e.sampling_rate, "noise_multiplier": e.noise_multiplier, "steps": e.steps}
                for e in cost.events
            ],
        })  # fmt: skip
        return
    for e in cost.events:
        typer.echo(f"{e.steps:,} steps at sampling rate {e.sampling_rate:g}, noise multiplier {e.noise_multiplier:g}")
    typer.echo(f"epsilon at delta {delta:g}, for one unit (record or person) more or less:")
    typer.echo(f"  PLD  {_text(cost.epsilon)}  the number to publish")
    typer.echo(f"  RDP  {_text(cost.epsilon_rdp)}  an upper bound by another method")
    for name, other in cost.cross_checks.items():
        by = CROSS_CHECKS[name].by
        if other.upper is not None:
            typer.echo(
                f"  {name.upper()}  {_text(other.upper)}  an upper bound by {by}; its estimate is {other.epsilon:.4f}"
            )
        elif other.epsilon is not None:
            typer.echo(f"  {name.upper()}  {_text(other.epsilon)}  an estimate by {by}")
    for name, reason in cost.reasons.items():
        typer.echo(f"note: {name.upper()}: {reason}")
    typer.echo("An attacker who sees all that was released and has to say whether one unit was in the data:")
    typer.echo(
        f"  is right in at most {_percent(50 + 50 * cost.advantage)} % of cases; guessing is 50 % "
        f"(advantage {_percent(100 * cost.advantage)} %)"
    )
    typer.echo(
        f"  finds at most {_percent(100 * cost.tpr_at_1_percent)} % of those in the data, if 1 % of the others may be "
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
    found = api.calibrate(target, delta, sampling_rate, steps)
    if as_json:
        _print({
            "noise_multiplier": found.noise_multiplier, "pld": _finite(found.epsilon),
            "rdp": _finite(found.epsilon_rdp), "epsilon": target, "delta": delta, "sampling_rate": sampling_rate,
            "steps": steps, "reasons": dict(found.reasons),
        })  # fmt: skip
        return
    typer.echo(f"noise multiplier {found.noise_multiplier:g}")
    typer.echo(
        f"epsilon {found.epsilon:.4f} at delta {delta:g} (RDP {found.epsilon_rdp:.4f}) after {steps:,} steps at "
        f"sampling rate {sampling_rate:g}; the target is {target:g}"
    )
    for reason in found.reasons.values():
        typer.echo(f"note: {reason}")


@privacy_app.command("audit-bound")
def audit_bound(
    canaries: Annotated[int, typer.Option(help="Canaries, each put in with probability 1/2.", show_default=False)],
    guesses: Annotated[int, typer.Option(help="Canaries whose presence the attacker guessed.", show_default=False)],
    right: Annotated[int, typer.Option(help="Right guesses.", show_default=False)],
    delta: _DeltaOption,
    as_json: _JsonOption = False,
) -> None:
    """Print what an attack on one training run has proved: a lower bound on epsilon, with confidence 95 %.

    The number of guesses must have been fixed before anybody knew which canaries were in (Steinke, Nasr and Jagielski
    2023).
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


def parse_event(text: str) -> tuple[float, float, int]:
    """Return the sampling rate, noise multiplier and steps that `--event` names; raises ConfigError."""
    try:
        rate, noise, steps = text.split(",")
        return float(rate), float(noise), int(steps)
    except ValueError:
        raise ConfigError(
            f"--event {text[:80]!r}: expected sampling rate, noise multiplier and steps, such as 0.01,1.1,1000."
        ) from None


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
