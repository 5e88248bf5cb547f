"""Attention between the projections as one C kernel each way, for bfloat16 on CPUs that multiply bfloat16 pairs (AVX512-BF16).

B rows, T positions, H query heads, K kv heads, D head_dim. Elsewhere `ops.CoreAttention` means the same with PyTorch's products.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat_model.native.build import kernels
from nanochat_model.native.ops import EPS, CoreAttention, address, call, scratch

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]  # q, k, v, cos, sin, ve, gate
CHANNEL_MULTIPLE = 16  # the kernel's head sizes: whole vectors


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What a layer's attention computes: its window, the scale of queries and keys, and the range of value-embedding gates."""

    window: int
    qk_scale: float
    ve_range: float


def core_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None, gate: Tensor | None, meaning: Meaning
) -> Tensor:
    """(B, T, H, D) by the fastest kernel that takes these tensors. Arguments as of `CoreAttention`."""
    if fused(q.dtype, q.shape[-1]):
        return FusedAttention.apply(q, k, v, cos, sin, ve, gate, meaning)
    return CoreAttention.apply(q, k, v, cos, sin, ve, gate, meaning.window, meaning.qk_scale, meaning.ve_range)


def fused(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the one-kernel version takes queries of this dtype and head size."""
    return dtype == torch.bfloat16 and head_dim % CHANNEL_MULTIPLE == 0 and hasattr(kernels(), "attention_forward")


@functools.cache
def _scratch_bytes(T: int, D: int) -> int:
    size = kernels().attention_scratch  # type: ignore[union-attr]
    size.restype = ctypes.c_int64
    return int(size(ctypes.c_int64(T), ctypes.c_int64(D)))


def _scratch(T: int, D: int) -> Tensor:
    return scratch(_scratch_bytes(T, D) * torch.get_num_threads())


def _constants(meaning: Meaning, q: Tensor, k: Tensor) -> tuple[int | float, ...]:
    """The kernels' sizes and factors; heads and channels of a token lie together, tokens a stride apart."""
    B, T, H, D = q.shape
    assert q.stride()[2:] == k.stride()[2:] == (D, 1) and q.stride(0) == T * q.stride(1) and k.stride(0) == T * k.stride(1)
    factors = (meaning.window, EPS, meaning.qk_scale / math.sqrt(D), meaning.qk_scale, meaning.ve_range)
    return q.stride(1), k.stride(1), B, T, H, k.shape[2], D, *factors


def attend(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None, gate: Tensor | None, meaning: Meaning
) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, D) and row sums (B, H, T) float32, without autograd. q may lie in a wider row, so may k and v (alike)."""
    B, T, H, D = q.shape
    out = q.new_empty((B, T, H, D))
    sums = torch.empty((B, H, T), dtype=torch.float32)
    at = (address(t) for t in (q, k, v))
    call("attention_forward", *at, cos, sin, ve, gate, out, sums, _scratch(T, D), *_constants(meaning, q, k))
    return out, sums


def attend_backward(
    g: Tensor,
    inputs: Inputs,
    out: Tensor,
    sums: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    meaning: Meaning,
) -> None:
    """Fills the gradients of q, k, v, ve, gate (laid out as these are) from g (B, T, H, D), and `attend`'s inputs and results."""
    q, k, v, *rest = inputs
    gq, gk, gv, *grest = gradients
    constants = _constants(meaning, q, k)
    assert gq.stride() == q.stride() and gk.stride() == k.stride() == v.stride() == gv.stride()
    at, to = (address(t) for t in (q, k, v)), (address(t) for t in (gq, gk, gv))
    call("attention_backward", g.contiguous(), *at, *rest, out, sums, *to, *grest, _scratch(q.shape[1], q.shape[3]), *constants)


class FusedAttention(torch.autograd.Function):
    """As `CoreAttention`: rotary, QK norm, gated value embeddings, windowed causal attention.

    Keeps its inputs, its output and the row sums; exponentials are made again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        ve: Tensor | None,
        gate: Tensor | None,
        meaning: Meaning,
    ) -> Tensor:
        inputs = tuple(None if t is None else t.contiguous() for t in (q, k, v, cos, sin, ve, gate))
        out, sums = attend(*inputs, meaning)  # type: ignore[arg-type,call-arg]
        ctx.meaning = meaning
        ctx.save_for_backward(*inputs, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, out, sums = ctx.saved_tensors
        q, k, v, _, _, ve, gate = inputs
        made = tuple(None if t is None else torch.empty_like(t) for t in (q, k, v, ve, gate))
        attend_backward(g, tuple(inputs), out, sums, made, ctx.meaning)  # type: ignore[arg-type]
        gq, gk, gv, gve, ggate = made
        return gq, gk, gv, None, None, gve, ggate, None
