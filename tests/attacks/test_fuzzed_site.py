"""Attack: the server alters every field of every message and plan, their bytes and their order, and looks for a
difference between two sites that are one record apart.

Stopped by the site as a whole: nothing but noised payloads differs, what used records is charged and released, and
neither an exception nor a request without end comes of any bytes.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import random
import resource
import shutil
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import client.site
import fedllm.crypto.primitives
import fedllm.privacy.canaries
import fedllm.privacy.ledger
import fedllm.training.engine
import fedllm.training.self_check
from client.policy import SitePolicy
from client.records import SiteRecords
from client.site import Site
from fedllm import secagg
from fedllm.crypto.hash_chain import LedgerHead
from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.errors import Cancelled, DataError, FedllmError, MessageError, ModelError
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import AccountingEvent
from fedllm.privacy.ledger import LedgerFile, PrivacyLedger, Reservation
from fedllm.privacy.metrics import Layout, metric_names
from fedllm.privacy.split import Side, Split
from fedllm.protocol.messages import (
    _KINDS,
    MAGIC,
    AdvertiseKeys,
    ConsistencySignature,
    Declined,
    KeyShares,
    MaskedInput,
    Message,
    Prepare,
    Ready,
    SecAggRequest,
    ShareKeysRequest,
    TrainReply,
    TrainRequest,
    UnmaskingShares,
    from_bytes,
    pack,
    unpack,
)
from fedllm.protocol.spending_statement import open_statement
from fedllm.training.data import PrivacyUnit
from fedllm.training.model_context import ModelContext, open_for_training
from tests.attacks.office import BEGUN, IDENTITY, LABELS, Victim, plan_of, read
from tests.attacks.test_clip_switched_off import EXTREMES
from tests.attacks.test_refusals import KINDS, ROWS, TEMPLATE, TROUBLE, USABLE
from tests.conftest import SOAK, save_llama

HOUR = float(os.environ.get("FEDLLM_FUZZ_SECONDS", "3600"))  # of CPU, of the long form
MOST_CPU, MOST_MEMORY = 300.0, 1 << 30  # seconds and bytes that one request may take, generously
PEERS = {name: Identity.generate() for name in ("peer 1", "peer 2", "peer 3")}
HEAD = "5ca1ab1e" * 8  # stands for the digest of a site's own newest entry, which is a function of what it released
WORLDS = (
    ("labels", "a label that nobody declared"), ("text", "a long one"), ("persons", "nobody's"),
    ("chat", "a phrase that the chat template raises on"), ("text", "a hole"), ("persons", "a plain record"),
)  # fmt: skip
FEW = ROWS[:6]
Json = dict[str, Any]
Where = tuple[str | int, ...]


# ---- what is sent ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """A request as it should be; `inner` is the message of secure aggregation in it, and `wrap` puts one there."""

    frame: bytes
    inner: bytes = b""
    wrap: Callable[[bytes], bytes] = bytes


Talk = Generator[Ask, bytes, None]
Change = Callable[[Ask], bytes]


def split(frame: bytes) -> tuple[Json, bytes]:
    end = 8 + int.from_bytes(frame[4:8], "big")
    return json.loads(frame[8:end]), frame[end:]


def frame_of(header: bytes, payload: bytes) -> bytes:
    return MAGIC + len(header).to_bytes(4, "big") + header + payload


def with_text(frame: bytes, path: Where, text: str | None) -> bytes:
    """Return a frame in which a value is written as `text`, or is not there; the same where there is no such place."""
    header, payload = split(frame)
    place: Any = header
    try:
        for part in path[:-1]:
            place = place[part]
        if text is None:
            del place[path[-1]]
        else:
            place[path[-1]] = "@here@"
    except (KeyError, IndexError, TypeError):  # of sites that have begun anew, or altered before
        return frame
    written = json.dumps(header, ensure_ascii=False)
    return frame_of(written.replace('"@here@"', text or "").encode(errors="surrogatepass"), payload)


def options(schema: Json, defs: Json) -> Iterator[Json]:
    """Yield the kinds of value that a schema allows."""
    if "$ref" in schema:
        schema = defs[schema["$ref"].rpartition("/")[2]]
    for option in schema.get("anyOf", [schema]):
        if "$ref" in option or "anyOf" in option:
            yield from options(option, defs)
        else:
            yield option


def parts(option: Json, value: Any) -> Iterator[tuple[str | int, str, Json]]:
    """Yield what a value holds: where, how that is called, and its schema; without a value, one of each."""
    for key, schema in option.get("properties", {}).items():
        if value is None or (isinstance(value, dict) and key in value):
            yield key, f".{key}", schema
    inside = option.get("additionalProperties")
    if isinstance(inside, dict):
        for key in ["any"] if value is None else value if isinstance(value, dict) else []:
            yield key, ".{}", inside
    if option.get("type") == "array":
        for index in range(1 if value is None else len(value) if isinstance(value, list) else 0):
            yield index, "[]", option["items"] if "items" in option else option["prefixItems"][index]


def nodes(schema: Json, defs: Json, value: Any, name: str, path: Where = ()) -> Iterator[tuple[Where, str, Json]]:
    """Yield every place in a value, what it is called and its schema."""
    if path:
        yield path, name, schema
    for option in options(schema, defs):
        for key, called, inner in parts(option, value):
            if (path, key) != ((), "payload"):  # which travels behind the header
                yield from nodes(inner, defs, None if value is None else value[key], name + called, (*path, key))


SCHEMAS = {kind: cls.model_json_schema() for kind, cls in _KINDS.items()}
FIELDS = {
    name for kind, schema in SCHEMAS.items() for _, name, _ in nodes(schema, schema.get("$defs", {}), None, kind)
} | {f"{kind}.kind" for kind in _KINDS}  # fmt: skip


def places(frame: bytes) -> list[tuple[Where, str, Json]]:
    header, _ = split(frame)
    kind = header.pop("kind")
    return [
        (("kind",), f"{kind}.kind", {"enum": list(_KINDS)}),
        *nodes(SCHEMAS[kind], SCHEMAS[kind].get("$defs", {}), header, kind),
    ]


def bounds(schema: Json, defs: Json) -> Iterator[str]:
    """Yield values at the bounds of a schema, and just beyond them, as JSON."""
    for option in options(schema, defs):
        yield from map(json.dumps, option.get("enum", [option["const"]] if "const" in option else []))
        kind = option.get("type")
        if kind == "boolean":
            yield from ("true", "false")
        elif kind == "null":
            yield "null"
        elif kind in ("integer", "number"):
            for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
                if (edge := option.get(key)) is not None:
                    steps = (edge - 1, edge + 1) if kind == "integer" else (
                        math.nextafter(edge, -math.inf), math.nextafter(edge, math.inf))  # fmt: skip
                    yield from map(repr, (edge, *steps))
        elif kind == "string":
            most = option.get("maxLength", 64)
            yield from map(json.dumps, ("", "a", "0" * most, "가" * most, "0" * (most + 1), "A" * 64))
        elif kind == "array":
            yield from ("[]", json.dumps([1] * 3), json.dumps(["a"] * (option.get("maxItems", 2) + 1)))


ANYTHING = [
    *EXTREMES, '""', "null", "[]", "{}", "[[]]", '"NaN"', '"\\u0000"', '"\\ud800"', '"\ud800"',
    '"\\u1112\\u1161\\u11ab"',
    json.dumps(" x\n"), json.dumps("../" * 50), json.dumps("x" * 100_000), json.dumps("x" * (1 << 21)), "[" * 100_000,
    "9" * 5000, "1e5000", "-", "0x10", "01", json.dumps([0] * 20_000), '{"a": {"a": 1}}', "false", "1.0", "3",
    '"$(id)"', json.dumps("'; DROP TABLE entry; --"), json.dumps("victim"), json.dumps("\u202e" * 5), "[1, 1]",
]  # fmt: skip
STARTS = (math.nan, math.inf, -math.inf, -0.0, 1e-45, 1e-38, 1e4, -1e4, 10_000.001, 3e38, 1.0)


def garbled(rng: random.Random, frame: bytes) -> bytes:
    """Return a frame with some bytes flipped, cut, swapped, twice or of another start."""
    data, payload = bytearray(frame), 8 + int.from_bytes(frame[4:8], "big")
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if len(data) < 16:
            break
        low = payload if rng.random() < 0.4 and payload + 8 < len(data) else 0
        a, b = sorted(rng.randrange(low, len(data)) for _ in range(2))
        how = rng.randrange(7)
        if how == 0:
            data[a] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[a : min(b, a + rng.choice((1, 4, 64, len(data))))]
        elif how == 2:
            data[a:b] = data[a:b] * 2
        elif how == 3:
            middle = (a + b) // 2
            data[a:b] = data[middle:b] + data[a:middle]
        elif how == 4:
            data[a:a] = rng.randbytes(rng.choice((1, 4, 1000, 1 << 22)))
        elif how == 5:
            data[4:8] = rng.choice((b"\0\0\0\0", b"\xff" * 4, rng.randbytes(4), (len(data) - 8).to_bytes(4, "big")))
        elif payload + 4 <= len(data):
            at = rng.randrange(payload, len(data) - 3)
            data[at : at + 4] = np.float32(rng.choice(STARTS)).tobytes()
    return bytes(data)


# ---- two sites -----------------------------------------------------------------------------------------------------


class Draws:
    """All that is random, and the same for both sites: what differs in their answers, records made."""

    private = True

    def __init__(self) -> None:
        self._label, self._counts = "", Counter[str]()

    def begin(self, label: str) -> None:
        self._label, self._counts = label, Counter()

    def _draw(self, what: str, n: int) -> bytes:
        self._counts[what] += 1
        return hashlib.shake_256(f"{self._label} {what} {self._counts[what]}".encode()).digest(n)

    def secret(self, n: int) -> bytes:
        """Draw for secure aggregation."""
        return self._draw("secret", n)

    def coins(self, n: int) -> bytes:
        """Draw for the ledger."""
        return self._draw("coins", n)

    def canaries(self, n: int) -> bytes:
        """Draw for the attack on a run."""
        return self._draw("canaries", n)

    def begin_noise(self) -> None:
        """Forget what a self-check has drawn, which the second site of a process needs no more."""
        self._counts["noise"] = 0

    def words(self, n: int) -> NDArray[np.uint64]:
        return np.frombuffer(self._draw("noise", 8 * n), "<u8")


class Watched:
    """Records, and what the ledger said whenever one side of them was used."""

    def __init__(self, records: SiteRecords, ledger: Path, draws: Draws) -> None:
        self.declared, self.data_set, self.rule = records.declared, records.data_set, records.rule
        self._records, self._ledger, self._draws = records, ledger, draws
        self.used, self.unpaid = list[RunPlan](), list[RunPlan]()

    def units(self, plan: RunPlan, split: Split, side: Side) -> Sequence[PrivacyUnit]:
        self.used.append(plan)
        if len(self.used) == 1:
            self._draws.begin_noise()
        if not any(
            row[0] == plan.run and row[6] == "RESERVED" and row[3:6] == paid(plan, row[1])[:3]
            and (row[5] if side == "training" else row[12] == plan.evaluation.noise_multiplier)
            for row in charges(self._ledger)
        ):  # fmt: skip
            self.unpaid.append(plan)
        return self._records.units(plan, split, side)


def paid(plan: RunPlan, number: int) -> tuple[object, ...]:
    """Return what an exchange costs: sampling rate, noise and steps of its training, and the noise of its score."""
    rounds, every = plan.training.rounds, plan.evaluation.every
    steps = plan.training.local_steps if number <= rounds else 0
    scores = every is not None and ((number - 1) % every == 0 or number == rounds + 1)
    return (
        plan.privacy.sampling_rate, plan.privacy.noise_multiplier, steps,
        plan.evaluation.noise_multiplier if scores else None,
    )  # fmt: skip


def charges(ledger: Path) -> list[tuple[Any, ...]]:
    """Return run, round, charge, event and state of every charge, what was asked, whether there is a reply, a score."""
    if not ledger.exists():
        return []
    with closing(sqlite3.connect(f"{ledger.as_uri()}?mode=ro", uri=True)) as db:
        return db.execute(
            "SELECT run, round, charge, sampling_rate, noise_multiplier, steps, state, request, tries, account, "
            "reply IS NULL, coins IS NULL, evaluation FROM entry ORDER BY id"
        ).fetchall()


def costs(charge: tuple[Any, ...]) -> bool:
    """Whether a charge is for the use of records: one for the canaries' guesses alone is not."""
    return bool(charge[5]) or charge[12] is not None


def kinds(ledger: Path) -> list[str]:
    if not ledger.exists():
        return []
    with closing(sqlite3.connect(f"{ledger.as_uri()}?mode=ro", uri=True)) as db:
        return [row[0] for row in db.execute("SELECT kind FROM chain ORDER BY number")]


def masked(reply: TrainReply) -> bool:
    """Whether the payload is an upload of secure aggregation: two messages, each after its length."""
    return reply.payload[8:12] == MAGIC


def told(reply: bytes) -> tuple[object, ...]:
    """All that a reply says, but for the noised payload and what is a function of it."""
    message = read(reply)
    if not isinstance(message, TrainReply):
        return (reply,)
    statement, signer = open_statement(message.statement)
    rest: tuple[object, ...] = (len(message.payload),)
    if masked(message):
        sent, following = unpack(message.payload, 2)
        upload = from_bytes(sent, MaskedInput, MaskedInput)
        rest = (len(upload.payload), upload.model_copy(update={"payload": b""}).to_bytes(), following)
    return (
        message.model_copy(update={"payload": b"", "statement": ""}).to_bytes(), len(reply), *rest, signer,
        replace(statement, update="", ledger_digest=""),
    )  # fmt: skip


class Errors(logging.Handler):
    """The faults that a site wrote into its own log."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


class Twins:
    """Two sites, one record apart, that are asked the same."""

    def __init__(
        self, folder: Path, base: Path, world: tuple[str, str], draws: Draws, epsilon: float, self_check: bool
    ) -> None:
        """`self_check`: as by default; it costs more than all else, and uses no record."""
        self.world, self.draws, self.replies, self.number = world, draws, Counter[str](), 0
        self._self_check, self.furthest, self.slowest = self_check, [0.0, 0.0], 0.0  # of an update, of a score
        self._folder, self._base, self._epsilon, self._errors = folder, base, epsilon, Errors()
        self.begin()

    def begin(self) -> None:
        """Start both anew, with nothing spent."""
        self.number += 1
        self._folders = [self._folder / f"{self.number} {name}" for name in ("without", "with")]
        self.restart()

    def restart(self) -> None:
        """End both processes and begin them again: what is on disk is left."""
        kind, trouble = self.world
        text, declared = KINDS[kind]
        policy = SitePolicy(
            epsilon=self._epsilon, unit=declared.unit, reply_quantum=0.0, evaluation_share=0.5, canaries=3,
            peers={name: identity.public.fingerprint for name, identity in PEERS.items()},
        )  # fmt: skip
        self.victims, self.watched = [], []
        for folder, rows in zip(self._folders, (FEW, [*FEW, TROUBLE[trouble]]), strict=True):
            template = TEMPLATE if kind == "chat" else None
            victim = Peer(
                folder, self._base, rows, text, replace(declared, size=100), policy.model_dump(), template,
                self.context, self._self_check,
            )  # fmt: skip
            watched = Watched(victim.records, victim.folder / "ledger.db", self.draws)
            victim.site._records = watched
            self.victims.append(victim)
            self.watched.append(watched)
        if trouble == "a plain record":  # that one world at least has it evaluate; in the others its side is drawn
            one, more = (set(victim.records.identities) for victim in self.victims)
            keys = (hashlib.sha256(b"split %d" % n).digest() for n in itertools.count())
            key = next(key for key in keys if {Split(0.5, key).side(each) for each in more - one} == {"evaluation"})
            for victim in self.victims:
                victim.site._split_key = key

    def context(self, plan: RunPlan) -> ModelContext:
        """As a site opens it; compiling, which takes a minute and looks at no record, has tests of its own."""
        if plan.model.source != str(self._base):
            raise ModelError("site.yaml permits only one model")
        model = plan.model.model_copy(update={"compile": "off"})
        return open_for_training(plan.model_copy(update={"model": model}), model, "cpu", False)

    def plan(self, run: str, mode: str = "local", closes: bool = True, **changes: Any) -> RunPlan:
        """Return a plan that both take part in; one that `closes` has scores and canaries."""
        model: Json = {"max_length": 24}
        if self.world[0] == "labels":
            model |= {"task": "classification", "labels": LABELS}
        whole: Json = {"sites": 4, "quorum": 3} if mode == "distributed" else {"sites": 4}
        values: Json = {
            "model": model, "adapter": {"layers": [0]},
            "privacy": {
                "mode": mode, "unit": KINDS[self.world[0]][1].unit, "epsilon": 1e9, "delta": 1e-5,
                "noise_multiplier": 3.0, "self_check": self._self_check,
            },
            "training": {"rounds": 1000},
        }  # fmt: skip
        if closes:
            values |= {"evaluation": {"every": 2, "noise_multiplier": 3.0}, "canaries": 3, "guesses": 1}
        return plan_of(self._base, run, **whole, **{**values, **changes})

    def head(self) -> LedgerHead | None:
        """Return what both sites' newest entry is called, once there is one."""
        ledger = self.victims[0].folder / "ledger.db"
        return LedgerHead(len(kinds(ledger)) - 1, HEAD) if kinds(ledger) else None

    def ask(self, frame: bytes, patience: int | None = None) -> bytes:
        """Ask both; return the first one's answer. Fails where records made any difference, or a promise is broken.

        Whoever asks waits no more once a site has looked `patience` times: then there may be no answer, b"".
        """
        self.number += 1
        logger = logging.getLogger("fedllm.site")
        found, replies, overflows = [], list[bytes](), 0
        for victim, watched in zip(self.victims, self.watched, strict=True):
            place = victim.folder / "ledger.db"
            own, before, ledger = frame, charges(place), kinds(place)
            if HEAD.encode() in frame:
                own = frame.replace(HEAD.encode(), victim.site.open_ledger().file.head().digest.encode())
            watched.used.clear()
            self._errors.texts.clear()
            self.draws.begin(str(self.number))
            cpu, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            logger.addHandler(self._errors)
            try:
                reply = victim.site.handle(own, None if patience is None else Leaving(patience))
            except Cancelled:
                if patience is None:
                    raise self._fault("given up, and nobody left", frame) from None
                reply = b""
            except Exception as error:
                raise self._fault(f"{error!r} came out of Site.handle: {self._errors.texts}", frame) from error
            finally:
                logger.removeHandler(self._errors)
            cpu = time.process_time() - cpu
            memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
            self.slowest = max(self.slowest, cpu)
            if cpu > MOST_CPU or memory > MOST_MEMORY:
                raise self._fault(f"a request took {cpu:.0f} s and {memory} bytes", frame)
            message, after = read(reply) if reply else None, charges(place)
            if isinstance(message, Declined) and message.reason == "internal":
                raise self._fault(f"a fault in the software: {self._errors.texts}", frame)
            if watched.unpaid:
                raise self._fault(f"records were used, and that is not charged: {after[-3:]}", frame)
            if reply and (watched.used or isinstance(message, TrainReply)):
                self._check_released(place, from_bytes(own, TrainRequest, TrainRequest), reply, frame)
            if isinstance(message, UnmaskingShares) and not any(
                row[1] == message.round and row[6] == "RELEASED" for row in after
            ):
                raise self._fault("shares of a round that is not charged", frame)
            if not watched.used and [row for row in before if costs(row)] != [row for row in after if costs(row)]:
                raise self._fault("charged, and no record was used", frame)
            replies.append(reply)
            overflows += bool(watched.used) and isinstance(message, Declined) and message.reason == "training"
            found.append({
                "reply": told(reply) if reply else None, "charges": after,
                "entries of the ledger": kinds(place)[len(ledger) :], "used": len(watched.used),
            })  # fmt: skip
        for what in found[0]:
            said = [each[what] for each in found]
            # that a noised vector is too large to be sent is a function of it
            if said[0] != said[1] and not (what == "reply" and overflows and self.world[1] in USABLE):
                raise self._fault(f"one record more makes a difference, {what}: {said}", frame)
        if isinstance(message, TrainReply) and not overflows:
            request = from_bytes(own, TrainRequest, TrainRequest)
            self._check_payloads(request, [read(reply).payload for reply in replies])
        self.replies[message.reason if isinstance(message, Declined) else message.KIND if message else "given up"] += 1
        return replies[0]

    def _check_released(self, place: Path, request: TrainRequest, reply: bytes, frame: bytes) -> None:
        run, round_ = request.plan.run, request.round
        with closing(sqlite3.connect(f"{place.as_uri()}?mode=ro", uri=True)) as db:
            row = db.execute(
                "SELECT sampling_rate, noise_multiplier, steps, evaluation, state, reply FROM entry "
                "WHERE run = ? AND round = ? ORDER BY charge DESC LIMIT 1",
                (run, round_),
            ).fetchone()
        if row != (*paid(request.plan, round_), "RELEASED", reply):
            raise self._fault(f"an answer left that is not released: {row and row[:5]}", frame)

    def _check_payloads(self, request: TrainRequest, payloads: list[bytes]) -> None:
        """Of the same noise and coins: a record that cannot be used changes nothing, another no more than the clip.

        And that in the update or in the score, never in both.
        """
        plan, number = request.plan, request.round
        if not plan.privacy.protects:
            raise self._fault("an answer without noise", request.to_bytes())
        if self.world[1] not in USABLE:
            if payloads[0] != payloads[1]:
                raise self._fault("a record that cannot be used changes the update", request.to_bytes())
            return
        scored = paid(plan, number)[3] is not None
        if plan.distributed is not None and number <= plan.masked_exchanges:
            uploads = [np.frombuffer(read(unpack(each, 2)[0]).payload, "<u4") for each in payloads]
            difference = (uploads[0] - uploads[1]).view(np.int32).astype(float)
            end = difference.size - (1 + len(metric_names(len(plan.model.labels))) if scored else 0)
            update, score = difference[:end], difference[end:]
            self._check_moved(request, float(np.linalg.norm(update)) / plan.distributed.scale)
            if plan.distributed_scores is not None:
                self._check_moved(request, float(np.linalg.norm(score)) / plan.distributed_scores.scale, evaluates=True)
            sides = update.any(), score.any()
        else:
            parts = [unpack(each, 2) if scored else (each, b"") for each in payloads]
            self._check_update(request, [update for update, _ in parts])
            one, other = (np.frombuffer(score, "<f8") for _, score in parts)
            moved = float(np.linalg.norm(one - other))
            self._check_moved(request, moved, one.size * plan.score_mechanism.grid, evaluates=True)
            sides = parts[0][0] != parts[1][0], parts[0][1] != parts[1][1]
        if all(sides):
            raise self._fault("one record moves both update and score", request.to_bytes())

    def _check_update(self, request: TrainRequest, payloads: list[bytes]) -> None:
        plan, training, privacy = request.plan, request.plan.training, request.plan.privacy
        if (training.local_steps, training.optimizer) == (1, "sgd") and request.round <= training.rounds:
            start = np.frombuffer(request.payload, "<f4").astype(float)
            one, other = (np.frombuffer(each, training.wire).astype(float) for each in payloads)
            back = plan.expected_units / training.learning_rate / privacy.clip_norm  # to a sum, in clip norms
            digits = {"float32": 2.0**-22, "float16": 2.0**-10}[training.wire]
            off = (np.abs(one) + np.abs(other)) * digits + 2.0**-24 + np.abs(start) * 2.0**-22
            lost = float(np.linalg.norm(off * back + plan.mechanism.grid / privacy.clip_norm))
            self._check_moved(request, float(np.linalg.norm(one - other)) * back, lost)

    def _check_moved(self, request: TrainRequest, moved: float, lost: float = 0.0, evaluates: bool = False) -> None:
        """`moved`, in clip norms, of which `lost` may be rounding."""
        self.furthest[evaluates] = max(self.furthest[evaluates], moved - lost)
        if not moved <= 1 + lost:
            raise self._fault(f"one record moves a sum by {moved} clip norms", request.to_bytes())

    def _fault(self, what: str, frame: bytes) -> AssertionError:
        return AssertionError(f"{what[:6000]}\nworld: {self.world}, request {self.number}: {frame[:3000]!r}")

    def verify(self) -> None:
        for victim in self.victims:
            if (victim.folder / "ledger.db").exists():
                LedgerFile(victim.folder / "ledger.db", victim.folder / "ledger.anchor").verify([IDENTITY.public])


class Leaving(threading.Event):
    """Is set from the look on that comes after so many."""

    def __init__(self, patience: int) -> None:
        super().__init__()
        self._patience = patience

    def is_set(self) -> bool:
        self._patience -= 1
        return self._patience < 0


class Peer(Victim):
    """A site that knows three others."""

    @staticmethod
    def _peers(named: Mapping[str, str]) -> dict[str, PublicIdentity]:
        return {"victim": IDENTITY.public, **{name: identity.public for name, identity in PEERS.items()}}


# ---- an honest server -------------------------------------------------------------------------------------------


def task_of(twins: Twins, plan: RunPlan, number: int) -> TrainRequest:
    adapter = twins.context(plan).adapter
    return TrainRequest(
        plan=plan, round=number, spec_digest=adapter.spec.digest, head=twins.head() if number % 2 else None,
        begun=BEGUN, payload=adapter.initial.astype("<f4").tobytes(),
    )  # fmt: skip


def local_talk(twins: Twins, plan: RunPlan, first: int = 1) -> Talk:
    if isinstance(read((yield Ask(Prepare(plan=plan).to_bytes()))), Ready):
        for number in range(first, plan.exchanges + 1):
            yield Ask(task_of(twins, plan, number).to_bytes())


def shared_talk(twins: Twins, plan: RunPlan, first: int = 1) -> Talk:
    """Rounds in which three others take part, whom the server plays; in the first and every second, one drops out."""

    def secure(message: Message) -> Ask:
        def wrap(inner: bytes) -> bytes:
            return SecAggRequest(plan=plan, round=number, payload=inner).to_bytes()

        return Ask(wrap(message.to_bytes()), message.to_bytes(), wrap)

    roster = {"victim": IDENTITY.public, **{name: identity.public for name, identity in PEERS.items()}}
    session, number = hashlib.sha256(f"{plan.digest} {first}".encode()).hexdigest(), first
    called = {name: identity.to_text() for name, identity in roster.items()}
    ready = read((yield Ask(Prepare(plan=plan, session=session, roster=called).to_bytes())))
    if not isinstance(ready, Ready):
        return
    twins.draws.begin(f"peers {session}")
    params = secagg.SessionParams(plan.digest, session, plan.quorum, plan.privacy.colluding_sites, roster, plan.sites)
    members = {name: secagg.Participant(params, name, identity) for name, identity in PEERS.items()}
    joins = [
        from_bytes(ready.payload, AdvertiseKeys, AdvertiseKeys).join,
        *(member.join.join for member in members.values()),
    ]
    cohort = secagg.make_cohort(params, joins)
    for number in range(first, plan.masked_exchanges + 1):
        twins.draws.begin(f"peers {session} {number}")
        asked = ShareKeysRequest(context=params.context, round=number, joins=cohort.joins)
        dealt = {name: member.share(asked) for name, member in members.items()}
        answer = read((yield secure(asked)))
        if not isinstance(answer, KeyShares):
            return
        dealt["victim"] = answer
        task = task_of(twins, plan, number)
        start, masking = task.payload, secagg.masked_input_request(cohort, number, dealt, "victim").to_bytes()

        def wrap(inner: bytes, task: TrainRequest = task, start: bytes = start) -> bytes:
            return task.model_copy(update={"payload": pack(start, inner)}).to_bytes()

        if not isinstance(read((yield Ask(wrap(masking), masking, wrap))), TrainReply):
            return
        nothing = np.zeros(len(start) // 4, np.uint32)
        for name, member in members.items():
            member.mask(secagg.masked_input_request(cohort, number, dealt, name), task.task(start), nothing)
        common = secagg.common_digest(cohort, number, task.task(start), (dealt[name].dealing for name in sorted(dealt)))
        survivors = sorted(set(dealt) - {"peer 3"} if number % 2 else dealt)
        claim = secagg.consistency_check(cohort, number, common, dealt, survivors)
        consents = [members[name].unmask(claim) for name in survivors if name != "victim"]
        answer = read((yield secure(claim)))
        if isinstance(answer, ConsistencySignature):
            signed = [each for each in (answer, *consents) if isinstance(each, ConsistencySignature)]
            yield secure(secagg.unmasking_request(claim, signed))
    for number in range(plan.masked_exchanges + 1, plan.exchanges + 1):
        yield Ask(task_of(twins, plan, number).to_bytes())


def talk(twins: Twins, plan: RunPlan, first: int = 1) -> Talk:
    return (shared_talk if plan.privacy.mode == "distributed" else local_talk)(twins, plan, first)


def advance(conversation: Talk, reply: bytes | None) -> Ask | None:
    """Return what an honest server asks next; None where it is at an end, or its plan cannot be carried out."""
    try:
        return next(conversation) if reply is None else conversation.send(reply)
    except (StopIteration, FedllmError):
        return None


# ---- a malicious one -------------------------------------------------------------------------------------------------


class Fuzz:
    """Asks two sites what no server would, and counts which fields it altered."""

    def __init__(self, twins: Twins, rng: random.Random, label: str) -> None:
        self.twins, self.rng, self.hits, self._runs = twins, rng, Counter[str](), itertools.count(1)
        self._label, self.trained, self.closed = label, 0, 0

    def run(self) -> str:
        return f"{self._label} {next(self._runs)}"

    def plan(self, mode: str | None = None, closes: bool | None = None, **changes: Any) -> RunPlan:
        if closes is None:
            closes = mode is not None or self.rng.random() < 0.7
        return self.twins.plan(self.run(), mode or self.rng.choice(("local", "distributed")), closes, **changes)

    def text(self, name: str, path: Where, schema: Json, sensible: float) -> str | None:
        """Return something to write in a place; with a chance of `sensible` at the bounds of what belongs there."""
        self.hits[name] += 1
        rng, defs = self.rng, SCHEMAS[name.partition(".")[0]].get("$defs", {})
        edges = list(bounds(schema, defs))
        if edges and rng.random() < sensible:
            return rng.choice(edges)
        how = rng.random()
        if how < 0.05:
            return None
        text = rng.choice(ANYTHING) if how < 0.7 else repr(rng.choice((
            rng.randrange(1, 200), rng.uniform(0, 1), math.ldexp(1.0, rng.randrange(-1074, 1023)), rng.getrandbits(64),
            rng.lognormvariate(0, 3),
        )))  # fmt: skip
        if how > 0.95 and isinstance(path[-1], str):  # the same key twice
            text += f", {json.dumps(path[-1])}: {rng.choice(edges or ANYTHING)}"
        return text

    def try_plan(self, plan: RunPlan, steps: int, *changes: tuple[Where, str | None]) -> None:
        """Alter fields of a plan one after the other, as long as it is one still; then carry it out."""
        ask = advance(talk(self.twins, plan), None)
        assert ask is not None
        frame = ask.frame
        for path, text in changes:
            frame = with_text(frame, path, text)
            try:
                plan = from_bytes(frame, Prepare, Prepare).plan
            except MessageError:
                self.twins.ask(frame)
                return
        self.carry_out(talk(self.twins, plan), steps)

    def carry_out(self, conversation: Talk, steps: int) -> None:
        reply = None
        for _ in range(steps):
            ask = advance(conversation, reply)
            if ask is None:
                return
            reply = self.ask(ask.frame)

    def ask(self, frame: bytes) -> bytes:
        reply = self.twins.ask(frame)
        message = read(reply)
        self.trained += isinstance(message, TrainReply)
        if isinstance(message, Declined) and message.reason == "budget":
            self.twins.verify()
            self.twins.begin()
        return reply

    def at_every_step(self, plan: RunPlan, steps: int, alter: Callable[[Ask], Iterator[Change]]) -> None:
        """Go through an honest run, and send altered requests before each that is honest.

        After one that was not refused, the run begins anew and comes here with another round: things may have changed.
        """
        conversation, first = talk(self.twins, plan), 1
        ask = advance(conversation, None)
        for at in range(steps):
            for change in list(alter(ask)) if ask is not None else []:
                if ask is None or isinstance(read(self.ask(change(ask))), Declined) or at == 0:
                    continue
                first += 2 + 2 * (at // 3)  # odd as before
                conversation = talk(self.twins, plan, first)
                ask = advance(conversation, None)
                for _ in range(at):
                    ask = None if ask is None else advance(conversation, self.ask(ask.frame))
            ask = None if ask is None else advance(conversation, self.ask(ask.frame))

    def at_the_end(self, mode: str, wanted: Callable[[str], bool]) -> None:
        """Alter the request that closes a run; of a new run, once one was not refused. And send it as it is."""
        ask = self.last(mode)
        for change in list(self.altered(ask, wanted, 0.3)) if ask is not None else []:
            if ask is not None and not isinstance(read(self.ask(change(ask))), Declined):
                self.close(ask)
                ask = self.last(mode)
        self.close(ask)

    def last(self, mode: str) -> Ask | None:
        """Go through a run of one round, and return the request that closes it."""
        conversation = talk(self.twins, self.plan(mode, training={"rounds": 1}))
        ask = advance(conversation, None)
        while ask is not None and split(ask.frame)[0].get("round", 0) <= 1:
            ask = advance(conversation, self.ask(ask.frame))
        while ask is not None and split(ask.frame)[0]["kind"] != TrainRequest.KIND:
            ask = advance(conversation, self.ask(ask.frame))
        return ask

    def close(self, ask: Ask | None) -> None:
        self.closed += ask is not None and isinstance(read(self.ask(ask.frame)), TrainReply)

    def altered(self, ask: Ask, wanted: Callable[[str], bool], sensible: float) -> Iterator[Change]:
        """Yield what alters each wanted field, of a request or of the message of secure aggregation in it."""
        for path, name, schema in places(ask.frame):
            if wanted(name):
                text = self.text(name, path, schema, sensible)
                yield lambda ask, path=path, text=text: with_text(ask.frame, path, text)
        for path, name, schema in places(ask.inner) if ask.inner else []:
            if wanted(name):
                text = self.text(name, path, schema, sensible)
                yield lambda ask, path=path, text=text: ask.wrap(with_text(ask.inner, path, text))

    def strangers(self, plan: RunPlan, steps: int, wanted: Callable[[str], bool]) -> None:
        """Send a site what only sites send, altered, as it is and as a step of secure aggregation."""
        answers = list[bytes]()
        conversation = talk(self.twins, plan)
        ask = advance(conversation, None)
        while ask is not None and len(answers) < steps:
            answers.append(self.ask(ask.frame))
            ask = advance(conversation, answers[-1])
        more = list[bytes]()
        for answer in answers:
            message = read(answer)
            if isinstance(message, Ready):
                more.append(message.payload)
            if isinstance(message, TrainReply) and masked(message):
                more += unpack(message.payload, 2)
        declined = Declined(site="victim", reason="budget").to_bytes()
        for frame in [each for each in (*answers, *more, declined) if each]:
            for path, name, schema in places(frame):
                if wanted(name):
                    altered = with_text(frame, path, self.text(name, path, schema, 0.5))
                    self.ask(altered)
                    self.ask(SecAggRequest(plan=plan, round=1, payload=altered).to_bytes())

    def out_of_order(self, steps: int) -> None:
        """Mix two runs, or two plans of one run: early, late, twice, in another round, with the other's plan.

        And leave before there is an answer, or have the sites begin again.
        """
        one = self.plan()
        another = self.rng.choice(({"run": self.run()}, {"seed": 4}, {"quorum": 4}))
        other = one.model_copy(update=another)
        talks = [talk(self.twins, one), talk(self.twins, other)]
        coming: list[Ask | None] = [advance(each, None) for each in talks]
        said = [ask for ask in coming if ask is not None]
        said += [Ask(task_of(self.twins, plan, 1).to_bytes()) for plan in (one, other)]
        for _ in range(steps):
            which, ask = self.rng.randrange(2), self.rng.choice(said)
            if self.rng.random() < 0.05:
                self.twins.restart()
            following = coming[which]
            if following is not None and self.rng.random() < 0.6:
                said.append(following)
                coming[which] = advance(talks[which], self.ask(following.frame))
                continue
            frame, how = ask.frame, self.rng.random()
            header, _ = split(frame)
            if "round" in header and how < 0.3:
                number = self.rng.choice((1, 2, 3, header["round"] + 1, 1000, 1001, 1002))
                frame = with_text(frame, ("round",), str(number))
            elif how < 0.5:
                frame = with_text(frame, ("plan",), json.dumps(self.rng.choice((one, other)).model_dump(mode="json")))
            elif how < 0.7:
                self.twins.ask(frame, patience=self.rng.randrange(4))
                continue
            self.ask(frame)


Made = Callable[..., Fuzz]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer: thousands of requests are answered with it."""
    return save_llama(tmp_path_factory.mktemp("base"), num_hidden_layers=1)


@pytest.fixture
def fuzz(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Return a function that makes two sites and a server to attack them."""
    draws, count = Draws(), itertools.count()
    monkeypatch.setattr(fedllm.crypto.primitives, "random_bytes", draws.secret)
    monkeypatch.setattr(fedllm.privacy.ledger, "random_bytes", draws.coins)
    monkeypatch.setattr(fedllm.privacy.canaries, "random_bytes", draws.canaries)
    monkeypatch.setattr(client.site, "OsRandomness", lambda: draws)
    if not SOAK:  # takes as long as all other checks of the engine
        monkeypatch.delitem(fedllm.training.self_check.CHECKS, "company-changes-no-bit")

    def make(world: tuple[str, str], seed: int, epsilon: float = 1e6, self_check: bool = True) -> Fuzz:
        twins = Twins(tmp_path / str(next(count)), base, world, draws, epsilon, self_check)
        return Fuzz(twins, random.Random(seed), f"run {seed}")

    return make


# ---- the tests -------------------------------------------------------------------------------------------------------


def of_plan(name: str) -> bool:
    return name.startswith("prepare.plan")


@pytest.mark.slow
def test_every_field_of_every_message_and_plan_altered(fuzz: Made) -> None:
    """Each field at least once, in one of the worlds; those of a plan at all their bounds, and carried out."""
    hits, trained, replies, furthest, closed = Counter[str](), 0, Counter[str](), np.zeros(2), 0
    for number, world in enumerate(WORLDS):
        head = fuzz(world, number, self_check=number == 1)
        mine = {
            name for name in FIELDS
            if hashlib.sha256(name.encode()).digest()[0] % len(WORLDS) == number or (number == 0 and ".labels" in name)
        }  # fmt: skip
        (ask,) = itertools.islice(talk(head.twins, head.plan("local")), 1)
        for path, name, schema in places(ask.frame):
            if name in mine and of_plan(name):
                texts = [*bounds(schema, SCHEMAS["prepare"]["$defs"]), head.text(name, path, schema, 0.0)]
                closes = any(each in name for each in ("evaluation", "canaries", "guesses"))
                for at, text in enumerate(texts):  # scores and canaries take as long as all else
                    head.try_plan(head.plan("local", closes or at % 3 == 0), 2, (path, text))
                head.try_plan(head.plan("distributed"), 5, (path, head.text(name, path, schema, 1.0)))
        rest = {name for name in mine if ".plan" not in name}
        for fields in (rest, {name for name in mine if not of_plan(name)} - rest):  # another plan may end a run early
            head.at_every_step(
                head.plan("distributed"), 8,
                lambda ask, head=head, fields=fields: head.altered(ask, fields.__contains__, 0.3),
            )  # fmt: skip
        for mode in ("local", "distributed"):
            head.at_the_end(mode, rest.__contains__)
        head.strangers(head.plan("distributed"), 8, mine.__contains__)
        head.twins.verify()
        hits, trained, replies = hits + head.hits, trained + head.trained, replies + head.twins.replies
        furthest, closed = np.maximum(furthest, head.twins.furthest), closed + head.closed
    empty = {name for name in FIELDS if ".plan.groups[" in name}  # in no plan of two sites; the field itself is altered
    assert FIELDS - empty - set(hits) == set()
    assert trained > 100, "altered plans that two sites carry out"
    assert (furthest > 0.5).all(), "else no record was seen to move a sum, of updates and of scores"
    assert closed > 10, "runs that were closed"
    assert set(replies) > {"message", "policy", "data", "model", "masks", "ledger", "ready", "update"}, (
        "else nothing was tried"
    )


def episode(fuzz: Made, seed: int, steps: int, self_check: bool) -> Fuzz:
    """Attack two sites in one of four ways, for about so many requests."""
    head = fuzz(WORLDS[seed % len(WORLDS)], seed, (1e6, 30.0)[seed // 2 % 2], self_check)
    rng, how, steps_of_a_run = head.rng, seed % 4, head.rng.choice((2, 4, 5, 8))
    if how == 0:
        for _ in range(steps // 4):
            plan = head.plan()
            (ask,) = itertools.islice(talk(head.twins, plan), 1)
            fields = [each for each in places(ask.frame) if of_plan(each[1])]
            some = rng.sample(fields, rng.choice((1, 2, 3, 5)))
            changes = [(path, head.text(name, path, schema, 0.8)) for path, name, schema in some]
            head.try_plan(plan, steps_of_a_run, *changes)
    elif how == 1:
        share = rng.uniform(0, 0.15)
        head.at_every_step(
            head.plan(), steps_of_a_run, lambda ask: head.altered(ask, lambda _: rng.random() < share, rng.random())
        )
        head.strangers(head.plan(), steps_of_a_run, lambda _: rng.random() < share)
    elif how == 2:

        def garble(ask: Ask) -> Iterator[Change]:
            for _ in range(steps // steps_of_a_run):
                seed, inside = rng.getrandbits(32), rng.random() < 0.5
                yield lambda ask, seed=seed, inside=inside: (
                    ask.wrap(garbled(random.Random(seed), ask.inner)) if inside and ask.inner
                    else garbled(random.Random(seed), ask.frame)
                )  # fmt: skip

        head.at_every_step(head.plan(), steps_of_a_run, garble)
    else:
        head.out_of_order(steps)
    head.twins.verify()
    return head


@pytest.mark.slow
def test_bytes_and_order_altered(fuzz: Made) -> None:
    for seed in range(12):
        episode(fuzz, seed, 30, self_check=seed == 0)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_all_of_it_for_an_hour(
    fuzz: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """FEDLLM_FUZZ_SECONDS says how long. What fails names the seed of its `episode`."""
    first, end, furthest, slowest = int.from_bytes(os.urandom(4)), time.process_time() + HOUR, np.zeros(2), 0.0
    tried, fields = Counter[str](), Counter[str]()
    for seed in itertools.count(first):
        if time.process_time() > end:  # by the clock, a busy machine would try next to nothing
            break
        try:
            head = episode(fuzz, seed, 80, self_check=True)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        tried, fields = tried + head.twins.replies, fields + head.hits
        furthest, slowest = np.maximum(furthest, head.twins.furthest), max(slowest, head.twins.slowest)
        caplog.clear()
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)
    said = (
        f"{seed - first} episodes, {len(FIELDS & set(fields))} of {len(FIELDS)} fields altered; one record moved a sum "
        f"of updates by up to {furthest[0]:.3g} clip norms, one of scores by {furthest[1]:.3g}; the slowest request "
        f"took {slowest:.3g} s; answers: {dict(tried)}"
    )
    with capsys.disabled():
        sys.stdout.write(f"\n{said}\n")


# ---- that it can fail ------------------------------------------------------------------------------------------------


def unusable_records_refuse(self: Site, plan: RunPlan) -> None:
    ADMIT(self, plan)
    if any(self._records._records.wrong.values()):
        raise DataError("a record cannot be used")


def free_rounds(self: PrivacyLedger, run: str, round: int, *_: object) -> Reservation:
    return Reservation(run, round, None, bytes(32))


def free_scores(
    self: PrivacyLedger, run: str, round: int, request: str, event: AccountingEvent, evaluation: float | None
) -> Reservation:
    return RESERVE(self, run, round, request, event)


def on_both_sides(self: SiteRecords, split: Split, side: Side) -> Sequence[int]:
    return range(len(self.identities))


def sides_by_number(self: SiteRecords, split: Split, side: Side) -> Sequence[int]:
    units = len(self.identities)
    half = (units + 1) // 2
    return range(half) if side == "evaluation" else range(half, units)


def long_vectors(self: Layout, values: NDArray[np.float64]) -> NDArray[np.float64]:
    return VECTORS(self, values) * 3


def long_records_fail(self: Watched, plan: RunPlan, split: Split, side: Side) -> Sequence[PrivacyUnit]:
    found = UNITS(self, plan, split, side)
    if any(len(record.input_ids) == plan.model.max_length for unit in found for record in unit):
        raise MemoryError
    return found


def unclipped(gradients: torch.Tensor, *_: object) -> torch.Tensor:
    return gradients.double().sum(0)


def reversed_where_one_more(self: Watched, plan: RunPlan, split: Split, side: Side) -> Sequence[PrivacyUnit]:
    found = UNITS(self, plan, split, side)
    return found[::-1] if any(self._records.wrong.values()) else found


ADMIT, UNITS, RESERVE, VECTORS = Site._admit, Watched.units, PrivacyLedger.reserve, Layout.vectors
LONG, ODD = ("text", "a long one"), ("labels", "a label that nobody declared")
FAULTS = {
    "a refusal depends on records": (ODD, Site, "_admit", unusable_records_refuse, "makes a difference, reply"),
    "a charge is missing": (ODD, PrivacyLedger, "reserve", free_rounds, "that is not charged"),
    "an exception depends on records": (LONG, Watched, "units", long_records_fail, "came out of Site.handle"),
    "an answer is not kept": (ODD, PrivacyLedger, "release", lambda *_: None, "left that is not released"),
    "nothing is clipped": (LONG, fedllm.training.engine, "clip_and_sum", unclipped, "moves a sum by"),
    "a score is free": (ODD, PrivacyLedger, "reserve", free_scores, "that is not charged"),
    "a score is not clipped": (LONG, Layout, "vectors", long_vectors, "moves a sum by"),
    "one record trains and evaluates": (LONG, SiteRecords, "_on", on_both_sides, "moves both"),
    "one record changes the others' sides": (LONG, SiteRecords, "_on", sides_by_number, "moves"),
    "one record changes the others": (ODD, Watched, "units", reversed_where_one_more, "changes the update"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fuzz: Made, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    world, where, name, wrong, said = FAULTS[fault]
    head = fuzz(world, 0, self_check=False)

    def attack(times: int) -> None:
        for _ in range(times):  # with another key of the split, so that the record is on both sides in turn
            plan = head.plan("local")
            narrow = plan.privacy.model_copy(update={"clip_norm": 1e-3})
            head.carry_out(talk(head.twins, plan.model_copy(update={"privacy": narrow})), 8)
            head.twins.begin()

    attack(1)
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError, match=said):
        attack(8)
