"""A base or a setting that cannot be used is refused with the name of what was found, and with what would work."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from fedllm.config import ModelConfig, TextConfig
from fedllm.errors import ConfigError, ModelError
from fedllm.training.adapter import AdapterModel
from fedllm.training.data import Tokeniser
from fedllm.training.engine import Engine
from fedllm.training.model import load_base, load_reader
from tests.conftest import byte_tokenizer
from tests.fedllm.training.bases import MASKED, adapted, classifier, language, make

LOADS: tuple[Callable[[ModelConfig], Any], ...] = (load_reader, lambda config: load_base(config, "cpu"))
OPT = {"ffn_dim": 32, "word_embed_proj_dim": 16}
DISENTANGLED = {
    "relative_attention": True, "position_buckets": 16, "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
}  # fmt: skip


def offered(error: BaseException) -> tuple[str, ...]:
    """Return the targets that an error tells to give."""
    found = re.search(r"Give adapter\.targets=\[(.*)\]", str(error))
    assert found, error
    return tuple(found[1].split(","))


def test_layers_that_see_reshaped_records_are_named(tmp_path: Path) -> None:
    config = language(make(tmp_path, "opt", **OPT))
    text = r"fc1, fc2 .*decoder\.layers\.0\.fc1 is given 24 rows for 4 records of 6 tokens; the model only reshapes"
    with pytest.raises(ModelError, match=text) as refused:
        Engine(adapted(config))
    assert offered(refused.value) == ("k_proj", "out_proj", "q_proj", "v_proj")
    Engine(adapted(config, targets=offered(refused.value)))


def test_layers_that_records_share_are_named(tmp_path: Path) -> None:
    config = classifier(make(tmp_path, "deberta-v2", MASKED, **DISENTANGLED))
    text = r"key_proj, query_proj .*layer\.0\.attention\.self\.query_proj is given 1 row for .*; the model mixes"
    with pytest.raises(ModelError, match=text) as refused:
        Engine(adapted(config))
    assert offered(refused.value) == ("dense", "value_proj")
    Engine(adapted(config, targets=offered(refused.value)))


def test_fused_experts_are_named(tmp_path: Path) -> None:
    config = language(make(tmp_path, "mixtral", num_key_value_heads=2, num_local_experts=4))
    with pytest.raises(ModelError, match=r"experts are fused .*gate_up_proj") as refused:
        adapted(config)
    assert set(offered(refused.value)) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    engine = Engine(adapted(config, targets=offered(refused.value)))
    assert engine.rows(16, 8) == 1, "experts compute the tokens of a whole pass together"


@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_a_soft_cap_is_seen_where_logits_are_small(tmp_path: Path, kind: str) -> None:
    """The engine takes the output head apart only where nothing comes after it."""
    more: dict[str, Any] = {"head_dim": 4} if kind == "gemma2" else {}
    adapter = adapted(language(make(tmp_path, kind, num_key_value_heads=2, **more)), train="AB")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert adapter.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.abs().max() < 1
    assert (adapter.split is None) == (kind == "gemma2")


def test_vectors_that_differ_are_told_by_their_tensor(tmp_path: Path) -> None:
    adapter: AdapterModel = adapted(language(make(tmp_path, "llama")))
    a = torch.ones(adapter.spec.dimension)
    parts = adapter.spec.split(np.arange(adapter.spec.dimension, dtype=np.float32))
    name, first = next((name, int(part.reshape(-1)[0])) for name, part in parts.items() if "layers.1" in name)
    b = a.clone()
    b[first] = 3.0
    assert adapter.most_apart(b, a).startswith(f"{name.replace('.default', '')}, by ")


def test_an_encoder_with_a_decoder_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path, "t5", AutoModelForSeq2SeqLM, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    for load in LOADS:
        for config in (language(folder), classifier(folder), classifier(folder, pooling="mean")):
            with pytest.raises(ModelError, match=r"an encoder with a decoder \(t5\).*Give a causal"):
                load(config)


def test_an_adapter_is_no_base_and_names_its_own(tmp_path: Path) -> None:
    adapter = adapted(language(make(tmp_path / "base", "llama")))
    adapter.save(adapter.initial, tmp_path / "adapter", "some/base")
    for load in LOADS:
        with pytest.raises(ModelError, match=r"is an adapter of some/base, not a base.*merge_and_unload"):
            load(language(tmp_path / "adapter"))


def test_a_tokenizer_that_needs_sentencepiece_says_what_to_do(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}', "utf-8")
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    for load in LOADS:
        with pytest.raises(ModelError, match="pip install sentencepiece") as refused:
            load(language(folder))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer", "BertTokenizer", "T5Tokenizer", None])
def test_a_tokenizer_whose_vocabulary_is_lost_is_refused(tmp_path: Path, kind: str | None) -> None:
    """transformers makes an empty one up, by which every text is the same."""
    folder = make(tmp_path, "llama")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    if kind is not None:
        (folder / "tokenizer_config.json").write_text(f'{{"tokenizer_class": "{kind}"}}', "utf-8")
    for load in LOADS:
        with pytest.raises(ModelError, match=r"knows no text|the folder needs .*tokenizer files"):
            load(language(folder))


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (("neg", "pos"), r"a head of 3 classes \(neg, neutral, pos\), and model\.labels holds 2.*pooling=mean"),
        (("pos", "neutral", "neg"), r"another order .*model\.labels=\[neg,neutral,pos\]"),
        (("neg", "neutral", "pos"), None),
        (("a", "b", "c"), None),
    ],
)
def test_a_head_of_other_classes_is_refused(tmp_path: Path, labels: tuple[str, ...], text: str | None) -> None:
    names = {"0": "neg", "1": "neutral", "2": "pos"}
    folder = make(tmp_path, "bert", AutoModelForSequenceClassification, id2label=names,
                  label2id={name: int(number) for number, name in names.items()})  # fmt: skip
    load_base(classifier(folder, labels=labels, pooling="mean"), "cpu")
    if text is None:
        load_base(classifier(folder, labels=labels), "cpu")
        return
    with pytest.raises(ModelError, match=text):
        load_base(classifier(folder, labels=labels), "cpu")


def test_a_chat_template_that_refuses_is_told_with_the_remedy() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    data = TextConfig(text="{answer}", prompt="{question}", chat=True)
    with pytest.raises(ConfigError, match=r"chat template of base refuses .*system first.*data\.system"):
        Tokeniser(tokenizer, ModelConfig(source="base"), data)
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ConfigError, match="does not write what the assistant says"):
        Tokeniser(tokenizer, ModelConfig(source="base"), data)


def test_an_encoder_is_no_language_model(tmp_path: Path) -> None:
    """transformers loads it as one; it would be taught with the answer before its eyes."""
    with pytest.raises(ModelError, match=r"reads later tokens \(bert\): .* set model\.task=classification"):
        load_base(language(make(tmp_path, "bert", MASKED)), "cpu")


def test_an_architecture_without_a_model_for_the_task_is_named_with_what_to_do(tmp_path: Path) -> None:
    granite = make(tmp_path / "granite", "granite", num_key_value_heads=2)
    with pytest.raises(ModelError, match=r"no model for model\.task=classification .*model\.pooling=mean"):
        load_base(classifier(granite), "cpu")
    load_base(classifier(granite, pooling="mean"), "cpu")
    settings = {"cls_token_id": 1, "sep_token_id": 2}
    with pytest.raises(ModelError, match=r"no model for model\.task=causal-lm .*give a causal language model"):
        load_base(language(make(tmp_path / "modern", "modernbert", MASKED, **settings)), "cpu")
