"""Bases in 8 and 4 bits: what is stored, what is computed, and that the adapter belongs to the base as it was."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedllm.config import ModelConfig
from fedllm.errors import ModelError
from fedllm.training import quantised
from fedllm.training.adapter import AdapterModel, check_saved
from fedllm.training.engine import Engine
from fedllm.training.model import load_base, weights
from fedllm.training.quantised import QuantisedLinear, missing_for_nf4
from tests.fedllm.training.conftest import conv1d

Open = Callable[..., AdapterModel]
MakeConfig = Callable[[str], ModelConfig]
KINDS = ("int8", "nf4")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 24), (48, 96), (33, 17), (256, 512)])
def test_a_layer_multiplies_by_its_rounded_weights_and_passes_gradients_through_them(
    kind: Any, inputs: int, outputs: int
) -> None:
    """Also where rows are multiples of 16 values and not of 64, for which bitsandbytes' own kernel is wrong."""
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs).requires_grad_(False)
    layer = QuantisedLinear(plain.weight, plain.bias, kind)
    most = 0.5 / 127 if kind == "int8" else 0.16  # of the largest weight: half of the widest gap between two values
    assert float((layer.weight - plain.weight).abs().max()) <= most * float(plain.weight.abs().max()) * 1.01
    x = torch.randn(3, 5, inputs, requires_grad=True)
    expected = nn.functional.linear(x, layer.weight, plain.bias)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    for found, right in zip(
        torch.autograd.grad(layer(x).square().sum(), x), torch.autograd.grad(expected.square().sum(), x), strict=True
    ):
        assert torch.allclose(found, right, atol=1e-4)
    held = sum(part.numel() * part.element_size() for part in layer.buffers())
    assert inputs < 100 or held <= {"int8": 0.28, "nf4": 0.16}[kind] * 4 * inputs * outputs


@conv1d
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["llama", "gpt2", "bert-native"])
def test_the_base_is_named_by_its_original_weights_and_what_is_trained_stays_as_it_is(
    open_adapter: Open, model_config: MakeConfig, case: str, kind: str
) -> None:
    plain, adapter = open_adapter(case), open_adapter(case, quantize=kind)
    assert adapter.spec == plain.spec
    assert np.array_equal(adapter.initial, plain.initial)
    assert weights(adapter.model) == weights(plain.model)
    base = load_base(model_config(case).model_copy(update={"quantize": kind}), "cpu")
    inner = {name for name, module in base.model.named_modules() if isinstance(module, QuantisedLinear)}
    assert inner
    assert not [name for name in inner if name in base.new or name.startswith(("lm_head", "classifier"))]


@conv1d
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_a_saved_adapter_is_compared_on_a_quantised_base_and_loads_on_the_plain_one(
    open_adapter: Open, model_config: MakeConfig, random_vector: Any, tmp_path: Path, case: str, kind: str
) -> None:
    adapter = open_adapter(case, quantize=kind)
    config = model_config(case)
    Engine(adapter)
    final = random_vector(adapter)
    adapter.save(final, tmp_path, config.source)
    assert check_saved(tmp_path, adapter, final, config.model_copy(update={"quantize": kind, "dtype": "float32"}))
    loaded = PeftModel.from_pretrained(load_base(config, "cpu").model, str(tmp_path))
    ids = torch.arange(3, 12)[None]
    adapter.load(final)
    with torch.no_grad():
        mine, others = (model(input_ids=ids).logits for model in (adapter.model, loaded.eval()))
    assert float((mine - others).norm() / others.norm()) < {"int8": 0.1, "nf4": 0.6}[kind]  # the base is another
    loaded.merge_and_unload()


def test_nf4_is_what_transformers_loads_with_bitsandbytes_and_the_adapter_fits_there(
    open_adapter: Open, model_config: MakeConfig, random_vector: Any, tmp_path: Path
) -> None:
    adapter, source = open_adapter("llama", quantize="nf4"), model_config("llama").source
    Engine(adapter)
    final = random_vector(adapter)
    adapter.load(final)
    adapter.save(final, tmp_path, source)
    stock = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, device_map="cpu",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )  # fmt: skip
    theirs = stock.model.layers[0].self_attn.q_proj.weight
    mine = adapter.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert torch.equal(mine.codes, theirs.data)
    assert torch.equal(mine.scales, theirs.quant_state.absmax)
    PeftModel.from_pretrained(stock, str(tmp_path))


def test_without_bitsandbytes_one_error_says_what_to_install(
    model_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = model_config("llama")
    with pytest.raises(ModelError, match=r"model\.quantize=nf4 needs bitsandbytes.*pip install 'fedllm\[quantize\]'"):
        load_base(config.model_copy(update={"quantize": "nf4"}), "cpu")
    load_base(config.model_copy(update={"quantize": "int8"}), "cpu")
    assert importlib.util.find_spec("bitsandbytes") is None
    assert "pip install" in missing_for_nf4()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_are_refused(kind: Any) -> None:
    weight = torch.ones(4, 64)
    weight[1, 3] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinite"):
        QuantisedLinear(weight, None, kind)


def test_many_values_are_quantised_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(10, 100)
    whole = QuantisedLinear(weight, None, "nf4")
    monkeypatch.setattr(quantised, "_AT_ONCE", 128)
    assert torch.equal(QuantisedLinear(weight, None, "nf4").weight, whole.weight)
