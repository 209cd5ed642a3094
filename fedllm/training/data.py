"""Records to tokens: files or hub data sets, templates, privacy units, batches.

What a site protects is read record by record (`read_rows`, `Tokeniser.read`): nothing about one record changes how
another is read, and one that cannot be used is an error in its own place. A held-out set is refused as a whole
(`read_table`).
"""

import contextlib
import json
import logging
import math
import string
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedllm.canonical import canonical, canonical_json, digest_of
from fedllm.config import FileConfig, ModelConfig, TextConfig
from fedllm.errors import ConfigError, DataError, first_line
from fedllm.training.chat import ANSWER
from fedllm.training.sources import resolve
from fedllm.training.text_files import Record, column_name, text_rows

# `datasets` and pyarrow are imported where they are used: who reads lines of text does without them and their 100 MB.

_log = logging.getLogger("fedllm.site")

IGNORE = -100  # label of a position that carries no loss (the convention of torch and transformers)
_FORMATS = (".jsonl", ".json", ".csv", ".parquet")

Row: TypeAlias = Mapping[str, Any]
_T = TypeVar("_T")
_PLAIN = FileConfig()

_AT_ONCE = 1024  # records that are tokenised together


@dataclass(frozen=True)
class Example:
    """One tokenised record."""

    input_ids: NDArray[np.int64]  # [T]
    labels: NDArray[np.int64]  # [T], IGNORE where no loss falls; [] holds the class for classification


PrivacyUnit = tuple[Example, ...]  # the records of one privacy unit; none if none of them can be used


@dataclass(frozen=True)
class Tokens:
    """A tokenised record before a plan cuts it."""

    given: NDArray[np.int32]  # the prompt, or the whole text to classify
    learned: NDArray[np.int32]  # the answer with its end; nothing for classification
    label: str | None = None  # of classification
    ends: tuple[int, int] = (0, 0)  # classification: special tokens before and after the text, which no cut takes
    quiet: NDArray[np.bool_] | None = None  # of a conversation: those of `learned` that carry no loss

    def record(self, limit: int, labels: Sequence[str]) -> Example:
        """Return the record of at most `limit` tokens: the answer is kept before the prompt, its beginning first.

        `labels` hold `label`; its place among them is the class.
        """
        if self.label is not None:
            first, last = self.ends
            text, end = self.given[: len(self.given) - last], self.given[len(self.given) - last :]
            ids = np.concatenate([text[: max(first, limit - last)], end])
            return Example(ids.astype(np.int64), np.asarray(labels.index(self.label)))
        learned = self.learned[: limit - 1]
        given = self.given[max(0, len(self.given) - (limit - len(learned))) :]
        ids = np.concatenate([given, learned]).astype(np.int64)
        targets = np.where(np.arange(len(ids)) < len(given), IGNORE, ids)
        if self.quiet is not None:
            targets[len(given) :][self.quiet[: len(learned)]] = IGNORE
        return Example(ids, targets)


@dataclass(frozen=True)
class Batch:
    """Records of one forward pass, padded on the right."""

    input_ids: Tensor  # int64[N, T]
    attention_mask: Tensor  # int64[N, T]
    labels: Tensor  # int64[N, T], or int64[N] for classification
    unit_of_row: Tensor  # int64[N], 0 <= value < units
    units: int


def read_table(source: str, split: str, how: FileConfig = _PLAIN) -> list[Row]:
    """Read a researcher's own or public records, as `read_rows` does, into memory; refused as a whole.

    Raises DataError with the first that cannot be read.
    """
    rows = list[Row]()
    for row in read_rows(source, split, how, alone=False):
        if isinstance(row, DataError):
            raise row
        rows.append(row)
    if not rows:
        raise DataError(f"{source} holds no records")
    return rows


def _hub_rows(source: str, split: str) -> Iterator[Record]:
    """Yield the records of a data set of the hub; raises DataError."""
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(source, split=split, trust_remote_code=False)
        classes = {
            name: found.names for name, found in table.features.items() if isinstance(found, datasets.ClassLabel)
        }
        for number, row in enumerate(table, start=1):
            yield _named_classes(row, classes, f"{source}, record {number}")
    except DataError:
        raise
    except Exception as error:  # datasets raises many types; each becomes one clear error
        reason = error.__cause__ or error
        raise DataError(f"{source} (split {split}) cannot be read: {first_line(reason)}") from error


def read_rows(source: str, split: str, how: FileConfig = _PLAIN, *, alone: bool = True) -> Iterator[Row | DataError]:
    """Yield the records of a data set, each as a row that knows its place or as what is wrong with it.

    `alone`: records are a site's, a line of .jsonl or .csv or a row of .parquet, and nothing in one changes how another
    is read. Else they are a researcher's own: also .json, cells of several lines, and hub names. Raises DataError where
    the files themselves cannot be used: there is none, a kind that cannot be read so, no header, no Parquet.
    """
    try:
        place = resolve(source)
    except ConfigError as error:
        raise DataError(str(error)) from None
    if not isinstance(place, Path) and alone:
        raise DataError(f"{source}: no such file or folder")
    if not isinstance(place, Path):
        yield from _hub_rows(place, split)
        return
    for file in _files(place, split):
        if file.suffix.lower() != ".parquet":
            yield from text_rows(file, how, alone)
            continue
        classes = _class_names(file)
        for number, row in enumerate(_parquet_rows(file), start=1):
            yield _named_classes(row, classes, f"{file}, record {number}")


def _named_classes(row: Row, classes: Mapping[str, Sequence[str]], where: str) -> Record:
    """Return a row with the names of classes instead of their numbers."""
    return Record({**row, **{name: _class(classes[name], row[name]) for name in classes if name in row}}, where)


def _class_names(file: Path) -> dict[str, list[str]]:
    """Return the names of the classes of those columns whose numbers stand for classes, as `datasets` writes them."""
    from pyarrow import parquet

    with contextlib.suppress(Exception):  # no Parquet, or nothing of the sort in it: reading the rows tells
        features = json.loads((parquet.read_schema(file).metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: [str(each) for each in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    return {}


def _class(names: Sequence[str], value: Any) -> str | None:
    """Return the name of a class; None where there is no class (-1 by convention)."""
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _parquet_rows(file: Path) -> Iterator[Row]:
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as whole:
            names = whole.schema_arrow.names
            if len(set(names)) < len(names):
                raise ValueError("two columns have one name")
            for batch in whole.iter_batches():
                columns = [_cells(file, *pair) for pair in zip(batch.schema.names, batch.columns, strict=True)]
                for cells in zip(*columns, strict=True):
                    yield dict(zip(batch.schema.names, cells, strict=True))
    except Exception as error:  # pyarrow raises many types
        raise DataError(f"{file} cannot be read: {first_line(error)}") from error


def _cells(file: Path, name: str, column: Any) -> list[object]:
    """Return a column's cells. One that Python cannot hold, such as text that is not UTF-8 or year 10000, is empty."""
    try:
        return list(column.to_pylist())
    except Exception:  # pyarrow raises many types
        found, unreadable = list[object](), 0
    for cell in column:
        try:
            found.append(cell.as_py())
        except Exception:
            found.append(None)
            unreadable += 1
    _log.warning("%s: %d cells of column %s cannot be read, and count as empty", file, unreadable, name)
    return found


def _remedy(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in (".xls", ".xlsx", ".ods"):
        return ". Save the sheet as CSV UTF-8"
    if suffix in (".gz", ".zip", ".bz2", ".xz", ".zst", ".7z"):
        return ". Unpack it"
    return ". Name it .csv and set data.separator=tab" if suffix in (".tsv", ".tab") else ""


def _files(place: Path, split: str) -> list[Path]:
    """Return the files of a split: the file itself, or those in a folder whose name begins with the split's."""
    if place.is_file():
        if place.suffix.lower() not in _FORMATS:
            raise DataError(f"{place}: unknown kind of file; expected {', '.join(_FORMATS)}{_remedy(place)}")
        if place.stat().st_size == 0:
            raise DataError(f"{place} is empty")
        return [place]
    if not place.is_dir():
        raise DataError(f"{place} is neither a file nor a folder")
    files = sorted(f for f in place.iterdir() if f.suffix.lower() in _FORMATS and f.name.startswith(split))
    if not files:
        raise DataError(f"{place} holds no {split}*.jsonl, .json, .csv or .parquet")
    if len({f.suffix.lower() for f in files}) > 1:
        raise DataError(f"{place} holds files of several kinds for split {split}; keep one kind")
    return files


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """Put the name of the data set before a DataError about its records."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def columns_of(rows: Iterable[Row]) -> list[str]:
    """Return the columns that rows have, in the order in which they come."""
    return list(dict.fromkeys(column for row in rows for column in row))


def check_named(columns: Sequence[str], data: TextConfig, extra: Sequence[str | None] = ()) -> None:
    """Raise DataError unless every column is there that the configuration names; `extra`: person and site, if any."""
    missing = sorted({*_text_columns(data), *filter(None, (data.label, *extra))} - set(columns))
    if missing:
        raise DataError(f"missing column {', '.join(missing)}; the records have {', '.join(columns)}")


def _text_columns(data: TextConfig) -> list[str]:
    """Return the columns that become text; raises ConfigError where a template is more than plain {column} fields."""
    if data.messages is not None:
        return [data.messages]
    names = [*fields_of(data.prompt or ""), *fields_of(data.text or "")]
    return [data.columns.get(name, column_name(name)) for name in names]


def fields_of(template: str) -> list[str]:
    """Return the columns that a template names; raises ConfigError if it is more than plain {column} fields."""
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


def place_of(row: object, number: int) -> str:
    """Return where a row stands: file and line, or its number in the table."""
    return row.place if isinstance(row, Record) else f"record {number + 1}"


def render(
    template: str,
    row: Row,
    number: int,
    columns: Mapping[str, str] = {},  # never changed
    *,
    given: bool = False,
) -> str:
    """Fill a template from one row, `columns` giving other names; raises DataError if a value is no usable text.

    What is only `given` may be blank: many data sets have a column of further context that most records leave blank.
    """
    try:
        values = dict[str, str]()
        for name in fields_of(template):
            value = row.get(columns.get(name, column_name(name)))
            blank = given and isinstance(value, str)
            values[name] = cell(value) if blank else text_of(value, columns.get(name, name))
    except DataError as error:
        raise DataError(f"{place_of(row, number)}: {error}") from None
    return template.format(**values)


def text_of(value: object, what: str) -> str:
    """Return the text of a cell: the one definition of what can be used. Raises DataError where it is none."""
    if is_missing(value):
        raise DataError(f"{what} is empty. Fill it in or leave the record out.")
    if not isinstance(value, str | int | float | Decimal | date | time | timedelta):
        hint = " (data.messages reads conversations)" if isinstance(value, list) else ""
        kind = "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else "bytes"
        raise DataError(f"{what} holds {kind}; expected text or a number{hint}")
    return cell(value)


_ROLES = ("system", "user", "assistant", "tool")
_SAID_ELSEWHERE = ("tool_calls", "function_call")  # of what an assistant says, beside its content
Turn = dict[str, str]  # role and content


def conversation(value: object, what: str) -> list[Turn]:
    """Return the turns of a conversation up to the assistant's last; raises DataError where it is none."""
    if is_missing(value):
        raise DataError(f"{what} is empty. Fill it in or leave the record out.")
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise DataError(f"{what} is no conversation: expected a list of objects with role and content")
    if any(turn.get("role") not in _ROLES for turn in value):
        raise DataError(f"{what}: a turn has no role, or none of {', '.join(_ROLES)}")
    beside = [name for turn in value for name in _SAID_ELSEWHERE if turn.get(name)]
    if beside:
        raise DataError(f"{what}: a turn has {beside[0]}, and only content is learned. Write the call into content.")
    turns = [
        {"role": turn["role"], "content": text_of(_joined(turn.get("content"), what), f"{what}: the content of a turn")}
        for turn in value
    ]
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        raise DataError(f"{what} has no turn of the assistant, so there is nothing to learn")
    return turns


def _joined(content: object, what: str) -> object:
    """Return the content of a turn, joined to one text where it is a list of parts that are text alone."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{what}: a turn has a part that is no text, such as an image. Leave the record out.")
    return "".join(map(str, texts))


def cell(value: object) -> str:
    """Return a cell's text. Whole numbers are written as such, whatever type the other cells of a column ask for."""
    if isinstance(value, Decimal) and value.is_finite():
        return f"{value.normalize():f}"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value)


@dataclass(frozen=True)
class _Written:
    """A record as text."""

    pieces: tuple[str, ...]  # given and learned in turn, for classification the text alone
    closed: bool = True  # the chat template has closed the answer
    label: str | None = None


class Tokeniser:
    """Turns rows into tokens with the base model's own tokenizer, which is never fitted on private text."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: ModelConfig, data: TextConfig, vocabulary: int = 2**31
    ) -> None:
        """`model` says the longest record and the labels; `vocabulary`, how many tokens the model knows."""
        self._tokenizer, self._model, self._data, self._vocabulary = tokenizer, model, data, vocabulary
        self._classifies, self._labels = model.task == "classification", frozenset(model.labels)
        self._ends = (0, 0)
        if self._classifies:
            special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
            self._ends = special.index(0), special[::-1].index(0)
        if data.chats:
            self._check_template()

    def prompt_ids(self, row: Row, number: int = 0) -> list[int]:
        """Return the tokens that are given: the prompt, with the sequence's first token where the model has one."""
        pieces = self._write(row, number).pieces[:-1]
        return self._opened([token for piece in pieces for token in self._code(piece)])

    def answer_ids(self, row: Row, number: int = 0) -> list[int]:
        """Return the tokens that are learned, closed as the template closes a turn, or by the end-of-sequence token."""
        written = self._write(row, number)
        return self._closed(self._code(written.pieces[-1]), written.closed)

    def question(self, row: Row, number: int) -> tuple[str, str]:
        """Return what is asked in a row and the answer that is expected, as a person reads them."""
        turns = self._turns(row, number)
        return "".join(turn["content"] for turn in turns[-2:-1]), turns[-1]["content"].strip()

    def __call__(self, row: Row, number: int) -> Example:
        """Tokenise one row, at most max_length tokens; raises DataError if it cannot be used."""
        (found,) = self.read([row], number)
        if isinstance(found, DataError):
            raise found
        return self.cut(found)

    def cut(self, tokens: Tokens) -> Example:
        """Return a record of at most max_length tokens."""
        return tokens.record(self._model.max_length, self._model.labels)

    def read(self, rows: Iterable[Row | DataError], first: int = 0) -> Iterator[Tokens | DataError]:
        """Tokenise rows, numbered from `first`, many at a time, and each as if it were the only one.

        If a row cannot be used, or none was read, a DataError stands in its place. No more is kept of a record than
        one of max_length tokens can hold.
        """
        source = iter(rows)
        while some := list(islice(source, _AT_ONCE)):
            yield from self._read(some, first)
            first += len(some)

    def _read(self, rows: Sequence[Row | DataError], first: int) -> Iterator[Tokens | DataError]:
        written = [
            row if isinstance(row, DataError) else _tried(place_of(row, number), self._write, row, number)
            for number, row in enumerate(rows, start=first)
        ]
        codes = iter(self._encode([piece for one in written if isinstance(one, _Written) for piece in one.pieces]))
        for number, (row, one) in enumerate(zip(rows, written, strict=True), start=first):
            if isinstance(one, DataError):
                yield one
            else:
                place = place_of(row, number)
                yield _tried(place, self._tokens, one, [next(codes) for _ in one.pieces], place)

    def _write(self, row: Row, number: int) -> _Written:
        if self._classifies:
            value, place = row.get(self._data.label or ""), place_of(row, number)
            label = canonical(cell(value))
            if is_missing(value):
                raise DataError(f"{place}: {self._data.label} is empty. Fill it in or leave the record out.")
            if label not in self._labels:
                raise DataError(f"{place}: label {label!r} is not among model.labels. Declare it or drop the record.")
            return _Written((render(self._data.text or "", row, number, self._data.columns),), label=label)
        turns = self._turns(row, number)
        if self._data.messages is not None:
            return _Written(self._pieces(turns, place_of(row, number)))
        *before, answer = turns
        if not self._data.chat:
            return _Written(("".join(turn["content"] for turn in before), answer["content"]), closed=False)
        opening, whole = self._chat(before, opens=True), self._chat(turns, opens=False)
        if not whole.startswith(opening):
            return _Written((opening, answer["content"]), closed=False)
        return _Written((opening, whole[len(opening) :]))

    def _turns(self, row: Row, number: int) -> list[Turn]:
        """Return a row as a conversation that ends with the assistant's turn, the last that is learned."""
        data = self._data
        if data.messages is not None:
            try:
                turns = conversation(row.get(data.messages), data.messages)
            except DataError as error:
                raise DataError(f"{place_of(row, number)}: {error}") from None
        else:
            prompt = render(data.prompt or "", row, number, data.columns, given=True)
            answer = render(data.text or "", row, number, data.columns)
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        if data.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": data.system})
        return turns

    def _pieces(self, turns: Sequence[Turn], place: str) -> tuple[str, ...]:
        """Return a conversation as the chat template writes it, cut at the ends of what the assistant says."""
        whole, pieces, done = self._chat(turns, opens=False), list[str](), 0
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant":
                begin, end = self._span(turns, number, whole)
                if not done <= begin < end:
                    raise DataError(f"{place}: in what the chat template writes, a turn of the assistant is not found")
                pieces += [whole[done:begin], whole[begin:end]]
                done = end
        return tuple(pieces)

    def _span(self, turns: Sequence[Turn], number: int, whole: str) -> tuple[int, int]:
        """Return where the assistant's turn of this number begins and ends in the whole text; (0, 0) if unclear.

        Some templates write a turn that others follow in a shorter form (without what was thought, say): then what it
        says is looked up, and what closes it.
        """
        alone = self._chat(turns[: number + 1], opens=False)
        if number:
            opening = self._chat(turns[:number], opens=True)
        else:  # who speaks first has nothing before that a template could write
            opening = self._chat([{**turns[0], "content": ANSWER}, *turns[1:]], opens=False).partition(ANSWER)[0]
        if not whole.startswith(opening):
            return 0, 0
        if whole.startswith(alone):
            return len(opening), len(alone)
        said = turns[number]["content"].strip()
        closing = alone[alone.rfind(said) + len(said) :]
        at = whole.find(said, len(opening))
        if said not in alone or at < 0 or not whole.startswith(closing, at + len(said)):
            return 0, 0
        return len(opening), at + len(said) + len(closing)

    def _tokens(self, text: _Written, codes: Sequence[list[int] | DataError], place: str) -> Tokens:
        known = [code for code in codes if not isinstance(code, DataError)]
        if len(known) < len(codes):
            raise DataError(f"{place}: the tokenizer fails on it. Leave it out.")
        given, *rest = known
        most = max((token for code in known for token in code), default=0)
        if most >= self._vocabulary:
            raise DataError(f"{place}: token {most}, and the model knows {self._vocabulary}. Leave it out.")
        limit = self._model.max_length
        if text.label is None:
            learned = self._closed([token for code in rest for token in code], text.closed)[:limit]
            quiet = None
            if len(rest) > 1:
                quiet = np.concatenate([np.full(len(code), at % 2 == 1) for at, code in enumerate(rest)])[:limit]
            found = Tokens(_ids(self._opened(given)[-limit:]), _ids(learned), quiet=quiet)
        else:
            last = len(given) - self._ends[1]
            found = Tokens(_ids(given[: min(last, limit)] + given[last:]), _ids([]), text.label, ends=self._ends)
        if not len(found.given if text.label is not None else found.learned):
            raise DataError(f"{place}: the tokenizer makes no token of its text. Leave the record out.")
        return found

    def _check_template(self) -> None:
        """Raise ConfigError unless the chat template writes a conversation as short as any."""
        setting = "data.chat=true" if self._data.chat else f"data.messages={self._data.messages}"
        source = self._model.source
        if not self._tokenizer.chat_template:
            raise ConfigError(f"{setting}, but the tokenizer of {source} has no chat template")
        system = [] if self._data.system is None else [{"role": "system", "content": self._data.system}]
        asked = [*system, {"role": "user", "content": "a"}]
        try:
            self._chat(asked, opens=True)
            one, other = (self._chat([*asked, {"role": "assistant", "content": said}], opens=False) for said in "bc")
        except Exception as error:  # a template may raise anything
            turns = "a user's and an assistant's turn" if not system else "a system, a user's and an assistant's turn"
            hint = "If it wants a system turn, set data.system" if not system else "Leave data.system out"
            raise ConfigError(
                f"{setting}: the chat template of {source} refuses {turns} ({first_line(error)}). {hint}."
            ) from None
        if one == other:
            raise ConfigError(f"{setting}: the chat template of {source} does not write what the assistant says")

    def _chat(self, turns: Sequence[Turn], opens: bool) -> str:
        return str(self._tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=opens))

    def _opened(self, prompt: list[int]) -> list[int]:
        bos = self._tokenizer.bos_token_id
        return prompt if bos is None or self._data.chats else [bos, *prompt]

    def _closed(self, answer: list[int], closed: bool) -> list[int]:
        eos = self._tokenizer.eos_token_id
        return answer if eos is None or closed else [*answer, eos]

    def _encode(self, texts: Sequence[str]) -> list[list[int] | DataError]:
        """Tokenise texts at once; where that fails one by one, so that only those fail that would fail alone."""
        together = _tried("", self._code, list(texts)) if texts else []
        if not isinstance(together, DataError):
            return list(together)
        return [_tried("", self._code, text) for text in texts]

    def _code(self, text: str | list[str]) -> Any:
        return self._tokenizer(text, add_special_tokens=self._classifies, verbose=False)["input_ids"]


def _ids(ids: list[int]) -> NDArray[np.int32]:
    return np.asarray(ids, dtype=np.int32)


def _tried(place: str, read: Callable[..., _T], *arguments: Any) -> _T | DataError:
    """Return what was read, or a DataError whatever a tokenizer or template has raised; a panic is no Exception."""
    try:
        return read(*arguments)
    except DataError as error:
        return error
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # its text may quote the record
        return DataError(f"{place}: the tokenizer or its template fails on it ({type(error).__name__})")


def group(
    rows: Iterable[Row | DataError], tokens: Iterable[Tokens | DataError], unit: str | None
) -> tuple[list[list[Tokens]], list[DataError]]:
    """Return the usable records of every privacy unit, and what is wrong with the others.

    A unit is a person, whom the column `unit` names, or without it a record. A record without a person is a unit of its
    own without anything in it, so that no other record's place depends on whether it can be used.
    """
    groups: dict[object, list[Tokens]] = {}
    wrong: list[DataError] = []
    for number, (row, found) in enumerate(zip(rows, tokens, strict=True)):
        who, one = _person_of(row, unit), found
        if unit is not None and who is None and not isinstance(row, DataError):
            one = DataError(f"{place_of(row, number)}: {unit} is empty, so its privacy unit is unknown. Fill it in.")
        own = groups.setdefault(number if who is None else who, [])
        if isinstance(one, DataError):
            wrong.append(one)
        else:
            own.append(one)
    return list(groups.values()), wrong


def _person_of(row: Row | DataError, column: str | None) -> str | None:
    """Return the person that a record belongs to; None if nobody knows."""
    who = None if column is None or isinstance(row, DataError) else row.get(column)
    return None if is_missing(who) or isinstance(who, list | dict) else person(who)


def identities(rows: Iterable[Row | DataError], data: TextConfig, column: str | None, by_person: bool) -> list[bytes]:
    """Return bytes that tell the privacy units of `group` from others, in its order: for `fedllm.privacy.split`.

    A record is told by its person, whatever the privacy unit, so that no person is on two sides; where none is
    known, by the text that is learned, which stays the same if a column is added.
    """
    found: dict[object, bytes] = {}
    columns = _text_columns(data)
    for number, row in enumerate(rows):
        who = _person_of(row, column)
        text = {} if isinstance(row, DataError) else row
        found.setdefault(
            who if by_person and who is not None else number,
            b"text\0" + canonical_json([_spelt(text.get(name)) for name in columns])
            if who is None
            else b"person\0" + who.encode(),
        )
    return list(found.values())


def split_rule(data: TextConfig, column: str | None, by_person: bool) -> str:
    """Return a digest, 16 hexadecimal digits, of what `identities` tells units by: a ledger notices when it changes."""
    told = [] if column is None else ["person", canonical(column)]
    if column is None or not by_person:  # a record whose person is unknown is told by its text, and trains
        told += ["text", *_text_columns(data)]
    return digest_of(told)[:16]


def build_units(rows: Sequence[Row], tokeniser: Tokeniser, unit: str | None, cap: int) -> tuple[PrivacyUnit, ...]:
    """Tokenise rows and group them by privacy unit, at most the first `cap` records a unit.

    `unit=None` makes every record a unit of its own. Raises DataError with the first record that cannot be used.
    """
    groups, wrong = group(rows, tokeniser.read(rows), unit)
    if wrong:
        raise wrong[0]
    return tuple(tuple(map(tokeniser.cut, tokens[:cap])) for tokens in groups)


def is_missing(value: object) -> bool:
    """Whether a cell is empty: null, not a number, or text of nothing that shows. Somebody may be called None."""
    return not _cell(value)


def members(rows: Iterable[Row], data: TextConfig, unit: str | None) -> Iterator[bytes]:
    """Yield what records hold, as bytes that tell one record or person from another, to compare it with others.

    Every record twice, by its whole content and by the text that is learned alone, which stays the same if a column
    is added, and every person if `unit` names their column. Cells are in their one spelling (`canonical`).
    """
    columns = _text_columns(data)
    for row in rows:
        yield b"record\0" + canonical_json(_spelt(row))
        yield b"text\0" + canonical_json([_spelt(row.get(column)) for column in columns])
        if unit is not None:
            yield b"person\0" + person(row.get(unit)).encode()


def _spelt(value: object) -> object:
    """Return a cell, or all cells of a row, list or object, in their one spelling; empty ones of a row are left out."""
    if isinstance(value, dict):
        return {canonical(key): spelt for key, cell in value.items() if (spelt := _spelt(cell)) != ""}
    if isinstance(value, list):
        return [_spelt(cell) for cell in value]
    return _cell(value)


def _cell(value: object) -> str:
    """Return the one spelling of a cell, empty if the cell is."""
    missing = value is None or (isinstance(value, float | Decimal) and math.isnan(value))
    return "" if missing else canonical(value)


def person(value: object) -> str:
    """Return the key of a person, or of a site: one spelling for one name, also if Hangul came decomposed."""
    return canonical(value)


def batches(
    units: Sequence[PrivacyUnit], micro_batch: int, pad_id: int, device: torch.device, longest: int | None = None
) -> Iterator[Batch]:
    """Cut units as `passes` does, and pad them."""
    for some, width in passes(units, lambda _: micro_batch, longest):
        yield collate(some, pad_id, device, width)


class Drawn(Sequence[PrivacyUnit]):
    """Some of many units, each made when it is looked at: a sample takes no memory of its own."""

    def __init__(self, units: Sequence[PrivacyUnit], indices: Sequence[int] | NDArray[np.int64]) -> None:
        self._units, self._indices = units, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> PrivacyUnit: ...
    @overload
    def __getitem__(self, index: slice) -> "Drawn": ...
    def __getitem__(self, index: int | slice) -> "PrivacyUnit | Drawn":
        if isinstance(index, slice):
            return Drawn(self._units, self._indices[index])
        return self._units[int(self._indices[index])]


class MadeWhenTaken(Sequence[PrivacyUnit]):
    """Units that are made by `take`, each when it is looked at; a slice holds those that it names."""

    @abstractmethod
    def take(self, index: int) -> PrivacyUnit:
        """Return a unit, by its place from 0."""

    @overload
    def __getitem__(self, index: int) -> PrivacyUnit: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PrivacyUnit]: ...
    def __getitem__(self, index: int | slice) -> PrivacyUnit | Sequence[PrivacyUnit]:
        places = range(len(self))[index]
        return self.take(places) if isinstance(places, int) else [self.take(place) for place in places]


class Joined(MadeWhenTaken):
    """Units, and others behind them."""

    def __init__(self, first: Sequence[PrivacyUnit], then: Sequence[PrivacyUnit]) -> None:
        self._first, self._then = first, then

    def __len__(self) -> int:
        return len(self._first) + len(self._then)

    def take(self, index: int) -> PrivacyUnit:
        return self._first[index] if index < len(self._first) else self._then[index - len(self._first)]


def passes(
    units: Sequence[PrivacyUnit], rows: Callable[[int], int], longest: int | None = None
) -> Iterator[tuple[list[PrivacyUnit], int]]:
    """Cut units, none of them in two, into passes of at most `rows(width)` records of one width, and that width.

    A unit of more records is a pass of its own, and one without records is in none.

    With `longest`, the most tokens that the model takes, the shape of a unit's records depends on the unit alone: how
    many tokens they are padded to, and whether any of them is padded at all, which models have code of its own for.
    Without it, units of similar length share a pass, and a width.
    """

    def shape(unit: PrivacyUnit) -> tuple[int, bool]:
        lengths = [len(record.input_ids) for record in unit]
        if longest is None:
            return max(lengths), False
        width = padded(max(lengths), longest)
        return width, min(lengths) == width

    order = sorted((*shape(unit), number) for number, unit in enumerate(units) if unit)
    pending: list[PrivacyUnit] = []
    here = (0, False)
    for width, full, number in order:
        unit = units[number]
        other = longest is not None and here != (width, full)
        if pending and (other or sum(map(len, pending)) + len(unit) > rows(width)):
            yield pending, here[0]
            pending = []
        pending.append(unit)
        here = width, full
    if pending:
        yield pending, here[0]


def padded(length: int, longest: int) -> int:
    """Return how many tokens a record of `length` is padded to: a quarter more at most, from 32 tokens on."""
    step = max(8, 1 << max(0, length.bit_length() - 3))
    return max(length, min(-(-length // step) * step, longest))


def collate(units: Sequence[PrivacyUnit], pad_id: int, device: torch.device, width: int, rows: int = 0) -> Batch:
    """Return the records of units in one tensor, padded on the right to `width` tokens.

    Filled to `rows` records with empty units, which come last: as long as the tensor is wide, and without a label.
    """
    records = [record for unit in units for record in unit]
    classifies, nobody = not records[0].labels.ndim, max(0, rows - len(records))
    ids = np.full((len(records) + nobody, width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    mask[len(records) :] = 1
    labels = np.zeros(len(ids), dtype=np.int64) if classifies else np.full_like(ids, IGNORE)
    for row, record in enumerate(records):
        ids[row, : len(record.input_ids)] = record.input_ids
        mask[row, : len(record.input_ids)] = 1
        labels[(row,) if classifies else (row, slice(len(record.labels)))] = record.labels
    sizes = [len(unit) for unit in units] + [1] * nobody
    owners = np.repeat(np.arange(len(sizes)), sizes)
    tensors = [torch.from_numpy(array).to(device) for array in (ids, mask, labels, owners)]
    return Batch(tensors[0], tensors[1], tensors[2], tensors[3], len(sizes))
