"""A whole deployment on loopback: real processes, TLS, node authentication, sealed messages."""

import pytest

from fedllm.privacy.ledger import LedgerFile
from server.ledger_heads import HEADS, LedgerHeads
from tests.deployment.conftest import Federation
from tests.deployment.harness import fedllm, settings

pytestmark = [pytest.mark.deployment, pytest.mark.soak]


@pytest.mark.parametrize("mode", ["local", "distributed", "off"])
def test_a_run_of_three_offices_completes_and_every_ledger_is_right(federation: Federation, mode: str) -> None:
    head = federation.head
    before = {name: len(branch.charged()) for name, branch in federation.branches.items()}
    done = head.submit(*settings(mode, 2, **{
        "privacy.mode": mode, "evaluation.every": 1, "evaluation.noise_multiplier": 2.0, "data.heldout": "null",
    }))  # fmt: skip
    if mode == "off":  # the sites' policies permit no run without noise
        assert done.returncode == 1
        assert "declined (policy)" in done.stderr
        assert {n: len(b.charged()) for n, b in federation.branches.items()} == before
        return
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record.round for record in head.rounds(mode)] == [0, 1, 2]
    assert all(record.answered == sorted(federation.branches) for record in head.rounds(mode)[1:])
    assert all((record.noise_multiplier is not None) == (mode == "distributed") for record in head.rounds(mode)[1:])
    assert {n: len(b.charged()) - before[n] for n, b in federation.branches.items()} == dict.fromkeys(
        before, 3
    )  # two rounds, and the closing exchange
    assert (head.run(mode) / "adapter" / "adapter_model.safetensors").exists()
    seen = LedgerHeads(head.home / HEADS).read()
    assert sorted(seen) == sorted(federation.branches)
    for name, branch in federation.branches.items():  # the next run will ask for these
        assert LedgerFile(branch.home / "data" / "ledger.db").knows(seen[name])
    # of some 18 units with such noise it may be that nothing but their number can be told
    assert all("units" in record.at_sites for record in head.rounds(mode))
    for branch in federation.branches.values():  # its owner knows better, and nobody else
        assert "For this site it is" in fedllm("site", "report", "--home", str(branch.home)).stdout
