"""Whole sublayers of a training step on CPUs as single autograd functions: few nodes, no copies, gradients added in place.

N = B·T tokens, C model_dim, H heads, K kv heads, D head_dim. Weights are float32, products run in the input's dtype. Where a weight
has a gradient already (the optimizer keeps one), backward adds to it itself; elsewhere it hands the gradient to autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanochat_model.native.attention import Meaning, attend, attend_backward
from nanochat_model.native.ops import EPS, PIECE, call
from nanochat_model.native.products import (
    add_gradient,
    add_gradients,
    held_gradient,
    hidden_and_square,
    hidden_backward,
    linear,
    linear_backward,
)


class Look(torch.autograd.Function):
    """Rows of a float32 table (V, width) at idx (B, T)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, idx: Tensor) -> Tensor:
        ctx.table, ctx.idx = table, idx.contiguous()
        out = torch.empty((*idx.shape, table.shape[1]), dtype=torch.float32)
        call("look_rows_f32", table, ctx.idx, out, idx.numel(), table.shape[1])
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return add_rows(ctx.table, ctx.idx, g.contiguous()), None


def add_rows(table: Tensor, idx: Tensor, g: Tensor) -> Tensor | None:
    """Add the rows of g (N, width) to table.grad at idx (N,), where there is one; otherwise return it, for autograd."""
    total = torch.zeros_like(table) if table.grad is None else table.grad
    call("scatter_rows_f32", total, idx, g, idx.numel(), table.shape[1])
    return total if table.grad is None else None


class Embed(torch.autograd.Function):
    """Normalized rows of a float32 table (V, C) at idx (B, T), each mixed with that of the token before it: x_t + s_t x_{t-1} with
    s_t = smear_lambda · sigmoid(gate · x_t[:G]); in bfloat16. gate (1, G), smear_lambda (1,), float32."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, idx: Tensor, gate: Tensor, smear_lambda: Tensor) -> Tensor:
        B, T = idx.shape
        dtype = torch.bfloat16
        idx, weight, factor = idx.contiguous(), gate.to(dtype), smear_lambda.to(dtype).item()
        x, y = (torch.empty((B, T, table.shape[1]), dtype=dtype) for _ in range(2))
        inverse, sigmoid = torch.empty((2, B * T), dtype=torch.float32)
        sizes = (B, T, table.shape[1], gate.shape[1])
        call("embed_bf16", table, idx, weight, factor, x, y, inverse, sigmoid, *sizes, EPS)
        ctx.kept = (table, idx, weight, factor, x, inverse, sigmoid)
        ctx.sizes = sizes
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        table, idx, weight, factor, x, inverse, sigmoid = ctx.kept
        del ctx.kept
        B, T, C, G = ctx.sizes
        rows, sums = torch.empty((B * T, C)), torch.empty((B, G + 1))
        kept = (table, idx, weight, factor, x, inverse, sigmoid)
        call("embed_backward_bf16", g.contiguous(), *kept, rows, sums, B, T, C, G)
        total = sums.sum(0)
        return add_rows(table, idx, rows), None, total[:G].view(1, G), total[G:]


class Feedforward(torch.autograd.Function):
    """residual + relu(x Wfcᵀ)² Wprojᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        hidden, active = hidden_and_square(flat, fc)
        ctx.kept, ctx.weights = (flat, hidden), (fc, proj)
        return linear(active, (proj,), plus=residual.reshape(-1, x.shape[-1])).view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, hidden = ctx.kept
        fc, proj = ctx.weights
        del ctx.kept  # memory is used again at once
        flat = g.reshape(-1, g.shape[-1])
        g_proj = add_gradient(proj, flat, hidden, square=True)
        gh = hidden_backward(flat, proj, hidden)
        return linear_backward(gh, (fc,)).view_as(g), g, add_gradient(fc, gh, x), g_proj


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
        flat = x.reshape(-1, C).contiguous()
        qkv = linear(flat, (c_q, c_k, c_v))
        ctx.split = (len(c_q), len(c_k), len(c_v))
        q, k, v = _heads(qkv, ctx.split, B, T, head_dim)
        small = gate = None
        if ve_gate is not None and ve is not None:
            small = ve_gate.to(x.dtype)
            gate = torch.empty((B * T, small.shape[0]), dtype=x.dtype)
            call("gate_logits", flat.data_ptr(), small, gate, B * T, flat.stride(0), *small.shape)
            ve = ve.contiguous()
        inputs = (q, k, v, cos.contiguous(), sin.contiguous(), ve, gate)
        out, sums = attend(*inputs, meaning)
        ctx.kept = (flat, qkv, inputs, out, sums, small)
        ctx.weights, ctx.head_dim, ctx.meaning = (c_q, c_k, c_v, c_proj, ve_gate), head_dim, meaning
        return linear(out.view(B * T, C), (c_proj,)).view(B, T, C)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        flat, qkv, inputs, out, sums, small = ctx.kept
        del ctx.kept
        *c_qkv, c_proj, ve_gate = ctx.weights
        B, T, C = g.shape
        rows = g.reshape(B * T, C)
        g_proj = add_gradient(c_proj, rows, out.view(B * T, C))
        g_out = linear_backward(rows, (c_proj,)).view_as(out)
        g_qkv = torch.empty_like(qkv)
        gve, ggate = (None if t is None else torch.empty_like(t) for t in inputs[5:])
        gq, gk, gv = _heads(g_qkv, ctx.split, B, T, ctx.head_dim)
        attend_backward(g_out, inputs, out, sums, (gq, gk, gv, gve, ggate), ctx.meaning)
        gx = linear_backward(g_qkv, c_qkv)
        g_weights = add_gradients(c_qkv, g_qkv, flat)
        g_gate = None
        if small is not None and ggate is not None:
            total, g_gate = held_gradient(ve_gate)
            parts = torch.empty((-(-B * T // PIECE), *small.shape))
            strides = (flat.stride(0), gx.stride(0))
            call("gate_logits_backward", ggate, flat.data_ptr(), small, gx, total, parts, B * T, *strides, *small.shape)
        return gx.view_as(g), *g_weights, g_proj, g_gate, gve, None, None, None, None


def _heads(qkv: Tensor, split: tuple[int, int, int], B: int, T: int, head_dim: int) -> list[Tensor]:
    """Views (B, T, heads, D) of the three parts of qkv (B·T, all channels)."""
    return [part.unflatten(-1, (-1, head_dim)).unflatten(0, (B, T)) for part in qkv.split(split, dim=-1)]
