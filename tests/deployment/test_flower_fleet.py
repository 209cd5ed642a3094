"""The same apps on Flower's own SuperLink and a SuperNode, as docs/flower.md says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deployment.harness import Branch, HeadOffice, Program, fedllm, free_port, records_of, settings, until

pytestmark = [pytest.mark.deployment, pytest.mark.soak]
BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def test_a_prepared_run_completes_on_a_stock_superlink(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("s")
    head = HeadOffice(folder)
    branch = Branch(folder, "busan", records_of("busan-haeundae", folder / "records.jsonl"), relayed=True)
    branch.join(head)
    runtime, node = free_port(), free_port()
    flower = folder / "flower"
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    env = {**QUIET, "FLWR_HOME": str(flower), "FEDLLM_HOME": str(head.home), "PATH": path, "TMPDIR": str(folder)}
    socket = str(branch.office.socket if branch.office.socket else "")
    config = f'site="busan" socket={json.dumps(socket)}'
    programs = [
        Program(["--insecure", "--host", "127.0.0.1", "--port", str(runtime), "--isolation", "subprocess"],
                folder / "superlink.log", env=env, command=[str(BIN / "flower-superlink")]),
        Program(["--insecure", "--superlink", f"127.0.0.1:{runtime}", "--host", "127.0.0.1", "--port", str(node),
                 "--node-config", config], folder / "supernode.log", env=env, command=[str(BIN / "flower-supernode")]),
        Program(["site", "start", "--home", str(branch.home)], folder / "site.log"),
    ]  # fmt: skip
    try:
        for program in programs:
            program.start()
        done = fedllm("submit", *settings("first", 2), "federation.quorum=1", "--prepare", "--home", str(head.home))
        assert done.returncode == 0, done.stdout + done.stderr
        app = folder / "app"
        app.mkdir()
        shutil.copy(ROOT / "pyproject.toml", app)
        for name in ("README.md", "LICENSE"):
            shutil.copy(ROOT / name, app)
        flower.mkdir(exist_ok=True)
        (flower / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{runtime}"\ninsecure = true\n'
        )
        run = subprocess.run(
            [str(BIN / "flwr"), "run", str(app), "own", "--run-config", 'run="first"'],
            capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **env},
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        until(lambda: head.status("first").state in ("completed", "stopped"), 600, "the end of the run", pause=1.0)
        assert head.status("first").state == "completed", head.status("first").text
        assert [record.answered for record in head.rounds("first")][1:] == [["busan"], ["busan"]]
        assert len(branch.charged()) == 2
    finally:
        for program in programs:
            program.stop()
