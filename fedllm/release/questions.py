"""What a release is asked beyond its training, and records whose answers are its own.

Questions come from public texts. So sampling from a release, or teaching another model by it, is post-processing of
what was released: it costs no further epsilon (Dwork and Roth 2014, proposition 2.1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedllm.config import TextConfig
from fedllm.errors import DataError, ReleaseError
from fedllm.release.chat_template import space_before
from fedllm.release.loading import Release
from fedllm.training.data import Row, fields_of
from fedllm.training.text_files import column_name

ANSWER = "fedllm_answer"  # column of a model's own answer, whole; in no file
_NONE_YET = "-"  # stands for an answer: a record without one has no tokens
_FEWEST = 8  # tokens of an answer, at the least


@dataclass(frozen=True)
class Questions:
    """Records of public questions, and how a release is asked them."""

    release: Release
    rows: tuple[Row, ...]  # without an answer, or with one that is not read

    @classmethod
    def of(cls, release: Release, rows: Sequence[Row]) -> "Questions":
        """Return the questions in `rows`, which have the columns of the prompt in training, or that of conversations.

        Raises ReleaseError where the model answers none, DataError for a missing column.
        """
        check_answers(release)
        reading = release.manifest.reading
        known = dict.fromkeys(key for row in rows for key in row)
        if missing := [column for column in question_columns(reading) if column not in known]:
            raise DataError(f"missing column {', '.join(missing)}; the records have {', '.join(known) or 'none'}")
        own = release.manifest.model_copy(update={"reading": as_answered(reading)})
        return cls(replace(release, manifest=own), tuple(rows))

    def once(self) -> "Questions":
        """Return each question once, in order."""
        reading = self.release.manifest.reading
        columns = question_columns(reading)
        found: dict[str, Row] = {}
        for row in self.rows:
            found.setdefault(repr([_asked(reading, row.get(column)) for column in columns]), row)
        return replace(self, rows=tuple(found.values()))

    def answers(self, **options: Any) -> list[str]:
        """Return the model's answer to each: greedy, or as `options` of `generate` say; at most what a record holds."""
        prompts = self.release.prompts([self._record(row, _NONE_YET) for row in self.rows])
        most = max(_FEWEST, self.release.manifest.max_length - min(map(len, prompts)))
        return self.release.answers(prompts, most, **options)

    def records(self, answers: Sequence[str]) -> list[Row]:
        """Return records, to be read by `self.release.manifest.reading`, with these answers."""
        return [self._record(row, answer) for row, answer in zip(self.rows, answers, strict=True)]

    def has_room(self, record: Row) -> bool:
        """Whether a record ends within what one of training holds: a longer answer was cut, and has no end."""
        tokeniser = self.release.tokeniser
        tokens = len(tokeniser.prompt_ids(record)) + len(tokeniser.answer_ids(record))
        return tokens <= self.release.manifest.max_length

    def _record(self, row: Row, answer: str) -> Row:
        column = self.release.manifest.reading.messages
        if column is None:
            return {**row, ANSWER: answer}
        turns = row.get(column)
        if isinstance(turns, list):
            turns = [*_asked(self.release.manifest.reading, turns), {"role": "assistant", "content": answer}]
        return {**row, column: turns}


def check_answers(release: Release) -> None:
    """Raise ReleaseError unless the model answers questions: a classifier does not, nor what only continues a text."""
    reading = release.manifest.reading
    if release.manifest.task != "causal-lm":
        raise ReleaseError(
            f"{release.folder} is a classifier: it chooses a label and writes no text. Name the release of a causal "
            "language model."
        )
    if reading.prompt is None and reading.messages is None:
        raise ReleaseError(
            f"{release.folder} was trained without a prompt (data.prompt=null): it continues a text and answers no "
            "question. Name a release that was trained with data.prompt."
        )


def question_columns(reading: TextConfig) -> list[str]:
    """Return the columns that make a question; raises ConfigError for a template that is none."""
    if reading.messages is not None:
        return [reading.messages]
    return list(dict.fromkeys(_column(reading, name) for name in fields_of(reading.prompt or "")))


def answer_place(reading: TextConfig) -> tuple[str, str, str]:
    """Return the column of the answer, and what its template writes before and after it.

    Raises ReleaseError where several columns make an answer: then nobody can tell which part belongs to which.
    """
    template = reading.text or ""
    fields = fields_of(template)
    if len(fields) != 1:
        raise ReleaseError(
            f"data.text={template!r} makes an answer of {len(fields)} columns, expected one: an answer could not be "
            "divided into columns again."
        )
    before, _, after = template.partition(f"{{{fields[0]}}}")
    before, after = (part.replace("{{", "{").replace("}}", "}").strip() for part in (before, after))
    return _column(reading, fields[0]), before, after


def as_answered(reading: TextConfig) -> TextConfig:
    """Return how a record is read whose answer is a model's own, whole: white space before it as in training."""
    if reading.messages is not None or reading.text is None:
        return reading
    return reading.model_copy(update={"text": f"{space_before(reading)}{{{ANSWER}}}"})


def _asked(reading: TextConfig, value: Any) -> Any:
    """Return what is asked in a cell: of a conversation, without the assistant's last turn."""
    if reading.messages is None or not isinstance(value, list):
        return value
    last = len(value)
    while last and isinstance(value[last - 1], Mapping) and value[last - 1].get("role") == "assistant":
        last -= 1
    return value[:last]


def _column(reading: TextConfig, name: str) -> str:
    return reading.columns.get(name, column_name(name))
