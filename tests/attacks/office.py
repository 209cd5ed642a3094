"""A real site on real records, and the questions that the server can put to it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

import client.site
import fedllm.privacy.ledger
from client.policy import widest
from client.records import Declared, SiteRecords, load_records
from client.site import Site
from fedllm import adapter_vector
from fedllm.config import ModelConfig, TextConfig
from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.errors import DataError
from fedllm.plan import RunPlan
from fedllm.privacy.ledger_place import LedgerPlace
from fedllm.privacy.randomness import SeededRandomness
from fedllm.protocol.messages import Message, Prepare, RoundBegun, TrainRequest, from_bytes
from fedllm.training.data import Row
from fedllm.training.model import Reader, load_reader
from fedllm.training.model_context import ModelContext, open_context
from fedllm.values import parse

BEGUN = RoundBegun(roster="a" * 64, number=1, digest="b" * 64)

IDENTITY = Identity.generate()
LABELS = ("a", "b", "c")


def plan_of(base: Path, run: str = "run", **changes: Any) -> RunPlan:
    """Return a plan for the tiny model; `changes` are whole sections' values."""
    values: dict[str, Any] = {
        "run": run, "seed": 3, "quorum": 3,
        "model": {"source": str(base), "max_length": 32},
        "adapter": {"rank": 2, "targets": ["q_proj", "v_proj"]},
        "privacy": {
            "mode": "local", "unit": "record", "epsilon": 8.0, "delta": 1e-3, "clip_norm": 1.0, "sampling_rate": 0.5,
            "units_per_site": 24, "noise_multiplier": 1.5, "self_check": False,
        },
        "training": {"rounds": 4, "local_steps": 1, "learning_rate": 0.1, "wire": "float32"},
    }  # fmt: skip
    for section, own in changes.items():
        values[section] = {**values.get(section, {}), **own} if isinstance(own, dict) else own
    return parse(RunPlan, values)


@dataclass
class Victim:
    """A site with its records; every one of its requests is the server's."""

    folder: Path
    base: Path
    rows: Sequence[Row | DataError]
    text: TextConfig
    declared: Declared
    policy: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None  # of chat
    open_context: Callable[[RunPlan], ModelContext] | None = None
    self_check: bool = False
    records: SiteRecords = field(init=False)
    site: Site = field(init=False)

    def __post_init__(self) -> None:
        found = load_reader(ModelConfig(source=str(self.base)))
        tokenizer: PreTrainedTokenizerBase = found.tokenizer
        tokenizer.chat_template = self.template
        reader = Reader(tokenizer, found.positions, found.vocabulary, found.digest)
        self.records = load_records(self.rows, self.text, "who", self.declared, {str(self.base): reader})
        limits = {
            "epsilon": 8.0, "delta": 1e-3, "unit": self.declared.unit, "allow_unprotected": False, **self.policy,
        }  # fmt: skip
        place = LedgerPlace(self.folder / "ledger.db", self.folder / "ledger.anchor")
        self.site = Site(
            "victim", widest(**limits), place, lambda: IDENTITY,
            self.open_context or context, self.records, 8, self._peers, self.self_check,
        )  # fmt: skip

    @staticmethod
    def _peers(named: Mapping[str, str]) -> dict[str, PublicIdentity]:
        return {"victim": IDENTITY.public}

    def prepare(self, plan: RunPlan) -> bytes:
        return self.site.handle(Prepare(plan=plan).to_bytes())

    def train(self, plan: RunPlan, round_: int = 1, **changes: Any) -> bytes:
        return self.site.handle(request(plan, round_, **changes))


def context(plan: RunPlan) -> ModelContext:
    return open_context(plan.model, plan.adapter, plan.seed, "cpu")


def request(plan: RunPlan, round_: int = 1, **changes: Any) -> bytes:
    adapter = context(plan).adapter
    values = {
        "plan": plan, "round": round_, "spec_digest": adapter.spec.digest, "head": None,
        "payload": adapter_vector.encode(adapter.initial, "float32"), "begun": BEGUN,
    }  # fmt: skip
    return TrainRequest(**{**values, **changes}).to_bytes()


def read(reply: bytes) -> Message:
    return from_bytes(reply, Message, Message)


def fix_randomness(patch: pytest.MonkeyPatch) -> None:
    """Let all sites draw the same coins and the same noise, so that nothing but records tells two replies apart."""

    class Fixed(SeededRandomness):
        private = True

        def __init__(self) -> None:
            super().__init__(1)

    patch.setattr(client.site, "OsRandomness", Fixed)
    patch.setattr(fedllm.privacy.ledger, "random_bytes", bytes)
