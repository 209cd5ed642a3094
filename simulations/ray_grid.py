"""Flower's simulation engine on Ray: the sites in processes of this machine, or of a cluster's machines.

Flower gives a message to whichever process is idle. Here a site has one process for the whole run, since its secrets of
secure aggregation live there and are never written down.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import ray
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.server.superlink.fleet.vce.backend import raybackend
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from flwr.simulation.ray_transport.ray_actor import BasicActorPool
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedllm.errors import ConfigError
from simulations.workers import process_ended

_site_log = logging.getLogger("fedllm.site")
ADDRESS = "RAY_ADDRESS"  # Ray's own variable: the cluster to use


class _Homes(BasicActorPool):
    """Flower's pool of Ray actors, in which a site has one actor for the whole run, and waits for its turn there.

    The actors lie on as many machines as there are, and work where this process does.
    """

    def __init__(self, sites: int, actor_type: Any, client_resources: Any, actor_kwargs: Any) -> None:
        super().__init__(actor_type, client_resources, actor_kwargs)
        self._sites, self._ended, self._ending = sites, set[int](), False
        self._asked: dict[Any, tuple[Message, str, Context]] = {}
        self.actors_capacity = min(self.actors_capacity, sites)
        there = partial(os.chdir, os.getcwd())
        self.create_actor_fn = lambda: actor_type.options(**client_resources, scheduling_strategy="SPREAD").remote(
            on_actor_init_fn=there
        )

    def add_actors_to_pool(self, num_actors: int) -> None:
        super().add_actors_to_pool(num_actors)
        self.num_actors = self._sites  # for Flower: how many messages are under way at a time

    def submit(self, actor_fn: Any, job: tuple[Any, Message, str, Context]) -> Any:
        _, message, site, context = job
        future = actor_fn(self.pool[int(site) % len(self.pool)], *job)
        self._asked[future] = message, site, context
        return future

    def fetch_result_and_return_actor_to_pool(self, future: Any) -> tuple[Message, Context]:
        """Wait for an answer, and return what Flower keeps of it; no actor has left the pool."""
        message, site, context = self._asked.pop(future)
        try:
            _, reply, context = ray.get(future)
        except RayError as error:
            if isinstance(error, RayActorError):
                if not self._ending:
                    process_ended("Raise federation.cpus_per_site", int(site) % len(self.pool), self._ended)
            else:
                _site_log.error("site %s: %s", site, getattr(error, "cause", error))
            reply = Message(Error(code=0, reason=type(error).__name__), reply_to=message)
        return reply, context

    def end(self) -> None:
        """Kill the actors, whatever they do: a site that never returned, or a run that is stopped."""
        self._ending = True
        for actor in self.pool:
            ray.kill(actor)


@contextlib.contextmanager
def ray_grid(client_app: ClientApp, nodes: int, cpus: float, gpus: float, folder: Path) -> Iterator[Grid]:
    """Give the Grid of Flower's simulation engine, every site in a Ray actor with `cpus` and `gpus`.

    Raises ConfigError if no machine has as many, or one of them has not the run's `folder`.
    """
    # Started here, as Flower would do, to ask what there is: Ray heeds a container's limits.
    try:
        ray.init(os.environ.get(ADDRESS, "local"), include_dashboard=False, logging_level="error", log_to_driver=True)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"{ADDRESS}={os.environ.get(ADDRESS)}: {error}") from None
    try:
        _check_machines(cpus, gpus, folder)
        with _engine(client_app, nodes, {"num_cpus": cpus, "num_gpus": gpus}) as grid:
            yield grid
    finally:
        ray.shutdown()


def _check_machines(cpus: float, gpus: float, folder: Path) -> None:
    machines = [node for node in ray.nodes() if node["Alive"]]
    have = [(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)) for node in machines]
    if not any(c >= cpus and g >= gpus for c, g in have):
        found = ", ".join(f"{c:g} CPUs and {g:g} GPUs" for c, g in have)
        raise ConfigError(
            f"federation.cpus_per_site={cpus:g} and federation.gpus_per_site={gpus:g}, but no machine of Ray's has as "
            f"many: {found}. Lower them."
        )
    if len(machines) == 1:
        return
    for node in machines:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        look = ray.remote(num_cpus=0)(_missing).options(scheduling_strategy=there)
        try:
            missing = ray.get(look.remote([Path.cwd(), folder]))
        except RayError as error:
            raise ConfigError(
                f"{node['NodeManagerHostname']} cannot run fedllm: {str(error).splitlines()[-1]}. Every machine of the "
                "cluster needs this version of it, in the same Python."
            ) from None
        if missing:
            raise ConfigError(
                f"{node['NodeManagerHostname']} has no {missing[0]}. The machines of a cluster share a file system: "
                "records, model and the run's folder have the same paths on all of them."
            )


def _missing(places: list[Path]) -> list[Path]:
    return [place for place in places if not place.is_dir()]


@contextlib.contextmanager
def _engine(client_app: ClientApp, nodes: int, resources: dict[str, float]) -> Iterator[Grid]:
    """Run Flower's engine on a thread of its own: errors and Ctrl-C come to the caller, not to its log."""
    server_app, grids, over, homes = ServerApp(), SimpleQueue[Grid](), threading.Event(), list[_Homes]()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        del context  # Flower's run configuration is not used
        grids.put(grid)
        over.wait()

    def pool(**arguments: Any) -> _Homes:
        homes.append(_Homes(nodes, **arguments))
        return homes[0]

    raybackend.BasicActorPool = pool  # type: ignore[assignment,attr-defined]  # Flower has no setting for it
    engine = threading.Thread(
        target=run_simulation,
        args=(server_app, client_app, nodes),
        kwargs={"backend_config": {"client_resources": resources}},
    )
    engine.start()
    try:
        yield grids.get()
    finally:
        over.set()
        for home in homes:
            home.end()
        engine.join()
        raybackend.BasicActorPool = BasicActorPool  # type: ignore[attr-defined]
