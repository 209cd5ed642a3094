"""How long the audit of a large run takes: its report, and its verification on another machine.

python -m simulations.benchmarks.audit --sites 100 --rounds 1000

The evidence is made without training: everything in it is signed and chained as in a run, and verifies.
"""

import base64
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fedllm.audit.evidence import LEDGERS, METRICS, PLAN, RECORD
from fedllm.crypto.hash_chain import EXPORT, START, make_entry
from fedllm.crypto.identity import Identity
from fedllm.files import write_secret
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import AccountingEvent, PrivacySpent, spent
from fedllm.protocol.spending_statement import Statement, roster_digest, sign_statement
from fedllm.values import HEAD_OFFICE, parse

_BEGAN = 1_790_000_000.0  # seconds since the epoch
_DELTA = 1e-5


class _Chain:
    """Signed entries, one after the other."""

    def __init__(self, signer: Identity) -> None:
        self.lines: list[str] = []
        self.head = START
        self.signer = signer

    def add(self, kind: str, body: dict[str, Any]) -> None:
        number = len(self.lines)
        self.lines.append(make_entry(number, self.head, kind, _BEGAN + 60 * (number // 2), body, self.signer))
        payload = base64.b64decode(json.loads(self.lines[-1])["payload"])
        self.head = hashlib.sha256(payload).hexdigest()

    def write(self, path: Path) -> None:
        path.write_text("".join(f"{line}\n" for line in self.lines), "utf-8")


def measure(
    sites: Annotated[int, typer.Option(min=1, help="Sites, each with a ledger of its own.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, every site in each of them.")] = 1000,
) -> None:
    """Make the evidence of a run, then time its report in both languages, with PDFs, and its verification."""
    with tempfile.TemporaryDirectory() as place:
        run = Path(place)
        head_office = Identity.generate()
        keys = _make(run, head_office, sites, rounds)
        size = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
        print(f"{size / 1e6:.0f} MB of evidence, {sites * (2 * rounds + 3) + rounds + 2:,} entries, "
              f"{sites * rounds:,} statements")  # fmt: skip
        write_secret(run / "identity", head_office.to_bytes())
        (run / "keys.txt").write_text("".join(f"{name} {key}\n" for name, key in keys.items()), "utf-8")
        for arguments in (
            ["report", str(run), "--key", str(run / "identity")],
            ["verify", str(run / "audit"), "--trust", str(run / "keys.txt"), "--allow-uncompared"],
        ):
            _command(arguments)


def _command(arguments: list[str]) -> None:
    """Run an audit command in a process of its own, and print what it took."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "fedllm.cli", "audit", *arguments], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"fedllm audit {arguments[0]}: {time.perf_counter() - began:.0f} s, of the CPU {cpu:.0f} s, "
        f"{after.ru_maxrss / 1024:.0f} MB at most",
        flush=True,
    )


def _make(run: Path, head_office: Identity, sites: int, rounds: int) -> dict[str, str]:
    """Write the evidence and return the keys that verify it."""
    plan = parse(RunPlan, {
        "run": "f" * 32, "seed": 0, "model": {"source": "pkg://simulations.demo/base"}, "adapter": {},
        "privacy": {"unit": "person", "epsilon": 8.0, "delta": _DELTA, "sampling_rate": 0.01, "units_per_site": 300,
                    "noise_multiplier": 1.0},
        "training": {"rounds": rounds, "local_steps": 1},
    })  # fmt: skip
    event = plan.mechanism.event(1)
    costs = [
        spent([AccountingEvent(event.sampling_rate, event.noise_multiplier, n)], _DELTA) for n in range(rounds + 1)
    ]
    signers = {f"site-{number:03d}": Identity.generate() for number in range(sites)}
    (run / LEDGERS).mkdir()
    ledgers = {site: _ledger(signer) for site, signer in signers.items()}
    record = _Chain(head_office)
    record.add("plan", {
        "plan": plan.model_dump(mode="json"), "plan_digest": plan.digest, "spec_digest": "a" * 64,
        "versions": {"fedllm": "0.1.0"}, "sites": {s: signer.public.to_text() for s, signer in signers.items()},
        "adapter": "0" * 64,
    })  # fmt: skip
    metrics: list[dict[str, Any]] = []
    for number in range(rounds + 1):
        answered: dict[str, str] = {}
        if number:
            record.add("begun", {"round": number, "sites": sorted(signers)})
            begun = (roster_digest(signers), len(record.lines) - 1, record.head)
            for site, ledger in ledgers.items():
                answered[site] = _answer(site, ledger, plan, number, costs[number], begun)
        metrics.append({"round": number, "loss": 2.5 / (1 + number), "perplexity": 5.0, "accuracy": None,
                        "answered": sorted(answered), "declined": {}})  # fmt: skip
        if number:
            record.add("round", {
                "round": number, "counts": True, "answered": answered, "declined": {}, "failed": {},
                "adapter_before": f"{number - 1:064x}", "adapter_after": f"{number:064x}",
                "bytes_up": 10, "bytes_down": 10,
            })  # fmt: skip
    record.add("end", {"round": rounds, "stopped": "", "adapter": f"{rounds:064x}"})
    record.write(run / RECORD)
    for site, ledger in ledgers.items():
        ledger.add(EXPORT, {"run": plan.run, "number": len(record.lines) - 1, "digest": record.head})
        ledger.write(run / LEDGERS / f"{site}.jsonl")
    (run / PLAN).write_text(plan.model_dump_json(indent=2), "utf-8")
    (run / METRICS).write_text("".join(json.dumps(each) + "\n" for each in metrics), "utf-8")
    return {name: signer.public.fingerprint for name, signer in {HEAD_OFFICE: head_office, **signers}.items()}


def _ledger(signer: Identity) -> _Chain:
    """Return a site's ledger before the run."""
    ledger = _Chain(signer)
    ledger.add("opened", {})
    ledger.add("budget", {"epsilon": 100.0, "delta": _DELTA})
    return ledger


def _answer(
    site: str, ledger: _Chain, plan: RunPlan, number: int, cost: PrivacySpent, begun: tuple[str, int, str]
) -> str:
    """Charge a round and return the site's statement on it."""
    event = plan.mechanism.event(1)
    where = {"account": "site", "run": plan.run, "round": number, "charge": 1}
    ledger.add("reserved", {
        **where, "request": "b" * 64, "sampling_rate": event.sampling_rate,
        "noise_multiplier": event.noise_multiplier, "steps": 1,
    })  # fmt: skip
    statement = Statement(site, plan.run, plan.digest, number, cost.epsilon, cost.epsilon_rdp, _DELTA,
                          len(ledger.lines) - 1, ledger.head, "c" * 64, *begun, f"{number - 1:064x}")  # fmt: skip
    ledger.add("released", {**where, "reply": "d" * 64})
    return sign_statement(statement, ledger.signer)


if __name__ == "__main__":
    typer.run(measure)
