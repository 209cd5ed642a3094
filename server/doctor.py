"""Looks at head office for `fedllm doctor`: changes nothing, and each finding says what to do."""

import ipaddress
import socket
import time
from datetime import timedelta
from pathlib import Path

import psutil

from fedllm import crypto
from fedllm.crypto import CertificateFacts
from fedllm.errors import FederationError, FedllmError
from fedllm.files import read
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
from fedllm.provision import now, read_config
from fedllm.reach import reach, remedy
from server.federation import FederationFile, HeadOffice, Roster
from server.superlink import CONTROL_HOST, Control

_ROTATE = "fedllm server rotate certificate"
_START = "fedllm server start"
_SYNC = 8.0  # seconds after which `fedllm server start` has certainly seen a change of the roster
_STARTS = 30.0  # seconds that a SuperLink may need
_OVERLAP = timedelta(days=30)  # for offices to install what names the next authority


def examine(folder: Path) -> list[Finding]:
    """Look at head office's folder, its SuperLink and the offices."""
    keys = folder / "keys"
    secret = [folder / name for name in ("federation.yaml", "roster.json", "flower", "flower/state.db")]
    secret += [keys, *sorted(keys.glob("*"))]
    found = gather(lambda: access(folder, secret), lambda: _certificates(folder))
    office: HeadOffice | None = None
    try:
        office = HeadOffice.open(folder)
    except FedllmError as error:
        found.append(wrong(str(error)))
    if office is not None:
        known = office
        found += gather(
            lambda: _keys(known),
            lambda: _roster(known.roster),
            lambda: _ports(known),
            lambda: clock(max((m.admitted_at for m in known.roster.members), default=None), "the last admission"),
        )
    found += gather(
        lambda: [disk("checkpoints and the SuperLink's database", folder)],
        lambda: size("the SuperLink's database", folder / "flower" / "state.db", 5, _SHRINK.format(folder=folder)),
        lambda: size("the log", folder / "log", 1, "see docs/deployment.md, logs"),
        lambda: size("all runs together", folder / "runs", 100, f"remove folders of old runs from {folder / 'runs'}"),
        versions,
    )
    return list(dict.fromkeys(found))


_SHRINK = (
    "while no run is open, end fedllm server start, remove {folder}/flower/state.db*, start it; offices are let in anew"
)


# ---- certificates ----------------------------------------------------------------------------------------------------


def _certificates(folder: Path) -> list[Finding]:
    """Look at the certificates one by one, also where the folder cannot be opened because of them."""
    config, keys = read_config(FederationFile, folder / "federation.yaml"), folder / "keys"
    server = crypto.read_certificates(read(keys / "server.pem"))[0]
    authorities = crypto.read_pairs(read(keys / "ca.pem"), read(keys / "ca.key"))
    found = [certificate("the server certificate", server, _ROTATE), *_names(config, server)]
    if _elsewhere(config):
        found.append(
            wrong(f"listen={config.listen}: only this machine can connect, and offices look for {config.host}. Edit "
                  "federation.yaml (listen: 0.0.0.0), then start the server anew.")
        )  # fmt: skip
    newest = crypto.read_certificates(authorities[-1].certificate)[0]
    # what it issues may not outlive it, and offices need time to install what names the next one
    needed = timedelta(days=config.server_days) + _OVERLAP
    finding = certificate("the certificate authority", newest, "fedllm server rotate ca")
    if finding.level == "ok" and newest.ends - now() <= needed < newest.ends - newest.begins:
        finding = warning(f"{finding.text}, and certificates of {config.server_days} days need more. Remedy: "
                          "fedllm server rotate ca")  # fmt: skip
    return [*found, finding]


def _names(config: FederationFile, server: CertificateFacts) -> list[Finding]:
    missing = [host for host in config.hosts if host not in server.hosts]
    if config.host in missing:
        return [
            wrong(f"the server certificate is not good for {config.host}, where offices connect. Remedy: {_ROTATE}")
        ]
    if missing:
        return [warning(f"the server certificate is not good for {', '.join(missing)}. Remedy: {_ROTATE}")]
    return [ok(f"the server certificate is good for {', '.join(server.hosts)}")]


def _elsewhere(config: FederationFile) -> bool:
    """Whether the fleet port listens on loopback, and offices are told another place."""
    return _is_loopback(config.listen) and not _is_loopback(config.host)


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _keys(office: HeadOffice) -> list[Finding]:
    found = [ok(f"settings and keys of {office.config.name}, {office.identity.public.fingerprint}")]
    if len(office.authorities) == 2:
        found.append(_half_done("ca", office.issuer > 0))
    if len(office.identities) == 2:
        found.append(_half_done("identity", office.switched))
    return found


def _half_done(what: str, switched: bool) -> Finding:
    if switched:
        return warning(
            f"the old {what} is still accepted. When a round went well: fedllm server rotate {what} --retire"
        )
    return warning(
        f"a new {what} is announced. When every office has installed its grant: fedllm server rotate {what} --finish"
    )


def _roster(roster: Roster) -> list[Finding]:
    if not roster.active:
        return [warning("roster: no office is admitted yet. Remedy: fedllm admit NAME.join")]
    found = [ok(f"roster: {', '.join(member.site for member in roster.active)}")]
    for member in roster.active:
        if len(member.identities) > 1:
            text = f"roster: old keys of {member.site} are still accepted. When it has installed its new grant:"
            found.append(warning(f"{text} fedllm server retire {member.site}"))
    return found


# ---- the SuperLink ---------------------------------------------------------------------------------------------------


def _ports(office: HeadOffice) -> list[Finding]:
    config = office.config
    running = processes("flower-superlink", str(office.folder / "flower" / "state.db"))
    found = proxies([CONTROL_HOST])
    for process in running:
        found += quiet("SuperLink", process)
    mine = {process.pid for process in running}
    listeners = _listeners()
    for name, port in (("fleet", config.fleet_port), ("control", config.control_port)):
        strangers = [pid for _, pid in listeners.get(port, []) if pid is not None and pid not in mine]
        if strangers:
            found.append(
                wrong(f"ports: {_program(strangers[0])} listens on the {name} port {port}. End it, or choose another "
                      f"{name}_port in federation.yaml.")
            )  # fmt: skip
    for port, places in listeners.items():
        for address, pid in places:
            if pid in mine and port != config.fleet_port and not _is_loopback(address):
                found.append(
                    wrong(f"ports: the SuperLink listens on {address}:{port}, open to others: whoever reaches its "
                          f"control port runs code at every office. End it, and start it with {_START}")
                )  # fmt: skip
    if not running:
        alive = held(office.folder / "flower")
        if any(not finding.right for finding in found):
            return found
        if alive:
            text = (
                f"fedllm server start runs, but its SuperLink does not. See {office.folder / 'log' / 'superlink.log'}"
            )
            return [*found, wrong(f"SuperLink: {text}")]
        return [*found, warning(f"SuperLink: it does not run. Start it: {_START}")]
    if config.control_port in listeners:
        found.append(ok(f"ports: control port {config.control_port} on loopback only"))
    if config.fleet_port not in listeners and _young(running[0]):
        return [*found, warning("SuperLink: it is just starting. Look again in half a minute")]
    return [*found, *_way(office), *_offices(office)]


def _young(process: psutil.Process) -> bool:
    try:
        return time.time() - process.create_time() < _STARTS
    except psutil.Error:
        return True


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


def _way(office: HeadOffice) -> list[Finding]:
    config = office.config
    near = "127.0.0.1" if config.listen in ("0.0.0.0", "::") else config.listen  # noqa: S104  # compares
    try:
        shown = reach(config.host, config.fleet_port, office.ca_file, near)
    except OSError as error:
        text = f"ports: the fleet port is not served: {remedy(near, config.fleet_port, error)}"
        return [wrong(text)]
    found = []
    if crypto.read_certificates(shown)[0] != crypto.read_certificates(office.server.certificate)[0]:
        text = "the SuperLink still shows its former certificate. It starts again by itself within seconds; else"
        found.append(warning(f"{text}: {_START}"))
    try:
        reach(config.host, config.fleet_port, office.ca_file)
    except socket.gaierror as error:
        return [*found, wrong(f"ports: {remedy(config.host, config.fleet_port, error)}")]
    except OSError as error:
        text = f"ports: from this machine, {remedy(config.host, config.fleet_port, error)}"
        return [*found, warning(f"{text} Offices may come by another way: look at one with fedllm doctor.")]
    return [*found, ok(f"ports: offices reach {config.host}:{config.fleet_port}, TLS 1.3 and gRPC, as seen from here")]


def _offices(office: HeadOffice) -> list[Finding]:
    try:
        online = Control(office).connected()
        if None in online:  # the server looks at the roster every few seconds
            time.sleep(_SYNC)
            online = Control(office).connected()
    except FederationError as error:
        return [wrong(f"SuperLink: {error}")]
    found = []
    for member in office.roster.active:
        if member.site not in online:
            text = f"{member.site} is in the roster, and the SuperLink does not know its key yet. It should in seconds;"
            found.append(warning(f"{text} else see what fedllm server start says"))
        elif not online[member.site]:
            found.append(warning(f"{member.site} is not connected. There: fedllm doctor"))
        else:
            found.append(ok(f"{member.site} is connected"))
    if None in online:
        text = "the SuperLink lets a node in that is not in the roster. No message of fedllm goes to it;"
        found.append(wrong(f"{text} fedllm server start should have removed it: see what it says"))
    return found
