"""A site's records: one table, what it is known by, and the privacy units in it."""

from dataclasses import dataclass
from functools import cached_property

from fedllm.plan import RunPlan, TextConfig
from fedllm.privacy.ledger import DataSet, fingerprint
from fedllm.training.data import Table, Tokeniser, Unit, build_units, check_columns, members
from fedllm.training.workspace import Workspace


@dataclass(frozen=True)
class TableRecords:
    """The rows of a site."""

    table: Table
    text: TextConfig
    person: str | None  # column that names the person a row belongs to

    @cached_property
    def data_set(self) -> DataSet:
        """The fingerprint of the rows and persons."""
        return fingerprint(members(self.table, self.text, self.person))

    def units(self, plan: RunPlan, workspace: Workspace) -> tuple[Unit, ...]:
        """Tokenise the rows; raises DataError where they cannot be used."""
        by_person = self.person if plan.privacy.unit == "person" else None
        check_columns(self.table, self.text, [by_person])
        tokeniser = Tokeniser(workspace.adapter.tokenizer, plan.model, self.text)
        return build_units(self.table, tokeniser, by_person, plan.privacy.records_per_person)
