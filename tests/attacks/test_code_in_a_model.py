"""Attack: a model or data set that brings code of its own, which the library that reads it would run: a module, or a
pickle of weights.

Stopped by saying so at every call of a loader: without a word, transformers may ask whoever sits at the terminal, and
reads pickles, if with a reader that refuses most of what they can hold.
"""

import ast
import json
import shutil
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file

from fedllm.config import ModelConfig
from fedllm.errors import ModelError, ReleaseError
from fedllm.release.loading import _with_adapter
from fedllm.release.manifest import Manifest
from fedllm.training.model import files_digest, load_base

ROOT = Path(__file__).parents[2]
# loads weights into a model that is there, by a configuration that names no code
WITHOUT_CODE = {"PeftModel.from_pretrained"}
WITHOUT_WEIGHTS = {"AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained"}


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
        load_base(ModelConfig(source=str(model), max_length=64), "cpu")
    assert not trace.exists()


def test_weights_in_a_pickle_are_refused_harmless_or_not(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    weights = load_file(model / "model.safetensors")
    load_base(ModelConfig(source=str(model), max_length=64), "cpu")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    config = ModelConfig(source=str(model), max_length=64)
    refused = pytest.raises(ModelError, match=r"no model\.safetensors.*may bring code.*save_pretrained")
    with refused:
        load_base(config, "cpu")
    with refused:  # and by `fedllm site check`
        files_digest(config, {})


def test_an_adapter_in_a_pickle_is_no_release(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ReleaseError, match=r"holds no adapter_model\.safetensors"):
        _with_adapter(tmp_path, cast(Manifest, None), "cpu")


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
                said = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
                calls += 1
                where = f"{file.relative_to(ROOT)}:{node.lineno}: {name}"
                if name not in WITHOUT_CODE and said.get("trust_remote_code") is not False:
                    silent.append(where)
                weighs = name.endswith(".from_pretrained") and name not in WITHOUT_CODE | WITHOUT_WEIGHTS
                if weighs and said.get("use_safetensors") is not True:
                    silent.append(f"{where}, of weights")
    assert silent == []
    assert calls >= 6, "or the loaders have another name now"
