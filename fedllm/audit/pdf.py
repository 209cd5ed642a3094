"""A page as PDF, by WeasyPrint, in a process of its own: several are rendered at once, and the caller loads nothing.

python -m fedllm.audit.pdf PAGE.html >PAGE.pdf
"""

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedllm.errors import FolderError

PDF_NEEDS = (
    "audit.pdf was not written: WeasyPrint or a library that it uses is missing. "
    "On Debian: apt-get install libpango-1.0-0 libpangoft2-1.0-0 libharfbuzz-subset0. Then make "
    "the report again, or print audit.html from a browser."
)


def render_pdf(html: str) -> bytes:
    """Return the page as PDF; raises FolderError that says what to install if that is not possible here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from weasyprint import HTML

            logging.getLogger("weasyprint").setLevel(logging.ERROR)  # it warns of SVG's own properties
            logging.getLogger("fontTools").setLevel(logging.ERROR)
            return bytes(HTML(string=html).write_pdf())
    except (ImportError, OSError):  # OSError: a shared library that is not there
        raise FolderError(PDF_NEEDS) from None


@contextmanager
def renderer(page: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """Begin to render an HTML file in a process of its own, and end that process at the end of the block."""
    path = os.pathsep.join(filter(None, sys.path))  # what this process imports from; never the folder that it works in
    command = [sys.executable, "-P", "-m", "fedllm.audit.pdf", str(page)]
    pipe, env = subprocess.PIPE, {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=env) as process:
        try:
            yield process
        finally:
            process.kill()


def rendered(process: "subprocess.Popen[bytes]") -> bytes:
    """Wait for the PDF of a `renderer`, and return it; raises FolderError that says why there is none."""
    pdf, said = process.communicate()
    if process.returncode == 0:
        return pdf
    why = (said.decode(errors="replace").strip().splitlines() or [f"ended with {process.returncode}"])[-1]
    raise FolderError(why if why == PDF_NEEDS else f"audit.pdf was not written: its renderer failed: {why}")


def main() -> None:
    """Render one page; the last line of stderr says why that failed."""
    try:
        sys.stdout.buffer.write(render_pdf(Path(sys.argv[1]).read_text("utf-8")))
    except FolderError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
