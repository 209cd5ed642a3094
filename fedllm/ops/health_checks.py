"""Health checks for `fedllm doctor`: results of one line each with what to do, and the checks that both ends share."""

import ctypes
import os
import platform
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from fedllm.crypto.certificates import CertificateFacts
from fedllm.errors import FedllmError, FolderError
from fedllm.files import check_private, locked
from fedllm.protocol.enrolment import now

_GIB = 1 << 30
_WARN, _URGENT = timedelta(days=30), timedelta(days=14)  # before a certificate ends
_UNSYNCHRONISED = 16_000_000  # microseconds; at this possible error the kernel calls its clock unsynchronised


@dataclass(frozen=True)
class CheckResult:
    """What one check found."""

    level: Literal["ok", "warning", "ERROR"]
    text: str  # what was found; if it is not ok, what to do. Never a record's content

    @property
    def right(self) -> bool:
        """Whether nothing has to be put right before a run."""
        return self.level != "ERROR"


def ok(text: str) -> CheckResult:
    """Nothing to do."""
    return CheckResult("ok", text)


def warning(text: str) -> CheckResult:
    """It works, but needs attention."""
    return CheckResult("warning", text)


def failure(text: str) -> CheckResult:
    """It does not work, or is not safe."""
    return CheckResult("ERROR", text)


Check = Callable[[], list[CheckResult]]


def run_checks(*looks: Check) -> list[CheckResult]:
    """Return the results of all checks; an error of one is its result, and equal results are given once."""
    found: list[CheckResult] = []
    for look in looks:
        try:
            found += look()
        except FedllmError as error:
            found.append(failure(str(error)))
        except OSError as error:
            found.append(failure(f"{error}. Run fedllm doctor as the owner of the folder."))
    return list(dict.fromkeys(found))


# ---- certificates and clocks -----------------------------------------------------------------------------------------


def certificate(what: str, facts: CertificateFacts, remedy: str) -> CheckResult:
    """Look how long a certificate holds; of a short-lived one the last third and sixth are what 30 and 14 days are."""
    left, life = facts.ends - now(), facts.ends - facts.begins
    if facts.begins > now():
        return failure(
            f"{what} is valid from {facts.begins:%Y-%m-%d %H:%M} UTC, and the clock here says {now():%Y-%m-%d %H:%M}. "
            f"Set the clock: timedatectl set-ntp true. If it is right: {remedy}"
        )
    if left <= timedelta(0):
        return failure(f"{what} has ended on {facts.ends:%Y-%m-%d}. Remedy: {remedy}")
    text = f"{what} ends on {facts.ends:%Y-%m-%d}, in {left.days} days"
    if left <= min(_URGENT, life / 6):
        return failure(f"{text}. Remedy: {remedy}")
    if left <= min(_WARN, life / 3):
        return warning(f"{text}. Remedy: {remedy}")
    return ok(text)


def clock(last: datetime | None, what: str) -> list[CheckResult]:
    """Look whether this clock is kept right, and not behind `last`, the newest time at which `what` was made."""
    if last is not None and last > now() + timedelta(seconds=60):
        return [
            failure(
                f"clock: it says {now():%Y-%m-%d %H:%M:%S} UTC, but {what} was made on {last:%Y-%m-%d %H:%M:%S}. Set "
                "the clock here, or there: timedatectl set-ntp true"
            )
        ]
    synchronised = _synchronised()
    if synchronised is None:
        return [warning("clock: the system does not say if it is synchronised. Compare it by hand: date")]
    if not synchronised:
        return [warning("clock: not synchronised, and certificates depend on it. Remedy: timedatectl set-ntp true")]
    return [ok("clock: synchronised")]


def _synchronised() -> bool | None:
    """Ask the kernel, as timedatectl does (adjtimex(2)); None if it does not tell."""
    fields = (ctypes.c_long * 64)()  # struct timex: modes, offset, freq, maxerror, ...; all of modes 0: only asks
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.byref(fields))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else bool(fields[3] < _UNSYNCHRONISED)


# ---- the machine -----------------------------------------------------------------------------------------------------


def versions() -> list[CheckResult]:
    """Look whether the libraries are those that fedllm works with."""
    have = {}
    for name in ("fedllm", "flwr", "torch", "cryptography", "grpcio"):
        try:
            have[name] = version(name)
        except PackageNotFoundError:
            return [failure(f"versions: {name} is not installed. Remedy: pip install -c constraints.txt fedllm")]
    shown = ", ".join(f"{name} {number}" for name, number in {**have, "Python": platform.python_version()}.items())
    return [ok(f"versions: {shown}; the same fedllm belongs at the other end")]


def disk(what: str, place: Path, least: float = 1.0, better: float = 5.0) -> CheckResult:
    """Check for room where `what` is written, in GiB: ERROR below `least`, a warning below `better`."""
    while not place.exists():
        place = place.parent
    usage, inodes = shutil.disk_usage(place), os.statvfs(place)
    free = usage.free / _GIB
    text = f"disk: {free:.1f} GiB free for {what} ({place})"
    if free < least:
        return failure(f"{text}, and {least:g} are needed. Free some space: a full disk ends the run.")
    if inodes.f_files and inodes.f_favail < 1000:
        return failure(
            f"disk: only {inodes.f_favail} more files fit for {what} ({place}). Remove files: df -i '{place}'"
        )
    if free < better:
        return warning(f"{text}; {better:g} are better. Free some space.")
    return ok(text)


def size(what: str, place: Path, most: float, remedy: str) -> list[CheckResult]:
    """Warn if a file, or all files of a folder, have grown over `most` GiB."""
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    gib = sum(file.lstat().st_size for file in files) / _GIB
    return [] if gib <= most else [warning(f"disk: {what} has grown to {gib:.1f} GiB ({place}). Remedy: {remedy}")]


def proxies(hosts: Sequence[str]) -> list[CheckResult]:
    """Look for variables that would send connections to `hosts` through a proxy."""
    spared = {name.strip() for key in ("no_proxy", "NO_PROXY") for name in os.environ.get(key, "").split(",")}
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        missing = [host for host in hosts if host not in spared]
        if os.environ.get(name) and missing and "*" not in spared:
            return [
                warning(
                    f"environment: {name} is set, so connections to {', '.join(missing)} go through that proxy. "
                    f"If they should not: export no_proxy={','.join(hosts)}"
                )
            ]
    return []


# ---- folders ---------------------------------------------------------------------------------------------------------


def access(folder: Path, secret: Sequence[Path]) -> list[CheckResult]:
    """Look whether anybody but the folder's owner can read or change something in it.

    `secret` are the files and folders in it without whose privacy no command works.
    """
    owner = folder.stat().st_uid
    if os.geteuid() not in (0, owner):
        return [
            failure(f"{folder} belongs to {_user(owner)}. Run the command as that user: sudo -u {_user(owner)} ...")
        ]
    found = list(_refused([folder, *secret]))
    known = {folder, *secret}
    inside = [place for place in sorted(folder.rglob("*")) if not place.is_symlink() and not place.is_socket()]
    loose = [place for place in inside if place not in known and place.stat().st_mode & 0o077]
    if loose:
        text = f"{loose[0]} and {len(loose) - 1} more" if loose[1:] else str(loose[0])
        found.append(
            warning(f"access: only the folder's own mode keeps others from {text}. Run: chmod -R go-rwx '{folder}'")
        )
    foreign = [place for place in inside if place.stat().st_uid != owner]
    if foreign:
        found.append(
            failure(
                f"access: {foreign[0]} belongs to {_user(foreign[0].stat().st_uid)}, the folder to {_user(owner)}: a "
                f"command was run as another user. Run: chown -R {_user(owner)} '{folder}'"
            )
        )
    for parent in folder.resolve().parents:
        mode = parent.stat().st_mode
        if mode & 0o002 and not mode & stat.S_ISVTX:
            found.append(
                failure(
                    f"access: everybody may write to {parent}, and could put another folder in the place of {folder}. "
                    f"Run: chmod o-w '{parent}'"
                )
            )
    return found or [ok(f"access: {folder} is {_user(owner)}'s alone; what fedllm writes is made with umask 077")]


def _refused(places: Sequence[Path]) -> Iterator[CheckResult]:
    for place in places:
        try:
            if place.exists():
                check_private(place)
        except FolderError as error:
            yield failure(str(error))


def _user(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def is_locked(folder: Path) -> bool:
    """Whether a long-running command holds this folder."""
    if not folder.is_dir():
        return False
    try:
        with locked(folder):
            return False
    except FolderError:
        return True
