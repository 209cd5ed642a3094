"""Files on disk: atomic writes, folders made as a whole, private modes, locks and unix sockets."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedllm.errors import ConfigError, FedllmError, FolderError, first_line

LOCK = "lock"  # the file whose lock tells that a process is at work in a folder
_MAX_SOCKET = 107  # bytes of a unix socket's path (unix(7): sun_path)


def replace_file(path: Path, data: bytes, mode: int | None = None) -> None:
    """Replace the file at `path` as a whole: after a crash it holds the old bytes or the new ones.

    `mode` is set whatever the umask; None leaves the mode to the umask. Raises OSError; the old file is then untouched.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        if mode is not None:
            temporary.touch(mode)  # so that nobody opens it before its mode is set
        with temporary.open("wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise an OSError for what libraries in Rust make of one: it says in words alone what the system said."""
    try:
        yield
    except FedllmError:
        raise
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None or isinstance(error, OSError):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def is_full(error: OSError) -> bool:
    """Whether a write failed because there was no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_secret(path: Path, data: bytes) -> None:
    """Replace the file at `path` as a whole, mode 0600; folders that are missing are made, mode 0700.

    Raises FolderError if the disk is full or not writable; the old file is then untouched.
    """
    try:
        _make_private(path.parent)
        replace_file(path, data, 0o600)
    except OSError as error:
        raise cannot_write(path, error) from error


def remove(path: Path) -> None:
    """Remove a file, for good, if it is there; raises FolderError."""
    try:
        if path.exists():
            path.unlink()
            _sync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to fill, mode 0700, that takes its place at `folder` when the block ends without an error.

    After a crash `folder` holds everything or does not exist. Raises FolderError if it exists and is not empty.
    """
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(_entries(folder)))):
        raise FolderError(f"{folder} exists and is not empty. Nothing was overwritten; choose another folder.")
    try:
        _make_private(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))  # mode 0700
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield temporary
        _sync(temporary)
        temporary.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already if all went well


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time change `folder`; raises FolderError if there is no such folder or it is taken."""
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise cannot_read(folder, error) from None
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(f"{folder}: another command is changing this folder. Wait until it is done.") from None
        yield
    finally:
        os.close(opened)


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Let processes change the file at `path` one after the other; a file beside it carries the lock."""
    try:
        opened = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def try_lock(file: IO[str]) -> bool:
    """Take an open file's lock, until it is closed or the process ends; False if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_locked(folder: Path) -> bool:
    """Whether a process has taken the lock of a folder's LOCK file: it is at work there."""
    try:
        with (folder / LOCK).open("r") as file:
            return not try_lock(file)
    except OSError:
        return False


def check_private(path: Path) -> None:
    """Raise FolderError unless `path` exists and only its owner may use it."""
    try:
        found = path.stat()
    except OSError as error:
        raise cannot_read(path, error) from None
    if found.st_mode & 0o077:
        right = "700" if stat.S_ISDIR(found.st_mode) else "600"
        raise FolderError(
            f"{path} has mode {stat.S_IMODE(found.st_mode):03o}: others than its owner may use it. "
            f"Run: chmod {right} '{path}', and treat its contents as exposed."
        )


def stamp(*files: Path) -> list[tuple[int, int]]:
    """Return what changes when one of these files is replaced, as `replace_file` does; raises FolderError."""
    found = []
    for file in files:
        try:
            state = file.stat()
        except OSError as error:
            raise cannot_read(file, error) from None
        found.append((state.st_mtime_ns, state.st_ino))
    return found


def make_socket(path: Path, bind: Callable[[str], object], group: int | None = None) -> None:
    """Have `bind` make a unix socket that its owner may use, and `group`, without a moment in which others may.

    `bind` takes gRPC's name of the place. Raises ConfigError if the socket cannot be made.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of a process that was killed
        before = os.umask(0o177)
        try:
            bind(f"unix:{path}")
        finally:
            os.umask(before)
        if group is not None:
            os.chown(path.parent, -1, group)
            path.parent.chmod(0o710)
            os.chown(path, -1, group)
            path.chmod(0o660)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"socket={path}: cannot be made ({error}). The folder must be writable.") from None


def check_socket(path: Path, settings: str) -> Path:
    """Return the path of a unix socket; raises ConfigError if it is too long for one (unix(7): sun_path)."""
    length = len(os.fsencode(path.absolute()))
    if length > _MAX_SOCKET:
        raise ConfigError(
            f"socket={path}: {length} bytes, and the system takes at most {_MAX_SOCKET}. Give a shorter path as socket "
            f"in {settings}, such as /run/fedllm/link.sock."
        )
    return path


def read_secret(path: Path) -> bytes:
    """Return the bytes of a file that only its owner may use; raises FolderError."""
    check_private(path)
    return read(path)


def read(path: Path, limit: int | None = None) -> bytes:
    """Return the bytes of a file; raises FolderError if it cannot be read or is larger than `limit` bytes."""
    try:
        if limit is not None and path.stat().st_size > limit:
            raise FolderError(f"{path} is larger than {limit} bytes, so it is not the file that is meant here.")
        return path.read_bytes()
    except OSError as error:
        raise cannot_read(path, error) from None


def cannot_read(path: Path, error: OSError) -> FolderError:
    """Return the error that says why `path` cannot be read."""
    remedy = {
        errno.ENOENT: "Check the path, or restore it from a backup",
        errno.EACCES: "Run the command as the owner of the file",
    }.get(error.errno or 0, "Check the path and the disk")
    return FolderError(f"cannot read {path}: {error.strerror}. {remedy}.")


def cannot_write(
    path: Path, error: OSError, then: str = "try again", kind: type[FedllmError] = FolderError
) -> FedllmError:
    """Return the error that says why `path` cannot be written, and what to do before `then`."""
    remedy = "Free some space" if is_full(error) else "Check who owns the folder and its permissions"
    reason = error.strerror or first_line(error)
    return kind(f"cannot write {path}: {reason}. What was there is intact. {remedy}, then {then}.")


def _make_private(folder: Path) -> None:
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(mode=0o700, exist_ok=True)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise cannot_read(folder, error) from None


def _sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
