"""A site's records, read and tokenised before anybody asks, and what their owner has declared of them.

A plan is compared with the declaration and never with the records: whether a site takes part, and how it says no, is
the same whatever they hold.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fedllm.config import ModelConfig, TextConfig
from fedllm.errors import DataError
from fedllm.plan import RunPlan
from fedllm.privacy.ledger import DataSet, fingerprint
from fedllm.privacy.split import Side, Split
from fedllm.training.data import (
    MadeWhenTaken,
    PrivacyUnit,
    Row,
    Tokeniser,
    Tokens,
    group,
    identities,
    members,
    place_of,
    split_rule,
)
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
    identities: Sequence[bytes]  # what tells every unit from others
    rule: str  # what that is made of

    def units(self, plan: RunPlan, split: Split, side: Side) -> Sequence[PrivacyUnit]:
        """Return the privacy units of one side, as a plan cuts them; each is cut when it is taken."""
        units = self.groups[plan.model.source]
        return _Cut([units[i] for i in self._on(split, side)], plan)

    def _on(self, split: Split, side: Side) -> Sequence[int]:
        if split not in self._sides:
            self._sides.clear()
            sides = self._sides[split] = {"training": [], "evaluation": []}
            for index, identity in enumerate(self.identities):
                sides[split.side(identity)].append(index)
        return self._sides[split][side]

    @cached_property
    def _sides(self) -> dict[Split, dict[Side, list[int]]]:
        return {}


class _Cut(MadeWhenTaken):
    """Units of a plan: no more records of a person and no longer ones than it allows."""

    def __init__(self, groups: Sequence[Sequence[Tokens]], plan: RunPlan) -> None:
        self._groups, self._cap = groups, plan.privacy.records_per_person
        self._limit, self._labels = plan.model.max_length, plan.model.labels

    def __len__(self) -> int:
        return len(self._groups)

    def take(self, index: int) -> PrivacyUnit:
        return tuple(tokens.record(self._limit, self._labels) for tokens in self._groups[index][: self._cap])


def load_records(
    rows: Iterable[Row | DataError], text: TextConfig, person: str | None, declared: Declared,
    readers: Mapping[str, Reader],
) -> SiteRecords:  # fmt: skip
    """Tokenise records for every model that plans may name. One that cannot be used is left out, and alone.

    `person` is the column that names the person a record belongs to, None if there is none.
    """
    kept, data_set = list[Row | DataError](), set[bytes]()
    for number, row in enumerate(rows):
        found = row if isinstance(row, DataError) else _members(row, number, text, person)
        kept.append(found if isinstance(found, DataError) else row)
        data_set |= frozenset() if isinstance(found, DataError) else found
    groups, wrong = {}, {}
    for source, reader in readers.items():
        longest = min(reader.positions, _LONGEST)
        task: Literal["classification", "causal-lm"] = "classification" if declared.labels else "causal-lm"
        model = ModelConfig(source=source, task=task, labels=declared.labels, max_length=longest)
        tokeniser = Tokeniser(reader.tokenizer, model, text, reader.vocabulary)
        by = person if declared.unit == "person" else None
        groups[source], wrong[source] = group(kept, tokeniser.read(kept), by)
    known_by = identities(kept, text, person, declared.unit == "person")
    rule = split_rule(text, person, declared.unit == "person")
    return SiteRecords(declared, frozenset(data_set), groups, wrong, known_by, rule)


def _members(row: Row, number: int, text: TextConfig, person: str | None) -> DataSet | DataError:
    """Return the fingerprint of a row, or an error where it has none."""
    try:
        return fingerprint(members([row], text, person))
    except Exception as error:  # nested more deeply than can be written down
        return DataError(f"{place_of(row, number)}: it cannot be written as text ({type(error).__name__})")
