"""How good releases are on PUBLIC records, beside their base and one another, and which prompt serves best.

Nothing here is counted against anybody's epsilon: a score on records that are not public costs privacy, and belongs in
training (`evaluation.every`). That `--data` is public is the user's word.
"""

import hashlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import fedllm
from fedllm.audit.trust import Trust
from fedllm.config import TextConfig
from fedllm.errors import ConfigError, DataError, FedllmError, ModelError, ReleaseError
from fedllm.files import cannot_write, replace_file
from fedllm.release.loading import Release, base_of, load_release
from fedllm.release.manifest import Digest, Manifest, check_place, manifest_digest, verify_release
from fedllm.settings_file import read_settings
from fedllm.training.adapter import logits_of
from fedllm.training.data import IGNORE, Row, check_named, naming, padded, read_rows, render
from fedllm.training.evaluation import each_record
from fedllm.training.losses import record_losses
from fedllm.training.model import load_base, pick_device
from fedllm.training.sources import resolve
from fedllm.values import Frozen, parse

RECORDS = 1000  # at most, if the user says nothing
SEED, RESAMPLES, CONFIDENCE = 0, 2000, 0.95  # of the bootstrap
OWN = "as trained"  # the release's own prompt, among those that are compared
LESS_IS_BETTER = ("perplexity",)
_PROMPTS = 20  # to compare: the interval of the best is widened for every pair of them
_FEW = 30  # records, below which an interval says little
_TEXT = 1 << 30  # bytes of .jsonl, .json and .csv, which are read whole
_LOGITS = 1 << 26  # logits that are in memory at a time: 256 MiB of float32

Metric = Literal["exact_match", "chrf", "perplexity", "accuracy", "macro_f1"]
Estimate = tuple[float, float, float]  # value, lower and upper end of its interval
Estimates = dict[Metric, Estimate]
Prompts = Mapping[str, TextConfig]
Say = Callable[[str], None]
_Measure = Callable[[NDArray[np.int64]], float]  # of the records, by their numbers, some of them several times


class Model(Frozen):
    """One column: a release, or the base that releases were made from."""

    name: str  # unique, as "merged int8"
    kind: Literal["base", "adapter", "merged", "student"]
    quantized: Literal["none", "int8", "nf4"] = "none"
    place: str  # folder of the release; name of the base
    digest: Digest  # of the release's manifest; of the base's weights
    epsilon: float | None = None  # that the release claims; None: it has no bound, or this is the base
    delta: float | None = None
    unit: Literal["record", "person"] | None = None
    private: bool | None = None  # whether the release may be called private; None: this is the base
    scores: Estimates


class Difference(Frozen):
    """By how much the scores of `name` are above those of `against`, on the same records."""

    name: str
    against: str
    scores: Estimates


class Prompt(Frozen):
    """A template that was tried with the first release."""

    name: str
    prompt: str | None
    system: str | None
    scores: Estimates


class Best(Frozen):
    """The prompt with the highest score, beside the second; both were chosen by the same records."""

    name: str
    second: str
    metric: Metric  # that decided: exact match, or chrF where no prompt has any
    difference: Estimate  # of the two; its interval is wide enough for all pairs at once (Bonferroni)
    pairs: int


class Answer(Frozen):
    """One record, and what every model said of it, in the order of `Evaluation.models`."""

    prompt: str
    expected: str
    answers: tuple[str, ...]
    right: tuple[bool, ...]


class Note(Frozen):
    """What a reader should know: a code, which pages have words for, and what fills them in."""

    code: Literal["no_base", "new_head", "other_base", "taught", "few", "no_record", "tokens", "not_private"]
    values: dict[str, str]


class Evaluation(Frozen):
    """Everything that was found: evaluation.json.

    `exact_match`, `accuracy` and `macro_f1` are shares from 0 to 1; `chrf` is from 0 to 100 (Popović 2015, as sacrebleu
    computes it over all records); `perplexity` is that of the answers, a token. Macro-F1 is the mean over the classes
    that a record has or was given. Intervals are percentile bootstrap intervals over records (Efron 1979), of
    differences paired: both models see the same resamples.
    """

    format: Literal[1] = 1
    made: str  # UTC
    program: str
    task: Literal["causal-lm", "classification"]
    data: str
    data_digest: Digest | None  # SHA-256, if it is one file
    records: int  # that were used, evenly spread over those that are there
    records_there: int
    seed: int = SEED
    resamples: int = RESAMPLES
    confidence: float = CONFIDENCE
    models: tuple[Model, ...]
    differences: tuple[Difference, ...]
    prompts: tuple[Prompt, ...] = ()  # best first; none unless several were compared
    best: Best | None = None
    notes: tuple[Note, ...] = ()
    answers: tuple[Answer, ...] = ()  # none of a model of bare texts

    def model(self, name: str) -> Model:
        """Return a column by its name."""
        return next(model for model in self.models if model.name == name)


def evaluate(
    folders: Sequence[Path], data: str, trust: Trust, prompts: Path | None, limit: int, say: Say
) -> Evaluation:
    """Evaluate releases, each verified first, on public records.

    Raises ReleaseError where a release is not what head office signed, or they cannot stand in one table; DataError
    with the first record that cannot be used; ConfigError for prompts that do not fit; ModelError.
    """
    manifests = _verified(folders, trust)
    first = next(iter(manifests.values()))
    templates = {} if prompts is None else read_prompts(prompts, first)
    generates = any(_generates(manifest.reading) for manifest in manifests.values())
    if generates and importlib.util.find_spec("sacrebleu") is None:
        raise ConfigError("chrF needs sacrebleu. Run: pip install 'fedllm[evaluate]'")
    rows, there = read_records(data, first.reading, limit, [m.reading for m in manifests.values()], templates)
    say(f"{len(rows):,} of {there:,} records of {data}, which you state to be public: no epsilon is counted for scores")
    names, digest = _names(manifests), _digest(data)
    notes = _notes_on(digest, dict(zip(names, manifests.values(), strict=True)), len(rows))
    columns, bases = list[_Column](), set[str]()
    tried = dict[str, _Found]()
    for (folder, manifest), name in zip(manifests.items(), names, strict=True):
        say(f"{name}: {folder}")
        release = load_release(folder, manifest)
        if manifest.base.digest not in bases:
            say(f"its base: {manifest.base.source}")
            base = _base_of(release)
            if isinstance(base, Note):
                notes.append(base)
            else:
                which = f"base {manifest.base.source}" if bases else "base"
                columns.append(_Column(which, manifest.base.source, None, manifest.base.digest, _found(base, rows)))
            bases.add(manifest.base.digest)
            del base
        columns.append(_Column(name, folder, manifest, manifest_digest(folder), _found(release, rows)))
        if manifest is first:
            for which, reading in templates.items():
                say(f"prompt {which}")
                tried[which] = _found(_asked_by(release, reading), rows)
            tried[OWN] = columns[-1].found
        del release  # its memory is the next one's
    if len({column.found.tokens.sum() for column in columns}) > 1 and first.task == "causal-lm":
        notes.append(Note(code="tokens", values={}))
    return _compared(first, (data, digest), there, columns, tried if templates else {}, templates, notes)


def write(evaluation: Evaluation, folder: Path, pages: Mapping[str, str], releases: Sequence[Path]) -> None:
    """Write evaluation.json and `pages` to a folder; raises FolderError, and ReleaseError for a release's folder."""
    check_place(folder, releases)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in {"evaluation.json": evaluation.model_dump_json(indent=1) + "\n", **pages}.items():
            replace_file(folder / name, text.encode())
    except OSError as error:
        raise cannot_write(folder, error) from error


# ---- what is read ----------------------------------------------------------------------------------------------------


def _verified(folders: Sequence[Path], trust: Trust) -> dict[Path, Manifest]:
    """Return the manifests of releases that can stand in one table."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("a release is named twice. Name each once.")
    manifests = {folder: verify_release(folder, trust) for folder in folders}
    (place, first), *others = manifests.items()
    for folder, manifest in others:
        for what, mine, its in (
            ("task", first.task, manifest.task), ("classes", first.labels, manifest.labels),
            ("way to read records", _generates(first.reading), _generates(manifest.reading)),
        ):  # fmt: skip
            if mine != its:
                raise ReleaseError(
                    f"{folder} has another {what} ({its}) than {place} ({mine}), and one table cannot hold both. "
                    "Evaluate each alone."
                )
    return manifests


def _generates(reading: TextConfig) -> bool:
    """Whether a model read so was trained to answer."""
    return reading.label is None and (reading.prompt is not None or reading.messages is not None)


def read_prompts(path: Path, manifest: Manifest) -> dict[str, TextConfig]:
    """Return how each prompt of a YAML file has records read: {name: template}, or {name: {prompt:, system:}}.

    Raises ConfigError with the name of the first that does not fit the release.
    """
    if not _generates(manifest.reading):
        raise ConfigError(f"--prompts: {manifest.name} answers no prompts (task {manifest.task}). Leave out --prompts.")
    values = read_settings(path)
    if not 1 <= len(values) <= _PROMPTS:
        raise ConfigError(f"{path}: {len(values)} prompts, expected 1 to {_PROMPTS}")
    found = dict[str, TextConfig]()
    for name, value in values.items():
        where = f"{path}: prompt {name!r}"
        given = {"prompt": value} if isinstance(value, str) else value
        if not isinstance(given, dict) or not given or not set(given) <= {"prompt", "system"}:
            raise ConfigError(f"{where}: expected a template, or its parts prompt and system, found {value!r}")
        if name == OWN:
            raise ConfigError(f"{where}: the release's own prompt has that name. Choose another.")
        if "prompt" in given and manifest.reading.messages is not None:
            raise ConfigError(f"{where}: the records are whole conversations, in which only `system` can be changed")
        try:
            found[name] = parse(TextConfig, {**manifest.reading.model_dump(mode="json"), **given})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    return found


def read_records(
    data: str, reading: TextConfig, limit: int, readings: Sequence[TextConfig] = (), prompts: Prompts | None = None
) -> tuple[list[Row], int]:
    """Return at most `limit` records, evenly spread over all, and how many there are; no more is kept in memory.

    Raises DataError for a record that cannot be read, and where a column is missing that one of `readings` or `prompts`
    names.
    """
    place = resolve_data(data)
    if isinstance(place, Path):
        files = [place] if place.is_file() else list(place.iterdir())
        size = sum(file.stat().st_size for file in files if file.suffix.lower() != ".parquet")
        if size > _TEXT:
            raise DataError(
                f"{data}: {size:,} bytes of text, expected at most {_TEXT:,}, since it is read whole. Write "
                ".parquet, or a smaller file."
            )
    there, columns = 0, dict[str, None]()
    for row in read_rows(data, "test", reading, alone=False):
        if isinstance(row, DataError):
            raise row
        columns.update(dict.fromkeys(row))
        there += 1
    if not there:
        raise DataError(f"{data} holds no records")
    with naming(data):
        for each in (reading, *readings):
            check_named(list(columns), each)
        for name, each in (prompts or {}).items():
            try:
                check_named(list(columns), each)
            except FedllmError as error:
                raise DataError(f"prompt {name!r}: {error}") from None
    count = min(limit, there)
    chosen = iter([i * there // count for i in range(count)])
    rows, wanted = list[Row](), next(chosen)
    for number, row in enumerate(islice(read_rows(data, "test", reading, alone=False), there)):
        if number == wanted:
            rows.append(cast(Row, row))
            wanted = next(chosen, there)
    return rows, there


def resolve_data(data: str) -> str | Path:
    """Return where records are; raises DataError if nothing is there."""
    try:
        return resolve(data)
    except ConfigError as error:
        raise DataError(f"--data {error}") from None


# ---- what models say -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """What one model said of N records, and what was expected."""

    tokens: NDArray[np.int64]  # [N], on which the loss falls; a classifier: 1 each
    losses: NDArray[np.float64]  # [N], nats, summed over these tokens
    asked: list[str]
    expected: list[str]
    answers: list[str]  # or names of classes; none of bare texts, as of the two above

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which answers are as expected, bool[N]."""
        return np.array([a == e for a, e in zip(self.answers, self.expected, strict=True)], dtype=bool)


@dataclass(frozen=True)
class _Column:
    name: str
    place: Path | str
    manifest: Manifest | None  # None: of a base
    digest: str
    found: _Found


@dataclass(frozen=True)
class _Scored:
    """A release as the losses of training see a model."""

    release: Release
    split: None = None

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return [N, T, vocabulary] of the text's own tokens, or [N, classes]."""
        return logits_of(self.release.model, input_ids, attention_mask)


def _found(release: Release, rows: Sequence[Row]) -> _Found:
    manifest, model = release.manifest, _Scored(release)
    examples = [release.tokeniser.cut(_usable(tokens, manifest)) for tokens in release.tokeniser.read(rows)]
    vocabulary = 1 if manifest.labels else int(release.model.config.get_text_config().vocab_size)
    each = partial(
        each_record, records=examples, rows=lambda width: max(1, min(64, _LOGITS // (width * vocabulary))),
        pad_id=release.tokenizer.pad_token_id, device=release.device,
    )  # fmt: skip
    losses = each(partial(record_losses, model)).astype(np.float64)
    if not np.isfinite(losses).all():
        raise ModelError(
            f"{release.folder}: its loss on record {int(np.argmin(np.isfinite(losses))) + 1} is not a number"
        )
    if manifest.task == "classification":
        classes = each(lambda batch: model.logits(batch.input_ids, batch.attention_mask).argmax(-1)).astype(int)
        reading, labels = manifest.reading, manifest.labels
        asked = [render(reading.text or "", row, number, reading.columns) for number, row in enumerate(rows)]
        expected = [labels[int(example.labels)] for example in examples]
        return _Found(np.ones(len(rows), np.int64), losses, asked, expected, [labels[i] for i in classes])
    tokens = np.array([int((example.labels[1:] != IGNORE).sum()) for example in examples])
    if not tokens.sum():
        raise DataError("the records hold no token to predict")
    if not _generates(manifest.reading):
        return _Found(tokens, losses * tokens, [], [], [])
    pairs = [release.tokeniser.question(row, number) for number, row in enumerate(rows)]
    asked, expected = [each for each, _ in pairs], [each for _, each in pairs]
    return _Found(tokens, losses * tokens, asked, expected, _answers(release, rows))


def _usable(tokens: Any, manifest: Manifest) -> Any:
    if isinstance(tokens, DataError):
        known = f" The release knows {', '.join(manifest.labels)}." if manifest.labels else ""
        raise DataError(f"{tokens}{known}")
    return tokens


def _answers(release: Release, rows: Sequence[Row]) -> list[str]:
    """Answer every record; an answer is cut where it is some tokens longer than the expected one: see `padded`."""
    longest = release.manifest.max_length
    most = [
        padded(min(longest, len(release.tokeniser.answer_ids(row, number)) + 8), longest)
        for number, row in enumerate(rows)
    ]
    prompts = release.prompts(rows)
    answers = [""] * len(rows)
    for length in sorted(set(most)):
        some = [i for i, each in enumerate(most) if each == length]
        for i, answer in zip(some, release.answers([prompts[i] for i in some], length), strict=True):
            answers[i] = answer
    return answers


def _asked_by(release: Release, reading: TextConfig) -> Release:
    return replace(release, manifest=release.manifest.model_copy(update={"reading": reading}))


def _base_of(release: Release) -> Release | Note:
    """Return the base of a release, read as the release is; a note why there is none to compare with."""
    manifest = release.manifest
    base = manifest.base
    told = {"base": base.source}
    if manifest.pooling == "mean":
        return Note(code="new_head", values=told)
    try:
        loaded = load_base(base_of(release.folder, manifest), pick_device("auto"))
    except (ModelError, ConfigError) as error:
        return Note(code="no_base", values={**told, "why": str(error)})
    if loaded.digest != base.digest:
        return Note(code="other_base", values=told)
    if loaded.new:
        return Note(code="new_head", values=told)
    return replace(release, model=loaded.model.requires_grad_(False))


# ---- what follows ----------------------------------------------------------------------------------------------------


def _measures(found: _Found, task: str) -> dict[Metric, _Measure]:
    """Return every metric of what a model said, as a function of the records that count, int64[n]."""
    right = found.right
    if task == "classification":
        names = sorted({*found.expected, *found.answers})
        truth, said = (np.array([names.index(each) for each in some]) for some in (found.expected, found.answers))

        def macro_f1(some: NDArray[np.int64]) -> float:
            counted = partial(np.bincount, minlength=len(names))
            hits, true, guessed = counted(truth[some][right[some]]), counted(truth[some]), counted(said[some])
            there = true + guessed > 0
            return float((2 * hits[there] / (true + guessed)[there]).mean())

        return {"accuracy": lambda some: float(right[some].mean()), "macro_f1": macro_f1}

    def perplexity(some: NDArray[np.int64]) -> float:
        return math.exp(min(700.0, float(found.losses[some].sum() / max(1, found.tokens[some].sum()))))

    if not found.answers:
        return {"perplexity": perplexity}
    from sacrebleu.metrics.chrf import CHRF

    # as sacrebleu's own bootstrap, which gives no interval of a difference: sums of what it counts for each record
    chrf: Any = CHRF()
    counts = np.array(chrf._extract_corpus_statistics(found.answers, [found.expected]))
    return {
        "exact_match": lambda some: float(right[some].mean()),
        "chrf": lambda some: float(chrf._compute_score_from_stats(counts[some].sum(0).tolist()).score),
        "perplexity": perplexity,
    }


def _drawn(measures: Sequence[_Measure], records: int, resamples: int) -> NDArray[np.float64]:
    """Return measures of all records, then of resamples, [1 + resamples, measures]; equal calls see equal resamples."""
    random = np.random.default_rng(SEED)
    values = np.empty((1 + resamples, len(measures)))
    for number in range(1 + resamples):
        some = np.arange(records) if number == 0 else random.integers(records, size=records)
        values[number] = [measure(some) for measure in measures]
    return values


def _estimate(drawn: NDArray[np.float64], confidence: float = CONFIDENCE) -> Estimate:
    low, high = np.quantile(drawn[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(drawn[0]), float(low), float(high)


def tells(difference: Estimate) -> bool:
    """Whether an interval of a difference leaves out 0."""
    return not difference[1] <= 0 <= difference[2]


def _drawn_all(
    found: Sequence[_Found], task: str, resamples: int = RESAMPLES
) -> list[dict[Metric, NDArray[np.float64]]]:
    """Return for each model its metrics, drawn on the same resamples."""
    tables = [_measures(each, task) for each in found]
    drawn = _drawn([each for table in tables for each in table.values()], len(found[0].tokens), resamples)
    columns = iter(drawn.T)
    return [{metric: next(columns) for metric in table} for table in tables]


def _estimates(drawn: Mapping[Metric, NDArray[np.float64]]) -> Estimates:
    return {metric: _estimate(values) for metric, values in drawn.items()}


def _compared(
    first: Manifest, data: tuple[str, str | None], there: int, columns: Sequence[_Column], tried: Mapping[str, _Found],
    prompts: Prompts, notes: list[Note],
) -> Evaluation:  # fmt: skip
    drawn = dict(zip((c.name for c in columns), _drawn_all([c.found for c in columns], first.task), strict=True))
    lead = next(column.name for column in columns if column.manifest is not None)
    pairs = [(lead, column.name) for column in columns[:1] if column.manifest is None]
    pairs += [(column.name, lead) for column in columns if column.manifest is not None and column.name != lead]
    ranked, best = _ranked(tried, prompts, first)
    some = columns[0].found
    if first.labels:
        lacking = [label for label in first.labels if label not in some.expected]
        if lacking:
            notes.append(Note(code="no_record", values={"labels": ", ".join(lacking)}))
    return Evaluation(
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        program=fedllm.__version__,
        task=first.task,
        data=data[0],
        data_digest=data[1],
        records=len(some.tokens),
        records_there=there,
        models=tuple(_model(column, _estimates(drawn[column.name])) for column in columns),
        differences=tuple(
            Difference(name=a, against=b, scores=_estimates({m: drawn[a][m] - drawn[b][m] for m in drawn[a]}))
            for a, b in pairs
        ),
        prompts=ranked,
        best=best,
        notes=tuple(notes),
        answers=_side_by_side(first, columns),
    )


def _model(column: _Column, scores: Estimates) -> Model:
    manifest = column.manifest
    if manifest is None:
        return Model(name=column.name, kind="base", place=str(column.place), digest=column.digest, scores=scores)
    claim = manifest.privacy
    return Model(
        name=column.name, kind=manifest.form, quantized=manifest.quantized, place=str(column.place),
        digest=column.digest, epsilon=claim.epsilon, delta=claim.delta, unit=claim.unit, private=claim.private,
        scores=scores,
    )  # fmt: skip


def _ranked(tried: Mapping[str, _Found], prompts: Prompts, first: Manifest) -> tuple[tuple[Prompt, ...], Best | None]:
    """Return prompts, the best first, and by how much it is ahead of the second."""
    if not tried:
        return (), None
    pairs = len(tried) * (len(tried) - 1) // 2
    # some of the resamples must lie beyond an interval that holds for all pairs
    drawn = dict(zip(tried, _drawn_all(list(tried.values()), first.task, max(RESAMPLES, 200 * pairs)), strict=True))
    metric: Metric = "exact_match" if any(each["exact_match"][0] for each in drawn.values()) else "chrf"
    order = sorted(
        drawn, key=lambda name: (drawn[name][metric][0], drawn[name]["chrf"][0], -drawn[name]["perplexity"][0]),
        reverse=True,
    )  # fmt: skip
    best, second, *_ = order
    ahead = drawn[best][metric] - drawn[second][metric]
    found = Best(
        name=best, second=second, metric=metric, difference=_estimate(ahead, 1 - (1 - CONFIDENCE) / pairs), pairs=pairs
    )
    how = {**prompts, OWN: first.reading}
    return tuple(
        Prompt(name=name, prompt=how[name].prompt, system=how[name].system, scores=_estimates(drawn[name]))
        for name in order
    ), found


def _side_by_side(first: Manifest, columns: Sequence[_Column]) -> tuple[Answer, ...]:
    if not columns[0].found.answers:
        return ()
    rights = np.array([column.found.right for column in columns])  # [models, N]
    lead = next(column.found for column in columns if column.manifest is first)
    return tuple(
        Answer(
            prompt=lead.asked[i], expected=lead.expected[i],
            answers=tuple(column.found.answers[i] for column in columns), right=tuple(map(bool, rights[:, i])),
        )
        for i in range(len(lead.expected))
    )  # fmt: skip


def _names(manifests: Mapping[Path, Manifest]) -> list[str]:
    """Return a name for each release that no other has."""
    kinds = [f"{m.form}{'' if m.quantized == 'none' else ' ' + m.quantized}" for m in manifests.values()]
    return [
        kind if kinds.count(kind) == 1 else f"{kind} {folder}" for kind, folder in zip(kinds, manifests, strict=True)
    ]


def _notes_on(digest: str | None, named: Mapping[str, Manifest], records: int) -> list[Note]:
    notes = [Note(code="taught", values={"name": name}) for name, each in named.items() if digest in each.public_data]
    notes += [
        Note(code="not_private", values={"name": name}) for name, each in named.items() if not each.privacy.private
    ]
    return notes + ([Note(code="few", values={"records": str(records)})] if records < _FEW else [])


def _digest(data: str) -> str | None:
    place = resolve_data(data)
    if not isinstance(place, Path) or not place.is_file():
        return None
    with place.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
