"""Signed documents: readable JSON with signatures (join requests, grants), and DSSE envelopes (chains, reports)."""

import json
from typing import Any

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import FormatError, VerificationError
from securesystemslib.signer import Key, Signature, Signer, SSlibKey  # type: ignore[attr-defined]

from fedllm.canonical import canonical_json
from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.errors import CryptoError

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


# ---- DSSE envelopes: entries of ledgers and run logs --------------------------------------------------------------


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
    the identity's sealing key: if that matters, the payload has to name the signer.
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
