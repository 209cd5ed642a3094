"""PEFT's methods beside LoRA: gradients of single units, what is saved, what is refused, and generation."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.lora.dora import DoraLinearLayer
from safetensors.torch import load_file

from client.site import PlanSession
from fedllm.config import AdapterConfig, ModelConfig
from fedllm.errors import ConfigError, ModelError
from fedllm.plan import RunPlan
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import OsRandomness
from fedllm.training import self_check
from fedllm.training.adapter import AdapterModel, attach, check_saved, generated
from fedllm.training.data import PrivacyUnit
from fedllm.training.engine import Engine
from fedllm.training.model import load_base
from fedllm.training.self_check import Subject
from fedllm.values import parse
from tests.bug_zoo.invariants import plan_of
from tests.fedllm.training import bases
from tests.fedllm.training.conftest import conv1d
from tests.fedllm.training.test_engine import CLIP, by_length, one_batch, slow_gradient

Open = Callable[..., AdapterModel]
MakeConfig = Callable[[str], ModelConfig]
MakeUnits = Callable[..., list[PrivacyUnit]]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning"),  # peft 0.21 calls transformers 5 so
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft 0.21 reads it
]
SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"rank": 2, "alpha": 4.0, "train": "AB"},
    "dora": {"rank": 2, "alpha": 4.0, "train": "AB"},
    "ia3": {},
    "prompt": {"tokens": 5},
    "prefix": {"tokens": 5},
    "ptuning": {"tokens": 5},
}
# PEFT's prefix does not go with any classifier of transformers 5, and virtual tokens hide a text's end from decoders
CASES = [
    (method, case)
    for case in ("llama", "gpt2", "gemma2", "bert-native", "bert-mean", "gpt2-native")
    for method in SETTINGS
    if not (method == "prefix" and "-" in case) and not ("tokens" in SETTINGS[method] and case == "gpt2-native")
]


@pytest.fixture
def open_method(model_config: MakeConfig) -> Open:
    """Return a function that puts a fresh adapter of a method on a fresh base of a case."""

    def make(method: str, case: str, dtype: Any = "float32", **changes: Any) -> AdapterModel:
        config = model_config(case).model_copy(update={"dtype": dtype})
        adapter = AdapterConfig(**{"method": method, **SETTINGS.get(method, {}), **changes})
        return attach(load_base(config, "cpu"), config, adapter, 0)

    return make


def moved(adapter: AdapterModel) -> NDArray[np.float32]:
    """Return values at which no gradient vanishes: around those that a method starts from."""
    drawn = np.random.default_rng(5).normal(0, 0.1, adapter.spec.dimension)
    return (adapter.initial + drawn).astype(np.float32)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 45).reshape(2, 20)
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return result


@conv1d
@pytest.mark.parametrize(("method", "case"), CASES)
def test_the_gradient_of_each_unit_is_the_one_of_a_slow_loop(
    open_method: Open, make_units: MakeUnits, method: str, case: str
) -> None:
    plain, adapter = open_method(method, case), open_method(method, case)
    vector = moved(adapter)
    plain.load(vector)
    adapter.load(vector)
    engine, units = Engine(adapter), by_length(make_units(case))
    assert engine.alone == (method != "rslora")
    found = engine.unit_gradients(one_batch(units)).double().numpy()
    for row, unit in zip(found, units, strict=True):
        slow = slow_gradient(plain, unit)
        assert np.linalg.norm(slow) > 1e-4
        assert np.linalg.norm(row - slow) <= 1e-5 * np.linalg.norm(slow)
        clipped = engine.clipped_sum([unit], Mechanism(CLIP, 1.0, 0.5), 4).numpy()
        expected = slow * min(1, CLIP / float(np.linalg.norm(slow)))
        assert np.linalg.norm(clipped - expected) <= 1e-5 * CLIP
    assert all(p.grad is None for p in adapter.model.parameters())


@conv1d
@pytest.mark.parametrize(
    ("method", "case", "dtype"),
    [
        ("dora", "gpt2", "float32"), ("dora", "llama", "bfloat16"), ("ia3", "llama", "bfloat16"),
        ("ia3", "bert-native", "float32"), ("prompt", "bert-native", "bfloat16"), ("prefix", "llama", "bfloat16"),
        ("ptuning", "gpt2", "float32"), ("rslora", "gemma2", "float32"),
    ],
)  # fmt: skip
def test_a_units_part_of_the_sum_is_the_same_to_the_last_bit_whoever_else_is_drawn(
    open_method: Open, make_units: MakeUnits, method: str, case: str, dtype: str
) -> None:
    adapter = open_method(method, case, dtype)
    adapter.load(moved(adapter))
    assert adapter.flat.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in adapter.trainable.values())
    engine, units, mechanism = Engine(adapter), make_units(case, sizes=(1, 3, 1, 2, 1)), Mechanism(CLIP, 1.0, 0.5)
    for micro_batch in (2, 64):
        parts = [engine.clipped_sum([unit], mechanism, micro_batch) for unit in units]
        assert all(float(part.norm()) > 1e-5 for part in parts)
        for some in ([0, 1, 2, 3, 4], [4, 2, 0, 1], [3, 1], []):
            found = engine.clipped_sum([units[k] for k in some], mechanism, micro_batch)
            assert torch.equal(found, sum((parts[k] for k in some), torch.zeros_like(found)))


@conv1d
@pytest.mark.parametrize(("method", "case"), CASES)
def test_a_saved_adapter_gives_the_same_logits_in_plain_peft(
    open_method: Open, model_config: MakeConfig, make_units: MakeUnits, tmp_path: Path, method: str, case: str
) -> None:
    adapter, config = open_method(method, case), model_config(case)
    adapter.load(moved(adapter))
    engine = Engine(adapter)
    optimizer = engine.optimizer(
        torch.optim.SGD([adapter.flat], lr=0.01), Mechanism(1.0, 1.0, 0.5), 1.0, OsRandomness()
    )
    engine.step(optimizer, make_units(case), 8)
    final, expected = adapter.vector(), logits(adapter.model)
    adapter.load(adapter.initial)
    adapter.save(final, tmp_path, config.source)
    assert adapter.vector().tobytes() == adapter.initial.tobytes()
    loaded = PeftModel.from_pretrained(load_base(config, "cpu").model, str(tmp_path)).eval()
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    if "tokens" in SETTINGS[method]:
        assert len(saved["prompt_embeddings"]) == 5
        assert not any("prompt_encoder" in name for name in saved)


@conv1d
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", SETTINGS)
def test_a_saved_adapter_is_compared_as_its_users_load_it(
    open_method: Open, model_config: MakeConfig, tmp_path: Path, method: str, dtype: str
) -> None:
    adapter, config = open_method(method, "gpt2", dtype), model_config("gpt2")
    final = moved(adapter)
    adapter.save(final, tmp_path, config.source)
    assert check_saved(tmp_path, adapter, final, config)
    if dtype == "bfloat16":  # in which a few virtual tokens more or less are within rounding
        return
    adapter.save(final * 1.5, tmp_path, config.source)
    with pytest.raises(ModelError, match="not the one that was trained"):
        check_saved(tmp_path, adapter, final, config)


def small_plan(base: Path, method: str, **changes: Any) -> RunPlan:
    return plan_of(base, **changes).model_copy(
        update={"adapter": AdapterConfig(**{"method": method, **SETTINGS.get(method, {})})}
    )


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("dora", {}), ("ia3", {"classifies": True}), ("prompt", {"distributed": True}), ("ptuning", {}),
        ("prefix", {"distributed": True}), ("prefix", {}), ("dora", {"distributed": True, "classifies": True}),
    ],
)  # fmt: skip
def test_the_self_check_passes(tiny_llama: Path, method: str, changes: dict[str, Any]) -> None:
    plan = small_plan(tiny_llama, method, **changes)
    adapter = attach(load_base(plan.model, "cpu"), plan.model, plan.adapter, plan.seed)
    session = cast(Any, SimpleNamespace(site="zoo", plan=plan))
    self_check.self_check(Subject(adapter, Engine(adapter), plan, lambda: PlanSession.randomness(session, 1), 8))


def test_an_engine_that_takes_records_one_at_a_time_says_so(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    for method, told in (("ia3", True), ("rslora", False)):
        caplog.clear()
        plan = small_plan(tiny_llama, method)
        adapter = attach(load_base(plan.model, "cpu"), plan.model, plan.adapter, plan.seed)
        with caplog.at_level(logging.INFO):
            Engine(adapter).set_up(plan, checkpointing=False)
        assert ("every record is computed by itself" in caplog.text) == told


def test_rslora_divides_by_the_root_of_the_rank(open_method: Open) -> None:
    lora, rslora = (open_method(method, "llama", rank=4, alpha=6.0) for method in ("lora", "rslora"))
    assert (lora.spec.scaling, rslora.spec.scaling) == (1.5, 3.0)
    assert {layer.scaling["default"] for layer in rslora.model.modules() if hasattr(layer, "lora_A")} == {3.0}
    assert lora.spec.digest != rslora.spec.digest


@pytest.mark.parametrize(("train", "kinds"), [("B", {"lora_B", "vector"}), ("AB", {"lora_A", "lora_B", "vector"})])
def test_dora_trains_the_lengths_of_rows_with_either_choice_of_matrices(
    open_method: Open, train: str, kinds: set[str]
) -> None:
    names = [tensor.name for tensor in open_method("dora", "llama", train=train).spec.tensors]
    found = {kind for kind in ("lora_A", "lora_B", "vector") if any(kind in name for name in names)}
    assert found == kinds


def test_the_norms_of_dora_are_taken_once_for_an_adapter_and_change_no_bit(
    open_method: Open, make_units: MakeUnits, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = open_method("dora", "llama")
    engine, units = Engine(adapter), make_units("llama", sizes=(1, 3, 1, 2))
    layers = [module for module in adapter.model.modules() if isinstance(module, DoraLinearLayer)]
    taken = []
    take = DoraLinearLayer.get_weight_norm
    monkeypatch.setattr(DoraLinearLayer, "get_weight_norm", lambda *a, **k: (taken.append(a[0]), take(*a, **k))[1])
    found = []
    for vector in (adapter.initial, moved(adapter)):
        adapter.load(vector)
        found.append(engine.clipped_sum(units, Mechanism(CLIP, 0.0, 1.0), 4))
        assert len(taken) == len(layers)
        taken.clear()
    monkeypatch.setattr(Engine, "_norms_kept", lambda self: contextlib.nullcontext())
    assert torch.equal(engine.clipped_sum(units, Mechanism(CLIP, 0.0, 1.0), 4), found[1])
    assert len(taken) == len(layers) * sum(map(len, units)) > len(layers)
    assert not torch.equal(*found)


@conv1d
@pytest.mark.parametrize(
    ("case", "inner"), [("llama", "mlp.down_proj"), ("gpt2", "mlp.c_proj"), ("bert-native", "1.output.dense")]
)
def test_ia3_scales_what_the_second_layer_of_a_block_reads_and_what_all_others_give(
    open_method: Open, case: str, inner: str
) -> None:
    adapter = open_method("ia3", case, layers=(1,))
    layers = {name: m.is_feedforward for name, m in adapter.model.named_modules() if hasattr(m, "is_feedforward")}
    assert layers
    assert all(".1." in name for name in layers)
    assert [name.endswith(inner) for name in layers] == list(layers.values())


@pytest.mark.parametrize(("method", "pooling"), [("prefix", "bert-native"), ("prefix", "bert-mean")])
def test_what_peft_does_not_support_is_refused_with_its_reason(open_method: Open, method: str, pooling: str) -> None:
    with pytest.raises(
        ModelError, match=r"adapter\.method=prefix does not fit .*past key values.* adapter\.method=lora"
    ):
        open_method(method, pooling)


@pytest.mark.parametrize("method", ["prompt", "ptuning"])
def test_virtual_tokens_before_a_decoder_that_classifies_are_refused(open_method: Open, method: str) -> None:
    with pytest.raises(ModelError, match="takes padding for text"):
        open_method(method, "llama-native")


@pytest.mark.parametrize("method", ["prompt", "prefix", "ptuning"])
def test_virtual_tokens_and_text_must_fit_the_models_positions(open_method: Open, method: str) -> None:
    assert open_method(method, "llama", tokens=64).positions == 64  # of 128, with a max_length of 64
    with pytest.raises(
        ModelError, match=r"adapter\.tokens=65 and model\.max_length=64 are more than the 128 positions"
    ):
        open_method(method, "llama", tokens=65)


def test_roberta_numbers_virtual_tokens_as_text(tmp_path: Path) -> None:
    folder = bases.make(tmp_path, "roberta", bases.MASKED)
    config = bases.classifier(folder, max_length=61)
    adapter = attach(load_base(config, "cpu"), config, AdapterConfig(method="prompt", tokens=4), 0)
    ids = torch.full((1, 61), 5)
    assert adapter.logits(ids, torch.ones_like(ids)).isfinite().all()
    with pytest.raises(ModelError, match="more than the 65 positions"):
        attach(load_base(config, "cpu"), config, AdapterConfig(method="prompt", tokens=5), 0)


def test_a_prefix_cannot_be_computed_twice(tiny_llama: Path) -> None:
    plan = small_plan(tiny_llama, "prefix")
    engine = Engine(attach(load_base(plan.model, "cpu"), plan.model, plan.adapter, 0))
    with pytest.raises(ModelError, match=r"site\.checkpointing"):
        engine.set_up(plan, checkpointing=True)


@pytest.mark.parametrize("method", ["dora", "ia3", "prompt", "ptuning"])
def test_recomputed_blocks_give_the_same_gradients(tiny_llama: Path, make_units: MakeUnits, method: str) -> None:
    plan = small_plan(tiny_llama, method)
    adapter = attach(load_base(plan.model, "cpu"), plan.model, plan.adapter, 0)
    engine, sums = Engine(adapter), []
    for checkpointing in (False, True):
        engine.set_up(plan, checkpointing)
        sums.append(engine.clipped_sum(make_units(), Mechanism(CLIP, 1.0, 0.5), 8))
    assert torch.equal(sums[0], sums[1])


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"method": "prompt", "rank": 4}, ["no rank", "adapter.rank=8"]),
        ({"method": "ia3", "train": "AB"}, ["no train", "adapter.train=B"]),
        (
            {"method": "prefix", "alpha": 0.3, "layers": [5]},
            ["no alpha, layers", "adapter.alpha=16 adapter.layers=null"],
        ),
        ({"method": "dora", "tokens": 5}, ["no tokens", "adapter.tokens=20"]),
        ({"tokens": 5}, ["method=lora has no tokens"]),
        ({"method": "lora2"}, ["method"]),
        ({"method": "prompt", "tokens": 0}, ["tokens"]),
    ],
)
def test_a_setting_that_means_nothing_to_a_method_is_refused(values: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse(AdapterConfig, values)
    for word in named:
        assert word in str(error.value)


@conv1d
@pytest.mark.parametrize("case", ["untied", "gpt2", "gemma2"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "prompt", "prefix", "ptuning"])
def test_generation_follows_the_logits_whatever_the_padding(open_method: Open, method: str, case: str) -> None:
    adapter = open_method(method, case)
    adapter.load(moved(adapter))
    texts = [[7, 30, 8, 90, 61], [11, 200, 45]]
    width, new = 5, 6
    ids, mask = torch.zeros((2, width), dtype=torch.int64), torch.zeros((2, width), dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :], mask[row, width - len(text) :] = torch.tensor(text), 1
    with torch.no_grad():
        options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        found = generated(adapter.model, ids, mask, **options)
        for row, text in enumerate(texts):
            whole = torch.tensor([text])
            for _ in range(new):
                token = adapter.logits(whole, torch.ones_like(whole))[0, -1].argmax()
                whole = torch.cat([whole, token.reshape(1, 1)], dim=1)
            assert found[row].tolist() == whole[0, len(text) :].tolist()
