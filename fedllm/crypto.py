"""Identities, key agreement, signed and sealed bytes, certificates: the only importer of `cryptography`.

A party (a site, or head office) has one `Identity`: an Ed25519 key that signs and an X25519 key that others seal to.
Everything here raises CryptoError, and nothing else, on keys or bytes that are not what they should be.
"""

import hashlib
import ipaddress
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import FormatError, VerificationError
from securesystemslib.signer import Key, Signature, Signer, SSlibKey  # type: ignore[attr-defined]

from fedllm.canonical import canonical_json
from fedllm.errors import CryptoError
from fedllm.files import read_secret, write_secret

_SEAL_MAGIC = b"FLS1"
_SEAL_INFO = b"fedllm sealed message v1"
_SIGNED_SEAL, _SIGNED_DOCUMENT = b"fedllm signature in a sealed message v1", b"fedllm signed document v1"
_KEY, _SIGNATURE, _TAG = 32, 64, 16  # bytes
_RAW = serialization.Encoding.Raw, serialization.PublicFormat.Raw
_SPKI = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
_BLOCK = 1 << 16  # bytes of a mask that are made at a time: they stay in the processor's cache
_BACKDATE = timedelta(minutes=5)  # so that a new certificate is valid where the clock is a little behind


# ---- identities ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PublicIdentity:
    """What others know of a party."""

    signing: bytes  # Ed25519, 32 bytes
    sealing: bytes  # X25519, 32 bytes

    def __post_init__(self) -> None:
        if len(self.signing) != _KEY or len(self.sealing) != _KEY:
            raise CryptoError(f"an identity has two keys of {_KEY} bytes")

    @property
    def fingerprint(self) -> str:
        """The first 160 bits of SHA-256 over both keys, in ten groups that can be read out on the telephone."""
        digest = hashlib.sha256(b"fedllm identity v1" + self.signing + self.sealing).hexdigest()[:40]
        return "-".join(digest[i : i + 4] for i in range(0, 40, 4))

    def to_text(self) -> str:
        """Return both keys in hexadecimal."""
        return (self.signing + self.sealing).hex()

    @classmethod
    def from_text(cls, text: str) -> "PublicIdentity":
        """Read what `to_text` wrote."""
        try:
            keys = bytes.fromhex(text)
        except (ValueError, TypeError):
            raise CryptoError("a public identity is 128 hexadecimal digits") from None
        return cls(keys[:_KEY], keys[_KEY:])

    def verify(self, document: bytes, signature: bytes) -> None:
        """Raise CryptoError unless this party signed `document`."""
        _verify(self.signing, signature, self.signed_part(document))

    def signed_part(self, document: bytes) -> bytes:
        """Return what this party signs of a document: with both its keys, so that neither can be exchanged."""
        return _SIGNED_DOCUMENT + self.signing + self.sealing + document


class Identity:
    """A party's private keys."""

    def __init__(self, signing: Ed25519PrivateKey, sealing: X25519PrivateKey) -> None:
        self._signing, self._sealing = signing, sealing
        self.public = PublicIdentity(signing.public_key().public_bytes(*_RAW), sealing.public_key().public_bytes(*_RAW))

    @classmethod
    def generate(cls) -> "Identity":
        """Make new keys from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate(), X25519PrivateKey.generate())

    def to_bytes(self) -> bytes:
        """Return the private keys; they belong in a file of mode 0600."""
        return (self._signing.private_bytes_raw() + self._sealing.private_bytes_raw()).hex().encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> "Identity":
        """Read what `to_bytes` wrote."""
        try:
            keys = bytes.fromhex(data.decode("ascii").strip())
            if len(keys) != 2 * _KEY:
                raise ValueError
        except ValueError:
            raise CryptoError("not an identity file. Restore it from a backup, or make new keys.") from None
        return cls(Ed25519PrivateKey.from_private_bytes(keys[:_KEY]), X25519PrivateKey.from_private_bytes(keys[_KEY:]))

    @classmethod
    def read(cls, path: Path) -> "Identity":
        """Read a file that only its owner may use; raises CryptoError with its path, and FolderError."""
        try:
            return cls.from_bytes(read_secret(path))
        except CryptoError as error:
            raise CryptoError(f"{path}: {error}") from None

    @classmethod
    def kept(cls, path: Path) -> "Identity":
        """Read a file that is made, with new keys, on first use."""
        if not path.exists():
            write_secret(path, cls.generate().to_bytes())
        return cls.read(path)

    def sign(self, document: bytes) -> bytes:
        """Return a signature of 64 bytes over a document."""
        return self._signing.sign(self.public.signed_part(document))

    def seal(self, plaintext: bytes, receiver: PublicIdentity) -> bytes:
        """Sign `plaintext` for `receiver` and encrypt both to it.

        A fresh X25519 key per message, HKDF-SHA256 over its shared secret with all public keys as context, and
        ChaCha20-Poly1305; the key is used once, so the nonce is constant. The signature covers the receiver and the
        fresh key, so that a receiver cannot pass it on as meant for somebody else, and lies inside the encryption, so
        that outsiders do not learn the sender from it.
        """
        ephemeral = X25519PrivateKey.generate()
        public = ephemeral.public_key().public_bytes(*_RAW)
        signature = self._signing.sign(_signed_part(public, receiver, plaintext))
        key = _key(_exchange(ephemeral, receiver.sealing), public, receiver)
        return _SEAL_MAGIC + public + ChaCha20Poly1305(key).encrypt(bytes(12), signature + plaintext, _SEAL_MAGIC)

    def open(self, sealed: bytes, senders: Sequence[PublicIdentity]) -> tuple[bytes, PublicIdentity]:
        """Decrypt what was sealed to this identity and tell which of `senders` signed it.

        Raises CryptoError where none of them did.
        """
        head = len(_SEAL_MAGIC) + _KEY
        if not sealed.startswith(_SEAL_MAGIC) or len(sealed) < head + _TAG + _SIGNATURE:
            raise CryptoError("not a sealed message. Do both ends run the same version?")
        public = sealed[len(_SEAL_MAGIC) : head]
        key = _key(_exchange(self._sealing, public), public, self.public)
        try:
            opened = ChaCha20Poly1305(key).decrypt(bytes(12), memoryview(sealed)[head:], _SEAL_MAGIC)
        except InvalidTag:
            raise CryptoError("a sealed message was altered, or is meant for somebody else") from None
        signature, plaintext = opened[:_SIGNATURE], opened[_SIGNATURE:]
        signed = _signed_part(public, self.public, plaintext)
        for sender in senders:
            try:
                _verify(sender.signing, signature, signed)
            except CryptoError:
                continue
            return plaintext, sender
        raise CryptoError("a sealed message was not signed by anyone who may send here")


def _signed_part(ephemeral: bytes, receiver: PublicIdentity, plaintext: bytes) -> bytes:
    return (
        _SIGNED_SEAL + ephemeral + receiver.signing + receiver.sealing + hashlib.sha256(plaintext).digest()
    )  # fixed lengths, so that no two contexts read the same


def _key(shared: bytes, ephemeral: bytes, receiver: PublicIdentity) -> bytes:
    info = _SEAL_INFO + ephemeral + receiver.signing + receiver.sealing
    return HKDF(hashes.SHA256(), _KEY, salt=None, info=info).derive(shared)


def _exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # a point of small order: the secret would be the same for everyone
        raise CryptoError("a key of small order, which protects nothing") from None


def _verify(key: bytes, signature: bytes, data: bytes) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (InvalidSignature, ValueError):
        raise CryptoError("the signature is not of this party") from None


# ---- key agreement, one-time sealing and mask streams: what secure aggregation is made of ----------------------------


def random_bytes(n: int) -> bytes:
    """Return `n` bytes of the operating system's CSPRNG: every secret of secure aggregation comes from here."""
    return os.urandom(n)


class AgreementKey:
    """A private X25519 key (RFC 7748)."""

    def __init__(self, private: bytes) -> None:
        if len(private) != _KEY:
            raise CryptoError(f"an agreement key has {_KEY} bytes, found {len(private)}")
        self._private = X25519PrivateKey.from_private_bytes(private)
        self.public = self._private.public_key().public_bytes(*_RAW)

    @classmethod
    def generate(cls) -> "AgreementKey":
        """Make a new key."""
        return cls(random_bytes(_KEY))

    @property
    def scalar(self) -> int:
        """The number that the key multiplies with: between 2^254 and 2^255 (RFC 7748, section 5)."""
        number = int.from_bytes(self._private.private_bytes_raw(), "little")
        return (number & (2**254 - 8)) | 2**254

    @classmethod
    def from_scalar(cls, scalar: int) -> "AgreementKey":
        """Return the key whose `scalar` this is; raises CryptoError where there is none.

        Numbers that differ in the bits which RFC 7748 fixes would give the same key: only one of them is taken.
        """
        if not 2**254 <= scalar < 2**255 or scalar % 8:
            raise CryptoError("this number is no private X25519 key")
        return cls(scalar.to_bytes(_KEY, "little"))

    def agree(self, public: bytes) -> bytes:
        """Return the 32 bytes that both ends alone know; raises CryptoError on a point that would give them away."""
        return _exchange(self._private, public)


def check_agreement(public: bytes) -> None:
    """Raise CryptoError unless agreeing with this X25519 key gives a secret."""
    _exchange(X25519PrivateKey.generate(), public)


def derive(secret: bytes, info: bytes) -> bytes:
    """Return a key of 32 bytes for one purpose: HKDF-SHA256 (RFC 5869)."""
    return HKDF(hashes.SHA256(), _KEY, salt=None, info=info).derive(secret)


def seal_once(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """Encrypt with a key that is used for nothing else, hence the constant nonce; 16 bytes longer."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), plaintext, associated)


def open_once(key: bytes, sealed: bytes, associated: bytes) -> bytes:
    """Decrypt what `seal_once` gave; raises CryptoError where anything differs."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, associated)
    except InvalidTag:
        raise CryptoError("sealed bytes were altered, or are meant for another place") from None


def keystream(key: bytes, size: int) -> Iterator[memoryview]:
    """Yield `size` pseudo-random bytes in blocks: AES-256-CTR from zero, for a key that is used for nothing else.

    A block is overwritten by the next one. AES rather than ChaCha20: a little faster where the processor has it.
    """
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    zeros, block = memoryview(bytes(_BLOCK)), bytearray(_BLOCK + 15)  # OpenSSL asks for a cipher block more
    for start in range(0, size, _BLOCK):
        n = min(_BLOCK, size - start)
        stream.update_into(zeros[:n], block)
        yield memoryview(block)[:n]


# ---- signed documents: join requests and grants ----------------------------------------------------------------------


def sign_document(content: dict[str, Any], *signers: Identity) -> bytes:
    """Return `content` as readable JSON with the signatures of `signers` over its canonical form."""
    body = canonical_json(content)
    signatures = {signer.public.to_text(): signer.sign(body).hex() for signer in signers}
    return json.dumps({**content, "signatures": signatures}, indent=2, ensure_ascii=False).encode() + b"\n"


def open_document(data: bytes) -> tuple[dict[str, Any], list[PublicIdentity]]:
    """Return the content of a signed document and who signed it; every signature in it is checked.

    Whether the signers are the right ones is for the caller to decide.
    """
    try:
        content = json.loads(data.decode())
        signatures = content.pop("signatures")
        body = canonical_json(content)
        pairs = [(PublicIdentity.from_text(who), bytes.fromhex(what)) for who, what in signatures.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CryptoError("not a signed document, or it was cut or altered on its way. Ask for it again.") from None
    for who, signature in pairs:
        try:
            who.verify(body, signature)
        except CryptoError:
            raise CryptoError("a signed document was altered: its signature does not fit. Ask for it again.") from None
    return content, [who for who, _ in pairs]


# ---- DSSE envelopes: entries of ledgers and run records --------------------------------------------------------------


class _Signer(Signer):
    """An identity as securesystemslib asks for it; the key's id is the whole public identity."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri: str, public_key: Key, secrets_handler: Any = None) -> "_Signer":
        """Refuse: identities come from their own files."""
        raise NotImplementedError

    @property
    def public_key(self) -> Key:
        """The public key in securesystemslib's form."""
        return _dsse_key(self._identity.public)

    def sign(self, payload: bytes) -> Signature:
        """Sign DSSE's pre-authentication encoding."""
        return Signature(self._identity.public.to_text(), self._identity._signing.sign(payload).hex())


def _dsse_key(identity: PublicIdentity) -> Key:
    return SSlibKey(identity.to_text(), "ed25519", "ed25519", {"public": identity.signing.hex()})


def sign_envelope(payload: bytes, payload_type: str, identity: Identity) -> str:
    """Return a DSSE envelope (https://github.com/secure-systems-lab/dsse) with one signature, as one line of JSON."""
    envelope = Envelope(payload, payload_type, {})
    envelope.sign(_Signer(identity))
    return _as_line(envelope)


def _as_line(envelope: Envelope) -> str:
    return json.dumps(envelope.to_dict(), separators=(",", ":"))


def open_envelope(text: str, payload_type: str) -> tuple[bytes, PublicIdentity]:
    """Return the payload of a DSSE envelope of the expected type, and the one identity that signed it.

    Whether that identity is the right one is for the caller to decide. DSSE does not sign the key's id, and so not
    the identity's sealing key: where that matters, the payload has to name the signer.
    """
    try:
        envelope = Envelope.from_dict(json.loads(text))
        (who,) = envelope.signatures
        signer = PublicIdentity.from_text(who)
        envelope.verify([_dsse_key(signer)], 1)
        right = text == _as_line(envelope) and who == signer.to_text()
    except VerificationError:
        raise CryptoError("the signature does not fit the content") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FormatError):
        raise CryptoError("not a signed envelope") from None
    if not right:  # the same content, but not byte for byte what was signed: somebody wrote it anew
        raise CryptoError("not in the form in which it was signed")
    if envelope.payload_type != payload_type:
        raise CryptoError(f"an envelope of another kind: {envelope.payload_type[:80]}")
    return envelope.payload, signer


# ---- certificates ----------------------------------------------------------------------------------------------------


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
    """Return a certificate, PEM, for a site's key: as a client or, where `hosts` are given, to serve at these."""
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

    Keys without a certificate are passed over. Raises CryptoError where there is no certificate, or one without a key.
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
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise CryptoError(f"not a PEM certificate ({error})") from None
    return [_facts(certificate) for certificate in found]


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
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise CryptoError(f"not a PEM certificate ({error})") from None


def _load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CryptoError(f"not a private key in PEM ({error}). Restore it from a backup.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CryptoError("expected an elliptic curve key. Restore it from a backup.")
    return key
