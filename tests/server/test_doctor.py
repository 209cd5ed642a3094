"""The doctor at the server: every fault that is planted is named, with its remedy, and order is not."""

import os
import socket
import stat
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedllm.cli.main import app
from fedllm.crypto import certificates
from fedllm.crypto.certificates import Certificate
from fedllm.files import write_secret
from fedllm.ops import health_checks
from fedllm.ops.health_checks import CheckResult
from fedllm.protocol.enrolment import Grant, now
from fedllm.protocol.link_pb2 import Connected, Refused, Sites
from server import doctor, federation, grpc_grid
from server.doctor import examine
from tests.link.ends import daemon_of, free_port
from tests.server.test_federation import Site


@pytest.fixture(autouse=True)
def synchronised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_checks, "_synchronised", lambda: True)
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    text = f"name: x\nhost: 127.0.0.1\nlisten: 127.0.0.1\nport: {free_port()}\n"
    (tmp_path / "federation.yaml").write_text(text)
    made = federation.init_federation(tmp_path / "federation.yaml", tmp_path / "head-office").folder
    site = Site()
    federation.admit(made, site.join(), site.fingerprint)
    return made


def said(folder: Path, level: str) -> list[str]:
    return [finding.text for finding in examine(folder) if finding.level == level]


def edit(folder: Path, **values: object) -> None:
    path = folder / "federation.yaml"
    lines = [line for line in path.read_text().splitlines() if line.partition(":")[0] not in values]
    write_secret(path, "\n".join([*lines, *(f"{key}: {value}" for key, value in values.items())]).encode())


def test_a_folder_in_order_has_nothing_wrong_and_is_left_as_it_was(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = examine(folder)
    assert [finding for finding in found if finding.level == "ERROR"] == []
    assert [finding.text for finding in found if finding.level == "warning"] == [
        "daemon: it does not run. Start it: fedllm server start"
    ]
    for word in (
        "certificate authority ends",
        "good for 127.0.0.1",
        "서울-강남",
        "GiB free",
        "flwr 1.42",
        "access: ",
    ):
        assert any(word in finding.text for finding in found)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# ---- certificates and keys -------------------------------------------------------------------------------------------


def authority(folder: Path) -> Certificate:
    keys = folder / "keys"
    return certificates.read_pairs((keys / "ca.pem").read_bytes(), (keys / "ca.key").read_bytes())[0]


def serve_with(folder: Path, certificate: Certificate) -> None:
    write_secret(folder / "keys" / "server.pem", certificate.certificate + certificate.key)


HOSTS = ("127.0.0.1", "localhost")


@pytest.mark.parametrize(
    ("days_later", "level", "text"),
    [(0, "ok", "ends on"), (55, "ok", "ends on"), (61, "warning", "days. Remedy"), (77, "ERROR", "days. Remedy"),
     (91, "ERROR", "has ended"), (-1, "ERROR", "Set the clock")],
)  # fmt: skip
def test_a_certificate_that_ends_is_announced_30_days_before_and_wrong_14_days_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch, days_later: int, level: str, text: str
) -> None:
    then = now() + timedelta(days=days_later)
    monkeypatch.setattr(health_checks, "now", lambda: then)
    [line] = [finding for finding in examine(folder) if finding.text.startswith(("the server certificate ends",
              "the server certificate has", "the server certificate is valid"))]  # fmt: skip
    assert line.level == level
    assert text in line.text
    assert level == "ok" or "fedllm server rotate certificate" in line.text


def test_an_authority_is_replaced_before_it_is_too_short_for_what_it_issues(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    then = now() + timedelta(days=3650 - 110)
    monkeypatch.setattr(health_checks, "now", lambda: then)
    monkeypatch.setattr(doctor, "now", lambda: then)
    assert any("authority" in text and "fedllm server rotate ca" in text for text in said(folder, "warning"))


def test_a_server_certificate_of_another_authority_is_wrong(folder: Path) -> None:
    serve_with(folder, certificates.make_server_certificate(certificates.make_ca("other", 365), HOSTS, 90))
    assert any("not issued by this federation's authority" in text for text in said(folder, "ERROR"))


def test_a_server_certificate_without_its_own_key_is_wrong(folder: Path) -> None:
    made = certificates.make_server_certificate(authority(folder), HOSTS, 90)
    other = certificates.make_server_certificate(authority(folder), HOSTS, 90)
    serve_with(folder, Certificate(made.certificate, other.key))
    assert any("no private key beside it. Restore" in text for text in said(folder, "ERROR"))


def test_a_host_that_the_certificate_does_not_cover_is_wrong(folder: Path) -> None:
    edit(folder, host="head.example.com", listen="0.0.0.0")
    [text] = said(folder, "ERROR")
    assert "not good for head.example.com" in text
    assert "fedllm server rotate certificate" in text
    federation.rotate_server_certificate(folder)
    assert said(folder, "ERROR") == []
    edit(folder, names="[10.1.2.3]")
    assert any("not good for 10.1.2.3" in text for text in said(folder, "warning"))


def test_a_port_that_offices_cannot_reach_by_design_is_wrong(folder: Path) -> None:
    edit(folder, host="head.example.com")
    assert any("listen: 0.0.0.0" in text for text in said(folder, "ERROR"))


@pytest.mark.parametrize("name", ["keys/identity", "keys/ca.key", "keys/ca.pem", "keys/server.pem", "roster.json"])
def test_a_file_that_is_lost_or_damaged_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    assert said(folder, "ERROR")
    (folder / name).unlink()
    assert any(name in text and "backup" in text for text in said(folder, "ERROR"))


def test_a_mistake_in_the_settings_is_named(folder: Path) -> None:
    edit(folder, prt=1)
    assert any("did you mean port" in text for text in said(folder, "ERROR"))


@pytest.mark.parametrize("what", ["ca", "identity"])
def test_a_rotation_that_is_half_done_says_its_next_step(folder: Path, what: str) -> None:
    rotate = federation.rotate_ca if what == "ca" else federation.rotate_identity
    rotate(folder, "start")
    assert any(f"fedllm server rotate {what} --finish" in text for text in said(folder, "warning"))
    rotate(folder, "finish")
    assert any(f"fedllm server rotate {what} --retire" in text for text in said(folder, "warning"))
    rotate(folder, "retire")
    assert not any("rotate" in text for text in said(folder, "warning"))


def test_the_roster_is_looked_at(folder: Path) -> None:
    old, new = Site("b"), Site("b")
    federation.admit(folder, old.join(), old.fingerprint)
    federation.admit(folder, new.join(old.identity), new.fingerprint)
    assert any("fedllm server retire b" in text for text in said(folder, "warning"))
    for site in ("b", "서울-강남"):
        federation.revoke(folder, site)
    assert any("no site is admitted" in text for text in said(folder, "warning"))


# ---- permissions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "keys", "keys/identity", "keys/ca.key", "keys/server.pem", "roster.json"])
def test_what_others_may_use_is_wrong(folder: Path, name: str) -> None:
    path = folder / name
    path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o004)
    [text] = said(folder, "ERROR")
    assert f"'{path}'" in text
    assert "chmod" in text


def test_loose_files_inside_a_private_folder_are_a_warning(folder: Path) -> None:
    (folder / "grants" / "서울-강남.grant").chmod(0o644)
    assert any(f"chmod -R go-rwx '{folder}'" in text for text in said(folder, "warning"))


def test_a_folder_that_everybody_may_exchange_is_wrong(folder: Path) -> None:
    folder.parent.chmod(0o777)
    try:
        assert any("another folder in the place" in text and "chmod o-w" in text for text in said(folder, "ERROR"))
    finally:
        folder.parent.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_wrong(folder: Path) -> None:
    os.chown(folder / "roster.json", 65534, -1)
    assert any("chown -R" in text and "roster.json" in text for text in said(folder, "ERROR"))


# ---- the machine -----------------------------------------------------------------------------------------------------


def test_a_clock_that_is_behind_or_free_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_checks, "_synchronised", lambda: False)
    assert any("not synchronised" in text and "set-ntp" in text for text in said(folder, "warning"))
    monkeypatch.setattr(health_checks, "_synchronised", lambda: None)
    assert any("Compare it by hand" in text for text in said(folder, "warning"))
    then = now() - timedelta(hours=1)
    monkeypatch.setattr(health_checks, "now", lambda: then)
    assert any(text.startswith("clock: it says") for text in said(folder, "ERROR"))


def test_the_kernel_is_asked_about_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert health_checks._synchronised() in (True, False, None)


@pytest.mark.parametrize(
    ("gib", "level", "text"), [(0.5, "ERROR", "Free some space"), (3, "warning", "Free"), (9, "ok", "9.0 GiB")]
)
def test_a_disk_that_fills_up_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, gib: float, level: str, text: str
) -> None:
    class Usage:
        free = int(gib * (1 << 30))

    monkeypatch.setattr(health_checks.shutil, "disk_usage", lambda place: Usage)
    assert any("disk" in line and text in line for line in said(folder, level))


def test_a_log_that_has_grown_is_named(folder: Path) -> None:
    (folder / "log").mkdir(0o700)
    path = folder / "log" / "server.log"
    path.touch(0o600)
    os.truncate(path, 2 << 30)
    assert any("2.0 GiB" in text and "What to watch" in text for text in said(folder, "warning"))


def test_a_library_that_is_missing_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise health_checks.PackageNotFoundError(name)

    monkeypatch.setattr(health_checks, "version", version)
    assert any("not installed" in text and "pip install" in text for text in said(folder, "ERROR"))


# ---- ports -----------------------------------------------------------------------------------------------------------


def test_another_program_on_the_port_is_wrong(folder: Path) -> None:
    config = federation.HeadOffice.open(folder).config
    with socket.create_server(("127.0.0.1", config.port)):
        [text] = said(folder, "ERROR")
    assert f"process {os.getpid()}" in text
    assert "choose another port" in text


def test_a_daemon_that_does_not_answer_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_grid, "_TIMEOUT", 1.0)
    (folder / "run").mkdir(0o700)
    with health_checks.locked(folder / "run"):
        assert any("server.log" in text and "start it anew" in text for text in said(folder, "ERROR"))


def test_a_daemon_whose_port_is_not_served_or_shows_another_certificate_is_named(folder: Path) -> None:
    with daemon_of(folder):
        assert said(folder, "ERROR") == []
        federation.rotate_server_certificate(folder)  # this daemon does not look for a new one
        assert any("former certificate" in text for text in said(folder, "warning"))
        edit(folder, port=free_port())
        assert any("the port is not served" in text and "connection refused" in text for text in said(folder, "ERROR"))


def test_offices_that_are_connected_away_or_refused_are_told_apart(folder: Path) -> None:
    office = federation.HeadOffice.open(folder)
    there = Connected(site="서울-강남", address="ipv4:10.0.0.1:5", software="0.1.0")
    refused = Refused(site="서울-강남", text="no hello", times=3)
    for sites, level, text in (
        (Sites(connected=[there]), "ok", "is connected from ipv4:10.0.0.1:5, fedllm 0.1.0"),
        (Sites(connected=[there], refused=[refused]), "ok", "is connected"),
        (Sites(), "warning", "There: fedllm doctor"),
        (Sites(refused=[refused]), "ERROR", "no hello"),
        (Sites(refused=[Refused(site="stranger", text="never")]), "warning", "stranger, which is not in the roster"),
    ):
        found = doctor._offices(office, sites)
        assert any(each.level == level and text in each.text for each in found)


def test_a_certificate_of_an_office_that_another_authority_issued_is_wrong(folder: Path) -> None:
    """As after a rotation whose grant is lost."""
    path = folder / "grants" / "서울-강남.grant"
    office = federation.HeadOffice.open(folder)
    grant = Grant.open(path.read_bytes())[0]
    key = certificates.certified_key(grant.link.encode())
    other = certificates.certify(certificates.make_ca("other", 9), key, grant.site, 9)
    write_secret(path, grant.model_copy(update={"link": other.decode()}).sign(office.identities))
    [text] = said(folder, "ERROR")
    assert "the certificate of 서울-강남 is not of this federation's authority" in text
    assert "fedllm server grant 서울-강남" in text


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_ends_with_1_where_something_is_wrong_and_says_which(folder: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--home", str(folder)])
    assert done.exit_code == 0, done.output
    assert "warning  daemon" in done.output
    (folder / "keys" / "identity").chmod(0o644)
    done = CliRunner().invoke(app, ["doctor", "--home", str(folder)])
    assert done.exit_code == 1
    assert "ERROR    " in done.output
    assert "found an ERROR" in str(done.exception)


def test_the_command_finds_out_what_it_looks_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir(0o700)
    done = CliRunner().invoke(app, ["doctor", "--home", str(tmp_path / "x")])
    assert "neither the server's folder" in str(done.exception)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = CliRunner().invoke(app, ["doctor"])
    assert "init-federation" in str(done.exception)


def test_a_finding_is_said_once() -> None:
    assert health_checks.run_checks(lambda: [CheckResult("ok", "a")], lambda: [CheckResult("ok", "a")]) == [
        CheckResult("ok", "a")
    ]
