"""A whole federation on one machine: what it leaves behind, and what it promises about it."""

import csv
import fcntl
import gc
import json
import math
import pickle
import shutil
import struct
import threading
import time
import unicodedata
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flwr
import numpy as np
import pytest
import torch
from datasets import Dataset
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

import client.site
import fedllm.privacy.accounting
import fedllm.training.model_context
import server.channel
import server.run
import simulations.grid
from client.site import Site
from fedllm.audit.bundle import verify
from fedllm.audit.summary import RunSummary
from fedllm.audit.trust import Trust
from fedllm.cli.main import app
from fedllm.config import SimulationConfig
from fedllm.errors import ConfigError, FedllmError
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import AccountingEvent, spent
from fedllm.privacy.ledger import LedgerFile
from fedllm.protocol.messages import Declined, Message, Prepare, TrainReply, TrainRequest, from_bytes
from fedllm.protocol.spending_statement import open_statement, sign_statement
from fedllm.training.adapter import AdapterModel
from fedllm.training.self_check import Subject
from fedllm.values import parse
from server.checkpoint import load_checkpoint
from server.events import Event, Phase, RoundMetrics, SiteAnswered
from server.ledger_heads import HEADS, LedgerHeads
from server.run_record import key_in
from simulations.simulate import KEYS, simulate
from tests.fedllm.audit.conftest import any_pdf
from tests.fedllm.audit.test_summary import OUTPUTS
from tests.fedllm.privacy.budgets import for_several_plans
from tests.korean import english_words
from tests.sharing import once
from tests.simulations.conftest import write

Configure = Callable[..., SimulationConfig]

BRANCHES = ("강남", "busan", "daegu", "jeju")
LABELS = ["카드", "loan", "visa"]
OFF: dict[str, Any] = {"privacy": {"mode": "off"}}
# Several tests need no more than the figures of a run.
SMALL: dict[str, Any] = {"training": {"rounds": 2, "local_steps": 1}}


def charged(ledger: Path) -> list[AccountingEvent]:
    return [charge.event for charge in LedgerFile(ledger).charges()] if ledger.exists() else []


@dataclass
class Run:
    """A simulation that has ended."""

    config: SimulationConfig
    summary: RunSummary
    events: list[Event] = field(default_factory=list)
    plan: RunPlan | None = None
    names: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.summary.folder

    def adapter(self) -> NDArray[np.float32]:
        return load_checkpoint(self.folder / "checkpoint.safetensors").adapter

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text("utf-8").splitlines()]

    def ledger(self, site: str) -> list[Any]:
        return charged(self.folder / "sites" / site / "ledger.db")


def run(config: SimulationConfig) -> Run:
    seen: dict[str, Any] = {}
    events: list[Event] = []

    def announce(plan: RunPlan, names: list[str], _: object) -> None:
        seen.update(plan=plan, names=names)

    return Run(config, simulate(config, announce, events.append), events, **seen)


def without_plots(patch: pytest.MonkeyPatch) -> None:
    """Leave out what takes most of the time of a small run, where the test is about something else."""
    patch.setattr(server.run, "write_outputs", lambda *_: None)


# ---- variants: each is run once, and all tests of outputs look into each -------------------------------------------


def _as_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _as_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def _as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.fixture(scope="session")
def variants(
    tmp_path_factory: pytest.TempPathFactory, configure: Configure, rows: list[dict[str, Any]], tiny_bert: Path
) -> Callable[[str], Run]:
    """Return a function that gives a finished run by the name of its variant, which runs once a test run."""
    folder = tmp_path_factory.mktemp("variants")
    tables = {"csv": _as_csv(folder / "train.csv", rows), "parquet": _as_parquet(folder / "train.parquet", rows)}
    by_topic = {"partition": {"by": "dirichlet", "column": "topic", "sites": 3, "alpha": 20.0}, "quorum": 1}
    classify = {
        "model": {"source": str(tiny_bert), "task": "classification", "labels": LABELS},
        "data": {"prompt": None, "text": "{question}", "label": "topic"},
        "adapter": {"targets": ["query", "value"]},
        "privacy": {"unit": "record", "noise_multiplier": None},
        "federation": by_topic,
    }
    changes: dict[str, dict[str, Any]] = {
        "person": {"data": {"samples": 2}, "privacy": {"noise_multiplier": None}},
        "record": {
            "data": {"train": str(tables["csv"]), "prompt": None, "text": "{question} {answer}"},
            "adapter": {"train": "AB"},
            "privacy": {"unit": "record", "noise_multiplier": None},
            "training": {"wire": "float16", "optimizer": "adam", "learning_rate": 0.01},
            "federation": {"partition": {"by": "iid", "sites": 3, "column": None}},
        },
        "off": {
            "data": {"train": str(tables["parquet"])},
            "privacy": {"mode": "off"},
            "training": {"wire": "float16", "server": {"name": "adam", "learning_rate": 0.05}},
            "federation": by_topic,
        },
        "seeded": {"privacy": {"insecure_seed": 11, "noise_multiplier": None}},
        "classes": {**classify, "data": {**classify["data"], "train": str(tables["csv"])}},
        "pooled": {**classify, "model": {**classify["model"], "pooling": "mean"}, **OFF},
    }

    def get(name: str) -> Run:
        def make(new: Path) -> None:
            outputs = new.parent / "variants"  # beside it: a run knows where it lies, and cannot be moved
            shutil.rmtree(outputs / name, ignore_errors=True)
            with warnings.catch_warnings():  # datasets 4 leaves a csv file open until it is collected
                warnings.filterwarnings("ignore", "unclosed file .*csv", ResourceWarning)
                (new / "run").write_bytes(pickle.dumps(run(configure(outputs, name, **changes[name]))))
                gc.collect()

        finished: Run = pickle.loads((once(tmp_path_factory, f"variant-{name}", make) / "run").read_bytes())
        return finished

    return get


PRIVATE = ["person", "record", "classes"]
BRANDED = ["off", "seeded", "pooled"]
ALL = [*PRIVATE, *BRANDED]


@pytest.mark.parametrize("name", ALL)
def test_a_run_leaves_every_output_and_nothing_else(variants: Callable[[str], Run], name: str) -> None:
    folder = variants(name).folder
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    generates = (
        set[str]() if variants(name).config.model.task == "classification" else {"adapter/generation_config.json"}
    )
    assert {file for file in found if not file.startswith("sites/")} == generates | {
        "adapter/README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "checkpoint.safetensors", "checkpoint.safetensors.previous", "config.json", "lock", "metrics.jsonl",
        "plan.json", "record.jsonl", "record.key",
        "rounds.ko.svg", "rounds.png", "rounds.svg", "sites.ko.svg", "sites.png", "sites.svg", "summary.ko.md",
        "summary.md",
    }  # fmt: skip
    assert "sites/sites.log" in found
    assert folder.stat().st_mode & 0o077 == 0, "the folder holds ledgers: it is for its owner alone"


@pytest.mark.parametrize("name", ALL)
def test_all_planned_rounds_were_run_by_all_sites(variants: Callable[[str], Run], name: str) -> None:
    done = variants(name)
    assert not done.summary.stopped
    assert [record["round"] for record in done.summary.records] == [0, 1, 2, 3]
    assert [e.round for e in done.events if isinstance(e, RoundMetrics)] == [0, 1, 2, 3]
    assert {n: s["rounds"] for n, s in done.summary.sites.items()} == dict.fromkeys(done.names, 3)
    phases = [(i, e.text) for i, e in enumerate(done.events) if isinstance(e, Phase)]
    last = max(i for i, e in enumerate(done.events) if isinstance(e, RoundMetrics))
    assert [text.split(":")[0] for i, text in phases if i > last][:2] == [
        "closing evaluation", "writing adapter, plots and summaries",
    ], "nobody waits before a silent screen"  # fmt: skip
    assert (phases[0], phases[-1][0]) == ((0, "reading the records"), len(done.events) - 1)
    expected = {"person": set(BRANCHES), "seeded": set(BRANCHES)}.get(name, {"site-00", "site-01", "site-02"})
    assert set(done.names) == expected


@pytest.mark.parametrize("name", ALL)
def test_metrics_have_a_line_for_the_base_and_for_every_round(variants: Callable[[str], Run], name: str) -> None:
    done = variants(name)
    lines = done.metrics()
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert {line["private"] for line in lines} == {name in PRIVATE}
    for line in lines:
        key = "accuracy" if name in ("classes", "pooled") else "perplexity"
        assert math.isfinite(line["loss"])
        assert line[key] is not None
    width = {"float16": 2, "float32": 4}[done.config.training.wire]
    assert all(line["bytes_up"] > len(done.names) * width * len(done.adapter()) for line in lines[1:])
    assert len({line["loss"] for line in lines}) == 4, "every round changed the adapter"


@pytest.mark.parametrize("name", ALL)
def test_the_resolved_configuration_and_the_plan_can_be_read_back(variants: Callable[[str], Run], name: str) -> None:
    done = variants(name)
    config = parse(SimulationConfig, json.loads((done.folder / "config.json").read_text("utf-8")))
    plan = parse(RunPlan, json.loads((done.folder / "plan.json").read_text("utf-8")))
    assert plan == done.plan
    assert config.privacy.units_per_site == plan.privacy.units_per_site
    assert config.privacy.units_per_site is not None
    assert config == done.config.model_copy(
        update={"privacy": done.config.privacy.model_copy(update={"units_per_site": config.privacy.units_per_site})}
    )


@pytest.mark.parametrize("name", [*PRIVATE, "seeded"])
def test_epsilon_ends_just_within_its_target_at_every_site(variants: Callable[[str], Run], name: str) -> None:
    """Calibrated for the whole run: not above the target, and not more than half a per cent below it."""
    done = variants(name)
    target = done.config.privacy.epsilon
    series = [line["epsilon"] for line in done.metrics()]
    assert series[0] == 0
    assert series == sorted(set(series)), "every round costs"
    assert 0.995 * target <= series[-1] <= target
    for site, state in done.summary.sites.items():
        events = done.ledger(site)
        assert len(events) == 3
        assert [event.steps for event in events] == [2, 2, 2]
        assert state["epsilon"] == spent(events, done.config.privacy.delta).epsilon == series[-1]
        assert state["epsilon_rdp"] >= state["epsilon"]


@pytest.mark.parametrize("name", ["off", "pooled"])
def test_without_noise_epsilon_is_never_a_number(variants: Callable[[str], Run], name: str) -> None:
    done = variants(name)
    assert [line["epsilon"] for line in done.metrics()] == [None] * 4
    for text in ("summary.md", "summary.ko.md", "adapter/README.md"):
        assert "∞" in (done.folder / text).read_text("utf-8") or "privacy=off" in (done.folder / text).read_text(
            "utf-8"
        )


BRAND = {"en": "NOT PRIVATE", "ko": "프라이버시 보호 미적용"}


@pytest.mark.parametrize("name", BRANDED)
@pytest.mark.parametrize("file", OUTPUTS)
def test_a_run_that_is_not_private_says_so_in_every_output(
    variants: Callable[[str], Run], name: str, file: str
) -> None:
    assert BRAND["ko" if ".ko." in file else "en"] in (variants(name).folder / file).read_text("utf-8")


@pytest.mark.parametrize("name", PRIVATE)
@pytest.mark.parametrize("file", OUTPUTS)
def test_a_private_run_is_not_branded(variants: Callable[[str], Run], name: str, file: str) -> None:
    assert BRAND["ko" if ".ko." in file else "en"] not in (variants(name).folder / file).read_text("utf-8")


@pytest.mark.parametrize("name", PRIVATE)
def test_the_card_states_base_data_epsilon_delta_unit_sampler_and_versions(
    variants: Callable[[str], Run], name: str
) -> None:
    done = variants(name)
    card = (done.folder / "adapter" / "README.md").read_text("utf-8")
    assert done.plan is not None
    noise = done.plan.privacy.noise_multiplier
    unit = done.config.privacy.unit
    for expected in (
        done.config.model.source, "generated", "0.001", unit, "Poisson", "0.4", str(noise), "PLD",
        f"torch {torch.__version__}", "opacus ", "peft ", f"flwr {flwr.__version__}", done.plan.run,
        f"{done.summary.after['epsilon']:.4g}",
    ):  # fmt: skip
        assert expected in card


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("plot", ["rounds", "sites"])
def test_plots_are_images(variants: Callable[[str], Run], name: str, plot: str) -> None:
    folder = variants(name).folder
    assert ET.fromstring((folder / f"{plot}.svg").read_text("utf-8")).tag == "{http://www.w3.org/2000/svg}svg"
    data = (folder / f"{plot}.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 600
    assert height > 200
    assert data.endswith(b"IEND\xaeB`\x82")


def test_every_site_is_named_in_the_plot_and_in_the_summaries(variants: Callable[[str], Run]) -> None:
    folder = variants("person").folder
    for file in ("sites.svg", "summary.md", "summary.ko.md"):
        text = (folder / file).read_text("utf-8")
        assert all(name in text for name in BRANCHES), file


def _run_card(folder: Path, source: str) -> PreTrainedModel:
    """Run the model card's own example and return the model that it loads."""
    card = (folder / "adapter" / "README.md").read_text("utf-8")
    code = card.split("```python\n")[1].split("```")[0].replace('"adapter"', repr(str(folder / "adapter")))
    names: dict[str, Any] = {"BASE": source}
    exec(code, names)
    model: PreTrainedModel = names["model"].eval()
    return model


@pytest.mark.parametrize("name", ["person", "record", "off", "seeded"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_the_adapter_loads_as_its_card_says_and_scores_as_the_metrics_say(
    variants: Callable[[str], Run], records: Any, name: str
) -> None:
    """The score is computed here from plain transformers, record by record."""
    done = variants(name)
    source = done.config.model.source
    model, tokenizer = _run_card(done.folder, source), AutoTokenizer.from_pretrained(source)
    losses, counts = 0.0, 0
    for line in records.heldout.read_text("utf-8").splitlines():
        row = json.loads(line)
        given = [tokenizer.bos_token_id]
        if done.config.data.prompt:
            given += tokenizer(row["question"] + "\n", add_special_tokens=False)["input_ids"]
        text = row["answer"] if done.config.data.prompt else f"{row['question']} {row['answer']}"
        learned = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([given + learned])[:, :32]
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, len(given) - 1 : -1]
        losses += float(F.cross_entropy(logits, ids[0, len(given) :], reduction="sum"))
        counts += len(ids[0]) - len(given)
    last = done.metrics()[-1]
    assert losses / counts == pytest.approx(last["loss"], rel=1e-5)
    assert math.exp(losses / counts) == pytest.approx(last["perplexity"], rel=1e-5)


@pytest.mark.parametrize("name", ["classes", "pooled"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_the_classifier_loads_as_its_card_says_and_scores_as_the_metrics_say(
    variants: Callable[[str], Run], records: Any, name: str
) -> None:
    done = variants(name)
    source = done.config.model.source
    model, tokenizer = _run_card(done.folder, source), AutoTokenizer.from_pretrained(source)
    losses, right = [], []
    for line in records.heldout.read_text("utf-8").splitlines():
        row = json.loads(line)
        batch = tokenizer(row["question"], return_tensors="pt")
        with torch.inference_mode():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        target = LABELS.index(row["topic"])
        losses.append(float(F.cross_entropy(logits, torch.tensor([target]))))
        right.append(int(logits.argmax()) == target)
    last = done.metrics()[-1]
    assert np.mean(losses) == pytest.approx(last["loss"], rel=1e-4)
    assert np.mean(right) == last["accuracy"]


@pytest.mark.parametrize("name", ALL)
def test_only_what_is_trained_travels_and_it_is_what_the_adapter_file_holds(
    variants: Callable[[str], Run], name: str
) -> None:
    done = variants(name)
    tensors = load_file(done.folder / "adapter" / "adapter_model.safetensors")
    trained = {k: v for k, v in tensors.items() if "lora_A" not in k or done.config.adapter.train == "AB"}
    assert sum(tensor.size for tensor in trained.values()) == len(done.adapter())
    flat = np.concatenate([np.sort(np.concatenate([t.ravel() for t in trained.values()]))])
    np.testing.assert_array_equal(flat, np.sort(done.adapter()))


def test_the_summary_tells_sample_answers_before_and_after(variants: Callable[[str], Run]) -> None:
    done = variants("person")
    assert done.summary.exact_match is not None
    assert len(done.summary.samples) == 2
    assert all(0 <= share <= 1 for share in done.summary.exact_match)


# ---- the base is loaded once ---------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every loading of weights by transformers, whatever the class."""
    seen: list[str] = []
    real = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: type, source: object, *args: Any, **kwargs: Any) -> Any:
        seen.append(str(source))
        return real(cls, source, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(fedllm.training.model_context, "_open", {})
    return seen


def test_the_base_is_loaded_once_for_head_office_all_sites_and_all_rounds(
    tmp_path: Path, configure: Configure, loads: list[str]
) -> None:
    done = run(configure(tmp_path, **OFF))
    assert len(done.names) == 4
    assert loads == [done.config.model.source] * 2  # and once at the end, for the adapter that was written


def test_the_base_is_loaded_once_for_several_runs_of_one_process(
    tmp_path: Path, configure: Configure, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_plots(monkeypatch)
    for name in ("first", "second"):
        run(configure(tmp_path, name, **OFF, **SMALL))
    assert len(loads) == 1  # no outputs are written here


def test_the_counter_of_loadings_counts(loads: list[str], tiny_llama: Path, tiny_bert: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_llama)
    AutoModel.from_pretrained(tiny_bert)
    assert loads == [str(tiny_llama), str(tiny_bert)]


@pytest.mark.parametrize("asked", [True, False])
def test_sites_check_the_engine_that_they_share_unless_the_run_goes_without(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    without_plots(monkeypatch)
    checked, honest = list[RunPlan](), client.site.self_check_once

    def watched(subject: Subject) -> None:
        honest(subject)
        checked.append(subject.plan)

    monkeypatch.setattr(client.site, "self_check_once", watched)
    done = run(configure(tmp_path, privacy={"self_check": asked}, **SMALL))
    assert not done.summary.stopped
    assert done.plan is not None
    assert {plan.digest for plan in checked} == ({done.plan.digest} if asked else set())


# ---- the same and not the same -------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [OFF, {"privacy": {"insecure_seed": 4}}], ids=["off", "seeded"])
def test_a_seed_repeats_a_run_that_is_not_private(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    without_plots(monkeypatch)
    first, second = (run(configure(tmp_path, name, **changes, **SMALL)) for name in ("first", "second"))
    assert first.adapter().tobytes() == second.adapter().tobytes()
    other = run(configure(tmp_path, "other", **changes, **SMALL, seed=6))
    assert not np.array_equal(other.adapter(), first.adapter())


def test_no_seed_repeats_a_private_run(tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    without_plots(monkeypatch)
    first, second = (run(configure(tmp_path, name, **SMALL)) for name in ("first", "second"))
    assert first.plan is not None
    assert second.plan is not None
    assert first.plan.run != second.plan.run
    assert not np.array_equal(first.adapter(), second.adapter())
    initial = fedllm.training.model_context.open_context(first.plan.model, first.plan.adapter, 5, "cpu").adapter.initial
    for one, other in ((first.adapter(), second.adapter()), (first.adapter(), initial)):
        assert np.mean(one == other) < 0.01, "noise falls on every coordinate"


def test_training_without_noise_learns(tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    without_plots(monkeypatch)
    training = {"rounds": 6, "local_steps": 4, "learning_rate": 1.0, "server": {"learning_rate": 2.0}}
    done = run(configure(tmp_path, training=training, **OFF))
    losses = [line["loss"] for line in done.metrics()]
    assert losses[-1] < losses[0] - 0.05


def test_without_a_heldout_set_a_run_has_no_scores_and_all_other_outputs(tmp_path: Path, configure: Configure) -> None:
    done = run(configure(tmp_path, data={"heldout": None}, **SMALL))
    assert [line["loss"] for line in done.metrics()] == [None] * 3
    assert done.summary.exact_match is None
    for file in ("summary.md", "rounds.svg", "adapter/adapter_model.safetensors"):
        assert (done.folder / file).stat().st_size > 0


# ---- resuming ------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9."""


def run_until(config: SimulationConfig, events: int) -> None:
    """Run a simulation and drop it dead at an event."""
    seen: list[Event] = []

    def observe(event: Event) -> None:
        seen.extend([] if isinstance(event, Phase) else [event])
        if len(seen) == events:
            raise Killed

    with pytest.raises(Killed):
        simulate(config, lambda *_: None, observe)
    for thread in threading.enumerate():  # kill -9 leaves no site at work
        if thread.name.startswith("node-"):
            thread.join()


def resumed(config: SimulationConfig, **changes: Any) -> SimulationConfig:
    return parse(SimulationConfig, {**json.loads(config.model_dump_json()), "resume": True, **changes})


@pytest.mark.parametrize(
    ("privacy", "stops"),
    [("off", (1, 4, 7, 13, 18)), ("local", (4, 18))],  # base, within round 1, after it, after 2, within 3
)
def test_a_resumed_run_of_real_sites_is_charged_and_ends_as_if_it_had_not_stopped(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, privacy: str, stops: tuple[int, ...]
) -> None:
    without_plots(monkeypatch)
    changes: dict[str, Any] = {"privacy": {"mode": privacy}, "training": {"local_steps": 1}}
    whole = run(configure(tmp_path, "whole", **changes))
    for number, events in enumerate(stops):
        config = configure(tmp_path, f"stopped-{number}", **changes)
        run_until(config, events)
        done = run(resumed(config))
        assert [line["round"] for line in done.metrics()] == [0, 1, 2, 3]
        for name in done.names:
            assert len(done.ledger(name)) == 3, f"{name} was charged twice (stopped at event {events})"
        if privacy == "off":
            assert done.adapter().tobytes() == whole.adapter().tobytes()
        else:
            assert done.summary.after["epsilon"] == whole.summary.after["epsilon"] <= 8
            assert done.plan == parse(RunPlan, json.loads((done.folder / "plan.json").read_text("utf-8")))


@pytest.mark.parametrize("events", [19, 15], ids=["after the last round", "within the last round"])
def test_a_damaged_checkpoint_of_real_sites_costs_no_budget_and_no_round(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, events: int
) -> None:
    """The sites answer the round before once more with the bytes of the first time, also when the next has begun."""
    without_plots(monkeypatch)
    whole = run(configure(tmp_path, "whole", **OFF))
    config = configure(tmp_path, "damaged", **OFF)
    run_until(config, events)
    checkpoint = config_folder(config) / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-10])
    done = run(resumed(config))
    assert not done.summary.stopped
    assert done.adapter().tobytes() == whole.adapter().tobytes()
    assert all(len(done.ledger(name)) == 3 for name in done.names)


def config_folder(config: SimulationConfig) -> Path:
    return Path(config.output) / config.name


def test_resuming_a_finished_run_writes_the_same_outputs_again(tmp_path: Path, configure: Configure) -> None:
    config = configure(tmp_path, **SMALL)
    first = run(config)
    kept = {f: f.read_bytes() for f in first.folder.rglob("*.safetensors")}
    for plot in ("rounds.svg", "summary.md"):
        (first.folder / plot).unlink()
    second = run(resumed(config))
    assert {f: f.read_bytes() for f in first.folder.rglob("*.safetensors")} == kept
    assert (first.folder / "summary.md").exists()
    assert (first.folder / "rounds.svg").exists()
    assert all(len(second.ledger(name)) == 2 for name in second.names)


def test_a_run_that_has_only_the_checkpoint_before_goes_on_from_it_and_is_not_started_over(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_plots(monkeypatch)
    config = configure(tmp_path, **SMALL)
    first = run(config)
    whole = first.adapter()
    (first.folder / "checkpoint.safetensors").unlink()
    before = {f: f.read_bytes() for f in first.folder.rglob("*") if f.is_file()}
    with pytest.raises(ConfigError, match="continue that run with resume=true"):
        run(config)
    assert {f: f.read_bytes() for f in first.folder.rglob("*") if f.is_file()} == before
    again = run(resumed(config))
    assert again.adapter().tobytes() == whole.tobytes()
    assert [line["round"] for line in again.metrics()] == [0, 1, 2]
    assert all(len(again.ledger(name)) == 2 for name in again.names), "no round was paid for twice"


@pytest.mark.parametrize(
    ("section", "value", "key"),
    [
        ("training", {"rounds": 5}, "training.rounds"),
        ("privacy", {"clip_norm": 2.0}, "privacy.clip_norm"),
        ("privacy", {"epsilon": 9.0}, "privacy.epsilon"),
        ("adapter", {"rank": 4}, "adapter.rank"),
        ("model", {"max_length": 16}, "model.max_length"),
        ("data", {"text": "{topic}"}, "data.text"),
        ("federation", {"quorum": 1}, "quorum"),  # the sites were promised two
        ("federation", {"partition": {"by": "iid", "sites": 4, "column": None}}, "partition"),
    ],
)
def test_a_resumed_run_is_the_same_run_or_is_refused(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, section: str, value: Any, key: str
) -> None:
    """Other records under the name of an old site would be charged to the wrong ledger."""
    without_plots(monkeypatch)
    run_until(configure(tmp_path), 7)
    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file() and "ledger" not in f.name}
    with pytest.raises(FedllmError, match=key):
        run(configure(tmp_path, resume=True, **{section: value}))
    assert before == {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f in before}


def test_how_a_run_is_carried_out_may_change_when_it_is_resumed(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_plots(monkeypatch)
    run_until(configure(tmp_path, **OFF), 7)
    changes: dict[str, Any] = {"federation": {"quorum": 3, "round_timeout": 30.0}, "site": {"micro_batch": 16}}
    assert not run(configure(tmp_path, resume=True, **OFF, **changes)).summary.stopped


# ---- sites that drop out -------------------------------------------------------------------------------------------


def cost(config: SimulationConfig, rounds: int) -> float:
    """Epsilon of so many rounds."""
    privacy = config.privacy
    assert privacy.noise_multiplier is not None
    event = AccountingEvent(privacy.sampling_rate, privacy.noise_multiplier, rounds * config.training.local_steps)
    return spent([event], privacy.delta).epsilon


def test_a_site_with_a_smaller_budget_drops_out_and_the_others_go_on(tmp_path: Path, configure: Configure) -> None:
    one_round = cost(configure(tmp_path), 1)
    done = run(configure(tmp_path, site={"budgets": {"강남": 1.01 * one_round}}))
    assert not done.summary.stopped
    state = done.summary.sites["강남"]
    assert (state["rounds"], state["reason"], state["epsilon"]) == (1, "budget", one_round)
    assert len(done.ledger("강남")) == 1
    assert [line["declined"] for line in done.metrics()] == [{}, {}, {"강남": "budget"}, {}]
    assert {name: done.summary.sites[name]["rounds"] for name in BRANCHES[1:]} == dict.fromkeys(BRANCHES[1:], 3)
    for file, reason in (("summary.md", "budget"), ("summary.ko.md", "예산 부족")):
        assert reason in (done.folder / file).read_text("utf-8")


def test_a_run_whose_quorum_is_gone_ends_with_its_outputs_and_the_reason(tmp_path: Path, configure: Configure) -> None:
    budgets = dict.fromkeys(BRANCHES[:3], 1.01 * cost(configure(tmp_path), 1))
    with any_pdf():
        done = run(configure(tmp_path, site={"budgets": budgets}, audit={"report": True}))
    assert "quorum=2" in done.summary.stopped
    assert all(f"{name} declined (budget)" in done.summary.stopped for name in budgets)
    assert [line["round"] for line in done.metrics()] == [0, 1]
    assert done.summary.after["round"] == 1
    assert "Ended early" in (done.folder / "summary.md").read_text("utf-8")
    assert "조기 종료" in (done.folder / "summary.ko.md").read_text("utf-8")
    np.testing.assert_array_equal(saved_values(done.folder), np.sort(done.adapter()))
    for file in ("rounds.svg", "rounds.png", "sites.svg", "sites.png"):
        assert (done.folder / file).stat().st_size > 0
    audit = json.loads((done.folder / "audit" / "audit.json").read_text("utf-8"))
    software = [f"{name} {version}" for name, version in audit["run"]["versions"].items()]
    names = [*BRANCHES, *software, audit["claim"]["base_model"], "run"]
    for file in ("summary.ko.md", "rounds.ko.svg", "sites.ko.svg", "audit/audit.ko.html"):
        assert english_words((done.folder / file).read_text("utf-8"), names) == set(), file
    assert "정족수 미달" in (done.folder / "audit" / "audit.ko.html").read_text("utf-8")


def saved_values(folder: Path) -> NDArray[np.float32]:
    """What is trained (B) of the adapter file, in ascending order."""
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    return np.sort(np.concatenate([t.ravel() for k, t in saved.items() if "lora_B" in k]))


@pytest.mark.parametrize("raising", [False, True], ids=["all decline", "all raise"])
def test_a_run_that_no_site_joins_ends_with_its_outputs(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, raising: bool
) -> None:
    def handle(site: Site, request: bytes) -> bytes:
        if raising:
            raise RuntimeError("a fault")
        return Declined(site=site.name, reason="policy").to_bytes()

    monkeypatch.setattr(Site, "handle", handle)
    done = run(configure(tmp_path, federation={"round_timeout": 2.0}))
    assert "quorum" in done.summary.stopped
    assert [line["round"] for line in done.metrics()] == [0]
    assert (done.folder / "summary.md").exists()
    assert (done.folder / "sites.svg").exists()
    assert (done.folder / "adapter" / "adapter_model.safetensors").exists()


def test_a_site_that_hangs_is_missed_and_the_others_go_on(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    """The first of the four, so that all others wait behind it."""
    without_plots(monkeypatch)
    real = Site.handle

    def handle(site: Site, request: bytes) -> bytes:
        if site.name == sorted(BRANCHES)[0] and not isinstance(from_bytes(request, Prepare, TrainRequest), Prepare):
            gate.wait()
        return real(site, request)

    monkeypatch.setattr(Site, "handle", handle)
    answered: list[Event] = []

    def observe(event: Event) -> None:
        answered.extend([event] if isinstance(event, SiteAnswered) and event.round == 1 else [])

    def clock() -> float:
        """Time is up as soon as all others have answered, however busy the machine is."""
        return time.monotonic() + (1e6 if len(answered) == 3 else 0)

    monkeypatch.setattr(server.channel, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    monkeypatch.setattr(simulations.grid, "_LAST_WORK", 0.1)
    summary = simulate(configure(tmp_path, **OFF), lambda *_: None, observe)
    assert not summary.stopped
    hung = sorted(BRANCHES)[0]
    assert {n: s["rounds"] for n, s in summary.sites.items()} == {n: 3 * (n != hung) for n in BRANCHES}


def test_a_site_without_enough_records_declines_and_the_others_go_on(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]
) -> None:
    without_plots(monkeypatch)
    train = _as_jsonl(tmp_path / "train.jsonl", [*rows, {**rows[0], "branch": "tiny"}])
    done = run(configure(tmp_path, data={"train": str(train)}, **SMALL))
    assert (done.summary.sites["tiny"]["rounds"], done.summary.sites["tiny"]["reason"]) == (0, "data")
    assert not done.ledger("tiny")
    assert done.summary.sites["busan"]["rounds"] == 2


@pytest.mark.parametrize("rate", [1.0, 0.9])
def test_sites_of_one_size_take_part_at_any_sampling_rate(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    """Nobody is too small for a nominal size that was taken from all of them."""
    without_plots(monkeypatch)
    done = run(configure(tmp_path, privacy={"mode": "off", "sampling_rate": rate}, **SMALL))
    assert {n: s["rounds"] for n, s in done.summary.sites.items()} == dict.fromkeys(BRANCHES, 2)


def test_late_work_of_a_site_does_not_reach_the_adapter_that_is_saved(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that missed the deadline may still train, in its thread, while the outputs are written."""
    real = AdapterModel.save

    def save(adapter: AdapterModel, *arguments: Any) -> None:
        def late() -> None:
            if adapter.lock.acquire(blocking=False):
                adapter.load(np.full_like(adapter.initial, 7.0))
                adapter.lock.release()

        thread = threading.Thread(target=late)
        thread.start()
        thread.join()
        real(adapter, *arguments)

    monkeypatch.setattr(AdapterModel, "save", save)
    done = run(configure(tmp_path, **OFF, **SMALL))
    np.testing.assert_array_equal(saved_values(done.folder), np.sort(done.adapter()))


def test_what_a_round_costs_is_computed_once_for_all_sites(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a large part of a second, and all sites ask at the same time."""
    without_plots(monkeypatch)
    fedllm.privacy.accounting._spent.cache_clear()
    done = run(configure(tmp_path))
    assert len(done.names) == 4
    counts = fedllm.privacy.accounting._spent.cache_info()
    assert counts.misses == counts.currsize


def test_two_runs_cannot_share_a_folder(tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second leaves everything as it is: also just after the first has begun, and when it resumes."""
    without_plots(monkeypatch)
    run_until(configure(tmp_path, **OFF), 7)
    folder = tmp_path / "run"
    first_minute = tmp_path / "begun"
    first_minute.mkdir()
    for file in ("plan.json", "config.json"):
        (first_minute / file).write_bytes((folder / file).read_bytes())
    for other, resume in ((folder, True), (first_minute, False)):
        before = {f: f.read_bytes() for f in other.rglob("*") if f.is_file() and f.name != "lock"}
        with (other / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(ConfigError, match="in use"):
                run(configure(tmp_path, other.name, resume=resume, **OFF))
        assert before == {f: f.read_bytes() for f in other.rglob("*") if f.is_file() and f.name != "lock"}


def test_an_absurd_claim_of_a_site_does_not_cost_the_run_its_outputs(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Site.handle

    def handle(site: Site, request: bytes) -> bytes:
        reply = from_bytes(real(site, request), Message, Message)
        if isinstance(reply, TrainReply):
            lie = replace(open_statement(reply.statement)[0], epsilon=1e308)
            reply = reply.model_copy(update={"statement": sign_statement(lie, site._identity())})
        return reply.to_bytes()

    monkeypatch.setattr(Site, "handle", handle)
    done = run(configure(tmp_path, **SMALL))
    for file in ("summary.md", "rounds.svg", "sites.png"):
        assert (done.folder / file).stat().st_size > 0


def test_a_lost_ledger_ends_the_run(tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an empty one in its place, what was spent before would be forgotten."""
    without_plots(monkeypatch)
    run_until(configure(tmp_path), 13)
    shutil.rmtree(tmp_path / "run" / "sites")
    done = run(resumed(configure(tmp_path)))
    assert "ledger" in done.summary.stopped
    assert [line["round"] for line in done.metrics()] == [0, 1, 2]


# ---- sites that outlive a run ----------------------------------------------------------------------------------------


NOISE = 2.0


@pytest.fixture
def lasting(tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Return a function that runs so many rounds for a server, at sites that keep their folders."""
    without_plots(monkeypatch)

    def start(head_office: str, name: str, rounds: int, epsilon: float = 8.0, **more: Any) -> Run:
        changes = {
            "privacy": {"noise_multiplier": NOISE}, "training": {"rounds": rounds, "local_steps": 1},
            "site": {"folder": str(tmp_path / "offices"), "epsilon": epsilon},
        }  # fmt: skip
        return run(configure(tmp_path / head_office, name, **changes, **more))

    return start


@pytest.mark.slow
def test_budget_belongs_to_the_records_whichever_head_office_asks(
    tmp_path: Path, configure: Configure, lasting: Callable[..., Run], without_pdfs: None
) -> None:
    privacy = configure(tmp_path).privacy
    five = [AccountingEvent(privacy.sampling_rate, NOISE, 1)] * 5
    budget = for_several_plans(five, privacy.delta)
    assert not lasting("seoul", "first", 2, budget).summary.stopped
    assert not lasting("busan", "second", 2, budget).summary.stopped
    third = lasting("seoul", "third", 3, budget, audit={"report": True})
    assert "round 2: 0 sites" in third.summary.stopped
    assert "강남 declined (budget)" in third.summary.stopped
    assert {s: len(charged(tmp_path / "offices" / s / "ledger.db")) for s in BRANCHES} == dict.fromkeys(BRANCHES, 5)
    assert not any(file.suffix == ".db" for file in third.folder.rglob("*")), "the ledgers stay with the sites"

    audit, _ = verify(third.folder / "audit", Trust.read(third.folder / KEYS))
    assert audit.verdict == "within"
    assert len({point.run for point in audit.timeline}) == 3, "what was spent for others is in the report"
    assert [site.left for site in audit.sites] == [pytest.approx(0.0, abs=1e-4)] * 4, "as the sites' own ledgers count"
    keys = {key_in(tmp_path / place).public for place in ("seoul/first", "busan/second")}
    assert len(keys) == 2


@pytest.mark.parametrize("unit", ["person", "record"])
def test_a_budget_is_not_fresh_because_the_same_records_are_spelt_in_another_way(
    tmp_path: Path, rows: list[dict[str, Any]], configure: Configure, lasting: Callable[..., Run], unit: str
) -> None:
    persons = {name: number for number, name in enumerate(dict.fromkeys(row["customer_id"] for row in rows))}
    numbered = [{**row, "customer_id": persons[row["customer_id"]]} for row in rows]
    respelt: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "ids are fractions": lambda row: {**row, "customer_id": float(row["customer_id"])},
        "ids are texts": lambda row: {**row, "customer_id": f" {row['customer_id']}"},
        "a column more": lambda row: {**row, "remark": "seen"},
        "blanks": lambda row: {**row, "answer": f"{row['answer']} "},
        "decomposed": lambda row: {**row, "question": unicodedata.normalize("NFD", row["question"])},
    }
    if unit == "person":  # whatever they have written
        respelt["other texts"] = lambda row: {**row, "question": f"please: {row['question']}"}
    privacy = configure(tmp_path).privacy
    budget = 1.01 * for_several_plans([AccountingEvent(privacy.sampling_rate, NOISE, 1)], privacy.delta)

    def start(name: str, table: list[dict[str, Any]]) -> str:
        train = write(tmp_path / f"{name}.jsonl", table)
        change = {"data": {"train": str(train)}, "privacy": {"noise_multiplier": NOISE, "unit": unit}}
        training = {"rounds": 1, "local_steps": 1}
        return run(
            configure(
                tmp_path / "seoul", name, **change, training=training,
                site={"folder": str(tmp_path / "offices"), "epsilon": budget},
            )
        ).summary.stopped  # fmt: skip

    assert not start("first", numbered)
    for name, change in respelt.items():
        stopped = start(name, [change(row) for row in numbered])
        assert all(f"{branch} declined (budget)" in stopped for branch in BRANCHES), name


def test_a_ledger_put_back_from_an_old_backup_is_refused_by_the_next_run(
    tmp_path: Path, lasting: Callable[..., Run]
) -> None:
    ledger = tmp_path / "offices" / "jeju" / "ledger.db"
    anchor = ledger.with_name("ledger.anchor")
    lasting("seoul", "first", 1)
    backup, before = ledger.read_bytes(), anchor.read_bytes()
    lasting("seoul", "second", 1)
    ledger.write_bytes(backup)
    third = lasting("seoul", "third", 1)
    assert "older than its anchor" in (third.folder / "sites" / "sites.log").read_text("utf-8")
    anchor.write_bytes(before)  # a snapshot of the whole machine holds an old anchor, too
    third = lasting("seoul", "third again", 1)
    assert third.metrics()[1]["declined"] == {"jeju": "ledger"}
    assert len(third.metrics()[1]["answered"]) == 3
    assert len(charged(ledger)) == 1, "nothing is charged to a ledger that is not the newest"
    log = (third.folder / "sites" / "sites.log").read_text("utf-8")
    assert "restored from an old backup" in log
    assert "fedllm server new-ledger" in log
    elsewhere = lasting("busan", "fourth", 1)  # another server has seen nothing of it yet
    assert not elsewhere.metrics()[1]["declined"]
    LedgerHeads(tmp_path / "seoul" / HEADS, f"{tmp_path / 'offices'}/").forget("jeju")
    assert not lasting("seoul", "fifth", 1).metrics()[1]["declined"]


@pytest.mark.slow
def test_a_run_writes_an_audit_in_both_languages_that_verifies_and_where_no_byte_can_be_changed(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_plots(monkeypatch)
    folder = run(configure(tmp_path, audit={"report": True}, **SMALL)).folder
    audit = folder / "audit"
    found = {file.name for file in audit.iterdir()}
    assert {"audit.html", "audit.ko.html", "audit.json", "audit.sig", "ledgers", "record.jsonl"} <= found
    assert ("audit.pdf" in found) == ("audit.ko.pdf" in found)
    command = ["audit", "verify", str(audit), "--trust", str(folder / KEYS), "--allow-uncompared"]
    done = CliRunner().invoke(app, command)
    assert "verified: within budget; 4 sites, 2 rounds" in done.output
    ledger = audit / "ledgers" / "jeju.jsonl"
    data = bytearray(ledger.read_bytes())
    data[len(data) // 2] ^= 1
    ledger.write_bytes(data)
    assert CliRunner().invoke(app, command).exit_code == 1


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_nothing_is_left_behind_by_a_run_that_is_refused(tmp_path: Path, configure: Configure) -> None:
    with pytest.raises(ConfigError, match=r"quorum=5.*4 sites"):
        run(configure(tmp_path / "runs", federation={"quorum": 5}))
    assert not (tmp_path / "runs").exists()


def test_names_of_sites_may_be_anything_that_a_branch_may_be_called(
    tmp_path: Path, configure: Configure, rows: list[dict[str, Any]]
) -> None:
    odd = {"강남": "서울/강남 (본점)", "busan": "..", "daegu": "a|b*c $\\x_$", "jeju": "서울%2F강남"}
    train = _as_jsonl(tmp_path / "train.jsonl", [{**row, "branch": odd[row["branch"]]} for row in rows])
    done = run(configure(tmp_path, data={"train": str(train)}, **SMALL))
    assert set(done.summary.sites) == set(odd.values())
    assert all(state["rounds"] == 2 for state in done.summary.sites.values())
    ledgers = list((done.folder / "sites").glob("*/ledger.db"))
    assert len(ledgers) == 4, "one ledger each, all of them below sites/"
    assert not (done.folder / "ledger.db").exists()
