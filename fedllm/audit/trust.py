"""Whose keys the reader of an audit trusts, and for what."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedllm.crypto.identity import PublicIdentity
from fedllm.errors import ConfigError
from fedllm.protocol.enrolment import same_fingerprint
from fedllm.values import HEAD_OFFICE


class Trust:
    """Identities that the reader knows by other means, by name; a name may have several."""

    def __init__(self, keys: Mapping[str, Sequence[str]]) -> None:
        """`keys` are fingerprints or whole identities in hexadecimal."""
        self._keys = {name: tuple(texts) for name, texts in keys.items()}

    @classmethod
    def read(cls, path: Path) -> "Trust":
        """Read a file of lines NAME KEY; raises ConfigError."""
        keys: dict[str, list[str]] = defaultdict(list)
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--trust: {path} cannot be read ({error})") from None
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, _, key = line.strip().rpartition(" ")
            if not name or len("".join(c for c in key if c.isalnum())) not in (40, 128):
                raise ConfigError(
                    f"{path}, line {number}: expected a name ({HEAD_OFFICE}, or a site's) and its fingerprint"
                )
            keys[name.strip()].append(key)
        if not keys:
            raise ConfigError(f"--trust: {path} names nobody")
        return cls(keys)

    @property
    def names(self) -> frozenset[str]:
        """Everybody who is known."""
        return frozenset(self._keys)

    def knows(self, name: str, identity: PublicIdentity) -> bool:
        """Whether `identity` is one of this name."""
        return any(
            same_fingerprint(key, identity.fingerprint) or key.casefold() == identity.to_text()
            for key in self._keys.get(name, ())
        )

    def name_of(self, identity: PublicIdentity) -> str | None:
        """Return whose identity this is."""
        return next((name for name in self._keys if self.knows(name, identity)), None)
