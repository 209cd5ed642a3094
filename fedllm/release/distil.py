"""A smaller model that a release teaches, on public questions.

Where both have one vocabulary, the student learns the teacher's whole distribution of every token of its answers
(Hinton, Vinyals and Dean 2015: soft targets at a temperature, its square as a factor); else the teacher's greedy
answers themselves (Kim and Rush 2016: sequence-level distillation). The student knows of private records what the
teacher says to public questions: post-processing, which costs no further epsilon. Private questions would.
"""

import hashlib
import inspect
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerBase

import fedllm
from fedllm.audit.trust import Trust
from fedllm.config import ModelConfig
from fedllm.crypto.identity import Identity
from fedllm.errors import DataError, Diverged, ModelError, PrivacyError, ReleaseError
from fedllm.files import cannot_read, new_folder, system_errors
from fedllm.release.cards import write_modelfile, write_pages
from fedllm.release.chat_template import made_template
from fedllm.release.loading import Release
from fedllm.release.manifest import Base, Manifest, check_place, check_public, manifest_digest, sign_release
from fedllm.release.questions import Questions, check_answers
from fedllm.release.synthesize import RECORDS, is_set, verify_set
from fedllm.training.chat import answer_end
from fedllm.training.data import IGNORE, Example, Row, Tokeniser, naming, read_table
from fedllm.training.model import BaseModel, load_base, load_reader, weights
from fedllm.training.quantised import unseen
from fedllm.training.sources import resolve
from fedllm.values import HEAD_OFFICE, Frozen, Rate, Seed, parse

with unseen():  # what they import imports it
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

Say = Callable[[str], None]


class Teaching(Frozen):
    """How a student is taught."""

    targets: Literal["auto", "logits", "answers"] = "auto"  # auto: logits where both have one vocabulary
    temperature: float = Field(2.0, gt=0, le=100)  # of soft targets
    epochs: int = Field(3, ge=1, le=100_000)  # over the questions
    learning_rate: Rate = 1e-4  # of AdamW, at its highest: a warm-up, then a cosine
    batch: int = Field(8, ge=1, le=65_536)  # records of a step
    seed: Seed = 0


@dataclass(frozen=True)
class Transfer:
    """A public set of questions, and what was checked of it."""

    source: Path
    rows: tuple[Row, ...]
    digest: str  # SHA-256 of the file, in hex
    synthetic: bool  # the teacher's own records, signed; else public by its user's word


def read_transfer(data: Path, release: Release, trust: Trust, public: bool) -> Transfer:
    """Read the set that a student is taught on: a signed synthetic set of the teacher's, or a file that is `public`.

    Raises PrivacyError for a file of which nobody says that it is public, ReleaseError for a synthetic set that does
    not verify or comes from another adapter: what two adapters tell of the same records adds up.
    """
    synthetic = is_set(data)
    if synthetic:
        data = data if data.is_file() else data / RECORDS
        if verify_set(data, trust).training != release.manifest.training:
            raise ReleaseError(
                f"{data} was sampled from another adapter than the one in {release.folder}. What both reveal of "
                "the same records adds up, and the claim of one does not cover it. Sample a set from this release."
            )
    elif not public:
        raise PrivacyError(
            f"--data {data}: a student is taught on public questions only. Records of the sites would cost epsilon "
            "that nobody counts, and break the claim. If everybody may read this file, say so with --data-is-public; "
            "or give a folder that `fedllm release synthesize --key` has made from this release."
        )
    try:
        digest = hashlib.sha256(data.read_bytes()).hexdigest()
    except OSError as error:
        raise cannot_read(data, error) from None
    return Transfer(data, tuple(read_table(str(data), "train")), digest, synthetic)


@dataclass(frozen=True)
class Student:
    """A model that was taught."""

    base: BaseModel  # what it began as; its model is trained in place
    config: ModelConfig  # of what it began as
    tokenizer: PreTrainedTokenizerBase
    logits: bool  # taught by them, else by answers
    questions: int
    losses: tuple[float, ...]  # mean of each epoch, in nats per token of an answer


def teach(release: Release, source: str, transfer: Transfer, how: Teaching, say: Say) -> Student:
    """Return the model `source` after the release has taught it; the same seed gives the same weights.

    Raises ModelError if the student cannot be loaded, has another vocabulary although logits are asked for, or
    diverges; DataError for questions that cannot be read; ReleaseError if the teacher answers no questions.
    """
    check_answers(release)
    device = release.device.type
    config = parse(ModelConfig, {"source": source, "max_length": 16})
    reader = load_reader(config)
    config = config.model_copy(update={"max_length": min(release.manifest.max_length, reader.positions)})
    if config.max_length < release.manifest.max_length:
        say(
            f"the student reads {config.max_length} tokens, the teacher {release.manifest.max_length}: longer records "
            "are cut"
        )
    same = _vocabulary(release.tokenizer) == _vocabulary(reader.tokenizer)
    if how.targets == "logits" and not same:
        raise ModelError(
            f"--student {source}: its vocabulary is another than the teacher's, so that one's logits say nothing of "
            "the other's tokens. Leave --targets out, or choose --targets answers."
        )
    base = load_base(config, device, how.seed)
    large, small = weights(release.model), weights(base.model)
    if small >= large:
        say(f"warning: the student has {small:,} weights, the teacher {large:,}: it is no smaller")
    by_logits = same and how.targets != "answers"
    with naming(str(transfer.source)):
        questions = Questions.of(release, transfer.rows).once()
        say(f"the teacher answers {len(questions.rows)} questions")
        answers = questions.answers()
        said = [row for row, answer in zip(questions.records(answers), answers, strict=True) if answer]
        rows = [row for row in said if questions.has_room(row)]
        left_out = f"{len(answers) - len(said)} empty answers, {len(said) - len(rows)} too long for a record"
        if not rows:
            raise DataError(f"no answer of the teacher can be used: {left_out}. Ask what it was trained on.")
        if len(rows) < len(answers):
            say(f"left out: {left_out}")
        # where both have one vocabulary, the teacher's tokenizer with its special tokens and template is the student's
        tokenizer = release.tokenizer if by_logits else base.tokenizer
        tokeniser = Tokeniser(tokenizer, config, questions.release.manifest.reading, base.vocabulary)
        examples = [tokeniser(row, number) for number, row in enumerate(rows)]
    losses = fit(base.model, examples, how, cast(int, tokenizer.pad_token_id), say, release if by_logits else None)
    return Student(base, config, tokenizer, by_logits, len(examples), losses)


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what makes tokens of text: two tokenizers of which it is the same give the same tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts: dict[str, Any] = {"vocab": sorted(tokenizer.get_vocab().items()), "kind": type(tokenizer).__name__}
    if backend is not None:
        whole = json.loads(backend.to_str())
        parts = {key: whole.get(key) for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# ---- training --------------------------------------------------------------------------------------------------------


class _Teacher(Trainer):  # type: ignore[misc]  # transformers has no types here
    """transformers' Trainer with the loss of distillation."""

    def __init__(self, teacher: Release | None, temperature: float, **options: Any) -> None:
        """`teacher`: whose logits are learned; None: the labels are."""
        super().__init__(**options)
        self._release, self._temperature = teacher, temperature
        self.seen: list[float] = []

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Return the mean over the learned tokens (scalar); raises Diverged where it is not finite."""
        labels_NT = inputs.pop("labels")[:, 1:]
        first = int((labels_NT != IGNORE).any(0).int().argmax())  # before it nothing is learned: no logits are made
        labels_NK = labels_NT[:, first:]
        learned_NK = labels_NK != IGNORE
        student_MV = _logits(model, inputs, labels_NK.shape[1])[learned_NK]
        if self._release is None:
            loss = F.cross_entropy(student_MV, labels_NK[learned_NK])
        else:
            with torch.no_grad():
                teacher_MV = _logits(self._release.model, inputs, labels_NK.shape[1])[learned_NK]
            loss = soft_loss(student_MV, teacher_MV, self._temperature)
        self.seen.append(loss.item())
        if not math.isfinite(self.seen[-1]):
            raise Diverged(
                f"the loss of step {len(self.seen)} is {self.seen[-1]}: the student has diverged. Lower "
                "--learning-rate."
            )
        return loss


def soft_loss(student_MV: Tensor, teacher_MV: Tensor, temperature: float) -> Tensor:
    """Return the mean divergence KL(teacher || student) at a temperature, times its square (scalar, nats).

    Hinton, Vinyals and Dean 2015, section 2. Rows of an embedding beyond the shorter one stand for no token.
    """
    width = min(student_MV.shape[1], teacher_MV.shape[1])
    student, teacher = (F.log_softmax(each[:, :width] / temperature, dim=1) for each in (student_MV, teacher_MV))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def _logits(model: Any, inputs: dict[str, Tensor], last: int) -> Tensor:
    """Return what a model says of the `last` tokens of each row, float32[N, last, V]: before each, of the next."""
    # an output head over whole prompts would take most of the memory
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": last + 1} if known else {}
    logits: Tensor = model(**inputs, **options).logits
    return logits[:, -last - 1 : -1].float()


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Tells the mean loss of every epoch."""

    def __init__(self, seen: list[float], epochs: int, say: Say) -> None:
        self._seen, self._epochs, self._say, self._told = seen, epochs, say, 0
        self.losses: list[float] = []

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        steps = self._seen[self._told :]
        self._told = len(self._seen)
        self.losses.append(math.fsum(steps) / len(steps))
        self._say(f"epoch {len(self.losses)}/{self._epochs}: loss {self.losses[-1]:.4f}")


def fit(
    model: Any, examples: Sequence[Example], how: Teaching, pad: int, say: Say, teacher: Release | None = None
) -> tuple[float, ...]:
    """Train a model in place on public records and return the mean loss of every epoch, in nats a learned token.

    `teacher`: whose logits are learned; None: the records' own tokens. Nothing is evaluated, and nothing sent. Raises
    Diverged.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    with tempfile.TemporaryDirectory(prefix="fedllm-") as folder:
        arguments = TrainingArguments(
            output_dir=folder, seed=how.seed, data_seed=how.seed, num_train_epochs=how.epochs,
            per_device_train_batch_size=how.batch, learning_rate=how.learning_rate, lr_scheduler_type="cosine",
            warmup_steps=0.05, save_strategy="no", eval_strategy="no", logging_strategy="no", report_to="none",
            push_to_hub=False, disable_tqdm=True, remove_unused_columns=False, use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
        )  # fmt: skip
        arguments._n_gpu = min(1, arguments.n_gpu)  # the device that the teacher is on, and no other
        trainer = _Teacher(
            teacher, how.temperature, model=model, args=arguments, train_dataset=list(examples),
            data_collator=lambda some: _batch(some, pad),
        )  # fmt: skip
        progress = _Progress(trainer.seen, how.epochs, say)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(progress)
        trainer.train()
    model.eval()
    return tuple(progress.losses)


def _batch(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """Return records padded on the right: input_ids, attention_mask and labels, int64[N, T] each."""
    width = max(len(each.input_ids) for each in examples)

    def padded(values: Sequence[Any], fill: int) -> Tensor:
        return torch.tensor([[*value, *[fill] * (width - len(value))] for value in values])

    return {
        "input_ids": padded([each.input_ids for each in examples], pad),
        "attention_mask": padded([[1] * len(each.input_ids) for each in examples], 0),
        "labels": padded([each.labels for each in examples], IGNORE),
    }


# ---- a student as a release ------------------------------------------------------------------------------------------


def distil(
    release: Release, source: str, data: Path, out: Path, trust: Trust, signer: Identity, how: Teaching, say: Say, *,
    public: bool = False,
) -> Manifest:  # fmt: skip
    """Teach the model `source` on the questions in `data`, write it to a new folder as a release, and sign that.

    `public`: everybody may read `data`. Raises what `read_transfer` and `teach` raise, FolderError for a folder that is
    not empty or cannot be written, ReleaseError for a signer that `trust` does not know as head office, and for a
    student that has learned from records of its own.
    """
    check_place(out, [release.folder])
    check_public(resolve(source))
    if not trust.knows(HEAD_OFFICE, signer.public):
        raise ReleaseError(
            f"--key: {signer.public.fingerprint} is no key that your file of keys trusts as {HEAD_OFFICE}, so that the "
            "student would not verify. Sign with head office's key, or add this one to the file."
        )
    with new_folder(out) as folder, system_errors():
        transfer = read_transfer(data, release, trust, public)
        student = teach(release, source, transfer, how, say)
        _save(folder, student, release, out.absolute().name)
        manifest = release.manifest.model_copy(
            update={
                "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M}", "program": fedllm.__version__,
                "name": out.absolute().name, "form": "student", "quantized": "none",
                "base": Base(source=source, revision=None, digest=student.base.digest),
                "max_length": student.config.max_length, "teacher": manifest_digest(release.folder),
                "public_data": (transfer.digest,),
            }
        )  # fmt: skip
        write_pages(
            folder, "student", m=manifest, teacher=release.manifest, s=student, how=how, transfer=transfer,
            weights=(weights(release.model), weights(student.base.model)),
        )  # fmt: skip
        for path in (folder, *folder.rglob("*")):  # whoever serves it may be another user
            path.chmod(0o755 if path.is_dir() else 0o644)
        return sign_release(folder, manifest, signer)


def _save(folder: Path, student: Student, release: Release, name: str) -> None:
    """Write model and tokenizer, how a question is put and what ends an answer, as an export does."""
    model: Any = student.base.model
    tokenizer, reading = student.tokenizer, release.manifest.reading
    end = answer_end(tokenizer, reading.chats)
    if (template := made_template(tokenizer, student.config, reading)) is not None:
        tokenizer.chat_template = template
    model.generation_config = GenerationConfig(  # whatever the base has there was not measured
        bos_token_id=tokenizer.bos_token_id, eos_token_id=list(end.tokens) or None, pad_token_id=tokenizer.pad_token_id
    )
    model.to(student.base.stored).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_modelfile(folder, name, tokenizer, reading, end)
