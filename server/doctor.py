"""Looks at the server for `fedllm doctor`: changes nothing, and each finding says what to do."""

import ipaddress
import socket
from datetime import datetime, timedelta
from pathlib import Path

import psutil

from fedllm.crypto import certificates
from fedllm.crypto.certificates import CertificateFacts
from fedllm.errors import CryptoError, FederationError, FedllmError
from fedllm.files import read
from fedllm.ops.health_checks import (
    CheckResult,
    access,
    certificate,
    clock,
    disk,
    failure,
    is_locked,
    ok,
    run_checks,
    size,
    versions,
    warning,
)
from fedllm.ops.tls_probe import explain_failure, probe_tls
from fedllm.protocol.enrolment import Grant, now, read_config
from fedllm.protocol.link_pb2 import Sites
from fedllm.values import address
from server.federation import FederationFile, HeadOffice
from server.grpc_grid import look
from server.roster import Roster

_ROTATE = "fedllm server rotate certificate"
_START = "fedllm server start"
_CLOCK = 30.0  # seconds by which clocks may differ
_OVERLAP = timedelta(days=30)  # for sites to install what names the next authority


def examine(folder: Path) -> list[CheckResult]:
    """Look at the server's folder, its daemon and the sites."""
    keys = folder / "keys"
    secret = [folder / name for name in ("federation.yaml", "roster.json", "run")]
    secret += [keys, *sorted(keys.glob("*"))]
    found = run_checks(lambda: access(folder, secret), lambda: _certificates(folder))
    office: HeadOffice | None = None
    try:
        office = HeadOffice.open(folder)
    except FedllmError as error:
        found.append(failure(str(error)))
    if office is not None:
        known = office
        found += run_checks(
            lambda: _keys(known),
            lambda: _roster(known.roster),
            lambda: _offices_certificates(known),
            lambda: _daemon(known),
            lambda: clock(max((m.admitted_at for m in known.roster.members), default=None), "the last admission"),
        )
    found += run_checks(
        lambda: [disk("checkpoints", folder)],
        lambda: size("the log", folder / "log", 1, "rotate it (docs/deployment.md, What to watch)"),
        lambda: size("all runs together", folder / "runs", 100, f"remove folders of old runs from {folder / 'runs'}"),
        versions,
    )
    return list(dict.fromkeys(found))


# ---- certificates ----------------------------------------------------------------------------------------------------


def _certificates(folder: Path) -> list[CheckResult]:
    """Look at the certificates one by one, also if the folder cannot be opened because of them."""
    config, keys = read_config(FederationFile, folder / "federation.yaml"), folder / "keys"
    server = certificates.read_certificates(read(keys / "server.pem"))[0]
    authorities = certificates.read_pairs(read(keys / "ca.pem"), read(keys / "ca.key"))
    found = [certificate("the server certificate", server, _ROTATE), *_names(config, server)]
    if _elsewhere(config):
        found.append(
            failure(f"listen={config.listen}: only this machine can connect, and sites look for {config.host}. Edit "
                  "federation.yaml (listen: 0.0.0.0), then start the server anew.")
        )  # fmt: skip
    newest = certificates.read_certificates(authorities[-1].certificate)[0]
    # what it issues may not outlive it, and sites need time to install what names the next one
    needed = timedelta(days=config.server_days) + _OVERLAP
    finding = certificate("the certificate authority", newest, "fedllm server rotate ca")
    if finding.level == "ok" and newest.ends - now() <= needed < newest.ends - newest.begins:
        finding = warning(f"{finding.text}, and certificates of {config.server_days} days need more. Remedy: "
                          "fedllm server rotate ca")  # fmt: skip
    return [*found, finding]


def _names(config: FederationFile, server: CertificateFacts) -> list[CheckResult]:
    missing = [host for host in config.hosts if host not in server.hosts]
    if config.host in missing:
        return [
            failure(f"the server certificate is not good for {config.host}, where sites connect. Remedy: {_ROTATE}")
        ]
    if missing:
        return [warning(f"the server certificate is not good for {', '.join(missing)}. Remedy: {_ROTATE}")]
    return [ok(f"the server certificate is good for {', '.join(server.hosts)}")]


def _elsewhere(config: FederationFile) -> bool:
    """Whether the port listens on loopback, and sites are told another place."""
    return _is_loopback(config.listen) and not _is_loopback(config.host)


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _keys(office: HeadOffice) -> list[CheckResult]:
    found = [ok(f"settings and keys of {office.config.name}, {office.identity.public.fingerprint}")]
    if len(office.authorities) == 2:
        found.append(_half_done("ca", office.issuer > 0))
    if len(office.identities) == 2:
        found.append(_half_done("identity", office.switched))
    return found


def _half_done(what: str, switched: bool) -> CheckResult:
    if switched:
        return warning(
            f"the old {what} is still accepted. When a round went well: fedllm server rotate {what} --retire"
        )
    return warning(
        f"a new {what} is announced. When every site has installed its grant: fedllm server rotate {what} --finish"
    )


def _roster(roster: Roster) -> list[CheckResult]:
    if not roster.active:
        return [warning("roster: no site is admitted yet. Remedy: fedllm admit NAME.join")]
    found = [ok(f"roster: {', '.join(member.site for member in roster.active)}")]
    for member in roster.active:
        if len(member.identities) > 1:
            text = f"roster: old keys of {member.site} are still accepted. When it has installed its new grant:"
            found.append(warning(f"{text} fedllm server retire {member.site}"))
    return found


def _offices_certificates(office: HeadOffice) -> list[CheckResult]:
    """Check which authority issued the certificates in the sites' newest grants, and how long they are valid."""
    found, authorities = [], [pair.certificate for pair in office.authorities]
    for member in office.roster.active:
        file = office.folder / "grants" / f"{member.site}.grant"
        if file.exists():
            issued = Grant.open(read(file))[0].link.encode()
            remedy_ = f"fedllm server grant {member.site}, and send it"
            finding = certificate(
                f"the certificate of {member.site}", certificates.read_certificates(issued)[0], remedy_
            )
            found += [finding] if finding.level != "ok" else []
            try:
                certificates.issued_by(issued, authorities)
            except CryptoError:
                text = f"the certificate of {member.site} is not of this federation's authority. Remedy: {remedy_}"
                found.append(failure(text))
    return found


# ---- the daemon ------------------------------------------------------------------------------------------------------


def _daemon(office: HeadOffice) -> list[CheckResult]:
    config = office.config
    if not is_locked(office.folder / "run"):
        strangers = [pid for _, pid in _listeners().get(config.port, []) if pid is not None]
        if strangers:
            text = f"ports: {_program(strangers[0])} listens on port {config.port}. End it, or choose another port in"
            return [failure(f"{text} federation.yaml.")]
        return [warning(f"daemon: it does not run. Start it: {_START}")]
    try:
        sites = look(office.socket)
    except FederationError:
        text = f"daemon: it runs, but does not answer on {office.socket}. See {office.folder / 'log' / 'server.log'}"
        return [failure(f"{text}; end it, and start it anew: {_START}")]
    return [*_way(office), *_offices(office, sites)]


def _listeners() -> dict[int, list[tuple[str, int | None]]]:
    """Return who listens on this machine: port -> addresses and processes, as far as this user may see."""
    found: dict[int, list[tuple[str, int | None]]] = {}
    for each in psutil.net_connections("tcp"):
        if each.status == psutil.CONN_LISTEN and each.laddr:
            found.setdefault(each.laddr.port, []).append((each.laddr.ip, each.pid))
    return found


def _program(pid: int) -> str:
    try:
        return f"{psutil.Process(pid).name()} (process {pid})"
    except psutil.Error:
        return f"process {pid}"


def _way(office: HeadOffice) -> list[CheckResult]:
    config = office.config
    near = "127.0.0.1" if config.listen in ("0.0.0.0", "::") else config.listen  # noqa: S104  # compares
    try:
        shown = probe_tls(config.host, config.port, office.ca_file, near)
    except OSError as error:
        text = f"ports: the port is not served: {explain_failure(near, config.port, error)}"
        return [failure(text)]
    found = []
    if certificates.read_certificates(shown)[0] != certificates.read_certificates(office.server.certificate)[0]:
        text = "the daemon still shows its former certificate. It takes the new one within seconds; else"
        found.append(warning(f"{text}: {_START}"))
    try:
        probe_tls(config.host, config.port, office.ca_file)
    except socket.gaierror as error:
        return [*found, failure(f"ports: {explain_failure(config.host, config.port, error)}")]
    except OSError as error:
        text = f"ports: from this machine, {explain_failure(config.host, config.port, error)}"
        return [*found, warning(f"{text} Sites may use another route: run fedllm doctor at one.")]
    return [*found, ok(f"ports: sites reach {address(config.host, config.port)}, TLS 1.3 and gRPC, as seen from here")]


def _offices(office: HeadOffice, sites: Sites) -> list[CheckResult]:
    """Look who is connected, and who tried to."""
    online = {each.site: each for each in sites.connected}
    refused = {each.site: each for each in sites.refused}
    found = []
    for member in office.roster.active:
        site = member.site
        if site in online:
            found.append(ok(f"{site} is connected from {online[site].address}, fedllm {online[site].software}"))
            if abs(online[site].ahead) > 1000 * _CLOCK:
                word = "ahead of" if online[site].ahead > 0 else "behind"
                text = f"clock: that of {site} is {abs(online[site].ahead) / 1000:.0f} s {word} this one."
                found.append(warning(f"{text} Set the one that is wrong: timedatectl set-ntp true"))
        elif site in refused:
            found.append(failure(f"{site} was refused at {_time(refused[site].at)}: {refused[site].text}"))
        else:
            found.append(warning(f"{site} is not connected. There: fedllm doctor"))
    for name in sorted(set(refused) - {member.site for member in office.roster.active}):
        text = f"{name}, which is not in the roster, was refused at {_time(refused[name].at)}: {refused[name].text}"
        found.append(warning(text))
    return found


def _time(milliseconds: int) -> str:
    return f"{datetime.fromtimestamp(milliseconds / 1000):%Y-%m-%d %H:%M:%S}"
