"""Compiled and recomputed blocks: the same gradients, the same model outside of training, and no hard dependency."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch._dynamo.utils import counters

from fedllm.config import AdapterConfig, ModelConfig, PrivacyConfig, TrainingConfig
from fedllm.errors import ModelError
from fedllm.plan import RunPlan
from fedllm.privacy.distributed_noise import DistributedMechanism
from fedllm.privacy.mechanism import Mechanism
from fedllm.training import compiling
from fedllm.training.adapter import AdapterModel
from fedllm.training.data import Batch, Example, PrivacyUnit, batches, collate
from fedllm.training.engine import Engine
from tests.fedllm.training.conftest import conv1d

Open = Callable[..., AdapterModel]
MakeUnits = Callable[..., list[PrivacyUnit]]
RandomVector = Callable[[AdapterModel], NDArray[np.float32]]

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of compiled code for this session."""
    folder = tmp_path_factory.getbasetemp() / "compiled"
    folder.mkdir(mode=0o700, exist_ok=True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    return folder


def plan_of(compile: str, unit: str = "record", max_length: int = 64, units: int = 100) -> RunPlan:
    return RunPlan.model_validate(
        {
            "run": "r", "seed": 0, "model": ModelConfig(source="m", max_length=max_length, compile=compile),  # type: ignore[arg-type]
            "adapter": AdapterConfig(), "training": TrainingConfig(),
            "privacy": PrivacyConfig(unit=unit, units_per_site=units, noise_multiplier=1.0),  # type: ignore[arg-type]
        }
    )  # fmt: skip


def opened(
    open_adapter: Open, random_vector: RandomVector, case: str, compile: str = "off", checkpointing: bool = False,
    adapted: dict[str, Any] | None = None, **options: Any,
) -> tuple[AdapterModel, Engine]:  # fmt: skip
    adapter = open_adapter(case, **(adapted or {}))
    engine = Engine(adapter)
    engine.set_up(plan_of(compile, **options), checkpointing)
    adapter.load(random_vector(adapter))
    return adapter, engine


def some_batches(make_units: MakeUnits, case: str, sizes: tuple[int, ...]) -> list[Batch]:
    """Batches of several shapes, one of them without padding and one of a single record."""
    device = torch.device("cpu")
    units = [make_units(case, sizes=sizes, seed=seed) for seed in range(3)]
    units[2] = units[2][:3]
    units.append(units[0][:1])
    records = [unit[0] for unit in units[1]]
    width = min(len(record.input_ids) for record in records)
    cut = [Example(r.input_ids[:width], r.labels[:width] if r.labels.ndim else r.labels) for r in records]
    units.append([(record,) for record in cut])
    return [batch for some in units for batch in batches(some, 10_000, 0, device)]


def some_records(make_units: MakeUnits, case: str) -> list[Batch]:
    """Passes of one record, as compiled code serves: of several lengths, padded and not."""
    return [
        collate([unit], 0, torch.device("cpu"), len(unit[0].input_ids) + more)
        for unit in make_units(case, sizes=(1,) * 6)
        for more in (0, 3)
    ]


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    apart = (found.double() - expected.double()).norm(dim=1)
    assert bool((apart <= tolerance * expected.double().norm(dim=1)).all()), apart


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's front end alone, which finds graphs, guards and gradients; to compile C++ takes a minute."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options, **others: compile(f, backend="aot_eager", **others))


@needs_compiler
@conv1d
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("case", "checkpointing", "adapted"),
    [
        (
            "llama",
            False,
            {"targets": ("q_proj", "down_proj")},
        ),  # of attention and of what follows: to trace all is long
        *(
            pytest.param(case, case == "llama", {}, marks=pytest.mark.soak)
            for case in ("llama", "gpt2", "qwen2", "gemma2", "bert-mean")
        ),
    ],
)
def test_traced_gradients_are_those_of_the_model_for_persons_with_several_records_and_for_nobody_at_all(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, case: str, checkpointing: bool,
    adapted: dict[str, Any],
) -> None:  # fmt: skip
    _, plain = opened(open_adapter, random_vector, case, adapted=adapted)
    adapter, fast = opened(
        open_adapter, random_vector, case, "on", checkpointing=checkpointing, adapted=adapted, unit="person"
    )
    assert fast.compiled
    made = counters["stats"]["unique_graphs"]
    for batch in some_records(make_units, case):
        assert_same(fast.unit_gradients(batch), plain.unit_gradients(batch))
    persons = make_units(case, sizes=(1, 3, 1, 2, 1))
    sums = [engine.clipped_sum(persons, Mechanism(0.1, 1.0, 0.5), 8)[None] for engine in (fast, plain)]
    assert_same(*sums)
    assert not fast.clipped_sum([], Mechanism(1.0, 1.0, 0.5), 8).any()
    assert fast.compiled
    assert counters["stats"]["unique_graphs"] == made  # all shapes run on what the trial compiled
    for block in compiling._adapted_blocks(adapter.model):
        assert "forward" not in vars(block)
    assert adapter.model.config._attn_implementation == ("eager" if case == "gemma2" else "sdpa")


@needs_compiler
@pytest.mark.soak  # its twin is traced
@pytest.mark.timeout(1200)
def test_compiled_gradients_are_those_of_the_model(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector
) -> None:
    _, plain = opened(open_adapter, random_vector, "llama")
    _, fast = opened(open_adapter, random_vector, "llama", "on")
    assert fast.compiled
    for batch in some_records(make_units, "llama"):
        assert_same(fast.unit_gradients(batch), plain.unit_gradients(batch))
    # and company changes not the last bit of them
    units, mechanism = make_units("llama", sizes=(1,) * 6), Mechanism(0.1, 1.0, 0.5)
    distributed = DistributedMechanism(mechanism, 2, 2, 0, 1.0)  # sums in quanta are exact
    alone = sum(fast.clipped_sum([unit], mechanism, 64, distributed) for unit in units)
    assert torch.equal(fast.clipped_sum(units, mechanism, 64, distributed), torch.as_tensor(alone))
    assert fast.compiled


@needs_compiler
@pytest.mark.parametrize("max_length", [64, 10_000])  # attention written out, or SDPA
@pytest.mark.parametrize("compiler", ["none", pytest.param("traced", marks=pytest.mark.soak)])
def test_compiled_gradients_of_a_base_in_bfloat16_are_close_to_the_uncompiled_ones(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest, compiler: str, max_length: int,
) -> None:  # fmt: skip
    if compiler == "traced":
        request.getfixturevalue("traced")
    else:
        monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    engines = []
    for wish in ("off", "on"):
        adapter = open_adapter("llama", dtype="bfloat16")
        engines.append(Engine(adapter))
        engines[-1].set_up(plan_of(wish, max_length=max_length), checkpointing=False)
        adapter.load(random_vector(adapter))
    assert engines[1].compiled
    assert engines[1]._blocks._writes_out == (max_length == 64)
    for batch in some_records(make_units, "llama"):
        gradients = [engine.unit_gradients(batch) for engine in engines]
        # 0.97 of one unit: attention that is written out rounds its scores to bfloat16
        assert bool((torch.nn.functional.cosine_similarity(*gradients, dim=1) > 0.95).all())


@conv1d
@pytest.mark.parametrize("case", ["llama", "gpt2", "qwen2", "gemma2", "bert-native", "bert-mean"])
def test_recomputed_activations_give_the_same_gradients_bit_for_bit(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, case: str
) -> None:
    _, plain = opened(open_adapter, random_vector, case)
    _, lean = opened(open_adapter, random_vector, case, checkpointing=True)
    for batch in some_batches(make_units, case, (1, 3, 1, 2, 1)):
        assert torch.equal(lean.unit_gradients(batch), plain.unit_gradients(batch))


def test_a_recomputing_engine_holds_less(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector
) -> None:
    (batch,) = batches(make_units(sizes=(1,) * 30), 10_000, 0, torch.device("cpu"))
    held = []
    for checkpointing in (False, True):
        adapter, engine = opened(open_adapter, random_vector, "llama", checkpointing=checkpointing)
        sizes: list[int] = []
        frozen = {p.data_ptr() for p in adapter.model.parameters()}

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes, frozen: set[int] = frozen) -> torch.Tensor:
            if tensor.data_ptr() not in frozen:
                sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            engine.unit_gradients(batch)
        held.append(sum(sizes))
    assert held[1] < 0.5 * held[0]


def test_auto_compiles_only_where_a_plan_is_long_enough(
    open_adapter: Open, random_vector: RandomVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    assert not compiling.pays(1_000_000, 500, 96, cpu)  # the embedded demonstration
    assert compiling.pays(135_000_000, 2_000, 256, cpu)
    assert not any(compiling.pays(10**9, 1e9, 256, torch.device(other)) for other in ("cuda", "meta"))
    monkeypatch.setattr(compiling.Blocks, "compile", lambda *_: pytest.fail("compiled"))
    opened(open_adapter, random_vector, "llama", "auto")


def test_where_no_compiler_is_found_auto_goes_on_and_on_says_what_to_do(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(compiling.shutil, "which", lambda _: None)
    with pytest.raises(ModelError, match=r"install g\+\+.*model\.compile=off"):
        opened(open_adapter, random_vector, "llama", "on")
    monkeypatch.setattr(compiling, "_PAYS_FROM", {"cpu": 0})
    with caplog.at_level(logging.WARNING, "fedllm.site"):
        _, engine = opened(open_adapter, random_vector, "llama", "auto")
        engine.set_up(plan_of("auto"), checkpointing=False)
    assert len(caplog.records) == 1
    assert not engine.compiled
    for batch in some_batches(make_units, "llama", (1, 1, 1)):
        engine.unit_gradients(batch)


@needs_compiler
@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_compiled_code_that_fails_or_computes_something_else_is_not_used(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, fault: str,
) -> None:  # fmt: skip
    def compiled(forward: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def run(states: torch.Tensor, *args: Any, **options: Any) -> Any:
            if fault == "raises":
                raise RuntimeError("no code today\nat line 1")
            return forward(states * 1.5, *args, **options)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(compiling, "_PAYS_FROM", {"cpu": 0})
    with pytest.raises(ModelError, match=r"model\.compile=off"):
        opened(open_adapter, random_vector, "llama", "on")
    with caplog.at_level(logging.WARNING, "fedllm.site"):
        _, engine = opened(open_adapter, random_vector, "llama", "auto")
    assert len(caplog.records) == 1
    assert not engine.compiled
    _, plain = opened(open_adapter, random_vector, "llama")
    for batch in some_batches(make_units, "llama", (1, 1, 1)):
        assert torch.equal(engine.unit_gradients(batch), plain.unit_gradients(batch))


@needs_compiler
@pytest.mark.parametrize("wish", ["auto", "on"])
def test_a_unit_on_which_compiled_code_fails_counts_zero_and_changes_nobody_elses_part(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, wish: str,
) -> None:  # fmt: skip
    """To go on uncompiled would change the last bits of everybody, on account of one."""

    def compiled(forward: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def run(states: torch.Tensor, *args: Any, **options: Any) -> Any:
            if states.shape[1] == 24:
                raise RuntimeError("no code for this")
            return forward(states * 1.0001, *args, **options)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(compiling, "_PAYS_FROM", {"cpu": 0})
    _, engine = opened(open_adapter, random_vector, "llama", wish)
    assert engine.compiled
    units, mechanism = make_units(sizes=(1,) * 12), Mechanism(0.1, 1.0, 0.5)
    failing = [unit for unit in units if len(unit[0].input_ids) > 16]
    others = [unit for unit in units if len(unit[0].input_ids) <= 16]
    assert failing
    assert others
    with caplog.at_level(logging.WARNING, "fedllm.site"):
        assert torch.equal(engine.clipped_sum(units, mechanism, 8), engine.clipped_sum(others, mechanism, 8))
    assert any("contributes nothing" in record.message for record in caplog.records)
    assert engine.compiled
    with pytest.raises(ModelError, match="24 tokens"):  # before a charge it is a reason to refuse
        engine.rehearse(8, 64)


def test_compiled_code_lies_where_nobody_else_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place() -> Path:
        compiling.use_private_cache()
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert folder.stat().st_mode & 0o777 == 0o700
        assert folder.stat().st_uid == os.getuid()
        return folder

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor_someone")  # torch's own choice
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert place() == tmp_path / "cache" / "fedllm"
    assert place() == tmp_path / "cache" / "fedllm"  # named by the environment now

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "cache" / "fedllm").chmod(0o770)  # others of the group could plant code
    assert tmp_path not in place().parents

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "cache" / "fedllm").rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache" / "fedllm").symlink_to(tmp_path / "elsewhere")
    assert tmp_path not in place().parents

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "open"))
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ModelError, match="TORCHINDUCTOR_CACHE_DIR"):
        compiling.use_private_cache()
