"""Noise in shares: rounded normals, the room in 32 bits, and a sum that is the Gaussian mechanism's."""

import itertools
import math

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedllm.errors import ConfigError, PrivacyError
from fedllm.plan import least_quorum
from fedllm.privacy import distributed_noise as distributed
from fedllm.privacy.distributed_noise import DistributedMechanism, rounded_normals
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import OsRandomness, SeededRandomness
from fedllm.protocol.messages import UnmaskingShares
from fedllm.values import MAX_HOLDERS

FALSE_ALARM = 1e-9  # of every statistical test here
MECHANISM = Mechanism(clip_norm=0.4, noise_multiplier=0.8, sampling_rate=0.1)


def cell_probabilities(std: float, edges: np.ndarray) -> np.ndarray:
    """Probabilities of a rounded normal between whole numbers that are edges: the cell of k is [k - 1/2, k + 1/2]."""
    return np.diff(stats.norm.cdf((edges - 0.5) / std))


@pytest.mark.parametrize("std", [0.7, 16.0, 4096.0])
def test_rounded_normals_follow_the_rounded_gaussian(std: float) -> None:
    draws = rounded_normals(OsRandomness(), 400_000, std)
    inner = np.unique(np.rint(np.linspace(-3 * std, 3 * std, 40)))
    edges = np.concatenate([[-np.inf], inner, [np.inf]])
    counts = np.histogram(draws, bins=np.nan_to_num(edges, neginf=-1e18, posinf=1e18))[0]
    # a histogram's last bin is closed; all draws lie far inside
    expected = cell_probabilities(std, edges) * len(draws)
    assert stats.chisquare(counts, expected).pvalue > FALSE_ALARM


def test_halves_of_a_pair_and_neighbours_are_independent() -> None:
    draws = rounded_normals(OsRandomness(), 400_000, 1000.0).astype(np.float64)
    limit = stats.norm.isf(FALSE_ALARM / 4) / math.sqrt(200_000)
    assert abs(np.corrcoef(draws[:200_000], draws[200_000:])[0, 1]) < limit
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < limit
    assert abs(np.corrcoef(draws[:200_000] ** 2, draws[200_000:] ** 2)[0, 1]) < 2 * limit


@pytest.mark.parametrize("std", [16.0, 65536.0, 2.0**30])
def test_the_error_bound_of_the_quick_path_holds_with_room_to_spare(std: float) -> None:
    """It is off by half its bound at most, whether the further bits of 256-bit uniforms are all 0 or all 1."""
    edges = [1, 2, 9, 2**11, 2**52, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 3 * 2**62, 2**64 - 2**40, 2**64 - 2, 2**64 - 1]
    drawn = SeededRandomness(1).words(2_000)
    radius_words = np.concatenate([np.repeat(np.array(edges, np.uint64), len(edges)), drawn[:1000]])
    angle_words = np.concatenate([np.tile(np.array(edges, np.uint64), len(edges)), drawn[1000:]])
    draws, errors = distributed._quickly(radius_words, angle_words, std)
    closest = 0.0
    with mpmath.workprec(300):
        for i, (radius_word, angle_word) in enumerate(zip(radius_words, angle_words, strict=True)):
            for further in (mpmath.mpf(0), 1 - mpmath.mpf(2) ** -192):
                u = (int(radius_word) + further) / mpmath.mpf(2) ** 64
                angle = 2 * mpmath.pi * (int(angle_word) + further) / mpmath.mpf(2) ** 64
                radius = std * mpmath.sqrt(-2 * mpmath.log(u))
                for draw, exact in zip(
                    draws[:, i], (radius * mpmath.cos(angle), radius * mpmath.sin(angle)), strict=True
                ):
                    closest = max(closest, float(abs(exact - mpmath.mpf(float(draw))) / errors[i]))
    assert 1e-3 < closest < 0.5, "a bound that is never nearly met would be no bound of this computation"


def test_quick_draws_are_the_exact_ones() -> None:
    std, source = 65536.0, SeededRandomness(1)
    words = SeededRandomness(1).words(1000)
    quick = rounded_normals(source, 1000, std)
    for i in range(500):
        exact = distributed._exactly(int(words[i]), int(words[500 + i]), OsRandomness(), std)
        assert exact == (quick[i], quick[500 + i])


def test_draws_near_the_middle_between_two_integers_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Middle:
        """Words whose first draw lies within float64's error of 1000.5."""

        private = False
        asked = 0

        def words(self, n: int) -> np.ndarray:
            self.asked += 1
            if self.asked == 1:
                with mpmath.workprec(200):
                    u = mpmath.exp(-(mpmath.mpf("1000.5") ** 2) / 2 / 1000**2)
                    return np.array([int(mpmath.floor(u * 2**64)), 0], dtype=np.uint64)
            return np.full(n, 2**64 - 1 if self.high else 0, dtype=np.uint64)

        high = True

    low, high = Middle(), Middle()
    low.high = False
    first, second = (int(rounded_normals(source, 1, 1000.0)[0]) for source in (low, high))
    assert low.asked == high.asked == 2, "more bits were drawn"
    assert (first, second) == (1001, 1000), "which decide: a larger uniform is a smaller radius"


@pytest.mark.parametrize("word", [0, 1, 2**64 - 1, 2**63, 2**53])
def test_extreme_words_give_finite_draws_within_reach(word: int) -> None:
    class Constant:
        private = False

        def words(self, n: int) -> np.ndarray:
            return np.full(n, word, dtype=np.uint64)

    assert np.abs(rounded_normals(Constant(), 3, 1000.0)).max() <= 19 * 1000


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf, 2.0**31])
def test_an_impossible_share_is_refused(std: float) -> None:
    with pytest.raises(PrivacyError, match="std="):
        rounded_normals(OsRandomness(), 3, std)


@given(
    sites=st.integers(1, 128), dropped=st.integers(0, 40), colluding=st.integers(0, 3),
    expected=st.floats(0.1, 1000), sigma=st.floats(0.3, 20),
)  # fmt: skip
def test_no_sum_of_all_sites_wraps_around(
    sites: int, dropped: int, colluding: int, expected: float, sigma: float
) -> None:
    colluding = min(colluding, sites - 1)
    quorum = max(colluding + 1, sites - dropped)
    try:
        mechanism = DistributedMechanism(Mechanism(1.0, sigma, 0.1), sites, quorum, colluding, expected)
    except ConfigError:
        return  # too coarse, and says so
    huge = np.array([1e18, -1e18, 2.0**31, 0.0])
    uploads = [mechanism.upload(huge, OsRandomness())[0] for _ in range(sites)]
    total = sum(int(upload[0].view(np.int32)) for upload in uploads)
    assert abs(total) < 2**31, "the worst that all sites together can send"
    wrapped = np.sum(uploads, axis=0, dtype=np.uint32)
    assert int(wrapped[0].view(np.int32)) == total
    most = mechanism.scale * max(1.0, expected)
    exact = np.array([math.floor(most), -math.floor(most)], dtype=np.float64)
    noise = mechanism.upload(exact, OsRandomness())[0].view(np.int32) - exact
    parts = sum(map(mechanism._std, mechanism._parts))
    assert np.abs(noise).max() < 19 * parts + 1, "the promised room is not cut into"


@pytest.mark.parametrize(
    ("present", "trimmed", "known"), [(6, 6, 1), (7, 7, 1), (8, 8, 1), (8, 6, 1), (8, 0, 0), (6, 0, 0)]
)
def test_the_sum_of_noise_shares_has_full_variance(present: int, trimmed: int, known: int) -> None:
    """With a quorum of 6 of 8 sites, 1 of which colludes: never less than the mechanism's, and with all hardly more."""
    mechanism = DistributedMechanism(MECHANISM, sites=8, quorum=6, colluding=1, expected_units=100.0)
    d, total = 100_000, np.zeros(100_000, np.uint32)
    for site in range(known, present):
        upload, seeds = mechanism.upload(np.zeros(d), OsRandomness())
        total += upload
        if site >= present - trimmed:  # what colluding sites know are the shares with the most noise
            total -= mechanism.surplus([seeds[k] for k in mechanism.revealed_seeds(present)], present, d)
    noise, multiplier = mechanism.decode(total), mechanism.noise_multiplier(present, trimmed, known)
    assert multiplier > MECHANISM.noise_multiplier * (1 - 1e-12)
    if trimmed == present:
        assert multiplier < MECHANISM.noise_multiplier * 1.02
    std = multiplier * MECHANISM.clip_norm
    ratio = float((noise / std) @ (noise / std))
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], d)
    assert low < ratio < high
    assert stats.kstest(noise / std, "norm").pvalue > FALSE_ALARM


def shared_of(sites: int, quorum: int, colluding: int) -> DistributedMechanism:
    return DistributedMechanism(MECHANISM, sites, quorum, colluding, 10.0)


@given(sites=st.integers(3, 128) | st.integers(129, MAX_HOLDERS), data=st.data())
def test_enough_noise_stays_in_the_worst_cases(sites: int, data: st.DataObject) -> None:
    """In units of a part, which are whole numbers: no rounding can hide a shortage."""
    colluding = data.draw(st.integers(0, (sites - 2) // 2))
    least = max((sites + colluding) // 2 + 1, colluding + 2)
    quorum = data.draw(st.integers(min(least, sites), sites))
    distributed = shared_of(sites, quorum, colluding)
    needed = (sites - colluding) * (quorum - colluding)

    def kept(survivors: int) -> int:
        gone = sum(distributed._parts[1 + k] for k in distributed.revealed_seeds(survivors))
        step = max(1, math.ceil((sites - quorum) / 15))
        assert survivors - quorum - step < gone <= survivors - quorum
        assert survivors < sites or gone == survivors - quorum, "all are there, and nothing stays that is not needed"
        return sum(distributed._parts) - gone

    assert sum(distributed._parts) == sites - colluding
    assert len(distributed._parts) <= 5, "the proof counts draws: 8,192 in a sum at most"
    assert MAX_HOLDERS * 5 <= 8192
    # one list with dropouts: a quorum answered it, the other honest survivors were shown whatever costs most
    survivors = data.draw(st.integers(quorum, sites))
    others = survivors - quorum
    assert (quorum - colluding) * kept(survivors) + others * kept(sites) >= needed
    # lists without dropouts, to groups of honest sites whose sum is read together
    honest = data.draw(st.integers(quorum - colluding, sites - colluding))
    assert honest * kept(min(honest + colluding, sites)) >= needed
    # and where nobody cheats, there is hardly more than needed: 4 % of deviation with two thirds, at the most
    if 3 * quorum >= 2 * sites and sites >= 8 and colluding <= 1:
        assert (survivors - colluding) * kept(survivors) <= 1.1 * needed


def least_noise(sites: int, quorum: int, colluding: int) -> int:
    """Return the fewest units of noise in any sum that the server can read, over all it may tell each honest site.

    A model of fedllm.secagg in sets. The server tells an honest site which sites take part and which of them survived;
    colluding sites sign and reveal whatever helps. It can read the sum of a set of uploads if it has the seed of each,
    and of each pairwise mask in one of them that no other cancels a key.
    """
    distributed, everybody = shared_of(sites, quorum, colluding), frozenset(range(sites))
    honest, units = range(sites - colluding), sum(distributed._parts)
    gone = {u: sum(distributed._parts[1 + k] for k in distributed.revealed_seeds(u)) for u in range(quorum, sites + 1)}

    def subsets(of: frozenset[int], least: int) -> list[frozenset[int]]:
        return [frozenset(x) for n in range(least, len(of) + 1) for x in itertools.combinations(sorted(of), n)]

    told = [
        [(p, left) for p in subsets(everybody, quorum) for left in subsets(p, quorum) if site in left]
        for site in honest
    ]
    fewest = sites * units
    for lists in itertools.product(*told):
        signers = {each: lists.count(each) + sum(k in each[1] for k in everybody if k >= len(honest)) for each in lists}
        answers = [i for i in honest if lists[i][0] == lists[i][1] or signers[lists[i]] >= quorum]
        seeds, keys = (
            {
                i for i in honest
                if colluding + sum(i in lists[j][0] and (i in lists[j][1]) == survived for j in answers) >= quorum
            }
            for survived in (True, False)
        )  # fmt: skip
        for read in subsets(frozenset(seeds), 1):
            if all(
                j in keys or i in keys or (j in read and i in lists[j][0])
                for i in read for j in lists[i][0] if j != i and j in honest
            ):  # fmt: skip
                fewest = min(fewest, sum(units - gone[len(lists[i][1])] * (i in answers) for i in read))
    return fewest


@pytest.mark.parametrize(("sites", "quorum", "colluding"), [(4, 3, 0), (4, 3, 1), (5, 4, 1), (5, 4, 2), (4, 4, 1)])
def test_no_lists_of_head_office_leave_too_little_noise(sites: int, quorum: int, colluding: int) -> None:
    assert least_noise(sites, quorum, colluding) == (sites - colluding) * (quorum - colluding)


def test_the_model_of_head_office_finds_what_the_bound_on_the_quorum_forbids() -> None:
    assert least_noise(4, 2, 0) < 4 * 2


def test_a_reveal_has_room_for_the_seeds_of_the_largest_plan() -> None:
    room = next(m.max_length for m in UnmaskingShares.model_fields["surplus"].metadata if hasattr(m, "max_length"))
    for colluding in (0, 1, 2):
        distributed = DistributedMechanism(
            Mechanism(1.0, 8.0, 0.1), MAX_HOLDERS, least_quorum(MAX_HOLDERS, colluding), colluding, 5.0
        )
        assert len(distributed.revealed_seeds(MAX_HOLDERS)) == len(distributed._parts) - 1 <= room


def test_what_a_site_gives_away_is_what_head_office_takes_off() -> None:
    distributed = shared_of(8, 6, 1)
    upload, seeds = distributed.upload(np.zeros(1000), OsRandomness())
    assert len(set(seeds)) == len(seeds) == 2
    assert distributed.revealed_seeds(6) == ()
    assert not distributed.surplus([], 6, 1000).any()
    one, both = (distributed.surplus([seeds[k] for k in distributed.revealed_seeds(u)], u, 1000) for u in (7, 8))
    again = distributed.surplus([seeds[k] for k in distributed.revealed_seeds(8)], 8, 1000)
    assert np.array_equal(both, again)
    assert one.any()
    assert not np.array_equal(one, both)
    left = (upload - both).view(np.int32).astype(np.float64)
    limit = stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(1000)
    assert abs(np.corrcoef(left, both.view(np.int32))[0, 1]) < limit, "what stays has nothing to do with what went"
    for survivors in (5, 9):
        with pytest.raises(PrivacyError, match="survivors, expected 6 to 8"):
            distributed.revealed_seeds(survivors)


def test_a_seed_stands_for_the_same_noise_where_another_processor_is_less_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which draws are computed again hangs on the last digits of a logarithm. Whoever takes noise off may have others.

    Several blocks and large draws, of which some are unclear anyway: all that follows one must stay what it was.
    """
    seed, std, quickly = "5a" * 32, 2.0**29, distributed._quickly

    def noise() -> np.ndarray:
        return np.concatenate([draws for _, draws in distributed._surplus_by_block(seed, 100_001, std)])

    again: list[int] = []
    exactly = distributed._exactly
    monkeypatch.setattr(distributed, "_exactly", lambda *pair: again.append(1) or exactly(*pair))
    here = noise()
    few = len(again)
    monkeypatch.setattr(
        distributed, "_quickly", lambda *words: (np.nextafter((own := quickly(*words))[0], np.inf), own[1] * 30)
    )
    assert np.array_equal(noise(), here)
    assert 0 < few < len(again) - few


@given(dimension=st.integers(1, 400), seed=st.integers(0, 2**32), lengths=st.floats(0.5, 100))
def test_a_rounded_unit_never_passes_the_clip(dimension: int, seed: int, lengths: float) -> None:
    mechanism = DistributedMechanism(MECHANISM, 8, 6, 1, 100.0)
    vector = np.random.default_rng(seed).standard_normal(dimension) * lengths
    limit = mechanism.clip_before_rounding(dimension)
    vector *= min(1.0, limit / np.linalg.norm(vector))
    quanta = [int(v) for v in np.rint(vector / mechanism.quantum)]
    assert sum(q * q for q in quanta) <= mechanism.scale**2, "in whole numbers, without any rounding"


def test_a_sum_that_is_not_whole_is_refused() -> None:
    with pytest.raises(PrivacyError, match="whole quanta"):
        DistributedMechanism(MECHANISM, 8, 6, 1, 100.0).upload(np.array([0.5]), OsRandomness())
    with pytest.raises(PrivacyError, match="whole quanta"):
        DistributedMechanism(MECHANISM, 8, 6, 1, 100.0).upload(np.array([math.nan]), OsRandomness())


def test_too_little_room_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="Use fewer"):
        DistributedMechanism(Mechanism(1.0, 0.3, 0.1), 1000, 900, 0, 1e5)
    with pytest.raises(ConfigError, match="smaller adapter"):
        DistributedMechanism(MECHANISM, 128, 80, 0, 1000.0).clip_before_rounding(100_000_000)
    with pytest.raises(PrivacyError, match="colluding < quorum"):
        DistributedMechanism(MECHANISM, 8, 1, 1, 100.0)


def test_the_law_of_a_sum_of_shares_is_that_of_the_rounded_gaussian() -> None:
    """The lemma of the module's docstring, in numbers, where the difference is large enough to be seen at all."""
    h, k = 3, np.arange(-60, 61)
    for s, most in ((0.5, 0.2), (1.0, 0.01), (2.0, 1e-7), (3.0, 1e-15)):
        share = np.diff(stats.norm.cdf((np.arange(-60, 62) - 0.5) / s))
        total = np.convolve(np.convolve(share, share), share)[120:241]
        t = np.linspace(-40 * math.pi, 40 * math.pi, 160_001)
        spectrum = np.exp(-h * s * s * t * t / 2) * np.sinc(t / 2 / math.pi) ** h
        law = np.array([np.trapezoid(spectrum * np.cos(t * each), t) / (2 * math.pi) for each in k])
        bound = (2 * 60 + 1) * h * 2.01 * math.exp(-(math.pi**2) * s * s / 2) / 2
        distance = np.abs(total - law).sum() / 2
        assert distance <= max(bound, 1e-12), (s, distance, bound)
        assert distance < max(most, 1e-12)
