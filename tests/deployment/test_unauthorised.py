"""Who may not take part is refused by the running processes, and nothing is charged for it.

The last tests of the soak revoke an office of the session's federation and take the others off the network, so they
come last.
"""

import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest

from client import office as site_folder
from client.wire import ask
from fedllm import crypto, envelope
from fedllm.crypto import Identity, PublicIdentity
from fedllm.envelope import Binding
from fedllm.errors import FederationError
from fedllm.files import write_secret
from fedllm.messages import Declined, Message, Prepare, Ready, RoundBegun, TrainRequest, from_bytes
from fedllm.reach import reach
from server import federation as head_folder
from server import superlink
from server.run import make_plan
from server.superlink import Control
from tests.deployment.conftest import Federation
from tests.deployment.harness import ALONE, HeadOffice, config_of, fedllm, free_port, stop_all, until
from tests.deployment.test_survival import SERVICE, SUPERNODE, begun

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(1800)]

BIN = Path(sys.executable).parent


# ---- at the SuperLink's door -----------------------------------------------------------------------------------------


class Intruder:
    """A SuperNode of Flower's own, with keys that it should not have, or none."""

    def __init__(self, head: HeadOffice, folder: Path, ca: Path, key: bytes | None) -> None:
        folder.mkdir()
        arguments = ["--superlink", f"127.0.0.1:{head.port}", "--root-certificates", str(ca)]
        if key is not None:
            (folder / "node").write_bytes(key)
            arguments += ["--auth-supernode-private-key", str(folder / "node")]
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [BIN / "flower-supernode", *arguments, "--port", str(free_port()), "--isolation", "subprocess"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, **superlink.environment(head.home), "FLWR_HOME": str(folder)},
            )  # fmt: skip

    def ended(self) -> tuple[int, str]:
        """Wait until it has ended or was let in, and return its exit code, 0 if it runs, and what it said."""
        try:
            until(lambda: self._process.poll() is not None or "SuperNode ID" in self._log.read_text("utf-8"), what="it")
            code = self._process.poll() or 0
        finally:
            self._process.kill()
            self._process.wait(120)
        return code, self._log.read_text("utf-8")


def _refused(federation: Federation, intruders: Mapping[str, Intruder]) -> None:
    for who, intruder in intruders.items():
        code, said = intruder.ended()
        assert code != 0, who
        assert "Exit Code: 305" in said, who
        assert "SuperNode ID" not in said, who
    assert Control(federation.head.office).connected() == dict.fromkeys(federation.admitted, True)


def test_a_node_without_a_registered_key_is_refused(federation: Federation, tmp_path: Path) -> None:
    federation.ready()
    head = federation.head
    keys = {"a key that is not registered": crypto.make_node_key().key, "TLS, but no key": None}
    ca = head.office.ca_file
    _refused(federation, {who: Intruder(head, tmp_path / who, ca, key) for who, key in keys.items()})


@pytest.mark.soak
def test_a_node_with_another_authority_or_with_the_key_of_one_online_is_refused(
    federation: Federation, tmp_path: Path
) -> None:
    head = federation.head
    federation.ready()
    other_ca = tmp_path / "other-ca.pem"
    other_ca.write_bytes(crypto.make_ca("한빛은행", 10).certificate)
    registered = federation.branches[ALONE].office.node_key_file.read_bytes()
    ca = head.office.ca_file
    intruders = {
        "an office that believes another authority": Intruder(head, tmp_path / "3", other_ca, registered),
        "an office's key while it is online": Intruder(head, tmp_path / "4", ca, registered),
    }
    _refused(federation, intruders)


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


def _handshake(port: int, ca: Path, least: ssl.TLSVersion, most: ssl.TLSVersion, ciphers: str) -> tuple[str, str]:
    context = ssl.create_default_context(cafile=str(ca))
    context.set_ciphers(ciphers)
    context.minimum_version, context.maximum_version = least, most
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=120) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        return secured.version() or "", (secured.cipher() or ("", "", 0))[0]


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
def test_an_older_version_than_tls_1_3_is_refused(federation: Federation) -> None:
    port, ca = federation.head.port, federation.head.office.ca_file
    old, last, new = ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
    everything = "ALL:@SECLEVEL=0"
    assert _handshake(port, ca, last, new, everything)[0] == "TLSv1.3"
    for version in (old, last):
        with pytest.raises(OSError, match=r"(?i)ssl|reset"):
            _handshake(port, ca, version, version, everything)


def test_an_office_does_not_connect_to_another_server(federation: Federation, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(crypto.make_ca("한빛은행", 10).certificate)
    with pytest.raises(ssl.SSLCertVerificationError):
        reach("127.0.0.1", federation.head.port, tmp_path / "ca.pem")
    assert reach("127.0.0.1", federation.head.port, federation.head.office.ca_file)


def test_the_control_api_listens_on_loopback_alone(federation: Federation) -> None:
    node = federation.head.program.processes("bin/flower-superlink")[0]
    listening = [c.laddr for c in node.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert federation.head.office.config.control_port in {address.port for address in listening}
    ips = {address.ip.removeprefix("::ffff:") for address in listening}  # IPv4 as gRPC writes it
    assert ips == {"127.0.0.1"}, "in the tests the Fleet API, too"


# ---- at the socket of the site service -------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_another_system_user_cannot_open_the_socket_of_the_site_service(federation: Federation) -> None:
    branch = federation.branches[ALONE]
    until(branch.office.socket.exists, what="the site service")
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print('connected')"
    with tempfile.TemporaryDirectory(dir=branch.home.parents[3], prefix="public") as public:
        os.chmod(public, 0o755)
        door = Path(public) / "s"
        os.link(branch.office.socket, door)  # the same socket, where the folders above keep nobody out
        for user, opens in ((0, True), (65534, False)):
            done = subprocess.run(
                ["/usr/bin/env", "python3", "-I", "-c", code, str(door)], user=user, group=user, extra_groups=[],
                capture_output=True, text=True, timeout=60, check=False, cwd="/",
            )  # fmt: skip
            assert ("connected" in done.stdout) is opens, done.stderr
            assert opens or "PermissionError" in done.stderr


def _sealed(
    message: Message, site: PublicIdentity, sender: Identity, run: str, plan: str, round_: int = 0, number: int = 0
) -> bytes:
    binding = Binding(direction="to-site", run=run, plan=plan, round=round_, number=number or time.time_ns())
    return envelope.seal(message.to_bytes(), binding, sender, site)


def test_what_the_pinned_head_office_did_not_ask_is_refused_at_the_socket(federation: Federation) -> None:
    branch, head = federation.branches[ALONE], federation.head
    until(lambda: "answers on" in branch.service_log, what="the site service")
    before = len(branch.charged())
    me, site = head.office.identity, branch.office.identity.public
    plan = make_plan(config_of("at-the-socket", 1), ["a", "b", "c"])
    known = {"run": plan.run, "plan": plan.digest}
    genuine = _sealed(Prepare(plan=plan), site, me, **known)
    begun = RoundBegun(roster="0" * 64, number=1, digest="0" * 64)
    train = TrainRequest(plan=plan, round=1, spec_digest="0" * 64, head=None, begun=begun, payload=b"")
    altered = bytearray(_sealed(Prepare(plan=plan), site, me, **known))
    altered[-1] ^= 1
    others = {
        "not signed": Prepare(plan=plan).to_bytes(),
        "signed by a stranger": _sealed(train, site, Identity.generate(), **known, round_=1),
        "sealed to another office": _sealed(train, federation.branches["seoul-gangnam"].office.identity.public, me,
                                            **known, round_=1),
        "altered": bytes(altered),
        "bound to another run": _sealed(train, site, me, run="other", plan=plan.digest, round_=1),
        "bound to another plan": _sealed(train, site, me, run=plan.run, plan="0" * 64, round_=1),
        "bound to another round": _sealed(train, site, me, **known, round_=2),
    }  # fmt: skip
    answer = ask(str(branch.office.socket), genuine, 600)
    binding, payload, _ = envelope.open_sealed(answer, me, [site])
    assert binding.request == envelope.digest(genuine)
    assert isinstance(from_bytes(payload, Ready, Declined), Ready)
    others["a replay"] = genuine
    others["older than the last"] = _sealed(train, site, me, **known, round_=1, number=1)
    for what, request in others.items():
        with pytest.raises(grpc.RpcError) as error:
            ask(str(branch.office.socket), request, 600)
        assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED, what
    assert len(branch.charged()) == before
    refusals = [line for line in branch.service_log.splitlines() if "refused" in line]
    assert len(refusals) >= len(others)


# ---- runs ------------------------------------------------------------------------------------------------------------


@contextmanager
def _identity(head: HeadOffice, identity: Identity) -> Iterator[None]:
    """Head office with another identity, as of somebody who took over its machine's place."""
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
    planted = head.home / "flower" / "bundle" / "records.jsonl"
    write_secret(planted, b'{"question": "CANARY"}\n')

    # somebody who has SuperLink, certificates and all, but not the identity that the offices have pinned
    refusals = {name: branch.service_log.count("not signed by anyone") for name, branch in branches.items()}
    with _identity(head, Identity.generate()):
        head.begin("stranger", 1, **{"federation.round_timeout": 15})
        ended = head.ended("stranger")
    assert ended.state == "stopped"
    assert "round 1: 0 sites, federation.quorum=2" in ended.text
    assert (head.run("stranger") / "summary.md").exists()
    assert all(branch.ledger(head.plan("stranger").run) == {} for branch in branches.values())
    assert any(branch.service_log.count("not signed by anyone") > refusals[n] for n, branch in branches.items())

    # head office itself; its operator stops the run in a round that an office has paid for already
    head.begin("trust", 2, **{
        "federation.round_timeout": 180, "training.local_steps": 12, "privacy.noise_multiplier": 4.0,
    })  # fmt: skip
    run = head.plan("trust").run
    begun(head, "trust", 1)
    mapo.caught(run, 1)
    with mapo.program.held(SERVICE):
        stopped = fedllm("stop", "trust", "--home", str(head.home))
    assert stopped.returncode == 0, stopped.stderr
    assert (head.status("trust").state, head.status("trust").text) == ("stopped", "ended by the operator.")

    # the round is repeated, and in the next one an office is revoked before it has answered
    head.resume("trust")
    begun(head, "trust", 2)
    mapo.caught(run, 2)
    with mapo.program.held(SERVICE):
        ends = mapo.program.text().count("SuperNode ended")
        revoked = head_folder.revoke(head.home, mapo.name)
    assert head.ended("trust").state == "completed"
    rounds = head.rounds("trust")
    assert rounds[1].answered == sorted(branches)
    assert rounds[2].answered == sorted({*branches} - {mapo.name})
    # its answer came in and was refused, or its node was gone before it could answer
    assert rounds[2].failed[mapo.name] in ("the site was revoked", "a fault at the site")
    assert set(rounds[2].failed) == {mapo.name}
    assert all(sorted(branch.ledger(run)) == [1, 2] for branch in branches.values())
    assert head.sites("trust")[mapo.name].charged == 2, "it may have paid, so it counts"

    # it cannot come back
    control = Control(head_folder.HeadOffice.open(head.home))
    others = {*branches} - {mapo.name}
    until(lambda: set(control.connected()) == others, what="the end of its registration")
    until(lambda: mapo.program.text().count("SuperNode ended") > ends, 180, "the end of its SuperNode")
    assert set(control.connected()) == others
    office = site_folder.Office.open(mapo.home)
    with pytest.raises(FederationError, match="were revoked"):
        head_folder.admit(head.home, office.join_file.read_bytes(), office.identity.public.fingerprint)
    assert revoked.revoked_at is not None

    # what travelled to the offices with the runs
    for branch in (branches["seoul-gangnam"], branches["busan-haeundae"]):
        apps = branch.home / "courier" / "flower" / "apps"
        assert {path.name for path in apps.rglob("*") if path.is_file()} == {"pyproject.toml"}
        text = "".join(path.read_text("utf-8") for path in apps.rglob("*.toml"))
        command = " ".join(branch.program.processes(SUPERNODE)[0].cmdline())
        for place in (head.home, head.home.parent / "head-office"):
            assert str(place) not in text + command


def test_a_file_in_the_bundles_folder_is_not_bundled(federation: Federation, tmp_path: Path) -> None:
    bundle = federation.head.home / "flower" / "bundle"
    write_secret(bundle / "records.jsonl", b'{"question": "CANARY"}\n')
    built = tmp_path / "app"
    shutil.copytree(bundle, built)
    done = subprocess.run(
        [BIN / "flwr", "build", "--app", str(built)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        check=False, env={**os.environ, **superlink.environment(federation.head.home)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.fab"))) as fab:
        assert set(fab.namelist()) - {".info/CONTENT"} == {"pyproject.toml"}
        everything = b"".join(fab.read(name) for name in fab.namelist())
    assert b"CANARY" not in everything
    assert str(federation.head.home).encode() not in everything
    run_config = (federation.head.home / "flower" / "run.toml").read_text("utf-8")
    assert str(federation.head.home) not in run_config
    assert len(run_config.splitlines()) == 1


@pytest.mark.soak
def test_with_too_few_offices_a_run_waits_and_then_stops_with_the_reason(federation: Federation) -> None:
    head = federation.head
    stop_all([branch.program for branch in federation.branches.values()])
    head.begin("few", 1, **{"federation.round_timeout": 3})
    ended = head.ended("few")
    assert ended.state == "stopped"
    assert "round 1: 0 sites, federation.quorum=2. no site answered." in ended.text
    record = head.rounds("few")
    assert [r.round for r in record] == [0]
    summary = (head.run("few") / "summary.md").read_text("utf-8")
    assert "federation.quorum=2" in summary
    assert (head.run("few") / "adapter" / "adapter_model.safetensors").exists()
