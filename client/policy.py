"""What a site permits. Never sent by, or to, the server."""

import math
import re
from typing import Any, Literal

from pydantic import Field, field_validator

from fedllm.errors import DataError, PrivacyError
from fedllm.plan import RunPlan
from fedllm.privacy.elapsed import Period
from fedllm.privacy.split import SHARE, SIDES
from fedllm.protocol.enrolment import fingerprint_digits
from fedllm.values import MAX_STEPS, MOST_CANARIES, Frozen


class SitePolicy(Frozen):
    """The limits of one site, as site.yaml gives them."""

    epsilon: float = Field(gt=0)
    """The most epsilon that these records may ever cost, over all runs."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """The largest delta that a plan may have."""
    unit: Literal["record", "person"] = "record"
    """What is protected. A plan must have the same unit."""
    min_units: int = Field(100, ge=1)
    """The site takes no part if `data.size` is below this."""
    allow_unprotected: bool = False
    """Accept plans that are NOT PRIVATE as well."""
    run_epsilon: float | None = Field(None, gt=0)
    """The most epsilon that one run may cost. Null: no limit of its own."""
    period: Period | None = None
    """The most epsilon that the runs of some days may cost. Null: no limit of its own."""
    # The most that a plan may ask for; what a site's memory and time are a function of, and what one sum may hold.
    max_rank: int = Field(64, ge=1)
    """The largest rank of an adapter."""
    max_length: int = Field(1024, ge=8)
    """The most tokens of a record, `adapter.tokens` before it included."""
    # as many as resources.micro_batch: one pass
    max_records_per_person: int = Field(64, ge=1)
    """The most records of one person that a plan may use."""
    max_local_steps: int = Field(100, ge=1)
    """The most steps in one round."""
    max_sampling_rate: float = Field(0.5, gt=0, le=1)
    """The largest sampling rate. Above 0.5, sampling hides hardly anybody."""
    min_noise_multiplier: float = Field(0.3, ge=0)
    """The least noise in a step. Less than 0.3 costs epsilon 10 or more in a single step."""
    max_noise_multiplier: float = Field(10.0, gt=0)
    """The most noise in a step. With more, rounds cost next to nothing, and their times could be read without end."""
    train: tuple[Literal["AB", "B"], ...] = Field(("AB", "B"), min_length=1)
    """Parts of an adapter that a plan may train. A method without LoRA's matrices trains all it has, and counts as AB.
    """
    quantize: tuple[Literal["none", "int8", "nf4"], ...] = Field(("none", "int8", "nf4"), min_length=1)
    """Values of `model.quantize` that a plan may have. All sites compute with the same base."""
    evaluation_share: float = Field(SHARE, ge=0, le=0.5)
    """Share of the privacy units that evaluate and never train. Fix it once: after a change every round counts on
    both accounts.
    """
    canaries: int = Field(0, ge=0, le=MOST_CANARIES)
    """The most made-up records that a plan may have this site train on, to try an attack on the run."""
    modes: tuple[Literal["local", "distributed", "off"], ...] = Field(("local", "distributed", "off"), min_length=1)
    """Values of `privacy.mode` that a plan may have."""
    min_sites: int = Field(1, ge=1)
    """Decline plans whose rounds count with fewer sites than this."""
    colluding_sites: int = Field(1, ge=0)
    """Mode distributed: decline plans that assume fewer colluding sites than this."""
    reply_quantum: float = Field(5.0, ge=0, le=3600)
    """Seconds. Updates leave at multiples of it, so that they do not tell how long training took."""
    record_seconds: float = Field(0.0, ge=0, le=3600)
    """Seconds added to the quantum for every record that a round may use. Set it to the longest that one record takes
    by itself, and no update leaves earlier than with the largest possible sample.
    """
    peers: dict[str, str] = Field(default_factory=dict)
    """Other sites and the fingerprints of their keys, as each of them told you itself. Without any, the site takes no
    part in mode distributed.
    """

    @field_validator("peers")
    @classmethod
    def _fingerprints(cls, peers: dict[str, str]) -> dict[str, str]:
        digits = {name: fingerprint_digits(heard) for name, heard in peers.items()}
        for name, found in digits.items():
            if not re.fullmatch("[0-9a-f]{40}", found):
                raise ValueError(f"the fingerprint of {name} has 40 hexadecimal digits, found {found!r}")
        if len(set(digits.values())) < len(digits):
            raise ValueError("two sites have one fingerprint; the holder of that key would count as two")
        return peers

    def admit(self, plan: RunPlan) -> None:
        """Raise PrivacyError if the plan asks for what the site does not permit, whatever the budget.

        A plan is compared with what the owner has written down, and with nothing else: a plan that were compared with
        the true number of units could search for it.

        The unit must be the site's own, in both directions. A plan of records protects somebody with k records only
        with k times the loss. A plan of persons does not protect a record at its price either: one record more turns
        its person's vector from one within the clip into another, by up to two clip norms, and one is charged for.
        """
        if not plan.privacy.protects and not self.allow_unprotected:
            raise PrivacyError(
                "the plan is NOT PRIVATE (no noise, or seeded noise), and the policy does not permit that "
                "(allow_unprotected)"
            )
        if plan.privacy.unit != self.unit:
            raise PrivacyError(
                f"privacy.unit={plan.privacy.unit}; this site protects each {self.unit} (policy.unit), which costs "
                "something else"
            )
        if plan.privacy.delta > self.delta:
            raise PrivacyError(f"privacy.delta={plan.privacy.delta:g} is above the site's delta of {self.delta:g}")

        for asked, wanted, permitted in (
            ("privacy.mode", plan.privacy.mode, self.modes),
            ("adapter.train", plan.adapter.train if plan.adapter.has_matrices else "AB", self.train),
            ("model.quantize", plan.model.quantize, self.quantize),
        ):
            if wanted not in permitted:
                raise PrivacyError(f"{asked}={wanted}; the policy permits {', '.join(permitted)}")
        if plan.privacy.mode == "distributed" and plan.privacy.colluding_sites < self.colluding_sites:
            raise PrivacyError(
                f"privacy.colluding_sites={plan.privacy.colluding_sites} is below the policy's {self.colluding_sites}"
            )
        if plan.quorum < self.min_sites:
            raise PrivacyError(f"quorum={plan.quorum} sites is below the policy's min_sites of {self.min_sites}")
        tokens = plan.adapter.virtual_tokens  # a record is longer by them
        length = "model.max_length and adapter.tokens" if tokens else "model.max_length"
        for asked, value, limit, most in (
            ("adapter.rank", plan.adapter.rank if plan.adapter.has_matrices else 0, "max_rank", self.max_rank),
            (length, plan.model.max_length + tokens, "max_length", self.max_length),
            ("privacy.records_per_person", plan.privacy.records_per_person, "max_records_per_person",
             self.max_records_per_person),
            ("audit.canaries", plan.canaries, "canaries", self.canaries),
            ("evaluation.noise_multiplier", plan.score_mechanism.noise_multiplier, "max_noise_multiplier",
             self.max_noise_multiplier),
            ("training.local_steps", plan.training.local_steps, "max_local_steps", self.max_local_steps),
            ("privacy.sampling_rate", plan.privacy.sampling_rate, "max_sampling_rate", self.max_sampling_rate),
            ("privacy.noise_multiplier", plan.mechanism.noise_multiplier, "max_noise_multiplier",
             self.max_noise_multiplier),
        ):  # fmt: skip
            if value > most:
                raise PrivacyError(f"{asked}={value:g} is above the policy's {limit} of {most:g}")
        self._admit_noise(plan)
        self.check_run(plan, both=False)

    def _admit_noise(self, plan: RunPlan) -> None:
        least = self.min_noise_multiplier
        for asked, mechanism in (("privacy", plan.mechanism), ("evaluation", plan.score_mechanism)):
            if mechanism.private and mechanism.noise_multiplier < least:
                raise PrivacyError(
                    f"{asked}.noise_multiplier={mechanism.noise_multiplier:g} is below the policy's "
                    f"min_noise_multiplier of {least:g}"
                )

    def check_run(self, plan: RunPlan, both: bool) -> None:
        """Raise PrivacyError if a run costs more than one may; `both`: the ledger counts all of it on both sides."""
        if self.run_epsilon is None:
            return
        from fedllm.privacy.accounting import overrun

        for side in SIDES:
            over = overrun(plan.cost(plan.exchanges, side, both), self.delta, self.run_epsilon, one_plan=True)
            if over is not None:
                raise PrivacyError(f"the run would cost epsilon {over:.4g}, above run_epsilon={self.run_epsilon:g}")

    def check_units(self, units: int) -> None:
        """Raise DataError if the site has declared too few units to take part; never asked of its records."""
        if units < self.min_units:
            raise DataError(f"{units} privacy units, at least {self.min_units:g} needed to take part")

    def quantum(self, plan: RunPlan, size: int, aside: float = 0.0) -> float:
        """Return of how many seconds a round's answer leaves at a multiple: of plan, policy and the declared `size`.

        With `record_seconds`, as long as the largest sample would take that such a site can draw (6 deviations above
        the mean, from twice the declared units), and `aside` more, which the round takes beside its records: then every
        answer leaves after one quantum.
        """
        most = 2 * size
        records = plan.privacy.records_per_person if plan.privacy.unit == "person" else 1

        def drawn(rate: float) -> float:
            return min(most, rate * most + 6 * math.sqrt(rate * most) + 6) * records

        trained = drawn(plan.privacy.sampling_rate) + plan.canaries
        scored = drawn(self.evaluation_share) if plan.evaluation.every is not None else 0.0
        used = plan.training.local_steps * trained + scored + plan.canaries
        return self.reply_quantum + self.record_seconds * used + aside


def widest(epsilon: float, delta: float, **limits: Any) -> SitePolicy:
    """Return a policy that permits all that a plan may say, but for `limits`.

    `epsilon` may be math.inf, without a budget, which no site.yaml can say.
    """
    wide: dict[str, Any] = {
        "min_units": 1, "allow_unprotected": True, "max_rank": 4096, "max_length": 1_000_000,
        "max_records_per_person": 1_000_000, "max_local_steps": MAX_STEPS, "max_sampling_rate": 1.0,
        "canaries": MOST_CANARIES, "min_noise_multiplier": 0.0, "max_noise_multiplier": 1e6, "colluding_sites": 0,
        "reply_quantum": 0.0,
    }  # fmt: skip
    return SitePolicy(epsilon=1.0, delta=delta, **{**wide, **limits}).model_copy(update={"epsilon": epsilon})
