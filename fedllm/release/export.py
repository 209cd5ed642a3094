"""From a finished run to a release: an ordinary Hugging Face folder, its cards, and one signed manifest.

The adapter goes out as it is, or merged: what it adds to the weights is added in float32, and the sum is rounded once,
to the type in which the base is stored. A merged model may be quantised for inference (bitsandbytes). A base that was
quantised in training is merged as it was trained against, with its rounded weights.
"""

import gc
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.utils import logging as transformers_logging

import fedllm
from fedllm.crypto.identity import Identity
from fedllm.errors import ModelError, ReleaseError, first_line
from fedllm.files import new_folder, system_errors
from fedllm.release.cards import write_cards
from fedllm.release.chat_template import made_template
from fedllm.release.finished_run import FinishedRun
from fedllm.release.loading import BASE, HEAD, load_release
from fedllm.release.manifest import Base, Manifest, check_public, sign_release
from fedllm.training.adapter import AdapterModel, attach
from fedllm.training.chat import AnswerEnd, answer_end
from fedllm.training.model import (
    HEADS,
    BaseModel,
    MeanPooledClassifier,
    linear_layers,
    load_base,
    made_up,
    quantised_layers,
)
from fedllm.training.quantised import missing_for_nf4, quiet_bitsandbytes, round_weights, unseen
from fedllm.training.sources import resolve

Quantised = Literal["none", "int8", "nf4"]
_PARTS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # of a base: no code
_FLAWED = 0.5  # logits that are further away than this share of their size are those of another model
# so far may logits be that bitsandbytes computes from weights that are rounded in the same way (docs/support.md)
_LIKE_ROUNDED = {"int8": 0.3, "nf4": 0.1}
_WHOLE = {"nf4": (64, 32), "int8": (1, 1)}  # inputs and outputs of a layer are multiples of these


@dataclass(frozen=True)
class Exported:
    """A release that was written."""

    folder: Path
    manifest: Manifest
    apart: float  # logits of the folder, loaded again, from those of the trained adapter: a share of their length (L2)
    notes: tuple[str, ...]


def export(
    run: FinishedRun, folder: Path, signer: Identity, merge: bool = False, quantize: Quantised = "none",
    say: Callable[[str], None] = lambda text: None,
) -> Exported:  # fmt: skip
    """Write the release of a run to a folder that is new or empty; `say` receives what is being done, in words.

    Nothing is left of one that fails. Raises ReleaseError if the form does not fit the run or the base is another one,
    ModelError if a model does not load or is not what was trained, FolderError if the folder cannot be written.
    """
    merge = merge or quantize != "none"
    _check_form(run, merge, quantize)
    say("loading the base")
    base, adapter = _tuned(run)
    trained = _probed(adapter.model, adapter.vocabulary)
    notes = list(_noted(run, merge))
    end = AnswerEnd(()) if adapter.classifies else answer_end(base.tokenizer, run.reading.chats)
    if not adapter.classifies:
        template = made_template(base.tokenizer, run.outcome.plan.model, run.reading)
        if template is not None:
            base.tokenizer.chat_template = template
        elif not run.reading.chats:
            notes.append("data.prompt has several fields: there is no chat template that asks as in training")
    with new_folder(folder) as new, system_errors():
        say("writing the model")
        base.tokenizer.save_pretrained(new)
        if not adapter.classifies:
            _generation(base, end).save_pretrained(new)
        skipped = list[str]()
        rounded: Tensor | None = None
        if merge:
            model = _merged(run, adapter, base)
            _save(model, _generation(base, end), new)
            if quantize != "none":
                skipped, rounded = _quantise(model, base, new, quantize, adapter)
                if skipped:
                    notes.append(f"not quantised, as bitsandbytes computes other shapes: {', '.join(skipped)}")
            del model
        else:
            _save_adapter(run, adapter, new)
        vocabulary = adapter.vocabulary
        manifest = _manifest(run, base, merge, quantize)
        write_cards(new, run, manifest, base, end, skipped)
        for path in (new, *new.rglob("*")):  # whoever serves it may be another user
            path.chmod(0o755 if path.is_dir() else 0o644)
        manifest = sign_release(new, manifest, signer)
        del base, adapter
        gc.collect()  # the base is loaded once more
        say("loading it again, and comparing")
        loaded = load_release(new, manifest, "cpu")
        found = _probed(loaded.model, vocabulary)
        del loaded
        apart = _apart(found, trained)
        if rounded is not None and not (off := _apart(found, rounded)) <= _LIKE_ROUNDED[quantize]:
            raise ModelError(
                f"--quantize={quantize}: bitsandbytes computes logits that are {off:.3g} of their size away from those "
                "of the rounded weights. Its kernels do not fit this model on this machine: export without --quantize."
            )
        if not apart <= _FLAWED:
            raise ModelError(
                f"the release is not what was trained: its logits are {apart:.3g} of their size away. Are the versions "
                "those of constraints.txt?"
            )
    return Exported(folder, manifest, apart, tuple(notes))


def _check_form(run: FinishedRun, merge: bool, quantize: Quantised) -> None:
    """Raise ReleaseError if a run cannot be released in a form."""
    plan = run.outcome.plan
    check_public(resolve(plan.model.source))
    if merge and plan.adapter.virtual_tokens:
        raise ReleaseError(
            f"--merge: {plan.adapter.title} adds {plan.adapter.tokens} virtual tokens to a text and changes no weight "
            "into which it could be merged. Export it without --merge and --quantize."
        )
    if quantize != "none" and plan.model.pooling == "mean":
        raise ReleaseError(
            f"--quantize={quantize}: a classifier with model.pooling=mean is no class of transformers, so it could not "
            "be loaded again. Export it without --quantize."
        )
    if quantize != "none" and (missing := missing_for_nf4()):
        raise ReleaseError(missing.replace("model.quantize=nf4", f"--quantize={quantize}"))


def _noted(run: FinishedRun, merge: bool) -> Iterator[str]:
    model = run.outcome.plan.model
    if model.quantize != "none":
        yield (
            f"the base was quantised in training (model.quantize={model.quantize}): "
            + ("merged with the rounded weights, as it was trained" if merge else
               "on the base as it is the adapter answers somewhat differently; --merge has the rounded weights")
        )  # fmt: skip
    if run.outcome.stopped:
        yield f"the run ended early: {run.outcome.stopped}"


def _tuned(run: FinishedRun) -> tuple[BaseModel, AdapterModel]:
    """Return the base with the trained adapter in it, float32 on the CPU; raises ReleaseError if it is another base."""
    plan = run.outcome.plan
    plain = plan.model.model_copy(update={"quantize": "none", "dtype": "float32"})
    base = load_base(plain, "cpu")
    if plan.model.quantize != "none":
        round_weights(base.model, quantised_layers(base.model, base.new), plan.model.quantize)
    with _quiet():
        adapter = attach(base, plain, plan.adapter, plan.seed)
    if adapter.spec.digest != run.outcome.spec:
        raise ReleaseError(
            f"model.source={plan.model.source} holds other weights (SHA-256 {base.digest[:16]}...) than the base that "
            f"run {run.name} trained on, or has another adapter with these versions of peft and transformers. Put "
            "the base of the run there, and install the versions of constraints.txt."
        )
    values = run.adapter()
    file = run.folder / "adapter" / "adapter_model.safetensors"
    try:
        adapter.check_file(file, values)
    except (OSError, SafetensorError) as error:
        raise ReleaseError(f"{file} cannot be read ({first_line(error)}). Restore it from a backup.") from None
    adapter.load(values)
    return base, adapter


def _merged(run: FinishedRun, adapter: AdapterModel, base: BaseModel) -> Any:
    """Return the model with the adapter in its weights, in the type of the base; the adapter is gone then."""
    with _quiet(), unseen():
        model = cast(Any, adapter.model).merge_and_unload(safe_merge=True)
    labels = run.outcome.plan.model.labels
    if labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}
    return model.to(base.stored)


def _save(model: Any, generation: GenerationConfig, folder: Path) -> None:
    with _quiet():
        if isinstance(model, MeanPooledClassifier):
            model.encoder.save_pretrained(folder)
            save_file({k: v.contiguous() for k, v in model.classifier.state_dict().items()}, folder / HEAD)
        else:
            if model.can_generate():  # whatever the base has there, such as how to sample, was not measured
                model.generation_config = generation
            model.save_pretrained(folder)


def _save_adapter(run: FinishedRun, adapter: AdapterModel, folder: Path) -> None:
    """Write the adapter, and beside it a base that others could not get by its name."""
    model = run.outcome.plan.model
    source = resolve(model.source)
    if isinstance(source, Path):
        (folder / BASE).mkdir()
        for path in sorted({path for part in _PARTS for path in source.glob(part)}):
            shutil.copyfile(path, folder / BASE / path.name)
    name = BASE if isinstance(source, Path) else source
    with _quiet():
        adapter.save(run.adapter(), folder, name, None if isinstance(source, Path) else model.revision)


def _quantise(
    model: Any, base: BaseModel, folder: Path, kind: Literal["int8", "nf4"], adapter: AdapterModel
) -> tuple[list[str], Tensor]:
    """Put the quantised model in the place of the merged one in a folder.

    Returns the last names of the layers that are left as they are, and the logits that rounded weights give.
    """
    ins, outs = _WHOLE[kind]
    layers = {name: model.get_submodule(name) for name in linear_layers(model)}
    odd = sorted({
        name.rpartition(".")[2] for name, layer in layers.items()
        if (shape := _shape(layer))[0] % ins or shape[1] % outs
    })  # fmt: skip
    heads = [name for name, module in model.named_children() if isinstance(module, nn.Linear) or name in HEADS]
    options: dict[str, Any] = {"llm_int8_skip_modules": [*heads, *odd]}
    if kind == "int8":
        options["load_in_8bit"] = True
    else:
        # scales of blocks as they are, as in training
        options |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": base.stored}
    auto: Any = AutoModelForSequenceClassification if adapter.classifies else AutoModelForCausalLM
    with _quiet():
        quantised = auto.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(**options), device_map="cpu", dtype=base.stored,
            trust_remote_code=False, use_safetensors=True,
        )  # fmt: skip
        for path in folder.glob("model*.safetensors*"):
            path.unlink()
        quantised.save_pretrained(folder)
    rest = [name for name in layers if name.rpartition(".")[2] not in odd]
    if not rest:
        raise ReleaseError(
            f"--quantize={kind}: bitsandbytes can compute none of this model's layers: their sizes are no multiples of "
            f"{max(ins, outs)}. Export it without --quantize."
        )
    round_weights(model.float(), rest, kind)
    return odd, _probed(model, adapter.vocabulary)


def _shape(layer: Any) -> tuple[int, int]:
    """Return inputs and outputs of a linear layer."""
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else (layer.nx, layer.nf)


def _generation(base: BaseModel, end: AnswerEnd) -> GenerationConfig:
    tokenizer = base.tokenizer
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=list(end.tokens) or None, pad_token_id=tokenizer.pad_token_id
    )


def _manifest(run: FinishedRun, base: BaseModel, merge: bool, quantize: Quantised) -> Manifest:
    model = run.outcome.plan.model
    return Manifest(
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        program=fedllm.__version__,
        name=run.name,
        form="merged" if merge else "adapter",
        quantized=quantize,
        task=model.task,
        labels=model.labels,
        pooling=model.pooling,
        base=Base(source=model.source, revision=model.revision, digest=base.digest),
        training=run.training,
        privacy=run.privacy,
        reading=run.reading,
        max_length=model.max_length,
        signer="",
        files={},
    )


@torch.inference_mode()
def _probed(model: Any, vocabulary: int) -> Tensor:
    """Return the logits of a few made-up tokens, float32."""
    ids = made_up(vocabulary, 12).reshape(2, 6)
    with _quiet():
        logits: Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits.float()


def _apart(a: Tensor, b: Tensor) -> float:
    """Return how far logits are from others, as a share of the latter's length; infinity if one is not finite."""
    found = float((a[:, -b.shape[1] :] - b).norm() / b.norm().clamp(min=1e-30))
    return found if math.isfinite(found) else math.inf


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what PEFT, transformers and bitsandbytes say of one another, and their bars."""
    quiet_bitsandbytes()
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
