"""Looks at a site: `check` tries all that a run will need, without a network; `examine` is `fedllm doctor`."""

import contextlib
import grp
import os
import pwd
import re
import stat
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import grpc

from client.link import read_state
from client.office import Office
from client.relay import CA, CERTIFICATE, KEY, SETTINGS, read_relay
from fedllm.canonical import canonical
from fedllm.config import ModelConfig
from fedllm.crypto.certificates import certified_key, key_line, read_certificates
from fedllm.errors import DataError, FedllmError
from fedllm.files import check_private, read, read_secret
from fedllm.ops.health_checks import (
    CheckResult,
    access,
    certificate,
    clock,
    disk,
    failure,
    is_locked,
    ok,
    proxies,
    run_checks,
    size,
    versions,
    warning,
)
from fedllm.ops.tls_probe import explain_failure, probe_tls
from fedllm.protocol.enrolment import now

if TYPE_CHECKING:
    from fedllm.privacy.accounting import PrivacySpent
    from fedllm.training.data import Row

_PATIENCE = 3.0  # seconds for the relay to answer
_YOUNG = 20.0  # seconds that a connection may need
_CLOCK = 30.0  # seconds by which clocks may differ
_LITTLE = 0.9  # of the budget


# ---- fedllm doctor, of a site's folder -------------------------------------------------------------------------------


def examine(folder: Path) -> list[CheckResult]:
    """Look at a site's folder, its processes and the way to the server; changes and spends nothing."""
    secret = [
        folder / name for name in ("site.yaml", "grant.json", "declaration.json", "data", "data/ledger.db", "run")
    ]
    keys = folder / "keys"
    secret += [keys, *sorted(keys.rglob("*"))]
    found = run_checks(lambda: access(folder, secret))
    office: Office | None = None
    try:
        office = Office.open(folder)
    except FedllmError as error:
        found.append(failure(str(error)))
    if office is not None:
        known = office
        found += run_checks(
            lambda: [ok(f"settings and keys of {known.name}, {known.identity.public.fingerprint}")],
            lambda: _grant(known),
            lambda: _ledger(known),
            lambda: _data(known),
            lambda: _declared(known),
            lambda: _socket(known),
            lambda: _link(known),
            lambda: _outside(known),
            lambda: clock(known.grant.made_at if known.grant else None, "the grant at the server"),
        )
    found += run_checks(
        lambda: [disk("the ledger and logs", folder, 0.1, 1)],
        lambda: size("the log", folder / "log", 1, "rotate it (docs/deployment.md, What to watch)"),
        versions,
    )
    return list(dict.fromkeys(found))


def _grant(office: Office) -> list[CheckResult]:
    known = ", ".join(identity.fingerprint for identity in office.coordinators)
    found = [ok(f"the server at {office.address}, known by {known}"), *_authorities(office.ca_file)]
    found.append(_own_certificate(office.in_use.link_file))
    if office.grant is not None and office.grant.ca.encode() != read(office.ca_file):
        text = "keys/ca.pem is not what the grant says. Install the grant again: fedllm site install grant.json"
        found.append(failure(text))
    if len(office.keys) > 1 and office.keys[-1] is not office.in_use:
        text = f"new keys wait for a grant: send {office.join_file} to the server, then fedllm site install FILE.grant"
        found.append(warning(text))
    elif len(office.keys) > 1:
        text = "old keys are still there. When the server has retired them (fedllm server retire): fedllm site retire"
        found.append(warning(text))
    return found


def _authorities(ca: Path) -> list[CheckResult]:
    newest = max(read_certificates(read(ca)), key=lambda facts: facts.ends)
    after = "ask the server for a new grant (there: fedllm server rotate ca)"
    return [certificate("the server's certificate authority", newest, after)]


def _most_spent(office: Office) -> "PrivacySpent":
    """Check the ledger's chain and return what the account that has spent most has spent."""
    from fedllm.privacy.accounting import PrivacySpent
    from fedllm.privacy.ledger import LedgerFile

    ledger, delta = LedgerFile(office.ledger.file, office.ledger.anchor), office.policy.delta
    ledger.verify()
    each = [ledger.spent(account, delta) for account in ledger.accounts()]
    return max(each, key=lambda one: one.epsilon_rdp, default=PrivacySpent(0.0, 0.0, delta))


def _ledger(office: Office) -> list[CheckResult]:
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


def _data(office: Office) -> list[CheckResult]:
    train = office.data.train
    found = [_check_mode(Path(train))] if not train.startswith("pkg://") else []
    if not office.config.models:
        found.append(failure("models: none permitted, so every plan is refused. Name them in site.yaml."))
    for name in office.config.models:
        try:
            office.model(ModelConfig(source=name, max_length=64))
        except FedllmError as error:
            found.append(failure(str(error)))
    return (
        [*found, ok("records and models are there; fedllm site check tries them")]
        if all(finding.right for finding in found)
        else found
    )


def _declared(office: Office) -> list[CheckResult]:
    from client.unfinished import Unfinished

    made = office.declaration
    found = [ok(f"declaration: of {made.made_at:%Y-%m-%d}, about {made.data.size} units, as site.yaml says")]
    stopped = Unfinished(office.ledger_file).read()
    if stopped is not None:
        found.append(failure(f"{stopped}, and the site answers nothing since. See to it, then: fedllm site resume"))
    return found


def _socket(office: Office) -> list[CheckResult]:
    """Look at the way to the relay, if there is one."""
    if office.socket is None:
        return []
    group = office.config.socket_group
    if group is not None:
        try:
            number = grp.getgrnam(group).gr_gid
        except KeyError:
            return [failure(f"socket_group={group}: no such group. Make it: groupadd {group}")]
    problem = _silent(office.socket)
    if problem:
        return [failure(f"relay: {problem}. Does it run (fedllm site relay), and is this user in its group?")]
    state = office.socket.stat()
    if group is not None and (state.st_gid != number or stat.S_IMODE(state.st_mode) != 0o660):
        return [failure(f"relay: {office.socket} is not open to the group {group} alone. Start the relay anew.")]
    return [ok(f"relay: listens on {office.socket}")]


def _link(office: Office) -> list[CheckResult]:
    """Look whether the site runs, and what its link says."""
    if not is_locked(office.ledger_file.parent):
        return [warning("site: it does not run. Start it: fedllm site start")]
    state, log = read_state(office.link_state_file), office.folder / "log" / "site.log"
    if state is None:
        return [warning(f"site: it is starting, reads its records, and connects then. Its log: {log}")]
    if state.state == "connecting":
        young = now().timestamp() - state.since / 1000 < _YOUNG
        return [(warning if young else failure)(f"site: it runs, but is not connected to the server: {state.text}")]
    found = [ok("site: connected to the server")]
    if abs(state.ahead) > 1000 * _CLOCK:
        word = "ahead of" if state.ahead > 0 else "behind"
        text = f"clock: it is {abs(state.ahead) / 1000:.0f} s {word} the server's. Set the one that is wrong:"
        found.append(warning(f"{text} timedatectl set-ntp true"))
    return found


def _outside(office: Office) -> list[CheckResult]:
    """Try the way to the server, unless a relay has it."""
    return _way(office.address, office.ca_file, office.in_use.link_file) if office.socket is None else []


def _own_certificate(key: Path) -> CheckResult:
    facts = read_certificates(read(key.with_suffix(".pem")))[0]
    after = "install a new grant (at the server: fedllm server grant SITE)"
    return certificate("this site's certificate", facts, after)


def _silent(socket: Path) -> str:
    """Return why nothing answers on a unix socket, nothing if it does."""
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


def _way(address: str, ca: Path, key: Path) -> list[CheckResult]:
    host, _, number = address.rpartition(":")
    name, port = host.strip("[]"), int(number)
    found = proxies([name])
    try:
        facts = read_certificates(probe_tls(name, port, ca, own=(key.with_suffix(".pem"), key)))[0]
    except OSError as error:
        return [*found, failure(f"way to the server: {explain_failure(name, port, error)}")]
    text = f"way to the server: {address} speaks TLS 1.3 with the expected certificate, and accepts this site's"
    return [
        *found,
        ok(text),
        certificate("the server certificate", facts, "at the server: fedllm server rotate certificate"),
    ]


# ---- fedllm doctor, of a relay's folder ------------------------------------------------------------------------------


def examine_relay(folder: Path) -> list[CheckResult]:
    """Look at a relay's folder, and at what its user can reach."""
    found = run_checks(lambda: access(folder, [folder / name for name in (SETTINGS, KEY, CERTIFICATE, CA)]))
    try:
        relay = read_relay(folder)
    except FedllmError as error:
        return list(dict.fromkeys([*found, failure(str(error))]))

    def keys() -> list[CheckResult]:
        if certified_key(read(folder / CERTIFICATE)) != key_line(read_secret(folder / KEY)):
            text = (
                "the relay's folder: its certificate is for another key. Make it again: fedllm site export-relay FOLDER"
            )
            return [failure(text)]
        return [ok("the relay's folder: settings, key and certificate"), _own_certificate(folder / KEY)]

    def socket() -> list[CheckResult]:
        problem = _silent(Path(relay.socket))
        start = f"Start it: fedllm site relay {folder}"
        return [warning(f"relay: {problem}. {start}")] if problem else [ok(f"relay: listens on {relay.socket}")]

    found += run_checks(
        keys,
        lambda: _authorities(folder / CA),
        socket,
        lambda: _way(relay.address, folder / CA, folder / KEY),
        lambda: clock(None, ""),
        lambda: [disk("logs", folder, 0.1, 1)],
        versions,
    )
    return list(dict.fromkeys(found))


# ---- a dry run -------------------------------------------------------------------------------------------------------


def check(folder: Path) -> list[CheckResult]:
    """Try all that a run will need, without a network: settings, keys, records, models, ledger, permissions.

    If nothing is wrong, the site signs what site.yaml declares of the records.
    """
    findings: list[CheckResult] = []
    try:
        office = Office.open(folder)
    except FedllmError as error:
        return [failure(str(error))]
    findings.append(ok(f"{folder}: settings and keys of {office.name}, {office.identity.public.fingerprint}"))
    for look in (_check_grant, _check_ledger, _check_socket, _check_records):
        try:
            findings += look(office)
        except FedllmError as error:
            findings.append(failure(str(error)))
    if all(finding.right for finding in findings):
        findings.append(_declare(office))
    return findings


def _declare(office: Office) -> CheckResult:
    """Sign what site.yaml says of the records, now that it was found to hold."""
    from fedllm.training.model import load_reader

    tokenizers = {
        name: load_reader(office.model(ModelConfig(source=name, max_length=8))).digest for name in office.config.models
    }
    office.declare(tokenizers, {name: office.files_digest(ModelConfig(source=name)) for name in office.config.models})
    return ok(f"declaration: signed by {office.identity.public.fingerprint}; the site starts with it")


def _check_grant(office: Office) -> list[CheckResult]:
    known = ", ".join(identity.fingerprint for identity in office.coordinators)
    found = [ok(f"the server at {office.address}, known by {known}")]
    ends = max(facts.ends for facts in read_certificates(read(office.ca_file)))
    if ends <= now() + timedelta(days=14):
        text = f"the server's authority ends on {ends:%Y-%m-%d}: ask for a new grant (there: fedllm server rotate ca)"
        found.append(failure(text))
    if len(office.keys) > 1:
        newer = office.keys[-1] is not office.in_use
        text = (
            f"new keys wait for a grant: send {office.join_file} to the server, then fedllm site install"
            if newer
            else "old keys are still there: fedllm site retire, when the server has heard from this site"
        )
        found.append(ok(text))
    return found


def _check_ledger(office: Office) -> list[CheckResult]:
    found = [warning(f"ledger: {text}") for text in office.ledger.warnings()]
    if office.ledger.is_new():
        return [*found, ok(f"ledger: nothing spent yet, of epsilon {office.policy.epsilon:g}")]
    if office.ledger_file.exists():
        check_private(office.ledger_file)
    own, spent = office.policy, _most_spent(office)
    # whether another round fits is decided by RDP once a second plan was charged, so that is the figure to look at
    return [*found, ok(f"ledger: epsilon {spent.epsilon_rdp:.4g} of {own.epsilon:g} spent, at delta {own.delta:g}")]


def _check_socket(office: Office) -> list[CheckResult]:
    group = office.config.socket_group
    if group is not None:
        try:
            grp.getgrnam(group)
        except KeyError:
            return [failure(f"socket_group={group}: no such group. Make it: groupadd {group}")]
    return [] if office.socket is None else [ok(f"relay: on {office.socket}")]


def _check_records(office: Office) -> list[CheckResult]:
    """Compare the records with what site.yaml declares of them: a running site never does."""
    data, own = office.data, office.config.data
    found = [_check_mode(Path(data.train))] if not data.train.startswith("pkg://") else []
    os.environ.update(office.environment)
    from fedllm.training.data import cell, check_named, columns_of, is_missing, naming, person, read_rows

    rows = list(read_rows(data.train, data.train_split, data))
    usable = [row for row in rows if not isinstance(row, DataError)]
    with naming(data.train):
        check_named(columns_of(usable), data, [data.unit])
    found.append(ok(f"records: {len(usable)} in {data.train}, with every column that is needed"))
    found += _faults("records", len(rows), [row for row in rows if isinstance(row, DataError)])
    if data.label is not None:
        label = data.label
        labels = Counter(canonical(cell(row[label])) for row in usable if not is_missing(row.get(label)))
        if len(own.labels) < 2:
            text = f"data.labels: declare every label that a record may have. The records have {len(labels)}"
            return [*found, failure(text)]
        text = f"records: {len(own.labels)} labels are declared, and a plan must name every one of them"
        found.append(ok(f"{text}; {len(set(own.labels) & set(labels))} of them occur"))
    by_person = office.config.policy.unit == "person" and data.unit is not None
    units = len({person(row.get(data.unit or "")) for row in usable} if by_person else usable)
    found += _size(office, units, "persons" if by_person else "records")
    if not office.config.models:
        found.append(failure("models: none permitted, so every plan is refused. Name them in site.yaml."))
    for name in office.config.models:
        try:
            found += _check_model(office, name, rows)
        except FedllmError as error:
            found.append(failure(str(error)))
    return found


def _size(office: Office, units: int, what: str) -> list[CheckResult]:
    """Compare the number of privacy units with the one that is declared, and delta with both."""
    size, delta = office.config.data.size, office.policy.delta
    about = int(float(f"{max(1, units):.1g}"))
    if size is None:
        text = f"data.size: declare about how many {what} there are, rounded. There are {units}: size: {about}"
        return [failure(text)]
    try:
        office.policy.check_units(size)
    except DataError as error:
        return [failure(f"data.size={size}: {error} (policy.min_units)")]
    if not units / 2 <= size <= 2 * units:
        return [failure(f"data.size={size}, and there are {units} {what}: declare about as many, such as {about}")]
    found = [ok(f"records: {units} {what} to protect, declared as about {size}; at least {office.policy.min_units:g}")]
    if delta * units > 0.1:
        text = f"policy.delta={delta:g} is weak protection for {units} {what}: {0.1 / units:.1g} or less is usual"
        found.append(warning(text))
    return found


def _faults(what: str, of: int, faults: Sequence[DataError]) -> list[CheckResult]:
    """Say which records cannot be used; that takes nothing from the others."""
    if not faults:
        return []
    # what an error quotes of a record, after these words, is not for others who see the screen
    first = [re.sub(": label .*", ": its label is not among data.labels", str(fault)) for fault in faults[:3]]
    said = "; ".join(text.partition(", found")[0] for text in first)
    text = f"{what}: {len(faults)} of {of} cannot be used, and contribute nothing. {said}"
    return [(failure if len(faults) == of else warning)(text)]


def _check_model(office: Office, name: str, rows: "Sequence[Row | DataError]") -> list[CheckResult]:
    """Load a permitted model, and turn every record into tokens."""
    from client.records import Declared, load_records
    from fedllm.training.model import load_base, load_reader, pick_device
    from fedllm.training.quantised import missing_for_nf4

    data, own = office.data, office.config.data
    task: Literal["classification", "causal-lm"] = "classification" if own.labels else "causal-lm"
    model = office.model(ModelConfig(source=name, task=task, labels=own.labels, max_length=8))
    reader = load_reader(model)
    load_base(model, pick_device(office.config.resources.device))
    declared = Declared(own.size or 0, office.config.policy.unit, own.labels)
    faults = load_records(rows, data, data.unit, declared, {name: reader}).wrong[name]
    found = [ok(f"model {name}: loaded, reads the records")]
    if "nf4" in office.config.policy.quantize and (missing := missing_for_nf4()):
        found.append(ok(f"{missing}. Until then, plans with it are declined"))
    return [*found, *_faults(f"model {name}", len(rows), faults)]


def _check_mode(path: Path) -> CheckResult:
    """Look whether other users of this machine can reach the records."""
    for place in [path, *sorted(path.iterdir())] if path.is_dir() else [path]:
        for bits in (0o070, 0o007):
            probe_tls = all(parent.stat().st_mode & 0o011 & bits for parent in place.resolve().parents)
            if probe_tls and place.stat().st_mode & 0o044 & bits:
                right = "go-rwx"
                return failure(f"records: others on this machine can read {place}. Run: chmod {right} '{place}'")
    return ok(f"records: only their owner can read {path}")
