"""Invariants that cost too much, or touch too much, for the start of a training: they run in the tests alone.

Each takes a fresh folder and the base model's, and returns what is wrong, or "".
"""

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client.site
from client.records import Declared, load_records
from client.unfinished import Unfinished
from fedllm.config import TextConfig
from fedllm.plan import RunPlan
from fedllm.privacy import accounting
from fedllm.privacy.accounting import spent
from fedllm.privacy.randomness import OsRandomness
from fedllm.privacy.split import Split
from fedllm.protocol.messages import TrainReply
from fedllm.protocol.spending_statement import open_statement
from fedllm.training import self_check
from fedllm.training.adapter import attach
from fedllm.training.engine import Engine
from fedllm.training.model import load_base, load_reader
from fedllm.training.self_check import Subject
from fedllm.values import parse
from server.checkpoint import Checkpoint, SiteState, load_checkpoint, save_checkpoint
from tests.attacks.test_rounding_of_epsilon import SPARED, exact_epsilon
from tests.client.test_site import Killed, Office, read


def plan_of(base: Path, **changes: Any) -> RunPlan:
    """Return a small plan; `changes` are privacy and training values."""
    privacy = {
        "mode": "local", "unit": "record", "epsilon": 8.0, "delta": 1e-3, "clip_norm": 0.4, "sampling_rate": 0.2,
        "units_per_site": 24, "noise_multiplier": 1.0,
    }  # fmt: skip
    training = {"rounds": 4, "local_steps": 2, "learning_rate": 0.1, "momentum": 0.9, "wire": "float32"}
    model: dict[str, Any] = {"source": str(base), "max_length": 32}
    if (quantize := changes.pop("quantize", None)) is not None:
        model["quantize"] = quantize
    whole: dict[str, Any] = {}
    if changes.pop("distributed", False):
        whole = {"sites": changes.pop("sites", 6), "quorum": changes.pop("quorum", 4)}
        privacy["mode"] = "distributed"
        training |= {"local_steps": 1, "momentum": 0.0}
    if changes.pop("classifies", False):
        model |= {"task": "classification", "labels": ["a", "b", "c"]}
    adapter: dict[str, Any] = {"rank": 2, "targets": ["q_proj", "v_proj"]}
    if (method := changes.pop("method", "lora")) != "lora":
        adapter = {"method": method}
    others = ("clipping", "insecure_seed", "records_per_person")
    for key, value in changes.items():
        (privacy if key in privacy or key in others else training)[key] = value
    return parse(
        RunPlan,
        {
            **whole, "run": "zoo", "seed": 3, "model": model, "adapter": adapter,
            "privacy": privacy, "training": training,
        },
    )  # fmt: skip


def office_of(folder: Path, base: Path) -> Office:
    return Office(folder, plan_of(base), epsilon=100.0, self_check=False)


def budget_composes_over_rounds(folder: Path, base: Path) -> str:
    """After three rounds, with restarts in between, a site states what three rounds cost together."""
    office = office_of(folder, base)
    for number in (1, 2, 3):
        office.restart()
        reply = office.train(number)
        if not isinstance(reply, TrainReply):
            return f"round {number} was declined"
        true = spent([office.plan.mechanism.event(2 * number)], 1e-3).epsilon
        stated = open_statement(reply.statement)[0].epsilon
        if stated is None or abs(stated - true) > 1e-9:
            return f"after round {number} the site states epsilon {stated}, expected {true:.4g}"
    return ""


def charge_is_on_disk_before_records_are_used(folder: Path, base: Path) -> str:
    """When training begins, its charge can be read from the ledger by anybody who opens it."""
    office, seen = office_of(folder, base), list[int]()
    honest = client.site.train_round

    def look(*arguments: Any) -> Any:
        seen.append(len(office.events()))
        return honest(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.site, "train_round", look)
        office.train(1)
    return "" if seen == [1] else f"{seen} charges on disk when training began, expected [1]"


def killed_round_stays_charged(folder: Path, base: Path) -> str:
    """A round whose process was killed may have been sent: it counts as spent, whatever happens next."""
    office = office_of(folder, base)

    def kill(*_: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.site, "train_round", kill)
        with pytest.raises(Killed):
            office.train(1)
    Unfinished(office.ledger_path).end()
    office.restart()
    reply = office.train(2)
    if not isinstance(reply, TrainReply):
        return "the round after the killed one was declined"
    true = spent([office.plan.mechanism.event(4)], 1e-3).epsilon
    stated = open_statement(reply.statement)[0].epsilon or 0.0
    return "" if stated >= true - 1e-9 else f"two charged rounds cost {stated:.4g}, expected {true:.4g}"


def one_charge_buys_one_release(folder: Path, base: Path) -> str:
    """Who asks twice gets the same bytes: two noisy answers at one price would be averaged."""
    office = office_of(folder, base)
    request = office.request()
    first = office.site.handle(request)
    second = office.restart().handle(request)
    if not isinstance(read(first), TrainReply):
        return "the round was declined"
    return "" if first == second else "one request was answered twice, with two noises, for one charge"


def checkpoint_keeps_what_was_charged(folder: Path, base: Path) -> str:
    """What the server knows of a site's spending survives the end of its process."""
    state = {"seoul": SiteState(rounds=2, charged=3, last_charged=3, stated=1.5, epsilon=2.0, epsilon_rdp=2.5)}
    path = folder / "checkpoint.safetensors"
    save_checkpoint(path, Checkpoint(3, "plan", np.zeros(4, np.float32), {}, state))
    found = load_checkpoint(path).sites
    return "" if found == state else f"the checkpoint holds {found}"


def every_plan_is_checked_itself(folder: Path, base: Path) -> str:
    """No plan rests on what another one passed, however near: 513.0 and 1 + 2^-52 have the same hash()."""
    plans, checked = [plan_of(base, clip_norm=clip) for clip in (513.0, 1 + 2.0**-52)], list[float]()
    adapter = attach(load_base(plans[0].model, "cpu"), plans[0].model, plans[0].adapter, plans[0].seed)
    engine = Engine(adapter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_check, "self_check", lambda subject: checked.append(subject.plan.privacy.clip_norm))
        for plan in plans * 2:
            self_check.self_check_once(Subject(adapter, engine, plan, OsRandomness, 8))
    return "" if checked == [513.0, 1 + 2.0**-52] else f"of two plans, asked for twice, these were checked: {checked}"


def epsilon_is_not_below_the_truth(folder: Path, base: Path) -> str:
    """Where the last digits of float64 are as large as delta, epsilon is that of the closed form, or more."""
    true = exact_epsilon(SPARED, 1e-12)
    found = spent([SPARED], 1e-12).epsilon
    accounting._spent.cache_clear()  # what a fault made of it is for nobody else
    return "" if found >= true else f"epsilon {found:.5g}, in truth {true:.5g}"


def a_person_is_one_unit(folder: Path, base: Path) -> str:
    """All records of a person form one unit, however the name is spelt, and no more than the cap are used."""
    name = "김하나"
    people = [name, f" {name} ", unicodedata.normalize("NFD", name), name, "이둘"]

    plan = plan_of(base, unit="person", records_per_person=3)
    rows = [{"person": person, "text": "x"} for person in people]
    reader = load_reader(plan.model)
    declared, text = Declared(2, "person"), TextConfig(text="{text}")
    records = load_records(rows, text, "person", declared, {plan.model.source: reader})
    units = records.units(plan, Split(0.0, bytes(32)), "training")
    sizes = sorted(map(len, units))
    return "" if sizes == [1, 3] else f"units of {sizes} records, expected [1, 3]"


INVARIANTS: dict[str, Callable[[Path, Path], str]] = {
    invariant.__name__.replace("_", "-"): invariant
    for invariant in (
        budget_composes_over_rounds, charge_is_on_disk_before_records_are_used, killed_round_stays_charged,
        one_charge_buys_one_release, checkpoint_keeps_what_was_charged, every_plan_is_checked_itself,
        epsilon_is_not_below_the_truth, a_person_is_one_unit,
    )
}  # fmt: skip
