"""A site whose budget is spent, and what its owner can say about it: for the attacks on its ledger."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from client.office import Office, init_office
from client.service import read_data_set
from fedllm.cli.main import app
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import AccountingEvent
from fedllm.privacy.elapsed import Period
from fedllm.privacy.ledger import PrivacyLedger
from fedllm.values import parse
from tests.fedllm.privacy.budgets import for_several_plans

DELTA = 1e-5
EVENT = AccountingEvent(0.5, 1.5, 2)  # of PLAN
ROUNDS = 3
BUDGET = for_several_plans([EVENT] * ROUNDS, DELTA)  # for ROUNDS of EVENT, and not one more
PLAN = parse(
    RunPlan,
    {
        "run": "first", "seed": 1, "model": {"source": "base"}, "adapter": {"rank": 4},
        "privacy": {"sampling_rate": 0.5, "units_per_site": 100, "noise_multiplier": 1.5},
        "training": {"rounds": ROUNDS, "local_steps": 2},
    },
)  # fmt: skip


class Branch:
    """A site's folder; every opening of its ledger is as after a restart of its service."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        init_office(folder, "busan")
        self.write([{"id": 1000 + number, "question": f"q{number}", "answer": f"a{number}"} for number in range(9)])
        self.set("epsilon: 8.0", f"epsilon: {BUDGET!r}")

    def write(self, rows: list[dict[str, Any]]) -> None:
        (self.folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "records.jsonl").read_text("utf-8").splitlines()]

    def set(self, before: str, after: str) -> None:
        """Change site.yaml."""
        text = (self.folder / "site.yaml").read_text("utf-8")
        assert before in text
        (self.folder / "site.yaml").write_text(text.replace(before, after), "utf-8")

    @property
    def office(self) -> Office:
        return Office.open(self.folder)

    def open(self, period: Period | None = None) -> PrivacyLedger:
        """Open the ledger as the site does for a plan: its records are compared, too."""
        office = self.office
        ledger = PrivacyLedger(office.ledger, office.policy.epsilon, DELTA, office.identity, period)
        ledger.compare(read_data_set(office))
        return ledger

    def spend(self, rounds: int = ROUNDS) -> None:
        """Answer the first rounds of a run, those that are answered already not again."""
        ledger = self.open()
        for round_ in range(1, rounds + 1):
            reservation = ledger.reserve("first", round_, "request", EVENT)
            if reservation.reply is None:
                ledger.release(reservation, b"reply")

    def owner(self, *arguments: object, said: str | None = None) -> str:
        """Run a command of the owner; an error is raised as it would be printed."""
        command = ["ledger", *map(str, arguments), "--home", str(self.folder)]
        result = CliRunner().invoke(app, command, input=said, env={"COLUMNS": "200"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    def plan_file(self) -> Path:
        path = self.folder / "plan.json"
        path.write_text(PLAN.model_dump_json(), "utf-8")
        return path
