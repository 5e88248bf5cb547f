"""Which attention kernel runs: chosen by vendor, installed packages and need, checked once against PyTorch's own, named in a line.

`auto` takes the first that is installed, runs here and agrees with SDPA (forward and backward, on a tiny input):
    CPU      blocked
    NVIDIA   fa3 (Hopper and Ampere, bf16; package `kernels`), flex, sdpa
    AMD      flash_attn (CK or AITER build), flex, sdpa
With full-length windows only, sdpa comes before flex: it is fused then. AMD is told by torch.version.hip, never by the compute
capability (an MI300X reports 9.4 and would pass for Hopper). The GPU choices have not been measured by this project yet.

FlexAttention is compiled for one length at a time, and a compiler must not trace the making of its masks. So it serves the rows
that are trained on, whose masks are made when it is chosen; other lengths (prompts, CORE, samples) go through sdpa.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat_model import attention
from nanochat_model.errors import ConfigError

Kernel = Callable[[Tensor, Tensor, Tensor, int], Tensor]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # largest difference over largest value
FALLBACK_COST = {
    # 226k against 309k tok/s with masks on 8×A100, 315k with FA3's windows (nanochat's log)
    "sdpa": "windows are cut into masked blocks: about a quarter less throughput than a kernel with windows",
    "flex": "no FlashAttention package: windows through compiled FlexAttention",
}
FA3_KERNEL = "kernels-community/flash-attn3"  # on the Hugging Face hub, loaded by the package `kernels`
FA3_VERSION = 1  # its major version, which `kernels` demands since 0.15; the build for any torch needs `kernels` 0.16
CHECK_LEN, CHECK_WINDOW = 256, 128  # of the rows that a kernel is checked on


@dataclass(frozen=True)
class Backend:
    """A chosen kernel and the line that tells of it."""

    name: str
    kernel: Kernel
    line: str


def choose_backend(
    requested: str, device: torch.device, dtype: torch.dtype, *, windowed: bool, shapes: Collection[tuple[int, int]] = ()
) -> Backend:
    """The kernel for `device` and `dtype`; `windowed`: some layer's window is shorter than the row. `shapes`: (positions, window)
    of the rows that are trained on, which FlexAttention is prepared for.

    Raises ConfigError if `requested` is unknown, or is not "auto" and does not work here.
    """
    if requested not in ("auto", *KERNELS):
        raise ConfigError(f"runtime.attention {requested!r} is not known; choose auto, {', '.join(KERNELS)}")
    backend = _choose(requested, device.type, dtype, windowed)
    if backend.name == "flex":
        for length, window in shapes:
            make_block_mask(length, window, device)
    return backend


@functools.cache
def _choose(requested: str, device_type: str, dtype: torch.dtype, windowed: bool) -> Backend:
    names = (requested,) if requested != "auto" else _candidates(device_type, windowed)
    refused: list[str] = []
    for name in names:
        try:
            kernel = KERNELS[name](device_type, dtype)
            if device_type != "cpu":
                check_against_sdpa(kernel, device_type, dtype)
        except _Unfit as e:
            refused.append(f"{name}: {e}")
            continue
        except Exception as e:  # a kernel package can fail in any way; what it said is printed
            refused.append(f"{name}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
            continue
        line = f"attention: {name}"
        if device_type != "cpu":  # which has one kernel only
            line += f" ({FALLBACK_COST.get(name, '')}; not used: {'; '.join(refused)})" if refused else ""
            if os.environ.get("LOCAL_RANK", "0") == "0":  # the ranks of a machine choose alike
                print(line, file=sys.stderr)
        return Backend(name, kernel, line)
    raise ConfigError(f"no attention kernel works on {device_type} in {dtype}: {'; '.join(refused)}")


def _candidates(device_type: str, windowed: bool) -> tuple[str, ...]:
    if device_type == "cpu":
        return ("blocked",)
    fused = "flash_attn" if torch.version.hip else "fa3"
    return (fused, "flex", "sdpa") if windowed else (fused, "sdpa", "flex")


class _Unfit(Exception):
    """This kernel is not for this machine."""


def _load_blocked(device_type: str, dtype: torch.dtype) -> Kernel:
    return attention.blocked


def _load_sdpa(device_type: str, dtype: torch.dtype) -> Kernel:
    return attention.sdpa


def _load_fa3(device_type: str, dtype: torch.dtype) -> Kernel:
    if device_type != "cuda" or torch.version.hip or torch.cuda.get_device_capability()[0] not in (8, 9):
        raise _Unfit("needs an NVIDIA Hopper GPU (or Ampere)")
    if dtype != torch.bfloat16:
        raise _Unfit("needs bfloat16")
    if importlib.util.find_spec("kernels") is None:
        raise _Unfit("package `kernels` is not installed")
    from kernels import get_kernel

    flash = get_kernel(FA3_KERNEL, version=FA3_VERSION).flash_attn_func
    return lambda q, k, v, window: _first(flash(q, k, v, causal=True, window_size=(window, 0)))


def _load_flash_attn(device_type: str, dtype: torch.dtype) -> Kernel:
    if device_type != "cuda" or dtype == torch.float32:
        raise _Unfit("needs a GPU and bfloat16 or float16")
    if importlib.util.find_spec("flash_attn") is None:
        raise _Unfit("package `flash_attn` is not installed")
    from flash_attn import flash_attn_func

    return lambda q, k, v, window: _first(flash_attn_func(q, k, v, causal=True, window_size=(window, 0)))


def _load_flex(device_type: str, dtype: torch.dtype) -> Kernel:
    if device_type != "cuda":
        raise _Unfit("needs a GPU")
    make_block_mask(CHECK_LEN, CHECK_WINDOW, torch.device(device_type))
    return flex_kernel()


def flex_kernel() -> Kernel:
    """FlexAttention for rows whose masks were made, sdpa for all others."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        mask = _BLOCK_MASKS.get((q.shape[1], window, q.device.index))
        if mask is None:
            return attention.sdpa(q, k, v, window)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return run


_BLOCK_MASKS: dict[tuple[int, int, int | None], Any] = {}  # by positions, window and index of the device


@torch.inference_mode(False)
def make_block_mask(length: int, window: int, device: torch.device) -> None:
    """Keep FlexAttention's sparse mask for rows of this length: which blocks of 128 × 128 are empty, full or partial. It is found
    on the CPU, so that nothing of length × length is ever on the device."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j <= window)

    index = torch.empty(0, device=device).device.index  # of "cuda": the current one
    if (length, window, index) not in _BLOCK_MASKS:
        _BLOCK_MASKS[length, window, index] = create_block_mask(visible, None, None, length, length, device="cpu").to(device)


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some builds return the log-sum-exp as well."""
    return result[0] if isinstance(result, tuple) else result


KERNELS: dict[str, Callable[[str, torch.dtype], Kernel]] = {
    "blocked": _load_blocked,
    "sdpa": _load_sdpa,
    "flex": _load_flex,
    "fa3": _load_fa3,
    "flash_attn": _load_flash_attn,
}


@torch.inference_mode(False)
@torch.enable_grad()
def check_against_sdpa(kernel: Kernel, device_type: str, dtype: torch.dtype) -> None:
    """Output and gradients of `kernel` against SDPA in float32, with a window, on a tiny input. Raises _Unfit on a difference.

    A first forward pass may ask for it from within no_grad or inference_mode: here gradients are on in any case.
    """
    generator = torch.Generator().manual_seed(0)
    B, T, H, K, D, window = 1, CHECK_LEN, 4, 4, 64, CHECK_WINDOW
    inputs = [torch.nn.functional.normalize(torch.randn(B, T, h, D, generator=generator), dim=-1) * 3 for h in (H, K, K)]
    results = []
    for f, kind in ((attention.sdpa, torch.float32), (kernel, dtype)):
        leaves = [t.to(device_type, dtype).to(kind).requires_grad_() for t in inputs]
        out = f(leaves[0], leaves[1], leaves[2], window)
        out.float().square().sum().backward()
        results.append([out.detach().float(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)])
    for name, expected, found in zip(("output", "dq", "dk", "dv"), *results, strict=True):
        error = ((expected - found).abs().max() / expected.abs().max()).item()
        if not error <= TOLERANCE[dtype]:
            raise _Unfit(f"its {name} differs from SDPA's by {error:.1e} of the largest value")
