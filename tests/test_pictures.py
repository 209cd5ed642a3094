"""The drawings of the documentation are what the script beside them draws."""

import json
import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
JOURNEY: dict[str, str] = runpy.run_path(str(FOLDER / "draw_journey.py"))["pictures"]()
RECORDER = runpy.run_path(str(FOLDER / "record_walkthrough.py"))


def test_every_drawing_is_drawn() -> None:
    assert {path.name for path in FOLDER.glob("*.svg")} == {*JOURNEY, RECORDER["PICTURE"].name}


@pytest.mark.parametrize("name", sorted(JOURNEY))
def test_a_drawing_is_what_the_script_draws(name: str) -> None:
    assert (FOLDER / name).read_text("utf-8") == JOURNEY[name], "run: python docs/pictures/draw_journey.py"
    ElementTree.fromstring(JOURNEY[name])


def test_the_recording_is_of_the_commands_of_the_page_and_the_drawing_is_of_the_recording() -> None:
    """Both are of one installation: other versions of rich may wrap a line elsewhere."""
    cast = RECORDER["CAST"].read_text("utf-8")
    typed = [line for line in cast.splitlines()[1:] if RECORDER["PROMPT"].partition("{")[0] in json.loads(line)[2]]
    commands = RECORDER["commands"](RECORDER["PAGE"].read_text("utf-8"))
    assert [json.loads(line)[2].rstrip() for line in typed] == [RECORDER["PROMPT"].format(line) for line in commands]
    drawn = RECORDER["PICTURE"].read_text("utf-8")
    assert drawn == RECORDER["draw"](cast), "run: python docs/pictures/record_walkthrough.py"
    ElementTree.fromstring(drawn)
    assert not re.search(
        r"https?://(?!www\.w3\.org/2000/svg)", re.sub(r"<text.*</text>", "", drawn)
    )  # nothing is fetched
