"""MkDocs calls this for every page: what is written for the repository, and for tests, as a site can show it."""

import re
from pathlib import Path
from typing import Any

_OUTSIDE = re.compile(r"(?<!!)\[([^]]+)\]\((\.\./[^)#]*)[^)]*\)")
_FENCE = re.compile(r"^( *```\w+) .*$", re.MULTILINE)


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Return a page without links to files outside docs/, and without what tests read after a fence's language.

    Of such a link the text stays; one to a file that does not exist stays whole, and is a warning.
    """
    docs = Path(config["docs_dir"])
    markdown = _OUTSIDE.sub(lambda link: link[1] if (docs / link[2]).exists() else link[0], markdown)
    return _FENCE.sub(r"\1", markdown)
