"""Nothing that comes over the link is ever run: the site's process has nothing that could run it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.protocol.link_pb2 import ToSite

ROOT = Path(__file__).parents[2]
# What runs text, bytes or a program: by itself, or as the last name of a call; and modules that do nothing else.
_BUILTINS = {"eval", "exec", "compile", "__import__"}
_CALLS = {
    "import_module", "system", "popen", "Popen", "run_path", "run_module", "execv", "execve", "execvp", "spawnv",
    "fork", "posix_spawn", "create_subprocess_exec", "create_subprocess_shell",
}  # fmt: skip
_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "subprocess", "runpy", "code", "ctypes"}
_COMMAND = "fedllm/cli/runs.py"  # `site start`: it executes itself anew, with its own arguments


@pytest.fixture(scope="module", name="loaded")
def _loaded() -> dict[str, str]:
    """The modules of a site's process, and the files of those that are fedllm's."""
    code = (
        "import json, sys, fedllm.cli, fedllm.cli.runs, client.service, fedllm.training.model_context\n"
        "import fedllm.training.trainer, fedllm.training.self_check\n"
        "print(json.dumps({name: getattr(each, '__file__', None) or '' for name, each in sys.modules.items()}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def _calls(tree: ast.Module) -> set[str]:
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                found |= {node.func.id} & (_BUILTINS | _CALLS)
            else:
                found |= {getattr(node.func, "attr", "")} & _CALLS
    return found


def _imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_nothing_that_a_sites_process_loads_of_fedllm_runs_code_or_programs(loaded: dict[str, str]) -> None:
    own = {Path(file) for file in loaded.values() if file and Path(file).is_relative_to(ROOT)}
    own = {path for path in own if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("fedllm", "client")}
    assert {ROOT / "client" / name for name in ("service.py", "link.py", "site.py")} <= own
    for path in own:
        name, tree = path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf-8"))
        assert _calls(tree) == ({"execv"} if name == _COMMAND else set()), name
        assert _imports(tree) & _MODULES == set(), name
        for node in ast.walk(tree):  # models bring no code of their own
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), name
                assert node.value.value is False, name


def test_a_sites_process_listens_nowhere_so_that_it_has_no_metrics_to_give(loaded: dict[str, str]) -> None:
    """Nor health, nor reflection: the relay is a process of its own, and holds nothing that could be counted."""
    listening = {"bind", "listen", "start_server", "start_unix_server", "serve_forever", "add_insecure_port",
                 "add_secure_port"}  # fmt: skip
    own = {Path(file) for file in loaded.values() if file and Path(file).is_relative_to(ROOT)}
    own = {path for path in own if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("fedllm", "client")}
    assert ROOT / "client" / "service.py" in own
    for path in own:
        names = {node.attr for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)}
        assert names & listening == set(), path
    assert {name for name in loaded if name.partition(".")[0] in ("prometheus_client", "opentelemetry")} == set()
    assert "grpc_reflection" not in loaded


def test_a_sites_process_starts_itself_anew_with_its_own_arguments_alone() -> None:
    tree = ast.parse((ROOT / _COMMAND).read_text("utf-8"))
    [call] = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "execv"
    ]
    names = {node.id for node in ast.walk(call) if isinstance(node, ast.Name)}
    assert names <= {"os", "sys", "str", "folder"}


def test_a_sites_process_holds_no_framework_that_runs_what_a_server_sends(loaded: dict[str, str]) -> None:
    assert {name for name in loaded if name.partition(".")[0] in ("flwr", "ray")} == set()


def test_a_frame_can_say_nothing_but_what_is_asked_and_that_it_is_not_asked_any_more() -> None:
    [choice] = ToSite.DESCRIPTOR.oneofs
    kinds = {field.name: field.message_type.name for field in choice.fields}
    assert kinds.pop("request") == "Part"
    assert set(kinds) <= {"welcome", "cancel", "end"}
    assert [field.name for field in ToSite.DESCRIPTOR.fields] == [field.name for field in choice.fields]
