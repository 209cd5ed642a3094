"""The two backends of a simulation run the same sites: what differs is only who carries the messages."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from flwr.server.superlink.fleet.vce.backend import raybackend
from flwr.simulation.ray_transport import ray_actor

import simulations.ray_grid
from fedllm.config import SimulationConfig
from fedllm.errors import CheckpointError, ConfigError
from server.checkpoint import Checkpoint, load_checkpoint
from simulations.simulate import simulate
from simulations.sites import SITE_LOG
from tests.simulations.conftest import CommandLine, Configure, Until

# Coins and noise are the same as well, since here a seed predicts them.
SMALL: dict[str, Any] = {
    "privacy": {"mode": "distributed", "insecure_seed": 7}, "training": {"rounds": 2, "local_steps": 1},
}  # fmt: skip


def reached(folder: Path, name: str) -> Checkpoint:
    return load_checkpoint(folder / name / "checkpoint.safetensors")


def compare(folder: Path) -> None:
    """Runs of the two backends have given the same adapter."""
    adapters = {}
    for backend in ("in-process", "ray"):
        checkpoint = reached(folder, backend)
        assert [state.rounds for state in checkpoint.sites.values()] == [2] * 4
        adapters[backend] = checkpoint.adapter
    assert np.abs(adapters["in-process"]).max() > 0.01, "the sites have moved it"
    np.testing.assert_allclose(adapters["ray"], adapters["in-process"], rtol=0, atol=1e-6)


# ---- Flower's engine, on what stands for Ray -------------------------------------------------------------------------


class Actor:
    """A thread for a process; it gets what Ray would send to one, pickled."""

    def __init__(self, options: dict[str, Any], begin: Callable[[], None]) -> None:
        begin()
        self.options, self.run = options, SimpleNamespace(remote=self._ask)
        self.terminate = SimpleNamespace(remote=lambda: None)
        self.sites: set[str] = set()
        self.dead = False
        self._app, self._thread = ray_actor.VirtualClientEngineActor(), ThreadPoolExecutor(1)

    def _ask(self, app_fn: Any, message: Any, site: str, context: Any) -> "Future[Any]":
        self.sites.add(site)
        sent = ray.cloudpickle.dumps((app_fn, message, site, context))
        return self._thread.submit(lambda: self._run(sent))

    def _run(self, sent: bytes) -> Any:
        if self.dead:
            raise ray.exceptions.ActorDiedError
        try:
            return self._app.run(*ray.cloudpickle.loads(sent))
        except Exception as error:
            raise ray.exceptions.RayError(str(error)) from error


class FakeRay(SimpleNamespace):
    """As much of Ray as is used: `machines` with two processors each."""

    def __init__(self, machines: int) -> None:
        super().__init__(actors=list[Actor](), missing=None, killed=list[Actor]())
        self._machines = machines

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "Alive": True,
                "NodeID": f"{number + 1:056x}",
                "NodeManagerHostname": f"host-{number}",
                "Resources": {"CPU": 2.0},
            }
            for number in range(self._machines)
        ]

    def options(self, **options: Any) -> Any:
        def remote(on_actor_init_fn: Callable[[], None]) -> Actor:
            self.actors.append(Actor(options, on_actor_init_fn))
            return self.actors[-1]

        return SimpleNamespace(remote=remote)

    def remote(self, **_: Any) -> Any:
        return lambda look: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=look))

    def get(self, future: Any) -> Any:
        return future.result() if isinstance(future, Future) else future

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor)

    def init(self, *_: Any, **__: Any) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def is_initialized(self) -> bool:
        return True


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    fake = FakeRay(machines=2)
    monkeypatch.setattr(simulations.sites, "log_to", lambda _: None)  # once a process, of which there is one here
    for module in (simulations.ray_grid, raybackend, ray_actor):
        monkeypatch.setattr(module, "ray", fake)
    monkeypatch.setattr(raybackend, "ClientAppActor", fake)
    yield fake
    for actor in fake.actors:
        actor._thread.shutdown()


def run(config: SimulationConfig) -> None:
    simulate(config, lambda *_: None, lambda _: None)


def test_a_site_stays_with_one_actor_and_gives_what_it_gives_in_one_process(
    configure: Configure, tmp_path: Path, cluster: FakeRay
) -> None:
    for backend in ("in-process", "ray"):
        federation = {"backend": backend, "quorum": 4, "cpus_per_site": 0.8}
        run(configure(tmp_path, backend, federation=federation, **SMALL))
    compare(tmp_path)
    assert [actor.sites for actor in cluster.actors] == [{"0"}, {"1"}, {"2"}, {"3"}], "as many as fit, and as sites"
    assert {actor.options["scheduling_strategy"] for actor in cluster.actors} == {"SPREAD"}
    assert cluster.killed == cluster.actors, "none outlives the run"
    assert raybackend.BasicActorPool is ray_actor.BasicActorPool, "as it was"


def test_a_round_goes_on_without_a_process_that_has_ended_and_the_log_says_so_once(
    configure: Configure, tmp_path: Path, cluster: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Actor._run
    asked = list[Actor]()

    def die(actor: Actor, sent: bytes) -> Any:
        asked.append(actor)
        actor.dead = actor is cluster.actors[1] and len(asked) > 12
        return real(actor, sent)

    monkeypatch.setattr(Actor, "_run", die)
    federation = {"backend": "ray", "quorum": 3, "cpus_per_site": 0.8}
    run(configure(tmp_path, "run", federation=federation, **{**SMALL, "training": {"rounds": 4, "local_steps": 1}}))
    rounds = [state.rounds for state in reached(tmp_path, "run").sites.values()]
    assert sorted(rounds)[1:] == [4, 4, 4]
    assert min(rounds) < 4
    assert (tmp_path / "run" / SITE_LOG).read_text("utf-8").count("Raise federation.cpus_per_site") == 1


@pytest.mark.parametrize(
    ("federation", "missing", "words"),
    [
        ({"cpus_per_site": 1.5, "gpus_per_site": 1.0}, [], "gpus_per_site=1, but no machine .* and 0 GPUs, 2 CPUs"),
        ({}, ["/runs"], "host-0 has no /runs"),
    ],
)  # fmt: skip
def test_a_cluster_that_cannot_run_it_is_one_clear_error(
    configure: Configure, tmp_path: Path, cluster: FakeRay, monkeypatch: pytest.MonkeyPatch,
    federation: dict[str, float], missing: list[str], words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(simulations.ray_grid, "_missing", lambda _: missing)
    with pytest.raises(ConfigError, match=words):
        run(configure(tmp_path, federation={"backend": "ray", **federation}))
    assert not cluster.actors


def test_a_cluster_that_is_not_there_is_one_clear_error(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(ConfigError, match="RAY_ADDRESS=nonsense"):
        run(configure(tmp_path, federation={"backend": "ray"}))


# ---- Ray itself ------------------------------------------------------------------------------------------------------

NOISY = {"noise_multiplier": 10.0}  # for many rounds
ON_RAY = {"TMPDIR": "/tmp"}  # Ray's sockets need a short path


@pytest.mark.soak  # Ray's processes import everything anew
@pytest.mark.timeout(600)
def test_sites_on_ray_give_the_adapter_that_sites_in_one_process_give(
    fedllm: CommandLine, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    for backend in ("in-process", "ray"):
        federation = {"backend": backend, "quorum": 4, "round_timeout": 500.0}
        result = fedllm("simulate", *overrides(tmp_path, backend, federation=federation, **SMALL), env=ON_RAY)
        assert result.code == 0, result.text
    compare(tmp_path)


def actors_of(process: psutil.Process) -> list[psutil.Process]:
    """Return the processes that Ray has made for sites, below a process."""
    found = []
    for below in process.children(recursive=True):
        try:
            found += [below] * below.cmdline()[0].startswith("ray::ClientAppActor")
        except (psutil.Error, IndexError):
            continue  # it has just ended
    return found


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_run_on_ray_survives_a_killed_process_and_ctrl_c_leaves_none_and_it_can_be_resumed(
    fedllm: CommandLine, overrides: Callable[..., list[str]], tmp_path: Path, until: Until
) -> None:
    federation = {"backend": "ray", "quorum": 3, "round_timeout": 500.0, "cpus_per_site": (os.cpu_count() or 1) / 4}
    changes = {**SMALL, "training": {"rounds": 30, "local_steps": 1}, "privacy": {**SMALL["privacy"], **NOISY}}
    arguments = overrides(tmp_path, federation=federation, **changes)
    command = fedllm.start("simulate", *arguments, env=ON_RAY)
    process = psutil.Process(command.pid)

    def rounds() -> list[int]:
        try:
            return sorted(state.rounds for state in reached(tmp_path, "run").sites.values()) or [0]
        except CheckpointError:
            return [0]

    until(lambda: rounds()[0] >= 1)
    family = process.children(recursive=True)
    actors = actors_of(process)
    assert len(actors) == 4
    actors[0].kill()
    at = rounds()[-1]
    until(lambda: rounds()[-1] >= at + 3)
    command.kill(signal.SIGINT)
    assert command.wait().code == 130
    until(lambda: not any(map(psutil.Process.is_running, family)))
    assert (tmp_path / "run" / SITE_LOG).read_text("utf-8").count("Raise federation.cpus_per_site") == 1
    before = rounds()
    assert before[0] < before[1]
    result = fedllm("simulate", *arguments, "resume=true", env=ON_RAY)
    assert result.code == 0, result.text
    assert rounds()[0] > before[0]
    assert rounds()[1:] == [30, 30, 30]


NODES = """
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print("address", cluster.address, flush=True)
input()
cluster.shutdown()
"""


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_run_spreads_its_sites_over_the_machines_of_a_cluster(
    fedllm: CommandLine, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Two nodes of Ray's, on this machine."""
    environment = {**os.environ, **ON_RAY, "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as nodes:
        assert nodes.stdout is not None
        address = next(line.split()[1] for line in nodes.stdout if line.startswith("address"))
        raylets = [process for process in psutil.Process(nodes.pid).children() if process.name() == "raylet"]
        assert len(raylets) == 2
        command = fedllm.start(
            "simulate",
            *overrides(tmp_path, "ray", federation={"backend": "ray", "quorum": 4, "round_timeout": 500.0}, **SMALL),
            env={**ON_RAY, "RAY_ADDRESS": address},
        )
        process, most = psutil.Process(command.pid), [0, 0]
        while process.status() != psutil.STATUS_ZOMBIE:  # nobody has waited for it yet
            most = [max(was, len(actors_of(raylet))) for was, raylet in zip(most, raylets, strict=True)]
            time.sleep(0.05)
        nodes.communicate("\n")
    result = command.wait()
    assert result.code == 0, result.text
    assert most == [1, 1]
    assert [state.rounds for state in reached(tmp_path, "ray").sites.values()] == [2] * 4
