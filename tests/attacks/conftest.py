"""The office that is attacked."""

from pathlib import Path

import pytest

from tests.attacks.ledgers import Branch


@pytest.fixture
def branch(tmp_path: Path) -> Branch:
    """A branch office with nine records, nothing spent yet."""
    return Branch(tmp_path / "busan")
