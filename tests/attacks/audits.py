"""What the server needs to hand in a false audit: a true one, its own key, and a pen."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedllm.audit.bundle import write_audit
from fedllm.audit.evidence import assess, file_name
from fedllm.audit.report import render_html, to_json
from fedllm.crypto.hash_chain import End, Entry, close_export, make_entry, open_entry
from fedllm.crypto.identity import Identity
from fedllm.plan import RunPlan
from tests.fedllm.audit.evidence import Chain, Federation, make_plan

EIGHT = tuple(f"branch-{number}" for number in range(1, 9))


def federation_of(folder: Path, sites: tuple[str, ...] = EIGHT, rounds: int = 2) -> tuple[Federation, Path]:
    """Return a federation, and the folder of the run that it made."""
    federation = Federation(folder, sites=sites)
    return federation, federation.run("run", make_plan(rounds=rounds))


def hand_in(run: Path, head_office: Identity, pages: bool = False) -> Path:
    """Write the audit of a run, signed by the server, and return its folder."""
    folder = write_audit(run, run / "audit", [], signer=head_office).folder
    if pages:  # without PDFs: to make them takes long
        audit = assess(folder, None, "2026-10-01 12:00", head_office.public.fingerprint)
        (folder / "audit.json").write_bytes(to_json(audit))
        (folder / "audit.html").write_text(render_html(audit, "en"), "utf-8")
        (folder / "audit.ko.html").write_text(render_html(audit, "ko"), "utf-8")
        sign(folder, head_office)
    return folder


def sign(folder: Path, signer: Identity) -> None:
    """Sign all that is in an audit's folder now."""
    from fedllm.audit import bundle

    payload = json.dumps({"files": bundle._digests(folder)}, sort_keys=True).encode()
    (folder / "audit.sig").write_text(bundle.sign_envelope(payload, bundle.SIGNATURE_TYPE, signer), "utf-8")


def rewrite(path: Path, signer: Identity, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Write a chain anew, by whoever may sign it, after `change` of its bodies (with their kinds)."""
    entries = [open_entry(line) for line in path.read_text("utf-8").splitlines()]
    bodies = [{"kind": entry.kind, **entry.body} for entry in entries]
    change(bodies)
    chain = Chain(signer)
    for body in bodies:
        chain.add(str(body.pop("kind")), body)
    path.write_text("".join(f"{line}\n" for line in chain.lines), "utf-8")


def append(run: Path, site: str, signer: Identity, kind: str, body: dict[str, Any], at: float | None = None) -> None:
    """Add an entry to a site's export before its end, all of it well chained and signed."""
    path = run / "ledgers" / f"{file_name(site)}.jsonl"
    *lines, end = path.read_text("utf-8").splitlines()
    last = open_entry(lines[-1])
    lines.append(make_entry(last.number + 1, last.digest, kind, last.at if at is None else at, body, signer))
    closed = close_export(lines, End(**open_entry(end).body), last.at, signer)
    path.write_text("".join(f"{line}\n" for line in closed), "utf-8")


def cut(run: Path, site: str, keep: Callable[[Entry], bool]) -> None:
    """Leave in a site's export only the entries that are to be kept."""
    path = run / "ledgers" / f"{file_name(site)}.jsonl"
    lines = [line for line in path.read_text("utf-8").splitlines() if keep(open_entry(line))]
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


class Liar(Federation):
    """A federation whose server shows the sites more than it puts into its record."""

    def lie(
        self,
        plan: RunPlan,
        hidden: Callable[[str, int], bool] = lambda site, round_: False,  # answers that are used, and called failed
        other: Callable[[str, int], RunPlan | None] = lambda site, round_: None,  # plan that a site is sent instead
        twice: str = "",  # a site that is asked by an entry of its own, and is in no round
        unrecorded: int = 0,  # the last rounds, whose answers are kept
    ) -> Path:
        """Carry out a run on paper and return its folder."""
        run = self.run("run", plan.model_copy(update={"training": plan.training.model_copy(update={"rounds": 0})}))
        record = Chain(self.head_office)
        record.add("plan", {
            "plan": plan.model_dump(mode="json"), "plan_digest": plan.digest, "versions": {},
            "sites": {site: identity.public.to_text() for site, identity in self.identities.items()},
            "adapter": "0" * 64,
        })  # fmt: skip
        metrics = [{"round": 0, "loss": 2.5, "perplexity": 12.2, "accuracy": None, "answered": [], "declined": {}}]
        done = plan.training.rounds - unrecorded
        for number in range(1, plan.training.rounds + 1):
            if twice:
                self._ask(record, plan, number, sorted(self.sites), other, [twice])
            asked = sorted(set(self.sites) - {twice})
            said = self._ask(record, plan, number, asked, other, asked)
            if number > done:
                break
            failed = {site: "no answer in time" for site in asked if hidden(site, number)}
            answered = {site: line for site, line in said.items() if site not in failed}
            record.add("round", {
                "round": number, "counts": True, "answered": answered, "declined": {}, "failed": failed,
                "adapter_before": f"{number - 1:064x}", "adapter_after": f"{number:064x}",
            })  # fmt: skip
            metrics.append({**metrics[0], "round": number, "answered": sorted(answered)})
        record.add("end", {"round": done, "stopped": "", "adapter": f"{done:064x}"})
        (run / "record.jsonl").write_text("".join(f"{line}\n" for line in record.lines), "utf-8")
        (run / "plan.json").write_text(plan.model_dump_json(indent=2), "utf-8")
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in metrics), "utf-8")
        self.export(run)
        return run

    def _ask(
        self, record: Chain, plan: RunPlan, number: int, roster: list[str],
        other: Callable[[str, int], RunPlan | None], sites: list[str],
    ) -> dict[str, str]:  # fmt: skip
        """Begin a round with some roster, and return what those of it who are really asked answer."""
        record.add("begun", {"round": number, "sites": roster})
        begun = open_entry(record.lines[-1])
        return {
            site: self.answer(self.ledger(site), site, other(site, number) or plan, number, roster, begun)
            for site in sites
        }
