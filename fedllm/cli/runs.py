"""Long-running processes, runs, service files and `fedllm doctor`. An entry point, imports late."""

import logging
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedllm.cli.enrolment import (
    HEAD_OFFICE,
    OFFICE,
    SERVING,
    HeadOfficeOption,
    OfficeOption,
    absolute,
    private,
    report,
    server_app,
    site_app,
)
from fedllm.errors import ConfigError, FederationError
from fedllm.ops.tls_probe import ONLY_TLS_1_3
from fedllm.shown import LogLines

if TYPE_CHECKING:
    from client.office import Office
    from fedllm.ops.health_checks import CheckResult
    from fedllm.ops.service_files import ServiceSpec

_console = Console()
_POLL = 0.5  # seconds between looks at a run's progress

_SUBMIT_HELP = """Start a run of the admitted sites and follow it.

OVERRIDES are Hydra's KEY=VALUE, as for simulate, on conf/deployment.yaml; `fedllm submit --cfg` prints every key. The
sites' records, templates and policies are their own; what is public and the same for all is set here.

[bold]Examples[/bold]

  fedllm submit experiment=demo-offices      the embedded model

  fedllm submit name=first model=causal-lm model.source=our-base data=heldout
      data.heldout=./public.jsonl data.prompt='{question}' data.text='{answer}'
      privacy.units_per_site=2000   your own model and data

  fedllm submit --resume first               after an interruption
"""


def register(app: typer.Typer) -> None:
    """Add the commands to the main command."""
    app.command("submit", help=_SUBMIT_HELP)(private(submit))
    app.command("status")(private(status))
    app.command("stop")(private(stop))
    app.command("doctor")(private(doctor))


# ---- long-running processes ------------------------------------------------------------------------------------------


def _say(line: str) -> None:
    typer.echo(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")
    sys.stdout.flush()


@server_app.command("start")
def server_start(home: HeadOfficeOption = HEAD_OFFICE) -> None:
    """Run the server's daemon, to which sites connect and which starts runs, until stopped.

    Runs that are under way go on without it, and find it again.
    """
    os.environ.update(ONLY_TLS_1_3)
    import asyncio

    from fedllm.files import locked
    from server.daemon import serve
    from server.federation import HeadOffice

    folder = absolute(home)
    office = HeadOffice.open(folder)
    _log_to(folder / "log" / "server.log")
    for warning in office.warnings():
        _say(f"warning: {warning}")
    (folder / "run").mkdir(mode=0o700, exist_ok=True)
    with locked(folder / "run"):
        asyncio.run(serve(folder, _say))


@server_app.command("run", hidden=True)
def server_run(
    name: Annotated[str, typer.Argument(help="A prepared run.", show_default=False)],
    home: HeadOfficeOption = HEAD_OFFICE,
) -> None:
    """Run what `fedllm submit` prepared: the daemon's command."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    from server import deployment

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    deployment.run(absolute(home), name)


@site_app.command("start")
def site_start(home: OfficeOption = OFFICE) -> None:
    """Run the site until stopped: connect to the server and answer it, within what site.yaml permits."""
    os.environ.update(ONLY_TLS_1_3)
    folder = absolute(home)
    office = _open_office(folder)
    _ = office.declaration  # raises if the site could not start
    _log_to(folder / "log" / "site.log")
    from client.service import run

    if run(office):
        os.execv(sys.executable, [sys.executable, "-m", "fedllm.cli", "site", "start", "--home", str(folder)])  # noqa: S606


@site_app.command("export-relay")
def site_export_relay(
    to: Annotated[Path, typer.Argument(help="The relay's folder, made if it is missing.", show_default=False)],
    home: OfficeOption = OFFICE,
) -> None:
    """Write the relay's folder: what `fedllm site relay` needs, and no key that opens a message."""
    from client.relay import export_relay_folder

    export_relay_folder(_open_office(absolute(home)), to)
    typer.echo(f"{to} is ready. Give it to the relay's user: chown -R USER '{to}'")


@site_app.command("relay")
def site_relay(
    folder: Annotated[Path, typer.Argument(help="The relay's folder.", show_default=False)],
) -> None:
    """Run the relay, through which a site process without network connects, until stopped."""
    os.environ.update(ONLY_TLS_1_3)
    import asyncio

    from client.relay import read_relay, serve

    folder = absolute(folder)
    read_relay(folder)
    _log_to(folder / "relay.log")
    asyncio.run(serve(folder))


def _log_to(file: Path) -> None:
    """Write log lines to a file and to the screen."""
    file.parent.mkdir(mode=0o700, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(file, encoding="utf-8"), logging.StreamHandler()]
    for handler in handlers:
        handler.setFormatter(LogLines())
    logging.basicConfig(handlers=handlers)
    logging.getLogger("fedllm").setLevel(logging.INFO)


def _open_office(folder: Path) -> "Office":
    """Open a site that has its grant, with the environment that its libraries need."""
    from client.office import Office

    office = Office.open(folder)
    os.environ.update(office.environment)
    _ = office.address  # raises if there is no grant yet
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
    only_prepare: Annotated[
        bool, typer.Option("--prepare", help="Do not start it: Flower's own SuperLink will. See docs/flower.md.")
    ] = False,
    cfg: Annotated[bool, typer.Option("--cfg", help="Print the composed configuration and stop.")] = False,
    config_dir: Annotated[
        Path | None, typer.Option("--config-dir", help="A folder with Hydra groups of your own, searched first.")
    ] = None,
    home: HeadOfficeOption = HEAD_OFFICE,
) -> None:
    """Start a run and follow it."""
    from fedllm.cli.hydra_config import as_yaml, compose, validate
    from fedllm.config import DeploymentConfig

    if resume is not None and (overrides or cfg):
        raise ConfigError("--resume NAME continues a run with its own settings; leave out overrides and --cfg")
    if resume is None:
        composed = compose("deployment", overrides or [], config_dir)
        if cfg:
            typer.echo(as_yaml(composed), nl=False)
            return
        folder = absolute(home)
        config = validate(DeploymentConfig, composed)
    os.environ.setdefault("TQDM_DISABLE", "1")
    from server import deployment
    from server.checkpoint import CONFIG, read_as
    from server.federation import HeadOffice
    from server.grpc_grid import look

    if resume is not None:
        folder = absolute(home)
        earlier = deployment.runs(folder) / resume / CONFIG
        if not earlier.exists():
            raise ConfigError(f"--resume {resume}: there is no such run in {deployment.runs(folder)}")
        config = read_as(earlier, DeploymentConfig).model_copy(update={"resume": True})
    socket = HeadOffice.open(folder).socket
    if not only_prepare:
        look(socket)  # raises if no daemon runs
    _console.print("checking model, held-out set and plan ...", highlight=False)
    deployment.prepare(folder, config)
    place = deployment.runs(folder) / config.name
    if only_prepare:
        _console.print(f"run {config.name} is prepared in {place}", highlight=False, soft_wrap=True)
        return
    deployment.hand_over(place, socket)
    _console.print(f"run {config.name} is started", highlight=False)
    if detach:
        return
    _follow(folder, config.name)


def _follow(home: Path, name: str) -> None:
    from rich.markdown import Markdown

    from fedllm.cli.live_view import Screen
    from fedllm.plan import RunPlan
    from server import deployment
    from server.checkpoint import read_as
    from server.events import PLAN
    from server.federation import HeadOffice

    place = deployment.runs(home) / name
    office = HeadOffice.open(home)
    position = 0
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
                deployment.settle(place)
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
    """Show runs: how far they are, what they spent, and which sites answered."""
    from fedllm.cli.live_view import score_of
    from server import deployment
    from server.federation import HeadOffice

    folder = absolute(home)
    HeadOffice.open(folder)
    if name is not None and follow:
        deployment.read_status(deployment.runs(folder) / name)
        _follow(folder, name)
        return
    table = Table()
    for heading in ("run", "state", "rounds", "epsilon", "held-out loss", "at the sites", "sites of the last round"):
        table.add_column(heading)
    places = deployment.known_runs(folder) if name is None else [deployment.runs(folder) / name]
    for place in places:
        state = deployment.settle(place)
        last = deployment.last_round(place)
        cells = [""] * 5
        if last is not None:
            epsilon = "NOT PRIVATE" if not last.private else f"{last.epsilon:.2f}"
            loss = "" if last.loss is None else f"{last.loss:.4g}"
            cells = [str(last.round), epsilon, loss, score_of(last), ", ".join(last.answered)]
        table.add_row(place.name, state.state, *cells)
    _console.print(table)
    for place in places:
        state = deployment.read_status(place)
        if state.text:
            _console.print(f"{place.name}: {state.text}", markup=False, highlight=False, soft_wrap=True)


def stop(
    name: Annotated[str, typer.Argument(help="The run.", show_default=False)], home: HeadOfficeOption = HEAD_OFFICE
) -> None:
    """Stop a run; `fedllm submit --resume` goes on from its last round."""
    from server import deployment

    deployment.end(deployment.runs(absolute(home)) / name)
    _console.print(f"run {name} is ended. What was done is kept: fedllm submit --resume {name}", highlight=False)


# ---- service managers ------------------------------------------------------------------------------------------------

_UnitsFolder = Annotated[Path, typer.Argument(help="Where to write them.")]
_UNITS = Path("fedllm-units")


@server_app.command("units")
def server_units(folder: _UnitsFolder = _UNITS, home: HeadOfficeOption = HEAD_OFFICE) -> None:
    """Write systemd units, a compose file and rotation of logs for the server."""
    from fedllm.ops import service_files
    from server.federation import HeadOffice

    home = absolute(home)
    office = HeadOffice.open(home)
    user = service_files.owner(home)
    server = service_files.ServiceSpec(
        "fedllm-server", f"The server of {office.config.name}", ("server", "start", "--home", str(home)), user,
        (home,), leaves=True,
    )  # fmt: skip
    write_units(
        folder, [server], [home / "log" / "*.log"], service_files.compose([server], {server.name: office.config.port})
    )


@site_app.command("units")
def site_units(
    folder: _UnitsFolder = _UNITS,
    one_user: Annotated[
        bool, typer.Option("--one-user", help="No relay: the site's own process has the network.")
    ] = False,
    relay_user: Annotated[str, typer.Option("--relay-user", help="The relay's user.")] = "fedllm-relay",
    relay: Annotated[Path, typer.Option("--relay", help="The relay's folder, of fedllm site export-relay.")] = Path(
        "/var/lib/fedllm-relay"
    ),
    home: OfficeOption = OFFICE,
) -> None:
    """Write systemd units, a compose file and rotation of logs for a site: a site without network, and its relay."""
    from client.office import Office
    from fedllm.ops import service_files

    home = absolute(home)
    office = Office.open(home)
    user, group = service_files.owner(home), office.config.socket_group
    device = office.config.resources.device
    gpu = device.startswith("cuda") or (device == "auto" and Path("/dev/nvidiactl").exists())
    reads = tuple(place for place in office.reads if not place.is_relative_to(home))
    site = service_files.ServiceSpec(
        "fedllm-site", f"Site {office.name}: records, keys, ledger, model", ("site", "start", "--home", str(home)),
        user, (home,), reads, group=group, network=one_user, devices=gpu,
    )  # fmt: skip
    if one_user:
        write_units(folder, [site], [home / "log" / "*.log"], None)
        return
    if group is None or office.socket is None:
        raise ConfigError(
            "site.yaml: a relay needs socket, such as /run/fedllm/link.sock, and socket_group. Without one: --one-user"
        )
    if user == relay_user:
        raise ConfigError(f"--relay-user={relay_user}: it is the site's user, too; take another")
    service_files.check_account(relay_user, group)
    place = office.socket.parent
    runtime = str(place.relative_to("/run")) if place.parent == Path("/run") else None
    relay_unit = service_files.ServiceSpec(
        "fedllm-relay", f"Relay of {office.name}: carries sealed bytes", ("site", "relay", str(relay)), relay_user,
        (relay,) if runtime else (relay, place), hidden=(home, *reads), group=group, runtime=runtime,
    )  # fmt: skip
    site = replace(site, after=(relay_unit.name,))
    composed = service_files.compose([site, relay_unit], {}, office.socket)
    write_units(folder, [site, relay_unit], [home / "log" / "*.log"], composed, relay)


def write_units(
    folder: Path, all_units: "list[ServiceSpec]", logs: list[Path], composed: str | None, relay: Path | None = None,
    extra: str | None = None,
) -> None:  # fmt: skip
    """Write the files and say what comes next."""
    from fedllm.ops import service_files

    folder = folder.expanduser().absolute()
    files = {f"{unit.name}.service": service_files.service(unit) for unit in all_units}
    rotations = [service_files.rotation(all_units[0].name, all_units[0].user, logs)] if logs else []
    if relay is not None:
        rotations.append(service_files.rotation(all_units[1].name, all_units[1].user, [relay / "*.log"]))
    if rotations:  # else the log is the journal's
        files[f"{all_units[0].name}.logrotate"] = "\n".join(rotations)
    if composed is not None:
        files |= {"compose.yaml": composed, "Dockerfile": service_files.dockerfile(folder, all_units, extra)}
    for path in service_files.write(folder, files):
        typer.echo(path)
    names = " ".join(f"{unit.name}.service" for unit in all_units)
    typer.echo(f"Next, as root: cp {folder}/*.service /etc/systemd/system/ && systemctl daemon-reload")
    typer.echo(f"and: systemctl enable --now {names}")


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def doctor(
    home: Annotated[
        Path | None,
        typer.Option(
            "--home", envvar="FEDLLM_HOME", help="The server's, a site's, a relay's or a served model's folder.",
            show_default="all that ~/.fedllm may hold",
        ),
    ] = None,
) -> None:  # fmt: skip
    """Check this installation, and say what to do. Changes nothing; exit code 1 if anything is ERROR.

    Checks certificates, keys, permissions, clock, ports, disk, versions, the ledger, the running processes and the
    way to the other end.
    """
    places = [absolute(place) for place in ([HEAD_OFFICE, OFFICE, SERVING] if home is None else [home])]
    found = [place for place in places if place.is_dir()]
    if not found:
        raise ConfigError(
            f"there is nothing at {' and '.join(map(str, places))}. Give the folder as --home, or make one: fedllm "
            "init-federation, fedllm site init, or fedllm serve token add"
        )
    report([finding for place in found for finding in _examine(place)])


def _examine(folder: Path) -> "list[CheckResult]":
    """Find out what kind of folder it is, and look at it."""
    if (folder / "federation.yaml").exists() or (folder / "roster.json").exists():
        from server.doctor import examine

        return examine(folder)
    if (folder / "site.yaml").exists() or (folder / "grant.json").exists():
        from client.doctor import examine

        return examine(folder)
    if (folder / "relay.json").exists():
        from client.doctor import examine_relay

        return examine_relay(folder)
    if (folder / "tokens.json").exists() or (folder / "serving.json").exists():
        from fedllm.release.doctor import examine

        return examine(folder)
    raise ConfigError(
        f"{folder} is neither the server's folder (federation.yaml), nor a site's (site.yaml), nor a relay's "
        "(relay.json), nor a served model's (tokens.json), or it may not be read by this user"
    )
