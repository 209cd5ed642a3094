"""Membership inference on finished simulations: it finds what was learned by heart, and says what it cannot attack."""

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedllm.config import SimulationConfig
from fedllm.crypto.hash_chain import make_entry, open_entry
from fedllm.errors import CheckpointError, ConfigError, DataError, FedllmError, LedgerError, ModelError
from fedllm.training import model_context
from server.checkpoint import load_checkpoint, save_checkpoint
from server.run_record import key_in
from simulations.attack import attack
from simulations.simulate import simulate
from tests.conftest import save_llama
from tests.simulations.conftest import CommandsHere, write

Configure = Callable[..., SimulationConfig]
Break = Callable[[Path, Path], None]  # a copied run, and the folder that all runs share
_MEMBERS, _OTHERS = 32, 120


def _rows(first: int, count: int) -> list[dict[str, Any]]:
    """Records of persons at two branches, with answers that nobody can guess."""
    answers = random.Random(first)
    return [
        {
            "branch": ("강남", "busan")[i % 2],
            "customer_id": f"person {first + i}",
            "question": "code?",
            "answer": "".join(answers.choices("abcdefghijklmnop", k=6)),
        }
        for i in range(count)
    ]


def _base(folder: Path, seed: int) -> None:
    """A Llama of random weights, so large that its head can tell any letter from the others."""
    save_llama(folder, seed, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, configure: Configure) -> Path:
    """A folder with two runs: `off` has learned its records by heart, `private` has done the same with noise."""
    folder = tmp_path_factory.mktemp("attacked")
    _base(folder / "base", 0)
    first = _rows(0, _MEMBERS)
    second = [{**row, "answer": row["answer"][::-1]} for row in first]  # of the same persons, beyond what a plan takes
    write(folder / "train.jsonl", first + second)
    write(folder / "heldout.jsonl", _rows(1000, _OTHERS))
    for name, privacy in (("off", {"mode": "off"}), ("private", {"mode": "local", "noise_multiplier": 4.0})):
        config = configure(
            folder, name,
            model={"source": str(folder / "base"), "compile": "off"},
            data={"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl")},
            adapter={"rank": 8, "targets": "all-linear", "train": "AB"},
            privacy={
                **privacy, "sampling_rate": 1.0, "clip_norm": 10.0, "units_per_site": 16, "records_per_person": 1
            },
            training={"rounds": 2, "local_steps": 15, "optimizer": "adam", "learning_rate": 0.02},
        )  # fmt: skip
        simulate(config, lambda *_: None, lambda _: None)
    return folder


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy of the run `off`."""
    return Path(shutil.copytree(runs / "off", tmp_path / "off", ignore=shutil.ignore_patterns("attack")))


def _quiet(_: str) -> None:
    pass


def _set(run: Path, key: str, value: object) -> None:
    config = json.loads((run / "config.json").read_text("utf-8"))
    config["data"][key] = value
    (run / "config.json").write_text(json.dumps(config), "utf-8")


def test_records_that_were_learned_by_heart_are_found(runs: Path) -> None:
    found = attack(runs / "off", None, _quiet)
    assert found.succeeds
    assert found.found.interval[0] > 0.6
    assert not found.differs
    assert found.target.epsilon is None
    assert found.auc_bound is None
    assert (found.target.members_there, found.target.others_there) == (_MEMBERS, _OTHERS)  # no second record of anybody
    written = {file.name for file in (runs / "off" / "attack").iterdir()}
    assert written == {"attack.json", "attack.md", "attack.ko.md", "attack.png", "attack.ko.png"}


def test_with_noise_they_are_not(runs: Path) -> None:
    found = attack(runs / "private", None, _quiet)
    assert found.found.auc < 0.75  # guessing is 0.5, with a standard deviation of 0.06
    assert not found.above
    assert found.target.events == ((1.0, 4.0, 30),)
    assert found.target.epsilon is not None
    assert found.auc_bound is not None
    assert found.auc_bound < 1


def test_a_limit_holds_for_each_side(run: Path) -> None:
    target = attack(run, 7, _quiet).target
    assert (target.members, target.members_there) == (7, _MEMBERS)
    assert (target.others, target.others_there) == (7, _OTHERS)


def test_held_out_records_that_a_site_has_are_left_out(run: Path, runs: Path, tmp_path: Path) -> None:
    _set(run, "heldout", str(write(tmp_path / "mixed.jsonl", _rows(1000, 20) + _rows(0, 5))))
    target = attack(run, None, _quiet).target
    assert (target.others_there, target.left_out) == (20, 5)


# ---- what cannot be attacked -----------------------------------------------------------------------------------------


def _no_settings(run: Path, _: Path) -> None:
    (run / "config.json").unlink()


def _of_real_sites(run: Path, _: Path) -> None:
    config = json.loads((run / "config.json").read_text("utf-8"))
    config["data"] = {"heldout": None}
    (run / "config.json").write_text(json.dumps(config), "utf-8")


def _cut_record(run: Path, _: Path) -> None:
    lines = (run / "record.jsonl").read_text("utf-8").splitlines(keepends=True)
    (run / "record.jsonl").write_text("".join(lines[:-1]), "utf-8")


def _no_round(run: Path, _: Path) -> None:
    first = (run / "record.jsonl").read_text("utf-8").splitlines()[0]
    before = open_entry(first)
    body = {"round": 0, "stopped": "quorum", "adapter": before.body["adapter"]}
    end = make_entry(1, before.digest, "end", time.time(), body, key_in(run))
    (run / "record.jsonl").write_text(f"{first}\n{end}\n", "utf-8")


def _altered_record(run: Path, _: Path) -> None:
    lines = (run / "record.jsonl").read_text("utf-8").splitlines(keepends=True)
    (run / "record.jsonl").write_text("".join(lines[:1] + lines[2:]), "utf-8")


def _another_checkpoint(run: Path, _: Path) -> None:
    checkpoint = load_checkpoint(run / "checkpoint.safetensors")
    save_checkpoint(run / "checkpoint.safetensors", replace(checkpoint, adapter=checkpoint.adapter * 2))


def _another_adapter(run: Path, runs: Path) -> None:
    shutil.copytree(runs / "private" / "adapter", run / "adapter", dirs_exist_ok=True)


def _no_adapter(run: Path, _: Path) -> None:
    shutil.rmtree(run / "adapter")


def _no_records(run: Path, runs: Path) -> None:
    _set(run, "train", str(runs / "gone.jsonl"))


def _other_records(run: Path, _: Path) -> None:
    _set(run, "train", str(write(run.parent / "other.jsonl", _rows(0, _MEMBERS - 2) + _rows(500, 2))))


def _no_site(run: Path, _: Path) -> None:
    _set(
        run,
        "train",
        str(write(run.parent / "one.jsonl", [row for row in _rows(0, _MEMBERS) if row["branch"] != "busan"])),
    )


def _no_ledger(run: Path, _: Path) -> None:
    for ledger in run.glob("sites/*/ledger.db"):
        ledger.unlink()


def _no_held_out(run: Path, _: Path) -> None:
    _set(run, "heldout", None)


def _only_members(run: Path, runs: Path) -> None:
    _set(run, "heldout", str(write(run.parent / "members.jsonl", _rows(0, 5))))


@pytest.mark.parametrize(
    ("broken", "kind", "said"),
    [
        (_no_settings, ConfigError, "is not the folder of a simulation"),
        (_of_real_sites, ConfigError, "A run of real sites cannot be attacked"),
        (_cut_record, CheckpointError, r"it has not ended.*resume=true"),
        (_no_round, CheckpointError, "no round of it was completed"),
        (_altered_record, CheckpointError, r"record\.jsonl.*Restore it from a backup"),
        (_another_checkpoint, CheckpointError, "of another adapter than the run ended with"),
        (_another_adapter, ModelError, "is not the one that was trained"),
        (_no_adapter, ModelError, "does not load"),
        (_no_records, FedllmError, "gone.jsonl"),
        (_other_records, DataError, r"has changed since the run.*its ledger lacks \d+ of \d+ hashes.*Put back"),
        (_no_site, DataError, r"has changed since the run.*busan.*there are none now"),
        (_no_ledger, LedgerError, "ledger"),
        (_no_held_out, ConfigError, r"data\.heldout=null"),
        (_only_members, DataError, r"data\.heldout=.*each of its 5 records is a record of a site as well"),
    ],
)
def test_what_cannot_be_attacked_is_refused(
    run: Path, runs: Path, broken: Break, kind: type[FedllmError], said: str
) -> None:
    broken(run, runs)
    with pytest.raises(kind, match=said):
        attack(run, None, _quiet)
    assert not (run / "attack").exists()


def test_a_base_that_was_exchanged_is_found(run: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = shutil.copytree(runs / "base", runs / "kept")
    monkeypatch.setattr(model_context, "_open", {})
    _base(runs / "base", 1)
    try:
        with pytest.raises(ModelError, match="is not the base that"):
            attack(run, None, _quiet)
    finally:
        shutil.rmtree(runs / "base")
        kept.rename(runs / "base")


def test_the_command_says_what_it_is_and_what_was_found(run: Path, tmp_path: Path) -> None:
    fedllm = CommandsHere(tmp_path)
    told = fedllm("audit", "attack", str(run), "--limit", "30")
    assert told.code == 0
    assert "SIMULATION ONLY" in told.text
    assert f"30 of {_MEMBERS} members (2 sites), 30 of {_OTHERS} non-members" in told.text
    assert "area under the ROC 0." in told.text
    assert f"Everything is in {run}/attack/" in told.text
    refused = fedllm("audit", "attack", str(tmp_path / "nothing"))
    assert refused.code == 1
    assert "is not the folder of a simulation" in refused.text
    assert "Traceback" not in refused.text


def test_the_best_non_members_are_units_that_sites_held_back(tmp_path: Path, configure: Configure) -> None:
    """They are of the same kind as the members, and a run without a public held-out set has them, too."""
    config = configure(
        tmp_path, evaluation={"every": 1, "noise_multiplier": 2.0}, data={"heldout": None}, training={"rounds": 1},
        privacy={"unit": "record"}, site={"evaluation_share": 0.5, "min_units": 1},
    )  # fmt: skip
    done = simulate(config, lambda *_: None, lambda _: None)
    found = attack(done.folder, None, lambda _: None).target
    rows = len(Path(config.data.train).read_text("utf-8").splitlines())
    assert not found.public
    assert found.members_there + found.others_there + found.left_out == rows
    assert 0.3 * rows < found.others_there + found.left_out < 0.7 * rows
