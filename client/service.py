"""A site's process: it alone opens records, keys, ledger and model, and answers what comes over its link.

What it keeps count of stays in its log: it exports no metrics, no health and no reflection.
"""

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from client.link import SiteLink, outside
from client.office import CHECK, Office
from client.records import Declared, SiteRecords, load_records
from client.site import Site
from fedllm.config import ModelConfig
from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.errors import ConfigError, CryptoError, FedllmError, MessageError, ModelError
from fedllm.files import locked, write_secret
from fedllm.plan import RunPlan
from fedllm.privacy.ledger import DataSet, LedgerFile
from fedllm.protocol import sealed_envelope
from fedllm.protocol.link import told_to_end
from fedllm.protocol.messages import Prepare, SecAggRequest, TrainRequest, from_bytes
from fedllm.protocol.sealed_envelope import Binding
from fedllm.training.data import read_rows
from fedllm.training.model import load_reader
from fedllm.training.model_context import ModelContext, open_for_training, use_threads

_log = logging.getLogger("fedllm.site")
_RUNS_KEPT = 1000  # of which the last number is remembered one by one
_DRAIN = 10.0  # seconds for the round that is being trained when the process is told to end
_HOUR = 3600.0  # seconds
_LOOK = 1.0  # seconds between looks whether the folder has changed


class ReplayGuard:
    """The number of the last request of every run, on disk: nothing is answered twice, nor out of order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: dict[str, int] = {}
        self._floor = 0  # what a run that is not remembered must exceed
        if path.exists():
            try:
                state = json.loads(path.read_text("utf-8"))
                self._floor = int(state["floor"])
                self._last = {str(run): int(number) for run, number in state["last"].items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                raise MessageError(
                    f"{path} cannot be read, so requests of before could be answered again. Restore it from a backup; "
                    "the ledger keeps a repeated round from being paid or answered anew, so it may also be removed."
                ) from None

    def check(self, run: str, number: int) -> None:
        """Note a request; raises MessageError if it is not newer than the last of its run."""
        if number <= self._last.get(run, self._floor):
            raise MessageError(f"request {number} of run {run} is not newer than the last: a replay, or out of order")
        self._last.pop(run, None)
        self._last[run] = number  # at the end: the least recent run comes first
        while len(self._last) > _RUNS_KEPT:
            self._floor = max(self._floor, self._last.pop(next(iter(self._last))))
        state = {"floor": self._floor, "last": self._last}
        write_secret(self._path, json.dumps(state, ensure_ascii=False).encode())


class Endpoint:
    """Between socket and site: opens what a pinned server sealed to this site, and seals the site's answer."""

    def __init__(
        self, site: Site, identities: Sequence[Identity], head_office: Sequence[PublicIdentity], replays: Path
    ) -> None:
        """`identities` are the site's own, the present one first; `head_office`: the server's, pinned."""
        self._site, self._identities, self._head_office = site, identities, head_office
        self._replays = ReplayGuard(replays)
        self._lock = threading.Lock()

    def handle(self, sealed: bytes, stop: threading.Event | None = None) -> bytes:
        """Answer one sealed request.

        Raises CryptoError or MessageError, and asks the site nothing, if the request was not sealed to this site by a
        pinned server, is not newer than the last of its run, or its envelope contradicts its content. Raises Cancelled
        as the site does.
        """
        binding, payload, sender = self._open(sealed)
        message = from_bytes(payload, Prepare, TrainRequest, SecAggRequest)
        round_ = 0 if isinstance(message, Prepare) else message.round
        said = Binding(
            direction="to-site", run=message.plan.run, plan=message.plan.digest, round=round_, number=binding.number
        )
        if binding != said:
            raise MessageError("the envelope is bound to another run, round, plan or direction than its message")
        with self._lock:
            self._replays.check(binding.run, binding.number)
        answer = self._site.handle(payload, stop)
        back = {"direction": "to-head-office", "request": sealed_envelope.digest(sealed)}
        return sealed_envelope.seal(answer, binding.model_copy(update=back), self._identities[0], sender)

    def _open(self, sealed: bytes) -> tuple[Binding, bytes, PublicIdentity]:
        for identity in self._identities[1:]:  # sealed to a key that is being replaced
            try:
                return sealed_envelope.open_sealed(sealed, identity, self._head_office)
            except CryptoError:
                continue
        return sealed_envelope.open_sealed(sealed, self._identities[0], self._head_office)


def read_data_set(office: Office) -> DataSet:
    """Return the fingerprint of a site's records as they are now; raises DataError if there are none."""
    data = office.data
    return load_records(
        read_rows(data.train, data.train_split, data), data, data.unit, Declared(1, "record"), {}
    ).data_set


def read_records(office: Office) -> SiteRecords:
    """Read and tokenise a site's records as they are now, for every model that plans may name.

    Raises ConfigError if their owner has not declared what they are, or something else was declared than is found.
    """
    data, declaration = office.data, office.declaration
    readers = {name: load_reader(office.model(ModelConfig(source=name))) for name in office.config.models}
    for name, reader in readers.items():
        if declaration.tokenizers[name] != reader.digest:
            raise ConfigError(f"models: {name} reads text in another way than when it was checked. {CHECK}")
        if declaration.files.get(name) != office.files_digest(ModelConfig(source=name)):
            raise ConfigError(f"models: {name} has other files than when it was checked. {CHECK}")
    found = load_records(read_rows(data.train, data.train_split, data), data, data.unit, declaration.declared, readers)
    for name, wrong in found.wrong.items():
        if wrong:
            _log.warning("%s: %d records cannot be used, and contribute nothing. %s", name, len(wrong), CHECK)
    return found


def open_site(office: Office) -> Site:
    """Return the Site that a folder configures: its records are read and tokenised now, and not again."""
    resources, declared = office.config.resources, office.declaration.files

    def context(plan: RunPlan) -> ModelContext:
        # every time: files may be exchanged while the site runs, and a plan may name another revision of them
        if declared.get(plan.model.source) != office.files_digest(plan.model):
            raise ModelError(
                f"model.source={plan.model.source}, revision={plan.model.revision}: its files are not those that were "
                f"checked. {CHECK}"
            )
        return open_for_training(plan, office.model(plan.model), resources.device, resources.checkpointing)

    return Site(
        office.name, office.policy, office.ledger, lambda: office.identity, context, read_records(office),
        resources.micro_batch, office.peers if office.config.policy.peers else None,
    )  # fmt: skip


def run(office: Office) -> bool:
    """Answer the server until SIGTERM or SIGINT; True if the folder has changed, and it is to be opened anew.

    Raises FedllmError if the site cannot start.
    """
    began, stamp = time.monotonic(), office.stamp()  # before the records are read, which takes its time
    use_threads(office.config.resources.threads)
    data = office.ledger_file.parent
    data.mkdir(mode=0o700, exist_ok=True)
    office.link_state_file.parent.mkdir(mode=0o700, exist_ok=True)
    with locked(data):  # two at once would answer from two memories
        ledger = _open_ledger(office)
        site = open_site(office)
        site.open_ledger()
        endpoint = Endpoint(site, office.identities, office.coordinators, data / "requests.json")
        quantum, elapsed = office.policy.reply_quantum, time.monotonic() - began
        _log.info("its records took %.2f s to read", elapsed)
        return asyncio.run(_answer(office, endpoint, ledger, stamp, _until_start(elapsed, quantum)))


def _until_start(elapsed: float, quantum: float) -> float:
    """Return the seconds until 1, 2, 4, 8 ... quanta have passed since the process began to read its records.

    The server sees when a site leaves, and when it is there again. So that tells of the time that all records take to
    read only within how many doublings of a quantum it lies.
    """
    while 0 < quantum < elapsed:
        quantum *= 2
    return max(0.0, quantum - elapsed)


async def _answer(
    office: Office, endpoint: Endpoint, ledger: LedgerFile, stamp: tuple[object, ...], pause: float
) -> bool:
    """Answer after `pause` seconds, and until told to end or the folder has changed."""
    stop = told_to_end()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), pause)
    limit = office.config.resources.max_message_mb << 20
    link = SiteLink(*way(office), endpoint.handle, limit, office.link_state_file)
    keeping = asyncio.create_task(_keep_time(ledger))
    running = asyncio.create_task(link.run(stop))
    _log.info("%s is ready", office.name)
    changed = False
    while not running.done():
        await asyncio.wait((running,), timeout=_LOOK)
        if office.stamp() != stamp and not link.busy:
            _log.info("its keys or settings have changed: the site starts anew")
            changed = True
            stop.set()
            await asyncio.wait((running,))
    keeping.cancel()
    await link.drained(_DRAIN)
    running.result()
    return changed


async def _keep_time(ledger: LedgerFile) -> None:
    """See to it that the evidence of how much time has passed is never old."""
    while True:
        await asyncio.sleep(_HOUR)
        try:
            await asyncio.to_thread(ledger.look_at_clock)
        except FedllmError as error:
            _log.warning("%s", error)


def way(
    office: Office,
) -> tuple[str, Callable[[], grpc.ChannelCredentials | None], Callable[[], str]]:
    """Return how a site connects: where to, with which credentials, and what explains that it does not."""
    if office.socket is not None:
        socket = office.socket
        return f"unix:{socket}", lambda: None, lambda: "" if socket.exists() else f"no relay listens on {socket}"
    link, ca = office.in_use.link_file, office.ca_file
    return outside(office.address, ca, link)


def _open_ledger(office: Office) -> LedgerFile:
    """Return the ledger; raises LedgerError if it is lost, so that the owner sees it and not a plan's reply."""
    for text in office.ledger.warnings():
        _log.warning("%s", text)
    ledger = LedgerFile(office.ledger.file, office.ledger.anchor, create=True)
    ledger.look_at_clock()
    return ledger
