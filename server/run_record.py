"""The run log, `record.jsonl`: what the server can show of a run, signed and chained (fedllm.crypto.hash_chain).

One entry a line, signed by the server's identity; in a simulation by a key made in the run's folder (`record.key`).
Bodies, by the entry's kind:

    plan     plan           the RunPlan, as JSON, and so is
             plan_digest    its digest; `spec_digest` is that of the adapter's shape
             versions       {package: version} at the server
             sites          {name: public identity, 128 hex digits} of the roster; {} in a simulation
             adapter        digest of the adapter that the run starts from
             most_loss      nats: where a score at the sites cuts the loss of a unit (fedllm.privacy.metrics)
    round    round          1, 2, ...
             counts         whether the round was used; false also if the quorum was lost after sites had answered
             answered       {site: its signed statement, word for word (fedllm.protocol.spending_statement)}
             declined       {site: reason}
             failed         {site or node: what was wrong}
             lost           why it was not applied, though the sites have paid; the round is over all the same. Noise in
                            shares: unmasking failed, or the sum was beyond what honest sites can send; or
                            federation.gate
             noise_multiplier                noise in shares: of the sum, without as many sites as may collude
             trimmed        noise in shares: sites whose excess noise was removed, by the server's own count
             sums           with groups: {number of a group, from 1: that of it}, of each whose sum was used; the
                            round's noise_multiplier is that of the sum with the least
             refused, closed                 with groups: {number: why}, of each whose sum was beyond what honest
                            sites can send, or could not be unmasked
             scores         of the adapter before the round, at the sites: the noised `total`, the `noise_std` of each
                            coordinate, and the `factor` that it is to be divided by (fedllm.privacy.metrics)
             adapter_before, adapter_after   digests; equal if the round does not count
             bytes_up, bytes_down            of updates and of requests
    closing  answered, declined, failed, lost, scores   of the exchange after the last round, which trains nothing;
                            its statements open what the sites guessed of their canaries
             adapter        digest of the last adapter
    begun    round, sites   the sites are asked now, and may pay; each signs for this entry, as the server named it in
                            its request. With noise in shares the round is not asked for again
    resumed  round          the last completed round, from which the run goes on; later `round` entries before this one
                            are superseded: those rounds are repeated, and have entries of their own further on
             adapter        digest of the adapter it goes on with
    key      identity       the server's new identity, signed by the one before: both hold from here on
    end      round          the last completed round
             stopped        why the run ended early, or ""
             adapter        digest of the final adapter

An adapter's digest is SHA-256 over its float32[d], little endian. An `end` may be followed by `resumed`. A round's
entry is on disk before the checkpoint, so the record is never behind; nothing that was signed is ever removed.
"""

import contextlib
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm.adapter_vector import adapter_digest
from fedllm.crypto.hash_chain import START, Entry, make_entry, open_entry, read_chain
from fedllm.crypto.identity import Identity
from fedllm.errors import ChainError, CheckpointError
from fedllm.plan import RunPlan
from fedllm.protocol.messages import RoundBegun
from fedllm.protocol.spending_statement import roster_digest
from server.checkpoint import cannot_write, write_atomically

RECORD_FILE, RECORD_KEY = "record.jsonl", "record.key"
_PACKAGES = ("fedllm", "torch", "transformers", "peft", "opacus", "dp-accounting", "flwr", "numpy", "cryptography")


def key_in(folder: Path) -> Identity:
    """Return the key that signs the record of a simulation, made on first use in the run's folder."""
    return Identity.load_or_create(folder / RECORD_KEY)


class RunLog:
    """One run's record file; raises CheckpointError if it cannot be written, read or believed."""

    def __init__(self, path: Path, signers: Sequence[Identity], roster: Mapping[str, str] | None = None) -> None:
        """The first of `signers` signs; the others are its predecessors. `roster` holds the sites' identities."""
        self.path, self._signers, self._roster = path, tuple(signers), dict(roster or {})
        self._last: Entry | None = None
        self._begun: dict[int, set[RoundBegun]] = {}  # by round, the latest and those before a resume
        self.closed = ""  # digest of the adapter with which the exchange after the last round is over

    def begin(self, plan: RunPlan, spec_digest: str, adapter: NDArray[np.float32], most_loss: float) -> None:
        """Start the record; one of an attempt that ended before any site was asked is replaced."""
        body = {
            "plan": plan.model_dump(mode="json"), "plan_digest": plan.digest, "spec_digest": spec_digest,
            "versions": _versions(), "sites": self._roster, "adapter": adapter_digest(adapter),
            "most_loss": most_loss,
        }  # fmt: skip
        line = make_entry(0, START, "plan", time.time(), body, self._signers[0])
        write_atomically(self.path, line.encode() + b"\n")
        self._last = open_entry(line)

    def resume(self, plan: RunPlan, round_: int, adapter: NDArray[np.float32]) -> dict[int, set[str]]:
        """Go on from the checkpoint of a round: later entries stand, and are superseded.

        Returns the rounds that were begun, and the sites that were asked and may have paid.
        """
        entries = self._read()
        if not entries or entries[0].kind != "plan" or entries[0].body.get("plan_digest") != plan.digest:
            raise CheckpointError(f"{self.path} is not the record of this run. Restore it from a backup.")
        rounds = [entry.body for entry in entries if entry.kind == "round"]
        done = [body.get("round") for body in rounds if body.get("counts") or body.get("lost")]
        if round_ and round_ not in done:
            raise CheckpointError(
                f"{self.path} does not reach round {round_} of the checkpoint. Restore it from a backup, or start a "
                "new run."
            )
        self._last = entries[-1]
        self.closed = next((str(e.body.get("adapter")) for e in reversed(entries) if e.kind == "closing"), "")
        new = self._signers[0].public
        named = {new.to_text()} & {str(entry.body.get("identity")) for entry in entries if entry.kind == "key"}
        if not named and new not in {entry.signer for entry in entries}:
            before = [signer for signer in self._signers if signer.public in {entry.signer for entry in entries}]
            self._append("key", {"identity": new.to_text()}, (before or [self._signers[0]])[0])
        self.note("resumed", {"round": round_, "adapter": adapter_digest(adapter)})
        begun: dict[int, set[str]] = {}
        for entry in entries:
            if entry.kind == "begun":
                self._began(entry)
                begun.setdefault(int(entry.body["round"]), set()).update(map(str, entry.body["sites"]))
            elif entry.kind == "round" and not (entry.body.get("counts") or entry.body.get("lost")):
                begun.pop(int(entry.body["round"]), None)  # nobody had paid for it when it ended
        return begun

    def note(self, kind: str, body: dict[str, Any]) -> None:
        """Append an entry; on return it is on disk."""
        self._append(kind, body, self._signers[0])

    def begin_round(self, round_: int, sites: Iterable[str]) -> RoundBegun:
        """Note whom a round asks; return what every one of them is to sign for."""
        names = sorted(sites)
        entry = self._append("begun", {"round": round_, "sites": names}, self._signers[0])
        return self._began(entry)

    def began(self, round_: int) -> frozenset[RoundBegun]:
        """Return what sites may have signed for in a round: after a resume it answers as it did before."""
        return frozenset(self._begun.get(round_, ()))

    def _began(self, entry: Entry) -> RoundBegun:
        names = [str(name) for name in entry.body["sites"]]
        begun = RoundBegun(roster=roster_digest(names), number=entry.number, digest=entry.digest)
        self._begun.setdefault(int(entry.body["round"]), set()).add(begun)
        return begun

    def _append(self, kind: str, body: dict[str, Any], signer: Identity) -> Entry:
        number, previous, at = 0, START, time.time()
        if self._last is not None:
            number, previous, at = self._last.number + 1, self._last.digest, max(at, self._last.at)
        line = make_entry(number, previous, kind, at, body, signer)
        try:
            size = self.path.stat().st_size
            try:
                with self.path.open("ab") as file:
                    file.write(line.encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)  # half an entry, for want of room
                raise
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._last = entry = open_entry(line)
        return entry

    def _read(self) -> list[Entry]:
        """Read and check the record, cutting off an entry that was being written when the process ended."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}. Restore it from a backup.") from error
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            write_atomically(self.path, whole)
        try:
            lines = whole.decode().splitlines()
            return read_chain(lines, str(self.path), [signer.public for signer in self._signers])
        except (ChainError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{error}. Restore the record from a backup, or start a new run.") from None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
