"""Two people follow docs/deployment.md, command by command, from nothing to a report, a rotation and a revocation."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.doctor import check
from client.office import init_office, install
from fedllm.cli import main as cli
from server import federation
from tests.conftest import SOAK
from tests.deployment.harness import free_port, records_of, until

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "deployment.md"
FINGERPRINT = re.compile(r"\b(?:[0-9a-f]{4}-){9}[0-9a-f]{4}\b")
READY = {"fedllm server start": "ready: sites connect", "fedllm site start": "connected to the server"}
LONG = "second"  # what the soak alone does: a run that is stopped and resumed
QUICK = "privacy.sampling_rate=0.02 privacy.noise_multiplier=4.0 data.heldout_limit=20 data.samples=1"
# What is said where a change of keys or certificates has been noticed, and is in use.
NOTICED = {
    "fedllm server start": "the port shows its new certificate",
    "fedllm site start": "connected to the server",
}
VARIABLES = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@dataclass(frozen=True)
class Block:
    """A fenced block: what it is, who uses it, and for a file where it goes."""

    kind: str
    who: str
    place: str
    text: str


def blocks() -> list[Block]:
    found = re.findall(r"^```(\w*) ?(\S*) ?(\S*)\n(.*?)^```", DOC.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [Block(*each) for each in found]


@dataclass
class Person:
    """Somebody with a home folder, a working folder, and a telephone."""

    home: Path
    port: int
    said: str = ""  # the fingerprint that this person's screen showed last
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    output: str = ""
    tried: set[str] = field(default_factory=set)  # commands that have run in a process of their own

    @property
    def desk(self) -> Path:
        return self.home / "desk"

    @property
    def variables(self) -> dict[str, str]:
        return {**os.environ, **VARIABLES, "HOME": str(self.home)}

    def write(self, place: str, text: str) -> None:
        """Write a file as the text shows it, for one machine instead of two."""
        text = text.replace("head.example.com", "127.0.0.1")
        if place == "federation.yaml":
            text += f"listen: 127.0.0.1\nport: {self.port}\n"
        if place.endswith("site.yaml") and not SOAK:  # fewer records, and no seconds until an update leaves
            records = records_of("seoul-gangnam", self.home / "records.jsonl", 200)
            text = text.replace("pkg://simulations.demo/data/train.jsonl", str(records)).replace(
                "size: 9000", "size: 200"
            )
            text = text.replace("policy:\n", "policy:\n  reply_quantum: 0.0\n")
        path = self.home / place.removeprefix("~/") if place.startswith("~/") else self.desk / place
        path.write_text(text, "utf-8")
        path.chmod(0o600)

    def do(self, line: str, heard: str) -> None:
        """Type one command, and what was heard on the telephone if it asks."""
        if line in READY:
            with self.log(line).open("wb") as file:
                self.running[line] = subprocess.Popen(
                    shlex.split(line), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                    env=self.variables, cwd=self.desk,
                )  # fmt: skip
            until(lambda: READY[line] in self.log(line).read_text("utf-8"), what=line)
            return
        assert self.type(line, heard) == 0, f"{line}\n{self.output}"
        fingerprints = FINGERPRINT.findall(self.output)
        if fingerprints:
            self.said = fingerprints[-1]

    def type(self, line: str, heard: str = "") -> int:
        """Return the exit code of a command: in the soak a process the first time; else, it spares the imports."""
        words = shlex.split(line)
        name = " ".join(words[: 3 if words[1] in ("server", "site") else 2])
        if name in self.tried or not SOAK:
            return self._type_here(words, heard)
        self.tried.add(name)
        done = subprocess.run(
            ["bash", "-c", line], input=f"{heard}\n", capture_output=True, text=True, timeout=900, check=False,
            env=self.variables, cwd=self.desk,
        )  # fmt: skip
        self.output = done.stdout + done.stderr
        return done.returncode

    def _type_here(self, words: list[str], heard: str) -> int:
        before, mask = dict(os.environ), os.umask(0o077)
        os.environ.update(self.variables)
        try:
            with contextlib.chdir(self.desk), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as outside of pytest
                done = CliRunner().invoke(cli.app, words[1:], input=f"{heard}\n")
        finally:
            os.environ.clear()
            os.environ.update(before)
            os.umask(mask)
        self.output = f"{done.output}\n{done.exception or ''}"
        return done.exit_code

    def log(self, line: str) -> Path:
        return self.home / f"{line.replace(' ', '-')}.log"

    def count(self, words: str) -> int:
        return sum(self.log(line).read_text("utf-8").count(words) for line in self.running)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to what runs, and not to its children."""
        for process in self.running.values():
            process.send_signal(number)

    def stop(self) -> None:
        self.send(signal.SIGTERM)
        self.send(signal.SIGCONT)
        for process in self.running.values():
            process.wait(120)


@dataclass
class Two:
    """The server and the site, and the mail between them."""

    head: Person
    office: Person
    held: bool = False

    def hold(self) -> None:
        """Let what runs overlook changes, so that many of them are noticed at once."""
        if not self.held:
            self.held = True
            for person in (self.head, self.office):
                person.send(signal.SIGSTOP)

    def release(self) -> None:
        """Wait until all changes have been noticed."""
        if self.held:
            self.held = False
            for person in (self.head, self.office):  # one after the other: the port is there when the site comes
                before = {line: person.count(NOTICED[line]) for line in person.running}
                person.send(signal.SIGCONT)
                for line, count in before.items():
                    until(lambda w=NOTICED[line], n=count, p=person: p.count(w) > n, what=NOTICED[line])

    def carry(self) -> None:
        for file in self.office.home.glob(".fedllm/site/*.join"):
            shutil.copy(file, self.head.desk)
        for file in self.head.home.glob(".fedllm/head-office/grants/*.grant"):
            shutil.copy(file, self.office.desk)


@pytest.fixture
def two() -> Iterator[Two]:
    folder = Path(tempfile.mkdtemp(prefix="fd-"))  # short: the path of a socket
    port = free_port()
    people = [Person(folder / name, port) for name in ("head", "office")]
    for person in people:
        person.desk.mkdir(parents=True)
        person.home.chmod(0o700)
    pair = Two(*people)
    pair.office.tried = pair.head.tried
    try:
        yield pair
    finally:
        for person in people:
            person.stop()
        shutil.rmtree(folder)


def test_two_people_come_from_nothing_to_a_report_and_through_every_rotation(two: Two) -> None:
    said = {"head-office": two.head, "office": two.office}
    for block in blocks():
        if block.who not in said:
            continue
        me = said[block.who]
        other = two.office if me is two.head else two.head
        if block.kind == "yaml":
            me.write(block.place, block.text)
            continue
        for line in block.text.splitlines():
            if LONG in line and not SOAK:
                continue
            if "rotate" in line:
                two.hold()
            if line == "fedllm doctor":
                two.release()
                seen = "is connected" if me is two.head else "connected to the server"
                until(lambda m=me, s=seen: m.type("fedllm doctor") == 0 and s in m.output, what="all ok", pause=2.0)
                continue
            me.do(f"{line} {QUICK}" if line.startswith("fedllm submit name=") else line, other.said)
            two.carry()
            if line == "fedllm status first":
                assert "completed" in me.output
    run = two.head.home / ".fedllm" / "head-office" / "runs"
    for name in ("first", LONG) if SOAK else ("first",):
        summary = (run / name / "summary.md").read_text("utf-8")
        assert "seoul-gangnam" in summary
        assert (run / name / "adapter" / "adapter_model.safetensors").exists()
    assert federation.HeadOffice.open(two.head.home / ".fedllm" / "head-office").roster.active == ()


# ---- what administrators do ------------------------------------------------------------------------------------------

# In systemd's place: starts what a unit's ExecStart says as its User, with its RuntimeDirectory.
SYSTEMCTL = """#!/bin/bash
[ "$1" = daemon-reload ] && exit 0
[ "$1 $2" = "enable --now" ] || exit 1
for name in "${@:3}"; do
  case " $STARTED " in *" $name "*) ;; *) test -e /etc/systemd/system/$name.service && continue ;; esac
  unit=/etc/systemd/system/$name.service
  get() { sed -n "s/^$1=//p" $unit; }
  for folder in $(get RuntimeDirectory); do install -d -m 710 -o $(get User) /run/$folder; done
  (umask 077; cd /; HOME=/nowhere exec runuser -u $(get User) -- $(get ExecStart) > /run/$name.log 2>&1 &)
done
for turn in $(seq 300); do case "$*" in *relay*) test -S /run/fedllm/link.sock && break;; *) break;; esac; sleep 1; done
sleep 3
"""

# A namespace in which users, units and folders can be made, and are gone with it.
NAMESPACE = """set -e
mkdir $T/etc && cp -a /etc/. $T/etc && mount --bind $T/etc /etc
for folder in /var/lib /run; do mount -t tmpfs -o mode=755 tmpfs $folder; done
mkdir -p /etc/systemd/system /etc/logrotate.d
for place in $HIDDEN; do mkdir -p $T/held$place; mount --bind $place $T/held$place; done
for place in $HIDDEN; do echo /$(echo $place | cut -d/ -f2); done | sort -u > $T/tops
for top in $(cat $T/tops); do mount -t tmpfs -o mode=755 tmpfs $top; done
for place in $HIDDEN; do mkdir -p $place; mount --move $T/held$place $place; done
cd /
until_said() { for i in $(seq 300); do "${@:2}" | grep -q "$1" && return 0; sleep 1; done; "${@:2}"; return 1; }
"""

CONNECTED = """
until_said "seoul-gangnam is connected" runuser -u fedllm -- fedllm doctor --home /var/lib/fedllm
until_said "site: connected to the server" runuser -u fedllm-site -- fedllm doctor --home /var/lib/fedllm-site
until_said "relay: listens on" runuser -u fedllm-relay -- fedllm doctor --home /var/lib/fedllm-relay
"""
CLOSED = """
for place in site.yaml keys/1/identity data; do
  ! runuser -u fedllm-relay -- cat /var/lib/fedllm-site/$place 2>/dev/null
done
"""


def closed_to_others() -> list[str]:
    """Folders that the commands need, below one that other users cannot enter, such as /root/.pyenv."""
    places = {Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), ROOT}
    return sorted(str(place) for place in places if any(not up.stat().st_mode & 0o001 for up in place.parents))


def can_have_a_namespace() -> bool:
    command = ["unshare", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    tools = all(shutil.which(tool) for tool in ("unshare", "useradd", "runuser"))
    return tools and os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_have_a_namespace(), reason="needs root and leave to make namespaces")
@pytest.mark.skipif(any(place.startswith("/tmp/") for place in closed_to_others()), reason="Python lies below /tmp")
@pytest.mark.parametrize(
    ("started", "checks"),
    [
        ("fedllm-server", ""),  # the server's commands alone
        pytest.param("fedllm-server fedllm-relay fedllm-site", CONNECTED + CLOSED, marks=pytest.mark.soak),
    ],
)
def test_administrators_come_to_services_of_their_own_users(tmp_path: Path, started: str, checks: str) -> None:
    you = Person(tmp_path / "you", free_port())
    you.desk.mkdir(parents=True)
    federation_yaml, site_yaml = (block for block in blocks() if block.kind == "yaml")
    you.write(federation_yaml.place, federation_yaml.text)
    head = federation.init_federation(you.desk / "federation.yaml", you.home / ".fedllm" / "head-office")
    site = init_office(you.home / ".fedllm" / "site", "seoul-gangnam")
    you.write(site_yaml.place, site_yaml.text)
    grant = federation.admit(head.folder, site.join_file.read_bytes(), site.identity.public.fingerprint)
    install(site.folder, grant.read_bytes(), head.identity.public.fingerprint)
    if checks:
        assert all(finding.right for finding in check(site.folder))

    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "systemctl").write_text(SYSTEMCTL)
    (tools / "systemctl").chmod(0o755)
    script = NAMESPACE
    of_administrators = [block for block in blocks() if block.who == "root"]
    for number, block in enumerate(of_administrators if checks else of_administrators[:1]):
        script += f"mkdir $T/{number}; cd $T/{number}\n{block.text.replace('/home/you', str(you.home))}cd /\n"
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", script + checks],
        capture_output=True, text=True, timeout=1500, check=False, stdin=subprocess.DEVNULL,
        env={**you.variables, "T": str(tmp_path), "STARTED": started, "HIDDEN": " ".join(closed_to_others()),
             "PATH": f"{tools}:{VARIABLES['PATH']}:/usr/sbin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_every_command_of_the_page_is_one_that_is_run() -> None:
    for block in blocks():
        assert (block.kind, block.who) in {
            ("", ""), ("yaml", "head-office"), ("yaml", "office"), ("sh", "head-office"), ("sh", "office"),
            ("sh", "root"),
        }  # fmt: skip
    [install_] = [block.text for block in blocks() if not block.kind]  # pip's: `make test` does the same
    assert "fedllm " not in install_
