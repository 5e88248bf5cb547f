"""Fused CPU kernels in plain C, compiled for this machine at first use, with pure PyTorch as the fallback."""

from __future__ import annotations

from nanochat_model.native.build import kernels, native_status

__all__ = ["kernels", "native_status"]
