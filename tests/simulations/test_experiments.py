"""Every experiment with every choice of every group: no key of an overlay outlives the group that replaces it."""

from pathlib import Path
from typing import Any

import pytest

from fedllm.cli.hydra_config import compose, validate
from fedllm.config import SimulationConfig
from fedllm.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf"
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml") if file.stem != "demo-offices")
CHOICES = [
    (folder.name, file.stem)
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name not in ("experiment", "__pycache__")
    for file in sorted(folder.glob("*.yaml"))
    if file.stem not in ("offices", "head-office")  # of `fedllm submit`
]
NEEDED = ["model.source=x", "data.train=x", "data.text='{text}'"]


def composed(*overrides: str) -> dict[str, Any]:
    return compose("config", [*NEEDED, *overrides], None)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_choice_of_a_group_is_valid_under_an_experiment_or_says_why_not(experiment: str) -> None:
    for group, choice in CHOICES:
        labels = (
            ["model.labels=[a,b]"] if (group, choice) == ("model", "classifier") or "classifier" in experiment else []
        )
        why = ""
        try:
            found = composed(f"experiment={experiment}", f"{group}={choice}", *labels)
            validate(SimulationConfig, found)
        except ConfigError as error:
            why = str(error)
        assert "unknown key" not in why, f"{group}={choice}"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("choice", ["branches", "iid", "dirichlet"])
def test_sites_are_what_the_choice_of_the_federation_says(experiment: str, choice: str) -> None:
    labels = ["model.labels=[a,b]"] if "classifier" in experiment else []
    found = composed(f"experiment={experiment}", f"federation={choice}", *labels)
    column = {"branches": "branch", "iid": None, "dirichlet": found["data"]["label"]}[choice]
    assert found["federation"]["partition"]["column"] == column
    assert found["federation"]["partition"]["by"] == {"branches": "natural"}.get(choice, choice)


def test_an_own_classifier_is_dealt_out_by_its_labels_whatever_their_column() -> None:
    found = composed("experiment=own-classifier", "model.labels=[0,1]", "data.label=mood")
    assert found["federation"]["partition"]["column"] == "mood"
    config = validate(SimulationConfig, found)
    assert config.model.labels == ("0", "1"), "whole numbers need no quotes"


@pytest.mark.parametrize(
    ("written", "labels"),
    [("[긍정,부정]", ("긍정", "부정")), ("[true,false]", ("True", "False")), ("[0.5,1.0]", ("0.5", "1"))],
)
def test_labels_are_what_is_written(written: str, labels: tuple[str, ...], tmp_path: Path) -> None:
    """On the command line, in any script, and in a file, which may begin with a byte order mark."""
    config = validate(SimulationConfig, composed("experiment=own-classifier", f"model.labels={written}"))
    assert config.model.labels == labels
    (tmp_path / "labels.json").write_text(written.replace("긍정,부정", '"긍정","부정"'), "utf-8-sig")
    found = composed("experiment=own-classifier", f"model.labels={tmp_path / 'labels.json'}")
    assert validate(SimulationConfig, found).model.labels == labels


def test_a_column_that_a_template_cannot_name_is_given_a_name() -> None:
    found = composed("experiment=own-records", "data.prompt='{q}'", "data.columns={q: '질문 내용(필수)'}")
    assert validate(SimulationConfig, found).data.columns == {"q": "질문 내용(필수)"}
