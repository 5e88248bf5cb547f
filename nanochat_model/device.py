"""Which device, how fast it can be, and how a process should be set up for it."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from nanochat_model.config import GPTConfig, TrainConfig
from nanochat_model.counts import flops_per_token
from nanochat_model.errors import ConfigError
from nanochat_model.hardware import find_device
from nanochat_model.native import native_status

# glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
CPU_MICRO_BATCH_TOKENS = 4096  # best on CPUs: activations of a micro-batch stay near the caches
CONTEXT_BYTES = 6e8  # what a process holds of a GPU before its first tensor: an assumption, 0.4–0.6 GB are reported
RECOMPILE_LIMIT = 128  # of all models of a process together, where torch knows no other way
COMPILE_FLOPS = 2e13  # a run on a CPU shorter than this spends more time compiling than it would gain


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The torch device of "auto", "cpu", "cuda" (this rank's) or "cuda:1". ROCm answers to "cuda". Raises ConfigError.

    A GPU becomes the process's current one: what is made on plain "cuda" must not land on, and take memory of, another.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number or "0").isdigit():
        raise ConfigError(f"runtime.device {name!r} is not known; choose auto, cpu, cuda or cuda:<index>")
    if not torch.cuda.is_available():
        raise ConfigError(f"runtime.device {name!r}, but torch sees no GPU; install a CUDA or ROCm build of torch, or use cpu")
    index = int(number) if number else local_rank
    if index >= torch.cuda.device_count():
        raise ConfigError(f"runtime.device {name!r} (index {index}), but torch sees {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def compile_fixed(function: Callable[..., Any], *, fullgraph: bool = False) -> Callable[..., Any]:
    """torch.compile for a function whose shapes stay what they are.

    Counts recompilations for itself: the entries of all models that a process has trained otherwise share one limit (8), past
    which torch goes on uncompiled, or under `fullgraph` raises. Before torch 2.13 that limit is raised instead.
    """
    if torch.__version__ >= "2.13":  # compared as versions
        with_limit_of_its_own: Any = torch.compile  # whose overloads do not name the option
        return with_limit_of_its_own(function, dynamic=False, fullgraph=fullgraph, isolate_recompiles=True)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(function, dynamic=False, fullgraph=fullgraph)


def tune_process(num_threads: int = 0) -> None:
    """Settings that pay on every CPU run; call once at process start, harmless again. `num_threads` 0 keeps torch's choice.

    glibc returns large buffers to the kernel at free and faults them in again at the next malloc; keeping them is worth 1.2×
    (compiled) to 1.6× (eager) in training on a CPU. Nothing happens where the C library is another.
    """
    if num_threads > 0:
        torch.set_num_threads(num_threads)
    _keep_freed_memory()


@functools.cache
def _keep_freed_memory() -> bool:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20))
    results = [mallopt(option, value) for option, value in settings]
    return all(r == 1 for r in results)


@functools.cache
def bf16_is_fast(device_type: str = "cpu") -> bool:
    """Whether bf16 products beat float32 ones here: GPUs from Ampere and CDNA on; CPUs by a measurement of some ms."""
    if device_type == "cuda":
        return bool(torch.version.hip) or torch.cuda.get_device_capability() >= (8, 0)
    return matmul_flops(torch.bfloat16, size=384, repeats=3) > 1.3 * matmul_flops(torch.float32, size=384, repeats=3)


def matmul_flops(dtype: torch.dtype, *, size: int = 1024, repeats: int = 5, device: torch.device | None = None) -> float:
    """FLOP/s of a square product on this device, best of `repeats`: a measured peak."""
    device = device or torch.device("cpu")
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def device_name(device: torch.device) -> str:
    """Marketing name of the device: what records carry."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf8") as f:
            model = next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} ({torch.get_num_threads()} of {os.cpu_count()} threads)"


def peak_flops(device: torch.device, precision: str = "bf16") -> float | None:
    """Dense FLOP/s by the vendor's data sheet, None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    spec = find_device(torch.cuda.get_device_name(device))
    return spec.peak_flops(precision) if spec else None


def model_flops_utilization(flops: float, tokens_per_second: float, peak: float | None, num_devices: int = 1) -> float | None:
    """MFU as a share: FLOPs a token × tokens/s / (peak × devices); None for an unknown peak.

    Raises ConfigError above 1: then the peak belongs to another device, or the FLOPs are miscounted.
    """
    if peak is None:
        return None
    share = flops * tokens_per_second / (peak * num_devices)
    if share > 1.0:
        raise ConfigError(
            f"MFU {share:.0%} of a peak of {peak / 1e12:.1f} TFLOP/s × {num_devices} is impossible; the peak is not this device's"
        )
    return share


def memory_bytes(device: torch.device) -> float | None:
    """The accelerator's memory; None for a CPU, whose memory is everybody's."""
    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def limit_memory(device: torch.device, share: float) -> None:
    """Let this process take no more than `share` of an accelerator that several trials use: past it torch says out of memory
    here, instead of in whichever trial comes next. Its peak is counted from now on. Raises ConfigError outside 0..1."""
    if not 0 < share <= 1:
        raise ConfigError(f"runtime.memory_share {share} must lie above 0 and at most 1")
    if device.type == "cuda":
        context = CONTEXT_BYTES / torch.cuda.get_device_properties(device).total_memory if share < 1 else 0.0
        torch.cuda.set_per_process_memory_fraction(max(share - context, 0.01), device)
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float | None:
    """Bytes that torch has held at most since `limit_memory`; None for a CPU."""
    return float(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else None


def default_micro_batch_rows(model: GPTConfig, device: torch.device) -> int:
    """Rows of a forward pass that suit the device."""
    if device.type == "cpu":
        return max(1, CPU_MICRO_BATCH_TOKENS // model.sequence_len)
    return max(1, 65536 // model.sequence_len)


def use_compile(choice: str, device: torch.device, config: TrainConfig) -> bool:
    """Whether to compile the training path: always on a GPU; on a CPU only where the C kernels are missing (they are faster than
    compiled PyTorch, see docs/training.md) and the run is long enough to win back the time. The same for a resumed run."""
    if choice in ("on", "off"):
        return choice == "on"
    if device.type != "cpu":
        return True
    return native_status() != "native" and flops_per_token(config.model) * config.num_tokens > COMPILE_FLOPS
