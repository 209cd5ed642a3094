"""A base model is the same at every party, known by its weights, and refused with a remedy where it cannot be used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedllm.config import ModelConfig
from fedllm.errors import ConfigError, FedllmError, ModelError
from fedllm.training.model import load_base, weights_digest
from fedllm.values import parse

MakeConfig = Callable[[str], ModelConfig]
FolderOf = Callable[[str], Path]


@pytest.fixture
def folder(base_folder: FolderOf, tmp_path: Path) -> Path:
    """A copy of a tiny Llama that a test may spoil."""
    return Path(shutil.copytree(base_folder("llama"), tmp_path / "base"))


def spoil(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**values, **changes}), "utf-8")


@pytest.mark.parametrize("case", ["llama", "bert-native", "bert-mean", "gpt2-native"])
def test_every_party_loads_the_same_weights_whatever_its_generators(model_config: MakeConfig, case: str) -> None:
    digests = set()
    for seed in (1, 2):
        torch.manual_seed(seed)  # a head that the checkpoint lacks is drawn, and must not differ
        digests.add(load_base(model_config(case), "cpu").digest)
    assert len(digests) == 1


@pytest.mark.parametrize("case", ["llama", "bert-native", "bert-mean"])
def test_loading_leaves_the_global_generators_alone(model_config: MakeConfig, case: str) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    load_base(model_config(case), "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_single_changed_bit_of_the_weights_changes_the_digest(model_config: MakeConfig) -> None:
    base = load_base(model_config("llama"), "cpu")
    assert weights_digest(base.model) == base.digest
    for name, p in list(base.model.named_parameters()):
        before = p.data.clone()
        flat = p.data.view(-1)
        flat[-1] = float(np.nextafter(np.float32(flat[-1]), np.float32(np.inf)))
        assert weights_digest(base.model) != base.digest, name
        p.data.copy_(before)
    assert weights_digest(base.model) == base.digest


def test_a_model_is_loaded_in_float32_and_without_dropout(model_config: MakeConfig) -> None:
    for case in ("llama", "gpt2", "bert-native"):
        model = load_base(model_config(case), "cpu").model
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not any(module.training for module in model.modules())


def test_a_tokenizer_without_padding_pads_with_its_end_token(folder: Path) -> None:
    spoil(folder / "tokenizer_config.json", pad_token=None)
    base = load_base(ModelConfig(source=str(folder), max_length=64), "cpu")
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == 2


def test_a_tokenizer_without_padding_and_end_is_refused(folder: Path) -> None:
    spoil(folder / "tokenizer_config.json", pad_token=None, eos_token=None)
    with pytest.raises(ModelError, match="neither a pad nor an eos"):
        load_base(ModelConfig(source=str(folder), max_length=64), "cpu")


def test_records_longer_than_the_model_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.max_length=129.*128"):
        load_base(ModelConfig(source=str(folder), max_length=129), "cpu")


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_a_folder_with_a_part_missing_is_refused_with_what_it_needs(folder: Path, lost: str) -> None:
    (folder / lost).unlink()
    with pytest.raises(ModelError, match=r"config\.json, weights and tokenizer files"):
        load_base(ModelConfig(source=str(folder), max_length=64), "cpu")


@pytest.mark.parametrize("lost", ["tokenizer.json", "tokenizer_config.json"])
def test_a_folder_without_its_tokenizer_is_refused_or_completed(folder: Path, lost: str) -> None:
    (folder / lost).unlink()
    try:
        base = load_base(ModelConfig(source=str(folder), max_length=64), "cpu")
    except ModelError:
        return
    assert base.tokenizer("ab")["input_ids"]  # what could be loaded must be able to read


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "up_proj" in name)
    weights[name][0, 0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} holds what is no number"):
        load_base(ModelConfig(source=str(folder), max_length=64), "cpu")


@pytest.mark.parametrize("damaged", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"garbage" * 100], ids=["empty", "cut", "garbage"])
def test_a_damaged_file_is_an_error_of_ours(folder: Path, damaged: str, content: bytes) -> None:
    (folder / damaged).write_bytes(content)
    with pytest.raises(FedllmError):
        load_base(ModelConfig(source=str(folder), max_length=64), "cpu")


def test_a_pointer_in_the_place_of_weights_is_named(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        load_base(ModelConfig(source=str(folder), max_length=64), "cpu")


def test_weights_cut_short_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError):
        load_base(ModelConfig(source=str(folder), max_length=64), "cpu")


def test_weights_with_a_layer_missing_are_refused(folder: Path) -> None:
    """transformers would fill it in at random, and go on."""
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "up_proj" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"lack {lost}"):
        load_base(ModelConfig(source=str(folder), max_length=64), "cpu")
    for pooling in ("native", "mean"):
        values = {"source": str(folder), "max_length": 64, "task": "classification", "labels": ["a", "b"]}
        with pytest.raises(ModelError, match=lost.removeprefix("model.")):
            load_base(parse(ModelConfig, {**values, "pooling": pooling}), "cpu")


def test_an_encoder_is_no_causal_model(base_folder: FolderOf) -> None:
    """Its head would be drawn at random, and differ between the parties."""
    with pytest.raises(ModelError, match=r"model\.task"):
        load_base(ModelConfig(source=str(base_folder("bert")), max_length=32), "cpu")


@pytest.mark.parametrize("case", ["bert-native", "bert-mean", "gpt2-native"])
def test_a_new_head_is_no_news(model_config: MakeConfig, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    load_base(model_config(case), "cpu")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "source", ["./no/such/folder", "/no/such/folder", "~/no/such/model", "pkg://no_such_package/x", "pkg://"]
)
def test_a_place_where_no_model_is_is_a_config_error(source: str) -> None:
    with pytest.raises(ConfigError):
        load_base(ModelConfig(source=source), "cpu")


def test_quantised_weights_are_refused_with_the_remedy(folder: Path, model_config: MakeConfig) -> None:
    spoil(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    config = model_config("llama").model_copy(update={"source": str(folder)})
    with pytest.raises(ModelError, match=r"quantised weights.*model\.dtype=bfloat16"):
        load_base(config, "cpu")
