"""What is released shows nothing of the sum beneath through the grid of floating point.

The attacks here are Mironov's (2012) and those of Haney et al. (2022): sums and noise are floats, floats lie on grids
that are finer near zero, and a small result keeps the coarse grid of the large numbers that it came from.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import OsRandomness, float_safe_normals

FALSE_ALARM = 1e-9 / 4  # each of the four tests below that draw coins; 1e-9 together
UNIT = Mechanism(1.0, 1.0, 0.5)  # noise of deviation 1
sums = st.floats(-1e4, 1e4, width=32)


class NoNoise:
    """A source whose noise is zero: cos(pi / 2) of radius 0."""

    private = False

    def words(self, n: int) -> NDArray[np.uint64]:
        return np.zeros(n, dtype=np.uint64)


def on_grid(values: NDArray[np.floating], grid: float) -> NDArray[np.bool_]:
    scaled = values.astype(np.float64) / grid
    return scaled == np.rint(scaled)


def test_the_naive_release_in_float32_gives_the_sum_away() -> None:
    """Noise and sum in float32: a small result that is no multiple of 2^-25 cannot have come from a sum of 1."""
    noise = float_safe_normals(OsRandomness(), 200_000).astype(np.float32)
    betrayed = {}
    for true_sum in (np.float32(0), np.float32(1)):
        released = noise + true_sum
        small = released[np.abs(released) < 2**-6]
        assert len(small) > 500
        betrayed[float(true_sum)] = float((~on_grid(small, 2.0**-25)).mean())
    assert betrayed[0.0] > 0.5
    assert betrayed[1.0] == 0.0


def test_adding_in_a_wider_format_and_rounding_once_only_makes_it_rare() -> None:
    """Float32 released as float16 has 13 bits to spare, and can be watched; float64 as float32 has 29.

    The deviation is 1024, so that float16 reaches far enough below it. A result that is no multiple of 2^-14 cannot
    have come from a sum of 1024: about one in 2^15 gives a sum of 0 away, where float32 would in one of 2^31.
    """
    noise = (1024 * float_safe_normals(OsRandomness(), 2_000_000)).astype(np.float32)
    betrayed = [
        int((~on_grid((noise + true_sum).astype(np.float16), 2.0**-14)).sum())
        for true_sum in (np.float32(0), np.float32(1024))
    ]
    assert betrayed[0] > 0
    assert betrayed[1] == 0


@given(values=st.lists(sums, min_size=1, max_size=20), clip=st.floats(1e-6, 1e6), noise=st.floats(1e-2, 1e2))
def test_every_release_lies_on_a_grid_that_is_public(values: list[float], clip: float, noise: float) -> None:
    mechanism = Mechanism(clip, noise, 0.1)
    released = mechanism.release(np.asarray(values, dtype=np.float32), OsRandomness())
    assert released.dtype == np.float64
    assert on_grid(released, mechanism.grid).all()
    assert mechanism.noise_std / 2048 <= mechanism.grid <= mechanism.noise_std / 1024
    assert np.log2(mechanism.grid) == round(np.log2(mechanism.grid))


@given(values=st.lists(sums, min_size=1, max_size=20))
def test_the_rounding_moves_nothing_by_more_than_half_a_cell(values: list[float]) -> None:
    exact = np.asarray(values, dtype=np.float32)
    source = NoNoise()
    assert (np.abs(UNIT.release(exact, source) - exact - UNIT.noise(len(exact), source)) <= UNIT.grid / 2).all()


def test_a_float32_holds_what_was_released() -> None:
    clipped = np.linspace(-8_000, 8_000, 20_001).astype(np.float32)
    released = UNIT.release(clipped, OsRandomness())
    assert (released.astype(np.float32).astype(np.float64) == released).all()


@pytest.mark.parametrize("true_sum", [0.0, 1.0, 1 / 3, 1e-3, 3.0000001, 1e-30])
def test_the_last_bit_of_a_release_is_a_fair_coin_whatever_the_sum(true_sum: float) -> None:
    """Even and odd grid points alike, and near zero as elsewhere: the attacks above see nothing."""
    n = 200_000
    released = UNIT.release(np.full(n, true_sum, dtype=np.float32), OsRandomness()) / UNIT.grid
    near_zero = released[np.abs(released) < 2**7]
    for values in (released, near_zero):
        odd = int((values % 2 != 0).sum())
        tail = FALSE_ALARM / 6 / 2 / 2  # sums, subsets, sides
        # even and odd cells of a normal density this wide hold the same mass to 1e-300; near zero 127 and 128 cells
        share = 0.5 if values is released else 128 / 255
        assert stats.binom.ppf(tail, len(values), share) <= odd <= stats.binom.isf(tail, len(values), share)


def test_within_a_cell_of_the_grid_the_noise_is_random_to_its_last_bits() -> None:
    """A cell holds so many values of the noise that its chance hardly differs from that of real-valued noise."""
    n = 400_000
    cells = UNIT.noise(n, OsRandomness()) / UNIT.grid
    within = cells - np.floor(cells)
    assert stats.kstest(within, "uniform").pvalue > FALSE_ALARM / 38
    tail = FALSE_ALARM / 38 / 2
    for bit in range(1, 38):  # to 2^-37 of a cell
        ones = int((np.floor(within * 2.0**bit) % 2 == 1).sum())
        assert stats.binom.ppf(tail, n, 0.5) <= ones <= stats.binom.isf(tail, n, 0.5), f"bit {bit}"


def test_the_rounding_leaves_variance_and_shape_as_they_were() -> None:
    n = 1_000_000
    released = Mechanism(0.5, 3.0, 0.5).release(np.zeros(n, dtype=np.float32), OsRandomness()) / 1.5
    statistic, tail = float(np.sum(released**2)), FALSE_ALARM / 2 / 2
    assert stats.chi2.ppf(tail, n) <= statistic <= stats.chi2.isf(tail, n)
    # the distribution is a staircase, at most a cell's mass from the normal one
    distance = stats.kstest(released, "norm").statistic
    assert distance <= stats.kstwo.isf(FALSE_ALARM / 2, n) + 0.4 / 1024


def test_without_privacy_the_sum_is_released_as_it_is() -> None:
    clipped = np.asarray([0.1, 1e-20, 3.0], dtype=np.float32)
    mechanism = Mechanism(1.0, 0.0, 0.5)
    assert mechanism.release(clipped, OsRandomness()).tolist() == clipped.astype(np.float64).tolist()
    assert mechanism.grid == 0.0
