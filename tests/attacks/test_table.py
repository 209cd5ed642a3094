"""Attack: an attack is tried here and nobody can tell which, or what stops it.

Stopped by this test: every file begins with both.
"""

from pathlib import Path

import pytest

from tests.attacks.conftest import HERE, said


@pytest.mark.parametrize("file", sorted(HERE.glob("test_*.py")), ids=lambda file: file.stem)
def test_every_file_says_what_is_attacked_and_what_stops_it(file: Path) -> None:
    text = file.read_text("utf-8")
    attack, stop = said(file)
    assert text.startswith('"""Attack: ')
    assert "\n\nStopped " in text.split('"""')[1]
    assert len(attack) > 20
    assert len(stop) > 20
