"""What a round of many sites takes at the server: the real round loop and secure aggregation, and sites of no weight.

    python -m simulations.benchmarks.server_memory 1000 1000000        sites, values

A site here has no records and deals no secrets that would hide anything: its polynomials are constant, it puts on its
own mask and none that cancel, and its vector is zero. So it costs next to nothing, and the server sees messages of the
usual sizes, verifies every signature, and finds the right sum. Sites and server share one process: what it uses beyond
its start is the server's, and a few requests and answers of sites.
"""

import hashlib
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import typer
from flwr.app import Context

from client.app import Handler, client_app
from fedllm import secagg
from fedllm.adapter_vector import AdapterSpec, TensorSpec
from fedllm.config import PrivacyConfig, QuorumConfig
from fedllm.crypto.identity import Identity
from fedllm.crypto.primitives import AgreementKey
from fedllm.crypto.shamir import SHARE
from fedllm.plan import RunPlan
from fedllm.privacy.metrics import Layout, metric_names
from fedllm.protocol.messages import (
    AdvertisedKey,
    AdvertiseKeys,
    ConsistencyCheck,
    KeyShares,
    MaskedInput,
    MaskedInputRequest,
    Message,
    Prepare,
    Ready,
    SecAggRequest,
    ShareKeysRequest,
    SignedMaskKey,
    TrainReply,
    TrainRequest,
    UnmaskingShares,
    from_bytes,
    pack,
    unpack,
)
from fedllm.protocol.spending_statement import Statement, sign_statement, update_digest
from fedllm.secagg.masking import WORD, add_mask, seed_commitment, self_mask_key
from fedllm.secagg.session import SEALED, advertised_key_document, mask_key_document, survivors_digest
from fedllm.values import parse
from server.channel import PlainChannel
from server.events import Event
from server.rounds import Coordinator, PublicModel
from server.run_record import RECORD_FILE, RunLog
from simulations.grid import InProcessGrid

_DIGEST = "0" * 64
_HOUR = 3600.0


class Weightless:
    """All sites of a run, which know one another's secrets."""

    def __init__(self, sites: int) -> None:
        self.identities = {f"site-{number:04d}": Identity.generate() for number in range(sites)}
        self.names = list(self.identities)
        self._roster = {name: identity.public for name, identity in self.identities.items()}
        self._params: secagg.SessionParams | None = None
        self._joins: tuple[AdvertisedKey, ...] = ()

    def connect(self, context: Context) -> Handler:
        """Return how the site of a Flower node answers."""
        name = self.names[int(context.node_config["partition-id"])]
        return lambda request, timeout: self._answer(name, request).to_bytes()

    @cached_property
    def _cohort(self) -> secagg.Cohort:
        if self._params is None:
            raise RuntimeError("no site has joined")
        return secagg.Cohort(self._params, self._joins)

    def _answer(self, name: str, request: bytes) -> Message:
        message = from_bytes(request, Prepare, TrainRequest, SecAggRequest)
        if isinstance(message, Prepare):
            return self._join(name, message)
        if isinstance(message, TrainRequest):
            return self._upload(name, message)
        step = from_bytes(message.payload, ShareKeysRequest, ConsistencyCheck)
        if isinstance(step, ConsistencyCheck):
            seeds = b"".join(_seed(each, step.round).to_bytes(SHARE, "big") for each in step.survivors)
            claim = survivors_digest(self._cohort, step)
            return UnmaskingShares(
                context=step.context, round=step.round, joins=step.joins, site=name, claim=claim, surplus=(),
                payload=seeds,
            )  # fmt: skip
        self._joins = self._joins or step.joins
        return self._shares(name, step.round)

    def _join(self, name: str, request: Prepare) -> Ready:
        plan = request.plan
        self._params = self._params or secagg.SessionParams(
            plan.digest, str(request.session), plan.quorum, plan.privacy.colluding_sites, self._roster, plan.sites
        )
        key = AgreementKey.generate().public
        signature = self.identities[name].sign(advertised_key_document(self._params, name, key))
        own = AdvertisedKey(site=name, key=key.hex(), signature=signature.hex())
        join = AdvertiseKeys(context=self._params.context, join=own).to_bytes()
        return Ready(site=name, plan_digest=plan.digest, spec_digest=plan.adapter.targets[0], payload=join)

    def _shares(self, name: str, number: int) -> KeyShares:
        cohort, key = self._cohort, AgreementKey.generate().public
        commitment = seed_commitment(cohort, number, name, _seed(name, number))
        signature = self.identities[name].sign(mask_key_document(cohort, number, name, key, commitment))
        dealing = SignedMaskKey(site=name, key=key.hex(), commitment=commitment.hex(), signature=signature.hex())
        return KeyShares(
            context=cohort.params.context, round=number, joins=cohort.digest, dealing=dealing,
            payload=bytes(SEALED * (len(self.names) - 1)),
        )  # fmt: skip

    def _upload(self, name: str, request: TrainRequest) -> TrainReply:
        plan, number, cohort = request.plan, request.round, self._cohort
        start, asked = unpack(request.payload, 2)
        mask = from_bytes(asked, MaskedInputRequest, MaskedInputRequest)
        common = secagg.common_digest(cohort, number, request.task(start), mask.dealings)
        vector = np.zeros(len(start) // 4, WORD)
        add_mask(vector, self_mask_key(cohort, number, common, name, _seed(name, number)), 1)
        masked = MaskedInput(
            context=mask.context, round=number, joins=mask.joins, site=name, payload=vector.tobytes()
        ).to_bytes()
        following = self._shares(name, number + 1).to_bytes() if number < plan.masked_exchanges else b""
        payload = pack(masked, following)
        said = Statement(
            site=name, run=plan.run, plan=plan.digest, round=number, epsilon=1.0, epsilon_rdp=1.0,
            delta=plan.privacy.delta, ledger_number=number, ledger_digest=_DIGEST, update=update_digest(payload),
            roster=request.begun.roster, record_number=request.begun.number, record_digest=request.begun.digest,
            adapter=hashlib.sha256(start).hexdigest(),
        )  # fmt: skip
        return TrainReply(statement=sign_statement(said, self.identities[name]), payload=payload)


@lru_cache(maxsize=4096)
def _seed(name: str, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{name} {number}".encode()).digest()[1:], "big")


def play(folder: Path, sites: int, values: int, rounds: int, observe: Callable[[Event], None]) -> Coordinator:
    """Run so many rounds of so many sites with vectors of so many values, and return who asked for them."""
    spec = AdapterSpec(_DIGEST, _DIGEST, 1.0, (TensorSpec("all", (values,)),))
    privacy = PrivacyConfig(mode="distributed", noise_multiplier=1.0, units_per_site=100, sampling_rate=0.1)
    plan = parse(RunPlan, {
        "run": "benchmark", "seed": 0, "sites": sites, "quorum": sites,  # of all: no excess noise to take off
        "model": {"source": "none"}, "adapter": {"targets": [spec.digest]}, "privacy": privacy.model_dump(),
        "training": {"rounds": rounds},
    })  # fmt: skip
    made = Weightless(sites)
    roster = {name: identity.public for name, identity in made.identities.items()}
    score: Callable[[np.ndarray], Mapping[str, float | None]] = lambda _: {"loss": None}  # noqa: E731
    model = PublicModel(spec, np.zeros(values, np.float32), score, Layout(metric_names(0), 1.0))
    grid = InProcessGrid(client_app(made.connect), sites)
    channel, record = PlainChannel(grid, _HOUR, sites), RunLog(folder / RECORD_FILE, [Identity.generate()])
    coordinator = Coordinator(plan, QuorumConfig(round_timeout=_HOUR), model, channel, record, observe, roster=roster)
    coordinator.run()
    return coordinator


def measure(sites: int, values: int, rounds: int = 2) -> None:
    """Print what rounds of so many sites cost the server's process, and what it remembers at most."""
    with tempfile.TemporaryDirectory() as folder:
        play(Path(folder), 3, 3, 1, lambda _: None)  # what has to be imported is
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        done = play(Path(folder), sites, values, rounds, lambda _: None)
    used = resource.getrusage(resource.RUSAGE_SELF)
    counted = [record.round for record in done.records if record.round and not record.lost]
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"{sites} sites, {values} values: rounds {counted} count; {used.ru_maxrss / 1024:.0f} MB at most, "
        f"{before.ru_maxrss / 1024:.0f} at the start; {cpu:.1f} s of CPU with the sites', in "
        f"{time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    typer.run(measure)
