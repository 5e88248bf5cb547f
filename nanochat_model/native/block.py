"""A whole block of a training step, for CPUs that multiply bfloat16 pairs: one autograd function, one run of kernels each way.

B rows, T positions, N = B·T tokens, C model_dim, K kv heads, D head_dim. Activations are bfloat16, weights float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat_model.native import ops
from nanochat_model.native.attention import Inputs, Meaning, attend, attend_backward, fused
from nanochat_model.native.layers import add_rows, feedforward, feedforward_backward, look
from nanochat_model.native.ops import PIECE, call, mixed, mixed_backward, mixed_backward_learned, together
from nanochat_model.native.products import add_gradient, add_gradients, held_gradient, in_c, linear, linear_backward


class Weights(NamedTuple):
    """Of one block; the last two on layers with a value embedding: gate (K, channels), table (V, K·D)."""

    c_q: Tensor
    c_k: Tensor
    c_v: Tensor
    c_proj: Tensor
    fc: Tensor
    proj: Tensor
    ve_gate: Tensor | None
    ve_table: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a block reads besides activations: token ids (B, T), rotary tables (T, D/2), and what its attention means."""

    idx: Tensor
    cos: Tensor
    sin: Tensor
    head_dim: int
    meaning: Meaning


def trainable_in_one(x: Tensor, head_dim: int) -> bool:
    """Whether TrainedBlock takes activations x (B, T, C) of heads of this size: all of its products are in C then."""
    return ops.usable(x) and fused(x.dtype, head_dim) and in_c(x.flatten(0, 1), ())


class TrainedBlock(torch.autograd.Function):
    """m + feedforward(norm(m)) with m = s + attention(norm(s)) and s = r·x + l·x0; x, x0 (B, T, C), r and l 0-d.

    Where a weight has a gradient already, backward adds to it itself; elsewhere it hands the gradient to autograd.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, x0: Tensor, r: Tensor, l: Tensor, reading: Reading, *weights: Tensor | None) -> Tensor:
        ctx.factors, ctx.reading, ctx.weights = (r.item(), l.item()), reading, Weights(*weights)  # type: ignore[arg-type]
        w = ctx.weights
        x, x0 = x.contiguous(), x0.contiguous()
        with together():
            s, n, inv = mixed(x, x0, *ctx.factors)
            a, attention_kept = _attention(n, w, reading)
            m, n, inv_m = mixed(s, a, 1.0, 1.0, s=a)
            out, feedforward_kept = feedforward(n, m, w.fc, w.proj)
        ctx.kept = (x, x0, s, inv, attention_kept, m, inv_m, feedforward_kept)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, x0, s, inv, attention_kept, m, inv_m, feedforward_kept = ctx.kept
        del ctx.kept  # memory is used again at once
        w, g = ctx.weights, g.contiguous()
        with together():
            gn, g_fc, g_proj = feedforward_backward(g, feedforward_kept, w.fc, w.proj)
            g = mixed_backward(g, gn, m, inv_m)
            gn, g_attention = _attention_backward(g, attention_kept, w, ctx.reading)
            gx, gx0, sums = mixed_backward_learned(g, gn, s, inv, x, x0, *ctx.factors)
        g_r, g_l = sums.sum(0).float().unbind()
        *g_four, g_gate, g_table = g_attention
        return gx, gx0, g_r, g_l, None, *g_four, g_fc, g_proj, g_gate, g_table


class _Kept(NamedTuple):
    """What attention's backward needs: its input (N, C), the joint product, `attend`'s inputs and results, the gate in bfloat16."""

    x: Tensor
    qkv: Tensor
    inputs: Inputs
    out: Tensor
    sums: Tensor
    small: Tensor | None


def _attention(x: Tensor, w: Weights, reading: Reading) -> tuple[Tensor, _Kept]:
    """The attention sublayer of x (B, T, C), normalized: one product for queries, keys and values, the gate, attention, and the
    output projection."""
    B, T, C = x.shape
    flat = x.view(-1, C)
    qkv = linear(flat, (w.c_q, w.c_k, w.c_v))
    small = gate = ve = None
    if w.ve_gate is not None and w.ve_table is not None:
        small = w.ve_gate.to(x.dtype)
        gate = torch.empty((B * T, small.shape[0]), dtype=x.dtype)
        call("gate_logits", flat, small, gate, B * T, C, *small.shape)
        ve = look(w.ve_table, reading.idx)
    q, k, v = _heads(qkv, w, reading, B, T)
    inputs = (q, k, v, reading.cos, reading.sin, ve, gate)
    out, sums = attend(*inputs, reading.meaning)
    return linear(out.view(B * T, C), (w.c_proj,)).view(B, T, C), _Kept(flat, qkv, inputs, out, sums, small)


def _attention_backward(g: Tensor, kept: _Kept, w: Weights, reading: Reading) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of x, and of c_q, c_k, c_v, c_proj, ve_gate, ve_table."""
    B, T, C = g.shape
    rows, out = g.view(B * T, C), kept.out
    g_proj = add_gradient(w.c_proj, rows, out.view(B * T, C))
    g_out = linear_backward(rows, (w.c_proj,)).view_as(out)
    g_qkv = torch.empty_like(kept.qkv)
    gve, ggate = (None if t is None else torch.empty_like(t) for t in kept.inputs[5:])
    gq, gk, gv = _heads(g_qkv, w, reading, B, T)
    attend_backward(g_out, kept.inputs, out, kept.sums, (gq, gk, gv, gve, ggate), reading.meaning)
    c_qkv = (w.c_q, w.c_k, w.c_v)
    gx = linear_backward(g_qkv, c_qkv)
    g_weights = add_gradients(c_qkv, g_qkv, kept.x)
    g_gate = g_table = None
    if w.ve_gate is not None and w.ve_table is not None and gve is not None and kept.small is not None:
        total, g_gate = held_gradient(w.ve_gate)
        parts = torch.empty((-(-B * T // PIECE), *kept.small.shape))
        call("gate_logits_backward", ggate, kept.x, kept.small, gx, total, parts, B * T, C, C, *kept.small.shape)
        g_table = add_rows(w.ve_table, reading.idx, gve)
    return gx.view_as(g), [*g_weights, g_proj, g_gate, g_table]


def _heads(qkv: Tensor, w: Weights, reading: Reading, B: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views (B, T, heads, D) of the three parts of qkv (N, all channels)."""
    parts = qkv.split([len(w.c_q), len(w.c_k), len(w.c_v)], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, reading.head_dim)).unflatten(0, (B, T)) for part in parts)
    return q, k, v
