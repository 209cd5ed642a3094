"""What a round of many sites costs the server: real links and messages, noise in shares, and no training.

    python -m simulations.benchmarks.masked 50 100000        sites, values

The daemon, the links with their keys and certificates, the envelopes, secure aggregation, the round loop and its record
are the real ones. A site's sum of clipped gradients is zero, and it has no ledger; it masks, deals and reveals. All
sites share two processes here, so their work, which in a federation is done by as many machines, is listed apart.
"""

import asyncio
import hashlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import psutil
import typer

import server.channel
from client.secagg_client import SecAggClient
from client.service import Endpoint
from client.site import Site
from fedllm.adapter_vector import AdapterSpec, TensorSpec
from fedllm.config import PrivacyConfig, QuorumConfig
from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.ops.tls_probe import ONLY_TLS_1_3
from fedllm.plan import RunPlan, default_quorum
from fedllm.privacy.metrics import Layout, metric_names
from fedllm.privacy.randomness import OsRandomness
from fedllm.protocol.messages import (
    MaskedInputRequest,
    Prepare,
    Ready,
    SecAggRequest,
    TrainReply,
    TrainRequest,
    from_bytes,
    pack,
    unpack,
)
from fedllm.protocol.spending_statement import Statement, sign_statement, update_digest
from fedllm.values import parse
from server import deployment
from server.channel import SealedChannel
from server.events import Event, RoundMetrics
from server.federation import HeadOffice
from server.grpc_grid import GrpcGrid
from server.rounds import Coordinator, PublicModel
from server.run_record import RECORD_FILE, RunLog
from simulations.benchmarks.link import Answer, answering, connected, running, used

_PROCESSES = 2  # of the sites
_DIGEST = "0" * 64
_read = cache(PublicIdentity.from_text)


def _peers(roster: Mapping[str, str]) -> dict[str, PublicIdentity]:
    return {name: _read(text) for name, text in roster.items()}


class _Untrained:
    """A site that masks, deals and reveals as every site does, and has no records."""

    def __init__(self, name: str, identity: Identity) -> None:
        self._name, self._identity = name, identity
        self._masks = SecAggClient(name, lambda: identity, _peers)

    def handle(self, request: bytes, stop: threading.Event | None = None) -> bytes:
        del stop
        message = from_bytes(request, Prepare, TrainRequest, SecAggRequest)
        plan = message.plan
        if isinstance(message, SecAggRequest):
            return self._masks.answer(message)
        if isinstance(message, Prepare):
            join = self._masks.join(message)
            return Ready(site=self._name, plan_digest=plan.digest, spec_digest=plan.adapter.targets[0],
                         payload=join).to_bytes()  # fmt: skip
        start, asked = unpack(message.payload, 2)
        mask = from_bytes(asked, MaskedInputRequest, MaskedInputRequest)
        self._masks.check(plan, mask)
        vector, seeds = cast(Any, plan.distributed).upload(np.zeros(len(start) // 4), OsRandomness())
        payload = pack(*self._masks.mask(plan, mask, message.task(start), vector, (seeds,)))
        said = Statement(
            site=self._name, run=plan.run, plan=plan.digest, round=message.round, epsilon=1.0, epsilon_rdp=1.0,
            delta=plan.privacy.delta, ledger_number=message.round, ledger_digest=_DIGEST,
            update=update_digest(payload), roster=message.begun.roster, record_number=message.begun.number,
            record_digest=message.begun.digest, adapter=hashlib.sha256(start).hexdigest(),
        )  # fmt: skip
        return TrainReply(statement=sign_statement(said, self._identity), payload=payload).to_bytes()


@cache
def _head_office(folder: Path) -> PublicIdentity:
    return HeadOffice.open(folder / "head").identity.public


def _answer_of(folder: Path, number: int) -> Answer:
    identity, head = Identity.read(folder / f"{number}.identity"), _head_office(folder)
    site = cast(Site, _Untrained(f"site-{number}", identity))
    return Endpoint(site, [identity], [head], folder / f"{number}.requests").handle


def _plan(sites: int, rounds: int, spec: AdapterSpec) -> RunPlan:
    privacy = PrivacyConfig(mode="distributed", noise_multiplier=1.0, units_per_site=100, sampling_rate=0.1)
    return parse(RunPlan, {
        "run": "benchmark", "seed": 0, "sites": sites, "quorum": default_quorum(privacy, sites),
        "model": {"source": "none"}, "adapter": {"targets": [spec.digest]}, "privacy": privacy.model_dump(),
        "training": {"rounds": rounds},
    })  # fmt: skip


def measure(sites: int, values: int, rounds: int = 4) -> None:
    """Print what rounds of so many sites with vectors of so many values cost.

    The first has two exchanges more, joining and dealing; in the last nothing is dealt for a next one.
    """
    # where all sites share two cores, latecomers are no sign of a fault
    server.channel.PATIENCE = 3600.0
    spec = AdapterSpec(_DIGEST, _DIGEST, 1.0, (TensorSpec("all", (values,)),))
    plan, me = _plan(sites, rounds, spec), psutil.Process()
    rows: list[tuple[float, ...]] = []
    with (
        tempfile.TemporaryDirectory() as name,
        running(Path(name), sites, "simulations.benchmarks.masked", -(-sites // _PROCESSES)) as made,
        GrpcGrid(made.office.socket, 1 << 30) as grid,
    ):
        office = made.office
        connected(grid, sites)
        members = office.roster.active
        record = RunLog(Path(name) / RECORD_FILE, office.identities, {each.site: each.identity for each in members})
        marks = [(time.monotonic(), used(me), used(made.daemon), used(*made.links))]

        def observe(event: Event) -> None:
            if isinstance(event, RoundMetrics) and event.round:
                marks.append((time.monotonic(), used(me), used(made.daemon), used(*made.links)))
                spent = [now - before for now, before in zip(marks[-1], marks[-2], strict=True)]
                rows.append((*spent, event.bytes_up / sites, event.bytes_down / sites))
                memory = [process.memory_info().rss / 1e6 for process in (me, made.daemon)]
                print(
                    f"round {event.round}: {len(event.answered)} sites, {spent[0]:.1f} s; CPU s: run's process "
                    f"{spent[1]:.2f}, daemon {spent[2]:.2f}, a site {spent[3] / sites:.3f}; MB: run's process "
                    f"{memory[0]:.0f}, daemon {memory[1]:.0f}; kB a site: up {rows[-1][4] / 1e3:.0f}, down "
                    f"{rows[-1][5] / 1e3:.0f}", flush=True,
                )  # fmt: skip

        layout = Layout(metric_names(0), 1.0)  # nothing is scored
        model = PublicModel(spec, np.zeros(values, np.float32), lambda _: {"loss": None}, layout)
        member_of = deployment._member(office.roster_file)
        channel = SealedChannel(grid, 3600.0, sites, grid.sites, office.identity, member_of, plan)
        roster = {each.site: each.public for each in members}
        Coordinator(plan, QuorumConfig(round_timeout=3600), model, channel, record, observe, roster=roster).run()
    what = ("s", "CPU s, run's process", "CPU s, daemon", "CPU s, all sites")
    for label, found in zip(what, zip(*(rows[1:-1] or rows), strict=True), strict=False):
        print(f"a later round, {label:<22}{median(found):9.2f}")


if __name__ == "__main__":
    os.umask(0o077)
    os.environ.update(ONLY_TLS_1_3)
    if sys.argv[1] == "links":
        place = Path(sys.argv[2])
        asyncio.run(answering(place, sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), lambda n: _answer_of(place, n)))
    else:
        typer.run(measure)
