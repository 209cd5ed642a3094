"""A site's folder: whom it believes, which keys it uses, and that no step or crash loses either."""

import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from client import office
from client.doctor import check
from client.office import Declaration, Office, init_office, install, needs_fingerprint, retire, rotate
from client.records import Declared
from client.service import open_site
from client.site_file import SiteFile
from fedllm import files, settings_file
from fedllm.canonical import digest_of
from fedllm.cli import enrolment
from fedllm.config import ModelConfig, PrivacyConfig
from fedllm.crypto import certificates
from fedllm.crypto.hash_chain import open_entry
from fedllm.crypto.identity import Identity
from fedllm.crypto.signed_documents import sign_document
from fedllm.errors import ConfigError, CryptoError, DataError, FederationError, FedllmError, FolderError, ModelError
from fedllm.privacy.accounting import AccountingEvent
from fedllm.privacy.elapsed import Period
from fedllm.privacy.ledger import PrivacyLedger
from fedllm.privacy.split import Split
from fedllm.protocol.enrolment import Grant
from fedllm.values import parse
from server import federation

NAME = "서울-강남"
ALL = Split(0.0, bytes(32))  # train


@pytest.fixture
def head(tmp_path: Path) -> Path:
    (tmp_path / "federation.yaml").write_text("name: 한국\nhost: head.example.com\n", "utf-8")
    return federation.init_federation(tmp_path / "federation.yaml", tmp_path / "head").folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return init_office(tmp_path / "site", NAME).folder


def head_fingerprint(head: Path) -> str:
    return federation.HeadOffice.open(head).identity.public.fingerprint


def admit(head: Path, folder: Path) -> bytes:
    """Carry the join request that was made last to the server; return the grant."""
    site = Office.open(folder)
    return federation.admit(head, site.join_file.read_bytes(), site.keys[-1].identity.public.fingerprint).read_bytes()


@pytest.fixture
def member(head: Path, folder: Path) -> Path:
    """A site that was admitted and has installed its grant."""
    install(folder, admit(head, folder), head_fingerprint(head))
    return folder


# ---- making and opening ----------------------------------------------------------------------------------------------


def test_every_file_of_a_site_is_private(member: Path) -> None:
    rotate(member)
    found = {str(p.relative_to(member)): stat.S_IMODE(p.stat().st_mode) for p in (member, *member.rglob("*"))}
    for path, mode in found.items():
        assert mode == (0o700 if (member / path).is_dir() else 0o600), path
    assert set(found) == {
        ".", "site.yaml", f"{NAME}.join", "grant.json", "data", "keys", "keys/ca.pem", "keys/1", "keys/1/identity",
        "keys/1/link", "keys/1/link.pem", "keys/1/serving", "keys/1/serving.pem", "keys/2", "keys/2/identity",
        "keys/2/link", "keys/2/serving",
    }  # fmt: skip


def test_a_join_request_holds_no_secret(folder: Path) -> None:
    site = Office.open(folder)
    data = site.join_file.read_bytes()
    secret = site.identity.to_bytes().strip()
    assert secret[:64] not in data
    assert secret[64:] not in data
    assert b"PRIVATE" not in data
    assert certificates.key_line(site.in_use.link_file.read_bytes()) in data.decode()


def test_a_folder_of_the_version_before_says_how_it_is_made_anew(member: Path) -> None:
    keys = member / "keys" / "1"
    for name in ("link", "link.pem", "serving", "serving.pem"):
        (keys / name).unlink()
    files.write_secret(keys / "node", certificates.make_key())
    files.write_secret(member / "grant.json", sign_document({"kind": "fedllm grant v1"}, Identity.generate()))
    with pytest.raises(FolderError, match=r"earlier version.*fedllm site init.*admitted anew"):
        Office.open(member)


def test_a_name_has_one_spelling(tmp_path: Path) -> None:
    site = init_office(tmp_path / "site", unicodedata.normalize("NFD", NAME))
    assert site.name == NAME
    assert site.join_file.exists()


@pytest.mark.parametrize("name", ["../x", "", "a b", "a/b"])
def test_a_site_without_a_proper_name_is_not_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="site name"):
        init_office(tmp_path / "site", name)
    assert not (tmp_path / "site").exists()


def test_a_site_is_never_made_over_another(folder: Path) -> None:
    before = Office.open(folder).identity.public
    with pytest.raises(FolderError, match="not empty"):
        init_office(folder, NAME)
    assert Office.open(folder).identity.public == before


@pytest.mark.parametrize(
    "name",
    ["keys/1/identity", "keys/1/link", "keys/1/serving", "grant.json", "keys/ca.pem", "keys/1", "keys", ""],
)
def test_a_file_that_others_may_use_is_refused(member: Path, name: str) -> None:
    (member / name).chmod(stat.S_IMODE((member / name).stat().st_mode) | 0o004)
    with pytest.raises(FolderError, match="chmod"):
        Office.open(member)


@pytest.mark.parametrize("name", ["keys/1/identity", "keys/1/link", "keys/1/serving", "grant.json", "site.yaml"])
@pytest.mark.parametrize("damage", [b"", b"\xff\x00x", b"{}"])
def test_a_damaged_file_is_one_clear_error(member: Path, name: str, damage: bytes) -> None:
    (member / name).write_bytes(damage)
    with pytest.raises(FedllmError):
        Office.open(member)


def test_keys_that_are_gone_are_missed(member: Path) -> None:
    (member / "keys" / "1").rename(member / "away")
    with pytest.raises(FolderError, match="no keys"):
        Office.open(member)
    files.write_secret(member / "keys" / "3" / "identity", Identity.generate().to_bytes())
    for name in ("link", "serving"):
        files.write_secret(member / "keys" / "3" / name, certificates.make_key())
    with pytest.raises(FolderError, match="lacks the keys that the grant was made for"):
        Office.open(member)


def test_a_site_without_a_grant_says_what_comes_next(folder: Path) -> None:
    site = Office.open(folder)
    with pytest.raises(FederationError, match="fedllm site install"):
        site.coordinators  # noqa: B018
    with pytest.raises(FederationError, match="not admitted yet"):
        rotate(folder)


# ---- whom it believes ------------------------------------------------------------------------------------------------


def test_a_grant_is_believed_by_the_fingerprint_heard_on_the_telephone(head: Path, folder: Path) -> None:
    grant = admit(head, folder)
    assert needs_fingerprint(folder, grant)
    site = install(folder, grant, head_fingerprint(head).upper())
    assert site.coordinators == (federation.HeadOffice.open(head).identity.public,)
    assert site.address == "head.example.com:9092"
    assert site.ca_file.read_bytes() == federation.HeadOffice.open(head).ca_file.read_bytes()
    assert not needs_fingerprint(folder, grant)
    install(folder, grant)  # once more is no matter


def test_a_grant_is_not_believed_without_or_with_a_wrong_fingerprint(head: Path, folder: Path) -> None:
    grant = admit(head, folder)
    with pytest.raises(CryptoError, match="--fingerprint"):
        install(folder, grant)
    for heard in ("", "0" * 40, Office.open(folder).identity.public.fingerprint):
        with pytest.raises(CryptoError, match="does not fit"):
            install(folder, grant, heard)
    assert Office.open(folder).grant is None


def test_a_grant_for_another_site_is_refused(tmp_path: Path, head: Path, folder: Path) -> None:
    other = init_office(tmp_path / "other", "부산").folder
    with pytest.raises(CryptoError, match="for 부산"):
        install(folder, admit(head, other), head_fingerprint(head))


def test_a_grant_for_other_keys_of_the_same_name_is_refused(tmp_path: Path, head: Path, folder: Path) -> None:
    other = init_office(tmp_path / "other", NAME).folder
    with pytest.raises(CryptoError, match="made for other keys"):
        install(folder, admit(head, other), head_fingerprint(head))


def test_a_grant_brings_certificates_for_the_keys_that_were_made_here(head: Path, member: Path) -> None:
    site = Office.open(member)
    grant = site.grant
    assert grant is not None
    for file, pem in ((site.in_use.link_file, grant.link), (site.in_use.serving_file, grant.serving)):
        assert file.with_suffix(".pem").read_text() == pem
        assert certificates.certified_key(pem.encode()) == certificates.key_line(file.read_bytes())
    again = federation.renew_grant(head, NAME).read_bytes()
    install(member, again)
    assert site.in_use.link_file.with_suffix(".pem").read_text() == Grant.open(again)[0].link != grant.link


@pytest.mark.parametrize("name", ["link", "serving"])
def test_a_grant_with_a_certificate_for_another_key_is_refused_and_changes_nothing(
    head: Path, member: Path, name: str
) -> None:
    """Also when it would have new keys take the ledger over."""
    office = federation.HeadOffice.open(head)
    old = Office.open(member)
    ledger = PrivacyLedger(old.ledger, 8.0, 1e-5, old.identity)
    rotate(member)
    grant = Grant.open(admit(head, member))[0]
    other = certificates.certify(
        office.authorities[0], certificates.key_line(certificates.make_key()), NAME, 9
    ).decode()
    before = {path: path.read_bytes() for path in member.rglob("*") if path.is_file()}
    with pytest.raises(CryptoError, match=rf"certificate for another key than .*/keys/2/{name}\."):
        install(member, grant.model_copy(update={name: other}).sign(office.identities))
    assert {path: path.read_bytes() for path in before} == before
    assert Office.open(member).identity.public == old.identity.public
    assert all(open_entry(line).kind != "key" for line in ledger.file.lines())


def test_a_grant_of_another_head_office_is_refused_unless_the_telephone_says_so(
    tmp_path: Path, head: Path, member: Path
) -> None:
    second = federation.init_federation(head / "federation.yaml", tmp_path / "second").folder
    grant = admit(second, member)
    with pytest.raises(CryptoError, match="nobody that this site knows"):
        install(member, grant)
    with pytest.raises(CryptoError, match="does not fit"):
        install(member, grant, head_fingerprint(head))
    install(member, grant, head_fingerprint(second))
    assert Office.open(member).coordinators[0].fingerprint == head_fingerprint(second)


def test_a_grant_in_which_a_stranger_stands_beside_head_office_is_refused(head: Path, member: Path) -> None:
    real = federation.HeadOffice.open(head).identity
    stranger = Identity.generate()
    grant = Office.open(member).grant
    assert grant is not None
    both = grant.model_copy(update={"coordinators": (real.public.to_text(), stranger.public.to_text())})
    with pytest.raises(CryptoError, match="not signed by every identity"):
        install(member, both.sign([stranger]), head_fingerprint(head))


def test_an_older_grant_does_not_come_back(head: Path, member: Path) -> None:
    real = federation.HeadOffice.open(head).identity
    grant = Office.open(member).grant
    assert grant is not None
    older = grant.model_copy(update={"made_at": grant.made_at.replace(year=2000), "host": "old.example.com"})
    for heard in (None, head_fingerprint(head)):
        with pytest.raises(CryptoError, match="older than the one installed"):
            install(member, older.sign([real]), heard)
    assert Office.open(member).address == "head.example.com:9092"


def test_a_grant_of_tomorrow_does_not_shut_out_those_of_today(head: Path, member: Path) -> None:
    real = federation.HeadOffice.open(head).identity
    grant = Office.open(member).grant
    assert grant is not None
    later = grant.model_copy(update={"made_at": grant.made_at.replace(year=2999)})
    with pytest.raises(CryptoError, match="clocks"):
        install(member, later.sign([real]))


def test_head_office_replaces_its_identity_without_a_telephone_call(head: Path, member: Path) -> None:
    old = head_fingerprint(head)
    path = federation.rotate_identity(head, "start")[0]
    assert len(install(member, path.read_bytes()).coordinators) == 2
    federation.rotate_identity(head, "finish")
    path = federation.rotate_identity(head, "retire")[0]
    site = install(member, path.read_bytes())
    assert [identity.fingerprint for identity in site.coordinators] == [head_fingerprint(head)]
    assert head_fingerprint(head) != old


def test_an_office_that_slept_through_a_rotation_needs_the_telephone(head: Path, member: Path) -> None:
    for step in ("start", "finish", "retire"):
        grant = federation.rotate_identity(head, step)  # type: ignore[arg-type]
    with pytest.raises(CryptoError, match="--fingerprint"):
        install(member, grant[0].read_bytes())
    install(member, grant[0].read_bytes(), head_fingerprint(head))


def test_the_bundle_of_authorities_follows_the_grant(head: Path, member: Path) -> None:
    grant = federation.rotate_ca(head, "start")[0]
    site = install(member, grant.read_bytes())
    assert len(certificates.read_certificates(site.ca_file.read_bytes())) == 2


def test_an_address_of_version_6_is_written_in_brackets(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "f.yaml").write_text('name: x\nhost: "::1"\n')
    head = federation.init_federation(tmp_path / "f.yaml", tmp_path / "head6").folder
    assert install(folder, admit(head, folder), head_fingerprint(head)).address == "[::1]:9092"


# ---- rotation --------------------------------------------------------------------------------------------------------


def test_new_keys_are_used_from_their_grant_on_and_old_ones_open_until_retired(head: Path, member: Path) -> None:
    before = Office.open(member)
    waiting = rotate(member)
    assert waiting.identity.public == before.identity.public
    assert waiting.in_use.link_file == before.in_use.link_file
    new = waiting.keys[-1].identity.public
    assert new in [identity.public for identity in waiting.identities]  # the server may seal to it already
    grant = admit(head, member)
    roster = federation.HeadOffice.open(head).roster.find(NAME)
    assert roster is not None
    assert roster.identities == (new, before.identity.public)
    site = install(member, grant)
    assert site.identity.public == new
    assert site.in_use.link_file != before.in_use.link_file
    assert [identity.public for identity in site.identities] == [new, before.identity.public]
    assert roster.link_key == certificates.key_line(site.in_use.link_file.read_bytes())
    assert roster.serving_key == certificates.key_line(site.in_use.serving_file.read_bytes())
    site = retire(member)
    assert [identity.public for identity in site.identities] == [new]
    assert not before.in_use.folder.exists()


def test_a_rotation_that_is_repeated_before_its_grant_makes_no_third_set_of_keys(head: Path, member: Path) -> None:
    first = rotate(member).keys[-1].identity.public
    assert rotate(member).keys[-1].identity.public == first
    assert retire(member).keys[-1].identity.public == first, "keys that wait are not old"
    install(member, admit(head, member))
    assert Office.open(member).identity.public == first


def test_a_second_rotation_follows_the_first(head: Path, member: Path) -> None:
    for _ in range(2):
        rotate(member)
        install(member, admit(head, member))
    assert [keys.number for keys in retire(member).keys] == [3]
    roster = federation.HeadOffice.open(head).roster.find(NAME)
    assert roster is not None
    assert len(roster.identities) == 3


# ---- when the site starts anew ---------------------------------------------------------------------------------------


def test_a_charge_does_not_start_the_site_anew(ready: Path) -> None:
    site = Office.open(ready)
    before = site.stamp()
    ledger = PrivacyLedger(site.ledger, 8.0, 1e-5, site.identity)  # moves the anchor, which lies among the keys
    ledger.release(ledger.reserve("run", 1, "r", AccountingEvent(1.0, 2.0, 1)), b"")
    files.write_secret(site.link_state_file, b"{}")
    assert site.stamp() == before


def test_what_the_owner_or_head_office_changes_starts_the_site_anew(head: Path, ready: Path) -> None:
    site = Office.open(ready)
    stamps = [site.stamp()]

    def changed(work: Callable[[], object]) -> None:
        work()
        stamps.append(site.stamp())
        assert len(set(stamps)) == len(stamps)

    changed(lambda: check(ready))  # the declaration
    changed(lambda: edit(ready, {"data.size": 110}))
    changed(lambda: install(ready, federation.renew_grant(head, NAME).read_bytes()))
    changed(lambda: rotate(ready))
    changed(lambda: install(ready, admit(head, ready)))
    changed(lambda: retire(ready))


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
            patch.setattr(office, "write_secret", write_or_crash)
            try:
                work()
            except Crash:
                yield allowed
                continue
        return


def test_a_crash_while_a_site_is_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in crashing(monkeypatch, partial(init_office, tmp_path / "new", NAME)):
        assert not (tmp_path / "new").exists()
    Office.open(tmp_path / "new")


def test_a_crash_between_the_writes_of_any_step_leaves_a_site_that_opens(
    head: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Office.open(folder).identity.public
    for _ in crashing(monkeypatch, partial(install, folder, admit(head, folder), head_fingerprint(head))):
        assert Office.open(folder).grant is None
    for _ in crashing(monkeypatch, partial(rotate, folder)):
        assert Office.open(folder).identity.public == first
    assert len(Office.open(folder).keys) == 2
    for _ in crashing(monkeypatch, partial(install, folder, admit(head, folder))):
        assert Office.open(folder).identity.public == first
    assert Office.open(folder).identity.public != first
    (folder / "keys" / "1").rename(folder / "keys" / "1.leaving")  # a crash amid `retire`
    assert len(Office.open(folder).keys) == 1
    retire(folder)
    assert not (folder / "keys" / "1.leaving").exists()


# ---- site.yaml -------------------------------------------------------------------------------------------------------


def edit(folder: Path, changes: dict[str, Any]) -> Office:
    """Set dotted keys of site.yaml; None removes one."""
    path = folder / "site.yaml"
    values = settings_file.read_settings(path)
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is None:
            place.pop(last)
        else:
            place[last] = value
    path.write_text(yaml.safe_dump(values, allow_unicode=True), "utf-8")
    return Office.open(folder)


def test_the_template_means_what_it_says(folder: Path) -> None:
    site = Office.open(folder)
    policy = site.policy
    assert (policy.epsilon, policy.delta, policy.unit, policy.min_units) == (8.0, 1e-5, "record", 100)
    assert not policy.allow_unprotected
    assert site.config.models == {}
    assert site.config.resources.max_message_mb == 512
    assert site.config.data.prompt == "{question}\n"
    assert site.socket is None
    assert site.ledger_file == folder / "data" / "ledger.db"


def test_every_comment_of_the_template_can_be_taken_up(folder: Path) -> None:
    path = folder / "site.yaml"
    text = path.read_text("utf-8")
    for key in ("unit: customer", "threads: 4", "socket: /run", "socket_group: fedllm", "model_cache: /srv"):
        assert f"# {key}" in text
        text = text.replace(f"# {key}", key)
    path.write_text(text.replace("models: {}", "models:").replace("#  Qwen", "  Qwen"), "utf-8")
    site = Office.open(folder)
    assert site.config.data.unit == "customer"
    assert site.config.resources.threads == 4
    assert (str(site.socket), site.config.socket_group) == ("/run/fedllm/link.sock", "fedllm")
    assert "Qwen/Qwen2.5-0.5B" in site.config.models
    assert site.environment["HF_HUB_CACHE"] == "/srv/huggingface"


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"polcy": {}}, "polcy: unknown key; did you mean policy"), ({"policy.epsilom": 1}, "did you mean epsilon"),
     ({"policy.epsilon": 0}, "policy.epsilon=0"), ({"policy.epsilon": "much"}, "policy.epsilon='much'"),
     ({"policy.epsilon": None}, "epsilon"), ({"policy.unit": "person"}, "data.unit"), ({"name": "a/b"}, "site name"),
     ({"data.chat": True, "data.prompt": None}, "prompt"), ({"data.label": "x"}, "label"), ({"name": None}, "name"),
     ({"socket_group": "x"}, "socket"), ({"resources.max_message_mb": 0}, "max_message_mb"), ({"models": []}, "models"),
     ({"policy.delta": 1}, "delta"), ({"policy.min_units": 0}, "min_units")],
)  # fmt: skip
def test_a_mistake_in_site_yaml_is_named(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        edit(folder, changes)
    assert "site.yaml" in str(error.value)


def test_the_name_stays_as_it_was_admitted(member: Path) -> None:
    with pytest.raises(ConfigError, match=f"admitted this site as {NAME}"):
        edit(member, {"name": "부산"})


def test_only_models_that_the_owner_put_there_are_used(folder: Path, tmp_path: Path) -> None:
    (folder / "beside").mkdir()
    (tmp_path / "elsewhere").mkdir()
    site = edit(folder, {"models": {"a": "beside", "b": str(tmp_path / "elsewhere"), "c": "pkg://simulations.demo/base",
                                    "d": "org/model", "e": "./gone"}})  # fmt: skip

    def where(name: str, site: Office = site) -> str:
        return site.model(ModelConfig(source=name, revision="abc")).source

    assert where("a") == str(folder / "beside")
    assert where("b") == str(tmp_path / "elsewhere")
    assert where("c") == "pkg://simulations.demo/base"
    for name in ("beside", str(tmp_path / "elsewhere"), "org/model", "/etc", "pkg://simulations.demo/base", "../x"):
        with pytest.raises(ModelError, match="permits only these models: a, b, c, d, e"):
            where(name)
    for name in ("d", "e"):
        with pytest.raises(ModelError, match="no folder here"):
            where(name)
    site = edit(folder, {"model_cache": "cache"})
    assert where("d", site) == "org/model"
    assert site.environment["HF_HUB_CACHE"] == str(folder / "cache")
    assert site.environment["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(ModelError, match="no folder here"):
        where("e", site)


def test_records_are_files_of_this_machine(folder: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        edit(folder, {"data.train": "squad"}).data  # noqa: B018
    (folder / "records.jsonl").touch()
    assert edit(folder, {"data.train": "records.jsonl"}).data.train == str(folder / "records.jsonl")


def test_a_socket_whose_path_is_too_long_is_refused_with_the_remedy(folder: Path) -> None:
    with pytest.raises(ConfigError, match="shorter path"):
        edit(folder, {"socket": "x" * 108}).socket  # noqa: B018


# ---- the dry run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(member: Path, tiny_llama: Path) -> Path:
    """A site that wants nothing."""
    rows = [{"question": f"q{i}", "answer": f"SECRET{i}", "who": f"person{i % 30}"} for i in range(120)]
    files.write_secret(member / "records.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    edit(member, {"models": {"tiny": str(tiny_llama)}, "resources.device": "cpu", "socket": "/tmp/fedllm-test.sock",
                  "data.size": 100})  # fmt: skip
    return member


def wrong(folder: Path) -> list[str]:
    findings = check(folder)
    assert not any("SECRET" in finding.text or "person1" in finding.text for finding in findings)
    return [finding.text for finding in findings if not finding.right]


def test_a_dry_run_of_a_site_in_order_finds_nothing_wrong_and_spends_nothing(ready: Path) -> None:
    assert wrong(ready) == []
    assert not Office.open(ready).ledger_file.exists()
    assert any("120 records to protect" in finding.text for finding in check(ready))


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"data.train": "gone.jsonl"}, "no such file"), ({"data.text": "{answr}"}, "missing column answr"),
     ({"data.text": "{answer!r}"}, "plain name"), ({"models": {}}, "none permitted"),
     ({"models": {"x": "/gone"}}, "gone"),
     ({"models": {"x": "data"}}, "cannot be loaded"), ({"policy.min_units": 121}, "at least 121"),
     ({"policy.unit": "person", "data.unit": "who"}, "there are 30 persons"), ({"data.size": None}, "size: 100"),
     ({"data.size": 61}, "at least 100"), ({"data.size": 300}, "there are 120 records"),
     ({"data.label": "who", "data.prompt": None, "policy.min_units": 1}, "data.labels: declare every"),
     ({"data.chat": True}, "chat template"),
     ({"data.label": "who", "data.prompt": None, "data.unit": "whom"}, "missing column whom"),
     ({"socket_group": "no-such-group"}, "groupadd")],
)  # fmt: skip
def test_a_dry_run_finds_what_is_wrong(ready: Path, changes: dict[str, Any], said: str) -> None:
    edit(ready, changes)
    found = wrong(ready)
    assert len(found) == 1
    assert said in found[0]


def test_a_dry_run_counts_persons_and_labels(ready: Path, tiny_llama: Path) -> None:
    edit(ready, {"policy.unit": "person", "data.unit": "who", "policy.min_units": 30, "data.size": 30})
    assert wrong(ready) == []
    labels = [f"person{i}" for i in range(2, 30)]
    edit(ready, {"data.label": "who", "data.labels": [*labels, "nobody"], "data.prompt": None})
    assert wrong(ready) == []
    found = [finding.text for finding in check(ready) if "label" in finding.text]
    assert "29 labels are declared" in found[0]
    assert "28 of them occur" in found[0]
    assert "8 of 120 cannot be used" in found[1]
    assert "records.jsonl, line 1: its label is not among data.labels" in found[1]


def test_a_dry_run_signs_what_it_found_to_hold_and_a_site_starts_with_nothing_else(ready: Path) -> None:
    with pytest.raises(ConfigError, match="not checked yet"):
        open_site(Office.open(ready))
    edit(ready, {"data.size": 500})
    check(ready)
    assert not (ready / "declaration.json").exists(), "it did not hold"
    edit(ready, {"data.size": 100})
    assert wrong(ready) == []
    plan: Any = SimpleNamespace(model=ModelConfig(source="tiny"), privacy=PrivacyConfig())
    site = open_site(Office.open(ready))
    assert site._records.declared == Declared(100, "record")
    files.write_secret(ready / "records.jsonl", b"")
    with pytest.raises(DataError, match="empty"):
        open_site(Office.open(ready))
    files.write_secret(ready / "records.jsonl", b'{"question": 1, "answer": 2}\n{\n' * 9)
    assert len(open_site(Office.open(ready))._records.units(plan, ALL, "training")) == 18, "the site looks at no number"
    for changes in (
        {"data.size": 101},
        {"data.text": "x"},
        {"models": {}},
        {"policy.unit": "person", "data.unit": "who"},
    ):
        edit(ready, changes)
        with pytest.raises(ConfigError, match="fedllm site check"):
            open_site(Office.open(ready))


def test_what_a_declaration_signs_changes_with_no_setting_but_those_that_are_new() -> None:
    settings = parse(SiteFile, {
        "name": "a", "data": {"train": "r.jsonl", "text": "{t}", "prompt": "{q}\n", "size": 10, "unit": "who"},
        "policy": {"epsilon": 8.0}, "models": {"m": "/m"},
    })  # fmt: skip
    made = Declaration(
        site="a", data=settings.data, unit="record", models=settings.models, tokenizers={"m": "0" * 64},
        files={"m": "1" * 64}, made_at=datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip
    signed = digest_of(made.model_dump(mode="json"))
    assert signed == "c7fa411abd4f90fa3dc7d1f5745e0415722133737810aa9fe8ddd9355fb93fb9"


def test_a_declaration_is_the_offices_own(ready: Path) -> None:
    assert wrong(ready) == []
    written, made = json.loads((ready / "declaration.json").read_text("utf-8")), Office.open(ready).declaration
    stranger = {key: value for key, value in written.items() if key != "signatures"}
    files.write_secret(ready / "declaration.json", sign_document(stranger, Identity.generate()))
    with pytest.raises(ConfigError, match="not signed by this site"):
        Office.open(ready).declaration  # noqa: B018
    files.write_secret(ready / "declaration.json", json.dumps({**written, "unit": "person"}).encode())
    with pytest.raises(CryptoError, match="altered"):
        Office.open(ready).declaration  # noqa: B018
    Office.open(ready).declare({"tiny": "0" * 64}, made.files)
    with pytest.raises(ConfigError, match="another way"):
        open_site(Office.open(ready))
    Office.open(ready).declare(made.tokenizers, {})
    with pytest.raises(ConfigError, match=r"other files.*fedllm site check"):
        open_site(Office.open(ready))


def test_a_dry_run_sees_records_and_ledger_that_others_can_read(ready: Path) -> None:
    site = Office.open(ready)
    PrivacyLedger(site.ledger, 8.0, 1e-5, site.identity)
    assert wrong(ready) == []
    site.ledger_file.chmod(0o644)
    assert "chmod 600" in wrong(ready)[0]
    site.ledger_file.chmod(0o600)
    site.ledger_file.write_bytes(b"")
    assert "ledger" in wrong(ready)[0]


def test_a_dry_run_sees_records_outside_that_others_can_read(ready: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as outside:
        Path(outside).chmod(0o755)
        records = Path(shutil.copy(ready / "records.jsonl", outside))
        edit(ready, {"data.train": str(records)})
        records.chmod(0o644)
        assert "chmod go-rwx" in wrong(ready)[0]
        records.chmod(0o600)
        assert wrong(ready) == []


def test_a_dry_run_sees_an_authority_that_ends_soon(head: Path, member: Path) -> None:
    (head / "federation.yaml").write_text("name: x\nhost: a\nca_days: 13")
    for step in ("start", "finish", "retire"):
        grants = federation.rotate_ca(head, step)  # type: ignore[arg-type]
    install(member, grants[0].read_bytes())
    assert any("authority ends" in text for text in wrong(member))


def test_a_dry_run_before_admission_says_so_and_looks_at_the_rest(folder: Path) -> None:
    found = wrong(folder)
    assert len(found) == 2
    assert "no grant yet" in found[0]
    assert "records.jsonl" in found[1]
    (folder / "site.yaml").write_text("name: x")
    assert len(wrong(folder)) == 1


# ---- the commands ----------------------------------------------------------------------------------------------------


def command(*words: str | Path, said: str | None = None) -> Result:
    app = typer.Typer()
    enrolment.register(app)
    return CliRunner().invoke(app, [str(word) for word in words], input=said)


def test_two_people_come_from_nothing_to_a_federation_by_the_commands(tmp_path: Path) -> None:
    head, site = tmp_path / "head", tmp_path / "site"
    (tmp_path / "federation.yaml").write_text("name: 한국\nhost: 127.0.0.1\n", "utf-8")
    join, grant = site / f"{NAME}.join", head / "grants" / f"{NAME}.grant"

    def do(*words: str | Path, home: Path, said: str | None = None) -> str:
        result = command(*words, "--home", home, said=said)
        assert result.exception is None, result.output
        return result.output

    def refused(*words: str | Path, home: Path, said: str | None = None) -> str:
        result = command(*words, "--home", home, said=said)
        assert isinstance(result.exception, FedllmError), result.output
        return f"{result.output}{result.exception}"

    made = do("init-federation", tmp_path / "federation.yaml", home=head)
    assert head_fingerprint(head) in made
    assert str(join) in do("site", "init", "--name", NAME, home=site)
    fingerprint = Office.open(site).identity.public.fingerprint
    asked = refused("admit", join, home=head, said="wrong\n")
    assert fingerprint not in asked, "shown only to those who have heard it"
    assert "nobody answered" in refused("admit", join, home=head, said="")
    assert str(grant) in do("admit", join, home=head, said=fingerprint + "\n")
    assert "does not fit" in refused("site", "install", grant, "--fingerprint", fingerprint, home=site)
    do("site", "install", grant, home=site, said=head_fingerprint(head) + "\n")
    do("site", "install", do("server", "grant", NAME, home=head).split()[-1], home=site)  # asks nobody
    assert "1 of" in refused("site", "check", home=site)
    new = do("site", "rotate", home=site).split()[-1]
    do("admit", join, "--fingerprint", new, home=head)
    do("site", "install", grant, home=site)
    do("server", "retire", NAME, home=head)
    do("site", "retire", home=site)
    for what in ("ca", "identity"):
        for step in ([], ["--finish"], ["--retire"]):
            do("server", "rotate", what, *step, home=head)
            do("site", "install", grant, home=site)
    do("server", "rotate", "certificate", home=head)
    assert "one step" in refused("server", "rotate", "certificate", "--finish", home=head)
    assert "one at a time" in refused("server", "rotate", "ca", "--finish", "--retire", home=head)
    do("revoke", NAME, home=head)
    assert "not in the roster" in refused("revoke", NAME, home=head)
    assert Grant.open((site / "grant.json").read_bytes())[0].coordinators[0] == (
        federation.HeadOffice.open(head).identity.public.to_text()
    )


@pytest.mark.parametrize(
    "words",
    [["admit", "gone.join"], ["revoke", "x"], ["init-federation", "gone.yaml"], ["site", "check"], ["site", "rotate"],
     ["site", "install", "gone.grant"], ["site", "retire"], ["site", "init", "--name", "a/b"], ["server", "grant", "x"],
     ["server", "retire", "x"], ["server", "rotate", "ca"]],
)  # fmt: skip
def test_a_mistake_in_a_command_is_one_clear_error(tmp_path: Path, words: list[str]) -> None:
    before = os.umask(0o022)
    try:
        result = command(*words, "--home", tmp_path / "gone")
        assert os.umask(0o022) == 0o077
    finally:
        os.umask(before)
    if words != ["site", "check"]:
        assert isinstance(result.exception, FedllmError)
    assert result.exit_code == 1
    assert not (tmp_path / "gone").exists()


def test_the_folders_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "here"))
    assert command("site", "init", "--name", "a").exit_code == 0
    assert Office.open(tmp_path / "here").name == "a"
    monkeypatch.delenv("FEDLLM_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command("site", "init", "--name", "b").exit_code == 0
    assert Office.open(tmp_path / ".fedllm" / "site").name == "b"
    assert stat.S_IMODE((tmp_path / ".fedllm").stat().st_mode) == 0o700


def test_a_site_is_made_without_any_heavy_library(tmp_path: Path) -> None:
    code = f"""
import sys, typer
from fedllm.cli import enrolment
app = typer.Typer()
enrolment.register(app)
app(["site", "init", "--name", "a", "--home", {str(tmp_path / "site")!r}], standalone_mode=False)
print("loaded:", *sorted({{name.partition('.')[0] for name in sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("loaded:")[2].split())
    assert "cryptography" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "flwr", "hydra", "sqlite3", "scipy", "pandas"}


def test_new_keys_take_the_ledger_over_when_their_grant_is_installed(head: Path, member: Path) -> None:
    old = Office.open(member)
    ledger = PrivacyLedger(old.ledger, 8.0, 1e-5, old.identity)
    rotate(member)
    assert all(open_entry(line).kind != "key" for line in ledger.file.lines())
    new = install(member, admit(head, member))
    assert new.identity.public != old.identity.public
    retire(member)
    for trusted in (old.identity.public, new.identity.public):
        ledger.file.verify([trusted])
    kinds = [(open_entry(line).kind, open_entry(line).signer) for line in ledger.file.lines()[-2:]]
    assert kinds == [("key", old.identity.public), ("opened", new.identity.public)]


def test_every_limit_of_site_yaml_reaches_the_policy(folder: Path) -> None:
    edit(folder, {
        "policy.run_epsilon": 4.0, "policy.period": {"days": 90, "epsilon": 3.0}, "policy.max_rank": 16,
        "policy.train": ["B"], "policy.modes": ["local"], "policy.min_sites": 3,
    })  # fmt: skip
    policy = Office.open(folder).policy
    assert (policy.run_epsilon, policy.period, policy.max_rank) == (4.0, Period(days=90, epsilon=3.0), 16)
    assert (policy.train, policy.modes, policy.min_sites) == (("B",), ("local",), 3)


@pytest.mark.parametrize(
    "wrong", [{"run_epsilon": 0}, {"period": {"days": 0, "epsilon": 1}}, {"period": {"days": 9}}, {"max_rank": 0},
              {"train": []}, {"train": ["A"]}, {"modes": ["central"]}, {"min_sites": 0}, {"peers": {"b": "12-34"}},
              {"peers": {"b": "z" * 40}}, {"peers": {"b": "ab" * 20, "c": "AB-" * 20}}],
)  # fmt: skip
def test_an_impossible_limit_is_refused(folder: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"policy.{next(iter(wrong))}"):
        edit(folder, {f"policy.{key}": value for key, value in wrong.items()})
