"""`fedllm audit`: report, verify and attack.

An entry point: it may import anything, and imports late so that --help is quick.
"""

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.errors import ChainError
from fedllm.shown import escaped

if TYPE_CHECKING:
    from fedllm.audit.model import Audit, Status

audit_app = typer.Typer(help="The audit of a run: a report for people, and its verification.", no_args_is_help=True)

_RECORD_KEY = "record.key"  # a simulation's own


class Lang(Enum):
    """Languages of a report."""

    ko = "ko"
    en = "en"


def register(app: typer.Typer) -> None:
    """Add the commands to the main command."""
    app.add_typer(audit_app, name="audit")


@audit_app.command("report")
def report(
    run: Annotated[Path, typer.Argument(help="The run's folder, or an audit's.", show_default=False)],
    lang: Annotated[
        Lang | None, typer.Option(help="Language of audit.html and audit.pdf; without it, both.", show_default=False)
    ] = None,
    ledgers: Annotated[
        Path | None,
        typer.Option(help="Folder of the sites' ledgers, SITE.jsonl, by fedllm ledger export.", show_default=False),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="Identity file that signs the report, such as keys/identity.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="RUN/audit")] = None,
) -> None:
    """Check a run's evidence and write audit.html, audit.json and audit.pdf."""
    from fedllm.audit.accountants import CROSS_CHECKS
    from fedllm.audit.bundle import FOLDER, write_audit
    from fedllm.crypto.identity import Identity

    own = run / _RECORD_KEY
    source = key if key is not None else own if own.exists() else None
    signer = Identity.read(source) if source is not None else None
    pages = [("audit", lang.value)] if lang is not None else [("audit", "en"), ("audit.ko", "ko")]
    written = write_audit(run, out or run / FOLDER, pages, ledgers, signer, CROSS_CHECKS)
    typer.echo(f"{VERDICTS[written.audit.verdict]}. The report is in {written.folder}")
    _list(written.audit, "fails")
    _list(written.audit, "unverified")
    if signer is None:
        typer.echo("It is not signed: give --key, or nobody can tell whether its pages were altered.")
    for problem in written.problems:
        typer.echo(f"warning: {problem}", err=True)


def _list(audit: "Audit", status: "Status") -> bool:
    """Print the checks of integrity that ended so, and return whether there are any."""
    from fedllm.audit.model import INTEGRITY

    found = [finding for finding in audit.findings if finding.status == status and finding.code in INTEGRITY]
    for finding in found:
        more = max(0, len(finding.evidence) - 1) + finding.more
        first = finding.evidence[0] if finding.evidence else "-"
        typer.echo(f"{status}: {finding.code}: {escaped(first)}{f' (and {more} more)' if more else ''}")
    return bool(found)


VERDICTS = {"within": "within budget", "exceeded": "exceeded", "unverifiable": "cannot verify"}


@audit_app.command("verify")
def verify(
    folder: Annotated[Path, typer.Argument(help="The audit's folder.", show_default=False)],
    trust: Annotated[
        Path,
        typer.Option(
            help="File of keys that you trust: lines NAME FINGERPRINT, NAME being head-office or a site.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write pages of your own to, from what was verified.")
    ] = None,
    absent: Annotated[
        list[str] | None,
        typer.Option(help="A site of your file of keys that took no part in this run. May be repeated."),
    ] = None,
    allow_uncompared: Annotated[
        bool, typer.Option("--allow-uncompared", help="What could not be compared is no error.")
    ] = False,
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Gaps in the evidence that are no contradiction are no error.")
    ] = False,
) -> None:
    """Check an audit offline, without trusting who made it; exit code 1 at the first contradiction.

    Schema, chains, signatures and co-signatures are checked, every epsilon is computed again from the ledgers' events,
    and pages are rendered again and compared. Also ends with 1 if a site in the file of keys has signed nothing, if
    something could not be compared (PDFs never are), if the evidence has gaps, and if the audit is sound but its
    verdict is not "within budget".
    """
    from fedllm.audit.bundle import verify as check
    from fedllm.audit.bundle import write_pages
    from fedllm.audit.trust import Trust

    audit, left = check(folder, Trust.read(trust), absent or [])
    if out is not None:
        write_pages(audit, out)
        typer.echo(f"pages of your own: {out}")
    for line in left:
        typer.echo(f"not compared: {escaped(line)}")
    gaps = _list(audit, "unverified")
    if audit.verdict != "within":
        found = [f for f in audit.findings if f.status == "fails"] or [
            f for f in audit.findings if f.status == "unverified"
        ]
        raise ChainError(
            f"the audit is sound, and its verdict is: {VERDICTS[audit.verdict]} "
            f"({found[0].code}: {found[0].evidence[0]})"
        )
    if left and not allow_uncompared:
        raise ChainError(
            f"the evidence is sound, but nobody has compared it with {', '.join(left)}: whoever signed may have "
            "written anything there. Read pages of your own (--out FOLDER), or those that were compared; "
            "--allow-uncompared ends without this error"
        )
    if gaps and not allow_unverified:
        raise ChainError(
            "what there is of the evidence is sound, but it has gaps: see `unverified` above. Ask for what is missing; "
            "--allow-unverified ends without this error"
        )
    spent = audit.accountants
    typer.echo(
        f"verified: {VERDICTS[audit.verdict]}; {len(audit.sites)} sites, {audit.run.rounds} rounds, epsilon at most "
        f"{'∞' if spent.pld is None else f'{spent.pld:.4g}'} at delta {spent.delta:g} ({escaped(spent.site)})"
    )


@audit_app.command("attack")
def attack(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of fedllm simulate.", show_default=False)],
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Try so many records a side, evenly spread over all.", show_default="every record"),
    ] = None,
) -> None:
    """SIMULATION ONLY: try to tell a run's records from held-out ones, by its adapter; write RUN/attack.

    Membership inference by each record's loss before and after training. It reads the real records of every site, which
    no site would allow in a deployment. The curve is drawn beside the most that the run's epsilon allows.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars of the libraries' own
    from simulations.attack import FOLDER
    from simulations.attack import attack as try_attack

    found = try_attack(run, limit, typer.echo)
    typer.echo("SIMULATION ONLY: made with the sites' real records. Keep the figures as you keep the records.")
    target = found.target
    typer.echo(
        f"{target.members} of {target.members_there} members ({target.sites} sites), {target.others} of "
        f"{target.others_there} non-members"
    )
    bound = "" if found.auc_bound is None else f"; the claim allows {found.auc_bound:.3f}"
    low, high = found.found.interval
    typer.echo(f"area under the ROC {found.found.auc:.3f} (95 %: {low:.3f} to {high:.3f}){bound}")
    for hits in found.hits:
        low, high = (100 * edge for edge in hits.interval)
        bound = "" if hits.bound is None else f"; the claim allows {100 * hits.bound:.2f} %"
        typer.echo(
            f"found at {100 * hits.fpr:g} % false positives: {100 * hits.tpr:.2f} % of members "
            f"(95 %: {low:.2f} to {high:.2f} %){bound}"
        )
    if found.differs:
        typer.echo(
            f"Compare with care: before training the two sets already differ (area {found.control.auc:.3f} by the loss "
            "alone)."
        )
    told = "can be told apart" if found.succeeds else "cannot be told apart by this attack; a better one might"
    typer.echo(f"Members and non-members {told}. Everything is in {run / FOLDER}/")
