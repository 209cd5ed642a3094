"""An adapter is the same at every party that agrees on its description, and survives saving, loading and training."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

import fedllm.training.adapter
from fedllm.config import AdapterConfig, ModelConfig
from fedllm.errors import ModelError, SpecMismatch
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import OsRandomness
from fedllm.training.adapter import AdapterModel, attach, check_saved
from fedllm.training.data import PrivacyUnit
from fedllm.training.engine import Engine
from fedllm.training.model import load_base
from tests.fedllm.training.conftest import conv1d

Open = Callable[..., AdapterModel]
MakeConfig = Callable[[str], ModelConfig]
MakeUnits = Callable[..., list[PrivacyUnit]]
RandomVector = Callable[[AdapterModel], NDArray[np.float32]]
CASES = ["llama", "qwen2", "bert-native", "bert-mean", "llama-native"]


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(5, 45).reshape(2, 20)
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return result


@pytest.mark.parametrize("case", CASES)
def test_values_that_are_loaded_are_read_back(open_adapter: Open, random_vector: RandomVector, case: str) -> None:
    adapter = open_adapter(case)
    vector = random_vector(adapter)
    adapter.load(vector)
    assert adapter.vector().tobytes() == vector.tobytes()
    assert adapter.vector().shape == (adapter.spec.dimension,)


@pytest.mark.parametrize("case", CASES)
def test_every_value_lands_in_the_tensor_that_the_spec_names(
    open_adapter: Open, random_vector: RandomVector, case: str
) -> None:
    adapter = open_adapter(case)
    vector = random_vector(adapter)
    adapter.load(vector)
    parameters = dict(adapter.model.named_parameters())
    for name, values in adapter.spec.split(vector).items():
        assert parameters[name].requires_grad
        assert np.array_equal(parameters[name].detach().numpy(), values)
    assert {name for name, p in parameters.items() if p.requires_grad} == {t.name for t in adapter.spec.tensors}


def test_a_vector_is_a_copy_in_both_directions(open_adapter: Open, random_vector: RandomVector) -> None:
    adapter = open_adapter("llama")
    vector = random_vector(adapter)
    adapter.load(vector)
    before = vector.copy()
    read = adapter.vector()
    read += 1
    vector += 1
    assert np.array_equal(adapter.vector(), before)


def test_a_vector_of_another_adapter_is_refused_and_changes_nothing(open_adapter: Open) -> None:
    adapter, other = open_adapter("llama"), open_adapter("llama", rank=3)
    before = adapter.vector()
    for wrong in (other.vector(), adapter.vector().astype(np.float64), adapter.vector()[:-1]):
        with pytest.raises(SpecMismatch):
            adapter.load(wrong)
    assert np.array_equal(adapter.vector(), before)


@pytest.mark.parametrize("train", ["AB", "B"])
@pytest.mark.parametrize("case", ["llama", "bert-native", "bert-mean"])
def test_equal_arguments_give_equal_adapters_everywhere(open_adapter: Open, case: str, train: str) -> None:
    first = open_adapter(case, train=train)
    torch.manual_seed(999)  # another party's generators are in another state
    torch.randn(17)
    second = open_adapter(case, train=train)
    assert first.spec == second.spec
    assert first.spec.digest == second.spec.digest
    assert first.initial.tobytes() == second.initial.tobytes()
    assert torch.equal(logits(first.model), logits(second.model))


OTHERS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "rank": {"rank": 3, "alpha": 6.0},  # with the same scaling
    "alpha": {"alpha": 4.5},
    "targets": {"targets": ("q_proj",)},
    "targets of equal shape": {"targets": ("o_proj",)},
    "layers": {"layers": (0,)},
    "other layer": {"layers": (1,)},
    "train": {"train": "AB"},
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_adapter_has_another_digest(open_adapter: Open, other: str) -> None:
    values: dict[str, Any] = {"train": "B", "targets": ("q_proj", "v_proj")}
    digests = {open_adapter("llama", **values).spec.digest}
    digests.add(open_adapter("llama", **{**values, **OTHERS[other]}).spec.digest)
    assert len(digests) == 2


def test_another_base_has_another_digest(open_adapter: Open, model_config: MakeConfig) -> None:
    config = model_config("llama")
    adapter = AdapterConfig(rank=2, targets=("q_proj",))
    digest = attach(load_base(config, "cpu"), config, adapter, 0).spec.digest
    assert attach(load_base(config, "cpu"), config, adapter, 0).spec.digest == digest
    assert attach(replace(load_base(config, "cpu"), digest="0" * 64), config, adapter, 0).spec.digest != digest
    assert open_adapter("untied", train="B", targets=("q_proj",), rank=2, alpha=16.0).spec.digest != digest


def test_seeds_differ_in_the_frozen_part_that_a_vector_does_not_carry(open_adapter: Open) -> None:
    first, second = (open_adapter("llama", train="B", seed=seed) for seed in (0, 1))
    assert first.spec.frozen != second.spec.frozen
    assert first.spec.tensors == second.spec.tensors


def test_the_order_of_the_flat_vector_is_stable(open_adapter: Open) -> None:
    specs = [open_adapter("llama", targets=targets).spec for targets in (("q_proj", "v_proj"), ("v_proj", "q_proj"))]
    assert specs[0].tensors == specs[1].tensors
    assert specs[0].digest == specs[1].digest


def test_attaching_leaves_the_global_generators_alone(open_adapter: Open) -> None:
    torch.manual_seed(1)
    numpy_before, torch_before = np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    for case in ("llama", "bert-native"):
        open_adapter(case)
    assert torch.equal(torch.random.get_rng_state(), torch_before)
    assert np.random.get_state()[1].tolist() == numpy_before


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_adapter_changes_nothing(open_adapter: Open, model_config: MakeConfig, case: str) -> None:
    assert torch.allclose(logits(open_adapter(case).model), logits(load_base(model_config(case), "cpu").model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
@pytest.mark.parametrize("train", ["AB", "B"])
@pytest.mark.parametrize("case", CASES)
def test_a_saved_adapter_gives_the_same_logits_on_a_freshly_loaded_base(
    open_adapter: Open, model_config: MakeConfig, random_vector: RandomVector, make_units: MakeUnits, tmp_path: Path,
    case: str, train: str,
) -> None:  # fmt: skip
    adapter = open_adapter(case, train=train)
    adapter.load(random_vector(adapter))
    engine = Engine(adapter)  # as in a run: saved after training
    optimizer = engine.optimizer(
        torch.optim.SGD([adapter.flat], lr=0.01), Mechanism(1.0, 1.0, 0.5), 1.0, OsRandomness()
    )
    engine.step(optimizer, make_units(case), 8)
    expected = logits(adapter.model)
    config = model_config(case)
    final = adapter.vector()
    adapter.load(adapter.initial)  # whatever another site left in the shared model
    adapter.save(final, tmp_path / "adapter", config.source)
    base = load_base(config, "cpu").model
    assert not torch.allclose(logits(base), expected, atol=1e-3)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert torch.allclose(logits(loaded), expected, atol=1e-6)


@conv1d
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["llama", "gpt2", "bert-native", "bert-mean", "gpt2-native"])
def test_a_saved_adapter_is_loaded_as_its_users_will_and_compared(
    open_adapter: Open, model_config: MakeConfig, random_vector: RandomVector, tmp_path: Path, case: str, dtype: str
) -> None:
    adapter, config = open_adapter(case, dtype=dtype), model_config(case)
    Engine(adapter)
    final, before = random_vector(adapter), adapter.vector()
    adapter.save(final, tmp_path / "adapter", config.source)
    assert check_saved(tmp_path / "adapter", adapter, final, config)
    assert adapter.vector().tobytes() == before.tobytes()
    adapter.save(final * 1.5, tmp_path / "adapter", config.source)  # another one lies where this one should
    with pytest.raises(ModelError, match="not the one that was trained"):
        check_saved(tmp_path / "adapter", adapter, final, config)
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="does not load"):
        check_saved(tmp_path / "adapter", adapter, final, config)


def test_a_large_base_is_not_loaded_twice(
    open_adapter: Open, model_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedllm.training.adapter, "_RELOAD", 1000)
    adapter = open_adapter("llama")
    assert not check_saved(tmp_path, adapter, adapter.initial, model_config("llama"))


@pytest.mark.parametrize("damage", ["a value changed", "a tensor missing", "the values of another vector"])
def test_a_file_that_does_not_hold_the_adapter_is_found_at_once(
    open_adapter: Open, random_vector: RandomVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    adapter = open_adapter("bert-native")

    def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
        name = next(name for name in tensors if "lora_B" in name)
        if damage == "a value changed":
            tensors[name] = tensors[name].clone()
            tensors[name][0, 0] += 1e-3
        elif damage == "a tensor missing":
            del tensors[name]
        else:
            tensors = {name: value * 2 for name, value in tensors.items()}
        save_file(tensors, path)

    monkeypatch.setattr(fedllm.training.adapter, "save_file", write)
    with pytest.raises(ModelError, match="does not hold what was trained"):
        adapter.save(random_vector(adapter), tmp_path / "adapter", "base")


def test_a_saved_adapter_names_its_base_and_no_other_place(
    open_adapter: Open, model_config: MakeConfig, tmp_path: Path
) -> None:
    adapter = open_adapter("llama")
    adapter.save(adapter.initial, tmp_path / "adapter", model_config("llama").source)
    text = (tmp_path / "adapter" / "adapter_config.json").read_text("utf-8")
    assert f'"base_model_name_or_path": "{model_config("llama").source}"' in text


@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")
@pytest.mark.parametrize("base", ["pkg://simulations.demo/base", "someone/a-model-on-the-hub", "모델/기본"])
def test_an_adapter_can_be_saved_for_a_base_of_any_name(open_adapter: Open, tmp_path: Path, base: str) -> None:
    adapter = open_adapter("llama")
    adapter.save(adapter.initial, tmp_path / "adapter", base)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_b_leaves_a_and_the_base_untouched_bit_for_bit(
    open_adapter: Open, make_units: MakeUnits, optimizer: type[torch.optim.Optimizer]
) -> None:
    adapter = open_adapter("llama", train="B")
    before = {name: p.detach().clone() for name, p in adapter.model.named_parameters()}
    assert sum("lora_A" in name for name in before) == 14
    engine = Engine(adapter)
    wrapped = engine.optimizer(optimizer([adapter.flat], lr=0.5), Mechanism(1.0, 1.0, 0.5), 1.0, OsRandomness())
    for _ in range(3):
        engine.step(wrapped, make_units(), 4)
    for name, p in adapter.model.named_parameters():
        if "lora_B" in name:
            assert not torch.equal(p, before[name])
        else:
            assert p.detach().numpy().tobytes() == before[name].numpy().tobytes(), name


@pytest.mark.parametrize("targets", [("no_such_layer",), ("q_proj", "no_such_layer"), ("q_proj.weight",), ("",)])
def test_targets_that_do_not_exist_are_refused_with_the_layers_that_do(
    open_adapter: Open, targets: tuple[str, ...]
) -> None:
    with pytest.raises(ModelError) as error:
        open_adapter("llama", targets=targets)
    for layer in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert layer in str(error.value)


@conv1d
def test_the_layers_of_a_model_without_nn_linear_are_listed_too(open_adapter: Open) -> None:
    with pytest.raises(ModelError, match="c_attn"):
        open_adapter("gpt2", targets=("q_proj",))
    assert open_adapter("gpt2", targets=("c_attn",)).spec.dimension


@pytest.mark.parametrize("layers", [(2,), (0, 7)])
def test_layers_that_do_not_exist_are_refused(open_adapter: Open, layers: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="layers"):
        open_adapter("llama", targets=("q_proj",), layers=layers)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj",)])
def test_layers_limit_the_adapter_to_some_blocks(open_adapter: Open, targets: Any) -> None:
    names = [t.name for t in open_adapter("llama", targets=targets, layers=(1,)).spec.tensors]
    assert names
    assert all(".layers.1." in name for name in names)


@pytest.mark.parametrize("case", ["bert-native", "bert-mean"])
def test_every_trainable_tensor_of_a_classifier_takes_part_in_its_output(
    open_adapter: Open, random_vector: RandomVector, case: str
) -> None:
    adapter = open_adapter(case, train="B")
    adapter.load(random_vector(adapter))
    ids = torch.arange(5, 45).reshape(2, 20)
    adapter.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().sum().backward()
    idle = [name for name, p in adapter.trainable.items() if p.grad is None]
    assert not idle  # they would be sent as noise, and nothing else
