"""Where a site's ledger lies, and the anchor beside its keys that tells whether it is still the newest.

The anchor is a small file with the number and digest of the ledger's newest entry. It is written after each entry and
before what was paid for is used, so the ledger always contains the entry that the anchor names, and may be ahead of it
after a crash. A ledger that does not contain it is missing, cut, older or another one.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedllm.crypto.hash_chain import START, LedgerHead
from fedllm.errors import FolderError, LedgerError
from fedllm.files import exclusive_lock, read_secret, write_secret

SITE = "site"  # the account that all data sets of a site share, but for those that its owner declared disjoint
BEFORE = LedgerHead(-1, START)  # of a ledger without entries

_MOUNTS = Path("/proc/self/mounts")
_NETWORK = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "ceph", "lustre", "afs", "glusterfs", "ncpfs")
_LOST_ON_RESTART = {"tmpfs": "in memory", "ramfs": "in memory", "overlay": "in a container", "aufs": "in a container"}


@dataclass(frozen=True)
class LedgerPlace:
    """A site's ledger, its anchor, and which data set the site's records are."""

    file: Path
    anchor: Path  # beside the keys, not beside the ledger: what takes one away leaves the other
    data_set: str = SITE  # shares the site's account unless the ledger says that it was declared disjoint

    def is_new(self) -> bool:
        """Whether there was never an entry here; raises LedgerError if that cannot be told."""
        return not self.file.exists() and read_anchor(self.anchor) in (None, BEFORE)

    def warnings(self) -> list[str]:
        """Return, a sentence each, what may make this place lose what was spent."""
        found = []
        for path in (self.file, self.anchor):
            kind = _file_system(path)
            if kind in _LOST_ON_RESTART:
                found.append(
                    f"{path.parent} lies {_LOST_ON_RESTART[kind]} ({kind}), and is empty when that is started anew: "
                    "what was spent would be forgotten. Put it on a disk, or a volume, that stays."
                )
            if path.parent.is_symlink():
                found.append(f"{path.parent} is a symbolic link. Let nobody but this site's user be able to change it.")
        return list(dict.fromkeys(found))


def check_path(path: Path) -> None:
    """Raise LedgerError if `path` is a link, or on a network file system, whose locks cannot be relied on."""
    kind = _file_system(path)
    if kind.startswith(_NETWORK):
        raise LedgerError(
            f"the privacy ledger's file {path} would lie on a network file system ({kind}), whose locks are not "
            "reliable. Put it on a local disk."
        )
    try:
        mode = path.lstat().st_mode
    except OSError:  # it is not there, or cannot be reached: whoever opens it says so
        return
    if not stat.S_ISREG(mode):
        raise LedgerError(
            f"the privacy ledger's file {path} is {'a symbolic link' if stat.S_ISLNK(mode) else 'no plain file'}, "
            "which can be exchanged unnoticed. Move the file itself there."
        )


def read_anchor(path: Path) -> LedgerHead | None:
    """Return the entry that the anchor names, None if there is no anchor; raises LedgerError."""
    check_path(path)
    if not path.exists():
        return None
    try:
        content = json.loads(read_secret(path))
        head = LedgerHead(content["number"], content["digest"])
    except FolderError as error:
        raise LedgerError(f"the privacy ledger's anchor cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError):
        head = LedgerHead(-2, "")
    if type(head.number) is not int or head.number < -1 or not isinstance(head.digest, str):
        raise LedgerError(
            f"{path} is no anchor of a privacy ledger. Restore it from a backup of the keys, beside which it lies. If "
            "there is none, remove it and see: fedllm ledger restart --help"
        )
    return head


def write_anchor(path: Path, head: LedgerHead) -> None:
    """Let the anchor name `head`; raises LedgerError if it cannot be written."""
    try:
        write_secret(path, json.dumps({"number": head.number, "digest": head.digest}).encode())
    except FolderError as error:
        raise LedgerError(f"the privacy ledger's anchor cannot be written: {error} Nothing was released.") from None


def advance_anchor(path: Path, head: LedgerHead) -> None:
    """Let the anchor name `head` unless another process was faster and it names a later entry; raises LedgerError."""
    with one_at_a_time(path):
        known = read_anchor(path)
        if known is None or known.number < head.number:
            write_anchor(path, head)


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let processes look at the anchor and change it one after the other; raises LedgerError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with exclusive_lock(path):
            yield
    except (OSError, FolderError) as error:
        raise LedgerError(f"cannot use the privacy ledger's anchor {path}: {error} Check its permissions.") from error


def _file_system(path: Path) -> str:
    """Return the kind of file system that `path` lies on, or would; "" if it is not known (Linux: /proc/mounts)."""
    try:
        mounts = [line.split()[1:3] for line in _MOUNTS.read_text("utf-8").splitlines()]
    except OSError:
        return ""
    place = path.parent
    while not place.exists():
        place = place.parent
    here = os.path.realpath(place)
    best = max(
        ((point, kind) for point, kind in mounts if here == point or here.startswith(point.rstrip("/") + "/")),
        key=lambda mount: len(mount[0]), default=("", ""),
    )  # fmt: skip
    return best[1]
