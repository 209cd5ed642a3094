"""A small federation to simulate: four branches of Korean and English records, and a command line to run it with."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import BertConfig, BertModel

import fedllm.cli.main
from fedllm.config import SimulationConfig
from fedllm.values import parse
from tests.conftest import byte_tokenizer

BRANCHES = ("강남", "busan", "daegu", "jeju")
Row = dict[str, Any]


def _rows(branches: tuple[str, ...], persons: int) -> list[Row]:
    rows = []
    for branch in branches:
        for i in range(persons):
            korean = i % 2 == 0
            for k in range(1 + i % 3 // 2):  # every third person has two records
                rows.append(
                    {
                        "branch": branch,
                        "customer_id": f"{branch}-{i}",
                        "lang": "ko" if korean else "en",
                        "question": f"창구 {i}.{k}?" if korean else f"desk {i}.{k}?",
                        "answer": f"{(i + k) % 4}번" if korean else f"no {(i + k) % 4}",
                        "topic": ("카드", "loan", "visa")[i % 3],
                    }
                )
    return rows


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    """Records of four branches: 18 persons each, some with two records."""
    return _rows(BRANCHES, persons=18)


@dataclass(frozen=True)
class Records:
    """Files of records."""

    train: Path
    heldout: Path


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> Records:
    folder = tmp_path_factory.mktemp("records")
    return Records(write(folder / "train.jsonl", rows), write(folder / "heldout.jsonl", _rows(BRANCHES[:2], 3)))


Sections = Mapping[str, Any]


@pytest.fixture(scope="session")
def settings(tiny_llama: Path, records: Records) -> dict[str, Any]:
    """The plain data of a small configuration, all but `name` and `output`."""
    return {
        "seed": 5,
        # tests that want them say so: a report takes longer than the run
        "audit": {"report": False, "canaries": 0}, "evaluation": {"every": None},
        "model": {"source": str(tiny_llama), "max_length": 32},
        "data": {
            "train": str(records.train), "heldout": str(records.heldout), "prompt": "{question}\n", "text": "{answer}",
            "unit": "customer_id", "description": "generated", "samples": 0,
        },
        "adapter": {"rank": 2, "targets": ["q_proj", "v_proj"]},
        "privacy": {
            "mode": "local", "unit": "person", "records_per_person": 2, "epsilon": 8.0, "delta": 1e-3,
            "self_check": False,  # as long as all else of so small a run; test_simulate.py has runs with it
            "clip_norm": 1.0, "sampling_rate": 0.4,
            "noise_multiplier": 1.0,  # spares most tests the search for it; epsilon is then about 4.6
        },
        "training": {"rounds": 3, "local_steps": 2, "learning_rate": 0.5, "wire": "float32"},
        "federation": {"partition": {"by": "natural", "column": "branch"}, "quorum": 2,
                       "round_timeout": 600.0, "processes": 1},
        "site": {},
    }  # fmt: skip


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes`, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


Configure = Callable[..., SimulationConfig]


@pytest.fixture(scope="session")
def configure(settings: dict[str, Any]) -> Configure:
    """Return a function that makes a configuration: output folder, name, and changed sections."""

    def make(output: Path, name: str = "run", **changes: Any) -> SimulationConfig:
        return parse(SimulationConfig, merge({**settings, "name": name, "output": str(output)}, changes))

    return make


# ---- the command line ------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """A command that has ended."""

    code: int  # exit code, or minus the signal that ended it
    output: str
    error: str

    @property
    def text(self) -> str:
        """Everything that the user saw, on one line, so that wrapped words can be found."""
        return " ".join((self.output + " " + self.error).split())


class CommandsHere:
    """`fedllm` in this process: one of its own costs more than most mistakes take to be told."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, *arguments: str, cwd: Path | None = None) -> Result:
        output, error, code = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(error):
            patch.chdir(cwd or self._folder)
            patch.setenv("COLUMNS", "2000")  # wide: lines as they are written
            patch.setattr(fedllm.cli.main, "_console", Console())
            patch.setattr(fedllm.cli.main, "_errors", Console(stderr=True))
            patch.setattr(sys, "argv", ["fedllm", *arguments])
            try:
                fedllm.cli.main.main()
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        return Result(code, output.getvalue(), error.getvalue())


class Command:
    """A command that runs."""

    def __init__(self, server: "CommandLine", pid: int, folder: Path) -> None:
        self._server, self.pid, self._folder = server, pid, folder

    def wait(self) -> Result:
        while (code := self._server.ask({"wait": self.pid})) is None:
            time.sleep(0.01)
        return Result(code, (self._folder / "out").read_text("utf-8"), (self._folder / "err").read_text("utf-8"))

    def kill(self, number: int) -> None:
        """Send a signal; harmless where the process has just ended, since nobody has waited for it yet."""
        self._server.ask({"kill": self.pid, "signal": number})


class CommandLine:
    """`fedllm` in real processes, forked from one that has the imports behind it (they take ten seconds)."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self.elsewhere = folder / "elsewhere"  # what libraries and the system keep outside the run's folder
        places = {name: str(self.elsewhere / name.lower()) for name in ("HOME", "HF_HOME", "FLWR_HOME", "TMPDIR")}
        for place in places.values():
            Path(place).mkdir(parents=True)
        script = Path(__file__).with_name("fork_server.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **places,
                "COLUMNS": "2000",  # wide: lines as they are written
                "HF_HUB_OFFLINE": "1",
                # one thread: a process that has more cannot be forked safely
                "OMP_NUM_THREADS": "1",
                "JE_ARROW_MALLOC_CONF": "background_thread:false",
            },
        )

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Command:
        folder = self._folder / str(self._count)
        folder.mkdir()
        self._count += 1
        request = {
            "arguments": list(arguments),
            "folder": str(folder),
            "cwd": str(cwd or folder),
            "env": dict(env or {}),
        }
        return Command(self, self.ask(request), folder)

    def __call__(self, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Result:
        return self.start(*arguments, cwd=cwd, env=env).wait()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(120)  # seconds; on a busy machine even an end takes its time
        self._process.stdout.close()


@pytest.fixture(scope="session", name="fedllm")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The command line: `fedllm("simulate", "privacy=off")`."""
    server = CommandLine(tmp_path_factory.mktemp("command-line"))
    yield server
    server.close()


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return nested settings as Hydra overrides."""
    overrides = []
    for key, value in settings.items():
        if isinstance(value, dict):
            overrides += flat(value, f"{prefix}{key}.")
        else:
            overrides.append(f"{prefix}{key}={json.dumps(value, ensure_ascii=False) if value is not None else 'null'}")
    return overrides


@pytest.fixture(scope="session")
def overrides(settings: dict[str, Any]) -> Callable[..., list[str]]:
    """Return a function that makes the arguments of `fedllm simulate` for the small federation."""

    def make(output: Path, name: str = "run", **changes: Any) -> list[str]:
        values = merge({**settings, "name": name, "output": str(output)}, changes)
        return ["model=causal-lm", "data=records", "training=demo", *flat(values)]

    return make


Until = Callable[[Callable[[], bool]], None]


@pytest.fixture
def until() -> Until:
    """Return a function that waits until something has come about; the suite's own time limit bounds it."""

    def wait(come_about: Callable[[], bool]) -> None:
        while not come_about():
            time.sleep(0.002)

    return wait


# ---- federations that several tests look into ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT encoder of a few thousand random parameters and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opens at the end of the test, so that no node hangs for longer."""
    event = threading.Event()
    yield event
    event.set()
