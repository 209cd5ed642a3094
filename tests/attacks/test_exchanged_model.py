"""Attack: a base model is exchanged under its name, or a plan asks for a revision of it that nobody has checked.

Stopped by digests of the models' files, which the owner signs with the declaration; compared at the start and for every
request, before a charge.
"""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

import fedllm.training.model
from client.office import Office, init_office
from client.service import open_site
from client.site import Site
from fedllm import adapter_vector
from fedllm.config import ModelConfig
from fedllm.errors import ConfigError, ModelError
from fedllm.files import write_secret
from fedllm.plan import RunPlan
from fedllm.protocol.messages import Declined, Prepare, Ready, TrainReply, TrainRequest
from fedllm.training.model import files_digest, load_reader
from tests.attacks.office import BEGUN, context, plan_of, read

WEIGHTS = "model.safetensors"


def exchange(weights: Path) -> None:
    """Change one byte of the weights, and leave size and time as they were."""
    before = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


def site_of(folder: Path, model: str, cache: Path | None = None) -> Site:
    """Return a site whose owner has checked its model."""
    if not folder.exists():
        init_office(folder, "busan")
        rows = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(24)]
        write_secret(folder / "records.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        settings = {
            "name": "busan", "data": {"train": "records.jsonl", "text": "{question}", "size": 24},
            "policy": {"epsilon": 8.0, "delta": 1e-3, "min_units": 1, "reply_quantum": 0.0},
            "models": {"base": model}, "model_cache": None if cache is None else str(cache),
            "resources": {"device": "cpu"},
        }  # fmt: skip
        write_secret(folder / "site.yaml", json.dumps(settings).encode())
        office, base = Office.open(folder), ModelConfig(source="base")
        office.declare({"base": load_reader(office.model(base)).digest}, {"base": office.files_digest(base)})
    return open_site(Office.open(folder))


def copied(base: Path, folder: Path) -> Path:
    return Path(shutil.copytree(base, folder))


def asked(plan: RunPlan, base: Path) -> bytes:
    """Return the request of a round, as the server makes it that has the model at `base`."""
    here = plan.model_copy(update={"model": plan.model.model_copy(update={"source": str(base), "revision": None})})
    adapter = context(here).adapter
    payload = adapter_vector.encode(adapter.initial, "float32")
    asked = TrainRequest(plan=plan, round=1, spec_digest=adapter.spec.digest, head=None, payload=payload, begun=BEGUN)
    return asked.to_bytes()


@pytest.mark.parametrize("file", [WEIGHTS, "config.json", "tokenizer.json", "new.safetensors"])
def test_a_model_that_was_exchanged_is_refused_at_the_start(tmp_path: Path, tiny_llama: Path, file: str) -> None:
    model = copied(tiny_llama, tmp_path / "model")
    site_of(tmp_path / "office", str(model))
    if file == WEIGHTS:
        exchange(model / file)
    else:
        (model / file).write_bytes((model / file).read_bytes() + b" " if file.endswith("json") else b"")
    with pytest.raises(ConfigError, match=r"models: base .*than when it was checked.*fedllm site check"):
        site_of(tmp_path / "office", str(model))


def test_a_model_that_is_exchanged_while_the_site_runs_is_refused_before_a_charge(
    tmp_path: Path, tiny_llama: Path
) -> None:
    model, plan = copied(tiny_llama, tmp_path / "model"), plan_of(Path("base"))
    site = site_of(tmp_path / "office", str(model))
    exchange(model / WEIGHTS)
    for message in (Prepare(plan=plan).to_bytes(), asked(plan, tiny_llama)):
        assert read(site.handle(message)) == Declined(site="busan", reason="model")
    assert site.open_ledger().events() == []
    shutil.copy(tiny_llama / WEIGHTS, model)
    assert isinstance(read(site.handle(Prepare(plan=plan).to_bytes())), Ready)
    assert isinstance(read(site.handle(asked(plan, tiny_llama))), TrainReply)


def test_a_plan_has_no_other_revision_of_a_model_than_the_one_that_was_checked(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    hub = cache / "models--org--model"
    copied(tiny_llama, hub / "snapshots" / "a")
    copied(tiny_llama, hub / "snapshots" / "b")
    exchange(hub / "snapshots" / "b" / WEIGHTS)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))  # as Office.environment, for a process
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    site = site_of(tmp_path / "office", "org/model", cache)
    plan = plan_of(Path("base"))
    for revision, there in ((None, True), ("a", True), ("main", True), ("b", False), ("c", False)):
        named = plan.model_copy(update={"model": plan.model.model_copy(update={"revision": revision})})
        answer = read(site.handle(Prepare(plan=named).to_bytes()))
        assert isinstance(answer, Ready) if there else answer == Declined(site="busan", reason="model"), revision


def test_files_that_have_not_changed_are_read_once(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, known = ModelConfig(source=str(copied(tiny_llama, tmp_path / "model"))), dict[str, list[object]]()
    first = files_digest(model, known)
    with monkeypatch.context() as here:
        here.setattr(fedllm.training.model.hashlib, "file_digest", None)
        assert files_digest(model, known) == first
    assert files_digest(model, {}) == files_digest(ModelConfig(source=str(tiny_llama)), {}) == first
    exchange(tmp_path / "model" / WEIGHTS)
    assert files_digest(model, known) == files_digest(model, {}) != first
    with pytest.raises(ModelError, match="cannot be loaded"):
        files_digest(ModelConfig(source="org/model-that-is-not-there"), {})
