"""A privacy unit is on one side, for ever, and each side has an account that the budget holds for."""

import contextlib
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.crypto.hash_chain import open_entry
from fedllm.crypto.identity import Identity
from fedllm.errors import BudgetExceeded
from fedllm.privacy.accounting import AccountingEvent, spent
from fedllm.privacy.elapsed import Period
from fedllm.privacy.ledger import LedgerFile, Loss, PrivacyLedger, restart
from fedllm.privacy.ledger_place import LedgerPlace
from fedllm.privacy.split import SIDES, Side, Split

SIGNER = Identity.generate()
TRAINING, SCORE = AccountingEvent(0.1, 1.0, 1), 4.0
EVALUATION = AccountingEvent(1.0, SCORE, 1)
DELTA = 1e-5


@pytest.fixture
def place(tmp_path: Path) -> LedgerPlace:
    return LedgerPlace(tmp_path / "ledger.db", tmp_path / "keys" / "ledger.anchor")


def open_ledger(
    place: LedgerPlace, epsilon: float = math.inf, share: float = 0.1, rule: str = "text", period: Period | None = None
) -> PrivacyLedger:
    return PrivacyLedger(place, epsilon, DELTA, SIGNER, period, share, rule)


def rounds(ledger: PrivacyLedger, run: str, many: int) -> None:
    for number in range(1, many + 1):
        ledger.reserve(run, number, "request", TRAINING, SCORE)


def until_refused(ledger: PrivacyLedger, training: AccountingEvent, score: float | None) -> None:
    with contextlib.suppress(BudgetExceeded):
        for number in range(1, 1000):
            ledger.reserve("run", number, "request", training, score)
    assert number < 999


@given(st.binary(min_size=32, max_size=32), st.binary(), st.floats(0, 0.5))
def test_the_side_of_a_unit_is_a_function_of_key_share_and_unit(key: bytes, unit: bytes, share: float) -> None:
    assert Split(share, key).side(unit) == Split(share, bytes(key)).side(bytes(unit))
    if Split(share, key).side(unit) == "evaluation":
        assert Split(min(0.5, share * 1.5), key).side(unit) == "evaluation", "a larger share moves units one way"
    assert Split(0.0, key).side(unit) == "training"


def test_the_share_is_kept_and_the_key_decides() -> None:
    units = [str(n).encode() for n in range(4000)]
    sides = [[Split(0.1, bytes([k]) * 32).side(unit) for unit in units] for k in range(2)]
    for side in sides:
        assert 300 < side.count("evaluation") < 500
    both = sum(a == b == "evaluation" for a, b in zip(*sides, strict=True))
    assert 10 < both < 90, "two keys split independently"


def test_a_round_is_charged_to_both_sides_in_one_entry_and_each_pays_its_own(place: LedgerPlace) -> None:
    ledger = open_ledger(place)
    rounds(ledger, "run", 3)
    ledger.reserve("run", 4, "request", AccountingEvent(0.1, 1.0, 0), SCORE)  # a score alone
    ledger.reserve("run", 5, "request", TRAINING)
    assert ledger.events() == [TRAINING] * 4
    assert ledger.events("evaluation") == [EVALUATION] * 4
    assert ledger.spent().epsilon == max(spent([e] * 4, DELTA).epsilon for e in (TRAINING, EVALUATION))
    kinds = [open_entry(line).kind for line in ledger.file.lines()]
    assert kinds == ["opened", "budget", "split", *["reserved"] * 5]
    ledger.file.verify()


@pytest.mark.parametrize("costly", SIDES)
@pytest.mark.parametrize("period", [None, Period(epsilon=3.0, days=7)])
def test_the_budget_holds_on_each_side(place: LedgerPlace, costly: Side, period: Period | None) -> None:
    training, score = (AccountingEvent(0.5, 0.6, 1), 50.0) if costly == "training" else (TRAINING, 1.5)
    ledger = open_ledger(place, math.inf if period else 3.0, period=period)
    until_refused(ledger, training, score)
    other = "evaluation" if costly == "training" else "training"
    assert spent(ledger.events(costly), DELTA).epsilon <= 3.0
    assert spent(ledger.events(other), DELTA).epsilon < 2.5
    assert len(ledger.events(costly)) == len(ledger.events(other))


def test_a_score_costs_training_nothing(place: LedgerPlace) -> None:
    """What a budget admits of training is the same with and without scores that cost less."""
    many = []
    for number, score in enumerate((None, 8.0)):
        ledger = open_ledger(
            LedgerPlace(place.file.with_name(f"{number}.db"), place.anchor.with_name(f"{number}")), 3.0
        )
        until_refused(ledger, TRAINING, score)
        many.append(len(ledger.events()))
    assert many[0] == many[1]


def test_the_split_stands_in_the_chain_once_and_its_key_does_not(place: LedgerPlace) -> None:
    split = open_ledger(place).split
    assert open_ledger(place).split == split
    entries = [open_entry(line) for line in LedgerFile(place.file).lines()]
    assert [e.body for e in entries if e.kind == "split"] == [
        {"account": "site", "share": 0.1, "rule": "text", "key": split.key_digest}
    ]
    assert split.key.hex() not in "".join(str(e.body) for e in entries)
    assert (
        split.key
        != PrivacyLedger(
            LedgerPlace(place.file.with_name("other.db"), place.anchor.with_name("other")), 1.0, DELTA, SIGNER
        ).split.key
    ), "drawn, and not the same at two sites"


@pytest.mark.parametrize("change", [{"share": 0.2}, {"rule": "person"}])
def test_after_a_change_every_charge_counts_on_both_sides(place: LedgerPlace, change: dict[str, float]) -> None:
    """A unit that changed sides has paid one before, and pays the other now: no account may hold less."""
    rounds(open_ledger(place), "before", 2)
    changed = open_ledger(place, **change)
    rounds(changed, "after", 3)
    assert changed.events() == [*[TRAINING] * 2, *[TRAINING, EVALUATION] * 3]
    assert changed.events("evaluation") == [*[EVALUATION] * 2, *[TRAINING, EVALUATION] * 3]
    dearest = max(
        spent([*[a] * 2, *[b] * 3], DELTA).epsilon for a in (TRAINING, EVALUATION) for b in (TRAINING, EVALUATION)
    )
    assert changed.spent().epsilon >= dearest
    rounds(open_ledger(place), "back", 1)
    assert len(open_ledger(place).events()) == 2 + 2 * 3 + 2, "to go back undoes nothing"
    changed.file.verify()


def test_what_was_lost_and_all_after_it_count_on_both_sides(place: LedgerPlace) -> None:
    rounds(open_ledger(place), "before", 2)
    place.file.unlink()
    restart(place, SIGNER, [Loss("before", AccountingEvent(0.1, 1.0, 2))])
    ledger = open_ledger(place)
    rounds(ledger, "after", 1)
    for side in SIDES:
        assert ledger.events(side) == [AccountingEvent(0.1, 1.0, 2), TRAINING, EVALUATION]
    ledger.file.verify()
