"""Cross-entropy of soft-capped logits, in chunks of tokens, with its gradient taken in the forward pass.

The (N, V) logits never exist as a whole: a chunk's logits, probabilities and both gradients are made and dropped. Shapes:
N tokens (B·T), C model_dim, V vocabulary (the table is padded past it; padded rows get no gradient).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_model.native import ops as native
from nanochat_model.native import products

SOFTCAP = 15.0  # logits = 15·tanh(raw/15) (nanochat gpt.py)
IGNORE_INDEX = -1
CPU_CHUNK_TOKENS = 1024  # large enough for the products, small enough for the caches
GPU_CHUNK_TOKENS = 8192


def chunk_tokens(device: torch.device) -> int:
    """Tokens a chunk."""
    return CPU_CHUNK_TOKENS if device.type == "cpu" else GPU_CHUNK_TOKENS


def softcapped_logits(x: Tensor, weight: Tensor, vocab_size: int) -> Tensor:
    """Float32 logits (…, V) of features x (…, C) under the table `weight` (padded V, C)."""
    raw = F.linear(x, weight[:vocab_size].to(x.dtype)).float()
    return SOFTCAP * torch.tanh(raw / SOFTCAP)


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, reduction: str = "mean") -> Tensor:
    """Loss in nats of targets (N,) given features x (N, C) and the unembedding table `weight` (padded V, C).

    reduction "mean" (over targets other than -1), "sum", or "none" (N,), where ignored targets are 0. A batch without any
    target gives a mean of 0 with zero gradients (torch would give nan).
    """
    if reduction == "none":
        losses = [
            F.cross_entropy(softcapped_logits(xc, weight, vocab_size), tc, ignore_index=IGNORE_INDEX, reduction="none")
            for xc, tc in zip(*_split(chunk_tokens(x.device), x, targets), strict=True)
        ]
        return torch.cat(losses)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} must be mean, sum or none")
    total = _FusedCrossEntropy.apply(x, weight, targets, vocab_size)
    if reduction == "mean":
        total = total / (targets != IGNORE_INDEX).sum().clamp_min(1)
    return total


def _split(size: int, *tensors: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    return tuple(t.split(size) for t in tensors)


class _FusedCrossEntropy(torch.autograd.Function):
    """Sum of losses. Gradients are unscaled (of the sum) until backward multiplies by what comes from above, so that fp16
    does not underflow on a factor 1/N."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        size = chunk_tokens(x.device)
        rows = weight[:vocab_size]
        needs_grad = x.requires_grad or weight.requires_grad
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x) if needs_grad else None
        grad_table = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        table = _Table(x, rows, needs_grad)
        for start in range(0, x.shape[0], size):
            xc, tc = x[start : start + size], targets[start : start + size]
            loss, grad_logits = _chunk(table.logits(xc), tc, needs_grad)
            total += loss
            if grad_x is not None and grad_table is not None and grad_logits is not None:
                table.backward(grad_logits, xc, grad_x[start : start + size], grad_table[:vocab_size])
        if needs_grad:
            ctx.kept, ctx.weight = (grad_x, grad_table), weight
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_x, grad_table = ctx.kept
        del ctx.kept
        grad_x.mul_(grad)
        if ctx.weight.grad is None or not native.usable(grad_table):
            return grad_x, grad_table.mul_(grad), None, None
        ctx.weight.grad.add_(grad_table, alpha=grad.item())
        return grad_x, None, None, None


class _Table:
    """The unembedding table (V, C) in the dtype of features, for the products of one pass: packed for C or cast for PyTorch."""

    def __init__(self, x: Tensor, rows: Tensor, needs_grad: bool) -> None:
        self.rows = rows
        self.cast: Tensor | None = None
        if native.usable(x) and products.in_c(x, (rows,)):
            self.outputs, _ = products.packed_outputs((rows,))
            if needs_grad:
                self.inputs = products.packed_inputs((rows,))
        else:
            self.cast = rows.to(x.dtype)

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.cast.T if self.cast is not None else products.product(x, self.outputs, len(self.rows))

    def backward(self, g: Tensor, x: Tensor, grad_x: Tensor, grad_table: Tensor) -> None:
        """Gradients of the features (written) and of the table (added), from those of the raw logits."""
        if self.cast is None:
            products.product(g, self.inputs, x.shape[1], out=grad_x)
        else:
            torch.mm(g, self.cast, out=grad_x)
        if native.usable(g):
            products.accumulate_gradient(grad_table, g, x)
        else:
            grad_table += g.T @ x


def _chunk(raw: Tensor, targets: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Summed loss of one chunk and the gradient (n, V), in raw's dtype, of that sum with respect to the raw logits.

    With t = tanh(raw/15) and z = 15·t: d loss / d raw = (softmax(z) - onehot)·(1 - t²). |z| <= 15, so exp needs no maximum
    subtracted.
    """
    if native.usable(raw):
        return native.cross_entropy_rows(raw, targets, SOFTCAP, needs_grad).sum(), raw if needs_grad else None
    valid = targets != IGNORE_INDEX
    index = targets.clamp_min(0).unsqueeze(1)
    t = torch.tanh_(raw.float().mul_(1.0 / SOFTCAP))
    target_logit = t.gather(1, index).squeeze(1) * SOFTCAP
    p = torch.exp(t * SOFTCAP)
    denominator = p.sum(1)
    loss = ((denominator.log() - target_logit) * valid).sum()
    if not needs_grad:
        return loss, None
    p.mul_((valid / denominator).unsqueeze(1))
    p.scatter_add_(1, index, -valid.to(p.dtype).unsqueeze(1))
    p.addcmul_(p * t, t, value=-1.0)
    return loss, p.to(raw.dtype)
