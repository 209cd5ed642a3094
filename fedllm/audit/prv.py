"""Opacus' PRV accountant as a cross-check (Gopi, Lee and Wutschitz 2021)."""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from fedllm.audit.model import Estimate
from fedllm.privacy.accounting import AccountingEvent

_ERROR = 0.01  # of epsilon, and a thousandth of delta: Opacus' own settings
_MOST_POINTS = 2**23  # of its grid: half a gigabyte and some seconds
_OWN = "_fedllm_opacus_accountants"


def prv(events: Sequence[AccountingEvent], delta: float) -> Estimate:
    """Return what Opacus says about epsilon after `events`; `upper` is what it publishes.

    That is the estimate at a slightly smaller delta, plus 0.01.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opacus = _opacus()
            accountant = opacus.PRVAccountant()
            accountant.history = [(e.noise_multiplier, e.sampling_rate, e.steps) for e in events if e.steps]
            if not accountant.history:
                return Estimate(None, reason="there is nothing to account for")
            steps = [opacus.PoissonSubsampledGaussianPRV(q, noise) for noise, q, _ in accountant.history]
            counts = [count for _, _, count in accountant.history]
            errors = {"eps_error": _ERROR, "delta_error": delta / 1000}
            if accountant._get_domain(steps, counts, **errors).size > _MOST_POINTS:
                return Estimate(None, reason="Opacus would need too much memory")
            distribution = accountant._get_dprv(**errors)  # it publishes the upper
            _, estimate, upper = distribution.compute_epsilon(delta, delta / 1000, _ERROR)  # bound only
    except ImportError:
        return Estimate(None, reason="Opacus is not installed")
    except (ValueError, RuntimeError, MemoryError):
        return Estimate(None, reason="Opacus cannot tell within its numerical precision")
    return Estimate(round(float(estimate), 9), round(float(upper), 9))


class _History:
    """What its accountants use of their base class, whose own module asks for torch to annotate a callback."""

    def __init__(self) -> None:
        self.history: list[tuple[float, float, int]] = []


def _opacus() -> Any:
    """Import Opacus' PRV accountant, which is NumPy and SciPy alone, without Opacus itself, which loads torch.

    Its modules get a name of their own, so that a later `import opacus` is whole. Raises ImportError if it is not
    installed.
    """
    opacus = importlib.util.find_spec("opacus")
    if opacus is None or not opacus.submodule_search_locations:
        raise ImportError("opacus")
    if _OWN not in sys.modules:
        package, base = ModuleType(_OWN), ModuleType(f"{_OWN}.accountant")
        package.__path__ = [f"{place}/accountants" for place in opacus.submodule_search_locations]
        base.IAccountant = _History  # type: ignore[attr-defined]
        sys.modules |= {_OWN: package, base.__name__: base}
    return importlib.import_module(f"{_OWN}.prv")
