"""fedllm: federated LoRA fine-tuning of language models under differential privacy."""

import time
from typing import TYPE_CHECKING, Any

from fedllm.errors import FedllmError

if TYPE_CHECKING:
    from fedllm.api import Noise, PrivacyCost, Run, calibrate, epsilon, load_run, simulate

__version__ = "0.1.0"
__all__ = ["FedllmError", "Noise", "PrivacyCost", "Run", "calibrate", "epsilon", "load_run", "simulate"]
BEGAN = time.monotonic()  # seconds; as near to the start of the process as can be told


def __getattr__(name: str) -> Any:
    """Import what a program asks for when it does, so that `import fedllm` takes no time."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedllm import api

    return getattr(api, name)
