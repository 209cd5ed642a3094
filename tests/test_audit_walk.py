"""The walk-through of docs/audit.md, command by command, and what it shows; with fewer rounds, records and steps."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedllm.cli.main import app
from fedllm.errors import FedllmError
from tests.conftest import some_of_the_demo

PAGE = Path(__file__).parents[1] / "docs" / "audit.md"
# What makes a run quick. Two runs of two rounds fit the budget of the page, as two of six do, and one round of a third.
QUICK = [
    "training.rounds=2", "privacy.sampling_rate=0.05", "privacy.self_check=false",
    "data.train=some.jsonl", "data.heldout_limit=8", "data.samples=0", "model.compile=off", "federation.processes=1",
]  # fmt: skip


def steps() -> list[tuple[list[str], str]]:
    """Return the commands of each block, and what the page shows of their output."""
    text = PAGE.read_text("utf-8")
    found = re.findall(r"^```sh walk\n(.*?)^```\n```text\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(found) == text.count("```sh walk")
    return [(commands.splitlines(), shown) for commands, shown in found]


def shape(text: str) -> str:
    """Leave out figures, digests and the frames of tables: they differ from run to run."""
    text = re.sub(r"[0-9a-f]*\d[0-9a-f.-]*", "#", re.sub(r"[━┏┳┓┃┡╇┩│└┴┘─]", " ", text))
    return " ".join(text.split())


def run(line: str) -> tuple[int, str]:
    """Run one line in the working folder; return its exit status and all that was said."""
    words = shlex.split(line)
    if words[0] != "fedllm":
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
        )
        return done.returncode, done.stdout + done.stderr
    result = CliRunner().invoke(app, words[1:] + (QUICK if words[1] == "simulate" else []), env={"COLUMNS": "300"})
    if isinstance(result.exception, FedllmError):
        return 1, f"{result.output}error {result.exception}"
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.slow
@pytest.mark.timeout(900)  # it makes three runs and several reports
@pytest.mark.filterwarnings("default")  # third-party packages warn; tests of our own code make warnings errors
def test_the_walk_through_goes_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_pdfs: None, without_plots: None
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some_of_the_demo())
    Path("some.jsonl").write_text(rows, "utf-8")
    for commands, shown in steps():
        said = ""
        for number, line in enumerate(commands, start=1):
            code, output = run(line)
            fails = shown.startswith("error") and number == len(commands)
            assert code == fails, f"{line}\n{output}"
            said += output + "\n"
        for line in filter(None, map(shape, shown.splitlines())):
            assert line in shape(said), f"{line}\n{said}"
    audit = tmp_path / "head-office" / "autumn" / "audit"
    assert '<html lang="ko">' in (audit / "audit.ko.html").read_text("utf-8")


def test_every_fedllm_command_that_the_page_fences_is_walked() -> None:
    text = PAGE.read_text("utf-8")
    fenced = re.findall(r"^```(.*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for kind, block in fenced:
        assert kind == "sh walk" or not re.search("^fedllm ", block, flags=re.MULTILINE), block
