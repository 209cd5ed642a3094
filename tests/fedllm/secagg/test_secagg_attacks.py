"""A malicious server: one test an attack. No site helps it to anything but one sum of at least the threshold."""

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from fedllm import secagg
from fedllm.crypto import primitives
from fedllm.crypto.identity import Identity
from fedllm.errors import ConfigError, FederationError, FedllmError, MessageError, PrivacyError, QuorumLost
from fedllm.privacy.distributed_noise import DistributedMechanism
from fedllm.privacy.mechanism import Mechanism
from fedllm.protocol.messages import AdvertisedKey, ShareKeysRequest, Signed, SignedMaskKey, UnmaskingShares
from fedllm.secagg import masking, session
from tests.fedllm.secagg.secagg_federation import (
    PLAN,
    SESSION,
    TASK,
    Federation,
    Vector,
    identity_of,
    names,
    random_vectors,
    total,
)

A, B, C, D, E = names(5)
DIMENSION = 16


@pytest.fixture
def five() -> Federation:
    return Federation(5, 3)


def vectors_of(federation: Federation) -> dict[str, Vector]:
    return random_vectors(federation.members, DIMENSION)


def with_joins(federation: Federation, joins: tuple[AdvertisedKey, ...], site: str = A) -> None:
    """Ask a site to deal to this list."""
    federation.members[site].share(federation.share_request(1).model_copy(update={"joins": joins}))


def replace(joins: tuple[AdvertisedKey, ...], new: AdvertisedKey) -> tuple[AdvertisedKey, ...]:
    return tuple(new if join.site == new.site else join for join in joins)


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_forged_share_key_without_a_signature(five: Federation) -> None:
    forged = five.cohort.joins[1].model_copy(update={"key": "ab" * 32})
    with pytest.raises(MessageError, match=f"{B}.*not its own"):
        with_joins(five, replace(five.cohort.joins, forged))


@pytest.mark.parametrize("signer", ["outsider", C])
def test_forged_share_key_signed_by_somebody_else(five: Federation, signer: str) -> None:
    imposter = identity_of(signer)
    others = {name: public for name, public in five.params.roster.items() if public != imposter.public}
    params = secagg.SessionParams(PLAN, SESSION, 3, 0, {**others, B: imposter.public})
    forged = secagg.Participant(params, B, imposter).join.join
    with pytest.raises(MessageError, match=f"{B}.*not its own"):
        with_joins(five, replace(five.cohort.joins, forged))


def test_own_share_key_substituted(five: Federation) -> None:
    other = secagg.Participant(
        five.params, A, five.identities[A]
    ).join.join  # validly signed, of a process that is gone
    with pytest.raises(MessageError, match=f"{A}.*missing from the list, or is not the one"):
        with_joins(five, replace(five.cohort.joins, other))
    with pytest.raises(MessageError, match=f"{A}.*missing"):
        with_joins(five, five.cohort.joins[1:])


def dealing_request(federation: Federation, new: SignedMaskKey, site: str = A):  # type: ignore[no-untyped-def]
    dealt = federation.share(1)
    request = federation.masked_input_request(1, dealt, site)
    return request.model_copy(update={"dealings": tuple(new if d.site == new.site else d for d in request.dealings)})


def test_forged_mask_key_without_a_signature(five: Federation) -> None:
    old = five.share(1)[B].dealing
    for forged in (old.model_copy(update={"key": "ab" * 32}), old.model_copy(update={"commitment": "ab" * 32})):
        with pytest.raises(MessageError, match=f"{B}.*not its own"):
            five.members[A].mask(dealing_request(five, forged), TASK, np.zeros(4, np.uint32))


@pytest.mark.parametrize("signer", ["outsider", C])
def test_forged_mask_key_signed_by_somebody_else(five: Federation, signer: str) -> None:
    key, commitment = b"\xab" * 32, b"\xcd" * 32
    document = session.mask_key_document(five.cohort, 1, B, key, commitment)
    forged = SignedMaskKey(
        site=B, key=key.hex(), commitment=commitment.hex(), signature=identity_of(signer).sign(document).hex()
    )
    with pytest.raises(MessageError, match=f"{B}.*not its own"):
        five.members[A].mask(dealing_request(five, forged), TASK, np.zeros(4, np.uint32))


def test_own_mask_key_substituted(five: Federation) -> None:
    document = session.mask_key_document(five.cohort, 1, A, b"\xab" * 32, b"\xcd" * 32)
    forged = SignedMaskKey(
        site=A, key="ab" * 32, commitment="cd" * 32, signature=five.identities[A].sign(document).hex()
    )  # as if the site's signing key had leaked
    with pytest.raises(MessageError, match=f"{A}.*missing, or was altered"):
        five.members[A].mask(dealing_request(five, forged), TASK, np.zeros(4, np.uint32))


def test_one_key_for_two_sites(five: Federation) -> None:
    join = five.cohort.joins[1]
    document = session.advertised_key_document(five.params, C, bytes.fromhex(join.key))
    copied = AdvertisedKey(site=C, key=join.key, signature=five.identities[C].sign(document).hex())
    with pytest.raises(MessageError, match="a key twice"):
        with_joins(five, replace(five.cohort.joins, copied))


def test_one_mask_key_for_two_sites(five: Federation) -> None:
    """A colluding site announces the mask key of another one as its own."""
    key, commitment = bytes.fromhex(five.share(1)[B].dealing.key), b"\xcd" * 32
    document = session.mask_key_document(five.cohort, 1, C, key, commitment)
    copied = SignedMaskKey(
        site=C, key=key.hex(), commitment=commitment.hex(), signature=five.identities[C].sign(document).hex()
    )
    with pytest.raises(MessageError, match="or a site or key twice"):
        five.members[A].mask(dealing_request(five, copied), TASK, np.zeros(4, np.uint32))


def test_sites_with_different_rosters_do_not_aggregate_together(five: Federation) -> None:
    """Two rosters give one name two identities, which sign the same share key."""
    key, digests = bytes.fromhex(five.cohort.joins[4].key), []
    for identity in (five.identities[E], identity_of("outsider")):
        params = secagg.SessionParams(PLAN, SESSION, 3, 0, {**five.params.roster, E: identity.public})
        signature = identity.sign(session.advertised_key_document(params, E, key)).hex()
        joins = (*five.cohort.joins[:4], AdvertisedKey(site=E, key=key.hex(), signature=signature))
        digests.append(secagg.make_cohort(params, joins).digest)
    assert digests[0] == five.cohort.digest != digests[1]
    member = secagg.Participant(params, A, five.identities[A])  # knows the outsider as E, and is shown the other E
    joins = (member.join.join, *five.cohort.joins[1:])
    with pytest.raises(MessageError, match=E):
        member.share(ShareKeysRequest(context=params.context, round=1, joins=joins))


def test_one_identity_under_two_names(five: Federation) -> None:
    """Whoever holds its key would hold two shares of every secret, and count as one who may collude."""
    with pytest.raises(PrivacyError, match="two names"):
        secagg.SessionParams(PLAN, SESSION, 3, 0, {**five.params.roster, E: five.identities[A].public})


def test_a_mask_key_that_protects_nothing(five: Federation) -> None:
    """A colluding site announces the point of order one; every site would share the mask zero with it."""
    document = session.mask_key_document(five.cohort, 1, B, bytes(32), b"\xcd" * 32)
    weak = SignedMaskKey(site=B, key="00" * 32, commitment="cd" * 32, signature=five.identities[B].sign(document).hex())
    with pytest.raises(MessageError, match=B):
        five.members[A].mask(dealing_request(five, weak), TASK, np.zeros(4, np.uint32))
    shares = five.share(1)[B].model_copy(update={"dealing": weak})
    with pytest.raises(MessageError, match=f"{B}.*small order"):
        secagg.check_key_shares(five.cohort, 1, shares)


def test_a_share_key_that_protects_nothing(five: Federation) -> None:
    document = session.advertised_key_document(five.params, B, bytes(32))
    weak = AdvertisedKey(site=B, key="00" * 32, signature=five.identities[B].sign(document).hex())
    with pytest.raises(MessageError, match=f"{B}.*small order"):
        with_joins(five, replace(five.cohort.joins, weak))
    with pytest.raises(MessageError, match=f"{B}.*small order"):
        secagg.check_advertised_key(five.params, weak)


# ---- who takes part --------------------------------------------------------------------------------------------------


def test_sybils_that_are_not_on_the_roster(five: Federation) -> None:
    sybil, name = Identity.generate(), "지점-999"
    params = secagg.SessionParams(PLAN, SESSION, 3, 0, {**five.params.roster, name: sybil.public})
    join = secagg.Participant(params, name, sybil).join.join
    with pytest.raises(MessageError, match=f"{name}.*not on the roster"):
        with_joins(five, (*five.cohort.joins[:4], join))


def test_a_participant_that_has_not_joined() -> None:
    federation = Federation(4, 3, roster=5)
    dealt = federation.share(1)
    request = federation.masked_input_request(1, dealt, A)
    stranger = dealt[B].dealing.model_copy(update={"site": E, "key": "ab" * 32})
    request = request.model_copy(
        update={"dealings": (*request.dealings, stranger), "payload": request.payload + bytes(session.SEALED)}
    )
    with pytest.raises(MessageError, match=f"{E}.*has not joined"):
        federation.members[A].mask(request, TASK, np.zeros(4, np.uint32))


def test_the_same_site_twice(five: Federation) -> None:
    twice = secagg.Participant(five.params, B, five.identities[B]).join.join
    with pytest.raises(MessageError, match="a site or a key twice"):
        with_joins(five, (*five.cohort.joins, twice))


@pytest.mark.parametrize(("n", "threshold", "colluders"), [(5, 2, 0), (6, 3, 0), (5, 3, 1), (10, 6, 2), (3, 4, 0)])
def test_a_threshold_that_leaves_room_for_two_lists(n: int, threshold: int, colluders: int) -> None:
    with pytest.raises(PrivacyError, match="2 \\* threshold > sites \\+ colluders"):
        Federation(n, threshold, colluders)


@pytest.mark.parametrize(("threshold", "colluders"), [(1, 0), (0, 0), (3, 2), (2, 1), (2, -1)])
def test_a_sum_with_a_single_honest_site(threshold: int, colluders: int) -> None:
    with pytest.raises(PrivacyError, match="at least 2 honest sites"):
        secagg.SessionParams(PLAN, SESSION, threshold, colluders, {})


def test_too_small_a_federation(five: Federation) -> None:
    with pytest.raises(PrivacyError, match="With 2 sites the threshold must be 2 to 2"):
        with_joins(five, five.cohort.joins[:2])
    with pytest.raises(PrivacyError, match="With 1 sites no threshold does"):
        with_joins(five, five.cohort.joins[:1])


def test_too_few_participants(five: Federation) -> None:
    dealt = five.share(1)
    request = five.masked_input_request(1, {name: dealt[name] for name in (A, B)}, A)
    with pytest.raises(PrivacyError, match="2 participants, expected at least the threshold of 3"):
        five.members[A].mask(request, TASK, np.zeros(4, np.uint32))


def test_a_site_whose_identity_is_not_the_one_on_its_roster(five: Federation) -> None:
    with pytest.raises(ConfigError, match="Renew the roster"):
        secagg.Participant(five.params, A, five.identities[B])


# ---- replay ----------------------------------------------------------------------------------------------------------


def test_shares_of_an_earlier_round(five: Federation) -> None:
    old = five.share(1)
    new = five.share(2)
    mixed = five.masked_input_request(2, {**new, B: old[B]}, A)
    with pytest.raises(MessageError, match=f"{B}.*not for round 2"):
        five.members[A].mask(mixed, TASK, np.zeros(4, np.uint32))
    with pytest.raises(MessageError, match="another session, round"):
        secagg.check_key_shares(five.cohort, 2, old[B])


def test_sealed_shares_of_an_earlier_round(five: Federation) -> None:
    old, new = five.share(1), five.share(2)
    payload = five.masked_input_request(1, old, A).payload
    with pytest.raises(MessageError, match=f"{B}.*cannot be used"):
        five.members[A].mask(
            five.masked_input_request(2, new, A).model_copy(update={"payload": payload}), TASK, np.zeros(4, np.uint32)
        )


def test_a_round_cannot_be_dealt_again(five: Federation) -> None:
    """Only one that nothing was masked with, to other sites: then what was dealt before opens nothing any more."""
    vectors = vectors_of(five)
    five.share(1)
    dealt = five.share(5)
    for number in (1, 4):
        with pytest.raises(PrivacyError, match="shares a round's secrets once"):
            five.members[A].share(five.share_request(number))
    assert five.members[A].share(five.share_request(5)) == five.share(5)[A]
    fewer = five.share_request(5).model_copy(update={"joins": five.cohort.joins[:4]})
    again = five.members[A].share(fewer)
    back = five.members[A].share(five.share_request(5))
    assert len({back.payload, again.payload, dealt[A].payload}) == 3
    assert back.dealing.commitment != dealt[A].dealing.commitment, "new secrets, and so new keys to seal them with"
    five.members[A].share(fewer)
    assert again.dealing.key != dealt[A].dealing.key
    assert again.dealing.commitment != dealt[A].dealing.commitment
    with pytest.raises(MessageError, match="other advertised keys"):
        five.members[A].mask(five.masked_input_request(5, dealt, A), TASK, vectors[A])
    five.members[B].mask(five.masked_input_request(5, dealt, B), TASK, vectors[B])
    with pytest.raises(PrivacyError, match="shares a round's secrets once"):
        five.members[B].share(fewer)


def test_no_key_seals_twice(five: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server may have a round dealt to one list, another, and the first again: a keystream used twice would show
    its plaintexts' difference, and with enough of them the secrets themselves."""
    keys: list[bytes] = []
    seal = primitives.seal_once

    def noting(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
        keys.append(key)
        return seal(key, plaintext, associated)

    monkeypatch.setattr(primitives, "seal_once", noting)
    whole = five.share_request(1)
    fewer = whole.model_copy(update={"joins": five.cohort.joins[:4]})
    for _ in range(5):
        for request in (whole, fewer):
            five.members[A].share(request)
    assert len(keys) == 5 * (4 + 3)
    assert len(set(keys)) == len(keys)


def test_requests_of_a_round_that_is_over(five: Federation) -> None:
    vectors, dealt = vectors_of(five), five.share(1)
    uploads = five.mask(1, dealt, vectors)
    claim = five.claim(1, dealt, uploads)
    five.share(2)
    five.share(3)
    with pytest.raises(PrivacyError, match="the round is over"):
        five.members[A].unmask(claim)


@pytest.mark.parametrize("other", [{"session": "c3" * 32}, {"plan": "c3" * 32}, {"threshold": 4}])
def test_messages_of_another_session_plan_or_threshold(five: Federation, other: dict[str, object]) -> None:
    elsewhere = Federation(5, **{"threshold": 3, **other})  # type: ignore[arg-type]
    with pytest.raises(MessageError, match="another plan, session or threshold"):
        five.members[A].share(elsewhere.share_request(1))
    replayed = elsewhere.cohort.joins[1]
    with pytest.raises(MessageError, match=f"{B}.*another plan or session"):
        with_joins(five, replace(five.cohort.joins, replayed))
    dealt = five.share(1)
    foreign = elsewhere.share(1)
    with pytest.raises(MessageError, match="another plan"):
        five.members[A].mask(elsewhere.masked_input_request(1, foreign, A), TASK, np.zeros(4, np.uint32))
    dressed = five.masked_input_request(1, {**dealt, B: foreign[B]}, A)
    with pytest.raises(MessageError, match=f"{B}.*not its own"):
        five.members[A].mask(dressed, TASK, np.zeros(4, np.uint32))


def test_two_lists_of_joins(five: Federation) -> None:
    """Some sites see all five, the others four: what one group deals, the other does not accept."""
    fewer = five.cohort.joins[:4]
    for site in (A, B):
        with_joins(five, fewer, site)
    dealt = {site: five.members[site].share(five.share_request(1)) for site in (C, D, E)}
    small = secagg.make_cohort(five.params, fewer)
    theirs = {
        site: five.members[site].share(five.share_request(1).model_copy(update={"joins": fewer})) for site in (A, B)
    }
    with pytest.raises(MessageError, match="other advertised keys"):
        five.members[C].mask(
            secagg.masked_input_request(small, 1, {**theirs, C: dealt[C]}, C), TASK, np.zeros(4, np.uint32)
        )
    with pytest.raises(MessageError, match=f"{A}.*not its own"):
        five.members[C].mask(five.masked_input_request(1, {**dealt, A: theirs[A]}, C), TASK, np.zeros(4, np.uint32))


# ---- sealed shares and uploads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("byte", [0, 31, 32, 63, 64, session.SEALED - 1])
def test_a_tampered_sealed_share(five: Federation, byte: int) -> None:
    dealt = five.share(1)
    request = five.masked_input_request(1, dealt, A)
    payload = bytearray(request.payload)
    payload[session.SEALED + byte] ^= 1  # the second peer's
    vector = np.zeros(DIMENSION, np.uint32)
    with pytest.raises(MessageError, match=f"{C}.*Leave that site out"):
        five.members[A].mask(request.model_copy(update={"payload": bytes(payload)}), TASK, vector)
    del dealt[C]  # nothing was released: the round goes on without that site
    assert five.members[A].mask(five.masked_input_request(1, dealt, A), TASK, vector)


def test_sealed_shares_exchanged_between_sites(five: Federation) -> None:
    dealt = five.share(1)
    payload = five.masked_input_request(1, dealt, B).payload  # sealed to B, given to A
    with pytest.raises(MessageError, match="cannot be used"):
        five.members[A].mask(
            five.masked_input_request(1, dealt, A).model_copy(update={"payload": payload}), TASK, np.zeros(4, np.uint32)
        )
    for wrong in (payload[:-1], payload + b"0", b""):
        with pytest.raises(MessageError, match="bytes of sealed shares"):
            five.members[A].mask(
                five.masked_input_request(1, dealt, A).model_copy(update={"payload": wrong}),
                TASK,
                np.zeros(4, np.uint32),
            )


def test_a_masked_upload_of_another_length(five: Federation) -> None:
    dealt = five.share(1)
    uploads = five.mask(1, dealt, vectors_of(five))
    for payload in (uploads[B].payload[:-4], uploads[B].payload + bytes(4), uploads[B].payload[:-1], b""):
        spoiled = uploads[B].model_copy(update={"payload": payload})
        with pytest.raises(MessageError, match=f"{B}.*expected {4 * DIMENSION}"):
            secagg.MaskedSum(five.cohort, 1, DIMENSION).add(spoiled)
    with pytest.raises(MessageError, match="another session, round"):
        secagg.MaskedSum(five.cohort, 2, DIMENSION).add(uploads[B])


def test_a_second_upload_of_a_site_is_in_no_sum(five: Federation) -> None:
    uploads = five.mask(1, five.share(1), vectors_of(five))
    total = five.added(1, uploads)
    before = total.total_d.copy()
    with pytest.raises(MessageError, match=f"{B}.*twice in round 1"):
        total.add(uploads[B])
    assert np.array_equal(total.total_d, before)


# ---- repeated requests -----------------------------------------------------------------------------------------------


def test_another_vector_or_other_participants_in_one_round(five: Federation) -> None:
    vectors, dealt = vectors_of(five), five.share(1)
    request = five.masked_input_request(1, dealt, A)
    five.members[A].mask(request, TASK, vectors[A])
    with pytest.raises(PrivacyError, match="A round has one upload"):
        five.members[A].mask(request, TASK, vectors[A] + np.uint32(1))
    fewer = five.masked_input_request(1, {name: dealt[name] for name in (A, B, C)}, A)
    with pytest.raises(PrivacyError, match="A round has one upload"):
        five.members[A].mask(fewer, TASK, vectors[A])


# ---- lists of survivors ----------------------------------------------------------------------------------------------


def uploaded(federation: Federation, gone: tuple[str, ...] = ()):  # type: ignore[no-untyped-def]
    """Play a round up to the uploads; return what the server has then."""
    vectors = {site: vector for site, vector in vectors_of(federation).items() if site not in gone}
    dealt = federation.share(1)
    return dealt, federation.mask(1, dealt, vectors), vectors


@pytest.mark.parametrize(
    ("survivors", "dropped", "error", "text"),
    [
        ((A, B, C, D), (D, E), MessageError, "each once"),  # in both lists
        ((A, B, C), (E,), MessageError, "each once"),  # one in neither
        ((A, B, C, D, E), ("지점-999",), MessageError, "each once"),
        ((A, B, C, D, "지점-999"), (E,), MessageError, "each once"),
        ((A, A, B, C, D), (E,), MessageError, "each once"),
        ((B, A, C, D), (E,), MessageError, "by name"),
        ((A, B), (C, D, E), PrivacyError, "2 survivors, expected at least the threshold of 3"),
        ((), (A, B, C, D, E), PrivacyError, "0 survivors"),
        ((B, C, D, E), (A,), PrivacyError, "said to have dropped out, yet is asked"),
    ],
)
def test_lists_that_no_site_answers(
    five: Federation, survivors: tuple[str, ...], dropped: tuple[str, ...], error: type[FedllmError], text: str
) -> None:
    dealt, _, _ = uploaded(five)
    claim = five.claim(1, dealt, dealt).model_copy(update={"survivors": survivors, "dropped": dropped})
    with pytest.raises(error, match=text):
        five.members[A].unmask(claim)
    assert isinstance(five.members[A].unmask(five.claim(1, dealt, dealt)), UnmaskingShares)  # nothing was used up


def test_two_different_lists_to_one_site(five: Federation) -> None:
    dealt, _, _ = uploaded(five)
    five.members[A].unmask(five.claim(1, dealt, (A, B, C, D)))
    for other in ((A, B, C), (A, B, C, D, E)):
        with pytest.raises(PrivacyError, match="two lists of survivors"):
            five.members[A].unmask(five.claim(1, dealt, other))


@pytest.mark.parametrize("n", [4, 5, 6, 7])
def test_split_view_gets_no_proof_for_either_list(n: int) -> None:
    """The server shows one list to some sites and another to the rest, in every division of the sites."""
    for first_group in range(1, n):
        federation = Federation(n)
        dealt, _, _ = uploaded(federation)
        sites = list(federation.members)
        lists = [federation.claim(1, dealt, sites[:-1]), federation.claim(1, dealt, sites)]
        signed = federation.consents(lists[0], sites[:-1][:first_group])
        fast = [federation.members[s].unmask(lists[1]) for s in sites if s not in sites[:-1][:first_group]]
        seeds = len(fast) >= federation.params.threshold
        proof = secagg.unmasking_request(lists[0], signed)
        keys = 0
        for site in sites[:-1][:first_group]:
            try:
                federation.members[site].reveal(proof)
                keys += 1
            except PrivacyError:
                continue
        assert not (seeds and keys >= federation.params.threshold)


def test_signatures_for_another_list_prove_nothing(five: Federation) -> None:
    dealt, _, _ = uploaded(five)
    first, second = five.claim(1, dealt, (A, B, C, D)), five.claim(1, dealt, (A, B, C))
    mine, theirs = five.consents(first, [A]), five.consents(second, [B, C])
    with pytest.raises(MessageError, match=f"{B}.*not on this list"):
        five.members[A].reveal(secagg.unmasking_request(first, mine + theirs))


def test_signatures_that_do_not_count(five: Federation) -> None:
    dealt, uploads, _ = uploaded(five, gone=(E,))
    claim = five.claim(1, dealt, uploads)
    a, b, c, _ = five.consents(claim, [A, B, C, D])
    document = session.survivors_document(five.cohort, claim)

    def request(*consents: object):  # type: ignore[no-untyped-def]
        return secagg.unmasking_request(claim, (a, b)).model_copy(
            update={"consents": (a.consent, b.consent, *consents)}
        )

    cases: list[tuple[object, type[FedllmError], str]] = [
        (b.consent, MessageError, "twice"),
        (c.consent.model_copy(update={"site": D}), MessageError, f"{D}.*not on this list"),
        (c.consent.model_copy(update={"site": E}), MessageError, "not a survivor"),
        (
            c.consent.model_copy(update={"signature": identity_of("outsider").sign(document).hex()}),
            MessageError,
            f"{C}.*not on this list",
        ),
    ]
    for consent, error, text in cases:
        with pytest.raises(error, match=text):
            five.members[A].reveal(request(consent))
    with pytest.raises(PrivacyError, match="2 survivors signed the list, expected at least 3"):
        five.members[A].reveal(request())
    assert five.members[A].reveal(request(c.consent))


def test_reveal_before_upload_or_before_a_signature(five: Federation) -> None:
    dealt = five.share(1)
    claim = five.claim(1, dealt, (A, B, C, D))
    with pytest.raises(PrivacyError, match="has not uploaded, so it reveals nothing"):
        five.members[A].unmask(five.claim(1, dealt, dealt))
    five.mask(1, dealt, vectors_of(five))
    others = five.consents(claim, [B, C, D])
    with pytest.raises(PrivacyError, match="has signed no list"):
        five.members[A].reveal(secagg.unmasking_request(claim, others))


# ---- both secrets of one peer ----------------------------------------------------------------------------------------


def test_both_shares_of_one_peer_in_every_order() -> None:
    """Fast path, and dropout paths with different peers dropped, in all orders: one answer is all there is."""
    everybody, without_e, without_d = (A, B, C, D, E), (A, B, C, D), (A, B, C, E)
    for order in itertools.permutations([everybody, without_e, without_d]):
        federation = Federation(5, 3)
        dealt, _, _ = uploaded(federation)
        member, answers, reveals = federation.members[A], 0, 0
        for survivors in order:
            claim = federation.claim(1, dealt, survivors)
            document = session.survivors_document(federation.cohort, claim)
            signed = tuple(
                Signed(site=site, signature=federation.identities[site].sign(document).hex())
                for site in claim.survivors
            )  # as if all others were colluding
            proof = secagg.unmasking_request(claim, ()).model_copy(update={"consents": signed})
            steps: list[Callable[[], object]] = [partial(member.unmask, claim), partial(member.reveal, proof)]
            for step in steps:
                try:
                    answer = step()
                except FedllmError:
                    continue
                answers += 1
                reveals += isinstance(answer, UnmaskingShares)
        assert reveals == 1
        assert answers == (1 if order[0] == everybody else 2)


def test_fast_path_while_somebody_dropped_out(five: Federation) -> None:
    """The server lies that all uploaded. It gets seeds, cannot read the sum, and cannot ask again."""
    dealt, uploads, vectors = uploaded(five, gone=(E,))
    lie = five.claim(1, dealt, dealt)
    reveals = five.reveals(lie, (), [A, B, C, D])
    with pytest.raises(FederationError, match="uploads and survivors differ"):
        secagg.unmask(five.cohort, dealt, lie, five.added(1, uploads), reveals)
    honest = five.claim(1, dealt, uploads)
    for site in (A, B, C, D):
        with pytest.raises(PrivacyError, match="two lists of survivors"):
            five.members[site].unmask(honest)
    seen = total({site: np.frombuffer(m.payload, "<u4") for site, m in uploads.items()})
    for site in uploads:  # all that it can take off
        seed = five.members[site]._rounds[1].seed
        masking.add_mask(
            seen, masking.self_mask_key(five.cohort, 1, five.members[site]._rounds[1].common, site, seed), -1
        )
    assert (seen != total(vectors)).all()  # E's pairwise masks are still there


def test_surplus_noise_fetched_with_one_list_and_the_sum_read_with_another() -> None:
    """The server and H tell A that all are there, the others that G dropped out. What stays is what was promised."""
    federation = Federation(8, 6, 1)
    distributed = DistributedMechanism(Mechanism(1.0, 1.0, 0.1), 8, 6, 1, 10.0)
    given: dict[str, tuple[int, ...]] = {}

    def surplus(site: str, survivors: int) -> tuple[str, ...]:
        assert site not in given, "once a round"
        given[site] = distributed.revealed_seeds(survivors)
        return tuple(f"{k:064x}" for k in given[site])

    *honest, dropped, colluder = names(8)
    dealt = federation.share(1)
    vectors = vectors_of(federation)
    uploads = {}
    for site in federation.members:
        request = federation.masked_input_request(1, dealt, site)
        uploads[site] = federation.members[site].mask(request, TASK, vectors[site], partial(surplus, site))
    everybody = federation.claim(1, dealt, dealt)
    without = federation.claim(1, dealt, [*honest, colluder])
    first = federation.members[honest[0]].unmask(everybody)
    assert isinstance(first, UnmaskingShares)
    assert len(first.surplus) == 2
    with pytest.raises(PrivacyError, match="two lists"):
        federation.members[honest[0]].unmask(without)
    signers = [*honest[1:], colluder]
    reveals = federation.reveals(without, signers, signers)
    del uploads[dropped]
    read = secagg.unmask(federation.cohort, dealt, without, federation.added(without.round, uploads), reveals).total_d
    assert np.array_equal(read, total({site: vectors[site] for site in uploads})), "the sum can be read"
    units = sum(sum(distributed._parts) - sum(distributed._parts[1 + k] for k in given[site]) for site in honest)
    assert units == (8 - 1) * (6 - 1), "with the mechanism's variance, to the unit"


def test_different_participants_to_different_sites(five: Federation) -> None:
    """Pairwise masks then do not cancel: all seeds together do not open any sum; and no list finds a threshold of
    sites that answer it, which is what it takes to open the pairwise masks of those it calls dropped."""
    dealt = five.share(1)
    vectors = vectors_of(five)
    views = {A: (A, B, C), B: (A, B, C, D), C: (A, B, C, E), D: (B, C, D), E: (A, C, E)}
    opened = {}
    for site, view in views.items():
        request = five.masked_input_request(1, {name: dealt[name] for name in view}, site)
        opened[site] = np.frombuffer(five.members[site].mask(request, TASK, vectors[site]).payload, "<u4").copy()
        seed = five.members[site]._rounds[1].seed
        masking.add_mask(
            opened[site], masking.self_mask_key(five.cohort, 1, five.members[site]._rounds[1].common, site, seed), -1
        )
    for size in range(1, 6):
        for chosen in itertools.combinations(views, size):
            seen = total({site: opened[site] for site in chosen})
            assert (seen != total({site: vectors[site] for site in chosen})).any()
    for view in views.values():
        for survivors in itertools.chain.from_iterable(
            itertools.combinations(view, n) for n in range(1, len(view) + 1)
        ):
            for site in views.keys() - {name for name, own in views.items() if own == view}:
                with pytest.raises((MessageError, PrivacyError)):
                    five.members[site].unmask(five.claim(1, view, survivors))


# ---- what the server itself has to notice ---------------------------------------------------------------------------


def test_answers_that_do_not_belong_to_the_round(five: Federation) -> None:
    dealt, uploads, _ = uploaded(five)
    claim = five.claim(1, dealt, uploads)
    reveals = five.reveals(claim, (), list(uploads))
    first, *rest = reveals
    spoiled: list[tuple[list[UnmaskingShares], str]] = [
        ([first, first, *rest], "reveals twice"),
        ([first.model_copy(update={"payload": first.payload[:-1]}), *rest], f"{A}.*expected 160"),
        ([first.model_copy(update={"claim": "0" * 64}), *rest], f"{A}.*another list"),
        ([first.model_copy(update={"round": 2}), *rest], f"{A}.*another session, round"),
        ([first.model_copy(update={"site": "지점-999"}), *rest], "지점-999.*has not joined"),
    ]
    for answers, text in spoiled:
        with pytest.raises(MessageError, match=text):
            secagg.unmask(five.cohort, dealt, claim, five.added(1, uploads), answers)
    with pytest.raises(QuorumLost, match="2 sites revealed their shares, expected at least 3"):
        secagg.unmask(five.cohort, dealt, claim, five.added(1, uploads), reveals[:2])


def test_shares_that_the_server_refuses(five: Federation) -> None:
    shares = five.share(1)[B]
    for wrong, text in (
        (shares.model_copy(update={"payload": shares.payload[:-1]}), f"{B}.*bytes of sealed shares"),
        (shares.model_copy(update={"joins": "0" * 64}), f"{B}.*list of keys"),
        (shares.model_copy(update={"dealing": shares.dealing.model_copy(update={"site": C})}), f"{C}.*not its own"),
    ):
        with pytest.raises(MessageError, match=text):
            secagg.check_key_shares(five.cohort, 1, wrong)
