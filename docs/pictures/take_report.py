"""Take the pictures of the audit report: `python docs/pictures/take_report.py runs/NAME`; needs Chromium."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

SIZES = {"en": ("audit.html", 890), "ko": ("audit.ko.html", 790)}  # what the first screen takes, in pixels

if __name__ == "__main__":
    audit = Path(sys.argv[1]).resolve() / "audit"
    with tempfile.TemporaryDirectory() as scratch:
        for language, (page, height) in SIZES.items():
            shot = Path(scratch) / "shot.png"
            subprocess.run(
                [shutil.which("chromium") or "", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                 f"--user-data-dir={scratch}/chromium", f"--window-size=1000,{height}", f"--screenshot={shot}",
                 (audit / page).as_uri()],
                check=True, capture_output=True, timeout=300,
            )  # fmt: skip
            few_colours = Image.open(shot).convert("RGB").quantize(160)
            few_colours.save(Path(__file__).parent / f"report.{language}.png", optimize=True)
