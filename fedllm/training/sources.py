"""Names of models and data sets: hub names, local paths, and pkg://package/path for what ships in a package."""

from importlib import resources
from pathlib import Path

from fedllm.errors import ConfigError

_FILES = (".jsonl", ".json", ".csv", ".parquet")  # what ends like this is meant as a file, and no hub name


def resolve(source: str) -> str | Path:
    """Return a Path if `source` exists on this machine, or `source` itself if it can only be a hub name.

    Raises ConfigError if it is meant as a path and nothing is there.
    """
    try:
        if source.startswith("pkg://"):
            package, _, inside = source.removeprefix("pkg://").partition("/")
            path = Path(str(resources.files(package))) / inside
        else:
            path = Path(source).expanduser()
        found = path.exists()
    except (ModuleNotFoundError, TypeError, ValueError):
        raise ConfigError(f"{source}: there is no Python package of that name with files") from None
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{source[:80]}: not a usable path ({error})") from None
    if found:
        return path
    if source.startswith("pkg://"):
        raise ConfigError(f"{source}: the package holds no such file or folder")
    looks_like_hub_name = (
        source.count("/") <= 1 and not source.startswith((".", "/", "~")) and path.suffix.lower() not in _FILES
    )
    if looks_like_hub_name:
        return source
    raise ConfigError(f"{source}: no such file or folder (looked in {Path.cwd()})")
