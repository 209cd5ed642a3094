"""The server's folder: whom it admits, and that no step or crash leaves it shut, open to others, or contradictory."""

import itertools
import json
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from typer.testing import CliRunner

from fedllm import files
from fedllm.cli.main import app
from fedllm.crypto import certificates
from fedllm.crypto.hash_chain import LedgerHead
from fedllm.crypto.identity import Identity
from fedllm.errors import ConfigError, CryptoError, FederationError, FedllmError, FolderError
from fedllm.protocol.enrolment import Grant, JoinRequest, now
from server import federation
from server.federation import HeadOffice, admit, init_federation, retire, revoke
from server.ledger_heads import HEADS, LedgerHeads
from server.roster import Roster


class Site:
    """A site's keys, as the server meets them."""

    def __init__(self, name: str = "서울-강남") -> None:
        self.name, self.identity = name, Identity.generate()
        self.link_key, self.serving_key = (certificates.key_line(certificates.make_key()) for _ in range(2))
        self.hosts = ("llm.seoul.example.com", "10.9.8.7")

    def join(self, *signers: Identity) -> bytes:
        request = JoinRequest(
            site=self.name, identity=self.identity.public.to_text(), link_key=self.link_key,
            serving_key=self.serving_key, hosts=self.hosts, made_at=now(),
        )  # fmt: skip
        return request.sign(self.identity, *signers)

    @property
    def fingerprint(self) -> str:
        return self.identity.public.fingerprint


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "federation.yaml"
    path.write_text("name: 한국 연합\nhost: head.example.com\nnames: [10.1.2.3]\n", "utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path, settings: Path) -> Path:
    return init_federation(settings, tmp_path / "head-office").folder


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): stat.S_IMODE(p.stat().st_mode) for p in (folder, *folder.rglob("*"))}


# ---- what is seen of ledgers -----------------------------------------------------------------------------------------


def test_head_office_takes_a_new_ledger_of_a_site_by_a_command_of_its_own(folder: Path) -> None:
    heads = LedgerHeads(folder / HEADS)
    heads.note({name: LedgerHead(7, "seven") for name in ("busan", "jeju")})
    assert modes(folder)[HEADS] == 0o600
    done = CliRunner().invoke(app, ["server", "new-ledger", "jeju", "--home", str(folder)])
    assert done.exit_code == 0, done.output
    assert list(heads.read()) == ["busan"]
    again = CliRunner().invoke(app, ["server", "new-ledger", "jeju", "--home", str(folder)])
    assert isinstance(again.exception, FederationError)


# ---- making and opening ----------------------------------------------------------------------------------------------


def test_every_file_of_head_office_is_private_and_every_key_its_own(folder: Path) -> None:
    site = Site()
    admit(folder, site.join(), site.fingerprint)
    for path, mode in modes(folder).items():
        assert mode == (0o700 if (folder / path).is_dir() else 0o600), path
    assert set(modes(folder)) == {
        ".", "federation.yaml", "roster.json", "grants", "grants/서울-강남.grant", "keys", "keys/identity",
        "keys/ca.pem", "keys/ca.key", "keys/server.pem",
    }  # fmt: skip


def test_the_server_certificate_is_good_for_every_name_and_for_loopback(folder: Path) -> None:
    office = HeadOffice.open(folder)
    facts = certificates.read_certificates(office.server_certificate_file.read_bytes())[0]
    assert facts.hosts == ("head.example.com", "10.1.2.3", "127.0.0.1", "localhost")
    assert office.warnings() == []
    assert certificates.read_pairs(
        office.server_certificate_file.read_bytes(), office.server_certificate_file.read_bytes()
    )


def test_nothing_is_ever_overwritten(folder: Path, settings: Path) -> None:
    before = HeadOffice.open(folder).identity.public
    with pytest.raises(FolderError, match="not empty"):
        init_federation(settings, folder)
    assert HeadOffice.open(folder).identity.public == before


@pytest.mark.parametrize(
    ("text", "said"),
    [("name: x\nhst: y", "hst: unknown key; did you mean host"), ("name: x", "host"), ("host: x", "name"),
     ("name: x\nhost: http://y", "host"), ("name: x\nhost: y\nport: 0", "port=0"), ("[]", "list"),
     ("name: x\nhost: y\nnames: [a b]", "names"), ("name: ''\nhost: y", "name"),
     ("name: x\nhost: y\nserver_days: 0", "days"), ("name: x\nhost: y\nsite_days: 0", "site_days"),
     ("name: x\nhost: y\nfleet_port: 9092", "fleet_port: unknown key; known keys: .*port")],
)  # fmt: skip
def test_a_mistake_in_federation_yaml_is_refused_and_nothing_is_made(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        init_federation(tmp_path / "f.yaml", tmp_path / "head")
    assert not (tmp_path / "head").exists()


def test_a_folder_that_is_not_there_says_how_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="init-federation"):
        HeadOffice.open(tmp_path / "gone")


@pytest.mark.parametrize("name", ["keys/identity", "keys/ca.key", "keys/server.pem", "roster.json", "keys", ""])
def test_a_key_that_others_may_read_is_not_used(folder: Path, name: str) -> None:
    path = folder / name
    path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o040)
    with pytest.raises(FolderError, match="chmod"):
        HeadOffice.open(folder)


@pytest.mark.parametrize("damage", [b"", b"\xff\x00", b"signs 00\n", b"{}x", b"-----BEGIN CERTIFICATE-----\nx\n"])
@pytest.mark.parametrize("name", ["keys/identity", "keys/ca.key", "keys/ca.pem", "keys/server.pem", "roster.json"])
def test_a_damaged_file_is_named(folder: Path, name: str, damage: bytes) -> None:
    (folder / name).write_bytes(damage)
    with pytest.raises(FedllmError, match=r"ca\.pem" if name == "keys/ca.key" else name):
        HeadOffice.open(folder)


@pytest.mark.parametrize(
    "name", ["keys/identity", "keys/ca.key", "keys/ca.pem", "keys/server.pem", "roster.json", "federation.yaml"]
)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FedllmError, match=name):
        HeadOffice.open(folder)


def test_a_server_certificate_of_another_authority_is_found(folder: Path) -> None:
    other = certificates.make_server_certificate(certificates.make_ca("한국 연합", 9), ("a",), 9)
    files.write_secret(folder / "keys" / "server.pem", other.certificate + other.key)
    with pytest.raises(CryptoError, match="not issued"):
        HeadOffice.open(folder)


def test_what_needs_to_be_renewed_is_said_in_time(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("name: x\nhost: a\nserver_days: 10\nca_days: 20")
    folder = init_federation(tmp_path / "f.yaml", tmp_path / "head").folder
    said = HeadOffice.open(folder).warnings()
    assert [line.rpartition("fedllm ")[2] for line in said] == ["server rotate certificate", "server rotate ca"]
    (folder / "federation.yaml").write_text("name: x\nhost: b\nserver_days: 100\nca_days: 2000")
    assert any("not good for b" in line for line in HeadOffice.open(folder).warnings())
    federation.rotate_ca(folder, "start")
    federation.rotate_ca(folder, "finish")
    assert HeadOffice.open(folder).warnings() == []


def test_a_server_whose_certificate_has_ended_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f.yaml").write_text('name: x\nhost: "::1"\nport: 19092\nserver_days: 10')
    folder = init_federation(tmp_path / "f.yaml", tmp_path / "head").folder
    assert HeadOffice.open(folder).readiness() == "ready: sites connect to [::1]:19092"
    later = datetime.now(UTC) + timedelta(days=20)
    monkeypatch.setattr(federation, "datetime", SimpleNamespace(now=lambda _: later))
    said = HeadOffice.open(folder).readiness()
    assert said.startswith("no site can connect: the server certificate ended on")
    assert "fedllm server rotate certificate" in said


# ---- admission -------------------------------------------------------------------------------------------------------


def test_an_office_is_admitted_by_the_fingerprint_heard_on_the_telephone(folder: Path) -> None:
    site = Site()
    path = admit(folder, site.join(), site.fingerprint.upper().replace("-", " "))
    office = HeadOffice.open(folder)
    grant, signers = Grant.open(path.read_bytes())
    assert grant.site == site.name
    assert grant.site_fingerprint == site.fingerprint
    assert (grant.host, grant.port) == ("head.example.com", 9092)
    assert grant.identities == (office.identity.public,) == tuple(signers)
    assert grant.ca.encode() == office.ca_file.read_bytes()
    member = office.roster.of_link_key(site.link_key)
    assert member is not None
    assert member.site == site.name
    assert member.identities == (site.identity.public,)
    assert office.roster.find(site.name) == member
    assert Roster.load(office.roster_file) == office.roster


def test_a_grant_certifies_the_sites_keys_each_for_its_use(folder: Path) -> None:
    site = Site()
    grant = Grant.open(admit(folder, site.join(), site.fingerprint).read_bytes())[0]
    office = HeadOffice.open(folder)
    for pem, key, hosts in (
        (grant.link, site.link_key, ()), (grant.serving, site.serving_key, (*site.hosts, "localhost", "127.0.0.1")),
    ):  # fmt: skip
        facts = certificates.read_certificates(pem.encode())[0]
        assert certificates.certified_key(pem.encode()) == key
        assert certificates.issued_by(pem.encode(), [office.authorities[0].certificate]) == 0
        assert facts.subject == f"CN={site.name}"
        assert facts.hosts == hosts
        assert timedelta(days=364) < facts.ends - now() <= timedelta(days=365)


@pytest.mark.parametrize("names", ["[10.1.2.3]", "['2001:DB8::1', 10.1.2.3, localhost]"])
def test_no_office_gets_a_certificate_for_a_name_of_head_office(tmp_path: Path, names: str) -> None:
    settings = f"name: x\nhost: head.example.com\nnames: {names}\n"
    (tmp_path / "f.yaml").write_text(settings)
    folder, site = init_federation(tmp_path / "f.yaml", tmp_path / "h").folder, Site()
    site.hosts = ("Head.example.COM", "10.1.2.3", "2001:db8:0:0::1", "localhost", "own.example.com")
    grant = Grant.open(admit(folder, site.join(), site.fingerprint).read_bytes())[0]
    hosts = certificates.read_certificates(grant.serving.encode())[0].hosts
    assert set(hosts) & set(HeadOffice.open(folder).config.names) == set()
    assert "head.example.com" not in hosts
    assert {"own.example.com", "127.0.0.1"} <= set(hosts)
    assert ("localhost" in hosts) == ("localhost" not in names)
    assert certificates.read_certificates(grant.link.encode())[0].hosts == ()


def test_a_serving_certificate_without_any_name_is_still_none_of_a_client(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("name: x\nhost: 127.0.0.1\nnames: [localhost]\n")
    folder, site = init_federation(tmp_path / "f.yaml", tmp_path / "h").folder, Site()
    site.hosts = ()
    grant = Grant.open(admit(folder, site.join(), site.fingerprint).read_bytes())[0]
    found = x509.load_pem_x509_certificate(grant.serving.encode())
    uses = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]
    assert certificates.read_certificates(grant.serving.encode())[0].hosts == ()


def test_what_offices_are_certified_for_lasts_as_long_as_the_settings_say(folder: Path) -> None:
    site = Site()
    with (folder / "federation.yaml").open("a") as file:
        file.write("site_days: 3\n")
    path = admit(folder, site.join(), site.fingerprint)
    first = Grant.open(path.read_bytes())[0]
    assert certificates.read_certificates(first.link.encode())[0].ends - now() <= timedelta(days=3)
    again = Grant.open(federation.renew_grant(folder, site.name).read_bytes())[0]
    assert again.link != first.link
    assert certificates.certified_key(again.link.encode()) == site.link_key


def test_a_folder_of_the_version_before_says_how_it_is_made_anew(folder: Path) -> None:
    """Its roster has other keys, and its settings two ports."""
    member = {"site": "a", "identity": Site().identity.public.to_text(), "node_key": Site().link_key,
              "admitted_at": "2026-01-01T00:00:00Z"}  # fmt: skip
    (folder / "roster.json").write_text(json.dumps({"members": [member]}))
    with (folder / "federation.yaml").open("a") as file:
        file.write("fleet_port: 9092\n")
    with pytest.raises(FolderError, match=r"earlier version.*init-federation.*admitted anew"):
        HeadOffice.open(folder)


@pytest.mark.parametrize("heard", ["", "0" * 40, "서울", None])
def test_a_wrong_fingerprint_admits_nobody_and_does_not_give_away_the_right_one(
    folder: Path, heard: str | None
) -> None:
    site = Site()
    with pytest.raises(CryptoError, match="does not fit") as error:
        admit(folder, site.join(), site.fingerprint[:-1] if heard is None else heard)
    assert site.fingerprint not in str(error.value)
    assert HeadOffice.open(folder).roster.members == ()
    assert not (folder / "grants").exists()


def test_a_join_request_that_was_exchanged_on_its_way_is_refused(folder: Path) -> None:
    site, other = Site(), Site()
    with pytest.raises(CryptoError, match="does not fit"):
        admit(folder, other.join(), site.fingerprint)
    with pytest.raises(CryptoError):
        admit(folder, site.join().replace("강남".encode(), "강북".encode()), site.fingerprint)


def test_a_name_that_is_taken_is_refused_to_others(folder: Path) -> None:
    site, other = Site(), Site()
    admit(folder, site.join(), site.fingerprint)
    with pytest.raises(FederationError, match="present keys did not sign"):
        admit(folder, other.join(Identity.generate()), other.fingerprint)
    assert HeadOffice.open(folder).roster.of_link_key(other.link_key) is None


@pytest.mark.parametrize("shared", ["identity", "link_key", "serving_key"])
@pytest.mark.parametrize("as_", ["link_key", "serving_key"])
def test_keys_belong_to_one_site_and_one_use(folder: Path, shared: str, as_: str) -> None:
    site, other = Site(), Site("부산")
    admit(folder, site.join(), site.fingerprint)
    setattr(other, as_ if shared != "identity" else shared, getattr(site, shared))
    with pytest.raises(FederationError, match="in the roster, as those of 서울-강남"):
        admit(folder, other.join(), other.fingerprint)


def test_admitting_twice_is_admitting_once(folder: Path) -> None:
    site = Site()
    for _ in range(3):
        admit(folder, site.join(), site.fingerprint)
    assert len(HeadOffice.open(folder).roster.members) == 1


def test_new_keys_signed_by_the_present_ones_are_admitted_and_both_accepted_until_retired(folder: Path) -> None:
    old, new = Site(), Site()
    admit(folder, old.join(), old.fingerprint)
    path = admit(folder, new.join(old.identity), new.fingerprint)
    assert Grant.open(path.read_bytes())[0].site_fingerprint == new.fingerprint
    roster = HeadOffice.open(folder).roster
    member = roster.find(old.name)
    assert member is not None
    assert member.public == new.identity.public
    assert member.identities == (new.identity.public, old.identity.public)
    assert roster.of_link_key(old.link_key) == roster.of_link_key(new.link_key) == member
    retire(folder, old.name)
    roster = HeadOffice.open(folder).roster
    assert roster.of_link_key(old.link_key) is None
    assert roster.of_link_key(new.link_key) is not None
    with pytest.raises(FederationError, match="present keys did not sign"):  # the old request, sent once more
        admit(folder, old.join(), old.fingerprint)


def test_the_old_keys_cannot_take_the_name_back(folder: Path) -> None:
    old, new, newer = Site(), Site(), Site()
    admit(folder, old.join(), old.fingerprint)
    admit(folder, new.join(old.identity), new.fingerprint)
    with pytest.raises(FederationError, match="in the roster"):
        admit(folder, old.join(new.identity), old.fingerprint)
    with pytest.raises(FederationError, match="present keys did not sign"):
        admit(folder, newer.join(old.identity), newer.fingerprint)


def test_a_revoked_site_is_nobody_and_its_keys_never_come_back(folder: Path) -> None:
    site, other, fresh = Site(), Site("부산"), Site()
    admit(folder, site.join(), site.fingerprint)
    admit(folder, other.join(), other.fingerprint)
    assert revoke(folder, site.name).revoked_at is not None
    roster = HeadOffice.open(folder).roster
    revoked = roster.of_link_key(site.link_key)
    assert revoked is not None
    assert revoked.revoked_at is not None, "found, so that the port can say that it was"
    assert roster.find(site.name) is None
    assert [member.site for member in roster.active] == ["부산"]
    assert not (folder / "grants" / f"{site.name}.grant").exists()
    for name in (site.name, "대전"):
        site.name = name
        with pytest.raises(FederationError, match="were revoked"):
            admit(folder, site.join(), site.fingerprint)
    for step in (revoke, retire, federation.renew_grant):
        with pytest.raises(FederationError, match="not in the roster, which holds 부산"):
            step(folder, fresh.name)
    admit(folder, fresh.join(), fresh.fingerprint)  # the site itself comes back with new keys
    assert HeadOffice.open(folder).roster.find(fresh.name) is not None
    again = HeadOffice.open(folder).roster.of_link_key(site.link_key)
    assert again is not None
    assert again.revoked_at is not None


def test_a_name_is_found_in_either_spelling_of_hangul(folder: Path) -> None:
    site = Site()
    admit(folder, site.join(), site.fingerprint)
    assert federation.renew_grant(folder, unicodedata.normalize("NFD", site.name)).exists()


# ---- rotation --------------------------------------------------------------------------------------------------------


def test_a_new_server_certificate_is_of_the_same_authority(folder: Path) -> None:
    before = HeadOffice.open(folder)
    after = federation.rotate_server_certificate(folder)
    assert after.server != before.server
    assert after.authorities == before.authorities


def test_while_the_authority_is_replaced_every_grant_in_use_covers_the_server(folder: Path) -> None:
    site = Site()
    path = admit(folder, site.join(), site.fingerprint)
    grants = [Grant.open(path.read_bytes())[0].ca]
    old = HeadOffice.open(folder)

    def believed(ca: str) -> bool:
        authorities = re.findall(rb"-----BEGIN.*?-----END CERTIFICATE-----\n", ca.encode(), re.DOTALL)
        try:
            return certificates.issued_by(HeadOffice.open(folder).server.certificate, authorities) >= 0
        except CryptoError:
            return False

    assert federation.rotate_ca(folder, "start") == [path]
    grants.append(Grant.open(path.read_bytes())[0].ca)
    assert len(certificates.read_certificates(grants[1].encode())) == 2
    assert HeadOffice.open(folder).server == old.server
    federation.rotate_server_certificate(folder)  # an old one again: not every site knows the new authority
    assert believed(grants[0])
    federation.rotate_ca(folder, "finish")
    assert HeadOffice.open(folder).issuer == 1
    assert believed(grants[1])
    assert not believed(grants[0])
    federation.rotate_server_certificate(folder)
    assert HeadOffice.open(folder).issuer == 1
    federation.rotate_ca(folder, "retire")
    grants.append(Grant.open(path.read_bytes())[0].ca)
    new = HeadOffice.open(folder)
    assert len(new.authorities) == 1
    assert new.authorities[0] != old.authorities[0]
    assert grants[2] == new.ca_file.read_text()
    assert grants[2] in grants[1]
    assert old.authorities[0].key not in (folder / "keys" / "ca.key").read_bytes()


def test_while_the_identity_is_replaced_grants_are_signed_by_both(folder: Path) -> None:
    site = Site()
    path = admit(folder, site.join(), site.fingerprint)
    old = HeadOffice.open(folder).identity.public
    federation.rotate_identity(folder, "start")
    office = HeadOffice.open(folder)
    new = office.identities[1].public
    assert office.identity.public == old
    assert Grant.open(path.read_bytes())[0].identities == (old, new)
    assert federation.rotate_identity(folder, "finish") == []
    office = HeadOffice.open(folder)
    assert [identity.public for identity in office.identities] == [new, old]
    federation.rotate_identity(folder, "retire")
    assert [identity.public for identity in HeadOffice.open(folder).identities] == [new]
    assert Grant.open(path.read_bytes())[0].identities == (new,)


ROTATIONS = [federation.rotate_ca, federation.rotate_identity]
Rotate = Callable[[Path, federation.Step], list[Path]]


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_a_step_of_a_rotation_out_of_turn_is_refused_and_a_repeated_one_changes_nothing(
    folder: Path, rotate: Rotate
) -> None:
    def keys() -> list[bytes]:
        return [path.read_bytes() for path in sorted((folder / "keys").iterdir())]

    with pytest.raises(FederationError, match="no rotation has begun"):
        rotate(folder, "finish")
    rotate(folder, "start")
    with pytest.raises(FederationError, match="--finish"):
        rotate(folder, "retire")
    before = keys()
    rotate(folder, "start")
    assert keys() == before
    rotate(folder, "finish")
    with pytest.raises(FederationError, match="--retire"):
        rotate(folder, "start")
    before = keys()
    rotate(folder, "finish")
    assert keys() == before
    rotate(folder, "retire")
    before = keys()
    rotate(folder, "retire")
    assert keys() == before


# ---- crashes ---------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here."""


def crashing(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> Iterator[int]:
    """Run `work` again and again, ending it before its first write, its second, and so on, until it is done."""
    write = files.write_secret
    for allowed in itertools.count():
        done = 0

        def write_or_crash(path: Path, data: bytes, allowed: int = allowed) -> None:
            nonlocal done
            if done == allowed:
                raise Crash
            done += 1
            write(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(federation, "write_secret", write_or_crash)
            try:
                work()
            except Crash:
                yield allowed
                continue
        return


def test_a_crash_while_the_folder_is_made_leaves_none(
    tmp_path: Path, settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new"
    for _ in crashing(monkeypatch, lambda: init_federation(settings, folder)):
        assert not folder.exists()
    HeadOffice.open(folder)


@pytest.mark.parametrize("steps", [["start"], ["start", "finish"], ["start", "finish", "retire"]])
@pytest.mark.parametrize("rotate", ROTATIONS)
def test_a_crash_between_the_writes_of_a_rotation_leaves_a_folder_that_opens_and_a_step_to_repeat(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rotate: Rotate, steps: list[federation.Step]
) -> None:
    site = Site()
    path = admit(folder, site.join(), site.fingerprint)
    for step in steps[:-1]:
        rotate(folder, step)
    crashes = 0
    for _ in crashing(monkeypatch, lambda: rotate(folder, steps[-1])):
        crashes += 1
        office = HeadOffice.open(folder)
        assert office.roster.find(site.name) is not None
        Grant.open(path.read_bytes())
    assert crashes >= 1
    office = HeadOffice.open(folder)
    two = steps[-1] != "retire"
    assert len(office.authorities if rotate is federation.rotate_ca else office.identities) == 1 + two
    if steps[-1] != "finish":
        assert Grant.open(path.read_bytes())[0].coordinators == tuple(i.public.to_text() for i in office.identities)
        assert Grant.open(path.read_bytes())[0].ca == office.ca_file.read_text()
    keys = (folder / "keys" / "ca.key").read_bytes()
    assert keys.count(b"BEGIN") == len(office.authorities)


def test_a_crash_while_an_office_is_admitted_or_revoked_leaves_it_in_or_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = Site(), Site()
    for site, signers in ((old, []), (new, [old.identity])):
        work = partial(admit, folder, site.join(*signers), site.fingerprint)
        for _ in crashing(monkeypatch, work):
            HeadOffice.open(folder)
        member = HeadOffice.open(folder).roster.find(site.name)
        assert member is not None
        assert member.public == site.identity.public
    assert len(HeadOffice.open(folder).roster.members) == 1
    for _ in crashing(monkeypatch, lambda: revoke(folder, old.name)):
        assert HeadOffice.open(folder).roster.find(old.name) is not None
    assert HeadOffice.open(folder).roster.find(old.name) is None


def test_a_command_waits_for_no_other_one(folder: Path) -> None:
    site = Site()
    with files.locked(folder), pytest.raises(FolderError, match="another command"):
        admit(folder, site.join(), site.fingerprint)
