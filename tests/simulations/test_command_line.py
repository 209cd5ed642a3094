"""The command line as its user meets it: every mistake is one clear error that says what to do."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import fedllm as package
from fedllm.cli.hydra_config import compose, validate
from fedllm.cli.live_view import Screen
from fedllm.cli.main import _SIMULATE_HELP, app
from fedllm.config import SimulationConfig
from tests.simulations.conftest import CommandsHere

Overrides = Callable[..., list[str]]


@pytest.fixture
def fedllm(tmp_path: Path) -> CommandsHere:
    """The command line: `fedllm("simulate", "privacy=off")`."""
    return CommandsHere(tmp_path)


@pytest.fixture
def federate(fedllm: Any, overrides: Overrides, tmp_path: Path, without_plots: None) -> Callable[..., Any]:
    """Return a function that runs the small federation with more arguments, one short round."""

    def run(*arguments: str, **changes: Any) -> Any:
        few = {"training": {"rounds": 1, "local_steps": 1}}
        return fedllm("simulate", *overrides(tmp_path / "runs", **{**few, **changes}), *arguments, cwd=tmp_path)

    return run


def refused(result: Any, *words: str) -> None:
    """One error, the words in it, nothing else on the way, and no traceback."""
    assert "Traceback" not in result.text
    assert result.code == 1, result.text
    assert result.error.startswith("error "), "the error comes first, without noise of libraries"
    assert "\nerror" not in result.error
    assert "FEDLLM_TRACEBACK" not in result.text, "the user's mistake is not a fault of fedllm"
    for word in words:
        assert word in result.text


# ---- what is right -------------------------------------------------------------------------------------------------


def test_the_command_tells_its_version_and_what_it_can_do() -> None:
    """With `python -m fedllm.cli`, in a process of its own."""

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "fedllm.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert run("version").strip().count(".") == 2
    assert "simulate" in run("--help")


def test_an_error_in_a_log_file_is_not_broken_into_lines(tmp_path: Path) -> None:
    """A path that is cut in two can be neither searched for nor copied."""
    folder = tmp_path / ("long-" * 30)
    command = [sys.executable, "-m", "fedllm.cli", "simulate", f"--config-dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"--config-dir={folder}: no such folder" in done.stderr


def test_help_can_be_learned_from(fedllm: Any) -> None:
    result = fedllm("simulate", "--help")
    assert result.code == 0
    for words in ("privacy=off", "resume=true", "experiment=", "experiment=parallel", "--cfg", "KEY=VALUE"):
        assert words in result.text


def _examples() -> list[list[str]]:
    """Return the arguments of every example in the help; what is said of it stands behind three spaces."""
    text = _SIMULATE_HELP.partition("[/bold]\n")[2].replace("\n      ", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [shlex.split(line.partition("   ")[0].removeprefix("fedllm simulate")) for line in lines]


@pytest.mark.parametrize("arguments", _examples(), ids=" ".join)
def test_every_example_of_the_help_is_a_configuration(arguments: list[str]) -> None:
    overrides = [argument for argument in arguments if argument != "--cfg"]
    assert all("=" in override for override in overrides), "the words about an example are not part of it"
    validate(SimulationConfig, compose("config", overrides, None))


def test_the_examples_of_the_help_are_found() -> None:
    assert len(_examples()) >= 9
    assert "privacy.unit=record" in _examples()[-2]


def test_a_mistake_is_told_before_torch_is_imported() -> None:
    """Which takes ten seconds on a small machine."""
    code = (
        "import sys, fedllm.cli.main\n"
        "try: fedllm.cli.main.main()\n"
        "except SystemExit as leaving: assert leaving.code == 1\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, "simulate", "privacy.epsilon=abc"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "privacy.epsilon='abc'" in done.stderr
    assert done.returncode == 0, done.stderr


def test_the_first_line_comes_before_the_libraries_that_take_long() -> None:
    code = """
import sys
from importlib.abc import MetaPathFinder
class Stop(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "flwr", "datasets", "matplotlib", "scipy"):
            print("NOW", name)
            raise SystemExit(3)
sys.meta_path.insert(0, Stop())
from fedllm.cli.main import main
main()
"""
    command = [sys.executable, "-c", code, "simulate", "output=/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    first, then = done.stdout.splitlines()
    assert first == "loading PyTorch and Transformers ..."
    assert then.startswith("NOW")


def test_the_last_line_counts_from_the_start_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports and report included, not the rounds alone."""
    told: list[float] = []
    monkeypatch.setattr(package, "BEGAN", time.monotonic() - 1_000_000)
    monkeypatch.setattr("simulations.simulate.simulate", lambda *_: SimpleNamespace(stopped=""))
    monkeypatch.setattr("fedllm.cli.live_view.Screen.summarise", lambda self, summary, seconds: told.append(seconds))
    done = CliRunner().invoke(app, ["simulate", "federation.processes=1"])  # which starts no process before the run
    assert done.exit_code == 0, done.output
    assert told[0] >= 1_000_000


def test_without_a_command_the_help_is_shown(fedllm: Any) -> None:
    assert "simulate" in fedllm().text
    assert "Traceback" not in fedllm().text


def composed(fedllm: Any, *arguments: str) -> dict[str, Any]:
    result = fedllm("simulate", "--cfg", *arguments)
    assert result.code == 0, result.text
    values: dict[str, Any] = yaml.safe_load(result.output)
    return values


def test_cfg_prints_the_whole_configuration_as_yaml(fedllm: Any) -> None:
    values = composed(fedllm)
    assert set(values) == {
        "name", "output", "seed", "resume", "audit", "evaluation",
        "model", "data", "adapter", "privacy", "training", "federation", "site",
    }  # fmt: skip
    assert values["privacy"]["epsilon"] == 8.0
    assert composed(fedllm, "privacy=off", "privacy.epsilon=3", "name=first")["privacy"]["mode"] == "off"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("name=한글 이름", ["name"], "한글 이름"),
        ("data.prompt={question}", ["data", "prompt"], "{question}"),
        ("data.prompt=문의: {question}, {branch}", ["data", "prompt"], "문의: {question}, {branch}"),
        ("data.prompt={질문}", ["data", "prompt"], "{질문}"),
        ("data.text=[{answer}]", ["data", "text"], "[{answer}]"),
        ("data.text='{answer}'", ["data", "text"], "{answer}"),
        ("data.text=a: b", ["data", "text"], "a: b"),
        ("site.budgets={서울-강남: 4.0, busan: 2}", ["site", "budgets"], {"서울-강남": 4.0, "busan": 2}),
        ("site.budgets={'서울 강남': 4.0}", ["site", "budgets"], {"서울 강남": 4.0}),
        ("site.budgets.서울=4.0", ["site", "budgets"], {"서울": 4.0}),
        ("federation.weights={busan: 2}", ["federation", "weights"], {"busan": 2}),
        ("federation.weights.부산=2.0", ["federation", "weights"], {"부산": 2.0}),
        ("model.labels=[가, 나]", ["model", "labels"], ["가", "나"]),
        ("model.labels=[카드 분실,대출]", ["model", "labels"], ["카드 분실", "대출"]),
        ("model.labels=['0','1']", ["model", "labels"], ["0", "1"]),
        ("model.labels=[loan,card]", ["model", "labels"], ["loan", "card"]),
    ],
)
def test_what_a_user_writes_is_what_is_meant(fedllm: Any, override: str, path: list[str], value: Any) -> None:
    found: Any = composed(fedllm, override)
    for key in path:
        found = found[key]
    assert found == value


@pytest.mark.parametrize(
    "experiment",
    [
        file.stem
        for file in (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml")
        if file.stem != "demo-offices"
    ],
)
def test_every_experiment_composes_or_says_what_it_needs(fedllm: Any, experiment: str) -> None:
    result = fedllm("simulate", "--cfg", f"experiment={experiment}")
    if result.code == 0:
        assert yaml.safe_load(result.output)["training"]["rounds"] > 0
    else:
        refused(result, "a value is needed", "model.source")


@pytest.mark.parametrize(
    ("data", "size", "key", "value"),
    [
        ("own-records", "tiny-lm", "rounds", 16),
        ("own-records", "large-lm", "rounds", 9),
        ("own-classifier", "encoder", "rounds", 12),
    ],
)
def test_settings_for_a_size_go_on_top_of_those_for_the_data(
    fedllm: Any, data: str, size: str, key: str, value: int
) -> None:
    found = composed(fedllm, f"experiment=[{data},{size}]", "model.source=x", "data.train=x", "model.labels=[a,b]")
    assert found["training"][key] == value
    assert found["model"]["source"] == "x"
    lone = composed(fedllm, f"experiment={data}", "model.source=x", "data.train=x", "model.labels=[a,b]")
    assert found["data"] == lone["data"]


def test_a_folder_of_own_groups_is_used(fedllm: Any, tmp_path: Path) -> None:
    folder = tmp_path / "내 설정, it's mine"
    (folder / "privacy").mkdir(parents=True)
    (folder / "privacy" / "mine.yaml").write_text("defaults: [local, _self_]\nepsilon: 2.5\n")
    assert composed(fedllm, "privacy=mine", f"--config-dir={folder}")["privacy"]["epsilon"] == 2.5


def test_a_run_ends_with_exit_code_0_and_says_where_its_outputs_are(overrides: Overrides, tmp_path: Path) -> None:
    """In a process of its own, as a user starts it."""
    arguments = overrides(tmp_path / "runs", training={"rounds": 1, "local_steps": 1})
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TQDM")}
    done = subprocess.run(
        [sys.executable, "-m", "fedllm.cli", "simulate", *arguments],
        capture_output=True, text=True, check=False, env={**environment, "COLUMNS": "2000"},
    )  # fmt: skip
    assert done.returncode == 0
    for words in (str(tmp_path / "runs" / "run"), "강남", "epsilon"):
        assert words in done.stdout
    assert "NOT PRIVATE" not in done.stdout
    assert done.stderr == "", "nothing on the error stream: no warnings, no progress bars of libraries"


def test_a_run_without_privacy_says_so_on_the_screen(federate: Any) -> None:
    result = federate(privacy={"mode": "off"})
    assert result.code == 0
    assert result.text.count("NOT PRIVATE") >= 2


def test_branches_are_shown_as_they_are_called(federate: Any, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """Rich's markup in a name is a name."""
    names = {"jeju": "[/b]", "busan": "[red]", "daegu": "[/제주]", "강남": "a[b]c", "": "\\[x]"}
    renamed = [{**row, "branch": names["" if row["customer_id"] > "강남-5" else row["branch"]]} for row in rows]
    train = jsonl(tmp_path / "odd.jsonl", renamed)
    result = federate(data={"train": str(train)}, privacy={"mode": "off"}, site={"budgets": {}})
    assert result.code == 0, result.text
    assert [name for name in names.values() if name not in result.text] == []


def test_a_lost_quorum_ends_with_exit_code_1_the_reason_and_all_outputs(
    federate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = Screen.summarise

    def summarise(screen: Screen, *arguments: Any) -> None:
        sys.stderr.write("THE TABLES\n")
        tables(screen, *arguments)

    monkeypatch.setattr(Screen, "summarise", summarise)
    result = federate("site.epsilon=0.01")
    assert result.code == 1
    assert "Traceback" not in result.text
    assert "quorum=2" in result.error
    assert "강남 declined (budget)" in result.error
    assert result.error.endswith("THE TABLES\n"), "the reason comes first"
    assert "epsilon spent" in result.text
    assert "before" not in result.text, "nothing was trained"
    for file in ("summary.md", "summary.ko.md", "metrics.jsonl", "sites.svg", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "runs" / "run" / file).stat().st_size > 0


# ---- mistakes in keys and values -----------------------------------------------------------------------------------

CONFIGURATION: dict[str, tuple[list[str], list[str]]] = {
    # unknown keys and groups
    "unknown key": (["privacy.epsilo=3"], ["privacy.epsilo", "did you mean epsilon"]),
    "unknown key, added": (["+privacy.strength=3"], ["privacy.strength", "known keys", "clip_norm"]),
    "unknown section": (["privcy.epsilon=3"], ["privcy", "privacy"]),
    "unknown top key": (["epsilon=3"], ["epsilon"]),
    "unknown group choice": (["privacy=nope"], ["privacy/nope", "local", "off"]),
    "unknown model group": (["model=nope"], ["model/nope", "causal-lm"]),
    "unknown experiment": (["experiment=nope"], ["nope", "shakeout"]),
    "unknown experiment of two": (["experiment=[shakeout,nope]"], ["nope", "tiny-lm"]),
    "number among experiments": (["experiment=[shakeout,3]"], ["experiment"]),
    "sweep over experiments": (["experiment=shakeout,strict"], ["shakeout,strict"]),
    "number for a group": (["privacy=3"], ["privacy"]),
    "null for a group": (["privacy=null"], ["privacy"]),
    "key of a value": (["privacy.mode.x=3"], ["privacy.mode"]),
    "removed section": (["~privacy.nope"], ["privacy.nope"]),
    # malformed overrides
    "no value": (["privacy"], ["KEY=VALUE"]),
    "no key": (["=3"], ["=3"]),
    "a flag of Hydra": (["-m"], []),
    "double dot": (["privacy..epsilon=3"], ["privacy..epsilon"]),
    "trailing dot": (["privacy.=3"], ["privacy."]),
    "space in a key": (["privacy epsilon=3"], ["privacy epsilon"]),
    "unknown Korean key": (["개인정보.엡실론=3"], ["개인정보"]),
    "sweep": (["privacy.epsilon=1,2"], ["privacy.epsilon"]),
    "range": (["privacy.epsilon=range(1,3)"], ["privacy.epsilon"]),
    "unknown interpolation": (["privacy.epsilon=${nope}"], ["nope"]),
    "endless interpolation": (["privacy.epsilon=${privacy.epsilon}"], ["privacy.epsilon"]),
    "half an interpolation": (["privacy.epsilon=${"], ["privacy.epsilon"]),
    "unset environment": (["privacy.epsilon=${oc.env:FEDLLM_NOPE}"], ["FEDLLM_NOPE"]),
    "no such folder of groups": (["--config-dir=nope"], ["--config-dir=nope"]),
    # missing values
    "missing value": (["model.source=???"], ["model.source", "a value is needed"]),
    "own records without a file": (["data=records", "data.train=???"], ["data.train"]),
    # types
    "text for a number": (["privacy.epsilon=eight"], ["privacy.epsilon='eight'", "number"]),
    "nothing for a number": (["privacy.epsilon="], ["privacy.epsilon"]),
    "null for a number": (["privacy.epsilon=null"], ["privacy.epsilon"]),
    "list for a number": (["privacy.epsilon=[8]"], ["privacy.epsilon"]),
    "fraction for a count": (["training.rounds=2.5"], ["training.rounds=2.5"]),
    "text for a switch": (["resume=maybe"], ["resume='maybe'"]),
    "switch for a seed": (["seed=true"], ["seed=True"]),
    "list for weights": (["federation.weights=[1]"], ["federation.weights"]),
    "text for a weight": (["federation.weights={busan: heavy}"], ["federation.weights.busan='heavy'"]),
    "word for targets": (["adapter.targets=q_proj"], ["adapter.targets"]),
    # impossible values
    "negative epsilon": (["privacy.epsilon=-1"], ["privacy.epsilon=-1", "greater than or equal to"]),
    "infinite epsilon": (["privacy.epsilon=inf"], ["privacy.epsilon", "finite"]),
    "NaN epsilon": (["privacy.epsilon=nan"], ["privacy.epsilon", "finite"]),
    "huge epsilon": (["privacy.epsilon=1e400"], ["privacy.epsilon", "finite"]),
    "delta 0": (["privacy.delta=0"], ["privacy.delta=0"]),
    "delta without meaning": (["privacy.delta=0.5"], ["delta=0.5", "units"]),
    "sampling above 1": (["privacy.sampling_rate=1.5"], ["privacy.sampling_rate=1.5"]),
    "no clip": (["privacy.clip_norm=0"], ["privacy.clip_norm=0"]),
    "next to no noise": (["privacy.noise_multiplier=1e-9"], ["privacy.noise_multiplier"]),
    "unknown mode": (["privacy.mode=maximal"], ["privacy.mode='maximal'", "local"]),
    "person without a column": (["data.unit=null"], ["data.unit", "person", "privacy.unit=record"]),
    "weights with shares of noise": (
        ["privacy.mode=distributed", "federation.weights={busan: 2.0}"],
        ["federation.weights", "privacy=local"],
    ),
    "person of an empty column name": (["data.unit="], ["data.unit"]),
    "no rounds": (["training.rounds=0"], ["training.rounds=0"]),
    "endless rounds": (["training.rounds=1000000000000"], ["training.rounds"]),
    "unknown optimiser": (["training.server.name=lamb"], ["training.server.name='lamb'", "adam"]),
    "beta of 1": (["training.server.betas=[0.9,1.0]"], ["training.server", "betas"]),
    "one beta": (["training.server.betas=[0.9]"], ["training.server.betas"]),
    "unknown wire": (["training.wire=int8"], ["training.wire='int8'", "float16"]),
    "no quorum": (["federation.quorum=0"], ["federation.quorum=0"]),
    "unknown backend": (["federation.backend=spark"], ["federation.backend='spark'", "ray"]),
    "no time": (["federation.round_timeout=0"], ["federation.round_timeout=0"]),
    "unknown partition": (["federation.partition.by=nope"], ["federation.partition.by='nope'", "dirichlet"]),
    "natural without a column": (["federation.partition.column=null"], ["partition.column"]),
    "weight 0": (["federation.weights={busan: 0}"], ["weights must be positive"]),
    "negative budget": (["site.budgets={busan: -1}"], ["budgets must be positive"]),
    "no micro-batch": (["site.micro_batch=0"], ["site.micro_batch=0"]),
    "rank 0": (["adapter.rank=0"], ["adapter.rank=0"]),
    "too short": (["model.max_length=7"], ["model.max_length=7"]),
    "labels without a name": (["model.labels=[0,null]"], ["model.labels.1=None"]),
    "labels for a causal model": (["model.labels=[a,b]"], ["labels", "classification"]),
    "negative seed": (["seed=-1", "federation=iid", "federation.partition.sites=2"], ["seed=-1"]),
    "enormous seed": (["seed=99999999999999999999"], ["seed"]),
    # names
    "name with a slash": (["name=a/b"], ["name='a/b'", "Leave out /"]),
    "name with a backslash": (["name=a\\\\b"], ["name=", "Leave out /"]),
    "output without a name": (["output="], ["output=''"]),
    "name of the folder above": (["name=.."], ["name"]),
    "no name": (["name="], ["name"]),
    "name that no disk takes": (["name=" + "가" * 100], ["name"]),
    "resume without a name": (["name=null", "resume=true"], ["resume=true needs name="]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", CONFIGURATION)
def test_a_mistake_in_the_configuration_is_refused_before_anything_is_loaded(
    federate: Any, tmp_path: Path, mistake: str
) -> None:
    arguments, words = CONFIGURATION[mistake]
    result = federate(*arguments)
    if arguments[0].startswith("-") and "=" not in arguments[0]:
        assert result.code == 2
        assert "No such option" in result.text
        assert "Traceback" not in result.text
    else:
        refused(result, *words)
    assert not (tmp_path / "runs").exists()


def test_a_partition_without_what_it_needs_is_refused(fedllm: Any) -> None:
    refused(fedllm("simulate", "federation=dirichlet"), "partition.column")
    refused(fedllm("simulate", "federation=iid", "federation.partition.sites=null"), "partition.sites")


def test_an_unknown_key_is_not_said_to_be_possible_with_a_plus(federate: Any) -> None:
    """Hydra's own advice leads to the next error."""
    assert "+epsilon" not in federate("epsilon=3").text


def test_classification_without_labels_or_label_is_refused(fedllm: Any, tmp_path: Path) -> None:
    base = ["model=classifier", "model.source=x", "data=records", "data.train=x.jsonl", "data.text={text}"]
    refused(fedllm("simulate", *base), "model.labels")
    refused(fedllm("simulate", *base, "model.labels=[]"), "model.labels")
    refused(fedllm("simulate", *base, "model.labels=[a]"), "at least two")
    refused(fedllm("simulate", *base, "model.labels=[a,a]"), "twice")
    refused(fedllm("simulate", *base, "model.labels=[a,b]"), "data.label")
    refused(fedllm("simulate", *base, "model.labels=[a,b]", "data.label=x", "data.prompt=x"), "data.prompt")
    refused(fedllm("simulate", *base, "model.labels=nope.json"), "nope.json")
    for content in (b"{bad", b'{"a": 1}', b'"abc"', b"[1, null]", b"\xff\xfe"):
        (tmp_path / "labels.json").write_bytes(content)
        refused(fedllm("simulate", *base, f"model.labels={tmp_path / 'labels.json'}"), "model.labels")


# ---- mistakes in data ----------------------------------------------------------------------------------------------


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


_GOOD = '{"branch": "a", "customer_id": "1", "question": "q", "answer": "답"}\n'


def _branches(last: str) -> bytes:
    return "".join(_GOOD.replace('"a"', f'"{name}"') for name in ("a", "b", "c", last)).encode()


_CSV = "branch,customer_id,question,answer\n"

# name of the file, its bytes, words in the error
FILES: dict[str, tuple[str, bytes, list[str]]] = {
    "malformed line": ("x.jsonl", (_GOOD * 2 + "{bad\n" + _GOOD).encode(), ["x.jsonl, line 3", "not JSON"]),
    "cut line": ("x.jsonl", (_GOOD * 3 + _GOOD[:30]).encode(), ["x.jsonl, line 4", "not JSON"]),
    "line of another kind": ("x.jsonl", (_GOOD + "[1, 2]\n").encode(), ["x.jsonl, line 2", "object"]),
    "numbers": ("x.jsonl", b"1\n2\n", ["x.jsonl, line 1", "object"]),
    "null": ("x.jsonl", b"null\n", ["x.jsonl, line 1", "object"]),
    "null among records": ("x.jsonl", (_GOOD + "null\n" + _GOOD).encode(), ["x.jsonl, line 2", "object"]),
    "Korean, not UTF-8": ("x.jsonl", (_GOOD * 2).encode("euc-kr"), ["x.jsonl, line 1", "UTF-8"]),
    "UTF-16": ("x.jsonl", _GOOD.encode("utf-16"), ["x.jsonl, line 1", "UTF-8"]),
    "zeros": ("x.jsonl", bytes(100), ["x.jsonl, line 1"]),
    "nested without end": ("x.jsonl", b'{"a":' + b"[" * 100_000, ["x.jsonl, line 1"]),
    "empty": ("x.jsonl", b"", ["x.jsonl is empty"]),
    "blank lines": ("x.jsonl", b"\n\n\n", ["x.jsonl", "no records"]),
    "empty objects": ("x.jsonl", b"{}\n{}\n", ["x.jsonl"]),
    "other columns": ("x.jsonl", b'{"a": 1}\n', ["missing column", "customer_id", "the records have a", "x.jsonl"]),
    "person is a list": ("x.jsonl", _GOOD.replace('"1"', '["1"]').encode(), ["customer_id"]),
    "person is an object": ("x.jsonl", _GOOD.replace('"1"', '{"id": 1}').encode(), ["customer_id"]),
    "branch is empty": ("x.jsonl", _GOOD.replace('"a"', '""').encode(), ["x.jsonl, line 1", "branch"]),
    "branch is null": ("x.jsonl", (_GOOD + _GOOD.replace('"a"', "null")).encode(), ["x.jsonl, line 2", "branch"]),
    "branch of 201 letters": ("x.jsonl", _branches("가" * 201), ["site name", "200"]),
    "csv without records": ("x.csv", _CSV.encode(), ["x.csv", "no records"]),
    "csv of other columns": ("x.csv", b"a,b\n1,2\n", ["missing column"]),
    "csv of another separator": ("x.csv", b"a;b\n1;2\n", ["data.separator=';'"]),
    "csv with a long line": ("x.csv", (_CSV + "a,1,q,w\n" + "a,1,q,w,x,y\n").encode(), ["x.csv", "record 2"]),
    "csv with an open quote": ("x.csv", (_CSV + 'a,1,q,"w\n').encode(), ["x.csv"]),
    "csv, not UTF-8": ("x.csv", (_CSV + "a,1,질문,답\n").encode("euc-kr"), ["x.csv", "UTF-8"]),
    "parquet that is none": ("x.parquet", b"PAR1 and then nothing", ["x.parquet"]),
    "json that is none": ("x.json", b"{bad", ["x.json"]),
    "json text": ("x.json", b'"hello"', ["x.json"]),
    "another kind of file": ("x.txt", b"hello", ["x.txt", ".jsonl", ".csv"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", FILES)
def test_a_file_that_cannot_be_used_is_refused_with_its_name_and_line(
    federate: Any, tmp_path: Path, mistake: str
) -> None:
    name, content, words = FILES[mistake]
    (tmp_path / name).write_bytes(content)
    refused(federate(data={"train": str(tmp_path / name)}), *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("mistake", ["malformed line", "Korean, not UTF-8", "null", "empty", "csv, not UTF-8"])
def test_a_heldout_file_that_cannot_be_used_is_refused_as_well(federate: Any, tmp_path: Path, mistake: str) -> None:
    name, content, words = FILES[mistake]
    (tmp_path / name).write_bytes(content)
    refused(federate(data={"heldout": str(tmp_path / name)}), *words)
    assert not (tmp_path / "runs").exists()


def test_a_heldout_file_of_other_columns_is_named(federate: Any, tmp_path: Path) -> None:
    heldout = jsonl(tmp_path / "public.jsonl", [{"q": "x"}])
    refused(federate(data={"heldout": str(heldout)}), "missing column", "question", "public.jsonl")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nope.jsonl", ["nope.jsonl", "no such file"]),
        ("/nope/train.jsonl", ["/nope/train.jsonl", "no such file"]),
        ("org/nope", ["org/nope"]),
        ("pkg://nope/train.jsonl", ["no Python package"]),
        ("pkg://fedllm/nope.jsonl", ["holds no"]),
        ("pkg://", ["pkg://"]),
        ("pkg:///x", ["pkg://"]),
        ("/dev/null", ["/dev/null"]),
        (".", ["holds no train"]),
    ],
)
def test_a_source_that_is_not_there_is_refused(federate: Any, source: str, words: list[str]) -> None:
    refused(federate(data={"train": source}), *words)


def test_files_of_a_folder_that_do_not_belong_together_are_refused(federate: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train-1.jsonl").write_text(_GOOD, "utf-8")
    (folder / "train-2.csv").write_text(_CSV, "utf-8")
    refused(federate(data={"train": str(folder)}), "several kinds")
    (folder / "train-2.csv").unlink()
    (folder / "train-2.jsonl").write_text('{"other": {"columns": 1}}\n', "utf-8")
    refused(federate(data={"train": str(folder)}))


@pytest.mark.parametrize(
    ("key", "template", "words"),
    [
        ("prompt", "{nope}", ["missing column nope", "question"]),
        ("prompt", "{질문}", ["missing column 질문"]),
        ("prompt", "{", ["template", "Write {column}"]),
        ("prompt", "}", ["template", "Write {column}"]),
        ("prompt", "a {} b", ["template", "{question}"]),
        ("prompt", "{0}", ["0"]),
        ("prompt", "{question.__class__}", ["template", "plain name"]),
        ("prompt", "{question[0]}", ["template", "plain name"]),
        ("prompt", "{question!x}", ["template"]),
        ("prompt", "Q {question:d}", ["template"]),
        ("prompt", "{question:{answer}}", ["template"]),
        ("prompt", "{question:,}", ["template"]),
        ("text", "{answer!x}", ["template"]),
        ("text", "", ["data.text"]),
    ],
)
def test_a_template_that_does_not_fit_is_refused(
    federate: Any, tmp_path: Path, key: str, template: str, words: list[str]
) -> None:
    """Without a held-out set, so that the server does not meet it before the sites do."""
    refused(federate(data={key: template, "heldout": None}), *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("heldout", [True, False], ids=["with held-out set", "without"])
def test_a_chat_template_that_the_model_lacks_is_refused(federate: Any, heldout: bool) -> None:
    refused(federate(data={"chat": True, **({} if heldout else {"heldout": None})}), "data.chat=true", "chat template")


def test_a_heldout_record_with_a_hole_is_named(federate: Any, tmp_path: Path) -> None:
    heldout = jsonl(tmp_path / "public.jsonl", [{"question": "q", "answer": "a"}, {"question": None, "answer": "a"}])
    refused(federate(data={"heldout": str(heldout)}), "line 2", "question", "public.jsonl")


def test_a_label_that_is_not_declared_is_refused(federate: Any, tiny_bert: Path) -> None:
    model = {"source": str(tiny_bert), "task": "classification", "labels": ["카드", "loan"], "pooling": "mean"}
    data = {"prompt": None, "text": "{question}", "label": "topic"}
    changes = {"model": model, "adapter": {"targets": ["query"]}, "privacy": {"unit": "record"}}
    result = federate(data=data, **changes)
    refused(result, "'visa'", "line 3", "model.labels", "train.jsonl")  # in a simulation the user may see why


def test_records_without_a_person_are_named_before_the_first_round(
    federate: Any, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    holes = [{**row, "customer_id": None if row["branch"] == "busan" else row["customer_id"]} for row in rows]
    result = federate(data={"train": str(jsonl(tmp_path / "x.jsonl", holes))})
    refused(result, "x.jsonl, line ", "customer_id is empty")


# ---- mistakes about models -----------------------------------------------------------------------------------------


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def _config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **values}), "utf-8")

    return change


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


MODELS: dict[str, Callable[[Path], Any]] = {
    "weights cut": _cut,
    "weights empty": _write("model.safetensors", b""),
    "weights of another kind": _write("model.safetensors", b"\xff" * 64),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "configuration malformed": _write("config.json", b"{bad"),
    "configuration empty": _write("config.json", b"{}"),
    "configuration is a list": _write("config.json", b"[]"),
    "unknown architecture": _write("config.json", b'{"model_type": "nope"}'),
    "no attention heads": _config(num_attention_heads=0),
    "wider than its weights": _config(hidden_size=32),
    "tokenizer malformed": _write("tokenizer.json", b"{bad"),
    "tokenizer empty": _write("tokenizer.json", b"{}"),
    "no tokenizer": lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
    "nothing": lambda folder: [file.unlink() for file in folder.iterdir()],
}


@pytest.mark.parametrize("mistake", MODELS)
def test_a_folder_that_is_no_model_is_refused(federate: Any, tmp_path: Path, tiny_llama: Path, mistake: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    MODELS[mistake](folder)
    result = federate(model={"source": str(folder)})
    assert result.code == 1
    assert "Traceback" not in result.text
    assert "error model.source=" in result.error, "transformers may say more before it"
    assert "cannot be loaded" in result.error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.source=nope"], ["model.source=nope", "local folder"]),
        (["model.source=/nope"], ["model.source=/nope: no such"]),
        (["model.max_length=129"], ["model.max_length=129", "128"]),
        (["adapter.targets=[nope]"], ["adapter.targets", "nope", "q_proj"]),
        (["adapter.targets=[]"], ["targets"]),
        (["adapter.targets=[embed_tokens]"], ["adapter.targets"]),
        (["adapter.targets=[input_layernorm]"], ["adapter.targets", "q_proj"]),
        (["adapter.layers=[99]"], ["adapter.layers", "99"]),
        (["adapter.layers=[]"], ["layers"]),
        (["adapter.targets=all-linear", "adapter.layers=[99]"], ["adapter.layers", "99"]),
        (["site.device=tpu"], ["site.device=tpu", "cpu"]),
        (["site.device=meta"], ["site.device=meta", "cpu"]),
        (["site.device=cuda:99"], ["site.device=cuda:99"]),
        (["site.device="], ["site.device="]),
    ],
)
def test_a_model_that_does_not_fit_the_settings_is_refused(
    federate: Any, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    refused(federate(*arguments), *words)
    assert not (tmp_path / "runs").exists()


def test_all_linear_layers_of_some_blocks_can_be_chosen(federate: Any) -> None:
    result = federate("adapter.targets=all-linear", "adapter.layers=[1]")
    assert result.code == 0, result.text


def test_a_model_that_gives_no_numbers_is_refused(federate: Any, tmp_path: Path, tiny_llama: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: torch.full_like(v, torch.nan) for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    refused(federate(model={"source": str(folder)}), "model.embed_tokens.weight", "no number")


# ---- mistakes about sites, outputs and runs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["federation.quorum=5"], ["federation.quorum=5", "4 sites"]),
        (["privacy.mode=distributed", "privacy.colluding_sites=3"], ["4 sites are too few", "privacy.mode=local"]),
        (["site.min_units=30"], ["0 of 4 sites have the 30 units", "a round needs 2 sites", "site.min_units"]),
        (["federation.weights={nope: 2.0}"], ["federation.weights", "nope", "busan"]),
        (["site.budgets={nope: 2.0}"], ["site.budgets", "nope", "강남"]),
        (["federation.partition.column=nope"], ["missing column nope"]),
        (["data.unit=nope"], ["missing column nope"]),
        (["data.label=nope"], ["missing column nope"]),
        (
            ["federation.partition.by=iid", "federation.partition.sites=1000"],
            ["partition.sites=1000", "72 privacy units"],
        ),
    ],
)
def test_a_federation_that_cannot_be_is_refused(
    federate: Any, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    refused(federate(*arguments), *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_more_processors_than_there_are_is_one_clear_error(federate: Any) -> None:
    result = federate("federation.backend=ray", "federation.cpus_per_site=1000")
    assert result.code == 1
    assert "Traceback" not in result.text
    assert "cpus_per_site" in result.error


@pytest.mark.parametrize("place", ["file", "file/runs", "/dev/null", "/proc/runs", "a" * 300, "dangling"])
def test_an_output_folder_that_cannot_be_made_is_refused(federate: Any, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at all")
    refused(federate(f"output={place}"), "output")


def test_a_name_is_used_once(federate: Any, tmp_path: Path) -> None:
    assert federate(privacy={"mode": "off"}).code == 0
    before = {f: f.read_bytes() for f in (tmp_path / "runs").rglob("*") if f.is_file()}
    refused(federate(privacy={"mode": "off"}), "exists", "name=", "resume=true")
    assert before == {f: f.read_bytes() for f in (tmp_path / "runs").rglob("*") if f.is_file()}
    changed = federate("resume=true", "training.rounds=2", privacy={"mode": "off"})
    refused(changed, "training.rounds", "was 1", "now 2")
    (tmp_path / "runs" / "run" / "record.key").write_bytes(b"ab")
    refused(federate("resume=true", privacy={"mode": "off"}), "runs/run/record.key: not an identity file")
    (tmp_path / "runs" / "run" / "record.key").write_bytes(before[tmp_path / "runs" / "run" / "record.key"])
    assert federate("resume=true", privacy={"mode": "off"}).code == 0
    for file, words in (("plan.json", "plan.json"), ("metrics.jsonl", "metrics.jsonl"), ("config.json", "config.json")):
        for content in (b"[]", b"{\xff"):
            (tmp_path / "runs" / "run" / file).write_bytes(content)
            refused(federate("resume=true", privacy={"mode": "off"}), words)
        (tmp_path / "runs" / "run" / file).write_bytes(before[tmp_path / "runs" / "run" / file])


@pytest.mark.parametrize("there", ["nothing", "a folder", "a file"])
def test_a_run_without_a_checkpoint_cannot_be_resumed(federate: Any, tmp_path: Path, there: str) -> None:
    if there == "a folder":
        (tmp_path / "runs" / "run").mkdir(parents=True)
    elif there == "a file":
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "run").write_text("x")
    refused(federate("resume=true"), "resume=true", "checkpoint")
