"""What `import fedllm` offers to programs. An entry point: it may import anything, and imports late."""

import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.errors import CheckpointError, ConfigError, FolderError, PrivacyError, QuorumLost

if TYPE_CHECKING:
    from fedllm.audit.model import CrossCheck, Estimate
    from fedllm.config import SimulationConfig
    from fedllm.privacy.accounting import AccountingEvent, PrivacySpent

_MOST_STEPS = 1_000_000
_LEAST_NOISE = 1e-6  # less is no noise
_MOST_NOISE = 10_000.0  # as far as calibration looks
_MOST_EPSILON = 50.0  # as far as calibration is exact; more than that promises nothing
_WITHOUT_BOUND = "there is a step without noise, or with next to none: epsilon has no bound"
_AGREEMENT = 0.01  # between PLD and a cross-check


# ---- a run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and what its rounds have measured."""

    folder: Path
    config: dict[str, Any]  # all settings of the run, nested; `simulate` takes them again, with another name
    metrics: tuple[dict[str, Any], ...]  # a record for each round, from 0, the base model: the lines of metrics.jsonl

    @property
    def epsilon(self) -> float:
        """The largest epsilon that any site has spent, at `delta`; math.inf if no noise was added."""
        spent = self.metrics[-1]["epsilon"]
        return math.inf if spent is None else float(spent)

    @property
    def delta(self) -> float:
        """Delta of the guarantee (epsilon, delta)."""
        return float(self.config["privacy"]["delta"])

    @property
    def private(self) -> bool:
        """Whether the run may be called private: noise was added, and no seed predicts it."""
        return bool(self.metrics[-1]["private"])

    @property
    def adapter(self) -> Path:
        """Folder of the trained adapter, in PEFT's format, with a model card."""
        return self.folder / "adapter"

    @property
    def audit(self) -> Path:
        """Folder of the audit report; it is not there if `audit.report=false`."""
        return self.folder / "audit"


def simulate(
    settings: "Sequence[str] | Mapping[str, Any] | SimulationConfig" = (), *, config_dir: str | Path | None = None
) -> Run:
    """Run a whole federation on this machine, as `fedllm simulate` does, and return what it left.

    `settings` are overrides of the embedded demo as on the command line, such as ["privacy.epsilon=3", "name=first"],
    or one whole configuration: nested values as in `Run.config`, or a validated SimulationConfig. `config_dir` is a
    folder with choices of your own for overrides, searched first.

    Raises QuorumLost if too few sites answered for the run to go on; its outputs so far are written, and `load_run`
    reads them. Raises other kinds of FedllmError for settings, records, models or folders that cannot be used.
    """
    config = _configuration(settings, config_dir)  # before torch is imported: a mistake is told at once
    from simulations.workers import warm_up

    warm_up(config.federation)  # beside the imports below
    from simulations.simulate import simulate as run

    summary = run(config, lambda *_: None, lambda _: None)
    if summary.stopped:
        raise QuorumLost(summary.stopped)
    return load_run(summary.folder)


def load_run(path: str | Path) -> Run:
    """Return the run whose outputs are in a folder, simulated or deployed.

    Raises FolderError if there is no finished run, and CheckpointError if one of its files is damaged.
    """
    from fedllm.files import read

    folder = _folder("path", path)
    if not (folder / "adapter" / "adapter_config.json").is_file():
        raise FolderError(
            f"{folder} holds no finished run: there is no adapter/adapter_config.json. Name the folder of a run, such "
            "as runs/first; one that was interrupted goes on with resume=true."
        )
    config = _parsed(folder / "config.json", read(folder / "config.json"))
    file = folder / "metrics.jsonl"
    metrics = tuple(_parsed(file, line) for line in read(file).splitlines())
    if not metrics or not isinstance(config.get("privacy"), dict) or not {"epsilon", "private"} <= set(metrics[-1]):
        raise _damaged(folder)
    return Run(folder, config, metrics)


def _folder(name: str, path: str | Path) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise ConfigError(f"{name}={str(path)[:80]}: expected the path of a folder.") from None


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        raise _damaged(path) from None
    if not isinstance(value, dict):
        raise _damaged(path)
    return value


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: damaged. Restore it from a backup, or run again under another name.")


def _configuration(
    settings: "Sequence[str] | Mapping[str, Any] | SimulationConfig", config_dir: str | Path | None
) -> "SimulationConfig":
    from fedllm.cli.hydra_config import compose, validate
    from fedllm.config import SimulationConfig

    if isinstance(settings, SimulationConfig):
        return settings
    if isinstance(settings, Mapping):
        return validate(SimulationConfig, deepcopy(dict(settings)))
    if isinstance(settings, str) or not isinstance(settings, Sequence) or not all(isinstance(s, str) for s in settings):
        raise ConfigError(
            f"settings={str(settings)[:80]!r}: expected a list of overrides, such as ['privacy.epsilon=3'], or a whole "
            "configuration."
        )
    folder = None if config_dir is None else _folder("config_dir", config_dir)
    return validate(SimulationConfig, compose("config", list(settings), folder))


# ---- what a training costs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrivacyCost:
    """What a training costs in privacy at `delta`, by several accountants, and what that means for an attacker.

    Poisson-subsampled Gaussian noise; one unit (record or person) more or less.
    """

    epsilon: float  # by PLD, or RDP (see reasons): the number to publish; math.inf if it has no bound
    epsilon_rdp: float  # an upper bound by another method
    cross_checks: "Mapping[str, Estimate]"  # by accountants of others: by name, as in fedllm.audit.accountants
    delta: float
    advantage: float  # the most by which an attacker's true positive rate exceeds the false positive rate
    tpr_at_1_percent: float  # the largest true positive rate at a false positive rate of 1 %
    reasons: Mapping[str, str]  # accountant -> why it says nothing, or something else
    events: tuple["AccountingEvent", ...]  # what was accounted for


@dataclass(frozen=True)
class Noise:
    """The noise that meets a target."""

    noise_multiplier: float  # standard deviation / clip norm
    epsilon: float  # by PLD, at most the target
    epsilon_rdp: float  # an upper bound by another method
    reasons: Mapping[str, str]  # "noise_multiplier" -> why it costs much less than the target


def epsilon(
    delta: float, sampling_rate: float | None = None, noise_multiplier: float | None = None, steps: int | None = None,
    event: Sequence[tuple[float, float, int]] = (),
) -> PrivacyCost:  # fmt: skip
    """Return what steps of DP-SGD cost, as `fedllm privacy epsilon` prints it.

    `sampling_rate` is the probability that a unit enters one step, `noise_multiplier` the standard deviation of the
    noise / clip norm, `steps` their number. `event` holds further (sampling rate, noise multiplier, steps): all
    compose. Raises ConfigError for a value that is no such number, and PrivacyError if the accountants contradict each
    other.
    """
    from fedllm.audit.accountants import CROSS_CHECKS
    from fedllm.audit.risk import risk_of
    from fedllm.privacy.accounting import spent

    _check_delta(delta)
    events = [checked_event(*each) for each in _triples(event)]
    single = (sampling_rate, noise_multiplier, steps)
    if sampling_rate is not None and noise_multiplier is not None and steps is not None:
        events.append(checked_event(sampling_rate, noise_multiplier, steps))
    elif single != (None, None, None) or not events:
        raise ConfigError("give sampling rate, noise multiplier and steps together, or events, or both.")
    cost = spent(events, delta)
    risk = risk_of(events, cost.epsilon if math.isfinite(cost.epsilon) else None, cost.grid)
    others = {name: _cross_check(name, check, events, cost, delta) for name, check in CROSS_CHECKS.items()}
    reasons = {name: other.reason for name, other in others.items() if other.reason}
    if cost.by_rdp_alone:
        where = (
            "above 100, or where a PLD takes too long," if cost.exact else "at so small a delta, after so many steps,"
        )
        reasons["pld"] = _WITHOUT_BOUND if math.isinf(cost.epsilon) else f"{where} the RDP bound takes its place"
    return PrivacyCost(
        cost.epsilon, cost.epsilon_rdp, others, delta, risk.advantage, risk.tpr_at_1_percent, reasons, tuple(events)
    )


def calibrate(epsilon: float, delta: float, sampling_rate: float, steps: int) -> Noise:
    """Return the noise whose epsilon by PLD is at the target, or at most 0.5 % below it.

    As `fedllm privacy calibrate` prints it: `epsilon` is the target, more than 0 and at most 50; the others are as in
    `epsilon()`. Raises ConfigError for a value that is no such number, and PrivacyError if no noise meets the target.
    """
    from fedllm.privacy.accounting import AccountingEvent, spent
    from fedllm.privacy.accounting import calibrate as least_noise

    _check_delta(delta)
    if not 0 < _real("epsilon", epsilon) <= _MOST_EPSILON:
        raise ConfigError(f"epsilon {epsilon:g}: expected more than 0 and at most {_MOST_EPSILON:g}.")
    checked_event(sampling_rate, 1.0, steps)
    if sampling_rate == 0:
        raise ConfigError("sampling rate 0: nobody's data is used, so there is no noise to choose.")
    noise = least_noise(epsilon, delta, sampling_rate, steps)
    cost = spent([AccountingEvent(sampling_rate, noise, steps)], delta)
    far = cost.epsilon < 0.995 * epsilon
    reason = {"noise_multiplier": "so little noise is enough that none lower is looked for"} if far else {}
    return Noise(noise, cost.epsilon, cost.epsilon_rdp, reason)


def checked_event(sampling_rate: float, noise_multiplier: float, steps: int) -> "AccountingEvent":
    """Return an event that can be accounted for. Raises ConfigError if there is none."""
    from fedllm.privacy.accounting import AccountingEvent

    if not 0 <= _real("sampling rate", sampling_rate) <= 1:
        raise ConfigError(f"sampling rate {sampling_rate:g}: expected a probability, from 0 to 1.")
    if _real("noise multiplier", noise_multiplier) != 0 and not _LEAST_NOISE <= noise_multiplier <= _MOST_NOISE:
        raise ConfigError(
            f"noise multiplier {noise_multiplier:g}: expected {_LEAST_NOISE:g} to {_MOST_NOISE:,.0f}, or 0 for none."
        )
    if not isinstance(steps, Integral) or isinstance(steps, bool) or not 1 <= steps <= _MOST_STEPS:
        raise ConfigError(f"steps {str(steps)[:20]}: expected a whole number, 1 to {_MOST_STEPS:,}.")
    return AccountingEvent(float(sampling_rate), float(noise_multiplier), int(steps))


def _triples(events: Sequence[tuple[float, float, int]]) -> Sequence[tuple[float, float, int]]:
    try:
        return [(rate, noise, steps) for rate, noise, steps in events]
    except (TypeError, ValueError):
        raise ConfigError(
            f"event={str(events)[:80]}: expected a list of (sampling rate, noise multiplier, steps), such as "
            "[(0.01, 1.1, 1000)]."
        ) from None


def _cross_check(
    name: str, check: "CrossCheck", events: "Sequence[AccountingEvent]", cost: "PrivacySpent", delta: float
) -> "Estimate":
    """Return what a cross-check says, if it can be asked. Raises PrivacyError if it contradicts the PLD."""
    from fedllm.audit.model import Estimate

    if cost.epsilon == 0:
        return Estimate(0.0, 0.0)
    if cost.exact and cost.by_rdp_alone:
        return Estimate(None, reason="not computed where epsilon is above 100 or has no bound")
    if not cost.exact:
        return Estimate(None, reason="not compared: delta is too small for so many steps in float64")
    other = check.estimate([event for event in events if event.sampling_rate > 0], delta)
    if other.epsilon is not None and abs(other.epsilon - cost.epsilon) > _AGREEMENT:
        raise PrivacyError(
            f"the accountants contradict each other: PLD {cost.epsilon:.4g}, {name.upper()} {other.epsilon:.4g}. "
            "Believe neither; check the versions against constraints.txt."
        )
    return other


def _check_delta(delta: float) -> None:
    if not 0 < _real("delta", delta) < 1:
        raise ConfigError(f"delta {delta:g}: expected more than 0 and less than 1.")


def _real(name: str, value: float) -> float:
    """Return a number as it is; raises ConfigError if it is none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ConfigError(f"{name} {str(value)[:80]!r}: expected a number.")
    return value
