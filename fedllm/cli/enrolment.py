"""`fedllm server` and `fedllm site`: folders, admission, keys.

An entry point: it may import anything, and imports late so that --help is quick.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

import typer

from fedllm.errors import ConfigError, FedllmError
from fedllm.shown import escaped, escaped_lines
from fedllm.values import address

if TYPE_CHECKING:
    from fedllm.ops.health_checks import CheckResult

_P = ParamSpec("_P")
_R = TypeVar("_R")


def keep_private() -> None:
    """Begin a command: nothing that this process makes is open to others."""
    os.umask(0o077)


def private(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return a command that keeps private what it makes."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        keep_private()
        return command(*args, **kwargs)

    return run


site_app = typer.Typer(
    help="A site: its folder, keys, grants and processes.", no_args_is_help=True, callback=keep_private
)
server_app = typer.Typer(
    help="The server: its keys, its process, and the grants of sites.", no_args_is_help=True, callback=keep_private
)

HeadOfficeOption = Annotated[
    Path,
    typer.Option("--home", envvar="FEDLLM_HOME", help="The server's folder.", show_default="~/.fedllm/head-office"),
]
OfficeOption = Annotated[
    Path, typer.Option("--home", envvar="FEDLLM_HOME", help="The site's folder.", show_default="~/.fedllm/site")
]
HEAD_OFFICE, OFFICE, SERVING = Path("~/.fedllm/head-office"), Path("~/.fedllm/site"), Path("~/.fedllm/serve")
_Fingerprint = Annotated[
    str | None,
    typer.Option(
        "--fingerprint", help="The fingerprint that the other side read to you on the telephone.", show_default=False
    ),
]
_SiteName = Annotated[str, typer.Argument(help="The site's name.", show_default=False)]


class Rotated(Enum):
    """What the server can replace."""

    certificate = "certificate"
    ca = "ca"
    identity = "identity"


def register(app: typer.Typer) -> None:
    """Add the commands of a deployment to the main command."""
    app.command("init-federation")(private(init_federation))
    app.command("admit")(private(admit))
    app.command("revoke")(private(revoke))
    app.add_typer(site_app, name="site")
    app.add_typer(server_app, name="server")


# ---- the server -----------------------------------------------------------------------------------------------------


def init_federation(
    file: Annotated[Path, typer.Argument(help="federation.yaml: name and host, at the least.", show_default=False)],
    home: HeadOfficeOption = HEAD_OFFICE,
) -> None:
    """Make the server's folder: authority, server certificate, identity, roster."""
    from server.federation import init_federation as make

    office = make(file, absolute(home))
    facts = office.config
    typer.echo(f"The server of {facts.name}, at {address(facts.host, facts.port)}: {office.folder}")
    typer.echo(f"Its fingerprint, to read to sites on the telephone:\n\n  {office.identity.public.fingerprint}\n")
    typer.echo("Next, at every site: fedllm site init --name NAME. Then here: fedllm admit NAME.join")


def admit(
    file: Annotated[Path, typer.Argument(help="The join request, NAME.join.", show_default=False)],
    fingerprint: _Fingerprint = None,
    home: HeadOfficeOption = HEAD_OFFICE,
) -> None:
    """Admit a site, or a site's new keys."""
    from fedllm.protocol.enrolment import JoinRequest
    from server import federation

    folder = absolute(home)
    office = federation.HeadOffice.open(folder)  # before anybody is asked anything
    join = federation.read_join_request(file)
    request, _ = JoinRequest.open(join)
    typer.echo(f"Join request of {request.site}, made {request.made_at:%Y-%m-%d %H:%M} UTC")
    heard = fingerprint or _ask("Call the site on a number that you know. Its fingerprint, as heard")
    grant = federation.admit(folder, join, heard)
    typer.echo(f"{request.site} is admitted: {request.public.fingerprint}")
    typer.echo(f"Send it this grant: {grant}")
    typer.echo(f"and read this fingerprint to it on the telephone:\n\n  {office.identity.public.fingerprint}\n")


def revoke(site: _SiteName, home: HeadOfficeOption = HEAD_OFFICE) -> None:
    """Revoke a site: none of its keys is accepted any more."""
    from server import federation

    member = federation.revoke(absolute(home), site)
    typer.echo(f"{member.site} is revoked. Its keys cannot be admitted again; new keys can.")


@server_app.command("grant")
def server_grant(site: _SiteName, home: HeadOfficeOption = HEAD_OFFICE) -> None:
    """Write a site's grant again."""
    from server import federation

    typer.echo(f"Send it this grant: {federation.renew_grant(absolute(home), site)}")


@server_app.command("new-ledger")
def server_new_ledger(site: _SiteName, home: HeadOfficeOption = HEAD_OFFICE) -> None:
    """Accept the ledger that a site has now: its own was lost, and its owner has stated what was spent."""
    from server.ledger_heads import HEADS, LedgerHeads

    folder = absolute(home)
    LedgerHeads(folder / HEADS).forget(site)
    typer.echo(f"{site}: the next run takes its ledger as it is")


@server_app.command("retire")
def server_retire(site: _SiteName, home: HeadOfficeOption = HEAD_OFFICE) -> None:
    """Accept only the newest keys of a site, after its rotation."""
    from server import federation

    member = federation.retire(absolute(home), site)
    typer.echo(f"{member.site} is known by {member.public.fingerprint} alone. There: fedllm site retire")


@server_app.command("rotate")
def server_rotate(
    what: Annotated[Rotated, typer.Argument(help="What to replace.", show_default=False)],
    finish: Annotated[bool, typer.Option("--finish", help="ca, identity: second step, use the new one.")] = False,
    retire: Annotated[bool, typer.Option("--retire", help="ca, identity: last step, forget the old one.")] = False,
    home: HeadOfficeOption = HEAD_OFFICE,
) -> None:
    """Replace a key of the server while rounds go on.

    certificate: one step, and sites do nothing. ca and identity: three steps, so that every site can install its new
    grant in between.
    """
    from server import federation

    folder = absolute(home)
    if finish and retire:
        raise ConfigError("--finish and --retire are two steps. Take one at a time.")
    if what is Rotated.certificate:
        if finish or retire:
            raise ConfigError("rotate certificate is one step; leave out --finish and --retire")
        federation.rotate_server_certificate(folder)
        typer.echo("The server has a new certificate; a daemon that runs takes it up by itself")
        return
    step: federation.Step = "finish" if finish else "retire" if retire else "start"
    rotate = federation.rotate_ca if what is Rotated.ca else federation.rotate_identity
    grants = rotate(folder, step)
    new = federation.HeadOffice.open(folder).identities[-1 if step == "start" else 0].public.fingerprint
    said = {
        "start": f"A new {what.value} stands beside the old one, and every grant names both.",
        "finish": f"The new {what.value} is in use.",
        "retire": f"The old {what.value} is forgotten.",
    }
    after = {
        "start": f"When every site has installed its grant: fedllm server rotate {what.value} --finish",
        "finish": f"When a round went well: fedllm server rotate {what.value} --retire",
        "retire": "Sites install their grants when it suits them.",
    }
    typer.echo(said[step])
    if what is Rotated.identity:
        typer.echo(f"The new fingerprint: {new}")
    for grant in grants:
        typer.echo(f"  {grant}")
    typer.echo(after[step])


# ---- a site -------------------------------------------------------------------------------------------------------


@site_app.command("init")
def site_init(
    name: Annotated[str, typer.Option("--name", help="The site's name, such as seoul-gangnam.", show_default=False)],
    home: OfficeOption = OFFICE,
) -> None:
    """Make the site's folder, with its keys, settings and join request."""
    from client.office import init_office

    office = init_office(absolute(home), name)
    typer.echo(f"The site {office.name}: {office.folder}")
    typer.echo(f"Send the server this join request: {office.join_file}")
    typer.echo(f"and read this fingerprint to them on the telephone:\n\n  {office.identity.public.fingerprint}\n")
    typer.echo(f"Meanwhile fill in {office.folder / 'site.yaml'}, then: fedllm site check")


@site_app.command("install")
def site_install(
    file: Annotated[Path, typer.Argument(help="The grant from the server, NAME.grant.", show_default=False)],
    fingerprint: _Fingerprint = None,
    home: OfficeOption = OFFICE,
) -> None:
    """Install a grant: the site then answers this server, and no other."""
    from client import office

    folder = absolute(home)
    grant = office.read_grant(file)
    if fingerprint is None and office.needs_fingerprint(folder, grant):
        fingerprint = _ask("Call the server on a number that you know. Its fingerprint, as heard")
    installed = office.install(folder, grant, fingerprint)
    known = " and ".join(identity.fingerprint for identity in installed.coordinators)
    typer.echo(f"{installed.name} takes part at {installed.address}; the server is known by {known}")
    typer.echo("A site that runs takes it up by itself; else: fedllm site start")
    if installed.socket is not None:
        typer.echo("Its relay has a copy of the certificate. Make it again: fedllm site export-relay FOLDER")


@site_app.command("rotate")
def site_rotate(home: OfficeOption = OFFICE) -> None:
    """Make new keys beside the present ones, and a join request for them."""
    from client.office import rotate

    office = rotate(absolute(home))
    typer.echo(f"New keys of {office.name}; the present ones stay in use until the grant for the new is installed.")
    typer.echo(f"Send the server this join request: {office.join_file}")
    typer.echo(f"and read this fingerprint to them:\n\n  {office.keys[-1].identity.public.fingerprint}\n")


@site_app.command("retire")
def site_retire(home: OfficeOption = OFFICE) -> None:
    """Forget keys that are no longer in use."""
    from client.office import retire

    office = retire(absolute(home))
    typer.echo(f"{office.name} keeps {len(office.keys)} set of keys; in use: {office.identity.public.fingerprint}")


@site_app.command("check")
def site_check(home: OfficeOption = OFFICE) -> None:
    """Check all that a run will need, offline and at no cost, and sign what site.yaml declares of the records."""
    from client.doctor import check

    report(check(absolute(home)))


@site_app.command("report")
def site_report(home: OfficeOption = OFFICE) -> None:
    """Show how good each run's adapter is on this site's own records, exactly. Nobody else is told.

    The records are those of the persons who evaluate and never train (policy.evaluation_share).
    """
    from rich.console import Console
    from rich.table import Table

    from client.office import Office
    from client.own_scores import own_scores

    scores = own_scores(Office.open(absolute(home)).ledger_file)
    if not scores:
        typer.echo("No run has been scored on this site's records yet: runs with evaluation.every are.")
        return
    for run in dict.fromkeys(score.run for score in scores):
        own = [score for score in scores if score.run == run]
        table = Table(title=f"run {escaped(run)}, on {own[-1].units} units of this site")
        table.add_column("round", justify="right")
        names = [name for name in own[-1].metrics if name in own[0].metrics]
        for name in names:
            table.add_column(name.replace("_", " "), justify="right")
        for score in own:
            table.add_row(str(score.round), *(f"{score.metrics.get(name, math.nan):.4g}" for name in names))
        Console().print(table)
        if len(own) > 1 and names:
            first, last = own[0].metrics[names[0]], own[-1].metrics[names[0]]
            better = last < first if names[0] == "loss" else last > first
            word = "better" if better else "no better"
            typer.echo(f"For this site it is {word}: {names[0].replace('_', ' ')} {first:.4g} -> {last:.4g}")


@site_app.command("resume")
def site_resume(home: OfficeOption = OFFICE) -> None:
    """Let a site answer again after it failed, or was killed, while it used records. Remove the cause first."""
    from client.office import Office
    from client.unfinished import Unfinished

    left = Unfinished(Office.open(absolute(home)).ledger_file)
    said = left.read()
    left.end()
    typer.echo("nothing to resume" if said is None else f"{said}; the site answers the server again")


# ---- common ----------------------------------------------------------------------------------------------------------


def absolute(folder: Path) -> Path:
    """Return the folder as an absolute path."""
    try:
        return folder.expanduser().absolute()
    except RuntimeError:
        raise ConfigError(f"--home={folder}: there is no such home folder") from None


def report(findings: Sequence["CheckResult"]) -> None:
    """Print results, a line each; raises FedllmError if one is ERROR."""
    for finding in findings:
        text = escaped_lines(finding.text)  # it may quote what others wrote
        typer.echo(f"{finding.level:<7}  {text}")
    count = sum(not finding.right for finding in findings)
    if count:
        raise FedllmError(f"{count} of {len(findings)} checks found an ERROR: do what their lines say")


def _ask(question: str) -> str:
    try:
        return str(typer.prompt(question, default="", show_default=False))
    except typer.Abort:
        raise ConfigError("nobody answered. Give what you heard on the telephone as --fingerprint.") from None
