"""Muon's update of a stack of equal matrices (K, m, n), as nanochat does it: Nesterov momentum, row equilibration, Polar
Express, norm snapping, NorMuon variance reduction, cautious weight decay.

Every function is shape-static and takes scheduled values as floats or 0-d tensors, so that it can be compiled once.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Polar Express, arXiv 2505.16932, for 5 steps (safety factor 2e-2, cushion 2), the constants nanochat uses.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NORM_MARGIN = 1.01  # the spectral norm enters the iteration under 1 with this margin
NORM_FLOOR = 1e-6


def muon_step(
    params: Tensor,
    grads: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor,
    *,
    momentum: float | Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    beta2: float,
    polar_steps: int,
    dtype: torch.dtype,
) -> None:
    """Update `params` (K, m, n) in place from `grads`, and the states momentum_buffer (K, m, n), second_moment (K, m, 1) for
    tall or square matrices, (K, 1, n) for wide ones. `dtype` is that of the orthogonalization (bfloat16 or float32)."""
    momentum_buffer.lerp_(grads, 1.0 - momentum)
    update = torch.lerp(grads, momentum_buffer, momentum)
    update = orthogonalize(equilibrate(update).to(dtype), polar_steps).to(params.dtype)
    update = reduce_variance(update, second_moment, beta2)
    cautious_update(params, update, lr, weight_decay)


def equilibrate(g: Tensor) -> Tensor:
    """Every row at the mean (quadratic) row norm, the whole scaled to a Frobenius norm just under 1 (MuonEq, arXiv 2603.28254)."""
    row_square = g.square().sum(dim=-1, keepdim=True)
    row_norm = row_square.sqrt().clamp_min(NORM_FLOOR)
    factor = row_square.mean(dim=-2, keepdim=True).sqrt() / row_norm
    norm = (row_square * factor.square()).sum(dim=-2, keepdim=True).sqrt()
    return g * (factor / (norm * NORM_MARGIN + NORM_FLOOR))


def orthogonalize(x: Tensor, steps: int) -> Tensor:
    """Nearest semi-orthogonal matrix (U Vᵀ of the SVD), approximately: singular values end near 1. x (K, m, n), norm under 1."""
    tall = x.shape[-2] > x.shape[-1]
    for a, b, c in POLAR_EXPRESS[:steps]:
        gram = x.mT @ x if tall else x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, poly, beta=a) if tall else torch.baddbmm(x, poly, x, beta=a)
    return x


def reduce_variance(u: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """Frobenius norm set to √min(m, n) (Muon+, arXiv 2602.21545), then each row (tall) or column (wide) divided by the root of
    its running second moment, the norm kept (NorMuon, arXiv 2510.05491). Updates `second_moment` in place."""
    m, n = u.shape[-2:]
    dim, size = (-1, n) if m >= n else (-2, m)
    mean_square = u.square().mean(dim=dim, keepdim=True)
    norm = (mean_square.sum(dim=(-2, -1), keepdim=True) * size).sqrt()
    snap = min(m, n) ** 0.5 / norm.clamp_min(NORM_FLOOR)
    mean_square = mean_square * snap.square()
    second_moment.lerp_(mean_square, 1.0 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    new_norm = (mean_square * size * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return u * (snap * scale * (norm * snap / new_norm.clamp_min(1e-10)))


def cautious_update(params: Tensor, update: Tensor, lr: float | Tensor, weight_decay: float | Tensor) -> None:
    """params -= lr·(update + weight_decay·params where update·params >= 0), in place (arXiv 2411.16085)."""
    agree = (update * params) >= 0
    params.sub_(lr * (update + weight_decay * params * agree))
