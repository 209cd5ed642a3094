"""A run of a deployed federation: prepared by `fedllm submit`, run by the ServerApp in a process of its own.

What needs a model is imported where it is used: to ask what became of a run takes none.
"""

import contextlib
import json
import os
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from flwr.serverapp import Grid
from pydantic import Field

from fedllm.crypto import node_key_line
from fedllm.errors import CheckpointError, ConfigError, FederationError, FedllmError, QuorumLost
from fedllm.files import in_use, write_secret
from fedllm.plan import DeploymentConfig, Frozen, RunPlan
from server.channel import SealedChannel
from server.checkpoint import CONFIG, has_checkpoint, read_as, writing
from server.federation import HeadOffice, Member, Roster
from server.heads import HEADS, Heads
from server.record import RECORD_FILE, RunRecord
from server.rounds import CHECKPOINT, PLAN, Event, Phase, RoundRecord, RoundStarted, SiteAnswered
from server.superlink import RUNS, Control

STATUS, PROGRESS, ERROR = "status.json", "progress.jsonl", "error.txt"
_KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in (Phase, RoundStarted, SiteAnswered, RoundRecord)}


class Status(Frozen):
    """What became of a run, and Flower's number for it."""

    state: Literal["submitted", "running", "completed", "stopped"]
    flower: str = ""
    ticket: str = ""  # by which the run's process finds the folder: the SuperLink and the nodes learn it, not the name
    text: str = Field("", max_length=10_000)  # why it ended early

    @property
    def open(self) -> bool:
        """Whether the run may still go on by itself."""
        return self.state in ("submitted", "running")


def runs(home: Path) -> Path:
    """Return the folder of the runs' folders."""
    return home / RUNS


def read_status(folder: Path) -> Status:
    """Return what became of a run; raises CheckpointError where the folder is none of a run."""
    return read_as(folder / STATUS, Status)


def write_status(folder: Path, status: Status) -> None:
    """Note what became of a run."""
    write_secret(folder / STATUS, status.model_dump_json(indent=2).encode() + b"\n")


def known_runs(home: Path) -> list[Path]:
    """Return the folders of all runs, in the order of their names."""
    place = runs(home)
    return sorted(found.parent for found in place.glob(f"*/{STATUS}")) if place.is_dir() else []


def last_round(folder: Path) -> RoundRecord | None:
    """Return the record of the last completed round."""
    found = [event for event in events(folder / PROGRESS, 0)[0] if isinstance(event, RoundRecord)]
    return found[-1] if found else None


def settle(folder: Path, control: Control) -> Status:
    """Return what became of a run, after a look whether its process still lives.

    Before there is a process Flower is asked; where it does not answer, what is known is returned.
    """
    status = read_status(folder)
    if status.state == "running" and not in_use(folder):
        why = "was ended from outside"
    elif status.state == "submitted" and status.flower:
        try:
            flower = control.state(status.flower)
        except FederationError:
            return status
        if flower in ("pending", "running") or in_use(folder):
            return status
        why = f"ended ({flower})"
    else:
        return status
    status = read_status(folder)  # it may have ended in good order meanwhile
    if status.open:
        text = f"its process at head office {why}; see {folder.parents[1] / 'log' / 'superlink.log'}."
        status = status.model_copy(update={"state": "stopped", "text": text})
        write_status(folder, status)
    return status


def prepare(home: Path, config: DeploymentConfig) -> RunPlan:
    """Make a run's folder and plan, or find those of the run that is resumed.

    Raises ConfigError where the run cannot be, or another plan is meant than the one that is resumed.
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
            changed += differences("federation.weights", earlier.federation.weights, config.federation.weights)
            if changed:
                raise ConfigError(f"resume=true continues the same plan, but these differ: {', '.join(changed)}")
        HeadOfficeRun(config)  # here, where the operator sees what is wrong with model or held-out set
        write_plan(folder, plan, config)
        write_status(folder, Status(state="submitted"))
        write_secret(folder / PROGRESS, b"")
    return plan


def hand_over(folder: Path, control: Control) -> None:
    """Give a prepared run to the SuperLink; raises FederationError, and notes it, where that does not take it."""
    ticket = uuid.uuid4().hex
    write_status(folder, read_status(folder).model_copy(update={"ticket": ticket}))
    try:
        number = control.start(ticket)
    except FederationError as error:
        write_status(folder, Status(state="stopped", text=str(error)))
        raise
    status = read_status(folder)  # its process may have begun already
    write_status(folder, status.model_copy(update={"flower": number}))


def run_of(home: Path, ticket: str) -> str:
    """Return the name of the run that was handed over with this ticket; raises ConfigError where none was."""
    for folder in known_runs(home):
        with contextlib.suppress(CheckpointError):  # another run's folder may be damaged
            if read_status(folder).ticket == ticket:
                return folder.name
    raise ConfigError("this process was started for a run that is not, or no longer, to be run")


def _list(names: list[str]) -> str:
    return ", ".join(names) or "no site"


def run(grid: Grid, home: Path, name: str) -> None:
    """Run what `prepare` prepared, over the sealed channel, and write its outputs."""
    from server.run import HeadOfficeRun, alone_in

    folder = runs(home) / name
    began = time.monotonic()
    config, plan = read_as(folder / CONFIG, DeploymentConfig), read_as(folder / PLAN, RunPlan)
    with alone_in(folder, config):
        status = read_status(folder).model_copy(update={"state": "running"})
        write_status(folder, status)
        office = HeadOffice.open(home)
        channel = SealedChannel(grid, office.identity, _member_of(office.roster_file), plan)
        head_office = HeadOfficeRun(config)
        members = office.roster.active
        record = RunRecord(folder / RECORD_FILE, office.identities, {each.site: each.identity for each in members})
        heads = Heads(home / HEADS)
        roster = {each.site: each.public for each in members}
        coordinator = head_office.begin(plan, folder, _note(folder / PROGRESS), len(members), record, heads, roster)
        stopped = ""
        try:
            coordinator.run(grid, channel)
        except QuorumLost as error:
            stopped = str(error)
        head_office.finish(stopped, {}, time.monotonic() - began)
        write_status(
            folder, status.model_copy(update={"state": "stopped" if stopped else "completed", "text": stopped})
        )


def fail(home: Path, name: str, ticket: str, error: BaseException) -> None:
    """Note that the run handed over with `ticket` ended with an error, unless it is known already why it ended.

    It may have been ended, and be submitted again with another ticket, before its process gets here.
    """
    folder = runs(home) / name
    status = read_status(folder)
    if isinstance(error, FedllmError):
        text = str(error)
    elif isinstance(error, Exception):
        text = f"{type(error).__name__}: {error}"
        write_secret(folder / ERROR, "".join(traceback.format_exception(error)).encode())
    else:
        text = "its process at head office was told to end: by `fedllm stop`, or because the SuperLink ended."
    if status.open and status.ticket == ticket:
        write_status(folder, status.model_copy(update={"state": "stopped", "text": text[:10_000]}))


def _member_of(roster: Path) -> Callable[[bytes], Member | None]:
    """Return a function that looks a node's key up in the roster as it is now."""
    return lambda key: Roster.load(roster).site_of_node_key(node_key_line(key))


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


def home_of_this_process(variable: str) -> Path:
    """Return head office's folder as the SuperLink was told; raises ConfigError where it was not."""
    home = os.environ.get(variable)
    if not home:
        raise ConfigError(f"{variable} is not set: this ServerApp runs under `fedllm server start` only")
    return Path(home)
