"""What a release says of itself to people: model card in English and Korean, and a Modelfile for Ollama."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import PreTrainedTokenizerBase

from fedllm.config import TextConfig
from fedllm.release.chat_template import frame_of, ollama_template
from fedllm.release.finished_run import FinishedRun
from fedllm.release.manifest import Manifest
from fedllm.training.chat import AnswerEnd
from fedllm.training.model import BaseModel
from fedllm.training.sources import resolve

MODELFILE = "Modelfile"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as --max-lora-rank


def write_cards(
    folder: Path, run: FinishedRun, manifest: Manifest, base: BaseModel, end: AnswerEnd, skipped: Sequence[str]
) -> None:
    """Write README.md, README.ko.md and, if Ollama can have the model, Modelfile; `skipped` were not quantised."""
    plan, tokenizer = run.outcome.plan, base.tokenizer
    hub = isinstance(resolve(plan.model.source), str)
    frame = frame_of(run.reading)
    adapter, causal = manifest.form == "adapter", manifest.task == "causal-lm"
    # what other programs know of adapters: LoRA alone, and no head beside it
    lora = plan.adapter.method in ("lora", "rslora") and causal
    rank = next((rank for rank in _RANKS if rank >= plan.adapter.rank), None)
    known = {
        "r": run, "m": manifest, "plan": plan, "privacy": manifest.privacy, "hub": hub, "adapter": adapter,
        "causal": causal, **_for_ollama(manifest.name, tokenizer, run.reading, end),
        "base": plan.model.source if hub else "base", "dtype": str(base.stored).removeprefix("torch."),
        "chats": run.reading.chats or frame is not None, "bos": tokenizer.bos_token is not None,
        "skipped": skipped, "pad": tokenizer.pad_token_id,
        "vllm": causal and (not adapter or (lora and rank is not None)), "rank": rank,
        "gguf": causal and manifest.quantized == "none" and (not adapter or lora),
    }  # fmt: skip
    pages = _templates()

    def render(name: str, **more: object) -> str:
        return pages.get_template(f"{name}.j2").render({**known, **more})

    loading = render("loading.md").strip()
    for name, english in (("README.md", True), ("README.ko.md", False)):
        servers = render("servers.md", english=english).strip()
        (folder / name).write_text(render(name, loading=loading, servers=servers), "utf-8")
    if known["gguf"]:
        (folder / MODELFILE).write_text(render(MODELFILE), "utf-8")


def write_pages(folder: Path, name: str, **values: object) -> None:
    """Write the card of that name, filled with `values`, as README.md in English and README.ko.md in Korean."""
    for language, file in (("en", "README.md"), ("ko", "README.ko.md")):
        (folder / file).write_text(_templates().get_template(f"{name}.{language}.md.j2").render(values), "utf-8")


def write_modelfile(
    folder: Path, name: str, tokenizer: PreTrainedTokenizerBase, reading: TextConfig, end: AnswerEnd
) -> None:
    """Write the Modelfile of a whole causal model: Ollama asks it as in training."""
    values = {"adapter": False, **_for_ollama(name, tokenizer, reading, end)}
    (folder / MODELFILE).write_text(_templates().get_template(f"{MODELFILE}.j2").render(values), "utf-8")


def _for_ollama(
    name: str, tokenizer: PreTrainedTokenizerBase, reading: TextConfig, end: AnswerEnd
) -> dict[str, object]:
    """Return what a Modelfile holds: a name, the template of a question, and the texts that end an answer."""
    frame, ends = frame_of(reading), [*tokenizer.convert_ids_to_tokens(list(end.tokens)), end.text]
    return {
        "slug": re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "model",
        "template": None if frame is None else ollama_template(frame),
        "stops": [json.dumps(text, ensure_ascii=False) for text in ends if text],
    }


def _templates() -> Environment:
    environment = Environment(  # noqa: S701  # Markdown, not HTML
        loader=PackageLoader("fedllm.release"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(
        number=lambda value: "∞" if value is None else f"{value:.4g}",
        cell=lambda text: " ".join(str(text).split()).replace("|", "\\|"),
        text=lambda value: json.dumps(value, ensure_ascii=False),
        quoted=lambda value: shlex.quote(str(value)),
    )
    return environment
