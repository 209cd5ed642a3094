"""What a site signs with every update: what it has spent, and where its ledger stood.

A statement is one DSSE envelope on one line; its payload is canonical JSON. The server keeps it, word for word, in
the run log. It ties the update to the site's ledger: whoever holds it notices a ledger that was cut or put back. And
it ties the server to what it told the site: whom it asked in this round, and where its own record stood then.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from fedllm.canonical import canonical_json, digest_of
from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.crypto.signed_documents import open_envelope, sign_envelope
from fedllm.errors import CryptoError
from fedllm.shown import shows

STATEMENT_TYPE = "application/vnd.fedllm.statement+json"


@dataclass(frozen=True)
class Statement:
    """A site's word on one round. Which records it used is not in it."""

    site: str
    run: str
    plan: str  # the plan's digest
    round: int
    epsilon: float | None  # spent on these records so far, at `delta`: PLD; None if no noise was added
    epsilon_rdp: float | None
    delta: float
    ledger_number: int  # an entry of the site's chain that already holds the round's charge: its newest
    ledger_digest: str
    update: str  # SHA-256 of the update's bytes, hex
    roster: str = ""  # `roster_digest` of the sites that the server said it asks in this round; "": earlier versions
    record_number: int = 0  # the newest entry of the server's run log, as it said: the one that begins the round
    record_digest: str = ""
    adapter: str = ""  # SHA-256 of float32[d], little endian, hex: that the site was sent, to train from or to score
    canaries: str = ""  # in the closing exchange: their opening (fedllm.privacy.canaries)
    grid: float | None = None  # of the privacy loss, on which `epsilon` was computed; None: 1e-4, or there is no PLD


def roster_digest(sites: Iterable[str]) -> str:
    """Return what a statement calls the sites of a round: SHA-256, hex, of their sorted names as canonical JSON."""
    return digest_of(sorted(sites))


def update_digest(payload: bytes) -> str:
    """Return what a statement calls an update."""
    return hashlib.sha256(payload).hexdigest()


def sign_statement(statement: Statement, signer: Identity) -> str:
    """Return a statement as one line."""
    fields = {**asdict(statement), "signer": signer.public.to_text()}
    return sign_envelope(canonical_json(fields), STATEMENT_TYPE, signer)


def open_statement(line: str) -> tuple[Statement, PublicIdentity]:
    """Read a statement and who signed it; raises CryptoError if its signature does not fit, or it is none.

    Whether the signer is the site's identity is for the caller to decide.
    """
    payload, signer = open_envelope(line, STATEMENT_TYPE)
    try:
        fields = json.loads(payload)
        canonical = canonical_json(fields) == payload
        named = fields.pop("signer")
        statement = Statement(**fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CryptoError("a signed statement of unknown form") from None
    numbers = (statement.epsilon, statement.epsilon_rdp, statement.delta, statement.grid)
    texts = (statement.site, statement.run, statement.plan, statement.ledger_digest, statement.update,
             statement.roster, statement.record_digest, statement.canaries, statement.adapter)  # fmt: skip
    counts = (statement.round, statement.ledger_number, statement.record_number)
    if (
        not canonical
        or named != signer.to_text()
        or not all(n is None or (type(n) in (int, float) and 0 <= n <= sys.float_info.max) for n in numbers)
        or statement.delta is None
        or not all(isinstance(text, str) and shows(text) for text in texts)
        or not all(type(count) is int and 0 <= count < 2**63 for count in counts)
    ):
        raise CryptoError("a signed statement of unknown form")
    return statement, signer
