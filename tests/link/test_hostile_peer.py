"""Whoever comes to the server's port: what is not a site of the roster, or does not speak the link, gets nowhere."""

import contextlib
import socket
import ssl
from datetime import timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedllm.crypto import certificates
from fedllm.ops.tls_probe import explain_failure, probe_tls
from fedllm.protocol.enrolment import now
from fedllm.protocol.link import PART, request_id
from fedllm.protocol.link_pb2 import FromSite, Part, Refusal, ToSite
from fedllm.protocol.messages import ENVELOPE_KEY, ENVELOPE_RECORD
from server.grpc_grid import GrpcGrid
from tests.link.conftest import House, Loop, Peer, until

Code = grpc.StatusCode


def test_a_site_of_the_roster_is_welcome(house: House, loop: Loop) -> None:
    peer = Peer(house, house.admit("busan"), loop)
    assert ToSite.FromString(peer.hello() or b"").WhichOneof("frame") == "welcome"
    assert house.connected() == ["busan"]
    peer.close()
    until(lambda: house.connected() == [], "the end of the connection")


@pytest.mark.parametrize(
    ("state", "code", "text"),
    [
        ("unknown", Code.UNAUTHENTICATED, "no site of the roster"),
        ("revoked", Code.PERMISSION_DENIED, "was revoked on"),
    ],
)
def test_a_certificate_alone_opens_nothing_the_roster_decides(
    house: House, loop: Loop, state: str, code: Code, text: str
) -> None:
    key = house.admit("busan", known=state != "unknown")
    if state == "revoked":
        house.change(*(member.model_copy(update={"revoked_at": now()}) for member in house.office.roster.members))
    peer = Peer(house, key, loop)
    with contextlib.suppress(grpc.aio.AioRpcError):
        assert peer.hello() is None
    assert peer.end()[0] is code
    assert text in peer.end()[1]
    assert text in house.refused()["busan"]
    assert house.connected() == []


def test_a_revocation_ends_a_stream_that_is_open(house: House, loop: Loop) -> None:
    peer = Peer(house, house.admit("busan"), loop)
    peer.hello()
    house.change(*(member.model_copy(update={"revoked_at": now()}) for member in house.office.roster.members))
    assert peer.end()[0] is Code.PERMISSION_DENIED
    assert house.connected() == []


def test_a_key_that_was_retired_ends_its_stream_and_the_new_one_goes_on(house: House, loop: Loop) -> None:
    old, new = house.admit("busan"), house.admit("busan", known=False)
    [member] = house.office.roster.members
    both = member.model_copy(
        update={"link_key": certificates.key_line(new.read_bytes()), "previous_link_keys": (member.link_key,)}
    )
    house.change(both)
    first = Peer(house, old, loop)
    first.hello()
    house.change(both.model_copy(update={"previous_link_keys": ()}))
    assert first.end()[0] is Code.UNAUTHENTICATED
    second = Peer(house, new, loop)
    assert second.hello() is not None


def test_the_newest_of_two_connections_counts_and_the_other_is_told(house: House, loop: Loop) -> None:
    key = house.admit("busan")
    first, second = Peer(house, key, loop), Peer(house, key, loop)
    first.hello()
    second.hello()
    assert first.end()[0] is Code.ABORTED
    assert "has connected again" in first.end()[1]
    assert house.connected() == ["busan"]


def test_with_a_certificate_of_its_own_a_site_is_itself_whatever_it_says(house: House, loop: Loop) -> None:
    """Nothing in a frame names a site: to come as another one takes that one's key."""
    house.admit("seoul")
    peer = Peer(house, house.admit("busan"), loop)
    peer.hello()
    assert house.connected() == ["busan"]
    assert "site" not in FromSite.DESCRIPTOR.fields_by_name
    assert "site" not in FromSite.DESCRIPTOR.fields_by_name["hello"].message_type.fields_by_name


@pytest.mark.parametrize(
    "frame",
    [
        b"", b"\xff" * 40, b"\x0a\x05abc", FromSite(answer=Part(id=b"x")).SerializeToString(),
        FromSite(refusal=Refusal(id=b"x")).SerializeToString(),
    ],
)  # fmt: skip
def test_a_first_frame_that_is_no_hello_ends_the_stream(house: House, loop: Loop, frame: bytes) -> None:
    honest, peer = Peer(house, house.admit("seoul"), loop), Peer(house, house.admit("busan"), loop)
    honest.hello()
    peer.send(frame)
    assert peer.end()[0] in (Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION)
    assert house.connected() == ["seoul"]


@pytest.mark.parametrize("frame", [b"\xff" * 40, b"\x0a\x05abc", b""])
def test_a_malformed_frame_or_a_second_hello_ends_the_stream_and_no_other(
    house: House, loop: Loop, frame: bytes
) -> None:
    honest, peer = Peer(house, house.admit("seoul"), loop), Peer(house, house.admit("busan"), loop)
    honest.hello()
    peer.hello()
    peer.send(frame)
    assert peer.end()[0] is Code.INVALID_ARGUMENT
    until(lambda: house.connected() == ["seoul"], "the end of one connection")


def test_a_hello_said_again_is_none(house: House, loop: Loop) -> None:
    peer = Peer(house, house.admit("busan"), loop)
    peer.hello()
    peer.send(FromSite(hello={"version": 1}))
    assert peer.end()[0] is Code.INVALID_ARGUMENT


def test_another_version_is_told_so(house: House, loop: Loop) -> None:
    peer = Peer(house, house.admit("busan"), loop)
    with contextlib.suppress(grpc.aio.AioRpcError):
        assert peer.hello(version=2) is None
    assert peer.end() == (
        Code.FAILED_PRECONDITION,
        "version 2 of the link, and the server speaks 1. Install the same fedllm",
    )


def test_answers_that_nobody_waits_for_are_dropped(house: House, loop: Loop) -> None:
    peer = Peer(house, house.admit("busan"), loop)
    peer.hello()
    for _ in range(50):
        peer.send(FromSite(answer=Part(id=b"x" * 32, size=PART, data=bytes(PART))))
    assert house.connected() == ["busan"]
    [link] = house.daemon._links.values()
    assert not link.answers
    assert link.outgoing.qsize() == 0


def raw(house: House) -> socket.socket:
    return socket.create_connection(("127.0.0.1", house.port), timeout=30)


@pytest.mark.parametrize("opening", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", bytes(5000)])
def test_half_handshakes_and_other_languages_hold_up_nobody(house: House, loop: Loop, opening: bytes) -> None:
    strangers = [raw(house) for _ in range(30)]
    for each in strangers:
        with contextlib.suppress(OSError):
            each.sendall(opening)
    peer = Peer(house, house.admit("busan"), loop)
    assert peer.hello() is not None
    for each in strangers:
        each.close()
    assert house.connected() == ["busan"]


def context(house: House, key: Path | None = None) -> ssl.SSLContext:
    found = ssl.create_default_context(cafile=str(house.office.ca_file))
    found.set_alpn_protocols(["h2"])
    if key is not None:
        found.load_cert_chain(str(key.with_suffix(".pem")), str(key))
    return found


@pytest.mark.parametrize("fault", ["none shown", "ended", "another authority"])
def test_a_certificate_that_is_not_believed_is_refused_before_a_frame_and_the_site_learns_why(
    house: House, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = certificates.make_ca("stranger", 30)
    if fault == "ended":
        monkeypatch.setattr(certificates, "_BACKDATE", timedelta(days=2))
    key = house.admit("busan", stranger if fault == "another authority" else None, days=-1 if fault == "ended" else 30)
    if fault == "none shown":
        with raw(house) as plain, context(house).wrap_socket(plain, server_hostname="127.0.0.1") as secured:
            assert secured.recv(100) == b""
        return
    with pytest.raises(OSError) as found:  # noqa: PT011
        probe_tls("127.0.0.1", house.port, house.office.ca_file, own=(key.with_suffix(".pem"), key))
    text = explain_failure("127.0.0.1", house.port, found.value)
    assert ("has ended on" if fault == "ended" else "does not accept this site's certificate") in text
    assert "fedllm server grant SITE" in text
    assert house.connected() == []


def test_a_site_that_sends_parts_that_do_not_fit_gets_its_answer_refused(house: House, loop: Loop) -> None:
    peer = Peer(house, house.admit("busan"), loop)
    peer.hello()
    with GrpcGrid(house.office.socket, 1 << 20) as grid:
        [node] = grid.get_node_ids()
        for answer, reason in (
            ([Part(size=2 << 20, data=b"x")], "a payload of 2097152 bytes"),
            ([Part(size=10, data=b"x"), Part(size=11, data=b"y")], "do not fit together"),
            ([Part(size=2, data=b"xyz")], "do not fit together"),
        ):
            message = Message(
                RecordDict({ENVELOPE_RECORD: ConfigRecord({ENVELOPE_KEY: reason.encode()})}), node, "query", ttl=60
            )
            [id_] = grid.push_messages([message])
            frame = ToSite.FromString(peer.read() or b"")
            assert frame.request.id == request_id(reason.encode())
            for part in answer:
                part.id = frame.request.id
                peer.send(FromSite(answer=part))
            [reply] = until(lambda i=id_: list(grid.pull_messages([i])), "a reply")
            assert reason in reply.error.reason
            if sum(len(part.data) for part in answer) < answer[0].size:
                assert ToSite.FromString(peer.read() or b"").cancel.id == frame.request.id
