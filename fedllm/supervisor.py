"""Keeps long-running processes alive: starts them, and starts them again when they die, hang or have to change."""

import ctypes
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.errors import ConfigError

_log = logging.getLogger("fedllm.supervisor")
_LOOK = 0.5  # seconds between looks at the processes
_EXAMINE = 15.0  # seconds between examinations, which may take a while themselves
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 10.0  # seconds before a process that died is started again
_SOUND = 60.0  # seconds of life after which a process counts as sound
_GRACE = 15.0  # seconds to end by itself
_PR_SET_PDEATHSIG = 1  # Linux, prctl(2)


def _well(pid: int) -> str | None:
    del pid
    return None


def _always() -> Hashable:
    return None


def _idle(pid: int) -> bool:
    del pid
    return False


@dataclass(frozen=True)
class Child:
    """One process to keep alive."""

    name: str
    command: Callable[[], Sequence[str]]  # asked for at every start
    log: Path  # receives all output
    env: Mapping[str, str] = field(default_factory=dict)  # added to this process's own
    made_of: Callable[[], Hashable] = _always  # another value than at its start: it is started again
    busy: Callable[[int], bool] = _idle  # of its process id: whether a start for another `made_of` has to wait
    ails: Callable[[int], str | None] = _well  # of its process id: why it must be started again, None where it need not


class Supervisor:
    """Runs children until `stop` is set; they end with this process, even if that is killed."""

    def __init__(self, children: Sequence[Child], say: Callable[[str], None]) -> None:
        self._wards = [_Ward(child, say) for child in children]

    def run(self, stop: threading.Event) -> None:
        """Keep all children alive until `stop`, then end them."""
        try:
            while not stop.is_set():
                for ward in self._wards:
                    ward.look()
                stop.wait(_LOOK)
        finally:
            for ward in self._wards:
                ward.signal(signal.SIGTERM)
            deadline = time.monotonic() + _GRACE
            for ward in self._wards:
                ward.end(deadline)


class _Ward:
    """One child and the state of its process."""

    def __init__(self, child: Child, say: Callable[[str], None]) -> None:
        self._child, self._say = child, say
        self._process: subprocess.Popen[bytes] | None = None
        self._pause, self._not_before = _FIRST_PAUSE, 0.0
        self._began = self._examined = 0.0
        self._made_of: Hashable = None

    def look(self) -> None:
        """Start, restart or leave alone, as the state of the process demands."""
        now = time.monotonic()
        if self._process is None:
            if now >= self._not_before:
                self._start()
        elif (code := self._process.poll()) is not None:
            self._pause = _FIRST_PAUSE if now - self._began > _SOUND else min(2 * self._pause, _LONGEST_PAUSE)
            self._process, self._not_before = None, now + self._pause
            what = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            self._say(f"{self._child.name} ended ({what}); see {self._child.log}. Again in {self._pause:.0f} s")
        elif self._child.made_of() != self._made_of and not self._child.busy(self._process.pid):
            self._again("its keys or settings have changed")
        elif now - self._examined > _EXAMINE:
            why = self._child.ails(self._process.pid)
            self._examined = time.monotonic()
            if why:
                self._again(why)

    def _start(self) -> None:
        child = self._child
        self._made_of = child.made_of()
        self._began = self._examined = time.monotonic()
        try:
            child.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with child.log.open("ab") as log:
                self._process = subprocess.Popen(
                    list(child.command()),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **child.env},
                    preexec_fn=_die_with_parent,  # noqa: PLW1509  # nothing but one system call
                )
        except OSError as error:
            raise ConfigError(f"{child.name} cannot be started: {error}") from None
        self._say(f"{child.name} started (process {self._process.pid})")

    def _again(self, why: str) -> None:
        self._say(f"{self._child.name} is started again: {why}")
        self.signal(signal.SIGTERM)
        self.end(time.monotonic() + _GRACE)
        self._process, self._not_before, self._pause = None, 0.0, _FIRST_PAUSE

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process if there is one."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def end(self, deadline: float) -> None:
        """Wait for the process until `deadline`, then kill it."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def until_told(run: Callable[[threading.Event], None]) -> None:
    """Call `run` with an event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    run(stop)
