"""A Flower Grid inside one process: the same ServerApp and ClientApp, no network, no start-up."""

import threading
import time
from collections import deque
from collections.abc import Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from server.grid import OneRunGrid

_LAST_WORK = 10.0  # seconds; a node that never returns holds up the end of a run for no longer
_AT_ONCE = 16  # nodes that work, or whose reply nobody has fetched yet


class InProcessGrid(OneRunGrid):
    """Delivers messages to `nodes` virtual nodes, each message on a thread, `_AT_ONCE` at a time.

    Node i (1-based) runs `client_app` with partition-id i-1, as in Flower's simulation. Sites that share a model take
    turns by its lock. A node that never returns keeps its thread, counts as offline, and a few hold up nobody else.
    """

    def __init__(self, client_app: ClientApp, nodes: int) -> None:
        super().__init__()
        self._client_app = client_app
        self._contexts = {node: self._context(node, nodes) for node in range(1, nodes + 1)}
        self._busy: set[int] = set()
        self._queued: deque[Message] = deque()
        self._threads = 0

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
            self._queued.append(message)
            self._start()
        return True

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come in to these messages; as many others may be worked on."""
        found = super().pull_messages(message_ids)
        with self._lock:
            self._start()
        return found

    @property
    def _next(self) -> bool:
        return bool(self._queued) and self._threads + len(self._replies) < _AT_ONCE

    def _start(self) -> None:
        """Start threads; with the lock held."""
        while self._next:
            message = self._queued.popleft()
            self._threads += 1
            name = f"node-{message.metadata.dst_node_id}"
            threading.Thread(target=self._run_nodes, args=(message,), daemon=True, name=name).start()

    def close(self) -> None:
        """Wait a while for the nodes that still work: a run that is resumed in this process needs their folders."""
        deadline = time.monotonic() + _LAST_WORK
        while self._busy and time.monotonic() < deadline:
            time.sleep(0.01)

    def _run_nodes(self, message: Message) -> None:
        while True:
            self._run_node(message)
            with self._lock:
                self._threads -= 1
                if not self._next:
                    return
                message = self._queued.popleft()
                self._threads += 1

    def _run_node(self, message: Message) -> None:
        node = message.metadata.dst_node_id
        try:
            reply = self._client_app(message, self._contexts[node])
        except BaseException as error:  # an error reply, as in Flower; a panic in a Rust library is no Exception
            reply = Message(Error(code=0, reason=type(error).__name__), reply_to=message)
        with self._lock:  # free again before its reply is seen
            self._busy.discard(node)
        self._replied(message, reply)
