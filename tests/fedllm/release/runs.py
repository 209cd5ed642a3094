"""Finished runs without training: a base, an adapter of random values, and a record that says it ended with them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fedllm.adapter_vector import adapter_digest
from fedllm.audit.evidence import Outcome
from fedllm.config import AdapterConfig, ModelConfig, PrivacyConfig, TextConfig, TrainingConfig
from fedllm.crypto.identity import Identity
from fedllm.plan import RunPlan
from fedllm.release.finished_run import FinishedRun
from fedllm.release.manifest import Privacy
from fedllm.training.adapter import AdapterModel, attach
from fedllm.training.model import load_base

SIGNER = Identity.generate()
PROMPT = TextConfig(prompt="Q: {question}\nA:", text=" {answer}")
LABELLED = TextConfig(text="{question}", label="topic")


def trained(folder: Path, model: ModelConfig, scale: float = 0.2, **adapter: Any) -> tuple[FinishedRun, AdapterModel]:
    """Write a run's folder; return the run, and the adapter as it was trained."""
    method = AdapterConfig(**adapter)
    attached = attach(load_base(model, "cpu"), model, method, 0)
    values: NDArray[np.float32] = attached.initial + scale * np.random.default_rng(5).normal(
        size=attached.spec.dimension
    ).astype(np.float32)
    (folder / "adapter").mkdir(parents=True)
    attached.save(values, folder / "adapter", model.source)
    attached.load(values)
    save_file({"adapter": values}, folder / "checkpoint.safetensors")
    plan = RunPlan(
        run="f" * 32, seed=0, model=model, adapter=method,
        privacy=PrivacyConfig(units_per_site=50, delta=1e-3, noise_multiplier=1.0),
        training=TrainingConfig(rounds=1),
    )  # fmt: skip
    outcome = Outcome(plan, attached.spec.digest, adapter_digest(values), (SIGNER.public,), "1" * 64, "")
    audit: Any = SimpleNamespace(
        sites=("a", "b"),
        run=SimpleNamespace(rounds=1),
        accountants=SimpleNamespace(several_sites=((2, 7.5), (3, None))),
    )
    privacy = Privacy(
        mode="local", unit="record", epsilon=2.5, delta=1e-3, seeded=False, verdict="within", audit="2" * 64
    )
    reading = LABELLED if attached.classifies else PROMPT
    return FinishedRun(folder, "시험 run", "generated", reading, outcome, cast(Any, audit), privacy), attached
