"""`fedllm release`: what a run's model becomes.

An entry point: it may import anything, and imports late so that --help is quick.
"""

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.shown import escaped

if TYPE_CHECKING:
    from fedllm.release.evaluate import Evaluation

release_app = typer.Typer(help="A model's release: what it claims, and how good it is.", no_args_is_help=True)


class Lang(Enum):
    """Languages of a page."""

    ko = "ko"
    en = "en"


def register(app: typer.Typer) -> None:
    """Add the commands to the main command."""
    app.add_typer(release_app, name="release")


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
    trust: Annotated[Path, typer.Option(help="File of trusted keys: lines of NAME KEY.", show_default=False)],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="YAML of prompts to compare with the first DEST: {name: template}, or {name: {prompt: , system: }}.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("evaluation"),
    limit: Annotated[int, typer.Option(min=1, help="Use so many records at most, evenly spread over all.")] = 1000,
    lang: Annotated[
        Lang | None, typer.Option(help="Language of evaluation.html; without it, both.", show_default=False)
    ] = None,
) -> None:
    """Compare releases with their base on PUBLIC records: a table, evaluation.json and evaluation.html.

    That the records are public is your word; nothing can check it, and nothing is counted for what you learn.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars of the libraries' own
    from fedllm.audit.trust import Trust
    from fedllm.release import evaluate as work
    from fedllm.release.evaluation_page import render_html

    work.check_place(out, dest)
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
