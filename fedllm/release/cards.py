"""What a release says of itself to people: model card in English and Korean, and a Modelfile for Ollama."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import PreTrainedTokenizerBase

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
        "causal": causal, "slug": re.sub("[^a-z0-9]+", "-", manifest.name.lower()).strip("-") or "model",
        "base": plan.model.source if hub else "base", "dtype": str(base.stored).removeprefix("torch."),
        "chats": run.reading.chats or frame is not None, "bos": tokenizer.bos_token is not None,
        "skipped": skipped, "pad": tokenizer.pad_token_id,
        "vllm": causal and (not adapter or (lora and rank is not None)), "rank": rank,
        "gguf": causal and manifest.quantized == "none" and (not adapter or lora),
        "stops": [json.dumps(text, ensure_ascii=False) for text in _stops(tokenizer, end)],
        "template": None if frame is None else ollama_template(frame),
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


def _stops(tokenizer: PreTrainedTokenizerBase, end: AnswerEnd) -> list[str]:
    """Return the texts that end an answer."""
    return [text for text in (*tokenizer.convert_ids_to_tokens(list(end.tokens)), end.text) if text]


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
