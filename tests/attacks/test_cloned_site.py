"""Attack: a running site is copied, and both copies mask a vector with the same secrets: the difference is not masked.

Stopped where the copy can tell: secrets are forgotten in another process, start of a machine or virtual machine.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import client.secagg_client
from client.secagg_client import SecAggClient, incarnation
from fedllm.crypto.hash_chain import LedgerHead
from fedllm.errors import SecAggError
from fedllm.plan import RunPlan
from fedllm.protocol.messages import (
    AdvertiseKeys,
    Declined,
    KeyShares,
    Prepare,
    SecAggRequest,
    ShareKeysRequest,
    TrainReply,
    from_bytes,
)
from fedllm.protocol.spending_statement import open_statement
from fedllm.secagg import SessionParams, make_cohort, masked_input_request
from fedllm.values import parse
from tests.attacks.test_clip_switched_off import SHARED
from tests.bug_zoo.invariants import office_of
from tests.client.test_site import NAME
from tests.fedllm.secagg.secagg_federation import SESSION, TASK, identity_of, names

PLAN = parse(RunPlan, SHARED)


class Running:
    """Four sites that have joined and dealt round 1; each would mask now."""

    def __init__(self) -> None:
        roster = {name: identity_of(name).public for name in names(4)}
        self.prepare = Prepare(plan=PLAN, session=SESSION, roster={k: v.to_text() for k, v in roster.items()})
        self.sites = {
            name: SecAggClient(name, lambda name=name: identity_of(name), lambda _: roster) for name in roster
        }
        joins = [from_bytes(site.join(self.prepare), AdvertiseKeys, AdvertiseKeys) for site in self.sites.values()]
        params = SessionParams(PLAN.digest, SESSION, PLAN.quorum, PLAN.privacy.colluding_sites, roster, PLAN.sites)
        cohort = make_cohort(params, [join.join for join in joins])
        request = ShareKeysRequest(context=params.context, round=1, joins=cohort.joins)
        self.step = SecAggRequest(plan=PLAN, round=1, payload=request.to_bytes())
        dealt = {name: from_bytes(site.answer(self.step), KeyShares, KeyShares) for name, site in self.sites.items()}
        self.site, self.request = self.sites[names(4)[0]], masked_input_request(cohort, 1, dealt, names(4)[0])

    def mask(self, value: int) -> bytes:
        """Return one site's upload."""
        vector = np.full(8, value, np.uint32)
        return self.site.mask(PLAN, self.request, TASK, vector, [f"{k:064x}" for k in range(8)])[0]


@pytest.fixture
def running() -> Running:
    return Running()


@pytest.fixture
def ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Stand for the ids that the kernel shows; the second is shown on some machines only."""
    paths = tmp_path / "boot_id", tmp_path / "uuid"
    paths[0].write_text("first\n")
    monkeypatch.setattr(client.secagg_client, "_IDS", paths)
    return paths


@pytest.mark.parametrize("changed", [0, 1])
def test_a_site_in_another_start_of_the_machine_has_forgotten_its_secrets(ids: tuple[Path, Path], changed: int) -> None:
    running = Running()
    ids[changed].write_text("second\n")
    for _ in range(2):
        with pytest.raises(SecAggError, match="has not joined"):
            running.mask(1)
    with pytest.raises(SecAggError, match="has not joined"):
        running.site.check(PLAN, running.request)
    with pytest.raises(SecAggError, match="has not joined"):
        running.site.answer(running.step)


def test_a_site_that_joins_in_another_start_of_the_machine_has_other_keys(
    ids: tuple[Path, Path], running: Running
) -> None:
    before = running.site.join(running.prepare)
    assert running.site.join(running.prepare) == before
    ids[0].write_text("second\n")
    assert running.site.join(running.prepare) != before
    with pytest.raises(SecAggError, match="holds no secrets"):
        running.mask(1)


def test_a_site_that_was_not_copied_keeps_its_secrets(running: Running) -> None:
    assert running.mask(1) == running.mask(1)


def test_a_forked_site_has_forgotten_its_secrets(running: Running) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # nothing may leave this process but one word
        said = b"masked"
        try:
            running.mask(2)
        except SecAggError:
            said = b"forgotten"
        finally:
            os.write(write, said)
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        assert answer.read() == b"forgotten"
    assert os.waitpid(child, 0)[1] == 0
    assert running.mask(1), "the original goes on"


def test_the_kernel_tells_which_start_this_is() -> None:
    assert incarnation() == incarnation()
    if client.secagg_client._IDS[0].exists():
        assert client.secagg_client._IDS[0].read_text("ascii").strip() in incarnation()


def test_copies_of_an_office_answer_twice_for_one_charge(tmp_path: Path, tiny_llama: Path) -> None:
    """What docs/threat-model.md says is not defended against, mode local included, and that it is noticed."""
    first = office_of(tmp_path / "first", tiny_llama)
    first.train(1)
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    second = office_of(tmp_path / "second", tiny_llama)
    replies = [office.train(2) for office in (first, second)]
    assert all(isinstance(reply, TrainReply) for reply in replies)
    assert replies[0].payload != replies[1].payload, "two noises"
    assert len(first.events()) == len(second.events()) == 2, "each ledger knows of one of the two answers"
    statement, _ = open_statement(first.train(3).statement)
    head = LedgerHead(statement.ledger_number, statement.ledger_digest)
    assert second.train(3, head=head) == Declined(site=NAME, reason="ledger")
