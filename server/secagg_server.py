"""The server's side of secure aggregation over a run: keys advertised, secrets shared, and the one sum it may read."""

import logging
import math
import os
import threading
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from fedllm import secagg
from fedllm.crypto.identity import PublicIdentity
from fedllm.crypto.primitives import random_bytes
from fedllm.errors import FedllmError, MessageError, QuorumLost
from fedllm.plan import RunPlan
from fedllm.privacy.distributed_noise import DistributedMechanism
from fedllm.protocol.messages import (
    AdvertisedKey,
    AdvertiseKeys,
    ConsistencySignature,
    Declined,
    KeyShares,
    MaskedInput,
    Prepare,
    SecAggRequest,
    ShareKeysRequest,
    UnmaskingShares,
    from_bytes,
)
from fedllm.secagg import Cohort, SessionParams
from server.aggregate import bound_of_sum, median
from server.channel import arrived

_log = logging.getLogger("fedllm.server")
_SAID = 10  # wrong shares of a sum that are logged
_LIES = "gave back wrong shares, of more than half of all secrets: it is not asked again in this run"

# Sends each of these sites a request and returns what they answered: bytes, or text that says why there is nothing.
# The number is how many answers are enough for others not to be waited for long.
Ask = Callable[[Mapping[str, bytes], int], Iterable[tuple[str, bytes | str]]]


class SecAggServer:
    """One session, in memory only: a server that was started again opens another, and all sites advertise keys anew."""

    def __init__(
        self, plan: RunPlan, distributed: DistributedMechanism, dimension: int, metrics: int,
        roster: Mapping[str, PublicIdentity], session: str = "",
    ) -> None:  # fmt: skip
        """`distributed` is the plan's; `roster` names the sites that may take part; groups share one `session`.

        A sum holds the update, of `dimension` values, the score, of `metrics`, or both.
        """
        self._plan, self._distributed, self._dimension, self._metrics = plan, distributed, dimension, metrics
        self._params = SessionParams(
            plan.digest, session or new_session(), plan.quorum, plan.privacy.colluding_sites, dict(roster), plan.sites
        )
        self._scores = plan.distributed_scores
        self._joins: dict[str, AdvertisedKey] = {}
        self._cohort: Cohort | None = None
        self._dealt: dict[str, KeyShares] = {}  # of the next round, from the cohort
        self._participants: dict[str, KeyShares] = {}  # of the present round
        self._uploads: secagg.MaskedSum | None = None  # the same
        self.liars: dict[str, str] = {}  # of the last sum that was opened: whose shares were wrong, and how

    @property
    def question(self) -> bytes:
        """The request that announces the plan and asks a site for its keys."""
        return _announced(self._plan, self._params.session, self._params.roster)

    def join(self, site: str, payload: bytes) -> None:
        """Take a site's AdvertiseKeys in place of an earlier one; raises MessageError if they are not its own."""
        message = from_bytes(payload, AdvertiseKeys, AdvertiseKeys)
        if message.context != self._params.context or message.join.site != site:
            raise MessageError("an advertised key of another site, or for another session")
        secagg.check_advertised_key(self._params, message.join)
        if any(other.key == message.join.key for name, other in self._joins.items() if name != site):
            raise MessageError("an advertised key that another site has, too")
        if self._joins.get(site) != message.join:
            self._dealt.pop(site, None)
        self._joins[site] = message.join

    def deal(self, number: int, sites: Iterable[str], ask: Ask) -> tuple[Mapping[str, bytes], dict[str, str]]:
        """Have `sites` share a round's secrets; return a MaskedInputRequest for each that did, and why others did not.

        Nothing is asked if all shared them with their last uploads: that is the round of two exchanges. Raises
        FedllmError if too few sites have advertised keys.
        """
        failed: dict[str, str] = {}
        cohort = self._cohort
        present = sorted(set(sites) & set(self._joins), key=lambda name: (name not in self._dealt, name))
        names = sorted(present[: self._plan.sites])
        failed.update(dict.fromkeys(present[self._plan.sites :], f"the plan is for {self._plan.sites} sites"))
        dealt = {name: self._dealt[name] for name in names if name in self._dealt}
        if cohort is None or set(dealt) != set(names):
            cohort = self._cohort = secagg.make_cohort(self._params, [self._joins[name] for name in names])
            step = ShareKeysRequest(context=self._params.context, round=number, joins=cohort.joins).to_bytes()
            dealt = {}
            for site, data in ask(dict.fromkeys(names, self._secure(number, step)), self._plan.quorum):
                try:
                    shares = from_bytes(arrived(data), KeyShares, Declined)
                    if isinstance(shares, Declined):
                        raise MessageError(f"declined to share secrets ({shares.reason})")
                    self._check_key_shares(cohort, number, shares, site)
                    dealt[site] = shares
                except MessageError as error:
                    failed[site] = str(error)
        self._dealt = {}
        self._participants = dealt
        self._uploads = secagg.MaskedSum(cohort, number, self._length(number))
        return secagg.MaskedInputRequests(cohort, number, dealt), failed

    def read(self, site: str, number: int, masked: bytes, following: bytes) -> None:
        """Check an upload, add it to the others, and keep the site's shares for the next round.

        Raises MessageError; then the upload is in no sum.
        """
        cohort = self._at(number)
        upload = from_bytes(masked, MaskedInput, MaskedInput)
        if upload.site != site:
            raise MessageError(f"an upload of site={upload.site}")
        if following:
            shares = from_bytes(following, KeyShares, KeyShares)
            self._check_key_shares(cohort, number + 1, shares, site)
        self._summed(number).add(upload)
        if following:
            self._dealt[site] = shares

    def step(self, number: int, task: str, uploads: Collection[str], ask: Ask) -> "Opened":
        """Return what the sum of the uploads says, which are those of the sites named.

        `task` is the digest of the request, the same for all sites. The sum is the first thing that can be read; it is
        divided by public numbers: survivors, and the expected units of each. Raises FedllmError if unmasking
        fails, or the sum is beyond what honest sites can send.
        """
        total, trimmed = self.unmask(number, task, uploads, ask)
        return self.read_sum(number, total, len(uploads), trimmed)

    def read_sum(self, number: int, total: NDArray[np.uint32], survivors: int, trimmed: int) -> "Opened":
        """Return what an unmasked sum uint32[n] says; raises MessageError beyond its bound."""
        step: NDArray[np.float32] | None = None
        scores: ScoreSum | None = None
        for mechanism, block in self._blocks(number, total):
            decoded = mechanism.decode(block)
            bound = bound_of_sum(mechanism, survivors, trimmed)
            bound.check(decoded)
            if mechanism is self._distributed:
                decoded *= -self._plan.training.learning_rate
                decoded /= survivors * self._plan.expected_units
                step = decoded.astype(np.float32)
            else:
                scores = ScoreSum(decoded, bound.noise_std, mechanism.clip_before_rounding(self._metrics))
        return Opened(step, trimmed, self.noise_multiplier(survivors, trimmed), scores)

    def _parts(self, number: int) -> list[tuple[DistributedMechanism, int]]:
        """Return by which mechanisms an exchange's sum is made, and how many of its values by each."""
        parts = [(self._distributed, self._dimension)] if number <= self._plan.training.rounds else []
        if self._scores is not None and self._plan.score_noise(number) is not None:
            parts.append((self._scores, self._metrics))
        return parts

    def _length(self, number: int) -> int:
        return sum(length for _, length in self._parts(number))

    def _blocks(self, number: int, total: NDArray[np.uint32]) -> list[tuple[DistributedMechanism, NDArray[np.uint32]]]:
        """Return the parts of a sum uint32[n], views, each with the mechanism that it was made by."""
        found, position = [], 0
        for mechanism, length in self._parts(number):
            found.append((mechanism, total[position : position + length]))
            position += length
        return found

    def noise_multiplier(self, survivors: int, trimmed: int) -> float:
        """Return the sum's noise multiplier, as seen by the server with the sites that may collude with it."""
        return self._distributed.noise_multiplier(survivors, trimmed, self._plan.privacy.colluding_sites)

    def unmask(self, number: int, task: str, uploads: Collection[str], ask: Ask) -> tuple[NDArray[np.uint32], int]:
        """Return the sum of the uploads, uint32[n], and from how many of them excess noise was removed."""
        cohort, threshold = self._at(number), self._plan.quorum
        dealings = (self._participants[site].dealing for site in sorted(self._participants))
        common = secagg.common_digest(cohort, number, task, dealings)
        survivor_list = secagg.consistency_check(cohort, number, common, self._participants, uploads)
        secagg.check_survivor_list(self._params, survivor_list, self._participants)
        consents: list[ConsistencySignature] = []
        reveals: list[UnmaskingShares] = []
        faults: list[str] = []
        surplus = len(self._parts(number)) * len(self._distributed.revealed_seeds(len(uploads)))
        question: dict[str, bytes] = dict.fromkeys(uploads, self._secure(number, survivor_list.to_bytes()))
        while question:
            for site, data in ask(question, threshold):
                try:
                    answer = from_bytes(arrived(data), ConsistencySignature, UnmaskingShares, Declined)
                    if isinstance(answer, Declined):
                        raise MessageError(f"declined ({answer.reason})")
                    if isinstance(answer, ConsistencySignature):
                        if answer.consent.site != site:
                            raise MessageError(f"a signature of site={answer.consent.site}")
                        secagg.check_consistency_signature(cohort, survivor_list, answer.consent)
                        consents.append(answer)
                    else:
                        if answer.site != site:
                            raise MessageError(f"shares of site={answer.site}")
                        secagg.check_unmasking_shares(cohort, survivor_list, answer)
                        if len(answer.surplus) != surplus:
                            raise MessageError(f"{len(answer.surplus)} seeds of excess noise, expected {surplus}")
                        reveals.append(answer)
                except MessageError as error:
                    faults.append(f"{site}: {error}")
            question = {}
            if len(consents) >= threshold and not reveals:
                step = secagg.unmasking_request(survivor_list, consents).to_bytes()
                question = dict.fromkeys((consent.consent.site for consent in consents), self._secure(number, step))
                consents = []
        if len(reveals) < threshold:
            raise QuorumLost(
                f"{len(reveals)} of {len(uploads)} sites helped to unmask the sum, at least {threshold} are needed. "
                f"{'; '.join(faults)}"
            )
        unmasked = secagg.unmask(cohort, self._participants, survivor_list, self._summed(number), reveals)
        for holder, dealer in unmasked.doubtful[:_SAID]:
            _log.warning(
                "round %d: a share of %s's secret that %s gave back is wrong: one of the two made it", number, dealer,
                holder,
            )  # fmt: skip
        self.liars = dict.fromkeys(unmasked.liars, _LIES)
        total = unmasked.total_d
        self._take_off(number, total, [reveal.surplus for reveal in reveals], len(uploads))
        return total, len(reveals)

    def _take_off(self, number: int, total: NDArray[np.uint32], seeds: Iterable[Sequence[str]], survivors: int) -> None:
        """Subtract excess noise in place; drawing it again is most of the server's work, hence on all cores."""
        blocks, turn = self._blocks(number, total), threading.Lock()

        def take_off(own: Sequence[str]) -> None:
            each = len(own) // len(blocks)
            for k, (mechanism, block) in enumerate(blocks):
                mechanism.take_off(block, own[k * each : (k + 1) * each], survivors, turn)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(take_off, seeds):
                pass

    def _secure(self, number: int, step: bytes) -> bytes:
        return SecAggRequest(plan=self._plan, round=number, payload=step).to_bytes()

    def _check_key_shares(self, cohort: Cohort, number: int, shares: KeyShares, site: str) -> None:
        if shares.dealing.site != site:
            raise MessageError(f"shares of site={shares.dealing.site}")
        secagg.check_key_shares(cohort, number, shares)

    def _summed(self, number: int) -> secagg.MaskedSum:
        if self._uploads is None:
            raise FedllmError(f"round {number}: no site has shared secrets")
        return self._uploads

    def _at(self, number: int) -> Cohort:
        if self._cohort is None:
            raise FedllmError(f"round {number}: no site has shared secrets")
        return self._cohort


@dataclass(frozen=True)
class ScoreSum:
    """A noised sum of the sites' scores of an adapter (fedllm.privacy.metrics)."""

    total: NDArray[np.float64]  # [1 + metrics]
    noise_std: float  # of each coordinate
    factor: float  # by which every unit's vector was shortened, so that rounded it is still in the clip

    @staticmethod
    def of(sums: "Sequence[ScoreSum | None]") -> "ScoreSum | None":
        """Add up sums of different sites; None if there is none."""
        found = [each for each in sums if each is not None]
        if not found:
            return None
        total = np.sum([each.total for each in found], axis=0)
        return ScoreSum(total, math.hypot(*(each.noise_std for each in found)), found[0].factor)


@dataclass(frozen=True)
class Opened:
    """What a sum says that was unmasked."""

    step: NDArray[np.float32] | None  # [d]; None in the closing exchange
    trimmed: int  # from how many sites excess noise was removed
    noise_multiplier: float  # as seen by the server with the sites that may collude with it
    scores: ScoreSum | None  # of the adapter that the round starts from


@dataclass(frozen=True)
class Combined:
    """What the sums of a round's groups give together; keys are a group's number in the plan, from 1, as text."""

    step: NDArray[np.float32] | None  # [d]; None in the closing exchange
    scores: ScoreSum | None
    noise_multiplier: float  # the least of those of the sums
    trimmed: dict[str, int]  # of each sum that was used: from how many sites excess noise was removed
    refused: dict[str, str]  # why, for each sum beyond what honest sites can send
    closed: dict[str, str]  # why, for each sum that could not be unmasked


class Groups:
    """The sessions of a plan's groups; to the round loop they look like one session."""

    def __init__(
        self, plan: RunPlan, distributed: DistributedMechanism, dimension: int, metrics: int,
        roster: Mapping[str, PublicIdentity],
    ) -> None:  # fmt: skip
        """`roster` holds the sites of all groups; a site in no group takes part in none."""
        self._plan, self._roster, self._session = plan, dict(roster), new_session()
        self._of = {
            group: SecAggServer(
                plan, distributed, dimension, metrics, {n: roster[n] for n in group if n in roster}, self._session
            )
            for group in plan.groups
        }

    @property
    def question(self) -> bytes:
        """The request that announces the plan and asks a site for its keys."""
        return _announced(self._plan, self._session, self._roster)

    @property
    def liars(self) -> dict[str, str]:
        """Whose shares were wrong in the last sum of its group that was opened, and how."""
        return {site: text for masks in self._of.values() for site, text in masks.liars.items()}

    def join(self, site: str, payload: bytes) -> None:
        """Take a site's AdvertiseKeys; raises MessageError if they are not its own."""
        self._masks_of(site).join(site, payload)

    def deal(self, number: int, sites: Iterable[str], ask: Ask) -> tuple[Mapping[str, bytes], dict[str, str]]:
        """Have secrets shared in every group, as `SecAggServer.deal` does. A group below its quorum is left out."""
        masking, failed, present = ChainMap[str, bytes](), dict[str, str](), set(sites)
        for group, masks in self._of.items():
            here = present & set(group)
            try:
                asked, undealt = masks.deal(number, here, ask)
            except FedllmError as error:
                asked, undealt = {}, dict.fromkeys(here, f"its group cannot share secrets: {error}")
            if len(asked) < self._plan.quorum:
                undealt = {**dict.fromkeys(asked, f"{len(asked)} sites of its group shared secrets"), **undealt}
                asked = {}
            masking.maps.append(cast(dict[str, bytes], asked))
            failed |= undealt
        return masking, failed

    def read(self, site: str, number: int, masked: bytes, following: bytes) -> None:
        """Check and add an upload, as `SecAggServer.read` does; raises MessageError."""
        self._masks_of(site).read(site, number, masked, following)

    def step(self, number: int, task: str, uploads: Collection[str], ask: Ask) -> Combined:
        """Return the median of the steps of the groups' sums.

        A group whose sum is beyond what honest sites can send counts against the poisoned sites. Raises QuorumLost
        if too few sums can be used to outvote the others.
        """
        opened = dict[str, Opened]()
        refused, closed = dict[str, str](), dict[str, str]()
        for index, (group, masks) in enumerate(self._of.items(), start=1):
            here = set(uploads) & set(group)
            try:
                if len(here) < self._plan.quorum:
                    raise QuorumLost(f"{len(here)} sites answered, {self._plan.quorum} are needed")
                total, off = masks.unmask(number, task, here, ask)
            except FedllmError as error:
                closed[str(index)] = str(error)
                continue
            try:
                opened[str(index)] = masks.read_sum(number, total, len(here), off)
            except MessageError as error:
                refused[str(index)] = str(error)
        if not self._plan.outvotes(len(opened), len(refused)):
            why = "; ".join(f"group {index}: {text}" for index, text in sorted((refused | closed).items()))
            raise QuorumLost(
                f"the sums of {len(opened)} groups can be used, and {self._plan.poisoned_sites} sites may be poisoned. "
                f"{why}"
            )
        steps = [each.step for each in opened.values() if each.step is not None]
        return Combined(
            median(steps) if steps else None,
            ScoreSum.of([each.scores for each in opened.values()]),
            min(each.noise_multiplier for each in opened.values()),
            {index: each.trimmed for index, each in opened.items()},
            refused,
            closed,
        )

    def _masks_of(self, site: str) -> SecAggServer:
        for group, masks in self._of.items():
            if site in group:
                return masks
        raise MessageError(f"site={site!r} is in no group of the plan")


def new_session() -> str:
    """Return a nonce of 64 hexadecimal digits."""
    return random_bytes(32).hex()


def _announced(plan: RunPlan, session: str, roster: Mapping[str, PublicIdentity]) -> bytes:
    named = {name: identity.to_text() for name, identity in roster.items()}
    return Prepare(plan=plan, session=session, roster=named).to_bytes()
