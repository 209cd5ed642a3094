"""Looks at an office: `check` tries all that a run will need, without a network; `examine` is `fedllm doctor`."""

import contextlib
import grp
import json
import os
import pwd
import stat
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import grpc
import psutil

from client.office import Office
from client.supernode import CA, KEY, SETTINGS, Courier, connected, read_courier
from fedllm.crypto import node_public_key, read_certificates
from fedllm.errors import FedllmError
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

_PATIENCE = 3.0  # seconds for the site service to answer
_YOUNG = timedelta(seconds=30)  # a SuperNode may need that to connect
_LITTLE = 0.9  # of the budget


# ---- fedllm doctor, of a site's folder -------------------------------------------------------------------------------


def examine(folder: Path) -> list[Finding]:
    """Look at a site's folder, its processes and the way to head office; changes and spends nothing."""
    secret = [
        folder / name for name in ("site.yaml", "grant.json", "data", "data/ledger.db", "courier", "courier/node")
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
    """Try all that a run will need, without a network: settings, keys, records, models, ledger, permissions."""
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
    return findings


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
    data = office.data
    found = [_check_mode(Path(data.train))] if not data.train.startswith("pkg://") else []
    os.environ.update(office.environment)
    from fedllm.training.data import check_columns, read_table

    table = read_table(data.train, data.train_split)
    check_columns(table, data, [data.unit])
    found.append(ok(f"records: {len(table)} in {data.train}, with every column that is needed"))
    labels: tuple[str, ...] = ()
    if data.label is not None:
        count = Counter(None if label is None else str(label) for label in table[data.label])
        labels = tuple(sorted(label for label in count if label is not None))
        empty = count[None]
        if empty:
            found.append(wrong(f"records: {data.label} is empty in {empty}. Fill it in or leave them out."))
            return found
        if len(labels) < 2:
            found.append(wrong(f"records: {data.label} holds fewer than two labels; check data.label"))
            return found
        found.append(ok(f"records: {len(labels)} labels; a plan must declare every one of them"))
    if not office.config.models:
        found.append(wrong("models: none permitted, so every plan is refused. Name them in site.yaml."))
    for name in office.config.models:
        try:
            found.append(_check_model(office, name, labels))
        except FedllmError as error:
            found.append(wrong(str(error)))
    return found


def _check_model(office: Office, name: str, labels: tuple[str, ...]) -> Finding:
    """Load a permitted model, turn every record into tokens, and count privacy units."""
    from fedllm.training.data import Tokeniser, build_units, read_table
    from fedllm.training.model import load_base, pick_device

    data, own = office.data, office.policy
    task: Literal["classification", "causal-lm"] = "classification" if labels else "causal-lm"
    planned = ModelConfig(source=name, task=task, labels=labels, max_length=64)  # a plan chooses its own length
    model = office.model(planned)
    tokenizer = load_base(model, pick_device(office.config.resources.device)).tokenizer
    table = read_table(data.train, data.train_split)
    cap = len(table)  # a plan chooses how many records of one person count
    units = build_units(table, Tokeniser(tokenizer, model, data), data.unit if own.unit == "person" else None, cap)
    own.check_units(len(units))
    what = "persons" if own.unit == "person" else "records"
    return ok(f"model {name}: loaded; {len(units)} {what} to protect, at least {own.min_units:g} needed")


def _check_mode(path: Path) -> Finding:
    """Look whether other users of this machine can reach the records."""
    for place in [path, *sorted(path.iterdir())] if path.is_dir() else [path]:
        for bits in (0o070, 0o007):
            reach = all(parent.stat().st_mode & 0o011 & bits for parent in place.resolve().parents)
            if reach and place.stat().st_mode & 0o044 & bits:
                right = "go-rwx"
                return wrong(f"records: others on this machine can read {place}. Run: chmod {right} '{place}'")
    return ok(f"records: only their owner can read {path}")
