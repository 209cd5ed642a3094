"""Makes the folder of a run, with everything that sites and the server sign, without training anything."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedllm.audit.evidence import file_name
from fedllm.audit.trust import Trust
from fedllm.crypto.hash_chain import START, End, Entry, make_entry, open_entry
from fedllm.crypto.identity import Identity
from fedllm.plan import RunPlan
from fedllm.privacy.ledger import PrivacyLedger
from fedllm.privacy.ledger_place import LedgerPlace
from fedllm.protocol.spending_statement import Statement, roster_digest, sign_statement, update_digest
from fedllm.values import HEAD_OFFICE

SITES = ("seoul-gangnam", "부산-해운대", "incheon")
DELTA = 1e-5


def make_plan(run: str = "f" * 32, rounds: int = 4, unit: str = "person", **privacy: Any) -> RunPlan:
    fields = {
        "run": run,
        "seed": 0,
        "model": {"source": "pkg://simulations.demo/base"},
        "adapter": {},
        "privacy": {"unit": unit, "epsilon": 3.0, "delta": DELTA, "sampling_rate": 0.1, "units_per_site": 300,
                    "noise_multiplier": 2.0, **privacy},
        "training": {"rounds": rounds, "local_steps": 2},
    }  # fmt: skip
    return RunPlan.model_validate_json(json.dumps(fields))


@dataclass
class Chain:
    """The server's record as a list of lines."""

    signer: Identity
    lines: list[str] = field(default_factory=list)

    def add(self, kind: str, body: dict[str, Any]) -> None:
        last = open_entry(self.lines[-1]).digest if self.lines else START
        self.lines.append(
            make_entry(len(self.lines), last, kind, 1_790_000_000.0 + 60 * len(self.lines), body, self.signer)
        )


@dataclass
class Federation:
    """The server and sites that keep their ledgers over several runs."""

    folder: Path
    sites: Sequence[str] = SITES
    budget: float = 4.0
    head_office: Identity = field(default_factory=Identity.generate)
    identities: dict[str, Identity] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.identities = {name: Identity.generate() for name in self.sites}

    @property
    def trust(self) -> Trust:
        keys = {name: [identity.public.fingerprint] for name, identity in self.identities.items()}
        return Trust({HEAD_OFFICE: [self.head_office.public.to_text()], **keys})

    def write_trust(self, path: Path) -> Path:
        lines = [f"{name} {identity.public.fingerprint}" for name, identity in self.identities.items()]
        path.write_text(
            "# keys\n" + "\n".join([f"{HEAD_OFFICE} {self.head_office.public.fingerprint}", *lines]), "utf-8"
        )
        return path

    def place(self, site: str) -> LedgerPlace:
        folder = self.folder / "offices" / file_name(site)
        return LedgerPlace(folder / "ledger.db", folder / "ledger.anchor")

    def ledger(self, site: str) -> PrivacyLedger:
        return PrivacyLedger(self.place(site), self.budget, DELTA, self.identities[site])

    def run(self, name: str, plan: RunPlan, declines: Sequence[str] = (), ended: bool = True) -> Path:
        """Carry out a run on paper and return its folder."""
        run = self.folder / name
        (run / "ledgers").mkdir(parents=True)
        record = Chain(self.head_office)
        record.add("plan", {
            "plan": plan.model_dump(mode="json"), "plan_digest": plan.digest, "spec_digest": "a" * 64,
            "versions": {"python": "3.11", "fedllm": "0.1.0"},
            "sites": {site: identity.public.to_text() for site, identity in self.identities.items()},
            "adapter": "0" * 64,
        })  # fmt: skip
        metrics = [{"round": 0, "loss": 2.5, "perplexity": 12.2, "accuracy": None, "answered": [], "declined": {}}]
        ledgers = {site: self.ledger(site) for site in self.sites}
        for number in range(1, plan.training.rounds + 1):
            answered: dict[str, str] = {}
            asked = sorted(site for site in self.sites if site not in declines or not number % 2)
            record.add("begun", {"round": number, "sites": asked})
            for site in asked:
                answered[site] = self.answer(ledgers[site], site, plan, number, asked, open_entry(record.lines[-1]))
            declined = {site: "policy" for site in self.sites if site not in answered}
            record.add("round", {
                "round": number, "counts": True, "answered": answered, "declined": declined, "failed": {},
                "adapter_before": f"{number - 1:064x}", "adapter_after": f"{number:064x}",
                "bytes_up": 10, "bytes_down": 10,
            })  # fmt: skip
            metrics.append({"round": number, "loss": 2.5 / (1 + 0.3 * number), "perplexity": 5.0, "accuracy": None,
                            "answered": sorted(answered), "declined": declined})  # fmt: skip
        if ended:
            record.add("end", {"round": plan.training.rounds, "stopped": "", "adapter": f"{plan.training.rounds:064x}"})
        (run / "record.jsonl").write_text("".join(f"{line}\n" for line in record.lines), "utf-8")
        (run / "plan.json").write_text(plan.model_dump_json(indent=2), "utf-8")
        (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in metrics), "utf-8")
        self.export(run)
        return run

    def export(self, run: Path) -> None:
        record = [open_entry(line) for line in (run / "record.jsonl").read_text("utf-8").splitlines()]
        end = End(record[0].body["plan"]["run"], record[-1].number, record[-1].digest)
        for site in self.sites:
            lines = self.ledger(site).file.export(end, self.identities[site])
            (run / "ledgers" / f"{file_name(site)}.jsonl").write_text("".join(f"{x}\n" for x in lines), "utf-8")

    def answer(
        self, ledger: PrivacyLedger, site: str, plan: RunPlan, number: int, asked: Sequence[str], begun: Entry
    ) -> str:
        event = plan.mechanism.event(plan.training.local_steps)
        reservation = ledger.reserve(plan.run, number, "request", event)
        cost, head = ledger.spent(), ledger.file.head()
        finite = cost.epsilon != float("inf")
        statement = Statement(
            site=site, run=plan.run, plan=plan.digest, round=number,
            epsilon=cost.epsilon if finite else None, epsilon_rdp=cost.epsilon_rdp if finite else None,
            delta=cost.delta, ledger_number=head.number, ledger_digest=head.digest, update=update_digest(b"update"),
            roster=roster_digest(asked), record_number=begun.number, record_digest=begun.digest,
            adapter=f"{number - 1:064x}",
        )  # fmt: skip
        ledger.release(reservation, b"reply")
        return sign_statement(statement, self.identities[site])


def resign(line: str, changes: dict[str, Any], signer: Identity) -> str:
    """Return a statement with some fields changed, signed again by who may sign it: a lie, not a forgery."""
    from fedllm.protocol.spending_statement import open_statement

    return sign_statement(Statement(**{**asdict(open_statement(line)[0]), **changes}), signer)
