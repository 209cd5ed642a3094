"""Bearer tokens of a served model: one a name, 256 random bits each, of which only the SHA-256 is kept.

A slow hash such as scrypt protects what people choose and others can guess. Nobody guesses 256 random bits, so a fast
hash gives nothing away, and every request can be checked against the file as it is now: a token that was revoked is
refused from then on.
"""

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import AwareDatetime, Field, ValidationError

from fedllm.errors import ConfigError, CryptoError
from fedllm.files import exclusive_lock, read_secret, stamp, write_secret
from fedllm.protocol.enrolment import now
from fedllm.values import Frozen

TOKENS = "tokens.json"
_PREFIX = "fedllm-"  # so that those who search for leaked secrets find one
_NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"  # it stands in every line of the log


class Token(Frozen):
    """What is kept of a token."""

    digest: str = Field(pattern="^[0-9a-f]{64}$")  # SHA-256, in hex
    made: AwareDatetime


class _File(Frozen):
    kind: str = Field("fedllm tokens v1", pattern="^fedllm tokens v1$")
    tokens: dict[str, Token]


def read_tokens(file: Path) -> dict[str, Token]:
    """Return what is kept of every token, by name; none if there is no file.

    Raises FolderError if others than the file's owner may use it, CryptoError if it is no file of tokens.
    """
    if not file.exists():
        return {}
    data = read_secret(file)
    try:
        return _File.model_validate_json(data).tokens
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"])) or "content"
        raise CryptoError(
            f"{file} is no file of tokens ({where}: {found['msg']}). Restore it from a backup, or remove it and add "
            "tokens anew."
        ) from None


def add_token(file: Path, name: str) -> str:
    """Make a token for `name` and return it: nobody can read it again. Raises ConfigError if the name has one."""
    if not re.fullmatch(_NAME, name):
        raise ConfigError(f"name={name[:80]!r}: expected 1 to 64 letters and digits, and . _ @ - between them")
    token = _PREFIX + secrets.token_urlsafe(32)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with exclusive_lock(file):
        tokens = read_tokens(file)
        if name in tokens:
            raise ConfigError(f"{name} has a token already. Revoke it first: fedllm serve token revoke {name}")
        _write(file, {**tokens, name: Token(digest=_digest(token), made=now())})
    return token


def revoke_token(file: Path, name: str) -> None:
    """Forget the token of `name`; raises ConfigError if there is none."""
    with exclusive_lock(file):
        tokens = read_tokens(file)
        if name not in tokens:
            known = ", ".join(sorted(tokens)) or "nobody"
            raise ConfigError(f"there is no token of {name[:80]!r}. Tokens have: {known}")
        _write(file, {other: token for other, token in tokens.items() if other != name})


@dataclass
class Gatekeeper:
    """Knows whose token it is that a request shows; reads the file again whenever it was replaced."""

    file: Path
    _stamp: object = None
    _tokens: Mapping[str, Token] | None = None

    def name_of(self, shown: str) -> str | None:
        """Return whose token this is, None if nobody's. Raises FolderError or CryptoError if the file went bad."""
        found, digest = None, _digest(shown)
        for name, token in self._current().items():  # all of them, each in constant time
            if hmac.compare_digest(token.digest, digest):
                found = name
        return found

    def _current(self) -> Mapping[str, Token]:
        state = stamp(self.file) if self.file.exists() else None
        if self._tokens is None or state != self._stamp:
            self._tokens, self._stamp = None, state  # none is good while the file is not
            self._tokens = read_tokens(self.file)
        return self._tokens


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _write(file: Path, tokens: Mapping[str, Token]) -> None:
    content = _File(tokens=dict(tokens)).model_dump(mode="json")
    write_secret(file, json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n")
