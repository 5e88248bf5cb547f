"""Cross-entropy of soft-capped logits, in chunks of tokens, with its gradient taken in the forward pass.

The (N, V) logits never exist as a whole: a chunk's logits, probabilities and both gradients are made and dropped. Shapes:
N tokens (B·T), C model_dim, V vocabulary (the table is padded past it; padded rows get no gradient).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_model.device import compile_fixed
from nanochat_model.native import ops as native
from nanochat_model.native.cross_entropy import chunked_losses, whole_in_c
from nanochat_model.native.products import accumulate_gradient

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
            F.cross_entropy(softcapped_logits(x[at], weight, vocab_size), targets[at], ignore_index=IGNORE_INDEX, reduction="none")
            for at in _slices(len(x), chunk_tokens(x.device))
        ]
        return torch.cat(losses)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} must be mean, sum or none")
    total = _FusedCrossEntropy.apply(x, weight, targets, vocab_size)
    if reduction == "mean":
        total = total / (targets != IGNORE_INDEX).sum().clamp_min(1)
    return total


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


class _FusedCrossEntropy(torch.autograd.Function):
    """Sum of losses. Gradients are unscaled (of the sum) until backward multiplies by what comes from above, so that fp16
    does not underflow on a factor 1/N."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        rows = weight[:vocab_size]
        grad_table = torch.zeros_like(weight, dtype=torch.float32) if x.requires_grad or weight.requires_grad else None
        in_table = None if grad_table is None else grad_table[:vocab_size]
        if whole_in_c(x, rows):
            losses, grad_x = chunked_losses(x, rows, targets, cap=SOFTCAP, most=CPU_CHUNK_TOKENS, grad_table=in_table)
            total = losses.sum()
        else:
            total, grad_x = _by_chunks(x, rows.to(x.dtype), targets, in_table)
        if grad_table is not None:
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


def _by_chunks(x: Tensor, table: Tensor, targets: Tensor, grad_table: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Sum of losses and its gradient of x; that of the table (V, C; here in x's dtype) is added to grad_table, if there is one."""
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    grad_x = None if grad_table is None else torch.empty_like(x)
    for at in _slices(len(x), chunk_tokens(x.device)):
        raw = x[at] @ table.T
        g: Tensor | None
        if x.is_cuda and grad_table is not None:
            loss, g = _compiled_chunk(raw.shape, raw.dtype)(raw, targets[at])
        else:
            loss, g = _chunk(raw, targets[at], grad_table is not None)
        total += loss
        if grad_x is None or grad_table is None or g is None:
            continue
        torch.mm(g, table, out=grad_x[at])
        if native.usable(g):
            accumulate_gradient(grad_table, g, x[at])
        else:
            grad_table += g.T @ x[at]
    return total, grad_x


def _chunk(raw: Tensor, targets: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Summed loss of one chunk and the gradient (n, V), in raw's dtype, of that sum with respect to the raw logits.

    With t = tanh(raw/15) and z = 15·t: d loss / d raw = (softmax(z) - onehot)·(1 - t²). |z| <= 15, so exp needs no maximum
    subtracted.
    """
    if native.usable(raw):
        losses = torch.empty(len(raw), dtype=torch.float32)
        native.cross_entropy_rows(raw, targets, SOFTCAP, losses, want_grad=needs_grad)
        return losses.sum(), raw if needs_grad else None
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


def whole_chunk(raw: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As `_chunk`, for a compiler: it becomes two passes over the logits (n, V). Eager, its dozen small operations would move some
    20 GB for 8,192 tokens of 32,768 ids: by arithmetic 5 ms on an H200, where all of a d12's step on these tokens takes some 14."""
    valid = (targets != IGNORE_INDEX).unsqueeze(1)
    index = targets.clamp_min(0).unsqueeze(1)
    t = torch.tanh(raw.float() * (1.0 / SOFTCAP))
    p = torch.exp(t * SOFTCAP)
    denominator = p.sum(1, keepdim=True)
    loss = ((denominator.log() - t.gather(1, index) * SOFTCAP) * valid).sum()
    hit = torch.arange(raw.shape[1], device=raw.device) == index  # compared, not scattered, so that it fuses
    return loss, ((p / denominator - hit.to(p.dtype)) * (1.0 - t * t) * valid).to(raw.dtype)


@functools.cache
def _compiled_chunk(shape: torch.Size, dtype: torch.dtype) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return compile_fixed(whole_chunk)
