"""One step of plain LoRA training on a model that is loaded for it: what a stock ClientApp does in every round."""

import time
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def make_model(folder: Path, hidden: int, layers: int, mlp: int) -> None:
    """Write a Llama of random weights with the demo's tokenizer: for timing, it knows nothing."""
    tokenizer = AutoTokenizer.from_pretrained(
        str(resources.files("simulations.demo") / "base"), trust_remote_code=False
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def adapter_shapes(model: str) -> dict[str, list[int]]:
    """Return the names and shapes of the adapter's tensors, A and B."""
    return {name: list(value.shape) for name, value in get_peft_model_state_dict(_load(model)).items()}


def train_once(
    model: str, adapter: dict[str, NDArray[np.float32]], batch: int, tokens: int
) -> tuple[dict[str, NDArray[np.float32]], float]:
    """Return the adapter after one step on `batch` records of `tokens` random tokens, and the seconds of that step."""
    torch.set_num_threads(1)
    loaded = _load(model)
    set_peft_model_state_dict(loaded, {name: torch.from_numpy(value) for name, value in adapter.items()})
    optimizer = torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.1)
    ids = torch.randint(3, int(loaded.config.vocab_size), (batch, tokens))
    began = time.monotonic()
    loaded(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    seconds = time.monotonic() - began
    return {name: value.detach().numpy() for name, value in get_peft_model_state_dict(loaded).items()}, seconds


def _load(model: str) -> Any:
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False, dtype=torch.float32)
    return get_peft_model(base, config)
