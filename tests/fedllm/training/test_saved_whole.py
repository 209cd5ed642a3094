"""The saved adapter is the whole trained model: whoever loads it with plain PEFT gets what was trained and measured."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from fedllm.errors import ModelError
from fedllm.training.adapter import check_saved
from fedllm.training.engine import Engine
from fedllm.training.model import load_base
from tests.fedllm.training.bases import CAUSAL, LABELS, MASKED, adapted, classifier, make

KINDS: dict[str, dict[str, Any]] = {
    "bert": {}, "deberta": {}, "roberta": {}, "electra": {"embedding_size": 16}, "albert": {"embedding_size": 16},
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 4},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2}, "llama": {},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
@pytest.mark.parametrize("train", ["AB", "B"])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_gives_the_trained_logits_whatever_its_seed(tmp_path: Path, kind: str, train: str) -> None:
    folder = make(tmp_path / "base", kind, CAUSAL if kind == "llama" else MASKED, **KINDS[kind])
    config = classifier(folder)
    adapter = adapted(config, train=train)
    Engine(adapter)
    vector = np.random.default_rng(0).normal(0, 0.2, adapter.spec.dimension).astype(np.float32)
    adapter.save(vector, tmp_path / "adapter", config.source)
    assert check_saved(tmp_path / "adapter", adapter, vector, config)
    adapter.load(vector)
    ids = torch.arange(5, 25).reshape(2, 10)
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS), pad_token_id=0)
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        with torch.no_grad():
            found, trained = (
                m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for m in (loaded, adapter.model)
            )
        assert torch.allclose(found, trained, atol=1e-6)


def test_what_the_checkpoint_lacks_is_drawn_alike_at_every_party_and_trained(tmp_path: Path) -> None:
    config = classifier(make(tmp_path, "deberta", MASKED))
    assert load_base(config, "cpu").digest == load_base(config, "cpu").digest != load_base(config, "cpu", seed=1).digest
    assert load_base(config, "cpu").new == ("classifier", "pooler.dense")
    names = [tensor.name for tensor in adapted(config).spec.tensors]
    assert sum("pooler.dense.modules_to_save" in name for name in names) == 2
    assert not any("pooler.dense.lora" in name for name in names)


def test_an_adapter_without_a_part_of_the_head_is_found(tmp_path: Path) -> None:
    config = classifier(make(tmp_path / "base", "deberta", MASKED))
    adapter = adapted(config)
    adapter.save(adapter.initial, tmp_path / "adapter", config.source)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    values = load_file(file)
    values["base_model.model.pooler.dense.weight"] += 1
    save_file(values, file)
    with pytest.raises(ModelError, match="not the one that was trained"):
        check_saved(tmp_path / "adapter", adapter, adapter.initial, config)
