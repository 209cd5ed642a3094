"""A site's process: it answers the pinned the server, once, and nobody else; and starts anew when it has to."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import service
from client.link import SiteLink, read_state
from client.office import Office, install
from client.service import Endpoint, ReplayGuard
from client.site import Site
from fedllm.crypto.identity import Identity
from fedllm.errors import Cancelled, CryptoError, FolderError, MessageError
from fedllm.files import locked
from fedllm.plan import RunPlan
from fedllm.protocol import sealed_envelope
from fedllm.protocol.messages import Declined, Prepare, RoundBegun, TrainRequest
from fedllm.protocol.sealed_envelope import Binding
from fedllm.values import parse
from server import federation
from tests.link.conftest import until
from tests.link.ends import make_head, make_member, short_folder

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
    return sealed_envelope.seal(message if payload is None else payload, Binding(**values), sender, receiver.public)


def test_the_site_answers_its_head_office_and_the_answer_is_bound_to_the_request(
    endpoint: Endpoint, branch: Branch
) -> None:
    sealed = request()
    binding, answer, sender = sealed_envelope.open_sealed(endpoint.handle(sealed), HEAD, [SITE.public])
    assert (answer, sender) == (b"answer", SITE.public)
    assert binding == Binding(
        direction="to-head-office",
        run="run-1",
        plan=plan().digest,
        round=2,
        number=1,
        request=sealed_envelope.digest(sealed),
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
    replays = ReplayGuard(tmp_path / "seen.json")
    for number, run in enumerate(("a", "b", "c"), start=1):
        replays.check(run, 10 * number)
    with pytest.raises(MessageError, match="replay"):
        replays.check("a", 10)
    replays.check("a", 11)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"floor": "x", "last": {}}', b'{"floor": 1, "last": [1]}'])
def test_a_damaged_memory_of_requests_is_refused_with_a_remedy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "seen.json").write_bytes(content)
    with pytest.raises(MessageError, match="Restore it from a backup"):
        ReplayGuard(tmp_path / "seen.json")


def test_while_keys_are_rotated_both_are_accepted(branch: Branch, tmp_path: Path) -> None:
    new_site, new_head = Identity.generate(), Identity.generate()
    both = Endpoint(branch, [new_site, SITE], [new_head.public, HEAD.public], tmp_path / "seen.json")  # type: ignore[arg-type]
    for number, (sender, receiver) in enumerate([(HEAD, SITE), (new_head, SITE), (HEAD, new_site)], start=1):
        sealed = both.handle(request(number, sender=sender, receiver=receiver))
        assert sealed_envelope.open_sealed(sealed, sender, [new_site.public])[1] == b"answer"


# ---- the process -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A member's folder whose site answers without records, and whose way leads nowhere."""
    with short_folder() as place:
        made = make_member(make_head(place), place / "site")
        settings = (made / "site.yaml").read_text("utf-8")
        (made / "site.yaml").write_text(settings.replace("  # reply_quantum: 5 ", "  reply_quantum: 0 "), "utf-8")

        class Stub(Branch):
            def open_ledger(self) -> None:
                """There is none."""

        monkeypatch.setattr(service, "open_site", lambda office: Stub())
        monkeypatch.setattr(service, "_LOOK", 0.02)
        monkeypatch.setattr(signal, "SIGTERM", signal.SIGUSR1)  # pytest's own are left alone
        monkeypatch.setattr(signal, "SIGINT", signal.SIGUSR2)
        yield made


def test_the_process_ends_when_it_is_told_to(ready: Path) -> None:
    """And leaves the folder to the next one."""
    office = Office.open(ready)

    def end() -> None:
        until(lambda: read_state(office.link_state_file) is not None)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=end)
    thread.start()
    assert service.run(office) is False
    thread.join()
    with locked(office.ledger_file.parent):
        pass


def test_the_process_starts_anew_when_a_grant_was_installed(ready: Path) -> None:
    office = Office.open(ready)

    def renew() -> None:
        until(lambda: read_state(office.link_state_file) is not None)
        install(ready, federation.renew_grant(ready.parent / "head", office.name).read_bytes())

    thread = threading.Thread(target=renew)
    thread.start()
    assert service.run(office) is True
    thread.join()


def test_what_changes_while_records_are_read_is_not_missed(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = service.open_site

    def slow(office: Office) -> Site:
        install(ready, federation.renew_grant(ready.parent / "head", office.name).read_bytes())
        return found(office)

    monkeypatch.setattr(service, "open_site", slow)
    assert service.run(Office.open(ready)) is True


def test_two_processes_of_one_site_are_refused(ready: Path) -> None:
    office = Office.open(ready)
    with locked(office.ledger_file.parent), pytest.raises(FolderError):
        service.run(office)


def test_a_refusal_and_a_fault_tell_head_office_nothing_but_that(
    endpoint: Endpoint,
    branch: Branch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    link = SiteLink("unix:/nowhere", lambda: None, str, endpoint.handle, 1 << 20, tmp_path / "link.json")
    assert link._safely(request(sender=STRANGER), threading.Event()) == "refused; the site's log says why"
    assert "not signed by anyone who may send here" in caplog.text

    def handle(request: bytes, stop: object) -> bytes:
        raise ValueError("Hong Gildong's record")

    monkeypatch.setattr(branch, "handle", handle)
    said = link._safely(request(), threading.Event())
    assert said == "a fault in the site's software; its log says more"
    assert "Hong" in caplog.text


def test_a_request_that_nobody_waits_for_is_given_up(endpoint: Endpoint, branch: Branch, tmp_path: Path) -> None:
    link = SiteLink("unix:/nowhere", lambda: None, str, endpoint.handle, 1 << 20, tmp_path / "link.json")
    branch.may_answer.clear()
    stop = threading.Event()
    stop.set()
    assert link._safely(request(), stop) == "given up"
    assert branch.given_up.is_set()
