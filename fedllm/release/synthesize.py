"""Synthetic records: a release answers public questions by chance, and what it says becomes a set of records.

The set depends on private records through the released weights alone, so it costs no further epsilon: sampling is
post-processing. For the same reason the sampler's seed may be known to everybody: noise that protects was added in
training, and nothing here protects. What is asked, and what the set is compared with, must be public.
"""

import hashlib
import itertools
import json
import math
import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import Field

import fedllm
from fedllm.audit.trust import Trust
from fedllm.canonical import canonical
from fedllm.config import TextConfig
from fedllm.crypto.identity import Identity
from fedllm.errors import ConfigError, DataError, ReleaseError
from fedllm.files import new_folder, read
from fedllm.release.cards import write_pages
from fedllm.release.loading import Release
from fedllm.release.manifest import (
    Digest,
    Privacy,
    Signed,
    Training,
    check_files,
    check_place,
    digests,
    manifest_digest,
    read_signed,
    write_signed,
)
from fedllm.release.questions import ANSWER, Questions, answer_place, check_answers, question_columns
from fedllm.settings_file import read_settings
from fedllm.training.data import Row, fields_of, read_rows, render
from fedllm.training.text_files import column_name
from fedllm.values import Frozen, Seed

RECORDS, SIGNED = "records.jsonl", "synthetic.json"  # files of a set
_TYPE = "application/vnd.fedllm.synthetic+json"
_MOST_BYTES, _MOST_PROMPTS = 1 << 20, 1 << 60
_AROUND = re.compile(r"^\W+|\W+$")  # a word
_WORDS, _LETTERS = 8, 20  # of a run that counts as copied: words, or characters without spaces


class Sampling(Frozen):
    """How answers are drawn."""

    temperature: float = Field(0.7, gt=0, le=10)
    top_p: float = Field(0.95, gt=0, le=1)  # nucleus sampling (Holtzman et al. 2020)
    seed: Seed = 0


class Counts(Frozen):
    """What became of the answers."""

    asked: int
    kept: int
    duplicates: int  # but for case, spaces and punctuation the same question and answer as one before
    empty: int
    too_long: int  # without an end within what a record holds


class Overlap(Frozen):
    """How much of the set stands word for word in a given public set."""

    compared: int  # records of that set
    exact: int  # of the kept answers: equal to a cell of that set
    runs: int  # of the kept answers: share a run of 8 words, or of 20 characters without spaces


class SyntheticSet(Signed):
    """What is signed about a set; without a signer it stands in the cards alone."""

    release: Digest  # of the release.json of the model that answered
    training: Training
    privacy: Privacy  # the claim of that release, which is that of the set
    sampling: Sampling
    prompts: Digest  # of the file of prompts
    counts: Counts
    overlap: Overlap | None


@dataclass(frozen=True)
class Topics:
    """Public questions: templates, each crossed with the lists that it names."""

    templates: tuple[Mapping[str, str], ...]  # column -> template
    lists: Mapping[str, tuple[str, ...]]

    @property
    def total(self) -> int:
        """How many questions there are."""
        return sum(math.prod(len(self.lists[name]) for name in self._names(each)) for each in self.templates)

    def draw(self, n: int, seed: int) -> list[dict[str, str]]:
        """Return `n` questions by column: all of them as often as they fit, and a random part of them for the rest."""
        drawn = random.Random(seed)
        often, rest = divmod(n, self.total)
        numbers = itertools.chain(*(range(self.total) for _ in range(often)), drawn.sample(range(self.total), rest))
        return [self._question(number) for number in numbers]

    def _names(self, template: Mapping[str, str]) -> list[str]:
        return list(dict.fromkeys(name for text in template.values() for name in fields_of(text)))

    def _question(self, number: int) -> dict[str, str]:
        for template in self.templates:
            names = self._names(template)
            many = math.prod(len(self.lists[name]) for name in names)
            if number < many:
                chosen = {}
                for name in names:
                    number, at = divmod(number, len(self.lists[name]))
                    chosen[column_name(name)] = self.lists[name][at]
                return {column: render(text, chosen, 0) for column, text in template.items()}
            number -= many
        raise IndexError(number)


def read_topics(path: Path, columns: Sequence[str]) -> Topics:
    """Read a file of public questions for a model that is asked by these columns; raises ConfigError.

    YAML: `prompts` is a list of templates, as text where a question has one column, else as `column: template`.
    `lists` has the words for each `{name}` in them. Every template is crossed with all words of its lists.
    """
    values = read_settings(path)
    if unknown := sorted(set(values) - {"prompts", "lists"}):
        raise ConfigError(f"{path}: {unknown[0]}: unknown key; known keys: lists, prompts")
    given = values.get("lists", {})
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: lists: expected `name: [words]`, found {type(given).__name__}")
    lists = {name: _words(path, name, words) for name, words in given.items()}
    prompts = values.get("prompts")
    if not isinstance(prompts, list) or not prompts:
        raise ConfigError(f'{path}: prompts: expected a list of templates, such as ["Where is the {{desk}}?"]')
    topics = Topics(tuple(_template(path, each, columns, lists) for each in prompts), lists)
    if topics.total > _MOST_PROMPTS:
        raise ConfigError(f"{path}: {topics.total} questions, expected at most 2^60. Cross fewer lists.")
    return topics


def _words(path: Path, name: object, words: object) -> tuple[str, ...]:
    if (
        not isinstance(words, list)
        or not words
        or any(isinstance(w, list | dict | None) or not str(w).strip() for w in words)
    ):
        raise ConfigError(f"{path}: lists: {name}: expected a list of words, such as [loans, cards]")
    return tuple(dict.fromkeys(map(str, words)))


def _template(path: Path, value: object, columns: Sequence[str], lists: Mapping[str, object]) -> dict[str, str]:
    if isinstance(value, str) and len(columns) == 1:
        value = {columns[0]: value}
    if not isinstance(value, dict) or sorted(map(str, value)) != sorted(columns):
        expected = "text" if len(columns) == 1 else "an object"
        raise ConfigError(
            f"{path}: prompts: found {str(value)[:80]!r}, expected {expected}: this model is asked by "
            f"{', '.join(columns)}"
        )
    for text in value.values():
        try:
            names = fields_of(str(text))
        except ConfigError as error:
            raise ConfigError(f"{path}: prompts: {error}") from None
        if missing := [name for name in names if name not in lists]:
            raise ConfigError(f"{path}: prompts: {str(text)[:80]!r} names {{{missing[0]}}}, and lists has none of it")
        if not str(text).strip():
            raise ConfigError(f"{path}: prompts: a template is empty")
    return {str(column): str(text) for column, text in value.items()}


def synthesize(
    release: Release, topics: Topics, n: int, sampling: Sampling, public: Path | None = None
) -> tuple[list[Row], Counts, Overlap | None]:
    """Return up to `n` records in the columns that training reads, what became of the others, and the overlap.

    `public`: a set to look for copies of. The same release, questions and sampling give the same records on the same
    kind of machine. Raises ReleaseError for a model without answers, DataError if `public` cannot be read.
    """
    check_answers(release)
    if public is not None and not public.is_file():
        raise DataError(f"{public}: no such file")  # a name is nothing to look for elsewhere
    reading = release.manifest.reading
    place = None if reading.messages is not None else answer_place(reading)
    questions = Questions.of(release, [_row(reading, each) for each in topics.draw(n, sampling.seed)])
    with torch.random.fork_rng(devices=[release.device] if release.device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        answers = questions.answers(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)
    kept: dict[str, tuple[Row, str]] = {}
    empty = too_long = 0
    for record, answer in zip(questions.records(answers), answers, strict=True):
        if not any(map(str.isalnum, answer)):
            empty += 1
        elif not questions.has_room(record):
            too_long += 1
        else:
            row, said = (record, answer) if place is None else _in_columns(record, answer, *place)
            kept.setdefault(_key(row), (row, said))
    counts = Counts(
        asked=n, kept=len(kept), duplicates=n - empty - too_long - len(kept), empty=empty, too_long=too_long
    )
    shared = None if public is None else overlap([answer for _, answer in kept.values()], public)
    return [row for row, _ in kept.values()], counts, shared


def _row(reading: TextConfig, question: Mapping[str, str]) -> Row:
    if reading.messages is None:
        return question
    return {reading.messages: [{"role": "user", "content": question[reading.messages]}]}


def _in_columns(record: Row, answer: str, column: str, before: str, after: str) -> tuple[Row, str]:
    """Return a record with its answer in its own column, without what the template of training writes around it."""
    said = answer.removeprefix(before).removesuffix(after).strip() or answer
    return {**{name: value for name, value in record.items() if name != ANSWER}, column: said}, said


def _key(row: Row) -> str:
    """Return what two records share that differ in case, spaces and punctuation at most."""
    text = unicodedata.normalize("NFKC", json.dumps(row, sort_keys=True, ensure_ascii=False)).casefold()
    return "".join(_AROUND.sub("", word) for word in text.split())  # not within: 3.5 % is not 35 %


def overlap(answers: Sequence[str], public: Path) -> Overlap:
    """Return how many answers stand in a public set word for word; raises DataError if it cannot be read.

    The set is read record by record; what is kept in memory are the answers.
    """
    whole, parts = defaultdict[str, set[int]](set), defaultdict[str, set[int]](set)
    for number, answer in enumerate(answers):
        whole[canonical(answer)].add(number)
        for run in _runs(answer):
            parts[run].add(number)
    exact, copied, compared = set[int](), set[int](), 0
    for row in read_rows(str(public), "train", alone=False):
        if isinstance(row, DataError):
            raise row
        compared += 1
        for text in _texts(dict(row)):
            exact |= whole.get(canonical(text), set())
            for run in _runs(text):
                copied |= parts.get(run, set())
    if not compared:
        raise DataError(f"{public} holds no records")
    return Overlap(compared=compared, exact=len(exact), runs=len(copied))


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


def _runs(text: str) -> Iterator[str]:
    """Yield every run of 8 words, and of 20 characters without spaces: Korean has few long words."""
    words = text.split()
    for start in range(len(words) - _WORDS + 1):
        yield " ".join(words[start : start + _WORDS])
    letters = "".join(words)
    for start in range(len(letters) - _LETTERS + 1):
        yield letters[start : start + _LETTERS]


# ---- a set as a folder -----------------------------------------------------------------------------------------------


def write_set(
    out: Path, release: Release, prompts: Path, n: int, sampling: Sampling, public: Path | None, signer: Identity | None
) -> SyntheticSet:
    """Sample a set and write it to a new folder, with its cards; with `signer`, signed. Returns what it claims.

    Raises what `read_topics` and `synthesize` raise, FolderError for a folder that is not empty or cannot be written,
    and ReleaseError where no record is left.
    """
    check_answers(release)
    check_place(out, [release.folder])
    topics = read_topics(prompts, question_columns(release.manifest.reading))
    with new_folder(out) as folder:
        records, counts, shared = synthesize(release, topics, n, sampling, public)
        if not records:
            raise ReleaseError(
                f"of {n} answers none can be used ({counts.empty} empty, {counts.too_long} too long). Lower "
                "--temperature, or ask what the model was trained on."
            )
        found = SyntheticSet(
            made=f"{datetime.now(UTC):%Y-%m-%d %H:%M}", program=fedllm.__version__,
            release=manifest_digest(release.folder), training=release.manifest.training,
            privacy=release.manifest.privacy, sampling=sampling, prompts=hashlib.sha256(read(prompts)).hexdigest(),
            counts=counts, overlap=shared, signer=None if signer is None else signer.public.fingerprint,
        )  # fmt: skip
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in records]
        (folder / RECORDS).write_text("".join(lines), "utf-8")
        write_pages(folder, "synthetic", s=found, m=release.manifest, columns=sorted(records[0]))
        found = found.model_copy(update={"files": digests(folder, SIGNED)})
        if signer is not None:
            write_signed(folder / SIGNED, found, _TYPE, signer)
    return found


def is_set(data: Path) -> bool:
    """Whether a path is a signed synthetic set, or its records."""
    return ((data if data.is_dir() else data.parent) / SIGNED).is_file() and (data.is_dir() or data.name == RECORDS)


def verify_set(data: Path, trust: Trust) -> SyntheticSet:
    """Return what a signed set claims, after its signer and every file were checked; raises ReleaseError."""
    folder = data if data.is_dir() else data.parent
    found = read_signed(folder / SIGNED, _TYPE, SyntheticSet, trust, _MOST_BYTES, "set")
    check_files(folder, found.files, SIGNED, "set")
    return found
