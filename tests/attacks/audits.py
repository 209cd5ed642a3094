"""What head office needs to hand in a false audit: a true one, its own key, and a pen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedllm.audit.bundle import write_audit
from fedllm.audit.evidence import assess, file_name
from fedllm.audit.report import render_html, to_json
from fedllm.chain import make_entry, open_entry
from fedllm.crypto import Identity
from tests.fedllm.audit.evidence import Chain, Federation, make_plan

EIGHT = tuple(f"branch-{number}" for number in range(1, 9))


def federation_of(folder: Path, sites: tuple[str, ...] = EIGHT, rounds: int = 2) -> tuple[Federation, Path]:
    """Return a federation, and the folder of the run that it made."""
    federation = Federation(folder, sites=sites)
    return federation, federation.run("run", make_plan(rounds=rounds))


def hand_in(run: Path, head_office: Identity, pages: bool = False) -> Path:
    """Write the audit of a run, signed by head office, and return its folder."""
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
    import json

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
    """Add an entry to a site's export, well chained and signed."""
    path = run / "ledgers" / f"{file_name(site)}.jsonl"
    last = open_entry(path.read_text("utf-8").splitlines()[-1])
    line = make_entry(last.number + 1, last.digest, kind, last.at if at is None else at, body, signer)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
