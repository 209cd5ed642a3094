"""Tiny models of several families with random weights, and units of random tokens for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fedllm.config import AdapterConfig, ModelConfig
from fedllm.training.adapter import AdapterModel, attach
from fedllm.training.data import IGNORE, Example, PrivacyUnit
from fedllm.training.model import load_base

conv1d = pytest.mark.filterwarnings(  # PEFT turns the flag round for GPT-2's layers, as it must, and warns of it
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning"
)

LABELS = ("긍정", "부정", "중립")
_COMMON: dict[str, Any] = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ROTARY: dict[str, Any] = {
    **_COMMON, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_BERT: dict[str, Any] = {
    "vocab_size": 259, "pad_token_id": 0, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip


def _build(family: str) -> PreTrainedModel:
    torch.manual_seed(1)
    if family == "gpt2":  # Conv1D instead of Linear
        return GPT2LMHeadModel(GPT2Config(**_COMMON, n_embd=16, n_layer=2, n_head=4, n_positions=128))
    if family == "bert":
        return BertModel(BertConfig(**_BERT))
    if family == "qwen2":  # grouped queries, biases, tied embeddings
        return Qwen2ForCausalLM(Qwen2Config(**_ROTARY, tie_word_embeddings=True))
    if family == "gemma2":  # caps its logits after the output head
        config = Gemma2Config(**_ROTARY, head_dim=4, final_logit_softcapping=1.5, query_pre_attn_scalar=4)
        model = Gemma2ForCausalLM(config)
        model.get_input_embeddings().weight.data *= 20  # logits that the cap bends
        return model
    untied = LlamaForCausalLM(LlamaConfig(**_ROTARY, tie_word_embeddings=False))
    untied.get_output_embeddings().weight.data *= 20  # logits large enough to learn something by heart
    return untied


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[[str], Path]:
    """Return a function that gives the folder of a tiny base model by family."""
    folders = {"llama": tiny_llama}  # tied embeddings, grouped queries

    def folder_of(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            state = torch.random.get_rng_state()
            _build(family).save_pretrained(folders[family])
            torch.random.set_rng_state(state)
            PreTrainedTokenizerFast.from_pretrained(tiny_llama).save_pretrained(folders[family])
        return folders[family]

    return folder_of


@pytest.fixture(scope="session")
def model_config(base_folder: Callable[[str], Path]) -> Callable[[str], ModelConfig]:
    """Return a function that gives the ModelConfig of a case such as gpt2, bert-native or bert-mean."""

    def config_of(case: str) -> ModelConfig:
        family, _, pooling = case.partition("-")
        if pooling in ("native", "mean"):
            return ModelConfig(
                source=str(base_folder(family)), task="classification", labels=LABELS, pooling=pooling, max_length=64
            )
        return ModelConfig(source=str(base_folder(case)), max_length=64)

    return config_of


@pytest.fixture(scope="session")
def open_adapter(model_config: Callable[[str], ModelConfig]) -> Callable[..., AdapterModel]:
    """Return a function that puts a fresh adapter on a fresh base of a case."""

    def open_case(
        case: str, seed: int = 0, dtype: str = "float32", quantize: str = "none", **adapter: Any
    ) -> AdapterModel:
        config = model_config(case).model_copy(update={"dtype": dtype, "quantize": quantize})
        values = {"rank": 2, "alpha": 4.0, "train": "AB", **adapter}
        return attach(load_base(config, "cpu"), config, AdapterConfig(**values), seed)

    return open_case


@pytest.fixture(scope="session")
def make_units() -> Callable[..., list[PrivacyUnit]]:
    """Return a function that gives units of random records; `sizes` are records a unit."""

    def make(
        case: str = "llama", sizes: tuple[int, ...] = (1, 3, 1, 2, 1), seed: int = 0, low: int = 3, high: int = 250
    ) -> list[PrivacyUnit]:
        generator = np.random.default_rng(seed)
        units = []
        for size in sizes:
            records = []
            for _ in range(size):
                ids = generator.integers(low, high, size=int(generator.integers(4, 24)))
                labels = np.where(np.arange(len(ids)) < len(ids) // 3, IGNORE, ids)
                if case.endswith(("-native", "-mean")):
                    labels = np.asarray(int(generator.integers(0, len(LABELS))))
                records.append(Example(ids, labels))
            units.append(tuple(records))
        return units

    return make


@pytest.fixture(scope="session")
def random_vector() -> Callable[[AdapterModel], NDArray[np.float32]]:
    """Return a function that gives adapter values at which no gradient vanishes, unlike the initial ones."""

    def vector_of(adapter: AdapterModel, seed: int = 5) -> NDArray[np.float32]:
        return np.random.default_rng(seed).normal(0, 0.2, adapter.spec.dimension).astype(np.float32)

    return vector_of
