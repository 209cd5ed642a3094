"""Every command, argument and option says in --help what it is."""

from collections.abc import Iterator

import click
from typer.main import get_command

from fedllm.cli.main import app


def commands(command: click.Command, path: str = "fedllm") -> Iterator[tuple[str, click.Command]]:
    """Yield a command and all below it, with what is typed for each."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{path} {name}")


def test_every_argument_and_option_is_explained() -> None:
    found = list(commands(get_command(app)))
    assert len(found) > 40
    for path, command in found:
        assert command.help, path
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{path}: {parameter.name}"


def test_paragraphs_fill_the_terminal_and_examples_keep_their_lines() -> None:
    """Typer would break the lines of a terminal of 80 columns once more where the docstring has a line break."""
    for path, command in commands(get_command(app)):
        for line in (command.help or "").split("\n"):
            assert not line.startswith(" ") or len(line) <= 79, path
    restart = dict(commands(get_command(app)))["fedllm ledger restart"].help or ""
    assert [len(part.splitlines()) for part in restart.split("\n\n")] == [1, 1, 1]
