"""Coins that a site is bound to, openings that say one thing, and what right guesses prove of a run."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedllm.canonical import digest_of
from fedllm.errors import ConfigError, CryptoError
from fedllm.privacy.canaries import (
    EACH,
    MAX_CANARIES,
    Opening,
    Secret,
    choose,
    commitment,
    most_guesses,
    pooled,
    usual_guesses,
)
from fedllm.privacy.one_run import CONFIDENCE, epsilon_lower_bound

COINS = "1101001011"


def secret_of(coins: str = COINS, run: str = "시험", site: str = "서울") -> Secret:
    return Secret(run=run, site=site, nonce="0" * 64, seed="1" * 64, coins=coins)


def opening_of(black: tuple[int, ...] = (0, 1), white: tuple[int, ...] = (2, 9), **values: str) -> Opening:
    return Opening(secret=secret_of(**values), black=black, white=white)


# ---- the secret and its commitment -----------------------------------------------------------------------------------


def test_a_secret_is_drawn_afresh_and_its_coins_are_fair() -> None:
    first, second = (Secret.draw("run", "site", MAX_CANARIES) for _ in range(2))
    assert len({first.nonce, second.nonce, first.seed, second.seed}) == 4
    assert first.coins != second.coins
    for secret in (first, second):
        assert len(secret.coins) == MAX_CANARIES
        heads = secret.coins.count("1")
        assert stats.binom.ppf(1e-9, MAX_CANARIES, 0.5) <= heads <= stats.binom.isf(1e-9, MAX_CANARIES, 0.5)
        assert secret.members == tuple(i for i, coin in enumerate(secret.coins) if coin == "1")


@pytest.mark.parametrize("canaries", [1, 7, 8, 9, 100])
def test_there_are_as_many_coins_as_canaries(canaries: int) -> None:
    assert len(Secret.draw("run", "site", canaries).coins) == canaries


@pytest.mark.parametrize("canaries", [0, -1, MAX_CANARIES + 1])
def test_more_canaries_than_an_opening_holds_are_refused(canaries: int) -> None:
    with pytest.raises(ConfigError, match=f"canaries={canaries}: expected 1 to 10,000"):
        Secret.draw("run", "site", canaries)


def test_the_commitment_is_the_digest_of_everything_under_a_label() -> None:
    secret = secret_of()
    said = {"domain": "fedllm canaries v1", "run": "시험", "site": "서울", "nonce": "0" * 64, "seed": "1" * 64,
            "coins": COINS}  # fmt: skip
    assert commitment(secret) == digest_of(said)
    others = [
        secret_of("1101001010"), secret_of(run="other"), secret_of(site="busan"),
        secret.model_copy(update={"nonce": "2" * 64}), secret.model_copy(update={"seed": "2" * 64}),
    ]  # fmt: skip
    assert len({commitment(other) for other in [secret, *others]}) == 6


# ---- openings --------------------------------------------------------------------------------------------------------


def test_an_opening_is_read_as_it_was_written() -> None:
    opening = opening_of()
    assert Opening.from_text(opening.to_text()) == opening
    largest = tuple(range(MAX_CANARIES // 2, MAX_CANARIES))  # half of all canaries: no plan has more guesses
    most = Opening(secret=Secret.draw("가" * 500, "나" * 200, MAX_CANARIES), black=largest, white=largest)
    assert Opening.from_text(most.to_text()) == most


def _spoilt(change: Callable[[dict[str, Any]], object]) -> str:
    values = json.loads(opening_of().to_text())
    change(values)
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[" * 100_000,
        "[" * 200_000,
        "{}",
        opening_of().to_text() + " ",
        opening_of().to_text().replace(":", ": "),
        opening_of().to_text().replace('"black":[0,1]', '"black":[0,1],"black":[0,1]'),
        _spoilt(lambda v: v.update(more=1)),
        _spoilt(lambda v: v.pop("white")),
        _spoilt(lambda v: v.update(black=[0])),  # another number of guesses than the other attack
        _spoilt(lambda v: v.update(black=[1, 0])),
        _spoilt(lambda v: v.update(black=[1, 1])),
        _spoilt(lambda v: v.update(black=[-1, 1])),
        _spoilt(lambda v: v.update(black=[0, 10])),
        _spoilt(lambda v: v.update(black=[0, 1.0])),
        _spoilt(lambda v: v.update(black=[False, True])),
        _spoilt(lambda v: v.update(black=["0", "1"])),
        _spoilt(lambda v: v.update(black="01")),
        _spoilt(lambda v: v["secret"].update(coins="")),
        _spoilt(lambda v: v["secret"].update(coins="1101001012")),
        _spoilt(lambda v: v["secret"].update(coins="1101001011\n")),
        _spoilt(lambda v: v["secret"].update(coins=[1, 0])),
        _spoilt(lambda v: v["secret"].update(coins="1" * (MAX_CANARIES + 1))),
        _spoilt(lambda v: v["secret"].update(nonce="0" * 63)),
        _spoilt(lambda v: v["secret"].update(nonce="A" * 64)),
        _spoilt(lambda v: v["secret"].update(seed="1" * 64 + "\n")),
        _spoilt(lambda v: v["secret"].update(site="a\nb")),
        _spoilt(lambda v: v["secret"].update(run="")),
        _spoilt(lambda v: v["secret"].update(more="")),
    ],
    ids=range(30),
)  # fmt: skip
def test_nothing_else_is_an_opening(text: str) -> None:
    with pytest.raises(CryptoError, match="an opening of canaries"):
        Opening.from_text(text)


def test_an_opening_is_that_of_its_commitment_run_and_site() -> None:
    opening = opening_of()
    committed = commitment(opening.secret)
    opening.check("시험", "서울", 10, 2, committed)
    for arguments, names in (
        (("other", "서울", 10, 2, committed), "run='시험', expected 'other'"),
        (("시험", "busan", 10, 2, committed), "site='서울', expected 'busan'"),
        (("시험", "서울", 11, 2, committed), "canaries=10, expected 11"),
        (("시험", "서울", 10, 3, committed), "guesses=2, expected 3"),
        (("시험", "서울", 10, 2, "0" * 64), "not what was committed to"),
    ):  # fmt: skip
        with pytest.raises(CryptoError, match=names):
            opening.check(*arguments)  # type: ignore[arg-type]
    flipped = opening_of(coins="0" + COINS[1:])
    with pytest.raises(CryptoError, match="not what was committed to"):
        flipped.check("시험", "서울", 10, 2, committed)


# ---- guesses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("canaries", "rate", "steps", "most", "usual"),
    [(100, 1.0, 1, 50, 25), (100, 0.1, 9, 30, 15), (1000, 0.1, 9, 306, 153), (3, 0.5, 1, 0, 1), (100, 1e-9, 1, 0, 1)],
)
def test_guesses_are_fewer_than_canaries_that_were_drawn(
    canaries: int, rate: float, steps: int, most: int, usual: int
) -> None:
    assert most_guesses(canaries, rate, steps) == most
    assert usual_guesses(canaries, rate, steps) == usual
    assert most <= canaries * (1 - (1 - rate) ** steps) / 2


@pytest.mark.parametrize(("rate", "steps"), [(0.0, 1), (1.1, 1), (math.nan, 1), (0.5, 0)])
def test_a_plan_that_draws_nobody_is_refused(rate: float, steps: int) -> None:
    with pytest.raises(ConfigError, match="sampling_rate="):
        most_guesses(10, rate, steps)


def test_the_usual_guesses_prove_more_of_a_hindered_attack_and_lose_log_2_of_a_perfect_one() -> None:
    canaries, rate, steps = 800, 0.1, 9
    generator = np.random.default_rng(0)
    proved: dict[tuple[int, float], list[float]] = {}
    most, usual = most_guesses(canaries, rate, steps), usual_guesses(canaries, rate, steps)
    for _ in range(20):
        coins = generator.integers(0, 2, canaries)
        drawn = coins * generator.binomial(steps, rate, canaries)
        for strength in (3.0, 20.0):  # of one draw, in deviations of one step's noise
            order = np.argsort(-(strength * drawn + generator.normal(0, math.sqrt(steps), canaries)))
            for guesses in (most, usual):
                right = int(coins[order[:guesses]].sum())
                bound = epsilon_lower_bound(canaries, guesses, right, 1e-6, EACH)
                proved.setdefault((guesses, strength), []).append(bound)
    mean = {case: float(np.mean(bounds)) for case, bounds in proved.items()}
    assert mean[usual, 3.0] > 1.4 * mean[most, 3.0]
    ceilings = [epsilon_lower_bound(canaries, guesses, guesses, 1e-6, EACH) for guesses in (most, usual)]
    assert mean[usual, 20.0] > ceilings[0] - math.log(2) - 0.05
    assert mean[usual, 20.0] == pytest.approx(ceilings[1], abs=0.05)


def test_the_highest_scores_are_guessed_the_first_of_equal_ones_and_nan_last() -> None:
    assert choose(np.array([0.1, 3.0, 2.0, -1.0]), 2) == (1, 2)
    assert choose(np.array([1.0, 1.0, 1.0, 1.0]), 2) == (0, 1)
    assert choose(np.array([np.nan, 1.0, -np.inf, np.nan]), 3) == (0, 1, 2)
    assert choose(np.array([np.nan, 1.0, np.inf, 2.0], dtype=np.float32), 1) == (2,)
    assert choose(np.zeros(3), 0) == ()
    for guesses in (-1, 4):
        with pytest.raises(ConfigError, match=f"guesses={guesses}: expected 0 to 3"):
            choose(np.zeros(3), guesses)


# ---- what guesses prove ----------------------------------------------------------------------------------------------


def test_right_guesses_are_counted_over_all_sites() -> None:
    # COINS are 1 at 0, 1, 3, 6, 8 and 9
    openings = [opening_of((0, 1), (2, 9)), opening_of((4, 5), (0, 8), site="busan")]
    result = pooled(openings, 2, 1e-5)
    assert (result.canaries, result.delta) == (20, 1e-5)
    assert (result.black.right, result.black.guesses) == (2, 4)
    assert (result.white.right, result.white.guesses) == (3, 4)
    for attack in (result.black, result.white):
        assert attack.lower == epsilon_lower_bound(20, 4, attack.right, 1e-5, EACH)
        assert attack.ceiling == epsilon_lower_bound(20, 4, 4, 1e-5, EACH)


def sure(right: int, guesses: int, canaries: int) -> Opening:
    """An opening whose white-box attack has so many right, and whose black-box attack has none."""
    coins = "1" * right + "0" * (canaries - right)
    return Opening(
        secret=secret_of(coins), white=tuple(range(guesses)), black=tuple(range(canaries - guesses, canaries))
    )


@pytest.mark.parametrize(("guesses", "both", "alone"), [(100, 3.29, 3.49), (1000, 5.59, 5.80)])
def test_a_perfect_attack_has_a_ceiling(guesses: int, both: float, alone: float) -> None:
    """Of one attack at 95 % it is 3.5 with 100 guesses and 5.8 with 1,000; of two at 97.5 % each a little less."""
    result = pooled([sure(guesses, guesses, 2 * guesses)], guesses, 1e-6)
    assert result.white.lower == result.white.ceiling == result.black.ceiling == pytest.approx(both, abs=0.02)
    assert epsilon_lower_bound(2 * guesses, guesses, guesses, 1e-6) == pytest.approx(alone, abs=0.02)
    assert result.black.lower == 0.0
    assert result.could_have(both - 0.05)
    assert not result.could_have(both + 0.05)
    assert result.contradicts(both - 0.05)
    assert not result.contradicts(both + 0.05)


def test_what_could_have_been_contradicted_need_not_be() -> None:
    result = pooled([sure(60, 100, 200)], 100, 1e-6)
    assert result.could_have(2.0)
    assert not result.contradicts(2.0)
    nothing = pooled([sure(0, 0, 10)], 0, 1e-6)
    assert nothing.black == nothing.white
    assert not nothing.could_have(0.0)


@given(st.integers(1, 60), st.floats(0, 4), st.integers(0, 2**32))
def test_guesses_that_know_nothing_are_seldom_believed(guesses: int, epsilon: float, seed: int) -> None:
    """Exactly: of all outcomes of both attacks together, those that contradict have 5 % at most."""
    truth = 1 / (1 + math.exp(-epsilon))
    wrong = sum(
        float(stats.binom.pmf(v, guesses, truth))
        for v in range(guesses + 1)
        if epsilon_lower_bound(2 * guesses, guesses, v, 1e-12, EACH) > epsilon
    )
    assert 2 * wrong <= 1 - CONFIDENCE + 1e-12


def test_openings_of_other_runs_twice_or_with_other_guesses_are_refused() -> None:
    for openings, names in (
        ([opening_of(), opening_of()], "opened its canaries twice"),
        ([opening_of(), opening_of(run="other", site="busan")], "several runs"),
        ([opening_of((0,), (1,))], "'서울': 1 guesses, where the plan has 2"),
    ):
        with pytest.raises(CryptoError, match=names):
            pooled(openings, 2, 1e-5)
    with pytest.raises(ConfigError, match="canaries=0"):
        pooled([], 2, 1e-5)
