"""Every `fedllm` command of the README, the quick start and the page on own data is run, on tiny inputs and with as few
steps as possible; and the Korean README is held to the English one."""

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

from fedllm.cli.main import app
from tests.conftest import SOAK, byte_tokenizer, some_of_the_demo

ROOT = Path(__file__).parents[1]
README, KOREAN = ROOT / "README.md", ROOT / "README.ko.md"
PAGES = (ROOT / "docs" / "quickstart.md", ROOT / "docs" / "data-and-models.md", README)
# What makes a command quick; a command's own settings of the same keys are overridden.
QUICK = [
    "training.rounds=1", "training.local_steps=1", "privacy.sampling_rate=0.05", "data.heldout_limit=8",
    "data.samples=1", "model.compile=off", "federation.processes=1",
]  # fmt: skip
RAY = ("fedllm simulate experiment=parallel",)
# What one command shows for all: the search for the noise, the check of the engine at every site, the report.
ONCE = ["privacy.noise_multiplier=2", "privacy.self_check=false", "audit.report=false"]


def fenced(page: Path) -> list[str]:
    """Return the lines of a page's plain fenced blocks, in order."""
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def commands() -> list[str]:
    """Return all commands of fedllm once, in the order of the pages."""
    return list(dict.fromkeys(line for page in PAGES for line in fenced(page) if line.startswith("fedllm ")))


def prose(page: Path) -> str:
    """Return what a reader reads: no code blocks, no targets of links, no attributes."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^\[[^]]+\]: .*$", "", text, flags=re.MULTILINE)
    return re.sub(r"<[^>]*>|(?<=\])\([^)]*\)|(?<=\])\[[^]]*\]", " ", text)


def test_the_pages_show_commands() -> None:
    assert len(commands()) >= 8
    assert set(RAY) < set(commands())
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    for page in PAGES:
        for line in fenced(page):
            program, word = line.split()[:2]
            assert program == "fedllm" or (program == "make" and word in targets), line


def test_the_readme_is_short() -> None:
    """Words are runs of letters and digits; code, link targets and alternative texts are not counted."""
    assert len(re.findall(r"[\w.,%()-]*\w[\w.,%()-]*", prose(README))) < 900


def test_the_korean_readme_has_the_commands_figures_and_links_of_the_english_one() -> None:
    assert fenced(KOREAN) == fenced(README)

    def figures(page: Path) -> list[str]:
        return sorted(re.findall(r"\d+(?:[.,]\d+)*(?:e-\d+)?", prose(page)))

    def links(page: Path) -> list[str]:
        text = page.read_text("utf-8").replace(".ko.md", ".md").replace(".ko.", ".en.")
        patterns = (r"\]\((\S+)\)", r"^\[.+\]: (\S+)$", r'src\w*="(\S+)"')
        return sorted(link for pattern in patterns for link in re.findall(pattern, text, flags=re.MULTILINE))

    def counts(page: Path) -> list[int]:
        lines = page.read_text("utf-8").splitlines()
        return [sum(line.startswith(mark) for line in lines) for mark in ("#", "|", "- ")]

    assert figures(KOREAN) == figures(README)
    assert links(KOREAN) == links(README)
    assert counts(KOREAN) == counts(README)


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the files that the commands name."""
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
def test_a_command_of_the_pages_works(
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
