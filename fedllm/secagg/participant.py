"""A site's part in secure aggregation: advertise a key, share secrets, mask one vector a round, help to unmask."""

import hashlib
from dataclasses import dataclass, field

import numpy as np

from fedllm.crypto import primitives, shamir
from fedllm.crypto.identity import Identity
from fedllm.crypto.primitives import AgreementKey
from fedllm.errors import ConfigError, CryptoError, MessageError, PrivacyError
from fedllm.protocol.messages import (
    AdvertisedKey,
    AdvertiseKeys,
    ConsistencyCheck,
    ConsistencySignature,
    KeyShares,
    MaskedInput,
    MaskedInputRequest,
    ShareKeysRequest,
    Signed,
    SignedMaskKey,
    UnmaskingRequest,
    UnmaskingShares,
)
from fedllm.secagg.masking import WORD, add_mask, agreed_mask_key, mask_sign, seed_commitment, self_mask_key, share_key
from fedllm.secagg.session import (
    SEALED,
    Cohort,
    RevealedSeeds,
    SessionParams,
    Vector,
    advertised_key_document,
    check_consistency_signature,
    check_mask_key,
    check_survivor_list,
    common_digest,
    digest_of_document,
    make_cohort,
    mask_key_document,
    survivors_digest,
    survivors_document,
)


@dataclass(frozen=True)
class _FromPeer:
    """What another participant shared with this site, and what the masks' keys of the two agree on."""

    shares: tuple[bytes, bytes]  # of its seed and its mask key
    agreed: bytes


@dataclass
class _Round:
    """What a site holds for one round; the fields from `asked` on only ever go from None to their one value."""

    cohort: Cohort
    agreed: dict[str, bytes]  # the secret agreed with each peer's key
    number: int
    seed: int
    key: AgreementKey
    shares: KeyShares  # as sent
    own: tuple[bytes, bytes]  # its own shares of seed and mask key
    # what `check` opened of a request, so that `mask` need not: opening is most of a site's work among many
    opened: tuple[MaskedInputRequest, dict[str, _FromPeer]] | None = None
    asked: str | None = None  # digest of the one vector, task and participants that were masked
    common: str = ""  # `common_digest` of that
    held: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)  # every participant's shares of seed and key
    pair_keys: dict[str, bytes] = field(default_factory=dict)  # of the masks shared with every other participant
    survivor_list: ConsistencyCheck | None = None  # the one list of survivors
    surplus: RevealedSeeds = lambda _: ()


class Participant:
    """A site's part in secure aggregation for one session; one thread at a time."""

    def __init__(self, params: SessionParams, site: str, identity: Identity) -> None:
        """Draw the share key and sign it. Raises ConfigError if the roster has another identity for this site."""
        if params.roster.get(site) != identity.public:
            raise ConfigError(f"site={site!r} is not on its own roster with its present identity. Renew the roster.")
        self.params, self.site, self._identity = params, site, identity
        self._key = AgreementKey.generate()
        signature = identity.sign(advertised_key_document(params, site, self._key.public))
        self.join = AdvertiseKeys(
            context=params.context,
            join=AdvertisedKey(site=site, key=self._key.public.hex(), signature=signature.hex()),
        )
        self._rounds: dict[int, _Round] = {}  # the newest and the one before

    def share(self, request: ShareKeysRequest) -> KeyShares:
        """Draw this round's secrets and share them. Raises MessageError and PrivacyError.

        Before anything is masked with them, others may be shared in their place with another list of sites.
        """
        self._expect(request.context)
        cohort, agreed = self._cohort_of(request)
        number, newest = request.round, max(self._rounds, default=0)
        done = self._rounds.get(number)
        if done is not None and done.cohort.digest == cohort.digest:
            return done.shares
        unused = number == newest and done is not None and done.asked is None  # another site came or went
        if number <= newest and not unused:
            raise PrivacyError(
                f"round {number}: site={self.site!r} has shared the secrets of round {newest} already, and shares a "
                "round's secrets once. Go on with the next round."
            )
        state = self._deal(cohort, agreed, number)
        self._rounds = {k: v for k, v in self._rounds.items() if k >= number - 1}
        self._rounds[number] = state
        return state.shares

    def mask(
        self, request: MaskedInputRequest, task: str, vector_d: Vector, surplus: RevealedSeeds = lambda _: ()
    ) -> MaskedInput:
        """Open the shares that are meant for this site, and mask uint32[d]. Raises MessageError and PrivacyError.

        `task` is the digest of what the vector was computed from, 64 hex: masks cancel among sites with the same.
        `surplus` is revealed with the shares, for the round's one list.

        A share that does not open implicates the site that made it or the server, which passed it on: take that site
        out of the request and ask again.
        """
        state = self._state(request)
        if vector_d.dtype != np.uint32 or vector_d.ndim != 1:
            raise ConfigError(f"expected a flat vector of uint32, found {vector_d.dtype} of shape={vector_d.shape}")
        total_d = np.array(vector_d, WORD)
        common = common_digest(state.cohort, state.number, task, request.dealings)
        asked = digest_of_document(common.encode() + request.to_bytes() + hashlib.sha256(total_d.data).digest())
        if state.asked is None:
            peers = self._open(state, request)
            state.held = {self.site: state.own, **{peer: found.shares for peer, found in peers.items()}}
            state.pair_keys = {
                peer: agreed_mask_key(state.cohort, state.number, common, self.site, found.agreed, peer)
                for peer, found in peers.items()
            }
            state.opened = None
            state.asked, state.common, state.surplus = asked, common, surplus
        elif state.asked != asked:
            raise PrivacyError(
                f"round {request.round}: site={self.site!r} has masked another vector, or for other sites or another "
                "request. A round has one upload: go on with the next round."
            )
        cohort, number = state.cohort, state.number
        add_mask(total_d, self_mask_key(cohort, number, state.common, self.site, state.seed), 1)
        for peer, key in state.pair_keys.items():
            add_mask(total_d, key, mask_sign(cohort, self.site, peer))
        return MaskedInput(
            context=request.context, round=number, joins=cohort.digest, site=self.site, payload=total_d.tobytes()
        )

    def check(self, request: MaskedInputRequest) -> None:
        """Raise what `mask` would raise of this request and a new vector; what it is answered stays the same."""
        state = self._state(request)
        if state.asked is not None:
            raise PrivacyError(f"round {request.round}: site={self.site!r} has masked a vector already")
        state.opened = request, self._open(state, request)

    def unmask(self, request: ConsistencyCheck) -> ConsistencySignature | UnmaskingShares:
        """Answer the round's list of survivors: with shares of seeds if nobody dropped out, or else with a signature.

        From here on this site answers no other list in this round. Raises MessageError and PrivacyError.
        """
        state = self._state(request)
        if state.asked is None:
            raise PrivacyError(f"round {request.round}: site={self.site!r} has not uploaded, so it reveals nothing")
        if state.survivor_list is not None and state.survivor_list != request:
            raise PrivacyError(
                f"round {request.round}: site={self.site!r} was shown two lists of survivors. The server is at fault: "
                "both together would open an update. This site answers the first one only."
            )
        check_survivor_list(self.params, request, state.held)
        if request.common != state.common:
            raise PrivacyError(
                f"round {request.round}: the list of survivors is for another request than the one site={self.site!r} "
                "answered. All sites of a round must be sent the same start values, plan and participants."
            )
        if self.site not in request.survivors:
            raise PrivacyError(f"round {request.round}: site={self.site!r} is said to have dropped out, yet is asked")
        answer = None if request.dropped else _reveal(state, self.site, request)
        state.survivor_list = request
        if answer is not None:
            return answer
        signature = self._identity.sign(survivors_document(state.cohort, request))
        return ConsistencySignature(
            context=request.context, round=request.round, joins=request.joins,
            consent=Signed(site=self.site, signature=signature.hex()),
        )  # fmt: skip

    def reveal(self, request: UnmaskingRequest) -> UnmaskingShares:
        """Reveal shares of survivors' seeds and of dropped sites' mask keys, for the list that this site signed.

        Raises MessageError and PrivacyError unless at least the threshold of survivors signed the same list.
        """
        state = self._state(request)
        survivor_list = state.survivor_list
        if survivor_list is None or not survivor_list.dropped:
            raise PrivacyError(
                f"round {request.round}: site={self.site!r} has signed no list of survivors to reveal for"
            )
        for consent in request.consents:
            check_consistency_signature(state.cohort, survivor_list, consent)
        signers = {consent.site for consent in request.consents}
        if len(signers) != len(request.consents):
            raise MessageError(f"round {request.round}: a survivor's signature comes twice")
        if len(signers) < self.params.threshold:
            raise PrivacyError(
                f"round {request.round}: {len(signers)} survivors signed the list, expected at least "
                f"{self.params.threshold}. Nothing is revealed."
            )
        return _reveal(state, self.site, survivor_list)

    def _expect(self, context: str) -> None:
        if context != self.params.context:
            raise MessageError(
                f"a request of secure aggregation for another plan, session or threshold than site={self.site!r} knows"
            )

    def _state(self, request: MaskedInputRequest | ConsistencyCheck | UnmaskingRequest) -> _Round:
        self._expect(request.context)
        state = self._rounds.get(request.round)
        if state is None:
            raise PrivacyError(
                f"round {request.round}: site={self.site!r} holds no secrets for it: it was not asked to share any, "
                "or the round is over, or its process is a new one. Leave the site out of this round."
            )
        if request.joins != state.cohort.digest:
            raise MessageError(
                f"round {request.round}: a request for other advertised keys than those site={self.site!r} shared with"
            )
        return state

    def _cohort_of(self, request: ShareKeysRequest) -> tuple[Cohort, dict[str, bytes]]:
        """Return the checked cohort and what was agreed with each peer; both stay as long as the list does."""
        known = self._rounds[max(self._rounds)] if self._rounds else None
        if known is None and not request.joins:
            raise MessageError(f"round {request.round}: no advertised keys were sent to site={self.site!r} yet")
        if known is not None and (not request.joins or known.cohort.joins == request.joins):
            return known.cohort, known.agreed
        cohort = make_cohort(self.params, request.joins)
        if self.join.join not in cohort.joins:
            raise MessageError(
                f"round {request.round}: the key of site={self.site!r} is missing from the list, or is not the one "
                "that it sent. If the site was started again, send it the list with its new key."
            )
        return cohort, {entry.site: self._agree(entry) for entry in cohort.joins if entry.site != self.site}

    def _agree(self, entry: AdvertisedKey) -> bytes:
        try:
            return self._key.agree(bytes.fromhex(entry.key))
        except CryptoError as error:
            raise MessageError(f"site={entry.site!r} advertised {error}. Leave it out.") from None

    def _deal(self, cohort: Cohort, agreed: dict[str, bytes], number: int) -> _Round:
        seed, key = shamir.random_number(), AgreementKey.generate()
        holders = len(cohort.names)
        pairs = [
            tuple(share.to_bytes(shamir.SHARE, "big") for share in pair)
            for pair in zip(
                shamir.split(seed, self.params.threshold, holders),
                shamir.split(key.scalar, self.params.threshold, holders),
                strict=True,
            )
        ]
        commitment = seed_commitment(cohort, number, self.site, seed)
        signed = mask_key_document(cohort, number, self.site, key.public, commitment)
        mask_key = SignedMaskKey(
            site=self.site, key=key.public.hex(), commitment=commitment.hex(),
            signature=self._identity.sign(signed).hex(),
        )  # fmt: skip
        sealed = b"".join(
            primitives.seal_once(
                share_key(cohort, number, agreed[peer], self.site, peer, signed), b"".join(pair), signed
            )
            for peer, pair in zip(cohort.names, pairs, strict=True)
            if peer != self.site
        )
        shares = KeyShares(
            context=self.params.context, round=number, joins=cohort.digest, dealing=mask_key, payload=sealed
        )
        seed_share, key_share = pairs[cohort.place[self.site] - 1]
        return _Round(cohort, agreed, number, seed, key, shares, (seed_share, key_share))

    def _open(self, state: _Round, request: MaskedInputRequest) -> dict[str, _FromPeer]:
        """Check what the other participants shared, and return it."""
        if state.opened is not None and state.opened[0] == request:
            return state.opened[1]
        cohort, number = state.cohort, state.number
        dealings = {mask_key.site: mask_key for mask_key in request.dealings}
        names = [mask_key.site for mask_key in request.dealings]
        if names != sorted(dealings) or len({mask_key.key for mask_key in request.dealings}) != len(names):
            raise MessageError(f"round {number}: participants out of order, or a site or key twice")
        if len(names) < self.params.threshold:
            raise PrivacyError(
                f"round {number}: {len(names)} participants, expected at least the threshold of {self.params.threshold}"
            )
        if dealings.pop(self.site, None) != state.shares.dealing:
            raise MessageError(f"round {number}: what site={self.site!r} shared is missing, or was altered")
        if len(request.payload) != SEALED * len(dealings):
            raise MessageError(
                f"round {number}: {len(request.payload)} bytes of sealed shares, expected {SEALED * len(dealings)}"
            )
        found = {}
        for index, (name, mask_key) in enumerate(dealings.items()):
            signed = check_mask_key(cohort, number, mask_key)
            sealed = request.payload[SEALED * index : SEALED * (index + 1)]
            try:
                pair = primitives.open_once(
                    share_key(cohort, number, state.agreed[name], name, self.site, signed), sealed, signed
                )
                agreed = state.key.agree(bytes.fromhex(mask_key.key))
            except CryptoError as error:
                raise MessageError(
                    f"round {number}: what site={name!r} shared with site={self.site!r} cannot be used ({error}): that "
                    "site made it wrongly, or the server altered it. Leave that site out of the round and ask again."
                ) from None
            found[name] = _FromPeer((pair[: shamir.SHARE], pair[shamir.SHARE :]), agreed)
        return found


def _reveal(state: _Round, site: str, survivor_list: ConsistencyCheck) -> UnmaskingShares:
    """One share for each participant. Which of the two depends on nothing but the round's only list."""
    survivors = set(survivor_list.survivors)
    payload = b"".join(state.held[name][0 if name in survivors else 1] for name in sorted(state.held))
    return UnmaskingShares(
        context=survivor_list.context, round=survivor_list.round, joins=survivor_list.joins, site=site,
        claim=survivors_digest(state.cohort, survivor_list), surplus=state.surplus(len(survivors)), payload=payload,
    )  # fmt: skip
