"""`fedllm ledger`: what a site has spent, and what its owner may do about it.

An entry point: it may import anything, and imports late so that --help is quick.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedllm.cli.enrolment import OFFICE, OfficeOption, absolute, keep_private
from fedllm.errors import ConfigError, LedgerError
from fedllm.shown import escaped

if TYPE_CHECKING:
    from client.office import Office
    from client.policy import SitePolicy
    from fedllm.plan import RunPlan
    from fedllm.privacy.accounting import AccountingEvent, PrivacySpent
    from fedllm.privacy.ledger import LedgerFile, Loss
    from fedllm.privacy.split import Side

ledger_app = typer.Typer(
    help="A site's account of the privacy that was spent.", no_args_is_help=True, callback=keep_private
)
_FileOption = Annotated[
    Path | None, typer.Option("--file", help="A ledger elsewhere, instead of the site's own.", show_default=False)
]
_DELTA = 1e-5  # at which a ledger is shown that states none
_console = Console()


def register(app: typer.Typer) -> None:
    """Add the commands to the main command."""
    app.add_typer(ledger_app, name="ledger")


def _office(home: Path) -> "Office":
    from client.office import Office

    return Office.open(absolute(home))


def _of(office: "Office") -> "LedgerFile":
    from fedllm.privacy.ledger import LedgerFile

    return LedgerFile(office.ledger.file, office.ledger.anchor)


def _open(home: Path, file: Path | None) -> "tuple[LedgerFile, Office | None]":
    from fedllm.privacy.ledger import LedgerFile

    if file is None:
        office = _office(home)
        return _of(office), office
    if not file.exists():
        raise LedgerError(f"--file={file}: there is no such file")
    return LedgerFile(file), None


@ledger_app.command("show")
def show(home: OfficeOption = OFFICE, file: _FileOption = None) -> None:
    """Show what every account has spent, at the site's delta, and what is left of its budget.

    All data sets of a site share one account, except those that were declared disjoint.

    With `--file` budget and delta are those that the ledger states.
    """
    from fedllm.privacy.accounting import counted, spent
    from fedllm.privacy.ledger import on_side
    from fedllm.privacy.split import SIDES

    ledger, office = _open(home, file)
    budget, delta = (office.policy.epsilon, office.policy.delta) if office else ledger.budget() or (math.inf, _DELTA)
    charges = ledger.charges()
    limit = "" if budget == math.inf else f", of a budget of {budget:g}"
    table = Table(title=f"epsilon at delta {delta:g}{limit}")
    for name in ("account", "spent", "reserved", "by RDP", "left", "runs", "rounds"):
        table.add_column(name, justify="left" if name in ("account", "rounds") else "right")
    for name in ledger.accounts():
        own = [charge for charge in charges if charge.account == name]
        total = ledger.spent(name, delta)
        open_ = [charge for charge in own if charge.state == "RESERVED"]
        both = not ledger.sided(name)
        reserved = max(
            spent([e for c in open_ for e in on_side(side, c.event, c.evaluation, both)], delta).epsilon
            for side in SIDES
        )
        states = Counter(charge.state.lower() for charge in own)
        # another plan may be next, and then RDP decides, at orders that depend on the budget
        held = max(counted(ledger.events(name, side=side), delta, budget, one_plan=False) for side in SIDES)
        left = "" if budget == math.inf else f"{max(0.0, budget - held):.4g}"
        table.add_row(
            name, f"{total.epsilon:.4g}", f"{reserved:.4g}", f"{total.epsilon_rdp:.4g}",
            left, str(len({charge.run for charge in own})), ", ".join(f"{n} {s}" for s, n in sorted(states.items())),
        )  # fmt: skip
    _console.print(table)
    newest = {(charge.run, charge.round): charge.state for charge in charges}
    for run, round_ in [key for key, state in newest.items() if state == "RESERVED"]:
        typer.echo(f"open: round {round_} of run {escaped(run)}; it counts as spent until it is released or aborted")


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
    from fedllm.crypto.hash_chain import read_chain
    from fedllm.crypto.identity import PublicIdentity
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
    end: Annotated[
        str | None,
        typer.Option(
            help="The run that it is for, and the end of its record, RUN:NUMBER:DIGEST: fedllm audit report names it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write the signed chain as JSON lines, for a privacy officer. It holds no record, and no number of records.

    With `--end` its last line states, signed, that the export is complete. An audit needs this from every site, because
    otherwise anybody who carries the file could cut it.
    """
    from fedllm.crypto.hash_chain import End
    from fedllm.files import write_secret

    ledger, office = _open(home, file)
    if end is not None and office is None:
        raise ConfigError("--end is signed with the site's keys, and --file has none: leave one of the two out")
    ledger.verify()
    if to.exists():
        raise ConfigError(f"{to} exists. Nothing was overwritten; choose another file.")
    lines = ledger.lines() if office is None or end is None else ledger.export(End.parse(end), office.identity)
    write_secret(to, "".join(line + "\n" for line in lines).encode())
    typer.echo(f"{len(lines)} entries: {to}")


@ledger_app.command("abort")
def abort(
    run: Annotated[str, typer.Argument(help="The run.", show_default=False)],
    round_: Annotated[int, typer.Argument(metavar="ROUND", help="Its round.", show_default=False)],
    home: OfficeOption = OFFICE,
) -> None:
    """Give a reserved round back to the budget. Nothing of it was released, and nothing of it ever will be."""
    office = _office(home)
    _of(office).abort(run, round_, office.identity)
    typer.echo(f"aborted: round {round_} of run {run}")


@ledger_app.command("disjoint")
def disjoint(
    name: Annotated[
        str, typer.Argument(help="What the data set is called: data.name in site.yaml.", show_default=False)
    ],
    home: OfficeOption = OFFICE,
) -> None:
    """Declare that no person and no record of a data set is in another one of this site: it gets its own budget.

    The declaration is signed and permanent. It is the owner's word: the command only reports what the records have in
    common with other data sets.
    """
    from client.service import read_data_set
    from fedllm.canonical import canonical
    from fedllm.privacy.ledger import LedgerFile

    office, name = _office(home), canonical(name)
    if office.ledger.data_set != name:
        raise ConfigError(
            f"data.name={office.ledger.data_set}: expected {name}. Let site.yaml name this data set and its records "
            "first, so that they can be compared with what was charged before."
        )
    ledger = LedgerFile(office.ledger.file, office.ledger.anchor, create=True)
    data = read_data_set(office)
    for account, count in ledger.overlaps(name, data).items():
        typer.echo(f"WARNING: {count} records, texts or persons of {name} are in what was charged to {account}, too.")
    typer.echo(
        f"Nobody in {name}, and no record of it, is in any other data set that this site was or will be trained on."
    )
    typer.confirm("Do you declare this?", abort=True)
    ledger.declare_disjoint(name, data, office.identity)
    typer.echo(f"declared: {name} has an account of its own from the next plan on")


@ledger_app.command("clock")
def clock(home: OfficeOption = OFFICE) -> None:
    """Confirm that the clock is right, after the ledger has found that it went ahead.

    What policy.period frees depends on it.
    """
    office = _office(home)
    ledger = _of(office)
    ahead = ledger.look_at_clock()
    ledger.confirm_clock(office.identity)
    typer.echo(
        f"confirmed: it is {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, {ahead / 86_400:.3g} days ahead"
    )


@ledger_app.command("restart")
def restart(
    lost: Annotated[
        list[str],
        typer.Option("--lost", help="PLAN=ROUNDS for each run that it lacks, or nothing, or everything.",
                     show_default=False),
    ],
    home: OfficeOption = OFFICE,
) -> None:  # fmt: skip
    """Go on with an older ledger, or with none: its owner states what is lost, and that counts as spent.

    PLAN is the plan of a run, plan.json in its folder at the server. ROUNDS is how many of its rounds are missing; its
    closing score counts as one.

    `nothing` states that this ledger is the newest. `everything` states that nobody knows what is lost: nothing more is
    trained on any records of this site. Losses count on every account, and what is open stays spent. Stop the site
    first.
    """
    from fedllm.files import locked
    from fedllm.privacy.accounting import spent
    from fedllm.privacy.ledger import restart

    office = _office(home)
    losses = _losses(lost)
    office.ledger_file.parent.mkdir(mode=0o700, exist_ok=True)
    with locked(office.ledger_file.parent):
        head = restart(office.ledger, office.identity, losses)
    cost = spent([loss.event for loss in losses], office.policy.delta).epsilon
    typer.echo(f"restarted at entry {head.number}: epsilon {cost:.4g} at delta {office.policy.delta:g} counts as lost")
    typer.echo(f"The server takes it from now on: fedllm server new-ledger {office.name}")


def _losses(stated: list[str]) -> "list[Loss]":
    """Read what the owner states; raises ConfigError."""
    from fedllm.privacy.ledger import EVERYTHING, Loss

    if stated in (["nothing"], ["everything"]):
        return [EVERYTHING] if stated == ["everything"] else []
    found = []
    for each in stated:
        path, _, rounds = each.rpartition("=")
        if not path or not rounds.isascii() or not rounds.isdigit() or not 0 < int(rounds[:9]) == int(rounds):
            raise ConfigError(
                f"--lost={each}: expected PLAN=ROUNDS, such as plan.json=30, or nothing, or everything alone"
            )
        plan = _read_plan(Path(path))
        found += [Loss(plan.run, event) for event in plan.most(int(rounds))]  # on both sides
    return found


def _read_plan(path: Path) -> "RunPlan":
    from fedllm.plan import RunPlan
    from fedllm.settings_file import read_settings
    from fedllm.values import parse

    return parse(RunPlan, {"run": "forecast", **read_settings(path)})


@ledger_app.command("forecast")
def forecast(
    plan: Annotated[Path, typer.Argument(help="A plan: plan.json of a run, or YAML.", show_default=False)],
    home: OfficeOption = OFFICE,
    file: _FileOption = None,
    policy_file: Annotated[
        Path | None,
        typer.Option("--policy", help="YAML of limits, as below `policy` in site.yaml.", show_default=False),
    ] = None,
) -> None:
    """Say what a planned run would spend on this site's records, if the policy admits it, and how many rounds fit.

    With `--file` no site's folder is needed. The forecast is then for the costliest account in the ledger, with the
    limits that the ledger states, or those of `--policy`.
    """
    from client.office import Office
    from client.policy import SitePolicy
    from fedllm.errors import PrivacyError
    from fedllm.settings_file import read_settings
    from fedllm.values import parse

    planned = _read_plan(plan)
    office = None if file is not None else Office.open(absolute(home))
    policy = parse(SitePolicy, read_settings(policy_file)) if policy_file is not None else None
    if office is not None:
        policy = policy or office.policy
        past = _past_of(office)
    else:
        ledger, _ = _open(home, file)
        policy, past = policy or _stated(ledger, planned), _past_in(ledger)
    cost = partial(_cost, planned, past, policy.delta)
    typer.echo(f"the run alone: epsilon {cost(math.inf).epsilon:.4g} at delta {policy.delta:g}")
    after = cost(-math.inf)
    typer.echo(f"with all before it: epsilon {after.epsilon:.4g} (by RDP {after.epsilon_rdp:.4g})")
    budget, period = policy.epsilon, policy.period
    whole = _fitting(planned, past, -math.inf, policy.delta, budget)
    typer.echo(f"rounds that fit the budget of {budget:g}: {_rounds_of(planned, whole)}")
    if period is not None:
        now = _fitting(planned, past, time.time() - period.days * 86_400, policy.delta, period.epsilon)
        typer.echo(
            f"rounds that fit now, with at most {period.epsilon:g} in {period.days:g} days: "
            f"{_rounds_of(planned, min(whole, now))}"
        )
    try:
        policy.admit(planned)
        policy.check_run(planned, past.both)
        if office is not None:
            office.model(planned.model)
    except PrivacyError as error:
        raise PrivacyError(f"policy: refused: {error}") from None
    known = office is not None or policy_file is not None
    typer.echo("policy: admits the plan" if known else "policy: not known; --policy FILE checks the plan against one")


def _cost(planned: "RunPlan", past: "_Past", delta: float, since: float) -> "PrivacySpent":
    """Return what a whole run costs the costlier side of an account, with what was charged since a time."""
    from fedllm.privacy.accounting import spent
    from fedllm.privacy.ledger import costlier
    from fedllm.privacy.split import SIDES

    return costlier(
        spent([*past.events(since, side), *planned.cost(planned.exchanges, side, past.both)], delta) for side in SIDES
    )


def _fitting(planned: "RunPlan", past: "_Past", since: float, delta: float, budget: float) -> int:
    """Return how many of the run's exchanges, the closing one too, may follow what was charged since a time.

    By the rule that a ledger decides by.
    """
    from fedllm.privacy.accounting import overrun
    from fedllm.privacy.split import SIDES

    before = {side: past.events(since, side) for side in SIDES}
    low, high = 0, planned.exchanges
    while low < high:
        middle = (low + high + 1) // 2
        fits = all(
            overrun(
                [*before[side], *planned.cost(middle, side, past.both)], delta, budget,
                one_plan=since == -math.inf and not any(before.values()),
            ) is None
            for side in SIDES
        )  # fmt: skip
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _rounds_of(planned: "RunPlan", exchanges: int) -> str:
    """Return how many of the rounds so many exchanges are, and whether the score after the last of them fits, too."""
    rounds = planned.training.rounds
    if exchanges < rounds or planned.evaluation.every is None:
        return f"{min(exchanges, rounds)} of {rounds}"
    return f"{rounds} of {rounds}, " + ("and the closing score" if exchanges > rounds else "but not the closing score")


@dataclass(frozen=True)
class _Past:
    """What an account has been charged with."""

    ledger: "LedgerFile | None" = None  # None: there is none yet
    account: str = ""

    def events(self, since: float, side: "Side") -> "list[AccountingEvent]":
        """Return what was charged to a side since a time."""
        return self.ledger.events(self.account, since, side) if self.ledger is not None else []

    @property
    def both(self) -> bool:
        """Whether both sides count everything."""
        return self.ledger is not None and not self.ledger.sided(self.account)


def _past_of(office: "Office") -> _Past:
    """Return what a site's records have been charged with."""
    if office.ledger.is_new():
        return _Past()
    ledger = _of(office)
    account = ledger.account_of(office.ledger.data_set)
    return _Past(ledger if account in ledger.accounts() else None, account)


def _past_in(ledger: "LedgerFile") -> _Past:
    """Return what the costliest account of a ledger has been charged with."""
    known = ledger.accounts()
    if not known:
        return _Past()
    return _Past(ledger, max(known, key=lambda name: ledger.spent(name, _DELTA).epsilon_rdp))


def _stated(ledger: "LedgerFile", plan: "RunPlan") -> "SitePolicy":
    """Return the limits that a ledger states; its site may have others, which only the site knows."""
    from client.policy import widest

    epsilon, delta = ledger.budget() or (math.inf, _DELTA)
    return widest(epsilon, delta, unit=plan.privacy.unit)
