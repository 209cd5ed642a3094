"""What an office permits. Never sent by, or to, head office."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedllm.errors import DataError, PrivacyError
from fedllm.plan import RunPlan

if TYPE_CHECKING:
    from fedllm.privacy.ledger import Period


@dataclass(frozen=True)
class SitePolicy:
    """The limits of one site."""

    epsilon: float  # total budget for the site's records, over all rounds and runs; math.inf without a limit
    delta: float  # the largest that a plan may promise: the owner knows the true number of units, and head office not
    min_units: float  # fewer declared units than this: the site takes no part
    unit: Literal["record", "person"] = "record"  # what this office protects, and every plan must
    allow_unprotected: bool = False  # plans without noise, or with noise that a seed predicts
    run_epsilon: float = math.inf  # the most that one run may cost, at `delta`, all its rounds together
    period: "Period | None" = None  # what may be spent in some days, beside the whole budget
    # The most that a plan may ask for; what a site's memory and time are a function of, and what one sum may hold.
    max_rank: float = math.inf  # of an adapter
    max_length: float = math.inf  # tokens of a record
    max_records_per_person: float = math.inf
    max_local_steps: float = math.inf  # between two charges
    max_sampling_rate: float = math.inf  # share of the units that one step may use
    min_noise_multiplier: float = 0.0  # a plan with less noise in a step is declined, however few its steps
    max_noise_multiplier: float = math.inf  # with more, a round costs next to nothing, and the time it takes is read
    train: tuple[str, ...] = ("AB", "B")  # the parts of an adapter that a plan may train
    modes: tuple[str, ...] = ("local", "distributed", "off")  # of privacy
    colluding_sites: int = 1  # mode distributed: a plan that counts with fewer is declined
    min_sites: int = 1  # a plan whose rounds count with fewer sites is declined
    reply_quantum: float = 0.0  # seconds; what used records leaves at a multiple of it, 0: when it is ready
    record_seconds: float = 0.0  # added to the quantum for each record that a round may use: no round takes longer
    self_check: bool = True  # check the engine before any record is used, also where the plan does not ask for it

    def admit(self, plan: RunPlan) -> None:
        """Raise PrivacyError where the plan asks for what the site does not permit, whatever the budget.

        A plan is compared with what the owner has written down, and with nothing else: a plan that were compared with
        the true number of units could search for it.

        The unit must be the office's own, in both directions. A plan of records protects somebody with k records only
        with k times the loss. A plan of persons does not protect a record at its price either: one record more turns
        its person's vector from one within the clip into another, by up to two clip norms, and one is charged for.
        """
        if not plan.privacy.protects and not self.allow_unprotected:
            raise PrivacyError("the plan is NOT PRIVATE (no noise, or seeded noise), and the policy permits none such")
        if plan.privacy.unit != self.unit:
            raise PrivacyError(
                f"privacy.unit={plan.privacy.unit}; this office protects each {self.unit} (policy.unit), which costs "
                "something else"
            )
        if plan.privacy.delta > self.delta:
            raise PrivacyError(f"privacy.delta={plan.privacy.delta:g} is above the site's delta of {self.delta:g}")

        if plan.privacy.mode not in self.modes:
            raise PrivacyError(f"privacy.mode={plan.privacy.mode}; the policy permits {', '.join(self.modes)}")
        if plan.adapter.train not in self.train:
            raise PrivacyError(f"adapter.train={plan.adapter.train}; the policy permits {', '.join(self.train)}")
        if plan.privacy.mode == "distributed" and plan.privacy.colluding_sites < self.colluding_sites:
            raise PrivacyError(
                f"privacy.colluding_sites={plan.privacy.colluding_sites} is below the policy's {self.colluding_sites}"
            )
        if plan.quorum < self.min_sites:
            raise PrivacyError(f"quorum={plan.quorum} sites is below the policy's min_sites of {self.min_sites}")
        for asked, value, limit, most in (
            ("adapter.rank", plan.adapter.rank, "max_rank", self.max_rank),
            ("model.max_length", plan.model.max_length, "max_length", self.max_length),
            ("privacy.records_per_person", plan.privacy.records_per_person, "max_records_per_person",
             self.max_records_per_person),
            ("training.local_steps", plan.training.local_steps, "max_local_steps", self.max_local_steps),
            ("privacy.sampling_rate", plan.privacy.sampling_rate, "max_sampling_rate", self.max_sampling_rate),
            ("privacy.noise_multiplier", plan.mechanism.noise_multiplier, "max_noise_multiplier",
             self.max_noise_multiplier),
        ):  # fmt: skip
            if value > most:
                raise PrivacyError(f"{asked}={value:g} is above the policy's {limit} of {most:g}")
        noise, least = plan.mechanism.noise_multiplier, self.min_noise_multiplier
        if plan.mechanism.private and noise < least:
            raise PrivacyError(
                f"privacy.noise_multiplier={noise:g} is below the policy's min_noise_multiplier of {least:g}"
            )
        if math.isfinite(self.run_epsilon):
            from fedllm.privacy.accounting import overrun

            over = overrun([plan.mechanism.event(plan.steps)], self.delta, self.run_epsilon, one_plan=True)
            if over is not None:
                raise PrivacyError(f"the run would cost epsilon {over:.4g}, above run_epsilon={self.run_epsilon:g}")

    def check_units(self, units: int) -> None:
        """Raise DataError where the site has declared too few units to take part; never asked of its records."""
        if units < max(1.0, self.min_units):
            raise DataError(f"{units} privacy units, at least {max(1.0, self.min_units):g} needed to take part")

    def quantum(self, plan: RunPlan, size: int) -> float:
        """Return of how many seconds a round's answer leaves at a multiple: of plan, policy and the declared `size`.

        With `record_seconds`, as long as the largest sample would take that such a site can draw (6 deviations above
        the mean, from twice the declared units): then every answer leaves after one quantum.
        """
        most = 2 * size
        mean = plan.privacy.sampling_rate * most
        records = plan.privacy.records_per_person if plan.privacy.unit == "person" else 1
        drawn = min(most, mean + 6 * math.sqrt(mean) + 6) * records
        return self.reply_quantum + self.record_seconds * plan.training.local_steps * drawn
