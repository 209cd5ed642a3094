"""Attack: different start values to different sites, so that the sum holds what one of them learned and nothing else
(Pasquini et al., "Eluding Secure Aggregation in Federated Learning via Model Inconsistency", CCS 2022).

Stopped by masks that depend on all that is common to a round's request, and by a bound on start values.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from client.policy import widest
from client.site import Site
from fedllm import secagg
from fedllm.crypto import shamir
from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.crypto.primitives import AgreementKey
from fedllm.errors import FedllmError, MessageError, PrivacyError, QuorumLost
from fedllm.plan import RunPlan
from fedllm.privacy.ledger import LedgerFile
from fedllm.privacy.ledger_place import LedgerPlace
from fedllm.protocol.messages import (
    ConsistencyCheck,
    ConsistencySignature,
    Declined,
    MaskedInput,
    Message,
    Ready,
    Signed,
    TrainReply,
    TrainRequest,
    UnmaskingShares,
    from_bytes,
    pack,
    unpack,
)
from fedllm.secagg import aggregator, session
from fedllm.secagg.masking import add_mask, mask_sign, pair_mask_key, self_mask_key
from fedllm.training.model_context import ModelContext, open_context
from fedllm.values import MAX_START
from server.secagg_server import SecAggServer
from tests.bug_zoo.invariants import plan_of
from tests.client.test_site import BEGUN, Loader
from tests.fedllm.secagg.secagg_federation import TASK, Federation, Vector, names, random_vectors, total

POISONED = "d4" * 32  # the task that others are given
DIMENSION = 16


# ---- the masks: every script of the server, with all it can work out ------------------------------------------------


class HeadOffice:
    """Asks what it likes, and takes off every mask whose key it can put together."""

    def __init__(self, federation: Federation, colluding: Collection[str] = ()) -> None:
        self.federation, self.colluding = federation, colluding
        self.dealt = federation.share(1)
        self.views = {site: frozenset(self.dealt) for site in self.dealt}  # the participants each is shown
        self.vectors = random_vectors(self.dealt, DIMENSION)
        self.uploads: dict[str, MaskedInput] = {}
        self.shares: dict[tuple[str, bool], dict[str, int]] = {}  # of a dealer's seed, or else mask key; by holder

    def collect(self, gone: Collection[str] = ()) -> None:
        """Have every site upload that has not gone."""
        for site in self.dealt:
            if site not in gone:
                seen = {name: self.dealt[name] for name in self.views[site]}
                self.uploads |= self.federation.mask(1, seen, {site: self.vectors[site]})
        for site in set(self.colluding) & set(self.uploads):
            for dealer, pair in self.federation.members[site]._rounds[1].held.items():
                for share, of_seed in zip(pair, (True, False), strict=True):
                    self.shares.setdefault((dealer, of_seed), {})[site] = int.from_bytes(share, "big")

    def ask(self, sites: Iterable[str], survivors: Collection[str], task: str, view: Collection[str] = ()) -> int:
        """Play a list of survivors to these sites, the colluding ones signing it too; return how many reveal."""
        claim = self.federation.claim(1, view or self.dealt, survivors, task)
        consents, revealed = [], 0
        document = session.survivors_document(self.federation.cohort, claim)
        for name in set(self.colluding) & set(survivors):
            signature = self.federation.identities[name].sign(document).hex()
            consents.append(Signed(site=name, signature=signature))
        asked = [site for site in sites if site in self.uploads and site not in self.colluding]
        for site in asked:
            try:
                answer = self.federation.members[site].unmask(claim)
            except FedllmError:
                continue
            if isinstance(answer, ConsistencySignature):
                consents.append(answer.consent)
            else:
                revealed += self._note(claim, answer)
        proof = secagg.unmasking_request(claim, ()).model_copy(update={"consents": tuple(consents)})
        for site in asked if claim.dropped else ():
            try:
                revealed += self._note(claim, self.federation.members[site].reveal(proof))
            except FedllmError:
                continue
        return revealed

    def _note(self, claim: ConsistencyCheck, reveal: UnmaskingShares) -> int:
        for index, dealer in enumerate(sorted([*claim.survivors, *claim.dropped])):
            found = self.shares.setdefault((dealer, dealer in claim.survivors), {})
            found[reveal.site] = aggregator._share_at(reveal, index)
        return 1

    def _secret(self, dealer: str, of_seed: bool) -> int | None:
        found = self.shares.get((dealer, of_seed), {})
        if dealer in self.colluding:
            state = self.federation.members[dealer]._rounds[1]
            return state.seed if of_seed else state.key.scalar
        if len(found) < self.federation.params.threshold:
            return None
        place = self.federation.cohort.place
        holders = sorted(found, key=place.__getitem__)[: self.federation.params.threshold]
        points = tuple(place[holder] for holder in holders)
        return shamir.combine(shamir.weights(points), [found[holder] for holder in holders])

    def opened(self) -> list[frozenset[str]]:
        """Return every group of sites whose sum it can read, the colluding sites' own vectors left out."""
        cohort, bare = self.federation.cohort, dict[str, Vector]()
        for site, upload in self.uploads.items():
            common = self.federation.common(1, self.views[site], self.federation.tasks[site])
            bare[site] = np.frombuffer(upload.payload, "<u4").copy()
            if (seed := self._secret(site, True)) is not None:
                add_mask(bare[site], self_mask_key(cohort, 1, common, site, seed), -1)
            for peer in self.views[site] - {site}:
                for own, other in ((site, peer), (peer, site)):
                    if (scalar := self._secret(own, False)) is not None:
                        key = AgreementKey.from_scalar(scalar)
                        mask = pair_mask_key(cohort, 1, common, own, key, self.dealt[other].dealing)
                        add_mask(bare[site], mask, -mask_sign(cohort, site, peer))
                        break
        honest = [site for site in self.uploads if site not in self.colluding]
        groups = itertools.chain.from_iterable(
            itertools.combinations(honest, size) for size in range(1, len(honest) + 1)
        )
        return [
            frozenset(group) for group in groups
            if any(
                np.array_equal(total({s: bare[s] for s in (*group, *others)}),
                               total({s: self.vectors[s] for s in (*group, *others)}))
                for others in ((), tuple(set(self.colluding) & set(self.uploads)))
            )
        ]  # fmt: skip


FAST, DROPOUT = "all survived", "the others dropped out"


@pytest.mark.parametrize("colluders", [0, 1])
@pytest.mark.parametrize("gone", [0, 1])
@pytest.mark.parametrize("lists", [*itertools.product((FAST, DROPOUT), repeat=2)])
@pytest.mark.parametrize("poisoned", [0, 1, 2, 3, 4])
def test_only_sums_over_a_quorum_with_one_request_open(
    poisoned: int, lists: tuple[str, str], gone: int, colluders: int
) -> None:
    """So many sites are given another task; one of them all may drop out, the last may collude."""
    sites = names(5)
    federation = Federation(5, colluders=colluders)
    for site in sites[:poisoned]:
        federation.tasks[site] = POISONED
    head = HeadOffice(federation, sites[5 - colluders :])
    head.collect(sites[2 : 2 + gone])
    for task, way in zip((POISONED, TASK), lists, strict=True):
        group = [site for site in head.uploads if federation.tasks[site] == task or site in head.colluding]
        head.ask(group, list(head.dealt) if way == FAST else group, task)
    quorum = federation.params.threshold
    for group in head.opened():
        assert len(group) >= quorum - colluders >= 2
        assert len({federation.tasks[site] for site in group}) == 1, "one request"


def test_the_script_above_does_open_a_sum_where_all_are_asked_for_the_same() -> None:
    head = HeadOffice(Federation(5))
    head.collect(names(5)[2:3])
    assert head.ask(head.uploads, head.uploads, TASK) == 4
    assert head.opened() == [frozenset(head.uploads)]


def test_four_poisoned_sites_do_not_isolate_the_fifth() -> None:
    *others, victim = names(5)
    federation = Federation(5)
    federation.tasks |= dict.fromkeys(others, POISONED)
    head = HeadOffice(federation)
    head.vectors |= {site: np.zeros(DIMENSION, np.uint32) for site in others}  # what the attack relies on
    head.collect()
    assert head.ask(others, head.dealt, POISONED) == 4, "all own masks are off"
    assert head.ask([victim], head.dealt, TASK) == 1
    assert head.opened() == []


def test_two_requests_with_fewer_than_a_quorum_each_open_nothing() -> None:
    federation = Federation(6, colluders=1)  # a quorum of 4; 3 and 2 honest sites
    first, second, colluding = names(6)[:3], names(6)[3:5], names(6)[5:]
    federation.tasks |= dict.fromkeys(first, POISONED)
    head = HeadOffice(federation, colluding)
    head.collect()
    assert head.ask(second, [*second, *colluding], TASK) == 0
    assert head.ask(first, head.dealt, POISONED) == 3
    assert head.opened() == []


def test_a_list_for_another_request_is_not_answered() -> None:
    federation = Federation(5)
    head = HeadOffice(federation)
    head.collect()
    with pytest.raises(PrivacyError, match="for another request than the one"):
        federation.members[names(5)[0]].unmask(federation.claim(1, head.dealt, head.dealt, POISONED))
    request = federation.masked_input_request(1, head.dealt, names(5)[0])
    with pytest.raises(PrivacyError, match="or another request"):
        federation.members[names(5)[0]].mask(request, POISONED, head.vectors[names(5)[0]])
    assert head.ask(head.dealt, head.dealt, TASK) == 5, "nothing was used up"


def test_signatures_for_another_request_prove_nothing() -> None:
    """Three sites sign that the others dropped out, for their request: with it nobody of the other request reveals."""
    federation, sites = Federation(5), names(5)
    federation.tasks |= dict.fromkeys(sites[:3], POISONED)
    head = HeadOffice(federation)
    head.collect()
    survivors = sites[:4]
    signed = federation.consents(federation.claim(1, head.dealt, survivors, POISONED), sites[:3])
    own = federation.consents(federation.claim(1, head.dealt, survivors, TASK), sites[3:4])
    proof = secagg.unmasking_request(federation.claim(1, head.dealt, survivors, TASK), [*own, *signed])
    with pytest.raises(MessageError, match="not on this list"):
        federation.members[sites[3]].reveal(proof)


@pytest.mark.parametrize("task", [TASK, POISONED])
def test_changed_participants_and_requests_together_open_nothing(task: str) -> None:
    """The server also shows the victim other participants than the rest."""
    federation, sites = Federation(5), names(5)
    federation.tasks |= dict.fromkeys(sites[:4], task)
    head = HeadOffice(federation)
    head.views |= {sites[4]: frozenset({sites[0], sites[1], sites[4]})}
    head.collect()
    assert head.ask(sites[:4], head.dealt, task) == 4
    assert head.ask(sites[4:], head.views[sites[4]], TASK, head.views[sites[4]]) == 1
    assert head.opened() == []


# ---- real sites ------------------------------------------------------------------------------------------------------


class Offices:
    """Five real sites under one plan, and the server's script; one base model serves them all."""

    def __init__(self, folder: Path, base: Path) -> None:
        values = plan_of(base, distributed=True, insecure_seed=None).model_dump() | {"sites": 5, "quorum": 4}
        self.plan = RunPlan.model_validate(values)
        self.context: ModelContext = open_context(self.plan.model, self.plan.adapter, self.plan.seed, "cpu")
        self.identities = {name: Identity.generate() for name in names(5)}
        self.roster: dict[str, PublicIdentity] = {k: v.public for k, v in self.identities.items()}
        self.ledgers = {
            name: LedgerPlace(folder / name / "ledger.db", folder / name / "ledger.anchor") for name in names(5)
        }
        self.sites: dict[str, Site] = {}
        for name in names(5):
            self.start(name)
        self.begin()

    def start(self, name: str) -> None:
        """Start a site's process, again."""
        policy = widest(1e6, 1e-3, allow_unprotected=False)
        identity = self.identities[name]
        self.sites[name] = Site(
            name, policy, self.ledgers[name], lambda: identity, lambda _: self.context, Loader(), 8,
            lambda _: self.roster, self_check=False,
        )  # fmt: skip

    def begin(self) -> None:
        """Start the server, again: a session, which all sites join."""
        assert self.plan.distributed is not None
        dimension = self.context.adapter.spec.dimension
        self.masks = SecAggServer(self.plan, self.plan.distributed, dimension, 0, self.roster)
        for name, site in self.sites.items():
            ready = from_bytes(site.handle(self.masks.question), Ready, Declined)
            assert isinstance(ready, Ready)
            self.masks.join(name, ready.payload)

    def ask(self, questions: Mapping[str, bytes], _: int = 0) -> Iterable[tuple[str, bytes | str]]:
        return [(name, self.sites[name].handle(question)) for name, question in questions.items()]

    def task(self, start: NDArray[np.float32], number: int = 1) -> TrainRequest:
        return TrainRequest(
            plan=self.plan, round=number, spec_digest=self.context.adapter.spec.digest, head=None, begun=BEGUN,
            payload=start.astype("<f4").tobytes(),
        )  # fmt: skip

    def train(self, tasks: Mapping[str, TrainRequest]) -> dict[str, Message]:
        """Deal, and send each site its request; return the answers."""
        (number,) = {task.round for task in tasks.values()}
        masking, failed = self.masks.deal(number, self.sites, self.ask)
        assert not failed
        questions = {
            name: task.model_copy(update={"payload": pack(task.payload, masking[name])}).to_bytes()
            for name, task in tasks.items()
        }
        return {
            name: from_bytes(data, Message, Message) for name, data in self.ask(questions) if isinstance(data, bytes)
        }

    def uploads(self, number: int, answers: Mapping[str, Message]) -> dict[str, MaskedInput]:
        """Have the server add the uploads up; return them, since one that cheats keeps them."""
        found = {}
        for name, answer in answers.items():
            assert isinstance(answer, TrainReply)
            masked, following = unpack(answer.payload, 2)
            self.masks.read(name, number, masked, following)
            found[name] = from_bytes(masked, MaskedInput, MaskedInput)
        return found

    def keep(self, number: int, uploads: Mapping[str, MaskedInput]) -> None:
        """Have the server forget its sum, and add up these uploads alone."""
        cohort = self.masks._cohort
        assert cohort is not None
        self.masks._uploads = secagg.MaskedSum(cohort, number, self.context.adapter.spec.dimension)
        for upload in uploads.values():
            self.masks._uploads.add(upload)

    def charges(self, name: str) -> int:
        return len(LedgerFile(self.ledgers[name].file).charges()) if self.ledgers[name].file.exists() else 0


@pytest.fixture
def offices(tmp_path: Path, tiny_llama: Path) -> Offices:
    return Offices(tmp_path, tiny_llama)


def test_a_site_whose_start_values_differ_is_in_no_sum(offices: Offices) -> None:
    """First an honest round, which opens; then one in which four sites start from where nothing can be learned."""
    start = offices.context.adapter.initial
    honest = offices.task(start)
    uploads = offices.uploads(1, offices.train(dict.fromkeys(offices.sites, honest)))
    step = offices.masks.step(1, honest.task(honest.payload), uploads, offices.ask).step
    assert step is not None
    assert np.abs(step).max() < 100, "a gradient and noise, not masks"

    victim, others = names(5)[4], names(5)[:4]
    true, poisoned = offices.task(start, 2), offices.task(np.full_like(start, MAX_START), 2)
    tasks = {**dict.fromkeys(others, poisoned), victim: true}
    uploads = offices.uploads(2, offices.train(tasks))
    with pytest.raises(QuorumLost, match="1 of 5 sites helped"):
        offices.masks.step(2, true.task(true.payload), uploads, offices.ask)
    # those that answered no list yet help to open their own sum, in which the victim is not
    del uploads[victim]
    offices.keep(2, uploads)
    step = offices.masks.step(2, poisoned.task(poisoned.payload), uploads, offices.ask).step
    assert step is not None
    assert np.abs(step).max() < 100


def test_a_round_that_did_not_open_is_not_asked_again_from_elsewhere(offices: Offices) -> None:
    """The server is started again, and so is a site; another session does not make another request of the round."""
    victim, start = names(5)[4], offices.context.adapter.initial
    poisoned = offices.task(np.full_like(start, 1.0))
    offices.train({**dict.fromkeys(offices.sites, poisoned), victim: offices.task(start)})
    offices.start(names(5)[0])
    offices.begin()
    for start_value in (1.0, 0.0):
        answers = offices.train(dict.fromkeys(offices.sites, offices.task(np.full_like(start, start_value))))
        assert {answer.reason for answer in answers.values() if isinstance(answer, Declined)} == {"ledger"}
        assert len(answers) == 5
    assert offices.charges(victim) == 1


def test_start_values_beyond_the_bound_are_refused_before_a_charge(offices: Offices) -> None:
    start, victim = offices.context.adapter.initial.copy(), names(5)[4]
    for value in (3e38, -3e38, np.nextafter(np.float32(MAX_START), np.float32(np.inf)), np.nan, np.inf):
        start[-1] = value
        assert offices.train({victim: offices.task(start)}) == {victim: Declined(site=victim, reason="message")}
    assert offices.charges(victim) == 0
