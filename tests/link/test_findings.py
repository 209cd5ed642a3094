"""Whatever keeps a site from being connected is named by the doctor at both ends, with what to do."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest

import client.doctor
import client.link
import server.doctor
from client.link import LinkState
from client.office import Office, rotate
from fedllm.crypto import certificates
from fedllm.crypto.certificates import Certificate
from fedllm.files import write_secret
from fedllm.ops import health_checks
from fedllm.protocol.enrolment import Grant
from fedllm.protocol.link import milliseconds
from server import federation
from tests.link.conftest import until
from tests.link.ends import admit, daemon_of, link_of, link_says, make_head, make_member, short_folder

NAME = "서울-강남"


class Ends:
    """An admitted site and its server."""

    def __init__(self, place: Path, ends: ExitStack) -> None:
        self.head = make_head(place)
        self.site = make_member(self.head, place / "site", NAME)
        self._ends = ends

    def start(self, says: Callable[[LinkState], bool]) -> None:
        """Start both, and wait until the site's link is as expected."""
        self._ends.enter_context(daemon_of(self.head))
        self.start_site(says)

    def start_site(self, says: Callable[[LinkState], bool]) -> None:
        self._ends.enter_context(link_of(self.site))
        link_says(self.site, says)

    @property
    def authority(self) -> Certificate:
        return federation.HeadOffice.open(self.head).authorities[0]

    @property
    def link_key(self) -> str:
        return certificates.key_line(Office.open(self.site).in_use.link_file.read_bytes())

    def replace_certificate(self, made: bytes) -> None:
        """Let the site show another certificate, which is in its grant at the server, too."""
        write_secret(Office.open(self.site).in_use.link_file.with_suffix(".pem"), made)
        path = self.head / "grants" / f"{NAME}.grant"
        grant = Grant.open(path.read_bytes())[0].model_copy(update={"link": made.decode()})
        write_secret(path, grant.sign(federation.HeadOffice.open(self.head).identities))

    def at_site(self, level: str) -> str:
        return "\n".join(each.text for each in client.doctor.examine(self.site) if each.level == level)

    def at_head(self, level: str) -> str:
        return "\n".join(each.text for each in server.doctor.examine(self.head) if each.level == level)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    monkeypatch.setattr(health_checks, "_synchronised", lambda: True)
    monkeypatch.setattr(client.doctor, "_YOUNG", -9.0)  # a connection that is not there yet is one that is missing
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with short_folder() as place, ExitStack() as stack:
        yield Ends(place, stack)


def not_connected(state: LinkState) -> bool:
    return state.state == "connecting"


def connected(state: LinkState) -> bool:
    return state.state == "connected"


def test_an_office_that_is_connected_is_so_at_both_ends(ends: Ends) -> None:
    ends.start(connected)
    assert "site: connected to the server" in ends.at_site("ok")
    assert "accepts this site's" in ends.at_site("ok")
    assert f"{NAME} is connected from ipv4:127.0.0.1:" in ends.at_head("ok")
    assert "sites reach 127.0.0.1" in ends.at_head("ok")
    assert ends.at_head("ERROR") == ""


def expired(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> bytes:
    with monkeypatch.context() as past:
        past.setattr(certificates, "_BACKDATE", timedelta(days=9))
        return certificates.certify(ends.authority, ends.link_key, NAME, -2)


def test_a_certificate_that_has_ended(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    ends.replace_certificate(expired(ends, monkeypatch))
    ends.start(not_connected)
    said = ends.at_site("ERROR")
    assert "this site's certificate has ended on" in said
    assert "not connected to the server: this site's certificate has ended on" in said
    assert "fedllm server grant SITE" in said
    assert f"the certificate of {NAME} has ended on" in ends.at_head("ERROR")
    assert f"fedllm server grant {NAME}, and send it" in ends.at_head("ERROR")
    assert f"{NAME} is not connected. There: fedllm doctor" in ends.at_head("warning")


def test_a_certificate_that_ends_soon_is_announced(ends: Ends) -> None:
    ends.replace_certificate(certificates.certify(ends.authority, ends.link_key, NAME, 90))
    assert "this site's certificate ends on" in ends.at_site("ok")
    with pytest.MonkeyPatch.context() as patch:
        then = health_checks.now() + timedelta(days=65)
        patch.setattr(health_checks, "now", lambda: then)
        assert "this site's certificate ends on" in ends.at_site("warning")
        assert f"the certificate of {NAME} ends on" in ends.at_head("warning")


def test_keys_that_were_retired(ends: Ends) -> None:
    rotate(ends.site)
    waiting = Office.open(ends.site)
    heard = waiting.keys[-1].identity.public.fingerprint
    federation.admit(ends.head, waiting.join_file.read_bytes(), heard)
    federation.retire(ends.head, NAME)  # too early: the site has not installed its grant
    ends.start(not_connected)
    assert "no site of the roster has this certificate's key: it was retired" in ends.at_site("ERROR")
    assert f"{NAME} was refused at" in ends.at_head("ERROR")
    assert "it was retired, or never admitted" in ends.at_head("ERROR")


def test_an_office_that_was_revoked_is_cut_off_and_told(ends: Ends) -> None:
    ends.start(connected)
    federation.revoke(ends.head, NAME)
    link_says(ends.site, lambda state: "revoked" in state.text)
    assert f"not connected to the server: {NAME} was revoked on" in ends.at_site("ERROR")
    until(lambda: f"{NAME}, which is not in the roster, was refused at" in ends.at_head("warning"))
    assert f"{NAME} was revoked on" in ends.at_head("warning")


def test_an_office_that_is_unknown(ends: Ends) -> None:
    write_secret(ends.head / "roster.json", b'{"members": []}')  # as of a backup of before
    ends.start(not_connected)
    assert "never admitted" in ends.at_site("ERROR")
    assert f"{NAME}, which is not in the roster, was refused at" in ends.at_head("warning")


def test_a_certificate_of_another_authority(ends: Ends) -> None:
    ends.replace_certificate(certificates.certify(certificates.make_ca("x", 9), ends.link_key, NAME, 9))
    ends.start(not_connected)
    said = ends.at_site("ERROR")
    for where in ("not connected to the server: ", "way to the server: "):
        assert f"{where}the server does not accept this site's certificate" in said
    assert "it is of another authority" in said
    assert f"{NAME} is not connected. There: fedllm doctor" in ends.at_head("warning")
    assert f"the certificate of {NAME} is not of this federation's authority" in ends.at_head("ERROR")


def test_a_head_office_of_another_authority(ends: Ends) -> None:
    for step in ("start", "finish", "retire"):  # the site has slept through it
        federation.rotate_ca(ends.head, step)  # type: ignore[arg-type]
    ends.start(not_connected)
    said = ends.at_site("ERROR")
    assert (
        "not connected to the server: the server certificate was not issued by the authority that the grant names"
        in said
    )
    assert "way to the server: the server certificate was not issued by the authority" in said
    assert f"{NAME} is not connected" in ends.at_head("warning")


@pytest.mark.parametrize(("seconds", "word"), [(120, "ahead of"), (-120, "behind")])
def test_a_clock_that_is_off(ends: Ends, monkeypatch: pytest.MonkeyPatch, seconds: int, word: str) -> None:
    monkeypatch.setattr(client.link, "milliseconds", lambda: milliseconds() + 1000 * seconds)
    ends.start(connected)
    for said in (ends.at_site("warning"), ends.at_head("warning")):
        [line] = [line for line in said.splitlines() if line.startswith("clock")]
        assert word in line
        assert "timedatectl set-ntp true" in line
        assert any(f"{near} s" in line for near in range(115, 126))


def test_a_head_office_that_does_not_run(ends: Ends) -> None:
    ends.start_site(not_connected)
    assert "connection refused. Start the server there (fedllm server start)" in ends.at_site("ERROR")
    assert "daemon: it does not run. Start it: fedllm server start" in ends.at_head("warning")


def test_a_site_that_is_not_connected_for_long_is_wrong(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it has tried meanwhile."""
    monkeypatch.setattr(client.doctor, "_YOUNG", 20.0)
    ends.start_site(not_connected)
    file = Office.open(ends.site).link_state_file
    first, written = client.link.read_state(file), file.stat().st_mtime_ns
    assert first is not None
    assert "is not connected to the server" in ends.at_site("warning")
    until(lambda: file.stat().st_mtime_ns != written)
    link_says(ends.site, lambda state: state.since == first.since)
    later = health_checks.now() + timedelta(seconds=30)
    monkeypatch.setattr(client.doctor, "now", lambda: later)
    assert "is not connected to the server" in ends.at_site("ERROR")


def test_a_site_that_does_not_run(ends: Ends) -> None:
    with daemon_of(ends.head):
        assert "site: it does not run. Start it: fedllm site start" in ends.at_site("warning")
        assert f"{NAME} is not connected. There: fedllm doctor" in ends.at_head("warning")


def test_a_relay_that_is_missing(ends: Ends) -> None:
    values = (ends.site / "site.yaml").read_text("utf-8") + f"socket: {ends.site / 'relay.sock'}\n"
    write_secret(ends.site / "site.yaml", values.encode())
    ends.start(not_connected)
    said = ends.at_site("ERROR")
    assert f"not connected to the server: no relay listens on {ends.site / 'relay.sock'}" in said
    assert "Does it run (fedllm site relay)" in said
    assert f"{NAME} is not connected" in ends.at_head("warning")


def test_an_office_comes_back_by_itself_when_it_is_put_right(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    ends.replace_certificate(expired(ends, monkeypatch))
    ends.start(not_connected)
    federation.renew_grant(ends.head, NAME)
    admit(ends.head, ends.site)
    link_says(ends.site, connected)
    assert f"{NAME} is connected" in ends.at_head("ok")
