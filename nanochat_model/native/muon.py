"""Muon's update as one C kernel, for bfloat16 orthogonalization on CPUs that multiply bfloat16 pairs (AVX512-BF16)."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from nanochat_model.native.build import kernels
from nanochat_model.native.ops import call


def usable(params: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel takes this stack of matrices (K, m, n): one a thread, so no fewer than threads."""
    return (
        dtype == torch.bfloat16
        and params.device.type == "cpu"
        and len(params) >= min(torch.get_num_threads(), 2)
        and hasattr(kernels(), "muon_step")
    )


def muon_step(
    params: Tensor,
    grads: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor,
    *,
    momentum: float,
    lr: float,
    weight_decay: float,
    beta2: float,
    coefficients: tuple[tuple[float, float, float], ...],
) -> None:
    """As optim.muon.muon_step, with the iteration's coefficients for its number of steps; everything is updated in place."""
    count, m, n = params.shape
    scratch = torch.empty(_scratch_bytes(m, n) * torch.get_num_threads(), dtype=torch.uint8)
    table = torch.tensor(coefficients)
    states = (params, grads, momentum_buffer, second_moment, scratch, table)
    call("muon_step", *states, count, m, n, len(table), float(momentum), float(lr), float(weight_decay), float(beta2))


@functools.cache
def _scratch_bytes(m: int, n: int) -> int:
    size = kernels().muon_scratch  # type: ignore[union-attr]
    size.restype = ctypes.c_int64
    return int(size(ctypes.c_int64(m), ctypes.c_int64(n)))
