"""fedllm: federated LoRA fine-tuning of language models under differential privacy."""

import time

__version__ = "0.1.0"
BEGAN = time.monotonic()  # seconds; as near to the start of the process as can be told
