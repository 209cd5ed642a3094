"""What all parties of a secure aggregation agree on: parameters, the cohort with its keys, and what is signed."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from fedllm.crypto import primitives, shamir
from fedllm.crypto.identity import PublicIdentity
from fedllm.errors import ConfigError, CryptoError, MessageError, PrivacyError
from fedllm.plan import least_quorum
from fedllm.protocol.messages import AdvertisedKey, ConsistencyCheck, Signed, SignedMaskKey
from fedllm.values import MAX_HOLDERS

SEALED = 2 * shamir.SHARE + 16  # bytes: a share of the seed, one of the mask key, and the tag
_DOMAIN = b"fedllm secure aggregation v2"  # v1 had no `common_digest`
Vector = NDArray[np.uint32]
RevealedSeeds = Callable[[int], tuple[str, ...]]  # number of survivors -> seeds that a site reveals beside shares


@dataclass(frozen=True)
class SessionParams:
    """What a site accepts before it takes part. The roster is the site's own: the server cannot add to it."""

    plan: str  # digest of the run's plan, 64 hexadecimal digits
    session: str  # nonce of this start of the run, 64 hexadecimal digits
    threshold: int  # t: shares that give a secret, and fewest survivors of a round
    colluders: int  # c: sites that may collude with the server and with each other
    roster: Mapping[str, PublicIdentity]
    sites: int = MAX_HOLDERS  # n: the most that may hold shares, by the plan

    def __post_init__(self) -> None:
        if not (_is_digest(self.plan) and _is_digest(self.session)):
            raise ConfigError("secure aggregation: plan and session are 64 hexadecimal digits each")
        if self.colluders < 0 or self.threshold - self.colluders < 2:
            raise PrivacyError(
                f"secagg.threshold={self.threshold} with colluders={self.colluders}: at least 2 honest sites must be "
                "in every sum, otherwise it shows one site's update. Raise the threshold."
            )
        if len({identity.signing for identity in self.roster.values()}) < len(self.roster):
            raise PrivacyError("the roster has one identity under two names: the holder of its key would count as two")

    @cached_property
    def context(self) -> str:
        """Digest that every message, key and signature carries."""
        return digest_of_document(_document("terms", self.plan, self.session, self.threshold, self.colluders))

    def check_size(self, holders: int) -> None:
        """Raise PrivacyError unless the threshold, of `holders` sites, leaves no room for two contradictory lists."""
        most = min(self.sites, MAX_HOLDERS)
        if holders > most:
            raise PrivacyError(f"secure aggregation takes {most} sites at most in this session, found {holders}")
        if not (self.threshold <= holders and 2 * self.threshold > holders + self.colluders):
            raise PrivacyError(
                f"secagg.threshold={self.threshold} for {holders} sites of which {self.colluders} may collude: "
                f"expected threshold <= sites and 2 * threshold > sites + colluders. {self.advice(holders)}"
            )

    def advice(self, holders: int) -> str:
        """Say which thresholds would do."""
        least = least_quorum(holders, self.colluders)
        if least > holders:
            return f"With {holders} sites no threshold does: more sites are needed."
        return f"With {holders} sites the threshold must be {least} to {holders}."


@dataclass(frozen=True)
class Cohort:
    """The sites that share secrets with one another, by their keys, whose signatures `make_cohort` has checked."""

    params: SessionParams
    joins: tuple[AdvertisedKey, ...]  # by name

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Sites by name; a site's place here, from 1, is where Shamir's polynomials are evaluated for it."""
        return tuple(entry.site for entry in self.joins)

    @cached_property
    def place(self) -> dict[str, int]:
        """Number of each site, from 1."""
        return {name: number for number, name in enumerate(self.names, 1)}

    @cached_property
    def digest(self) -> str:
        """Digest of names, identities and share keys: a site that sees another list makes other keys and signatures."""
        parts = ((entry.site, self.params.roster[entry.site].to_text(), entry.key) for entry in self.joins)
        return digest_of_document(_document("joins", self.params.context, *(part for row in parts for part in row)))

    def document(self, label: str, number: int, *parts: str | bytes | int) -> bytes:
        """Return bytes for one purpose in one round of this cohort."""
        return _document(label, self.params.context, self.digest, number, *parts)


# by all that they hold: what is checked for one site of a process is for its others (a simulation has a thousand)
_made: WeakValueDictionary[str, Cohort] = WeakValueDictionary()


def check_advertised_key(params: SessionParams, entry: AdvertisedKey) -> None:
    """Raise MessageError unless a site of the roster signed this key, a usable one, for this session."""
    _check_signed_key(params, entry)
    check_key(entry.site, entry.key)


def _check_signed_key(params: SessionParams, entry: AdvertisedKey) -> None:
    identity = params.roster.get(entry.site)
    if identity is None:
        raise MessageError(
            f"secure aggregation: site={entry.site!r} is not on the roster. Add it there, or leave it out."
        )
    try:
        identity.verify(
            advertised_key_document(params, entry.site, bytes.fromhex(entry.key)), bytes.fromhex(entry.signature)
        )
    except CryptoError as error:
        raise MessageError(
            f"the key of site={entry.site!r} is not its own, or is for another plan or session ({error})"
        ) from None


def check_key(site: str, key: str) -> None:
    try:
        primitives.check_agreement(bytes.fromhex(key))
    except CryptoError as error:
        raise MessageError(f"site={site!r} sent {error}. Leave it out.") from None


def make_cohort(params: SessionParams, joins: Iterable[AdvertisedKey]) -> Cohort:
    """Check advertised keys, in any order; raises MessageError, and PrivacyError if the threshold does not fit."""
    ordered = tuple(sorted(joins, key=lambda entry: entry.site))
    if len({entry.site for entry in ordered}) != len(ordered) or len({entry.key for entry in ordered}) != len(ordered):
        raise MessageError("the list of advertised keys names a site or a key twice")
    params.check_size(len(ordered))
    known = digest_of_document(
        _document("cohort", params.context, params.sites, *(part for row in _named(params, ordered) for part in row))
    )
    if (made := _made.get(known)) is not None:
        return made
    for entry in ordered:
        _check_signed_key(params, entry)
    made = _made[known] = Cohort(params, ordered)
    return made


def _named(params: SessionParams, ordered: Iterable[AdvertisedKey]) -> Iterator[tuple[str, str, str, str]]:
    for entry in ordered:
        identity = params.roster.get(entry.site)
        yield entry.site, entry.key, entry.signature, identity.to_text() if identity is not None else ""


def check_mask_key(cohort: Cohort, number: int, mask_key: SignedMaskKey) -> bytes:
    """Return the document that was signed; raises MessageError unless a site of the cohort signed it for this round."""
    identity = cohort.params.roster.get(mask_key.site)
    if identity is None or mask_key.site not in cohort.place:
        raise MessageError(f"round {number}: shares of site={mask_key.site!r}, which has not joined")
    document = mask_key_document(
        cohort, number, mask_key.site, bytes.fromhex(mask_key.key), bytes.fromhex(mask_key.commitment)
    )
    try:
        _verify(identity, document, mask_key.signature)
    except CryptoError as error:
        raise MessageError(
            f"the shares of site={mask_key.site!r} are not its own, or not for round {number} of these sites ({error})"
        ) from None
    return document


@lru_cache(maxsize=4 * MAX_HOLDERS)
def _verify(identity: PublicIdentity, document: bytes, signature: str) -> None:
    """Raise CryptoError unless a party signed a document; what it signed is looked at once in a process."""
    identity.verify(document, bytes.fromhex(signature))


def survivors_digest(cohort: Cohort, request: ConsistencyCheck) -> str:
    """Return the digest of a list of survivors."""
    return digest_of_document(survivors_document(cohort, request))


def advertised_key_document(params: SessionParams, site: str, key: bytes) -> bytes:
    return _document("join", params.context, site, key)


def mask_key_document(cohort: Cohort, number: int, site: str, key: bytes, commitment: bytes) -> bytes:
    return cohort.document("dealing", number, site, key, commitment)


def survivors_document(cohort: Cohort, request: ConsistencyCheck) -> bytes:
    listed = request.survivors + request.dropped
    return cohort.document("survivors", request.round, request.common, len(request.survivors), *listed)


def _document(label: str, *parts: str | bytes | int) -> bytes:
    """Join parts so that no two lists of parts read the same."""
    result = [_DOMAIN]
    for part in (label, *parts):
        encoded = part if isinstance(part, bytes) else str(part).encode()
        result += [len(encoded).to_bytes(4, "big"), encoded]
    return b"".join(result)


def digest_of_document(document: bytes) -> str:
    return hashlib.sha256(document).hexdigest()


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def common_digest(cohort: Cohort, number: int, task: str, dealings: Iterable[SignedMaskKey]) -> str:
    """Return the digest of what is the same for all sites of a round: `task` is that of their request, 64 hex."""
    dealt = ((each.site, each.key, each.commitment, each.signature) for each in dealings)
    return digest_of_document(cohort.document("common", number, task, *(part for row in dealt for part in row)))


def check_survivor_list(params: SessionParams, request: ConsistencyCheck, participants: Collection[str]) -> None:
    """Raise MessageError or PrivacyError unless the list divides the participants and leaves enough survivors."""
    listed = [*request.survivors, *request.dropped]
    ordered = list(request.survivors) == sorted(request.survivors) and list(request.dropped) == sorted(request.dropped)
    if not ordered or len(set(listed)) != len(listed) or set(listed) != set(participants):
        raise MessageError(
            f"round {request.round}: survivors and dropped sites must be, by name, all {len(participants)} "
            "participants, each once"
        )
    if len(request.survivors) < params.threshold:
        raise PrivacyError(
            f"round {request.round}: {len(request.survivors)} survivors, expected at least the threshold of "
            f"{params.threshold}. Give the round up."
        )


def check_consistency_signature(cohort: Cohort, survivor_list: ConsistencyCheck, consent: Signed) -> None:
    """Raise MessageError unless a survivor signed this list."""
    if consent.site not in survivor_list.survivors:
        raise MessageError(f"round {survivor_list.round}: site={consent.site!r} signed, but is not a survivor")
    try:
        cohort.params.roster[consent.site].verify(
            survivors_document(cohort, survivor_list), bytes.fromhex(consent.signature)
        )
    except CryptoError:
        raise MessageError(
            f"round {survivor_list.round}: the signature of site={consent.site!r} is not on this list of survivors"
        ) from None
