"""What is carried between a site and the server is believed only as it was made; files are private and whole."""

import errno
import json
import os
import stat
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm import files, settings_file
from fedllm.crypto import certificates, signed_documents
from fedllm.crypto.identity import Identity
from fedllm.errors import ConfigError, CryptoError, FolderError
from fedllm.protocol.enrolment import Grant, JoinRequest, check_host, now, same_fingerprint
from fedllm.values import check_site_name

SITE, OLD_SITE, OFFICE, NEW_OFFICE = (Identity.generate() for _ in range(4))
LINK_KEY, SERVING_KEY = (certificates.key_line(certificates.make_key()) for _ in range(2))
AUTHORITY = certificates.make_ca("한국", 30)
REQUEST = JoinRequest(
    site="서울-강남", identity=SITE.public.to_text(), link_key=LINK_KEY, serving_key=SERVING_KEY,
    hosts=("llm.seoul.example.com",), made_at=now(),
)  # fmt: skip
GRANT = Grant(
    federation="한국",
    site="서울-강남",
    site_fingerprint=SITE.public.fingerprint,
    host="head.example.com",
    port=9092,
    ca=AUTHORITY.certificate.decode(),
    link=certificates.certify(AUTHORITY, LINK_KEY, "서울-강남", 9).decode(),
    serving=certificates.certify(AUTHORITY, SERVING_KEY, "서울-강남", 9, ("llm.seoul.example.com",)).decode(),
    coordinators=(OFFICE.public.to_text(), NEW_OFFICE.public.to_text()),
    made_at=now(),
)


# ---- join requests and grants ----------------------------------------------------------------------------------------


def test_a_join_request_and_a_grant_come_back_with_their_signers() -> None:
    request, signers = JoinRequest.open(REQUEST.sign(SITE, OLD_SITE))
    assert request == REQUEST
    assert set(signers) == {SITE.public, OLD_SITE.public}
    grant, signers = Grant.open(GRANT.sign([OFFICE, NEW_OFFICE]))
    assert grant == GRANT
    assert grant.identities == (OFFICE.public, NEW_OFFICE.public)
    assert set(signers) == set(grant.identities)


def test_a_join_request_that_the_identity_in_it_did_not_sign_is_refused() -> None:
    with pytest.raises(CryptoError, match="not signed by the identity in it"):
        JoinRequest.open(REQUEST.sign(OLD_SITE))


def test_a_grant_that_an_identity_in_it_did_not_sign_is_refused() -> None:
    for signers in ([OFFICE], [NEW_OFFICE], [SITE]):
        with pytest.raises(CryptoError, match="not signed by every identity"):
            Grant.open(GRANT.sign(signers))


@pytest.mark.parametrize("kind", [JoinRequest, Grant])
def test_a_document_altered_at_any_byte_is_refused_or_says_the_same(kind: type[JoinRequest] | type[Grant]) -> None:
    data = REQUEST.sign(SITE) if kind is JoinRequest else GRANT.sign([OFFICE, NEW_OFFICE])
    said = kind.open(data)[0]
    for place in range(0, len(data), 3):
        altered = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        try:
            assert kind.open(altered)[0] == said
        except CryptoError:
            continue


@pytest.mark.parametrize(
    ("key", "value"),
    [("site", "../x"), ("site", ""), ("site", "a/b"), ("site", "a\nb"), ("site", "a b"), ("site", '"'),
     ("site", "가" * 67),
     ("site", unicodedata.normalize("NFD", "서울")), ("site", 3), ("identity", "00"), ("link_key", "ssh-rsa AAAA"),
     ("link_key", LINK_KEY + " comment"), ("serving_key", LINK_KEY + "\n" + LINK_KEY), ("serving_key", ""),
     ("hosts", ["a b"]), ("hosts", ["http://a"]), ("hosts", ["a"] * 17), ("hosts", "a"), ("made_at", "yesterday"),
     ("made_at", "2026-01-01T00:00:00"), ("kind", "fedllm grant v2"), ("kind", "fedllm join request v9"), ("more", 1),
     ("identity", SITE.public.to_text().upper())],
)  # fmt: skip
def test_a_join_request_with_a_value_that_it_cannot_have_is_refused(key: str, value: Any) -> None:
    content = {**REQUEST.model_dump(mode="json"), key: value}
    with pytest.raises(CryptoError):
        JoinRequest.open(signed_documents.sign_document(content, SITE))


@pytest.mark.parametrize(
    ("key", "value"),
    [("host", "head.example.com:9092"), ("host", "https://x"), ("host", ""), ("port", 0), ("port", "9092"),
     ("port", 65536), ("ca", "nonsense"), ("ca", ""), ("link", ""), ("link", LINK_KEY), ("serving", "nonsense"),
     ("coordinators", []), ("federation", ""),
     ("coordinators", [OFFICE.public.to_text()] * 9), ("kind", "fedllm join request v2"), ("more", 1)],
)  # fmt: skip
def test_a_grant_with_a_value_that_it_cannot_have_is_refused(key: str, value: Any) -> None:
    content = {**GRANT.model_dump(mode="json"), key: value}
    with pytest.raises(CryptoError):
        Grant.open(signed_documents.sign_document(content, OFFICE, NEW_OFFICE))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([*JoinRequest.model_fields, *Grant.model_fields]), _JSON, st.sampled_from([JoinRequest, Grant]))
def test_a_hostile_value_in_a_signed_document_raises_one_type_of_error(
    key: str, value: Any, kind: type[JoinRequest] | type[Grant]
) -> None:
    base = REQUEST if kind is JoinRequest else GRANT
    try:
        data = signed_documents.sign_document({**base.model_dump(mode="json"), key: value}, SITE, OFFICE, NEW_OFFICE)
    except (UnicodeEncodeError, ValueError):
        return  # cannot be written either
    try:
        kind.open(data)
    except CryptoError:
        return


@given(st.binary(max_size=300), st.sampled_from([JoinRequest, Grant]))
def test_hostile_bytes_are_refused(data: bytes, kind: type[JoinRequest] | type[Grant]) -> None:
    with pytest.raises(CryptoError):
        kind.open(data)


def test_a_file_too_large_to_be_meant_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(CryptoError, match="too many"):
        JoinRequest.open(b" " * (1 << 21))


def test_a_document_of_the_other_kind_is_refused() -> None:
    with pytest.raises(CryptoError, match="right file"):
        JoinRequest.open(GRANT.sign([OFFICE, NEW_OFFICE]))
    with pytest.raises(CryptoError, match="right file"):
        Grant.open(REQUEST.sign(SITE))


def test_a_document_of_the_version_before_says_how_it_is_made_again() -> None:
    """As they were before sites had keys for the link."""
    request = {
        "kind": "fedllm join request v1",
        "site": "서울",
        "identity": SITE.public.to_text(),
        "node_key": LINK_KEY,
    }
    grant = {"kind": "fedllm grant v1", "site": "서울", "fleet_port": 9092}
    with pytest.raises(CryptoError, match=r"join request v1, expected .* v2.*fedllm site init"):
        JoinRequest.open(signed_documents.sign_document(request, SITE))
    with pytest.raises(CryptoError, match=r"grant v1, expected .* v2.*fedllm admit"):
        Grant.open(signed_documents.sign_document(grant, OFFICE))


# ---- names, hosts, fingerprints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["seoul-gangnam", "서울-강남", "서울_2.지점", "हिन्दी", "7", "東京"])
def test_a_site_may_have_a_name_of_any_script(name: str, tmp_path: Path) -> None:
    assert check_site_name(unicodedata.normalize("NFD", name)) == unicodedata.normalize("NFC", name)
    (tmp_path / f"{name}.grant").touch()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-x", "a/b", "a\\b", "a\0", "a b", "a\n", "\ud800", "가" * 67, "a" * 201, "a\u202eb", "%41"]
)
def test_a_name_that_is_no_name_of_a_file_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="site name"):
        check_site_name(name)


@pytest.mark.parametrize(
    ("host", "right"),
    [("Head.Example.com", "head.example.com"), ("10.0.0.1", "10.0.0.1"), ("::1", "::1"),
     ("2001:DB8:0::1", "2001:db8::1"),
     ("localhost", "localhost"),
     ("서울.kr", "서울.kr".encode("idna").decode())],
)  # fmt: skip
def test_a_host_is_written_as_certificates_write_it(host: str, right: str) -> None:
    assert check_host(host) == right


@pytest.mark.parametrize(
    "host",
    ["", "a b", "a:1", "[::1]", "http://a", "a/b", "-a", "a..b", "*.a.com", "fe80::1%eth0", "a\n", "x" * 254, "_a"],
)
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="host"):
        check_host(host)


def test_a_fingerprint_is_compared_whatever_its_case_and_separators() -> None:
    found = SITE.public.fingerprint
    for heard in (found, found.upper(), found.replace("-", " "), found.replace("-", ""), f" {found}\n", f"«{found}».."):
        assert same_fingerprint(heard, found)
    for heard in ("", "-", found[:-1], found + "0", OFFICE.public.fingerprint, found.replace(found[0], "０", 1)):
        assert not same_fingerprint(heard, found)


# ---- files -----------------------------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Any:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_a_secret_is_private_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "secret"
    files.write_secret(path, b"1")
    files.write_secret(path, b"2")
    assert path.read_bytes() == b"2"
    assert [mode(place) for place in (path, path.parent, path.parent.parent)] == [0o600, 0o700, 0o700]
    assert list(path.parent.iterdir()) == [path]
    assert files.read_secret(path) == b"2"


def test_a_secret_is_never_open_to_others_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    fsync = os.fsync

    def look(descriptor: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    (tmp_path / "secret.new").touch(0o666)
    (tmp_path / "secret.new").chmod(0o666)  # left by a crash
    monkeypatch.setattr(os, "fsync", look)
    files.write_secret(tmp_path / "secret", b"x")
    assert modes[0] == 0o600


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o601, 0o660])
def test_a_secret_that_others_may_use_is_refused_with_the_remedy(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "키"
    path.write_bytes(b"x")
    path.chmod(bits)
    with pytest.raises(FolderError, match=r"chmod 600 '.*키'"):
        files.check_private(path)
    path.chmod(0o600)
    files.check_private(path)
    tmp_path.chmod(0o750)
    with pytest.raises(FolderError, match="chmod 700"):
        files.check_private(tmp_path)
    with pytest.raises(FolderError, match="backup"):
        files.check_private(tmp_path / "gone")


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "Free some space"), (errno.EACCES, "permissions")])
@pytest.mark.parametrize("step", ["touch", "open", "replace", "fsync", "mkdir"])
def test_a_write_that_fails_leaves_the_old_file_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, remedy: str
) -> None:
    path = tmp_path / "keys" / "secret"
    if step != "mkdir":
        files.write_secret(path, b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os if step == "fsync" else Path, step, fail)
        with pytest.raises(FolderError, match=remedy):
            files.write_secret(path, b"new")
    if step != "mkdir":
        assert path.read_bytes() == b"old"
        assert list(path.parent.iterdir()) == [path]
    files.write_secret(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_new_folder_appears_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "site"

    def fill_half() -> None:
        with files.new_folder(folder) as place:
            files.write_secret(place / "keys" / "x", b"x")
            files.write_secret(place / "keys" / "x" / "y", b"a file is no folder")

    with pytest.raises(FolderError):
        fill_half()
    assert not folder.exists()
    assert list(folder.parent.iterdir()) == []
    folder.mkdir()  # empty: nothing is lost
    with files.new_folder(folder) as place:
        files.write_secret(place / "keys" / "x", b"x")
    assert (folder / "keys" / "x").read_bytes() == b"x"
    assert mode(folder) == 0o700
    for taken in (folder, folder / "keys" / "x"):
        with pytest.raises(FolderError, match="not empty"), files.new_folder(taken):
            pytest.fail("was given")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FolderError), files.new_folder(tmp_path / "link"):
        pytest.fail("was given")


def test_two_commands_do_not_change_a_folder_at_once(tmp_path: Path) -> None:
    with files.locked(tmp_path), pytest.raises(FolderError, match="another command"), files.locked(tmp_path):
        pytest.fail("was given")
    with files.locked(tmp_path):
        pass
    with pytest.raises(FolderError), files.locked(tmp_path / "gone"):
        pytest.fail("was given")


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_mean_what_they_look_like(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        "a: 1e-5\nb: 8\nc: no\nd: 2026-01-01\ne: null\nf: true\ng: 1:30\nh: 010\n이름: 서울\ni: -.5e3\nj: [a, 'b']",
        "utf-8-sig",
    )
    assert settings_file.read_settings(path) == {
        "a": 1e-5, "b": 8, "c": "no", "d": "2026-01-01", "e": None, "f": True, "g": "1:30", "h": "010", "이름": "서울",
        "i": -500.0, "j": ["a", "b"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: 1\nb: 2\na: 3", "line 1.*a is given twice"), ("a: [1\nb", "line 2"), ("[1]", "list"), ("", "NoneType"),
     ("1: 2", "expected lines"), ("a: !!python/name:os.system", "line 1"), ("a: &x [*x]", "line 1"),
     ("a: \x00", "YAML"),
     ("? [1]\n: 2", "YAML"), ("\t- a", "line 1")],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused_with_their_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=said):
        settings_file.read_settings(path)


def test_settings_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        settings_file.read_settings(tmp_path / "site.yaml")
    (tmp_path / "big").write_bytes(b" " * (2 << 20))
    with pytest.raises(FolderError, match="larger"):
        settings_file.read_settings(tmp_path / "big")
    with pytest.raises(FolderError, match="Check the path"):
        settings_file.read_settings(tmp_path / "gone")


@given(st.text(max_size=60))
def test_hostile_settings_raise_one_type_of_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(settings_file.read_settings(path), dict)
    except ConfigError:
        return


def test_a_document_is_json_that_people_can_read() -> None:
    assert json.loads(REQUEST.sign(SITE))["site"] == "서울-강남"
