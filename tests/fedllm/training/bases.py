"""Tiny bases of many architectures, spoilt as real ones are."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

from fedllm.config import AdapterConfig, ModelConfig
from fedllm.training.adapter import AdapterModel, attach
from fedllm.training.model import load_base
from tests.conftest import byte_tokenizer

CAUSAL, MASKED = AutoModelForCausalLM, AutoModelForMaskedLM
LABELS = ("neg", "pos")
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def of_letters(letters: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few letters and four special tokens."""
    tokens = {token: number for number, token in enumerate([*SPECIAL.values(), *letters])}
    model = models.BPE(vocab=tokens, merges=[], unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **SPECIAL)


def make(folder: Path, kind: str, auto: Any = CAUSAL, tokenizer: Any = None, **settings: Any) -> Path:
    """Write a model of random weights, of an architecture by its name in transformers, with its tokenizer."""
    tokenizer = tokenizer or byte_tokenizer()
    values = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 66, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, **settings,
    }  # fmt: skip
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        auto.from_config(AutoConfig.for_model(kind, **values)).save_pretrained(folder)
    finally:
        transformers.logging.set_verbosity(verbosity)
        torch.random.set_rng_state(state)
    tokenizer.save_pretrained(folder)
    return folder


def language(folder: Path, **values: Any) -> ModelConfig:
    """Return the settings of a language model."""
    return ModelConfig(**{"source": str(folder), "max_length": 32, "dtype": "float32", **values})


def classifier(folder: Path, **values: Any) -> ModelConfig:
    """Return the settings of a classifier."""
    return language(folder, **{"task": "classification", "labels": LABELS, **values})


def adapted(config: ModelConfig, **adapter: Any) -> AdapterModel:
    """Return a base with a fresh adapter."""
    return attach(load_base(config, "cpu"), config, AdapterConfig(**{"rank": 2, "alpha": 4.0, **adapter}), 0)
