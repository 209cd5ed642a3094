"""`fedllm`: the command line's root, and `fedllm simulate`.

An entry point: it may import anything, and imports late so that --help is quick.
"""

import gc
import inspect
import os
import re
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import fedllm
from fedllm.cli import audit, enrolment, ledger, privacy, release, runs, serve
from fedllm.errors import FedllmError
from fedllm.shown import escaped_lines

app = typer.Typer(
    help="Fine-tune one language model across sites, under differential privacy.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # `main` prints one line; a traceback may quote a record
    context_settings={"help_option_names": ["-h", "--help"]},
)
_console = Console()
_errors = Console(stderr=True)

_SIMULATE_HELP = """Run a whole federation on this machine.

Without arguments: eight sites, a small Korean and English model and a service-desk corpus that ship with
fedllm, epsilon 8. Everything is a setting; OVERRIDES are Hydra's KEY=VALUE.

[bold]Examples[/bold]

  fedllm simulate                                        the embedded demo

  fedllm simulate privacy=off                            without privacy

  fedllm simulate privacy.epsilon=3 training.rounds=30   other settings

  fedllm simulate name=first                             writes to runs/first

  fedllm simulate name=first resume=true                 after a crash

  fedllm simulate experiment=shakeout                    of conf/experiment

  fedllm simulate experiment=parallel                    on Ray

  fedllm simulate model=causal-lm model.source=./my-model data=records
      data.train=./records.jsonl data.prompt='{question}' data.text='{answer}'
      federation=iid privacy.unit=record   your own model and records

  fedllm simulate --cfg                                  print the settings
"""


@app.command(help=_SIMULATE_HELP)
def simulate(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Hydra overrides, KEY=VALUE.", show_default=False)
    ] = None,
    cfg: Annotated[bool, typer.Option("--cfg", help="Print the composed configuration and stop.")] = False,
    config_dir: Annotated[
        Path | None, typer.Option("--config-dir", help="A folder with Hydra groups of your own, searched first.")
    ] = None,
) -> None:
    """Run a simulated federation."""
    from fedllm.cli.hydra_config import as_yaml, compose, validate
    from fedllm.config import SimulationConfig

    composed = compose("config", overrides or [], config_dir)
    if cfg:
        typer.echo(as_yaml(composed), nl=False)
        return
    config = validate(SimulationConfig, composed)  # before torch is imported: a mistake is told at once
    from simulations.workers import warm_up

    warm_up(config.federation)  # beside the imports below
    from fedllm.cli.live_view import Screen

    try:
        with Screen(_console) as screen:
            screen.say("loading PyTorch and Transformers")
            gc.disable()  # imports make millions of objects that stay: to look for garbage among them takes seconds
            from simulations.simulate import simulate as run

            gc.freeze()
            gc.enable()
            summary = run(config, screen.announce, screen.observe)
    except KeyboardInterrupt:
        _errors.print(f"stopped. What was done is kept; continue with name={config.name} resume=true.", markup=False)
        raise typer.Exit(130) from None
    if summary.stopped:  # the reason first: what follows is to be read with it
        _say_error(summary.stopped)
    screen.summarise(summary, time.monotonic() - fedllm.BEGAN)
    if summary.stopped:
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(fedllm.__version__)


enrolment.register(app)
runs.register(app)
ledger.register(app)
audit.register(app)
privacy.register(app)
release.register(app)
serve.register(app)


def _let_flow(part: typer.Typer) -> None:
    """Let paragraphs of help fill the terminal: typer keeps the line breaks of docstrings, all but the first's."""
    for command in part.registered_commands:
        text = inspect.cleandoc(command.help or (command.callback and command.callback.__doc__) or "")
        command.help = re.sub(r"(?<=\S)\n(?=\S)", " ", text)  # what is indented is an example
    for group in part.registered_groups:
        if group.typer_instance is not None:
            _let_flow(group.typer_instance)


_let_flow(app)


def _say_error(message: str) -> None:
    """Print an error. It may quote what others have written, which must not rewrite the screen."""
    _errors.print("[bold red]error[/bold red]", end=" ")
    _errors.print(escaped_lines(message), markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; a FedllmError becomes one message and exit code 1."""
    try:
        app(standalone_mode=True)
    except FedllmError as error:
        _say_error(str(error))
        sys.exit(1)
    except Exception as error:
        if os.environ.get("FEDLLM_TRACEBACK"):
            raise
        lines = str(error).strip().splitlines() or ["no more is known"]
        _say_error(
            f"{type(error).__name__}: {lines[0][:500]}. If this is a fault of fedllm, FEDLLM_TRACEBACK=1 shows where."
        )
        sys.exit(1)
    finally:
        gc.freeze()  # the search for garbage at the end of the process takes seconds, and nobody needs it
