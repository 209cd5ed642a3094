"""Hash-chained, signed entries: what a site's ledger and the server's run log are made of.

An entry is one DSSE envelope on one line. Its payload is canonical JSON: its number (0, 1, 2 ...), the digest of the
entry before it, a kind, a time, a body, and its signer's public identity. A reader with a later digest detects every
edit, deletion, insertion and reordering of earlier entries; one with the signer's public key detects entries that it
did not sign.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field

from fedllm.canonical import canonical_json
from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.crypto.signed_documents import open_envelope, sign_envelope
from fedllm.errors import ChainError, CryptoError

ENTRY_TYPE = "application/vnd.fedllm.entry+json"
START = "0" * 64  # what the first entry names as the one before it
EXPORT = "export"  # kind of the entry that ends a copy


@dataclass(frozen=True)
class LedgerHead:
    """The newest entry of a site's ledger; -1 and START before the first."""

    number: Annotated[int, Field(ge=-1, lt=2**63)]
    digest: Annotated[str, Field(max_length=64)]


@dataclass(frozen=True)
class End:
    """Where the server's record of a run ends: for which the sites hand in their ledgers."""

    run: str
    number: int
    digest: str

    @classmethod
    def parse(cls, text: str) -> "End":
        """Read RUN:NUMBER:DIGEST; raises ChainError."""
        run, _, rest = text.partition(":")
        number, _, digest = rest.partition(":")
        if not run or not re.fullmatch("[0-9]{1,18}", number) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ChainError(f"{text!r:.200}: expected RUN:NUMBER:DIGEST, as the audit of the run names it")
        return cls(run, int(number), digest)

    def __str__(self) -> str:
        return f"{self.run}:{self.number}:{self.digest}"


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
    fields = {
        "number": number, "previous": previous, "kind": kind, "at": at, "body": body,
        "signer": signer.public.to_text(),
    }  # fmt: skip
    return sign_envelope(canonical_json(fields), ENTRY_TYPE, signer)


def close_export(lines: Sequence[str], end: End, at: float, signer: Identity) -> list[str]:
    """Return a chain with one more entry, of kind `export`: its signer's word that there is no newer one.

    It is no part of the chain itself, and only ends a copy that is handed in for the audit of one run, after its `end`.
    """
    last = open_entry(lines[-1]) if lines else None
    number, previous = (last.number + 1, last.digest) if last is not None else (0, START)
    return [*lines, make_entry(number, previous, EXPORT, at, asdict(end), signer)]


def open_entry(line: str) -> Entry:
    """Read one entry; raises CryptoError if its signature does not fit, or it is none.

    A payload that is not canonical may read otherwise elsewhere, with a key given twice for instance: it is refused.
    """
    payload, signer = open_envelope(line, ENTRY_TYPE)
    try:
        fields = json.loads(payload)
        right = canonical_json(fields) == payload
        named = fields.pop("signer")
        entry = Entry(**fields, signer=signer, digest=hashlib.sha256(payload).hexdigest())
        right = (
            right and named == signer.to_text() and type(entry.number) is int and isinstance(entry.previous, str)
            and isinstance(entry.kind, str) and type(entry.at) in (int, float) and isinstance(entry.body, dict)
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        right = False
    if not right:
        raise CryptoError("a signed entry of unknown form")
    return entry


def read_chain(lines: Iterable[str], name: str, signers: Iterable[PublicIdentity] | None = None) -> list[Entry]:
    """Check a whole chain and return its entries.

    The first entry's signer may sign, and so may everyone that an entry of kind `key` by such a signer names. `signers`
    are those whom the reader trusts: one of them must have signed an entry, which vouches for all before it, and keys
    hand over from there. If a key was lost, its successor names itself; only a reader who trusts the successor accepts
    that. Raises ChainError that names the first bad entry.
    """
    entries: list[Entry] = []
    trusted = set(signers) if signers is not None else None
    may_sign: set[PublicIdentity] = set()
    for position, line in enumerate(lines):
        where = f"{name}, entry {position}"
        try:
            entry = open_entry(line)
            named = PublicIdentity.from_text(str(entry.body.get("identity"))) if entry.kind == "key" else entry.signer
        except CryptoError as error:
            raise ChainError(f"{where}: {error}") from None
        known = entry.signer in may_sign or not entries
        adopted = trusted is not None and entry.signer in trusted and entry.kind == "key"
        if not known and not adopted:
            # if it is the reader's own signer, those before it are the strangers
            bad = entry if trusted is None or entry.signer not in trusted else entries[0]
            raise ChainError(f"{name}, entry {bad.number}: signed by {bad.signer.fingerprint}, who may not sign here")
        if entry.number != position or entry.previous != (entries[-1].digest if entries else START):
            raise ChainError(
                f"{where}: it does not follow the entry before it (its number is {entry.number}). "
                "Entries were removed, inserted or exchanged."
            )
        may_sign |= {entry.signer, named}
        entries.append(entry)
    if trusted is not None and entries and not trusted & {entry.signer for entry in entries}:
        raise ChainError(f"{name}, entry 0: signed by {entries[0].signer.fingerprint}, who is not trusted here")
    return entries
