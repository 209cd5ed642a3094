"""A finished run, read from its folder and checked before anything of it is released. Needs no torch."""

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedllm.adapter_vector import adapter_digest
from fedllm.audit import bundle
from fedllm.audit.evidence import PLAN, RECORD, Outcome, outcome
from fedllm.audit.model import INTEGRITY, Audit
from fedllm.audit.trust import Trust
from fedllm.canonical import read_json
from fedllm.config import TextConfig
from fedllm.crypto.identity import Identity
from fedllm.errors import ChainError, ConfigError, ReleaseError, first_line
from fedllm.files import cannot_read
from fedllm.release.manifest import Privacy, Training
from fedllm.values import HEAD_OFFICE, parse

KEY = "record.key"  # of a simulation, which signs as head office would
_CONFIG, _CHECKPOINTS = "config.json", ("checkpoint.safetensors", "checkpoint.safetensors.previous")


@dataclass(frozen=True)
class FinishedRun:
    """A run whose record, evidence and audit agree."""

    folder: Path
    name: str
    description: str  # of its data
    reading: TextConfig
    outcome: Outcome
    audit: Audit
    privacy: Privacy

    @property
    def training(self) -> Training:
        """What a manifest says of the run."""
        found = self.outcome
        return Training(
            run=found.plan.run, plan=found.plan.digest, record=found.head, adapter=found.adapter,
            signer=found.signers[-1].fingerprint,
        )  # fmt: skip

    def adapter(self) -> NDArray[np.float32]:
        """Return the values that the run ended with, float32[d]: those whose digest the record has signed.

        They are the checkpoint's: what PEFT saves of some methods is not all that was trained. Raises ReleaseError.
        """
        for name in _CHECKPOINTS:
            with contextlib.suppress(OSError, SafetensorError):
                tensors = load_file(self.folder / name)
                for key in ("adapter", "best"):
                    if key in tensors and adapter_digest(tensors[key]) == self.outcome.adapter:
                        return tensors[key]
        raise ReleaseError(
            f"{self.folder}: no checkpoint holds the adapter with which the run ended according to {RECORD} (SHA-256 "
            f"{self.outcome.adapter[:16]}...). Restore {_CHECKPOINTS[0]} from a backup."
        )


def read_run(folder: Path, signer: Identity, audit: Path | None = None) -> FinishedRun:
    """Read the run in a folder with its audit, by default in RUN/audit; `signer` is who will sign the release.

    Raises ReleaseError if they do not agree, if the run has not ended, or if it cost more than it promised.
    """
    if not (folder / RECORD).exists():
        raise ReleaseError(f"{folder} holds no run: there is no {RECORD}. Name the folder of a finished run.")
    audit = audit or folder / bundle.FOLDER
    if not (audit / bundle.JSON).exists():
        raise ReleaseError(
            f"{audit} holds no audit, and a release states what the audit found. Run: fedllm audit report '{folder}'"
        )
    try:
        found = outcome(folder)
    except ChainError as error:
        raise ReleaseError(f"{folder}: {first_line(error)}. Name the folder of a finished run.") from None
    signers = [who.fingerprint for who in (*found.signers, signer.public)]
    try:
        read = bundle.reread(audit, Trust({HEAD_OFFICE: signers}))
        digest = hashlib.sha256((audit / bundle.JSON).read_bytes()).hexdigest()
    except ChainError as error:
        raise ReleaseError(f"{audit}: {first_line(error)}. Make it again: fedllm audit report '{folder}'") from None
    except OSError as error:
        raise cannot_read(audit / bundle.JSON, error) from None
    _check(folder, audit, found, read)
    plan = found.plan
    name, description, reading = _configured(folder / _CONFIG)
    privacy = Privacy(
        mode=plan.privacy.mode, unit=plan.privacy.unit, epsilon=_largest(read), delta=plan.privacy.delta,
        seeded=plan.privacy.insecure_seed is not None, verdict=read.verdict, audit=digest,
    )  # fmt: skip
    return FinishedRun(folder, name, description, reading, found, read, privacy)


def _check(folder: Path, audit: Path, found: Outcome, read: Audit) -> None:
    """Raise ReleaseError unless an audit is about this run as it ended, and lets it be released."""
    about = (read.run.name, read.run.plan_digest, read.run.head)
    if about != (found.plan.run, found.plan.digest, found.head):
        raise ReleaseError(
            f"{audit} is about run {read.run.name}, up to entry {read.run.head[:16]}..., and {folder} holds "
            f"{found.plan.run}, which ended with {found.head[:16]}.... Make it again: fedllm audit report '{folder}'"
        )
    _plan_as_recorded(folder / PLAN, found)
    failed = [finding for finding in read.findings if finding.status == "fails"]
    broken = [finding for finding in failed if finding.code in (*INTEGRITY, "keys")]
    # one that protects nobody may be released, branded: what it promised, nothing, it has kept
    over = failed if read.verdict == "exceeded" and found.plan.privacy.protects else []
    for finding in broken or over:
        raise ReleaseError(
            f"{folder} is not released: its audit says {read.verdict} ({finding.code}: "
            f"{'; '.join(finding.evidence[:1])}). Read {audit / bundle.JSON}."
        )


def _largest(audit: Audit) -> float | None:
    """Return the largest epsilon of any site; None if one has no bound.

    It is by a site's events or, where its ledger is missing, by its signed word: without a ledger, the audit's
    accountants know of this run alone, and a site may have spent in others before.
    """
    known = [audit.accountants.pld, *(site.charged for site in audit.sites)]
    finite = [epsilon for epsilon in known if epsilon is not None]
    return max(finite) if len(finite) == len(known) else None


def _plan_as_recorded(path: Path, found: Outcome) -> None:
    try:
        same = type(found.plan).model_validate_json(path.read_bytes()).digest == found.plan.digest
    except OSError as error:
        raise cannot_read(path, error) from None
    except ValidationError:
        same = False
    if not same:
        raise ReleaseError(f"{path} is not the plan that {RECORD} holds. Restore it from a backup.")


def _configured(path: Path) -> tuple[str, str, TextConfig]:
    """Return a run's name, the description of its data, and how its records became text."""
    try:
        content = read_json(path.read_bytes())
        data = content["data"]
        fields = {key: value for key, value in data.items() if key in TextConfig.model_fields}
        return str(content["name"]), str(data.get("description", "")), parse(TextConfig, fields)
    except OSError as error:
        raise cannot_read(path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise ReleaseError(f"{path} cannot be read ({first_line(error)}). Restore it from a backup.") from None
