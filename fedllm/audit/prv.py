"""Opacus' PRV accountant as a cross-check, by other people. It loads torch; nothing that is verified needs it."""

import warnings
from collections.abc import Sequence

from fedllm.privacy.accounting import AccountingEvent

_ERROR = 0.01  # of epsilon, and a thousandth of delta: Opacus' own settings


def epsilon_prv(events: Sequence[AccountingEvent], delta: float) -> float | None:
    """Return Opacus' estimate of epsilon; None where Opacus is not installed or cannot tell."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus.accountants import PRVAccountant

            accountant = PRVAccountant()
            accountant.history = [(e.noise_multiplier, e.sampling_rate, e.steps) for e in events if e.steps]
            if not accountant.history:
                return None
            distribution = accountant._get_dprv(eps_error=_ERROR, delta_error=delta / 1000)  # it publishes the upper
            _, estimate, _ = distribution.compute_epsilon(delta, delta / 1000, _ERROR)  # bound only
    except (ImportError, ValueError, RuntimeError, MemoryError):
        return None
    return round(float(estimate), 9)
