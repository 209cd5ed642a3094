"""Every `fedllm` command that the README shows is run, on tiny inputs and with as few steps as possible."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from fedllm.cli import app
from tests.conftest import SOAK, byte_tokenizer, some_of_the_demo

README = Path(__file__).parents[1] / "README.md"
# What makes a command quick; a command's own settings of the same keys are overridden.
QUICK = [
    "training.rounds=1", "training.local_steps=1", "privacy.sampling_rate=0.05", "data.heldout_limit=8",
    "data.samples=1", "model.compile=off", "federation.processes=1",
]  # fmt: skip
RAY = ("fedllm simulate experiment=parallel",)
# What one command shows for all: the search for the noise, the check of the engine at every site, the report.
ONCE = ["privacy.noise_multiplier=2", "privacy.self_check=false", "audit=false"]


def commands() -> list[str]:
    """Return the lines of the README's fenced blocks that begin with fedllm, in order."""
    blocks = re.findall(r"^```\n(.*?)^```", README.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("fedllm ")]


def test_the_readme_shows_commands() -> None:
    assert len(commands()) >= 8
    assert set(RAY) < set(commands())


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the files that the README's commands name."""
    folder = tmp_path_factory.mktemp("office")
    base = Path(__file__).parents[1] / "simulations" / "demo" / "base"
    shutil.copytree(base, folder / "my-model")
    branches = ["강남", "마포", "Itaewon", "Haeundae"]
    rows = [
        {
            "question": f"{i}번 창구는 어디인가요?",
            "answer": f"{i}층입니다.",
            "branch": branches[i % 4],
            "customer_id": f"C{i}",
        }
        for i in range(160)
    ]
    for name, part in (("train.jsonl", rows), ("public.jsonl", rows[:8]), ("demo.jsonl", some_of_the_demo())):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / name).write_text(text, "utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "my-encoder")
    byte_tokenizer().save_pretrained(folder / "my-encoder")
    (folder / "labels.json").write_text('["대출", "card"]', "utf-8")
    for name, count in (("train.csv", 400), ("test.csv", 8)):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([f"문의 {i}", ("대출", "card")[i % 2]] for i in range(count))
    return folder


def stories() -> list[tuple[str, ...]]:
    """Return the commands, each with those that go on with what it made."""
    found: list[tuple[str, ...]] = []
    for command in commands():
        if "resume=true" in command:
            found[-1] = (*found[-1], command)
        else:
            found.append((command,))
    return found


def quick(command: str) -> list[str]:
    """Return the settings that make a command quick."""
    if not command.startswith("fedllm simulate") or "--" in command:
        return []
    settings = [*QUICK, *([] if "data.train=" in command else ["data.train=demo.jsonl"])]
    if "name=first" not in command:
        settings += ONCE
    if command in RAY and not SOAK:
        settings.append("federation.backend=in-process")  # Ray's processes import everything anew
    return settings


@pytest.mark.slow
@pytest.mark.timeout(900)  # Ray takes its time on a busy machine
@pytest.mark.filterwarnings("default")  # third-party packages warn; tests of our own code make warnings errors
@pytest.mark.parametrize("story", [*stories(), pytest.param(RAY, marks=pytest.mark.soak)], ids=" | ".join)
def test_a_command_of_the_readme_works(
    story: list[str], office: Path, monkeypatch: pytest.MonkeyPatch, without_pdfs: None
) -> None:
    monkeypatch.chdir(office)
    for command in story:
        settings = quick(command)
        result = CliRunner().invoke(app, [*shlex.split(command)[1:], *settings], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        if settings:
            newest = max((office / "runs").iterdir(), key=lambda folder: (folder / "summary.md").stat().st_mtime_ns)
            assert ("NOT PRIVATE" in (newest / "summary.md").read_text("utf-8")) == ("privacy=off" in command)
            assert (newest / "adapter" / "adapter_model.safetensors").exists()
