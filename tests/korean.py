"""What a Korean page may hold in Latin letters: names, and nothing else."""

import html
import re
from collections.abc import Iterable

# Names of software, methods, standards, parties and formats, and units of measurement.
_NAMES = {
    "fedllm", "python", "LoRA", "PEFT", "PLD", "RDP", "PRV", "Opacus", "PyTorch", "DSSE", "Ed", "SHA", "GDPR", "GPU",
    "UTC", "Dong", "Roth", "Su", "Steinke", "Nasr", "Jagielski", "MB", "nat", "float", "trade", "off", "dp",
    "accounting", "head", "office", "site",
}  # fmt: skip
_MARKUP = (r"<style.*?</style>", r"<metadata.*?</metadata>", r"<pre.*?</pre>", r"<wbr>", r"<[^<>]*>")
_FIGURES = (
    r"`[^`]*`", r"\]\([^)]*\)",  # settings, commands and links
    r"\b[a-z_]+=[^\s,)]*",  # settings of the plan, in evidence
    r"\b[0-9a-f]{4}(-[0-9a-f]{4})+\b", r"\b[0-9a-f]{8,}\b", r"\b\w+://\S+",  # fingerprints, digests, sources
    r"\d(\.\d+)?e[+-]?\d+",
)  # fmt: skip


def english_words(page: str, names: Iterable[str] = ()) -> set[str]:
    """Return the words in Latin letters of a Korean page, in HTML, SVG or Markdown, that are no names."""
    for pattern in _MARKUP:
        page = re.sub(pattern, "" if pattern == "<wbr>" else " ", page, flags=re.DOTALL)
    page = re.sub(r"[\w./%-]+\.(jsonl|json|html|md|svg|db)(?![a-z])", " ", html.unescape(page))  # files
    for pattern in (*map(re.escape, names), *_FIGURES):
        page = re.sub(pattern, " ", page, flags=re.ASCII)
    return {word for word in re.findall(r"[A-Za-z]{2,}", page) if word not in _NAMES}
