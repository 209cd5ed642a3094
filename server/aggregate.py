"""From many updates to one; and what no update can be, however a site's records are."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm.config import QuorumConfig, TrainingConfig
from fedllm.errors import ConfigError, MessageError
from fedllm.plan import RunPlan
from fedllm.privacy.distributed_noise import DistributedMechanism

FALSE_ALARM = 1e-9  # probability, of each of three bounds: number of units, length, largest coordinate
TIMES_NOMINAL = 2  # so many times the nominal number of units there may be, all pulling one way
_BLOCK = 1 << 16  # values that are looked at together
_LOG = -math.log(FALSE_ALARM)
_RELATIVE, _ABSOLUTE = 2.0**-11, 2.0**-25  # by which a value is rounded at most on its way: float16
# largest step of Adam with torch's betas, in learning rates: |m| / sqrt(v) by Cauchy and Schwarz, bias corrections too
_ADAM = (1 - 0.9) / math.sqrt((1 - 0.999) * (1 - 0.9**2 / 0.999))


def public_weights(names: Iterable[str], weights: Mapping[str, float]) -> dict[str, float]:
    """Return what each of these sites counts in their mean, in the order of names; one not in `weights` weighs 1."""
    found = {name: weights.get(name, 1.0) for name in sorted(names)}
    total = sum(found.values())
    return {name: weight / total for name, weight in found.items()}


def weighted_mean(updates: Mapping[str, NDArray[np.float32]], weights: Mapping[str, float]) -> NDArray[np.float32]:
    """Return the mean of the sites' updates, float32[d], by `public_weights`.

    FedAvg (McMahan et al. 2017) with public weights instead of record counts. Summed in float64 in the order of the
    sites' names, so that the result does not depend on who answered first.
    """
    shares = public_weights(updates, weights)
    return np.asarray(sum(share * updates[name].astype(np.float64) for name, share in shares.items()), dtype=np.float32)


@dataclass(frozen=True)
class AggregationRule:
    """How the updates of a round become one.

    `combine` takes the sites' updates float32[d] and their public weights, and returns float32[d]. What it reads was
    released, so it costs no budget. `is_mean` says that it is the mean by `public_weights`, whose noise is known.
    """

    combine: Callable[[Mapping[str, NDArray[np.float32]], Mapping[str, float]], NDArray[np.float32]]
    is_mean: bool = False


# by the value of federation.aggregation: add a rule here
AGGREGATION: dict[str, AggregationRule] = {"mean": AggregationRule(weighted_mean, is_mean=True)}


def aggregation_rule(federation: QuorumConfig, training: TrainingConfig) -> AggregationRule:
    """Return the rule that a run is configured with; raises ConfigError if there is none, or it does not fit."""
    name = federation.aggregation
    rule = AGGREGATION.get(name)
    if rule is None:
        raise ConfigError(f"federation.aggregation={name}: no such rule. Choose one of {', '.join(AGGREGATION)}")
    if training.server.noise_corrected and not rule.is_mean:
        raise ConfigError(
            f"training.server.noise_corrected=true: the noise that federation.aggregation={name} leaves is not known. "
            "Set it to false, or federation.aggregation=mean"
        )
    return rule


def median(steps: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the median in each coordinate, float32[d], of the steps of at least one group.

    Where fewer than half of them are poisoned, it lies between two honest ones in every coordinate (Yin et al.,
    "Byzantine-Robust Distributed Learning", ICML 2018). Its noise is that of the groups' mean times sqrt(pi / 2) = 1.25
    at most; and that of the mean of G groups, each with a whole noise, is sqrt(G) times that of one sum of all.
    """
    return np.median(np.stack(steps), axis=0).astype(np.float32)


@dataclass(frozen=True)
class Bound:
    """What honest sites can send: something within `length` and `coordinate`, plus noise, each coordinate its own."""

    length: float  # L2
    coordinate: float  # magnitude of each
    noise_std: float

    def limits(self, d: int) -> tuple[float, float]:
        """Return L2 norm and magnitude that float[d] exceeds with probability FALSE_ALARM each, at most.

        Length: |x|^2 over the noise's variance s^2 is noncentral chi-square with d degrees of freedom and lambda =
        (length / s)^2 at most, which exceeds d + lambda + 2 sqrt((d + 2 lambda) t) + 2 t with probability exp(-t) at
        most (Birge, "An alternative point of view on Lepski's method", 2001, lemma 8.1). Coordinates: a normal tail
        is exp(-z^2 / 2) at most, on both sides and of d of them.
        """
        s = self.noise_std
        of_noise = 2 * s * math.sqrt((d * s**2 + 2 * self.length**2) * _LOG) + 2 * s**2 * _LOG
        return (
            math.sqrt(d * s**2 + self.length**2 + of_noise),
            self.coordinate + s * math.sqrt(2 * (_LOG + math.log(2 * max(d, 1)))),
        )

    def check(self, update: NDArray[np.floating]) -> None:
        """Raise MessageError if float[d] is beyond a limit, also before it was rounded on its way."""
        length, largest = self.limits(update.size)
        norm, most_of_all = _norms(update)
        for what, value, rounded, most in (
            ("length", norm, math.sqrt(update.size) * _ABSOLUTE, length),
            ("largest value", most_of_all, _ABSOLUTE, largest),
        ):
            if not value - rounded <= (1 + _RELATIVE) * most:  # nor is NaN
                raise MessageError(
                    f"an update with {what}={value:.4g}, expected {most:.4g} at most: training under this plan gives "
                    "none. A site is poisoned or faulty, or has too many units for privacy.units_per_site"
                )


def _norms(x: NDArray[np.floating]) -> tuple[float, float]:
    """Return L2 norm and largest magnitude of float[d], NaN if one is; in float64 a block at a time, not a copy."""
    squares, largest = 0.0, 0.0
    for first in range(0, x.size, _BLOCK):
        part = np.abs(x[first : first + _BLOCK].astype(np.float64))
        squares += float(part @ part)
        largest = float(np.max(part, initial=largest))  # NaN stays
    return math.sqrt(squares), largest


def bound_of_update(plan: RunPlan, dimension: int) -> Bound | None:
    """Return what one site's update float[d] is bound by with noise of its own; None if nothing is clipped.

    Plain SGD adds up its steps' noised means; momentum m counts a step's that has n after it (1 - m^(n+1)) / (1 - m)
    times. Adam's steps have a largest size each.
    """
    training, steps = plan.training, plan.training.local_steps
    if plan.privacy.mode != "local":
        return None
    if training.optimizer == "adam":
        most = _ADAM * training.learning_rate * steps
        return Bound(math.sqrt(dimension) * most, most, 0.0)
    m = training.momentum
    weights = (1 - m ** np.arange(1, steps + 1)) / (1 - m)
    one = training.learning_rate * plan.mechanism.clip_norm / plan.expected_units
    length = one * float(weights[-1]) * _most_units(plan.expected_units * steps)
    return Bound(length, length, one * plan.mechanism.noise_multiplier * float(np.linalg.norm(weights)))


def bound_of_score(plan: RunPlan) -> Bound:
    """Return what one site's score float[1 + metrics] is bound by, with noise of its own."""
    units = _most_units(float(plan.privacy.units_per_site or 0))
    return Bound(units, units, plan.score_mechanism.noise_std)


def bound_of_sum(distributed: DistributedMechanism, survivors: int, trimmed: int) -> Bound:
    """Return what the sum of so many sites, in gradient units, is bound by; `trimmed` had excess noise removed."""
    clip = distributed.mechanism.clip_norm
    length = clip * _most_units(distributed.expected_units * survivors)
    coordinate = min(length, survivors * distributed.most)
    return Bound(length, coordinate, distributed.noise_std(survivors, trimmed))


def _most_units(nominal: float) -> float:
    """Return how many units are drawn at most where so many are by nominal sizes, but with probability FALSE_ALARM.

    Bernstein's inequality for a sum of Bernoulli variables (Boucheron, Lugosi and Massart 2013, section 2.8).
    """
    mean = TIMES_NOMINAL * nominal
    return mean + math.sqrt(2 * mean * _LOG) + _LOG / 3
