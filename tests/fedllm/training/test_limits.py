"""What a model takes is measured when it is loaded: not found out with private records, or after a charge."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedllm.errors import ModelError
from fedllm.privacy.mechanism import Mechanism
from fedllm.training.adapter import check_saved
from fedllm.training.data import Example
from fedllm.training.engine import Engine
from fedllm.training.model import load_base, load_reader
from tests.conftest import byte_tokenizer
from tests.fedllm.training.bases import MASKED, adapted, classifier, language, make, of_letters
from tests.fedllm.training.conftest import conv1d

MECHANISM = Mechanism(1.0, 0.0, 1.0)


def longest_record(config: Any) -> None:
    """Compute the gradient of records of max_length tokens, one of them padded to the model's last position."""
    adapter = adapted(config)
    ids = np.arange(config.max_length) % 5 + 3
    units = [(Example(ids[:n], np.asarray(n % 2) if adapter.classifies else ids[:n]),) for n in (len(ids), 58)]
    assert bool(Engine(adapter).clipped_sum(units, MECHANISM, 4).isfinite().all())


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta"])
def test_positions_that_padding_takes_are_not_usable(tmp_path: Path, kind: str) -> None:
    folder = make(tmp_path, kind, MASKED)
    for pooling in ("native", "mean"):
        with pytest.raises(ModelError, match=r"max_length=66, but .* has 66 positions, 65 usable"):
            load_base(classifier(folder, max_length=66, pooling=pooling), "cpu")
    assert load_base(classifier(folder, max_length=65), "cpu").positions == 65
    longest_record(classifier(folder, max_length=65))


@conv1d
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "opt", "modernbert"])
def test_every_position_of_other_models_is_usable(tmp_path: Path, kind: str) -> None:
    more = {"ffn_dim": 32, "word_embed_proj_dim": 16} if kind == "opt" else {}
    if kind == "modernbert":
        more = {"cls_token_id": 1, "sep_token_id": 2}
    encoder = kind in ("bert", "modernbert")
    folder = make(tmp_path, kind, *([MASKED] if encoder else []), **more)
    settings = classifier if encoder else language
    assert load_base(settings(folder, max_length=66), "cpu").positions == 66
    with pytest.raises(ModelError, match=r"max_length=67, but .* has 66 positions\. Lower it to 66"):
        load_base(settings(folder, max_length=67), "cpu")


def test_what_the_configuration_says_is_not_believed(tmp_path: Path) -> None:
    """A table of positions that is shorter than the model says."""
    folder = make(tmp_path, "bert", MASKED)
    config, weights = folder / "config.json", folder / "model.safetensors"
    shorter = make(tmp_path / "shorter", "bert", MASKED, max_position_embeddings=40)
    weights.write_bytes((shorter / "model.safetensors").read_bytes())
    assert '"max_position_embeddings": 66' in config.read_text("utf-8")
    with pytest.raises(ModelError):
        load_base(classifier(folder, max_length=66), "cpu")


@pytest.mark.parametrize("value", [-1, 0, None])
def test_no_limit_is_no_limit(tmp_path: Path, value: int | None) -> None:
    """As deberta says with a negative value; its relative positions end nowhere."""
    folder = make(tmp_path, "bloom")
    text = (
        (folder / "config.json")
        .read_text("utf-8")
        .replace('"max_position_embeddings": 66', '"max_position_embeddings": -1')
    )
    if value != -1:
        text = text.replace(
            '"max_position_embeddings": -1', f'"max_position_embeddings": {"null" if value is None else value}'
        )
    (folder / "config.json").write_text(text, "utf-8")
    assert load_reader(language(folder)).positions >= 1 << 20
    assert load_base(language(folder, max_length=200), "cpu").positions >= 1 << 20


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["desk"])
    folder = make(tmp_path, "llama", tokenizer=tokenizer, vocab_size=259)
    for load in (load_reader, lambda config: load_base(config, "cpu")):
        with pytest.raises(ModelError, match=r"has 260 tokens, its embedding 259: token 259 \('desk'\).*Resize"):
            load(language(folder))


def test_a_padding_token_that_the_embedding_lacks_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    folder = make(tmp_path, "llama", tokenizer=tokenizer, vocab_size=259)
    with pytest.raises(ModelError, match=r"\[PAD\].*Resize"):
        load_base(language(folder), "cpu")


def test_a_special_token_that_no_text_makes_may_lie_beyond(tmp_path: Path) -> None:
    """The image token of Gemma 3's text models does."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    longest_record(language(make(tmp_path, "llama", tokenizer=tokenizer, vocab_size=259), max_length=66))


def test_padding_that_tokenizer_and_model_know_by_other_tokens(tmp_path: Path) -> None:
    """A decoder's head finds the last token of a record by it; RoBERTa its positions."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    adapter = adapted(classifier(make(tmp_path / "llama", "llama", tokenizer=tokenizer), max_length=64), train="AB")
    adapter.load(np.random.default_rng(0).normal(0, 0.2, adapter.spec.dimension).astype(np.float32))
    engine = Engine(adapter)
    units = [(Example(np.arange(5, 5 + n), np.asarray(n % 2)),) for n in (4, 9, 13)]
    for unit in units:  # padded to one width, and by itself
        ids = torch.from_numpy(unit[0].input_ids)[None]
        with torch.no_grad():
            alone = adapter.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            wide = torch.nn.functional.pad(ids, (0, 5), value=tokenizer.pad_token_id)
            mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 5))
            assert torch.allclose(adapter.model(input_ids=wide, attention_mask=mask).logits, alone, atol=1e-6)
    apart = engine.clipped_sum(units, MECHANISM, 4) - sum(engine.clipped_sum([unit], MECHANISM, 4) for unit in units)
    assert not apart.any()
    with pytest.raises(ModelError, match="pads with token 2, and the model finds padding by token 0"):
        load_base(classifier(make(tmp_path / "roberta", "roberta", MASKED, tokenizer)), "cpu")


@pytest.mark.parametrize("letters", ["ACGT", "ACGTN", "ABCDEFGHIJKLMNO"])
def test_a_vocabulary_of_a_few_tokens_does(tmp_path: Path, letters: str) -> None:
    config = language(make(tmp_path / "base", "llama", tokenizer=of_letters(letters)), max_length=66)
    longest_record(config)
    adapter = adapted(config)
    adapter.save(adapter.initial, tmp_path / "adapter", config.source)
    assert check_saved(tmp_path / "adapter", adapter, adapter.initial, config)
    engine = Engine(adapter)
    engine.rehearse(2, 32)


def test_a_vocabulary_or_a_record_that_is_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="knows 7 tokens, expected at least 8"):
        load_base(language(make(tmp_path / "a", "llama", tokenizer=of_letters("ABC"))), "cpu")
    with pytest.raises(ModelError, match="15 positions, expected at least 16"):
        load_base(language(make(tmp_path / "b", "llama", max_position_embeddings=15), max_length=8), "cpu")
