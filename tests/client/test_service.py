"""The site service: answers the pinned head office, once, and nobody else; on a socket that others cannot open."""

import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from client.service import Endpoint, Replays, serve
from client.wire import CHUNK, METHOD, SERVICE, ask, chunks, join
from fedllm import envelope
from fedllm.crypto import Identity
from fedllm.envelope import Binding
from fedllm.errors import Cancelled, ConfigError, CryptoError, MessageError
from fedllm.messages import Declined, Prepare, RoundBegun, TrainRequest, from_bytes
from fedllm.plan import RunPlan, parse

HEAD, SITE, STRANGER = Identity.generate(), Identity.generate(), Identity.generate()
BEGUN = RoundBegun(roster="a" * 64, number=1, digest="b" * 64)


def plan(run: str = "run-1") -> RunPlan:
    values = {
        "run": run, "seed": 1, "model": {"source": "base"}, "adapter": {}, "training": {},
        "privacy": {"mode": "off", "units_per_site": 10},
    }  # fmt: skip
    return parse(RunPlan, values)


class Branch:
    """Stands where the site is: notes what it is asked, and answers when it may."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.given_up = threading.Event()
        self.answer = b"answer"

    def handle(self, request: bytes, stop: threading.Event | None = None) -> bytes:
        self.asked.append(request)
        while not self.may_answer.wait(0.02):
            if stop is not None and stop.is_set():
                self.given_up.set()
                raise Cancelled("nobody waits")
        return self.answer


@pytest.fixture
def branch() -> Branch:
    return Branch()


@pytest.fixture
def endpoint(branch: Branch, tmp_path: Path) -> Endpoint:
    return Endpoint(branch, [SITE], [HEAD.public], tmp_path / "seen.json")  # type: ignore[arg-type]


def request(
    number: int = 1, *, sender: Identity = HEAD, receiver: Identity = SITE, run: str = "run-1", round_: int = 2,
    payload: bytes | None = None, **binding: object,
) -> bytes:  # fmt: skip
    asked = plan(run)
    message = TrainRequest(plan=asked, round=2, spec_digest="s", head=None, begun=BEGUN, payload=b"adapter").to_bytes()
    values = {"direction": "to-site", "run": run, "plan": asked.digest, "round": round_, "number": number, **binding}
    return envelope.seal(message if payload is None else payload, Binding(**values), sender, receiver.public)


def test_the_site_answers_its_head_office_and_the_answer_is_bound_to_the_request(
    endpoint: Endpoint, branch: Branch
) -> None:
    sealed = request()
    binding, answer, sender = envelope.open_sealed(endpoint.handle(sealed), HEAD, [SITE.public])
    assert (answer, sender) == (b"answer", SITE.public)
    assert binding == Binding(
        direction="to-head-office", run="run-1", plan=plan().digest, round=2, number=1, request=envelope.digest(sealed)
    )
    assert len(branch.asked) == 1


REFUSED = {
    "a stranger's request": request(sender=STRANGER),
    "the site's own": request(sender=SITE),
    "a request to another site": request(receiver=STRANGER),
    "plain bytes": Prepare(plan=plan()).to_bytes(),
    "nothing": b"",
    "an answer sent back": request(direction="to-head-office"),
    "another run": request(run="run-1", payload=Prepare(plan=plan("run-2")).to_bytes(), round_=0),
    "another plan": request(plan="0" * 64),
    "another round": request(round_=3),
    "a message that is none": request(payload=b"hello"),
    "a message of a site": request(payload=Declined(site="x", reason="data").to_bytes()),
    "number 0": request(0),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_head_office_did_not_ask_this_site_is_refused(endpoint: Endpoint, branch: Branch, what: str) -> None:
    with pytest.raises((CryptoError, MessageError)):
        endpoint.handle(REFUSED[what])
    assert branch.asked == []
    endpoint.handle(request(1))
    assert len(branch.asked) == 1, "a refused request uses up no number"


@pytest.mark.parametrize("restart", [False, True])
def test_a_replay_and_an_older_request_are_refused_also_after_a_restart(
    endpoint: Endpoint, branch: Branch, tmp_path: Path, restart: bool
) -> None:
    first, second = request(5), request(6)
    endpoint.handle(second)
    if restart:
        endpoint = Endpoint(branch, [SITE], [HEAD.public], tmp_path / "seen.json")  # type: ignore[arg-type]
    for old in (second, first, request(6, round_=2)):
        with pytest.raises(MessageError, match="replay"):
            endpoint.handle(old)
    endpoint.handle(request(1, run="run-2"))  # another run counts for itself
    endpoint.handle(request(7))
    assert len(branch.asked) == 3


def test_runs_that_were_forgotten_cannot_be_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.service._RUNS_KEPT", 2)
    replays = Replays(tmp_path / "seen.json")
    for number, run in enumerate(("a", "b", "c"), start=1):
        replays.check(run, 10 * number)
    with pytest.raises(MessageError, match="replay"):
        replays.check("a", 10)
    replays.check("a", 11)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"floor": "x", "last": {}}', b'{"floor": 1, "last": [1]}'])
def test_a_damaged_memory_of_requests_is_refused_with_a_remedy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "seen.json").write_bytes(content)
    with pytest.raises(MessageError, match="Restore it from a backup"):
        Replays(tmp_path / "seen.json")


def test_while_keys_are_rotated_both_are_accepted(branch: Branch, tmp_path: Path) -> None:
    new_site, new_head = Identity.generate(), Identity.generate()
    both = Endpoint(branch, [new_site, SITE], [new_head.public, HEAD.public], tmp_path / "seen.json")  # type: ignore[arg-type]
    for number, (sender, receiver) in enumerate([(HEAD, SITE), (new_head, SITE), (HEAD, new_site)], start=1):
        sealed = both.handle(request(number, sender=sender, receiver=receiver))
        assert envelope.open_sealed(sealed, sender, [new_site.public])[1] == b"answer"


# ---- on the socket -------------------------------------------------------------------------------------------------


@pytest.fixture
def socket(endpoint: Endpoint, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run" / "site.sock"
    server = serve(endpoint, path, None, 300 << 20)
    yield path
    server.stop(None).wait()


def test_the_courier_gets_the_answer_over_the_socket(socket: Path, branch: Branch) -> None:
    sealed = request()
    binding, answer, _ = envelope.open_sealed(ask(str(socket), sealed, 60), HEAD, [SITE.public])
    assert answer == b"answer"
    assert binding.request == envelope.digest(sealed)
    assert from_bytes(branch.asked[0], TrainRequest, Prepare).payload == b"adapter"


@pytest.mark.parametrize("megabytes", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_large_updates_pass_both_ways(socket: Path, branch: Branch, megabytes: int) -> None:
    large = os.urandom(1 << 20) * megabytes
    branch.answer = large[::-1]
    message = TrainRequest(plan=plan(), round=2, spec_digest="s", head=None, begun=BEGUN, payload=large).to_bytes()
    sealed = ask(str(socket), request(payload=message), 200)
    assert envelope.open_sealed(sealed, HEAD, [SITE.public])[1] == large[::-1]


def test_only_the_owner_can_open_the_socket(socket: Path) -> None:
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700


def code(error: pytest.ExceptionInfo[grpc.RpcError]) -> grpc.StatusCode:
    found: grpc.StatusCode = error.value.code()
    return found


def test_a_refusal_tells_nothing_but_that(socket: Path, branch: Branch, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(grpc.RpcError) as error:
        ask(str(socket), request(sender=STRANGER), 60)
    assert code(error) == grpc.StatusCode.PERMISSION_DENIED
    assert error.value.details() == "refused; the site's log says why"
    assert "not signed by anyone who may send here" in caplog.text
    assert branch.asked == []


def test_a_fault_in_the_site_tells_nothing_of_it(
    socket: Path, branch: Branch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def handle(request: bytes, stop: object) -> bytes:
        raise ValueError("Hong Gildong's record")

    monkeypatch.setattr(branch, "handle", handle)
    with pytest.raises(grpc.RpcError) as error:
        ask(str(socket), request(), 60)
    assert code(error) == grpc.StatusCode.INTERNAL
    assert "Hong" not in str(error.value)
    assert "Hong" in caplog.text


def test_a_request_that_is_too_large_is_cut_off(endpoint: Endpoint, branch: Branch, tmp_path: Path) -> None:
    server = serve(endpoint, tmp_path / "small.sock", None, 100_000)
    with pytest.raises(grpc.RpcError) as error:
        ask(str(tmp_path / "small.sock"), bytes(100_001), 60)
    assert code(error) == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert branch.asked == []
    server.stop(None).wait()


def test_when_the_time_is_up_the_site_gives_up(socket: Path, branch: Branch) -> None:
    branch.may_answer.clear()
    for number, seconds in enumerate((0.3, 3, 30), start=1):  # a busy machine: the time was up on the way to the site
        with pytest.raises(grpc.RpcError) as error:
            ask(str(socket), request(number), seconds)
        assert code(error) == grpc.StatusCode.DEADLINE_EXCEEDED
        if branch.asked:
            break
    assert branch.given_up.wait(60)


def test_when_the_courier_is_gone_the_site_gives_up(socket: Path, branch: Branch) -> None:
    branch.may_answer.clear()
    channel = grpc.insecure_channel(f"unix:{socket}")
    call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(chunks(request()))
    while not branch.asked:
        time.sleep(0.01)
    call.cancel()
    assert branch.given_up.wait(60)
    channel.close()


def test_nothing_else_is_served(socket: Path) -> None:
    """No health, no reflection, no other method."""
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        for method in ("/fedllm.Site/Other", "/grpc.health.v1.Health/Check", "/grpc.reflection.v1.ServerReflection/x"):
            with pytest.raises(grpc.RpcError) as error:
                channel.unary_unary(method)(b"", timeout=60)
            assert code(error) == grpc.StatusCode.UNIMPLEMENTED


def test_the_socket_of_a_service_that_was_killed_is_replaced(endpoint: Endpoint, tmp_path: Path) -> None:
    path = tmp_path / "run" / "site.sock"
    for number in (1, 2):
        server = serve(endpoint, path, None, 1 << 20)
        ask(str(path), request(number), 60)
        server.stop(None).wait()
        path.touch()


@pytest.mark.parametrize(
    ("name", "group", "words"), [("x" * 120, None, "100 bytes"), ("site.sock", "no-such-group", "socket_group")]
)
def test_a_socket_that_cannot_be_made_is_one_clear_error(
    endpoint: Endpoint, tmp_path: Path, name: str, group: str | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        serve(endpoint, tmp_path / name, group, 1 << 20)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_chunks_join_to_what_was_cut(size: int) -> None:
    data = os.urandom(size)
    parts = list(chunks(data))
    assert join(parts) == data
    assert parts
    assert max(map(len, parts)) <= CHUNK
