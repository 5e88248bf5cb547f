"""Whole sublayers of a training step on CPUs as single autograd functions: few nodes, no copies, gradients added in place.

N = B·T tokens, C model_dim, H heads, K kv heads, D head_dim. Weights are float32, products run in the input's dtype. Where a weight
has a gradient already (the optimizer keeps one), backward adds to it itself; elsewhere it hands the gradient to autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanochat_model.native.attention import Meaning, attend, attend_backward
from nanochat_model.native.ops import SUFFIX, call


def add_gradient(weight: Tensor, gradient: Tensor) -> Tensor | None:
    """Add to weight.grad where there is one; otherwise the gradient in the weight's dtype, for autograd."""
    total = weight.grad
    if total is None or not total.is_contiguous() or gradient.dtype not in SUFFIX:
        return gradient.to(weight.dtype)
    call("accumulate" + SUFFIX[gradient.dtype], total, gradient.contiguous(), total.numel())
    return None


class Look(torch.autograd.Function):
    """Rows of a float32 table (V, width) at idx (B, T)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, idx: Tensor) -> Tensor:
        ctx.table, ctx.idx = table, idx.contiguous()
        return table.index_select(0, ctx.idx.view(-1)).view(*idx.shape, table.shape[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        table, idx, g = ctx.table, ctx.idx, g.contiguous()
        total = torch.zeros_like(table) if table.grad is None else table.grad
        call("scatter_rows_f32", total, idx, g, idx.numel(), table.shape[1])
        return total if table.grad is None else None, None


class Projection(torch.autograd.Function):
    """x (…, in) times weight (out, in), transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.cast = weight, weight.to(x.dtype)
        ctx.x = x.reshape(-1, x.shape[-1])
        return (ctx.x @ ctx.cast.T).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        flat = g.reshape(-1, g.shape[-1])
        gx = (flat @ ctx.cast).view(*g.shape[:-1], ctx.x.shape[-1])
        return gx, add_gradient(ctx.weight, flat.T @ ctx.x)


class Feedforward(torch.autograd.Function):
    """relu(x Wfcᵀ)² Wprojᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights = fc.to(x.dtype), proj.to(x.dtype)
        hidden = flat @ weights[0].T
        active = torch.empty_like(hidden)
        call("relu_square" + SUFFIX[x.dtype], hidden, active, hidden.numel())
        ctx.kept, ctx.weights = (flat, hidden, active, *weights), (fc, proj)
        return (active @ weights[1].T).view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, hidden, active, fc, proj = ctx.kept
        del ctx.kept  # memory is used again at once
        flat = g.reshape(-1, g.shape[-1])
        g_proj = add_gradient(ctx.weights[1], flat.T @ active)
        gh = torch.mm(flat, proj, out=active)
        call("relu_square_backward" + SUFFIX[g.dtype], hidden, gh, gh, gh.numel())
        return (gh @ fc).view_as(g), add_gradient(ctx.weights[0], gh.T @ x), g_proj


class AttentionLayer(torch.autograd.Function):
    """A whole attention sublayer: one product for queries, keys and values, the gate, attention, and the output projection.

    weights: c_q, c_k, c_v, c_proj, and ve_gate (K, channels) or None with ve (B, T, K·D) float32 or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        c_q: Tensor,
        c_k: Tensor,
        c_v: Tensor,
        c_proj: Tensor,
        ve_gate: Tensor | None,
        ve: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        head_dim: int,
        meaning: Meaning,
    ) -> Tensor:
        B, T, C = x.shape
        flat = x.reshape(-1, C)
        joint = torch.cat([c_q, c_k, c_v]).to(x.dtype)
        proj = c_proj.to(x.dtype)
        qkv = flat @ joint.T
        ctx.split = (len(c_q), len(c_k), len(c_v))
        q, k, v = _heads(qkv, ctx.split, B, T, head_dim)
        small = gate = None
        if ve_gate is not None and ve is not None:
            small = ve_gate.to(x.dtype)
            gate = flat[:, : small.shape[1]] @ small.T
            ve = ve.contiguous()
        inputs = (q, k, v, cos.contiguous(), sin.contiguous(), ve, gate)
        out, sums = attend(*inputs, meaning)
        ctx.kept = (flat, qkv, inputs, out, sums, joint, proj, small)
        ctx.weights, ctx.head_dim, ctx.meaning = (c_q, c_k, c_v, c_proj, ve_gate), head_dim, meaning
        return (out.view(B * T, C) @ proj.T).view(B, T, C)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        flat, qkv, inputs, out, sums, joint, proj, small = ctx.kept
        del ctx.kept
        c_q, c_k, c_v, c_proj, ve_gate = ctx.weights
        B, T, C = g.shape
        rows = g.reshape(B * T, C)
        g_proj = add_gradient(c_proj, rows.T @ out.view(B * T, C))
        g_out = (rows @ proj).view_as(out)
        g_qkv = torch.empty_like(qkv)
        gve, ggate = (None if t is None else torch.empty_like(t) for t in inputs[5:])
        gq, gk, gv = _heads(g_qkv, ctx.split, B, T, ctx.head_dim)
        attend_backward(g_out, inputs, out, sums, (gq, gk, gv, gve, ggate), ctx.meaning)
        gx = g_qkv @ joint
        g_joint = (g_qkv.T @ flat).split(ctx.split)
        g_weights = [add_gradient(w, part) for w, part in zip((c_q, c_k, c_v), g_joint, strict=True)]
        g_gate = None
        if small is not None and ggate is not None:
            gx[:, : small.shape[1]] += ggate @ small
            g_gate = add_gradient(ve_gate, ggate.T @ flat[:, : small.shape[1]])
        return gx.view_as(g), *g_weights, g_proj, g_gate, gve, None, None, None, None


def _heads(qkv: Tensor, split: tuple[int, int, int], B: int, T: int, head_dim: int) -> list[Tensor]:
    """Views (B, T, heads, D) of the three parts of qkv (B·T, all channels)."""
    return [part.unflatten(-1, (-1, head_dim)).unflatten(0, (B, T)) for part in qkv.split(split, dim=-1)]
