"""Processes of fedllm's own, in whatever program it is used."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def without_main() -> Iterator[None]:
    """Start processes in this block that do not import the program's main module.

    `multiprocessing` has each new process do so, which would run a script again that has no `if __name__ ==
    "__main__"`. What processes of fedllm's run is in modules of its own.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
