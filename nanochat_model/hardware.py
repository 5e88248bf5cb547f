"""Peak rates and memory of accelerators, for MFU and planning. A table without torch.

Dense rates of the vendors' data sheets (no sparsity): NVIDIA H100/H200 SXM, A100 SXM and B200; AMD Instinct MI300X and
MI325X. What a card reaches in practice is lower: an 8192³ bf16 product ran at 788 TFLOP/s on an H200, and many GEMM shapes
reach about 45% of the data sheet on an MI300X. The denominator is part of an MFU: print it beside the number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nanochat_model.errors import ConfigError

TERA = 1e12
GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """One accelerator: dense FLOP/s by precision, bytes of memory."""

    name: str
    bf16_flops: float
    fp8_flops: float | None
    memory_bytes: float

    def peak_flops(self, precision: str = "bf16") -> float:
        """Dense FLOP/s; raises ConfigError where this card has no units for `precision` (bf16 or fp8)."""
        if precision == "fp8":
            if self.fp8_flops is None:
                raise ConfigError(f"device {self.name} has no fp8 units; use bf16")
            return self.fp8_flops
        return self.bf16_flops


def _spec(name: str, bf16: float, fp8: float | None, memory_gb: float) -> DeviceSpec:
    return DeviceSpec(
        name=name,
        bf16_flops=bf16 * TERA,
        fp8_flops=fp8 * TERA if fp8 else None,
        memory_bytes=memory_gb * GIGA,
    )


DEVICES: tuple[DeviceSpec, ...] = (
    _spec("H100", 989, 1979, 80),
    _spec("H200", 989, 1979, 141),
    _spec("MI300X", 1307.4, 2614.9, 192),
    _spec("MI325X", 1307.4, 2614.9, 256),
    _spec("A100-40GB", 312, None, 40),
    _spec("A100-80GB", 312, None, 80),
    _spec("B200", 2250, 4500, 180),
)
_OTHER_CARDS = re.compile(r"pcie|nvl|gh200|gb200|mi300a", re.IGNORECASE)  # same letters, other peaks: not in the table


def find_device(name: str) -> DeviceSpec | None:
    """The spec of a device by its marketing name ("NVIDIA H100 80GB HBM3", "AMD Instinct MI300X OAM", "mi300x").

    None for what the table does not hold (CPUs, PCIe and NVL variants): its peak is unknown and must be printed as such.
    """
    if _OTHER_CARDS.search(name):
        return None
    text = re.sub(r"[\s_-]", "", name).upper()
    if "A100" in text:
        return next(d for d in DEVICES if d.name == ("A100-40GB" if "40GB" in text else "A100-80GB"))
    return next((d for d in DEVICES if d.name in text), None)


def require_device(name: str) -> DeviceSpec:
    """As `find_device`, but an unknown name is a ConfigError that lists the known ones."""
    spec = find_device(name)
    if spec is None:
        known = ", ".join(d.name.lower() for d in DEVICES)
        raise ConfigError(
            f"device {name!r} is not in the table of peaks ({known}); choose one of these, or give --tokens-per-second"
        )
    return spec


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 matrix instructions (AVX512-BF16, AMX-BF16 or Arm's), which make bf16 products 4–6 times as fast
    as float32 ones. By its flags, so that the answer is the same on each call; False where they cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf8")
    except OSError:
        return False
    line = next((x for x in text.splitlines() if x.startswith(("flags", "Features"))), "")
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(line.split())
