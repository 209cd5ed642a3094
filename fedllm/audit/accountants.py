"""The cross-checks: accountants by other people, whose epsilon is compared with the PLD.

To add one, write it in a module of its own, as fedllm.audit.prv is, and name it here. Its name is its key in audit.json
and its row in the report. Nothing that is verified needs one.
"""

from fedllm.audit.model import CrossCheck
from fedllm.audit.prv import prv

CROSS_CHECKS: dict[str, CrossCheck] = {"prv": CrossCheck("Opacus", prv)}
