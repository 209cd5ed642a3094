"""The doctor at a site: every fault that is planted is named, with its remedy, and order is not."""

import grp
import json
import os
import shutil
import socket
import ssl
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from client import doctor
from client.doctor import examine, examine_relay
from client.office import Office, init_office, install, rotate
from client.relay import export_relay_folder
from fedllm.cli.main import app
from fedllm.crypto import certificates
from fedllm.crypto.certificates import Certificate
from fedllm.files import write_secret
from fedllm.ops import health_checks
from fedllm.privacy.accounting import AccountingEvent
from fedllm.privacy.ledger import PrivacyLedger
from fedllm.protocol.enrolment import now
from server import federation


@pytest.fixture(autouse=True)
def synchronised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_checks, "_synchronised", lambda: True)
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


class HeadOffice:
    """The server's folder, and something that answers on its port."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = int(found.getsockname()[1])
        settings = folder / "federation.yaml"
        settings.write_text(f"name: x\nhost: 127.0.0.1\nlisten: 127.0.0.1\nport: {self.port}\n")
        self.folder = federation.init_federation(settings, folder / "head-office").folder
        self._listener: socket.socket | None = None

    @property
    def office(self) -> federation.HeadOffice:
        return federation.HeadOffice.open(self.folder)

    def authority(self) -> Certificate:
        return self.office.authorities[0]

    def serve(self, certificate: Certificate | None = None, alpn: str = "h2", newest: int = 0) -> None:
        """Shake hands with whoever comes; without TLS where there is no `alpn`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        pair = certificate or self.office.server
        write_secret(self.folder.parent / "served.pem", pair.certificate + pair.key)
        context.load_cert_chain(self.folder.parent / "served.pem")
        if alpn:
            context.set_alpn_protocols([alpn])
        if newest:
            context.maximum_version = ssl.TLSVersion(newest)
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._answer, args=(self._listener, context, alpn), daemon=True).start()

    @staticmethod
    def _answer(listener: socket.socket, context: ssl.SSLContext, alpn: str) -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                if alpn:
                    with context.wrap_socket(plain, server_side=True) as secured:
                        secured.sendall(b"x")  # whatever it was shown, it goes on
                        secured.recv(1)
                else:
                    plain.sendall(b"220 mail.example.com\r\n")
                    plain.close()
            except OSError:
                plain.close()

    def close(self) -> None:
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()


@pytest.fixture
def head(tmp_path: Path) -> Iterator[HeadOffice]:
    made = HeadOffice(tmp_path)
    yield made
    made.close()


@pytest.fixture
def folder(head: HeadOffice) -> Iterator[Path]:
    """A site that was admitted; the server answers unless a test says otherwise. Its path is short: a socket."""
    place = Path(tempfile.mkdtemp(prefix="fd"))
    made = init_office(place / "site", "a").folder
    site = Office.open(made)
    grant = federation.admit(head.folder, site.join_file.read_bytes(), site.identity.public.fingerprint)
    install(made, grant.read_bytes(), head.office.identity.public.fingerprint)
    write_secret(made / "records.jsonl", b'{"question": "q", "answer": "SECRET"}\n')
    (made / "model").mkdir(mode=0o700)
    edit(made, models={"m": "model"})
    Office.open(made).declare({"m": "of its tokenizer"}, {"m": "of its files"})
    yield made
    shutil.rmtree(place)


def edit(folder: Path, **changes: Any) -> None:
    values = {
        "name": "a", "data": {"train": "records.jsonl", "prompt": "{question}", "text": "{answer}", "size": 1},
        "policy": {"epsilon": 8.0}, "models": {"m": "model"}, **changes,
    }  # fmt: skip
    write_secret(folder / "site.yaml", json.dumps(values).encode())


def said(folder: Path, level: str) -> list[str]:
    found = examine(folder)
    assert not any("SECRET" in finding.text for finding in found)
    return [finding.text for finding in found if finding.level == level]


def test_an_office_in_order_has_nothing_wrong_and_spends_nothing(head: HeadOffice, folder: Path) -> None:
    head.serve()
    assert said(folder, "ERROR") == []
    assert [text.partition(":")[0] for text in said(folder, "warning")] == ["site"]
    fine = said(folder, "ok")
    for word in (
        "access: ",
        "nothing spent yet",
        "speaks TLS 1.3",
        "certificate authority ends",
        "GiB free",
        "flwr 1.42",
    ):
        assert any(word in text for text in fine), word
    assert not Office.open(folder).ledger_file.exists()


# ---- the way to the server ------------------------------------------------------------------------------------------


def test_a_head_office_that_does_not_run_is_wrong(folder: Path) -> None:
    [text] = said(folder, "ERROR")
    assert "connection refused" in text
    assert "fedllm server start" in text


@pytest.mark.parametrize(("alpn", "said_"), [("", "does not speak TLS 1.3"), ("http/1.1", "gRPC")])
def test_another_program_in_head_offices_place_is_wrong(head: HeadOffice, folder: Path, alpn: str, said_: str) -> None:
    head.serve(alpn=alpn)
    assert any(said_ in text for text in said(folder, "ERROR"))


def test_older_tls_is_wrong(head: HeadOffice, folder: Path) -> None:
    head.serve(newest=ssl.TLSVersion.TLSv1_2)
    assert any("does not speak TLS 1.3" in text for text in said(folder, "ERROR"))


def test_another_authority_is_wrong(head: HeadOffice, folder: Path) -> None:
    head.serve(certificates.make_server_certificate(certificates.make_ca("x", 365), ["127.0.0.1"], 90))
    assert any("ask for a new grant" in text for text in said(folder, "ERROR"))


def test_a_certificate_for_another_host_is_wrong(head: HeadOffice, folder: Path) -> None:
    head.serve(certificates.make_server_certificate(head.authority(), ["other.example.com"], 90))
    assert any("not good for 127.0.0.1" in text and "rotate certificate" in text for text in said(folder, "ERROR"))


@pytest.mark.parametrize(("begins", "said_"), [(1, "the clock here is behind"), (-100, "has ended, or the clock")])
def test_a_certificate_out_of_its_time_is_wrong(
    head: HeadOffice, folder: Path, monkeypatch: pytest.MonkeyPatch, begins: int, said_: str
) -> None:
    monkeypatch.setattr(certificates, "_BACKDATE", timedelta(days=-begins))
    made = certificates.make_server_certificate(head.authority(), ["127.0.0.1"], 90 if begins > 0 else -1)
    head.serve(made)
    assert any(said_ in text for text in said(folder, "ERROR"))


def test_a_certificate_that_soon_ends_is_seen_from_here(head: HeadOffice, folder: Path) -> None:
    head.serve(certificates.make_server_certificate(head.authority(), ["127.0.0.1"], 90))
    assert any(text.startswith("the server certificate ends") for text in said(folder, "ok"))


@pytest.mark.parametrize(
    ("error", "said_"),
    [(socket.gaierror(-2, "x"), "getent hosts"), (TimeoutError(), "firewall"), (ConnectionResetError(), "breaks off"),
     (OSError(113, "No route"), "ip route get"), (OSError("odd"), "odd")],
)  # fmt: skip
def test_what_the_network_says_is_explained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, said_: str
) -> None:
    def fail(*_: object, **__: object) -> bytes:
        raise error

    monkeypatch.setattr(doctor, "probe_tls", fail)
    assert any(said_ in text for text in said(folder, "ERROR"))


def test_a_proxy_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert any("no_proxy=127.0.0.1" in text for text in said(folder, "warning"))


# ---- keys, grant, permissions ----------------------------------------------------------------------------------------


def test_an_office_without_a_grant_is_told_what_comes_next(tmp_path: Path) -> None:
    made = init_office(tmp_path / "site", "a").folder
    assert any("fedllm site install" in text for text in said(made, "ERROR"))


def test_keys_between_two_grants_are_a_warning_with_the_next_step(head: HeadOffice, folder: Path) -> None:
    head.serve()
    rotate(folder)
    assert any("fedllm site install FILE.grant" in text for text in said(folder, "warning"))
    site = Office.open(folder)
    grant = federation.admit(head.folder, site.join_file.read_bytes(), site.keys[-1].identity.public.fingerprint)
    install(folder, grant.read_bytes())
    assert any("fedllm site retire" in text for text in said(folder, "warning"))


def test_authorities_other_than_the_grants_are_wrong(head: HeadOffice, folder: Path) -> None:
    head.serve()
    write_secret(folder / "keys" / "ca.pem", certificates.make_ca("x", 365).certificate)
    assert any("not what the grant says" in text and "site install" in text for text in said(folder, "ERROR"))


def test_an_authority_that_ends_is_announced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    then = now() + timedelta(days=3640)
    monkeypatch.setattr(health_checks, "now", lambda: then)
    assert any("authority" in text and "ask the server for a new grant" in text for text in said(folder, "ERROR"))


@pytest.mark.parametrize(
    "name", ["", "keys", "keys/1/identity", "keys/1/link", "keys/1/serving", "site.yaml", "grant.json", "data"]
)
def test_what_others_may_use_is_wrong(head: HeadOffice, folder: Path, name: str) -> None:
    head.serve()
    path = folder / name
    path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o040)
    found = said(folder, "ERROR")
    assert any(f"chmod {'700' if path.is_dir() else '600'} '{path}'" in text for text in found)


def test_records_that_others_can_read_are_wrong(head: HeadOffice, folder: Path) -> None:
    head.serve()
    place = Path(tempfile.mkdtemp(prefix="records"))
    place.chmod(0o755)
    (place / "r.jsonl").write_text("{}")
    (place / "r.jsonl").chmod(0o644)
    edit(folder, data={"train": str(place / "r.jsonl"), "text": "{answer}"})
    assert any("others on this machine can read" in text and "chmod" in text for text in said(folder, "ERROR"))
    shutil.rmtree(place)


@pytest.mark.parametrize(
    ("changes", "said_"),
    [({"models": {}}, "none permitted"), ({"models": {"m": "gone"}}, "no folder here"),
     ({"data": {"train": "gone.jsonl", "text": "{answer}"}}, "no such file"), ({"nome": 1}, "did you mean name"),
     ({"socket": "/tmp/x.sock", "socket_group": "no-such-group"}, "groupadd")],
)  # fmt: skip
def test_a_mistake_in_the_settings_is_named(
    head: HeadOffice, folder: Path, changes: dict[str, Any], said_: str
) -> None:
    head.serve()
    edit(folder, **changes)
    assert any(said_ in text for text in said(folder, "ERROR"))


def test_a_folder_is_for_its_owner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_checks.os, "geteuid", lambda: 4242)
    assert any("Run the command as that user: sudo -u" in text for text in said(folder, "ERROR"))


def test_a_clock_behind_the_grant_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    then = now() - timedelta(hours=1)
    monkeypatch.setattr(health_checks, "now", lambda: then)
    assert any("the grant at the server was made" in text for text in said(folder, "ERROR"))


# ---- the ledger ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "level", "said_"),
    [(1, "ok", "of 8 spent"), (9, "warning", "Little is left"), (12, "warning", "declined")],
)
def test_what_was_spent_is_told(folder: Path, rounds: int, level: str, said_: str) -> None:
    office = Office.open(folder)
    ledger = PrivacyLedger(office.ledger, 1e9, 1e-5, office.identity)
    for round_ in range(rounds):
        ledger.release(ledger.reserve("run", round_, "r", AccountingEvent(1.0, 2.0, 1)), b"")
    assert any(text.startswith("ledger") and said_ in text for text in said(folder, level))


def test_a_damaged_ledger_is_wrong_and_a_backup_is_warned_of(folder: Path) -> None:
    office = Office.open(folder)
    PrivacyLedger(office.ledger, 8.0, 1e-5, office.identity)
    write_secret(office.ledger.file, b"x" * 4096)
    assert any("a backup may lack the latest charges" in text for text in said(folder, "ERROR"))


def test_a_full_disk_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1 << 20

    monkeypatch.setattr(health_checks.shutil, "disk_usage", lambda place: Usage)
    assert any("Free some space" in text for text in said(folder, "ERROR"))


# ---- the relay -------------------------------------------------------------------------------------------------------


@pytest.fixture
def relayed(folder: Path) -> Path:
    """The same site behind a relay, of a group that this user is in."""
    group = grp.getgrgid(os.getegid()).gr_name
    edit(folder, socket=str(folder.parent / "run" / "link.sock"), socket_group=group)
    return folder


@pytest.fixture
def listening(folder: Path) -> Iterator[Callable[[], Path]]:
    """Something that answers where the relay does, once called."""
    server = grpc.server(ThreadPoolExecutor(1))
    path = folder.parent / "run" / "link.sock"

    def start() -> Path:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        server.add_insecure_port(f"unix:{path}")
        server.start()
        path.chmod(0o660)
        return path

    yield start
    server.stop(None).wait()


def test_a_site_behind_a_relay_tries_no_way_of_its_own(relayed: Path, listening: Callable[[], Path]) -> None:
    path = listening()
    assert said(relayed, "ERROR") == []
    assert f"relay: listens on {path}" in said(relayed, "ok")


def test_a_relay_that_is_not_there_or_does_not_answer_is_wrong(relayed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PATIENCE", 0.5)
    path = relayed.parent / "run" / "link.sock"
    [text] = said(relayed, "ERROR")
    assert f"{path} is not there" in text
    assert "fedllm site relay" in text
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    [text] = said(relayed, "ERROR")
    assert f"nothing answers on {path}" in text


def test_a_socket_that_is_not_the_groups_alone_is_wrong(relayed: Path, listening: Callable[[], Path]) -> None:
    listening().chmod(0o666)
    [text] = said(relayed, "ERROR")
    assert "not open to the group" in text
    assert "Start the relay anew" in text


def test_a_socket_in_a_folder_that_is_closed_to_this_user_is_no_fault_of_the_doctor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def closed(self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.Path, "exists", closed)
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: False)
    assert "is not open to" in doctor._silent(Path("/run/fedllm/link.sock"))


# ---- the relay's folder ----------------------------------------------------------------------------------------------


@pytest.fixture
def relay(relayed: Path) -> Path:
    place = relayed.parent / "relay"
    export_relay_folder(Office.open(relayed), place)
    return place


def relay_said(folder: Path, level: str) -> list[str]:
    return [finding.text for finding in examine_relay(folder) if finding.level == level]


def test_a_relays_folder_in_order_has_nothing_wrong_and_opens_no_message(head: HeadOffice, relay: Path) -> None:
    head.serve()
    assert relay_said(relay, "ERROR") == []
    assert any("fedllm site relay" in text for text in relay_said(relay, "warning"))
    fine = relay_said(relay, "ok")
    for word in ("settings, key and certificate", "this site's certificate ends", "speaks TLS 1.3", "GiB free"):
        assert any(word in text for text in fine), word
    assert sorted(path.name for path in relay.iterdir()) == ["ca.pem", "link", "link.pem", "relay.json"]


def test_a_relay_that_runs_is_seen(relay: Path, listening: Callable[[], Path]) -> None:
    path = listening()
    assert f"relay: listens on {path}" in relay_said(relay, "ok")


def test_a_relays_certificate_for_another_key_is_wrong(head: HeadOffice, relay: Path) -> None:
    head.serve()
    write_secret(relay / "link", certificates.make_key())
    found = relay_said(relay, "ERROR")
    assert any("certificate is for another key" in text for text in found)


def test_a_relays_certificate_that_has_ended_is_wrong(
    head: HeadOffice, relay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site has installed a new grant, and its relay's folder was not made again."""
    head.serve()
    then = now() + timedelta(days=400)
    monkeypatch.setattr(health_checks, "now", lambda: then)
    assert any("this site's certificate has ended" in text for text in relay_said(relay, "ERROR"))


@pytest.mark.parametrize("name", ["relay.json", "link", "link.pem", "ca.pem"])
@pytest.mark.parametrize("damage", [b"{}", None])
def test_a_relays_damaged_or_missing_file_is_wrong(
    head: HeadOffice, relay: Path, name: str, damage: bytes | None
) -> None:
    head.serve()
    if damage is None:
        (relay / name).unlink()
    else:
        write_secret(relay / name, damage)
    assert any(name in text or "PEM" in text for text in relay_said(relay, "ERROR"))


def test_the_command_knows_every_kind_of_folder(head: HeadOffice, folder: Path, relay: Path) -> None:
    head.serve()
    for place, word in ((folder, "ledger"), (relay, "relay's folder"), (head.folder, "roster")):
        done = CliRunner().invoke(app, ["doctor", "--home", str(place)])
        assert word in done.output, done.output
