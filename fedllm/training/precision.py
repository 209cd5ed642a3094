"""How far apart two honest computations of one thing may be, as a fraction of its length (L2), by type of the base."""

import torch

# bfloat16 has 8 bits of mantissa, and every layer rounds
SAME_SUM = {torch.float32: 1e-5, torch.bfloat16: 0.1}  # clipped sums of gradients
SAME_LOGITS = {torch.float32: 1e-5, torch.bfloat16: 0.05}  # logits of one adapter in two models
SAME_COMPILED = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # gradients of compiled blocks, which add in other orders
