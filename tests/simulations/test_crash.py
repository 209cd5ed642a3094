"""kill -9 of the real command, wherever it is, and resume=true: nothing is lost, damaged or paid for twice."""

import json
import signal
import sqlite3
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from fedllm.config import SimulationConfig
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import AccountingEvent, spent
from fedllm.privacy.ledger import LedgerFile
from fedllm.values import parse
from server.checkpoint import load_checkpoint
from tests.simulations.conftest import BRANCHES

ROUNDS = 12  # so many that a watcher who is kept waiting still comes before the end

Overrides = Callable[..., list[str]]
Until = Callable[[Callable[[], bool]], None]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rounds on record; the file is replaced as a whole, so no line is ever half written."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def charges(folder: Path) -> dict[str, list[AccountingEvent]]:
    """What every site has paid; each ledger must be sound."""
    paid = {}
    for file in (folder / "sites").glob("*/ledger.db"):
        with sqlite3.connect(file) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        db.close()
        ledger = LedgerFile(file)
        if ledger.lines():  # killed before its first entry: as good as not there
            ledger.verify()
        paid[file.parent.name] = [charge.event for charge in ledger.charges()]
    return paid


def check_what_a_crash_left(folder: Path) -> None:
    """All that was begun is whole, and no site has paid for more than one round that is not on record."""
    parse(RunPlan, json.loads((folder / "plan.json").read_text("utf-8")))
    parse(SimulationConfig, json.loads((folder / "config.json").read_text("utf-8")))
    recorded = metrics(folder)
    assert [line["round"] for line in recorded] == list(range(len(recorded)))
    assert load_checkpoint(folder / "checkpoint.safetensors").round in (len(recorded) - 1, len(recorded) - 2)
    for site, events in charges(folder).items():
        assert len(recorded) - 1 <= len(events) <= len(recorded), site


def check_outputs(folder: Path) -> None:
    """Every file of a finished run can be read."""
    assert load_file(folder / "adapter" / "adapter_model.safetensors")
    json.loads((folder / "adapter" / "adapter_config.json").read_text("utf-8"))
    for plot in ("rounds", "sites"):
        ET.fromstring((folder / f"{plot}.svg").read_text("utf-8"))
        assert (folder / f"{plot}.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    for text in ("summary.md", "summary.ko.md", "adapter/README.md"):
        assert "Ended early" not in (folder / text).read_text("utf-8")
    assert not list(folder.glob("*.new")), "half-written files"


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    fedllm: Any, overrides: Overrides, until: Until, tmp_path: Path
) -> None:
    arguments = overrides(tmp_path, training={"rounds": ROUNDS, "local_steps": 1})
    folder = tmp_path / "run"
    moments: list[Callable[[], bool]] = [
        lambda: len(list((folder / "sites").glob("*/ledger.db"))) > 0,  # within the first round
        lambda: len(metrics(folder)) >= 4,
        lambda: len(metrics(folder)) >= 7,
    ]
    again: list[str] = []
    for moment in moments:
        command = fedllm.start("simulate", *arguments, *again)
        until(moment)
        command.kill(signal.SIGKILL)
        result = command.wait()
        assert result.code == -signal.SIGKILL, result.text
        assert not (folder / "summary.md").exists()
        check_what_a_crash_left(folder)
        again = ["resume=true"]

    result = fedllm("simulate", *arguments, *again)
    assert result.code == 0, result.text
    recorded = metrics(folder)
    assert [line["round"] for line in recorded] == list(range(ROUNDS + 1))
    assert all(line["answered"] == sorted(BRANCHES) for line in recorded[1:]), "every site, in every round"
    paid = charges(folder)
    assert set(paid) == set(BRANCHES)
    for site, events in paid.items():
        assert len(events) == ROUNDS, f"{site}: one charge a round"
        assert spent(events, 1e-3).epsilon == recorded[-1]["epsilon"]
    check_outputs(folder)


def test_a_run_that_is_killed_before_its_first_checkpoint_is_started_over(
    fedllm: Any, overrides: Overrides, until: Until, tmp_path: Path
) -> None:
    arguments = overrides(tmp_path, training={"rounds": 2, "local_steps": 1}, privacy={"mode": "off"})
    folder = tmp_path / "run"
    command = fedllm.start("simulate", *arguments)
    until((folder / "plan.json").exists)
    command.kill(signal.SIGSTOP)
    if (folder / "checkpoint.safetensors").exists():  # the watcher was kept waiting: put the folder back to that moment
        for file in folder.glob("checkpoint.*"):
            file.unlink()
    command.kill(signal.SIGKILL)
    assert command.wait().code == -signal.SIGKILL
    result = fedllm("simulate", *arguments, "resume=true")
    assert result.code == 1
    assert "without resume=true" in result.error
    assert fedllm("simulate", *arguments).code == 0
    assert [line["round"] for line in metrics(folder)] == [0, 1, 2]
    check_outputs(folder)


def test_a_folder_is_free_again_once_its_run_was_killed(
    fedllm: Any, overrides: Overrides, until: Until, tmp_path: Path
) -> None:
    """And not before."""
    arguments = overrides(tmp_path, training={"rounds": ROUNDS, "local_steps": 1}, privacy={"mode": "off"})
    command = fedllm.start("simulate", *arguments)
    until(lambda: len(metrics(tmp_path / "run")) >= 2)
    command.kill(signal.SIGSTOP)
    refused = fedllm("simulate", *arguments, "resume=true")
    assert (refused.code, "in use by another run" in refused.error) == (1, True), refused.text
    command.kill(signal.SIGKILL)
    assert command.wait().code == -signal.SIGKILL
    assert fedllm("simulate", *arguments, "resume=true").code == 0
