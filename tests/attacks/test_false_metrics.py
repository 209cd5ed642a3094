"""Attack: the server writes figures into its signed metrics that look better than what the sites have signed.

Stopped by `fedllm audit verify`: all that the log or a site has signed for is compared, the rest is called its word.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedllm.audit.bundle import verify
from fedllm.audit.evidence import assess
from fedllm.crypto.hash_chain import read_chain
from fedllm.errors import ChainError
from fedllm.protocol.spending_statement import open_statement
from tests.attacks.audits import federation_of, hand_in, sign
from tests.fedllm.audit.evidence import Federation

OWN_WORD = {"loss": 0.1, "perplexity": 1.1, "accuracy": 1.0, "update_norm": 9.0, "seconds": 1.0, "clipped": 0.0}
FALSE: list[dict[str, Any]] = [
    {"epsilon": 0.0001}, {"private": False}, {"failed": {"branch-7": "x"}}, {"noise_multiplier": 500.0},
    {"lost": "the gate"}, {"without": {"1": "x"}}, {"bytes_up": 7}, {"bytes_down": 7}, {"answered": ["branch-1"]},
    {"declined": {"branch-2": "policy"}}, {"round": 2},
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Path]:
    return federation_of(tmp_path_factory.mktemp("federation"), ("branch-1", "branch-2"), rounds=2)


@pytest.fixture
def two(made: tuple[Federation, Path], tmp_path: Path) -> tuple[Federation, Path]:
    """The federation, and a copy of its run with metrics as a server writes them."""
    federation, run = tmp_path / "run", made[1]
    shutil.copytree(run, federation)
    entries = read_chain((run / "record.jsonl").read_text("utf-8").splitlines(), "record.jsonl")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    for line in lines:
        line |= {"private": True, "epsilon": 0.0, "failed": {}, "bytes_up": 10 if line["round"] else 0}
        line["bytes_down"] = line["bytes_up"]
    for entry in entries:
        if entry.kind == "round":
            said = [open_statement(line)[0].epsilon or 0.0 for line in entry.body["answered"].values()]
            lines[entry.body["round"]]["epsilon"] = max(said)
    write(federation, lines)
    return made[0], federation


def write(run: Path, lines: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")


def read(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("false", FALSE, ids=lambda change: next(iter(change)))
def test_a_figure_that_somebody_else_has_signed_for_cannot_be_another(
    two: tuple[Federation, Path], false: dict[str, Any]
) -> None:
    federation, run = two
    folder = hand_in(run, federation.head_office)
    verify(folder, federation.trust)
    lines = read(folder)
    lines[1] |= false
    write(folder, lines)
    sign(folder, federation.head_office)
    with pytest.raises(ChainError, match=r"^metrics: "):
        verify(folder, federation.trust)


@pytest.mark.parametrize(
    "false", [{"bytes_up": 3}, {"private": False}, {"noise_multiplier": 2.0}, {"failed": {"x": "y"}}], ids=str
)
def test_nor_can_one_of_the_base_model(two: tuple[Federation, Path], false: dict[str, Any]) -> None:
    _, run = two
    assert assess(run).finding("metrics").status == "holds"
    lines = read(run)
    lines[0] |= false
    write(run, lines)
    assert assess(run).finding("metrics").status == "fails"


def test_what_the_server_alone_measures_is_its_word(two: tuple[Federation, Path]) -> None:
    """As is an epsilon that is more than the sites of the round signed for: others may have spent more."""
    _, run = two
    lines = read(run)
    lines[1] |= {**OWN_WORD, "epsilon": lines[1]["epsilon"] + 1}
    lines[2]["epsilon"] = None
    write(run, lines)
    assert assess(run).finding("metrics").status == "holds"
