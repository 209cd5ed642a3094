"""What a site is asked: the RunPlan that the server sends to every site, with the rules on quorums and groups.

Everything here is public; fedllm/config.py has what a user configures, of which a plan is made.

**Every number of a plan has a bound on both sides, and every text and list a greatest length**: a plan comes from
whoever runs the server, and a number at the edge of the floats would switch off what is computed with it. Within the
bounds, no product or quotient of a plan's numbers that training takes leaves the normal float32 (1e-38 to 3e38): the
noise of a step, learning_rate * clip_norm * noise_multiplier / (sampling_rate * units_per_site), lies between 1e-26 and
1e24, and a million steps of it with momentum below 1e37. The texts of a plan fit the header of a message.
"""

import math
from collections.abc import Collection

from pydantic import Field, model_validator

from fedllm.canonical import digest_of
from fedllm.config import (
    AdapterConfig,
    EvaluationConfig,
    ModelConfig,
    PrivacyConfig,
    TrainingConfig,
    check_groups,
    check_scores,
)
from fedllm.errors import ConfigError, PrivacyError
from fedllm.privacy.accounting import AccountingEvent
from fedllm.privacy.distributed_noise import DistributedMechanism
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.metrics import metric_names
from fedllm.privacy.split import Side
from fedllm.values import MAX_HOLDERS, MAX_SITES, MOST_CANARIES, Frozen, Names, Printable, Seed


class RunPlan(Frozen):
    """Everything that the server asks of a site, for a whole run; frozen, hashed, public."""

    run: Printable = Field(min_length=1, max_length=500)  # unique
    seed: Seed  # public: initial adapter values
    sites: int = Field(1, ge=1, le=MAX_SITES)  # that may take part; with groups, in the largest of them
    quorum: int = Field(
        1, ge=1, le=MAX_SITES
    )  # promised to the sites: a round with answers of fewer sites, with groups of one, does not count
    # names; every site is in one, for the whole run, and sums with the others of its group alone; none: all with all
    groups: tuple[Names, ...] = Field((), max_length=MAX_HOLDERS)
    poisoned_sites: int = Field(0, ge=0, le=MAX_HOLDERS)  # with groups: so many may send what they like
    model: ModelConfig
    adapter: AdapterConfig
    privacy: PrivacyConfig
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    canaries: int = Field(0, ge=0, le=MOST_CANARIES)  # of each site
    guesses: int = Field(0, ge=0, le=MOST_CANARIES)  # of each site and attack: which of its canaries are in

    @model_validator(mode="after")
    def _validate(self) -> "RunPlan":
        if self.privacy.units_per_site is None:
            raise ValueError("privacy.units_per_site: a plan states the nominal number of units a site")
        if self.privacy.mode != "off" and self.privacy.noise_multiplier is None:
            raise ValueError("privacy.noise_multiplier: a plan states the calibrated noise")
        if self.privacy.mode != "off" and self.evaluation.every and self.evaluation.noise_multiplier is None:
            raise ValueError("evaluation.noise_multiplier: a plan states the calibrated noise")
        if not bool(self.canaries) == bool(self.guesses) or self.guesses > self.canaries:
            raise ValueError(f"guesses={self.guesses} of canaries={self.canaries}: expected one at most for each")
        check_scores(self.training, self.evaluation)
        check_groups(len(self.groups), self.poisoned_sites, self.privacy, self.training)
        if self.groups:
            self._check_members()
        if self.privacy.mode == "distributed":
            check_distributed(self.privacy, self.training, self.sites, self.quorum)
            try:
                _, scores = self.distributed, self.distributed_scores
                if scores is not None:  # else a site finds out when it has paid
                    scores.clip_before_rounding(1 + len(metric_names(len(self.model.labels))))
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self

    def _check_members(self) -> None:
        sizes, names = [len(group) for group in self.groups], {name for group in self.groups for name in group}
        if len(names) != sum(sizes) or not len(names) <= MAX_SITES:
            raise ValueError(f"groups: a site is named twice, or there are more than {MAX_SITES}")
        if not self.quorum <= min(sizes) <= max(sizes) == self.sites:
            raise ValueError(
                f"federation.groups={len(sizes)}: {len(names)} sites make groups of {min(sizes)} to {max(sizes)}, and "
                f"each needs its quorum of {self.quorum}. Choose fewer groups, or admit more sites"
            )

    def cohort(self, site: str) -> Names | None:
        """Return who is in one sum with a site: its group, or None, all; raises PrivacyError if it is in none."""
        if not self.groups:
            return None
        for group in self.groups:
            if site in group:
                return group
        raise PrivacyError(f"the plan has groups, and site={site!r} is in none of them")

    def enough(self, sites: Collection[str], quorum: int) -> bool:
        """Whether these sites are enough for a round: `quorum` of them; with groups, of `least_groups` groups."""
        if not self.groups:
            return len(sites) >= quorum
        return sum(len(set(group) & set(sites)) >= quorum for group in self.groups) >= self.least_groups

    def outvotes(self, used: int, refused: int) -> bool:
        """Whether so many groups, without so many in which a poisoned site gave itself away, outvote what is left."""
        return refused <= self.poisoned_sites and used + refused >= self.least_groups

    @property
    def least_groups(self) -> int:
        """Groups without whose sums a round does not count; 1 if there are none."""
        return 2 * self.poisoned_sites + 1

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form."""
        return digest_of(self.model_dump(mode="json"))

    @property
    def steps(self) -> int:
        """DP steps of a whole run at one site."""
        return self.training.rounds * self.training.local_steps

    @property
    def mechanism(self) -> Mechanism:
        """The one object that clips, samples, adds noise and is charged for."""
        noise = self.privacy.noise_multiplier if self.privacy.mode != "off" else 0.0
        return Mechanism(self.privacy.clip_norm, noise or 0.0, self.privacy.sampling_rate, self.privacy.clipping)

    @property
    def closes(self) -> bool:
        """Whether there is one exchange more after the last round: for the last score, and what canaries found."""
        return self.evaluation.every is not None or self.canaries > 0

    @property
    def exchanges(self) -> int:
        """Exchanges of a whole run in which sites answer with what they compute: its rounds, and the closing one."""
        return self.training.rounds + self.closes

    @property
    def masked_exchanges(self) -> int:
        """With noise in shares: so many of the exchanges have a sum. The closing one has none without a score."""
        return self.training.rounds + (self.evaluation.every is not None)

    def event(self, exchange: int) -> AccountingEvent:
        """Return what an exchange, from 1, costs whoever trains: nothing in the closing one."""
        return self.mechanism.event(self.training.local_steps if exchange <= self.training.rounds else 0)

    def score_noise(self, exchange: int) -> float | None:
        """Return the noise multiplier of the score in an exchange, from 1, or None if there is none.

        Exchange r scores the adapter that round r starts from, which is that of round r-1.
        """
        every, scored = self.evaluation.every, exchange - 1
        if every is None or (scored % every and scored != self.training.rounds):
            return None
        return self.score_mechanism.noise_multiplier

    def scores_in(self, exchanges: int) -> int:
        """Return how many of the first exchanges have a score."""
        return self.evaluation.scores_in(exchanges, self.training.rounds)

    @property
    def scores(self) -> int:
        """Scores of a whole run."""
        return self.scores_in(self.exchanges)

    @property
    def score_epsilon(self) -> float:
        """Target for all scores of a run together."""
        return self.evaluation.epsilon or self.privacy.epsilon

    def cost(self, exchanges: int, side: Side, both: bool = False) -> list[AccountingEvent]:
        """Return what the first exchanges cost the units of one side; `both`: a ledger counts all on both sides."""
        steps = min(exchanges, self.training.rounds) * self.training.local_steps
        training = [self.mechanism.event(steps)] if steps else []
        scores = self.scores_in(exchanges)
        evaluation = [self.score_mechanism.event(scores)] if scores else []
        return [*training, *evaluation] if both else training if side == "training" else evaluation

    def most(self, rounds: int) -> list[AccountingEvent]:
        """Return the most that so many of the rounds, one after the other, and the closing exchange cost a unit.

        Whichever rounds they are: the last ones of a run may have more scores than as many first ones.
        """
        rounds, every = min(rounds, self.training.rounds), self.evaluation.every
        found = [self.mechanism.event(rounds * self.training.local_steps)]
        if every is not None:
            found.append(self.score_mechanism.event(min(self.scores, -(-rounds // every) + 1)))
        return found

    @property
    def score_mechanism(self) -> Mechanism:
        """The mechanism of one score: every evaluation unit counts, with a vector of metrics of length 1 at most."""
        noise = self.evaluation.noise_multiplier if self.privacy.mode != "off" else 0.0
        return Mechanism(1.0, noise or 0.0, 1.0)

    @property
    def distributed_scores(self) -> DistributedMechanism | None:
        """The mechanism of scores in shares, in mode distributed: with room for all units of a site."""
        if self.privacy.mode != "distributed" or self.evaluation.every is None:
            return None
        units = float(self.privacy.units_per_site or 0)
        return DistributedMechanism(self.score_mechanism, self.sites, self.quorum, self.privacy.colluding_sites, units)

    @property
    def expected_units(self) -> float:
        """Public divisor of every noisy sum: q times the nominal number of units, never the actual batch."""
        return self.privacy.sampling_rate * (self.privacy.units_per_site or 0)

    @property
    def distributed(self) -> DistributedMechanism | None:
        """The mechanism in shares, in mode distributed; raises ConfigError if 32 bits are too few for it."""
        if self.privacy.mode != "distributed":
            return None
        colluding = self.privacy.colluding_sites
        return DistributedMechanism(self.mechanism, self.sites, self.quorum, colluding, self.expected_units)

    def noise_std(self, weights: Collection[float], trimmed: int) -> float:
        """Return the deviation of the noise in each coordinate of a round's averaged update.

        `weights` are those of the sites that answered, and sum to 1. Every local step of plain SGD adds its own
        noise; noise in shares is decoded from their sum, and its sites all weigh the same; from `trimmed` of them
        excess noise was removed.
        """
        one = self.training.learning_rate * self.privacy.clip_norm / self.expected_units
        if (distributed := self.distributed) is not None:
            return one * distributed.noise_multiplier(len(weights), trimmed, known=0) / len(weights)
        return (
            one
            * self.mechanism.noise_multiplier
            * math.sqrt(self.training.local_steps * sum(weight**2 for weight in weights))
        )


def least_quorum(sites: int, colluding: int) -> int:
    """Return the smallest t with 2 t > sites + colluding and t - colluding >= 2; it may exceed the sites."""
    return max((sites + colluding) // 2 + 1, colluding + 2)


def check_distributed(privacy: PrivacyConfig, training: TrainingConfig, sites: int, quorum: int) -> None:
    """Raise ValueError if noise in shares cannot protect what a plan asks for.

    `quorum` of the sites are in every sum that the server can read, and `privacy.colluding_sites` of those may have
    told it their noise. The bound on the quorum is that of secure aggregation (fedllm.secagg).
    """
    if training.local_steps != 1 or training.optimizer != "sgd" or training.momentum:
        raise ValueError(
            "privacy.mode=distributed sums gradients, once a round: it needs training.local_steps=1, "
            "training.optimizer=sgd and training.momentum=0. Momentum and Adam are the server's (training.server)"
        )
    least = least_quorum(sites, privacy.colluding_sites)
    if sites > MAX_HOLDERS:
        raise ValueError(f"privacy.mode=distributed takes {MAX_HOLDERS} sites at most, found {sites}")
    if least > sites:
        raise ValueError(
            f"privacy.mode=distributed: {sites} sites are too few where {privacy.colluding_sites} of them may collude "
            f"with the server (privacy.colluding_sites). It takes at least {privacy.colluding_sites + 2}. With "
            "fewer, set privacy.mode=local: every site then adds noise enough for itself"
        )
    if not least <= quorum <= sites:
        raise ValueError(
            f"federation.quorum={quorum}: privacy.mode=distributed with {sites} sites, of which "
            f"{privacy.colluding_sites} may collude with the server, needs a quorum of {least} to {sites}"
        )


def default_quorum(privacy: PrivacyConfig, sites: int) -> int:
    """Return the quorum if none is configured: half of the sites; with noise in shares, two thirds and enough."""
    if privacy.mode != "distributed":
        return max(min(2, sites), sites // 2)
    return min(sites, max(least_quorum(sites, privacy.colluding_sites), -(-2 * sites // 3)))
