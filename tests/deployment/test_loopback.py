"""A whole deployment on loopback: real processes, TLS, node authentication, sealed messages."""

import pytest

from tests.deployment.conftest import Federation
from tests.deployment.harness import settings

pytestmark = [pytest.mark.deployment, pytest.mark.slow]


@pytest.mark.timeout(900)
def test_two_runs_at_once_one_completes_and_the_other_is_not_permitted(federation: Federation) -> None:
    federation.ready()
    head, branches = federation.head, federation.branches
    head.begin("off", 2, **{"privacy.mode": "off"})  # the offices' policies permit no run without noise
    done = head.submit(*settings("local", 2))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "local" in done.stdout
    assert [record.round for record in head.rounds("local")] == [0, 1, 2]
    assert all(record.answered == sorted(branches) for record in head.rounds("local")[1:])
    assert (head.run("local") / "adapter" / "adapter_model.safetensors").exists()

    refused = head.ended("off")
    assert refused.state == "stopped"
    assert all(f"{name} declined (policy)" in refused.text for name in branches)
    for branch in branches.values():
        assert sorted(branch.ledger(head.plan("local").run)) == [1, 2]
        assert branch.ledger(head.plan("off").run) == {}
