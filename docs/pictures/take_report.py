"""Take the pictures of the pages in a folder: `python docs/pictures/take_report.py runs/NAME/audit`, the audit report;
`python docs/pictures/take_report.py evaluation`, what `fedllm release evaluate` has written. Needs Chromium."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

SIZES = {  # what the first screen takes, in pixels
    "report.en": ("audit.html", 890), "report.ko": ("audit.ko.html", 790),
    "evaluation.en": ("evaluation.html", 1290), "evaluation.ko": ("evaluation.ko.html", 1270),
}  # fmt: skip

if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        for name, (page, height) in SIZES.items():
            if not (folder / page).exists():
                continue
            shot = Path(scratch) / "shot.png"
            subprocess.run(
                [shutil.which("chromium") or "", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                 f"--user-data-dir={scratch}/chromium", f"--window-size=1000,{height}", f"--screenshot={shot}",
                 (folder / page).as_uri()],
                check=True, capture_output=True, timeout=300,
            )  # fmt: skip
            few_colours = Image.open(shot).convert("RGB").quantize(160)
            few_colours.save(Path(__file__).parent / f"{name}.png", optimize=True)
