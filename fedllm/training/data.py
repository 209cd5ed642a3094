"""Records to tokens: files or hub data sets, templates, privacy units, batches."""

import bisect
import contextlib
import csv
import json
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow import parquet
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedllm.canonical import canonical, canonical_json
from fedllm.errors import ConfigError, DataError, first_line
from fedllm.plan import ModelConfig, TextConfig
from fedllm.training.sources import resolve

datasets.disable_progress_bars()

IGNORE = -100  # label of a position that carries no loss (the convention of torch and transformers)
_FORMATS = (".jsonl", ".json", ".csv", ".parquet")

Table: TypeAlias = datasets.Dataset


@dataclass(frozen=True)
class Record:
    """One tokenised record."""

    input_ids: NDArray[np.int64]  # [T]
    labels: NDArray[np.int64]  # [T], IGNORE where no loss falls; [] holds the class for classification


Unit = tuple[Record, ...]  # all records of one privacy unit, at least one


@dataclass(frozen=True)
class Batch:
    """Records of one forward pass, padded on the right."""

    input_ids: Tensor  # int64[N, T]
    attention_mask: Tensor  # int64[N, T]
    labels: Tensor  # int64[N, T], or int64[N] for classification
    unit_of_row: Tensor  # int64[N], 0 <= value < units
    units: int


def read_table(source: str, split: str) -> Table:
    """Read a data set: a file or folder of jsonl, json, csv or parquet, pkg://package/file, or a hub name.

    Raises DataError, with the line where a text file is malformed.
    """
    try:
        place = resolve(source)
    except ConfigError as error:
        raise DataError(str(error)) from None
    try:
        if not isinstance(place, Path):
            table = datasets.load_dataset(place, split=split, trust_remote_code=False)
        else:
            files = _files(place, split)
            table = datasets.concatenate_datasets([_read_file(file) for file in files])
    except DataError:
        raise
    except Exception as error:  # datasets raises many types; each becomes one clear error
        reason = error.__cause__ or error
        raise DataError(f"{source} (split {split}) cannot be read: {first_line(reason)}") from error
    if len(table) == 0:
        raise DataError(f"{source} holds no records")
    return table


def _files(place: Path, split: str) -> list[Path]:
    """Return the files of a split: the file itself, or those in a folder whose name begins with the split's."""
    if place.is_file():
        if place.suffix not in _FORMATS:
            raise DataError(f"{place}: unknown kind of file; expected {', '.join(_FORMATS)}")
        if place.stat().st_size == 0:
            raise DataError(f"{place} is empty")
        return [place]
    files = sorted(f for f in place.iterdir() if f.suffix in _FORMATS and f.name.startswith(split))
    if not files:
        raise DataError(f"{place} holds no {split}*.jsonl, .json, .csv or .parquet")
    if len({f.suffix for f in files}) > 1:
        raise DataError(f"{place} holds files of several kinds for split {split}; keep one kind")
    return files


def _read_file(file: Path) -> Table:
    """Read one file into memory. `datasets` would leave a copy of the records in a cache on disk."""
    if file.suffix == ".parquet":
        return datasets.Dataset(parquet.read_table(file))
    rows = _csv_rows(file) if file.suffix == ".csv" else _json_rows(file)
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    try:
        return datasets.Dataset.from_dict(columns)
    except Exception:  # pyarrow and datasets raise many types, which name neither column nor line
        for column, values in columns.items():
            _check_kinds(file, column, values)
        raise


def _check_kinds(file: Path, column: str, values: list[Any]) -> None:
    """Raise DataError with the first record whose value does not fit into one column with those before it."""

    def fails(count: int) -> bool:
        try:
            datasets.Dataset.from_dict({"": values[:count]})
        except Exception:
            return True
        return False

    at = bisect.bisect_left(range(len(values) + 1), True, key=fails) - 1
    if at == len(values):
        return
    where = f"{file}, record {at + 1}"
    if file.suffix == ".jsonl":
        lines = [number for number, line in enumerate(file.read_bytes().split(b"\n"), start=1) if line.strip()]
        where = f"{file}, line {lines[at]}"
    before = sorted({_kind(value) for value in values[:at]} - {"null"})
    among = f", where the records before it hold {' or '.join(before)}" if before else ""
    raise DataError(
        f"{where}: column {column} holds {_kind(values[at])}{among}. A column takes values of one kind, whole numbers "
        "of at most 64 bits and text in valid Unicode: correct the value, or put it in quotes."
    )


_KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}


def _kind(value: object) -> str:
    """Name the kind of a JSON value, and not the value: an error may be read by others than its owner."""
    if isinstance(value, list | dict):
        inside = sorted({_kind(item) for item in (value.values() if isinstance(value, dict) else value)})
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {' and '.join(inside) or 'nothing'}"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "a whole number of more than 64 bits"
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        return "text that is not valid Unicode (a lone surrogate)"
    return _KINDS[type(value)]


def _csv_rows(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    start = 1  # line in which the record begins that is being read: one with an open quote ends far below
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            columns = next(reader, [])
            twice = sorted({column for column in columns if column and columns.count(column) > 1})
            if twice:
                raise DataError(f"{file}, line 1: two columns are called {', '.join(twice)}. Rename or remove one.")
            start = reader.line_num + 1
            for fields in reader:
                if fields and len(fields) != len(columns):
                    raise DataError(
                        f"{file}, line {start} (record {len(rows) + 1}): expected {len(columns)} fields, as in the "
                        f"first line, found {len(fields)}. Correct or remove it; text that holds a comma is quoted."
                    )
                if fields:
                    rows.append(dict(zip(columns, fields, strict=True)))
                start = reader.line_num + 1
    except UnicodeDecodeError:
        raise DataError(f"{file}: not UTF-8. Convert the file to UTF-8.") from None
    except csv.Error as error:
        raise DataError(
            f"{file}: not CSV ({error}) in the record that begins in line {start}. Correct or remove it."
        ) from None
    return rows


def _json_rows(file: Path) -> list[dict[str, Any]]:
    """Parse a .jsonl file, or a .json file with a list of objects; raises DataError that names the line.

    Parsed here and not by `datasets`, whose C parsers name no line and crash the process on some malformed input.
    """
    rows: list[Any] = []
    lines = [file.read_bytes()] if file.suffix == ".json" else file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        where = f"{file}, line {number}" if file.suffix == ".jsonl" else str(file)
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise DataError(f"{where}: not UTF-8. Convert the file to UTF-8.") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}). Correct or remove it.") from None
        found = value if isinstance(value, list) and file.suffix == ".json" else [value]
        if not all(isinstance(row, dict) for row in found):
            raise DataError(f"{where}: expected an object such as {{...}}, found {line[:20]!r}")
        rows += found
    return rows


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """Put the name of the data set before a DataError about its records."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def check_columns(table: Table, data: TextConfig, extra: Sequence[str | None] = ()) -> None:
    """Raise DataError unless the table has every column that the configuration names.

    Of label, person and site (the last two in `extra`, None where there is none), a cell must hold one value.
    """
    single = [column for column in (data.label, *extra) if column]
    named = [*_fields(data.prompt or ""), *_fields(data.text), *single]
    missing = sorted(set(named) - set(table.column_names))
    if missing:
        raise DataError(f"missing column {', '.join(missing)}; the records have {', '.join(table.column_names)}")
    for column in single:
        if not isinstance(table.features[column], datasets.Value | datasets.ClassLabel):
            raise DataError(f"column {column} holds lists or objects; expected text or numbers")


def _fields(template: str) -> list[str]:
    """Return the columns that a template names; raises ConfigError where it is more than plain {column} fields."""
    try:
        parts = list(string.Formatter().parse(template))
        render_more = [part for part in parts if part[2] or part[3]]  # a format or conversion
    except ValueError as error:
        raise ConfigError(f"template {template!r}: {error}. Write {{column}}, and {{{{ }}}} for braces.") from None
    fields = [name for _, name, _, _ in parts if name is not None]
    plain = (name.replace("_", "a").replace("-", "a").replace(" ", "a") for name in fields)
    if render_more or any(not name.isalnum() or name.isdigit() for name in plain):
        raise ConfigError(f"template {template!r}: a field is the plain name of a column, such as {{question}}")
    return fields


def render(template: str, row: Mapping[str, Any], number: int) -> str:
    """Fill a template from one row; raises DataError where a value is missing."""
    values = {name: row[name] for name in _fields(template)}
    empty = [name for name, value in values.items() if value is None]
    if empty:
        raise DataError(f"record {number + 1}: {', '.join(empty)} is empty. Fill it in or leave the record out.")
    return template.format(**values)


class Tokeniser:
    """Turns rows into records with the base model's own tokenizer, which is never fitted on private text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: ModelConfig, data: TextConfig) -> None:
        self._tokenizer, self._model, self._data = tokenizer, model, data
        self._classes = {label: index for index, label in enumerate(model.labels)}
        if data.chat and not tokenizer.chat_template:
            raise ConfigError(f"data.chat=true, but the tokenizer of {model.source} has no chat template")

    def prompt_ids(self, row: Mapping[str, Any], number: int = 0) -> list[int]:
        """Return the tokens that are given: the prompt, with the sequence's first token where the model has one."""
        prompt = render(self._data.prompt or "", row, number)
        if self._data.chat:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        bos = self._tokenizer.bos_token_id
        return ([] if bos is None else [bos]) + self._plain(prompt)

    def answer_ids(self, row: Mapping[str, Any], number: int = 0) -> list[int]:
        """Return the tokens that are learned, closed as the template closes a turn, or by the end-of-sequence token."""
        if self._data.chat:
            user = {"role": "user", "content": render(self._data.prompt or "", row, number)}
            answer = {"role": "assistant", "content": render(self._data.text, row, number)}
            opening = self._tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
            whole = self._tokenizer.apply_chat_template([user, answer], tokenize=False)
            if whole.startswith(opening):
                return self._plain(whole[len(opening) :])
        eos = self._tokenizer.eos_token_id
        return self._plain(render(self._data.text, row, number)) + ([] if eos is None else [eos])

    def __call__(self, row: Mapping[str, Any], number: int) -> Record:
        """Tokenise one row, at most max_length tokens: the answer is kept before the prompt, its beginning first."""
        limit = self._model.max_length
        if self._model.task == "classification":
            text = render(self._data.text, row, number)
            ids = self._tokenizer(text, truncation=True, max_length=limit)["input_ids"]
            if not ids:
                raise DataError(f"record {number + 1}: its text is empty. Fill it in or leave the record out.")
            label = row[self._data.label or ""]
            if str(label) not in self._classes:
                raise DataError(
                    f"record {number + 1}: label {label!r} is not among model.labels. Declare it or drop the record."
                )
            return Record(np.asarray(ids), np.asarray(self._classes[str(label)]))
        answer = self.answer_ids(row, number)[: limit - 1]
        prompt = self.prompt_ids(row, number)[-(limit - len(answer)) :]
        return Record(np.asarray(prompt + answer), np.asarray([IGNORE] * len(prompt) + answer))

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def build_units(table: Table, tokeniser: Tokeniser, unit: str | None, cap: int) -> tuple[Unit, ...]:
    """Tokenise a table and group its records by privacy unit, at most the first `cap` records a unit.

    `unit=None` makes every record a unit of its own.
    """
    groups: dict[str, list[Record]] = {}
    for number, row in enumerate(table):
        if unit is not None and is_missing(row[unit]):
            raise DataError(f"record {number + 1}: {unit} is empty, so its privacy unit is unknown. Fill it in.")
        group = groups.setdefault(person(row[unit]) if unit is not None else str(number), [])
        if len(group) < cap:
            group.append(tokeniser(row, number))
    return tuple(tuple(records) for records in groups.values())


def is_missing(value: object) -> bool:
    """Whether a cell is empty: null, not a number, or text of nothing that shows. Somebody may be called None."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or not canonical(value)


def members(table: Table, data: TextConfig, unit: str | None) -> Iterator[bytes]:
    """Yield what the table holds, as bytes that tell one record or person from another, to compare it with others.

    Every record twice, by its whole content and by the text that is learned alone, which stays the same where a column
    is added, and every person where `unit` names their column. Cells are in their one spelling (`canonical`).
    """
    columns = [*_fields(data.prompt or ""), *_fields(data.text)]
    for row in table:
        yield b"record\0" + canonical_json(_spelt(row))
        yield b"text\0" + canonical_json([_spelt(row[column]) for column in columns])
        if unit is not None:
            yield b"person\0" + person(row[unit]).encode()


def _spelt(value: object) -> object:
    """Return a cell, or all cells of a row, list or object, in their one spelling; empty ones of a row are left out."""
    if isinstance(value, dict):
        return {canonical(key): _spelt(cell) for key, cell in value.items() if not is_missing(cell)}
    if isinstance(value, list):
        return [_spelt(cell) for cell in value]
    return "" if is_missing(value) else canonical(value)


def person(value: object) -> str:
    """Return the key of a person, or of a site: one spelling for one name, also where Hangul came decomposed."""
    return canonical(value)


def batches(
    units: Sequence[Unit], micro_batch: int, pad_id: int, device: torch.device, longest: int | None = None
) -> Iterator[Batch]:
    """Cut units, none of them in two, into batches of about `micro_batch` records of similar length.

    With `longest`, the most tokens that the model takes, the shape of a unit's records depends on the unit alone: how
    many tokens they are padded to, and whether any of them is padded at all, which models have code of its own for.
    """

    def shape(unit: Unit) -> tuple[int, bool]:
        lengths = [len(record.input_ids) for record in unit]
        if longest is None:
            return max(lengths), False
        width = _padded(max(lengths), longest)
        return width, min(lengths) == width

    pending: list[Unit] = []
    width, full = 0, False
    for unit in sorted(units, key=shape):
        other = longest is not None and shape(unit) != (width, full)
        if pending and (other or sum(map(len, pending)) + len(unit) > micro_batch):
            yield _collate(pending, pad_id, device, width)
            pending = []
        pending.append(unit)
        width, full = shape(unit)
    if pending:
        yield _collate(pending, pad_id, device, width)


def _padded(length: int, longest: int) -> int:
    """Return how many tokens a record of `length` is padded to: a quarter more at most, from 32 tokens on."""
    step = max(8, 1 << max(0, length.bit_length() - 3))
    return max(length, min(-(-length // step) * step, longest))


def _collate(units: Sequence[Unit], pad_id: int, device: torch.device, width: int) -> Batch:
    records = [record for unit in units for record in unit]
    ids = np.full((len(records), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    labels = np.full_like(ids, IGNORE)
    for row, record in enumerate(records):
        ids[row, : len(record.input_ids)] = record.input_ids
        mask[row, : len(record.input_ids)] = 1
        if record.labels.ndim:
            labels[row, : len(record.labels)] = record.labels
    if not records[0].labels.ndim:
        labels = np.asarray([int(record.labels) for record in records])
    owners = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
    tensors = [torch.from_numpy(array).to(device) for array in (ids, mask, labels, owners)]
    return Batch(tensors[0], tensors[1], tensors[2], tensors[3], len(units))
