"""Canaries: made-up units that a site trains on or not, by coins that it commits to; and what guessing them proves.

A site makes N canaries from a seed, draws a coin for each, and commits to both before the first round. The canaries
whose coin is 1 train as records do. After the last round two attacks each name the canaries that they take for "in",
and the commitment is opened: whoever reads the openings of a run counts the right guesses, and `one_run` says which
epsilon they refute (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846). A guess is made of what training released, so
it costs no budget, and no coin says anything of a record.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fedllm.canonical import canonical_json, digest_of, read_json
from fedllm.crypto.primitives import random_bytes
from fedllm.errors import ConfigError, CryptoError
from fedllm.privacy.one_run import CONFIDENCE, epsilon_lower_bound
from fedllm.values import Frozen, Name, Printable

MAX_CANARIES = 10_000  # of a site
ATTACKS = 2  # on one run
EACH = 1 - (1 - CONFIDENCE) / ATTACKS  # confidence of each bound, so that both hold with CONFIDENCE

_DOMAIN = "fedllm canaries v1"
_SECRET = 32  # bytes: a nonce that hides the coins, a seed that nobody chose
_LONGEST = 1 << 17  # characters of an opening: MAX_CANARIES coins, and twice half as many indices

_Hex = Annotated[str, Field(pattern=re.compile(r"^[0-9a-f]{64}\Z"))]
_Indices = Annotated[tuple[int, ...], Field(max_length=MAX_CANARIES)]


class Secret(Frozen):
    """What a site keeps to itself from before the first round of a run until after the last."""

    run: Printable = Field(min_length=1, max_length=500)
    site: Name
    nonce: _Hex  # hides the coins behind the commitment
    seed: _Hex  # makes the canaries
    coins: Annotated[str, Field(pattern=re.compile(r"^[01]+\Z"), max_length=MAX_CANARIES)]  # 1: the canary trains

    @classmethod
    def draw(cls, run: str, site: str, canaries: int) -> "Secret":
        """Draw a secret, every coin fair and independent: the operating system's CSPRNG.

        Raises ConfigError unless there are 1 to MAX_CANARIES canaries.
        """
        _check_canaries(canaries)
        bits = int.from_bytes(random_bytes(-(-canaries // 8)), "big")
        coins = "".join("01"[bits >> number & 1] for number in range(canaries))
        nonce, seed = random_bytes(_SECRET).hex(), random_bytes(_SECRET).hex()
        return cls(run=run, site=site, nonce=nonce, seed=seed, coins=coins)

    @property
    def members(self) -> tuple[int, ...]:
        """Which canaries train."""
        return tuple(number for number, coin in enumerate(self.coins) if coin == "1")


def commitment(secret: Secret) -> str:
    """Return SHA-256, hex, of the canonical JSON of a secret: it binds the site, and the nonce hides the rest."""
    return digest_of({"domain": _DOMAIN, **secret.model_dump()})


class Opening(Frozen):
    """A secret that is none any more, and which canaries each attack took for "in"."""

    secret: Secret
    black: _Indices  # by the loss under the final adapter: sorted, each once
    white: _Indices  # by the adapters of all rounds

    @model_validator(mode="after")
    def _validate(self) -> "Opening":
        canaries = len(self.secret.coins)
        for guessed in (self.black, self.white):
            if any(a >= b for a, b in itertools.pairwise(guessed)):
                raise ValueError("guesses are not in order, or one is made twice")
            if guessed and not 0 <= guessed[0] <= guessed[-1] < canaries:
                raise ValueError(f"a guess on a canary that is none of {canaries}")
        if len(self.black) != len(self.white):
            raise ValueError("the two attacks made different numbers of guesses")
        return self

    def to_text(self) -> str:
        """Return the opening as canonical JSON."""
        return canonical_json(self.model_dump(mode="json")).decode()

    @classmethod
    def from_text(cls, text: str) -> "Opening":
        """Read what `to_text` wrote; raises CryptoError on anything else.

        Run, site, commitment and number of guesses are for the caller to compare, with `check`.
        """
        if len(text) > _LONGEST:
            raise CryptoError(f"an opening of canaries has {len(text)} characters, expected {_LONGEST} at most")
        try:
            read_json(text)  # a key that is given twice says two things
            opening = cls.model_validate_json(text)
            canonical = opening.to_text() == text
        except (ValueError, RecursionError):  # pydantic's, too; its text quotes what others wrote
            canonical = False
        if not canonical:
            raise CryptoError("an opening of canaries of unknown form: it was altered, or is of another version")
        return opening

    def check(self, run: str, site: str, canaries: int, guesses: int, committed: str) -> None:
        """Raise CryptoError unless this opens a site's commitment in a run, with as many guesses as were planned."""
        secret = self.secret
        found = (secret.run, secret.site, len(secret.coins), len(self.black))
        for what, value, expected in zip(
            ("run", "site", "canaries", "guesses"), found, (run, site, canaries, guesses), strict=True
        ):
            if value != expected:
                raise CryptoError(f"an opening of canaries for {what}={value!r}, expected {expected!r}")
        if commitment(secret) != committed:
            raise CryptoError(
                f"canaries of {site!r}: what is opened is not what was committed to before the first round"
            )


def most_guesses(canaries: int, sampling_rate: float, steps: int) -> int:
    """Return floor(N (1 - (1-q)^T) / 2): how many canaries are in and were drawn at least once, on average.

    Beyond that, guesses are on canaries that no adapter has ever seen. Raises ConfigError on numbers that no plan has.
    """
    return math.floor(canaries * _drawn(canaries, sampling_rate, steps))


def usual_guesses(canaries: int, sampling_rate: float, steps: int) -> int:
    """Return half of `most_guesses`, 1 at the least: the guesses of which an attack is surest.

    One wrong guess costs more than many right ones bring. Of as many guesses as canaries were drawn on average, chance
    alone makes some wrong. With half as many a perfect attack loses at most log 2 of its bound, and an attack that
    noise hinders proves up to twice as much.
    """
    return max(1, most_guesses(canaries, sampling_rate, steps) // 2)


def _drawn(canaries: int, sampling_rate: float, steps: int) -> float:
    """Return the chance that a canary is in and is drawn at least once in `steps` steps."""
    _check_canaries(canaries)
    if not 0 < sampling_rate <= 1 or steps < 1:
        raise ConfigError(f"sampling_rate={sampling_rate:g}, steps={steps}: expected a rate in (0, 1], and steps")
    return (1 - (1 - sampling_rate) ** steps) / 2


def _check_canaries(canaries: int) -> None:
    if not 1 <= canaries <= MAX_CANARIES:
        raise ConfigError(f"canaries={canaries}: expected 1 to {MAX_CANARIES:,} at a site")


def choose(scores: NDArray[np.floating], guesses: int) -> tuple[int, ...]:
    """Return the indices of the highest of float[n] scores, sorted; of equal ones the first, and NaN last.

    Raises ConfigError if there are fewer scores than guesses.
    """
    if not 0 <= guesses <= len(scores):
        raise ConfigError(f"guesses={guesses}: expected 0 to {len(scores)}, one guess a canary at most")
    order = np.lexsort((-scores, np.isnan(scores)))  # stable: of equal scores the first comes first
    return tuple(sorted(int(number) for number in order[:guesses]))


@dataclass(frozen=True)
class Attack:
    """What the guesses of one attack came to, all sites together."""

    right: int
    guesses: int
    lower: float  # epsilon: every smaller one is refuted, with confidence EACH
    ceiling: float  # `lower` if all guesses had been right


@dataclass(frozen=True)
class Result:
    """What both attacks on one run prove of it, at `delta`; both bounds hold with CONFIDENCE."""

    canaries: int  # of all sites
    delta: float
    black: Attack
    white: Attack

    def contradicts(self, claim: float) -> bool:
        """Whether an attack proves more than the claimed epsilon: of an honest run with probability 5 % at most."""
        return max(self.black.lower, self.white.lower) > claim

    def could_have(self, claim: float) -> bool:
        """Whether so many guesses could have contradicted the claim at all, had they been right."""
        return max(self.black.ceiling, self.white.ceiling) > claim


def pooled(openings: Sequence[Opening], guesses: int, delta: float) -> Result:
    """Return what the openings of a run's sites prove together, `guesses` at each site by each attack.

    Raises CryptoError if they are not openings of one run, one a site, with so many guesses; ConfigError on a delta
    that is none, or if there are no openings.
    """
    if len({opening.secret.run for opening in openings}) > 1:
        raise CryptoError("openings of canaries of several runs: each run is audited by itself")
    if len({opening.secret.site for opening in openings}) < len(openings):
        raise CryptoError("a site opened its canaries twice: its guesses would count twice")
    for opening in openings:
        if len(opening.black) != guesses:
            raise CryptoError(
                f"canaries of {opening.secret.site!r}: {len(opening.black)} guesses, where the plan has {guesses}"
            )
    canaries, total = sum(len(opening.secret.coins) for opening in openings), guesses * len(openings)

    def attack(guessed: list[tuple[int, ...]]) -> Attack:
        right = sum(
            opening.secret.coins[number] == "1"
            for opening, own in zip(openings, guessed, strict=True)
            for number in own
        )
        lower, ceiling = (epsilon_lower_bound(canaries, total, n, delta, EACH) for n in (right, total))
        return Attack(right, total, lower, ceiling)

    return Result(canaries, delta, attack([o.black for o in openings]), attack([o.white for o in openings]))
