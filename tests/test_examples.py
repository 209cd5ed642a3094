"""The examples run, on little data and with as few steps as possible; the notebook, as it is, in `make soak`."""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from tests.conftest import some_of_the_demo

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "tour.ipynb"
QUICK = [
    "training.rounds=1", "privacy.sampling_rate=0.05", "privacy.noise_multiplier=10", "privacy.self_check=false",
    "data.samples=0", "data.heldout_limit=8", "model.compile=off", "federation.processes=1", "audit.report=false",
]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("default")  # third-party packages warn; tests of our own code make them errors


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    plt.close("all")


def start(name: str, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} == {
        "sweep_epsilon.py", "own_data.py", "answer.py",
    }  # fmt: skip


def test_the_sweep_and_an_answer_of_one_of_its_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some_of_the_demo(20))
    (tmp_path / "train.jsonl").write_text(rows, "utf-8")
    start("sweep_epsilon.py", "--epsilon", "2", "8", "--", *QUICK, "data.train=train.jsonl")
    assert (tmp_path / "sweep.svg").read_text("utf-8").count("epsilon at delta 1e-05") <= 1
    assert capsys.readouterr().out.count("held-out loss") == 2
    start("answer.py", "runs/epsilon-8", "Which desk handles card loss?")
    said = capsys.readouterr().out
    assert "before: " in said
    assert "after:  " in said


def test_own_data_from_a_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start("own_data.py", *QUICK)
    assert "for every customer, delta 1e-05" in capsys.readouterr().out
    assert (tmp_path / "runs" / "own-data" / "adapter" / "adapter_model.safetensors").exists()


def cells() -> list[str]:
    """Return the code of the notebook, cell by cell."""
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_kept_without_output_and_its_cells_are_python() -> None:
    for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    for code in cells():
        compile(code, str(NOTEBOOK), "exec")


@pytest.mark.soak
def test_the_notebook_runs() -> None:
    """In one namespace, as a kernel would."""
    space: dict[str, object] = {"__name__": "__main__"}
    for code in cells():
        exec(compile(code, str(NOTEBOOK), "exec"), space)
    assert space["run"]
