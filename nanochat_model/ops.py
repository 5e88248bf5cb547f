"""Small fused operations of the forward pass, each in pure PyTorch; on CPUs the C kernels of `native` take their place.

Which of the two runs is decided by the tensors (see native.ops.usable). While torch.compile traces, it is always PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_model.native import ops as native


def rms_norm(x: Tensor) -> Tensor:
    """x / √(mean(x²) + eps) over the last dimension, no gain; computed in float32, eps of float32."""
    return F.rms_norm(x, (x.shape[-1],), eps=native.EPS)


def mix_norm(x: Tensor, y: Tensor, r: Tensor | None = None, l: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """s = r·x + l·y (r and l 0-d, None for 1) and rms_norm(s)."""
    if native.usable(x, y):
        return native.MixNorm.apply(x, y, r, l)
    s = (x if r is None else r * x) + (y if l is None else l * y)
    return s, rms_norm(s)


def relu_square(x: Tensor) -> Tensor:
    """relu(x)²."""
    if native.usable(x):
        return native.ReluSquare.apply(x)
    return F.relu(x).square()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, H, D) by -θ: halves of D are paired; cos, sin broadcast to (B, T, H, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)
