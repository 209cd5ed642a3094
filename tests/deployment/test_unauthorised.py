"""Who may not take part is refused by the running processes, and nothing is charged for it.

What a hostile peer sends at the port is in tests/server/test_daemon.py. The last tests of the soak revoke a site of
the session's federation and take the others off the network, so they come last.
"""

import os
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import psutil
import pytest

from client import office as site_folder
from fedllm.crypto import certificates
from fedllm.crypto.certificates import Certificate
from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.errors import FederationError, MessageError
from fedllm.files import write_secret
from fedllm.ops.tls_probe import probe_tls
from fedllm.protocol import sealed_envelope
from fedllm.protocol.link import CONNECT, CONTROL, VERSION, parts, request_id
from fedllm.protocol.link_pb2 import Answer, FromSite, Hello, Request, ToSite
from fedllm.protocol.messages import Declined, Message, Prepare, Ready, RoundBegun, TrainRequest, from_bytes
from fedllm.protocol.sealed_envelope import Binding
from server import federation as head_folder
from server.run import make_plan
from tests.deployment.conftest import Federation
from tests.deployment.harness import ALONE, HeadOffice, config_of, fedllm, stop_all, until
from tests.deployment.test_survival import begun

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(1800)]

_Code = grpc.StatusCode

# ---- at the port -----------------------------------------------------------------------------------------------------


class Stream:
    """A site's stream, as anybody can open one with the files that a certificate, its key and an authority are."""

    def __init__(self, port: int, ca: bytes, key: bytes | None = None, certificate: bytes | None = None) -> None:
        self._channel = grpc.secure_channel(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(ca, key, certificate))
        self._out = SimpleQueue[bytes]()
        self._out.put(FromSite(hello=Hello(version=VERSION, software="test", clock=0)).SerializeToString())
        open_: Any = self._channel.stream_stream(CONNECT)
        self._call = open_(iter(self._out.get, b""), timeout=120)

    def frame(self) -> ToSite:
        """The next frame from the server; raises grpc.RpcError where the stream has ended."""
        return ToSite.FromString(next(self._call))

    def close(self) -> None:
        self._call.cancel()
        self._out.put(b"")
        self._channel.close()

    def ended(self) -> tuple[grpc.StatusCode, str]:
        """Wait for the stream's end, and return how the server has ended it."""
        try:
            while True:
                self.frame()
        except grpc.RpcError as error:
            return error.code(), error.details() or ""  # type: ignore[attr-defined]  # it is a grpc.Call
        finally:
            self.close()


def refused(head: HeadOffice, key: bytes | None, certificate: bytes | None) -> tuple[grpc.StatusCode, str]:
    """Return how the server ends the stream of somebody whom it does not let in."""
    return Stream(head.port, head.office.ca_file.read_bytes(), key, certificate).ended()


def certificate_of(head: HeadOffice, key: bytes, name: str) -> bytes:
    """A certificate of the server's authority, as it would have issued one."""
    return certificates.certify(head.office.authorities[0], certificates.key_line(key), name, 30)


def test_who_has_no_certificate_or_one_of_another_authority_or_that_has_ended_is_not_let_in(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, key = federation.head, certificates.make_key()
    other: Certificate = certificates.make_ca("한빛은행", 10)
    line = certificates.key_line(key)
    assert refused(head, None, None)[0] is _Code.UNAVAILABLE
    assert refused(head, key, certificates.certify(other, line, ALONE, 30))[0] is _Code.UNAVAILABLE
    office_key = federation.branches[ALONE].office.keys[-1].link_file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(certificates, "_BACKDATE", timedelta(days=3))
        ended = certificates.certify(head.office.authorities[0], certificates.key_line(office_key), ALONE, -1)
    assert refused(head, office_key, ended)[0] is _Code.UNAVAILABLE
    # nor is one that is good for serving good for connecting
    serving = certificates.certify(
        head.office.authorities[0], certificates.key_line(office_key), ALONE, 30, ["localhost"]
    )
    assert refused(head, office_key, serving)[0] is _Code.UNAVAILABLE


def test_a_key_that_is_not_in_the_roster_is_refused_by_name_and_takes_nobody_s_place(federation: Federation) -> None:
    federation.ready()
    head, key = federation.head, certificates.make_key()
    code, text = refused(head, key, certificate_of(head, key, ALONE))
    assert (code, "never admitted" in text) == (_Code.UNAUTHENTICATED, True)
    assert "never admitted" in head.refused()[ALONE]
    assert head.connected() == set(federation.admitted)


def test_an_office_is_let_in_until_its_key_is_retired_or_it_is_revoked_which_ends_its_stream(
    federation: Federation, tmp_path: Path
) -> None:
    head = federation.head
    home = site_folder.init_office(tmp_path / "site", "일시").folder  # its folder alone, no process

    def admitted(office: site_folder.Office) -> site_folder.Office:
        fingerprint = office.keys[-1].identity.public.fingerprint
        grant = head_folder.admit(head.home, office.join_file.read_bytes(), fingerprint)
        return site_folder.install(home, grant.read_bytes(), head.fingerprint)

    def stream(keys: site_folder.KeySet) -> Stream:
        files = keys.link_file.read_bytes(), keys.link_file.with_suffix(".pem").read_bytes()
        return Stream(head.port, head.office.ca_file.read_bytes(), *files)

    first = admitted(site_folder.Office.open(home)).in_use

    def let_in(keys: site_folder.KeySet) -> Stream:
        """The daemon looks at the roster every second."""
        opened: list[Stream] = []

        def welcome() -> bool:
            opened.append(stream(keys))
            try:
                return opened[-1].frame().WhichOneof("frame") == "welcome"
            except grpc.RpcError:
                opened[-1].close()
                return False

        until(welcome, 60, "a welcome")
        return opened[-1]

    try:
        old = let_in(first)
        second = admitted(site_folder.rotate(home)).in_use
        assert second.number == 2
        head_folder.retire(head.home, "일시")
        assert old.ended() == (_Code.UNAUTHENTICATED, "this key of the site was retired")
        assert stream(first).ended()[0] is _Code.UNAUTHENTICATED

        present = let_in(second)
    finally:
        head_folder.revoke(head.home, "일시")
    code, text = present.ended()
    assert (code, "was revoked on" in text) == (_Code.PERMISSION_DENIED, True)
    assert stream(second).ended() == (code, text)
    assert head.refused()["일시"] == text


def test_the_door_speaks_tls_alone(federation: Federation) -> None:
    with socket.create_connection(("127.0.0.1", federation.head.port), timeout=120) as plain:
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000"))
        answer = b""
        try:
            while part := plain.recv(4096):
                answer += part
        except ConnectionError:
            pass
    assert len(answer) < 50  # a TLS alert, or nothing
    assert b"\x00\x00\x00\x04" not in answer  # HTTP/2's settings


def _handshake(port: int, ca: Path, least: ssl.TLSVersion, most: ssl.TLSVersion, ciphers: str) -> str:
    context = ssl.create_default_context(cafile=str(ca))
    context.set_ciphers(ciphers)
    context.minimum_version, context.maximum_version = least, most
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=120) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        return secured.version() or ""


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
def test_an_older_version_than_tls_1_3_is_refused(federation: Federation) -> None:
    port, ca = federation.head.port, federation.head.office.ca_file
    old, last, new = ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
    everything = "ALL:@SECLEVEL=0"
    assert _handshake(port, ca, last, new, everything) == "TLSv1.3"
    for version in (old, last):
        with pytest.raises(OSError, match=r"(?i)ssl|reset"):
            _handshake(port, ca, version, version, everything)


def test_an_office_does_not_connect_to_another_server(federation: Federation, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(certificates.make_ca("한빛은행", 10).certificate)
    with pytest.raises(ssl.SSLCertVerificationError):
        probe_tls("127.0.0.1", federation.head.port, tmp_path / "ca.pem")
    assert probe_tls("127.0.0.1", federation.head.port, federation.head.office.ca_file)


def test_one_port_listens_at_head_office_and_none_at_an_office(federation: Federation) -> None:
    federation.ready()

    def ports(process: psutil.Process) -> set[tuple[str, int]]:
        found = (each for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN)
        return {(each.laddr.ip.removeprefix("::ffff:"), each.laddr.port) for each in found}  # IPv4 as gRPC writes it

    for process in federation.head.program.processes():
        assert ports(process) == {("127.0.0.1", federation.head.port)}
    for program in federation.branches[ALONE].programs:
        assert {port for process in program.processes() for port in ports(process)} == set(), program.arguments


# ---- at the unix sockets ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("which", ["the server's daemon", "the relay"])
def test_another_system_user_cannot_open_the_socket(federation: Federation, which: str) -> None:
    relay = federation.branches[ALONE].office.socket
    assert relay is not None
    place = federation.head.socket if "daemon" in which else relay
    until(place.exists, what=which)
    assert place.stat().st_mode & 0o777 == 0o600
    assert place.parent.stat().st_mode & 0o077 == 0
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print('connected')"
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="public") as public:
        os.chmod(public, 0o755)
        door = Path(public) / "s"
        os.link(place, door)  # the same socket, where the folders above keep nobody out
        for user, opens in ((0, True), (65534, False)):
            done = subprocess.run(
                ["/usr/bin/env", "python3", "-I", "-c", code, str(door)], user=user, group=user, extra_groups=[],
                capture_output=True, text=True, timeout=60, check=False, cwd="/",
            )  # fmt: skip
            assert ("connected" in done.stdout) is opens, done.stderr
            assert opens or "PermissionError" in done.stderr


def _ask(head: HeadOffice, site: str, payload: bytes) -> bytes:
    """Have the daemon carry a payload to a site, and return what it answers, as whoever has the daemon can.

    Raises MessageError where the site refuses.
    """
    with grpc.insecure_channel(f"unix:{head.socket}") as channel:
        ask: Any = channel.stream_stream(f"/{CONTROL}/Ask")
        frames = [Request(site=site, part=part).SerializeToString() for part in parts(request_id(payload), payload)]
        answers = [Answer.FromString(each) for each in ask(iter(frames), timeout=600)]
    if answers[-1].WhichOneof("frame") != "part":
        raise MessageError(answers[-1].refused or answers[-1].gone)
    return b"".join(each.part.data for each in answers)


def _sealed(
    message: Message, site: PublicIdentity, sender: Identity, run: str, plan: str, round_: int = 0, number: int = 0
) -> bytes:
    binding = Binding(direction="to-site", run=run, plan=plan, round=round_, number=number or time.time_ns())
    return sealed_envelope.seal(message.to_bytes(), binding, sender, site)


def test_what_the_pinned_head_office_did_not_ask_is_refused_by_the_office(federation: Federation) -> None:
    branch, head = federation.branches[ALONE], federation.head
    federation.ready()
    before = len(branch.charged())
    me, site = head.office.identity, branch.office.identity.public
    # one that the policy declines, which is an answer of the site, and comes before its self-check
    costly = {"privacy.epsilon": 1000, "privacy.noise_multiplier": 0.05}
    plan = make_plan(config_of("not-asked", 1, **costly), ["a", "b", "c"])
    known = {"run": plan.run, "plan": plan.digest}
    genuine = _sealed(Prepare(plan=plan), site, me, **known)
    begun = RoundBegun(roster="0" * 64, number=1, digest="0" * 64)
    train = TrainRequest(plan=plan, round=1, spec_digest="0" * 64, head=None, begun=begun, payload=b"")
    altered = bytearray(_sealed(Prepare(plan=plan), site, me, **known))
    altered[-1] ^= 1
    others = {
        "not signed": Prepare(plan=plan).to_bytes(),
        "signed by a stranger": _sealed(train, site, Identity.generate(), **known, round_=1),
        "sealed to another site": _sealed(train, federation.branches["seoul-gangnam"].office.identity.public, me,
                                            **known, round_=1),
        "altered": bytes(altered),
        "bound to another run": _sealed(train, site, me, run="other", plan=plan.digest, round_=1),
        "bound to another plan": _sealed(train, site, me, run=plan.run, plan="0" * 64, round_=1),
        "bound to another round": _sealed(train, site, me, **known, round_=2),
    }  # fmt: skip
    answer = _ask(head, branch.name, genuine)
    binding, payload, _ = sealed_envelope.open_sealed(answer, me, [site])
    assert binding.request == sealed_envelope.digest(genuine)
    assert isinstance(from_bytes(payload, Ready, Declined), Declined)
    others["a replay"] = genuine
    others["older than the last"] = _sealed(train, site, me, **known, round_=1, number=1)
    for request in others.values():
        with pytest.raises(MessageError, match=r"^refused; the site's log says why$"):
            _ask(head, branch.name, request)
    assert len(branch.charged()) == before
    refusals = [line for line in branch.log.splitlines() if "refused" in line]
    assert len(refusals) >= len(others)


# ---- runs ------------------------------------------------------------------------------------------------------------


@contextmanager
def _identity(head: HeadOffice, identity: Identity) -> Iterator[None]:
    """The server with another identity, as of somebody who took over its machine's place."""
    file = head.home / "keys" / "identity"
    before = file.read_bytes()
    head_folder._write_identities(head.home, [("signs", identity)])
    try:
        yield
    finally:
        write_secret(file, before)


@pytest.mark.soak
def test_a_stranger_at_head_office_is_refused_and_so_is_a_revoked_office(federation: Federation) -> None:
    head, branches = federation.head, federation.branches
    mapo = branches["서울-마포"]
    federation.ready()
    # somebody who has the daemon, certificates and all, but not the identity that the sites have pinned
    refusals = {name: branch.log.count("not signed by anyone") for name, branch in branches.items()}
    with _identity(head, Identity.generate()):
        head.begin("stranger", 1, **{"federation.round_timeout": 15})
        ended = head.ended("stranger")
    assert ended.state == "stopped"
    assert "round 1: 0 sites, federation.quorum=2" in ended.text
    assert (head.run("stranger") / "summary.md").exists()
    assert all(branch.ledger(head.plan("stranger").run) == {} for branch in branches.values())
    assert any(branch.log.count("not signed by anyone") > refusals[n] for n, branch in branches.items())

    # the server itself; its operator stops the run in a round that a site has paid for already
    head.begin("trust", 2, **{
        "federation.round_timeout": 180, "training.local_steps": 12, "privacy.noise_multiplier": 4.0,
    })  # fmt: skip
    run = head.plan("trust").run
    begun(head, "trust", 1)
    mapo.caught(run, 1)
    with mapo.program.held():
        stopped = fedllm("stop", "trust", "--home", str(head.home))
    assert stopped.returncode == 0, stopped.stderr
    assert (head.status("trust").state, head.status("trust").text) == ("stopped", "ended by the operator.")

    # the round is repeated, and in the next one a site is revoked before it has answered
    head.resume("trust")
    begun(head, "trust", 2)
    mapo.caught(run, 2)
    with mapo.program.held():
        revoked = head_folder.revoke(head.home, mapo.name)
    assert head.ended("trust").state == "completed"
    rounds = head.rounds("trust")
    assert rounds[1].answered == sorted(branches)
    assert rounds[2].answered == sorted({*branches} - {mapo.name})
    # its answer came in and was refused, or its stream was ended before it could answer
    assert rounds[2].failed[mapo.name] in ("the site was revoked", "no answer in time")
    assert set(rounds[2].failed) == {mapo.name}
    assert all(sorted(branch.ledger(run)) == [1, 2] for branch in branches.values())
    assert head.sites("trust")[mapo.name].charged == 2, "it may have paid, so it counts"

    # it cannot come back
    until(lambda: head.connected() == {*branches} - {mapo.name}, what="the end of its stream")
    until(lambda: "was revoked on" in mapo.log, what="the reason at the site")
    office = site_folder.Office.open(mapo.home)
    with pytest.raises(FederationError, match="were revoked"):
        head_folder.admit(head.home, office.join_file.read_bytes(), office.identity.public.fingerprint)
    assert revoked.revoked_at is not None


@pytest.mark.soak
def test_with_too_few_offices_a_run_waits_and_then_stops_with_the_reason(federation: Federation) -> None:
    head = federation.head
    stop_all([program for branch in federation.branches.values() for program in branch.programs])
    head.begin("few", 1, **{"federation.round_timeout": 3})
    ended = head.ended("few")
    assert ended.state == "stopped"
    assert "round 1: 0 sites, federation.quorum=2. no site answered." in ended.text
    record = head.rounds("few")
    assert [r.round for r in record] == [0]
    summary = (head.run("few") / "summary.md").read_text("utf-8")
    assert "federation.quorum=2" in summary
    assert (head.run("few") / "adapter" / "adapter_model.safetensors").exists()
