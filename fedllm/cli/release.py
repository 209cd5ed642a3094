"""`fedllm release`: what is made from a finished run, and from a release.

An entry point: it may import anything, and imports late so that --help is quick.
"""

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fedllm.shown import escaped

release_app = typer.Typer(
    help="A release: its model with the evidence behind it, and what is made from it.", no_args_is_help=True
)

_Folder = Annotated[Path, typer.Argument(help="Folder of a release.", show_default=False)]
_Trust = Annotated[
    Path,
    typer.Option(
        help="File of keys that you trust: lines NAME FINGERPRINT, NAME being head-office.", show_default=False
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the main command."""
    app.add_typer(release_app, name="release")


def _say(line: str) -> None:
    typer.echo(escaped(line))


class Targets(Enum):
    """What a student learns of its teacher."""

    auto = "auto"
    logits = "logits"
    answers = "answers"


@release_app.command("distil")
def distil(
    dest: _Folder,
    student: Annotated[str, typer.Option(help="Model to teach: a folder or a hub name.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(
            help="PUBLIC questions (.jsonl, .csv, .parquet), or the folder of a synthetic set.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the student to, a release itself.", show_default=False)],
    trust: _Trust,
    key: Annotated[
        Path,
        typer.Option(
            help="Identity file of head office, such as keys/identity, that signs the student.", show_default=False
        ),
    ],
    data_is_public: Annotated[
        bool, typer.Option("--data-is-public", help="Everybody may read --data. A signed synthetic set needs no word.")
    ] = False,
    targets: Annotated[
        Targets, typer.Option(help="Teach by logits or by answers; auto: by logits where both have one vocabulary.")
    ] = Targets.auto,
    temperature: Annotated[float, typer.Option(help="Temperature of the logits.")] = 2.0,
    epochs: Annotated[int, typer.Option(help="Times that every question is learned.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate of AdamW.")] = 1e-4,
    batch: Annotated[int, typer.Option(help="Questions of a step.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the order of the questions.")] = 0,
) -> None:
    """Teach a smaller model by a release, on public questions, and release it with the teacher's claim.

    The columns of the prompt are read; the answers are the teacher's own. Records of the sites as --data would cost
    epsilon that nobody counts and break the claim: what is public is your word, and goes into the student's card.
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
    _say(f"the student is in {out}. Its claim is its teacher's: {_claim(made)}")


@release_app.command("synthesize")
def synthesize(
    dest: _Folder,
    prompts: Annotated[
        Path, typer.Option(help="PUBLIC questions: a YAML file of templates and lists.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the set to.", show_default=False)],
    trust: _Trust,
    n: Annotated[int, typer.Option("--n", min=1, max=10_000_000, help="Questions to ask.")] = 1000,
    temperature: Annotated[float, typer.Option(help="Temperature of sampling.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this share.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of sampling. It may be known.")] = 0,
    compare: Annotated[
        Path | None, typer.Option(help="PUBLIC set: tell how much of it is in the answers word for word.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Identity file of head office that signs the set; without it, it is not signed.")
    ] = None,
) -> None:
    """Sample records from a release: its answers, drawn by chance, to public questions.

    Costs no further epsilon, as long as the questions are public. A comparison with private records would tell of them.
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
    _say(f"the set is in {out}{'' if signer else ', not signed'}. Its claim is the release's: {_claim(made)}")


def _claim(made: Any) -> str:
    privacy = made.privacy
    if not privacy.private:
        return "NOT PRIVATE"
    return f"epsilon {privacy.epsilon:.4g} at delta {privacy.delta:g}, for one {privacy.unit} of a site"
