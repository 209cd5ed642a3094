"""From conf/ and overrides to a validated configuration. An entry point, and the only importer of Hydra."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.values import parse

_T = TypeVar("_T", bound=RunConfig)


def compose(root: str, overrides: list[str], config_dir: Path | None) -> dict[str, Any]:
    """Compose conf/`root`.yaml with overrides, `config_dir` searched first; raises ConfigError if Hydra refuses."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
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
            config = hydra_compose(root, overrides=overrides)
        missing = sorted({str(key) for key in OmegaConf.missing_keys(config)} - {".".join(path) for path, _ in later})
        if missing:
            raise ConfigError(f"{', '.join(missing)}: a value is needed, e.g. {missing[0]}=...")
        values: Any = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        text = str(error).strip().splitlines()
        hints = [line for line in text[1:] if line.strip() and not any(words in line for words in _HYDRAS_ADVICE)][:12]
        unknown = re.search(r"Could not load '(\w+)/", text[0])  # one of a list, of whose choices Hydra says nothing
        if unknown:
            hints.append(f"Available options in '{unknown[1]}': {', '.join(_choices(unknown[1]))}")
        raise ConfigError("\n".join([text[0].replace("'++", "'"), *hints, "`--cfg` prints every key."])) from None
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
            single = parsed.is_sweep_override() or isinstance(parsed.value(), str)  # Hydra itself refuses sweeps
            chosen = parsed.value() if key.lstrip("+") == "experiment" else None  # overlays may lie one on another
            several = isinstance(chosen, list) and all(isinstance(each, str) for each in chosen)
            if choices and "=" in override and not single and not several:
                raise ConfigError(f"{override}: {key} is a group of settings; choose one of {', '.join(choices)}")
        is_key = override[0].isalpha() and not choices and "/" not in key and "@" not in key
        for_hydra.append("++" + override if is_key else override)
    return for_hydra, later


# Lines of Hydra's that lead to its own next error, or to features that there are none of here.
_HYDRAS_ADVICE = ("full stack", "To append to your config", "To sweep over it", "Config search path", "provider=")


def _choices(key: str) -> list[str]:
    """Return the choices of a group in conf/; none if the key is no group."""
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


def as_yaml(composed: dict[str, Any]) -> str:
    """Return a configuration for a person to read."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(composed))


def validate(kind: type[_T], composed: dict[str, Any]) -> _T:
    """Return the configuration as `kind`, its name filled in; raises ConfigError."""
    if composed.get("name") is None:
        if composed.get("resume"):
            raise ConfigError("resume=true needs name=..., the run to continue")
        composed["name"] = f"{datetime.now():%Y%m%d-%H%M%S}"
    model = composed.get("model")
    if isinstance(model, dict):
        if isinstance(labels := model.get("labels"), str):  # the path of a JSON list
            try:
                model["labels"] = json.loads(Path(labels).read_text("utf-8-sig"))
            except (OSError, ValueError) as error:
                raise ConfigError(f"model.labels={labels}: not a JSON file with a list of labels ({error})") from None
        if isinstance(labels := model.get("labels"), list):  # numbers, true and false are names of classes
            model["labels"] = [str(label) if isinstance(label, int | float) else label for label in labels]
    return parse(kind, composed)
