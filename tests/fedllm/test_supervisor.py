"""What dies is started again, later and later; what hangs, ails or has changed is replaced; nothing is left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from fedllm import supervisor
from fedllm.errors import ConfigError
from fedllm.supervisor import Child, Supervisor

pytestmark = pytest.mark.processes

FOREVER = "import time; time.sleep(600)"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_LOOK", 0.01), ("_EXAMINE", 0.02), ("_FIRST_PAUSE", 0.05), ("_GRACE", 20.0)):
        monkeypatch.setattr(supervisor, name, seconds)


def until(come_about: Callable[[], object], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not come_about():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


class Story:
    """What a supervisor said, and the processes that it started."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)

    @property
    def pids(self) -> list[int]:
        return [int(line.rpartition("process ")[2].rstrip(")")) for line in self.lines if " started (process " in line]

    def has(self, words: str) -> bool:
        return any(words in line for line in self.lines)


@contextmanager
def supervised(*children: Child) -> Iterator[Story]:
    story, stop = Story(), threading.Event()
    thread = threading.Thread(target=Supervisor(children, story).run, args=(stop,))
    thread.start()
    try:
        yield story
    finally:
        stop.set()
        thread.join(240)
        assert not thread.is_alive()
        assert not any(map(alive, story.pids)), "it ends what it has started"


def child(tmp_path: Path, code: str = FOREVER, **more: object) -> Child:
    return Child("it", lambda: [sys.executable, "-c", code], tmp_path / "log" / "it.log", **more)  # type: ignore[arg-type]


def test_what_is_killed_is_started_again(tmp_path: Path) -> None:
    with supervised(child(tmp_path)) as story:
        for number in (1, 2):
            until(lambda number=number: len(story.pids) == number)
            os.kill(story.pids[-1], signal.SIGKILL)
        until(lambda: len(story.pids) == 3)
        assert story.has("it ended (killed by signal 9)")
        assert len(set(story.pids)) == 3


def test_what_keeps_dying_is_started_later_and_later_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_LONGEST_PAUSE", 0.15)
    pauses: list[float] = []
    monkeypatch.setattr(supervisor._Ward, "_start", _noting_pauses(supervisor._Ward._start, pauses))
    with supervised(child(tmp_path, "print('alas'); raise SystemExit(3)")) as story:
        until(lambda: len(pauses) >= 5)
        assert story.has("it ended (exit code 3)")
    assert pauses[:5] == [0.05, 0.1, 0.15, 0.15, 0.15]
    assert (tmp_path / "log" / "it.log").read_text().count("alas") >= 4


def test_what_lived_long_enough_is_started_again_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_SOUND", 0.0)
    pauses: list[float] = []
    monkeypatch.setattr(supervisor._Ward, "_start", _noting_pauses(supervisor._Ward._start, pauses))
    with supervised(child(tmp_path, "pass")):
        until(lambda: len(pauses) >= 4)
    assert set(pauses) == {0.05}


def _noting_pauses(start: Callable[..., None], pauses: list[float]) -> Callable[..., None]:
    def noting(ward: supervisor._Ward) -> None:
        pauses.append(ward._pause)
        start(ward)

    return noting


def test_output_is_appended_to_the_log_which_is_private(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with supervised(child(tmp_path, f"import os; print(os.environ['WORD'], flush=True); {FOREVER}",
                              env={"WORD": "나무"})):  # fmt: skip
            log = tmp_path / "log" / "it.log"
            until(lambda: log.exists() and log.read_text() == "나무\n")
        assert log.stat().st_mode & 0o777 == 0o600
        assert log.parent.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


def test_another_value_of_what_it_is_made_of_starts_it_again(tmp_path: Path) -> None:
    made_of = ["old"]
    with supervised(child(tmp_path, made_of=lambda: made_of[0])) as story:
        until(lambda: len(story.pids) == 1)
        made_of[0] = "new"
        until(lambda: len(story.pids) == 2)
        assert story.has("its keys or settings have changed")
        assert not alive(story.pids[0])


def test_a_change_waits_while_the_process_is_busy(tmp_path: Path) -> None:
    made_of, busy, asked = ["old"], [True], []

    def is_busy(pid: int) -> bool:
        asked.append(pid)
        return busy[0]

    with supervised(child(tmp_path, made_of=lambda: made_of[0], busy=is_busy)) as story:
        until(lambda: len(story.pids) == 1)
        assert not asked, "nobody has to know before there is a change"
        made_of[0] = "new"
        until(lambda: len(asked) > 5)
        assert len(story.pids) == 1
        assert set(asked) == set(story.pids)
        busy[0] = False
        until(lambda: len(story.pids) == 2)


def test_what_ails_is_started_again_even_if_it_is_busy_and_changed(tmp_path: Path) -> None:
    ill: set[int] = set()
    made_of = ["old"]

    def ails(pid: int) -> str | None:
        return "it hangs" if pid in ill else None

    with supervised(child(tmp_path, made_of=lambda: made_of[0], busy=lambda pid: True, ails=ails)) as story:
        until(lambda: len(story.pids) == 1)
        made_of[0] = "new"
        ill.add(story.pids[0])
        until(lambda: len(story.pids) == 2)
        assert story.has("it is started again: it hangs")


def test_what_does_not_heed_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_GRACE", 0.3)
    ready = tmp_path / "ready"
    deaf = f"import pathlib, signal; signal.signal(15, signal.SIG_IGN); pathlib.Path({str(ready)!r}).touch(); {FOREVER}"
    with supervised(child(tmp_path, deaf)) as story:
        until(ready.exists)
    assert not alive(story.pids[0])


def test_what_heeds_sigterm_may_end_in_good_order(tmp_path: Path) -> None:
    ready, done = tmp_path / "ready", tmp_path / "done"
    orderly = textwrap.dedent(f"""
        import pathlib, signal, time
        def end(*_):
            time.sleep(0.3)
            pathlib.Path({str(done)!r}).touch()
            raise SystemExit
        signal.signal(15, end)
        pathlib.Path({str(ready)!r}).touch()
        time.sleep(600)
    """)
    with supervised(child(tmp_path, orderly)):
        until(ready.exists)
    assert done.exists()


def test_all_children_have_the_grace_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_GRACE", 0.3)
    deadlines, end = set(), supervisor._Ward.end

    def noting(ward: supervisor._Ward, deadline: float) -> None:
        deadlines.add(deadline)
        end(ward, deadline)

    monkeypatch.setattr(supervisor._Ward, "end", noting)
    marks = [tmp_path / str(number) for number in range(4)]
    deaf = [f"import pathlib, signal; signal.signal(15, signal.SIG_IGN); pathlib.Path({str(mark)!r}).touch(); {FOREVER}"
            for mark in marks]  # fmt: skip
    with supervised(*(child(tmp_path, code) for code in deaf)):
        until(lambda: all(mark.exists() for mark in marks))
    assert len(deadlines) == 1, "one for all, not one after the other"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_end_with_their_supervisor_even_if_it_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    code = textwrap.dedent(f"""
        import pathlib, sys
        from fedllm.supervisor import Child, Supervisor, until_told
        child = Child("it", lambda: [sys.executable, "-c", {FOREVER!r}], pathlib.Path({str(tmp_path / "it.log")!r}))
        until_told(Supervisor([child], lambda line: print(line, flush=True)).run)
    """)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline().rpartition("process ")[2].rstrip(")\n"))
        assert alive(pid)
        parent.send_signal(number)
        assert parent.wait(240) == (-9 if number is signal.SIGKILL else 0)
    until(lambda: not alive(pid))


def test_a_command_that_cannot_be_started_is_one_clear_error(tmp_path: Path) -> None:
    lost = Child("it", lambda: [str(tmp_path / "none")], tmp_path / "it.log")
    with pytest.raises(ConfigError, match="it cannot be started"):
        Supervisor([lost], Story()).run(threading.Event())
