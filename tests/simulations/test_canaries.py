"""Canary strings in the records, and a search for them in everything that leaves a site."""

import base64
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from client.site import Site
from fedllm.config import SimulationConfig
from fedllm.protocol.messages import ENVELOPE_KEY, ENVELOPE_RECORD
from simulations.grid import InProcessGrid
from simulations.simulate import simulate

CANARIES = ("canary-8241-customer", "canary-8241-question", "카나리아-8241-답변", "canary-8241-topic")
LABELS = ["카드", "loan", "visa"]


def _forms(canary: str) -> list[bytes]:
    """The canary as it may be written: plain, in JSON with escapes, in two other encodings."""
    plain = canary.encode()
    return [plain, json.dumps(canary)[1:-1].encode(), canary.encode("utf-16-le"), base64.b64encode(plain)[:-4]]


FORMS = [form for canary in CANARIES for form in _forms(canary)]


def found_in(data: bytes) -> list[bytes]:
    return [form for form in FORMS if form in data]


def leaks(files: Iterable[Path]) -> list[str]:
    return [f"{form!r} in {file}" for file in files if file.is_file() for form in found_in(file.read_bytes())]


@pytest.fixture
def marked(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    """The records, with a canary in each column of one person at each branch."""
    values = dict(zip(("customer_id", "question", "answer", "topic"), CANARIES, strict=True))
    marked = [{**row, **values} if i % 7 == 0 else row for i, row in enumerate(rows)]
    path = tmp_path / "marked.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in marked), "utf-8")
    assert len(leaks([path])) >= len(CANARIES)
    return path


@pytest.mark.parametrize("mode", ["local", "off"])
def test_nothing_of_a_record_crosses_the_grid(
    tmp_path: Path,
    configure: Callable[..., SimulationConfig],
    marked: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    """Neither when all goes well, nor when a site meets an error that quotes a record."""
    crossed: list[bytes] = []
    real_handle, real_push, real_pull = Site.handle, InProcessGrid.push_messages, InProcessGrid.pull_messages

    def note(message: Message) -> None:
        crossed.append(str(message.metadata).encode())
        if message.has_error():
            crossed.append(str(message.error).encode())
        else:
            crossed.append(str(dict(message.content)).encode())
            value = message.content.config_records[ENVELOPE_RECORD][ENVELOPE_KEY]
            assert isinstance(value, bytes)
            crossed.append(value)

    def push(grid: InProcessGrid, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            note(message)
        return real_push(grid, messages)

    def pull(grid: InProcessGrid, ids: Iterable[str]) -> Iterable[Message]:
        replies = list(real_pull(grid, ids))
        for reply in replies:
            note(reply)
        return replies

    def handle(site: Site, request: bytes) -> bytes:
        if site.name == "jeju" and len(crossed) > 60:
            raise ValueError(f"cannot parse {CANARIES[1]} of {CANARIES[0]}")  # past all of the site's own care
        return real_handle(site, request)

    monkeypatch.setattr(InProcessGrid, "push_messages", push)
    monkeypatch.setattr(InProcessGrid, "pull_messages", pull)
    monkeypatch.setattr(Site, "handle", handle)
    config = configure(tmp_path, data={"train": str(marked)}, privacy={"mode": mode}, training={"rounds": 4})
    summary = simulate(config, lambda *_: None, lambda event: None)
    assert summary.records[-1]["failed"], "a site has met the error"
    assert len(crossed) > 80
    assert [form for data in crossed for form in found_in(data)] == []
    assert leaks(f for f in summary.folder.rglob("*") if summary.folder / "sites" not in f.parents) == []


def test_nothing_of_a_record_lies_outside_the_sites_folders(
    fedllm: Any, overrides: Callable[..., list[str]], tmp_path: Path, marked: Path, tiny_bert: Path
) -> None:
    """Not in outputs, nor in what libraries keep in home, caches and temporary folders; errors that quote included."""
    arguments = overrides(
        tmp_path,
        model={"source": str(tiny_bert), "task": "classification", "labels": LABELS},
        adapter={"targets": ["query"]},
        data={"train": str(marked), "prompt": None, "text": "{question}", "label": "topic"},
        privacy={"unit": "record"},
        training={"rounds": 1},
    )
    folder = tmp_path / "run"
    result = fedllm("simulate", *arguments)
    assert found_in(result.error.encode()), "who simulates is told which label was not declared: the search can find"
    assert leaks(f for f in tmp_path.rglob("*") if f != marked) == []
    learned = overrides(tmp_path, data={"train": str(marked)}, training={"rounds": 1})
    assert fedllm("simulate", *learned).code == 0
    assert (folder / "summary.md").exists()
    assert leaks(f for f in folder.rglob("*") if folder / "sites" not in f.parents) == []
    assert leaks(fedllm.elsewhere.rglob("*")) == []


def test_what_sites_keep_is_for_their_owner_alone(
    fedllm: Any, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = overrides(tmp_path, training={"rounds": 1, "local_steps": 1}, privacy={"mode": "off"})
    assert fedllm("simulate", *arguments).code == 0
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    ledgers = list((tmp_path / "run").rglob("ledger.db"))
    assert len(ledgers) == 4
    assert {ledger.stat().st_mode & 0o777 for ledger in ledgers} == {0o600}
