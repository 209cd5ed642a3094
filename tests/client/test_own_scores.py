"""An owner is told exactly how good adapters are on the site's own records; what stands in the way is told as well."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.office import init_office
from client.own_scores import OwnScore, note_score, own_scores
from fedllm.cli.main import app
from fedllm.errors import FolderError


@pytest.fixture
def home(tmp_path: Path) -> Path:
    init_office(tmp_path / "site", "부산-지점")
    return tmp_path / "site"


def report(home: Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["site", "report", "--home", str(home)], env={"COLUMNS": "120"})
    return done.exit_code, " ".join(done.output.split())


def test_a_site_that_was_never_scored_says_so(home: Path) -> None:
    assert report(home) == (0, "No run has been scored on this site's records yet: runs with evaluation.every are.")


@pytest.mark.parametrize(
    ("name", "last", "word"),
    [("loss", 0.5, "better"), ("loss", 2.0, "no better"), ("accuracy", 2.0, "better"), ("accuracy", 0.5, "no better")],
)
def test_whether_it_is_better_for_this_site_is_said(home: Path, name: str, last: float, word: str) -> None:
    ledger = home / "data" / "ledger.db"
    for number, value in ((3, 9.9), (0, 1.0), (3, last)):  # round 3 was answered twice: the later one counts
        note_score(ledger, OwnScore("봄", number, 12, {name: value}))
    note_score(ledger, OwnScore("empty", 0, 0))
    code, text = report(home)
    assert code == 0
    assert "run 봄, on 12 units of this site" in text
    assert f"For this site it is {word}: {name} 1 -> {last:g}" in text


def test_a_file_that_is_none_is_named(home: Path) -> None:
    ledger = home / "data" / "ledger.db"
    path = ledger.with_name("scores.jsonl")
    path.write_bytes(b"\xff\x00 nothing\n")
    path.chmod(0o600)
    with pytest.raises(FolderError, match="holds no score that can be read"):
        own_scores(ledger)


def test_a_score_that_cannot_be_noted_stops_nothing(home: Path, tmp_path: Path) -> None:
    ledger = home / "data" / "ledger.db"
    (tmp_path / "elsewhere").write_text("not yours")
    ledger.with_name("scores.jsonl").symlink_to(tmp_path / "elsewhere")
    note_score(ledger, OwnScore("run", 0, 1, {"loss": 1.0}))  # whoever made the link gets nothing
    assert (tmp_path / "elsewhere").read_text() == "not yours"
    note_score(home / "nowhere" / "ledger.db", OwnScore("run", 0, 1, {"loss": 1.0}))
