"""A site's records, read and tokenised before anybody asks, and what their owner has declared of them.

A plan is compared with the declaration and never with the records: whether a site takes part, and how it says no, is
the same whatever they hold.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

from fedllm.config import ModelConfig, TextConfig
from fedllm.errors import DataError
from fedllm.plan import RunPlan
from fedllm.privacy.ledger import DataSet, fingerprint
from fedllm.training.data import PrivacyUnit, Row, Tokeniser, Tokens, group, members, place_of
from fedllm.training.model import Reader

_LONGEST = 1_000_000  # tokens of a record that are kept at the most


@dataclass(frozen=True)
class Declared:
    """What the owner says of the records. All that a plan is compared with."""

    size: int  # nominal number of privacy units
    unit: Literal["record", "person"]  # what a privacy unit is
    labels: tuple[str, ...] = ()  # of classification; none if text is learned

    def admit(self, plan: RunPlan) -> None:
        """Raise DataError if a plan does not fit."""
        if plan.privacy.unit != self.unit:
            raise DataError(f"privacy.unit={plan.privacy.unit}; the records are declared by {self.unit}")
        if (plan.model.task == "classification") != bool(self.labels):
            declared = "labels, for classification" if self.labels else "no labels, for text that is learned"
            raise DataError(f"model.task={plan.model.task}; the records are declared with {declared}")
        missing = sorted(set(self.labels) - set(plan.model.labels))
        if missing:
            raise DataError(f"model.labels lacks {', '.join(missing)}, which data.labels declares")


@dataclass(frozen=True)
class SiteRecords:
    """Records as they were when the site was started; they are read again when it is started again."""

    declared: Declared
    data_set: DataSet
    groups: Mapping[str, Sequence[Sequence[Tokens]]]  # by the model.source of a plan: the records of every unit
    wrong: Mapping[str, Sequence[DataError]]  # the same: why some contribute nothing. For their owner's eyes

    def units(self, plan: RunPlan) -> Sequence[PrivacyUnit]:
        """Return the privacy units as a plan cuts them; each is cut when it is taken."""
        return _Cut(self.groups[plan.model.source], plan)


class _Cut(Sequence[PrivacyUnit]):
    """Units of a plan: no more records of a person and no longer ones than it allows."""

    def __init__(self, groups: Sequence[Sequence[Tokens]], plan: RunPlan) -> None:
        self._groups, self._cap = groups, plan.privacy.records_per_person
        self._limit, self._labels = plan.model.max_length, plan.model.labels

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, index: int) -> PrivacyUnit: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PrivacyUnit]: ...
    def __getitem__(self, index: int | slice) -> PrivacyUnit | Sequence[PrivacyUnit]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return tuple(tokens.record(self._limit, self._labels) for tokens in self._groups[index][: self._cap])


def load_records(
    rows: Iterable[Row | DataError], text: TextConfig, person: str | None, declared: Declared,
    readers: Mapping[str, Reader],
) -> SiteRecords:  # fmt: skip
    """Tokenise records for every model that plans may name. One that cannot be used is left out, and alone.

    `person` is the column that names the person a record belongs to, None if there is none.
    """
    kept = [_known(row, number, text, person) for number, row in enumerate(rows)]
    usable = [row for row in kept if not isinstance(row, DataError)]
    groups, wrong = {}, {}
    for source, reader in readers.items():
        longest = min(reader.positions, _LONGEST)
        task: Literal["classification", "causal-lm"] = "classification" if declared.labels else "causal-lm"
        model = ModelConfig(source=source, task=task, labels=declared.labels, max_length=longest)
        tokeniser = Tokeniser(reader.tokenizer, model, text, reader.vocabulary)
        by = person if declared.unit == "person" else None
        groups[source], wrong[source] = group(kept, tokeniser.read(kept), by)
    return SiteRecords(declared, fingerprint(members(usable, text, person)), groups, wrong)


def _known(row: Row | DataError, number: int, text: TextConfig, person: str | None) -> Row | DataError:
    """Return a row, or an error where it has no fingerprint."""
    if isinstance(row, DataError):
        return row
    try:
        list(members([row], text, person))
    except Exception as error:  # nested more deeply than can be written down
        return DataError(f"{place_of(row, number)}: it cannot be written as text ({type(error).__name__})")
    return row
