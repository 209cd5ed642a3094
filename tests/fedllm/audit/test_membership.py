"""What an attack found is measured as textbooks say, with intervals that hold what they should as often as they say."""

import json
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from matplotlib import image

from fedllm.audit.membership import RATES, Attack, Target, area, attack_of, roc, true_positives, write_attack
from fedllm.audit.risk import risk_of
from fedllm.privacy.accounting import AccountingEvent, spent
from tests.korean import english_words

EVENT = AccountingEvent(0.1, 1.0, 10)


def scores(shift: float, n: int, m: int, seed: int = 0) -> tuple[Any, Any]:
    """Scores of `n` members, of mean `shift`, and of `m` non-members, of mean 0."""
    random = np.random.default_rng(seed)
    return random.normal(shift, 1, n), random.normal(0, 1, m)


def made(shift: float = 0.0, private: bool = True, n: int = 500, m: int = 400, **changes: Any) -> Attack:
    """An attack whose scores are normal."""
    gains = [each.astype(np.float32) for each in scores(shift, n, m)]
    before = [each.astype(np.float32) for each in scores(0.0, n, m, seed=1)]
    cost = spent([EVENT], 1e-5)
    epsilon = cost.epsilon if private else None
    target = Target(
        name="첫 실행 | first", run="0" * 32, round=3, sites=2, unit="person", members=n, members_there=n, others=m,
        others_there=m, left_out=0, epsilon=epsilon, delta=1e-5, events=((0.1, 1.0, 10),),
    ).model_copy(update=changes)  # fmt: skip
    after = [b - gain for b, gain in zip(before, gains, strict=True)]
    return attack_of(target, (before[0], before[1]), (after[0], after[1]), risk_of([EVENT], epsilon, cost.grid))


def test_the_area_counts_pairs_and_half_of_the_ties() -> None:
    members, others = np.array([3.0, 2.0, 0.0]), np.array([2.0, 1.0])
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert area(members, others).auc == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_the_area_has_an_interval_at_its_ends_too(end: float) -> None:
    members, others = np.full(20, end), np.full(20, 0.5)
    found = area(members, others)
    assert found.auc == end
    assert found.interval[1] - found.interval[0] > 0.05
    assert min(found.interval) >= 0
    assert max(found.interval) <= 1


def test_a_rate_of_true_positives_accuses_no_more_than_it_may() -> None:
    others = np.arange(1000.0)
    members = np.array([998.5, 989.5, 988.5, 0.0])  # 1, 10 and 11 non-members are above the first three
    assert true_positives(0.001, members, others)[0] == 0.25
    assert true_positives(0.01, members, others)[0] == 0.5
    assert true_positives(0.001, members, others[:500] * 0)[0] == 0.75  # none may be accused, and a tie would accuse
    points = dict(roc(members, others))
    assert points[0.0] == 0.0
    assert points[0.01] == 0.5
    assert points[1.0] == 1.0


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_intervals_hold_the_truth(shift: float) -> None:
    normal, runs = NormalDist(), 300
    truth = normal.cdf(shift / math.sqrt(2))
    held: dict[str | float, int] = {"auc": 0, **dict.fromkeys(RATES, 0)}
    for seed in range(runs):
        members, others = scores(shift, 400, 300, seed)
        low, high = area(members, others).interval
        held["auc"] += low <= truth <= high
        for rate in RATES:
            low, high = true_positives(rate, members, others)[1]
            held[rate] += low <= 1 - normal.cdf(normal.inv_cdf(1 - rate) - shift) <= high
    assert all(count >= 0.92 * runs for count in held.values()), held


def test_an_attack_that_finds_members_says_so() -> None:
    found, nothing = made(2.0, private=False), made(0.0)
    assert found.succeeds
    assert found.auc_bound is None
    assert not found.curve
    assert not found.above  # nothing was claimed
    assert not nothing.succeeds
    assert not nothing.above
    assert not nothing.differs


def test_an_attack_above_the_claim_says_so() -> None:
    assert made(4.0).above


def test_the_bound_is_that_of_the_events() -> None:
    attack = made()
    curve = dict(attack.curve)
    assert [hits.bound for hits in attack.hits] == [curve[rate] for rate in RATES]
    assert attack.auc_bound is not None
    rates, most = zip(*attack.curve, strict=True)
    below = float(np.trapezoid(most, rates))
    assert below <= attack.auc_bound <= below + 0.02


@pytest.mark.parametrize("unit", ["record", "person"])
@pytest.mark.parametrize(("shift", "private"), [(0.0, True), (4.0, True), (2.0, False)])
def test_what_is_written_is_branded_and_in_two_languages(
    tmp_path: Path, shift: float, private: bool, unit: str
) -> None:
    attack = made(shift, private, unit=unit, members_there=9000, left_out=3)
    write_attack(attack, tmp_path)
    assert Attack.model_validate(json.loads((tmp_path / "attack.json").read_text("utf-8")), strict=False) == attack
    for suffix, brand in (("", "Simulation only."), (".ko", "시뮬레이션 전용.")):
        page = (tmp_path / f"attack{suffix}.md").read_text("utf-8")
        assert brand in page
        assert f"attack{suffix}.png" in page
        assert "9,000" in page
        html = MarkdownIt("commonmark").enable("table").render(page)
        assert html.count("<h2>") == 2
        assert html.count("<tr>") == 5
        assert html.count("<li>") == 8
        picture = image.imread(tmp_path / f"attack{suffix}.png")
        assert picture.shape[0] > 400
        if suffix:
            assert english_words(page, [attack.target.name]) == set()
