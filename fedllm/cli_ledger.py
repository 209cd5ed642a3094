"""The commands of a site's privacy ledger. An entry point: it may import anything, and imports late."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedllm.cli_deploy import OFFICE, OfficeOption, private
from fedllm.errors import ConfigError, LedgerError

if TYPE_CHECKING:
    from client.office import Office
    from fedllm.privacy.ledger import LedgerFile

ledger_app = typer.Typer(help="A site's account of the privacy that was spent.", no_args_is_help=True)
_FileOption = Annotated[
    Path | None, typer.Option("--file", help="A ledger elsewhere, instead of the site's own.", show_default=False)
]
_console = Console()


def register(app: typer.Typer) -> None:
    """Add the commands to the main command."""
    app.add_typer(ledger_app, name="ledger")


def _open(home: Path, file: Path | None) -> "tuple[LedgerFile, Office | None]":
    from client.office import Office
    from fedllm.privacy.ledger import LedgerFile

    office = None if file is not None else Office.open(private(home))
    path = file if office is None else office.ledger_file
    if path is None or not path.exists():
        raise LedgerError(f"{path}: there is no ledger yet; nothing was spent")
    return LedgerFile(path), office


@ledger_app.command("show")
def show(home: OfficeOption = OFFICE, file: _FileOption = None) -> None:
    """Show what every data set has spent, at the site's delta, and what is left of its budget."""
    from fedllm.privacy.accounting import spent

    ledger, office = _open(home, file)
    budget, delta = (office.policy.epsilon, office.policy.delta) if office else (None, 1e-5)
    charges = ledger.charges()
    limit = "" if budget is None else f", of a budget of {budget:g}"
    table = Table(title=f"epsilon at delta {delta:g}{limit}")
    for name in ("data set", "spent", "reserved", "by RDP", "left", "runs", "rounds"):
        table.add_column(name, justify="left" if name in ("data set", "rounds") else "right")
    for name in ledger.data_sets():
        own = [charge for charge in charges if charge.dataset == name]
        total = spent(ledger.events(name), delta)  # with what it shares with others
        reserved = [charge.event for charge in own if charge.state == "RESERVED"]
        states = Counter(charge.state.lower() for charge in own)
        # RDP decides once a second plan was charged, so it says how much is sure to be left
        left = "" if budget is None else f"{max(0.0, budget - total.epsilon_rdp):.4g}"
        table.add_row(
            name[:12], f"{total.epsilon:.4g}", f"{spent(reserved, delta).epsilon:.4g}", f"{total.epsilon_rdp:.4g}",
            left, str(len({charge.run for charge in own})), ", ".join(f"{n} {s}" for s, n in sorted(states.items())),
        )  # fmt: skip
    _console.print(table)
    for run, round_ in [(charge.run, charge.round) for charge in charges if charge.state == "RESERVED"]:
        typer.echo(f"open: round {round_} of run {run}; it counts as spent until it is released or aborted")


@ledger_app.command("verify")
def verify(
    home: OfficeOption = OFFICE,
    file: _FileOption = None,
    key: Annotated[
        list[str] | None,
        typer.Option("--key", help="The public identity that must have signed, 128 hex digits.", show_default=False),
    ] = None,
) -> None:
    """Check every signature and link of the chain, and the tables against it; names the first bad entry.

    `--file` may also be an export.
    """
    from fedllm.chain import read_chain
    from fedllm.crypto import PublicIdentity
    from fedllm.files import read

    signers: set[PublicIdentity] | None = {PublicIdentity.from_text(text) for text in key} if key else None
    if file is not None and read(file)[:1] == b"{":
        entries = read_chain(read(file).decode("utf-8", "replace").splitlines(), str(file), signers)
        signer: PublicIdentity | None = entries[-1].signer
        number, digest = entries[-1].number, entries[-1].digest
    else:
        ledger, office = _open(home, file)
        if signers is None and office is not None:
            signers = {keys.identity.public for keys in office.keys}
        head = ledger.verify(signers)
        entries = read_chain(ledger.lines(), str(ledger.path))[-1:] if signers is None else []
        number, digest = head.number, head.digest
        signer = entries[-1].signer if entries else None
    typer.echo(f"sound: {number + 1} entries, head {digest}")
    if signers is None and signer is not None:
        typer.echo(f"signed by {signer.fingerprint}; with --key it is also checked that this is the right one")


@ledger_app.command("export")
def export(
    to: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)],
    home: OfficeOption = OFFICE,
    file: _FileOption = None,
) -> None:
    """Write the signed chain as JSON lines, for a privacy officer: no record, and no number of records, is in it."""
    from fedllm.files import write_secret

    ledger, _ = _open(home, file)
    ledger.verify()
    if to.exists():
        raise ConfigError(f"{to} exists. Nothing was overwritten; choose another file.")
    lines = ledger.lines()
    write_secret(to, "".join(line + "\n" for line in lines).encode())
    typer.echo(f"{len(lines)} entries: {to}")


@ledger_app.command("abort")
def abort(
    run: Annotated[str, typer.Argument(help="The run.", show_default=False)],
    round_: Annotated[int, typer.Argument(metavar="ROUND", help="Its round.", show_default=False)],
    home: OfficeOption = OFFICE,
) -> None:
    """Give a reserved round back to the budget. Nothing of it was released, and nothing of it ever will be."""
    ledger, office = _open(home, None)
    if office is not None:
        ledger.abort(run, round_, office.identity)
    typer.echo(f"aborted: round {round_} of run {run}")


@ledger_app.command("forecast")
def forecast(
    plan: Annotated[Path, typer.Argument(help="A plan: plan.json of a run, or YAML.", show_default=False)],
    home: OfficeOption = OFFICE,
) -> None:
    """Say what a planned run would spend on this site's records, whether policy admits it, and how many rounds fit."""
    from client.office import Office
    from client.service import read_records
    from fedllm.errors import PrivacyError
    from fedllm.files import read_settings
    from fedllm.plan import RunPlan, parse
    from fedllm.privacy.accounting import fits, spent
    from fedllm.privacy.ledger import LedgerFile

    planned = parse(RunPlan, {"run": "forecast", **read_settings(plan)})
    office = Office.open(private(home))
    policy, event = office.policy, planned.mechanism.event(planned.training.local_steps)
    before = []
    if office.ledger_file.exists():
        before = LedgerFile(office.ledger_file).events_of(read_records(office).data_set)
    alone = spent([event] * planned.training.rounds, policy.delta)
    after = spent([*before, *[event] * planned.training.rounds], policy.delta)
    typer.echo(f"the run alone: epsilon {alone.epsilon:.4g} at delta {policy.delta:g}")
    typer.echo(f"with all before it: epsilon {after.epsilon:.4g} (by RDP {after.epsilon_rdp:.4g})")
    low, high = 0, planned.training.rounds
    while low < high:
        middle = (low + high + 1) // 2
        over = fits([*before, *[event] * middle], policy.delta, policy.epsilon, one_plan=not before)
        low, high = (middle, high) if over is None else (low, middle - 1)
    typer.echo(f"rounds that fit the budget of {policy.epsilon:g}: {low} of {planned.training.rounds}")
    try:
        policy.admit(planned)
        office.model(planned.model)
    except PrivacyError as error:
        raise PrivacyError(f"policy: refused: {error}") from None
    typer.echo("policy: admits the plan" + ("" if policy.period is None else "; its period may hold rounds back"))
