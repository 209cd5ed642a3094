"""A disk that fills up: one error that says what to do, no traceback, and the run goes on once there is room."""

import io
import logging
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from fedllm.errors import CheckpointError
from server.checkpoint import writing
from simulations.sites import log_to

Overrides = Callable[..., list[str]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that makes a disk of so many KiB, or gives that size to the one it made."""
    place = tmp_path / "disk"

    def make(size: int) -> Path:
        options = f"size={size}k" if not place.exists() else f"remount,size={size}k"
        place.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)], capture_output=True)
        if done.returncode != 0:
            pytest.skip("mounting is not permitted here")
        return place

    yield make
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


@pytest.mark.parametrize("size", [24, 40, 56, 64, 128])
def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_once_there_is_room(
    fedllm: Any, overrides: Overrides, small_disk: Callable[[int], Path], size: int
) -> None:
    arguments = overrides(small_disk(size), training={"rounds": 2, "local_steps": 1}, privacy={"mode": "off"})
    result = fedllm("simulate", *arguments)
    assert result.code == 1
    for words in ("Traceback", "Logging error", "FEDLLM_TRACEBACK"):
        assert words not in result.text
    assert f"\n{result.error}".count("\nerror ") == 1  # a site's last words may come between
    assert "cannot write " in result.error
    assert "No space left on device" in result.error
    assert "Free some space, then continue with resume=true." in result.error
    small_disk(50_000)
    again = fedllm("simulate", *arguments, "resume=true")
    assert again.code == 0, again.text


class _Full(io.StringIO):
    """A stream on a full disk."""

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_log_that_cannot_be_written_says_nothing_and_hides_no_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A report of logging's own would quote the record, on the screen."""
    handler = log_to(tmp_path)
    assert isinstance(handler, logging.FileHandler)
    (handler.setStream(_Full()) or io.StringIO()).close()
    logger = logging.getLogger("fedllm.site")
    try:
        logger.warning("a customer's question")
        handler.close()
    finally:
        logger.removeHandler(handler)
    assert capfd.readouterr().err == ""


def test_a_log_that_cannot_be_opened_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "sites").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write .*sites\.log: File exists"):
        log_to(tmp_path)


def test_what_writers_of_other_libraries_say_becomes_the_same_error(tmp_path: Path) -> None:
    for error in (SafetensorError("I/O error: No space left on device (os error 28)"), OSError(28, "No space left")):
        with pytest.raises(CheckpointError, match="Free some space, then continue with resume=true"), writing(tmp_path):
            raise error
    with pytest.raises(SafetensorError, match="shape"), writing(tmp_path):
        raise SafetensorError("a wrong shape")
