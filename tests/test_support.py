"""docs/support.md says what is found when an architecture is trained, and not what somebody hopes."""

import re

import pytest

from tests import support


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.fixture
def written() -> dict[tuple[str, str], dict[str, str]]:
    """The cells of the page by architecture and task, then by column."""
    lines = [line for line in support.PAGE.read_text("utf-8").splitlines() if line.startswith("|")]
    head, _, *body = map(cells, lines)
    return {(row[0], row[1]): dict(zip(head[2:], row[2:], strict=True)) for row in body}


def test_the_page_has_every_row_and_a_reason_for_every_refusal(
    written: dict[tuple[str, str], dict[str, str]],
) -> None:
    assert list(written) == [(family.name, task) for family, task in support.rows()]
    reasons = set(re.findall(r"^(\d+)\. \S", support.PAGE.read_text("utf-8"), re.MULTILINE))
    said = set()
    for row in written.values():
        assert list(row) == list(support.COLUMNS)
        said |= set(row.values())
    assert said - {"yes"} == reasons


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Falcon"])
def test_a_row_says_what_is_found(written: dict[tuple[str, str], dict[str, str]], name: str) -> None:
    family = next(family for family in support.DECODERS if family.name == name)
    with support.small_model(family) as folder:
        for column in ("attention", "all-linear"):
            found = support.attempt(family, "causal-lm", column, folder)
            assert bool(found) == written[name, "causal-lm"][column].isdigit()


@pytest.mark.soak
def test_the_page_is_what_is_found() -> None:
    assert support.page() == support.PAGE.read_text("utf-8")
