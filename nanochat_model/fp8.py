"""fp8 matrix products for training, through torch._scaled_mm. Weights stay float32; evaluation never uses fp8.

Two recipes (names as in torchao and nanochat). tensorwise: one scale a tensor, the fastest. rowwise: one scale a row of each
factor, more exact, every factor quantized along the dimension that is summed over. Activations and weights take the e4m3 format,
gradients e5m2 under tensorwise (range) and e4m3 under rowwise. AMD's gfx942 has its own pair of formats (fnuz).
M tokens, K inputs, N outputs. Unmeasured by this project so far: no fp8 hardware was at hand.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from nanochat_model.errors import ConfigError

MULTIPLE = 16  # of both dimensions, demanded by the hardware
MIN_SIZE = 128  # smaller layers lose more in quantizing than they gain (nanochat's filter)
TINY = 1e-12
RECIPES = ("tensorwise", "rowwise")


def eligible(num_in: int, num_out: int) -> bool:
    """Whether a layer is worth, and capable of, fp8."""
    return num_in % MULTIPLE == 0 and num_out % MULTIPLE == 0 and min(num_in, num_out) >= MIN_SIZE


@functools.cache
def formats(device_type: str) -> tuple[torch.dtype, torch.dtype]:
    """(e4m3, e5m2) of this device. Raises ConfigError where there are no fp8 units."""
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        if torch.version.hip:
            arch = properties.gcnArchName.split(":")[0]
            if arch.startswith("gfx94"):
                return torch.float8_e4m3fnuz, torch.float8_e5m2fnuz
            if arch.startswith("gfx95"):
                return torch.float8_e4m3fn, torch.float8_e5m2
        elif (properties.major, properties.minor) >= (8, 9):
            return torch.float8_e4m3fn, torch.float8_e5m2
    raise ConfigError("fp8 needs an NVIDIA GPU from Ada or Hopper on, or an AMD MI300 or later; set fp8=off")


def quantize(x: Tensor, dtype: torch.dtype, dim: int | None) -> tuple[Tensor, Tensor]:
    """x in fp8 and the float32 factor that undoes its scale. `dim`: the one shared by a scale (None: all)."""
    top = torch.finfo(dtype).max
    largest = x.abs().amax() if dim is None else x.abs().amax(dim=dim, keepdim=True)
    scale = top / largest.float().clamp_min(TINY)
    return (x.float() * scale).clamp(-top, top).to(dtype), scale.reciprocal()


def scaled_matmul(a: Tensor, b: Tensor, formats_ab: tuple[torch.dtype, torch.dtype], recipe: str, *, fast: bool) -> Tensor:
    """a (m, k) @ b (k, n) in fp8, result in a's dtype. `fast` lets the hardware add in less than float32 (forward only)."""
    rowwise = recipe == "rowwise"
    a8, scale_a = quantize(a, formats_ab[0], 1 if rowwise else None)
    b8, scale_b = quantize(b, formats_ab[1], 0 if rowwise else None)
    a8, b8 = a8.contiguous(), b8.t().contiguous().t()  # row-major times column-major is what the hardware takes
    return torch._scaled_mm(
        a8, b8, scale_a=scale_a.contiguous(), scale_b=scale_b.contiguous(), out_dtype=a.dtype, use_fast_accum=fast
    )


class Float8Linear(torch.autograd.Function):
    """x (M, K) @ weight (N, K)ᵀ and both gradients in fp8. `pair` = (e4m3, e5m2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: str, pair: tuple[torch.dtype, torch.dtype]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe, ctx.pair = recipe, pair
        return scaled_matmul(x, weight.to(x.dtype).t(), (pair[0], pair[0]), recipe, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        e4m3, e5m2 = ctx.pair
        gradient = e5m2 if ctx.recipe == "tensorwise" else e4m3
        grad_x = scaled_matmul(grad, weight.to(grad.dtype), (gradient, e4m3), ctx.recipe, fast=False)
        grad_weight = scaled_matmul(grad.t(), x, (gradient, e4m3), ctx.recipe, fast=False)
        return grad_x, grad_weight.to(weight.dtype), None, None


def fp8_linear(x: Tensor, weight: Tensor, recipe: str) -> Tensor:
    """x (..., K) through a bias-free layer of weight (N, K)."""
    flat = x.reshape(-1, x.shape[-1])
    return Float8Linear.apply(flat, weight, recipe, formats(x.device.type)).view(*x.shape[:-1], -1)
