"""A LoRA adapter on a base model: PEFT's layers and file format, one flat float32 vector to the outside."""

import copy
import hashlib
import math
import threading
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from fedllm.adapter_vector import AdapterSpec, TensorSpec
from fedllm.config import AdapterConfig, ModelConfig
from fedllm.errors import ModelError, first_line
from fedllm.training.model import HEADS, BaseModel, linear_layers, load_base, made_up, pick_dtype, weights
from fedllm.training.precision import SAME_LOGITS
from fedllm.training.quantised import unseen

with unseen():
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

_KEPT = "The run's checkpoint holds the right values. Is peft the version of constraints.txt, and the disk sound?"
_BENT = 1e4  # times by which logits are made large, so that a cap on them is seen
_RELOAD = 1 << 30  # bytes of a base, in float32, that may be loaded a second time


class AdapterModel:
    """A base model with one adapter, whose values are swapped in and out as a flat vector.

    Sites of one process share it: hold `lock` from `load` until the values have been used.
    """

    def __init__(self, model: PeftModel, base: BaseModel, scaling: float) -> None:
        """Take `model`, which is `base` with an adapter in it."""
        self.model, self.tokenizer = model, base.tokenizer
        self.positions, self.vocabulary = base.positions, base.vocabulary  # tokens of a record, and different ones
        self.classifies = model.peft_config["default"].task_type == "SEQ_CLS"
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

    def load(self, vector: NDArray[np.float32]) -> None:
        """Set the values from float32[d]; raises SpecMismatch on another shape."""
        self.spec.split(vector)  # which checks it
        with torch.no_grad():
            self.flat.copy_(torch.from_numpy(vector.copy()))

    def most_apart(self, a: torch.Tensor, b: torch.Tensor) -> str:
        """Return the tensor in which two vectors, [d], differ most, and by what share of its length: for people."""
        sizes = [math.prod(tensor.shape) for tensor in self.spec.tensors]
        parts = zip(self.spec.tensors, torch.split(a, sizes), torch.split(b, sizes), strict=True)
        apart, length, name = max((float((x - y).norm()), float(y.norm()), tensor.name) for tensor, x, y in parts)
        return f"{_saved_name(name)}, by {apart / max(length, 1e-30):.3g} of its length"

    def save(self, vector: NDArray[np.float32], folder: Path, base: str) -> None:
        """Write the adapter float32[d] in PEFT format, naming its `base`, and read it back.

        PeftModel.from_pretrained(model, folder) loads it. The live values are neither used nor changed. Raises
        ModelError if a value of `vector` is not in the file under the name that PEFT gives it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        values = {name: torch.from_numpy(array.copy()) for name, array in self.spec.split(vector).items()}
        state = get_peft_model_state_dict(
            self.model, state_dict={**self.model.state_dict(), **values}, save_embedding_layers=False
        )
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in state.items()}, folder / "adapter_model.safetensors"
        )
        self._check_file(folder / "adapter_model.safetensors", values)
        config = copy.deepcopy(self.model.peft_config["default"])
        config.base_model_name_or_path, config.inference_mode = base, True
        config.save_pretrained(str(folder))

    def _check_file(self, path: Path, values: dict[str, torch.Tensor]) -> None:
        """Raise ModelError unless the file at `path` holds `values` and the frozen part of the adapter."""
        kept = ("lora_", ".modules_to_save.default.")
        live = {
            name: p.detach().cpu() for name, p in self.model.named_parameters() if any(part in name for part in kept)
        }
        right = {_saved_name(name): value for name, value in {**live, **values}.items()}
        found = load_file(path)
        wrong = sorted(set(found) - set(right))
        wrong += [name for name in right if name not in found or not torch.equal(found[name], right[name])]
        if wrong:
            raise ModelError(f"{path} does not hold what was trained: {', '.join(wrong[:3])}. {_KEPT}")


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
            fresh = PeftModel.from_pretrained(cast(Any, base), str(folder), is_trainable=True).eval()
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"the adapter saved in {folder} does not load ({str(error)[:200]}). {_KEPT}") from error
        dtype = next((p.dtype for p in live.parameters() if p.dtype != torch.float32), torch.float32)
        _narrow(fresh, dtype)
        with adapter.lock:
            before = adapter.vector()
            try:
                adapter.load(vector)
                trained = live(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
            finally:
                adapter.load(before)
        saved = fresh(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    apart = float((saved - trained).norm() / trained.norm().clamp(min=1e-30))
    if not apart <= SAME_LOGITS[dtype]:
        raise ModelError(
            f"the adapter saved in {folder} is not the one that was trained: its logits are {apart:.3g} of their size "
            f"away. {_KEPT}"
        )
    return True


def _saved_name(name: str) -> str:
    """Return the name of a parameter in PEFT's file: the adapter is not named there, whatever it was called."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def attach(base: BaseModel, model: ModelConfig, adapter: AdapterConfig, seed: int) -> AdapterModel:
    """Put a fresh adapter on `base` (which it takes over). Equal arguments give equal initial values everywhere.

    Raises ModelError if the targets do not exist, or a trainable layer is not a linear one.
    """
    blocks = int(getattr(base.model.config, "num_hidden_layers", 0))
    if adapter.layers is not None and max(adapter.layers) >= blocks:
        raise ModelError(f"adapter.layers={list(adapter.layers)}: the model has blocks 0 to {blocks - 1}")
    linear = sorted({name.rpartition(".")[2] for name in linear_layers(base.model)})
    targets: Any = list(adapter.targets)
    if adapter.targets == "all-linear":  # PEFT's own "all-linear" does not go with a choice of layers
        targets = linear if adapter.layers is not None else "all-linear"
    new = [name for name in base.new if name.partition(".")[0] not in HEADS] or None
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        layers_to_transform=list(adapter.layers) if adapter.layers is not None else None,
        bias="none",
        task_type="CAUSAL_LM" if model.task == "causal-lm" else "SEQ_CLS",
        # trained and saved whole, as the head is: who loads the adapter gets the same
        modules_to_save=new,
        exclude_modules=new,
    )
    unknown = sorted(set(targets) - set(linear)) if isinstance(targets, list) else []
    if unknown:
        raise ModelError(
            f"adapter.targets: no linear layer is called {', '.join(unknown)}; there are {', '.join(linear)}"
        )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), unseen():
            warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5 for an old property
            warnings.filterwarnings("ignore", "The following .*_pattern keys", RuntimeWarning)  # of fused experts
            torch.manual_seed(seed)
            peft_model = cast(PeftModel, get_peft_model(cast(Any, base.model), config))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"adapter.targets={adapter.targets} does not fit the model ({first_line(error)}). Its linear layers: "
            f"{', '.join(linear)}"
        ) from error
    fused = sorted(getattr(peft_model.peft_config["default"], "target_parameters", None) or ())
    if fused:  # PEFT adapts them by a factor on the parameter, which has no rows of single records
        raise ModelError(
            f"adapter.targets={adapter.targets}: the model's experts are fused into single parameters "
            f"({', '.join(fused)}), through which every record's tokens go at once, so that they have no gradients of "
            f"single records. Give adapter.targets=[{','.join(linear)}]."
        )
    for module in peft_model.modules():  # of a new head, a norm stays as it is: only linear layers are trained
        if not isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    if adapter.train == "B":
        for name, parameter in peft_model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
    peft_model.eval()
    _narrow(peft_model, pick_dtype(model.dtype, base.model))
    return AdapterModel(peft_model, base, adapter.alpha / adapter.rank)


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


def _split(model: PeftModel, vocabulary: int) -> tuple[nn.Module, nn.Module] | None:
    """Return transformer and output head of a causal LM, where the second after the first is all there is to it.

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
        states: list[torch.Tensor] = []

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
        return (transformer, head) if same(1.0) and same(_BENT) else None


def _digest(parameters: dict[str, nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()
