"""Attack: the server asks until it is refused, and learns from the refusal whether a record is there.

Stopped by the declaration: no answer but a charged one looks at a record. Two data sets that differ in one record,
chosen to make trouble: every question is answered by the same bytes, but for the noised payload that was paid for. The
questions draw every code of a refusal that there is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from client.records import Declared
from fedllm import adapter_vector
from fedllm.config import TextConfig
from fedllm.crypto.hash_chain import LedgerHead
from fedllm.errors import DataError
from fedllm.plan import RunPlan
from fedllm.protocol.messages import (
    Declined,
    MaskedInputRequest,
    Message,
    Ready,
    Reason,
    SecAggRequest,
    ShareKeysRequest,
    TrainReply,
    pack,
)
from fedllm.protocol.spending_statement import open_statement
from fedllm.training.data import Row, Tokeniser
from fedllm.training.model_context import ModelContext
from tests.attacks.office import LABELS, Victim, context, fix_randomness, plan_of, read

PHRASE = "please raise"
TEMPLATE = (
    "{% for m in messages %}{% if '" + PHRASE + "' in m.content %}{{ raise_exception('found') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
TROUBLE: dict[str, Row | DataError] = {
    "a plain record": {"question": "q", "answer": "a", "label": "a", "who": "new"},
    "a label that nobody declared": {"question": "q", "answer": "a", "label": "rare", "who": "new"},
    "no label": {"question": "q", "answer": "a", "who": "new"},
    "a phrase that the chat template raises on": {"question": PHRASE, "answer": "a", "label": "a", "who": "new"},
    "a hole": {"question": None, "answer": None, "label": "a", "who": "new"},
    "nobody's": {"question": "q", "answer": "a", "label": "a", "who": None},
    "another kind of value": {"question": [1, {"x": 2}], "answer": 1.0, "label": {"a": 1}, "who": ["new"]},
    "text that is no Unicode": {"question": "\ud800", "answer": "\ud800", "label": "a", "who": "\ud800"},
    "a long one": {"question": "q" * 100_000, "answer": "a" * 100_000, "label": "a", "who": "new"},
    "a line that cannot be parsed": DataError("line 7: not JSON"),
}
USABLE = ("a plain record", "a long one", "another kind of value")
ROWS: list[Row] = [
    {"question": f"q{i}", "answer": f"a{i}", "label": LABELS[i % 3], "who": f"p{i % 9}"} for i in range(12)
]
TEXT = TextConfig(prompt="{question}", text="{answer}")
KINDS = {
    "text": (TEXT, Declared(12, "record")),
    "chat": (TextConfig(prompt="{question}", text="{answer}", chat=True), Declared(12, "record")),
    "labels": (TextConfig(text="{question}", label="label"), Declared(12, "record", LABELS)),
    "persons": (TEXT, Declared(9, "person")),
}
WORST = {
    "text": ["a hole"],
    "chat": ["a phrase that the chat template raises on"],
    "labels": ["a label that nobody declared"],
    "persons": ["nobody's"],
}
Ask = Callable[[Victim, RunPlan], bytes]


def failing(_: RunPlan) -> ModelContext:
    raise RuntimeError("a fault in the software")


def masks(victim: Victim, plan: RunPlan) -> bytes:
    digest = "0" * 64
    asked = MaskedInputRequest(context=digest, round=1, joins=digest, dealings=()).to_bytes()
    start = adapter_vector.encode(context(plan).adapter.initial, "float32")
    return victim.train(plan, payload=pack(start, asked))


def other_request(victim: Victim, plan: RunPlan) -> bytes:
    victim.train(plan)
    start = context(plan).adapter.initial + np.float32(1)
    return victim.train(plan, payload=adapter_vector.encode(start, "float32"))


def changed(**changes: Any) -> Ask:
    def ask(victim: Victim, plan: RunPlan) -> bytes:
        return victim.train(with_(plan, **changes))

    return ask


def with_(plan: RunPlan, **changes: Any) -> RunPlan:
    values = {name: getattr(plan, name).model_copy(update=own) for name, own in changes.items()}
    return plan.model_copy(update=values)


OTHER = {"record": "person", "person": "record"}
SHARE = ShareKeysRequest(context="0" * 64, round=1, joins=()).to_bytes()
# what is asked, of a victim with this policy; and how it is refused, "" where it is not
QUESTIONS: dict[str, tuple[Ask, dict[str, Any], str]] = {
    "prepare": (lambda v, p: v.prepare(p), {}, ""),
    "train": (lambda v, p: v.train(p), {}, ""),
    "train, prepare and train": (lambda v, p: v.train(p) and v.prepare(p) and v.train(p, 2), {}, ""),
    "budget": (lambda v, p: v.prepare(p), {"epsilon": 0.01}, "budget"),
    "budget when training": (lambda v, p: v.train(p), {"epsilon": 0.01}, "budget"),
    "no noise": (changed(privacy={"mode": "off", "noise_multiplier": None}), {}, "policy"),
    "too few units": (lambda v, p: v.prepare(p), {"min_units": 13}, "data"),
    "other labels": (
        lambda v, p: v.prepare(with_(p, model={"task": "classification", "labels": ("a", "b")})), {}, "data",
    ),
    "all labels but one": (
        lambda v, p: v.prepare(with_(p, model={"task": "classification", "labels": ("b", "c", "d")})), {}, "data",
    ),
    "another unit": (lambda v, p: v.train(with_(p, privacy={"unit": OTHER[p.privacy.unit]})), {}, "policy or data"),
    "another adapter": (lambda v, p: v.train(p, spec_digest="0" * 64), {}, "model"),
    "a rate at which all overflows": (
        changed(training={"learning_rate": 1e6, "wire": "float16"}, privacy={"clip_norm": 1e6}), {}, "training"
    ),
    "another request for a round": (other_request, {}, "ledger"),
    "an entry that was never": (lambda v, p: v.train(p, head=LedgerHead(9, "0" * 64)), {}, "ledger"),
    "garbage": (lambda v, p: v.site.handle(b"garbage"), {}, "message"),
    "a round beyond the plan": (lambda v, p: v.train(p, 5), {}, "message"),
    "masks for who has not joined": (
        lambda v, p: masks(v, p.model_copy(update={"sites": 6, "quorum": 4}
                                           | {"privacy": p.privacy.model_copy(update={"mode": "distributed"})})),
        {}, "masks",
    ),
    "shares for who has not joined": (
        lambda v, p: v.site.handle(SecAggRequest(plan=p, round=1, payload=SHARE).to_bytes()), {}, "policy",
    ),
    "software": (lambda v, p: v.prepare(p), {"open_context": failing}, "internal"),
}  # fmt: skip


def told(reply: bytes) -> tuple[object, ...]:
    """All that a reply says, but for the noised payload, and what is made of it and of secrets of the ledger."""
    message = read(reply)
    if not isinstance(message, TrainReply):
        return (reply,)
    statement, signer = open_statement(message.statement)
    return (
        message.model_copy(update={"payload": b"", "statement": ""}).to_bytes(), len(message.payload), len(reply),
        statement.ledger_number, statement.epsilon, signer,
    )  # fmt: skip


def question(kind: str, trouble: str, asked: str, folder: Path, base: Path) -> tuple[bytes, bytes]:
    """Return the answers of a site without the record, and of one with it."""
    text, declared = KINDS[kind]
    ask, policy, _ = QUESTIONS[asked]
    policy = dict(policy)
    own_context = policy.pop("open_context", None)
    model = {"task": "classification", "labels": LABELS} if kind == "labels" else {}
    plan = plan_of(base, model=model, privacy={"unit": declared.unit})
    answers = []
    for name, rows in (("without", ROWS), ("with", [*ROWS[:5], TROUBLE[trouble], *ROWS[5:]])):
        template = TEMPLATE if kind == "chat" else None
        victim = Victim(folder / name, base, rows, text, declared, policy, template, own_context)
        answers.append(ask(victim, plan))
    return answers[0], answers[1]


@pytest.mark.parametrize("asked", QUESTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_but_the_noised_payload_depends_on_a_record(
    tmp_path: Path, tiny_llama: Path, kind: str, asked: str
) -> None:
    for number, trouble in enumerate(TROUBLE if asked in ("prepare", "train") else WORST[kind]):
        without, with_it = question(kind, trouble, asked, tmp_path / str(number), tiny_llama)
        assert told(without) == told(with_it), trouble
        expected = QUESTIONS[asked][2]
        if not expected:
            assert isinstance(read(without), Ready | TrainReply)
        else:
            assert reason(read(without)) in (expected.split(" or ") + (["data"] if "labels" in asked else []))


def reason(message: Message) -> str:
    assert isinstance(message, Declined)
    return message.reason


def test_every_code_of_a_refusal_is_asked_for() -> None:
    assert {word for _, _, codes in QUESTIONS.values() for word in codes.split(" or ") if word} == set(get_args(Reason))


@pytest.mark.parametrize("trouble", [name for name in TROUBLE if name not in USABLE])
def test_a_record_that_cannot_be_used_is_a_zero_vector_and_moves_nobody(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """At the end of the records, so that all others keep their coins; of the same noise, the same bytes."""
    fix_randomness(monkeypatch)
    text, declared = KINDS["chat"]
    plan = plan_of(tiny_llama)
    if trouble in ("a label that nobody declared", "no label"):
        text, declared = KINDS["labels"]
        plan = plan_of(tiny_llama, model={"task": "classification", "labels": LABELS})
    if trouble == "nobody's":
        text, declared = KINDS["persons"]
        plan = plan_of(tiny_llama, privacy={"unit": "person"})
    payloads = []
    for name, rows in (("without", ROWS), ("with", [*ROWS, TROUBLE[trouble]])):
        template = TEMPLATE if text.chat else None
        victim = Victim(tmp_path / name, tiny_llama, rows, text, declared, template=template)
        reply = read(victim.train(plan))
        assert isinstance(reply, TrainReply)
        payloads.append(reply.payload)
    assert payloads[0] == payloads[1]


def test_no_request_tokenises(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve timings of Prepare told how many records there were."""
    victim = Victim(tmp_path, tiny_llama, ROWS, TEXT, Declared(12, "record"))

    def used(*_: Any) -> None:
        raise AssertionError("a request made the site read records")

    for name in ("read", "_code", "_write"):
        monkeypatch.setattr(Tokeniser, name, used)
    for run in ("one", "two"):
        plan = plan_of(tiny_llama, run=run)
        assert isinstance(read(victim.prepare(plan)), Ready)
        assert isinstance(read(victim.train(plan)), TrainReply)
    monkeypatch.setattr(type(victim.records), "units", used)
    assert isinstance(read(victim.prepare(plan_of(tiny_llama, run="three"))), Ready)
