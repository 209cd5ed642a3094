"""Sealed messages, signed documents and certificates: what is altered, forged, passed on or for others is refused."""

import json
import socket
import ssl
import threading
from collections.abc import Callable
from concurrent import futures
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from fedllm.crypto import identity, signed_documents
from fedllm.crypto.certificates import (
    Certificate,
    certified_key,
    certify,
    check_key_line,
    issued_by,
    key_line,
    make_ca,
    make_key,
    make_server_certificate,
    read_certificates,
    read_pairs,
)
from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.errors import CryptoError

SITE, OFFICE, STRANGER = Identity.generate(), Identity.generate(), Identity.generate()
SEALED = SITE.seal("비밀 secret".encode(), OFFICE.public)
DOCUMENT = signed_documents.sign_document({"site": "서울-강남", "numbers": [1, 2.5, None]}, SITE, OFFICE)


# ---- sealed messages -------------------------------------------------------------------------------------------------


@given(st.binary(max_size=4096))
def test_a_sealed_message_is_read_by_its_receiver_who_learns_the_sender(message: bytes) -> None:
    sealed = SITE.seal(message, OFFICE.public)
    assert OFFICE.open(sealed, [STRANGER.public, SITE.public]) == (message, SITE.public)
    if len(message) > 8:
        assert message not in sealed


@pytest.mark.parametrize("place", range(len(SEALED)))
def test_a_sealed_message_that_was_altered_at_any_byte_is_refused(place: int) -> None:
    for bit in (1, 0x80):
        altered = SEALED[:place] + bytes([SEALED[place] ^ bit]) + SEALED[place + 1 :]
        with pytest.raises(CryptoError):
            OFFICE.open(altered, [SITE.public])


@pytest.mark.parametrize("length", [*range(0, len(SEALED), 7), len(SEALED) - 1])
def test_a_sealed_message_that_was_cut_or_grew_is_refused(length: int) -> None:
    for data in (SEALED[:length], SEALED + SEALED[: length + 1]):
        with pytest.raises(CryptoError):
            OFFICE.open(data, [SITE.public])


def test_a_sealed_message_is_closed_to_everyone_but_its_receiver() -> None:
    for other in (SITE, STRANGER):
        with pytest.raises(CryptoError, match="somebody else"):
            other.open(SEALED, [SITE.public])


def test_a_sealed_message_of_a_sender_who_is_not_expected_is_refused() -> None:
    for senders in ([], [OFFICE.public], [STRANGER.public, OFFICE.public]):
        with pytest.raises(CryptoError, match="not signed by anyone"):
            OFFICE.open(SEALED, senders)


def test_a_receiver_cannot_pass_a_message_on_as_meant_for_a_third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    """OFFICE holds SITE's signature and re-encrypts it to STRANGER, under a fresh key or under the very same one."""
    signature = SITE._signing.sign  # what OFFICE could read out of the message it opened
    kept: list[bytes] = []

    class Kept:
        def sign(self, data: bytes) -> bytes:
            kept.append(signature(data))
            return kept[-1]

    original = Identity(SITE._signing, SITE._sealing)
    original._signing = Kept()  # type: ignore[assignment]
    original.seal(b"for the office", OFFICE.public)

    class Replayed:
        def sign(self, _: bytes) -> bytes:
            return kept[0]

    forger = Identity(SITE._signing, SITE._sealing)
    forger._signing = Replayed()  # type: ignore[assignment]
    with pytest.raises(CryptoError, match="not signed"):
        STRANGER.open(forger.seal(b"for the office", STRANGER.public), [SITE.public])
    with pytest.raises(CryptoError, match="not signed"):  # nor to the same receiver, as a message of another time
        OFFICE.open(forger.seal(b"for the office", OFFICE.public), [SITE.public])


def test_the_signature_of_a_document_is_none_of_a_sealed_message() -> None:
    signature = SITE.sign(b"document")
    SITE.public.verify(b"document", signature)
    for document, by in ((b"documenT", SITE.public), (b"document", OFFICE.public), (b"", SITE.public)):
        with pytest.raises(CryptoError):
            by.verify(document, signature)
    with pytest.raises(CryptoError):
        identity._verify(SITE.public.signing, signature, b"document")  # the context is part of what is signed


def test_a_key_of_small_order_protects_nothing_and_is_refused() -> None:
    weak = SEALED[:4] + bytes(32) + SEALED[36:]
    with pytest.raises(CryptoError, match="protects nothing"):
        OFFICE.open(weak, [SITE.public])
    with pytest.raises(CryptoError):
        SITE.seal(b"x", PublicIdentity(SITE.public.signing, bytes(32)))


def test_two_messages_of_one_text_look_nothing_alike() -> None:
    assert len({SITE.seal(b"same", OFFICE.public)[4:36] for _ in range(20)}) == 20


# ---- hostile bytes ---------------------------------------------------------------------------------------------------

READERS: list[Callable[[bytes], object]] = [
    lambda data: OFFICE.open(data, [SITE.public]),
    lambda data: OFFICE.open(b"FLS1" + data, [SITE.public]),
    Identity.from_bytes,
    signed_documents.open_document,
    lambda data: PublicIdentity.from_text(data.decode("latin-1")),
    lambda data: check_key_line(data.decode("latin-1")),
    lambda data: check_key_line("ssh-" + data.decode("latin-1")),
    key_line,
    certified_key,
    read_certificates,
    lambda data: read_pairs(data, data),
]


@given(st.binary(max_size=400), st.sampled_from(READERS))
def test_hostile_bytes_raise_one_type_of_error(data: bytes, reader: Callable[[bytes], object]) -> None:
    with pytest.raises(CryptoError):
        reader(data)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(_JSON, _JSON)
def test_a_hostile_document_raises_one_type_of_error(content: object, signatures: object) -> None:
    for value in (content, {"content": content, "signatures": signatures}):
        if isinstance(value, dict) and value.get("signatures") == {}:
            continue  # signed by nobody, which the caller sees
        with pytest.raises(CryptoError):
            signed_documents.open_document(json.dumps(value).encode())


@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b'{"signatures": {"' + b"0" * 128 + b'": "00"}}', b'{"a": 1e999, "signatures": {}}',
     b'{"a": "\\ud800", "signatures": {}}', b'{"a": NaN, "signatures": {}}', b'{"signatures": {"ab": 1}}',
     b'{"n": ' + b"9" * 5000 + b', "signatures": {}}', "﻿{}".encode(), b"\xff"],
)  # fmt: skip
def test_a_document_made_to_break_a_parser_is_refused(data: bytes) -> None:
    with pytest.raises(CryptoError):
        signed_documents.open_document(data)


@pytest.mark.parametrize("text", ["", "00", "0" * 127, "g" * 128, "0" * 130, "가" * 128, "0" * 64 + "\x00" * 64])
def test_a_public_identity_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(CryptoError):
        PublicIdentity.from_text(text)


@pytest.mark.parametrize(
    "line", ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA==", "ssh-foo AAAA", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp384 x",
             "ecdsa-sha2-nistp256 AAAA", "sk-ssh-ed25519@openssh.com AAAA", "\ud800"]
)  # fmt: skip
def test_a_key_for_tls_of_another_kind_is_refused(line: str) -> None:
    with pytest.raises(CryptoError, match="nistp384"):
        check_key_line(line)
    with pytest.raises(CryptoError, match="nistp384"):
        certify(OLD_CA, line, "a", 9)


# ---- identities and documents ----------------------------------------------------------------------------------------


def test_keys_come_back_from_their_file_and_text() -> None:
    again = Identity.from_bytes(SITE.to_bytes())
    assert again.public == SITE.public == PublicIdentity.from_text(SITE.public.to_text())
    assert again.open(OFFICE.seal(b"x", SITE.public), [OFFICE.public])[0] == b"x"


def test_a_fingerprint_can_be_read_out_and_tells_identities_apart() -> None:
    found = SITE.public.fingerprint
    assert len(found.split("-")) == 10
    assert {len(group) for group in found.split("-")} == {4}
    swapped = PublicIdentity(SITE.public.sealing, SITE.public.signing)
    other = PublicIdentity(SITE.public.signing, OFFICE.public.sealing)
    assert len({found, swapped.fingerprint, other.fingerprint, OFFICE.public.fingerprint}) == 4


def test_a_document_names_its_signers_and_can_be_read_by_people() -> None:
    content, signers = signed_documents.open_document(DOCUMENT)
    assert content == {"site": "서울-강남", "numbers": [1, 2.5, None]}
    assert set(signers) == {SITE.public, OFFICE.public}
    assert "서울-강남" in DOCUMENT.decode()


def test_a_document_altered_at_any_byte_says_nothing_new() -> None:
    """White space may differ; what is said, and by whom, may not."""
    said = signed_documents.open_document(DOCUMENT)
    for place in range(len(DOCUMENT)):
        altered = DOCUMENT[:place] + bytes([DOCUMENT[place] ^ 1]) + DOCUMENT[place + 1 :]
        try:
            content, signers = signed_documents.open_document(altered)
        except CryptoError:
            continue
        assert content == said[0]
        assert set(signers) <= set(said[1])


def test_a_signature_is_not_moved_to_another_document_or_name() -> None:
    other = json.loads(signed_documents.sign_document({"site": "부산"}, SITE))
    stolen = {**other, "signatures": json.loads(DOCUMENT)["signatures"]}
    swapped = json.loads(DOCUMENT)
    swapped["signatures"] = {STRANGER.public.to_text(): next(iter(swapped["signatures"].values()))}
    for value in (stolen, swapped):
        with pytest.raises(CryptoError, match="does not fit"):
            signed_documents.open_document(json.dumps(value).encode())


def test_a_key_for_tls_goes_with_its_public_line() -> None:
    key = make_key()
    line = key_line(key)
    assert line.startswith("ecdsa-sha2-nistp384 ")
    check_key_line(line)
    assert line != key_line(make_key())


# ---- certificates ----------------------------------------------------------------------------------------------------

OLD_CA, NEW_CA, OTHER_CA = (make_ca("한국 federation", 30) for _ in range(3))  # one name, three keys
HOSTS = ("127.0.0.1", "localhost", "head.example.com")
OLD_SERVER, NEW_SERVER = (make_server_certificate(ca, HOSTS, 9) for ca in (OLD_CA, NEW_CA))


def shake_hands(folder: Path, server: Certificate, trusted: bytes, host: str, newest: ssl.TLSVersion) -> str | None:
    """Return the version of TLS that client and server agree on, over a socket on loopback."""
    one_file = folder / "server.pem"
    one_file.write_bytes(server.certificate + server.key)
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.minimum_version = ssl.TLSVersion.TLSv1_3
    theirs.load_cert_chain(one_file)
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ours.verify_flags |= ssl.VERIFY_X509_STRICT
    ours.maximum_version = newest
    ours.load_verify_locations(cadata=trusted.decode())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(20)

        def serve() -> None:
            try:
                with listening.accept()[0] as plain, theirs.wrap_socket(plain, server_side=True) as secure:
                    secure.sendall(b"x")
            except OSError:
                pass  # the client refused

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listening.getsockname(), timeout=20) as plain,
                ours.wrap_socket(plain, server_hostname=host) as secure,
            ):
                assert secure.recv(1) == b"x"
                return secure.version()
        finally:
            thread.join()


TLS13 = ssl.TLSVersion.TLSv1_3
SITE_KEY = make_key()
AS_CLIENT = certify(OLD_CA, key_line(SITE_KEY), "서울-강남", 9)
AS_SERVER = certify(OLD_CA, key_line(SITE_KEY), "서울-강남", 9, ("127.0.0.1", "llm.seoul.example.com"))


@pytest.mark.parametrize(
    ("certificate", "use", "hosts"),
    [(AS_CLIENT, ExtendedKeyUsageOID.CLIENT_AUTH, ()),
     (AS_SERVER, ExtendedKeyUsageOID.SERVER_AUTH, ("127.0.0.1", "llm.seoul.example.com"))],
)  # fmt: skip
def test_a_sites_certificate_is_for_its_key_its_name_and_one_use(
    certificate: bytes, use: x509.ObjectIdentifier, hosts: tuple[str, ...]
) -> None:
    found = x509.load_pem_x509_certificate(certificate)
    assert [each.value for each in found.subject] == ["서울-강남"]
    assert list(found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [use]
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    facts = read_certificates(certificate)[0]
    assert facts.hosts == hosts
    assert timedelta(days=8) < facts.ends - datetime.now(UTC) <= timedelta(days=9)
    assert certified_key(certificate) == key_line(SITE_KEY)
    assert issued_by(certificate, [NEW_CA.certificate, OLD_CA.certificate]) == 1


def test_a_name_longer_than_a_certificate_takes_is_cut_and_the_key_still_tells_the_site() -> None:
    certificate = certify(OLD_CA, key_line(SITE_KEY), "가" * 66, 9)
    assert [each.value for each in x509.load_pem_x509_certificate(certificate).subject] == ["가" * 21]
    assert certified_key(certificate) == key_line(SITE_KEY)
    assert read_certificates(make_ca("가" * 64, 9).certificate)[0].subject == "CN=" + "가" * 21


def test_a_site_is_no_server_with_its_certificate_as_a_client(tmp_path: Path) -> None:
    serving = Certificate(AS_SERVER, SITE_KEY)
    assert shake_hands(tmp_path, serving, OLD_CA.certificate, "127.0.0.1", TLS13) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):  # purpose, and no name
        shake_hands(tmp_path, Certificate(AS_CLIENT, SITE_KEY), OLD_CA.certificate, "127.0.0.1", TLS13)


@pytest.mark.parametrize(
    ("shown", "believed"), [(AS_CLIENT, True), (AS_SERVER, False), (OLD_SERVER, False), (NEW_SERVER, False)]
)
def test_a_server_takes_a_clients_certificate_for_that_use_and_of_its_authority_alone(
    shown: bytes | Certificate, believed: bool
) -> None:
    pair = shown if isinstance(shown, Certificate) else Certificate(shown, SITE_KEY)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials(
        [(OLD_SERVER.key, OLD_SERVER.certificate)], OLD_CA.certificate, require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    ours = grpc.ssl_channel_credentials(OLD_CA.certificate, pair.key, pair.certificate)
    try:
        with grpc.secure_channel(f"127.0.0.1:{port}", ours) as channel, pytest.raises(grpc.RpcError) as error:
            channel.unary_unary("/x/y")(b"", timeout=20)
        reached = grpc.StatusCode.UNIMPLEMENTED
        assert (error.value.code() is reached) is believed  # type: ignore[attr-defined]
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("host", HOSTS)
def test_a_server_is_believed_under_each_of_its_names_over_tls_1_3(tmp_path: Path, host: str) -> None:
    assert shake_hands(tmp_path, OLD_SERVER, OLD_CA.certificate, host, TLS13) == "TLSv1.3"


def test_while_an_authority_is_replaced_servers_of_both_are_believed(tmp_path: Path) -> None:
    for bundle in (OLD_CA.certificate + NEW_CA.certificate, NEW_CA.certificate + OLD_CA.certificate):
        for server in (OLD_SERVER, NEW_SERVER):
            assert shake_hands(tmp_path, server, bundle, "127.0.0.1", TLS13) == "TLSv1.3"


@pytest.mark.parametrize(
    ("server", "trusted", "host"),
    [(OLD_SERVER, OTHER_CA, "127.0.0.1"), (NEW_SERVER, OLD_CA, "127.0.0.1"), (OLD_SERVER, OLD_CA, "127.0.0.2"),
     (OLD_SERVER, OLD_CA, "evil.example.com"), (OLD_SERVER, OLD_SERVER, "evil.example.com")],
)  # fmt: skip
def test_a_server_of_another_authority_or_name_is_refused(
    tmp_path: Path, server: Certificate, trusted: Certificate, host: str
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, server, trusted.certificate, host, TLS13)


def test_tls_1_2_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"(?i)version|reset|alert"):
        shake_hands(tmp_path, OLD_SERVER, OLD_CA.certificate, "127.0.0.1", ssl.TLSVersion.TLSv1_2)


def test_a_server_certificate_cannot_act_as_an_authority(tmp_path: Path) -> None:
    forged = make_server_certificate(OLD_SERVER, HOSTS, 5)
    chain = Certificate(forged.certificate + OLD_SERVER.certificate, forged.key)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, chain, OLD_CA.certificate, "127.0.0.1", TLS13)


def test_grpc_takes_certificate_and_key_from_one_file_and_a_bundle_of_two_authorities() -> None:
    one_file = NEW_SERVER.certificate + NEW_SERVER.key
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(one_file, one_file)]))
    server.start()
    try:
        for trusted, is_believed in ((OLD_CA.certificate + NEW_CA.certificate, True), (OLD_CA.certificate, False)):
            with grpc.secure_channel(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(trusted)) as channel:
                ready = grpc.channel_ready_future(channel)
                if is_believed:
                    ready.result(timeout=20)
                else:
                    with pytest.raises(grpc.FutureTimeoutError):
                        ready.result(timeout=1)
                    ready.cancel()
    finally:
        server.stop(None).wait()


def test_a_certificate_never_outlives_its_authority_and_states_its_hosts() -> None:
    ca = make_ca("short", 3)
    server = make_server_certificate(ca, ("서울.example.com", "::1"), 90)
    facts, authority = (read_certificates(pair.certificate)[0] for pair in (server, ca))
    assert facts.ends == authority.ends
    assert facts.hosts == ("서울.example.com".encode("idna").decode(), "::1")
    assert facts.fingerprint != authority.fingerprint


def test_every_certificate_is_found_with_its_key_in_any_order() -> None:
    pairs = [OLD_CA, NEW_CA]
    certificates = b"".join(pair.certificate for pair in pairs)
    keys = OTHER_CA.key + NEW_CA.key + OLD_CA.key
    found = read_pairs(certificates, keys)
    assert [pair.key for pair in found] == [pair.key for pair in pairs]
    assert issued_by(NEW_SERVER.certificate, [pair.certificate for pair in found]) == 1
    with pytest.raises(CryptoError, match="no private key"):
        read_pairs(certificates, NEW_CA.key)
    with pytest.raises(CryptoError, match="not issued"):
        issued_by(NEW_SERVER.certificate, [OTHER_CA.certificate, OLD_CA.certificate])


def test_a_certificate_whose_serial_number_is_negative_is_refused() -> None:
    """The library only warns of it so far, and on a screen at that."""
    der = bytearray(ssl.PEM_cert_to_DER_cert(OLD_SERVER.certificate.decode()))
    number = x509.load_pem_x509_certificate(OLD_SERVER.certificate).serial_number
    width = (number.bit_length() + 8) // 8
    der[der.index(number.to_bytes(width, "big"))] |= 0x80
    altered = ssl.DER_cert_to_PEM_cert(bytes(der)).encode()
    for read in (read_certificates, lambda data: read_pairs(data, OLD_SERVER.key)):
        with pytest.raises(CryptoError, match="serial number"):
            read(altered)


def test_a_certificate_altered_at_any_byte_raises_one_type_of_error() -> None:
    pem = OLD_SERVER.certificate
    for place in range(len(pem)):
        altered = pem[:place] + bytes([pem[place] ^ 1]) + pem[place + 1 :]
        for read in (read_certificates, lambda data: read_pairs(data, OLD_SERVER.key)):
            try:
                read(altered)
            except CryptoError:
                continue
