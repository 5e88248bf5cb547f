"""Initial weights: nanochat's distributions (gpt.py, init_weights), drawn so that device, ranks and other tensors do not matter.

Each tensor has its own generator, seeded by the run's seed and the tensor's name, on the CPU: the same config and seed give
the same weights on any device and any number of ranks, and adding a parameter leaves the others as they were.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from nanochat_model.config import GPTConfig

EMBEDDING_STD = 0.8
UNEMBEDDING_STD = 0.001
HIDDEN_SCALE = 0.4  # c_fc against the other input projections
GATE_HIGH = 0.02  # gates start uniform in [0, 0.02]
RESID_FIRST, RESID_LAST = 1.15, 1.05
X0_FIRST, X0_LAST = 0.20, 0.05
BACKOUT = 0.2


def initial_tensor(name: str, shape: torch.Size, config: GPTConfig, seed: int) -> Tensor:
    """Initial value, float32 on the CPU, of the parameter `name` (a state-dict name)."""
    out = torch.empty(shape, dtype=torch.float32)
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1)
    bound = math.sqrt(3.0 / config.model_dim)  # uniform ±√3·σ has standard deviation σ = 1/√C
    if name == "transformer.wte.weight":
        return out.normal_(0.0, EMBEDDING_STD, generator=generator)
    if name == "lm_head.weight":
        return out.normal_(0.0, UNEMBEDDING_STD, generator=generator)
    if name.endswith("c_proj.weight") or name == "smear_lambda":
        return out.zero_()
    if name.endswith("gate.weight"):
        return out.uniform_(0.0, GATE_HIGH, generator=generator)
    if name.endswith("c_fc.weight"):
        return out.uniform_(-HIDDEN_SCALE * bound, HIDDEN_SCALE * bound, generator=generator)
    if name.endswith((".c_q.weight", ".c_k.weight", ".c_v.weight")) or name.startswith("value_embeds."):
        return out.uniform_(-bound, bound, generator=generator)
    if name == "resid_lambdas":
        return out.copy_(over_depth(RESID_FIRST, RESID_LAST, config.depth))
    if name == "x0_lambdas":
        return out.copy_(over_depth(X0_FIRST, X0_LAST, config.depth))
    if name == "backout_lambda":
        return out.fill_(BACKOUT)
    raise AssertionError(f"no initialization for parameter {name}")


def over_depth(first: float, last: float, depth: int) -> Tensor:
    """Linear from the first layer to the last; a model of one layer takes `first`."""
    return torch.tensor([first + (last - first) * i / max(depth - 1, 1) for i in range(depth)], dtype=torch.float32)
