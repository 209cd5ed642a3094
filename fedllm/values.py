"""Frozen, validated values: their base, the types and bounds that they share, and how their errors read."""

import difflib
import json
import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fedllm.canonical import canonical
from fedllm.errors import ConfigError
from fedllm.shown import shows

MAX_HOLDERS = 1024  # sites of one secure aggregation
MAX_SITES = 5_000  # of a federation: their roster fits the header of a message
MAX_NAME = 200  # characters of a site's name; bytes of UTF-8 of one that is deployed: with an ending it names a file
HEAD_OFFICE = "head-office"  # the server, where sites are named beside it: no site has that name
MAX_ROUNDS = 1_000_000
MOST_CANARIES = 1_000  # of a site, that a plan may ask for; an opening has room for more
MAX_STEPS = 1_000_000  # of a whole run: as far as the accountants were tried
# magnitude of a value that a round starts from: far beyond what training finds in an adapter, and products of three
# layers of them still have squares in float32
MAX_START = 1e4


class Frozen(BaseModel):
    """A value object: immutable, no unknown fields, no silent conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _spelled(values: dict[str, float]) -> dict[str, float]:
    """Return values by site, in the one spelling of a site."""
    named = {canonical(name): value for name, value in values.items()}
    if len(named) < len(values):
        raise ValueError("a site is named twice")
    return named


def _shown(text: str) -> str:
    """Refuse what would begin a line of a log, hide one, or look like another text."""
    if not shows(text):
        raise ValueError(f"expected characters that show, and no line break, found {text[:80]!r}")
    return text


Printable = Annotated[str, AfterValidator(_shown)]  # every text that comes from elsewhere and that people may read
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Rate = Annotated[float, Field(ge=1e-9, le=1e6)]  # of learning
Beta = Annotated[float, Field(ge=0, lt=1)]
Label = Annotated[Printable, AfterValidator(canonical), Field(max_length=1000)]  # a class, in its one spelling
Name = Annotated[Printable, Field(min_length=1, max_length=MAX_NAME)]  # of a site
Names = Annotated[tuple[Name, ...], Field(max_length=MAX_HOLDERS)]
Layer = Annotated[Printable, Field(max_length=200)]  # the name of one
BySite = Annotated[dict[str, float], AfterValidator(_spelled)]


def address(host: str, port: int) -> str:
    """Return HOST:PORT as people and gRPC write it: IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_head_office(name: str) -> bool:
    """Whether people would read a name as the server's."""
    return unicodedata.normalize("NFKC", name).casefold().strip().replace("_", "-").replace(".", "-") == HEAD_OFFICE


def _refuse_head_office(name: str) -> None:
    if is_head_office(name):
        raise ConfigError(f"site name {name!r}: an audit calls the server {HEAD_OFFICE!r}. Give the site another name")


def _column(name: str) -> str:
    """Return the one spelling of a column's name; refuse a name of nothing that shows."""
    found = canonical(name)
    if not found:
        raise ValueError("expected the name of a column")
    return found


Column = Annotated[str, AfterValidator(_column)]


def check_name(name: str) -> None:
    """Raise ConfigError where no message can carry the name of a site, or it is the server's."""
    _refuse_head_office(name)
    if not 1 <= len(name) <= MAX_NAME or not shows(name):
        raise ConfigError(f"site name {name[:40]!r}: expected 1 to {MAX_NAME} printable characters, found {len(name)}")


def check_site_name(name: str) -> str:
    """Return the name of a deployed site in its one spelling, NFC.

    Raises ConfigError where it cannot name a file, or is the server's.
    """
    _refuse_head_office(name)
    name = unicodedata.normalize("NFC", name)
    plain = all(unicodedata.category(sign)[0] in "LNM" or sign in "-_." for sign in name)
    if not plain or not name[:1].isalnum() or not 1 <= len(name.encode()) <= MAX_NAME:
        raise ConfigError(
            f"site name {name[:80]!r}: expected letters and digits of any script, and - _ . between them, such as "
            f"seoul-gangnam; at most {MAX_NAME} bytes"
        )
    return name


def _site(name: str) -> str:
    try:
        right = check_site_name(name)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    if right != name:
        raise ValueError("the name of a site is written in NFC")
    return name


SiteName = Annotated[str, AfterValidator(_site)]  # deployed
_T = TypeVar("_T", bound=Frozen)


def parse(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """Validate plain data as `kind`.

    Raises ConfigError with every offending key, what was expected, and the nearest known key if one is unknown.
    """
    try:
        text = json.dumps(values, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the configuration holds a value that is neither text nor number ({error})") from None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        lines = [_explain(kind, dict(detail)) for detail in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _explain(kind: type[Frozen], detail: dict[str, Any]) -> str:
    path = [str(part) for part in detail["loc"]]
    key = ".".join(path) or "configuration"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        known = _known_keys(kind, path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{key}: a value is needed"
    if detail["type"] == "value_error":
        return f"{key}: {message}"
    if detail["type"] == "string_type" and isinstance(detail["input"], bool | int | float):
        message += ". Put it in quotes, and the whole KEY=\"['0','1']\" in others, which the shell takes away"
    return f"{key}={detail['input']!r}: {message[:1].lower()}{message[1:]}"


def _known_keys(kind: type[Frozen], path: list[str]) -> list[str]:
    for part in path:
        field = kind.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Frozen)):
            return []
        kind = field.annotation
    return sorted(kind.model_fields)
