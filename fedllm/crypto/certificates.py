"""X.509 certificates of the federation's own authority, for the server and the sites."""

import ipaddress
import re
import secrets
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm.errors import CryptoError

_SPKI = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
_BACKDATE = timedelta(minutes=5)  # so that a new certificate is valid if another clock is a little behind


@dataclass(frozen=True)
class Certificate:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


def make_ca(name: str, days: int) -> Certificate:
    """Make a certificate authority: P-384, self-signed, with no authority below it."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _subject(name)
    builder = (
        _certificate(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    certificate = builder.sign(key, hashes.SHA384())
    return Certificate(certificate.public_bytes(serialization.Encoding.PEM), _pem(key))


def make_server_certificate(ca: Certificate, hosts: Sequence[str], days: int) -> Certificate:
    """Make a TLS server certificate for `hosts`, names or addresses; it never outlives its authority."""
    key = ec.generate_private_key(ec.SECP384R1())
    made = _issue(ca, hosts[0], key.public_key(), days, ExtendedKeyUsageOID.SERVER_AUTH, hosts)
    return Certificate(made.public_bytes(serialization.Encoding.PEM), _pem(key))


def _issue(
    ca: Certificate, name: str, key: ec.EllipticCurvePublicKey, days: int, use: x509.ObjectIdentifier,
    hosts: Sequence[str],
) -> x509.Certificate:  # fmt: skip
    authority, authority_key = _load(ca.certificate), _load_key(ca.key)
    subject = _subject(name)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    builder = (
        _certificate(subject, authority.subject, key, days, authority.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(identifier, critical=False)
    )
    if hosts:
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(authority_key, hashes.SHA384())


def make_key() -> bytes:
    """Make a private key for TLS: P-384, PEM."""
    return _pem(ec.generate_private_key(ec.SECP384R1()))


def key_line(private: bytes) -> str:
    """Return the public half of a private key for TLS, PEM, as one line; raises CryptoError."""
    return _line(_load_key(private).public_key())


def certified_key(certificate: bytes) -> str:
    """Return the key that a certificate is for, PEM, as one line; raises CryptoError."""
    key = _load(certificate).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise CryptoError("expected a certificate of an elliptic curve key")
    return _line(key)


def check_key_line(line: str) -> None:
    """Raise CryptoError unless this is the one form of the public half of a P-384 key."""
    _load_line(line)


def certify(ca: Certificate, line: str, site: str, days: int, hosts: Sequence[str] | None = None) -> bytes:
    """Return a certificate, PEM, for a site's key: as a client or, if `hosts` are given, to serve at these."""
    key = _load_line(line)
    use = ExtendedKeyUsageOID.CLIENT_AUTH if hosts is None else ExtendedKeyUsageOID.SERVER_AUTH
    return _issue(ca, site, key, days, use, hosts or ()).public_bytes(serialization.Encoding.PEM)


def _line(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def _load_line(line: str) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_ssh_public_key(line.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1) or _line(key) != line:
        raise CryptoError("a key for TLS is one line of two words: ecdsa-sha2-nistp384 and the key")
    return key


def read_pairs(certificates: bytes, keys: bytes) -> list[Certificate]:
    """Return every certificate of a PEM file, in order, with its private key out of another (or the same) file.

    Keys without a certificate are passed over. Raises CryptoError if there is no certificate, or one without a key.
    """
    private = {_load_key(block).public_key().public_bytes(*_SPKI): block for block in _blocks(keys, b"PRIVATE KEY")}
    pairs = []
    for block in _blocks(certificates, b"CERTIFICATE"):
        key = private.get(_public_key(_load(block)))
        if key is None:
            raise CryptoError("a certificate has no private key beside it. Restore the key from a backup.")
        pairs.append(Certificate(block, key))
    if not pairs:
        raise CryptoError("there is no PEM certificate here. Restore it from a backup.")
    return pairs


def _blocks(pem: bytes, kind: bytes) -> list[bytes]:
    pattern = rb"-----BEGIN ([A-Z ]+)-----\s.*?-----END \1-----"
    return [found.group(0) + b"\n" for found in re.finditer(pattern, pem, re.DOTALL) if found.group(1).endswith(kind)]


def _public_key(certificate: x509.Certificate) -> bytes:
    try:
        return certificate.public_key().public_bytes(*_SPKI)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CryptoError(f"a certificate with an unusable public key ({error})") from None


@dataclass(frozen=True)
class CertificateFacts:
    """What an operator asks of a certificate."""

    subject: str
    hosts: tuple[str, ...]
    begins: datetime  # UTC
    ends: datetime  # UTC
    fingerprint: str  # SHA-256, hex


def read_certificates(pem: bytes) -> list[CertificateFacts]:
    """Return the facts of every certificate in a PEM file."""
    return [_facts(certificate) for certificate in _parsed(pem)]


def _parsed(pem: bytes) -> list[x509.Certificate]:
    """Return the certificates of a PEM file; raises CryptoError also for what the library only warns of so far."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CryptographyDeprecationWarning)  # a serial number below 1: RFC 5280 has none
        try:
            return x509.load_pem_x509_certificates(pem)
        except (ValueError, CryptographyDeprecationWarning) as error:
            raise CryptoError(f"not a PEM certificate ({error})") from None


def issued_by(pem: bytes, authorities: Sequence[bytes]) -> int:
    """Return which of `authorities`, each one PEM certificate, issued a certificate; raises CryptoError if none did."""
    certificate = _load(pem)
    for number, authority in enumerate(authorities):
        try:
            certificate.verify_directly_issued_by(_load(authority))
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            continue
        return number
    raise CryptoError("the server certificate was not issued by this federation's authority")


def _facts(certificate: x509.Certificate) -> CertificateFacts:
    try:
        try:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            hosts = tuple(str(name.value) for name in names)
        except x509.ExtensionNotFound:
            hosts = ()
        return CertificateFacts(
            subject=certificate.subject.rfc4514_string(),
            hosts=hosts,
            begins=certificate.not_valid_before_utc,
            ends=certificate.not_valid_after_utc,
            fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        )
    except (  # what a malformed certificate makes the parser raise, which reads it bit by bit
        ValueError, KeyError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, UnsupportedAlgorithm,
    ) as error:  # fmt: skip
        raise CryptoError(f"a certificate that cannot be read ({error!r})") from None


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int, latest: datetime | None = None
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    ends = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(int.from_bytes(secrets.token_bytes(19), "big") + 1)
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(min(ends, latest) if latest is not None else ends)
    )


def _subject(name: str) -> x509.Name:
    """Return a common name: at most 64 bytes (RFC 5280 counts signs, and those who read it count bytes)."""
    short = name.encode()[:64].decode(errors="ignore")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, short)])


def _usage(**allowed: bool) -> x509.KeyUsage:
    none = dict.fromkeys(
        (
            "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
            "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
        ),
        False,
    )  # fmt: skip
    return x509.KeyUsage(**{**none, **allowed})


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("idna").decode("ascii"))
    except UnicodeError:
        raise CryptoError(f"{host!r} is neither the name nor the address of a host") from None


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load(pem: bytes) -> x509.Certificate:
    return _parsed(pem)[0]


def _load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CryptoError(f"not a private key in PEM ({error}). Restore it from a backup.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CryptoError("expected an elliptic curve key. Restore it from a backup.")
    return key
