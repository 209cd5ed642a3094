"""The folder of an audit: the evidence, the report, and one signature over all of it; written, and verified.

record.jsonl, plan.json, metrics.jsonl, ledgers/SITE.jsonl    the evidence (fedllm.audit.evidence)
audit.json                                                    what was found; audit.schema.json describes it
audit.html, audit.pdf (and audit.ko.html, audit.ko.pdf)       the same, for people
audit.sig                                                     {file: SHA-256}, signed (DSSE)

There is nothing else in it: a file that nobody compares with the evidence could say anything.
"""

import contextlib
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from pydantic import ValidationError

from fedllm.audit.evidence import LEDGERS, METRICS, PLAN, RECORD, assess, file_name, names_and_end
from fedllm.audit.model import INTEGRITY, Accountants, Audit, CrossCheck, Estimate
from fedllm.audit.pdf import rendered, renderer
from fedllm.audit.trust import Trust
from fedllm.canonical import read_json
from fedllm.crypto.hash_chain import End
from fedllm.crypto.identity import Identity
from fedllm.crypto.signed_documents import open_envelope, sign_envelope
from fedllm.errors import ChainError, CryptoError, FolderError, first_line
from fedllm.files import is_full
from fedllm.privacy.accounting import AccountingEvent
from fedllm.privacy.ledger import LedgerFile
from fedllm.values import HEAD_OFFICE

FOLDER, JSON, SIGNATURE = "audit", "audit.json", "audit.sig"
SIGNATURE_TYPE = "application/vnd.fedllm.audit+json"
_PAGES = ("audit.html", "audit.ko.html", "audit.pdf", "audit.ko.pdf")

_NEAR = 1e-5  # relative, between figures of two machines
_NEAR_CROSS = 1e-3  # between those of two versions of a cross-check, which promises 0.01
# where they are; all else is copied from the evidence,
_COMPUTED = (".sites", ".accountants", ".risk", ".timeline", ".scores", ".attack")
_COPIED = (".accountants.delta", ".accountants.events")  # and so are these


@dataclass(frozen=True)
class Written:
    """What `write_audit` made."""

    audit: Audit
    folder: Path
    problems: tuple[str, ...]  # why a file is missing


def write_audit(
    run: Path,
    folder: Path,
    pages: Sequence[tuple[str, str]],
    ledgers: Path | None = None,
    signer: Identity | None = None,
    cross_checks: Mapping[str, CrossCheck] = MappingProxyType({}),
    say: Callable[[str], None] = lambda text: None,
) -> Written:
    """Gather the evidence of a run, check it, and write the report to `folder`, which is replaced as a whole.

    `pages` are (stem, language) of the pages for people; `ledgers` is a folder of exported ledgers, without which the
    run's folder is searched; `say` receives what is being done, in words. Raises ChainError if there is no
    readable record, FolderError if nothing can be written.
    """
    from fedllm.audit.report import render_html, to_json

    if folder.exists() and any(folder.iterdir()) and not (folder / JSON).exists():
        raise FolderError(f"{folder} exists and holds no audit. Nothing was overwritten; choose another folder.")
    names, end = names_and_end(run)
    problems = []
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise _cannot_write(folder, error) from None
    try:
        say("audit: checking the evidence")
        _gather(run, names, end, ledgers, new)
        made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
        audit = assess(new, None, made, signer.public.fingerprint if signer else "", cross_checks)
        (new / JSON).write_bytes(to_json(audit))
        say("audit: report as HTML and PDF")
        with contextlib.ExitStack() as stack:
            renderers = {}
            for stem, language in pages:
                page = new / f"{stem}.html"
                page.write_text(render_html(audit, "ko" if language == "ko" else "en"), "utf-8")
                renderers[page.with_suffix(".pdf")] = stack.enter_context(renderer(page))
            for pdf, process in renderers.items():
                try:
                    pdf.write_bytes(rendered(process))
                except FolderError as error:
                    problems.append(str(error))
        if signer is not None:
            payload = json.dumps({"files": _digests(new)}, sort_keys=True, ensure_ascii=False).encode()
            (new / SIGNATURE).write_text(sign_envelope(payload, SIGNATURE_TYPE, signer), "utf-8")
        new.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return Written(audit, folder, tuple(dict.fromkeys(problems)))


def _cannot_write(folder: Path, error: OSError) -> FolderError:
    remedy = "Free some space" if is_full(error) else "Check who owns the folder and its permissions"
    return FolderError(
        f"{folder} cannot be written: {error.strerror or first_line(error)}. The run is not touched. {remedy}, then "
        "write its audit with `fedllm audit report`."
    )


def _gather(run: Path, names: Sequence[str], end: End, ledgers: Path | None, folder: Path) -> None:
    """Copy the evidence; what is missing is left for the audit to say."""
    for name in (RECORD, PLAN, METRICS):
        if (run / name).exists():
            shutil.copyfile(run / name, folder / name)
    (folder / LEDGERS).mkdir()
    for name in names:
        stem = file_name(name)
        export = (ledgers if ledgers is not None else run / LEDGERS) / f"{stem}.jsonl"
        own = run / "sites" / stem / "ledger.db"  # in a simulation, every site's ledger lies here
        if ledgers is not None or not own.exists():
            if export.exists():
                shutil.copyfile(export, folder / LEDGERS / export.name)
        else:
            lines = LedgerFile(own).export(end, Identity.read(own.with_name("identity")))
            (folder / LEDGERS / f"{stem}.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but the signature."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SIGNATURE
    }


# ---- verification ----------------------------------------------------------------------------------------------------


def verify(folder: Path, trust: Trust, absent: Collection[str] = ()) -> tuple[Audit, tuple[str, ...]]:
    """Check an audit's folder without believing who made it; return the audit, and what was not compared.

    Only the signature vouches for those: whoever signed may have written anything there.
    `absent` names those of `trust` that took no part in the run; everybody else's signatures must be there. Raises
    ChainError that names the first contradiction.
    """
    _check_files(folder)
    stored = _stored(folder / JSON)
    stated = stored.accountants.estimates
    audit = assess(folder, trust, stored.made, stored.signer, _given(stated))
    for code in (*(f.code for f in audit.findings if f.code in INTEGRITY), "keys", "metrics"):
        finding = audit.finding(code)
        if finding.status == "fails":
            raise ChainError(f"{code}: {finding.evidence[0]}")
    _check_present(audit, trust, absent)
    difference = _difference(json.loads(stored.model_dump_json()), json.loads(_unaware(audit).model_dump_json()), "")
    if difference:
        raise ChainError(f"{JSON}: {difference}")
    _check_signature(folder, audit, trust)
    left = _check_pages(folder, stored)
    own = _own_estimates(stored.accountants)
    left += tuple(
        f"{JSON}, accountants.{name} (its accountant is not at hand, or cannot tell)"
        for name, value in stated.items() if value is not None and own[name] is None
    )  # fmt: skip
    if own != stated or absent:  # what is shown to the reader
        audit = assess(folder, trust, stored.made, stored.signer, _given(own), absent)
    return audit, left


def reread(folder: Path, trust: Trust) -> Audit:
    """Return the audit in a folder, its figures computed again from the evidence, for whoever made it.

    Unlike `verify` it compares neither the pages nor the sites' keys; a signature must be by somebody of `trust`.
    Raises ChainError if the audit does not say what the evidence does, or a signature does not fit.
    """
    stored = _stored(folder / JSON)
    audit = assess(folder, None, stored.made, stored.signer, _given(stored.accountants.estimates))
    if difference := _difference(json.loads(stored.model_dump_json()), json.loads(audit.model_dump_json()), ""):
        raise ChainError(f"{JSON}: {difference}")
    if stored.signer or (folder / SIGNATURE).exists():
        _check_signature(folder, audit, trust)
    return stored


def _given(estimates: Mapping[str, float | None]) -> dict[str, CrossCheck]:
    """Return accountants that say what was said."""
    return {name: CrossCheck("", lambda *_, said=value: Estimate(said)) for name, value in estimates.items()}


def _stored(path: Path) -> Audit:
    try:
        content = read_json(path.read_bytes())
        if isinstance(content, dict) and content.get("format") in (1, 2):
            raise ChainError(
                f"{JSON}: format {content['format']}, made by an earlier version of fedllm; expected 3. Make a new "
                "report: fedllm audit report --help. Ledgers beside format 1 do not say that they are whole: let the "
                "sites export them again first."
            )
        return Audit.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ChainError(f"{JSON} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ChainError(f"{JSON}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise ChainError(f"{JSON}: {first_line(error)}") from None


def _own_estimates(accountants: Accountants) -> dict[str, float | None]:
    """Return what the cross-checks say here of the events that were verified, None if they say nothing.

    Raises ChainError if one says something else than was stated.
    """
    from fedllm.audit.accountants import CROSS_CHECKS

    events, found = [AccountingEvent(*event) for event in accountants.events], dict[str, float | None]()
    for name, stated in accountants.estimates.items():
        known = CROSS_CHECKS.get(name) if stated is not None else None
        own = found[name] = known.estimate(events, accountants.delta).epsilon if known is not None else None
        if own is not None and stated is not None and abs(own - stated) > _NEAR_CROSS:
            raise ChainError(f"{JSON}: accountants.{name} states {stated!r}, computed {own!r}")
    return found


def write_pages(audit: Audit, folder: Path) -> None:
    """Write the pages of an audit that was verified here, in both languages; `folder` is new, or empty."""
    from fedllm.audit.report import render_html

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderError(f"{folder} exists. Nothing was overwritten; choose another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "audit.html").write_text(render_html(audit, "en"), "utf-8")
        (folder / "audit.ko.html").write_text(render_html(audit, "ko"), "utf-8")
    except OSError as error:
        raise FolderError(f"{folder} cannot be written: {error.strerror or first_line(error)}.") from None


def _check_files(folder: Path) -> None:
    """Raise ChainError if something lies in the folder that is no part of an audit, and that nobody compares.

    The ledgers are compared with the sites of the record.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        link = path.is_symlink()
        if not link and ((path.is_dir() and name == LEDGERS) or (path.is_file() and path.parent == folder / LEDGERS)):
            continue
        if link or not path.is_file() or name not in (RECORD, PLAN, METRICS, JSON, SIGNATURE, *_PAGES):
            raise ChainError(f"{name}: no part of an audit. Whoever put it there may want it to be read as one")


def _check_present(audit: Audit, trust: Trust, absent: Collection[str]) -> None:
    """Raise ChainError unless everybody of `trust` has signed something here, or is named as absent."""
    # the server has signed the record, with a key that is known as its: otherwise `keys` fails before
    present = {HEAD_OFFICE, *(site.name for site in audit.sites if site.fingerprint)}
    missing = sorted(trust.names - present - set(absent))
    if missing:
        raise ChainError(
            f"keys: nothing here is signed by {', '.join(missing)}, whom the file of keys names. Were they left out? "
            "Ask them; where they took no part in this run, say so (--absent NAME)"
        )
    wrong = sorted(set(absent) & present)
    if wrong:
        raise ChainError(f"keys: {', '.join(wrong)} took part in this run, and was named as absent")


def _unaware(audit: Audit) -> Audit:
    """Return the audit as it is for somebody who has no keys to compare with."""
    findings = tuple(
        finding.model_copy(update={"status": "unverified"}) if finding.code == "keys" else finding
        for finding in audit.findings
    )
    return audit.model_copy(update={"findings": findings})


def _difference(stated: object, found: object, where: str) -> str | None:
    """Return the first place where two JSON values differ by more than two machines' arithmetic does."""
    if isinstance(stated, dict) and isinstance(found, dict) and stated.keys() == found.keys():
        pairs = [(stated[key], found[key], f"{where}.{key}") for key in stated]
    elif isinstance(stated, list) and isinstance(found, list) and len(stated) == len(found):
        pairs = [(a, b, f"{where}.{i}") for i, (a, b) in enumerate(zip(stated, found, strict=True))]
    elif isinstance(stated, float) and isinstance(found, float):
        computed = where.startswith(_COMPUTED) and not where.startswith(_COPIED)
        near = math.isclose(stated, found, rel_tol=_NEAR, abs_tol=_NEAR) if computed else stated == found
        return None if near else f"{where.lstrip('.')} states {stated!r}, computed {found!r}"
    else:
        same = stated == found and type(stated) is type(found)
        return None if same else f"{where.lstrip('.')} states {stated!r:.200}, the evidence says {found!r:.200}"
    return next((text for a, b, path in pairs if (text := _difference(a, b, path))), None)


def _check_signature(folder: Path, audit: Audit, trust: Trust) -> None:
    """Raise ChainError unless somebody who is trusted signed exactly these files."""
    try:
        payload, signer = open_envelope((folder / SIGNATURE).read_text("utf-8"), SIGNATURE_TYPE)
        files = read_json(payload)["files"]
    except OSError:
        raise ChainError(f"{SIGNATURE} is missing: nobody vouches for the report's pages") from None
    except (CryptoError, ValueError, KeyError, TypeError) as error:
        raise ChainError(f"{SIGNATURE}: {error}") from None
    if trust.name_of(signer) is None or signer.fingerprint != audit.signer:
        raise ChainError(f"{SIGNATURE}: signed by {signer.fingerprint}, who is not trusted, or not the one named")
    found = _digests(folder)
    for name in sorted(set(files) | set(found)):
        if files.get(name) != found.get(name):
            what = "missing" if name not in found else "not signed" if name not in files else "altered"
            raise ChainError(f"{name}: {what}")


def _check_pages(folder: Path, audit: Audit) -> tuple[str, ...]:
    """Render every page again and compare; return what could not be compared.

    Raises ChainError if a page that this software would have made is another.
    """
    from fedllm.audit.report import LANGUAGES, render_html, renderer

    left = [f"{path.name} (a PDF)" for path in sorted(folder.glob("*.pdf"))]
    own: list[bytes] = []
    for path in sorted(folder.glob("*.html")):
        page = path.read_bytes()
        own = own or [render_html(audit, language).encode() for language in LANGUAGES]
        if page in own:
            continue
        if f'content="fedllm {renderer()}"'.encode() in page:
            raise ChainError(f"{path.name}: it does not say what {JSON} says")
        left.append(f"{path.name} (made by other versions, or altered)")
    return tuple(left)
