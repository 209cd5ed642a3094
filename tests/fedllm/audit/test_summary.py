"""What a run leaves behind says how private it was, in two languages, whatever the names and texts in it."""

import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from matplotlib import image
from matplotlib.figure import Figure
from transformers import GenerationConfig

import fedllm.audit.summary
from fedllm.audit.summary import RunSummary, write_outputs
from fedllm.config import AdapterConfig, DataConfig, ModelConfig
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import AccountingEvent, spent
from fedllm.training.adapter import AdapterModel, attach
from fedllm.training.model import load_base

pytestmark = [
    pytest.mark.filterwarnings("ignore:Glyph .* missing from font:UserWarning"),  # a machine without Korean fonts
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),  # peft, of a base it cannot see
]
Make = Callable[..., RunPlan]
Write = Callable[..., Path]
OUTPUTS = [
    "summary.md",
    "summary.ko.md",
    "adapter/README.md",
    "rounds.svg",
    "sites.svg",
    "rounds.ko.svg",
    "sites.ko.svg",
]
TEXTS = OUTPUTS[:3]
SITES = ["서울 강남", "부산|해운대", "Praha (č)"]


def site(epsilon: float | None = 1.25, **changes: Any) -> dict[str, Any]:
    return {"rounds": 2, "declined": 0, "failed": 0, "reason": "", "epsilon": epsilon, "epsilon_rdp": epsilon,
            "bytes_up": 123_456, **changes}  # fmt: skip


def record(round_: int, epsilon: float | None = 1.25, **changes: Any) -> dict[str, Any]:
    return {"round": round_, "private": True, "epsilon": epsilon, "loss": 2.5 / (1 + round_), "perplexity": 12.18,
            "accuracy": None, "answered": [], "declined": {}, "failed": {}, "update_norm": 0.1, "bytes_up": 1,
            "bytes_down": 2, "seconds": 0.5, "at_sites": {}, **changes}  # fmt: skip


def scored(round_: int, epsilon: float | None = 1.25, **changes: Any) -> dict[str, Any]:
    """Return the record of a round whose adapter the sites have scored."""
    at_sites = {
        "units": [838.2, 834.6, 841.3],
        "loss": [0.875 / (1 + round_), 0.75 / (1 + round_), 1.0 / (1 + round_)],
        "exact_match": [0.125 * round_, 0.0625 * round_, 0.1875 * round_],
    }
    return record(round_, epsilon, at_sites=at_sites, **changes)


NOTHING_HELD_OUT: dict[str, Any] = {"loss": None, "perplexity": None, "accuracy": None}


@pytest.fixture(scope="session")
def adapter(tiny_llama: Path) -> AdapterModel:
    model = ModelConfig(source=str(tiny_llama), max_length=64)
    return attach(load_base(model, "cpu"), model, AdapterConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj")), 7)


@pytest.fixture
def write(
    tmp_path: Path, tiny_llama: Path, make_plan: Make, adapter: AdapterModel, monkeypatch: pytest.MonkeyPatch
) -> Write:
    """Return a function that writes the outputs of a run, with values of its plan and summary replaced."""

    def go(plan_changes: dict[str, Any] | None = None, pictures: str = "", **changes: Any) -> Path:
        save = Figure.savefig

        def save_some(figure: Figure, path: Path, **rest: Any) -> None:  # pictures take most of the time
            if path.suffix[1:] in pictures.split():
                save(figure, path, **rest)

        monkeypatch.setattr(Figure, "savefig", save_some)
        if any(key.startswith("model.") for key in plan_changes or {}):  # a plan that names another base than it had
            monkeypatch.setattr(fedllm.audit.summary, "check_saved", lambda *_: False)
        folder = tmp_path / "run"
        folder.mkdir()
        plan = make_plan({"model.source": str(tiny_llama), "adapter.layers": None, **(plan_changes or {})})
        values: dict[str, Any] = {
            "name": "첫 실행 | one",
            "folder": folder,
            "plan": plan,
            "data": DataConfig(train="t.jsonl", text="{a}", unit="customer_id", description="고객 문의 | 두 줄\n설명"),
            "records": [record(0, 0.0), record(1), record(2)],
            "sites": {name: site() for name in SITES},
            "budgets": dict.fromkeys(SITES, 8.0),
            "stopped": "",
            "seconds": 12.3,
            "peak_memory_mb": 456.7,
            "exact_match": (0.0, 0.5),
            "samples": [("질문 | 하나\n둘", "답 \\ 답", "", "a|b|c"), ("q\r\nr", "e", "`code", "<b>x</b> **y**")],
        }
        write_outputs(RunSummary(**{**values, **changes}), adapter, adapter.initial)
        return folder

    return go


SCORED = {"evaluation.every": 1, "evaluation.noise_multiplier": 2.5, "training.rounds": 2}
UNPROTECTED: dict[str, dict[str, Any]] = {
    "off": {"privacy.mode": "off"},
    "seeded": {"privacy.insecure_seed": 3},
}


def brand(name: str) -> str:
    """Return what an output of this name says of a run that protects nobody."""
    return "프라이버시 보호 미적용" if ".ko." in name else "NOT PRIVATE"


def without_epsilon() -> dict[str, Any]:
    """Return the parts of a summary of a run that added no noise."""
    return {
        "records": [record(n, None, private=False) for n in range(3)],
        "sites": {name: site(None) for name in SITES},
    }


def tables(path: Path) -> list[list[list[str]]]:
    """Return the tables of a Markdown file as rows of raw cells."""
    text = path.read_text("utf-8")
    if text.startswith("---\n"):
        text = text.split("\n---\n", 1)[1]
    found: list[list[list[str]]] = []
    inside = False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and inside:
            found[-1][-1].append(token.content)
        inside = token.type in ("th_open", "td_open")
    return found


def test_a_private_run_says_what_it_spent_and_is_not_branded(write: Write) -> None:
    folder = write(pictures="svg")
    for name in OUTPUTS:
        assert brand(name) not in (folder / name).read_text("utf-8"), name
    for name in TEXTS:
        text = (folder / name).read_text("utf-8")
        assert "1.25" in text
        assert "1e-05" in text


@pytest.mark.parametrize("kind", UNPROTECTED)
def test_a_run_that_protects_nobody_is_branded_in_every_output(write: Write, kind: str) -> None:
    folder = write(UNPROTECTED[kind], pictures="svg", **(without_epsilon() if kind == "off" else {}))
    for name in OUTPUTS:
        text = (folder / name).read_text("utf-8")
        assert brand(name) in text, name
        if name in TEXTS:
            body = text.split("\n---\n", 1)[1] if text.startswith("---\n") else text
            assert body.index(brand(name)) < 100, f"{name}: at the top, not in a footnote"


def test_a_run_without_noise_claims_no_epsilon(write: Write) -> None:
    folder = write({"privacy.mode": "off", "privacy.epsilon": 7.25}, **without_epsilon())
    for name in TEXTS:
        text = (folder / name).read_text("utf-8")
        assert "∞" in text
        assert "7.25" not in text  # the target that nothing was done to meet
        assert "PLD" not in text
    card = dict(row for table in tables(folder / "adapter/README.md") for row in table if len(row) == 2)
    assert card["epsilon"].startswith("∞")


@pytest.mark.parametrize("changes", [{"privacy.mode": "off"}, {"privacy.unit": "person"}], ids=str)
def test_no_output_calls_anything_anonymous(write: Write, changes: dict[str, Any]) -> None:
    folder = write(changes, pictures="svg", **(without_epsilon() if "privacy.mode" in changes else {}))
    for name in OUTPUTS:
        assert not re.search(r"(?i)anonymi[sz]|anonymous|익명|비식별", (folder / name).read_text("utf-8")), name


@pytest.mark.parametrize("language", ["summary.md", "summary.ko.md"])
def test_names_and_texts_of_any_kind_stay_in_their_cells(write: Write, language: str) -> None:
    folder = write()
    found = tables(folder / language)
    for table in found:
        assert len({len(row) for row in table}) == 1, table
    sites, samples = found[1], found[2]
    assert [row[0] for row in sites[1:]] == SITES
    assert samples[1:] == [["질문 | 하나 둘", "답 \\ 답", "", "a|b|c"], ["q r", "e", "`code", "<b>x</b> **y**"]]


def test_where_an_answer_ends_travels_with_the_adapter(write: Write) -> None:
    folder = write() / "adapter"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [2]
    card = (folder / "README.md").read_text("utf-8")
    assert 'GenerationConfig.from_pretrained("adapter")  # an answer ends at token 2\n' in card


def test_the_card_is_one_table_of_two_columns(write: Write) -> None:
    (table,) = tables(write() / "adapter" / "README.md")
    assert {len(row) for row in table} == {2}


def test_the_card_tells_all_that_a_guarantee_is_made_of(write: Write, make_plan: Make) -> None:
    folder = write({"privacy.unit": "person"})
    (table,) = tables(folder / "adapter" / "README.md")
    card = dict(table[1:])
    assert "1.25" in card["epsilon"]
    assert "delta 1e-05" in card["epsilon"]
    assert card["privacy unit"].startswith("person, at most 3 records")
    assert "add-or-remove-one" in card["privacy unit"]
    assert card["sampler"] == "Poisson, rate 0.1"
    for value in ("clip norm 0.5", "noise multiplier 1.25", "10 steps"):
        assert value in card["mechanism"]
    assert card["randomness"] == "operating system's CSPRNG"
    for package in ("flwr", "torch", "transformers", "peft", "opacus", "dp-accounting"):
        assert f"{package} {version(package)}" in card["software"]
    assert make_plan().run in card["run"]


@pytest.mark.parametrize("sites", ["not scored", "scored"])
def test_the_korean_and_the_english_summary_say_the_same_numbers(write: Write, sites: str) -> None:
    folder = write(SCORED, records=[scored(n) for n in range(3)], kept=1) if sites == "scored" else write()
    english, korean = (re.findall(r"\d+(?:\.\d+)?", (folder / name).read_text("utf-8")) for name in TEXTS[:2])
    assert set(english) - {"1"} == set(korean) - {"1"}  # "one record" is a word in English


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "off",
        "seeded",
        "nothing held out",
        "scored",
        "scored only",
        "scored, off",
        "not all scored",
        "stopped",
        "first round lost",
        "declined",
    ],
)
def test_every_kind_of_run_is_written_without_a_python_none(write: Write, kind: str) -> None:
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "plain": ({}, {}),
        "off": ({"privacy.mode": "off"}, without_epsilon()),
        "seeded": ({"privacy.insecure_seed": 0}, {}),
        "nothing held out": (
            {}, {"records": [record(n, **NOTHING_HELD_OUT) for n in range(3)], "exact_match": None, "samples": []}
        ),
        "scored": (SCORED, {"records": [scored(n) for n in range(3)]}),
        "scored only": (
            SCORED,
            {"records": [scored(n, **NOTHING_HELD_OUT) for n in range(3)], "exact_match": None, "samples": []},
        ),
        "scored, off": (
            {**SCORED, "privacy.mode": "off", "evaluation.noise_multiplier": None},
            {**without_epsilon(), "records": [scored(n, None, private=False) for n in range(3)]},
        ),
        "not all scored": (SCORED, {"records": [scored(0), record(1), record(2)]}),
        "stopped": ({}, {"stopped": "round 2: 1 sites, federation.quorum=2. 서울 declined (budget)."}),
        "first round lost": (
            {}, {"records": [record(0, 0.0)], "sites": {}, "budgets": {}, "stopped": "no site answered"}
        ),
        "declined": (
            {}, {"sites": {SITES[0]: site(0.0, rounds=0, declined=1, reason="budget"), SITES[1]: site(failed=3)}}
        ),
    }  # fmt: skip
    plan_changes, changes = kinds[kind]
    folder = write(plan_changes, pictures="svg", **changes)
    for name in OUTPUTS:
        text = (folder / name).read_text("utf-8").replace("None: `privacy=off`", "")
        assert "None" not in text, name
        assert not re.search(r"\b(nan|inf|Undefined)\b", text), name
    if kind in ("stopped", "first round lost"):
        assert changes["stopped"] in (folder / "summary.md").read_text("utf-8")
        assert "조기 종료" in (folder / "summary.ko.md").read_text("utf-8")
    if kind == "declined":
        for name in ("summary.md", "summary.ko.md", "sites.svg", "sites.ko.svg"):
            assert ("예산 부족" if ".ko." in name else "budget") in (folder / name).read_text("utf-8")


def test_pictures_can_be_opened_and_name_every_site(write: Write) -> None:
    folder = write(pictures="svg png")
    for name in ("rounds", "sites"):
        pixels = image.imread(folder / f"{name}.png")
        assert pixels.shape[0] > 100
        assert pixels.min() < pixels.max()
        root = ET.parse(folder / f"{name}.svg").getroot()
        assert root.tag.endswith("svg")
        text = "".join(root.itertext())
        assert "epsilon" in text
        if name == "sites":
            for site_name in SITES:
                assert site_name in text


@pytest.mark.parametrize("name", ["US$ and $FX", "$\\frac$", "<b>&amp; {{ 7 * 7 }}"])
def test_a_site_may_be_called_anything(write: Write, name: str) -> None:
    folder = write(pictures="svg", sites={name: site(), "other": site()}, budgets={name: 8.0, "other": 8.0})
    text = "".join(ET.parse(folder / "sites.svg").getroot().itertext())
    assert name in text
    assert name in (folder / "summary.md").read_text("utf-8")


def test_many_sites_fit_the_picture(write: Write) -> None:
    names = [f"지점 {n}" for n in range(30)]
    folder = write(pictures="svg", sites={name: site() for name in names}, budgets=dict.fromkeys(names, 8.0))
    text = "".join(ET.parse(folder / "sites.svg").getroot().itertext())
    assert all(name in text for name in names)


@pytest.mark.parametrize(
    "source", ["pkg://simulations.demo/base", "org/model", "./모델: 새 것 # 1", "'quoted' \"name\""]
)
def test_the_head_of_the_card_is_yaml_that_names_the_base(write: Write, source: str) -> None:
    text = (write({"model.source": source}) / "adapter" / "README.md").read_text("utf-8")
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["base_model"] == source
    assert head["library_name"] == "peft"
    assert "differential-privacy" in head["tags"]


def test_the_code_on_the_card_loads_the_adapter(
    write: Write, adapter: AdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write()
    code = re.search(r"```python\n(.*?)```", (folder / "adapter/README.md").read_text("utf-8"), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft 0.21
        exec(code[1], names)
    ids = torch.arange(5, 25)[None]
    adapter.load(adapter.initial)
    with torch.no_grad():
        assert torch.allclose(names["model"](input_ids=ids).logits, adapter.model(input_ids=ids).logits, atol=1e-6)


def test_a_classifier_is_scored_by_its_accuracy(write: Write, tiny_llama: Path) -> None:
    records = [record(n, accuracy=0.25 * (n + 1), perplexity=None) for n in range(3)]
    changes = {"model.task": "classification", "model.labels": ["긍정", "부정"]}
    folder = write(changes, pictures="svg", records=records, exact_match=None, samples=[])
    for name in TEXTS:
        text = (folder / name).read_text("utf-8")
        assert "0.25" in text
        assert "0.75" in text
        assert "perplexity" not in text
    assert "accuracy" in "".join(ET.parse(folder / "rounds.svg").getroot().itertext())
    code = re.search(r"```python\n(.*?)```", (folder / "adapter/README.md").read_text("utf-8"), re.DOTALL)
    assert code is not None
    compile(code[1], "card", "exec")
    assert "fedllm" not in code[1]  # plain transformers and PEFT


@pytest.mark.parametrize("held_out", [True, False], ids=["beside a held-out set", "without one"])
def test_the_sites_score_is_told_with_its_interval_and_what_it_cost(
    write: Write, make_plan: Make, held_out: bool
) -> None:
    without: dict[str, Any] = {} if held_out else {"exact_match": None, "samples": []}
    records = [scored(n, **({} if held_out else NOTHING_HELD_OUT)) for n in range(3)]
    folder = write(SCORED, pictures="svg", records=records, **without)
    cost = spent([AccountingEvent(1.0, 2.5, 3)], make_plan().privacy.delta).epsilon  # before, between and after
    for name in TEXTS:
        text = (folder / name).read_text("utf-8")
        for said in ("0.875 (0.750–1.000)", "0.292 (0.250–0.333)", "25.0 % (12.5–37.5)", "838 (835–841)", "95 %"):
            assert said in text, name
        assert f"{cost:.4g}" in text, name
    picture = "".join(ET.parse(folder / "rounds.svg").getroot().itertext())
    assert "at the sites, 95 % interval" in picture
    assert ("held-out set" in picture) == held_out
    assert "no score" not in picture


def test_what_is_said_of_the_adapter_is_said_of_the_one_that_was_kept(write: Write) -> None:
    records = [scored(0), scored(1, perplexity=3.75, loss=1.321), scored(2, perplexity=4.625, loss=1.531)]
    folder = write({**SCORED, "training.keep": "best"}, pictures="svg", records=records, kept=1)
    for name, said in zip(TEXTS, ("adapter is that of round 1", "1라운드의 어댑터", "adapter of round 1"), strict=True):
        text = (folder / name).read_text("utf-8")
        assert said in text
        assert "3.75" in text
        assert "0.438 (0.375–0.500)" in text
        assert "4.625" not in text, "it is of the last round"
        assert "evaluation.patience" not in text
    assert "adapter that was kept" in "".join(ET.parse(folder / "rounds.svg").getroot().itertext())


@pytest.mark.parametrize("stopped", ["", "round 3: 1 sites, federation.quorum=2."])
def test_a_run_that_ends_since_scores_improve_no_longer_says_so(write: Write, stopped: str) -> None:
    plan = {**SCORED, "training.rounds": 9, "evaluation.patience": 4}
    folder = write(plan, records=[scored(n) for n in range(3)], stopped=stopped)
    for name, said in zip(
        TEXTS, ("Scores at the sites no longer", "나아지지 않았습니다", "no longer improved"), strict=True
    ):
        assert (said in (folder / name).read_text("utf-8")) == (not stopped), name


def test_a_closing_exchange_that_costs_more_than_the_rounds_did_is_in_epsilon(write: Write) -> None:
    folder = write(SCORED, records=[scored(n) for n in range(3)], sites={name: site(2.375) for name in SITES})
    said = ("Epsilon 2.375 at", "ε = 2.375,", "| epsilon | 2.375 at")
    for name, text in zip(TEXTS, said, strict=True):
        assert text in (folder / name).read_text("utf-8")
