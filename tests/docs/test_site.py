"""The documentation as a site: `make docs` builds it and refuses a warning; here is what needs no MkDocs."""

import re
from pathlib import Path

from docs.site_hooks import on_page_markdown

ROOT = Path(__file__).parents[2]


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r"^ *- ([\w.-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert len(named) == len(set(named))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(named)


def test_a_site_has_no_links_to_the_repository_and_no_words_for_tests() -> None:
    page = "[here](../README.md#limits), [there](privacy.md), [gone](../nowhere.md)\n\n```sh head-office\nls\n```\n"
    shown = on_page_markdown(page, {"docs_dir": str(ROOT / "docs")})
    assert shown == "here, [there](privacy.md), [gone](../nowhere.md)\n\n```sh\nls\n```\n"
