"""Causal attention with a left window and grouped keys: one meaning, several kernels.

B rows, T positions, H query heads, K key/value heads (head h reads kv head h // (H/K)), D head_dim. A window w lets a position
see itself and w positions to its left. The softmax scale is 1/√D. Every kernel takes q (B, T, H, D), k and v (B, T, K, D) and
returns (B, T, H, D). On a GPU no kernel here builds a mask of T × T. Which kernel runs is chosen in attention_backends.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 128  # queries a block of the CPU kernel; a block computes only the keys it can see
SAVE_WEIGHTS_MAX = 1024  # up to this many positions the exponentials are kept for backward, beyond it they are made again


def blocked(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The CPU kernel: matmuls over blocks of queries. Needs normalized queries and keys (see BlockedAttention)."""
    return BlockedAttention.apply(q, k, v, window)


def sdpa(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """PyTorch's fused attention. It has no window argument: a window shorter than the row is cut into blocks of queries, each
    with the keys it can see and a mask of that block's size."""
    T = q.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    if window >= T - 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)
    size = max(window, QUERY_BLOCK)
    out = []
    for start in range(0, T, size):
        stop, first = min(start + size, T), max(0, start - window)
        distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        visible = (distance >= 0) & (distance <= window)
        part = (q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop])
        out.append(F.scaled_dot_product_attention(*part, attn_mask=visible, enable_gqa=gqa))
    return torch.cat(out, dim=2).transpose(1, 2)


def cached(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int) -> Tensor:
    """A few new queries (B, T, H, D) at `positions` (B, T) against a cache of keys and values (B, S, K, D) whose entry j is
    position j; later entries are hidden. The mask has T × S entries, with T the number of new tokens."""
    distance = positions.unsqueeze(-1) - torch.arange(k.shape[1], device=q.device)  # (B, T, S)
    visible = ((distance >= 0) & (distance <= window)).unsqueeze(1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


class BlockedAttention(torch.autograd.Function):
    """Batched matmuls over blocks of queries, with the softmax in place.

    No maximum is subtracted before exp: queries and keys are normalized (|q| = |k| = 1.2·√D), so |logit| <= 1.44·√D.
    With E = exp(logits), s its row sums and O = E V / s: dV = Eᵀ (dO/s), dlogits = E ∘ ((dO/s) Vᵀ - rowsum(dO ∘ O)/s).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        B, T, H, D = q.shape
        K = k.shape[2]
        ctx.shape = (B, T, H, K, D)
        ctx.window = window
        qs = (q * (1.0 / math.sqrt(D))).view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4).contiguous()  # (B, K, G, T, D)
        ks = k.transpose(1, 2).contiguous().view(B * K, T, D)
        vs = v.transpose(1, 2).contiguous().view(B * K, T, D)
        out = torch.empty_like(qs)
        sums = torch.empty(qs.shape[:-1], dtype=torch.float32, device=q.device)
        kept: list[Tensor] = []
        for start, stop, first in blocks(T, window):
            e = _exp_logits(qs[:, :, :, start:stop], ks, start, stop, first, window)
            total = e.sum(-1, dtype=torch.float32).view(B, K, H // K, stop - start)
            sums[..., start:stop] = total
            o = torch.bmm(e, vs[:, first:stop]).view(B, K, H // K, stop - start, D)
            out[:, :, :, start:stop] = o / total.unsqueeze(-1)
            if T <= SAVE_WEIGHTS_MAX:
                kept.append(e)
        ctx.save_for_backward(qs, ks, vs, out, sums, *kept)
        return out.permute(0, 3, 1, 2, 4).reshape(B, T, H, D)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        B, T, H, K, D = ctx.shape
        qs, ks, vs, out, sums, *kept = ctx.saved_tensors
        G = H // K
        go = grad.view(B, T, K, G, D).permute(0, 2, 3, 1, 4)
        delta = (go * out).sum(-1, dtype=torch.float32) / sums
        go = (go / sums.unsqueeze(-1)).to(qs.dtype)
        gq = torch.empty_like(qs)
        gk = torch.zeros(ks.shape, dtype=torch.float32, device=ks.device)
        gv = torch.zeros_like(gk)
        for i, (start, stop, first) in enumerate(blocks(T, ctx.window)):
            e = kept[i] if kept else _exp_logits(qs[:, :, :, start:stop], ks, start, stop, first, ctx.window)
            rows = G * (stop - start)
            go_block = go[:, :, :, start:stop].reshape(B * K, rows, D)
            q_block = qs[:, :, :, start:stop].reshape(B * K, rows, D)
            gv[:, first:stop] += torch.bmm(e.mT, go_block)
            ds = torch.bmm(go_block, vs[:, first:stop].mT)
            ds = ds.sub_(delta[..., start:stop].reshape(B * K, rows, 1)).mul_(e)
            gq[:, :, :, start:stop] = torch.bmm(ds, ks[:, first:stop]).view(B, K, G, stop - start, D)
            gk[:, first:stop] += torch.bmm(ds.mT, q_block)
        grad_q = (gq.permute(0, 3, 1, 2, 4) * (1.0 / math.sqrt(D))).reshape(B, T, H, D)
        grad_k, grad_v = (g.view(B, K, T, D).transpose(1, 2).to(ks.dtype) for g in (gk, gv))
        return grad_q, grad_k, grad_v, None


def blocks(T: int, window: int) -> list[tuple[int, int, int]]:
    """(start, stop, first): queries start..stop-1 see keys first..stop-1 at most."""
    return [(s, min(s + QUERY_BLOCK, T), max(0, s - window)) for s in range(0, T, QUERY_BLOCK)]


def _exp_logits(q: Tensor, k: Tensor, start: int, stop: int, first: int, window: int) -> Tensor:
    """exp of the visible logits, 0 elsewhere: (B·K, G·(stop-start), stop-first)."""
    B, K, G, n, D = q.shape
    e = torch.bmm(q.reshape(B * K, G * n, D), k[:, first:stop].mT).exp_()
    square = e.view(B * K * G, n, stop - first)
    square.tril_(start - first)  # key j (from `first`) is visible to query i (from `start`) while j + first <= i + start
    if stop - 1 - window > first:  # and while j + first >= i + start - window
        square.triu_(start - first - window)
    return e
