"""Sites in several processes of one machine: the same federation, and nothing left behind."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import simulations.simulate
from fedllm.audit.summary import RunSummary
from fedllm.config import SimulationConfig
from fedllm.errors import FederationError
from fedllm.protocol.messages import Declined, from_bytes
from server.checkpoint import load_checkpoint
from simulations.simulate import simulate
from simulations.sites import SITE_LOG
from simulations.workers import Workers
from tests.simulations.conftest import CommandLine, Configure

SEEDED: dict[str, Any] = {
    "privacy": {"mode": "distributed", "insecure_seed": 3}, "training": {"rounds": 2, "local_steps": 1},
}  # fmt: skip


def run(config: SimulationConfig) -> RunSummary:
    return simulate(config, lambda *_: None, lambda _: None)


@pytest.fixture
def workers(configure: Configure, tmp_path: Path) -> Iterator[Workers]:
    made = Workers(1, 4, configure(tmp_path).model_dump_json(), str(tmp_path))
    yield made
    made.close()


def test_sites_in_two_processes_train_what_they_train_in_one(tmp_path: Path, configure: Configure) -> None:
    """With the same coins and noise, to the last bit, and every sum opens: a site keeps its secrets in one process."""
    one, two = (
        run(configure(
            tmp_path, f"in-{n}", **SEEDED, federation={"processes": n, "quorum": None},
            site={"budgets": {"jeju": 1e-3}},
        ))
        for n in (1, 2)
    )  # fmt: skip
    assert [record["lost"] for record in two.records] == ["", "", ""]
    first, second = (load_checkpoint(done.folder / "checkpoint.safetensors") for done in (one, two))
    assert np.array_equal(first.adapter, second.adapter)
    assert {name: site["rounds"] for name, site in two.sites.items()} == {"강남": 2, "busan": 2, "daegu": 2, "jeju": 0}
    assert (two.folder / SITE_LOG).read_text("utf-8").count("jeju declines (budget)") == 1
    assert two.peak_memory_mb > one.peak_memory_mb


@pytest.mark.parametrize(("asked", "processes", "given"), [(None, 2, 3), (None, 4, 1), (None, 8, 1), (2, None, 2)])
def test_the_cores_are_shared_out_among_the_processes(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch,
    asked: int | None, processes: int | None, given: int,
) -> None:  # fmt: skip
    made = list[tuple[int, int | None]]()

    class Noted:
        def __init__(self, number: int, sites: int, config_json: str, folder: str) -> None:
            made.append((number, SimulationConfig.model_validate_json(config_json).site.threads))

        def close(self) -> None:
            pass

    monkeypatch.setattr(simulations.simulate, "Workers", Noted)
    monkeypatch.setattr(simulations.simulate, "_cores", lambda: 6)
    config = configure(tmp_path, federation={"processes": processes}, site={"threads": asked})
    with simulations.simulate._workers(config, tmp_path, 10):
        assert made == [(processes or 3, given)]


def test_what_cannot_be_read_is_declined_in_a_process_of_its_own_too(workers: Workers) -> None:
    assert from_bytes(workers.handle(2, b"nonsense"), Declined).reason == "message"


def test_a_process_that_was_killed_is_an_error_that_says_what_to_do(workers: Workers) -> None:
    ((_, _, process),) = workers._workers
    process.kill()
    process.join()
    with pytest.raises(FederationError, match=r"Was it killed for memory\? Lower federation\.processes"):
        workers.handle(0, b"")


def ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # whoever inherited it has not looked yet
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_run_however_it_ends(
    tmp_path: Path, fedllm: CommandLine, overrides: Callable[..., list[str]], until: Callable[..., None], how: int
) -> None:
    command = fedllm.start(
        "simulate",
        *overrides(tmp_path, training={"rounds": 10_000}, privacy={"mode": "off"}, federation={"processes": 2}),
    )
    process = psutil.Process(command.pid)
    until(lambda: (tmp_path / "run" / "checkpoint.safetensors").exists())
    family = process.children(recursive=True)
    assert len(family) >= 2
    command.kill(how)
    assert command.wait().code == (130 if how == signal.SIGINT else -signal.SIGKILL)
    until(lambda: all(map(ended, family)))
