"""Checkpoints: everything that a run needs to go on, written atomically after every round."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedllm import files
from fedllm.canonical import digest_of
from fedllm.errors import CheckpointError, ConfigError, FedllmError
from fedllm.files import replace_file
from fedllm.values import Frozen, parse

CONFIG = "config.json"  # of a run: what it was configured by
_T = TypeVar("_T", bound=Frozen)
_ADAPTER, _STATE, _BEST = "adapter", "optimizer.", "best"


@dataclass(frozen=True)
class SiteState:
    """What the server knows of one site: the accountant's state and how it took part."""

    rounds: int = 0  # rounds whose update was used
    charged: int = 0  # rounds that the site may have paid for, used or not: the accountant's state
    last_charged: int = 0  # the last of them
    stated: float = 0.0  # epsilon by RDP in the site's last answer: unlike the PLD's, exactly monotone
    declined: int = 0
    failed: int = 0  # no answer in time, or not a valid one
    reason: str = ""  # of the last refusal, until the site answers again
    epsilon: float | None = 0.0  # spent so far: stated by the site, or composed from `charged` where that is more
    epsilon_rdp: float | None = 0.0
    bytes_up: int = 0  # of updates
    identity: str = ""  # that signed the site's last statement
    head_number: int = -1  # the newest entry of the site's ledger that it signed for
    head_digest: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """The state after `round` rounds."""

    round: int
    plan_digest: str
    adapter: NDArray[np.float32]  # [d]
    optimizer: dict[str, NDArray[np.float32]]
    sites: dict[str, SiteState] = field(default_factory=dict)
    best: NDArray[np.float32] | None = None  # the adapter with the best score at the sites, of `best_round`
    best_round: int = -1


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file at `path` as a whole: after a crash it holds the old bytes or the new ones.

    Raises CheckpointError if the disk is full or not writable; the old file is then untouched.
    """
    try:
        replace_file(path, data)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> FedllmError:
    """Return the CheckpointError that says why a file of a run cannot be written."""
    return files.cannot_write(path, error, "continue with resume=true", CheckpointError)


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn what writers of other libraries raise if there is no room into the error of `cannot_write`."""
    try:
        with files.system_errors():
            yield
    except OSError as error:
        raise cannot_write(place, error) from error


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, keeping the one before it as `<name>.previous`."""
    tensors = {_ADAPTER: checkpoint.adapter, **{_STATE + k: v for k, v in checkpoint.optimizer.items()}}
    if checkpoint.best is not None:
        tensors[_BEST] = checkpoint.best
    header: dict[str, Any] = {
        "round": checkpoint.round,
        "plan_digest": checkpoint.plan_digest,
        "best_round": checkpoint.best_round,
        "sites": {name: asdict(state) for name, state in checkpoint.sites.items()},
    }
    header["sha256"] = _digest(header, tensors)
    data = save(tensors, metadata={"fedllm": json.dumps(header, ensure_ascii=False)})
    previous = _previous(path)
    if _is_intact(path):  # a damaged one must not take the place of the good one before it
        try:
            previous.unlink(missing_ok=True)
            os.link(path, previous)
        except OSError as error:
            raise cannot_write(previous, error) from error
    write_atomically(path, data)


def _is_intact(path: Path) -> bool:
    try:
        _load(path)
    except CheckpointError:
        return False
    return True


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def has_checkpoint(path: Path) -> bool:
    """Whether there is something for `load_checkpoint` to read: `path` itself, or only the one before it."""
    return path.exists() or _previous(path).exists()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read the newest intact checkpoint: `path`, or the one before it where `path` is damaged or gone.

    Raises CheckpointError if there is none. Going back a round loses nothing: sites answer a repeated round with
    the update they gave the first time.
    """
    try:
        return _load(path)
    except CheckpointError as error:
        previous = _previous(path)
        if not previous.exists():
            raise
        try:
            return _load(previous)
        except CheckpointError:
            raise error from None


def _load(path: Path) -> Checkpoint:
    try:
        with safe_open(str(path), framework="numpy") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})["fedllm"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        if header.pop("sha256") != _digest(header, tensors):
            raise ValueError("checksum does not match")
        sites = {name: SiteState(**state) for name, state in header["sites"].items()}
        optimizer = {n.removeprefix(_STATE): t for n, t in tensors.items() if n.startswith(_STATE)}
        return Checkpoint(
            int(header["round"]), str(header["plan_digest"]), tensors[_ADAPTER], optimizer, sites, tensors.get(_BEST),
            int(header["best_round"]),
        )  # fmt: skip
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({error}). Restore it from a backup, or start a new run."
        ) from error


def _digest(header: dict[str, Any], tensors: dict[str, NDArray[np.float32]]) -> str:
    digest = hashlib.sha256(digest_of(header).encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def read_as(path: Path, kind: type[_T]) -> _T:
    """Read a JSON file of a run; raises CheckpointError."""
    try:
        return parse(kind, json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Restore it from a backup, or start a new run."
        ) from None
