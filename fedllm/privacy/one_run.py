"""What an attack on a single training run proves: a lower bound on epsilon (Steinke, Nasr and Jagielski 2023)."""

import math

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import ConfigError

CONFIDENCE = 0.95
_MOST = 10**8  # canaries; the window below grows with their square root


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return the chance, at most, of `right` or more right guesses if the training is (epsilon, delta)-DP.

    Each of `canaries` was put into the data with probability 1/2, independently, and the attacker guessed of `guesses`
    of them whether they are in. With W ~ Binomial(guesses, e^epsilon / (1 + e^epsilon)), arXiv 2305.08846, Theorem 5.2
    and Appendix D, is

        P[W >= right] + 2 canaries delta max_i P[right - i <= W < right] / i,    i = 1 .. right.
    """
    from scipy import special

    if right == 0:
        return 1.0
    at_least = float(special.betainc(right, guesses - right + 1, 1 / (1 + math.exp(-epsilon))))
    w = _window(guesses, right, epsilon)
    below = np.cumsum(np.exp(_log_binomial(w, guesses, epsilon)))  # P[w <= W < right]
    slope = float(np.max(below / (right - w), initial=0.0))
    return min(1.0, at_least + 2 * canaries * delta * slope)


def epsilon_lower_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """Return the largest epsilon such that every smaller one is refuted, with `confidence`; 0 if none is.

    Rounded down to a millionth. Of k attacks on one run each takes 1 - (1 - CONFIDENCE) / k. Raises ConfigError if
    there can be no such audit.
    """
    _check(canaries, guesses, right, delta)
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence:g}: expected more than 0 and less than 1.")

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, right, epsilon, delta) < 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return math.floor(low * 1e6) / 1e6


def _check(canaries: int, guesses: int, right: int, delta: float) -> None:
    if not 1 <= canaries <= _MOST:
        raise ConfigError(f"canaries={canaries}: expected 1 to {_MOST:,}.")
    if not 0 <= guesses <= canaries:
        raise ConfigError(f"guesses={guesses}: expected 0 to {canaries}, one guess a canary at most.")
    if not 0 <= right <= guesses:
        raise ConfigError(f"right={right}: expected 0 to {guesses}, the number of guesses.")
    if not 0 < delta < 1:
        raise ConfigError(f"delta={delta:g}: expected more than 0 and less than 1.")


def _window(guesses: int, right: int, epsilon: float) -> NDArray[np.float64]:
    """Return the values of W below `right` that can matter, downwards: beyond 25 deviations lie less than e^-100."""
    share = 1 / (1 + math.exp(-epsilon))
    reach = 25 * math.sqrt(guesses * share * (1 - share)) + 100
    highest = min(right - 1, math.ceil(guesses * share + reach))
    lowest = max(0, math.floor(guesses * share - reach))
    return np.arange(highest, lowest - 1, -1, dtype=np.float64)


def _log_binomial(w: NDArray[np.float64], n: int, epsilon: float) -> NDArray[np.float64]:
    """Return log P[W = w] for W ~ Binomial(n, e^epsilon / (1 + e^epsilon))."""
    from scipy import special

    log_share = -math.log1p(math.exp(-epsilon))
    choose = special.gammaln(n + 1) - special.gammaln(w + 1) - special.gammaln(n - w + 1)
    return np.asarray(choose + w * log_share + (n - w) * (log_share - epsilon))
