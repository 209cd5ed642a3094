"""`fedllm release`: what comes of a finished run.

An entry point: it may import anything, and imports late so that --help is quick.
"""

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.errors import ReleaseError
from fedllm.shown import escaped

if TYPE_CHECKING:
    from fedllm.release.manifest import Manifest

release_app = typer.Typer(help="A run's model for use: exported with its evidence, and checked.", no_args_is_help=True)

DestArgument = Annotated[Path, typer.Argument(help="The release's folder.", show_default=False)]
TrustOption = Annotated[
    Path,
    typer.Option(
        help="File of keys that you trust: lines NAME FINGERPRINT, one NAME being head-office.", show_default=False
    ),
]


class Quantised(Enum):
    """Types of quantised weights."""

    none = "none"
    int8 = "int8"
    nf4 = "nf4"


def register(app: typer.Typer) -> None:
    """Add the commands to the main command."""
    app.add_typer(release_app, name="release")


@release_app.command("export")
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    dest: Annotated[Path, typer.Argument(help="Folder to write, new or empty.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="Add the adapter to the base's weights: one model that needs no PEFT.")
    ] = False,
    quantize: Annotated[
        Quantised, typer.Option(help="Quantise the merged model for inference (bitsandbytes).")
    ] = Quantised.none,
    key: Annotated[
        Path | None,
        typer.Option(
            help="Identity file that signs the release, such as keys/identity.", show_default="RUN/record.key"
        ),
    ] = None,
    audit: Annotated[
        Path | None, typer.Option(help="Folder of the run's audit report.", show_default="RUN/audit")
    ] = None,
) -> None:
    """Write a run's model as a Hugging Face folder with cards, and a signed manifest of what it promises.

    The run's record and audit are checked first; epsilon is computed again from the evidence.
    """
    from fedllm.crypto.identity import Identity
    from fedllm.release.finished_run import KEY, read_run

    own = run / KEY
    if key is None and not own.exists():
        raise ReleaseError(
            f"{run} holds no {KEY}, as a simulation's folder does: give --key, such as keys/identity of the server's "
            "folder. Whoever uses the release checks that head office has signed it."
        )
    signer = Identity.read(key or own)
    finished = read_run(run, signer, audit)
    os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars of the libraries' own
    from fedllm.release.export import export as write

    made = write(finished, dest, signer, merge, quantize.value, lambda text: typer.echo(f"{text} ...", err=True))
    _claim(made.manifest)
    typer.echo(f"checked       loaded again, its logits are {made.apart:.2g} of their length from the trained ones")
    for note in made.notes:
        typer.echo(f"note: {escaped(note)}")
    typer.echo(f"The release is in {dest}. Check it where it goes: fedllm release verify '{dest}' --trust KEYS")


@release_app.command("verify")
def verify(dest: DestArgument, trust: TrustOption) -> None:
    """Check a release offline, every file of it, and print what it promises; exit code 1 if anything is wrong."""
    from fedllm.audit.trust import Trust
    from fedllm.release.manifest import verify_release

    manifest = verify_release(dest, Trust.read(trust))
    _claim(manifest)
    typer.echo(f"verified: {len(manifest.files)} files, as {manifest.signer} has signed them")


def _claim(manifest: "Manifest") -> None:
    """Print what a release is and promises, on one screen."""
    base, privacy, training = manifest.base, manifest.privacy, manifest.training
    if not privacy.private:
        typer.echo("NOT PRIVATE: the model may give away the records that it was trained on.")
    epsilon = "∞" if privacy.epsilon is None or privacy.mode == "off" else f"{privacy.epsilon:.4g}"
    form = manifest.form + (f", {manifest.quantized}" if manifest.quantized != "none" else "")
    verdict = {"within": "within budget", "exceeded": "exceeded", "unverifiable": "cannot verify"}[privacy.verdict]
    lines = {
        "name": f"{manifest.name} ({form}, {manifest.task})",
        "base": f"{base.source}{f' @ {base.revision}' if base.revision else ''}, SHA-256 {base.digest[:16]}…",
        "epsilon": f"{epsilon} at delta {privacy.delta:g}, for one {privacy.unit} of one site (mode {privacy.mode})",
        "audit": f"{verdict}; audit.json SHA-256 {privacy.audit[:16]}…",
        "run": f"{training.run}, record {training.record[:16]}…, signed by {training.signer}",
        "adapter": f"SHA-256 {training.adapter[:16]}…",
        "made": f"{manifest.made} UTC by fedllm {manifest.program}",
    }
    if manifest.teacher is not None:
        lines["teacher"] = f"release.json SHA-256 {manifest.teacher[:16]}…; the claim is the teacher's"
    for heading, text in lines.items():
        typer.echo(f"{heading:<13} {escaped(text)}")
