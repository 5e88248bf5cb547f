"""Checks of the devices and of what torch makes of them: build, driver, attention kernels, precisions, collectives."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanoladder.doctor import Finding, error, ok, warning

LOW_SHARE_OF_PEAK = 0.3  # an MI300X reaches about 45% of its data sheet in many shapes, an H200 80%
BF16_ERROR = 0.02  # largest difference over largest value of a product against float64: bf16 keeps 8 bits
FP8_ERROR = 0.1
PRODUCT = 2048  # rows and columns of the product that is timed on a GPU
CPU_PRODUCT = 768
HINTS = {
    "nvidia": "pip install torch --index-url https://download.pytorch.org/whl/cu130",
    "amd": "pip install torch --index-url https://download.pytorch.org/whl/rocm7.0",
}


def vendors() -> dict[str, str]:
    """Accelerators that the kernel knows, by vendor, with the driver's version ("" where it does not say)."""
    found: dict[str, str] = {}
    nvidia = Path("/proc/driver/nvidia/version")
    if nvidia.exists() or list(Path("/dev").glob("nvidia[0-9]*")):
        match = re.search(r"Kernel Module[^\d]*([\d.]+)", nvidia.read_text(encoding="utf8")) if nvidia.exists() else None
        found["nvidia"] = match.group(1) if match else ""
    if Path("/dev/kfd").exists():
        version = Path("/sys/module/amdgpu/version")
        found["amd"] = version.read_text(encoding="utf8").strip() if version.exists() else ""
    return found


def devices() -> Iterator[Finding]:
    """Accelerators, their driver, and whether torch is a build for them."""
    import torch

    from nanochat_model.device import device_name
    from nanochat_model.hardware import find_device

    here = vendors()
    build = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    facts = {"torch": torch.__version__, "build": build, "drivers": here}
    if not torch.cuda.is_available():
        if not here:
            yield ok("devices", f"no accelerator; {device_name(torch.device('cpu'))}; torch {torch.__version__} ({build})", **facts)
            return
        vendor, driver = next(iter(here.items()))
        fitting = (vendor == "amd") == bool(torch.version.hip) and build != "CPU"
        why = "although it is a build for it" if fitting else f"which is a {build} build"
        remedy = f"see whether {'rocm-smi' if vendor == 'amd' else 'nvidia-smi'} answers" if fitting else HINTS[vendor]
        yield error(
            "devices",
            f"{vendor} driver {driver or '?'} is loaded, but torch {torch.__version__} sees no GPU, {why}",
            remedy,
            **facts,
        )
        return
    wrong = ("amd" in here and not torch.version.hip) or ("nvidia" in here and torch.version.hip)
    if wrong and len(here) == 1:
        yield error("devices", f"a {build} build of torch on {', '.join(here)} devices", HINTS[next(iter(here))], **facts)
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        spec = find_device(p.name)
        known = f"peak {spec.bf16_flops / 1e12:g} TFLOP/s" if spec else "peak unknown: MFU will be too"
        free, total = torch.cuda.mem_get_info(index)
        text = f"cuda:{index} {p.name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, {known}; torch {torch.__version__} ({build})"
        if free < 0.5 * total:
            yield warning("devices", text, "another process holds its memory: end it", index=index, **facts)
        else:
            yield ok("devices", text, index=index, name=p.name, **facts)


def environment() -> Iterator[Finding]:
    """Variables that are known to do harm."""
    harmful = {
        "HSA_OVERRIDE_GFX_VERSION": "needless on a real gfx942 and breaks newer ROCm; unset it",
        "ROCR_VISIBLE_DEVICES": "hide devices with HIP_VISIBLE_DEVICES, as Ray does; unset this one",
        "CUDA_LAUNCH_BLOCKING": "makes every kernel wait; unset it",
    }
    found = [name for name in harmful if os.environ.get(name)]
    for name in found:
        yield warning("environment", f"{name}={os.environ[name]}", harmful[name])
    if not found:
        yield ok("environment", "no variable set that is known to harm")


def attention() -> Iterator[Finding]:
    """Every attention kernel against SDPA, forward and backward, and the one that `auto` takes."""
    import torch

    from nanochat_model.attention_backends import KERNELS, check_against_sdpa, choose_backend

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    fastest = "flash_attn" if torch.version.hip else "fa3"
    agree: list[str] = []
    refused: dict[str, str] = {}
    for name, load in KERNELS.items():
        try:
            check_against_sdpa(load(kind, dtype), kind, dtype)
            agree.append(name)
        except Exception as e:  # a kernel package may fail in any way
            refused[name] = str(e).splitlines()[0] if str(e) else type(e).__name__
    chosen = choose_backend("auto", torch.device(kind), dtype, windowed=True)
    text = f"auto takes {chosen.name}; agree with SDPA on {kind}: {', '.join(agree)}"
    text += "; not here: " + ", ".join(f"{k} ({v})" for k, v in refused.items()) if refused else ""
    facts = {"chosen": chosen.name, "agree": agree, "refused": refused}
    wrong = [name for name, reason in refused.items() if "differs" in reason]
    if wrong:
        yield error("attention", text, f"do not use {', '.join(wrong)}: runtime.attention={chosen.name}", **facts)
    elif kind == "cuda" and (chosen.name == "sdpa" or "not installed" in refused.get(fastest, "")):
        remedy = "install flash_attn (CK or AITER build)" if torch.version.hip else "pip install 'kernels>=0.16' (FlashAttention 3)"
        cost = ", and windows cost a quarter of the throughput without it" if chosen.name == "sdpa" else ""
        yield warning("attention", text, f"{remedy}: it is the fastest here{cost}", **facts)
    else:
        yield ok("attention", text, **facts)


def bf16(measure: bool = True) -> Iterator[Finding]:
    """bf16 products: right, and how fast, against float32 and the data sheet."""
    import torch

    from nanochat_model.device import matmul_flops, peak_flops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong = product_error(torch.bfloat16, device)
    if wrong > BF16_ERROR:
        yield error(
            "bf16", f"a product is off by {wrong:.1%} of the largest value", "use compute_dtype float32; suspect the driver"
        )
        return
    if not measure:
        yield ok("bf16", f"products are right to {wrong:.2%}", error=wrong)
        return
    size = PRODUCT * 4 if device.type == "cuda" else CPU_PRODUCT
    fast, plain = (matmul_flops(dtype, size=size, device=device) for dtype in (torch.bfloat16, torch.float32))
    peak = peak_flops(device)
    facts: dict[str, Any] = {"error": wrong, "bf16_flops": fast, "float32_flops": plain, "peak_flops": peak}
    text = f"{fast / 1e12:.3g} TFLOP/s, {fast / plain:.1f} × float32, right to {wrong:.2%}"
    if peak is not None:
        text += f"; {fast / peak:.0%} of {peak / 1e12:g}"
    if peak is not None and fast < LOW_SHARE_OF_PEAK * peak:
        yield warning("bf16", text, "look for a power cap, a busy device, or heat (nvidia-smi -q, rocm-smi)", **facts)
    elif peak is None and fast < plain:
        yield ok("bf16", text + ": float32 is faster on this processor, and `auto` takes it", **facts)
    else:
        yield ok("bf16", text, **facts)


def fp8() -> Iterator[Finding]:
    import torch

    from nanochat_model.errors import ConfigError
    from nanochat_model.fp8 import formats, scaled_matmul

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        pair = formats(device.type)
    except ConfigError:
        yield ok("fp8", "no fp8 units: recipes with fp8 do not run here")
        return
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    found = scaled_matmul(a.to(device, torch.bfloat16), b.to(device, torch.bfloat16), (pair[0], pair[0]), "tensorwise", fast=True)
    wrong = relative_error(found, a.double() @ b.double())
    name = str(pair[0]).removeprefix("torch.")
    if wrong > FP8_ERROR:
        yield error("fp8", f"a {name} product is off by {wrong:.1%} of the largest value", "train with fp8=off; suspect the build")
    else:
        yield ok("fp8", f"{name}, right to {wrong:.1%}", error=wrong, format=name)


def collectives() -> Iterator[Finding]:
    """All-reduce between the ranks of this machine: NCCL or RCCL between its GPUs, else Gloo between two processes."""
    import torch

    from nanoladder.collective_probe import measure_here

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backend, ranks = ("nccl", num_gpus) if num_gpus > 1 else ("gloo", 2)
    result = measure_here(backend, ranks)
    text = f"{backend}, {ranks} ranks on this machine: {result['bytes_per_second'] / 1e9:.2f} GB/s all-reduce of "
    text += f"{result['num_bytes'] / 1e6:.0f} MB, {result['seconds_small'] * 1e6:.0f} µs for 8 bytes"
    yield ok("collectives", text, backend=backend, ranks=ranks, **result)


def product_error(dtype: Any, device: Any) -> float:
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    return relative_error(a.to(device, dtype) @ b.to(device, dtype), a.double() @ b.double())


def relative_error(found: Any, expected: Any) -> float:
    """Largest difference over the largest expected value."""
    return float((found.double().cpu() - expected).abs().max() / expected.abs().max())
