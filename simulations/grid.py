"""A Flower Grid inside one process: the same ServerApp and ClientApp, no network, no start-up."""

import threading
import time
import uuid
from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedllm.errors import ConfigError


class InProcessGrid(Grid):
    """Delivers messages to `nodes` virtual nodes, each message on a thread of its own.

    Node i (1-based) runs `client_app` with partition-id i-1, as in Flower's simulation. Sites that share a model take
    turns by its lock. A node that never returns keeps its thread, counts as offline, and holds up nobody else.
    """

    def __init__(self, client_app: ClientApp, nodes: int) -> None:
        self._client_app = client_app
        self._contexts = {node: self._context(node, nodes) for node in range(1, nodes + 1)}
        self._busy: set[int] = set()
        self._replies: dict[str, Message] = {}
        self._lock = threading.Lock()
        # Flower reads the identity of the running task when a Message is made
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0

    @staticmethod
    def _context(node: int, nodes: int) -> Context:
        return Context(1, node, {"partition-id": node - 1, "num-partitions": nodes}, RecordDict(), {})

    def set_run(self, run: Run) -> None:
        """Do nothing: a process has one run."""

    @property
    def run(self) -> Run:
        """An empty description of the run."""
        return Run.create_empty(1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message; kept for Flower's interface."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that can take a message."""
        with self._lock:
            return [node for node in self._contexts if node not in self._busy]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver messages and return their ids; a node that is busy with another gets none."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            node = message.metadata.dst_node_id
            with self._lock:
                if node in self._busy:
                    continue
                self._busy.add(node)
            ids.append(message.metadata.message_id)
            threading.Thread(target=self._run_node, args=(message,), daemon=True, name=f"node-{node}").start()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come in to these messages."""
        with self._lock:
            return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages and wait for their replies, at most `timeout` seconds."""
        waiting = set(self.push_messages(messages))
        deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
        replies: list[Message] = []
        while waiting and time.monotonic() < deadline:
            replies += self.pull_messages(waiting)
            waiting -= {reply.metadata.reply_to_message_id for reply in replies}
            time.sleep(0.01 if waiting else 0)
        return replies

    def _run_node(self, message: Message) -> None:
        node = message.metadata.dst_node_id
        try:
            reply = self._client_app(message, self._contexts[node])
        except BaseException as error:  # an error reply, as in Flower; a panic in a Rust library is no Exception
            reply = Message(Error(code=0, reason=type(error).__name__), reply_to=message)
        with self._lock:
            self._busy.discard(node)
            self._replies[message.metadata.message_id] = reply


def run_ray(server_app: Any, client_app: ClientApp, nodes: int, cpus: float, gpus: float) -> None:
    """Run both apps on Flower's simulation engine, every site in a Ray actor with `cpus` and `gpus`.

    Raises ConfigError where this machine has not as many.
    """
    import ray
    from flwr.simulation import run_simulation

    # Started here, as Flower would do, to ask how much there is: Ray heeds a container's limits.
    ray.init(include_dashboard=False, logging_level="error", log_to_driver=True)
    there = ray.cluster_resources()
    for key, kind, asked in (("cpus_per_site", "CPU", cpus), ("gpus_per_site", "GPU", gpus)):
        if asked > there.get(kind, 0):
            raise ConfigError(f"federation.{key}={asked:g}, but Ray finds {there.get(kind, 0):g} here. Lower it.")
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=nodes,
        backend_config={"client_resources": {"num_cpus": cpus, "num_gpus": gpus}},
    )
