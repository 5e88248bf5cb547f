"""Whole sublayers of a training step on CPUs as single autograd functions: few nodes, no copies, gradients added in place.

N = B·T tokens, C model_dim. Weights are float32, products run in the input's dtype. Where a weight
has a gradient already (the optimizer keeps one), backward adds to it itself; elsewhere it hands the gradient to autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanochat_model.native.ops import EPS, call
from nanochat_model.native.products import add_gradient, hidden_and_square, hidden_backward, linear, linear_backward


class Look(torch.autograd.Function):
    """Rows of a float32 table (V, width) at idx (B, T)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, idx: Tensor) -> Tensor:
        ctx.table, ctx.idx = table, idx.contiguous()
        return look(table, ctx.idx)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return add_rows(ctx.table, ctx.idx, g.contiguous()), None


def look(table: Tensor, idx: Tensor) -> Tensor:
    """Rows (B, T, width) of a float32 table (V, width) at idx (B, T)."""
    out = torch.empty((*idx.shape, table.shape[1]), dtype=torch.float32)
    call("look_rows_f32", table, idx, out, idx.numel(), table.shape[1])
    return out


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
        ctx.weights = (fc, proj)
        out, ctx.kept = feedforward(x, residual, fc, proj)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept = ctx.kept
        del ctx.kept  # memory is used again at once
        gx, *g_weights = feedforward_backward(g, kept, *ctx.weights)
        return gx, g, *g_weights


def feedforward(x: Tensor, residual: Tensor, fc: Tensor, proj: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """residual + relu(x Wfcᵀ)² Wprojᵀ, and what backward needs."""
    flat = x.reshape(-1, x.shape[-1])
    hidden, active = hidden_and_square(flat, fc)
    return linear(active, (proj,), plus=residual.reshape(-1, x.shape[-1])).view_as(x), (flat, hidden)


def feedforward_backward(
    g: Tensor, kept: tuple[Tensor, Tensor], fc: Tensor, proj: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x and of the weights; that of residual is g."""
    x, hidden = kept
    flat = g.reshape(-1, g.shape[-1])
    g_proj = add_gradient(proj, flat, hidden, square=True)
    gh = hidden_backward(flat, proj, hidden)
    return linear_backward(gh, (fc,)).view_as(g), add_gradient(fc, gh, x), g_proj
