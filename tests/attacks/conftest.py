"""The site that is attacked; and, at the end of the tests, a table of the attacks, what became of them and why."""

import ast
from pathlib import Path

import pytest

from tests.attacks.ledgers import Branch

HERE = Path(__file__).parent


@pytest.fixture
def branch(tmp_path: Path) -> Branch:
    """A site with nine records, nothing spent yet."""
    return Branch(tmp_path / "busan")


def said(file: Path) -> tuple[str, str]:
    """Return a file's attack and what stops it, one line each."""
    first, _, then = (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n\n")
    return tuple(" ".join(part.split()) for part in (first.removeprefix("Attack: "), then.removeprefix("Stopped ")))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of the attacks that were tried."""
    results: dict[str, set[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            path, _, _ = report.nodeid.partition("::")
            if path.startswith("tests/attacks/"):
                results.setdefault(Path(path).name, set()).add(outcome)
    if not results:
        return
    terminalreporter.section("attacks")
    for name, outcomes in sorted(results.items()):
        attack, stop = said(HERE / name)
        result = "SUCCEEDED, or not tried" if outcomes & {"failed", "error"} else "stopped"
        terminalreporter.line(f"{result}: {attack}")
        terminalreporter.line(f"    {stop}")
