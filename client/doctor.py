"""Looks at an office: `check` tries all that a run will need, without a network; `examine` is `fedllm doctor`."""

import contextlib
import grp
import json
import os
import pwd
import re
import stat
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import grpc
import psutil

from client.office import Office
from client.supernode import CA, KEY, SETTINGS, Courier, connected, read_courier
from fedllm.crypto import node_public_key, read_certificates
from fedllm.errors import DataError, FedllmError
from fedllm.files import check_private, read, read_secret
from fedllm.findings import (
    Finding,
    access,
    certificate,
    clock,
    disk,
    gather,
    held,
    ok,
    processes,
    proxies,
    quiet,
    size,
    versions,
    warning,
    wrong,
)
from fedllm.plan import ModelConfig
from fedllm.provision import now
from fedllm.reach import reach, remedy

if TYPE_CHECKING:
    from fedllm.privacy.accounting import PrivacySpent
    from fedllm.training.data import Row

_PATIENCE = 3.0  # seconds for the site service to answer
_YOUNG = timedelta(seconds=30)  # a SuperNode may need that to connect
_LITTLE = 0.9  # of the budget


# ---- fedllm doctor, of a site's folder -------------------------------------------------------------------------------


def examine(folder: Path) -> list[Finding]:
    """Look at a site's folder, its processes and the way to head office; changes and spends nothing."""
    secret = [
        folder / name
        for name in ("site.yaml", "grant.json", "declaration.json", "data", "data/ledger.db", "courier", "courier/node")
    ]
    keys = folder / "keys"
    secret += [keys, *sorted(keys.rglob("*"))]
    found = gather(lambda: access(folder, secret))
    office: Office | None = None
    try:
        office = Office.open(folder)
    except FedllmError as error:
        found.append(wrong(str(error)))
    if office is not None:
        known = office
        found += gather(
            lambda: [ok(f"settings and keys of {known.name}, {known.identity.public.fingerprint}")],
            lambda: _grant(known),
            lambda: _ledger(known),
            lambda: _data(known),
            lambda: _declared(known),
            lambda: _service(known),
            lambda: _supernode(_courier_of(known), known.socket, "fedllm site start"),
            lambda: _way(_courier_of(known), known.ca_file),
            lambda: clock(known.grant.made_at if known.grant else None, "the grant at head office"),
        )
    found += gather(
        lambda: [disk("the ledger and logs", folder, 0.1, 1)],
        lambda: size("the log", folder / "log", 1, "see docs/deployment.md, logs"),
        versions,
    )
    return list(dict.fromkeys(found))


def _courier_of(office: Office) -> Courier:
    host, _, port = office.superlink.rpartition(":")
    return Courier(host=host.strip("[]"), port=int(port), socket=str(office.socket))


def _grant(office: Office) -> list[Finding]:
    known = ", ".join(identity.fingerprint for identity in office.coordinators)
    found = [ok(f"head office at {office.superlink}, known by {known}"), *_authorities(office.ca_file)]
    if office.grant is not None and office.grant.ca.encode() != read(office.ca_file):
        text = "keys/ca.pem is not what the grant says. Install the grant again: fedllm site install grant.json"
        found.append(wrong(text))
    if len(office.keys) > 1 and office.keys[-1] is not office.in_use:
        text = f"new keys wait for a grant: send {office.join_file} to head office, then fedllm site install FILE.grant"
        found.append(warning(text))
    elif len(office.keys) > 1:
        text = "old keys are still there. When head office has retired them (fedllm server retire): fedllm site retire"
        found.append(warning(text))
    return found


def _authorities(ca: Path) -> list[Finding]:
    newest = max(read_certificates(read(ca)), key=lambda facts: facts.ends)
    after = "ask head office for a new grant (there: fedllm server rotate ca)"
    return [certificate("head office's certificate authority", newest, after)]


def _most_spent(office: Office) -> "PrivacySpent":
    """Check the ledger's chain and return what the account that has spent most has spent."""
    from fedllm.privacy.accounting import PrivacySpent, spent
    from fedllm.privacy.ledger import LedgerFile

    ledger, delta = LedgerFile(office.ledger.file, office.ledger.anchor), office.policy.delta
    ledger.verify()
    each = [spent(ledger.events(account), delta) for account in ledger.accounts()]
    return max(each, key=lambda one: one.epsilon_rdp, default=PrivacySpent(0.0, 0.0, delta))


def _ledger(office: Office) -> list[Finding]:
    found = [warning(f"ledger: {text}") for text in office.ledger.warnings()]
    if office.ledger.is_new():
        return [*found, ok(f"ledger: nothing spent yet, of epsilon {office.policy.epsilon:g}")]
    own, spent = office.policy, _most_spent(office)
    text = (
        f"ledger: epsilon {spent.epsilon:.4g} of {own.epsilon:g} spent, at delta {own.delta:g} (by RDP, which decides "
        f"once a second plan is charged: {spent.epsilon_rdp:.4g})"
    )
    after = "More is for the owner of the records to decide: policy.epsilon in site.yaml"
    if spent.epsilon_rdp >= own.epsilon:
        return [*found, warning(f"{text}. Every new plan is declined. {after}")]
    if spent.epsilon_rdp > _LITTLE * own.epsilon:
        return [*found, warning(f"{text}. Little is left. {after}")]
    return [*found, ok(text)]


def _data(office: Office) -> list[Finding]:
    train = office.data.train
    found = [_check_mode(Path(train))] if not train.startswith("pkg://") else []
    if not office.config.models:
        found.append(wrong("models: none permitted, so every plan is refused. Name them in site.yaml."))
    for name in office.config.models:
        try:
            office.model(ModelConfig(source=name, max_length=64))
        except FedllmError as error:
            found.append(wrong(str(error)))
    return (
        [*found, ok("records and models are there; fedllm site check tries them")]
        if all(finding.right for finding in found)
        else found
    )


def _declared(office: Office) -> list[Finding]:
    from client.unfinished import Unfinished

    made = office.declaration
    found = [ok(f"declaration: of {made.made_at:%Y-%m-%d}, about {made.data.size} units, as site.yaml says")]
    stopped = Unfinished(office.ledger_file).read()
    if stopped is not None:
        found.append(wrong(f"{stopped}, and the site answers nothing since. See to it, then: fedllm site resume"))
    return found


def _service(office: Office) -> list[Finding]:
    running = held(office.ledger_file.parent)
    group = office.config.socket_group
    if group is not None:
        try:
            number = grp.getgrnam(group).gr_gid
        except KeyError:
            return [wrong(f"socket_group={group}: no such group. Make it: groupadd {group}")]
    if not running:
        start = "fedllm site start" if group is None else "fedllm site serve"
        return [warning(f"site service: it does not run. Start it: {start}")]
    problem = _silent(office.socket)
    if problem:
        return [
            wrong(f"site service: it runs, but {problem}. See {office.folder / 'log' / 'service.log'}; start it anew.")
        ]
    state = office.socket.stat()
    if group is not None and (state.st_gid != number or stat.S_IMODE(state.st_mode) != 0o660):
        return [wrong(f"site service: {office.socket} is not open to the group {group} alone. Start the service anew.")]
    if group is None and stat.S_IMODE(state.st_mode) & 0o077:
        return [wrong(f"site service: others may use {office.socket}. Start the service anew.")]
    return [ok(f"site service: answers on {office.socket}")]


def _silent(socket: Path) -> str:
    """Return why nothing answers on a unix socket, nothing where it does."""
    with contextlib.suppress(PermissionError):
        if not socket.exists():
            return f"{socket} is not there"
    if not os.access(socket, os.R_OK | os.W_OK):
        return f"{socket} is not open to {pwd.getpwuid(os.geteuid()).pw_name}"
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_PATIENCE)
        except grpc.FutureTimeoutError:
            return f"nothing answers on {socket}"
    return ""


# ---- fedllm doctor, of a courier's folder ----------------------------------------------------------------------------


def examine_courier(folder: Path) -> list[Finding]:
    """Look at a courier's folder, in a set-up of two users, and at what its user can reach."""
    found = gather(lambda: access(folder, [folder / name for name in (SETTINGS, KEY, CA)]))
    try:
        courier = read_courier(folder)
    except FedllmError as error:
        return list(dict.fromkeys([*found, wrong(str(error))]))

    def socket() -> list[Finding]:
        problem = _silent(Path(courier.socket))
        after = (
            "Does the site service run (fedllm site serve), and is this user in the group socket_group of site.yaml?"
        )
        return [warning(f"site service: {problem}. {after}")] if problem else [ok(f"site service: {courier.socket}")]

    def key() -> list[Finding]:
        node_public_key(read_secret(folder / KEY))
        return [ok("the courier's folder: settings and node key")]

    found += gather(
        key,
        lambda: _authorities(folder / CA),
        socket,
        lambda: _supernode(courier, Path(courier.socket), f"fedllm site carry {folder}"),
        lambda: _way(courier, folder / CA),
        lambda: clock(None, ""),
        lambda: [disk("logs", folder, 0.1, 1)],
        versions,
    )
    return list(dict.fromkeys(found))


# ---- what both see ---------------------------------------------------------------------------------------------------


def _supernode(courier: Courier, socket: Path, start: str) -> list[Finding]:
    running = processes("flower-supernode", json.dumps(str(socket), ensure_ascii=False))
    if not running:
        return [warning(f"SuperNode: it does not run. Start it: {start}")]
    process, others = running[0], running[1:]
    found: list[Finding] = []
    if others:
        found.append(wrong(f"SuperNode: {len(running)} run for one site. End all, and start one: {start}"))
    try:
        mine = os.geteuid() in (0, process.uids().effective)
        young = datetime.now(UTC) - datetime.fromtimestamp(process.create_time(), UTC) < _YOUNG
    except psutil.Error:
        return [warning(f"SuperNode: it has just ended. It should come back by itself; else: {start}")]
    if not mine:
        text = f"SuperNode: process {process.pid}; its own user sees more: fedllm doctor --home COURIERS_FOLDER"
        return [*found, ok(text)]
    found += quiet("SuperNode", process)
    if connected(process.pid, courier.port):
        text = f"SuperNode: process {process.pid}, connected to head office"
    else:
        after = "Its log says why; is this office in head office's roster (there: fedllm doctor)?"
        text = f"SuperNode: process {process.pid} is not connected to head office. {after}"
        return [*found, warning(text) if young else wrong(text)]
    return [*found, ok(text)]


def _way(courier: Courier, ca: Path) -> list[Finding]:
    found = proxies([courier.host])
    try:
        facts = read_certificates(reach(courier.host, courier.port, ca))[0]
    except OSError as error:
        return [*found, wrong(f"way to head office: {remedy(courier.host, courier.port, error)}")]
    text = f"way to head office: {courier.host}:{courier.port} speaks TLS 1.3 and gRPC with the certificate expected"
    after = "at head office: fedllm server rotate certificate"
    return [*found, ok(text), certificate("the server certificate", facts, after)]


# ---- a dry run -------------------------------------------------------------------------------------------------------


def check(folder: Path) -> list[Finding]:
    """Try all that a run will need, without a network: settings, keys, records, models, ledger, permissions.

    Where nothing is wrong, the office signs what site.yaml declares of the records.
    """
    findings: list[Finding] = []
    try:
        office = Office.open(folder)
    except FedllmError as error:
        return [wrong(str(error))]
    findings.append(ok(f"{folder}: settings and keys of {office.name}, {office.identity.public.fingerprint}"))
    for look in (_check_grant, _check_ledger, _check_socket, _check_records):
        try:
            findings += look(office)
        except FedllmError as error:
            findings.append(wrong(str(error)))
    if all(finding.right for finding in findings):
        findings.append(_declare(office))
    return findings


def _declare(office: Office) -> Finding:
    """Sign what site.yaml says of the records, now that it was found to hold."""
    from fedllm.training.model import load_reader

    tokenizers = {
        name: load_reader(office.model(ModelConfig(source=name, max_length=8))).digest for name in office.config.models
    }
    office.declare(tokenizers, {name: office.files_digest(ModelConfig(source=name)) for name in office.config.models})
    return ok(f"declaration: signed by {office.identity.public.fingerprint}; the site starts with it")


def _check_grant(office: Office) -> list[Finding]:
    known = ", ".join(identity.fingerprint for identity in office.coordinators)
    found = [ok(f"head office at {office.superlink}, known by {known}")]
    ends = max(facts.ends for facts in read_certificates(read(office.ca_file)))
    if ends <= now() + timedelta(days=14):
        text = f"head office's authority ends on {ends:%Y-%m-%d}: ask for a new grant (there: fedllm server rotate ca)"
        found.append(wrong(text))
    if len(office.keys) > 1:
        newer = office.keys[-1] is not office.in_use
        text = (
            f"new keys wait for a grant: send {office.join_file} to head office, then fedllm site install"
            if newer
            else "old keys are still there: fedllm site retire, when head office has heard from this office"
        )
        found.append(ok(text))
    return found


def _check_ledger(office: Office) -> list[Finding]:
    found = [warning(f"ledger: {text}") for text in office.ledger.warnings()]
    if office.ledger.is_new():
        return [*found, ok(f"ledger: nothing spent yet, of epsilon {office.policy.epsilon:g}")]
    if office.ledger_file.exists():
        check_private(office.ledger_file)
    own, spent = office.policy, _most_spent(office)
    # whether another round fits is decided by RDP once a second plan was charged, so that is the figure to look at
    return [*found, ok(f"ledger: epsilon {spent.epsilon_rdp:.4g} of {own.epsilon:g} spent, at delta {own.delta:g}")]


def _check_socket(office: Office) -> list[Finding]:
    group = office.config.socket_group
    if group is not None:
        try:
            grp.getgrnam(group)
        except KeyError:
            return [wrong(f"socket_group={group}: no such group. Make it: groupadd {group}")]
    return [ok(f"socket: {office.socket}")]


def _check_records(office: Office) -> list[Finding]:
    """Compare the records with what site.yaml declares of them: a running site never does."""
    data, own = office.data, office.config.data
    found = [_check_mode(Path(data.train))] if not data.train.startswith("pkg://") else []
    os.environ.update(office.environment)
    from fedllm.training.data import cell, is_missing, person, read_rows, template_columns

    rows = list(read_rows(data.train, data.train_split))
    usable = [row for row in rows if not isinstance(row, DataError)]
    columns = list(dict.fromkeys(column for row in usable for column in row))
    named = [*template_columns(data), *(column for column in (data.label, data.unit) if column)]
    missing = sorted(set(named) - set(columns))
    if missing:
        raise DataError(f"{data.train}: missing column {', '.join(missing)}; the records have {', '.join(columns)}")
    found.append(ok(f"records: {len(usable)} in {data.train}, with every column that is needed"))
    found += _faults("records", len(rows), [row for row in rows if isinstance(row, DataError)])
    if data.label is not None:
        label = data.label
        labels = Counter(cell(row[label]) for row in usable if not is_missing(row.get(label)))
        if len(own.labels) < 2:
            text = f"data.labels: declare every label that a record may have. The records have {len(labels)}"
            return [*found, wrong(text)]
        text = f"records: {len(own.labels)} labels are declared, and a plan must name every one of them"
        found.append(ok(f"{text}; {len(set(own.labels) & set(labels))} of them occur"))
    by_person = office.config.policy.unit == "person" and data.unit is not None
    units = len({person(row.get(data.unit or "")) for row in usable} if by_person else usable)
    found += _size(office, units, "persons" if by_person else "records")
    if not office.config.models:
        found.append(wrong("models: none permitted, so every plan is refused. Name them in site.yaml."))
    for name in office.config.models:
        try:
            found += _check_model(office, name, rows)
        except FedllmError as error:
            found.append(wrong(str(error)))
    return found


def _size(office: Office, units: int, what: str) -> list[Finding]:
    """Compare the number of privacy units with the one that is declared, and delta with both."""
    size, delta = office.config.data.size, office.policy.delta
    about = int(float(f"{max(1, units):.1g}"))
    if size is None:
        text = f"data.size: declare about how many {what} there are, rounded. There are {units}: size: {about}"
        return [wrong(text)]
    try:
        office.policy.check_units(size)
    except DataError as error:
        return [wrong(f"data.size={size}: {error} (policy.min_units)")]
    if not units / 2 <= size <= 2 * units:
        return [wrong(f"data.size={size}, and there are {units} {what}: declare about as many, such as {about}")]
    found = [ok(f"records: {units} {what} to protect, declared as about {size}; at least {office.policy.min_units:g}")]
    if delta * units > 0.1:
        text = f"policy.delta={delta:g} is weak protection for {units} {what}: {0.1 / units:.1g} or less is usual"
        found.append(warning(text))
    return found


def _faults(what: str, of: int, faults: Sequence[DataError]) -> list[Finding]:
    """Say which records cannot be used; that takes nothing from the others."""
    if not faults:
        return []
    # what an error quotes of a record, after these words, is for nobody who reads over a shoulder
    first = [re.sub(": label .*", ": its label is not among data.labels", str(fault)) for fault in faults[:3]]
    said = "; ".join(text.partition(", found")[0] for text in first)
    text = f"{what}: {len(faults)} of {of} cannot be used, and contribute nothing. {said}"
    return [(wrong if len(faults) == of else warning)(text)]


def _check_model(office: Office, name: str, rows: "Sequence[Row | DataError]") -> list[Finding]:
    """Load a permitted model, and turn every record into tokens."""
    from client.records import Declared, load_records
    from fedllm.training.model import load_base, load_reader, pick_device

    data, own = office.data, office.config.data
    task: Literal["classification", "causal-lm"] = "classification" if own.labels else "causal-lm"
    model = office.model(ModelConfig(source=name, task=task, labels=own.labels, max_length=8))
    reader = load_reader(model)
    load_base(model, pick_device(office.config.resources.device))
    declared = Declared(own.size or 0, office.config.policy.unit, own.labels)
    faults = load_records(rows, data, data.unit, declared, {name: reader}).wrong[name]
    return [ok(f"model {name}: loaded, reads the records"), *_faults(f"model {name}", len(rows), faults)]


def _check_mode(path: Path) -> Finding:
    """Look whether other users of this machine can reach the records."""
    for place in [path, *sorted(path.iterdir())] if path.is_dir() else [path]:
        for bits in (0o070, 0o007):
            reach = all(parent.stat().st_mode & 0o011 & bits for parent in place.resolve().parents)
            if reach and place.stat().st_mode & 0o044 & bits:
                right = "go-rwx"
                return wrong(f"records: others on this machine can read {place}. Run: chmod {right} '{place}'")
    return ok(f"records: only their owner can read {path}")
