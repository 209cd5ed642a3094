"""A release in memory: its model, how it is asked, and what it answers."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from fedllm.config import ModelConfig
from fedllm.errors import ModelError, ReleaseError, first_line
from fedllm.release.manifest import Manifest
from fedllm.training.adapter import answered, virtual_tokens
from fedllm.training.chat import AnswerEnd, answer_end
from fedllm.training.data import Row, Tokeniser
from fedllm.training.model import MeanPooledClassifier, load_base, pick_device
from fedllm.training.quantised import quiet_bitsandbytes, unseen

with unseen():
    from peft import PeftModel

ADAPTER = "adapter_model.safetensors"
BASE = "base"  # folder in a release of an adapter whose base cannot be had by its name
HEAD = "classifier.safetensors"  # of a merged classifier with mean pooling, beside its encoder
_AT_ONCE = 32  # questions that are answered together


@dataclass(frozen=True)
class Release:
    """A release that was verified and loaded."""

    folder: Path
    manifest: Manifest
    model: Any  # of transformers, a MeanPooledClassifier, or a PeftModel where PEFT cannot merge
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return cast(torch.device, next(p.device for p in self.model.parameters()))

    @cached_property
    def tokeniser(self) -> Tokeniser:
        """What makes tokens of records, as in training."""
        return Tokeniser(self.tokenizer, self.manifest.model, self.manifest.reading)

    @cached_property
    def end(self) -> AnswerEnd:
        """What ends an answer."""
        return answer_end(self.tokenizer, self.manifest.reading.chats)

    def prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """Return the tokens that ask each row's question, as in training."""
        return [self.tokeniser.prompt_ids(row, number) for number, row in enumerate(rows)]

    def answers(self, prompts: Sequence[list[int]], most: int, **options: Any) -> list[str]:
        """Return the answer to each prompt: greedy, at most `most` tokens, or as `options` of `generate` say.

        Answers do not depend on what else is asked, but for the last bits of padded arithmetic.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: dict[int, str] = {}
        for start in range(0, len(order), _AT_ONCE):
            some = order[start : start + _AT_ONCE]
            found.update(zip(some, self._answers([prompts[i] for i in some], most, options), strict=True))
        return [found[i] for i in range(len(prompts))]

    @cached_property
    def positions(self) -> int:
        """The most tokens of a prompt and its answer; 2^31 where the model's configuration has no limit."""
        declared = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return (declared if isinstance(declared, int) and declared > 0 else 1 << 31) - virtual_tokens(self.model)

    @torch.inference_mode()
    def _answers(self, prompts: Sequence[list[int]], most: int, options: dict[str, Any]) -> list[str]:
        room = max(1, self.positions - most)
        return answered(self.model, self.tokenizer, self.end, [prompt[-room:] for prompt in prompts], most, **options)


def load_release(folder: Path, manifest: Manifest, device: str = "auto") -> Release:
    """Load the model of a release whose manifest was read, for use: nothing in it trains.

    LoRA's kinds are merged in memory. Raises ModelError if it does not load, and ReleaseError if the base is another
    one than the release was made for.
    """
    where = pick_device(device)
    quiet_bitsandbytes()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        load = _with_adapter if manifest.form == "adapter" else _whole
        model = load(folder, manifest, where)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ModelError(
            f"{folder} does not load ({first_line(error)}). Are the versions those of constraints.txt?"
        ) from error
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{folder}: its tokenizer has no pad token. Export the release again.")
    return Release(folder, manifest, model.eval().requires_grad_(False), tokenizer)


def base_of(folder: Path, manifest: Manifest) -> ModelConfig:
    """Return the base of a release as it is to be had: in its folder, or by its name."""
    inside = folder / BASE
    return manifest.model.model_copy(update={"source": str(inside), "revision": None} if inside.is_dir() else {})


def _with_adapter(folder: Path, manifest: Manifest, device: str) -> Any:
    if not (folder / ADAPTER).is_file():  # PEFT would look for a pickle, and then for a hub's repository of that name
        raise ReleaseError(f"{folder} holds no {ADAPTER}: it is no release of an adapter. Export it again.")
    model = base_of(folder, manifest)
    base = load_base(model, device)
    if base.digest != manifest.base.digest:
        raise ReleaseError(
            f"{model.source} holds other weights (SHA-256 {base.digest[:16]}...) than the base that the adapter in "
            f"{folder} was trained on ({manifest.base.digest[:16]}...). Put that base there."
        )
    with warnings.catch_warnings(), unseen():
        warnings.simplefilter("ignore")  # of peft, on reading its own configuration
        tuned = PeftModel.from_pretrained(cast(Any, base.model), str(folder)).eval()
        mergeable = not tuned.peft_config["default"].is_prompt_learning
        return cast(Any, tuned).merge_and_unload() if mergeable else tuned


def _whole(folder: Path, manifest: Manifest, device: str) -> nn.Module:
    if manifest.pooling == "mean":
        encoder = AutoModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, dtype="auto")
        model: Any = MeanPooledClassifier(encoder, len(manifest.labels))
        model.classifier.load_state_dict(load_file(folder / HEAD))
        return cast(nn.Module, model.to(device))
    kind: Any = AutoModelForCausalLM if manifest.task == "causal-lm" else AutoModelForSequenceClassification
    return cast(
        nn.Module,
        kind.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, dtype="auto", device_map=device),
    )
