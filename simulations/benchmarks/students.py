"""What students and synthetic records are worth: the demo's release, and models that learned from it alone.

fedllm simulate
fedllm release export runs/demo released
python -m simulations.benchmarks.students released --trust runs/demo/trusted-keys.txt --key runs/demo/record.key

The questions are public: made by the demo's generator with a seed of their own, none of them a record of a site or
held out; half of the held-out questions are worded in ways that they never use.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from fedllm.audit.trust import Trust
from fedllm.config import ModelConfig
from fedllm.crypto.identity import Identity
from fedllm.release.distil import Teaching, distil, fit
from fedllm.release.loading import Release, load_release
from fedllm.release.manifest import verify_release
from fedllm.release.synthesize import RECORDS, Sampling, write_set
from fedllm.training.data import Row, Tokeniser
from fedllm.training.model import load_base, weights
from fedllm.training.model_context import use_threads
from simulations.benchmarks.bench import machine
from simulations.demo import corpus

_BASE = "pkg://simulations.demo/base"
_LONGEST = 48  # tokens of an answer

app = typer.Typer(add_completion=False)


def halve(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Write a model with every second block of a Llama to a folder, and return that."""
    model.model.layers = model.model.layers[1::2]
    model.config.num_hidden_layers = len(model.model.layers)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def exact_match(release: Release, rows: Sequence[Row]) -> dict[str, float]:
    """Return the share of greedy answers that equal the expected one: of all, and of each language."""
    answers = release.answers(release.prompts(rows), _LONGEST)
    right = [answer == row["answer"] for answer, row in zip(answers, rows, strict=True)]
    shares = {"all": sum(right) / len(right)}
    for lang in ("ko", "en"):
        own = [hit for hit, row in zip(right, rows, strict=True) if row["lang"] == lang]
        shares[lang] = sum(own) / max(1, len(own))
    return shares


@app.command()
def main(
    release: Annotated[Path, typer.Argument(help="Release of a run of the embedded demo.", show_default=False)],
    trust: Annotated[Path, typer.Option(help="File of keys.", show_default=False)],
    key: Annotated[Path, typer.Option(help="Identity that signs the students.", show_default=False)],
    questions: Annotated[int, typer.Option(min=1, help="Public questions.")] = 4000,
    epochs: Annotated[int, typer.Option(min=1, help="Over the questions.")] = 8,
    heldout: Annotated[int, typer.Option(min=1, help="Held-out questions, at most.")] = 384,
    seed: Annotated[int, typer.Option(min=0, help="Of questions, sampling and training.")] = 0,
) -> None:
    """Measure the held-out exact match of teacher, students, and a base trained on synthetic records alone."""
    use_threads(1)
    keys, signer = Trust.read(trust), Identity.read(key)
    teacher = load_release(release, verify_release(release, keys), "cpu")
    held = corpus.heldout_rows(train := corpus.train_rows())
    taken = {row["question"] for row in (*train, *held)}
    asked = corpus.public_questions(questions, taken, f"public/{seed}")
    held = held[:heldout]
    model = ModelConfig(source=_BASE, max_length=teacher.manifest.max_length)
    how = Teaching(epochs=epochs, learning_rate=2e-3, batch=32, seed=seed)
    print("| model | weights | learned from | held-out exact match | Korean | English | CPU time |")
    print("|---|---:|---|---:|---:|---:|---:|")

    def row(name: str, source: str, found: Release, began: float | None = None) -> None:
        spent = "-" if began is None else f"{time.process_time() - began:.0f} s"
        shares = exact_match(found, held)
        cells = " | ".join(f"{100 * shares[part]:.1f} %" for part in ("all", "ko", "en"))
        print(f"| {name} | {weights(found.model):,} | {source} | {cells} | {spent} |", flush=True)

    with tempfile.TemporaryDirectory() as place:
        folder, base = Path(place), load_base(model, "cpu")
        own = {"tokenizer": base.tokenizer, "model": base.model}
        row("the base", "public text", replace(teacher, **own))
        row("the teacher", "the sites' records, under differential privacy", teacher)

        began = time.process_time()
        prompts = folder / "prompts.yaml"
        texts = [text.replace("{", "{{").replace("}", "}}") for text in asked]
        prompts.write_text(json.dumps({"prompts": texts}, ensure_ascii=False), "utf-8")
        made = write_set(folder / "set", teacher, prompts, questions, Sampling(seed=seed), None, signer)
        records = [json.loads(line) for line in (folder / "set" / RECORDS).read_text("utf-8").splitlines()]
        tokeniser = Tokeniser(base.tokenizer, model, teacher.manifest.reading, base.vocabulary)
        examples = [tokeniser(record, number) for number, record in enumerate(records)]
        fit(base.model, examples, how, cast(int, base.tokenizer.pad_token_id), _silent)
        row("the base", f"{made.counts.kept:,} synthetic records", replace(teacher, **own), began)

        fresh = load_base(model, "cpu")
        half = halve(fresh.model, fresh.tokenizer, folder / "half")
        halved = load_base(model.model_copy(update={"source": str(half)}), "cpu")
        row("half the blocks", "public text", replace(teacher, model=halved.model))
        public = folder / "public.jsonl"
        public.write_text("".join(json.dumps({"question": text}) + "\n" for text in asked), "utf-8")
        for targets in ("logits", "answers"):
            began, out = time.process_time(), folder / targets
            teaching = how.model_copy(update={"targets": targets})
            found = distil(teacher, str(half), public, out, keys, signer, teaching, _silent, public=True)
            learned = f"the teacher's {targets}, {questions:,} questions"
            row("half the blocks", learned, load_release(out, found, "cpu"), began)
    print(f"\n{len(held)} held-out questions, seed {seed}, {epochs} epochs. {machine()}")


def _silent(line: str) -> None:
    pass


if __name__ == "__main__":
    app()
