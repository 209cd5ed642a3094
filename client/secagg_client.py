"""A site's part in secure aggregation over its runs: keeps a `fedllm.secagg.Participant` for each."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.errors import ConfigError, CryptoError, MessageError, PrivacyError, SecAggError
from fedllm.plan import RunPlan
from fedllm.protocol.messages import (
    ConsistencyCheck,
    KeyShares,
    MaskedInputRequest,
    Prepare,
    SecAggRequest,
    ShareKeysRequest,
    UnmaskingRequest,
    from_bytes,
)
from fedllm.secagg import Participant, SessionParams

_RUNS = 8  # at a time
# ids of this start of the machine, and of the virtual machine if its host gives each copy another one (Xen)
_IDS = (Path("/proc/sys/kernel/random/boot_id"), Path("/sys/hypervisor/uuid"))
Peers = Callable[[Mapping[str, str]], Mapping[str, PublicIdentity]]


class SecAggClient:
    """Keeps secrets in memory only: a site that was started again has dropped out, and advertises keys anew.

    So has one that finds itself in another process, or start of a machine, than its secrets were made in: two copies of
    a running site would mask two vectors alike, and the difference of these is not masked.
    """

    def __init__(self, site: str, identity: Callable[[], Identity], peers: Peers) -> None:
        """`peers` returns those of the sites that the server names whom this site believes to be who they are."""
        self._site, self._identity, self._peers = site, identity, peers
        self._members: dict[str, Participant] = {}  # by the plan's digest, the least recent first: runs may overlap
        self._made = incarnation()

    def join(self, request: Prepare) -> bytes:
        """Return this site's AdvertiseKeys for a session of a plan; the same one while the session lasts."""
        plan = request.plan
        if request.session is None:
            raise MessageError("a plan with noise in shares comes with a session of secure aggregation")
        self._forget_if_copied()
        cohort = plan.cohort(self._site)  # fixed by the plan for the whole run: sites outside it are no peers
        with _judged():
            peers = self._peers(request.roster)
            params = SessionParams(
                plan.digest,
                request.session,
                plan.quorum,
                plan.privacy.colluding_sites,
                peers if cohort is None else {name: peers[name] for name in cohort if name in peers},
                plan.sites,
            )
            member = self._members.pop(plan.digest, None)
            if member is None or member.params != params:
                member = Participant(params, self._site, self._identity())
        self._members[plan.digest] = member
        while len(self._members) > _RUNS:
            del self._members[next(iter(self._members))]
        return member.join.to_bytes()

    def answer(self, request: SecAggRequest) -> bytes:
        """Answer a step of secure aggregation that is not an upload."""
        member = self._of(request.plan)
        step = from_bytes(request.payload, ShareKeysRequest, ConsistencyCheck, UnmaskingRequest)
        if step.round != request.round or step.round > request.plan.masked_exchanges:
            raise MessageError(f"round={step.round} of secure aggregation in a request of round={request.round}")
        with _judged():
            if isinstance(step, ShareKeysRequest):
                return member.share(step).to_bytes()
            return (member.unmask(step) if isinstance(step, ConsistencyCheck) else member.reveal(step)).to_bytes()

    def check(self, plan: RunPlan, request: MaskedInputRequest) -> None:
        """Raise SecAggError if an upload could not be masked as the server asks: before it is paid for."""
        with _judged():
            self._of(plan).check(request)

    def mask(
        self,
        plan: RunPlan,
        request: MaskedInputRequest,
        task: str,
        vector: NDArray[np.uint32],
        seeds: Sequence[Sequence[str]],
    ) -> tuple[bytes, bytes]:
        """Return the masked vector uint32[d] as a message, and its KeyShares of the next round.

        `task` is the digest of what the vector was computed from; `seeds` are, for each of its blocks, of the noise in
        it that may turn out as excess.
        """
        member, distributed = self._of(plan), plan.distributed
        if distributed is None:
            raise MessageError(f"privacy.mode={plan.privacy.mode} has no noise in shares")
        with _judged():
            masked = member.mask(
                request, task, vector, lambda u: tuple(own[k] for own in seeds for k in distributed.revealed_seeds(u))
            )
            following: KeyShares | None = None
            if request.round < plan.masked_exchanges:
                following = member.share(ShareKeysRequest(context=request.context, round=request.round + 1, joins=()))
        return masked.to_bytes(), following.to_bytes() if following is not None else b""

    def _forget_if_copied(self) -> None:
        if (now := incarnation()) != self._made:
            self._members.clear()
            self._made = now

    def _of(self, plan: RunPlan) -> Participant:
        self._forget_if_copied()
        member = self._members.get(plan.digest)
        if member is None:
            raise SecAggError(
                "this site has not joined secure aggregation for this plan since it was started, or copied"
            )
        return member


def incarnation() -> str:
    """Return which process this is, in which start of which machine; two copies with one answer are not told apart."""
    found = [str(os.getpid())]
    for path in _IDS:
        with contextlib.suppress(OSError, ValueError):
            found.append(path.read_text("ascii").strip())
    return " ".join(found)


@contextlib.contextmanager
def _judged() -> Iterator[None]:
    """Turn what secure aggregation refuses into the one error that says so."""
    try:
        yield
    except SecAggError:
        raise
    except (PrivacyError, MessageError, CryptoError, ConfigError) as error:
        raise SecAggError(str(error)) from error
