"""`make check`: the tests of what has changed, with no process and no more time than a pause has.

`fedllm/crypto/hash_chain.py` is tested by `test_hash_chain.py` and `test_hash_chain_*.py` of `tests/fedllm/crypto`.
What starts a process, is marked slow, or comes when the time is over is skipped; `make test` runs it.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALWAYS = ROOT / "tests" / "test_architecture.py"
SECONDS = 30.0
_STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec")  # Python's audit events


def mirror(changed: Iterable[str], root: Path = ROOT) -> list[Path]:
    """Return the files of tests that belong to changed files, given relative to `root`."""
    found: set[Path] = set()
    for path in map(Path, changed):
        if path.suffix != ".py":
            continue
        if path.parts[:2] == ("tests", "deployment"):
            continue
        if path.parts[0] != "tests":
            place = root / "tests" / path.parent
            found |= {place / f"test_{path.stem}.py", *place.glob(f"test_{path.stem}_*.py")}
        elif path.name.startswith("test_"):
            found.add(root / path)
        elif len(path.parts) > 2:  # what the tests of a folder share
            found |= set((root / path.parent).glob("test_*.py"))
    return sorted(file for file in found if file.exists())


def changed() -> set[str]:
    """Return what differs from the last commit, from the branch `main` where there is one, or is not yet in git."""
    commands = [["diff", "--name-only", "HEAD"], ["ls-files", "--others", "--exclude-standard"]]
    if _git("rev-parse", "--quiet", "--verify", "main"):
        commands.append(["diff", "--name-only", "main...HEAD"])
    return {name for command in commands for name in _git(*command)}


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


class _Quick:
    """Pytest's hooks."""

    def __init__(self) -> None:
        self._over = 0.0

    def pytest_collection_finish(self) -> None:
        self._over = time.monotonic() + SECONDS
        sys.addaudithook(_no_process)

    def pytest_runtest_setup(self) -> None:
        if time.monotonic() > self._over:
            pytest.skip("no time left")


def _no_process(event: str, _: object) -> None:
    """Skip the test that does it, wherever in the product or a library it happens; of a thread, no test would know."""
    if event in _STARTS and threading.current_thread() is threading.main_thread():
        pytest.skip("starts a process")


if __name__ == "__main__":
    files = sorted({*mirror(changed()), ALWAYS})
    print("tests of what has changed:", *(file.relative_to(ROOT) for file in files))  # noqa: T201
    few = "not soak and not slow and not processes"
    sys.exit(pytest.main(["-q", "-p", "no:xdist", "-m", few, *map(str, files)], [_Quick()]))
