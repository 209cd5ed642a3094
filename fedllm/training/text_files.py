"""Text files of records, .jsonl, .json and .csv, to rows with their places.

How a file is read is a setting and never guessed (`FileConfig`); where it does not fit, the error names the likely one.
"""

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from fedllm.canonical import canonical, read_json
from fedllm.config import FileConfig
from fedllm.errors import DataError, first_line

_SEPARATORS = (";", "\t", "|")
_MAGIC = {  # first bytes of what is named .csv or .json by mistake
    b"PK\x03\x04": "an Excel (.xlsx) or ZIP file",
    b"\xd0\xcf\x11\xe0": "an Excel (.xls) file",
    b"\x1f\x8b": "a gzip file",
    b"PAR1": "a Parquet file",
}
_ASCII = "".join(map(chr, range(128)))
_BEYOND = "éя漢가"

column_name = lru_cache(maxsize=10_000)(canonical)


class Record(dict[str, Any]):
    """A row by canonical column names, and where it stands."""

    __slots__ = ("place",)

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        """Raise DataError where two columns have one name."""
        super().__init__({column_name(name): value for name, value in values.items()})
        self.place = place
        if len(self) < len(values):
            raise DataError(f"{place}: two columns have one name, apart from spaces and Unicode form. Rename one.")


def text_rows(file: Path, how: FileConfig, alone: bool) -> Iterator[Record | DataError]:
    """Yield the records of a text file, each as a row or as what is wrong with it.

    `alone`: nothing in one record changes how another is read. Raises DataError where the file cannot be used.
    """
    suffix = file.suffix.lower()
    if alone and suffix == ".json":
        raise DataError(
            f"{file}: one damaged record would spoil the others. Write .jsonl, a record a line; a file that is written "
            "so need only be renamed."
        )
    content, encoding = _content(file, how, alone)
    if suffix == ".csv":
        yield from (_csv_lines if alone else _csv_rows)(file, content, encoding, how)
    elif suffix == ".json" and (rows := _json_list(file, content, encoding)) is not None:
        yield from rows
    else:
        for number, line in _lines(content):
            where = f"{file}, line {number}"
            try:
                yield _object(_json_value(line, encoding, where), where)
            except DataError as error:
                yield error


def _content(file: Path, how: FileConfig, alone: bool) -> tuple[bytes, str]:
    """Return the bytes of a file and their encoding, in which a line ends with the byte of a line feed."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    found = next((kind for first, kind in _MAGIC.items() if content.startswith(first)), None)
    if found is not None and not (alone and file.suffix.lower() == ".jsonl"):  # there, these bytes are one record's
        raise DataError(f"{file} is {found} by another name. Save it as text (CSV, UTF-8), or name it as what it is.")
    encoding = how.encoding
    if not _by_lines(encoding):
        if alone:
            raise DataError(
                f"{file}: in data.encoding={encoding} one damaged record would spoil the others. Convert it to UTF-8."
            )
        try:
            content, encoding = content.decode(encoding).encode(), "utf-8"
        except UnicodeError as error:
            raise DataError(f"{file}: not {encoding} ({first_line(error)})") from None
    return content.removeprefix(codecs.BOM_UTF8), encoding


@cache
def _by_lines(encoding: str) -> bool:
    """Whether a line can be read by itself: ASCII is ASCII, and other letters are not written with it (ISO-2022)."""
    beyond = _BEYOND.encode(encoding, "ignore")
    return _ASCII.encode(encoding, "ignore") == _ASCII.encode() and not (beyond and beyond.isascii())


def _lines(content: bytes) -> list[tuple[int, bytes]]:
    return [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]


def _decode(line: bytes, encoding: str, where: str) -> str:
    try:
        return line.removeprefix(codecs.BOM_UTF8).decode(encoding)
    except UnicodeDecodeError:
        raise DataError(_not_encoded(line, encoding, where)) from None


def _not_encoded(line: bytes, encoding: str, where: str) -> str:
    likely = "data.encoding"
    if b"\0" in line or line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        likely = "data.encoding=utf-16"
    elif encoding != "cp949":
        try:
            line.decode("cp949")
            likely = "data.encoding=cp949"
        except UnicodeDecodeError:
            pass
    return f"{where}: not {encoding.upper()}. Set {likely}, or convert the file to UTF-8."


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _json_list(file: Path, content: bytes, encoding: str) -> Iterator[Record | DataError] | None:
    """Return the records of a file that is one list of objects, or one object; None where it has a record a line."""
    try:
        value = _json_value(content, encoding, str(file))
    except DataError:
        if content.lstrip()[:1] == b"{":
            return None
        raise
    if not isinstance(value, dict | list):
        raise DataError(f"{file}: expected a list of objects such as [{{...}}], or an object a line")
    return _json_objects(file, value if isinstance(value, list) else [value])


def _json_objects(file: Path, values: Sequence[object]) -> Iterator[Record | DataError]:
    for number, value in enumerate(values, start=1):
        try:
            yield _object(value, f"{file}, record {number}")
        except DataError as error:
            yield error


def _json_value(line: bytes, encoding: str, where: str) -> Any:
    try:
        return read_json(_decode(line, encoding, where))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}). Correct or remove it.") from None
    except ValueError:  # its text may quote the record
        raise DataError(
            f"{where}: not JSON (a key is given twice, or a number has more than 4,300 digits). Correct or remove it."
        ) from None


def _object(value: object, where: str) -> Record:
    if not isinstance(value, dict):
        hint = "; a file that is one list is called .json" if isinstance(value, list) else ""
        raise DataError(f"{where}: expected an object such as {{...}}, found {str(value)[:20]!r}{hint}")
    return Record(value, where)


# ---- CSV -------------------------------------------------------------------------------------------------------------


def _csv_lines(file: Path, content: bytes, encoding: str, how: FileConfig) -> Iterator[Record | DataError]:
    """Yield a record for each line: a cell that goes on in the next would make two records depend on one another."""
    lines = _lines(content)
    if not lines:
        return
    columns = _csv_line(lines[0][1], encoding, how, f"{file}, line {lines[0][0]}")
    _check_header(file, columns)
    for number, line in lines[1:]:
        where = f"{file}, line {number}"
        try:
            yield _cells(columns, _csv_line(line, encoding, how, where), where)
        except DataError as error:
            yield error


def _reader(lines: Iterable[str], how: FileConfig) -> Any:
    csv.field_size_limit(2**31 - 1)  # a cell is as long as a line of .jsonl may be
    return csv.reader(lines, strict=True, delimiter=how.delimiter)


def _csv_line(line: bytes, encoding: str, how: FileConfig, where: str) -> list[str]:
    try:
        text = _decode(line, encoding, where).rstrip("\r")
        return list(next(_reader([text], how)))
    except csv.Error as error:
        raise DataError(
            f"{where}: not CSV in one line ({error}). Correct or remove it; for text of several lines write .jsonl."
        ) from None


def _csv_rows(file: Path, content: bytes, encoding: str, how: FileConfig) -> Iterator[Record | DataError]:
    """Yield records of one or several lines; raises DataError where it is not clear where a record ends."""
    text = content.decode(encoding, "surrogateescape")  # what cannot be read is an error of its record alone
    reader = _reader(io.StringIO(text, newline=""), how)
    start, number = 1, 0  # line in which the record begins that is being read: one with an open quote ends far below
    columns: list[str] | None = None
    try:
        for fields in reader:
            if fields and columns is None:
                columns = fields
                _check_text(fields, encoding, f"{file}, line {start}")
                _check_header(file, columns)
            elif fields and columns is not None:
                number += 1
                where = f"{file}, line {start} (record {number})"
                try:
                    _check_text(fields, encoding, where)
                    yield _cells(columns, fields, where)
                except DataError as error:
                    yield error
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{file}: not CSV ({error}) in the record that begins in line {start}. Correct or remove it."
        ) from None


def _check_text(fields: Sequence[str], encoding: str, where: str) -> None:
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        raise DataError(_not_encoded("".join(fields).encode(encoding, "surrogateescape"), encoding, where)) from None


def _cells(columns: Sequence[str], fields: Sequence[str], where: str) -> Record:
    if len(fields) != len(columns):
        raise DataError(
            f"{where}: expected {len(columns)} fields, as in the first line, found {len(fields)}. Correct or remove "
            "it; text that holds a separator is quoted."
        )
    return Record(dict(zip(columns, fields, strict=True)), where)


def _check_header(file: Path, columns: Sequence[str]) -> None:
    names = [column_name(column) for column in columns]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(f"{file}, line 1: two columns are called {', '.join(twice)}. Rename or remove one.")
    found = [sign for sign in _SEPARATORS if len(columns) == 1 and sign in columns[0]]
    if found:
        setting = "tab" if found[0] == "\t" else f"'{found[0]}'"
        raise DataError(
            f"{file}, line 1: there is one column, {columns[0]!r}. Set data.separator={setting}, or rename the column."
        )
