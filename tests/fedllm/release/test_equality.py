"""What was trained, what PEFT loads, what was merged and what a folder gives back are one model."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedllm.audit.trust import Trust
from fedllm.config import ModelConfig
from fedllm.errors import ModelError, ReleaseError
from fedllm.release.export import Quantised, export
from fedllm.release.finished_run import FinishedRun
from fedllm.release.loading import load_release
from fedllm.release.manifest import verify_release
from fedllm.training.adapter import AdapterModel, generated
from fedllm.training.data import Tokeniser
from tests.fedllm.release.runs import SIGNER, trained
from tests.fedllm.training.bases import CAUSAL, LABELS, classifier, language, make
from tests.fedllm.training.test_methods import SETTINGS
from tests.support import Family, rows, small_model

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]
TRUST = Trust({"head-office": [SIGNER.public.fingerprint]})
FLOAT32, BFLOAT16 = 1e-5, 0.05  # docs/data-and-models.md: logits, a share of their length (L2)
ROW = {"question": "Where do I report a lost card?", "answer": "a", "topic": LABELS[0]}
QUESTIONS = ["Where do I report a lost card?", "카드를 잃어버렸어요", "a"]


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    return found[:, -ids.shape[1] :] if found.ndim == 3 else found


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def greedy(generate: Any, ids: Tensor) -> list[list[int]]:
    mask = torch.ones_like(ids)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    with torch.inference_mode():
        found: Tensor = generate(input_ids=ids, attention_mask=mask, **options)
    return [[int(token) for token in row if token not in (0, 2)] for row in found[:, -8:]]


def compared(run: FinishedRun, adapter: AdapterModel, folder: Path, bound: float = FLOAT32, **options: Any) -> None:
    """Export a run in its forms, and compare what was trained with what comes back."""
    ids = torch.randint(3, adapter.vocabulary, (3, 9), generator=torch.Generator().manual_seed(1))
    expected = logits(adapter.model, ids)
    answers = None if adapter.classifies else greedy(partial(generated, adapter.model), ids)
    forms = [False] if adapter.config.is_prompt_learning else [False, True]
    for merge in forms:
        made = export(run, folder / f"merge-{merge}", SIGNER, merge, **options)
        assert made.apart <= bound
        release = load_release(made.folder, verify_release(made.folder, TRUST), "cpu")
        assert apart(logits(release.model, ids), expected) <= bound
        if answers is not None and bound == FLOAT32 and merge:
            assert greedy(release.model.generate, ids) == answers
        if merge and run.outcome.plan.model.pooling == "native":  # as anybody loads it
            auto: Any = AutoModelForSequenceClassification if adapter.classifies else AutoModelForCausalLM
            plain, found = auto.from_pretrained(made.folder, output_loading_info=True)
            assert not found["missing_keys"]
            assert not found["unexpected_keys"]
            assert apart(logits(plain.eval(), ids), expected) <= bound
            if adapter.classifies:
                assert plain.config.id2label == dict(enumerate(LABELS))


def of_family(family: Family, task: str, folder: Path) -> tuple[FinishedRun, AdapterModel]:
    with small_model(family) as made:
        base = made.rename(folder / "base")
    model = language(base) if task == "causal-lm" else classifier(base, pooling=family.pooling)
    # experts that are fused into single parameters get no adapter
    targets: Any = tuple(family.attention) if any("experts" in key for key in family.settings) else "all-linear"
    return trained(folder / "run", model, rank=2, alpha=4.0, train="AB", targets=targets)


def names(value: object) -> str:
    return value.name if isinstance(value, Family) else str(value)


FEW = [pair for pair in rows() if (pair[0].name, pair[1]) in {
    ("GPT-2", "causal-lm"),  # Conv1D, and a head tied to the embedding
    ("Gemma 2", "causal-lm"), ("Qwen3-MoE", "causal-lm"), ("Llama", "classification"), ("RoBERTa", "classification"),
    ("MiniLM", "classification"),
}]  # fmt: skip


@pytest.mark.parametrize(("family", "task"), FEW, ids=names)
def test_a_release_is_the_model_that_was_trained(family: Family, task: str, tmp_path: Path) -> None:
    compared(*of_family(family, task, tmp_path), tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize(("family", "task"), rows(), ids=names)
def test_a_release_is_the_model_that_was_trained_of_every_architecture(
    family: Family, task: str, tmp_path: Path
) -> None:
    try:
        run, adapter = of_family(family, task, tmp_path)
    except ModelError as error:
        if "transformers has no model for model.task=classification of this architecture" in str(error):
            return  # docs/support.md says so
        raise
    compared(run, adapter, tmp_path)


METHODS = [method if method in ("dora", "ia3", "prompt") else pytest.param(method, marks=pytest.mark.soak)
           for method in SETTINGS]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_release_is_the_model_that_was_trained_by_every_method(method: str, tmp_path: Path) -> None:
    base = make(tmp_path / "base", "llama", num_key_value_heads=2)
    compared(*trained(tmp_path / "run", language(base), method=method, **SETTINGS[method]), tmp_path)


def in_bfloat16(folder: Path) -> Path:
    CAUSAL.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_merged_model_has_the_type_of_its_base(tmp_path: Path) -> None:
    """One rounding of each weight: the sum is computed in float32, and not in bfloat16."""
    base = in_bfloat16(make(tmp_path / "base", "llama"))
    run, adapter = trained(tmp_path / "run", language(base), rank=2, alpha=4.0, train="AB")
    compared(run, adapter, tmp_path, BFLOAT16)
    merged = CAUSAL.from_pretrained(tmp_path / "merge-True", dtype="auto")
    assert merged.dtype == torch.bfloat16
    with torch.no_grad():
        exact = cast(Any, adapter.model).merge_and_unload().state_dict()
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, exact[name].to(torch.bfloat16)), name


def test_a_head_that_is_tied_to_the_embedding_stays_tied_and_as_it_was(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "llama", tie_word_embeddings=True)
    run, adapter = trained(tmp_path / "run", language(base), rank=2, alpha=4.0)
    compared(run, adapter, tmp_path)
    merged, before = (CAUSAL.from_pretrained(place) for place in (tmp_path / "merge-True", base))
    assert merged.config.tie_word_embeddings
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight, before.get_input_embeddings().weight)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_base_that_was_quantised_in_training_is_merged_as_it_was_trained_against(
    family: str, kind: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 66} if family == "gpt2" else {}
    base = make(tmp_path / "base", family, **settings)
    run, adapter = trained(tmp_path / "run", language(base, quantize=kind), rank=2, alpha=4.0, train="AB")
    ids = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(1))
    expected = logits(adapter.model, ids)  # through QuantisedLinear
    made = export(run, tmp_path / "merged", SIGNER, merge=True)
    assert apart(logits(CAUSAL.from_pretrained(made.folder).eval(), ids), expected) <= FLOAT32
    assert "as it was trained" in made.notes[0]
    assert f"model.quantize={kind}" in (made.folder / "README.md").read_text("utf-8")
    adapted = export(run, tmp_path / "adapter", SIGNER)
    assert adapted.apart > made.apart  # on the base as it is, another model; which is said
    assert "answers somewhat differently" in adapted.notes[0]


# ---- quantised for inference -----------------------------------------------------------------------------------------


@pytest.fixture
def wide(tmp_path: Path) -> ModelConfig:
    """A base whose layers bitsandbytes computes."""
    return language(make(tmp_path / "wide", "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2))


@pytest.mark.parametrize(("kind", "bound"), [("nf4", 0.02), ("int8", 0.05)])
def test_a_quantised_release_computes_with_the_rounded_weights(
    kind: Quantised, bound: float, wide: ModelConfig, tmp_path: Path
) -> None:
    """Compared with weights that were rounded here, by other code than bitsandbytes' layers."""
    from fedllm.training.model import linear_layers
    from fedllm.training.quantised import round_weights

    run, adapter = trained(tmp_path / "run", wide, scale=0.05, rank=2, alpha=4.0)
    ids = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(1))
    expected = logits(adapter.model, ids)
    made = export(run, tmp_path / "quantised", SIGNER, quantize=kind)
    manifest = verify_release(made.folder, TRUST)
    assert (manifest.form, manifest.quantized) == ("merged", kind)
    loaded = AutoModelForCausalLM.from_pretrained(made.folder, device_map="cpu").eval()
    assert {type(loaded.get_submodule(name)).__name__ for name in linear_layers(loaded)} == {
        "Linear4bit" if kind == "nf4" else "Linear8bitLt"
    }
    exported = export(run, tmp_path / "merged", SIGNER, merge=True)
    rounded = CAUSAL.from_pretrained(exported.folder)
    round_weights(rounded, linear_layers(rounded), cast(Any, kind))
    assert apart(logits(loaded, ids), logits(rounded.eval(), ids)) <= bound
    assert apart(logits(loaded, ids), expected) <= 0.3
    size = sum(path.stat().st_size for path in made.folder.glob("*.safetensors"))
    assert size < sum(path.stat().st_size for path in exported.folder.glob("*.safetensors"))


def test_layers_that_bitsandbytes_computes_wrongly_stay_as_they_are(tmp_path: Path) -> None:
    """A row that is a multiple of 16 and not of 64."""
    base = make(tmp_path / "base", "llama", hidden_size=64, intermediate_size=80)
    run, _ = trained(tmp_path / "run", language(base), rank=2, alpha=4.0)
    made = export(run, tmp_path / "quantised", SIGNER, quantize="nf4")
    assert made.notes == ("not quantised, as bitsandbytes computes other shapes: down_proj, gate_proj, up_proj",)
    assert "all but down_proj, gate_proj, up_proj" in (made.folder / "README.md").read_text("utf-8")


def test_a_model_none_of_whose_layers_can_be_quantised_is_refused(tmp_path: Path) -> None:
    run, _ = trained(tmp_path / "run", language(make(tmp_path / "base", "llama")), rank=2, alpha=4.0)
    with pytest.raises(ReleaseError, match="bitsandbytes can compute none of this model's layers"):
        export(run, tmp_path / "release", SIGNER, quantize="nf4")


def test_kernels_that_compute_something_else_are_found(
    wide: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes

    right = bitsandbytes.matmul_4bit
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda *given, **more: right(*given, **more).flip(-1))
    run, _ = trained(tmp_path / "run", wide, rank=2, alpha=4.0)
    with pytest.raises(ModelError, match="Its kernels do not fit this model on this machine"):
        export(run, tmp_path / "release", SIGNER, quantize="nf4")
    assert not (tmp_path / "release").exists()


def test_a_classifier_of_averaged_states_is_not_quantised(tmp_path: Path) -> None:
    run, _ = trained(tmp_path / "run", classifier(make(tmp_path / "base", "llama"), pooling="mean"), rank=2, alpha=4.0)
    with pytest.raises(ReleaseError, match=r"model\.pooling=mean is no class of transformers"):
        export(run, tmp_path / "release", SIGNER, quantize="int8")


@pytest.mark.parametrize(("merge", "method"), [
    (False, {"rank": 2, "alpha": 4.0}), (True, {"rank": 2, "alpha": 4.0}), (False, {"method": "prompt", "tokens": 4}),
    (False, {"method": "prefix", "tokens": 4}),
])  # fmt: skip
def test_a_release_is_asked_as_in_training(merge: bool, method: dict[str, Any], tmp_path: Path) -> None:
    run, adapter = trained(tmp_path / "run", language(make(tmp_path / "base", "llama")), **method)
    tokeniser = Tokeniser(adapter.tokenizer, run.outcome.plan.model, run.reading)
    made = export(run, tmp_path / "release", SIGNER, merge)
    release = load_release(made.folder, made.manifest, "cpu")
    asked = [{**ROW, "question": question} for question in QUESTIONS]
    assert release.prompts(asked) == [tokeniser.prompt_ids(row) for row in asked]
    for prompt in release.prompts(asked):
        (answer,) = release.answers([prompt], 8)
        ids = torch.tensor([prompt])
        (expected,) = generated(
            adapter.model, ids, torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=2
        ).tolist()
        text = adapter.tokenizer.decode(release.end.cut(expected), skip_special_tokens=True)
        assert answer == text.strip()
