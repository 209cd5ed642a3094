"""The newest entry that the server has seen of every site's ledger, over all runs: `heads.json`, beside the runs.

A site signs, with every update, where its ledger stands. A ledger that lacks such an entry later was cut, or put back
from an old backup that does not know what was spent since: it is refused, in whatever run.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter

from fedllm.crypto.hash_chain import LedgerHead
from fedllm.errors import CheckpointError, FederationError
from fedllm.files import exclusive_lock, replace_file
from fedllm.protocol.messages import SeenHead
from server.checkpoint import cannot_write

HEADS = "heads.json"
_FILE = TypeAdapter(dict[str, SeenHead], config=ConfigDict(strict=True, extra="forbid"))


class LedgerHeads:
    """The file; several runs may use it at once. Raises CheckpointError if it cannot be read or written."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        """`prefix` comes before the sites' names, where sites of one name have several ledgers."""
        self._path, self._prefix = path, prefix

    def read(self) -> dict[str, LedgerHead]:
        """Return the newest entry seen, by site."""
        return {
            key.removeprefix(self._prefix): head for key, head in self._load().items() if key.startswith(self._prefix)
        }

    def note(self, seen: Mapping[str, LedgerHead]) -> None:
        """Keep what was seen, if it is newer; on return it is on disk."""
        with exclusive_lock(self._path):
            known = self._load()
            newer = {self._prefix + site: head for site, head in seen.items()}
            self._save(known | {k: h for k, h in newer.items() if k not in known or h.number > known[k].number})

    def forget(self, site: str) -> None:
        """Take whatever ledger a site has from now on: a person at the server has decided so."""
        with exclusive_lock(self._path):
            known = self._load()
            if known.pop(self._prefix + site, None) is None:
                raise FederationError(f"nothing was seen yet of a ledger of {site}; there is nothing to forget")
            self._save(known)

    def _load(self) -> dict[str, LedgerHead]:
        try:
            return _FILE.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self._path} cannot be read ({type(error).__name__}). Restore it from a backup: without it, a "
                "ledger that was put back from an old backup goes unnoticed between runs."
            ) from None

    def _save(self, heads: Mapping[str, LedgerHead]) -> None:
        content = {site: asdict(head) for site, head in sorted(heads.items())}
        try:
            replace_file(self._path, json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n", 0o600)
        except OSError as error:
            raise cannot_write(self._path, error) from error
