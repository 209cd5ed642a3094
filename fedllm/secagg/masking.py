"""Masks, the same for both ends: how their keys are derived, and how one is added to a vector."""

import numpy as np

from fedllm.crypto import primitives
from fedllm.crypto.primitives import AgreementKey
from fedllm.protocol.messages import SignedMaskKey
from fedllm.secagg.session import Cohort, Vector

WORD = np.dtype("<u4")


def seed_commitment(cohort: Cohort, number: int, site: str, seed: int) -> bytes:
    """Commit to a seed: it has 256 random bits, so its image under HKDF gives nothing away."""
    return primitives.derive(seed.to_bytes(32, "big"), cohort.document("commitment", number, site))


def self_mask_key(cohort: Cohort, number: int, common: str, site: str, seed: int) -> bytes:
    return primitives.derive(seed.to_bytes(32, "big"), cohort.document("self mask", number, common, site))


def pair_mask_key(cohort: Cohort, number: int, common: str, own: str, key: AgreementKey, peer: SignedMaskKey) -> bytes:
    """Return the key of the mask between two sites; raises CryptoError on a peer's key of small order."""
    return agreed_mask_key(cohort, number, common, own, key.agree(bytes.fromhex(peer.key)), peer.site)


def agreed_mask_key(cohort: Cohort, number: int, common: str, own: str, agreed: bytes, peer: str) -> bytes:
    """Return the key of the mask between two sites, from what their keys of the round agree on."""
    return primitives.derive(agreed, cohort.document("pair mask", number, common, *sorted((own, peer))))


def share_key(cohort: Cohort, number: int, agreed: bytes, sender: str, receiver: str, mask_key: bytes) -> bytes:
    """Return a key for one pair of shares: `dealing` is the signed document on them, with keys of their own."""
    return primitives.derive(agreed, cohort.document("sealed shares", number, sender, receiver, mask_key))


def add_mask(total_d: Vector, key: bytes, sign: int) -> None:
    """Add or subtract PRG(key), uint32[d], in place."""
    start = 0
    for block in primitives.keystream(key, total_d.nbytes):
        words = np.frombuffer(block, WORD)
        part = total_d[start : start + len(words)]
        (np.add if sign > 0 else np.subtract)(part, words, out=part)
        start += len(words)


def mask_sign(cohort: Cohort, site: str, peer: str) -> int:
    """Return what `site` multiplies the mask that it shares with `peer` by."""
    return 1 if cohort.place[site] < cohort.place[peer] else -1
