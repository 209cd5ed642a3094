"""A run of a deployed federation: prepared by `fedllm submit`, run in a process of its own that the daemon starts.

What needs a model is imported where it is used: to ask what became of a run takes none.
"""

import contextlib
import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from flwr.serverapp import Grid
from pydantic import Field

from fedllm.config import DeploymentConfig
from fedllm.errors import CheckpointError, ConfigError, FederationError, FedllmError, QuorumLost
from fedllm.files import is_locked, stamp, write_secret
from fedllm.plan import RunPlan
from fedllm.values import Frozen
from server.channel import SealedChannel
from server.checkpoint import CONFIG, has_checkpoint, read_as, writing
from server.events import CHECKPOINT, PLAN, Event, Phase, RoundMetrics, RoundStarted, SiteAnswered
from server.federation import HeadOffice
from server.grpc_grid import GrpcGrid, start
from server.ledger_heads import HEADS, LedgerHeads
from server.roster import Roster, RosterEntry
from server.run_record import RECORD_FILE, RunLog

RUNS = "runs"  # folder of the runs' folders
_STARTS = 180.0  # seconds in which a run's process begins, on a machine that is busy
_ENDS, _POLL = 60.0, 0.2  # seconds in which it ends, and between looks at it
_OVERHEAD = 64 << 20  # bytes of a site's answer beside its vector
STATUS, PROGRESS, ERROR = "status.json", "progress.jsonl", "error.txt"
_KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in (Phase, RoundStarted, SiteAnswered, RoundMetrics)}


class Status(Frozen):
    """What became of a run, and which process it is."""

    state: Literal["submitted", "running", "completed", "stopped"]
    process: int = 0
    at: int = 0  # seconds since 1970 UTC: when it was submitted
    text: str = Field("", max_length=10_000)  # why it ended early

    @property
    def open(self) -> bool:
        """Whether the run may still go on by itself."""
        return self.state in ("submitted", "running")


def runs(home: Path) -> Path:
    """Return the folder of the runs' folders."""
    return home / RUNS


def read_status(folder: Path) -> Status:
    """Return what became of a run; raises CheckpointError if the folder is none of a run."""
    return read_as(folder / STATUS, Status)


def write_status(folder: Path, status: Status) -> None:
    """Note what became of a run."""
    write_secret(folder / STATUS, status.model_dump_json(indent=2).encode() + b"\n")


def known_runs(home: Path) -> list[Path]:
    """Return the folders of all runs, in the order of their names."""
    place = runs(home)
    return sorted(found.parent for found in place.glob(f"*/{STATUS}")) if place.is_dir() else []


def last_round(folder: Path) -> RoundMetrics | None:
    """Return the record of the last completed round."""
    found = [event for event in events(folder / PROGRESS, 0)[0] if isinstance(event, RoundMetrics)]
    return found[-1] if found else None


def settle(folder: Path) -> Status:
    """Return what became of a run, after a look whether its process still lives."""
    status = read_status(folder)
    young = status.state == "submitted" and time.time() - status.at < _STARTS
    if not status.open or young or is_locked(folder):
        return status
    status = read_status(folder)  # it may have ended in good order meanwhile
    if status.open:
        text = f"its process at the server was ended from outside; see {folder.parents[1] / 'log' / 'runs.log'}."
        status = status.model_copy(update={"state": "stopped", "text": text})
        write_status(folder, status)
    return status


def prepare(home: Path, config: DeploymentConfig) -> RunPlan:
    """Make a run's folder and plan, or find those of the run that is resumed.

    Raises ConfigError if the run cannot be, or another plan is meant than the one that is resumed.
    """
    from server.run import HeadOfficeRun, alone_in, check_folder, continued, differences, make_plan, write_plan

    names = [member.site for member in HeadOffice.open(home).roster.active]
    folder = runs(home) / config.name
    if config.resume and (folder / PLAN).exists() and not has_checkpoint(folder / CHECKPOINT):
        config = config.model_copy(update={"resume": False})  # ended before any site was asked: it starts over
    check_folder(config, folder)
    unknown = sorted(set(config.federation.weights) - set(names))
    if unknown:
        raise ConfigError(f"federation.weights: {', '.join(unknown)} is not in the roster, which holds {_list(names)}")
    if (config.federation.quorum or 1) > len(names):
        raise ConfigError(
            f"federation.quorum={config.federation.quorum}, but the roster holds {len(names)} sites. Admit more, or "
            "lower the quorum."
        )
    plan = make_plan(config, names)
    with alone_in(folder, config):
        if config.resume:
            before = read_as(folder / PLAN, RunPlan)
            earlier = read_as(folder / CONFIG, DeploymentConfig)
            plan = continued(plan, before)
            changed = differences("", before.model_dump(), plan.model_dump())
            changed += differences("data", earlier.data.model_dump(), config.data.model_dump())
            for key in ("weights", "aggregation"):
                was, now = earlier.federation.model_dump()[key], config.federation.model_dump()[key]
                changed += differences(f"federation.{key}", was, now)
            if changed:
                raise ConfigError(f"resume=true continues the same plan, but these differ: {', '.join(changed)}")
        HeadOfficeRun(config)  # here, where the operator sees what is wrong with model or held-out set
        write_plan(folder, plan, config)
        write_status(folder, Status(state="submitted", at=int(time.time())))
        write_secret(folder / PROGRESS, b"")
    return plan


def hand_over(folder: Path, socket: Path) -> None:
    """Have the daemon start a prepared run; raises FederationError, and notes it, where it does not."""
    try:
        start(socket, folder.name)
    except FederationError as error:
        write_status(folder, Status(state="stopped", text=str(error)))
        raise


def end(folder: Path) -> Status:
    """End a run's process where it is, and return what became of the run; raises ConfigError if it has ended."""
    status = settle(folder)
    if not status.open:
        raise ConfigError(f"run {folder.name} has ended already ({status.state})")
    deadline = time.monotonic() + _ENDS
    told = False
    while (is_locked(folder) or not told) and time.monotonic() < deadline:  # until then it cannot be resumed
        status = read_status(folder)
        if status.process and not told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(status.process, signal.SIGTERM)
            told = True
        time.sleep(_POLL)
    status = read_status(folder)
    if status.state == "completed":
        raise ConfigError(f"run {folder.name} was completed before it could be ended")
    status = status.model_copy(update={"state": "stopped", "text": "ended by the operator."})
    write_status(folder, status)
    return status


def _list(names: list[str]) -> str:
    return ", ".join(names) or "no site"


def run(home: Path, name: str, by: tuple[Grid, Callable[[], dict[int, str]]] | None = None) -> None:
    """Run what `prepare` prepared, in this process; whatever ends it is noted in the run's folder.

    Goes by the daemon, or `by` another grid, with what tells the sites of its nodes. Raises FederationError if
    it has ended with an error.
    """
    from server.run import HeadOfficeRun, alone_in

    folder = runs(home) / name
    began = time.monotonic()
    config, plan = read_as(folder / CONFIG, DeploymentConfig), read_as(folder / PLAN, RunPlan)
    with alone_in(folder, config):
        status = read_status(folder).model_copy(update={"state": "running", "process": os.getpid()})
        write_status(folder, status)
        try:
            office = HeadOffice.open(home)
            head_office = HeadOfficeRun(config)
            members = office.roster.active
            record = RunLog(folder / RECORD_FILE, office.identities, {each.site: each.identity for each in members})
            heads = LedgerHeads(home / HEADS)
            roster = {each.site: each.public for each in members}
            stopped = ""
            with contextlib.ExitStack() as stack:
                if by is None:
                    own = stack.enter_context(GrpcGrid(office.socket, _OVERHEAD + 8 * head_office.dimension))
                grid, sites = by or (own, own.sites)
                channel = SealedChannel(
                    grid, config.federation.round_timeout, len(members), sites, office.identity,
                    _member(office.roster_file), plan,
                )  # fmt: skip
                coordinator = head_office.coordinator(plan, channel, record, _note(folder / PROGRESS), heads, roster)
                try:
                    coordinator.run()
                except QuorumLost as error:
                    stopped = str(error)
            head_office.finish(coordinator, stopped, {}, time.monotonic() - began)
            state = "stopped" if stopped else "completed"
            write_status(folder, status.model_copy(update={"state": state, "text": stopped}))
        except BaseException as error:
            write_status(folder, status.model_copy(update={"state": "stopped", "text": _why(folder, error)[:10_000]}))
            raise


def _why(folder: Path, error: BaseException) -> str:
    """Return why a run ended with an error, its particulars in a file of its own."""
    if isinstance(error, FedllmError):
        return str(error)
    if not isinstance(error, Exception):
        return "its process at the server was told to end."
    write_secret(folder / ERROR, "".join(traceback.format_exception(error)).encode())
    return f"{type(error).__name__}: {error}"


def _member(file: Path) -> Callable[[str], RosterEntry | None]:
    """Return a function that looks a site up in the roster as it is now; it is read again when it was replaced."""
    seen, members = list[tuple[int, int]](), dict[str, RosterEntry]()

    def find(site: str) -> RosterEntry | None:
        nonlocal seen, members
        if (now := stamp(file)) != seen:
            members, seen = {member.site: member for member in Roster.load(file).active}, now
        return members.get(site)

    return find


def _note(path: Path) -> Callable[[Event], None]:
    """Return a function that appends events, for `fedllm submit` to follow."""

    def note(event: Event) -> None:
        line = json.dumps({"event": type(event).__name__, **asdict(event)}, ensure_ascii=False) + "\n"
        with writing(path.parent), path.open("a", encoding="utf-8") as file:
            file.write(line)

    return note


def events(path: Path, start: int) -> tuple[list[Event], int]:
    """Return the events in a progress file from byte `start`, and where to go on."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    whole = data[: data.rfind(b"\n") + 1]  # the last line may still be being written
    found = []
    for line in whole.splitlines():
        values = json.loads(line)
        found.append(_KINDS[values.pop("event")](**values))
    return found, start + len(whole)
