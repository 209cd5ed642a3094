"""How a test run goes: which process gets which tests, and that nothing is left behind. Hooks for conftest.py."""

import ctypes
import gc
import getpass
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest
from xdist.scheduler import LoadFileScheduling

_PR_SET_CHILD_SUBREAPER = 36  # Linux, prctl(2): whose parent has died becomes a child of this process
_ENDING = 120  # seconds in which what was told to end has ended
_ROOT = Path(__file__).parents[1]
_HOMES = tuple(Path.home() / name for name in (".fedllm", ".flwr"))  # of the product and of Flower
_LIBRARIES = ("resource_tracker", "compile_worker", "forkserver")  # processes that live as long as the test process
_CACHES = (
    "torchinductor_",
    "pymp-",
    "ray",
    ".pytest_cache",
    ".mypy_cache",
    ".ruff_cache",
    ".hypothesis",
    "__pycache__",
)


# ---- which process gets which tests ----------------------------------------------------------------------------------


def _unit(path: str) -> str:
    """Return what runs in one process: a file, for its fixtures; and all deployments, which would take each other's
    cores."""
    return "deployment" if "tests/deployment/" in path else path


class _Units(LoadFileScheduling):  # type: ignore[misc]
    def _split_scope(self, nodeid: str) -> str:
        return _unit(nodeid.partition("::")[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> _Units:
    config.option.loadscopereorder = False  # `pytest_collection_modifyitems` has
    return _Units(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what takes long, so that no process is left alone with it at the end."""

    def unit(item: pytest.Item) -> str:
        return _unit(item.nodeid.partition("::")[0])

    slow = {unit(item) for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (unit(item) != "deployment", unit(item) not in slow))


# ---- what it costs ---------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Have the search for garbage pass over what was imported: it took a third of the time of many files."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


# ---- that nothing is left behind -------------------------------------------------------------------------------------


class _Before:
    """How things were before the first test. Ports need no look: a port is left only by a process that is."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        system = tempfile.gettempdir()
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", system)  # pytest keeps its own folders, to be looked at
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{system}/torchinductor_{getpass.getuser()}")
        self.scratch = Path(tempfile.mkdtemp(prefix="ft-", dir=system))  # short: the path of a socket
        self.scratch.chmod(0o711)  # some tests are other users, too
        os.environ["TMPDIR"], tempfile.tempdir = str(self.scratch), None
        self._files = _files()

    def left(self) -> list[str]:
        """Return what is there now and was not; end it."""
        mine = psutil.Process().children(recursive=True)
        mine = [each for each in mine if not any(word in _command(each) for word in _LIBRARIES)]
        _, alive = psutil.wait_procs(mine, timeout=_ENDING)
        found = [f"process {each.pid}: {_command(each)}" for each in alive]
        for each in alive:
            each.kill()
        new = _files() - self._files | set(self.scratch.iterdir())
        found += [f"file {path}" for path in sorted(new) if not path.name.startswith(_CACHES)]
        shutil.rmtree(self.scratch, ignore_errors=True)
        return found


def _files() -> set[Path]:
    return {path for place in (_ROOT, Path.cwd(), *_HOMES) if place.is_dir() for path in place.iterdir()}


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())  # of a process that has ended: nothing
    except psutil.Error:
        return ""


_BEFORE = pytest.StashKey[_Before]()


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # the first process alone looks, when all others have ended
        session.config.stash[_BEFORE] = _Before()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    before = session.config.stash.get(_BEFORE, None)
    if before is None or not (left := before.left()):
        return
    text = "the tests have left behind:\n" + "\n".join(left)
    report = pytest.TestReport(
        "tests", ("tests", None, "tests"), {}, "failed", text, "teardown", sections=[], duration=0.0
    )
    session.config.pluginmanager.get_plugin("terminalreporter").stats.setdefault("error", []).append(report)
    if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
