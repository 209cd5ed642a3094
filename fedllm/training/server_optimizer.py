"""The server's optimiser: the averaged update is a descent direction for torch.optim (Reddi et al. 2021)."""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from fedllm.config import ServerOptimizerConfig
from fedllm.errors import CheckpointError


class ServerOptimizer:
    """Steps the global adapter, float32[d]; its state travels through checkpoints as named arrays."""

    def __init__(self, config: ServerOptimizerConfig, start: NDArray[np.float32]) -> None:
        self._config = config
        self._parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.SGD([self._parameter], lr=config.learning_rate, momentum=config.momentum)
            if config.name == "sgd"
            else torch.optim.Adam([self._parameter], lr=config.learning_rate, betas=config.betas, eps=config.eps)
        )

        d = self._parameter.shape
        self._shapes: dict[str, tuple[int, ...]] = {"step": (), "exp_avg": tuple(d), "exp_avg_sq": tuple(d)}
        if config.noise_corrected:
            self._shapes["noise_sq"] = ()
        if config.name == "sgd":
            self._shapes = {"momentum_buffer": tuple(d)} if config.momentum else {}

    @property
    def value(self) -> NDArray[np.float32]:
        """The global adapter, float32[d]; a copy."""
        return self._parameter.detach().numpy().copy()

    def step(self, update: NDArray[np.float32], progress: float = 0.0, noise_std: float = 0.0) -> NDArray[np.float32]:
        """Apply the averaged update float32[d] and return the new adapter.

        `progress` is the fraction of the rounds that are over; the learning rate follows it from 1 to `final_rate`
        along a half cosine (Loshchilov and Hutter 2017). `noise_std` is the deviation of the noise in each coordinate
        of `update`; Adam takes it out of its mean of squares if `noise_corrected` is set.
        """
        fall = (1.0 - self._config.final_rate) * 0.5 * (1.0 - math.cos(math.pi * progress))
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.learning_rate * (1.0 - fall)
        self._parameter.grad = -torch.from_numpy(update.copy())
        before = self._parameter.detach().clone() if self._config.noise_corrected else None
        self._optimizer.step()
        if before is not None:
            self._correct(before, noise_std)
        return self.value

    def _correct(self, before: torch.Tensor, noise_std: float) -> None:
        """Step from `before` again, with the noise taken out of the denominator.

        DP-AdamBC, Tang, Shpilevskiy and Lecuyer 2023 (arXiv 2312.14334), algorithm 1: m / sqrt(max(v - noise, floor)),
        v and the variance of the noise averaged alike, so that noise may differ from round to round. The floor, which
        the paper leaves to be tuned, is eps^2 or one deviation of the noise's mean square, whichever is more: below it
        a coordinate shows no signal, and its step would be as long as the noise happens to be small.
        """
        first, second = self._config.betas
        state = self._optimizer.state[self._parameter]
        steps, rate = int(state["step"]), float(self._optimizer.param_groups[0]["lr"])
        noise_sq = second * state.get("noise_sq", torch.zeros(())) + (1 - second) * noise_std**2
        state["noise_sq"] = noise_sq  # beside Adam's own, and so in checkpoints
        left = second**steps
        averaged = (1 + second) * (1 - left) / ((1 - second) * (1 + left))  # so many squares, weights considered
        floor = max(self._config.eps**2, float(noise_sq) / (1 - left) * math.sqrt(2 / averaged))
        squares = (state["exp_avg_sq"] - noise_sq) / (1 - left)
        mean = state["exp_avg"] / (1 - first**steps)
        with torch.no_grad():
            self._parameter.copy_(before - rate * mean / squares.clamp_min(floor).sqrt())

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Return the optimiser's state as arrays."""
        state = self._optimizer.state.get(self._parameter, {})
        return {name: torch.as_tensor(value).numpy().copy() for name, value in state.items() if value is not None}

    def restore(self, state: dict[str, NDArray[np.float32]]) -> None:
        """Continue from a saved state; raises CheckpointError if it belongs to another adapter."""
        if state and {name: array.shape for name, array in state.items()} != self._shapes:
            found = {name: array.shape for name, array in state.items()}
            raise CheckpointError(f"optimiser state {found} belongs to another adapter or optimiser ({self._shapes})")
        for name, value in state.items():
            self._optimizer.state[self._parameter][name] = torch.from_numpy(value.copy())
