"""The in-process grid: Flower's messages without Flower's processes."""

import threading
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import server.grid
import simulations.grid
from client.app import Handler, client_app
from fedllm.protocol.messages import ENVELOPE_KEY, ENVELOPE_RECORD
from simulations.grid import InProcessGrid


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid sets it; here it is put back."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)


def message(node: int, payload: bytes, ttl: float = 60.0) -> Message:
    return Message(RecordDict({ENVELOPE_RECORD: ConfigRecord({ENVELOPE_KEY: payload})}), node, "train", ttl=ttl)


def payload(reply: Message) -> bytes:
    value = reply.content.config_records[ENVELOPE_RECORD][ENVELOPE_KEY]
    assert isinstance(value, bytes)
    return value


def collect(grid: InProcessGrid, ids: list[str], until: Callable[[Callable[[], bool]], None]) -> dict[str, Message]:
    replies: dict[str, Message] = {}

    def all_here() -> bool:
        replies.update({reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages(ids)})
        return len(replies) == len(ids)

    until(all_here)
    return replies


def test_every_node_is_served_with_its_own_partition(until: Callable[[Callable[[], bool]], None]) -> None:
    def connect(context: Context) -> Handler:
        return lambda request, timeout: request + f" at {context.node_config['partition-id']}".encode()

    grid = InProcessGrid(client_app(connect), 5)
    assert list(grid.get_node_ids()) == [1, 2, 3, 4, 5]
    ids = list(grid.push_messages([message(node, f"to {node}".encode()) for node in (3, 1, 5)]))
    assert len(set(ids)) == 3
    replies = collect(grid, ids, until)
    assert [payload(replies[i]) for i in ids] == [b"to 3 at 2", b"to 1 at 0", b"to 5 at 4"]
    assert [replies[i].metadata.src_node_id for i in ids] == [3, 1, 5]
    assert list(grid.pull_messages(ids)) == [], "a reply is handed out once"


def test_a_node_gets_one_message_at_a_time(until: Callable[[Callable[[], bool]], None], gate: threading.Event) -> None:
    asked: list[bytes] = []

    def connect(context: Context) -> Handler:
        def handle(request: bytes, timeout: float) -> bytes:
            asked.append(request)
            gate.wait()
            return request

        return handle

    grid = InProcessGrid(client_app(connect), 1)
    first = list(grid.push_messages([message(1, b"first")]))
    assert list(grid.push_messages([message(1, b"second")])) == []
    gate.set()
    assert payload(collect(grid, first, until)[first[0]]) == b"first"
    assert asked == [b"first"]


def test_a_node_that_raises_answers_with_an_error_that_quotes_nothing(
    until: Callable[[Callable[[], bool]], None],
) -> None:
    def connect(context: Context) -> Handler:
        def handle(request: bytes, timeout: float) -> bytes:
            if context.node_id == 1:
                raise ValueError("a record of Hong Gildong")
            return b"fine"

        return handle

    grid = InProcessGrid(client_app(connect), 2)
    ids = list(grid.push_messages([message(1, b""), message(2, b"")]))
    replies = collect(grid, ids, until)
    assert replies[ids[0]].has_error()
    assert "Hong" not in str(replies[ids[0]].error)
    assert payload(replies[ids[1]]) == b"fine"


class Panic(BaseException):
    """What a panic in a Rust library looks like from Python: not an Exception."""


def test_a_node_whose_libraries_panic_answers_with_an_error(until: Callable[[Callable[[], bool]], None]) -> None:
    """And not with silence, for which the others would wait until the round's time is up."""

    def connect(context: Context) -> Handler:
        def handle(request: bytes, timeout: float) -> bytes:
            if request == b"panic":
                raise Panic
            return request

        return handle

    grid = InProcessGrid(client_app(connect), 1)
    replies = list(grid.send_and_receive([message(1, b"panic")], timeout=600.0))
    assert [reply.has_error() for reply in replies] == [True]
    assert [payload(reply) for reply in grid.send_and_receive([message(1, b"again")], timeout=600.0)] == [b"again"]


def test_a_node_that_hangs_counts_as_offline_while_the_others_are_served(
    until: Callable[[Callable[[], bool]], None], gate: threading.Event
) -> None:
    def connect(context: Context) -> Handler:
        def handle(request: bytes, timeout: float) -> bytes:
            if context.node_id == 1:
                gate.wait()
            return request

        return handle

    grid = InProcessGrid(client_app(connect), 3)
    hung, *served = grid.push_messages([message(node, b"first") for node in (1, 2, 3)])
    collect(grid, served, until)
    assert list(grid.get_node_ids()) == [2, 3]
    collect(grid, list(grid.push_messages([message(node, b"second") for node in (2, 3)])), until)
    assert list(grid.pull_messages([hung])) == []
    gate.set()
    assert payload(collect(grid, [hung], until)[hung]) == b"first"
    until(lambda: list(grid.get_node_ids()) == [1, 2, 3])
    again = list(grid.push_messages([message(1, b"third")]))
    assert payload(collect(grid, again, until)[again[0]]) == b"third"


def test_a_grid_that_is_closed_waits_for_work_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    """A run that failed may be resumed in the same process at once: nobody may still write to its sites' folders."""
    done = list[bytes]()

    def connect(context: Context) -> Handler:
        def handle(request: bytes, timeout: float) -> bytes:
            gate.wait()
            done.append(request)
            return request

        return handle

    grid = InProcessGrid(client_app(connect), 1)
    grid.push_messages([message(1, b"long")])
    monkeypatch.setattr(simulations.grid, "_LAST_WORK", 0.05)
    grid.close()
    assert done == []
    monkeypatch.setattr(simulations.grid, "_LAST_WORK", 600.0)
    threading.Timer(0.1, gate.set).start()
    grid.close()
    assert done == [b"long"]


def test_replies_can_be_waited_for(monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> None:
    def connect(context: Context) -> Handler:
        def handle(request: bytes, timeout: float) -> bytes:
            if request == b"hang":
                gate.wait()
            return request

        return handle

    grid, came = InProcessGrid(client_app(connect), 2), list[Message]()
    replies = list(grid.send_and_receive([message(1, b"one"), message(2, b"two")]))
    assert sorted(map(payload, replies)) == [b"one", b"two"]

    def pull(ids: Iterable[str]) -> list[Message]:
        came.extend(InProcessGrid.pull_messages(grid, ids))
        return came

    monkeypatch.setattr(grid, "pull_messages", pull)
    clock = SimpleNamespace(
        monotonic=lambda: 1e6 if came else 0.0, sleep=time.sleep
    )  # time is up once one has answered
    monkeypatch.setattr(server.grid, "time", clock)
    replies = list(grid.send_and_receive([message(1, b"hang"), message(2, b"two")], timeout=1.0))
    assert list(map(payload, replies)) == [b"two"]
