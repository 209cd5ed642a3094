"""The server's optimiser does what its name says, and goes on after a restart as if there had been none."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedllm.config import ServerOptimizerConfig
from fedllm.errors import CheckpointError
from fedllm.training.server_optimizer import ServerOptimizer

D = 50
CONFIGS: dict[str, ServerOptimizerConfig] = {
    "fedavg": ServerOptimizerConfig(),
    "sgd": ServerOptimizerConfig(learning_rate=0.3),
    "momentum": ServerOptimizerConfig(learning_rate=0.3, momentum=0.9),
    "adam": ServerOptimizerConfig(name="adam", learning_rate=0.05, betas=(0.9, 0.99), eps=1e-3),
    "falling momentum": ServerOptimizerConfig(learning_rate=0.3, momentum=0.9, final_rate=0.1),
    "falling adam": ServerOptimizerConfig(name="adam", learning_rate=0.05, final_rate=0.2),
    "corrected adam": ServerOptimizerConfig(
        name="adam", learning_rate=0.05, final_rate=0.2, eps=0.1, noise_corrected=True
    ),
}
by_config = pytest.mark.parametrize("name", CONFIGS)


def vector(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=D).astype(np.float32)


def noise(seed: int) -> float:
    return 0.2 + 0.1 * (seed % 3)  # as if other sites answered in every round


Step = Callable[[NDArray[np.float64], NDArray[np.float64], float, float], NDArray[np.float64]]


def reference(config: ServerOptimizerConfig) -> Step:
    """Return a step (value, delta, progress, noise_std) -> value in float64, written from the papers.

    Kingma and Ba 2015, algorithm 1; Tang et al. 2023, algorithm 1, with a variance that may change; the rate falls as
    in Loshchilov and Hutter 2017, equation 5, without restarts.
    """
    m, v, t = np.zeros(D), np.zeros(D), 0
    noises: list[float] = []

    def step(
        value: NDArray[np.float64], delta: NDArray[np.float64], progress: float, noise_std: float
    ) -> NDArray[np.float64]:
        nonlocal m, v, t
        t += 1
        gradient = -delta
        least = config.learning_rate * config.final_rate
        rate = least + 0.5 * (config.learning_rate - least) * (1 + np.cos(np.pi * progress))
        if config.name == "sgd":
            m = config.momentum * m + gradient
            return np.asarray(value - rate * m)
        first, second = config.betas
        m = first * m + (1 - first) * gradient
        v = second * v + (1 - second) * gradient**2
        m_hat, v_hat = m / (1 - first**t), v / (1 - second**t)
        if config.noise_corrected:
            noises.append(noise_std)
            weights = second ** np.arange(t - 1, -1, -1)
            variance = np.average(np.square(noises), weights=weights)
            spread = variance * np.sqrt(2 * (weights**2).sum()) / weights.sum()
            floor = max(config.eps**2, spread)
            return np.asarray(value - rate * m_hat / np.sqrt(np.maximum(v_hat - variance, floor)))
        return np.asarray(value - rate * m_hat / (np.sqrt(v_hat) + config.eps))

    return step


def test_sgd_with_learning_rate_one_is_fedavg_bit_for_bit() -> None:
    value = vector(0)
    optimizer = ServerOptimizer(ServerOptimizerConfig(), value)
    for seed in range(1, 5):
        value = value + vector(seed)
        assert optimizer.step(vector(seed)).tobytes() == value.tobytes()


@by_config
def test_every_optimiser_equals_a_hand_written_one(name: str) -> None:
    optimizer, step = ServerOptimizer(CONFIGS[name], vector(0)), reference(CONFIGS[name])
    value = vector(0).astype(np.float64)
    for seed in range(1, 12):
        progress = (seed - 1) / 11
        value = step(value, vector(seed).astype(np.float64), progress, noise(seed))
        stepped = optimizer.step(vector(seed), progress, noise(seed))
        assert stepped == pytest.approx(value, rel=1e-5, abs=1e-6)
        assert optimizer.value.tobytes() == stepped.tobytes()


@by_config
@pytest.mark.parametrize("cut", [0, 1, 4])
def test_a_restored_optimiser_goes_on_bit_for_bit(name: str, cut: int) -> None:
    whole = ServerOptimizer(CONFIGS[name], vector(0))
    resumed = ServerOptimizer(CONFIGS[name], vector(0))
    for seed in range(1, 9):
        if seed == cut + 1:
            saved = {key: array.copy() for key, array in resumed.state().items()}
            resumed = ServerOptimizer(CONFIGS[name], resumed.value)
            resumed.restore(saved)
        stepped = whole.step(vector(seed), seed / 8, noise(seed))
        assert stepped.tobytes() == resumed.step(vector(seed), seed / 8, noise(seed)).tobytes()


def test_a_rate_that_does_not_fall_is_the_same_in_every_round() -> None:
    flat, plain = (ServerOptimizer(CONFIGS["fedavg"], vector(0)) for _ in range(2))
    for seed in range(1, 5):
        assert flat.step(vector(seed), seed / 4).tobytes() == plain.step(vector(seed)).tobytes()


def test_noise_does_not_shorten_the_steps_of_corrected_adam() -> None:
    """Plain Adam divides by signal and noise together; the corrected one by the signal, as if there were no noise."""
    signal, std, rounds = 0.5, 1.0, 400
    source = np.random.default_rng(0)
    moved = {}
    for corrected in (False, True):
        config = ServerOptimizerConfig(
            name="adam", learning_rate=0.01, betas=(0.9, 0.999), eps=0.3, noise_corrected=corrected
        )
        optimizer = ServerOptimizer(config, np.zeros(2_000, np.float32))
        for _ in range(rounds):
            delta = (signal + std * source.normal(size=2_000)).astype(np.float32)
            optimizer.step(delta, noise_std=std)
        moved[corrected] = float(optimizer.value.mean()) / (0.01 * rounds)  # 1: Adam's steps where nothing is noisy
    assert moved[False] == pytest.approx(signal / (np.hypot(signal, std) + 0.3), rel=0.05)
    assert moved[True] == pytest.approx(1, abs=0.15)


def test_corrected_adam_takes_no_giant_steps_where_there_is_no_signal() -> None:
    """Also with an eps that plain Adam is content with: most coordinates lie below the noise in the first rounds."""
    config = ServerOptimizerConfig(name="adam", learning_rate=0.1, betas=(0.9, 0.99), eps=1e-8, noise_corrected=True)
    optimizer, source = ServerOptimizer(config, np.zeros(100_000, np.float32)), np.random.default_rng(0)
    for rounds in range(1, 10):
        delta = (0.05 * source.normal(size=100_000)).astype(np.float32)
        assert np.abs(optimizer.step(delta, noise_std=0.05)).max() < 5 * 0.1 * rounds


def test_adam_remembers_how_many_steps_it_took() -> None:
    optimizer = ServerOptimizer(CONFIGS["adam"], vector(0))
    for seed in range(3):
        optimizer.step(vector(seed))
    again = ServerOptimizer(CONFIGS["adam"], optimizer.value)
    again.restore(optimizer.state())
    assert float(again.state()["step"]) == 3.0


@by_config
def test_a_saved_state_is_not_changed_by_later_steps(name: str) -> None:
    optimizer = ServerOptimizer(CONFIGS[name], vector(0))
    optimizer.step(vector(1))
    value, state = optimizer.value, optimizer.state()
    frozen = {key: array.tobytes() for key, array in state.items()}
    before = value.tobytes()
    optimizer.step(vector(2))
    assert value.tobytes() == before
    assert {key: array.tobytes() for key, array in state.items()} == frozen


def test_the_optimiser_changes_neither_its_start_nor_its_delta() -> None:
    start, delta = vector(0), vector(1)
    optimizer = ServerOptimizer(CONFIGS["momentum"], start)
    optimizer.step(delta)
    optimizer.step(delta)
    assert start.tobytes() == vector(0).tobytes()
    assert delta.tobytes() == vector(1).tobytes()


@by_config
def test_state_is_plain_arrays_that_a_checkpoint_can_hold(name: str) -> None:
    optimizer = ServerOptimizer(CONFIGS[name], vector(0))
    optimizer.step(vector(1))
    assert all(isinstance(array, np.ndarray) and array.dtype == np.float32 for array in optimizer.state().values())


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("exp_avg", (D + 1,)),
        ("exp_avg_sq", (D - 1,)),
        ("exp_avg", (1, D)),
        ("exp_avg", ()),
        ("step", (D,)),
        ("step", (1,)),
    ],
)
def test_a_state_of_another_shape_is_refused(key: str, shape: tuple[int, ...]) -> None:
    optimizer = ServerOptimizer(CONFIGS["adam"], vector(0))
    optimizer.step(vector(1))
    state: dict[str, Any] = {**optimizer.state(), key: np.ones(shape, np.float32)}
    with pytest.raises(CheckpointError, match=key):
        ServerOptimizer(CONFIGS["adam"], vector(0)).restore(state)


@pytest.mark.parametrize("lost", ["step", "exp_avg", "exp_avg_sq"])
def test_a_state_with_a_part_missing_is_refused(lost: str) -> None:
    optimizer = ServerOptimizer(CONFIGS["adam"], vector(0))
    optimizer.step(vector(1))
    state = {key: array for key, array in optimizer.state().items() if key != lost}
    with pytest.raises(CheckpointError):
        ServerOptimizer(CONFIGS["adam"], vector(0)).restore(state)


def test_a_state_of_another_kind_of_optimiser_is_refused() -> None:
    adam = ServerOptimizer(CONFIGS["adam"], vector(0))
    adam.step(vector(1))
    with pytest.raises(CheckpointError):
        ServerOptimizer(CONFIGS["momentum"], vector(0)).restore(adam.state())
