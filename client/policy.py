"""What an office permits. Never sent by, or to, head office."""

from dataclasses import dataclass
from typing import Literal

from fedllm.errors import DataError, PrivacyError
from fedllm.plan import RunPlan


@dataclass(frozen=True)
class SitePolicy:
    """The limits of one site."""

    epsilon: float  # total budget for the site's records, over all rounds and runs; math.inf without a limit
    delta: float
    min_units: float  # fewer units than this: the site takes no part
    unit: Literal["record", "person"] = "record"  # what this office protects, at the least
    allow_unprotected: bool = False  # plans without noise, or with noise that a seed predicts

    def admit(self, plan: RunPlan) -> None:
        """Raise PrivacyError where the plan asks for what the site does not permit, whatever the budget."""
        if not plan.privacy.protects and not self.allow_unprotected:
            raise PrivacyError("the plan is NOT PRIVATE (no noise, or seeded noise), and the policy permits none such")
        if self.unit == "person" and plan.privacy.unit != "person":
            raise PrivacyError("the plan protects single records; this office protects persons (privacy.unit=person)")
        if plan.privacy.delta > self.delta:
            raise PrivacyError(f"privacy.delta={plan.privacy.delta:g} is above the site's delta of {self.delta:g}")

    def check_units(self, units: int) -> None:
        """Raise DataError where the site has too few units to take part."""
        if units < max(1.0, self.min_units):
            raise DataError(f"{units} privacy units, at least {max(1.0, self.min_units):g} needed to take part")
