"""Cards beside what is made from a release: README.md in English, README.ko.md in Korean."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedllm.files import cannot_write


def write_pages(folder: Path, name: str, **values: object) -> None:
    """Write the card `name` in both languages to a folder; raises FolderError."""
    environment = Environment(  # noqa: S701  # Markdown, not HTML
        loader=PackageLoader("fedllm.release"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(cell=_cell)
    for language, file in (("en", "README.md"), ("ko", "README.ko.md")):
        text = environment.get_template(f"{name}.{language}.md.j2").render(**values)
        try:
            (folder / file).write_text(text, "utf-8")
        except OSError as error:
            raise cannot_write(folder / file, error) from error


def _cell(text: object) -> str:
    """Return text as it stands in a cell of a table: in one line, and as text whatever signs it has."""
    return "".join(f"\\{sign}" if sign in "\\|`*_{}[]<>#!" else sign for sign in " ".join(str(text).split()))
