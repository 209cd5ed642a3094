"""Shamir's secret sharing (Shamir 1979) of numbers below PRIME: any `threshold` shares give the secret, fewer nothing.

Python's integers do not hide how long a multiplication takes. Shares are made and combined a few times a round, in
processes that nobody else can time exactly; an attacker who shares the processor has easier ways in.
"""

from collections.abc import Sequence
from functools import lru_cache
from operator import mul

from fedllm.crypto import primitives

PRIME = 2**256 - 189  # the largest below 2^256: a share is 32 bytes, and every X25519 scalar fits
SHARE = 32  # bytes


def random_number() -> int:
    """Return a number below PRIME; 128 bits more than it has make it uniform to within 2^-128."""
    return int.from_bytes(primitives.random_bytes(SHARE + 16), "big") % PRIME


def split(secret: int, threshold: int, holders: int) -> list[int]:
    """Return the shares of participants 1, 2, ..., `holders`: values of a random polynomial with f(0) = `secret`."""
    if not 0 <= secret < PRIME or not 1 <= threshold <= holders:
        raise ValueError(f"cannot split: threshold={threshold}, holders={holders}")
    coefficients = [secret, *(random_number() for _ in range(threshold - 1))]
    return [sum(map(mul, coefficients, row)) % PRIME for row in _powers(threshold, holders)]


def combine(weights: Sequence[int], shares: Sequence[int]) -> int:
    """Return the secret from shares and their Lagrange weights; one wrong share gives a random number."""
    return int(sum(map(mul, weights, shares)) % PRIME)


def share_at(at: int, points: Sequence[int], weights: Sequence[int], shares: Sequence[int]) -> int:
    """Return f(at) for a holder that is none of `points`, whose weights and shares these are.

    The product of (at - x') / (0 - x') over all x' but x is that over all x', times x / (x - at).
    """
    above, below = 1, 1
    for x in points:
        above, below = above * (at - x) % PRIME, below * -x % PRIME
    terms = (w * y * x * _inverse(x - at) for x, w, y in zip(points, weights, shares, strict=True))
    return sum(terms) * above * pow(below, -1, PRIME) % PRIME


@lru_cache(maxsize=1 << 14)
def _inverse(difference: int) -> int:
    return pow(difference, -1, PRIME)


@lru_cache(maxsize=4)
def _powers(threshold: int, holders: int) -> list[list[int]]:
    """Return x^0, ..., x^(threshold-1) for every holder x: the same for both secrets of every round."""
    return [[pow(x, k, PRIME) for k in range(threshold)] for x in range(1, holders + 1)]


@lru_cache(maxsize=1024)  # a search for wrong shares goes through as many sets as there are holders
def weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """Return Lagrange's coefficients: f(0) is the sum of weight * f(point). Once for every set of holders."""
    if len(set(points)) != len(points):
        raise ValueError(f"points={points}: a holder twice")
    result = []
    for x in points:
        above, below = 1, 1
        for other in points:
            if other != x:
                above = above * -other % PRIME
                below = below * (x - other) % PRIME
        result.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(result)
