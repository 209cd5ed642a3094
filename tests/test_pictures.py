"""The drawings of the documentation are what the script beside them draws."""

import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
DRAWN: dict[str, str] = runpy.run_path(str(FOLDER / "draw_journey.py"))["pictures"]()


def test_every_drawing_is_drawn() -> None:
    assert {path.name for path in FOLDER.glob("*.svg")} == set(DRAWN)


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_a_drawing_is_what_the_script_draws(name: str) -> None:
    assert (FOLDER / name).read_text("utf-8") == DRAWN[name], "run: python docs/pictures/draw_journey.py"
    ElementTree.fromstring(DRAWN[name])
