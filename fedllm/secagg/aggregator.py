"""The server's part in secure aggregation: its requests, the checks of what sites answer, and the unmasked sum."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedllm.crypto import shamir
from fedllm.crypto.primitives import AgreementKey
from fedllm.errors import CryptoError, FederationError, MessageError, QuorumLost
from fedllm.protocol.messages import (
    ConsistencyCheck,
    ConsistencySignature,
    KeyShares,
    MaskedInput,
    MaskedInputRequest,
    SignedMaskKey,
    UnmaskingRequest,
    UnmaskingShares,
)
from fedllm.secagg.masking import WORD, add_mask, mask_sign, pair_mask_key, seed_commitment, self_mask_key
from fedllm.secagg.session import (
    SEALED,
    Cohort,
    Vector,
    check_key,
    check_mask_key,
    check_survivor_list,
    survivors_digest,
)


def check_key_shares(cohort: Cohort, number: int, shares: KeyShares) -> None:
    """Raise MessageError unless these are a site's shares for this round of this cohort."""
    _expect(cohort, number, shares, shares.dealing.site)
    check_mask_key(cohort, number, shares.dealing)
    check_key(shares.dealing.site, shares.dealing.key)
    expected = SEALED * (len(cohort.names) - 1)
    if len(shares.payload) != expected:
        raise MessageError(
            f"site={shares.dealing.site!r} sent {len(shares.payload)} bytes of sealed shares, expected {expected}"
        )


def masked_input_request(cohort: Cohort, number: int, dealt: Mapping[str, KeyShares], site: str) -> MaskedInputRequest:
    """Return the shares and signed mask keys that one site needs (`dealt`: checked, by participant): O(n) bytes."""
    names = sorted(dealt)
    return MaskedInputRequest(
        context=cohort.params.context, round=number, joins=cohort.digest,
        dealings=tuple(dealt[name].dealing for name in names), payload=_sealed_for(cohort, dealt, names, site),
    )  # fmt: skip


class MaskedInputRequests(Mapping[str, bytes]):
    """Every participant's request as bytes, made when it is looked up: all at once they are O(n^2).

    All but the payload is the same, and written once.
    """

    def __init__(self, cohort: Cohort, number: int, dealt: Mapping[str, KeyShares]) -> None:
        """`dealt` holds the participants, checked."""
        self._cohort, self._dealt, self._names, self._frame = cohort, dealt, sorted(dealt), b""
        if self._names:
            first = masked_input_request(cohort, number, dealt, self._names[0])
            self._frame = first.model_copy(update={"payload": b""}).to_bytes()

    def __getitem__(self, site: str) -> bytes:
        if site not in self._dealt:
            raise KeyError(site)
        return self._frame + _sealed_for(self._cohort, self._dealt, self._names, site)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _sealed_for(cohort: Cohort, dealt: Mapping[str, KeyShares], names: Sequence[str], site: str) -> bytes:
    return b"".join(_sealed_to(cohort, dealt[name], site) for name in names if name != site)


def _sealed_to(cohort: Cohort, shares: KeyShares, site: str) -> bytes:
    index = cohort.place[site] - 1 - (cohort.place[site] > cohort.place[shares.dealing.site])
    return shares.payload[SEALED * index : SEALED * (index + 1)]


def consistency_check(
    cohort: Cohort, number: int, common: str, participants: Iterable[str], survivors: Collection[str]
) -> ConsistencyCheck:
    """Return the round's list of survivors for a `common_digest`; `check_survivor_list` says if they are enough."""
    names = sorted(participants)
    return ConsistencyCheck(
        context=cohort.params.context, round=number, joins=cohort.digest, common=common,
        survivors=tuple(name for name in names if name in survivors),
        dropped=tuple(name for name in names if name not in survivors),
    )  # fmt: skip


def unmasking_request(survivor_list: ConsistencyCheck, consents: Iterable[ConsistencySignature]) -> UnmaskingRequest:
    """Return the proof that enough survivors signed the same list."""
    signed = tuple(consent.consent for consent in consents)
    return UnmaskingRequest(
        context=survivor_list.context, round=survivor_list.round, joins=survivor_list.joins, consents=signed
    )


class MaskedSum:
    """The uploads of a round, added up as they come: their sum is all that is kept of them."""

    def __init__(self, cohort: Cohort, number: int, dimension: int) -> None:
        self._cohort, self._number = cohort, number
        self.sites: set[str] = set()  # whose uploads are in it
        self.total_d: Vector = np.zeros(dimension, WORD)  # mod 2^32, still masked

    def add(self, masked: MaskedInput) -> None:
        """Add an upload; raises MessageError. A site whose upload is refused has dropped out."""
        _expect(self._cohort, self._number, masked, masked.site)
        if len(masked.payload) != self.total_d.nbytes:
            raise MessageError(
                f"site={masked.site!r} uploaded {len(masked.payload)} bytes, expected {self.total_d.nbytes}"
            )
        if masked.site in self.sites:
            raise MessageError(f"site={masked.site!r} uploaded twice in round {self._number}")
        self.total_d += np.frombuffer(masked.payload, WORD)
        self.sites.add(masked.site)


def check_unmasking_shares(cohort: Cohort, survivor_list: ConsistencyCheck, reveal: UnmaskingShares) -> None:
    """Raise MessageError unless a survivor answers this list with a share for every participant."""
    _expect(cohort, survivor_list.round, reveal, reveal.site)
    expected = shamir.SHARE * (len(survivor_list.survivors) + len(survivor_list.dropped))
    if reveal.site not in survivor_list.survivors or reveal.claim != survivors_digest(cohort, survivor_list):
        raise MessageError(f"round {survivor_list.round}: site={reveal.site!r} reveals for another list of survivors")
    if len(reveal.payload) != expected:
        raise MessageError(f"site={reveal.site!r} reveals {len(reveal.payload)} bytes, expected {expected}")


def _expect(cohort: Cohort, number: int, message: KeyShares | MaskedInput | UnmaskingShares, site: str) -> None:
    if (message.context, message.round, message.joins) != (cohort.params.context, number, cohort.digest):
        raise MessageError(f"site={site!r} answers for another session, round or list of keys than round {number}")
    if site not in cohort.place:
        raise MessageError(f"site={site!r} has not joined")


@dataclass(frozen=True)
class Unmasked:
    """The sum of the survivors' vectors, and shares that did not fit."""

    total_d: Vector  # uint32[d], mod 2^32
    doubtful: tuple[tuple[str, str], ...]  # (holder, dealer): one of the two made a wrong share; the sum is right
    participants: int  # that dealt

    @property
    def liars(self) -> tuple[str, ...]:
        """The holders whose shares are wrong for more than half of those who dealt.

        One wrong share does not tell who made it: a dealer can hand an honest holder a wrong one. To have an honest
        holder named here takes more than half of all who dealt, and these could as well end every round.
        """
        found = Counter(holder for holder, _ in self.doubtful)
        return tuple(sorted(holder for holder, many in found.items() if 2 * many > self.participants))


def unmask(
    cohort: Cohort,
    dealt: Mapping[str, KeyShares],
    survivor_list: ConsistencyCheck,
    uploads: MaskedSum,
    reveals: Sequence[UnmaskingShares],
) -> Unmasked:
    """Return the sum of the survivors' vectors from what the sites sent.

    `dealt` holds the participants, `uploads` the sum of the survivors' and no other's. Raises MessageError on an answer
    that does not belong here (see the `check_` functions, which take answers one by one), QuorumLost on fewer than t
    reveals, and FederationError if a secret cannot be reconstructed.
    """
    threshold, number, common = cohort.params.threshold, survivor_list.round, survivor_list.common
    check_survivor_list(cohort.params, survivor_list, dealt)
    if uploads.sites != set(survivor_list.survivors):
        raise FederationError(f"round {number}: uploads and survivors differ. Only sites that uploaded can survive.")
    answers = {reveal.site: reveal for reveal in reveals}
    if len(answers) != len(reveals):
        raise MessageError(f"round {number}: a site reveals twice")
    for reveal in reveals:
        check_unmasking_shares(cohort, survivor_list, reveal)
    if len(answers) < threshold:
        raise QuorumLost(
            f"round {number}: {len(answers)} sites revealed their shares, expected at least {threshold}. The sum "
            "cannot be read; the round is lost, and what the sites have spent on it stands."
        )
    holders = tuple(sorted(answers, key=cohort.place.__getitem__))
    search = _Search(cohort, holders)
    survivors = set(survivor_list.survivors)
    doubtful: list[tuple[str, str]] = []
    total_d = uploads.total_d.copy()
    for index, dealer in enumerate(sorted(dealt)):
        mask_key = dealt[dealer].dealing
        shares = [_share_at(answers[holder], index) for holder in holders]
        if dealer in survivors:
            seed, wrong = search.recover(shares, dealer, _seed_check(cohort, number, mask_key))
            add_mask(total_d, self_mask_key(cohort, number, common, dealer, seed), -1)
        else:
            scalar, wrong = search.recover(shares, dealer, _scalar_check(mask_key))
            key = AgreementKey.from_scalar(scalar)
            for site in survivor_list.survivors:
                pair = pair_mask_key(cohort, number, common, dealer, key, dealt[site].dealing)
                add_mask(total_d, pair, -mask_sign(cohort, site, dealer))
        doubtful += [(holder, dealer) for holder in wrong]
    return Unmasked(total_d, tuple(doubtful), len(dealt))


def _share_at(reveal: UnmaskingShares, index: int) -> int:
    return int.from_bytes(reveal.payload[shamir.SHARE * index : shamir.SHARE * (index + 1)], "big")


def _seed_check(cohort: Cohort, number: int, mask_key: SignedMaskKey) -> Callable[[int], bool]:
    expected = bytes.fromhex(mask_key.commitment)
    return lambda seed: seed_commitment(cohort, number, mask_key.site, seed) == expected


def _scalar_check(mask_key: SignedMaskKey) -> Callable[[int], bool]:
    expected = bytes.fromhex(mask_key.key)

    def fits(scalar: int) -> bool:
        try:
            return AgreementKey.from_scalar(scalar).public == expected
        except CryptoError:
            return False

    return fits


class _Search:
    """Finds t right shares of one dealer's secret after another.

    A secret can be checked against what its dealer signed, so any t right shares do. They are looked for in runs of t
    neighbours around the circle of holders: with one wrong share among t + 1 or more, one such run is without it. The
    run that fitted last is tried first, so that whoever gives wrong shares of many dealers' secrets costs one search.
    """

    def __init__(self, cohort: Cohort, holders: tuple[str, ...]) -> None:
        """`holders` are those who revealed their shares, t at least, by their places."""
        self._holders, self._threshold = holders, cohort.params.threshold
        self._points = [cohort.place[holder] for holder in holders]
        many, spare = len(holders), len(holders) - self._threshold
        # what these runs leave out lies side by side, so the first few are enough for one wrong share
        self._runs = list(dict.fromkeys([*range(0, many, spare), *range(many)])) if spare else [0]
        self._wrong_before: set[int] = set()

    def recover(self, shares: list[int], dealer: str, right: Callable[[int], bool]) -> tuple[int, list[str]]:
        """Return a dealer's secret, and the holders whose shares are not on its polynomial.

        Where the first run fits, only those are looked at whose share of another secret was wrong.
        """
        many = len(shares)
        for tried, first in enumerate(self._runs):
            chosen = [(first + k) % many for k in range(self._threshold)]
            at, values = tuple(self._points[k] for k in chosen), [shares[k] for k in chosen]
            weights = shamir.weights(at)
            secret = shamir.combine(weights, values)
            if not right(secret):
                continue
            self._runs.insert(0, self._runs.pop(tried))
            doubted = (set(range(many)) if tried else self._wrong_before) - set(chosen)
            wrong = [k for k in sorted(doubted) if shamir.share_at(self._points[k], at, weights, values) != shares[k]]
            self._wrong_before.update(wrong)
            return secret, [self._holders[k] for k in wrong]
        raise FederationError(
            f"the secret that site={dealer!r} shared cannot be reconstructed from the shares of "
            f"{', '.join(self._holders)}: that site sent wrong shares, or one of the others gave one back. The round "
            "is lost; leave it out of the next."
        )
