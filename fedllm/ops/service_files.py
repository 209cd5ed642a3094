"""Files for the service manager: systemd units, a compose file with its Dockerfile, and rotation of logs.

Every process gets the least that it can work with. What is written holds no secret; it is for the administrator to
read, install and keep.
"""

import grp
import json
import os
import pwd
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from fedllm.errors import ConfigError, FolderError
from fedllm.files import cannot_write, replace_file

_HOMES = ("/home", "/root", "/run/user")  # what ProtectHome= hides
_TEMPORARY = ("/tmp", "/var/tmp")  # noqa: S108  # what PrivateTmp= exchanges


@dataclass(frozen=True)
class ServiceSpec:
    """One long-running command and what it may use."""

    name: str  # of the service
    what: str
    arguments: tuple[str, ...]  # of fedllm
    user: str
    writes: tuple[Path, ...]
    reads: tuple[Path, ...] = ()  # outside the folders of the system
    hidden: tuple[Path, ...] = ()
    group: str | None = None  # one more that the user needs
    runtime: str | None = None  # a folder of its own under /run
    network: bool = True
    devices: bool = False  # a GPU
    after: tuple[str, ...] = ()
    leaves: bool = False  # its children go on when it is ended or started anew
    forgets: bool = False  # what it holds in memory never reaches a disk, as core or as swapped pages


_SERVICE = Template("""\
# Written by fedllm. Install it as /etc/systemd/system/$name.service, then: systemctl daemon-reload
[Unit]
Description=$what
Wants=network-online.target$after
After=network-online.target$after
StartLimitIntervalSec=0

[Service]
ExecStart=$command
User=$user
$group$runtime$forgets
Restart=always
RestartSec=5
TimeoutStopSec=60
KillMode=$kill
UMask=0077

# The whole system can be read but for $hidden, and only this can be written:
ReadWritePaths=$writes
ProtectSystem=strict
ProtectHome=$home
PrivateTmp=$tmp
$inaccessible
# $why
$network
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
PrivateDevices=$devices
ProtectClock=$devices
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
KeyringMode=private
RemoveIPC=yes
SystemCallArchitectures=native

[Install]
WantedBy=multi-user.target
""")

_NETWORK = "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6"
_NO_NETWORK = "PrivateNetwork=yes\nIPAddressDeny=any\nRestrictAddressFamilies=AF_UNIX"


def service(unit: ServiceSpec) -> str:
    """Return a systemd unit."""
    program = Path(sys.executable).parent / "fedllm"
    start = [str(program)] if program.exists() else [sys.executable, "-m", "fedllm.cli"]
    places = [*unit.writes, *unit.reads, Path(sys.prefix), Path(sys.base_prefix), Path(__file__).parent]
    return _SERVICE.substitute(
        name=unit.name,
        what=_line(unit.what).replace("%", "%%"),
        after="".join(f" {other}.service" for other in unit.after),
        command=" ".join(_word(part).replace("$", "$$") for part in (*start, *unit.arguments)),
        user=unit.user,
        kill="process" if unit.leaves else "mixed",
        group=f"SupplementaryGroups={unit.group}\n" if unit.group else "",
        runtime=f"RuntimeDirectory={unit.runtime}\nRuntimeDirectoryMode=0710\n" if unit.runtime else "",
        forgets="LimitCORE=0\nMemorySwapMax=0\n" if unit.forgets else "",
        writes=" ".join(_word(str(place)) for place in unit.writes),
        hidden="what lies below" if unit.hidden else "other users' processes",
        home="read-only" if _below(places, _HOMES) else "yes",
        tmp="no" if _below([*unit.writes, *unit.reads], _TEMPORARY) else "yes",
        inaccessible="".join(f"InaccessiblePaths={_word('-' + str(place))}\n" for place in unit.hidden),
        why="Connects and listens:" if unit.network else "No network at all, not even loopback:",
        network=_NETWORK if unit.network else _NO_NETWORK,
        devices="no" if unit.devices else "yes",
    )


def _line(text: str) -> str:
    """Return a text of the settings as one line: a second one would be read as a setting of its own."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def _below(places: Sequence[Path], tops: Sequence[str]) -> bool:
    return any(place.resolve().is_relative_to(top) for place in places for top in tops)


def _word(text: str) -> str:
    """Quote a word as systemd.syntax(7) reads it."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"' if any(sign in text for sign in " \t'\";") else text


_LOGS = Template("""\
# Written by fedllm. Install it as /etc/logrotate.d/$name
$places {
    su $user $group
    weekly
    rotate 8
    maxsize 100M
    compress
    missingok
    notifempty
    copytruncate
}
""")


def rotation(name: str, user: str, places: Sequence[Path]) -> str:
    """Return logrotate's settings; copytruncate, because the processes keep their logs open."""
    patterns = " ".join(f'"{place}"' for place in places)
    group = grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name
    return _LOGS.substitute(name=name, places=patterns, user=user, group=group)


# ---- containers ------------------------------------------------------------------------------------------------------

_DOCKERFILE = Template("""\
# Written by fedllm. The image is built from a wheel of fedllm, which goes beside this file together with the versions
# that were tested. In a checkout of fedllm:
#   pip wheel --no-deps --wheel-dir $folder . && cp constraints.txt $folder
FROM python:3.11-slim
COPY fedllm-*.whl constraints.txt /install/
RUN pip install --no-cache-dir --constraint /install/constraints.txt \\
    --extra-index-url https://download.pytorch.org/whl/cpu $wheel
# The numbers are those of this machine, so that files keep their owners.
${users}ENTRYPOINT ["fedllm"]
""")

_CONTAINER = Template("""\
  $name:
    # $why
    build: .
    image: fedllm:local
    command: $command
    user: $user
$more    volumes: $volumes
    environment: {HOME: /tmp}
    tmpfs: ["/tmp"]
    read_only: true
    cap_drop: ["ALL"]
    security_opt: ["no-new-privileges:true"]
    restart: unless-stopped
    stop_grace_period: 60s
""")


def compose(units: Sequence[ServiceSpec], ports: Mapping[str, int], socket: Path | None = None) -> str:
    """Return a compose file; `ports` are published, `socket` lies in a volume that all share and the last one makes.

    Folders are mounted where they are on this machine, since settings name them by their paths.
    """
    parts = ["# Written by fedllm. Start it: docker compose up --build --detach", "services:"]
    distributed = socket.parent if socket is not None else None
    for unit in units:
        user = pwd.getpwnam(unit.user)
        volumes = [f"{place}:{place}" for place in unit.writes if place != distributed]
        volumes += [f"{place}:{place}:ro" for place in unit.reads]
        more = ""
        if distributed is not None:
            volumes.append(f"socket:{distributed}")
        if unit.group is not None:
            more += f"    group_add: {_json([str(grp.getgrnam(unit.group).gr_gid)])}\n"
        if not unit.network:
            more += "    network_mode: none\n"
        elif unit.name in ports:
            more += f"    ports: {_json([f'{ports[unit.name]}:{ports[unit.name]}'])}\n"
        if unit.after:
            more += f"    depends_on: {_json(list(unit.after))}\n"
        parts.append(
            _CONTAINER.substitute(
                name=unit.name,
                why=_line(unit.what),
                command=_json(list(unit.arguments)),
                user=_json(f"{user.pw_uid}:{user.pw_gid}"),
                more=more,
                volumes=_json(volumes),
            ).rstrip("\n")
        )
    if distributed is not None:
        owner = pwd.getpwnam(units[-1].user)  # of the relay
        group = grp.getgrnam(units[-1].group or "").gr_gid
        options = f"uid={owner.pw_uid},gid={group},mode=0710"
        parts += [
            "volumes:", "  socket:  # in memory; the relay makes its socket there", "    driver: local",
            f"    driver_opts: {_json({'type': 'tmpfs', 'device': 'tmpfs', 'o': options})}",
        ]  # fmt: skip
    return "\n".join(parts) + "\n"


def dockerfile(folder: Path, units: Sequence[ServiceSpec], extra: str | None = None) -> str:
    """Return the Dockerfile of the image that `compose` uses, with this machine's users and groups.

    `extra` is one of fedllm's that the image needs.
    """
    lines, groups = [], {}
    for unit in units:
        user = pwd.getpwnam(unit.user)
        groups[user.pw_gid] = grp.getgrgid(user.pw_gid).gr_name
        if unit.group is not None:
            groups[grp.getgrnam(unit.group).gr_gid] = unit.group
    for number, name in groups.items():
        if number:
            lines.append(f"RUN groupadd --force --gid {number} {shlex.quote(name)}")
    for user in {unit.user: pwd.getpwnam(unit.user) for unit in units}.values():
        if user.pw_uid:
            lines.append(f"RUN useradd --no-create-home --uid {user.pw_uid} --gid {user.pw_gid} {user.pw_name}")
    wheel = "/install/fedllm-*.whl" if extra is None else f'"$(echo /install/fedllm-*.whl)[{extra}]"'
    return _DOCKERFILE.substitute(
        folder=shlex.quote(str(folder)), users="".join(f"{line}\n" for line in lines), wheel=wheel
    )


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False).replace("$", "$$")  # JSON is YAML; compose would fill in a lone $


# ---- writing ---------------------------------------------------------------------------------------------------------


def owner(folder: Path) -> str:
    """Return the user that a folder belongs to; raises ConfigError if the system has no such user any more."""
    number = folder.stat().st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        raise ConfigError(f"{folder} belongs to user {number}, whom this machine does not know. Run: chown") from None


def check_account(user: str, group: str | None) -> None:
    """Raise ConfigError unless there is such a user and such a group."""
    try:
        pwd.getpwnam(user)
    except KeyError:
        raise ConfigError(f"there is no user {user} here. Make it: useradd --system {user}") from None
    try:
        _ = None if group is None else grp.getgrnam(group)
    except KeyError:
        raise ConfigError(f"there is no group {group} here. Make it: groupadd --system {group}") from None


def write(folder: Path, files: Mapping[str, str]) -> list[Path]:
    """Write files for the administrator, readable by everybody; raises FolderError, overwriting nothing."""
    taken = [name for name in files if (folder / name).exists()]
    if taken:
        raise FolderError(f"{folder / taken[0]} exists. Nothing was overwritten; remove it, or choose another folder.")
    try:
        before = os.umask(0o022)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        finally:
            os.umask(before)
        for name, text in files.items():
            replace_file(folder / name, text.encode(), 0o644)
    except OSError as error:
        raise cannot_write(folder, error, "try again, or choose another folder") from None
    return [folder / name for name in files]
