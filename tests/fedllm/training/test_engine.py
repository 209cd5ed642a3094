"""One step: per-unit gradients that are right, a clip that holds, noise that is there once, and a public divisor."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import nn
from torch.nn import functional as F

from fedllm.errors import ModelError
from fedllm.privacy.distributed_noise import DistributedMechanism
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import OsRandomness, Randomness, SeededRandomness
from fedllm.training import losses
from fedllm.training.adapter import AdapterModel
from fedllm.training.data import Batch, Example, PrivacyUnit, batches
from fedllm.training.engine import Engine, _repeatable, clip_and_sum
from tests.fedllm.training.conftest import conv1d

FALSE_ALARM = 1e-6  # chance that a correct implementation fails one statistical test
CASES = ["llama", "gpt2", "qwen2", "gemma2", "untied", "bert-native", "bert-mean", "gpt2-native", "llama-native"]
CLIP = 0.05

Open = Callable[..., AdapterModel]
MakeUnits = Callable[..., list[PrivacyUnit]]
RandomVector = Callable[[AdapterModel], NDArray[np.float32]]


class Silent:
    """A source whose normals are all zero and whose coins draw everyone: what is left is the clipped sum."""

    private = False

    def words(self, n: int) -> NDArray[np.uint64]:
        return np.zeros(n, dtype=np.uint64)


class Recorder(torch.optim.SGD):
    """SGD that keeps a copy of the gradient it was given."""

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float = 0.0) -> None:
        super().__init__(parameters, lr=lr)
        self.seen: list[NDArray[np.float64]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        gradients = [p.grad.reshape(-1).double() for group in self.param_groups for p in group["params"]]
        self.seen.append(torch.cat(gradients).numpy().copy())
        super().step(closure)


def released(
    adapter: AdapterModel,
    engine: Engine,
    units: Sequence[PrivacyUnit],
    mechanism: Mechanism | None = None,
    expected_units: float = 1.0,
    source: Randomness | None = None,
    micro_batch: int = 64,
) -> NDArray[np.float64]:
    """Return what one step hands to the optimiser, float64[d]; without a source of noise, the clipped sum."""
    mechanism = mechanism or Mechanism(CLIP, 1.0, 0.5)
    if source is None and mechanism.private:
        return engine.clipped_sum(units, mechanism, micro_batch).numpy() / expected_units
    recorder = Recorder([adapter.flat])
    optimizer = engine.optimizer(recorder, mechanism, expected_units, source or Silent())
    engine.step(optimizer, units, micro_batch)
    assert len(recorder.seen) == 1
    return recorder.seen[0]


def one_batch(units: Sequence[PrivacyUnit]) -> Batch:
    (batch,) = batches(units, 10_000, 0, torch.device("cpu"))
    return batch


def by_length(units: Sequence[PrivacyUnit]) -> list[PrivacyUnit]:
    """Return units in the order in which they are batched."""
    return sorted(units, key=lambda unit: max(len(record.input_ids) for record in unit))


def slow_gradient(adapter: AdapterModel, unit: PrivacyUnit) -> NDArray[np.float64]:
    """Return a unit's gradient, float64[d]: record by record, unpadded, by plain autograd and the model's own loss."""
    for p in adapter.trainable.values():
        p.grad = None
    for record in unit:
        ids = torch.from_numpy(record.input_ids)[None]
        if record.labels.ndim:
            loss = adapter.model(input_ids=ids, labels=torch.from_numpy(record.labels)[None]).loss
        else:
            output = adapter.model(input_ids=ids, attention_mask=torch.ones_like(ids))
            loss = F.cross_entropy(output.logits, torch.from_numpy(np.atleast_1d(record.labels)))
        (loss / len(unit)).backward()
    # None: a layer that the output does not depend on
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in adapter.trainable.values()]
    return torch.cat([gradient.reshape(-1).double() for gradient in gradients]).numpy()


@conv1d
@pytest.mark.parametrize(
    ("case", "train"), [*((case, "AB") for case in CASES), ("llama", "B"), ("gpt2", "B"), ("bert-mean", "B")]
)
def test_the_gradient_of_each_unit_is_the_one_of_a_slow_loop(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, case: str, train: str
) -> None:
    plain, adapter = open_adapter(case, train=train), open_adapter(case, train=train)
    vector = random_vector(adapter)
    plain.load(vector)
    adapter.load(vector)
    units = by_length(make_units(case))
    fast = Engine(adapter).unit_gradients(one_batch(units)).double().numpy()
    assert fast.shape == (len(units), adapter.spec.dimension)
    for row, unit in zip(fast, units, strict=True):
        slow = slow_gradient(plain, unit)
        assert np.linalg.norm(slow) > 1e-4
        assert np.linalg.norm(row - slow) <= 1e-5 * np.linalg.norm(slow)


@conv1d
@pytest.mark.parametrize("case", CASES)
def test_outside_training_the_model_is_the_same_as_before(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, case: str
) -> None:
    adapter = open_adapter(case)
    vector = random_vector(adapter)
    adapter.load(vector)
    batch = one_batch(make_units(case))

    def logits() -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = adapter.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return result

    before = logits()
    names = list(dict(adapter.model.named_parameters()))
    engine = Engine(adapter)
    assert list(dict(adapter.model.named_parameters())) == names
    assert torch.equal(logits(), before)
    engine.unit_gradients(batch)
    released(adapter, engine, make_units(case))
    adapter.load(vector)
    assert torch.equal(logits(), before)
    assert all(p.grad is None for p in adapter.model.parameters())


@pytest.mark.parametrize("clip_norm", [1e-3, 0.05, 2.0])
@pytest.mark.parametrize("case", ["llama", "bert-native"])
def test_the_clipped_gradient_of_every_unit_is_at_most_the_clip_norm(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, case: str, clip_norm: float
) -> None:
    adapter = open_adapter(case)
    adapter.load(random_vector(adapter))
    engine = Engine(adapter)
    for unit in make_units(case, sizes=(1, 4, 1, 2)):
        raw = engine.unit_gradients(one_batch([unit])).double().numpy()[0]
        clipped = released(adapter, engine, [unit], Mechanism(clip_norm, 1.0, 0.5))
        norm, raw_norm = float(np.linalg.norm(clipped)), float(np.linalg.norm(raw))
        assert norm <= clip_norm * (1 + 1e-6)
        # and no smaller than it has to be, in the direction of the gradient
        assert norm == pytest.approx(min(clip_norm, raw_norm), rel=1e-4)
        assert float(clipped @ raw) == pytest.approx(norm * raw_norm, rel=1e-6)


@pytest.mark.parametrize("clip_norm", [1e-3, 2.0])
@pytest.mark.parametrize("case", ["llama", "bert-native"])
def test_automatic_clipping_brings_every_unit_to_almost_the_clip_norm(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, case: str, clip_norm: float
) -> None:
    adapter = open_adapter(case)
    adapter.load(random_vector(adapter))
    engine, mechanism = Engine(adapter), Mechanism(clip_norm, 1.0, 0.5, "automatic")
    units = make_units(case, sizes=(1, 4, 1, 2))
    total = np.zeros(adapter.spec.dimension)
    for unit in units:
        raw = engine.unit_gradients(one_batch([unit])).double().numpy()[0]
        norm = float(np.linalg.norm(raw))
        clipped = released(adapter, engine, [unit], mechanism)
        assert np.linalg.norm(clipped) < clip_norm
        assert np.linalg.norm(clipped - raw * clip_norm / (norm + 0.01)) <= 1e-5 * clip_norm
        total += clipped
    everyone = released(adapter, engine, units, mechanism, micro_batch=3)
    assert np.linalg.norm(everyone - total) <= 1e-5 * np.linalg.norm(total)
    for absent in range(len(units)):
        others = released(adapter, engine, units[:absent] + units[absent + 1 :], mechanism)
        assert np.linalg.norm(everyone - others) <= clip_norm * (1 + 1e-5)


def test_automatic_clipping_leaves_a_gradient_of_zero_at_zero(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector
) -> None:
    mechanism = Mechanism(CLIP, 1.0, 0.5, "automatic")
    assert not clip_and_sum(torch.zeros(3, 5), mechanism).any()
    tiny = clip_and_sum(torch.full((1, 4), 1e-8), mechanism)
    assert 0 < float(tiny.norm()) < 1e-5
    adapter = open_adapter("llama")
    adapter.load(random_vector(adapter))
    (unit,) = make_units(sizes=(1,))
    blank = (replace(unit[0], labels=np.full_like(unit[0].labels, -100)),)
    assert not released(adapter, Engine(adapter), [blank], mechanism).any()


def test_a_very_long_gradient_is_clipped_as_well_as_a_short_one() -> None:
    for length in (1_000, 1_000_000, 8_000_000):
        gradient = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (1, length)).astype(np.float32))
        clipped = clip_and_sum(gradient, Mechanism(1.0, 1.0, 0.5))
        assert float(clipped.double().norm()) == pytest.approx(1, rel=1e-6), f"{length} coordinates"


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("case", ["llama", "bert-mean"])
def test_adding_one_person_moves_the_clipped_sum_by_at_most_the_clip_norm(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, case: str, clipping: Any
) -> None:
    """A whole person: one record or several, all of them at once."""
    mechanism = Mechanism(CLIP, 1.0, 0.5, clipping)
    adapter = open_adapter(case)
    adapter.load(random_vector(adapter))
    engine = Engine(adapter)
    units = make_units(case, sizes=(1, 2, 5, 1, 3, 1, 1))
    everyone = released(adapter, engine, units, mechanism, micro_batch=4)
    for absent in range(len(units)):
        others = units[:absent] + units[absent + 1 :]
        moved = np.linalg.norm(everyone - released(adapter, engine, others, mechanism, micro_batch=4))
        assert 0 < moved <= CLIP * (1 + 1e-5)  # 1e-5: rounding of two float32 sums of seven
    alone = released(adapter, engine, units[:1], mechanism)
    assert np.linalg.norm(alone - released(adapter, engine, [], mechanism)) <= CLIP * (1 + 1e-6)


def test_a_person_with_many_records_counts_no_more_than_one_with_a_single_record(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector
) -> None:
    adapter = open_adapter("llama")
    adapter.load(random_vector(adapter))
    engine = Engine(adapter)
    (large,) = make_units(sizes=(30,))
    assert np.linalg.norm(released(adapter, engine, [large], micro_batch=4)) <= CLIP * (1 + 1e-6)
    copies = (large[0],) * 9
    assert released(adapter, engine, [copies]) == pytest.approx(released(adapter, engine, [copies[:1]]), abs=1e-6)


@pytest.mark.parametrize("case", ["llama", "bert-native"])
def test_the_size_of_a_micro_batch_does_not_change_the_step(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, case: str
) -> None:
    adapter = open_adapter(case)
    adapter.load(random_vector(adapter))
    engine = Engine(adapter)
    units = make_units(case, sizes=(1, 3, 1, 2, 1, 4))
    for mechanism in (Mechanism(CLIP, 1.0, 0.5), Mechanism(CLIP, 0.0, 0.5)):
        whole = released(adapter, engine, units, mechanism, micro_batch=1_000)
        for micro_batch in (1, 2, 3, 5, 12):
            cut = released(adapter, engine, units, mechanism, micro_batch=micro_batch)
            assert np.linalg.norm(cut - whole) <= 1e-5 * np.linalg.norm(whole)


RECORDS, PERSONS = (1,) * 9, (1, 3, 1, 2, 1, 1, 2)
PAIRS = [  # every type with every size, every model and quantisation; the rest in soak
    ("llama", "float32", "none", PERSONS),
    ("llama", "float32", "nf4", PERSONS),
    ("gpt2", "bfloat16", "none", PERSONS),
    ("gpt2", "float32", "int8", RECORDS),
    ("qwen2", "bfloat16", "none", RECORDS),
    ("gemma2", "float32", "none", RECORDS),
    ("bert-native", "bfloat16", "nf4", RECORDS),
    ("bert-mean", "bfloat16", "int8", PERSONS),
]


@conv1d
@pytest.mark.parametrize(
    ("case", "dtype", "quantize", "sizes"),
    [
        *PAIRS,
        *(
            pytest.param(*each, marks=pytest.mark.soak)
            for each in itertools.product(
                dict.fromkeys(pair[0] for pair in PAIRS),
                ["float32", "bfloat16"],
                ["none", "int8", "nf4"],
                [RECORDS, PERSONS],
            )
            if each not in PAIRS
        ),
    ],
    ids=lambda value: {RECORDS: "records", PERSONS: "persons"}.get(value, value),
)
def test_a_units_part_of_the_sum_is_the_same_to_the_last_bit_whoever_else_is_drawn(
    open_adapter: Open,
    make_units: MakeUnits,
    random_vector: RandomVector,
    case: str,
    dtype: str,
    quantize: str,
    sizes: tuple[int, ...],
) -> None:
    """In quanta far below the last bit of a gradient, whose sums are exact. One record fills its batch's width."""
    adapter = open_adapter(case, dtype=dtype, quantize=quantize)
    adapter.load(random_vector(adapter))
    engine, units = Engine(adapter), make_units(case, sizes=sizes)
    full = Example(np.arange(3, 19), np.asarray(1) if adapter.classifies else np.arange(3, 19))
    units += [(full,), (Example(full.input_ids[:-1], full.labels if adapter.classifies else full.labels[:-1]),)]
    mechanism = Mechanism(CLIP, 1.0, 0.5)
    distributed = DistributedMechanism(mechanism, 2, 2, 0, 1.0)

    def parts(drawn: Sequence[PrivacyUnit], micro_batch: int) -> torch.Tensor:
        return engine.clipped_sum(drawn, mechanism, micro_batch, distributed)

    for micro_batch in (4, 64):
        alone = [parts([unit], micro_batch) for unit in units]
        assert all(part.abs().max() > 1000 for part in alone)
        for absent in range(len(units)):
            expected = sum(part for k, part in enumerate(alone) if k != absent)
            found = parts(units[:absent] + units[absent + 1 :], micro_batch)
            assert torch.equal(found, torch.as_tensor(expected))


def test_the_order_of_the_units_does_not_change_the_step(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector
) -> None:
    adapter = open_adapter("llama")
    adapter.load(random_vector(adapter))
    engine, units = Engine(adapter), make_units()
    forward, backward = released(adapter, engine, units), released(adapter, engine, units[::-1])
    assert np.linalg.norm(forward - backward) <= 1e-5 * np.linalg.norm(forward)


@pytest.mark.parametrize("optimizer_kind", [torch.optim.SGD, torch.optim.Adam])
def test_an_empty_batch_is_a_step_of_noise_alone(
    open_adapter: Open, optimizer_kind: type[torch.optim.Optimizer]
) -> None:
    adapter = open_adapter("llama")
    engine, mechanism = Engine(adapter), Mechanism(2.0, 0.5, 0.1)
    noise = released(adapter, engine, [], mechanism, expected_units=4.0, source=SeededRandomness(3))
    again = mechanism.release(np.zeros(adapter.spec.dimension), SeededRandomness(3))
    assert noise == pytest.approx(again / 4.0, rel=1e-5, abs=1e-7)

    before = adapter.vector()
    inner = optimizer_kind([adapter.flat], lr=0.1)
    engine.step(engine.optimizer(inner, mechanism, 4.0, OsRandomness()), [], 8)
    assert (adapter.vector() != before).mean() > 0.99
    if optimizer_kind is torch.optim.Adam:
        assert int(inner.state[adapter.flat]["step"]) == 1


def test_the_divisor_is_public_and_not_the_size_of_the_batch(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector
) -> None:
    adapter = open_adapter("llama")
    adapter.load(random_vector(adapter))
    engine = Engine(adapter)
    for units in (make_units(sizes=(1,)), make_units(sizes=(1, 2, 1, 1))):
        clipped_sum = released(adapter, engine, units, expected_units=1.0, source=Silent())
        for expected in (0.5, 7.0, 1000.0):
            assert released(adapter, engine, units, expected_units=expected, source=Silent()) == pytest.approx(
                clipped_sum / expected, rel=1e-5, abs=1e-12
            )


@pytest.mark.parametrize("micro_batch", [1, 100])
def test_noise_is_added_once_and_has_the_stated_variance_in_every_coordinate(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, micro_batch: int
) -> None:
    adapter = open_adapter("llama")
    adapter.load(random_vector(adapter))
    engine, units, mechanism = Engine(adapter), make_units(sizes=(1, 1, 2, 1, 1)), Mechanism(0.5, 3.0, 0.5)
    clipped_sum = released(adapter, engine, units, mechanism, micro_batch=micro_batch)
    noisy = released(adapter, engine, units, mechanism, source=OsRandomness(), micro_batch=micro_batch)
    noise = noisy - clipped_sum
    statistic = float(np.sum(noise**2)) / (3.0 * 0.5) ** 2
    assert stats.chi2.ppf(FALSE_ALARM / 2, len(noise)) <= statistic <= stats.chi2.isf(FALSE_ALARM / 2, len(noise))
    assert stats.kstest(noise, stats.norm(scale=1.5).cdf).pvalue > FALSE_ALARM

    steps = 120
    draws = np.stack([released(adapter, engine, [], mechanism, source=OsRandomness()) for _ in range(steps)])
    each = (draws**2).sum(axis=0) / 1.5**2  # chi-square of `steps` degrees, for each coordinate
    tail = FALSE_ALARM / (2 * draws.shape[1])
    assert each.min() >= stats.chi2.ppf(tail, steps)
    assert each.max() <= stats.chi2.isf(tail, steps)


def test_a_run_without_privacy_neither_clips_nor_adds_noise(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector
) -> None:
    adapter = open_adapter("llama")
    adapter.load(random_vector(adapter))
    engine, units = Engine(adapter), by_length(make_units())
    total = engine.unit_gradients(one_batch(units)).double().numpy().sum(axis=0)
    off = released(adapter, engine, units, Mechanism(1e-6, 0.0, 0.5), expected_units=2.0, source=OsRandomness())
    assert np.linalg.norm(off - total / 2.0) <= 1e-5 * np.linalg.norm(total)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e38])
def test_a_unit_whose_gradient_is_not_finite_contributes_nothing_and_spoils_no_other(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, poison: float
) -> None:
    adapter = open_adapter("untied")
    adapter.load(random_vector(adapter))
    adapter.model.get_input_embeddings().weight.data[255] = poison
    engine = Engine(adapter)
    healthy = make_units(sizes=(1, 2, 1))
    record = healthy[0][0]
    sick = Example(np.where(np.arange(len(record.input_ids)) == 1, 255, record.input_ids), record.labels)
    expected = released(adapter, engine, healthy)
    assert np.linalg.norm(expected) > 0
    for bad in ((sick,), (record, sick)):
        alone = released(adapter, engine, [bad])
        assert not alone.any()
        for micro_batch in (1, 100):
            together = released(adapter, engine, [*healthy, bad], micro_batch=micro_batch)
            assert np.linalg.norm(together - expected) <= 1e-5 * np.linalg.norm(expected)
    with pytest.raises(ModelError, match="NaN or infinite"):  # where nothing is protected, nothing is hidden
        released(adapter, engine, [*healthy, (sick,)], Mechanism(1.0, 0.0, 0.5))


def test_a_gradient_too_large_for_float32_is_clipped_or_left_out_but_never_infinite(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector
) -> None:
    adapter = open_adapter("untied")
    adapter.load(random_vector(adapter))
    engine, units = Engine(adapter), make_units(sizes=(1, 1))
    for scale in (1e3, 1e10, 1e19, 1e30):
        adapter.model.get_output_embeddings().weight.data *= scale
        clipped = released(adapter, engine, units[:1])
        assert np.isfinite(clipped).all()
        assert np.linalg.norm(clipped) <= CLIP * (1 + 1e-6)


def test_a_record_without_any_label_is_a_unit_of_zero_gradient(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector
) -> None:
    adapter = open_adapter("llama")
    adapter.load(random_vector(adapter))
    engine = Engine(adapter)
    units = make_units(sizes=(1, 1))
    blank = (replace(units[0][0], labels=np.full_like(units[0][0].labels, -100)),)
    assert not released(adapter, engine, [blank]).any()
    assert released(adapter, engine, [blank, *units]) == pytest.approx(released(adapter, engine, units), abs=1e-7)


def test_the_update_is_what_the_optimiser_made_of_the_released_gradient(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector
) -> None:
    adapter = open_adapter("llama")
    start = random_vector(adapter)
    adapter.load(start)
    engine = Engine(adapter)
    recorder = Recorder([adapter.flat], lr=0.25)
    optimizer = engine.optimizer(recorder, Mechanism(1.0, 1.0, 0.5), 3.0, SeededRandomness(1))
    engine.step(optimizer, make_units(), 8)
    assert adapter.vector() == pytest.approx((start - 0.25 * recorder.seen[0]).astype(np.float32), abs=1e-6)
    assert (adapter.vector() != start).all()


def test_a_seeded_step_can_be_repeated_bit_for_bit(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector
) -> None:
    adapter = open_adapter("llama")
    adapter.load(random_vector(adapter))
    engine = Engine(adapter)
    first, second = (released(adapter, engine, make_units(), source=SeededRandomness(9)) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_no_state_of_one_step_reaches_the_next(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector
) -> None:
    adapter = open_adapter("llama")
    adapter.load(random_vector(adapter))
    engine, units = Engine(adapter), make_units()
    recorder = Recorder([adapter.flat])
    optimizer = engine.optimizer(recorder, Mechanism(CLIP, 1.0, 0.5), 1.0, Silent())
    for batch in (units, [], units[:1], units):
        engine.step(optimizer, batch, 2)
    assert recorder.seen[0].tobytes() == recorder.seen[3].tobytes()
    assert not recorder.seen[1].any()
    assert recorder.seen[2].tobytes() == released(adapter, engine, units[:1], source=Silent()).tobytes()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("targets", [("embed_tokens",), ("q_proj", "embed_tokens")])
def test_a_trainable_tensor_outside_linear_layers_is_refused(open_adapter: Open, targets: tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match="embed_tokens"):
        Engine(open_adapter("llama", targets=targets))


def test_a_trainable_layer_behind_a_mix_of_records_is_refused(open_adapter: Open, make_units: MakeUnits) -> None:
    adapter = open_adapter("llama")
    engine = Engine(adapter)
    layer = adapter.model.get_base_model().model.layers[0]
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: forward(x.reshape(1, -1, x.shape[-1])).reshape(x.shape)  # as experts' routers do
    with pytest.raises(ModelError, match=r"adapter\.targets"):
        released(adapter, engine, make_units())


@pytest.mark.parametrize("mix", ["mean over records", "previous record"])
def test_a_model_that_mixes_the_records_of_a_batch_is_refused_at_once(open_adapter: Open, mix: str) -> None:
    adapter = open_adapter("llama")
    norm = adapter.model.get_base_model().model.layers[0].post_attention_layernorm
    forward = norm.forward
    if mix == "mean over records":  # as batch normalisation does
        norm.forward = lambda x: forward(x - x.mean(0, keepdim=True))
    else:
        norm.forward = lambda x: forward(x + 0.5 * x.roll(1, 0))
    with pytest.raises(ModelError, match="mixes the records"):
        Engine(adapter)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("at_a_time", [1, 200, 10_000])  # logits: one token, two, all
def test_the_loss_of_the_head_and_its_gradient_are_those_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, at_a_time: int, bias: bool
) -> None:
    monkeypatch.setattr(losses, "_LOGITS", at_a_time)
    vocabulary = 100
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(4, vocabulary, bias=bias)
    states = torch.randn(5, 4, generator=generator).requires_grad_()
    targets = torch.tensor([0, vocabulary - 1, 3, 3, 5])
    weights = torch.randn(5, generator=generator)
    (expected,) = torch.autograd.grad(
        (F.cross_entropy(head(states), targets, reduction="none") * weights).sum(), states
    )
    bias_V = None if head.bias is None else head.bias.detach()
    found = losses.head_losses(states, head.weight.detach(), bias_V, targets)
    (gradient,) = torch.autograd.grad((found * weights).sum(), states)
    assert torch.allclose(found, F.cross_entropy(head(states), targets, reduction="none"), rtol=1e-5)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert not losses.head_losses(states[:0], head.weight.detach(), None, targets[:0]).numel()


@pytest.mark.parametrize("case", ["llama", "qwen2", "bert-native", "bert-mean"])
def test_a_base_in_bfloat16_leaves_adapter_clip_and_noise_in_float32(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector, case: str
) -> None:
    wide, narrow = open_adapter(case), open_adapter(case, dtype="bfloat16")
    vector = random_vector(wide)
    assert narrow.spec == wide.spec  # what parties compare does not depend on what they compute with
    assert {p.dtype for n, p in narrow.model.named_parameters() if not p.requires_grad and "lora_" not in n} == {
        torch.bfloat16
    }
    units = by_length(make_units(case, sizes=(1, 2, 1)))
    gradients = []
    for adapter in (wide, narrow):
        adapter.load(vector)
        assert adapter.vector().tobytes() == vector.tobytes()
        gradients.append(Engine(adapter).unit_gradients(one_batch(units)))
        assert gradients[-1].dtype == adapter.flat.dtype == torch.float32
    close = F.cosine_similarity(*gradients, dim=1)
    assert bool((close > 0.98).all()), close
    for unit in units:
        assert float(np.linalg.norm(released(narrow, Engine(narrow), [unit]))) <= CLIP * (1 + 1e-6)


def test_the_share_of_clipped_units_is_the_share_of_long_gradients(
    open_adapter: Open, make_units: MakeUnits, random_vector: RandomVector
) -> None:
    adapter = open_adapter("llama")
    adapter.load(random_vector(adapter))
    engine, units = Engine(adapter), make_units(sizes=(1, 1, 1, 1))
    norms = engine.unit_gradients(one_batch(units)).norm(dim=1).sort().values
    between = float(norms[0] + norms[1]) / 2
    assert engine.clipped_share(units, Mechanism(between, 1.0, 0.5), 3) == 0.75
    assert engine.clipped_share(units, Mechanism(between, 0.0, 0.5), 3) is None


@pytest.mark.parametrize(
    ("parameters", "width", "micro_batch", "records"),
    [(5e6, 128, 64, 32), (5e6, 128, 8, 8), (5e6, 1024, 64, 8), (1e9, 128, 64, 7), (7e9, 1024, 64, 1)],
)
def test_on_a_gpu_a_pass_has_more_records_whatever_the_threads(
    open_adapter: Open, monkeypatch: pytest.MonkeyPatch, parameters: float, width: int, micro_batch: int, records: int
) -> None:
    engine = Engine(open_adapter("llama"))
    monkeypatch.setattr(AdapterModel, "device", torch.device("cuda"))
    monkeypatch.setattr(engine, "_size", int(parameters))
    found = set()
    before = torch.get_num_threads()
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.add(engine.rows(width, micro_batch))
    torch.set_num_threads(before)
    assert found == {records}


def test_gradients_on_a_gpu_are_computed_by_algorithms_that_repeat_their_bits(
    open_adapter: Open, make_units: MakeUnits, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, modes = open_adapter("llama"), list[bool]()
    engine, batch = Engine(adapter), one_batch(make_units("llama"))
    honest = Engine._own_gradients

    def own(self: Engine, batch: Any) -> torch.Tensor:
        modes.append(torch.are_deterministic_algorithms_enabled())
        with monkeypatch.context() as there:
            there.setattr(AdapterModel, "device", torch.device("cpu"))
            return honest(self, batch)

    monkeypatch.setattr(Engine, "_own_gradients", own)
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(AdapterModel, "device", torch.device(device))
        engine.unit_gradients(batch)
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory
    assert modes == [False, True]


def test_an_operation_that_cannot_repeat_its_bits_on_a_gpu_is_an_error_of_ours() -> None:
    with (
        pytest.raises(ModelError, match=r"\(this has no deterministic implementation\)\. Use the CPU"),
        _repeatable(torch.device("cuda")),
    ):
        raise RuntimeError("this has no deterministic implementation")
    with pytest.raises(RuntimeError, match="out of memory"), _repeatable(torch.device("cuda")):
        raise RuntimeError("out of memory")
    assert not torch.are_deterministic_algorithms_enabled()
