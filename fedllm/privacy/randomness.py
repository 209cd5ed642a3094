"""Where sampling and noise come from: the operating system's CSPRNG, or a seed that brands the run NOT PRIVATE."""

import hashlib
import os
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedllm.crypto import primitives


class Randomness(Protocol):
    """A source of uniform 64-bit words."""

    @property
    def private(self) -> bool:
        """Whether the words are unpredictable to everyone outside this process."""
        ...

    def words(self, n: int) -> NDArray[np.uint64]:
        """Return `n` independent uniform words, uint64[n]."""
        ...


class OsRandomness:
    """The operating system's CSPRNG, drawn afresh for every word: no state to save, copy or reuse."""

    private = True

    def words(self, n: int) -> NDArray[np.uint64]:
        return np.frombuffer(os.urandom(8 * n), dtype=np.uint64)


class KeyedRandomness:
    """The words that 32 secret bytes stand for: AES-256-CTR, under a key of its own for every call.

    For what must come out the same once more and may not be guessed: the secret comes from the operating system.
    """

    private = True

    def __init__(self, secret: bytes, purpose: bytes) -> None:
        self._secret, self._purpose, self._calls = secret, purpose, 0

    def words(self, n: int) -> NDArray[np.uint64]:
        key = primitives.derive(self._secret, b"%s %d" % (self._purpose, self._calls))
        self._calls += 1
        return np.frombuffer(b"".join(bytes(block) for block in primitives.keystream(key, 8 * n)), "<u8")


class Beside:
    """The words of one source, and before them `many` of another: what either gives does not depend on the other."""

    def __init__(self, first: Randomness, many: int, then: Randomness) -> None:
        self._first, self._many, self._then = first, many, then
        self.private = first.private and then.private

    def words(self, n: int) -> NDArray[np.uint64]:
        return np.concatenate([self._first.words(self._many), self._then.words(n - self._many)])


class SeededRandomness:
    """Reproducible words for experiments and non-private runs. Protects nobody.

    `scope` separates streams: the same seed gives other words for another site or round, and the same words again
    when a round is repeated after a crash, so that a resumed run continues exactly.
    """

    private = False

    def __init__(self, seed: int, *scope: object) -> None:
        digest = hashlib.sha256(repr((seed, *scope)).encode()).digest()
        self._generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))

    def words(self, n: int) -> NDArray[np.uint64]:
        return self._generator.integers(0, 2**64, size=n, dtype=np.uint64, endpoint=False)


def uniforms(source: Randomness, n: int) -> NDArray[np.float64]:
    """Return float64[n], uniform on the 2^53 multiples of 2^-53 in [0, 1)."""
    return np.asarray((source.words(n) >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def normals(source: Randomness, n: int) -> NDArray[np.float64]:
    """Return float64[n] of standard normal draws (Box and Muller 1958)."""
    pairs = (n + 1) // 2
    u = uniforms(source, 2 * pairs)
    radius = np.sqrt(-2.0 * np.log1p(-u[:pairs]))  # log(1-u): u may be 0, never 1
    angle = 2.0 * np.pi * u[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]


def float_safe_normals(source: Randomness, n: int) -> NDArray[np.float64]:
    """Return float64[n] of standard normal draws whose low bits do not betray what they were added to.

    Each draw is the sum of four normals, halved. The set of floats that a single draw can produce has gaps that
    reveal the unperturbed value (Mironov 2012); inverting a sum of 2n draws needs exponentially more work in n
    (Holohan and Braghin, "Secure Random Sampling in Differential Privacy", 2021, section 5; n = 2 here).
    """
    return np.asarray(normals(source, 4 * n).reshape(4, n).sum(axis=0) / 2.0)
