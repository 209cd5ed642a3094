"""Whoever drops out, the sum is exact or the round ends cleanly; and no upload says anything by itself."""

import os
import subprocess
import sys
from collections import defaultdict
from functools import cache
from unittest import mock

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chi2

from fedllm import secagg
from fedllm.crypto import identity, primitives
from fedllm.errors import FederationError, FedllmError, MessageError, PrivacyError, QuorumLost
from fedllm.protocol.messages import MaskedInput, Signed, UnmaskingShares
from fedllm.secagg import masking, session
from tests.fedllm.secagg.secagg_federation import TASK, Federation, identity_of, random_vectors, total, wire

FALSE_ALARM = 1e-10  # of each statistical test, two-sided; all of them together stay below 1e-9
NEVER, BEFORE_SHARE, BEFORE_MASK, BEFORE_UNMASK, BEFORE_REVEAL = range(5)


@st.composite
def federations(draw: st.DrawFn) -> Federation:
    n = draw(st.integers(2, 7))
    colluders = draw(st.integers(0, max(0, n - 2)))
    least = max((n + colluders) // 2 + 1, colluders + 2)
    return Federation(n, draw(st.integers(least, n)), colluders)


# ---- the sum ---------------------------------------------------------------------------------------------------------


@given(federations(), st.data())
def test_the_sum_is_exact_or_the_round_ends_cleanly(federation: Federation, data: st.DataObject) -> None:
    """Three rounds; in each, every site may drop out at every point and is back in the next."""
    threshold = federation.params.threshold
    phase = st.sampled_from([NEVER] * 8 + [BEFORE_SHARE, BEFORE_MASK, BEFORE_UNMASK, BEFORE_REVEAL])
    drops = [{site: data.draw(phase) for site in federation.members} for _ in range(3)]
    dealt = federation.share(1, [site for site, when in drops[0].items() if when != BEFORE_SHARE])
    for number, when in enumerate(drops, 1):
        vectors = random_vectors(federation.members, data.draw(st.integers(1, 40)), number)
        upload = [site for site in dealt if when[site] != BEFORE_MASK]
        following = federation.share(  # travels with the uploads
            number + 1, [s for s in upload if number < 3 and drops[number][s] != BEFORE_SHARE]
        )
        if len(dealt) < threshold:
            for site in upload:
                with pytest.raises(PrivacyError, match="participants"):
                    federation.mask(number, dealt, {site: vectors[site]})
        else:
            uploads = federation.mask(number, dealt, {site: vectors[site] for site in upload})
            finish(federation, number, dealt, uploads, when, vectors)
        dealt = following


def finish(federation, number, dealt, uploads, when, vectors) -> None:  # type: ignore[no-untyped-def]
    """Play what follows the uploads, and expect the exact sum or the one error that fits."""
    threshold = federation.params.threshold
    claim = federation.claim(number, dealt, uploads)
    signers = [site for site in uploads if when[site] != BEFORE_UNMASK]
    answering = [site for site in signers if when[site] != BEFORE_REVEAL]
    if len(uploads) < threshold:
        for site in uploads:
            with pytest.raises(PrivacyError, match="survivors"):
                federation.members[site].unmask(claim)
        return
    if claim.dropped and len(signers) < threshold:
        proof = secagg.unmasking_request(claim, federation.consents(claim, signers))
        for site in answering:
            with pytest.raises(PrivacyError, match="Nothing is revealed"):
                federation.members[site].reveal(proof)
        return
    reveals = federation.reveals(claim, signers, answering)
    if len(reveals) < threshold:
        with pytest.raises(QuorumLost, match=f"round {number}"):
            secagg.unmask(federation.cohort, dealt, claim, federation.added(claim.round, uploads), reveals)
        return
    unmasked = secagg.unmask(federation.cohort, dealt, claim, federation.added(claim.round, uploads), reveals)
    assert unmasked.doubtful == ()
    assert unmasked.total_d.dtype == np.uint32
    assert unmasked.total_d.tolist() == total({site: vectors[site] for site in uploads}).tolist()


@pytest.mark.parametrize("dimension", [0, 1, 16_383, 16_384, 16_385, 50_000])
def test_masks_of_any_length_cancel(dimension: int) -> None:
    federation = Federation(3)
    vectors = random_vectors(federation.members, dimension)
    assert np.array_equal(federation.run(1, vectors).total_d, total(vectors))
    del vectors["지점-002"]
    assert np.array_equal(federation.run(2, vectors).total_d, total(vectors))


def test_sums_wrap_around_at_two_to_the_32() -> None:
    federation = Federation(3)
    vectors = {site: np.array([2**32 - 1, 2**31, 1], np.uint32) for site in federation.members}
    assert federation.run(1, vectors).total_d.tolist() == [2**32 - 3, 2**31, 3]


def test_an_input_is_not_changed_and_has_to_be_uint32() -> None:
    federation = Federation(3)
    dealt = federation.share(1)
    vector = np.arange(10, dtype=np.uint32)
    vector.setflags(write=False)
    federation.mask(1, dealt, {"지점-001": vector})
    assert vector.tolist() == list(range(10))
    for wrong in (vector.astype(np.int64), vector.reshape(2, 5)):
        with pytest.raises(FedllmError, match="flat vector of uint32"):
            federation.mask(1, dealt, {"지점-002": wrong})


def test_a_site_that_was_started_again_is_a_dropout_and_then_takes_part_again() -> None:
    federation, site = Federation(5), "지점-003"
    vectors = random_vectors(federation.members, 8)
    dealt = federation.share(1)
    uploads = federation.mask(1, dealt, vectors)
    reborn = secagg.Participant(federation.params, site, federation.identities[site])
    federation.members[site] = reborn
    claim = federation.claim(1, dealt, uploads)
    with pytest.raises(PrivacyError, match="its process is a new one"):
        reborn.unmask(claim)
    with pytest.raises(MessageError, match="not the one that it sent"):
        reborn.share(federation.share_request(2))
    others = [name for name in uploads if name != site]
    reveals = federation.reveals(claim, (), others)  # it uploaded: its vector is in the sum
    unmasked = secagg.unmask(federation.cohort, dealt, claim, federation.added(claim.round, uploads), reveals)
    assert unmasked.total_d.tolist() == total(vectors).tolist()
    federation.cohort = secagg.make_cohort(federation.params, [m.join.join for m in federation.members.values()])
    assert federation.run(2, vectors).total_d.tolist() == total(vectors).tolist()


def test_rounds_overlap_while_joins_change() -> None:
    """Shares of round 2 go to a new list of keys before round 1 is masked with the old one."""
    federation = Federation(4)
    vectors = random_vectors(federation.members, 8)
    dealt, old = federation.share(1), federation.cohort
    keep = [name for name in federation.members if name != "지점-004"]
    federation.cohort = secagg.make_cohort(
        federation.params, [member.join.join for name, member in federation.members.items() if name in keep]
    )
    following = federation.share(2, keep)
    new, federation.cohort = federation.cohort, old
    assert federation.run(1, vectors, dealt).total_d.tolist() == total(vectors).tolist()
    federation.cohort = new
    vectors = {name: vectors[name] for name in keep}
    assert federation.run(2, vectors, following).total_d.tolist() == total(vectors).tolist()


def test_the_same_request_gets_the_same_answer() -> None:
    federation = Federation(4)
    vectors = random_vectors(federation.members, 8)
    dealt = federation.share(1)
    assert federation.share(1) == dealt
    member = federation.members["지점-001"]
    assert member.share(federation.share_request(1, repeat=True)) == dealt["지점-001"]
    del vectors["지점-004"]
    uploads = federation.mask(1, dealt, vectors)
    assert federation.mask(1, dealt, vectors) == uploads
    claim = federation.claim(1, dealt, uploads)
    assert federation.consents(claim, list(uploads)) == federation.consents(claim, list(uploads))
    once = federation.reveals(claim, list(uploads), list(uploads))
    assert once == federation.reveals(claim, list(uploads), list(uploads))


def test_what_was_checked_is_not_opened_again_and_another_request_is() -> None:
    federation = Federation(4)
    dealt = federation.share(1)
    member, vector = federation.members["지점-001"], np.zeros(8, np.uint32)
    request = federation.masked_input_request(1, dealt, "지점-001")
    fewer = federation.masked_input_request(1, {k: dealt[k] for k in sorted(dealt)[:3]}, "지점-001")
    with mock.patch("fedllm.crypto.primitives.open_once", wraps=primitives.open_once) as opened:
        member.check(request)
        member.check(fewer)
        assert opened.call_count == 3 + 2
        upload = member.mask(wire(fewer), TASK, vector)
        assert opened.call_count == 3 + 2
        federation.members["지점-002"].mask(federation.masked_input_request(1, dealt, "지점-002"), TASK, vector)
        assert opened.call_count == 3 + 2 + 3
    altered = bytearray(request.payload)
    altered[0] ^= 1
    third = federation.members["지점-003"]
    third.check(asked := federation.masked_input_request(1, dealt, "지점-003"))
    with pytest.raises(MessageError):
        third.mask(asked.model_copy(update={"payload": bytes(altered)}), TASK, vector)
    assert upload == member.mask(fewer, TASK, vector)


@pytest.mark.parametrize(("sites", "threshold"), [(24, 14), pytest.param(128, 70, marks=pytest.mark.soak)])
def test_many_sites_work(sites: int, threshold: int) -> None:
    """All sites check the same signatures; here, in one process, each is checked once."""
    federation = Federation(sites, threshold)
    vectors = random_vectors(federation.members, 64)
    with mock.patch.object(identity.PublicIdentity, "verify", cache(identity.PublicIdentity.verify)):
        dealt = federation.share(1)
        for gone in ("지점-001", f"지점-{sites // 2:03d}", f"지점-{sites:03d}"):
            del vectors[gone]
        unmasked = federation.run(1, vectors, dealt)
    assert np.array_equal(unmasked.total_d, total(vectors))


# ---- wrong shares ----------------------------------------------------------------------------------------------------


def spoil(reveal: UnmaskingShares, index: int) -> UnmaskingShares:
    """Change the share of one dealer, by the order of participants."""
    payload = bytearray(reveal.payload)
    payload[32 * index + 31] ^= 1
    return reveal.model_copy(update={"payload": bytes(payload)})


@given(st.integers(0, 6), st.integers(0, 6), st.booleans())
def test_one_wrong_share_is_found_and_the_sum_is_still_right(holder: int, dealer: int, dropout: bool) -> None:
    federation = Federation(7, 4)
    vectors = random_vectors(federation.members, 8)
    sites = list(federation.members)
    dealt = federation.share(1)
    if dropout:
        holder, dealer = 1 + holder % 6, 0
        del vectors[sites[0]]
    uploads = federation.mask(1, dealt, vectors)
    claim = federation.claim(1, dealt, uploads)
    reveals = federation.reveals(claim, list(uploads), list(uploads))
    reveals = [spoil(r, dealer) if r.site == sites[holder] else r for r in reveals]
    unmasked = secagg.unmask(federation.cohort, dealt, claim, federation.added(claim.round, uploads), reveals)
    assert unmasked.total_d.tolist() == total(vectors).tolist()
    assert unmasked.doubtful in ((), ((sites[holder], sites[dealer]),))  # nobody who is not concerned
    needed = [site for site in sites if site in uploads][:4]
    assert bool(unmasked.doubtful) == (sites[holder] in needed)


def test_a_wrong_share_that_changes_only_bits_without_meaning_is_found_too() -> None:
    """Holders 2 to 5 weigh 10, -20, 15 and -4: a share wrong by one moves the scalar by four, which X25519 ignores."""
    federation = Federation(7, 4)
    vectors = random_vectors(federation.members, 8)
    del vectors["지점-001"]
    dealt = federation.share(1)
    uploads = federation.mask(1, dealt, vectors)
    claim = federation.claim(1, dealt, uploads)
    reveals = federation.reveals(claim, list(uploads), list(uploads))
    reveals = [spoil(r, 0) if r.site == "지점-005" else r for r in reveals]
    unmasked = secagg.unmask(federation.cohort, dealt, claim, federation.added(claim.round, uploads), reveals)
    assert unmasked.doubtful == (("지점-005", "지점-001"),)
    assert unmasked.total_d.tolist() == total(vectors).tolist()


def test_where_no_share_is_to_spare_the_round_ends_and_names_all_who_may_be_at_fault() -> None:
    federation = Federation(4, 3)
    vectors = random_vectors(federation.members, 8)
    dealt = federation.share(1)
    uploads = federation.mask(1, dealt, vectors)
    claim = federation.claim(1, dealt, uploads)
    reveals = federation.reveals(claim, (), ["지점-001", "지점-003", "지점-004"])
    with pytest.raises(FederationError, match=r"지점-002.*지점-001, 지점-003, 지점-004.*or one of the others"):
        secagg.unmask(
            federation.cohort,
            dealt,
            claim,
            federation.added(claim.round, uploads),
            [spoil(reveals[0], 1), *reveals[1:]],
        )


# ---- what an upload says ---------------------------------------------------------------------------------------------


def looks_uniform(words: NDArray[np.uint32]) -> bool:
    """Pearson's chi-square over the values of all bytes, two-sided at FALSE_ALARM."""
    counts = np.bincount(words.view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return bool(chi2.ppf(FALSE_ALARM / 2, 255) < statistic < chi2.isf(FALSE_ALARM / 2, 255))


def words_of(masked: MaskedInput) -> NDArray[np.uint32]:
    return np.frombuffer(masked.payload, "<u4")


def test_an_upload_and_every_partial_sum_are_uniform() -> None:
    """The vectors are zero, so all that is seen is masks: of one upload, of sums, and with some masks taken off."""
    federation = Federation(4, 3)
    zeros = {site: np.zeros(250_000, np.uint32) for site in federation.members}
    dealt = federation.share(1)
    uploads = {site: words_of(masked) for site, masked in federation.mask(1, dealt, zeros).items()}
    sites = list(uploads)
    assert not looks_uniform(zeros[sites[0]])
    assert looks_uniform(uploads[sites[0]])
    assert looks_uniform(uploads[sites[0]] + uploads[sites[1]])
    everything = total(uploads)
    assert looks_uniform(everything)  # pairwise masks have cancelled, every site's own mask is in it
    state = federation.members[sites[0]]._rounds[1]
    without_pairs, without_own = uploads[sites[0]].copy(), uploads[sites[0]].copy()
    for peer, key in state.pair_keys.items():
        masking.add_mask(without_pairs, key, -1 if sites[0] < peer else 1)
    own = masking.self_mask_key(federation.cohort, 1, state.common, sites[0], state.seed)
    masking.add_mask(without_own, own, -1)
    assert looks_uniform(without_pairs)
    assert looks_uniform(without_own)
    masking.add_mask(without_pairs, own, -1)
    assert not without_pairs.any()


def test_every_round_has_masks_of_its_own() -> None:
    federation = Federation(3)
    zeros = {site: np.zeros(100, np.uint32) for site in federation.members}
    seen = [federation.mask(number, federation.share(number), zeros)["지점-001"].payload for number in (1, 2, 3)]
    words = np.concatenate([np.frombuffer(payload, "<u4") for payload in seen])
    assert len(set(words.tolist())) > 295  # 300 words of 32 bits: five coincidences have probability below 1e-20


def test_a_message_of_m_parameters_is_four_bytes_each_and_a_small_header() -> None:
    federation = Federation(3)
    vectors = random_vectors(federation.members, 10_000)
    for masked in federation.mask(1, federation.share(1), vectors).values():
        assert 40_000 < len(masked.to_bytes()) < 40_400


def test_what_a_site_is_sent_grows_linearly() -> None:
    small, large = Federation(8), Federation(32)
    sizes = []
    for federation in (small, large):
        dealt = federation.share(1)
        sizes.append(len(federation.masked_input_request(1, dealt, "지점-001").to_bytes()))
    assert sizes[1] < 4.2 * sizes[0]


# ---- the one guarantee -----------------------------------------------------------------------------------------------


@given(st.data())
def test_a_site_never_reveals_both_secrets_of_a_peer(data: st.DataObject) -> None:
    """The server holds every other site's signing key, and asks whatever it likes in whatever order."""
    federation, victim = Federation(5, 3), "지점-001"
    member = federation.members[victim]
    sites = list(federation.members)
    vectors = random_vectors(sites, 3)
    dealt = {number: federation.share(number, sites[1:]) for number in (1, 2)}
    if data.draw(st.booleans()):  # half of the searches start where there is something to reveal
        dealt[1][victim] = member.share(federation.share_request(1))
        member.mask(federation.masked_input_request(1, dealt[1], victim), TASK, vectors[victim])
    revealed: dict[tuple[int, str], set[bytes]] = defaultdict(set)
    claims = []
    for _ in range(data.draw(st.integers(6, 25))):
        step = data.draw(st.sampled_from(["share", "mask", "unmask", "unmask", "unmask", "reveal", "reveal", "reveal"]))
        number = data.draw(st.integers(1, 2))
        present = [victim, *data.draw(st.lists(st.sampled_from(sites[1:]), unique=True, min_size=2))]
        try:
            if step == "share":
                request = federation.share_request(number)
                dealt[number][victim] = member.share(request)
            elif step == "mask":
                members = {name: dealt[number][name] for name in sites if name in dealt[number]}
                if data.draw(st.booleans()):
                    members = {name: members[name] for name in members if name in present}
                member.mask(
                    federation.masked_input_request(number, members, victim),
                    TASK,
                    vectors[data.draw(st.sampled_from(sites))],
                )
            elif step == "unmask":
                everybody = data.draw(st.sampled_from([sites, present]))
                claim = federation.claim(number, everybody, data.draw(st.sampled_from([present, everybody])))
                claims.append(claim)
                answer = member.unmask(claim)
                if isinstance(answer, UnmaskingShares):
                    note(revealed, answer, sorted(everybody))
            elif claims:
                claim = data.draw(st.sampled_from(claims))
                document = session.survivors_document(federation.cohort, claim)
                signed = [
                    Signed(site=site, signature=identity_of(site).sign(document).hex()) for site in claim.survivors
                ]
                proof = federation.claim(number, (), ())  # for its fields
                request = secagg.unmasking_request(proof, ()).model_copy(
                    update={"round": claim.round, "consents": tuple(signed)}
                )
                note(revealed, member.reveal(request), sorted([*claim.survivors, *claim.dropped]))
        except FedllmError:
            continue
    event(f"rounds with a reveal: {len({number for number, _ in revealed})}")
    assert all(len(shares) == 1 for shares in revealed.values())


def note(revealed: dict[tuple[int, str], set[bytes]], reveal: UnmaskingShares, participants: list[str]) -> None:
    assert len(reveal.payload) == 32 * len(participants)
    for index, name in enumerate(participants):
        revealed[reveal.round, name].add(reveal.payload[32 * index : 32 * index + 32])


def test_the_search_above_does_reach_reveals_by_both_paths() -> None:
    federation = Federation(5, 3)
    vectors = random_vectors(federation.members, 3)
    dealt = federation.share(1)
    uploads = federation.mask(1, dealt, vectors)
    revealed: dict[tuple[int, str], set[bytes]] = defaultdict(set)
    for reveal in federation.reveals(federation.claim(1, dealt, uploads), (), ["지점-001"]):
        note(revealed, reveal, list(dealt))
    assert len(revealed) == 5
    member = federation.members["지점-001"]
    for name in dealt:
        seed_share, key_share = member._rounds[1].held[name]
        assert revealed[1, name] == {seed_share}
        assert seed_share != key_share


# ---- where secrets come from -----------------------------------------------------------------------------------------


def test_every_secret_comes_from_the_operating_system() -> None:
    federation = Federation(5, 3)
    with mock.patch("fedllm.crypto.primitives.os.urandom", side_effect=os.urandom) as drawn:
        member = secagg.Participant(federation.params, "지점-001", identity_of("지점-001"))
        assert drawn.call_count == 1  # the share key
        assert member.join != federation.members["지점-001"].join
        federation.members["지점-001"] = member
        federation.cohort = secagg.make_cohort(federation.params, [m.join.join for m in federation.members.values()])
        federation.share(1, ["지점-001"])
    assert drawn.call_count == 3 + 2 * 2  # and seed, mask key, two coefficients for each


def test_the_mask_stream_is_aes_256_in_counter_mode() -> None:
    (block,) = primitives.keystream(bytes(32), 20)
    assert bytes(block).hex()[:32] == "dc95c078a2408989ad48a21492842087"  # AES-256 of zero under the key zero
    joined = b"".join(bytes(block) for block in primitives.keystream(b"k" * 32, 200_001))
    assert len(joined) == 200_001
    assert joined[:70_000] == b"".join(bytes(block) for block in primitives.keystream(b"k" * 32, 70_000))


def test_keys_are_derived_by_hkdf() -> None:  # RFC 5869, appendix A.3
    derived = primitives.derive(b"\x0b" * 22, b"")
    assert derived.hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"


def test_a_key_of_small_order_is_refused() -> None:
    for public in (bytes(32), b"\x01" + bytes(31)):
        with pytest.raises(FedllmError, match="small order"):
            primitives.check_agreement(public)
        with pytest.raises(FedllmError, match="small order"):
            primitives.AgreementKey.generate().agree(public)


def test_the_protocol_needs_no_heavy_library() -> None:
    code = "import sys, fedllm.secagg; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "scipy", "flwr", "datasets"}


def test_a_message_passes_unchanged_through_the_wire() -> None:
    federation = Federation(2)
    assert wire(federation.members["지점-001"].join) == federation.members["지점-001"].join
