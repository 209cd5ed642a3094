"""The one bit that a site's failure may tell: whether it stopped while it used records."""

import json
from pathlib import Path

from fedllm.errors import Halted
from fedllm.files import remove, write_secret


class Unfinished:
    """On disk while records are used. What a failure or the end of the process leaves behind stops the site."""

    def __init__(self, ledger: Path) -> None:
        """The file lies beside the site's ledger."""
        self._path = ledger.with_name("unfinished.json")

    def check(self) -> None:
        """Raise Halted if records were used and nothing came of it."""
        if (said := self.read()) is not None:
            raise Halted(f"{said}. The log says why. After you have seen to it: fedllm site resume")

    def read(self) -> str | None:
        """Return what was not finished, None if nothing was."""
        if not self._path.exists():
            return None
        try:
            state = json.loads(self._path.read_bytes())
            return f"round {int(state['round'])} of run {state['run']} failed, or was killed, while it used records"
        except (OSError, ValueError, KeyError, TypeError):
            return "a round failed, or was killed, while it used records"

    def begin(self, run: str, round_: int) -> None:
        """Note that records are about to be used."""
        write_secret(self._path, json.dumps({"run": run, "round": round_}, ensure_ascii=False).encode())

    def end(self) -> None:
        """Note that all went well, or that the owner has acted."""
        remove(self._path)
