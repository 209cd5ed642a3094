"""The reference of the settings is what the settings say of themselves."""

import pytest
from pydantic import Field

from client.site_file import SiteFile
from docs.reference import PAGE, docstrings, options, page
from fedllm.config import DeploymentConfig, SimulationConfig
from fedllm.values import Frozen
from server.federation import FederationFile


def test_the_page_is_not_stale() -> None:
    assert PAGE.read_text("utf-8") == page(), "write it anew: python -m docs.reference"


@pytest.mark.parametrize("kind", [SimulationConfig, DeploymentConfig, SiteFile, FederationFile])
def test_every_setting_is_in_it_and_says_what_it_means_in_a_sentence(kind: type[Frozen]) -> None:
    text = PAGE.read_text("utf-8")
    for key, (_, words) in options(kind):
        assert f"| `{key}` |" in text
        assert words[0].isupper() or words[0] == "`"
        assert words.endswith(".")


def test_a_setting_without_a_docstring_is_named() -> None:
    class Silent(Frozen):
        said: int = Field(1, ge=0)
        """How many."""
        silent: int = 2

    with pytest.raises(KeyError, match=r"Silent\.silent"):
        list(options(Silent))
    assert docstrings(Silent) == {"said": "How many."}
