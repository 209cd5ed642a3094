"""Writes docs/configuration.md from the settings' own types, defaults, bounds and docstrings.

python -m docs.reference
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from client.site_file import SiteFile
from fedllm.cli.hydra_config import compose
from fedllm.config import DeploymentConfig, SimulationConfig
from server.federation import FederationFile

PAGE = Path(__file__).with_name("configuration.md")
Schema = Mapping[str, Any]

_HEAD = """\
# Configuration

<!-- Written by `python -m docs.reference` from the settings themselves. Change their docstrings, not this page. -->

`fedllm simulate` and `fedllm submit` take settings as `KEY=VALUE`, for example `privacy.epsilon=3`. The settings come
in groups. `privacy=local` takes one choice of a group, which is a file of `conf/`. `experiment=NAME` lays an overlay on
top of the choices, `'experiment=[A,B]'` lays several. A single key counts more than an overlay, and an overlay more
than the choice of a group, in whatever order they are written. `--cfg` prints the result and stops. `--config-dir
FOLDER` adds choices of your own.

The defaults below are those of `fedllm simulate`:

- "submit" gives the default of `fedllm submit` if it differs.
- "simulate only" marks a setting that `fedllm submit` does not have. What a deployed site decides for itself is in its
  [site.yaml](#siteyaml).
- "required" means that there is no default.
- Other choices of a group have other defaults: see their files in `conf/`.

A setting that is unknown, of the wrong type or out of range is refused before anything is loaded.
"""
_SITE = """
## site.yaml

The settings of a site, in its own folder. The server never sees this file and cannot change it. `fedllm site init`
writes it, and `fedllm site check` must be run after a change. Limits of the policy are compared with a plan before any
record is used.
"""
_SERVER = """
## federation.yaml

The settings of the server, in its own folder. `fedllm init-federation` writes it.
"""


def page() -> str:
    """Return the whole page; raises KeyError with the name of a setting that has no docstring."""
    simulate, submit = _flat(compose("config", [], None)), _flat(compose("deployment", [], None))
    simulated, deployed = dict(options(SimulationConfig)), dict(options(DeploymentConfig))
    parts, groups = [_HEAD], dict.fromkeys(key.partition(".")[0] if "." in key else "" for key in simulated)
    for group in sorted(groups, key=bool):  # those of no group first
        rows = []
        for key, (schema, words) in simulated.items():
            if (key.partition(".")[0] if "." in key else "") != group:
                continue
            default, other = (_value(values.get(key, schema.get("default", "???"))) for values in (simulate, submit))
            if key not in deployed:
                default += " (simulate only)"
            elif other != default:
                default += f"; submit: {other}"
            rows.append((key, schema, default, words))
        parts += [f"\n## {group or 'The run'}\n\n", *_choices(group), _table(rows)]
    parts += ["\n## experiment\n\n", *_choices("experiment")[:-1]]
    for text, kind in ((_SITE, SiteFile), (_SERVER, FederationFile)):
        rows = [(key, schema, _value(schema.get("default", "???")), words) for key, (schema, words) in options(kind)]
        parts += [text, "\n", _table(rows)]
    return "".join(parts)


def options(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, tuple[Schema, str]]]:
    """Yield every setting below `kind`: its dotted key, and its JSON schema with what its docstring says."""
    whole = kind.model_json_schema()
    words = docstrings(kind)
    for name, field in kind.model_fields.items():
        key, inner = f"{prefix}{name}", _model_in(field.annotation)
        if inner is not None:
            yield from options(inner, f"{key}.")
            continue
        schema = whole["properties"][name]
        if field.default_factory is not None:
            schema = {**schema, "default": field.get_default(call_default_factory=True)}
        if name not in words:
            raise KeyError(f"{kind.__name__}.{name} has no docstring that says what it means")
        yield key, (schema, words[name])


def docstrings(kind: type) -> dict[str, str]:
    """Return the text below each attribute of a class and of those that it is made from."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] in ("builtins", "pydantic", "typing"):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for attribute, text in pairwise(getattr(tree, "body", [])):
            match attribute, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                    found[name] = " ".join(said.split())
    return found


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the group of settings that an annotation names, also if it may be null."""
    for part in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by their dotted keys; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found


# ---- how a setting is shown ------------------------------------------------------------------------------------------


def _table(rows: list[tuple[str, Schema, str, str]]) -> str:
    lines = ["| setting | type | allowed | default | meaning |", "|---|---|---|---|---|"]
    for key, schema, default, words in rows:
        kind, allowed = _type(schema)
        lines.append(f"| `{key}` | {kind} | {allowed} | {default} | {words.replace('|', '&#124;')} |")
    return "\n".join(lines) + "\n"


def _choices(group: str) -> list[str]:
    """Return a list of the choices of a group, each with the first words of its file."""
    folder = resources.files("conf") / group
    if not group or not folder.is_dir():
        return []
    lines = []
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        said: list[str] = []
        for line in file.read_text("utf-8").splitlines():
            text = line.removeprefix("#").strip()
            if not line.startswith("#") or (said and text.startswith("fedllm ")):
                break
            said += [text] if not text.startswith("@package") else []
        words = " ".join(said).replace("<", "&lt;").removesuffix(":").partition(" fedllm ")[0].removesuffix(":")
        lines.append(f"- `{group}={file.name.removesuffix('.yaml')}`{': ' if words else ''}{words}\n")
    return [*lines, "\n"]


def _type(schema: Schema) -> tuple[str, str]:
    """Return a type and the allowed values in words."""
    match schema:
        case {"anyOf": parts}:
            shown = [_type(part) for part in parts]
            return " or ".join(kind for kind, _ in shown), "; ".join(allowed for _, allowed in shown if allowed)
        case {"enum": values}:
            return "choice", ", ".join(f"`{value}`" for value in values)
        case {"const": value}:
            return "choice", f"`{value}`"
        case {"type": "array", "prefixItems": items}:
            kind, allowed = _type(items[0])
            return f"{len(items)} × {kind}", f"each {allowed}"
        case {"type": "array", "items": items}:
            kind, allowed = _type(items)
            count = _range(schema.get("minItems"), schema.get("maxItems"))
            return f"list of {kind}{'' if kind == 'text' else 's'}", "; ".join(
                filter(None, (f"{count} of them" if count else "", allowed))
            )
        case {"type": "object", "additionalProperties": values}:
            return f"mapping of text to {_type(values)[0]}", _type(values)[1]
        case {"type": "string"}:
            count = _range(schema.get("minLength"), schema.get("maxLength"))
            return "text", f"{count} characters" if schema.get("maxLength") else "not empty" if count else ""
        case {"type": "integer" | "number" as kind}:
            above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
            least, most = schema.get("minimum"), schema.get("maximum")
            return "whole number" if kind == "integer" else "number", _range(least, most, above, below)
        case {"type": "boolean"}:
            return "true or false", ""
        case {"type": "null"}:
            return "null", ""
    raise TypeError(f"no words for a setting of the type {schema}")


def _range(least: float | None, most: float | None, above: float | None = None, below: float | None = None) -> str:
    low = f"above {_number(above)}" if above is not None else _number(least) if least is not None else ""
    high = f"below {_number(below)}" if below is not None else _number(most) if most is not None else ""
    if low and high:
        return f"{low} to {high}"
    if low:
        return low if above is not None else f"{low} or more"
    return high if below is not None or not high else f"at most {high}"


def _number(value: float) -> str:
    if value >= 2**62:
        return "2⁶³"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


def _value(value: Any) -> str:
    match value:
        case "???":
            return "required"
        case bool():
            return f"`{str(value).lower()}`"
        case None:
            return "`null`"
        case float():
            return f"`{value:g}`"
        case list() | tuple():
            return f"`[{', '.join(_value(each).strip('`') for each in value)}]`"
        case dict():
            return f"`{value or '{}'}`"
        case "":
            return '`""`'
        case str():
            return f"`{value!r}`" if value != value.strip() or "\n" in value else f"`{value}`"
    return f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
