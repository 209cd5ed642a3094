"""Join requests and grants: the two signed documents that people carry between a site and the server.

Neither holds a secret. What protects them is the fingerprint that one person reads to the other on the telephone.
"""

import ipaddress
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, AwareDatetime, Field, ValidationError

from fedllm.crypto.certificates import check_key_line, read_certificates
from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.crypto.signed_documents import open_document, sign_document
from fedllm.errors import ConfigError, CryptoError
from fedllm.settings_file import read_settings
from fedllm.values import Frozen, Printable, SiteName, parse

MAX_DOCUMENT = 1 << 20  # bytes of a join request or grant


def check_host(host: str) -> str:
    """Return a host's name or address in its one spelling, as certificates have it; raises ValueError if neither."""
    try:
        name = host.encode("idna").decode("ascii").lower() if not host.isascii() else host.lower()
    except UnicodeError:
        name = ""
    label = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    if not (_is_address(name) or (len(name) <= 253 and re.fullmatch(rf"{label}(\.{label})*", name))):
        raise ValueError(f"{host[:80]!r} is not the name or address of a host. Write it without port and scheme.")
    return str(ipaddress.ip_address(name)) if _is_address(name) else name


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host)) and "%" not in host
    except ValueError:
        return False


def same_fingerprint(heard: str, fingerprint: str) -> bool:
    """Whether what somebody wrote down on the telephone is `fingerprint`, whatever the case and separators."""
    return fingerprint_digits(heard) == fingerprint.replace("-", "")


def fingerprint_digits(heard: str) -> str:
    """Return what somebody wrote down, in small letters and without separators."""
    return "".join(c for c in heard.casefold() if c.isalnum())


def now() -> datetime:
    """Return the time to the second, UTC."""
    return datetime.now(UTC).replace(microsecond=0)


def _identity(text: str) -> str:
    if PublicIdentity.from_text(text).to_text() != text:
        raise CryptoError("a public identity is 128 hexadecimal digits, in small letters")
    return text


def _key(line: str) -> str:
    check_key_line(line)
    return line


def _certificates(pem: str) -> str:
    read_certificates(pem.encode())
    return pem


IdentityText = Annotated[str, AfterValidator(_identity)]
KeyLine = Annotated[str, AfterValidator(_key)]
Certificates = Annotated[str, AfterValidator(_certificates)]
Host = Annotated[str, AfterValidator(check_host)]
Port = Annotated[int, Field(ge=1, le=65535)]


class JoinRequest(Frozen):
    """What a site asks the server with: its name and its public keys."""

    kind: Literal["fedllm join request v2"] = "fedllm join request v2"
    site: SiteName
    identity: IdentityText
    link_key: KeyLine  # to be certified: the site's as a client of the server
    serving_key: KeyLine  # to be certified: the site's as a server in its own house
    hosts: tuple[Host, ...] = Field((), max_length=16)  # that it serves at
    made_at: AwareDatetime

    @property
    def public(self) -> PublicIdentity:
        """The identity that asks to be admitted."""
        return PublicIdentity.from_text(self.identity)

    def sign(self, *signers: Identity) -> bytes:
        """Return the document, signed by the identity in it and, where that replaces another, by the present one."""
        return sign_document(self.model_dump(mode="json"), *signers)

    @classmethod
    def open(cls, data: bytes) -> "tuple[JoinRequest, list[PublicIdentity]]":
        """Return the request and everyone who signed it, the identity in it among them; raises CryptoError."""
        request, signers = _open(cls, data, "join request")
        if request.public not in signers:
            raise CryptoError("the join request is not signed by the identity in it. Ask the site to make it again.")
        return request, signers


class Grant(Frozen):
    """The server's answer: where it is to be found, and by which keys it is known."""

    kind: Literal["fedllm grant v2"] = "fedllm grant v2"
    federation: Printable = Field(min_length=1, max_length=64)
    site: SiteName
    site_fingerprint: Printable  # of the identity that the grant was made for
    host: Host
    port: Port
    ca: Certificates  # PEM; two authorities while one replaces the other
    link: Certificates  # PEM: the site's certificate as a client of the server
    serving: Certificates  # PEM: its certificate as a server
    coordinators: tuple[IdentityText, ...] = Field(min_length=1, max_length=8)  # the first one signs and seals now
    made_at: AwareDatetime

    @property
    def identities(self) -> tuple[PublicIdentity, ...]:
        """Every identity by which the server may be known."""
        return tuple(map(PublicIdentity.from_text, self.coordinators))

    def sign(self, signers: Sequence[Identity]) -> bytes:
        """Return the document, signed by every identity of the server."""
        return sign_document(self.model_dump(mode="json"), *signers)

    @classmethod
    def open(cls, data: bytes) -> "tuple[Grant, list[PublicIdentity]]":
        """Return the grant and everyone who signed it, all identities in it among them; raises CryptoError."""
        grant, signers = _open(cls, data, "grant")
        if not set(grant.identities) <= set(signers):
            raise CryptoError("the grant is not signed by every identity in it. Ask the server to make it again.")
        return grant, signers


_MADE_BY = {"join request": "fedllm site init, in a new folder", "grant": "fedllm admit NAME.join"}
_Document = TypeVar("_Document", JoinRequest, Grant)
_Settings = TypeVar("_Settings", bound=Frozen)


def read_config(kind: type[_Settings], path: Path) -> _Settings:
    """Read settings of an installation from a YAML file; raises ConfigError that names the file, or FolderError."""
    values = read_settings(path)
    try:
        return parse(kind, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _open(kind: type[_Document], data: bytes, name: str) -> tuple[_Document, list[PublicIdentity]]:
    if len(data) > MAX_DOCUMENT:
        raise CryptoError(f"{len(data)} bytes are too many for a {name}. Is it the right file?")
    content, signers = open_document(data)
    found, expected = str(content.get("kind")), kind.model_fields["kind"].default
    if found != expected and found.startswith(f"fedllm {name} v"):
        raise CryptoError(
            f"a {name} of another version of fedllm ({found[:40]}, expected {expected}). Install the same version at "
            f"both ends, and have it made again: {_MADE_BY[name]}"
        )
    try:
        return kind.model_validate_json(json.dumps(content)), signers
    except ValidationError as error:
        detail: Any = error.errors()[0]
        where = ".".join(map(str, detail["loc"])) or "content"
        raise CryptoError(
            f"not a {name} of this version ({where}: {detail['msg']}). Is it the right file, and do both ends run the "
            "same version?"
        ) from None
