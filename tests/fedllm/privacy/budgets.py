"""Budgets for tests of what they admit."""

from collections.abc import Sequence

from fedllm.privacy.accounting import AccountingEvent, overrun, spent


def for_several_plans(events: Sequence[AccountingEvent], delta: float) -> float:
    """Return the least budget (up to a millionth) that admits `events` of plans that may depend on one another."""
    low, high = 0.0, 3 * spent(events, delta).epsilon_rdp
    while high > low * (1 + 1e-6):
        middle = (low + high) / 2
        low, high = (low, middle) if overrun(events, delta, middle, one_plan=False) is None else (middle, high)
    return high
