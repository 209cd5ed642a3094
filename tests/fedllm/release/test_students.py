"""The benchmark of students runs from end to end; what it measures is in docs/distillation.md."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedllm.config import ModelConfig
from fedllm.crypto.identity import Identity
from fedllm.release.loading import Release
from fedllm.release.manifest import sign_release
from fedllm.training.model import load_base, weights
from fedllm.training.sources import resolve
from simulations.benchmarks.students import app, halve
from simulations.demo import corpus
from tests.fedllm.release.conftest import a_manifest, keys_of


def test_half_a_model_is_every_second_block(tiny_llama: Path, tmp_path: Path) -> None:
    whole = load_base(ModelConfig(source=str(tiny_llama), max_length=64), "cpu")
    many, second = weights(whole.model), weights(whole.model.model.layers[1])
    halve(whole.model, whole.tokenizer, tmp_path / "half")
    half = load_base(ModelConfig(source=str(tmp_path / "half"), max_length=64), "cpu")
    assert weights(half.model) == many - second


def test_public_questions_are_no_records_and_none_is_held_out() -> None:
    train = corpus.train_rows()
    taken = {row["question"] for row in (*train, *corpus.heldout_rows(train))}
    asked = corpus.public_questions(300, taken)
    assert asked == corpus.public_questions(300, taken)
    assert len(set(asked)) == 300
    assert not taken & set(asked)
    assert asked != corpus.public_questions(300, taken, "other")


def test_the_benchmark_of_students_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, trust = keys_of(tmp_path)
    folder = tmp_path / "release"  # the demo's base, as if it had been tuned
    shutil.copytree(Path(resolve("pkg://simulations.demo/base")), folder)
    sign_release(folder, a_manifest(folder, max_length=96), Identity.read(key))

    def answers(self: Release, prompts: Sequence[list[int]], most: int, **options: Any) -> list[str]:
        return ["3"] * len(prompts)

    monkeypatch.setattr(Release, "answers", answers)
    done = CliRunner().invoke(
        app,
        [str(folder), "--trust", str(trust), "--key", str(key), "--questions", "4", "--epochs", "1", "--heldout", "4"],
    )
    assert done.exception is None, done.output
    assert done.output.count("0.0 %") == 6 * 3
