"""Attack: a model or data set that brings code of its own, which the library that reads it would run.

Stopped by saying so at every call of a loader: without a word, transformers may ask whoever sits at the terminal.
"""

import ast
import json
import shutil
from pathlib import Path

import pytest

from fedllm.config import ModelConfig
from fedllm.errors import ModelError
from fedllm.training.model import load_base

ROOT = Path(__file__).parents[2]
# loads weights into a model that is there, by a configuration that names no code
WITHOUT_CODE = {"PeftModel.from_pretrained"}


def test_a_model_with_code_of_its_own_is_refused_and_the_code_not_run(tiny_llama: Path, tmp_path: Path) -> None:
    model, trace = tmp_path / "model", tmp_path / "it-ran"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text("utf-8"))
    config |= {"model_type": "own", "auto_map": {
        "AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoTokenizer": "own.OwnTokenizer",
    }}  # fmt: skip
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    (model / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\n", "utf-8")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(ModelConfig(source=str(model)), "cpu")
    assert not trace.exists()


def test_every_call_of_a_loader_says_that_no_code_is_to_be_run() -> None:
    calls, silent = 0, []
    for package in ("fedllm", "client", "server", "simulations"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
                    continue
                name = ast.unparse(node.func)
                if name.rpartition(".")[2] not in ("from_pretrained", "load_dataset", "from_config", "pipeline"):
                    continue
                said = {word.arg: word.value for word in node.keywords}.get("trust_remote_code")
                calls += 1
                if name not in WITHOUT_CODE and not (isinstance(said, ast.Constant) and said.value is False):
                    silent.append(f"{file.relative_to(ROOT)}:{node.lineno}: {name}")
    assert silent == []
    assert calls >= 6, "or the loaders have another name now"
