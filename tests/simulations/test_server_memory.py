"""The server's memory does not grow by a copy of the adapter a site: requests are made one by one, uploads added up."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity

import simulations.grid
from simulations.benchmarks.server_memory import play

COPY = 1 << 20  # bytes of an adapter


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid sets it; here it is put back."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)


def most(folder: Path, sites: int) -> int:
    """Return the bytes that a masked round of so many sites allocates at most, sites included."""
    folder.mkdir()
    tracemalloc.start()
    try:
        done = play(folder, sites, COPY // 4, 1, lambda _: None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert done.records[-1].answered == [f"site-{number:04d}" for number in range(sites)]
    assert not done.records[-1].lost
    assert np.linalg.norm(done.adapter) == 0, "the sum of nothing: all masks were taken off"
    return peak


def test_four_times_as_many_sites_take_no_more_copies_of_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulations.grid, "_AT_ONCE", 2)
    play(tmp_path, 3, 3, 1, lambda _: None)  # what has to be imported is
    few, many = most(tmp_path / "few", 8), most(tmp_path / "many", 32)
    assert many - few < 6 * COPY, "and 24 sites more"
