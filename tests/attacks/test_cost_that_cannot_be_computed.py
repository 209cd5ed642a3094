"""Attack: a plan whose cost no accountant can compute is charged, and nothing can be told or trained afterwards.

Stopped before the charge: costs that are next to nothing are computed, and what cannot be is refused.
"""

from pathlib import Path

import pytest

from fedllm.errors import PrivacyError
from fedllm.privacy import accounting
from fedllm.privacy.accounting import AccountingEvent, PrivacySpent, counted, overrun, spent
from fedllm.privacy.ledger import LedgerFile
from fedllm.protocol.messages import Declined, TrainReply
from tests.bug_zoo.invariants import plan_of
from tests.client.test_site import Office


@pytest.mark.parametrize("rate", [1e-9, 1e-6, 1e-3, 0.3, 1.0])
@pytest.mark.parametrize("noise", [1e3, 1e6, 1e9])
@pytest.mark.parametrize("steps", [1, 1000])
def test_a_step_that_costs_nearly_nothing_has_a_cost(rate: float, noise: float, steps: int) -> None:
    """The accountant's Renyi divergence of such a step is a little below 0 at some orders."""
    events = [AccountingEvent(rate, noise, steps)]
    cost = spent(events, 1e-5)
    assert 0 <= cost.epsilon <= cost.epsilon_rdp < 1
    assert overrun(events, 1e-5, 1.0, one_plan=True) is None
    assert counted(events, 1e-5, 1.0, one_plan=False) < 1


@pytest.mark.parametrize(("event", "delta"), [
    (AccountingEvent(1e-3, 1.37, 100_000), 1e-12),
    pytest.param(AccountingEvent(1e-4, 1.37, 10_000_000), 1e-12, marks=pytest.mark.soak),
])  # fmt: skip
def test_where_rounding_errors_may_exceed_half_of_delta_rdp_stands_alone(event: AccountingEvent, delta: float) -> None:
    cost = spent([event], delta)
    assert cost.epsilon == cost.epsilon_rdp < 2


def test_a_plan_of_next_to_no_sampling_is_charged_and_answered(tmp_path: Path, tiny_llama: Path) -> None:
    office = Office(tmp_path, plan_of(tiny_llama, sampling_rate=1e-6, noise_multiplier=1e6), epsilon=4.0)
    assert isinstance(office.train(1), TrainReply)


@pytest.mark.parametrize("error", [ValueError("math domain error"), OverflowError("x"), PrivacyError("contradict")])
def test_what_cannot_be_computed_is_refused_before_the_charge(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The budget's own check may need less than the statement: RDP alone admits what is far below a budget."""

    def fails(*_: object) -> PrivacySpent:
        raise error

    office = Office(tmp_path, plan_of(tiny_llama), epsilon=100.0)
    monkeypatch.setattr(accounting, "_spent", fails)
    assert isinstance(office.train(1), Declined)
    assert LedgerFile(office.ledger_path).charges() == []
    with pytest.raises(PrivacyError):
        spent([AccountingEvent(0.1, 2.0, 1)], 1e-5)
