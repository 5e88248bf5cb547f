"""fp8 matrix products for training, through torch._scaled_mm. Weights stay float32; evaluation never uses fp8.

Two recipes (names as in torchao and nanochat). tensorwise: one scale a tensor, the fastest; each tensor is quantized once and
serves two products. rowwise: one scale a row of each factor, more exact, every factor quantized along the dimension that is
summed over. Activations and weights take the e4m3 format, gradients e5m2 under tensorwise (range) and e4m3 under rowwise. AMD's
gfx942 has its own pair of formats (fnuz).
M tokens, K inputs, N outputs. Unmeasured by this project so far: no fp8 hardware was at hand.
"""

from __future__ import annotations

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


_FORMATS: dict[str, tuple[torch.dtype, torch.dtype]] = {}  # by type of device, once asked for: a compiler's trace only looks it up


def formats(device_type: str) -> tuple[torch.dtype, torch.dtype]:
    """(e4m3, e5m2) of this device. Raises ConfigError where there are no fp8 units."""
    if device_type not in _FORMATS:
        _FORMATS[device_type] = _find_formats(device_type)
    return _FORMATS[device_type]


def _find_formats(device_type: str) -> tuple[torch.dtype, torch.dtype]:
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


def check_fp8(recipe: str, *, device: torch.device, compute_dtype: str, sequence_len: int) -> None:
    """Raise ConfigError where training with `recipe` cannot run. "off" always can."""
    if recipe == "off":
        return
    if device.type != "cuda":
        raise ConfigError(f"fp8 {recipe!r} needs a GPU with fp8 units, the device is {device}; set fp8=off")
    formats(device.type)
    if compute_dtype != "bfloat16":
        raise ConfigError(f"fp8 {recipe!r} with compute_dtype {compute_dtype}: its products come out in bfloat16; set that")
    if sequence_len % MULTIPLE:  # the gradient of a weight sums over tokens
        raise ConfigError(
            f"fp8 {recipe!r} needs a sequence_len divisible by {MULTIPLE}, not {sequence_len}; change it or set fp8=off"
        )


def quantize(x: Tensor, dtype: torch.dtype, dim: int | None) -> tuple[Tensor, Tensor]:
    """x in fp8 and the float32 factor that undoes its scale. `dim`: the one shared by a scale (None: all)."""
    top = torch.finfo(dtype).max
    largest = x.abs().amax() if dim is None else x.abs().amax(dim=dim, keepdim=True)
    scale = top / largest.float().clamp_min(TINY)
    return (x.float() * scale).clamp(-top, top).to(dtype), scale.reciprocal()


def product(a8: Tensor, scale_a: Tensor, b8: Tensor, scale_b: Tensor, out_dtype: torch.dtype, *, fast: bool) -> Tensor:
    """a8 (m, k) @ b8 (k, n), both in fp8. `fast` lets the hardware add in less than float32 (forward only)."""
    a8, b8 = a8.contiguous(), b8.t().contiguous().t()  # row-major times column-major is what the hardware takes
    return torch._scaled_mm(
        a8, b8, scale_a=scale_a.contiguous(), scale_b=scale_b.contiguous(), out_dtype=out_dtype, use_fast_accum=fast
    )


def scaled_matmul(a: Tensor, b: Tensor, formats_ab: tuple[torch.dtype, torch.dtype], recipe: str, *, fast: bool) -> Tensor:
    """a (m, k) @ b (k, n) in fp8, result in a's dtype; both are quantized here. `fast`: see `product`."""
    rowwise = recipe == "rowwise"
    a8, scale_a = quantize(a, formats_ab[0], 1 if rowwise else None)
    b8, scale_b = quantize(b, formats_ab[1], 0 if rowwise else None)
    return product(a8, scale_a, b8, scale_b, a.dtype, fast=fast)


class Tensorwise(torch.autograd.Function):
    """x (M, K) @ weight (N, K)ᵀ and both gradients in fp8. `pair` = (e4m3, e5m2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, pair: tuple[torch.dtype, torch.dtype]) -> Tensor:
        x8, scale_x = quantize(x, pair[0], None)
        w8, scale_w = quantize(weight, pair[0], None)
        ctx.save_for_backward(x8, scale_x, w8, scale_w)
        ctx.e5m2, ctx.weight_dtype = pair[1], weight.dtype
        return product(x8, scale_x, w8.t(), scale_w, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x8, scale_x, w8, scale_w = ctx.saved_tensors
        g8, scale_g = quantize(grad, ctx.e5m2, None)
        grad_x = product(g8, scale_g, w8, scale_w, grad.dtype, fast=False)
        grad_weight = product(g8.t(), scale_g, x8, scale_x, grad.dtype, fast=False)
        return grad_x, grad_weight.to(ctx.weight_dtype), None


class Rowwise(torch.autograd.Function):
    """As Tensorwise, with a scale a row of each factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, pair: tuple[torch.dtype, torch.dtype]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.e4m3 = pair[0]
        return scaled_matmul(x, weight.t(), (ctx.e4m3, ctx.e4m3), "rowwise", fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        both = (ctx.e4m3, ctx.e4m3)
        grad_x = scaled_matmul(grad, weight, both, "rowwise", fast=False)
        grad_weight = scaled_matmul(grad.t(), x, both, "rowwise", fast=False)
        return grad_x, grad_weight.to(weight.dtype), None


LINEAR: dict[str, type[torch.autograd.Function]] = {"tensorwise": Tensorwise, "rowwise": Rowwise}


def fp8_linear(x: Tensor, weight: Tensor, recipe: str) -> Tensor:
    """x (..., K) through a bias-free layer of weight (N, K)."""
    flat = x.reshape(-1, x.shape[-1])
    return LINEAR[recipe].apply(flat, weight, formats(x.device.type)).view(*x.shape[:-1], -1)
