"""What an audit finds: one frozen value, written as audit.json. It holds no record and no count of records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from fedllm.privacy.accounting import AccountingEvent
from fedllm.values import Frozen

Status = Literal["holds", "fails", "unverified"]
Verdict = Literal["within", "exceeded", "unverifiable"]
# What is checked, in the order in which a contradiction is reported. `Finding.code` is one of these.
Code = Literal[
    "record_chain",  # the server's record is unbroken, and signed by one that is trusted
    "plan",  # the plan in the record, plan.json and every digest of it agree
    "rounds",  # rounds follow one another, and each starts from the adapter that the one before left
    "statements",  # every statement is signed by its site, and is about this run, plan and round
    "countersigned",  # sites signed whom each round asked, and where the record stood: the record still says so
    "ledger_chain",  # every site's ledger is unbroken, and signed by that site
    "ledger_complete",  # the ledger holds every entry that the site has signed a statement on, and what follows it
    "charged_before_release",  # every answer was paid for, as planned, before it left
    "answers_recorded",  # whatever a ledger says was released, the record has a statement on
    "epsilon",  # every stated epsilon is what the ledger's events cost
    "accountants",  # RDP is not below PLD; the cross-checks are near it
    "protected",  # noise is added, and nobody can predict it
    "plan_target",  # the run cost each site at most what the plan announced
    "budget",  # everything charged is within what the site permits
    "metrics",  # the server's measurements are about the rounds in the record
    "keys",  # the keys were compared with ones that the reader holds
    "site_software",  # sites really draw samples and noise as the plan says
    "unit",  # records are grouped by privacy unit as the plan says
    "peers",  # sites aggregate with sites whose keys they have compared themselves
    "one_site_a_person",  # nobody's records are at several sites
    "empirical",  # an attack was tried on the run, and what it proves does not contradict the claim
]
# If one of these fails, nothing else in the evidence can be relied on.
INTEGRITY: frozenset[Code] = frozenset(
    {"record_chain", "plan", "rounds", "statements", "countersigned", "ledger_chain", "ledger_complete",
     "charged_before_release", "answers_recorded", "epsilon", "accountants"}
)  # fmt: skip


class Finding(Frozen):
    """One thing that the audit looked at."""

    code: Code
    status: Status
    evidence: tuple[str, ...]  # where to look, and what is there: contradictions, gaps, or what agreed
    more: int = Field(0, ge=0)  # pieces of evidence that are left out for brevity


class Run(Frozen):
    """What was run, and by whom."""

    name: str  # the plan's id of the run
    plan_digest: str
    head_office: str  # fingerprint of the identity that signed last
    began: str  # UTC, by the server's clock
    ended: str | None  # None if the record has no end
    stopped: str  # why it ended early, or ""
    rounds: int
    rounds_planned: int
    entries: int  # of the record
    head: str  # digest of the record's last entry
    versions: dict[str, str]  # of the software at the server


class Claim(Frozen):
    """What the plan promises to one privacy unit of one site."""

    mode: Literal["local", "distributed", "off"]
    unit: Literal["record", "person"]
    records_per_person: int
    epsilon: float
    delta: float
    sampling_rate: float
    clipping: Literal["flat", "automatic"]
    clip_norm: float
    noise_multiplier: float  # mode distributed: of a sum of the fewest sites, without the shares of those that collude
    sites: int  # that may take part; with groups, in the largest of them
    quorum: int  # fewest in a sum that can be read
    colluding_sites: int  # mode distributed: so many may tell the server their share of the noise
    groups: int = 0  # mode distributed: each with a sum and noise of its own, 0 if all sites have one
    poisoned_sites: int = 0  # with groups: so many may send what they like
    local_steps: int
    units_per_site: int  # nominal, public
    seeded: bool
    base_model: str
    task: str
    scores: int = 0  # of adapters, on records of units that do not train
    score_epsilon: float = 0.0  # target for all of them together
    score_noise: float = 0.0  # of one, where a unit counts 1
    canaries: int = 0  # of each site
    adapter_method: str
    adapter_rank: int  # 0: the method has none
    wire: str


class Account(Frozen):
    """One of a site's accounts. Epsilons at the plan's delta; None is one without bound."""

    name: str
    declared: bool  # its owner's signed word: nobody in these records is in others of the site
    spent: float | None  # PLD, of all that was released, in every run
    charged: float | None  # PLD, of that and what is reserved and may still be released
    charged_rdp: float | None
    training: float | None  # PLD, of what was charged for units that train; the larger of the two is `charged`
    evaluation: float | None  # PLD, for units that evaluate
    counted: float | None  # what the site holds against its budget, at the budget's delta
    decides: Literal["PLD", "RDP"]  # by which accountant: PLD for one plan, RDP of fixed orders for several


class Site(Frozen):
    """One site, the figures those of its costliest account. Epsilons at the plan's delta; None is one without bound."""

    name: str
    fingerprint: str  # "" if the site never signed
    answered: int
    declined: int
    failed: int
    reasons: tuple[str, ...]  # of refusals
    ledger: Literal["verified", "broken", "missing"]
    entries: int
    head: str
    spent: float | None  # PLD, of all that was released of these records, in every run
    charged: float | None  # PLD, of that and what is reserved and may still be released
    charged_rdp: float | None
    run: float | None  # PLD, of this run alone
    budget: float | None  # of each account; None: unlimited, or not known
    budget_known: bool  # whether the site's ledger states one
    left: float | None  # of the budget, less what is counted
    accounts: tuple[Account, ...]  # none if there is no ledger


class Point(Frozen):
    """A site's spending after one of its charges."""

    site: str
    at: str  # UTC, to the minute
    run: str
    round: int
    charge: int  # 1, 2, ... of this site
    epsilon: float | None  # PLD


@dataclass(frozen=True)
class Estimate:
    """What a cross-check says about epsilon, or why it says nothing."""

    epsilon: float | None  # to be compared with PLD: within 0.01 of it
    upper: float | None = None  # the bound that its authors publish
    reason: str = ""  # why there is neither


@dataclass(frozen=True)
class CrossCheck:
    """An accountant by other people. `estimate` takes events and delta; fedllm.audit.accountants lists them by name."""

    by: str  # whose it is: a name, the same in every language
    estimate: Callable[[Sequence[AccountingEvent], float], Estimate]


class Accountants(Frozen):
    """One sequence of events, the costliest site's, by independent methods."""

    site: str
    events: tuple[tuple[float, float, int], ...]  # sampling rate, noise multiplier, steps
    delta: float
    grid: float | None = None  # of the privacy loss; None if there is no PLD
    pld: float | None
    rdp: float | None
    prv: float | None  # Opacus; None if it was not at hand
    # further cross-checks, by name; the key is left out if there are none
    cross_checks: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9_]{0,19}$")], float | None] = Field(
        {}, exclude_if=lambda value: not value
    )
    planned: float | None  # PLD of the whole plan
    several_sites: tuple[tuple[int, float | None], ...]  # a person in k sites, this run: (k, PLD)
    coalitions: tuple[tuple[int, float | None], ...]  # mode distributed: the server with k sites, more than named: PLD
    share_alone: float | None  # mode distributed: PLD of what always stays of one share, where the masks are broken

    @property
    def estimates(self) -> dict[str, float | None]:
        """Every cross-check's estimate, by name; None if it was not computed."""
        return {**self.cross_checks, "prv": self.prv}


class Risk(Frozen):
    """What an attacker who sees everything that was released can do, at most (the costliest site's records)."""

    advantage: float = Field(ge=0, le=1)  # how much likelier a right "was in the data" is than a wrong one
    tpr_at_1_percent: float = Field(ge=0, le=1)
    curve: tuple[tuple[float, float], ...]  # false positive rate, largest true positive rate


class Utility(Frozen):
    """The server's measurement on the public held-out set after a round; round 0 is the base model."""

    round: int
    loss: float | None
    perplexity: float | None
    accuracy: float | None


class SiteScore(Frozen):
    """What the sites' evaluation units say of the adapter after a round, as it was released under noise."""

    round: int
    metrics: dict[str, tuple[float, float, float]]  # estimate, and the ends of a 95 % interval; `units` counts them


class Attack(Frozen):
    """What one of the attacks on the run came to."""

    right: int  # canaries rightly taken for "in"
    lower: float  # epsilon that is proved; all smaller ones are refuted with confidence 97.5 %


class Empirical(Frozen):
    """The attack that was tried on the run: the sites' commitments are opened, and everything is counted again."""

    sites: int  # that opened what they had committed to
    canaries: int
    guesses: int  # of each attack
    black: Attack  # by the loss under the final adapter
    white: Attack  # by every round's adapter
    ceiling: float  # what all right guesses would have proved
    claim: float | None  # epsilon of the plan, which it is held against; None: there is none


class Audit(Frozen):
    """The whole audit."""

    format: Literal[3] = 3
    made: str = Field(pattern=r"^([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2})?$")  # UTC, by its signer's clock
    program: str  # fedllm's version
    signer: str  # fingerprint of who signs the report; "" for nobody
    verdict: Verdict
    run: Run
    claim: Claim
    sites: tuple[Site, ...]
    findings: tuple[Finding, ...]
    accountants: Accountants
    risk: Risk
    timeline: tuple[Point, ...]
    utility: tuple[Utility, ...]
    scores: tuple[SiteScore, ...]
    kept: int | None  # the round of the adapter that the run ended with, if it was not the last
    attack: Empirical | None  # None: no attack was planned, or nobody opened anything

    def finding(self, code: Code) -> Finding:
        """Return one finding."""
        return next(finding for finding in self.findings if finding.code == code)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of audit.json (draft 2020-12), as published in audit.schema.json."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fedllm audit",
        **{key: value for key, value in Audit.model_json_schema(mode="serialization").items() if key != "title"},
    }
