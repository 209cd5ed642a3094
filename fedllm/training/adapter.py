"""An adapter on a base model: PEFT's methods and file format, one flat float32 vector to the outside."""

import contextlib
import copy
import hashlib
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from fedllm.adapter_vector import AdapterSpec, TensorSpec
from fedllm.config import AdapterConfig, ModelConfig
from fedllm.errors import ModelError, first_line
from fedllm.training.chat import AnswerEnd
from fedllm.training.model import HEADS, BaseModel, linear_layers, load_base, made_up, pick_dtype, weights
from fedllm.training.precision import SAME_LOGITS
from fedllm.training.quantised import unseen

with unseen():
    from peft import (
        IA3Config,
        LoraConfig,
        PeftConfig,
        PeftModel,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        get_peft_model,
        get_peft_model_state_dict,
    )

_KEPT = "The run's checkpoint holds the right values. Is peft the version of constraints.txt, and the disk sound?"
_BENT = 1e4  # times by which logits are made large, so that a cap on them is seen
_RELOAD = 1 << 30  # bytes of a base, in float32, that may be loaded a second time
_OWN = ("lora_", "ia3_", "prompt_encoder.")  # in the names of what PEFT adds to a model
_PREFIX = 0.02  # deviation of the first keys and values of a prefix: PEFT's own, 1, drowns the text


class AdapterModel:
    """A base model with one adapter, whose values are swapped in and out as a flat vector.

    Sites of one process share it: hold `lock` from `load` until the values have been used.
    """

    def __init__(self, model: PeftModel, base: BaseModel, scaling: float) -> None:
        """Take `model`, which is `base` with an adapter in it."""
        self.model, self.tokenizer = model, base.tokenizer
        self.positions, self.vocabulary = base.positions, base.vocabulary  # tokens of a record, and different ones
        self.config = model.peft_config["default"]
        self.classifies = self.config.task_type == "SEQ_CLS"
        self.lock = threading.RLock()
        parameters = dict(model.named_parameters())
        self._trainable = {name: p for name, p in parameters.items() if p.requires_grad}
        self.flat = _joined(list(self._trainable.values()))
        frozen = {name: p for name, p in parameters.items() if "lora_" in name and not p.requires_grad}
        self.spec = AdapterSpec(
            base=base.digest,
            frozen=_digest(frozen),
            scaling=scaling,
            tensors=tuple(TensorSpec(name, tuple(p.shape)) for name, p in self._trainable.items()),
        )
        self.initial = self.vector()  # float32[d], before any training
        self.split = _split(model, base.vocabulary)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, in the order of the flat vector."""
        return self._trainable

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.flat.device

    def vector(self) -> NDArray[np.float32]:
        """Return a copy of the current values, float32[d]."""
        return self.flat.detach().cpu().numpy().copy()

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [N, T, vocabulary] of the text's own tokens, or [N, classes], for [N, T] each."""
        return logits_of(self.model, input_ids, attention_mask)

    def load(self, vector: NDArray[np.float32]) -> None:
        """Set the values from float32[d]; raises SpecMismatch on another shape."""
        self.spec.split(vector)  # which checks it
        with torch.no_grad():
            self.flat.copy_(torch.from_numpy(vector.copy()))

    def most_apart(self, a: Tensor, b: Tensor) -> str:
        """Return the tensor in which two vectors, [d], differ most, and by what share of its length: for people."""
        sizes = [math.prod(tensor.shape) for tensor in self.spec.tensors]
        parts = zip(self.spec.tensors, torch.split(a, sizes), torch.split(b, sizes), strict=True)
        apart, length, name = max((float((x - y).norm()), float(y.norm()), tensor.name) for tensor, x, y in parts)
        return f"{_saved_name(name)}, by {apart / max(length, 1e-30):.3g} of its length"

    def save(self, vector: NDArray[np.float32], folder: Path, base: str, revision: str | None = None) -> None:
        """Write the adapter float32[d] in PEFT format, naming its `base`, and read it back.

        PeftModel.from_pretrained(model, folder) loads it. The live values are neither used nor changed. Raises
        ModelError if a value of `vector` is not in the file under the name that PEFT gives it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        values = self._values(vector)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            state = get_peft_model_state_dict(
                self.model, state_dict={**self.model.state_dict(), **values}, save_embedding_layers=False
            )
        if self.config.is_prompt_learning:  # which PEFT takes from the live values
            state["prompt_embeddings"] = self._virtual(values)
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in state.items()}, folder / "adapter_model.safetensors"
        )
        self.check_file(folder / "adapter_model.safetensors", vector)
        config = copy.deepcopy(self.config)
        config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
        config.save_pretrained(str(folder))

    def _values(self, vector: NDArray[np.float32]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array.copy()) for name, array in self.spec.split(vector).items()}

    def check_file(self, path: Path, vector: NDArray[np.float32]) -> None:
        """Raise ModelError unless the file at `path` holds the adapter float32[d], and the frozen part of it."""
        values = self._values(vector)
        kept = ("lora_", ".modules_to_save.default.")
        live = {
            name: p.detach().cpu() for name, p in self.model.named_parameters() if any(part in name for part in kept)
        }
        right = {_saved_name(name): value for name, value in {**live, **values}.items()}
        if self.config.is_prompt_learning:
            right = {name: value for name, value in right.items() if not name.startswith("prompt_encoder.")}
            right["prompt_embeddings"] = self._virtual(values)
        found = load_file(path)
        wrong = sorted(set(found) - set(right))
        wrong += [name for name in right if name not in found or not torch.equal(found[name], right[name])]
        if wrong:
            raise ModelError(f"{path} does not hold what was trained: {', '.join(wrong[:3])}. {_KEPT}")

    def _virtual(self, values: dict[str, Tensor]) -> Tensor:
        """Return the virtual tokens that trained `values` stand for, [tokens, width]: what PEFT saves.

        Of `ptuning`, this is what its network computes. The network itself serves training alone and is not saved.
        """
        encoder = cast(Any, self.model.prompt_encoder)["default"]
        start = "prompt_encoder.default."
        own = {name.removeprefix(start): value.to(self.device) for name, value in values.items() if start in name}
        with torch.no_grad():
            tokens = torch.arange(self.config.num_virtual_tokens, device=self.device)
            found: Tensor = functional_call(encoder, own, (tokens[None],))[0]
        return found.cpu()


def generated(model: Any, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
    """Return the tokens, int64[N, new], that `generate` of transformers adds to texts padded on the left.

    `model` is one of transformers, or of PEFT. PEFT 0.21's own gives other tokens than the model's logits if there are
    virtual ones: transformers 5 does not tell it any more where a text begins. So the base generates, and is given what
    PEFT makes of the virtual tokens. `options` name the `pad_token_id`.
    """
    virtual = virtual_tokens(model)
    if not virtual:
        whole: Tensor = model.generate(input_ids=input_ids, attention_mask=attention_mask, **options)
        return whole[:, input_ids.shape[1] :]
    inputs, given = _prompted(model, input_ids, attention_mask), 0
    if "input_ids" in inputs:  # as if it had read tokens before the text
        blank = input_ids.new_full((len(input_ids), virtual), options["pad_token_id"])
        inputs["input_ids"] = torch.cat([blank, input_ids], dim=1)
        given = inputs["input_ids"].shape[1]
    with _quiet():
        new: Tensor = cast(Any, model.get_base_model()).generate(**inputs, **options)
    return new[:, given:]


def answered(
    model: Any, tokenizer: Any, end: AnswerEnd, prompts: Sequence[Sequence[int]], most: int, **options: Any
) -> list[str]:
    """Return what a model answers to prompts, as text: greedy, at most `most` tokens each, up to what ends an answer.

    `options` are of transformers' `generate`.
    """
    pad, width = tokenizer.pad_token_id, max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left, so that every answer begins at `width`
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = next(model.parameters()).device
    chosen = {"do_sample": False, "eos_token_id": list(end.tokens) or None, **options}
    new = generated(model, ids.to(device), mask.to(device), max_new_tokens=most, pad_token_id=pad, **chosen)
    texts = tokenizer.batch_decode([end.cut(answer) for answer in new.tolist()], skip_special_tokens=True)
    return [(str(text).partition(end.text)[0] if end.text else str(text)).strip() for text in texts]


def check_saved(folder: Path, adapter: AdapterModel, vector: NDArray[np.float32], model: ModelConfig) -> bool:
    """Load a saved adapter as its users will, onto a fresh base, and compare its logits with those of `vector`.

    Raises ModelError if they differ. Returns whether it was done: a base above 1 GiB is not loaded a second time.
    """
    live = adapter.model
    if weights(live) * 4 > _RELOAD:
        return False
    ids = made_up(adapter.vocabulary, 12).reshape(2, 6).to(adapter.device)
    # by another seed: whatever the checkpoint lacks is other for every user, unless it is in the file
    base = load_base(model, str(adapter.device), seed=1).model
    with warnings.catch_warnings(), torch.no_grad(), unseen():
        warnings.simplefilter("ignore")  # of peft, on reading its own configuration
        try:
            # virtual tokens are loaded as they are used: PEFT would make `ptuning` a new network to train
            trains = not adapter.config.is_prompt_learning
            fresh = PeftModel.from_pretrained(cast(Any, base), str(folder), is_trainable=trains).eval()
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"the adapter saved in {folder} does not load ({str(error)[:200]}). {_KEPT}") from error
        dtype = next((p.dtype for p in live.parameters() if p.dtype != torch.float32), torch.float32)
        for name, p in fresh.named_parameters():  # which tells what stays in float32
            p.requires_grad_(p.requires_grad or name in adapter.trainable)
        _narrow(fresh, dtype)
        with adapter.lock:
            before = adapter.vector()
            try:
                adapter.load(vector)
                trained = adapter.logits(ids, torch.ones_like(ids)).float()
            finally:
                adapter.load(before)
        saved = logits_of(fresh, ids, torch.ones_like(ids)).float()
    apart = float((saved - trained).norm() / trained.norm().clamp(min=1e-30))
    if not apart <= SAME_LOGITS[dtype]:
        raise ModelError(
            f"the adapter saved in {folder} is not the one that was trained: its logits are {apart:.3g} of their size "
            f"away. {_KEPT}"
        )
    return True


def _saved_name(name: str) -> str:
    """Return the name of a parameter in PEFT's file: the adapter is not named there, whatever it was called."""
    name = re.sub(r"(\.modules_to_save)?\.default(?=\.|$)", "", name)
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


def virtual_tokens(model: Any) -> int:
    """Return how many tokens an adapter puts before every text."""
    config: Any = model.peft_config["default"] if isinstance(model, PeftModel) else None
    return int(config.num_virtual_tokens) if config is not None and config.is_prompt_learning else 0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what transformers 5 says of how PEFT 0.21 calls it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*past_key_values", FutureWarning)
        yield


def logits_of(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return logits [N, T, vocabulary] of the text's own tokens, or [N, classes], of any model."""
    with _quiet() if virtual_tokens(model) else contextlib.nullcontext():
        output: Tensor = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return output[:, -input_ids.shape[1] :] if output.ndim == 3 else output


def _prompted(model: PeftModel, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """Return what PEFT gives to a base model, or to its transformer, for a text: virtual tokens, then the text's.

    Padding on the left stands between the two: it is masked, and counts as no position.
    """
    records, tokens = len(input_ids), model.peft_config["default"].num_virtual_tokens
    mask = torch.cat([attention_mask.new_ones((records, tokens)), attention_mask], dim=1)
    prompts: Any = model.get_prompt(records)
    if model.peft_config["default"].peft_type == "PREFIX_TUNING":  # a cache of keys and values
        return {"input_ids": input_ids, "attention_mask": mask, "past_key_values": prompts}
    text = cast(Any, model).word_embeddings(input_ids)
    return {"inputs_embeds": torch.cat([prompts.to(text.dtype), text], dim=1), "attention_mask": mask}


def attach(base: BaseModel, model: ModelConfig, adapter: AdapterConfig, seed: int) -> AdapterModel:
    """Put a fresh adapter on `base` (which it takes over). Equal arguments give equal initial values everywhere.

    Raises ModelError if the targets do not exist, or the method does not fit the model.
    """
    linear = _check_choice(base, model, adapter)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), unseen():
            warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5 for an old property
            warnings.filterwarnings("ignore", "The following .*_pattern keys", RuntimeWarning)  # of fused experts
            torch.manual_seed(seed)
            config = _peft_config(base, model, adapter, linear)
            peft_model = cast(PeftModel, get_peft_model(cast(Any, base.model), config))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        about = f"adapter.method={adapter.method}"
        if adapter.has_matrices:
            about = f"adapter.targets={adapter.targets}"
        raise ModelError(
            f"{about} does not fit the model ({first_line(error)}). Its linear layers: {', '.join(linear)}"
        ) from error
    fused = sorted(getattr(peft_model.peft_config["default"], "target_parameters", None) or ())
    if fused:  # PEFT adapts them by a factor on the parameter, which has no rows of single records
        raise ModelError(
            f"adapter.targets={adapter.targets}: the model's experts are fused into single parameters "
            f"({', '.join(fused)}), through which every record's tokens go at once, so that they have no gradients of "
            f"single records. Give adapter.targets=[{','.join(linear)}]."
        )
    _freeze(peft_model, adapter)
    if adapter.method == "prefix":
        with torch.no_grad():
            cast(Any, peft_model.prompt_encoder)["default"].embedding.weight.mul_(_PREFIX)
    peft_model.eval()
    if adapter.virtual_tokens:
        _check_padding(peft_model, base, adapter)
    _narrow(peft_model, pick_dtype(model.dtype, base.model))
    base = replace(base, positions=base.positions - adapter.virtual_tokens)
    return AdapterModel(peft_model, base, adapter.scaling)


def _check_choice(base: BaseModel, model: ModelConfig, adapter: AdapterConfig) -> list[str]:
    """Raise ModelError if a model lacks the chosen layers or positions; return the last names of its linear layers."""
    blocks = int(getattr(base.model.config, "num_hidden_layers", 0))
    if adapter.layers is not None and max(adapter.layers) >= blocks:
        raise ModelError(f"adapter.layers={list(adapter.layers)}: the model has blocks 0 to {blocks - 1}")
    room = base.positions - adapter.virtual_tokens
    if model.max_length > room:
        raise ModelError(
            f"adapter.tokens={adapter.tokens} and model.max_length={model.max_length} are more than the "
            f"{base.positions} positions that {model.source} has. Lower one of them."
        )
    linear = sorted({name.rpartition(".")[2] for name in linear_layers(base.model)})
    unknown = sorted(set(adapter.targets) - set(linear)) if adapter.targets != "all-linear" else []
    if unknown:
        raise ModelError(
            f"adapter.targets: no linear layer is called {', '.join(unknown)}; there are {', '.join(linear)}"
        )
    return linear


def _freeze(model: PeftModel, adapter: AdapterConfig) -> None:
    """Leave trainable what PEFT adds, A only if it is to be trained, and the linear layers of a new head."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) and not any(own in f"{name}." for own in _OWN):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    if adapter.has_matrices and adapter.train == "B":
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)


def _peft_config(base: BaseModel, model: ModelConfig, adapter: AdapterConfig, linear: list[str]) -> PeftConfig:
    """Return what PEFT calls the configuration of an adapter; `linear` are the last names of linear layers."""
    # trained and saved whole, as the head is: who loads the adapter gets the same
    new = [name for name in base.new if name.partition(".")[0] not in HEADS] or None
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM" if model.task == "causal-lm" else "SEQ_CLS", "modules_to_save": new,
    }  # fmt: skip
    if adapter.virtual_tokens:
        common["num_virtual_tokens"] = adapter.tokens
        if adapter.method == "prompt":  # tokens of the vocabulary: Lester et al. 2021
            return PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **common)
        return PrefixTuningConfig(**common) if adapter.method == "prefix" else PromptEncoderConfig(**common)
    if adapter.method == "ia3":  # which names layers whole: PEFT has no choice of blocks for it
        chosen = [name for name in linear_layers(base.model) if _chosen(name, adapter)]
        # where a layer reads anything else than the model's states, it is what it reads that is scaled, as in the paper
        width = cast(Any, base.model.config).get_text_config().hidden_size
        inner = [name for name in chosen if _inputs(base.model.get_submodule(name)) != width]
        return IA3Config(target_modules=chosen, feedforward_modules=inner, exclude_modules=new, **common)
    targets: Any = list(adapter.targets)
    if adapter.targets == "all-linear":  # PEFT's own "all-linear" does not go with a choice of layers
        targets = linear if adapter.layers is not None else "all-linear"
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        layers_to_transform=list(adapter.layers) if adapter.layers is not None else None,
        bias="none",
        exclude_modules=new,
        use_rslora=adapter.method == "rslora",
        use_dora=adapter.method == "dora",
        **common,
    )


def _chosen(name: str, adapter: AdapterConfig) -> bool:
    """Whether a linear layer is one of `adapter.targets` in one of `adapter.layers`."""
    block = re.search(r"\.(\d+)\.", name)
    return (adapter.targets == "all-linear" or name.rpartition(".")[2] in adapter.targets) and (
        adapter.layers is None or (block is not None and int(block[1]) in adapter.layers)
    )


def _inputs(layer: nn.Module) -> int:
    """Return how many values a linear layer reads."""
    return int(cast(Any, layer).nx if isinstance(layer, Conv1D) else cast(nn.Linear, layer).in_features)


def _check_padding(model: PeftModel, base: BaseModel, adapter: AdapterConfig) -> None:
    """Raise ModelError if the model does not take virtual tokens, or if padding a text changes what it makes of it."""
    device = next(model.parameters()).device
    ids = made_up(base.vocabulary, 12).reshape(2, 6).to(device)
    pad = torch.full_like(ids[:, :3], cast(Any, base.tokenizer).pad_token_id)
    mask = torch.ones_like(ids)
    remedy = "Use adapter.method=lora."
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = logits_of(model, ids, mask)
            padded = logits_of(model, torch.cat([ids, pad], 1), torch.cat([mask, torch.zeros_like(pad)], 1))
    except Exception as error:  # of PEFT, which knows what a model takes, or of the model
        raise ModelError(
            f"adapter.method={adapter.method} does not fit the model ({first_line(error)}). {remedy}"
        ) from error
    padded = padded[:, : ids.shape[1]] if plain.ndim == 3 else padded
    if not torch.allclose(plain, padded, rtol=1e-3, atol=1e-3 * float(plain.abs().max())):
        raise ModelError(
            f"adapter.method={adapter.method} does not fit the model: with virtual tokens, it takes padding for text "
            f"(a decoder that classifies finds a text's end by its tokens, and is given their embeddings). {remedy}"
        )


def _narrow(model: PeftModel, dtype: torch.dtype) -> None:
    """Give the base's frozen weights another type; the adapter, and with it clip and noise, stays float32.

    Only now: digests and initial values must not depend on what a party computes with.
    """
    if dtype == torch.float32:
        return
    for name, p in model.named_parameters():
        if not p.requires_grad and "lora_" not in name:
            p.data = p.data.to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:  # a head: PEFT converts for its own layers
            module.register_forward_pre_hook(lambda layer, x: (x[0].to(layer.weight.dtype), *x[1:]))


def _joined(parameters: list[nn.Parameter]) -> nn.Parameter:
    """Move the values of `parameters` into one vector, float32[d], of which they become views; return it.

    What is done to the vector is done to the model: one tensor to load, clip, add noise to and optimise.
    """
    flat = nn.Parameter(torch.cat([p.detach().reshape(-1).float() for p in parameters]))
    for p, values in zip(parameters, torch.split(flat.detach(), [p.numel() for p in parameters]), strict=True):
        p.data = values.view(p.shape)
    return flat


def _split(model: PeftModel, vocabulary: int) -> tuple[Callable[..., Any], nn.Module] | None:
    """Return transformer and output head of a causal LM, where the second after the first is all there is to it.

    The transformer takes input_ids and attention_mask, and returns states of virtual tokens before those of the text.

    Some models scale or cap their logits in between, so equality is measured once, on a few tokens, with logits as
    they are and with large ones: a cap does not bend those far below it.
    """
    inner: Any = model.get_base_model()
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    transformer = getattr(inner, "base_model", None)
    if head is None or transformer is None or transformer is inner or any(p.requires_grad for p in head.parameters()):
        return None
    ids = made_up(vocabulary, 8)[None].to(next(model.parameters()).device)

    def same(times: float) -> bool:
        states: list[Tensor] = []

        def scale(_: nn.Module, __: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state * times
            states.append(output.last_hidden_state)
            return output

        hook = transformer.register_forward_hook(scale)
        try:
            whole = inner(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        finally:
            hook.remove()
        if len(states) != 1:
            return False
        expected = head(states[0])
        return expected.shape == whole.shape and torch.allclose(expected, whole, rtol=1e-4, atol=1e-5 * times)

    with torch.no_grad():
        if not (same(1.0) and same(_BENT)):
            return None
        if not model.peft_config["default"].is_prompt_learning:
            return transformer, head

        def prompted(input_ids: Tensor, attention_mask: Tensor) -> Any:
            with _quiet():
                return transformer(**_prompted(model, input_ids, attention_mask))

        mask = torch.ones_like(ids)
        states = prompted(ids, mask).last_hidden_state[:, -ids.shape[1] :]
        fits = torch.allclose(head(states), logits_of(model, ids, mask), rtol=1e-4, atol=1e-5)
        return (prompted, head) if fits else None


def _digest(parameters: dict[str, nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()
