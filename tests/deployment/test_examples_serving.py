"""docs/serving.md and docs/walkthrough.md are followed, command by command, and every example of asking is run against
a real `fedllm serve`.

The suite leaves out what needs packages of its own; `make soak` makes an environment for each client.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.office import init_office, install
from fedllm.cli.main import app
from server.federation import admit, init_federation
from tests.conftest import some_of_the_demo
from tests.deployment.harness import Program, free_port
from tests.deployment.test_docs import NAMESPACE, SYSTEMCTL, can_have_a_namespace, closed_to_others
from tests.fedllm.audit.conftest import any_pdf

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "serving"
PAGE, WALK = ROOT / "docs" / "serving.md", ROOT / "docs" / "walkthrough.md"
# What makes the run of the walk-through quick.
QUICK = {
    "fedllm simulate": "training.rounds=1 privacy.sampling_rate=0.05 privacy.self_check=false data.train=some.jsonl "
    "data.heldout_limit=8 data.samples=0 model.compile=off federation.processes=1 evaluation.every=null "
    "audit.canaries=0",
    "fedllm release evaluate": "--limit 8",
}
# What every Python of a desk starts with: it connects to this machine alone, and looks up no other's name.
CLOSED = """
import sys

def refuse(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1"):
        raise SystemExit(f"connects to {arguments[1]}")
    if event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "localhost"):
        raise SystemExit(f"looks up {arguments[0]}")

sys.addaudithook(refuse)
"""
NEEDED = pytest.mark.skipif(not all(map(shutil.which, ("curl", "openssl"))), reason="needs curl and openssl")


@dataclass(frozen=True)
class Block:
    """A fenced block: who uses it, and its commands."""

    who: str
    commands: list[str]


def blocks(page: Path) -> list[Block]:
    """Return the blocks of commands of a page; a line that ends with a backslash goes on."""
    found = re.findall(r"^```sh (\S+)\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [Block(who, text.replace("\\\n", "").splitlines()) for who, text in found]


def reaches_pypi() -> bool:
    """Whether pip can install from where it is told to."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "bm25s"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@dataclass
class Machine:
    """Head office, office and desk on one machine, in one home folder."""

    home: Path
    port: int
    variables: dict[str, str] = field(default_factory=dict)
    server: Program | None = None
    token: str = ""

    @property
    def desk(self) -> Path:
        return self.home / "desk"

    def __post_init__(self) -> None:
        self.desk.mkdir(parents=True)
        (self.desk / "examples").symlink_to(ROOT / "examples")
        (self.home / "closed").mkdir()
        (self.home / "closed" / "sitecustomize.py").write_text(CLOSED)
        self.variables = {
            **os.environ, "HOME": str(self.home), "COLUMNS": "200",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        self.variables.pop("FEDLLM_HOME", None)

    def do(self, line: str) -> str:
        """Type one command of a page; return what it says."""
        line = line.replace("127.0.0.1:8443", f"127.0.0.1:{self.port}")
        words = shlex.split(line)
        if words[:2] == ["fedllm", "serve"] and words[2] != "token":
            self._serve(words)
            return ""
        if words[0] == "fedllm" and not re.search("[|>&]", line):
            said = self._type_here(words[1:])
            if words[:4] == ["fedllm", "serve", "token", "add"]:
                self.token = said.strip()
            return said
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            self.variables[name] = self.token if name == "FEDLLM_TOKEN" else value.replace("~", str(self.home))
            return ""
        places = [str(self.home / "closed"), *filter(None, [os.environ.get("PYTHONPATH")])]
        closed = {} if "pip" in line or "venv" in line else {"PYTHONPATH": os.pathsep.join(places)}
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, timeout=1500, check=False, cwd=self.desk,
            env={**self.variables, **closed},
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _serve(self, words: list[str]) -> None:
        arguments = [word.replace("~", str(self.home)) for word in words[1:] if word not in (">", "serve.log", "&")]
        self.server = Program(
            [*arguments, "--port", str(self.port)], self.desk / "serve.log", prefix=["env", "-C", str(self.desk)],
            env=self.variables,
        )  # fmt: skip
        self.server.started("serving ")

    def _type_here(self, words: list[str]) -> str:
        """Run a command of fedllm in this process, which spares the imports."""
        before, mask = dict(os.environ), os.umask(0o077)
        os.environ.update(self.variables)
        try:
            with contextlib.chdir(self.desk), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as outside of pytest
                done = CliRunner().invoke(app, [word.replace("~", str(self.home)) for word in words])
        finally:
            os.environ.clear()
            os.environ.update(before)
            os.umask(mask)
        assert done.exit_code == 0, f"{words}\n{done.output}\n{done.exception}"
        return done.output


@contextlib.contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    """Yield a machine; what it serves ends with it."""
    made = Machine(folder / "home", free_port())
    try:
        yield made
    finally:
        if made.server is not None:
            made.server.stop()


def admitted_site(folder: Path, home: Path) -> None:
    """Make a federation, and in a home folder a site that was admitted to it."""
    (folder / "federation.yaml").write_text("name: Hanbit Bank\nhost: head.example.com\n", "utf-8")
    head = init_federation(folder / "federation.yaml", folder / "head")
    site = init_office(home / ".fedllm" / "site", "seoul-gangnam")
    grant = admit(head.folder, site.join_file.read_bytes(), site.identity.public.fingerprint)
    install(site.folder, grant.read_bytes(), head.identity.public.fingerprint)


@pytest.fixture(scope="module", name="walked")
def _walked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, list[str]]]:
    """A machine on which the commands of the walk-through have run, and what each has said."""
    with machine(tmp_path_factory.mktemp("walk")) as here, any_pdf():
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some_of_the_demo())
        (here.desk / "some.jsonl").write_text(rows, "utf-8")
        lines = [line for block in blocks(WALK) for line in block.commands]
        quick = {line: [more for command, more in QUICK.items() if line.startswith(command)] for line in lines}
        yield here, [here.do(" ".join([line, *quick[line]])) for line in lines]


@pytest.mark.timeout(1800)
@NEEDED
def test_the_walk_through_comes_from_records_to_a_korean_answer(walked: tuple[Machine, list[str]]) -> None:
    said = walked[1]
    answer = json.loads(next(text for text in said if text.startswith("{")))
    assert re.search("[가-힣]", answer["choices"][0]["message"]["content"])
    assert "who=me" in said[-1]  # the log, which the page shows
    assert "통장" not in said[-1]


@pytest.mark.timeout(3600)
@NEEDED
@pytest.mark.parametrize("installs", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_finished_run_comes_to_answers_over_tls_as_the_page_says(
    tmp_path: Path, walked: tuple[Machine, list[str]], installs: bool
) -> None:
    if installs and not reaches_pypi():
        pytest.skip("pip reaches no index: the clients' packages cannot be installed")
    run = walked[0].desk / "runs" / "desk"
    with machine(tmp_path) as here:
        admitted_site(tmp_path, here.home)
        (here.desk / "runs").mkdir()
        (here.desk / "runs" / "demo").symlink_to(run)
        shutil.copy(run / "trusted-keys.txt", here.desk)
        asked = 0
        for line in (line for block in blocks(PAGE) if block.who != "root" for line in block.commands):
            if not installs:
                line = line.replace("openai/bin/", "")  # it is installed for the tests
                if "/bin/" in line or "venv" in line or line.startswith("pip "):
                    continue
            said = here.do(line)
            if "examples/serving/" in line:
                asked += 1
                assert re.search("[가-힣]", said), line
        assert here.server is not None
        log = here.server.text()
    answered = re.findall(r" 200 POST /v1/chat/completions who=desk-3 in=\d+ out=\d+ \d+ms$", log, flags=re.MULTILINE)
    assert len(answered) >= asked >= 2
    assert here.token not in log


@pytest.mark.soak
@pytest.mark.timeout(1800)
@NEEDED
@pytest.mark.skipif(not can_have_a_namespace(), reason="needs root and leave to make namespaces")
@pytest.mark.skipif(any(place.startswith("/tmp/") for place in closed_to_others()), reason="Python lies below /tmp")
def test_administrators_come_to_a_service_of_its_own_user(tmp_path: Path, walked: tuple[Machine, list[str]]) -> None:
    you, tools = tmp_path / "you", tmp_path / "tools"
    admitted_site(tmp_path, you)
    shutil.copytree(walked[0].desk / "desk", you / "release")
    shutil.copy(walked[0].desk / "runs" / "desk" / "trusted-keys.txt", you)
    tools.mkdir()
    (tools / "systemctl").write_text(SYSTEMCTL)
    (tools / "systemctl").chmod(0o755)
    [lines] = [block.commands for block in blocks(PAGE) if block.who == "root"]
    script = "\n".join(lines).replace("/home/you", str(you))
    checks = """
until_said "answers, over TLS 1.3" runuser -u fedllm-serve -- fedllm doctor --home /var/lib/fedllm-serve
curl --silent --fail --cacert $SITE/keys/ca.pem https://127.0.0.1:8443/health
! runuser -u fedllm-serve -- cat $SITE/keys/1/serving 2>/dev/null
"""
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--net", "bash", "-c",
         f"{NAMESPACE}ip link set lo up; mkdir $T/desk; cd $T/desk\n{script}{checks}"],
        capture_output=True, text=True, timeout=1500, check=False, stdin=subprocess.DEVNULL,
        env={**walked[0].variables, "T": str(tmp_path), "STARTED": "fedllm-serve", "SITE": f"{you}/.fedllm/site",
             "HIDDEN": " ".join(closed_to_others()), "PATH": f"{tools}:{walked[0].variables['PATH']}:/usr/sbin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_korean_walk_through_has_the_commands_and_headings_of_the_english_one() -> None:
    korean, english = (page.read_text("utf-8") for page in (ROOT / "docs" / "walkthrough.ko.md", WALK))
    fences, headings = (re.compile(r"^```.*?^```", re.M | re.S), re.compile(r"^##? ", re.M))
    assert fences.findall(korean) == fences.findall(english)
    assert len(headings.findall(korean)) == len(headings.findall(english))


def test_every_example_is_on_the_page_and_every_command_of_the_page_is_run() -> None:
    for example in EXAMPLES.glob("*.*"):
        assert f"examples/serving/{example.name}" in PAGE.read_text("utf-8"), example.name
    for page in (PAGE, WALK):
        for kind, block in re.findall(r"^```(.*)\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
            assert kind.startswith("sh ") or not re.search("^fedllm ", block, re.MULTILINE)


def test_no_example_trusts_a_server_that_it_cannot_verify() -> None:
    for example in EXAMPLES.glob("ask_*"):
        text = example.read_text("utf-8")
        assert "FEDLLM_CA" in text
        assert not re.search(r"verify=False|--insecure|-k |CERT_NONE|check_hostname", text), example.name
