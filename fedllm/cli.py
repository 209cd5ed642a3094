"""The command line. An entry point: it may import anything, and imports late so that --help is quick."""

import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import fedllm
from fedllm.errors import ConfigError, FedllmError

if TYPE_CHECKING:
    from fedllm.plan import SimulationConfig

app = typer.Typer(
    help="Fine-tune one language model across branch offices, under differential privacy.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # `main` prints one line; a traceback may quote a record
    context_settings={"help_option_names": ["-h", "--help"]},
)
_console = Console()
_errors = Console(stderr=True)

_SIMULATE_HELP = """Run a whole federation on this machine.

Without arguments: eight branch offices, a small Korean and English model and a service-desk corpus that ship with
fedllm, epsilon 8. Everything is a setting; OVERRIDES are Hydra's KEY=VALUE.

[bold]Examples[/bold]

  fedllm simulate                                            the embedded demo

  fedllm simulate privacy=off                                the same without privacy (branded NOT PRIVATE)

  fedllm simulate privacy.epsilon=3 training.rounds=30       other settings

  fedllm simulate name=first                                 outputs in runs/first

  fedllm simulate name=first resume=true                     continue it after a crash

  fedllm simulate experiment=shakeout                        an overlay from conf/experiment

  fedllm simulate federation.backend=ray                     sites in parallel processes, on Ray

  fedllm simulate model=causal-lm model.source=./my-model data=records data.train=./records.jsonl
      data.prompt='{question}' data.text='{answer}' federation=iid     your own model and records

  fedllm simulate --cfg                                      print the configuration and stop
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
    composed = _compose(overrides or [], config_dir)
    if cfg:
        from omegaconf import OmegaConf

        typer.echo(OmegaConf.to_yaml(OmegaConf.create(composed)), nl=False)
        return
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own progress bars would tear ours
    from simulations.screen import Screen
    from simulations.simulate import simulate as run

    config = _validate(composed)
    try:
        with Screen(_console) as screen:
            summary = run(config, screen.announce, screen.observe)
    except KeyboardInterrupt:
        _errors.print(f"stopped. What was done is kept; continue with name={config.name} resume=true.", markup=False)
        raise typer.Exit(130) from None
    screen.summarise(summary)
    if summary.stopped:
        _fail(summary.stopped)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(fedllm.__version__)


def _compose(overrides: list[str], config_dir: Path | None) -> dict[str, Any]:
    """Compose conf/ with the overrides; raises ConfigError where Hydra refuses."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise ConfigError(f"{override!r} is not an override. Write KEY=VALUE, for example privacy.epsilon=3.")
    overrides, later = _normalise(overrides)
    if config_dir is not None:
        if not config_dir.is_dir():
            raise ConfigError(f"--config-dir={config_dir}: no such folder")
        overrides = [f"hydra.searchpath=[{_quoted(f'file://{config_dir.resolve()}')}]", *overrides]
    try:
        with initialize_config_module("conf", version_base="1.3"):
            config = compose("config", overrides=overrides)
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"{', '.join(missing)}: a value is needed, e.g. {missing[0]}=...")
        values: Any = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        text = str(error).strip().splitlines()
        hints = [line for line in text[1:] if line.strip() and not any(words in line for words in _HYDRAS_ADVICE)][:12]
        raise ConfigError(
            "\n".join([text[0].replace("'++", "'"), *hints, "`fedllm simulate --cfg` prints every key."])
        ) from None
    for path, value in later:
        _set(values, path, value)
    return dict(values)


def _normalise(overrides: list[str]) -> tuple[list[str], list[tuple[list[str], Any]]]:
    """Spare the user three of Hydra's rules; returns overrides for Hydra, and (path, value) to set after it.

    A value that its grammar cannot read, such as the template {question}, is taken as text; a mapping, list or key
    that it cannot read, such as {서울: 4.0} or [가, 나], is read as YAML and set afterwards; and every key but that of
    a group may be new, since our own validation knows all keys and suggests the nearest.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, for_hydra, later = OverridesParser.create(), [], []
    for override in overrides:
        key, _, value = override.partition("=")
        if not key.strip("+~"):
            raise ConfigError(f"{override!r} names no key. Write KEY=VALUE, for example privacy.epsilon=3.")
        choices = _choices(key.lstrip("+"))
        try:
            parsed = parser.parse_override(override)
        except HydraException:
            loaded = _as_yaml(value)
            if isinstance(loaded, dict | list) or not key.isascii():
                later.append((key.lstrip("+").split("."), loaded))
                continue
            override = f"{key}={_quoted(value)}"  # noqa: PLW2901
        else:
            if choices and "=" in override and not parsed.is_sweep_override() and not isinstance(parsed.value(), str):
                raise ConfigError(f"{override}: {key} is a group of settings; choose one of {', '.join(choices)}")
        is_key = override[0].isalpha() and not choices and "/" not in key and "@" not in key
        for_hydra.append("++" + override if is_key else override)
    return for_hydra, later


# Lines of Hydra's that lead to its own next error, or to features that there are none of here.
_HYDRAS_ADVICE = ("full stack", "To append to your config", "To sweep over it", "Config search path", "provider=")


def _choices(key: str) -> list[str]:
    """Return the choices of a group in conf/; none where the key is no group."""
    from importlib import resources

    folder = resources.files("conf") / key
    if not key.isidentifier() or not folder.is_dir():
        return []
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def _as_yaml(value: str) -> Any:
    """Read a value as YAML; text that is none, or rather a template, stays: to YAML {question} is {question: null}."""
    import yaml

    try:
        loaded = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    inside = loaded.values() if isinstance(loaded, dict) else loaded if isinstance(loaded, list) else []
    return value if any(item is None or isinstance(item, dict | list) for item in inside) else loaded


def _quoted(text: str) -> str:
    """Quote text for Hydra's grammar, where a backslash counts only before a quote."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{'.'.join(path)}: {part} is a value, not a group of keys")
    values[path[-1]] = value


def _validate(composed: dict[str, Any]) -> "SimulationConfig":
    import json

    from fedllm.plan import SimulationConfig, parse

    if composed.get("name") is None:
        if composed.get("resume"):
            raise ConfigError("resume=true needs name=..., the run to continue")
        composed["name"] = f"{datetime.now():%Y%m%d-%H%M%S}"
    labels = composed.get("model", {}).get("labels")
    if isinstance(labels, str):  # the path of a JSON list
        try:
            composed["model"]["labels"] = json.loads(Path(labels).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.labels={labels}: not a JSON file with a list of labels ({error})") from None
    return parse(SimulationConfig, composed)


def _fail(message: str) -> None:
    _errors.print("[bold red]error[/bold red]", end=" ")
    _errors.print(message, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def main() -> None:
    """Run the command line; a FedllmError becomes one message and exit code 1."""
    try:
        app(standalone_mode=True)
    except FedllmError as error:
        _errors.print("[bold red]error[/bold red]", end=" ")
        _errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except Exception as error:
        if os.environ.get("FEDLLM_TRACEBACK"):
            raise
        lines = str(error).strip().splitlines() or ["no more is known"]
        _errors.print("[bold red]error[/bold red]", end=" ")
        text = (
            f"{type(error).__name__}: {lines[0][:500]}. If this is a fault of fedllm, FEDLLM_TRACEBACK=1 shows where."
        )
        _errors.print(text, markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
