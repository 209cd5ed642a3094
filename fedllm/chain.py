"""Hash-chained, signed entries: what a site's ledger and head office's run record are made of.

An entry is one DSSE envelope on one line. Its payload is canonical JSON: its number (0, 1, 2 ...), the digest of the
entry before it, a kind, a time and a body. Whoever holds a later digest notices every edit, deletion, insertion and
reordering of earlier entries, and whoever holds the signer's public key notices entries that it did not sign.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fedllm.crypto import Identity, PublicIdentity, open_envelope, sign_envelope
from fedllm.errors import ChainError, CryptoError

ENTRY_TYPE = "application/vnd.fedllm.entry+json"
START = "0" * 64  # what the first entry names as the one before it


@dataclass(frozen=True)
class Entry:
    """One entry, its signature checked."""

    number: int
    previous: str  # digest of the entry before
    kind: str
    at: float  # seconds since the epoch, UTC, by the signer's clock
    body: dict[str, Any]
    signer: PublicIdentity
    digest: str  # SHA-256 of the payload, hex


def make_entry(number: int, previous: str, kind: str, at: float, body: dict[str, Any], signer: Identity) -> str:
    """Return a new entry as a line."""
    fields = {"number": number, "previous": previous, "kind": kind, "at": at, "body": body}
    payload = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return sign_envelope(payload.encode(), ENTRY_TYPE, signer)


def open_entry(line: str) -> Entry:
    """Read one entry; raises CryptoError where its signature does not fit, or it is none."""
    payload, signer = open_envelope(line, ENTRY_TYPE)
    try:
        fields = json.loads(payload)
        entry = Entry(**fields, signer=signer, digest=hashlib.sha256(payload).hexdigest())
        right = (
            type(entry.number) is int and isinstance(entry.previous, str) and isinstance(entry.kind, str)
            and isinstance(entry.at, int | float) and isinstance(entry.body, dict)
        )  # fmt: skip
    except (ValueError, TypeError, RecursionError):
        right = False
    if not right:
        raise CryptoError("a signed entry of unknown form")
    return entry


def read_chain(lines: Iterable[str], name: str, signers: Iterable[PublicIdentity] | None = None) -> list[Entry]:
    """Check a whole chain and return its entries.

    `signers` are the identities that may have signed; None accepts any, as long as the first entry's signer signed, or
    an entry of kind `key` by a signer before it named, all. Raises ChainError that names the first bad entry.
    """
    entries: list[Entry] = []
    trusted = set(signers) if signers is not None else None
    for position, line in enumerate(lines):
        try:
            entry = open_entry(line)
        except CryptoError as error:
            raise ChainError(f"{name}, entry {position}: {error}") from None
        previous = entries[-1].digest if entries else START
        trusted = {entry.signer} if trusted is None else trusted
        if entry.signer not in trusted:
            raise ChainError(f"{name}, entry {position}: signed by {entry.signer.fingerprint}, who is not trusted here")
        if entry.number != position or entry.previous != previous:
            raise ChainError(
                f"{name}, entry {position}: it does not follow the entry before it (its number is {entry.number}). "
                "Entries were removed, inserted or exchanged."
            )
        if entry.kind == "key":  # a key of before hands over to its successor
            trusted = trusted | {PublicIdentity.from_text(str(entry.body.get("identity", "")))}
        entries.append(entry)
    return entries
