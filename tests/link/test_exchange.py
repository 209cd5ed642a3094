"""Requests and answers over real sockets: whole, once, given up when nobody waits, and safely asked again."""

import asyncio
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from client.link import read_state
from fedllm.protocol.enrolment import now
from fedllm.protocol.link import VERSION
from fedllm.protocol.link_pb2 import FromSite, Hello, Part, Refusal, ToSite
from fedllm.protocol.messages import ENVELOPE_KEY, ENVELOPE_RECORD
from server.grpc_grid import GrpcGrid, look, node_of
from tests.link.conftest import House, Loop, Site, until

LIMIT = 1 << 28
IN_HAND = "4 requests are in hand here; ask again later"


@pytest.fixture
def site(house: House, loop: Loop) -> Iterator[Callable[..., Site]]:
    started: list[Site] = []

    def make(name: str, limit: int = LIMIT) -> Site:
        found = Site(house, house.admit(name), loop)
        found.start(limit)
        started.append(found)
        return found

    yield make
    for each in started:
        each.stop()


@pytest.fixture
def grid(house: House) -> Iterator[GrpcGrid]:
    with GrpcGrid(house.office.socket, LIMIT) as found:
        yield found


def message(site: str, data: bytes, ttl: float = 60) -> Message:
    return Message(RecordDict({ENVELOPE_RECORD: ConfigRecord({ENVELOPE_KEY: data})}), node_of(site), "query", ttl=ttl)


def reply(grid: GrpcGrid, id_: str) -> bytes | str:
    """Wait for an answer; text is the reason of an error."""
    [found] = until(lambda: list(grid.pull_messages([id_])), "an answer")
    if found.has_error():
        return str(found.error.reason)
    data = found.content.config_records[ENVELOPE_RECORD][ENVELOPE_KEY]
    assert isinstance(data, bytes)
    return data


def ask(grid: GrpcGrid, house: House, site: str, data: bytes, ttl: float = 60) -> str:
    until(lambda: node_of(site) in grid.get_node_ids(), f"{site}'s connection")
    [id_] = grid.push_messages([message(site, data, ttl)])
    return id_


def under_way(grid: GrpcGrid, house: House, site: Callable[..., Site]) -> tuple[Site, str]:
    """Return a site that has begun to answer, and may not yet; and the message's id."""
    busan = site("busan")
    id_ = ask(grid, house, "busan", b"slow")
    until(lambda: busan.asked, "the request")
    return busan, id_


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 7 << 20])
def test_what_is_asked_arrives_whole_and_so_does_its_answer(house: House, grid: GrpcGrid, site, size: int) -> None:  # type: ignore[no-untyped-def]
    busan, data = site("busan"), secrets.token_bytes(size)
    busan.may_answer.set()
    assert reply(grid, ask(grid, house, "busan", data)) == b"to " + data
    assert busan.asked == [data]
    assert read_state(busan.state).state == "connected"  # type: ignore[union-attr]


def test_many_requests_to_many_sites_each_get_their_own_answer(house: House, grid: GrpcGrid, site) -> None:  # type: ignore[no-untyped-def]
    sites = {name: site(name) for name in ("busan", "seoul", "제주")}
    for each in sites.values():
        each.may_answer.set()
    asked = {ask(grid, house, name, f"{name} {n}".encode()): f"to {name} {n}" for name in sites for n in range(4)}
    for id_, expected in asked.items():
        assert reply(grid, id_) == expected.encode()


def test_a_request_that_is_too_long_is_refused_by_the_site_before_it_is_read(
    house: House, grid: GrpcGrid, site
) -> None:  # type: ignore[no-untyped-def]
    busan = site("busan", limit=1 << 20)
    assert (
        reply(grid, ask(grid, house, "busan", bytes(20 << 20)))
        == "a payload of 20971520 bytes, and at most 1048576 are taken"
    )
    busan.may_answer.set()
    assert reply(grid, ask(grid, house, "busan", b"short")) == b"to short"
    assert busan.asked == [b"short"]


def test_neither_answers_nor_refusals_nor_ends_leave_a_traceback(
    house: House,
    grid: GrpcGrid,
    site,  # type: ignore[no-untyped-def]
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Seen under load: the end of a call was sent while it was cancelled, or two read from it at once."""
    busan = site("busan", limit=1 << 20)
    busan.may_answer.set()
    until(lambda: node_of("busan") in grid.get_node_ids(), "the connection")
    sizes = [3 << 20, 10, 2 << 20, 1 << 19] * 8
    asked = [message("busan", n.to_bytes(4, "big") + bytes(size)) for n, size in enumerate(sizes)]
    for number, (id_, size) in enumerate(zip(grid.push_messages(asked), sizes, strict=True)):
        found = reply(grid, id_)
        if size < 1 << 20:
            assert found in (b"to " + number.to_bytes(4, "big") + bytes(size), IN_HAND)
        else:
            assert found == IN_HAND or "are taken" in str(found)
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


def test_where_time_is_up_the_site_is_told_that_nobody_waits(house: House, grid: GrpcGrid, site) -> None:  # type: ignore[no-untyped-def]
    busan = site("busan")
    ask(grid, house, "busan", b"slow", ttl=1.0)
    assert busan.given_up.wait(30)


def test_where_the_run_ends_the_site_is_told_that_nobody_waits(house: House, site) -> None:  # type: ignore[no-untyped-def]
    busan = site("busan")
    with GrpcGrid(house.office.socket, LIMIT) as grid:
        ask(grid, house, "busan", b"slow")
        until(lambda: busan.asked, "the request")
    assert busan.given_up.wait(30)


def test_a_daemon_that_is_started_again_meanwhile_costs_nothing_and_the_site_is_asked_once(
    house: House,
    grid: GrpcGrid,
    site,  # type: ignore[no-untyped-def]
) -> None:
    busan, id_ = under_way(grid, house, site)
    house.stop()
    assert list(grid.get_node_ids()) == []
    house.start()
    until(lambda: read_state(busan.state).state == "connecting", "the end of the connection")  # type: ignore[union-attr]
    assert "when the request in hand is answered" in read_state(busan.state).text  # type: ignore[union-attr]
    assert house.connected() == []
    busan.may_answer.set()
    assert reply(grid, id_) == b"to slow"
    assert busan.asked == [b"slow"]
    assert not busan.given_up.is_set()


def test_an_answer_that_was_ready_while_the_daemon_was_away_is_given_as_it_was(
    house: House,
    grid: GrpcGrid,
    site,  # type: ignore[no-untyped-def]
) -> None:
    busan, id_ = under_way(grid, house, site)
    house.stop()
    busan.may_answer.set()
    until(lambda: not busan.link.busy, "the answer")
    house.start()
    assert reply(grid, id_) == b"to slow"
    assert busan.asked == [b"slow"]


def test_the_same_request_asked_again_is_answered_from_memory(house: House, site) -> None:  # type: ignore[no-untyped-def]
    """As a run does that ended and goes on: what it asks again is byte for byte the same."""
    busan = site("busan")
    busan.may_answer.set()
    for _ in range(3):
        with GrpcGrid(house.office.socket, LIMIT) as grid:
            assert reply(grid, ask(grid, house, "busan", b"once")) == b"to once"
    assert busan.asked == [b"once"]


def test_what_a_site_has_not_begun_with_when_the_connection_ends_is_begun_once_all_the_same(
    house: House,
    grid: GrpcGrid,
    site,  # type: ignore[no-untyped-def]
) -> None:
    busan, slow = under_way(grid, house, site)
    waiting = ask(grid, house, "busan", b"waiting")
    until(lambda: len(busan.link._in_hand) == 2, "the second request")
    house.stop()
    house.start()
    busan.may_answer.set()
    assert reply(grid, slow) == b"to slow"
    assert reply(grid, waiting) == b"to waiting"
    assert busan.asked == [b"slow", b"waiting"]


def test_a_site_that_reads_nothing_holds_up_only_itself(house: House, grid: GrpcGrid, site) -> None:  # type: ignore[no-untyped-def]
    from tests.link.conftest import Peer

    deaf_loop = Loop()
    try:
        deaf = Peer(house, house.admit("deaf"), deaf_loop)
        deaf.hello()  # and reads no more
        seoul = site("seoul")
        seoul.may_answer.set()
        lost = ask(grid, house, "deaf", bytes(60 << 20))
        for n in range(5):
            assert reply(grid, ask(grid, house, "seoul", f"{n}".encode())) == f"to {n}".encode()
        [link] = [each for each in list(house.daemon._links.values()) if each.site == "deaf"]
        assert link.outgoing.qsize() <= 4, "the rest waits where it comes from"
        assert list(grid.pull_messages([lost])) == []
        deaf.close()
    finally:
        deaf_loop.end()


def test_many_requests_at_once_are_answered_one_after_another(house: House, grid: GrpcGrid, site) -> None:  # type: ignore[no-untyped-def]
    busan, first = under_way(grid, house, site)
    more = {ask(grid, house, "busan", f"{n}".encode()): f"to {n}".encode() for n in range(3)}
    assert busan.asked == [b"slow"]
    busan.may_answer.set()
    for id_, expected in {first: b"to slow", **more}.items():
        assert reply(grid, id_) == expected


def test_a_fault_at_the_site_says_nothing_of_its_text(
    house: House, grid: GrpcGrid, site, caplog: pytest.LogCaptureFixture
) -> None:  # type: ignore[no-untyped-def]
    busan = site("busan")

    def fail(request: bytes, stop: threading.Event) -> bytes:
        raise ValueError("a record: Kim")

    busan.link._handle = fail
    assert reply(grid, ask(grid, house, "busan", b"x")) == "a fault in the site's software; its log says more"
    assert "a record: Kim" in caplog.text


def test_a_site_that_cannot_connect_says_why_and_tries_on(house: House, loop: Loop, tmp_path: Path) -> None:
    busan = Site(house, house.admit("busan", known=False), loop)
    busan.start()
    state = until(lambda: read_state(busan.state), "a state")
    assert state.state == "connecting"
    assert "no site of the roster has this certificate's key" in state.text
    busan.stop()


def test_what_the_other_end_says_cannot_rewrite_a_screen(house: House, grid: GrpcGrid, loop: Loop) -> None:
    from tests.link.conftest import Peer

    peer = Peer(house, house.admit("busan"), loop)
    peer.send(FromSite(hello=Hello(version=VERSION, software="1\x1b[2K")))
    peer.read()
    [connected] = look(house.office.socket).connected
    assert connected.software == "1\\x1b[2K"
    id_ = ask(grid, house, "busan", b"x")
    asked = ToSite.FromString(peer.read() or b"").request
    peer.send(FromSite(refusal=Refusal(id=asked.id, text="all is\r\x1b[1Gwell\u202e")))
    assert reply(grid, id_) == "all is\\r\\x1b[1Gwell\\u202e"


def test_several_requests_may_not_fill_the_memory_together(house: House, loop: Loop) -> None:
    """Each may be as long as one may be; begun at once, they may not be longer together."""
    busan = Site(house, house.admit("busan"), loop)
    busan.start(limit=10 << 20)
    until(lambda: busan.link._outgoing is not None, "the connection")
    frames = asyncio.Queue[FromSite]()
    busan.link._outgoing = frames
    for id_ in (b"1", b"2"):
        loop.do(busan.link._arrive(Part(id=id_ * 32, size=8 << 20, data=bytes(1 << 20))))
    assert list(busan.link._arriving) == [b"1" * 32]
    assert "in hand" in frames.get_nowait().refusal.text
    busan.stop()


def test_whoever_is_revoked_while_it_is_asked_holds_nobody_up(house: House, grid: GrpcGrid, site) -> None:  # type: ignore[no-untyped-def]
    _, id_ = under_way(grid, house, site)
    house.change(*(member.model_copy(update={"revoked_at": now()}) for member in house.office.roster.members))
    assert reply(grid, id_) == "busan is not in the roster"
