"""A unit trains or evaluates, and pays for one of them: what proves that, and planted faults that it finds.

Sites are real, on records that are read from rows; without noise, so that what depends on a unit shows to the last bit.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client.records
import client.site
from client.policy import widest
from client.records import Declared, SiteRecords, load_records
from client.site import Site
from fedllm import adapter_vector
from fedllm.config import TextConfig
from fedllm.crypto.hash_chain import open_entry
from fedllm.crypto.identity import Identity
from fedllm.plan import RunPlan
from fedllm.privacy.ledger import LedgerFile, PrivacyLedger
from fedllm.privacy.ledger_place import LedgerPlace
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.metrics import Layout
from fedllm.privacy.split import Side, Split
from fedllm.protocol.messages import RoundBegun, TrainReply, TrainRequest, from_bytes, unpack
from fedllm.training import data, trainer
from fedllm.training.model import load_reader
from fedllm.training.model_context import open_context
from tests.bug_zoo.invariants import plan_of

SIGNER, KEY = Identity.generate(), b"k" * 32
TEXT = TextConfig(text="{text}")
PEOPLE = [f"사람 {n}" for n in range(24)]
BEGUN = RoundBegun(roster="a" * 64, number=1, digest="b" * 64)
Patch = pytest.MonkeyPatch


def rows_of(people: Sequence[str]) -> list[dict[str, Any]]:
    """Two records of every person, of different lengths, the second ones at the end."""
    return [
        {"person": who, "text": f"{again} {who} " + "가나다 abc " * (1 + hash_of(who) % 3)}
        for again in ("first", "second")
        for who in people
    ]


def hash_of(who: str) -> int:
    return sum(who.encode())


class SmallSite:
    """One site in a fresh folder, and what it answers in one exchange."""

    def __init__(self, folder: Path, plan: RunPlan, people: Sequence[str] = PEOPLE, **policy: Any) -> None:
        self.plan, self.file = plan, folder / "ledger.db"
        folder.mkdir(parents=True, exist_ok=True)
        declared = Declared(len(PEOPLE), plan.privacy.unit)
        reader = load_reader(plan.model)
        self.records = load_records(rows_of(people), TEXT, "person", declared, {plan.model.source: reader})
        limits = {"unit": plan.privacy.unit, "evaluation_share": 0.4, **policy}
        place = LedgerPlace(self.file, folder / "keys" / "anchor")
        self.site = Site(
            "site", widest(limits.pop("epsilon", math.inf), 1e-3, **limits), place, lambda: SIGNER,
            lambda own: open_context(own.model, own.adapter, own.seed, "cpu"), self.records, 8, self_check=False,
            split_key=KEY,
        )  # fmt: skip

    def answer(self, exchange: int = 1) -> tuple[bytes, np.ndarray]:
        """Return the update and the score, float64[1 + metrics]."""
        reply = from_bytes(self.site.handle(self.request(exchange)), TrainReply, TrainReply)
        update, score = unpack(reply.payload, 2)
        return update, np.frombuffer(score, "<f8")

    def request(self, exchange: int = 1, values: float = 0.01) -> bytes:
        """What the server asks, of an adapter that is `values` away from the initial one."""
        context = open_context(self.plan.model, self.plan.adapter, self.plan.seed, "cpu")
        return TrainRequest(
            plan=self.plan, round=exchange, spec_digest=context.adapter.spec.digest, head=None, begun=BEGUN,
            payload=adapter_vector.encode(context.adapter.initial + np.float32(values), "float32"),
        ).to_bytes()  # fmt: skip

    def side(self, who: str) -> Side:
        return Split(0.4, KEY).side(b"person\0" + who.encode())


def scored(base: Path, unit: str = "person", mode: str = "off", **changes: Any) -> RunPlan:
    """A plan with scores; without noise, and all units in every step, unless something else is asked for."""
    plan = plan_of(base, unit=unit, sampling_rate=1.0, momentum=0.0, local_steps=1, mode=mode, **changes)
    noise = None if mode == "off" else 2.0
    own = plan.evaluation.model_copy(update={"every": 1, "noise_multiplier": noise})
    return plan.model_copy(update={"evaluation": own})


def a_unit_is_on_one_side(folder: Path, base: Path, unit: str) -> str:
    """Who trains changes no score, and who evaluates no update; nor does anybody change both."""
    plan = scored(base, unit)
    whole = SmallSite(folder / "whole", plan)
    update, score = whole.answer()
    for number, who in enumerate(PEOPLE[:8]):
        other_update, other_score = SmallSite(folder / str(number), plan, [p for p in PEOPLE if p != who]).answer()
        changed = {"training": other_update != update, "evaluation": not np.array_equal(other_score, score)}
        expected = {side: side == whole.side(who) for side in changed}
        if changed != expected:
            return f"without {who}, who is on side {whole.side(who)}: changed {changed}"
    return ""


def one_unit_moves_a_score_by_its_norm_at_most(folder: Path, base: Path, unit: str) -> str:
    """Whatever a unit's values are: here a model that is wrong without bounds."""
    plan = scored(base, "person")

    def values(*_: Any) -> np.ndarray:
        return np.array([[math.nan, math.inf], [1e300, -1e300], [0.0, 1.0], [math.inf, 1.0]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "unit_metrics", values)
        _, score = SmallSite(folder, plan).answer()
    return "" if np.linalg.norm(score) <= 4 else f"four units have moved a score by {np.linalg.norm(score):.3g}"


def a_score_is_charged_before_records_are_used(folder: Path, base: Path, unit: str) -> str:
    """When the first unit is scored, its charge is on disk, on the side of evaluation."""
    plan, seen = scored(base, "person", "local"), list[Any]()
    site, honest = SmallSite(folder, plan, epsilon=100.0), trainer.unit_metrics

    def look(*arguments: Any) -> Any:
        seen.extend(LedgerFile(site.file).events("site", side="evaluation"))
        return honest(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "unit_metrics", look)
        site.answer()
    return "" if seen == plan.cost(1, "evaluation") else f"{seen} charged when units were scored"


def a_score_has_fresh_noise_in_every_coordinate(folder: Path, base: Path, unit: str) -> str:
    """Of two sites with the same records; also the number of units is told with noise."""
    plan = scored(base, "person", "local")
    scores = [SmallSite(folder / str(k), plan, epsilon=100.0).answer()[1] for k in range(6)]
    spread = np.std(scores, axis=0)
    fine = all(len({score[i] for score in scores}) == 6 for i in range(len(spread))) and spread.min() > 0.3
    return "" if fine else f"six scores of the same records deviate by {spread}, expected about 2 each"


INVARIANTS: dict[str, Callable[[Path, Path, str], str]] = {
    each.__name__.replace("_", "-"): each
    for each in (
        a_unit_is_on_one_side, one_unit_moves_a_score_by_its_norm_at_most,
        a_score_is_charged_before_records_are_used, a_score_has_fresh_noise_in_every_coordinate,
    )
}  # fmt: skip


def evaluation_units_train_as_well(patch: Patch) -> None:
    def everybody(self: SiteRecords, split: Split, side: Side) -> Sequence[int]:
        honest = [k for k, identity in enumerate(self.identities) if split.side(identity) == "evaluation"]
        return honest if side == "evaluation" else range(len(self.identities))

    patch.setattr(SiteRecords, "_on", everybody)


def every_tenth_unit_evaluates(patch: Patch) -> None:
    """The side follows from the place, which changes as others come and go."""

    def by_place(self: SiteRecords, split: Split, side: Side) -> Sequence[int]:
        return [k for k in range(len(self.identities)) if (k % 10 == 0) == (side == "evaluation")]

    patch.setattr(SiteRecords, "_on", by_place)


def records_are_split_and_not_persons(patch: Patch) -> None:
    """With privacy units that are records: one of a person's trains, the other one evaluates."""
    honest = client.records.identities
    patch.setattr(client.records, "identities", lambda rows, text, column, by_person: honest(rows, text, None, False))


def loss_is_not_cut(patch: Patch) -> None:
    def uncut(self: Layout, values: np.ndarray) -> np.ndarray:
        return np.column_stack([np.ones(len(values)), np.nan_to_num(values, posinf=9.0, neginf=-9.0).clip(-9, 9)])

    patch.setattr(Layout, "vectors", uncut)


def scores_are_not_charged(patch: Patch) -> None:
    honest = PrivacyLedger.reserve

    def free(self: PrivacyLedger, run: str, round: int, request: str, event: Any, evaluation: Any = None) -> Any:
        return honest(self, run, round, request, event)

    patch.setattr(PrivacyLedger, "reserve", free)


def scores_have_no_noise(patch: Patch) -> None:
    honest = trainer.score

    def bare(engine: Any, units: Any, plan: RunPlan, vector: Any, source: Any, micro_batch: int) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Mechanism, "noise", lambda self, dimension, source: np.zeros(dimension))
            return honest(engine, units, plan, vector, source, micro_batch)

    patch.setattr(client.site, "score", bare)


def the_count_has_no_noise(patch: Patch) -> None:
    honest = Mechanism.noise

    def most(self: Mechanism, dimension: int, source: Any) -> np.ndarray:
        found = honest(self, dimension, source)
        return np.where(np.arange(dimension) > 0, found, 0.0) if self.clip_norm == 1.0 else found

    patch.setattr(Mechanism, "noise", most)


FAULTS: list[tuple[str, str, Callable[[Patch], None]]] = [
    ("a-unit-is-on-one-side", "person", evaluation_units_train_as_well),
    ("a-unit-is-on-one-side", "person", every_tenth_unit_evaluates),
    ("a-unit-is-on-one-side", "record", records_are_split_and_not_persons),
    ("one-unit-moves-a-score-by-its-norm-at-most", "person", loss_is_not_cut),
    ("a-score-is-charged-before-records-are-used", "person", scores_are_not_charged),
    ("a-score-has-fresh-noise-in-every-coordinate", "person", scores_have_no_noise),
    ("a-score-has-fresh-noise-in-every-coordinate", "person", the_count_has_no_noise),
]


@pytest.mark.parametrize(("invariant", "unit", "fault"), FAULTS, ids=lambda each: getattr(each, "__name__", each))
def test_the_tests_find(
    tiny_llama: Path, tmp_path: Path, monkeypatch: Patch, invariant: str, unit: str, fault: Callable[[Patch], None]
) -> None:
    assert INVARIANTS[invariant](tmp_path / "honest", tiny_llama, unit) == ""
    fault(monkeypatch)
    assert INVARIANTS[invariant](tmp_path / "faulty", tiny_llama, unit) != ""


def test_a_person_keeps_the_side_however_the_name_is_spelt_and_whatever_is_added(tiny_llama: Path) -> None:
    rows = rows_of(PEOPLE)
    respelt = [{**row, "person": f" {row['person']} ", "more": 1} for row in rows]
    for by_person in (True, False):
        assert data.identities(rows, TEXT, "person", by_person) == data.identities(respelt, TEXT, "person", by_person)
    assert len(set(data.identities(rows, TEXT, "person", False))) == len(PEOPLE), "both records of a person alike"
    without = data.identities([{**row, "person": None} for row in rows], TEXT, "person", False)
    assert without == data.identities(rows, TEXT, None, False) == data.identities(respelt, TEXT, None, False)


def test_the_closing_exchange_scores_and_trains_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    plan = scored(tiny_llama, mode="local")
    site = SmallSite(tmp_path, plan, epsilon=100.0)
    update, score = site.answer(plan.exchanges)
    assert (update, len(score)) == (b"", 3)
    [charge] = LedgerFile(site.file).charges()
    assert (charge.event.steps, charge.evaluation, charge.round) == (0, 2.0, plan.training.rounds + 1)
    kinds = [open_entry(line).kind for line in LedgerFile(site.file).lines()]
    assert kinds[-2:] == ["reserved", "released"]
