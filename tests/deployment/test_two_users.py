"""A site of two system users: site and relay share a socket and nothing else, and the site has no network.

The users exist only for the processes of this test: each gets a mount namespace in which /etc/passwd and /etc/group
name them, and in which interpreter and source can be read where root's own folders would hide them.
"""

import errno
import grp
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from client.relay import export_relay_folder
from tests.deployment.harness import Branch, HeadOffice, Program, records_of, settings, until

pytestmark = [pytest.mark.deployment, pytest.mark.soak]

REPOSITORY = Path(__file__).parents[2]
SITE, RELAY, STRANGER, GROUP = "fedllm-site", "fedllm-relay", "fedllm-nobody", "fedllm-link"
IDS = {SITE: 64101, RELAY: 64102, STRANGER: 64103, GROUP: 64104}
NAME = "seoul-gangnam"

# Runs as one of the users: attempts everything and says what came of it
_ATTEMPTS = r"""
import ctypes, errno, json, os, signal, socket, sys
task, found = json.load(sys.stdin), {}
libc = ctypes.CDLL(None, use_errno=True)

def attempt(what, call):
    try:
        call()
        found[what] = "done"
    except OSError as error:
        found[what] = errno.errorcode[error.errno]

def of_libc(name, *arguments):
    ctypes.set_errno(0)
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)

def trace():
    of_libc("ptrace", 16, task["pid"], None, None)  # PTRACE_ATTACH
    os.waitpid(task["pid"], 0)
    of_libc("ptrace", 17, task["pid"], None, None)  # PTRACE_DETACH

def connect():
    with socket.socket(socket.AF_UNIX) as found:
        found.connect(task["socket"])

for place in task["folders"]:
    attempt("list " + place, lambda: os.listdir(place))
    attempt("write in " + place, lambda: os.close(os.open(place + "/new", os.O_CREAT | os.O_WRONLY)))
for place in task["files"]:
    attempt("read " + place, lambda: open(place, "rb").read())
    attempt("write " + place, lambda: open(place, "ab").close())
for name in ("environ", "mem", "maps"):
    attempt(name, lambda: open(f"/proc/{task['pid']}/{name}", "rb").read(0 if name == "mem" else -1))
attempt("descriptors", lambda: os.listdir(f"/proc/{task['pid']}/fd"))
attempt("its folder", lambda: os.listdir(f"/proc/{task['pid']}/cwd/"))
attempt("trace", trace)
attempt("signal", lambda: os.kill(task["pid"], 0))
attempt("replace the socket", lambda: os.rename(task["socket"], task["socket"] + ".old"))
attempt("connect", connect)
attempt("reach the server", lambda: socket.create_connection(("127.0.0.1", task["port"]), 10).close())
json.dump(found, sys.stdout)
"""


def _script(folder: Path) -> str:
    """Return shell commands that make the mount namespace; they end where the user's command begins."""
    lines = [f"mount --bind '{folder / name}' /etc/{name}" for name in ("passwd", "group")]
    roots = sorted({Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), REPOSITORY.resolve()})
    hidden: dict[Path, list[Path]] = {}
    for root in roots:
        closed = [parent for parent in [*reversed(root.parents), root] if not parent.stat().st_mode & 0o001]
        if closed and closed[0] != root:
            hidden.setdefault(closed[0], []).append(root)
    for top, inside in hidden.items():
        for number, root in enumerate(inside):
            lines.append(f"mkdir -p '{folder}/stage/{number}' && mount --bind '{root}' '{folder}/stage/{number}'")
        lines.append(f"mount -t tmpfs -o mode=0755 tmpfs '{top}'")
        for number, root in enumerate(inside):
            lines.append(f"mkdir -p '{root}' && mount --move '{folder}/stage/{number}' '{root}'")
    lines.append(
        'user="$1"; shift; exec setpriv --reuid "$user" --regid "$user" --init-groups --inh-caps=-all '
        f"--bounding-set=-all --no-new-privs env -C '{REPOSITORY}' HOME=/nonexistent \"$@\""
    )
    return "\n".join(lines)


def _users(folder: Path) -> None:
    """Write the lists of users and groups, as the namespaces shall see them."""
    ids = IDS.items()
    users = "".join(f"{n}:x:{i}:{i}::/nonexistent:/usr/sbin/nologin\n" for n, i in ids if n != GROUP)
    groups = "".join(f"{n}:x:{i}:{f'{SITE},{RELAY}' if n == GROUP else ''}\n" for n, i in ids)
    for name, more in (("passwd", users), ("group", groups)):
        (folder / name).write_text(Path("/etc", name).read_text("utf-8").rstrip("\n") + "\n" + more, "utf-8")
        (folder / name).chmod(0o644)


@dataclass
class Place:
    """A folder that every user may pass, and the way to be one of them."""

    folder: Path

    def as_user(self, name: str) -> list[str]:
        """Put before a command, it runs as this user; the site's has no network, as under its systemd unit."""
        apart = ["--net"] if name == SITE else []
        return ["unshare", "--mount", *apart, "--propagation", "private", "sh", "-ec", _script(self.folder), "sh", name]

    def give(self, path: Path, name: str) -> None:
        """Give a file or a folder with all that is in it to a user."""
        for each in [path, *path.rglob("*")]:
            os.chown(each, IDS[name], IDS[name], follow_symlinks=False)

    def attempt(self, user: str, task: dict[str, object]) -> dict[str, str]:
        """Return what came of everything that `_ATTEMPTS` tries."""
        said = self._run([*self.as_user(user), sys.executable, "-c", _ATTEMPTS], json.dumps(task))
        found: dict[str, str] = json.loads(said)
        return found

    @staticmethod
    def _run(command: list[str], given: str = "") -> str:
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    if os.geteuid() != 0:
        pytest.skip("only root may become other users")
    missing = [tool for tool in ("unshare", "setpriv", "mount", "env") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed (packages util-linux, coreutils)")
    taken = {entry.pw_uid for entry in pwd.getpwall()} | {entry.gr_gid for entry in grp.getgrall()}
    assert not taken & set(IDS.values())
    folder = Path(tempfile.mkdtemp(prefix="fedllm-", dir="/tmp"))  # not pytest's: that is closed to other users
    try:
        folder.chmod(0o755)
        (folder / "stage").mkdir()
        _users(folder)
        made = Place(folder)
        look = [*made.as_user(RELAY), sys.executable, "-c", "import fedllm.cli.main, client.relay, torch"]
        tried = subprocess.run(look, capture_output=True, text=True, check=False, timeout=120)
        if tried.returncode != 0:
            pytest.skip(f"other users cannot run this installation here: {tried.stderr.strip().splitlines()[-1:]}")
        yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class TwoUsers:
    """The server, and a site of two users."""

    place: Place
    head: HeadOffice
    branch: Branch
    relay: Program
    records: Path
    socket: Path

    def task(self, whose: str) -> dict[str, object]:
        """What the attempts are to be made on: what is the site's, or the relay's."""
        home, program, more = self.branch.home, self.branch.program, [self.records]
        if whose == RELAY:
            home, program, more = self.branch.relay_home, self.relay, []
        files = [path for path in home.rglob("*") if path.is_file()]
        expected = {"link", "link.pem"} | ({"identity", "ledger.db", "site.yaml"} if whose == SITE else {"relay.json"})
        assert expected <= {path.name for path in files}
        return {
            "folders": [str(path) for path in (home, *home.rglob("*")) if path.is_dir()],
            "files": [str(path) for path in (*files, *more)], "port": self.head.port,
            "socket": str(self.socket), "pid": program.processes()[0].pid,
        }  # fmt: skip


@pytest.fixture(scope="module")
def office(place: Place) -> Iterator[TwoUsers]:
    folder = place.folder
    head = HeadOffice(folder)
    records = records_of(NAME, folder / "records.jsonl")
    branch = Branch(folder, NAME, records, place.as_user(SITE))
    run = folder / "run"
    run.mkdir(mode=0o755)  # as systemd makes a RuntimeDirectory
    branch.settings |= {"socket": str(run / "link.sock"), "socket_group": GROUP}
    branch.write_settings()
    branch.join(head)
    export_relay_folder(branch.office, branch.relay_home)
    relay = Program(["site", "relay", str(branch.relay_home)], folder / "relay.log", place.as_user(RELAY))
    for path, user in ((branch.home, SITE), (records, SITE), (run, RELAY), (branch.relay_home, RELAY)):
        place.give(path, user)
    try:
        head.start()
        relay.started("the relay listens")
        branch.start()
        until(lambda: head.connected() == {NAME} or branch.program.ended, what=f"the site; {branch.program.text()}")
        yield TwoUsers(place, head, branch, relay, records, run / "link.sock")
    finally:
        branch.program.stop()
        relay.stop()
        head.stop()


CLOSED = {errno.errorcode[number] for number in (errno.EACCES, errno.EPERM)}


def test_a_run_completes_with_site_and_relay_under_two_users(office: TwoUsers) -> None:
    done = office.head.submit(*settings("two-users", 1, **{"federation.quorum": 1}))
    assert done.returncode == 0, done.stdout + done.stderr + office.branch.program.text() + office.relay.text()
    assert office.head.rounds("two-users")[1].answered == [NAME]
    for program, user in ((office.branch.program, SITE), (office.relay, RELAY)):
        found = program.processes()
        assert {each.uids().effective for each in found} == {IDS[user]}
        assert all(_capabilities(each) == 0 for each in found)


def _capabilities(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text("ascii")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapPrm:")), 16)


def test_the_relays_user_can_open_nothing_of_the_sites_and_not_look_into_its_process(office: TwoUsers) -> None:
    found = office.place.attempt(RELAY, office.task(SITE) | {"socket": str(office.socket) + ".none"})
    assert found.pop("reach the server") == "done"  # this is what it is for
    assert found.pop("replace the socket") == found.pop("connect") == errno.errorcode[errno.ENOENT]  # it is its own
    assert set(found.values()) <= CLOSED, found
    assert len(found) > 20


def test_the_sites_user_has_no_network_and_nothing_of_the_relays_but_its_socket(office: TwoUsers) -> None:
    found = office.place.attempt(SITE, office.task(RELAY))
    assert found.pop("connect") == "done"
    assert found.pop("reach the server") in ("ENETUNREACH", "ECONNREFUSED")  # not even loopback
    assert set(found.values()) <= CLOSED, found


def test_a_third_user_cannot_even_open_the_socket(office: TwoUsers) -> None:
    for whose in (SITE, RELAY):
        found = office.place.attempt(STRANGER, office.task(whose))
        assert found.pop("reach the server") == "done"  # its port, where it has no certificate to show
        assert set(found.values()) <= CLOSED, found


def test_the_attempts_succeed_where_they_are_permitted(office: TwoUsers) -> None:
    site = office.branch.home / "site.yaml"
    task = office.task(SITE) | {"folders": [], "files": [str(office.records), str(site)]}
    task["socket"] = str(office.socket) + ".none"  # it would replace it
    found = office.place.attempt(SITE, task)
    found.pop("reach the server")
    assert found.pop("connect") == errno.errorcode[errno.ENOENT]
    assert found.pop("replace the socket") in CLOSED | {errno.errorcode[errno.ENOENT]}
    assert found.pop("trace") in ("done", errno.errorcode[errno.EPERM])  # Yama's ptrace_scope may forbid it to all
    assert {what: came for what, came in found.items() if came != "done"} == {}


def test_the_relays_folder_holds_no_key_that_opens_a_message(office: TwoUsers) -> None:
    secrets = [path.read_bytes() for path in office.branch.home.glob("keys/*/identity")]
    assert secrets
    held = [path for path in office.branch.relay_home.rglob("*") if path.is_file()]
    assert {path.name for path in held} == {"link", "link.pem", "ca.pem", "relay.json", "relay.log"}
    for path in held:
        data = path.read_bytes()
        assert not any(secret in data for secret in secrets)
        assert str(office.branch.home).encode() not in data, path
