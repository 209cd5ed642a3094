"""A finished run with its evidence, and releases: one of that run, and one that needs no run."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedllm.audit.trust import Trust
from fedllm.config import ModelConfig, SimulationConfig, TextConfig
from fedllm.crypto.identity import Identity
from fedllm.release.export import export
from fedllm.release.finished_run import KEY, read_run
from fedllm.release.manifest import Base, Manifest, Privacy, Training, read_manifest, sign_release
from fedllm.training.model import load_base
from fedllm.values import HEAD_OFFICE, parse
from simulations.simulate import simulate
from tests.conftest import leave_out_plots, save_llama
from tests.fedllm.audit.conftest import any_pdf
from tests.sharing import once
from tests.simulations.conftest import _rows as rows_of
from tests.simulations.conftest import write


@dataclass(frozen=True)
class Released:
    """A release, who signed it, and the file of keys that knows the signer. Copy it before you change it."""

    folder: Path
    key: Path  # of the signer
    trust: Path

    @property
    def manifest(self) -> Manifest:
        """What was signed."""
        return read_manifest(self.folder, Trust.read(self.trust))

    @property
    def signer(self) -> Identity:
        """Who signed."""
        return Identity.read(self.key)


def keys_of(folder: Path) -> tuple[Path, Path]:
    """Make an identity and a file of keys that knows it as head office; return both files."""
    key, trust = folder / "identity", folder / "keys.txt"
    identity = Identity.load_or_create(key)
    trust.write_text(f"{HEAD_OFFICE} {identity.public.fingerprint}\n", "utf-8")
    return key, trust


def a_manifest(folder: Path, **changes: Any) -> Manifest:
    """Return a manifest made by hand, of a model in a folder, as if it were merged."""
    base = Base(
        source="tiny", revision=None, digest=load_base(ModelConfig(source=str(folder), max_length=64), "cpu").digest
    )
    values: dict[str, Any] = {
        "made": "2026-11-26 09:00", "program": "0.1.0", "name": "tiny", "form": "merged", "task": "causal-lm",
        "base": base, "reading": TextConfig(prompt="Q: {question}\nA:", text=" {answer}"), "max_length": 64,
        "training": Training(run="f" * 32, plan="1" * 64, record="2" * 64, adapter="3" * 64, signer="nobody"),
        "privacy": Privacy(mode="local", unit="person", epsilon=2.5, delta=1e-5, seeded=False, verdict="within",
                           audit="4" * 64),
        "signer": "", "files": {},
    }  # fmt: skip
    return Manifest(**{**values, **changes})


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory: pytest.TempPathFactory) -> Released:
    """A tiny Llama of random weights, as a merged release that was signed by hand."""

    def make(new: Path) -> None:
        key, _ = keys_of(new)
        folder = save_llama(new / "release")
        sign_release(folder, a_manifest(folder), Identity.read(key))

    place = once(tmp_path_factory, "tiny-release", make)
    return Released(place / "release", place / "identity", place / "keys.txt")


def small_run(output: Path, base: Path, **changes: Any) -> Path:
    """Run a small simulated federation with its audit, and return the run's folder."""
    rows = rows_of(("강남", "busan", "daegu"), persons=12)
    values: dict[str, Any] = {
        "name": "run", "output": str(output), "seed": 5,
        "model": {"source": str(base), "max_length": 64},
        "data": {"train": str(write(output.parent / f"{output.name}.jsonl", rows)), "prompt": "Q: {question}\nA:",
                 "text": " {answer}", "unit": "customer_id", "description": "generated"},
        "adapter": {"rank": 2, "targets": ["q_proj", "v_proj"]},
        "privacy": {"mode": "local", "unit": "person", "records_per_person": 2, "epsilon": 8.0, "delta": 1e-3,
                    "sampling_rate": 0.4, "noise_multiplier": 1.0, "units_per_site": 12, "self_check": False},
        "training": {"rounds": 2, "learning_rate": 0.5, "wire": "float32"},
        "federation": {"partition": {"by": "natural", "column": "branch"}, "quorum": 2, "processes": 1},
        "site": {},
    }  # fmt: skip
    for section, change in changes.items():
        values[section] = {**values[section], **change} if isinstance(change, dict) else change
    with any_pdf(), pytest.MonkeyPatch.context() as patch:
        leave_out_plots(patch)
        simulate(parse(SimulationConfig, values), lambda *_: None, lambda _: None)
    return output / "run"


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended; copy it before you change it."""

    def make(new: Path) -> None:
        place = new.parent / "a-finished-run"  # a run knows where it lies, and cannot be moved
        shutil.rmtree(place, ignore_errors=True)
        small_run(place / "runs", save_llama(place / "base"))

    return once(tmp_path_factory, "finished-run", make).parent / "a-finished-run" / "runs" / "run"


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> Released:
    """The merged release of a finished run."""

    def make(new: Path) -> None:
        signer = Identity.read(finished_run / KEY)
        export(read_run(finished_run, signer), new / "release", signer, merge=True)

    folder = once(tmp_path_factory, "release", make) / "release"
    return Released(folder, finished_run / KEY, finished_run / "trusted-keys.txt")
