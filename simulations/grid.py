"""A Flower Grid inside one process: the same ServerApp and ClientApp, no network, no start-up."""

import threading
import time
from collections.abc import Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from server.grid import OneRunGrid

_LAST_WORK = 10.0  # seconds; a node that never returns holds up the end of a run for no longer


class InProcessGrid(OneRunGrid):
    """Delivers messages to `nodes` virtual nodes, each message on a thread of its own.

    Node i (1-based) runs `client_app` with partition-id i-1, as in Flower's simulation. Sites that share a model take
    turns by its lock. A node that never returns keeps its thread, counts as offline, and holds up nobody else.
    """

    def __init__(self, client_app: ClientApp, nodes: int) -> None:
        super().__init__()
        self._client_app = client_app
        self._contexts = {node: self._context(node, nodes) for node in range(1, nodes + 1)}
        self._busy: set[int] = set()

    @staticmethod
    def _context(node: int, nodes: int) -> Context:
        return Context(1, node, {"partition-id": node - 1, "num-partitions": nodes}, RecordDict(), {})

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that can take a message."""
        with self._lock:
            return [node for node in self._contexts if node not in self._busy]

    def _send(self, message: Message) -> bool:
        node = message.metadata.dst_node_id
        with self._lock:
            if node in self._busy:
                return False
            self._busy.add(node)
        threading.Thread(target=self._run_node, args=(message,), daemon=True, name=f"node-{node}").start()
        return True

    def close(self) -> None:
        """Wait a while for the nodes that still work: a run that is resumed in this process needs their folders."""
        deadline = time.monotonic() + _LAST_WORK
        while self._busy and time.monotonic() < deadline:
            time.sleep(0.01)

    def _run_node(self, message: Message) -> None:
        node = message.metadata.dst_node_id
        try:
            reply = self._client_app(message, self._contexts[node])
        except BaseException as error:  # an error reply, as in Flower; a panic in a Rust library is no Exception
            reply = Message(Error(code=0, reason=type(error).__name__), reply_to=message)
        with self._lock:  # free again before its reply is seen
            self._busy.discard(node)
        self._replied(message, reply)
