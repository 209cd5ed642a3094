"""Things that are made once a test run, however many processes run its tests."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that `make` filled, in whichever process came first; the others wait, and read it only.

    Whoever wants to write there copies it first.
    """
    root = factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent  # of all workers of the run
    folder = root / f"once-{name}"
    with FileLock(root / f"once-{name}.lock"):
        if not folder.exists():
            new = root / f"once-{name}.new"
            shutil.rmtree(new, ignore_errors=True)  # of a worker that died or failed there
            new.mkdir()
            make(new)
            new.rename(folder)
    return folder
