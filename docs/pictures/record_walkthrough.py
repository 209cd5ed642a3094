"""Record the commands of docs/walkthrough.md in a terminal, and draw that: an SVG that plays, without a script in it.

python docs/pictures/record_walkthrough.py FOLDER    runs the commands in an empty folder, and draws the recording
python docs/pictures/record_walkthrough.py           draws it again

walkthrough.cast beside this script is the recording (asciicast v2: `asciinema play` shows it). walkthrough.svg is drawn
from it, byte for byte; tests/test_pictures.py compares them.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from html import escape
from itertools import groupby, pairwise
from pathlib import Path

from rich.ansi import AnsiDecoder
from rich.cells import cell_len
from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

HERE = Path(__file__).parent
PAGE, CAST, PICTURE = HERE.parent / "walkthrough.md", HERE / "walkthrough.cast", HERE / "walkthrough.svg"
COLUMNS, ROWS = 100, 28
PROMPT = "\x1b[1;32m$\x1b[0m \x1b[1m{}\x1b[0m"
_END = "end of command"


# ---- recording -------------------------------------------------------------------------------------------------------


def commands(page: str) -> list[str]:
    """Return the commands that a page shows, in order."""
    blocks = re.findall(r"^```sh walk\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\\\n *", "", "".join(blocks)).splitlines()


def record(folder: Path) -> str:
    """Run the page's commands in a folder, in one shell, and return what they said, as an asciicast."""
    began = time.monotonic()
    cast = [json.dumps({"version": 2, "width": COLUMNS, "height": ROWS})]

    def say(text: str) -> None:
        cast.append(json.dumps([round(time.monotonic() - began, 2), "o", f"{text}\r\n"], ensure_ascii=False))

    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with subprocess.Popen(
        [shutil.which("bash") or "", "--noprofile"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={**os.environ, "COLUMNS": str(COLUMNS), "PATH": path, "HOME": str(folder.resolve())},  # where tokens go
        start_new_session=True,
    ) as shell:
        if shell.stdin and shell.stdout:
            for command in commands(PAGE.read_text("utf-8")):
                say(PROMPT.format(command))
                shell.stdin.write(f"{command}\necho; echo {_END}\n")
                shell.stdin.flush()
                line = ""
                for line in iter(shell.stdout.readline, f"{_END}\n"):
                    say(line.rstrip("\n"))
                if line.strip():  # it had no end
                    say("")
        os.killpg(shell.pid, signal.SIGTERM)  # what runs in the background, too
    return "\n".join(cast) + "\n"


# ---- drawing ---------------------------------------------------------------------------------------------------------

CELL, ROW, SIZE, EDGE, BAR = 8.4, 19, 14, 16, 36  # pixels: a letter's width, a row, a letter, the window's edge and top
PAPER, INK, STRONG = "#1b1f24", "#d0d7de", "#ffffff"
LIGHTS = ("#ff5f57", "#febc2e", "#28c840")
FONT = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', 'D2Coding', 'NanumGothicCoding', monospace"
MOST, LEAST, LAST = 1.2, 0.03, 8.0  # seconds: the longest that nothing happens, between rows, of the last picture


def _rows(cast: str) -> Iterator[tuple[float, Text]]:
    """Yield the rows of a recording, as wide as the terminal, and the seconds at which each appears."""
    console, decoder = Console(width=COLUMNS), AnsiDecoder()
    shown, before = 0.0, 0.0
    for line in cast.splitlines()[1:]:
        at, _, text = json.loads(line)
        shown, before = shown + min(MOST, max(LEAST, at - before)), at
        for whole in decoder.decode(text.rstrip("\r\n") or " "):
            for row in whole.wrap(console, COLUMNS) or [Text()]:
                yield shown, row


def _wide(letter: str) -> bool:
    return cell_len(letter) == 2


def _drawn(row: Text, y: int) -> Iterator[str]:
    """Yield the text elements of a row: of one style each, and letters that are two cells wide by themselves."""
    column = 0
    for segment in row.render(Console(width=COLUMNS)):
        style = segment.style
        color = STRONG if style and style.bold else INK
        if style and style.color and not style.color.is_default:
            color = style.color.get_truecolor(DIMMED_MONOKAI).hex
        faint = ' opacity="0.6"' if style and style.dim else ""
        for wide, letters in groupby(segment.text, _wide):
            run = "".join(letters)
            cells = cell_len(run)
            if run.strip():
                large = ' font-size="16"' if wide else ""  # as high as it is wide
                place = f'x="{EDGE + column * CELL:.1f}" y="{y}" textLength="{cells * CELL:.1f}"'
                yield f'<text {place} fill="{color}"{large}{faint}>{escape(run)}</text>'
            column += cells


def draw(cast: str) -> str:
    """Return a recording as the text of an SVG file: its rows come in at the bottom, as they did in the terminal."""
    rows = list(_rows(cast))
    whole = rows[-1][0] + LAST
    steps = [(0.0, 1), *((at, number) for number, (at, _) in enumerate(rows, start=1)), (whole, len(rows))]
    frames = [
        f"{100 * at / whole:.2f}% {{transform: translateY({(ROWS - count) * ROW}px)}}"
        for (at, count), (after, _) in pairwise([*steps, (whole + 1, 0)])
        if after > at
    ]
    newline, last = "\n", (ROWS - len(rows)) * ROW
    texts = [element for number, (_, row) in enumerate(rows) for element in _drawn(row, BAR + SIZE + number * ROW)]
    width, height = round(2 * EDGE + COLUMNS * CELL), BAR + ROWS * ROW + EDGE
    title = "A terminal: from records to a Korean question that is answered over TLS"
    lights = [f'<circle cx="{EDGE + 4 + 20 * n}" cy="18" r="6" fill="{color}"/>' for n, color in enumerate(LIGHTS)]
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" \
aria-label="{title}" font-family="{FONT}" font-size="{SIZE}">
<title>{title}</title>
<style>
text {{white-space: pre}}
#rows {{transform: translateY({last}px)}}
@media (prefers-reduced-motion: no-preference) {{#rows {{animation: play {whole:.1f}s step-end infinite}}}}
@keyframes play {{
{newline.join(frames)}
}}
</style>
<clipPath id="window"><rect x="0" y="{BAR}" width="{width}" height="{ROWS * ROW}"/></clipPath>
<rect width="{width}" height="{height}" rx="10" fill="{PAPER}"/>
{"".join(lights)}
<g clip-path="url(#window)"><g id="rows">
{newline.join(texts)}
</g></g>
</svg>
"""


if __name__ == "__main__":
    if len(sys.argv) > 1:
        CAST.write_text(record(Path(sys.argv[1]).resolve()), "utf-8")
    PICTURE.write_text(draw(CAST.read_text("utf-8")), "utf-8")
