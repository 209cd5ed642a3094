"""Which privacy units of a site train, and which evaluate: by a keyed hash of the unit, and by nothing else.

**Why evaluation costs training nothing.** Let h be the rule that gives a unit its side: a function of key, share and
the unit alone. Let D and D' be data sets that differ in unit u. The sides of all other units are the same in both, so D
and D' differ in the training set if u trains, or in the evaluation set if u evaluates, and never in both.

Let a site release, in any order, training steps T_1, T_2, ... and scores E_1, E_2, ...; each may depend on all that was
released before. If u trains, then given what was released before, every E_i has the same law for D and D': it reads the
evaluation set alone, which is the same. So it is post-processing, and the releases together are as private as the T_i
composed: the density of a transcript is the product of the conditional densities, those of the E_i cancel, and what is
left is the adaptive composition of the T_i. In the same way with the E_i if u evaluates. So a unit pays for
training or for evaluation: a site keeps an account of both, admits nothing that is above the budget in either, and
the larger of the two is what it has spent on any unit (parallel composition, McSherry 2009, Theorem 4, adaptively).

That holds as long as a unit keeps its side. What was charged before there was a split, and all that is charged after
share, rule or key have changed, counts on both accounts: say a unit evaluated before the change, at a cost of E, and
trains after it, at T. The account of evaluation then holds E and T, and all others before and after no less; so
the larger of the two accounts is no less than what any unit pays, whichever its sides were.

A person at several sites may be on either side at each: `fedllm.audit.evidence` composes every such case, and publishes
the worst.
"""

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Literal

Side = Literal["training", "evaluation"]
SIDES: tuple[Side, ...] = ("training", "evaluation")
KEY = 32  # bytes
SHARE = 0.1  # of the units evaluate, unless their owner says otherwise
_LABEL = b"fedllm evaluation split v1\0"


@dataclass(frozen=True)
class Split:
    """A site's rule. The key is the owner's secret: else whoever writes a record could choose its side."""

    share: float  # of the units that evaluate, 0 to 1/2
    key: bytes = field(repr=False)

    def side(self, unit: bytes) -> Side:
        """Return the side of a privacy unit, by the bytes that tell it from others."""
        drawn = int.from_bytes(hmac.digest(self.key, _LABEL + unit, "sha256")[:8], "big")
        return "evaluation" if drawn < self.share * 2.0**64 else "training"

    @property
    def key_digest(self) -> str:
        """SHA-256 of the key, 64 hexadecimal digits: what the ledger's chain says of it."""
        return hashlib.sha256(_LABEL + self.key).hexdigest()
