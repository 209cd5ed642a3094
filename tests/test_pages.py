"""The pages of the documentation: their links lead to what is there, and nothing that belongs in a table is missing."""

import re
from pathlib import Path
from typing import get_args

import pytest

from fedllm import errors
from fedllm.protocol.messages import Reason

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def anchors(page: Path) -> set[str]:
    """Return what GitHub calls a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)
    for link in links:
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_every_error_and_every_refusal_is_explained() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    families = {kind.__name__ for kind in kinds} - {"FedllmError"}
    for name in [*families, *get_args(Reason)]:
        assert f"| `{name}` |" in text, name


def test_the_glossary_defines_every_term_once() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    english, korean = ([row[column].strip() for row in rows if row[0] != " term "] for column in (0, 1))
    assert len(set(english)) == len(english) == len(set(korean)) > 50
    assert all(re.search("[가-힣]", word) for word in korean)


# What pages may name without a file of it in the repository: what a run or an installation makes, and one's own.
MADE = re.compile(r"^(adapter/README|(summary|attack)(\.ko)?|results)\.md$")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_modules_and_tests_that_a_page_names_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # it names what there was
    files = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("[!.]*/**/*") if path.is_file()]
    functions = {
        name for path in ROOT.glob("tests/**/*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    for quoted in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)):
        if re.fullmatch(r"[\w./-]+\.(py|md|j2|proto)(: \w+)?", quoted):
            path, _, name = quoted.partition(": ")
            found = [file for file in files if file == path or file.endswith(f"/{path}")]
            assert found or (ROOT / path).exists() or MADE.match(path), quoted
            assert not name or any(re.search(rf"\b{name}\b", (ROOT / file).read_text("utf-8")) for file in found), (
                quoted
            )
        elif re.fullmatch(r"(fedllm|client|server|simulations|tests)(/[\w-]+)+/?", quoted):
            assert (ROOT / quoted).exists(), quoted
        elif dotted := re.fullmatch(r"(?:fedllm|client|server|simulations)((?:\.[a-z_0-9]+)+)(?:\.\w+|\(\))*", quoted):
            parts = quoted.partition("(")[0].split(".")
            known = [any((ROOT / "/".join(parts[:n])).with_suffix(end).exists() for end in ("", ".py"))
                     for n in range(2, len(parts) + 1)]  # fmt: skip
            assert any(known) or dotted[1].count(".") == 1, quoted
        elif re.fullmatch(r"test_\w+", quoted):
            assert quoted in functions, quoted
