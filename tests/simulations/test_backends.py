"""The two backends of a simulation run the same sites: what differs is only who carries the messages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.checkpoint import load_checkpoint


@pytest.mark.slow
@pytest.mark.timeout(600)  # Ray's processes import everything anew
def test_sites_on_ray_give_the_adapter_that_sites_in_one_process_give(
    fedllm: Any, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Coins and noise are the same as well, since here a seed predicts them."""
    adapters = {}
    for backend in ("in-process", "ray"):
        arguments = overrides(
            tmp_path,
            backend,
            privacy={"insecure_seed": 7},
            training={"rounds": 2, "local_steps": 1},
            federation={"backend": backend, "quorum": 4, "round_timeout": 500.0},
        )
        result = fedllm("simulate", *arguments, env={"TMPDIR": "/tmp"})  # Ray's sockets need a short path
        assert result.code == 0, result.text
        checkpoint = load_checkpoint(tmp_path / backend / "checkpoint.safetensors")
        assert [state.rounds for state in checkpoint.sites.values()] == [2] * 4
        adapters[backend] = checkpoint.adapter
    assert np.abs(adapters["in-process"]).max() > 0.01, "the sites have moved it"
    np.testing.assert_allclose(adapters["ray"], adapters["in-process"], rtol=0, atol=1e-6)
