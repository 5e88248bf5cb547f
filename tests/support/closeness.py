"""When a kernel's result is close enough to its reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanochat_model.native import build

DTYPES = [torch.float32, torch.bfloat16]
needs_native = pytest.mark.skipif(build.kernels() is None, reason="no C compiler here")


def tolerance(dtype: torch.dtype) -> float:
    return 2e-5 if dtype == torch.float32 else 2e-2


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "") -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)
    assert error <= tolerance(dtype), f"{what}: relative error {error:.2e}"


def leaves(*tensors: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The same values as fast leaves in `dtype` and as float64 leaves."""
    fast = [t.to(dtype).requires_grad_() for t in tensors]
    return fast, [t.detach().double().requires_grad_() for t in fast]
