"""The roster: which sites were admitted, with which keys, and which were revoked."""

from pathlib import Path

from pydantic import AwareDatetime, ValidationError

from fedllm.crypto.identity import PublicIdentity
from fedllm.errors import CryptoError, FolderError
from fedllm.files import read_secret
from fedllm.protocol.enrolment import Host, IdentityText, KeyLine
from fedllm.values import Frozen, SiteName


class RosterEntry(Frozen):
    """One admission of a site."""

    site: SiteName
    identity: IdentityText
    previous_identities: tuple[IdentityText, ...] = ()  # still accepted, until they are retired
    link_key: KeyLine
    previous_link_keys: tuple[KeyLine, ...] = ()
    serving_key: KeyLine
    hosts: tuple[Host, ...] = ()
    admitted_at: AwareDatetime
    revoked_at: AwareDatetime | None = None

    @property
    def public(self) -> PublicIdentity:
        """The identity that messages are sealed to."""
        return PublicIdentity.from_text(self.identity)

    @property
    def identities(self) -> tuple[PublicIdentity, ...]:
        """Every identity that may sign for the site, the present one first."""
        return tuple(map(PublicIdentity.from_text, (self.identity, *self.previous_identities)))

    @property
    def link_keys(self) -> tuple[str, ...]:
        """Every key with which the site may connect, the present one first."""
        return (self.link_key, *self.previous_link_keys)


class Roster(Frozen):
    """Every admission there was; of one site at most one is in force."""

    members: tuple[RosterEntry, ...] = ()

    @classmethod
    def load(cls, path: Path) -> "Roster":
        """Read roster.json; raises FolderError."""
        try:
            return cls.model_validate_json(read_secret(path))
        except (ValidationError, CryptoError) as error:
            if isinstance(error, ValidationError) and any("node_key" in each["loc"] for each in error.errors()):
                raise FolderError(
                    f"{path} is of an earlier version of fedllm. Make a new folder (fedllm init-federation), and have "
                    "every site make one (fedllm site init) and be admitted anew."
                ) from None
            raise FolderError(f"{path} is damaged ({error}). Restore it from a backup.") from None

    @property
    def active(self) -> tuple[RosterEntry, ...]:
        """Members that may take part."""
        return tuple(member for member in self.members if member.revoked_at is None)

    def find(self, site: str) -> RosterEntry | None:
        """Return the admission of a site that is in force."""
        return next((member for member in self.active if member.site == site), None)

    def of_link_key(self, line: str) -> RosterEntry | None:
        """Return the newest admission that a key belongs to, also one that was revoked."""
        return next((member for member in reversed(self.members) if line in member.link_keys), None)
