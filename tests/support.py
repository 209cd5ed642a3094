"""Writes docs/support.md: which architectures can be trained in which way, by trying each.

python -m tests.support
"""

import contextlib
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

from fedllm.config import AdapterConfig, ModelConfig, PrivacyConfig, TrainingConfig
from fedllm.errors import FedllmError
from fedllm.plan import RunPlan
from fedllm.privacy.randomness import OsRandomness
from fedllm.training.adapter import attach, check_saved
from fedllm.training.engine import Engine
from fedllm.training.model import load_base
from fedllm.training.self_check import Subject, self_check
from tests.fedllm.training.bases import CAUSAL, LABELS, MASKED, make

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
_HEAD = """\
# Architectures

<!-- Written by `python -m tests.support`, which tries every cell. `make soak` compares. Do not change it by hand. -->

Each cell was tried on a small model of random weights, on a CPU. **yes** means: the adapter is attached, the whole
self-check passes (it compares the private gradients with a slow loop, and sees that no record changes another's part to
the last bit), and the saved adapter gives the same logits in plain PEFT. A number is a refusal, with the reason below.
Models with experts (Mixtral, Qwen3-MoE) have their records computed one at a time: experts would compute the tokens of
several records together, in which the last bits mix.

- **attention**: LoRA in the attention layers alone. **all-linear**: in every linear layer. The other columns are as
  "attention", and with
- **bfloat16**: `model.dtype=bfloat16`, **compiled**: `model.compile=on`, **int8** and **nf4**: `model.quantize`.

"""


@dataclass(frozen=True)
class Family:
    """An architecture, and how a small one is made."""

    name: str  # as people know it
    kind: str  # as transformers does
    attention: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    settings: dict[str, Any] = field(default_factory=dict)
    pooling: str = "native"

    @property
    def encodes(self) -> bool:
        """Whether it is an encoder, which classifies and continues no text."""
        return self in ENCODERS


_ESCAPED = r"\\\1"
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_BERT = ("query", "key", "value")
DECODERS = [
    Family("Llama", "llama", settings=_GROUPED),
    Family("Mistral", "mistral", settings=_GROUPED),
    Family("Qwen2", "qwen2", settings=_GROUPED),
    Family("Qwen3", "qwen3", settings={**_GROUPED, "head_dim": 4}),
    Family("Gemma", "gemma", settings={**_GROUPED, "head_dim": 4}),
    Family("Gemma 2", "gemma2", settings={**_GROUPED, "head_dim": 4}),
    Family("Gemma 3", "gemma3_text", settings={**_GROUPED, "head_dim": 4}),
    Family("Phi-3", "phi3", ("qkv_proj", "o_proj"), _GROUPED),
    Family("OLMo 2", "olmo2", settings=_GROUPED),
    Family("EXAONE 4", "exaone4", settings=_GROUPED),
    Family("SmolLM3", "smollm3", settings=_GROUPED),
    Family("Granite", "granite", settings=_GROUPED),
    Family("GPT-2", "gpt2", ("c_attn",), {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 66}),
    Family("GPT-NeoX", "gpt_neox", ("query_key_value",)),
    Family("BLOOM", "bloom", ("query_key_value",), {"n_layer": 2, "n_head": 4}),
    Family("Falcon", "falcon", ("query_key_value",)),
    Family("OPT", "opt", ("q_proj", "k_proj", "v_proj", "out_proj"), {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    Family("Mixtral", "mixtral", settings={**_GROUPED, "num_local_experts": 4}),
    Family(
        "Qwen3-MoE", "qwen3_moe",
        settings={**_GROUPED, "head_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
]  # fmt: skip
ENCODERS = [
    Family("BERT", "bert", _BERT),
    Family("RoBERTa", "roberta", _BERT),
    Family("XLM-R", "xlm-roberta", _BERT),
    Family("DeBERTa-v2", "deberta-v2", ("query_proj", "key_proj", "value_proj"), {
        "relative_attention": True, "position_buckets": 16, "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
    }),
    Family("ModernBERT", "modernbert", ("Wqkv", "Wo"), {"cls_token_id": 1, "sep_token_id": 2}),
    Family("ELECTRA", "electra", _BERT, {"embedding_size": 16}),
    Family("MiniLM", "bert", _BERT, pooling="mean"),
]  # fmt: skip
COLUMNS: dict[str, dict[str, Any]] = {
    "attention": {},
    "all-linear": {},
    "bfloat16": {"dtype": "bfloat16"},
    "compiled": {"compile": "on"},
    "int8": {"quantize": "int8"},
    "nf4": {"quantize": "nf4"},
}


def rows() -> list[tuple[Family, str]]:
    """Return every architecture with a task that it has."""
    causal, classes = "causal-lm", "classification"
    return [(f, task) for f in DECODERS for task in (causal, classes)] + [(f, classes) for f in ENCODERS]


def attempt(family: Family, task: str, column: str, folder: Path) -> str:
    """Return why an architecture cannot be trained in this way, or nothing if it can. `folder` holds a small one."""
    classifies = {"labels": LABELS, "pooling": family.pooling} if task == "classification" else {}
    model = ModelConfig(**{
        "source": str(folder), "max_length": 32, "dtype": "float32", "compile": "off", "task": task, **classifies,
        **COLUMNS[column],
    })  # fmt: skip
    targets: Any = "all-linear" if column == "all-linear" else tuple(family.attention)
    adapter = AdapterConfig(rank=2, alpha=4.0, targets=targets)
    plan = RunPlan(
        run="support", seed=0, model=model, adapter=adapter,
        privacy=PrivacyConfig(units_per_site=50, delta=1e-3, noise_multiplier=1.0),
        training=TrainingConfig(rounds=1, local_steps=1),
    )  # fmt: skip
    try:
        attached = attach(load_base(model, "cpu"), model, adapter, 0)
        engine = Engine(attached)
        engine.set_up(plan, checkpointing=False)
        engine.rehearse(8, model.max_length)
        subject = Subject(attached, engine, plan, OsRandomness, 8)
        self_check(subject)
        attached.save(subject.start, folder / "adapter", model.source)
        check_saved(folder / "adapter", attached, subject.start, model)
    except FedllmError as error:
        return str(error).replace(str(folder), "MODEL")
    return ""


@contextlib.contextmanager
def small_model(family: Family) -> Iterator[Path]:
    """Make a small model of an architecture in a folder of its own."""
    with tempfile.TemporaryDirectory() as place:
        yield make(Path(place) / "model", family.kind, MASKED if family.encodes else CAUSAL, **family.settings)


def page() -> str:
    """Try everything and return the whole page."""
    transformers.logging.disable_progress_bar()
    reasons: dict[str, int] = {}
    lines = [f"| architecture | task | {' | '.join(COLUMNS)} |", f"|---|---|{'---|' * len(COLUMNS)}"]
    for family, task in rows():
        cells = []
        with small_model(family) as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for column in COLUMNS:
                found = attempt(family, task, column, folder)
                cells.append(str(reasons.setdefault(found, len(reasons) + 1)) if found else "yes")
        lines.append(f"| {family.name} | {task} | {' | '.join(cells)} |")
    notes = [f"{number}. {re.sub('([_*<>|])', _ESCAPED, reason)}" for reason, number in reasons.items()]
    return _HEAD + "\n".join(lines) + "\n\n## Why not\n\n" + "\n".join(notes) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
