"""The identity of a site or the server: an Ed25519 key that signs and an X25519 key that messages are sealed to."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedllm.crypto.primitives import KEY, RAW, SIGNATURE, TAG, derive, exchange
from fedllm.errors import CryptoError
from fedllm.files import read_secret, write_secret

_SEAL_MAGIC = b"FLS1"
_SEAL_INFO = b"fedllm sealed message v1"
_SIGNED_SEAL, _SIGNED_DOCUMENT = b"fedllm signature in a sealed message v1", b"fedllm signed document v1"


@dataclass(frozen=True)
class PublicIdentity:
    """What others know of a party."""

    signing: bytes  # Ed25519, 32 bytes
    sealing: bytes  # X25519, 32 bytes

    def __post_init__(self) -> None:
        if len(self.signing) != KEY or len(self.sealing) != KEY:
            raise CryptoError(f"an identity has two keys of {KEY} bytes")

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
        return cls(keys[:KEY], keys[KEY:])

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
        self.public = PublicIdentity(signing.public_key().public_bytes(*RAW), sealing.public_key().public_bytes(*RAW))

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
            if len(keys) != 2 * KEY:
                raise ValueError
        except ValueError:
            raise CryptoError("not an identity file. Restore it from a backup, or make new keys.") from None
        return cls(Ed25519PrivateKey.from_private_bytes(keys[:KEY]), X25519PrivateKey.from_private_bytes(keys[KEY:]))

    @classmethod
    def read(cls, path: Path) -> "Identity":
        """Read a file that only its owner may use; raises CryptoError with its path, and FolderError."""
        try:
            return cls.from_bytes(read_secret(path))
        except CryptoError as error:
            raise CryptoError(f"{path}: {error}") from None

    @classmethod
    def load_or_create(cls, path: Path) -> "Identity":
        """Read a file that is made, with new keys, on first use."""
        if not path.exists():
            write_secret(path, cls.generate().to_bytes())
        return cls.read(path)

    def sign(self, document: bytes) -> bytes:
        """Return a signature of 64 bytes over a document."""
        return self._signing.sign(self.public.signed_part(document))

    def seal(self, plaintext: bytes, receiver: PublicIdentity, seed: bytes | None = None) -> bytes:
        """Sign `plaintext` for `receiver` and encrypt both to it.

        A fresh X25519 key per message, HKDF-SHA256 over its shared secret with all public keys as context, and
        ChaCha20-Poly1305; the key is used once, so the nonce is constant. The signature covers the receiver and the
        fresh key, so that a receiver cannot pass it on as meant for somebody else, and lies inside the encryption, so
        that outsiders do not learn the sender from it.

        With a secret random `seed` of 32 bytes the same plaintext gives the same bytes to the same receiver: the fresh
        key is then derived from the seed, the receiver and the plaintext, so that no key ever meets two plaintexts.
        """
        digest = hashlib.sha256(plaintext).digest()
        ephemeral = X25519PrivateKey.generate() if seed is None else _derived(seed, receiver, digest)
        public = ephemeral.public_key().public_bytes(*RAW)
        signature = self._signing.sign(_signed_part(public, receiver, digest))
        key = _key(exchange(ephemeral, receiver.sealing), public, receiver)
        return _SEAL_MAGIC + public + ChaCha20Poly1305(key).encrypt(bytes(12), signature + plaintext, _SEAL_MAGIC)

    def open(self, sealed: bytes, senders: Sequence[PublicIdentity]) -> tuple[bytes, PublicIdentity]:
        """Decrypt what was sealed to this identity and tell which of `senders` signed it.

        Raises CryptoError if none of them did.
        """
        head = len(_SEAL_MAGIC) + KEY
        if not sealed.startswith(_SEAL_MAGIC) or len(sealed) < head + TAG + SIGNATURE:
            raise CryptoError("not a sealed message. Do both ends run the same version?")
        public = sealed[len(_SEAL_MAGIC) : head]
        key = _key(exchange(self._sealing, public), public, self.public)
        try:
            opened = ChaCha20Poly1305(key).decrypt(bytes(12), memoryview(sealed)[head:], _SEAL_MAGIC)
        except InvalidTag:
            raise CryptoError("a sealed message was altered, or is meant for somebody else") from None
        signature, plaintext = opened[:SIGNATURE], opened[SIGNATURE:]
        signed = _signed_part(public, self.public, hashlib.sha256(plaintext).digest())
        for sender in senders:
            try:
                _verify(sender.signing, signature, signed)
            except CryptoError:
                continue
            return plaintext, sender
        raise CryptoError("a sealed message was not signed by anyone who may send here")


def _signed_part(ephemeral: bytes, receiver: PublicIdentity, digest: bytes) -> bytes:
    # fixed lengths, so that no two contexts read the same
    return _SIGNED_SEAL + ephemeral + receiver.signing + receiver.sealing + digest


def _derived(seed: bytes, receiver: PublicIdentity, digest: bytes) -> X25519PrivateKey:
    info = _SEAL_INFO + b" fresh key " + receiver.signing + receiver.sealing + digest
    return X25519PrivateKey.from_private_bytes(derive(seed, info))


def _key(shared: bytes, ephemeral: bytes, receiver: PublicIdentity) -> bytes:
    return derive(shared, _SEAL_INFO + ephemeral + receiver.signing + receiver.sealing)


def _verify(key: bytes, signature: bytes, data: bytes) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (InvalidSignature, ValueError):
        raise CryptoError("the signature is not of this party") from None
