"""Primitives of secure aggregation: X25519 key agreement, HKDF, one-time sealing, and the mask stream (AES-CTR)."""

import os
from collections.abc import Iterator

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedllm.errors import CryptoError

KEY, SIGNATURE, TAG = 32, 64, 16  # bytes
RAW = serialization.Encoding.Raw, serialization.PublicFormat.Raw
_BLOCK = 1 << 16  # bytes of a mask that are made at a time: they stay in the processor's cache


def exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # a point of small order: the secret would be the same for everyone
        raise CryptoError("a key of small order, which protects nothing") from None


# ---- key agreement, one-time sealing and mask streams: what secure aggregation is made of ----------------------------


def random_bytes(n: int) -> bytes:
    """Return `n` bytes of the operating system's CSPRNG: every secret of secure aggregation comes from here."""
    return os.urandom(n)


class AgreementKey:
    """A private X25519 key (RFC 7748)."""

    def __init__(self, private: bytes) -> None:
        if len(private) != KEY:
            raise CryptoError(f"an agreement key has {KEY} bytes, found {len(private)}")
        self._private = X25519PrivateKey.from_private_bytes(private)
        self.public = self._private.public_key().public_bytes(*RAW)

    @classmethod
    def generate(cls) -> "AgreementKey":
        """Make a new key."""
        return cls(random_bytes(KEY))

    @property
    def scalar(self) -> int:
        """The number that the key multiplies with: between 2^254 and 2^255 (RFC 7748, section 5)."""
        number = int.from_bytes(self._private.private_bytes_raw(), "little")
        return (number & (2**254 - 8)) | 2**254

    @classmethod
    def from_scalar(cls, scalar: int) -> "AgreementKey":
        """Return the key whose `scalar` this is; raises CryptoError if there is none.

        Numbers that differ in the bits which RFC 7748 fixes would give the same key: only one of them is taken.
        """
        if not 2**254 <= scalar < 2**255 or scalar % 8:
            raise CryptoError("this number is no private X25519 key")
        return cls(scalar.to_bytes(KEY, "little"))

    def agree(self, public: bytes) -> bytes:
        """Return the 32 bytes that both ends alone know; raises CryptoError on a point that would give them away."""
        return exchange(self._private, public)


def check_agreement(public: bytes) -> None:
    """Raise CryptoError unless agreeing with this X25519 key gives a secret."""
    exchange(X25519PrivateKey.generate(), public)


def derive(secret: bytes, info: bytes) -> bytes:
    """Return a key of 32 bytes for one purpose: HKDF-SHA256 (RFC 5869)."""
    return HKDF(hashes.SHA256(), KEY, salt=None, info=info).derive(secret)


def seal_once(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """Encrypt with a key that is used for nothing else, hence the constant nonce; 16 bytes longer."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), plaintext, associated)


def open_once(key: bytes, sealed: bytes, associated: bytes) -> bytes:
    """Decrypt what `seal_once` gave; raises CryptoError if anything differs."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, associated)
    except InvalidTag:
        raise CryptoError("sealed bytes were altered, or are meant for another place") from None


def keystream(key: bytes, size: int) -> Iterator[memoryview]:
    """Yield `size` pseudo-random bytes in blocks: AES-256-CTR from zero, for a key that is used for nothing else.

    A block is overwritten by the next one. AES rather than ChaCha20: a little faster if the processor has it.
    """
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    zeros, block = memoryview(bytes(_BLOCK)), bytearray(_BLOCK + 15)  # OpenSSL asks for a cipher block more
    for start in range(0, size, _BLOCK):
        n = min(_BLOCK, size - start)
        stream.update_into(zeros[:n], block)
        yield memoryview(block)[:n]
