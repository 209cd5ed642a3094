"""Settings files in YAML (site.yaml, federation.yaml, conf/): read strictly, with the line of every mistake."""

import re
from pathlib import Path
from typing import Any

import yaml

from fedllm.errors import ConfigError
from fedllm.files import read

_MAX_SETTINGS = 1 << 20  # bytes


class _Settings(yaml.SafeLoader):
    """YAML without its traps: a key is given once, 1e-5 is a number, dates and yes/no are text."""


_Settings.yaml_implicit_resolvers = {
    sign: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
    for sign, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _signs in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", "-+.0123456789"),
):
    _Settings.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_signs))


def _mapping(loader: _Settings, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    twice = sorted({str(key) for key in keys if keys.count(key) > 1})
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is given twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Settings.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file; raises ConfigError with the line if it is not YAML."""
    data = read(path, _MAX_SETTINGS)
    try:
        values = yaml.load(data.decode("utf-8-sig"), _Settings)  # noqa: S506  # a SafeLoader
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8. Save the file as UTF-8.") from None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{line}: not YAML as expected ({problem}). Write `key: value`.") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: expected lines of `key: value`, found {type(values).__name__}")
    return values
