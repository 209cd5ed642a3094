"""Secure aggregation: head office learns the sum of the sites' integer vectors mod 2^32, and nothing else about them.

Double masking on the complete graph after Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving
Machine Learning" (CCS 2017), figure 4 with its steps against an active adversary: head office may do anything, together
with up to c colluding sites. Steps are pure of I/O: a request goes in, an answer comes out, or a FedllmError and
nothing has changed.

**What hides a vector.** A site uploads x_i + PRG(b_i) + sum over peers j of ±PRG(k_ij). b_i is its own secret; k_ij
comes of the mask keys s_i and s_j, and cancels in the sum. Both b_i and s_i are dealt out t of n (`fedllm.shamir`).
For a site whose upload is in the sum, the others reveal shares of b_i; for one that dropped out, shares of s_i, so
that its peers' pairwise masks come off. Whoever had both would have x_i.

**Exchanges a round.** Dealing needs nothing of the round before, so `Shares` of round r+1 travel with the `Masked`
upload of round r:

    1. MaskRequest    ->  Masked (and Shares of the next round)
    2. UnmaskRequest  ->  Reveal, where nobody dropped out: two exchanges. Otherwise Consent, and
    3. RevealRequest  ->  Reveal: three exchanges.

Once a run, `Join` and the Shares of round 1 come first; both can travel with the run's preparation.

**Why mask keys of one round.** A mask key that lived for a run would be revealed by its owner's first dropout. It opens
the pairwise masks of every earlier round too, and b_i of those rounds, where the site survived, is revealed already:
head office could then read all that site's earlier uploads. So b_i and s_i are drawn for one round. The key that
shares are sealed with lives as long as the process and is never shared.

**Why one list a round.** A site answers one UnmaskRequest a round, whichever path it leads to, and for each peer that
list says which of the two shares comes out. With n holders, c of whom collude, head office can get t shares of both
secrets of a peer only if two groups of honest sites answered different lists: 2(t - c) <= n - c. Every site demands
2t > n + c, which excludes it, and t - c >= 2, so that no sum holds a single honest upload. This also covers a list
with dropouts shown to some and one without to others, different participants shown to different sites (pairwise masks
then do not cancel, or only within one group of at least t - c honest sites), and different lists of joins (nothing of
one opens anything of the other: the digest is part of every key and signature). The signatures on a list with dropouts
are for the sites: t of them prove that no other list can have enough, before the first mask key is given away.

**Why one request a round.** Head office chooses what every site computes from. If it sent one site the true adapter
and the others one at which nothing is learned, the sum would be that site's vector alone (Pasquini et al., "Eluding
Secure Aggregation in Federated Learning via Model Inconsistency", CCS 2022). So what is common to all sites of a round
(`common_digest`: the task, with plan, start values and record, and what was dealt) is part of every mask's key, of the
signatures on the list of survivors, and of what is revealed. Sites that were asked for different things are to each
other like sites with different participants: only a group of at least t, with colluders, that was asked for one and the
same can be opened, and it is summed by itself.

**Why state in memory.** Whatever a site holds for a round dies with its process: a restart is a dropout. It cannot be
made to answer twice, for nothing is left to answer with; its new share key is not in the old list of joins. From the
next round on it takes part again with a new Join.

**What this does not do.** A site may upload nonsense (no input is proved), and one that deals wrong shares, or a head
office that alters messages, can stop a round; sealed shares are authenticated by their key alone, so one that does not
open tells nobody which of the two it was. Uploads and reveals are not signed here: only head office relies on them, and
the transport's envelope carries a signature. Which sites took part is public. Masks are as good as AES, X25519 and
HKDF-SHA256; the sum itself is protected by noise, elsewhere.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedllm import crypto, shamir
from fedllm.crypto import AgreementKey, Identity, PublicIdentity
from fedllm.errors import ConfigError, CryptoError, FederationError, MessageError, PrivacyError, QuorumLost
from fedllm.messages import (
    Consent,
    Dealing,
    Join,
    Masked,
    MaskRequest,
    Reveal,
    RevealRequest,
    ShareRequest,
    Shares,
    Signed,
    SignedKey,
    UnmaskRequest,
)
from fedllm.plan import MAX_HOLDERS, least_quorum

SEALED = 2 * shamir.SHARE + 16  # bytes: a share of the seed, one of the mask key, and the tag
_WORD = np.dtype("<u4")
_DOMAIN = b"fedllm secure aggregation v2"  # v1 had no `common_digest`

Vector = NDArray[np.uint32]
Surplus = Callable[[int], tuple[str, ...]]  # what a site reveals of its own beside shares, by the number of survivors


# ---- what all agree on -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Terms:
    """What a site accepts before it joins. The roster is the site's own: head office cannot add to it."""

    plan: str  # digest of the run's plan, 64 hexadecimal digits
    session: str  # nonce of this start of the run, 64 hexadecimal digits
    threshold: int  # t: shares that give a secret, and fewest survivors of a round
    colluders: int  # c: sites that may collude with head office and with each other
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
            raise PrivacyError("the roster has one identity under two names: whoever holds its key would count as two")

    @cached_property
    def context(self) -> str:
        """Digest that every message, key and signature carries."""
        return _digest(_document("terms", self.plan, self.session, self.threshold, self.colluders))

    def check_size(self, holders: int) -> None:
        """Raise PrivacyError unless a threshold of `holders` leaves no room for two contradictory lists."""
        most = min(self.sites, MAX_HOLDERS)
        if holders > most:
            raise PrivacyError(f"secure aggregation takes {most} sites at most under these terms, found {holders}")
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
class Circle:
    """The sites that hold shares: a list of joins whose every signature was checked. Made by `make_circle`."""

    terms: Terms
    joins: tuple[SignedKey, ...]  # by name

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Sites by name; a site's place here, from 1, is where Shamir's polynomials are taken for it."""
        return tuple(join.site for join in self.joins)

    @cached_property
    def place(self) -> dict[str, int]:
        """From 1."""
        return {name: number for number, name in enumerate(self.names, 1)}

    @cached_property
    def digest(self) -> str:
        """Digest of names, identities and share keys: who sees another list makes other keys and signatures."""
        parts = ((join.site, self.terms.roster[join.site].to_text(), join.key) for join in self.joins)
        return _digest(_document("joins", self.terms.context, *(part for row in parts for part in row)))

    def document(self, label: str, number: int, *parts: str | bytes | int) -> bytes:
        """Return bytes for one purpose in one round of this circle."""
        return _document(label, self.terms.context, self.digest, number, *parts)


def check_join(terms: Terms, join: SignedKey) -> None:
    """Raise MessageError unless a site of the roster signed this key, a usable one, under these terms."""
    _check_signed_key(terms, join)
    _check_key(join.site, join.key)


def _check_signed_key(terms: Terms, join: SignedKey) -> None:
    identity = terms.roster.get(join.site)
    if identity is None:
        raise MessageError(
            f"secure aggregation: site={join.site!r} is not on the roster. Add it there, or leave it out."
        )
    try:
        identity.verify(_join_document(terms, join.site, bytes.fromhex(join.key)), bytes.fromhex(join.signature))
    except CryptoError as error:
        raise MessageError(
            f"the join of site={join.site!r} is not its own, or is for another plan or session ({error})"
        ) from None


def _check_key(site: str, key: str) -> None:
    try:
        crypto.check_agreement(bytes.fromhex(key))
    except CryptoError as error:
        raise MessageError(f"site={site!r} sent {error}. Leave it out.") from None


def make_circle(terms: Terms, joins: Iterable[SignedKey]) -> Circle:
    """Check a list of joins, in any order; raises MessageError, and PrivacyError where the threshold does not fit."""
    ordered = tuple(sorted(joins, key=lambda join: join.site))
    if len({join.site for join in ordered}) != len(ordered) or len({join.key for join in ordered}) != len(ordered):
        raise MessageError("the list of joins names a site or a key twice")
    terms.check_size(len(ordered))
    for join in ordered:
        _check_signed_key(terms, join)
    return Circle(terms, ordered)


def check_dealing(circle: Circle, number: int, dealing: Dealing) -> bytes:
    """Return what was signed; raises MessageError unless a site of the circle signed it for this round."""
    identity = circle.terms.roster.get(dealing.site)
    if identity is None or dealing.site not in circle.place:
        raise MessageError(f"round {number}: shares of site={dealing.site!r}, which has not joined")
    document = _dealing_document(
        circle, number, dealing.site, bytes.fromhex(dealing.key), bytes.fromhex(dealing.commitment)
    )
    try:
        identity.verify(document, bytes.fromhex(dealing.signature))
    except CryptoError as error:
        raise MessageError(
            f"the shares of site={dealing.site!r} are not its own, or not for round {number} of these sites ({error})"
        ) from None
    return document


def claim_digest(circle: Circle, request: UnmaskRequest) -> str:
    """Return the digest of a list of survivors."""
    return _digest(_claim_document(circle, request))


def _join_document(terms: Terms, site: str, key: bytes) -> bytes:
    return _document("join", terms.context, site, key)


def _dealing_document(circle: Circle, number: int, site: str, key: bytes, commitment: bytes) -> bytes:
    return circle.document("dealing", number, site, key, commitment)


def _claim_document(circle: Circle, request: UnmaskRequest) -> bytes:
    listed = request.survivors + request.dropped
    return circle.document("survivors", request.round, request.common, len(request.survivors), *listed)


def _document(label: str, *parts: str | bytes | int) -> bytes:
    """Join parts so that no two lists of parts read the same."""
    result = [_DOMAIN]
    for part in (label, *parts):
        encoded = part if isinstance(part, bytes) else str(part).encode()
        result += [len(encoded).to_bytes(4, "big"), encoded]
    return b"".join(result)


def _digest(document: bytes) -> str:
    return hashlib.sha256(document).hexdigest()


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


# ---- masks: the same for both ends -----------------------------------------------------------------------------------


def _commitment(circle: Circle, number: int, site: str, seed: int) -> bytes:
    """Commit to a seed: it has 256 random bits, so its image under HKDF gives nothing away."""
    return crypto.derive(seed.to_bytes(32, "big"), circle.document("commitment", number, site))


def common_digest(circle: Circle, number: int, task: str, dealings: Iterable[Dealing]) -> str:
    """Return the digest of what is the same for all sites of a round: `task` is that of what they compute, 64 hex."""
    dealt = ((each.site, each.key, each.commitment, each.signature) for each in dealings)
    return _digest(circle.document("common", number, task, *(part for row in dealt for part in row)))


def _self_mask_key(circle: Circle, number: int, common: str, site: str, seed: int) -> bytes:
    return crypto.derive(seed.to_bytes(32, "big"), circle.document("self mask", number, common, site))


def _pair_mask_key(circle: Circle, number: int, common: str, own: str, key: AgreementKey, peer: Dealing) -> bytes:
    """Return the key of the mask between two sites; raises CryptoError on a peer's key of small order."""
    secret = key.agree(bytes.fromhex(peer.key))
    return crypto.derive(secret, circle.document("pair mask", number, common, *sorted((own, peer.site))))


def _seal_key(circle: Circle, number: int, agreed: bytes, sender: str, receiver: str, dealing: bytes) -> bytes:
    """Return a key for one pair of shares: `dealing` is what was signed of them, with keys drawn for them alone."""
    return crypto.derive(agreed, circle.document("sealed shares", number, sender, receiver, dealing))


def _add_mask(total_d: Vector, key: bytes, sign: int) -> None:
    """Add or subtract PRG(key), uint32[d], in place."""
    start = 0
    for block in crypto.keystream(key, total_d.nbytes):
        words = np.frombuffer(block, _WORD)
        part = total_d[start : start + len(words)]
        (np.add if sign > 0 else np.subtract)(part, words, out=part)
        start += len(words)


def _sign(circle: Circle, site: str, peer: str) -> int:
    """Return what `site` multiplies the mask that it shares with `peer` by."""
    return 1 if circle.place[site] < circle.place[peer] else -1


# ---- the site --------------------------------------------------------------------------------------------------------


@dataclass
class _Round:
    """What a site holds for one round; the fields below only ever go from None to their one value."""

    circle: Circle
    agreed: dict[str, bytes]  # what each peer's share key gives with one's own
    number: int
    seed: int
    key: AgreementKey
    shares: Shares  # as sent
    own: tuple[bytes, bytes]  # its own shares of seed and mask key
    asked: str | None = None  # digest of the one vector, task and participants that were masked
    common: str = ""  # `common_digest` of that
    held: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)  # every participant's shares of seed and key
    pair_keys: dict[str, bytes] = field(default_factory=dict)  # of the masks shared with every other participant
    claim: UnmaskRequest | None = None  # the one list of survivors
    surplus: Surplus = lambda _: ()


class Member:
    """A site's part in secure aggregation for one session; one thread at a time."""

    def __init__(self, terms: Terms, site: str, identity: Identity) -> None:
        """Draw the share key and sign it. Raises ConfigError where the roster has another identity for this site."""
        if terms.roster.get(site) != identity.public:
            raise ConfigError(f"site={site!r} is not on its own roster with its present identity. Renew the roster.")
        self.terms, self.site, self._identity = terms, site, identity
        self._key = AgreementKey.generate()
        signature = identity.sign(_join_document(terms, site, self._key.public))
        self.join = Join(
            context=terms.context,
            join=SignedKey(site=site, key=self._key.public.hex(), signature=signature.hex()),
        )
        self._rounds: dict[int, _Round] = {}  # the newest and the one before

    def share(self, request: ShareRequest) -> Shares:
        """Draw this round's secrets and deal them out. Raises MessageError and PrivacyError.

        Before anything is masked with them, others may be dealt in their place to another list of sites.
        """
        self._expect(request.context)
        circle, agreed = self._circle_of(request)
        number, newest = request.round, max(self._rounds, default=0)
        done = self._rounds.get(number)
        if done is not None and done.circle.digest == circle.digest:
            return done.shares
        unused = number == newest and done is not None and done.asked is None  # another site came or went
        if number <= newest and not unused:
            raise PrivacyError(
                f"round {number}: site={self.site!r} has dealt round {newest} already, and deals a round out "
                "once. Go on with the next round."
            )
        state = self._deal(circle, agreed, number)
        self._rounds = {k: v for k, v in self._rounds.items() if k >= number - 1}
        self._rounds[number] = state
        return state.shares

    def mask(self, request: MaskRequest, task: str, vector_d: Vector, surplus: Surplus = lambda _: ()) -> Masked:
        """Open the shares that are meant for this site, and mask uint32[d]. Raises MessageError and PrivacyError.

        `task` is the digest of what the vector was computed from, 64 hex: masks cancel among sites with the same.
        `surplus` is revealed with the shares, for the round's one list.

        A share that does not open implicates its dealer or head office, which passed it on: take the dealer out of the
        request and ask again.
        """
        state = self._state(request)
        if vector_d.dtype != np.uint32 or vector_d.ndim != 1:
            raise ConfigError(f"expected a flat vector of uint32, found {vector_d.dtype} of shape={vector_d.shape}")
        total_d = np.array(vector_d, _WORD)
        common = common_digest(state.circle, state.number, task, request.dealings)
        asked = _digest(common.encode() + request.to_bytes() + hashlib.sha256(total_d.data).digest())
        if state.asked is None:
            state.held, state.pair_keys = self._open(state, request, common)
            state.asked, state.common, state.surplus = asked, common, surplus
        elif state.asked != asked:
            raise PrivacyError(
                f"round {request.round}: site={self.site!r} has masked another vector, or for other sites or another "
                "request. A round has one upload: go on with the next round."
            )
        circle, number = state.circle, state.number
        _add_mask(total_d, _self_mask_key(circle, number, state.common, self.site, state.seed), 1)
        for peer, key in state.pair_keys.items():
            _add_mask(total_d, key, _sign(circle, self.site, peer))
        return Masked(
            context=request.context, round=number, joins=circle.digest, site=self.site, payload=total_d.tobytes()
        )

    def check(self, request: MaskRequest) -> None:
        """Raise what `mask` would raise of this request and a new vector. Nothing changes."""
        state = self._state(request)
        if state.asked is not None:
            raise PrivacyError(f"round {request.round}: site={self.site!r} has masked a vector already")
        self._open(state, request, "")

    def unmask(self, request: UnmaskRequest) -> Consent | Reveal:
        """Answer the round's list of survivors: with shares of seeds where nobody dropped out, or with a signature.

        From here on this site answers no other list in this round. Raises MessageError and PrivacyError.
        """
        state = self._state(request)
        if state.asked is None:
            raise PrivacyError(f"round {request.round}: site={self.site!r} has not uploaded, so it reveals nothing")
        if state.claim is not None and state.claim != request:
            raise PrivacyError(
                f"round {request.round}: site={self.site!r} was shown two lists of survivors. Head office is at fault: "
                "both together would open an update. This site answers the first one only."
            )
        check_claim(self.terms, request, state.held)
        if request.common != state.common:
            raise PrivacyError(
                f"round {request.round}: the list of survivors is for another request than the one site={self.site!r} "
                "answered. All sites of a round must be sent the same start values, plan and participants."
            )
        if self.site not in request.survivors:
            raise PrivacyError(f"round {request.round}: site={self.site!r} is said to have dropped out, yet is asked")
        answer = None if request.dropped else _reveal(state, self.site, request)
        state.claim = request
        if answer is not None:
            return answer
        signature = self._identity.sign(_claim_document(state.circle, request))
        return Consent(
            context=request.context, round=request.round, joins=request.joins,
            consent=Signed(site=self.site, signature=signature.hex()),
        )  # fmt: skip

    def reveal(self, request: RevealRequest) -> Reveal:
        """Reveal shares of survivors' seeds and of dropped sites' mask keys, for the list that this site signed.

        Raises MessageError and PrivacyError unless at least the threshold of survivors signed the same list.
        """
        state = self._state(request)
        claim = state.claim
        if claim is None or not claim.dropped:
            raise PrivacyError(
                f"round {request.round}: site={self.site!r} has signed no list of survivors to reveal for"
            )
        for consent in request.consents:
            check_consent(state.circle, claim, consent)
        signers = {consent.site for consent in request.consents}
        if len(signers) != len(request.consents):
            raise MessageError(f"round {request.round}: a survivor's signature comes twice")
        if len(signers) < self.terms.threshold:
            raise PrivacyError(
                f"round {request.round}: {len(signers)} survivors signed the list, expected at least "
                f"{self.terms.threshold}. Nothing is revealed."
            )
        return _reveal(state, self.site, claim)

    def _expect(self, context: str) -> None:
        if context != self.terms.context:
            raise MessageError(
                f"a request of secure aggregation for another plan, session or threshold than site={self.site!r} joined"
            )

    def _state(self, request: MaskRequest | UnmaskRequest | RevealRequest) -> _Round:
        self._expect(request.context)
        state = self._rounds.get(request.round)
        if state is None:
            raise PrivacyError(
                f"round {request.round}: site={self.site!r} holds no secrets for it: it was not asked to deal, or the "
                "round is over, or its process is a new one. Leave the site out of this round."
            )
        if request.joins != state.circle.digest:
            raise MessageError(
                f"round {request.round}: a request for other joins than those site={self.site!r} dealt to"
            )
        return state

    def _circle_of(self, request: ShareRequest) -> tuple[Circle, dict[str, bytes]]:
        """Return the checked circle and what its keys give; both stay as long as the list does."""
        known = self._rounds[max(self._rounds)] if self._rounds else None
        if known is None and not request.joins:
            raise MessageError(f"round {request.round}: no joins were sent to site={self.site!r} yet")
        if known is not None and (not request.joins or known.circle.joins == request.joins):
            return known.circle, known.agreed
        circle = make_circle(self.terms, request.joins)
        if self.join.join not in circle.joins:
            raise MessageError(
                f"round {request.round}: the join of site={self.site!r} is missing from the list, or is not the one "
                "that it sent. If the site was started again, send it the list with its new join."
            )
        return circle, {join.site: self._agree(join) for join in circle.joins if join.site != self.site}

    def _agree(self, join: SignedKey) -> bytes:
        try:
            return self._key.agree(bytes.fromhex(join.key))
        except CryptoError as error:
            raise MessageError(f"site={join.site!r} joined with {error}. Leave it out.") from None

    def _deal(self, circle: Circle, agreed: dict[str, bytes], number: int) -> _Round:
        seed, key = shamir.random_number(), AgreementKey.generate()
        holders = len(circle.names)
        pairs = [
            tuple(share.to_bytes(shamir.SHARE, "big") for share in pair)
            for pair in zip(
                shamir.split(seed, self.terms.threshold, holders),
                shamir.split(key.scalar, self.terms.threshold, holders),
                strict=True,
            )
        ]
        commitment = _commitment(circle, number, self.site, seed)
        signed = _dealing_document(circle, number, self.site, key.public, commitment)
        dealing = Dealing(
            site=self.site, key=key.public.hex(), commitment=commitment.hex(),
            signature=self._identity.sign(signed).hex(),
        )  # fmt: skip
        sealed = b"".join(
            crypto.seal_once(_seal_key(circle, number, agreed[peer], self.site, peer, signed), b"".join(pair), signed)
            for peer, pair in zip(circle.names, pairs, strict=True)
            if peer != self.site
        )
        shares = Shares(context=self.terms.context, round=number, joins=circle.digest, dealing=dealing, payload=sealed)
        seed_share, key_share = pairs[circle.place[self.site] - 1]
        return _Round(circle, agreed, number, seed, key, shares, (seed_share, key_share))

    def _open(
        self, state: _Round, request: MaskRequest, common: str
    ) -> tuple[dict[str, tuple[bytes, bytes]], dict[str, bytes]]:
        """Check what the participants dealt; return the shares for this site, and the keys of pairwise masks."""
        circle, number = state.circle, state.number
        dealings = {dealing.site: dealing for dealing in request.dealings}
        names = [dealing.site for dealing in request.dealings]
        if names != sorted(dealings) or len({dealing.key for dealing in request.dealings}) != len(names):
            raise MessageError(f"round {number}: participants out of order, or a site or key twice")
        if len(names) < self.terms.threshold:
            raise PrivacyError(
                f"round {number}: {len(names)} participants, expected at least the threshold of {self.terms.threshold}"
            )
        if dealings.pop(self.site, None) != state.shares.dealing:
            raise MessageError(f"round {number}: what site={self.site!r} dealt is missing, or was altered")
        if len(request.payload) != SEALED * len(dealings):
            raise MessageError(
                f"round {number}: {len(request.payload)} bytes of sealed shares, expected {SEALED * len(dealings)}"
            )
        held, pair_keys = {self.site: state.own}, {}
        for index, (name, dealing) in enumerate(dealings.items()):
            signed = check_dealing(circle, number, dealing)
            sealed = request.payload[SEALED * index : SEALED * (index + 1)]
            try:
                pair = crypto.open_once(
                    _seal_key(circle, number, state.agreed[name], name, self.site, signed), sealed, signed
                )
                pair_keys[name] = _pair_mask_key(circle, number, common, self.site, state.key, dealing)
            except CryptoError as error:
                raise MessageError(
                    f"round {number}: what site={name!r} dealt to site={self.site!r} cannot be used ({error}): that "
                    "site made it wrongly, or head office altered it. Leave that site out of the round and ask again."
                ) from None
            held[name] = pair[: shamir.SHARE], pair[shamir.SHARE :]
        return held, pair_keys


def _reveal(state: _Round, site: str, claim: UnmaskRequest) -> Reveal:
    """One share for each participant. Which one depends on nothing but the round's only list."""
    survivors = set(claim.survivors)
    payload = b"".join(state.held[name][0 if name in survivors else 1] for name in sorted(state.held))
    return Reveal(
        context=claim.context, round=claim.round, joins=claim.joins, site=site,
        claim=claim_digest(state.circle, claim), surplus=state.surplus(len(survivors)), payload=payload,
    )  # fmt: skip


def check_claim(terms: Terms, request: UnmaskRequest, participants: Collection[str]) -> None:
    """Raise MessageError or PrivacyError unless the list divides the participants and leaves enough survivors."""
    listed = [*request.survivors, *request.dropped]
    ordered = list(request.survivors) == sorted(request.survivors) and list(request.dropped) == sorted(request.dropped)
    if not ordered or len(set(listed)) != len(listed) or set(listed) != set(participants):
        raise MessageError(
            f"round {request.round}: survivors and dropped sites must be, by name, all {len(participants)} "
            "participants, each once"
        )
    if len(request.survivors) < terms.threshold:
        raise PrivacyError(
            f"round {request.round}: {len(request.survivors)} survivors, expected at least the threshold of "
            f"{terms.threshold}. Give the round up."
        )


def check_consent(circle: Circle, claim: UnmaskRequest, consent: Signed) -> None:
    """Raise MessageError unless a survivor signed this list."""
    if consent.site not in claim.survivors:
        raise MessageError(f"round {claim.round}: site={consent.site!r} signed, but is not a survivor")
    try:
        circle.terms.roster[consent.site].verify(_claim_document(circle, claim), bytes.fromhex(consent.signature))
    except CryptoError:
        raise MessageError(
            f"round {claim.round}: the signature of site={consent.site!r} is not on this list of survivors"
        ) from None


# ---- head office -----------------------------------------------------------------------------------------------------


def check_shares(circle: Circle, number: int, shares: Shares) -> None:
    """Raise MessageError unless these are a site's shares for this round of this circle."""
    _expect(circle, number, shares, shares.dealing.site)
    check_dealing(circle, number, shares.dealing)
    _check_key(shares.dealing.site, shares.dealing.key)
    expected = SEALED * (len(circle.names) - 1)
    if len(shares.payload) != expected:
        raise MessageError(
            f"site={shares.dealing.site!r} sent {len(shares.payload)} bytes of sealed shares, expected {expected}"
        )


def mask_request(circle: Circle, number: int, dealt: Mapping[str, Shares], site: str) -> MaskRequest:
    """Return what one site needs of all that was dealt (participants by name, checked): O(n) bytes."""
    names = sorted(dealt)
    sealed = b"".join(_sealed_to(circle, dealt[name], site) for name in names if name != site)
    return MaskRequest(
        context=circle.terms.context, round=number, joins=circle.digest,
        dealings=tuple(dealt[name].dealing for name in names), payload=sealed,
    )  # fmt: skip


def _sealed_to(circle: Circle, shares: Shares, site: str) -> bytes:
    index = circle.place[site] - 1 - (circle.place[site] > circle.place[shares.dealing.site])
    return shares.payload[SEALED * index : SEALED * (index + 1)]


def unmask_request(
    circle: Circle, number: int, common: str, participants: Iterable[str], survivors: Collection[str]
) -> UnmaskRequest:
    """Return the round's list, for what was asked (`common_digest`); `check_claim` says whether enough survived."""
    names = sorted(participants)
    return UnmaskRequest(
        context=circle.terms.context, round=number, joins=circle.digest, common=common,
        survivors=tuple(name for name in names if name in survivors),
        dropped=tuple(name for name in names if name not in survivors),
    )  # fmt: skip


def reveal_request(claim: UnmaskRequest, consents: Iterable[Consent]) -> RevealRequest:
    """Return the proof that enough survivors signed the same list."""
    signed = tuple(consent.consent for consent in consents)
    return RevealRequest(context=claim.context, round=claim.round, joins=claim.joins, consents=signed)


def read_masked(circle: Circle, number: int, masked: Masked, dimension: int) -> Vector:
    """Return uint32[dimension], still masked; raises MessageError. A site whose upload is refused has dropped out."""
    _expect(circle, number, masked, masked.site)
    if len(masked.payload) != _WORD.itemsize * dimension:
        raise MessageError(
            f"site={masked.site!r} uploaded {len(masked.payload)} bytes, expected {_WORD.itemsize * dimension}"
        )
    return np.frombuffer(masked.payload, _WORD)


def check_reveal(circle: Circle, claim: UnmaskRequest, reveal: Reveal) -> None:
    """Raise MessageError unless a survivor answers this list with a share for every participant."""
    _expect(circle, claim.round, reveal, reveal.site)
    expected = shamir.SHARE * (len(claim.survivors) + len(claim.dropped))
    if reveal.site not in claim.survivors or reveal.claim != claim_digest(circle, claim):
        raise MessageError(f"round {claim.round}: site={reveal.site!r} reveals for another list of survivors")
    if len(reveal.payload) != expected:
        raise MessageError(f"site={reveal.site!r} reveals {len(reveal.payload)} bytes, expected {expected}")


def _expect(circle: Circle, number: int, message: Shares | Masked | Reveal, site: str) -> None:
    if (message.context, message.round, message.joins) != (circle.terms.context, number, circle.digest):
        raise MessageError(f"site={site!r} answers for another session, round or list of joins than round {number}")
    if site not in circle.place:
        raise MessageError(f"site={site!r} has not joined")


@dataclass(frozen=True)
class Unmasked:
    """The sum of the survivors' vectors, and shares that did not fit."""

    total_d: Vector  # uint32[d], mod 2^32
    doubtful: tuple[tuple[str, str], ...]  # (holder, dealer): one of the two made a wrong share; the sum is right


def unmask(
    circle: Circle,
    dealt: Mapping[str, Shares],
    claim: UnmaskRequest,
    uploads: Mapping[str, Masked],
    reveals: Sequence[Reveal],
    dimension: int,
) -> Unmasked:
    """Return the sum of the survivors' vectors from what the sites sent.

    `dealt` holds the participants, `uploads` exactly the survivors. Raises MessageError on an answer that does not
    belong here (see the `check_` functions, which take answers one by one), QuorumLost on fewer than t reveals, and
    FederationError where a secret cannot be put together.
    """
    threshold, number, common = circle.terms.threshold, claim.round, claim.common
    check_claim(circle.terms, claim, dealt)
    if set(uploads) != set(claim.survivors):
        raise FederationError(f"round {number}: uploads and survivors differ. Only sites that uploaded can survive.")
    answers = {reveal.site: reveal for reveal in reveals}
    if len(answers) != len(reveals):
        raise MessageError(f"round {number}: a site reveals twice")
    for reveal in reveals:
        check_reveal(circle, claim, reveal)
    if len(answers) < threshold:
        raise QuorumLost(
            f"round {number}: {len(answers)} sites revealed their shares, expected at least {threshold}. The sum "
            "cannot be read; the round is lost, and what the sites have spent on it stands."
        )
    holders = tuple(sorted(answers, key=circle.place.__getitem__))
    survivors = set(claim.survivors)
    doubtful: list[tuple[str, str]] = []
    total_d = np.zeros(dimension, _WORD)
    for site in claim.survivors:
        total_d += read_masked(circle, number, uploads[site], dimension)
    for index, dealer in enumerate(sorted(dealt)):
        dealing = dealt[dealer].dealing
        shares = [_share_at(answers[holder], index) for holder in holders]
        if dealer in survivors:
            seed, wrong = _recover(circle, holders, shares, dealer, _seed_check(circle, number, dealing))
            _add_mask(total_d, _self_mask_key(circle, number, common, dealer, seed), -1)
        else:
            scalar, wrong = _recover(circle, holders, shares, dealer, _scalar_check(dealing))
            key = AgreementKey.from_scalar(scalar)
            for site in claim.survivors:
                pair = _pair_mask_key(circle, number, common, dealer, key, dealt[site].dealing)
                _add_mask(total_d, pair, -_sign(circle, site, dealer))
        doubtful += [(holder, dealer) for holder in wrong]
    return Unmasked(total_d, tuple(doubtful))


def _share_at(reveal: Reveal, index: int) -> int:
    return int.from_bytes(reveal.payload[shamir.SHARE * index : shamir.SHARE * (index + 1)], "big")


def _seed_check(circle: Circle, number: int, dealing: Dealing) -> Callable[[int], bool]:
    expected = bytes.fromhex(dealing.commitment)
    return lambda seed: _commitment(circle, number, dealing.site, seed) == expected


def _scalar_check(dealing: Dealing) -> Callable[[int], bool]:
    expected = bytes.fromhex(dealing.key)

    def fits(scalar: int) -> bool:
        try:
            return AgreementKey.from_scalar(scalar).public == expected
        except CryptoError:
            return False

    return fits


def _recover(
    circle: Circle, holders: tuple[str, ...], shares: list[int], dealer: str, right: Callable[[int], bool]
) -> tuple[int, list[str]]:
    """Return a dealer's secret, and the holders whose shares are not on its polynomial.

    A secret can be checked against what its dealer signed, so any t right shares do. They are looked for in runs of t
    neighbours around the circle of holders: with one wrong share among t + 1 or more, one such run is without it.
    """
    threshold, many = circle.terms.threshold, len(holders)
    points = [circle.place[holder] for holder in holders]
    for first in range(many if many > threshold else 1):
        chosen = [(first + k) % many for k in range(threshold)]
        at = tuple(points[k] for k in chosen)
        values = [shares[k] for k in chosen]
        secret = shamir.combine(shamir.weights(at), values)
        if not right(secret):
            continue
        if first == 0:  # nothing is known to be wrong; what was not needed is not looked at
            return secret, []
        rest = [k for k in range(many) if k not in chosen]
        return secret, [holders[k] for k in rest if shamir.combine(shamir.weights(at, points[k]), values) != shares[k]]
    raise FederationError(
        f"the secret that site={dealer!r} dealt cannot be put together from the shares of {', '.join(holders)}: that "
        "site dealt wrong shares, or one of the others gave one back. The round is lost; leave it out of the next."
    )
