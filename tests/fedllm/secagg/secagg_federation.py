"""Sites and an honest server for tests of secure aggregation; `python -m tests.fedllm.secagg.secagg_federation` writes
tests/vectors/secagg.json.

Every message travels as bytes. Seeded secrets exist only here: `seeded` replaces
`fedllm.crypto.primitives.random_bytes`, which production code can neither configure nor reach.
"""

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from fedllm import secagg
from fedllm.crypto.identity import Identity
from fedllm.protocol.messages import (
    AdvertiseKeys,
    ConsistencyCheck,
    ConsistencySignature,
    KeyShares,
    MaskedInput,
    MaskedInputRequest,
    Message,
    ShareKeysRequest,
    SignedMaskKey,
    UnmaskingRequest,
    UnmaskingShares,
    from_bytes,
)
from fedllm.secagg import aggregator

PLAN, SESSION, TASK = "a1" * 32, "b2" * 32, "c3" * 32
VECTORS = Path(__file__).parents[2] / "vectors" / "secagg.json"
KINDS: tuple[type[Message], ...] = (
    AdvertiseKeys, ShareKeysRequest, KeyShares, MaskedInputRequest, MaskedInput, ConsistencyCheck,
    ConsistencySignature, UnmaskingRequest, UnmaskingShares,
)  # fmt: skip
Vector = NDArray[np.uint32]
M = TypeVar("M", bound=Message)


def wire(message: M) -> M:
    """Return what the other end reads."""
    return from_bytes(message.to_bytes(), type(message), type(message))


@contextlib.contextmanager
def seeded(label: str) -> Iterator[None]:
    """Make every secret of secure aggregation a function of `label`."""
    count = 0

    def draw(n: int) -> bytes:
        nonlocal count
        count += 1
        return hashlib.shake_256(f"{label} {count}".encode()).digest(n)

    with mock.patch("fedllm.crypto.primitives.random_bytes", draw):
        yield


def identity_of(label: str) -> Identity:
    return Identity.from_bytes(hashlib.shake_256(label.encode()).hexdigest(64).encode())


def names(n: int) -> list[str]:
    return [f"지점-{number:03}" for number in range(1, n + 1)]


class Federation:
    """n sites that all joined, and what the server does for them."""

    def __init__(
        self, n: int, threshold: int | None = None, colluders: int = 0, plan: str = PLAN, session: str = SESSION,
        roster: int | None = None,
    ) -> None:  # fmt: skip
        least = max((n + colluders) // 2 + 1, colluders + 2)
        self.identities = {name: identity_of(name) for name in names(roster or n)}
        self.params = secagg.SessionParams(
            plan, session, threshold or least, colluders, {k: v.public for k, v in self.identities.items()}
        )
        self.members = {name: secagg.Participant(self.params, name, self.identities[name]) for name in names(n)}
        self.cohort = secagg.make_cohort(self.params, [wire(m.join).join for m in self.members.values()])
        self.tasks = dict.fromkeys(self.members, TASK)  # what each site is asked to compute
        self._dealt: dict[tuple[int, str], SignedMaskKey] = {}  # the newest, by round and site

    def share_request(self, number: int, *, repeat: bool = False) -> ShareKeysRequest:
        joins = () if repeat else self.cohort.joins
        return ShareKeysRequest(context=self.params.context, round=number, joins=joins)

    def share(self, number: int, sites: Collection[str] | None = None) -> dict[str, KeyShares]:
        """Return what the sites deal, checked."""
        dealt = {}
        for site in self.members if sites is None else sites:
            dealt[site] = wire(self.members[site].share(wire(self.share_request(number))))
            secagg.check_key_shares(self.cohort, number, dealt[site])
            self._dealt[number, site] = dealt[site].dealing
        return dealt

    def common(self, number: int, participants: Collection[str], task: str = TASK) -> str:
        """Return the digest of what is common to participants, those left out that never dealt."""
        dealings = [self._dealt[number, site] for site in sorted(participants) if (number, site) in self._dealt]
        return secagg.common_digest(self.cohort, number, task, dealings)

    def masked_input_request(self, number: int, dealt: Mapping[str, KeyShares], site: str) -> MaskedInputRequest:
        return wire(secagg.masked_input_request(self.cohort, number, dealt, site))

    def mask(
        self, number: int, dealt: Mapping[str, KeyShares], vectors: Mapping[str, Vector]
    ) -> dict[str, MaskedInput]:
        """Return the uploads of the sites in `vectors`."""
        return {
            site: wire(
                self.members[site].mask(self.masked_input_request(number, dealt, site), self.tasks[site], vector)
            )
            for site, vector in vectors.items()
        }

    def claim(
        self, number: int, participants: Collection[str], survivors: Collection[str], task: str = TASK
    ) -> ConsistencyCheck:
        common = self.common(number, participants, task)
        return wire(secagg.consistency_check(self.cohort, number, common, participants, survivors))

    def consents(self, claim: ConsistencyCheck, sites: Collection[str]) -> list[ConsistencySignature]:
        answers = [wire(self.members[site].unmask(claim)) for site in sites]
        assert all(isinstance(answer, ConsistencySignature) for answer in answers)
        return [answer for answer in answers if isinstance(answer, ConsistencySignature)]

    def reveals(
        self, claim: ConsistencyCheck, signers: Collection[str], sites: Collection[str]
    ) -> list[UnmaskingShares]:
        """Return the answers of `sites`, after `signers` have signed where that is needed."""
        if not claim.dropped:
            answers = [wire(self.members[site].unmask(claim)) for site in sites]
            return [answer for answer in answers if isinstance(answer, UnmaskingShares)]
        proof = wire(secagg.unmasking_request(claim, self.consents(claim, signers)))
        return [wire(self.members[site].reveal(proof)) for site in sites]

    def run(
        self, number: int, vectors: Mapping[str, Vector], dealt: Mapping[str, KeyShares] | None = None
    ) -> aggregator.Unmasked:
        """Play a round in which the sites outside `vectors` drop out after they have dealt."""
        dealt = self.share(number) if dealt is None else dealt
        uploads = self.mask(number, dealt, vectors)
        claim = self.claim(number, dealt, uploads)
        reveals = self.reveals(claim, list(uploads), list(uploads))
        return secagg.unmask(self.cohort, dealt, claim, self.added(number, uploads), reveals)

    def added(self, number: int, uploads: Mapping[str, MaskedInput], dimension: int | None = None) -> secagg.MaskedSum:
        """Return what the server keeps of uploads, of the first one's length where `dimension` is not given."""
        length = len(next(iter(uploads.values())).payload) // 4 if dimension is None else dimension
        result = secagg.MaskedSum(self.cohort, number, length)
        for upload in uploads.values():
            result.add(upload)
        return result


def random_vectors(sites: Collection[str], dimension: int, seed: int = 0) -> dict[str, Vector]:
    generator = np.random.default_rng(seed)
    return {site: generator.integers(0, 2**32, dimension, dtype=np.uint32) for site in sites}


def total(vectors: Mapping[str, Vector]) -> Vector:
    return np.sum(np.stack(list(vectors.values())), axis=0, dtype=np.uint32)


# ---- vectors ---------------------------------------------------------------------------------------------------------


def make_vectors() -> dict[str, Any]:
    """Return a quiet round and one with a dropout among four sites, message by message, and malformed ones."""
    with seeded("vectors"):
        federation = Federation(4, threshold=3)
        sites = list(federation.members)
        vectors = random_vectors(sites, 5)
        messages: list[Message] = [member.join for member in federation.members.values()]
        rounds = []
        for number, survivors in ((1, sites), (2, sites[1:])):
            messages += [federation.share_request(number, repeat=number > 1)]
            dealt = federation.share(number)
            uploads = federation.mask(number, dealt, {site: vectors[site] for site in survivors})
            claim = federation.claim(number, dealt, survivors)
            messages += [*dealt.values(), *(federation.masked_input_request(number, dealt, site) for site in survivors)]
            messages += [*uploads.values(), claim]
            if claim.dropped:
                consents = federation.consents(claim, survivors)
                messages += [*consents, secagg.unmasking_request(claim, consents)]
            reveals = federation.reveals(claim, survivors, survivors)
            unmasked = secagg.unmask(federation.cohort, dealt, claim, federation.added(number, uploads), reveals)
            messages += reveals
            rounds.append({"survivors": survivors, "sum": unmasked.total_d.tolist()})
    first = {kind: next(m for m in messages if isinstance(m, kind)) for kind in KINDS}
    return {
        "source": "python -m tests.fedllm.secagg.secagg_federation; secrets: SHAKE-256 of a counter, "
        "identities: of the name",
        "plan": PLAN,
        "session": SESSION,
        "threshold": 3,
        "colluders": 0,
        "identities": {name: identity.public.to_text() for name, identity in federation.identities.items()},
        "inputs": {site: vector.tolist() for site, vector in vectors.items()},
        "rounds": rounds,
        "messages": [{"kind": message.KIND, "hex": message.to_bytes().hex()} for message in messages],
        "malformed": [entry for kind in KINDS for entry in _malformed(first[kind])],
    }


def _malformed(message: Message) -> list[dict[str, str]]:
    data = message.to_bytes()
    length = int.from_bytes(data[4:8], "big")
    header = json.loads(data[8 : 8 + length])

    def frame(content: object) -> bytes:
        encoded = json.dumps(content, ensure_ascii=False).encode()
        return data[:4] + len(encoded).to_bytes(4, "big") + encoded

    first = next(key for key in header if key not in ("kind", "context"))
    spoiled = {
        "cut in the header": data[: 8 + length // 2],
        "of another protocol": b"XXXX" + data[4:],
        "a field missing": frame({k: v for k, v in header.items() if k != first}),
        "a field too many": frame({**header, "trust": "me"}),
        "a payload in the header": frame({**header, "payload": ""}),
        "a context in capitals": frame({**header, "context": header["context"].upper()}),
        "a context of 31 bytes": frame({**header, "context": header["context"][2:]}),
        "a field of another type": frame({**header, first: 1.5}),
    }
    return [{"kind": message.KIND, "why": why, "hex": value.hex()} for why, value in spoiled.items()]


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(make_vectors(), ensure_ascii=False, indent=1) + "\n", "utf-8")
