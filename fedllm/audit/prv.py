"""Opacus' PRV accountant as a cross-check, by other people. It loads torch; nothing that is verified needs it."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.privacy.accounting import AccountingEvent

_ERROR = 0.01  # of epsilon, and a thousandth of delta: Opacus' own settings
_MOST_POINTS = 2**23  # of its grid: half a gigabyte and some seconds


@dataclass(frozen=True)
class Prv:
    """What Opacus says about epsilon (Gopi, Lee and Wutschitz 2021), or why it says nothing."""

    estimate: float | None  # to be compared with PLD: within 0.01 of it
    upper: float | None  # what Opacus publishes: the estimate at a slightly smaller delta, plus 0.01
    reason: str = ""  # why there is neither


def epsilon_prv(events: Sequence[AccountingEvent], delta: float) -> float | None:
    """Return Opacus' estimate of epsilon; None where Opacus is not installed or cannot tell."""
    return prv(events, delta).estimate


def prv(events: Sequence[AccountingEvent], delta: float) -> Prv:
    """Return what Opacus says about epsilon after `events`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus.accountants import PRVAccountant
            from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV

            accountant = PRVAccountant()
            accountant.history = [(e.noise_multiplier, e.sampling_rate, e.steps) for e in events if e.steps]
            if not accountant.history:
                return Prv(None, None, "there is nothing to account for")
            steps = [PoissonSubsampledGaussianPRV(q, noise) for noise, q, _ in accountant.history]
            counts = [count for _, _, count in accountant.history]
            errors = {"eps_error": _ERROR, "delta_error": delta / 1000}
            if accountant._get_domain(steps, counts, **errors).size > _MOST_POINTS:
                return Prv(None, None, "Opacus would need too much memory")
            distribution = accountant._get_dprv(**errors)  # it publishes the upper
            _, estimate, upper = distribution.compute_epsilon(delta, delta / 1000, _ERROR)  # bound only
    except ImportError:
        return Prv(None, None, "Opacus is not installed")
    except (ValueError, RuntimeError, MemoryError):
        return Prv(None, None, "Opacus cannot tell within its numerical precision")
    return Prv(round(float(estimate), 9), round(float(upper), 9))
