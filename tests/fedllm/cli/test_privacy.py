"""`fedllm privacy`: sums that a privacy officer can do, and a clear answer to every mistake."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedllm.api import checked_event
from fedllm.audit.accountants import CROSS_CHECKS
from fedllm.audit.model import CrossCheck, Estimate
from fedllm.cli.main import app
from fedllm.cli.privacy import parse_event
from fedllm.errors import ConfigError
from fedllm.privacy import accounting

ROOT = Path(__file__).parents[3]
VECTORS: dict[str, Any] = json.loads((ROOT / "tests" / "vectors" / "accounting.json").read_text("utf-8"))
AUDITS: dict[str, Any] = json.loads((ROOT / "tests" / "vectors" / "one_run_audit.json").read_text("utf-8"))
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:opacus")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["privacy", *map(str, arguments)], env={"COLUMNS": "200"})


def run(*arguments: object) -> str:
    result = invoke(*arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(*arguments: object) -> dict[str, Any]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    values: dict[str, Any] = json.loads(run(*arguments, "--json"), parse_constant=no_constant)
    return values


def event_options(q: float, noise: float, steps: int) -> list[str]:
    return ["--sampling-rate", str(q), "--noise-multiplier", str(noise), "--steps", str(steps)]


# ---- epsilon ---------------------------------------------------------------------------------------------------------


# The accountants themselves meet all vectors in tests/fedllm/privacy and tests/fedllm/audit.
@pytest.mark.parametrize("vector", VECTORS["single"][::2], ids=lambda v: f"q={v['q']}-sigma={v['noise_multiplier']}")
def test_epsilon_prints_what_the_vectors_say(vector: dict[str, Any]) -> None:
    options = event_options(vector["q"], vector["noise_multiplier"], vector["steps"])
    values = run_json("epsilon", *options, "--delta", vector["delta"])
    tolerance = VECTORS["tolerance"]
    assert values["pld"] == pytest.approx(vector["pld"], abs=tolerance["pld"])
    assert values["rdp"] == pytest.approx(vector["rdp"], rel=tolerance["rdp_relative"])
    low, high = tolerance["opacus_prv_minus_pld"]
    assert low <= values["prv"] - vector["pld"] <= high
    assert abs(values["prv_estimate"] - values["pld"]) <= 0.01
    assert 0 < values["advantage"] <= 1
    assert 0.01 < values["tpr_at_1_percent"] <= 1
    assert values["reasons"] == {}


def test_events_compose_to_what_the_vectors_say_in_any_order() -> None:
    pair, sites = VECTORS["composed"]
    expected = {"pld": pair["pld"], "rdp": pair["rdp"]}
    answers = []
    for order in itertools.permutations(pair["events"]):
        options = [text for event in order for text in ("--event", ",".join(map(str, event)))]
        answers.append(run_json("epsilon", *options, "--delta", pair["delta"]))
    for values in answers:
        assert {key: values[key] for key in expected} == pytest.approx(expected, rel=0.005)
        assert 0 <= values["prv"] - values["pld"] <= 0.02
        del values["events"], values["prv"], values["prv_estimate"]  # opacus convolves in the order it was given
    assert answers[0] == answers[1]

    q, noise, steps = sites["event"]
    again = ["--event", f"{q},{noise},{steps}"]
    twice = run_json("epsilon", *event_options(q, noise, steps), *again, "--delta", sites["delta"])
    assert twice["pld"] == pytest.approx(sites["pld"][1], abs=0.01)
    assert len(twice["events"]) == 2


def test_the_text_says_the_same_in_words() -> None:
    text = run("epsilon", *event_options(0.01, 1.0, 1000), "--delta", 1e-5)
    for part in ("PLD  1.828", "RDP  2.101", "PRV  1.838", "advantage", "guessing is 50 %", "1 %"):
        assert part in text
    assert "anonym" not in text


def test_a_step_without_noise_has_no_bound_and_is_valid_json_all_the_same() -> None:
    values = run_json("epsilon", "--event", "0.01,0,1", "--event", "0.01,4,10", "--delta", 1e-5)
    assert (values["pld"], values["rdp"], values["prv"]) == (None, None, None)
    assert "without noise" in values["reasons"]["pld"]
    assert values["advantage"] == 1.0
    assert "without bound" in run("epsilon", "--event", "0.01,0,1", "--delta", 1e-5)


def test_what_touches_nobody_costs_nothing() -> None:
    values = run_json("epsilon", "--event", "0,0,10", "--delta", 1e-5)
    assert (values["pld"], values["rdp"], values["prv"], values["advantage"]) == (0, 0, 0, 0)


@pytest.mark.parametrize("event", ["1,0.01,1", "0.5,0.3,100000", "1,1e-6,1000000", "0.9,0.001,1"])
def test_an_epsilon_beyond_all_use_is_a_bound_by_rdp(event: str) -> None:
    values = run_json("epsilon", "--event", event, "--delta", 1e-5)
    assert values["pld"] is None or values["pld"] == values["rdp"] > 100
    assert values["prv"] is None
    assert set(values["reasons"]) == {"pld", "prv"}
    assert values["advantage"] == 1.0


@pytest.mark.parametrize(
    "event",
    [
        "1,10000,1",
        "1e-9,1,1000000",
        "0.5,0.4,1",
        pytest.param("0.001,10000,1000000", marks=pytest.mark.soak),
    ],
)
def test_the_ends_of_what_is_accepted_are_accounted_for(event: str) -> None:
    values = run_json("epsilon", "--event", event, "--delta", 1e-5)
    assert 0 <= values["pld"] <= values["rdp"] + 0.01
    assert values["prv"] is not None or values["reasons"]["prv"]


def test_without_opacus_there_is_no_prv_and_the_rest_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    values = run_json("epsilon", *event_options(0.01, 1.0, 10), "--delta", 1e-5)
    assert values["prv"] is None
    assert values["reasons"] == {"prv": "Opacus is not installed"}
    assert values["pld"] > 0
    assert "Opacus is not installed" in run("epsilon", *event_options(0.01, 1.0, 10), "--delta", 1e-5)


def test_accountants_that_contradict_each_other_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CROSS_CHECKS, "prv", CrossCheck("Opacus", lambda *_: Estimate(9.0, 9.01)))
    result = invoke("epsilon", *event_options(0.01, 1.0, 10), "--delta", 1e-5)
    assert result.exit_code == 1
    assert "contradict" in str(result.exception)
    assert result.stdout == ""


# ---- calibrate -------------------------------------------------------------------------------------------------------


# the demo's plan, and a full batch; more targets in tests/fedllm/privacy
@pytest.mark.parametrize(("target", "q", "steps"), [(8.0, 0.08, 60), (1.0, 1.0, 5)])
def test_calibrated_noise_is_at_the_target_or_half_a_percent_below(target: float, q: float, steps: int) -> None:
    options = ["--epsilon", target, "--delta", 1e-5, "--sampling-rate", q, "--steps", steps]
    values = run_json("calibrate", *options)
    assert 0.995 * target <= values["pld"] <= target
    back = run_json("epsilon", *event_options(q, values["noise_multiplier"], steps), "--delta", 1e-5)
    assert back["pld"] == values["pld"]
    assert back["rdp"] == values["rdp"]
    assert f"noise multiplier {values['noise_multiplier']:g}" in run("calibrate", *options)


def test_a_target_that_no_noise_can_miss_is_met_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accounting.calibrate(5.0, 0.1, 0.001, 1) == 0.1
    monkeypatch.setattr(accounting, "calibrate", lambda *_: 1.0)  # which is accounted for in less time
    options = ["--epsilon", 5, "--delta", 0.1, "--sampling-rate", 0.001, "--steps", 1]
    values = run_json("calibrate", *options)
    assert values["pld"] < 5
    assert values["noise_multiplier"] == 1.0
    assert "none lower" in values["reasons"]["noise_multiplier"]
    assert "note:" in run("calibrate", *options)


def test_a_target_that_no_noise_can_meet_is_refused() -> None:
    result = invoke("calibrate", "--epsilon", 1e-6, "--delta", 1e-12, "--sampling-rate", 1, "--steps", 1000)
    assert result.exit_code == 1
    assert isinstance(result.exception, ConfigError)


# ---- audit-bound -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", AUDITS["vectors"], ids=lambda v: f"{v['v']}-of-{v['r']}-of-{v['m']}")
def test_the_bound_of_an_audit_is_what_the_vectors_say(vector: dict[str, Any]) -> None:
    options = ["--canaries", vector["m"], "--guesses", vector["r"], "--right", vector["v"], "--delta", vector["delta"]]
    values = run_json("audit-bound", *options)
    assert values["eps_lower"] == pytest.approx(vector["eps_lower"], abs=AUDITS["tolerance"])
    assert values["eps_lower"] <= values["ceiling"]
    assert values["confidence"] == 0.95
    text = run("audit-bound", *options)
    assert f"at least {values['eps_lower']:.3f}" in text
    assert f"{values['ceiling']:.3f}" in text  # what a perfect attack could have proved is always said
    assert "no pass" in text


# ---- mistakes --------------------------------------------------------------------------------------------------------

EPSILON = ["epsilon", "--delta", "1e-5"]
CALIBRATE = {"--epsilon": "3", "--delta": "1e-5", "--sampling-rate": "0.01", "--steps": "100"}
BOUND = {"--canaries": "100", "--guesses": "50", "--right": "40", "--delta": "1e-5"}
MISTAKES: list[list[str]] = [
    EPSILON,
    [*EPSILON, "--sampling-rate", "0.1"],
    [*EPSILON, "--sampling-rate", "0.1", "--steps", "3", "--event", "0.1,1,3"],
    *([*EPSILON, "--event", text] for text in (
        "", ",,", "0.1", "0.1,1", "0.1,1,2,3", "a,b,c", "0.1;1;3", "1.1,1,3", "-0.1,1,3", "0.1,-1,3", "0.1,1,0",
        "0.1,1,-3", "0.1,1,3.5", "0.1,1,1e3", "nan,1,3", "0.1,nan,3", "0.1,1,nan", "inf,1,3", "0.1,inf,3", "0.1,1,inf",
        "0.1,1e30,3", "0.1,1," + "9" * 30, "0.1,1," + "9" * 5000, "x" * 10_000, "\x00", "0.1,1,3\n0.1,1,3",
    )),
    *([*EPSILON, *event_options(*values)] for values in (
        (1.5, 1.0, 10), (-0.1, 1.0, 10), (0.1, -1.0, 10), (0.1, 1.0, 0), (float("nan"), 1.0, 1), (0.1, 1.0, 10**40),
    )),
    *(["epsilon", "--delta", delta, "--event", "0.1,1,3"] for delta in ("0", "1", "-1", "2", "nan", "inf", "x", "")),
    ["epsilon", "--event", "0.1,1,3"],
    *(["calibrate", *(x for pair in {**CALIBRATE, **change}.items() for x in pair)] for change in (
        {"--epsilon": "0"}, {"--epsilon": "-1"}, {"--epsilon": "nan"}, {"--epsilon": "inf"}, {"--epsilon": "1e9"},
        {"--delta": "0"}, {"--delta": "1"}, {"--delta": "nan"}, {"--sampling-rate": "2"}, {"--sampling-rate": "0"},
        {"--sampling-rate": "nan"}, {"--steps": "0"}, {"--steps": "-5"}, {"--steps": "1" * 40}, {"--steps": "1.5"},
    )),
    *(["audit-bound", *(x for pair in {**BOUND, **change}.items() for x in pair)] for change in (
        {"--guesses": "101"}, {"--right": "51"}, {"--right": "-1"}, {"--guesses": "-1", "--right": "-1"},
        {"--canaries": "0"}, {"--canaries": "1" * 40}, {"--delta": "0"}, {"--delta": "1"}, {"--delta": "nan"},
        {"--right": "x"}, {"--right": "nan"},
    )),
]  # fmt: skip


@pytest.mark.parametrize("arguments", MISTAKES, ids=lambda arguments: " ".join(arguments)[:60])
def test_a_mistake_is_one_clear_error_and_prints_no_number(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.stdout == ""
    if isinstance(result.exception, ConfigError):  # `main` prints it as one line, and ends with 1
        text = str(result.exception)
        assert 20 < len(text) < 300
        assert len(text.splitlines()) == 1
    else:
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == 2  # an option that is missing, or no number at all
        assert "Error" in result.stderr


def test_a_mistake_at_the_real_command_is_one_line_and_exit_code_1() -> None:
    code = "import sys; sys.argv = ['fedllm', *sys.argv[1:]]; from fedllm.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "privacy", "epsilon", "--delta", "1e-5", "--event", "2,1,3"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error sampling rate 2:")


# ---- the parser ------------------------------------------------------------------------------------------------------


@given(st.floats(0, 1), st.just(0.0) | st.floats(1e-6, 1e4), st.integers(1, 10**6))
def test_an_event_is_read_as_it_was_written(q: float, noise: float, steps: int) -> None:
    assert parse_event(f"{q!r},{noise!r},{steps}") == (q, noise, steps)


@given(st.text() | st.text("0123456789.,-+einfa_ ", max_size=20))
def test_any_text_is_an_event_or_a_config_error(text: str) -> None:
    try:
        event = checked_event(*parse_event(text))
    except ConfigError:
        return
    assert checked_event(event.sampling_rate, event.noise_multiplier, event.steps) == event


# ---- what is loaded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "calibrate --epsilon 8 --delta 1e-5 --sampling-rate 1 --steps 1",
        "audit-bound --canaries 100 --guesses 50 --right 40 --delta 1e-5",
        "epsilon --event 0.1,0,3 --delta 1e-5",
        "epsilon --event 0.01,1,10 --delta 1e-5",
    ],
)
def test_no_sum_loads_torch(command: str) -> None:
    code = f"""
import sys
sys.argv = ["fedllm", "privacy", *{command.split()!r}]
from fedllm.cli.main import main
try:
    main()
finally:
    print("loaded:", *sorted({{name.partition('.')[0] for name in sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    loaded = set(done.stdout.rpartition("loaded:")[2].split())
    assert "typer" in loaded, done.stderr
    assert not loaded & {"torch", "opacus", "transformers", "flwr", "hydra"}
