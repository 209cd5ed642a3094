"""Fixtures for all tests: tiny models with random weights, built once a session, and small record files."""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.running import (  # noqa: F401  # hooks
    pytest_collection,
    pytest_collection_modifyitems,
    pytest_sessionfinish,
    pytest_sessionstart,
    pytest_xdist_make_scheduler,
)

if TYPE_CHECKING:  # seconds, which neither xdist's first process nor many a file needs
    from transformers import PreTrainedTokenizerFast

SOAK = os.environ.get("FEDLLM_SOAK") == "1"  # `make soak`: larger numbers, more examples
settings.register_profile(
    "suite", derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("soak", deadline=None, max_examples=5000, suppress_health_check=list(HealthCheck))
settings.load_profile("soak" if SOAK else "suite")
SHOWN = st.characters(exclude_categories=["C", "Zl", "Zp"])  # of texts that people may read (fedllm.shown)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models, and several test processes on few cores: threads cost more than they bring, also in processes of tests.
for pool in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(pool, "1")
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")  # some tests fork: no threads of libraries


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level tokenizer without merges: 256 bytes and three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def some_of_the_demo(persons: int = 40) -> list[dict[str, Any]]:
    """Return the demo's records of so many persons of each branch: tokenising all takes seconds."""
    file = Path(__file__).parents[1] / "simulations" / "demo" / "data" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    kept: dict[str, set[str]] = {row["branch"]: set() for row in rows}
    for row in rows:
        if len(kept[row["branch"]]) < persons:
            kept[row["branch"]].add(row["customer_id"])
    return [row for row in rows if row["customer_id"] in kept[row["branch"]]]


@pytest.fixture
def without_pdfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the PDFs of an audit: they take longer than all else of a small run."""
    monkeypatch.setattr("fedllm.audit.bundle.renderer", nullcontext)
    monkeypatch.setattr("fedllm.audit.bundle.rendered", lambda page: b"%PDF-")


def leave_out_plots(patch: pytest.MonkeyPatch) -> None:
    """Leave out the plots beside a run's summary: they take as long as all else of a small run."""
    picture = SimpleNamespace(savefig=lambda path, **_: path.write_text("a picture", "utf-8"))
    for name in ("_plot_rounds", "_plot_sites"):
        patch.setattr(f"fedllm.audit.summary.{name}", lambda *_: picture)


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `leave_out_plots`, for one test."""
    leave_out_plots(monkeypatch)


def save_llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a Llama of about 20k random parameters and a byte-level tokenizer to a folder, and return that."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": 259, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**values, **changes})).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of about 20k random parameters and a byte-level tokenizer."""
    return save_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, list[dict[str, Any]]], Path]:
    """Return a function that writes rows to a jsonl file in the test's folder."""

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return path

    return write
