"""Base models: loaded from Hugging Face's format, never altered, identified by the hash of their weights."""

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from fedllm.config import ModelConfig
from fedllm.errors import ConfigError, ModelError, first_line
from fedllm.training.quantised import QuantisedLinear, quantise
from fedllm.training.sources import resolve

HEADS = ("classifier", "score")  # PEFT trains and saves these of every sequence classifier
_UNLIMITED = 1 << 31
_FILES = ("*.json", "*.safetensors", "*.bin")  # settings, weights, tokenizer: what a model is loaded from
_PAYS_IN_BFLOAT16 = 20_000_000  # parameters; an estimate
_NO_WEIGHTS = (
    "there is no model.safetensors. A pickle of weights (.bin) may bring code, and is not read: if you trust it, load "
    "it elsewhere and save it anew with save_pretrained"
)
_FIRST, _MADE_UP = 3, 16  # first token of made-up records, and how many different ones they hold
_WORKSPACE, _REPEATABLE = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # with which cuBLAS repeats its bits
_FEWEST, _SHORTEST = 8, 16  # tokens of a vocabulary, and of the longest record: the self-check needs so many


@dataclass(frozen=True)
class BaseModel:
    """A public base model with its tokenizer."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    digest: str  # SHA-256 over names, dtypes, shapes and bytes of all weights, before they are quantised
    positions: int  # the most tokens that a record may have
    vocabulary: int  # rows of its token embedding
    new: tuple[str, ...] = ()  # modules of a classifier that its checkpoint lacks, and that were drawn at random
    stored: torch.dtype = torch.float32  # of its weights on disk, as its configuration says


@dataclass(frozen=True)
class Reader:
    """How a base model reads text; loaded without its weights."""

    tokenizer: PreTrainedTokenizerBase
    positions: int  # the most tokens that the model takes
    vocabulary: int  # tokens that it knows
    digest: str  # SHA-256 over the tokenizer, its special tokens and its chat template


class MeanPooledClassifier(nn.Module):
    """An encoder whose token states are averaged, normalised and classified by one linear layer.

    The pooling of sentence encoders (Reimers and Gurevych 2019), which the stock classification heads of encoders,
    that read the first token, do not offer. The layer starts at zero.
    """

    def __init__(self, encoder: Any, labels: int) -> None:
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # reads the first token only, and would be adapted for nothing
        self.encoder = encoder
        self.config = encoder.config
        # no bias: on embeddings of length 1 its gradient would take half of the clip
        self.classifier = nn.Linear(self.config.hidden_size, labels, bias=False)
        nn.init.zeros_(self.classifier.weight)

    @property
    def device(self) -> torch.device:
        """Where it lives: PEFT asks."""
        return self.classifier.weight.device

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Any = None, inputs_embeds: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Return logits[N, labels] for input_ids[N, T], or for inputs_embeds[N, T, D] in their place."""
        given = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        states_NTD = self.encoder(attention_mask=attention_mask, **given).last_hidden_state.float()
        mask_NT1 = attention_mask.unsqueeze(-1).to(states_NTD.dtype)
        mean_ND = (states_NTD * mask_NT1).sum(1) / mask_NT1.sum(1).clamp(min=1)
        return SequenceClassifierOutput(logits=self.classifier(F.normalize(mean_ND, dim=-1)))


def load_reader(config: ModelConfig) -> Reader:
    """Load a model's tokenizer; raises ModelError with the remedy if that fails."""
    source, where = _located(config)
    with _explained(config, source):
        shape = _shape(config, source, where).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **where)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        type(tokenizer).__name__ if backend is None else backend.to_str(), sorted(tokenizer.get_vocab().items()),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()}, tokenizer.chat_template,
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    vocabulary = _declared(shape, "vocab_size")
    _check_tokens(config, tokenizer, vocabulary)
    return Reader(tokenizer, _declared(shape, "max_position_embeddings"), vocabulary, digest)


def _declared(shape: Any, name: str) -> int:
    """Return a limit of a model's configuration; where it has none, 0 or a negative value: no limit."""
    value = getattr(shape, name, None)
    return value if isinstance(value, int) and value > 0 else _UNLIMITED


def files_digest(config: ModelConfig, known: dict[str, Any]) -> str:
    """Return the SHA-256, in hex, over names and contents of the files that a model is loaded from, at its revision.

    `known` holds, by path, what earlier calls found of a file and its SHA-256, and is brought up to date: a file that
    has not changed since (size, inode, times of its content and of its inode) is not read again. Raises ModelError.
    """
    source, where = _located(config)
    with _explained(config, source):
        folder = source if isinstance(source, Path) else Path(str(cached_file(source, "config.json", **where))).parent
        if not any(folder.glob("*.safetensors")):  # whoever declares a model is told
            raise OSError(_NO_WEIGHTS)
        digest = hashlib.sha256()
        for path in sorted({path for pattern in _FILES for path in folder.glob(pattern)}):
            state = path.stat()
            now = [state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns]
            *before, content = known.get(str(path), [""])
            if before != now:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                known[str(path)] = [*now, content]
            digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def load_base(config: ModelConfig, device: str, seed: int = 0) -> BaseModel:
    """Load model and tokenizer in float32 on `device`, quantised as `config` says; raises ModelError with the remedy.

    `seed` draws what the checkpoint of a classifier lacks. It must be the same at every party of a run.
    """
    source, where = _located(config)
    with _explained(config, source):
        shape = _shape(config, source, where)
        _check_head(config, shape)
        _check_weights(source, where)
        if getattr(shape, "quantization_config", None) is not None:
            raise ModelError(
                f"model.source={config.source} holds quantised weights (4-bit and the like), which are not supported: "
                "their kernels may let one record change what others get. Give the model as it was before, with "
                "model.quantize=nf4 or int8, or model.dtype=bfloat16, to save memory."
            )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **where)
        # dropout off: it is no defence, and it would make a unit's gradient depend on a random draw
        model, new = _from_pretrained(config, source, where, seed)
        model.eval()
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"model.source={config.source}: its tokenizer has neither a pad nor an eos token. Give it one "
                "(tokenizer.eos_token = ...), and save it in a folder with the model."
            )
        tokenizer.pad_token_id = tokenizer.eos_token_id
    infinite = next((name for name, each in model.named_parameters() if not each.isfinite().all()), None)
    if infinite is not None:
        raise ModelError(f"model.source={config.source}: {infinite} holds what is no number (NaN or infinity)")
    digest = weights_digest(model)
    if config.quantize != "none":
        quantise(model, quantised_layers(model, new), config.quantize)
    positions, vocabulary = _limits(config, model, tokenizer)
    if config.task == "causal-lm":
        _check_causal(config, model, vocabulary)
    # by it decoders find a record's last token, which a classifier reads
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    stored = next((found for each in (shape, shape.get_text_config()) if (found := each.dtype) is not None), None)
    return BaseModel(
        model.to(torch.device(device)), tokenizer, digest, positions, vocabulary, new, stored or torch.float32
    )


def linear_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers inside the transformer, output heads left out."""
    heads = {id(m) for n, m in model.named_children() if isinstance(m, nn.Linear) or n in HEADS}
    heads |= {id(inner) for m in model.children() if id(m) in heads for inner in m.modules()}
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and id(m) not in heads]


def quantised_layers(model: nn.Module, new: Collection[str]) -> list[str]:
    """Return the names of the layers that model.quantize rounds; `new` were drawn at random, and are trained."""
    return [name for name in linear_layers(model) if name not in new]


def weights(model: nn.Module) -> int:
    """Return how many weights a model has, whatever holds them."""
    own = sum(p.numel() for p in model.parameters())
    return own + sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantisedLinear))


def _limits(config: ModelConfig, model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return the most tokens of a record, and the rows of the token embedding; raises ModelError where they do not do.

    A public record of `max_length` tokens, the tokenizer's highest among them, goes through the model's first block:
    what the configuration says is not always what the model takes, and private records must not be the first to tell.
    """
    inner = model.encoder if isinstance(model, MeanPooledClassifier) else model
    embedding: Any = inner.get_input_embeddings()
    vocabulary = int(embedding.weight.shape[0])
    highest = _check_tokens(config, tokenizer, vocabulary)
    positions, pad = _declared(model.config.get_text_config(), "max_position_embeddings"), tokenizer.pad_token_id
    total = positions
    for name, table in model.named_modules():
        # RoBERTa and its kin count positions from behind that of padding, and find padding by its token
        if isinstance(table, nn.Embedding) and "position" in name and table.padding_idx is not None:
            total, positions = table.num_embeddings, table.num_embeddings - table.padding_idx - 1
            if table.padding_idx != pad:
                raise ModelError(
                    f"model.source={config.source}: its tokenizer pads with token {pad}, and the model finds padding "
                    f"by token {table.padding_idx}. Set the tokenizer's pad_token to the latter and save it."
                )
    if positions < _SHORTEST:
        raise ModelError(f"model.source={config.source} has {positions} positions, expected at least {_SHORTEST}")
    if config.max_length > positions:
        usable = "" if total == positions else f", {positions} usable"
        raise ModelError(
            f"model.max_length={config.max_length}, but {config.source} has {total} positions{usable}. Lower it to "
            f"{positions} or less."
        )
    ids = made_up(vocabulary, config.max_length)
    ids[-1] = highest
    try:
        with torch.no_grad(), _first_block_only(model):
            model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])
    except Exception as error:
        raise ModelError(
            f"model.source={config.source} fails on a record of model.max_length={config.max_length} tokens "
            f"({first_line(error)}). Lower model.max_length; if that does not help, the model cannot be used."
        ) from error
    return positions, vocabulary


def _check_causal(config: ModelConfig, model: Any, vocabulary: int) -> None:
    """Raise ModelError if what a model says of a token depends on later ones, as that of an encoder does."""
    ids = made_up(vocabulary, 8).repeat(2, 1)
    ids[1, -1] = ids[0, 0]
    with torch.no_grad():
        first, second = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].float()
    if float((first - second).abs().max()) > 1e-5 * float(first.abs().max()):
        raise ModelError(
            f"model.source={config.source} reads later tokens ({model.config.model_type}): it is an encoder, and "
            "cannot learn to continue a text. Give a causal language model (GPT-2, Llama, Qwen ...), or set "
            "model.task=classification."
        )


def _check_tokens(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
    """Return the highest token that text makes; raises ModelError where an embedding of `vocabulary` rows lacks it."""
    tokens = tokenizer.get_vocab()
    if vocabulary < _FEWEST:
        raise ModelError(f"model.source={config.source} knows {vocabulary} tokens, expected at least {_FEWEST}")
    if len(set(tokens) - set(tokenizer.all_special_tokens)) < 2:  # transformers makes one up where its file is lost
        raise ModelError(
            f"model.source={config.source}: its tokenizer knows no text, as if its files were missing. Put "
            "tokenizer.json, or the vocabulary that the tokenizer was made of, beside the weights."
        )
    # a special token that no text makes may lie beyond: the image token of Gemma 3; a record that has it is refused
    used = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    special = set(tokenizer.all_special_ids) - used
    usual = {name: number for name, number in tokens.items() if number not in special}
    beyond = sorted((number, name) for name, number in usual.items() if number >= vocabulary)
    if beyond:
        number, name = beyond[0]
        raise ModelError(
            f"model.source={config.source}: its tokenizer has {len(tokens)} tokens, its embedding {vocabulary}: token "
            f"{number} ({name!r}) has none. Resize the embedding (model.resize_token_embeddings({max(beyond)[0] + 1})) "
            "and save model and tokenizer together."
        )
    return int(max(usual.values()))


class _Enough(Exception):
    """The first block has run."""


@contextlib.contextmanager
def _first_block_only(model: nn.Module) -> Iterator[None]:
    """End a forward pass before the second of the model's blocks: positions and tokens are looked up before."""
    blocks: Any = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=())

    def stop(*_: object) -> None:
        raise _Enough

    hook = blocks[1].register_forward_pre_hook(stop) if len(blocks) > 1 else None
    try:
        with contextlib.suppress(_Enough):
            yield
    finally:
        if hook is not None:
            hook.remove()


def made_up(vocabulary: int, n: int) -> Tensor:
    """Return public made-up tokens, int64[n]: at most 16 different ones, whatever the model's vocabulary."""
    return _FIRST + torch.arange(n) % min(_MADE_UP, vocabulary - _FIRST - 1)


def _located(config: ModelConfig) -> tuple[str | Path, dict[str, Any]]:
    """Return where a model is, and which revision of it."""
    try:
        source = resolve(config.source)
    except ConfigError as error:  # begins with the source
        raise ConfigError(f"model.source={error}") from None
    return source, {"revision": config.revision} if isinstance(source, str) and config.revision else {}


@contextlib.contextmanager
def _explained(config: ModelConfig, source: str | Path) -> Iterator[None]:
    """Turn what transformers raises, which is of many types, into one clear error."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        hint = "without network, give a local folder as model.source"
        if isinstance(source, Path):
            hint = "the folder needs config.json, weights and tokenizer files"
        if "deserializing header" in str(error):
            hint = "a file of weights is damaged, or a Git LFS pointer in its place: git lfs pull"
        backend = any(word in str(error).lower() for word in ("sentencepiece", "tiktoken"))
        if backend and not (isinstance(source, Path) and not any(source.glob("*.model"))):
            hint = (
                "it has only a tokenizer.model: pip install sentencepiece protobuf, or write tokenizer.json where they "
                "are installed, by AutoTokenizer.from_pretrained(model).save_pretrained(model)"
            )
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "Unrecognized configuration class" in reason:  # of an AutoModel
            reason = f"transformers has no model for model.task={config.task} of this architecture"
            hint = "give a causal language model (GPT-2, Llama, Qwen ...)"
            if config.task == "classification":
                hint = "model.pooling=mean puts a head of its own on it"
        raise ModelError(f"model.source={config.source} cannot be loaded: {reason} ({hint})") from error


def _shape(config: ModelConfig, source: str | Path, where: dict[str, Any]) -> Any:
    """Return a model's configuration; raises ModelError where it is none, or that of an encoder with a decoder."""
    try:
        shape = AutoConfig.from_pretrained(source, trust_remote_code=False, **where)
    except Exception:
        base = _base_of_adapter(source, where)
        if base is None:
            raise
        raise ModelError(
            f"model.source={config.source} is an adapter of {base}, not a base model. Give model.source={base}; to go "
            "on from the adapter, merge it first: "
            "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)."
        ) from None
    if getattr(shape, "is_encoder_decoder", False):
        raise ModelError(
            f"model.source={config.source} is an encoder with a decoder ({shape.model_type}), expected one of the two. "
            "Give a causal language model (GPT-2, Llama, Qwen ...), or for task=classification an encoder (BERT ...)."
        )
    return shape


def _base_of_adapter(source: str | Path, where: dict[str, Any]) -> str | None:
    """Return the base that an adapter names; None where there is no adapter."""
    with contextlib.suppress(Exception):  # of the hub's client; the caller has a better error
        file = cached_file(source, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **where)
        if file is not None:
            return str(json.loads(Path(file).read_text("utf-8"))["base_model_name_or_path"])
    return None


def _check_weights(source: str | Path, where: dict[str, Any]) -> None:
    """Raise OSError unless weights are in safetensors; transformers would have a service of the hub convert others."""
    names = ("model.safetensors", "model.safetensors.index.json")
    if all(cached_file(source, each, _raise_exceptions_for_missing_entries=False, **where) is None for each in names):
        raise OSError(_NO_WEIGHTS)


def _check_head(config: ModelConfig, shape: Any) -> None:
    """Raise ModelError where a checkpoint's own head has other classes than the labels, or them in another order."""
    head = any("ForSequenceClassification" in name for name in getattr(shape, "architectures", None) or ())
    if not head or config.task != "classification" or config.pooling != "native":
        return
    classes = [str(shape.id2label[number]) for number in sorted(shape.id2label)]
    named = ", ".join(classes[:10])
    if len(classes) != len(config.labels):
        raise ModelError(
            f"model.source={config.source} has a head of {len(classes)} classes ({named}), and model.labels holds "
            f"{len(config.labels)}. Declare them all, or set model.pooling=mean for a new head."
        )
    if sorted(classes) == sorted(config.labels) and classes != list(config.labels):
        raise ModelError(
            f"model.source={config.source} has the classes in another order than model.labels. Give "
            f"model.labels=[{','.join(classes)}], or set model.pooling=mean for a new head."
        )


def _from_pretrained(
    config: ModelConfig, source: str | Path, where: dict[str, Any], seed: int
) -> tuple[Any, tuple[str, ...]]:
    """Return a model, and its modules that the checkpoint lacks."""
    if config.task == "causal-lm":
        return _load(AutoModelForCausalLM, source, where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.pooling == "mean":
            encoder, _ = _load(AutoModel, source, where)  # without its pooler
            return MeanPooledClassifier(encoder, len(config.labels)), ()
        return _load(AutoModelForSequenceClassification, source, {**where, "num_labels": len(config.labels)})


def _load(kind: Any, source: str | Path, options: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """Load a model; raises ModelError if the checkpoint lacks weights, but for a classifier's new head.

    Returns the modules that hold the weights of that head, too. transformers would make them up at random, and says so
    in a table that it also prints for every new head.
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, found = kind.from_pretrained(
            source,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    lacking = sorted(found["missing_keys"])
    new = tuple(dict.fromkeys(key.rpartition(".")[0] for key in lacking))
    if kind is not AutoModelForCausalLM:  # a pooler is part of a head: encoders without one are common
        inner = f"{model.base_model_prefix}." if kind is AutoModelForSequenceClassification else ""
        lacking = [key for key in lacking if key.startswith(inner) and "pooler." not in key]
    if lacking:
        raise ModelError(
            f"model.source={source} cannot be loaded: its weights lack {lacking[0]} and {len(lacking) - 1} more. "
            "Is model.task right, and the file complete?"
        )
    return model, new


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256, in hex, over the model's parameters and persistent buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pick_dtype(dtype: str, model: nn.Module) -> torch.dtype:
    """Return the type of the frozen weights while training.

    auto: bfloat16 if `model` has at least 20 million parameters and its device multiplies bfloat16 faster.
    """
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if weights(model) < _PAYS_IN_BFLOAT16:
        return torch.float32
    if next(model.parameters()).device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # torch has no public name for these
        faster = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if faster else torch.float32


def pick_device(device: str) -> str:
    """Return `device`, where auto is cuda if there is one; raises ModelError if it is absent."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).cpu()  # values go there and come back, as they do not from "meta"
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"site.device={device} is not usable here ({first_line(error)}). Use auto or cpu.") from None
    if device.startswith("cuda") and os.environ.get(_WORKSPACE) not in _REPEATABLE:
        os.environ[_WORKSPACE] = _REPEATABLE[0]  # read before the first product
    return device
