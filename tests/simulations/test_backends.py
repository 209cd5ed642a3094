"""The two backends of a simulation run the same sites: what differs is only who carries the messages."""

import pickle
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

import simulations.simulate
import simulations.sites
import simulations.workers
from client.app import Handler
from fedllm.config import SimulationConfig
from server.checkpoint import load_checkpoint
from simulations.grid import InProcessGrid
from simulations.simulate import simulate

# Coins and noise are the same as well, since here a seed predicts them.
SMALL: dict[str, Any] = {
    "privacy": {"mode": "distributed", "insecure_seed": 7}, "training": {"rounds": 2, "local_steps": 1},
}  # fmt: skip


def compare(folder: Path) -> None:
    """Runs of the two backends have given the same adapter."""
    adapters = {}
    for backend in ("in-process", "ray"):
        checkpoint = load_checkpoint(folder / backend / "checkpoint.safetensors")
        assert [state.rounds for state in checkpoint.sites.values()] == [2] * 4
        adapters[backend] = checkpoint.adapter
    assert np.abs(adapters["in-process"]).max() > 0.01, "the sites have moved it"
    np.testing.assert_allclose(adapters["ray"], adapters["in-process"], rtol=0, atol=1e-6)


@pytest.mark.soak  # Ray's processes import everything anew
@pytest.mark.timeout(600)
def test_sites_on_ray_give_the_adapter_that_sites_in_one_process_give(
    fedllm: Any, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    for backend in ("in-process", "ray"):
        federation = {"backend": backend, "quorum": 4, "round_timeout": 500.0}
        arguments = overrides(tmp_path, backend, federation=federation, **SMALL)
        result = fedllm("simulate", *arguments, env={"TMPDIR": "/tmp"})  # Ray's sockets need a short path
        assert result.code == 0, result.text
    compare(tmp_path)


def test_sites_that_move_between_processes_give_the_adapter_that_sites_in_one_process_give(
    configure: Callable[..., SimulationConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Ray, but without it: a new process knows of a site what can be pickled, and what lies in its folder."""
    monkeypatch.setattr(simulations.sites, "log_to", lambda _: None)  # once a process, of which there is one here
    moves, alone = list[int](), threading.Lock()
    real = simulations.workers.connect

    def moved(*arguments: Any) -> Handler:
        *known, context = arguments
        connect = pickle.loads(pickle.dumps(partial(real, *known)))

        def handle(request: bytes, timeout: float) -> bytes:
            with alone:
                simulations.sites._set_up.cache_clear()
                moves.append(context.node_id)
                answer: bytes = connect(context)(request, timeout)
                return answer

        return handle

    def run_ray(run_on: Callable[[Grid], None], client: ClientApp, nodes: int, *_: float) -> None:
        run_on(InProcessGrid(client, nodes))

    for backend in ("in-process", "ray"):
        config = configure(tmp_path, backend, federation={"backend": backend, "quorum": 4}, **SMALL)
        simulate(config, lambda *_: None, lambda _: None)
        assert bool(moves) == (backend == "ray")
        monkeypatch.setattr(simulations.simulate, "connect", moved)
        monkeypatch.setattr(simulations.simulate, "run_ray", run_ray)
    compare(tmp_path)
