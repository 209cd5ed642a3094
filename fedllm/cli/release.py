"""`fedllm release`: what comes of a finished run.

An entry point: it may import anything, and imports late so that --help is quick.
"""

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.cli.audit import VERDICTS, Lang
from fedllm.errors import ReleaseError
from fedllm.shown import escaped

if TYPE_CHECKING:
    from fedllm.release.evaluate import Evaluation
    from fedllm.release.manifest import Manifest, Privacy

release_app = typer.Typer(
    help="The model of a finished run, for use elsewhere: export, verify, evaluate, distil, sample.",
    no_args_is_help=True,
)

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


class Targets(Enum):
    """What a student learns of its teacher."""

    auto = "auto"
    logits = "logits"
    answers = "answers"


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
    lines = {
        "name": f"{manifest.name} ({form}, {manifest.task})",
        "base": f"{base.source}{f' @ {base.revision}' if base.revision else ''}, SHA-256 {base.digest[:16]}…",
        "epsilon": f"{epsilon} at delta {privacy.delta:g}, for one {privacy.unit} of one site (mode {privacy.mode})",
        "audit": f"{VERDICTS[privacy.verdict]}; audit.json SHA-256 {privacy.audit[:16]}…",
        "run": f"{training.run}, record {training.record[:16]}…, signed by {training.signer}",
        "adapter": f"SHA-256 {training.adapter[:16]}…",
        "made": f"{manifest.made} UTC by fedllm {manifest.program}",
    }
    if manifest.teacher is not None:
        lines["teacher"] = f"release.json SHA-256 {manifest.teacher[:16]}…; the claim is the teacher's"
    for heading, text in lines.items():
        typer.echo(f"{heading:<13} {escaped(text)}")


@release_app.command("evaluate")
def evaluate(
    dest: Annotated[list[Path], typer.Argument(help="Folders of releases, each a column.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            help="PUBLIC records: .jsonl, .json, .csv or .parquet, read as in training. Scores on private records cost "
            "epsilon and are not counted here: for these, set evaluation.every in training.",
            show_default=False,
        ),
    ],
    trust: TrustOption,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="YAML of prompts to compare with the first DEST: {name: template}, or {name: {prompt: , system: }}.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("evaluation"),
    limit: Annotated[int, typer.Option(min=1, help="Most records to use, evenly spread over the file.")] = 1000,
    lang: Annotated[
        Lang | None, typer.Option(help="Language of evaluation.html; without it, both.", show_default=False)
    ] = None,
) -> None:
    """Compare releases with their base on PUBLIC records: a table, evaluation.json and evaluation.html.

    That the records are public is your statement: no program can check it, and no epsilon is counted.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars of the libraries' own
    from fedllm.audit.trust import Trust
    from fedllm.release import evaluate as work
    from fedllm.release.evaluation_page import render_html
    from fedllm.release.manifest import check_place

    check_place(out, dest)
    found = work.evaluate(dest, data, Trust.read(trust), prompts, limit, lambda line: typer.echo(escaped(line)))
    pages = {"evaluation.html": lang.value} if lang else {"evaluation.html": "en", "evaluation.ko.html": "ko"}
    texts = {name: render_html(found, "ko" if which == "ko" else "en") for name, which in pages.items()}
    work.write(found, out, texts, dest)
    _show(found)
    typer.echo(f"Answers side by side, with plots, are in {out / 'evaluation.html'}")


def _show(found: "Evaluation") -> None:
    """Print the tables of an evaluation."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fedllm.release.evaluation_page import best_of, text_of, verdict, with_ends

    tables = [("model", [(model.name, model.scores) for model in found.models])]
    tables.append(("prompt", [(prompt.name, prompt.scores) for prompt in found.prompts]))
    for what, rows in tables:
        table = Table(what, box=None, header_style="bold", pad_edge=False)
        for metric in found.models[0].scores:
            table.add_column(text_of("en", f"metric.{metric}"), justify="right")
        for name, scores in rows:
            table.add_row(Text(escaped(name)), *(with_ends(*each) for each in scores.items()))
        if rows:
            Console().print(table)
    for difference in found.differences:
        for metric, value in difference.scores.items():
            typer.echo(escaped(f"{difference.name} against {difference.against}: {verdict('en', metric, value)}"))
    best = best_of(found, "en")
    if best is not None and found.best is not None:
        typer.echo(escaped(best))
        typer.echo(text_of("en", "best.several", pairs=found.best.pairs))
    for note in found.notes:
        typer.echo(escaped(f"note: {text_of('en', f'note.{note.code}', **note.values)}"))
    typer.echo(text_of("en", "public"))


@release_app.command("distil")
def distil(
    dest: DestArgument,
    student: Annotated[str, typer.Option(help="Model to teach: a folder or a hub name.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(
            help="PUBLIC questions (.jsonl, .csv, .parquet), or the folder of a synthetic set.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the student to, a release.", show_default=False)],
    trust: TrustOption,
    key: Annotated[
        Path,
        typer.Option(
            help="The server's identity file, such as keys/identity, which signs the student.", show_default=False
        ),
    ],
    data_is_public: Annotated[
        bool,
        typer.Option("--data-is-public", help="You state that --data is public. A signed set needs no statement."),
    ] = False,
    targets: Annotated[
        Targets,
        typer.Option(help="What the student learns; auto: logits if both have one vocabulary."),
    ] = Targets.auto,
    temperature: Annotated[float, typer.Option(help="Temperature of the logits.")] = 2.0,
    epochs: Annotated[int, typer.Option(help="How often every question is learned.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate of AdamW.")] = 1e-4,
    batch: Annotated[int, typer.Option(help="Questions in one step.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the order of the questions.")] = 0,
) -> None:
    """Teach a smaller model by a release, on public questions, and release it with the teacher's claim.

    Only the columns of the prompt are read; the answers are the teacher's own. --data must be public: records of a site
    would cost epsilon that is not counted, and the claim would be false. That it is public is your statement, and the
    student's card says so.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars of the libraries' own
    from fedllm.audit.trust import Trust
    from fedllm.crypto.identity import Identity
    from fedllm.release.distil import Teaching
    from fedllm.release.distil import distil as teach
    from fedllm.release.loading import load_release
    from fedllm.release.manifest import verify_release
    from fedllm.values import parse

    how = parse(Teaching, {
        "targets": targets.value, "temperature": temperature, "epochs": epochs, "learning_rate": learning_rate,
        "batch": batch, "seed": seed,
    })  # fmt: skip
    keys, signer = Trust.read(trust), Identity.read(key)
    release = load_release(dest, verify_release(dest, keys))
    made = teach(release, student, data, out, keys, signer, how, _say, public=data_is_public)
    _say(f"the student is in {out}. Its claim is its teacher's: {_promise(made.privacy)}")


@release_app.command("synthesize")
def synthesize(
    dest: DestArgument,
    prompts: Annotated[
        Path, typer.Option(help="PUBLIC questions: a YAML file of templates and lists.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the set to.", show_default=False)],
    trust: TrustOption,
    n: Annotated[int, typer.Option("--n", min=1, max=10_000_000, help="Questions to ask.")] = 1000,
    temperature: Annotated[float, typer.Option(help="Temperature of sampling.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens up to this share.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of sampling. It may be public.")] = 0,
    compare: Annotated[
        Path | None, typer.Option(help="PUBLIC set: count how much of it is in the answers, word for word.")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="The server's identity file; without it the set is not signed."),
    ] = None,
) -> None:
    """Sample records from a release: its sampled answers to public questions.

    Costs no further epsilon if the questions are public. A comparison with private records would reveal something
    about them.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    from fedllm.audit.trust import Trust
    from fedllm.crypto.identity import Identity
    from fedllm.release.loading import load_release
    from fedllm.release.manifest import verify_release
    from fedllm.release.synthesize import Sampling, write_set
    from fedllm.values import parse

    sampling = parse(Sampling, {"temperature": temperature, "top_p": top_p, "seed": seed})
    signer = None if key is None else Identity.read(key)
    release = load_release(dest, verify_release(dest, Trust.read(trust)))
    made = write_set(out, release, prompts, n, sampling, compare, signer)
    counts, shared = made.counts, made.overlap
    _say(
        f"asked {counts.asked}, kept {counts.kept}: {counts.duplicates} duplicates, {counts.empty} empty, "
        f"{counts.too_long} too long"
    )
    if shared is not None:
        _say(
            f"word for word in {compare}: {shared.exact} whole answers, {shared.runs} with a run of 8 words or 20 "
            "characters"
        )
    _say(f"the set is in {out}{'' if signer else ', not signed'}. Its claim is the release's: {_promise(made.privacy)}")


def _promise(privacy: "Privacy") -> str:
    return f"{privacy.said}, for one {privacy.unit} of one site" if privacy.private else privacy.said


def _say(line: str) -> None:
    typer.echo(escaped(line))
