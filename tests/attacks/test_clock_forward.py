"""Attack: the clock is set forward, by whoever serves the time, and policy.period is full again.

Stopped by the machine's own count of seconds (fedllm.privacy.elapsed) since the last look at the clock; where the
machine was started anew, three days are believed at once, and a period is longer.
"""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedllm.privacy.ledger
from client.doctor import check
from fedllm.errors import BudgetExceeded, ConfigError, LedgerError
from fedllm.privacy.elapsed import SHORTEST_PERIOD, Evidence, Moment, Period, this_moment
from tests.attacks.ledgers import DELTA, EVENT, Branch
from tests.fedllm.privacy.budgets import for_several_plans

DAY = 86_400.0
PERIOD = Period(days=30, epsilon=for_several_plans([EVENT], DELTA))  # one round in 30 days
ID = "0f0e"


class Machine:
    """Its clock, and its own count since it was started."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock, self.count, self.boot = time.time(), 1000.0, ID
        patch.setattr(fedllm.privacy.ledger, "this_moment", lambda: Moment(self.clock, self.boot, self.count))

    def runs(self, days: float) -> None:
        self.clock, self.count = self.clock + days * DAY, self.count + days * DAY

    def is_off(self, days: float, then_runs: float = 0.0) -> None:
        self.clock, self.count, self.boot = self.clock + (days + then_runs) * DAY, then_runs * DAY, self.boot + "1"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_a_clock_that_is_set_back_while_it_is_charged_frees_nothing_later(branch: Branch, machine: Machine) -> None:
    """The charge would be of long ago, once the clock is right again."""
    ledger = branch.open(PERIOD)
    ledger.check("first", EVENT)
    machine.runs(100)
    ledger.file.look_at_clock()
    machine.clock -= 40 * DAY
    ledger.file.look_at_clock()
    ledger.reserve("first", 1, "request", EVENT)
    machine.clock += 40 * DAY
    with pytest.raises(BudgetExceeded):
        ledger.reserve("second", 1, "request", EVENT)


@pytest.mark.parametrize("days", [0.1, 1, 31, 400])
def test_a_clock_that_is_set_forward_frees_nothing(branch: Branch, machine: Machine, days: float) -> None:
    ledger = branch.open(PERIOD)
    ledger.reserve("first", 1, "request", EVENT)
    machine.clock += days * DAY
    for step in (lambda: ledger.reserve("second", 1, "request", EVENT), lambda: ledger.check("second", EVENT)):
        with pytest.raises(LedgerError, match=r"clock has gone ahead.*timedatectl.*fedllm ledger clock"):
            step()
    machine.clock -= days * DAY  # put right, it is believed again
    with pytest.raises(BudgetExceeded):
        ledger.reserve("second", 1, "request", EVENT)


def test_small_steps_do_not_add_up_either(branch: Branch, machine: Machine) -> None:
    ledger = branch.open(PERIOD)
    ledger.reserve("first", 1, "request", EVENT)
    for _ in range(40 * 24):
        machine.clock += 3600
        ledger.file.look_at_clock()
    with pytest.raises(LedgerError, match="gone ahead"):
        ledger.reserve("second", 1, "request", EVENT)


def test_time_that_has_passed_frees_what_it_should(branch: Branch, machine: Machine) -> None:
    ledger = branch.open(PERIOD)
    ledger.reserve("first", 1, "request", EVENT)
    machine.runs(29)
    with pytest.raises(BudgetExceeded):
        ledger.reserve("second", 1, "request", EVENT)
    ledger.file.look_at_clock()  # as the site's service does every hour
    machine.is_off(0.5, then_runs=1)
    ledger.reserve("second", 1, "request", EVENT)


def test_a_machine_that_was_off_for_long_asks_its_owner(branch: Branch, machine: Machine) -> None:
    ledger = branch.open(PERIOD)
    ledger.reserve("first", 1, "request", EVENT)
    machine.is_off(31, then_runs=0.1)
    with pytest.raises(LedgerError, match="31 days"):
        ledger.reserve("second", 1, "request", EVENT)
    assert "confirmed" in branch.owner("clock")
    ledger.reserve("second", 1, "request", EVENT)
    machine.clock += 40 * DAY
    with pytest.raises(LedgerError, match="gone ahead"):
        ledger.reserve("third", 1, "request", EVENT)
    ledger.file.verify([branch.office.identity.public])


def test_one_start_with_the_clock_ahead_refills_no_period(branch: Branch, machine: Machine) -> None:
    """A period of three days or less was full again after any start with the clock as far ahead as a machine is off."""
    branch.set("policy:\n", f"policy:\n  period: {{days: {SHORTEST_PERIOD}, epsilon: {PERIOD.epsilon}}}\n")
    period = branch.office.policy.period
    ledger = branch.open(period)
    ledger.reserve("first", 1, "request", EVENT)
    for _ in range(2):
        machine.is_off(2.999)
        ledger.file.look_at_clock()  # as the site's service does when it starts
        with pytest.raises(BudgetExceeded):
            ledger.reserve("second", 1, "request", EVENT)
    branch.set(f"days: {SHORTEST_PERIOD}", "days: 6.9")
    with pytest.raises(ConfigError, match=r"policy.period.days: expected at least 7 days, found 6.9"):
        branch.office  # noqa: B018


def test_a_service_that_looked_every_hour_can_be_restarted_at_any_time(branch: Branch, machine: Machine) -> None:
    ledger = branch.open(PERIOD)
    ledger.reserve("first", 1, "request", EVENT)
    for _ in range(40):
        machine.runs(1)
        ledger.file.look_at_clock()
    machine.is_off(0.01)
    ledger.reserve("second", 1, "request", EVENT)


def test_what_was_paid_for_is_released_whatever_the_clock_says(branch: Branch, machine: Machine) -> None:
    ledger = branch.open(PERIOD)
    reservation = ledger.reserve("first", 1, "request", EVENT)
    machine.clock += 31 * DAY
    ledger.release(reservation, b"reply")
    assert ledger.reserve("first", 1, "request", EVENT).reply == b"reply"


def test_where_no_period_is_limited_the_clock_stops_nothing(branch: Branch, machine: Machine) -> None:
    ledger = branch.open()
    ledger.reserve("first", 1, "request", EVENT)
    machine.clock += 400 * DAY
    ledger.reserve("first", 2, "request", EVENT)
    assert all(finding.right for finding in check(branch.folder) if finding.text.startswith("ledger"))


TIMES = st.floats(0, 1e9)


@given(TIMES, TIMES, TIMES, st.floats(-1e9, 1e9))
def test_within_a_start_only_a_correction_of_an_hour_is_believed(
    clock: float, count: float, passed: float, jump: float
) -> None:
    now = Moment(clock + passed + jump, ID, count + passed)
    known = Evidence(Moment(clock, ID, count), clock)
    found = known.unexplained(now)
    assert known.at_least(now) == pytest.approx(clock + passed)
    assert (found > 0) == (jump > 3600) or abs(jump - 3600) < 1
    assert found == 0 or found == pytest.approx(jump, abs=1)


@given(TIMES, TIMES, TIMES)
def test_over_a_restart_three_days_off_are_believed(seen: float, off: float, up: float) -> None:
    now = Moment(seen + off + up, "another", up)
    known = Evidence(Moment(seen, ID, 1e9), seen)
    found = known.unexplained(now)
    assert seen <= known.at_least(now) <= max(now.clock, seen) + 1
    assert (found > 0) == (off > 3 * DAY) or abs(off - 3 * DAY) < 1


def test_this_machine_counts() -> None:
    first, second = this_moment(), this_moment()
    assert (first.boot, first.count <= second.count, first.count > 0) == (second.boot, True, True)
