"""The commands that run a deployment: long-running processes, and runs. An entry point, imports late."""

import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedllm.cli_deploy import (
    HEAD_OFFICE,
    OFFICE,
    HeadOfficeOption,
    OfficeOption,
    private,
    report,
    server_app,
    site_app,
)
from fedllm.errors import ConfigError, FederationError, FedllmError
from fedllm.shown import LogLines

if TYPE_CHECKING:
    from client.office import Office
    from fedllm.findings import Finding
    from fedllm.units import Unit

_console = Console()
_POLL, _ASK_FLOWER = 0.5, 15.0  # seconds between looks at a run's progress, and at what Flower says of it
_ENDS = 60.0  # seconds in which a run's process ends
_SYNC = 5.0  # seconds between looks at the roster

_SUBMIT_HELP = """Start a run of the admitted offices and follow it.

OVERRIDES are Hydra's KEY=VALUE, as for simulate, on conf/deployment.yaml; `fedllm submit --cfg` prints every key. The
offices' records, templates and policies are their own; what is public and the same for all is set here.

[bold]Examples[/bold]

  fedllm submit experiment=demo-offices                     the embedded model and its public held-out set

  fedllm submit name=first model=causal-lm model.source=our-base data=heldout data.heldout=./public.jsonl
      data.prompt='{question}' data.text='{answer}' privacy.units_per_site=2000      a model and data of your own

  fedllm submit --resume first                              continue it after whatever ended it
"""


def register(app: typer.Typer) -> None:
    """Add the commands to the main command."""
    app.command("submit", help=_SUBMIT_HELP)(submit)
    app.command("status")(status)
    app.command("stop")(stop)
    app.command("doctor")(doctor)


# ---- long-running processes ------------------------------------------------------------------------------------------


def _say(line: str) -> None:
    typer.echo(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")
    sys.stdout.flush()


@server_app.command("start")
def server_start(home: HeadOfficeOption = HEAD_OFFICE) -> None:
    """Run head office's SuperLink, and let in the nodes of the roster, until stopped."""
    from fedllm.files import locked
    from fedllm.supervisor import Supervisor, until_told
    from server.federation import HeadOffice
    from server.superlink import superlink

    folder = private(home)
    office = HeadOffice.open(folder)
    for warning in office.warnings():
        _say(f"warning: {warning}")
    (folder / "flower").mkdir(mode=0o700, exist_ok=True)
    with locked(folder / "flower"):

        def run(stop: threading.Event) -> None:
            gate = threading.Thread(target=_keep_gate, args=(folder, stop), daemon=True)
            gate.start()
            Supervisor([superlink(office)], _say).run(stop)

        until_told(run)


def _keep_gate(folder: Path, stop: threading.Event) -> None:
    """Tell the SuperLink who may connect, now and whenever the roster changes."""
    from server.federation import HeadOffice
    from server.superlink import Control

    told = None
    while not stop.wait(1.0 if told is None else _SYNC):
        try:
            office = HeadOffice.open(folder)
            if office.roster != told:
                for line in Control(office).sync(office.roster):
                    _say(line)
                if told is None:
                    _say(f"ready: offices connect to {office.config.host}:{office.config.fleet_port}")
                told = office.roster
        except FedllmError as error:
            if told is not None:
                _say(f"warning: {error}")
            told = None


@site_app.command("serve")
def site_serve(home: OfficeOption = OFFICE) -> None:
    """Run the site service alone: for a set-up of two users, where `fedllm site carry` runs as the other."""
    folder = private(home)
    office = _open_office(folder)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogLines())
    logging.basicConfig(handlers=[handler])
    logging.getLogger("fedllm.site").setLevel(logging.INFO)
    from client.service import run
    from fedllm.supervisor import until_told

    until_told(lambda stop: run(office, stop))


@site_app.command("courier")
def site_courier(
    to: Annotated[Path, typer.Argument(help="The courier's folder, made where it is missing.", show_default=False)],
    home: OfficeOption = OFFICE,
) -> None:
    """Write the courier's folder: what `fedllm site carry` needs, and no key that opens a message."""
    from client.supernode import hand_out

    office = _open_office(private(home))
    hand_out(office, to)
    typer.echo(f"{to} is ready. Give it to the courier's user: chown -R USER '{to}'")


@site_app.command("carry")
def site_carry(
    folder: Annotated[Path, typer.Argument(help="The courier's folder.", show_default=False)],
) -> None:
    """Run the SuperNode alone, from a courier's folder, until stopped."""
    from client.supernode import read_courier, supernode
    from fedllm.supervisor import Supervisor, until_told

    folder = private(folder)
    read_courier(folder)
    until_told(Supervisor([supernode(folder, folder / "supernode.log")], _say).run)


@site_app.command("start")
def site_start(home: OfficeOption = OFFICE) -> None:
    """Run the site service and the SuperNode, until stopped."""
    from client.supernode import hand_out, supernode
    from fedllm.files import locked
    from fedllm.supervisor import Child, Supervisor, until_told

    folder = private(home)
    office = _open_office(folder)
    _ = office.declaration  # raises where the service could not start
    courier = folder / "courier"

    hand_out(office, courier)
    given = _stamp(folder)

    def hand_out_anew() -> None:
        nonlocal given
        if (now := _stamp(folder)) != given:
            hand_out(_open_office(folder), courier)
            given = now

    service = [sys.executable, "-m", "fedllm.cli", "site", "serve", "--home", str(folder)]
    with locked(courier):
        children = [
            Child("site service", lambda: service, folder / "log" / "service.log", made_of=lambda: _stamp(folder)),
            supernode(courier, folder / "log" / "supernode.log", hand_out_anew),
        ]
        until_told(Supervisor(children, _say).run)


def _stamp(folder: Path) -> tuple[int, ...]:
    """Return what changes with an office's settings, grant or keys: all of them are replaced as whole files."""
    watched = (folder / "site.yaml", folder / "declaration.json", folder / "grant.json", folder / "keys")
    return tuple(place.stat().st_mtime_ns if place.exists() else 0 for place in watched)


def _open_office(folder: Path) -> "Office":
    """Open an office that has its grant, with the environment that its libraries need."""
    from client.office import Office

    office = Office.open(folder)
    os.environ.update(office.environment)
    _ = office.superlink  # raises where there is no grant yet
    return office


# ---- runs ------------------------------------------------------------------------------------------------------------


def submit(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Hydra overrides, KEY=VALUE.", show_default=False)
    ] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", help="Continue this run where it stopped.", show_default=False)
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Start the run and do not follow it.")] = False,
    cfg: Annotated[bool, typer.Option("--cfg", help="Print the composed configuration and stop.")] = False,
    config_dir: Annotated[
        Path | None, typer.Option("--config-dir", help="A folder with Hydra groups of your own, searched first.")
    ] = None,
    home: HeadOfficeOption = HEAD_OFFICE,
) -> None:
    """Start a run and follow it."""
    from fedllm.cli_settings import as_yaml, compose, validate
    from fedllm.plan import DeploymentConfig

    if resume is not None and (overrides or cfg):
        raise ConfigError("--resume NAME continues a run with its own settings; leave out overrides and --cfg")
    if resume is None:
        composed = compose("deployment", overrides or [], config_dir)
        if cfg:
            typer.echo(as_yaml(composed), nl=False)
            return
        folder = private(home)
        config = validate(DeploymentConfig, composed)
    os.environ.setdefault("TQDM_DISABLE", "1")
    from server import deployment
    from server.checkpoint import CONFIG, read_as
    from server.federation import HeadOffice
    from server.superlink import Control

    if resume is not None:
        folder = private(home)
        earlier = deployment.runs(folder) / resume / CONFIG
        if not earlier.exists():
            raise ConfigError(f"--resume {resume}: there is no such run in {deployment.runs(folder)}")
        config = read_as(earlier, DeploymentConfig).model_copy(update={"resume": True})
    control = Control(HeadOffice.open(folder))
    if not control.reachable():
        raise FederationError("the SuperLink does not answer. Is it running? fedllm server start")
    _console.print("checking model, held-out set and plan ...", highlight=False)
    deployment.prepare(folder, config)
    place = deployment.runs(folder) / config.name
    deployment.hand_over(place, control)
    _console.print(f"run {config.name} is handed to the SuperLink", highlight=False)
    if detach:
        return
    _follow(folder, config.name)


def _follow(home: Path, name: str) -> None:
    from rich.markdown import Markdown

    from fedllm.plan import RunPlan
    from server import deployment
    from server.checkpoint import read_as
    from server.federation import HeadOffice
    from server.rounds import PLAN
    from server.superlink import Control
    from simulations.screen import Screen

    place = deployment.runs(home) / name
    office = HeadOffice.open(home)
    control, position, asked = Control(office), 0, time.monotonic()
    try:
        with Screen(_console) as screen:
            screen.announce(read_as(place / PLAN, RunPlan), [member.site for member in office.roster.active])
            while True:
                state = deployment.read_status(place)
                found, position = deployment.events(place / deployment.PROGRESS, position)
                for event in found:
                    screen.observe(event)
                if not state.open:
                    break
                if state.state == "running" or time.monotonic() - asked > _ASK_FLOWER:
                    deployment.settle(place, control)
                    asked = time.monotonic()
                time.sleep(_POLL)
    except KeyboardInterrupt:
        _console.print(f"the run goes on. Follow it: fedllm status {name} --follow. End it: fedllm stop {name}")
        raise typer.Exit(130) from None
    if state.state == "stopped":
        raise FederationError(f"{state.text} Continue it: fedllm submit --resume {name}")
    text = (place / "summary.md").read_text("utf-8")
    _console.print(Markdown("\n".join(line for line in text.splitlines() if not line.startswith("!["))))  # no plots
    _console.print(f"Everything is in {place}/", highlight=False, soft_wrap=True)


def status(
    name: Annotated[str | None, typer.Argument(help="A run; without one, all.", show_default=False)] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Follow it to its end.")] = False,
    home: HeadOfficeOption = HEAD_OFFICE,
) -> None:
    """Show what became of runs."""
    from server import deployment
    from server.federation import HeadOffice
    from server.superlink import Control

    folder = private(home)
    office = HeadOffice.open(folder)
    if name is not None and follow:
        deployment.read_status(deployment.runs(folder) / name)
        _follow(folder, name)
        return
    table = Table()
    for heading in ("run", "state", "rounds", "epsilon", "held-out loss", "sites of the last round"):
        table.add_column(heading)
    places = deployment.known_runs(folder) if name is None else [deployment.runs(folder) / name]
    for place in places:
        state = deployment.settle(place, Control(office))
        last = deployment.last_round(place)
        cells = ["", "", "", ""]
        if last is not None:
            epsilon = "NOT PRIVATE" if not last.private else f"{last.epsilon:.2f}"
            loss = "" if last.loss is None else f"{last.loss:.4g}"
            cells = [str(last.round), epsilon, loss, ", ".join(last.answered)]
        table.add_row(place.name, state.state, *cells)
    _console.print(table)
    for place in places:
        state = deployment.read_status(place)
        if state.text:
            _console.print(f"{place.name}: {state.text}", markup=False, highlight=False, soft_wrap=True)


def stop(
    name: Annotated[str, typer.Argument(help="The run.", show_default=False)], home: HeadOfficeOption = HEAD_OFFICE
) -> None:
    """End a run where it is; `fedllm submit --resume` goes on from its last round."""
    from fedllm.files import in_use
    from server import deployment
    from server.federation import HeadOffice
    from server.superlink import Control

    folder = private(home)
    place = deployment.runs(folder) / name
    state = deployment.settle(place, control := Control(HeadOffice.open(folder)))
    if not state.open:
        raise ConfigError(f"run {name} has ended already ({state.state})")
    control.stop(state.flower)
    deadline = time.monotonic() + _ENDS
    while in_use(place) and time.monotonic() < deadline:  # until then it cannot be resumed
        time.sleep(_POLL)
    state = deployment.read_status(place)
    if state.state == "completed":
        raise ConfigError(f"run {name} was completed before it could be ended")
    deployment.write_status(place, state.model_copy(update={"state": "stopped", "text": "ended by the operator."}))
    _console.print(f"run {name} is ended. What was done is kept: fedllm submit --resume {name}", highlight=False)


# ---- service managers ------------------------------------------------------------------------------------------------

_UnitsFolder = Annotated[Path, typer.Argument(help="Where to write them.")]
_UNITS = Path("fedllm-units")


@server_app.command("units")
def server_units(folder: _UnitsFolder = _UNITS, home: HeadOfficeOption = HEAD_OFFICE) -> None:
    """Write systemd units, a compose file and rotation of logs for head office."""
    from fedllm import units
    from server.federation import HeadOffice

    home = private(home)
    office = HeadOffice.open(home)
    user = units.owner(home)
    server = units.Unit(
        "fedllm-server", f"Head office of {office.config.name}", ("server", "start", "--home", str(home)), user, (home,)
    )
    _write_units(
        folder, [server], [home / "log" / "*.log"], units.compose([server], {server.name: office.config.fleet_port})
    )


@site_app.command("units")
def site_units(
    folder: _UnitsFolder = _UNITS,
    two_users: Annotated[
        bool, typer.Option("--two-users", help="The site service and the SuperNode under two users, without network "
                           "for the first.")
    ] = False,
    courier_user: Annotated[str, typer.Option("--courier-user", help="The SuperNode's user.")] = "fedllm-courier",
    courier: Annotated[
        Path, typer.Option("--courier", help="The courier's folder, of fedllm site courier.")
    ] = Path("/var/lib/fedllm-courier"),
    home: OfficeOption = OFFICE,
) -> None:  # fmt: skip
    """Write systemd units, a compose file and rotation of logs for an office."""
    from client.office import Office
    from fedllm import units

    home = private(home)
    office = Office.open(home)
    user, group = units.owner(home), office.config.socket_group
    device = office.config.resources.device
    gpu = device.startswith("cuda") or (device == "auto" and Path("/dev/nvidiactl").exists())
    reads = tuple(place for place in office.reads if not place.is_relative_to(home))
    if not two_users:
        site = units.Unit(
            "fedllm-site", f"Site {office.name} of fedllm", ("site", "start", "--home", str(home)), user,
            (home,) if office.socket.is_relative_to(home) else (home, office.socket.parent), reads, group=group,
            devices=gpu,
        )  # fmt: skip
        _write_units(folder, [site], [home / "log" / "*.log"], None)
        return
    if group is None:
        raise ConfigError("site.yaml: two users need socket, such as /run/fedllm/site.sock, and socket_group")
    if user == courier_user:
        raise ConfigError(f"--courier-user={courier_user}: it is the site's user, too; take another")
    units.check_account(courier_user, group)
    place = office.socket.parent
    runtime = str(place.relative_to("/run")) if place.parent == Path("/run") else None
    service = units.Unit(
        "fedllm-site", f"Site service of {office.name}: records, keys, ledger, model",
        ("site", "serve", "--home", str(home)), user, (home,) if runtime else (home, place), reads, group=group,
        runtime=runtime, network=False, devices=gpu,
    )  # fmt: skip
    carrier = units.Unit(
        "fedllm-courier", f"SuperNode of {office.name}: carries sealed bytes",
        ("site", "carry", str(courier)), courier_user, (courier,), hidden=(home, *reads), group=group,
        after=("fedllm-site",),
    )  # fmt: skip
    composed = units.compose([service, carrier], {}, office.socket)
    _write_units(folder, [service, carrier], [home / "log" / "*.log"], composed, courier)


def _write_units(
    folder: Path, all_units: "list[Unit]", logs: list[Path], composed: str | None, courier: Path | None = None
) -> None:
    """Write the files and say what comes next."""
    from fedllm import units

    folder = folder.expanduser().absolute()
    files = {f"{unit.name}.service": units.service(unit) for unit in all_units}
    rotations = [units.rotation(all_units[0].name, all_units[0].user, logs)]
    if courier is not None:
        rotations.append(units.rotation(all_units[1].name, all_units[1].user, [courier / "*.log"]))
    files[f"{all_units[0].name}.logrotate"] = "\n".join(rotations)
    if composed is not None:
        files |= {"compose.yaml": composed, "Dockerfile": units.dockerfile(folder, all_units)}
    for path in units.write(folder, files):
        typer.echo(path)
    names = " ".join(f"{unit.name}.service" for unit in all_units)
    typer.echo(f"Next, as root: cp {folder}/*.service /etc/systemd/system/ && systemctl daemon-reload")
    typer.echo(f"and: systemctl enable --now {names}")


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def doctor(
    home: Annotated[
        Path | None,
        typer.Option(
            "--home", envvar="FEDLLM_HOME", help="Head office's, a site's or a courier's folder.",
            show_default="both that ~/.fedllm may hold",
        ),
    ] = None,
) -> None:  # fmt: skip
    """Look for what is wrong here, and say what to do. Changes nothing; ends with exit code 1 if anything is WRONG.

    Looks at certificates, keys, permissions, clock, ports, disk, versions, the ledger, the running processes and the
    way to the other end.
    """
    places = [private(place) for place in ([HEAD_OFFICE, OFFICE] if home is None else [home])]
    found = [place for place in places if place.is_dir()]
    if not found:
        raise ConfigError(
            f"there is nothing at {' and '.join(map(str, places))}. Give the folder as --home, or make one: fedllm "
            "init-federation, or fedllm site init"
        )
    report([finding for place in found for finding in _examine(place)])


def _examine(folder: Path) -> "list[Finding]":
    """Find out what kind of folder it is, and look at it."""
    if (folder / "federation.yaml").exists() or (folder / "roster.json").exists():
        from server.doctor import examine as look
    elif (folder / "site.yaml").exists() or (folder / "grant.json").exists():
        from client.doctor import examine as look
    elif (folder / "courier.json").exists():
        from client.doctor import examine_courier as look
    else:
        raise ConfigError(
            f"{folder} is neither head office's folder (federation.yaml), nor a site's (site.yaml), nor a courier's "
            "(courier.json), or it may not be read by this user"
        )
    return look(folder)
