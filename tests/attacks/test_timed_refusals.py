"""Attack: whoever runs the daemon sends frames while a site trains, and times what comes back at once.

Stopped by a link that is silent from when the site begins with a request until it returns: what leaves, leaves then,
also the end of a connection and the next one; and by reading no more than the one frame that may be a cancellation.
"""

import asyncio
import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import client.relay
import fedllm
from client.link import SiteLink
from client.relay import _server
from fedllm.errors import Cancelled
from fedllm.protocol.link import SERVER_OPTIONS, milliseconds, parts, request_id
from fedllm.protocol.link_pb2 import Cancel, End, FromSite, Part, ToSite, Welcome
from tests.link.conftest import Loop, until

SLOW, LIMIT = b"train", 1 << 24
ID = request_id(SLOW)


class Wire:
    """A site that trains for as long as a test says, behind its real link; and the daemon, which is the attacker."""

    def __init__(self, folder: Path, loop: Loop) -> None:
        self.folder, self.loop = folder, loop
        self.seen: list[str] = []  # what happened, in order: at the site, and what the daemon heard of it
        self.taken: list[str] = []  # kinds of the frames that the site read
        self.trained, self.may_end, self.reads = threading.Event(), threading.Event(), threading.Event()
        self.reads.set()
        self.calls: list[Any] = []
        self.link = SiteLink(f"unix:{folder / 's'}", lambda: None, str, self.handle, LIMIT, folder / "link.json")
        honest = self.link._take

        async def take(frame: ToSite) -> None:
            self.taken.append(str(frame.WhichOneof("frame")))
            await honest(frame)

        self.link._take = take  # type: ignore[method-assign]

    def handle(self, request: bytes, stop: threading.Event) -> bytes:
        if request != SLOW:
            self.seen.append(f"begins {request[:9].decode()}")
            return b"to " + request
        self.trained.set()
        while not self.may_end.wait(0.01) and not stop.is_set():
            pass
        time.sleep(0.3)  # the quantum: what is said at once is said before it is over
        self.seen.append("departure")
        if stop.is_set():
            raise Cancelled("given up")
        return b"to " + request

    async def connect(self, _: object, context: Any) -> None:
        await context.read()
        self.seen.append("connection")
        await context.write(
            ToSite(welcome=Welcome(software=fedllm.__version__, clock=milliseconds())).SerializeToString()
        )
        self.calls.append(context)
        while await asyncio.to_thread(self.reads.wait) and isinstance(data := await context.read(), bytes):
            frame = FromSite.FromString(data)
            found: Any = frame.answer if frame.WhichOneof("frame") == "answer" else frame.refusal
            self.seen.append(f"{frame.WhichOneof('frame')} {found.id.hex()[:8]}")
        self.seen.append("end")

    def send(self, *frames: ToSite | bytes) -> None:
        for frame in frames:
            self.loop.do(self.calls[-1].write(frame if isinstance(frame, bytes) else frame.SerializeToString()))

    def ask(self, request: bytes) -> None:
        self.send(*asked(request))

    def heard(self, *what: str) -> None:
        """Wait for the last of these, and find that they happened, and in this order."""
        until(lambda: what[-1] in self.seen, what[-1])
        assert [each for each in self.seen if each in what] == list(what), self.seen


def asked(request: bytes) -> list[ToSite]:
    return [ToSite(request=part) for part in parts(request_id(request), request)]


def about(id_: bytes, kind: str = "refusal") -> str:
    return f"{kind} {id_.hex()[:8]}"


@pytest.fixture
def wire(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    # gRPC widens its windows to megabytes by its own measurement: at 64 kB a test fills them at once
    monkeypatch.setattr(client.relay, "SERVER_OPTIONS", [*SERVER_OPTIONS, ("grpc.http2.bdp_probe", 0)])
    with tempfile.TemporaryDirectory(prefix="fd") as place:
        made = Wire(Path(place), loop)

        async def begin() -> tuple[Any, Any, Any]:
            server = _server(made.connect)
            server.add_insecure_port(f"unix:{place}/s")
            await server.start()
            stop = asyncio.Event()
            return server, stop, asyncio.create_task(made.link.run(stop))

        async def end() -> None:
            stop.set()
            await running
            await made.link.drained(10)
            await server.stop(0)

        server, stop, running = loop.do(begin())
        until(lambda: made.calls, "a connection")
        yield made
        made.may_end.set()
        made.reads.set()
        loop.do(end())


@pytest.fixture
def loop() -> Iterator[Loop]:
    found = Loop()
    yield found
    found.end()


BAD = b"\1" * 32
OTHER = request_id(b"other")


def train(wire: Wire) -> int:
    wire.ask(SLOW)
    assert wire.trained.wait(60)
    return len(wire.taken)


@pytest.mark.parametrize(
    ("frames", "then"),
    [
        ([ToSite(request=Part(id=BAD, size=1 << 60, data=b"x"))], [about(BAD)]),
        (asked(b"other"), ["begins other", about(OTHER, "answer")]),
        (asked(SLOW), []),
        (asked(b"before"), [about(request_id(b"before"), "answer")]),
        ([ToSite(request=Part(id=BAD, size=1, data=b"x"))], ["end", "connection"]),
        ([ToSite(request=Part(id=BAD, size=1, data=b"xyz"))], ["end", "connection"]),
        ([ToSite(request=Part(id=b"short", size=1, data=b"x"))], ["end", "connection"]),
        ([b"\xff" * 40], ["end", "connection"]),
        ([ToSite(end=End(text="it is over"))], ["end", "connection"]),
    ],
    ids=["too long", "another request", "a replay", "one that was answered", "another digest", "parts that do not fit",
         "no id", "no frame", "the end"],
)  # fmt: skip
def test_nothing_that_is_sent_during_a_training_is_answered_before_the_training_may_be(
    wire: Wire, frames: Sequence[ToSite | bytes], then: Sequence[str]
) -> None:
    """A refusal came within a millisecond while the site waited out its quantum, and after ten while it trained."""
    wire.ask(b"before")
    wire.heard(about(request_id(b"before"), "answer"))
    wire.seen.clear()
    before = train(wire)
    wire.send(*frames)
    until(lambda: len(wire.taken) > before or frames == [b"\xff" * 40], "the frame")
    wire.may_end.set()
    last = [about(ID, "answer")] if "end" not in then else []
    until(lambda: all(each in wire.seen for each in (*last, *then)), "all that is to follow")
    assert wire.seen[0] == "departure"
    assert sorted(wire.seen[1:]) == sorted([*last, *then])
    assert [each for each in wire.seen if each in then] == list(then)


def test_many_bad_frames_are_refused_after_the_training_one_by_one_and_in_order(wire: Wire) -> None:
    train(wire)
    ids = [n.to_bytes(32, "little") for n in range(1, 9)]
    for id_ in ids:
        wire.send(ToSite(request=Part(id=id_, size=1 << 60, data=b"x")))
    wire.ask(b"other")
    wire.may_end.set()
    until(lambda: about(OTHER, "answer") in wire.seen, "the last answer")
    assert wire.seen[:2] == ["connection", "departure"]
    refused = [each for each in wire.seen if each.startswith("refusal")]
    assert refused == [about(id_) for id_ in ids]
    wire.heard("departure", about(ID, "answer"), about(OTHER, "answer"))
    wire.heard("departure", "begins other", about(OTHER, "answer"))


def test_a_cancellation_ends_the_training_and_says_so_when_it_may(wire: Wire) -> None:
    before = train(wire)
    wire.send(ToSite(cancel=Cancel(id=ID)))
    wire.heard("connection", "departure", about(ID))
    assert wire.taken[before:] == ["cancel"]


def test_at_most_one_frame_is_read_while_a_site_trains(wire: Wire) -> None:
    """Each that is read moves the window of HTTP/2, and the other end sees when."""
    before = train(wire)
    for n in range(1, 9):
        wire.send(ToSite(cancel=Cancel(id=n.to_bytes(32, "big"))))
    until(lambda: len(wire.taken) > before, "the first")
    time.sleep(0.2)
    assert len(wire.taken) == before + 1
    wire.may_end.set()
    until(lambda: len(wire.taken) == before + 8, "the others")


def test_a_site_begins_with_nothing_until_what_it_has_to_say_is_said(wire: Wire) -> None:
    """How fast the rest of an answer came told whether the next training was under way."""
    large = b"large" + bytes(12 << 20)
    wire.reads.clear()
    wire.ask(large)
    wire.ask(b"other")
    until(lambda: wire.link._outgoing is not None and wire.link._outgoing.full(), "an answer that nobody reads")
    # but for the one frame that was being read already
    assert [each[:8] for each in wire.seen if not each.startswith("answer")] == ["connecti", "begins l"]
    wire.seen.append("reads")
    wire.reads.set()
    wire.heard("reads", "begins other", about(OTHER, "answer"))
    answered = [n for n, each in enumerate(wire.seen) if each == about(request_id(large), "answer")]
    assert len(answered) == 13
    assert max(answered) < wire.seen.index(about(OTHER, "answer"))


@pytest.mark.parametrize("flood", ["bad parts", "an answer again"])
def test_whoever_reads_nothing_does_not_fill_the_memory(wire: Wire, loop: Loop, flood: str) -> None:
    """A task was made for each part that was refused, and for each answer that was asked for again."""
    frame = ToSite(request=Part(id=BAD, size=1 << 60, data=b"x"))
    if flood == "an answer again":
        [frame] = asked(b"other")
        wire.send(frame)
        wire.heard(about(OTHER, "answer"))
    wire.reads.clear()

    async def send() -> None:
        with contextlib.suppress(TimeoutError):  # of a write, which waits until the site reads on
            for _ in range(4000):
                async with asyncio.timeout(2):
                    await wire.calls[-1].write(frame.SerializeToString())

    loop.do(send(), 300)
    assert len(asyncio.all_tasks(loop.loop)) < 40
    assert len(wire.taken) < 4000
