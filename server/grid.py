"""What Flower Grids of one run in one process have in common, whatever carries their messages."""

import threading
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterable

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedllm.protocol.messages import ENVELOPE_KEY, ENVELOPE_RECORD


def envelope(data: bytes) -> RecordDict:
    """Return what a message of Flower carries a message of ours in."""
    return RecordDict({ENVELOPE_RECORD: ConfigRecord({ENVELOPE_KEY: data})})


class Request(Message):
    """A message whose content is made whenever it is looked at: those of a thousand sites at once are gigabytes."""

    def __init__(self, make: Callable[[], bytes], node: int, kind: str, ttl: float) -> None:
        """`make` may be called more than once, and from other threads."""
        super().__init__(RecordDict(), node, kind, ttl=ttl)
        self.__dict__["_make"] = make

    @property  # type: ignore[misc]  # nobody sets it
    def content(self) -> RecordDict:
        """The content, made anew; raises what `make` does."""
        return envelope(data_of(self))


def data_of(message: Message) -> bytes:
    """Return the message of ours that one of Flower carries, b"" if there is none; raises what makes it does."""
    if isinstance(message, Request):  # not by way of its content, whose records are in a cycle of references
        return bytes(message.__dict__["_make"]())
    data = message.content.config_records[ENVELOPE_RECORD][ENVELOPE_KEY]
    return data if isinstance(data, bytes) else b""


class OneRunGrid(Grid):
    """Keeps the replies that have come in; how a message gets to its node is for a subclass to say."""

    def __init__(self) -> None:
        self._replies: dict[str, tuple[Message, Callable[[], None]]] = {}
        self._forgotten: set[str] = set()  # ids of messages that have no reply yet, and need none
        self._lock = threading.Lock()
        # Flower reads the identity of the running task when a Message is made
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0

    @abstractmethod
    def _send(self, message: Message) -> bool:
        """Send a message on its way, whose reply goes to `_replied`; False if its node takes none now."""

    def _replied(self, message: Message, reply: Message, taken: Callable[[], None] = lambda: None) -> None:
        """Keep a reply; `taken` is called when it is fetched."""
        id_ = message.metadata.message_id
        with self._lock:
            if unwanted := id_ in self._forgotten:
                self._forgotten.remove(id_)
            else:
                self._replies[id_] = reply, taken
        if unwanted:
            taken()

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

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages on their way and return the ids of those that nodes take."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = id_ = str(uuid.uuid4())
            if self._send(message):
                ids.append(id_)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come in to these messages."""
        with self._lock:
            found = [self._replies.pop(id_) for id_ in message_ids if id_ in self._replies]
        for _, taken in found:
            taken()
        return [reply for reply, _ in found]

    def forget(self, message_ids: Iterable[str]) -> None:
        """Keep no reply to these messages: nobody waits for it any more."""
        ids = list(message_ids)
        there = {reply.metadata.reply_to_message_id for reply in self.pull_messages(ids)}
        with self._lock:
            self._forgotten.update(set(ids) - there)

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
