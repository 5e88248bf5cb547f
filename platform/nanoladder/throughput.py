"""Tokens per second and hours of a run on a device: from recorded runs where there are any, else from a stated assumption.

Also the arithmetic that exposes the usual mistakes: 2N taken for 6N, the peak of another card, an MFU above 100%.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from nanochat_model.config import GPTConfig
from nanochat_model.counts import count_params, flops_per_token
from nanochat_model.errors import ConfigError
from nanochat_model.hardware import DEVICES, TERA, DeviceSpec, find_device
from nanochat_model.record import RunRecord
from nanoladder.target import DEVICES_PER_NODE

SECONDS_PER_HOUR = 3600.0
# nanochat on 8×H100, bf16: 41% at d12, 46% at d18, 50% at d24 (its log, January to March 2026). N of matrices + lm_head.
H100_MFU = ((110_100_912, 0.41), (324_404_172, 0.46), (729_810_624, 0.50))
AMD_MFU = 0.275  # nanochat d24 on one MI300X with SDPA: 68k tokens/s
CPU_FLOPS_PER_SECOND = 1e11  # two ordinary server cores in bf16; machines differ by 5 times
NEAREST_RUNS = 5
_CPU_NAME = re.compile(r"\(\d+ of \d+ threads\)$")  # how records name a CPU (nanochat_model.device.device_name)


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Speed of one run over all its devices."""

    tokens_per_second: float
    flops_per_second: float
    mfu: float | None  # null: the device's peak is unknown
    peak_flops_per_device: float | None
    source: str
    measured: bool
    includes_network: bool = False  # measured over several nodes: averaging gradients between them is in it

    @property
    def usual_mfu(self) -> float:
        """What a run on these devices may be held against (RuntimeConfig.usual_mfu): a measured MFU, else 0 for none known."""
        return self.mfu if self.measured and self.mfu is not None else 0.0

    def hours(self, num_tokens: float) -> float:
        return num_tokens / self.tokens_per_second / SECONDS_PER_HOUR


def mfu_of(
    model: GPTConfig,
    tokens_per_second: float,
    device: DeviceSpec,
    *,
    num_devices: int = 1,
    precision: str = "bf16",
    windows: Sequence[int] | None = None,
) -> float:
    """Model FLOPs utilization. Above 100% it is a ConfigError that names the mistakes which give such a number."""
    rate = tokens_per_second * flops_per_token(model, windows)
    peak = device.peak_flops(precision)
    mfu = rate / (peak * num_devices)
    if mfu > 1:
        fits = [d.name for d in DEVICES if d.peak_flops(precision if d.fp8_flops else "bf16") * num_devices >= rate]
        causes = f"tokens/s of all devices counted as one's (num_devices {num_devices}), a wrong device"
        causes += f" (a {fits[0]} could do it)" if fits else ""
        raise ConfigError(
            f"MFU {mfu:.0%} is over 100%: {rate / 1e12:.0f} TFLOP/s on {num_devices} × {device.name} of "
            f"{peak / 1e12:.0f} TFLOP/s; likely causes: {causes}, or warm-up left in the clock"
        )
    return mfu


def flops_mistake(model: GPTConfig, claimed_flops_per_token: float) -> str | None:
    """The name of a well-known miscount that `claimed_flops_per_token` equals within 3%, else None."""
    counts = count_params(model)
    right = flops_per_token(model)
    known = {
        "2N (forward pass only; training costs 6N, forward and backward)": 2.0 * counts.scaling,
        "6 × all parameters (embedding look-ups cost no FLOPs)": 6.0 * counts.total,
        "2 × all parameters (forward pass only, and look-ups counted)": 2.0 * counts.total,
        "6N without attention": 6.0 * counts.scaling,
    }
    if abs(claimed_flops_per_token / right - 1) < 0.03:
        return None
    return next((name for name, value in known.items() if abs(claimed_flops_per_token / value - 1) < 0.03), None)


def mfu_mistake(
    model: GPTConfig, claimed_mfu: float, tokens_per_second: float, device: DeviceSpec, *, num_devices: int = 1
) -> str | None:
    """Which well-known mistake turns this speed into `claimed_mfu` (a share), within 3%; None where the claim is right."""
    rate = tokens_per_second * flops_per_token(model)
    right = rate / (device.bf16_flops * num_devices)
    counts = count_params(model)
    if abs(claimed_mfu / right - 1) < 0.03:
        return None
    known = {
        f"divided by the peak of a {d.name}, {d.bf16_flops / TERA:g} TFLOP/s": rate / (d.bf16_flops * num_devices) for d in DEVICES
    }
    known |= {
        "2N taken for 6N (the forward pass only)": right * 2 * counts.scaling / flops_per_token(model),
        "6 × all parameters (look-ups cost no FLOPs)": right * 6 * counts.total / flops_per_token(model),
        "the sparse peak, twice the dense one": right / 2,
        "divided by one device's peak": right * num_devices,
    }
    name = next((n for n, value in known.items() if abs(claimed_mfu / value - 1) < 0.03), "no mistake known here")
    peak = f"{num_devices} × {device.name} at {device.bf16_flops / TERA:g} TFLOP/s"
    return f"MFU {claimed_mfu:.1%} is {name}; it is {right:.1%} of {peak}"


def estimate_throughput(
    model: GPTConfig,
    device: str,
    *,
    num_devices: int = 1,
    records: Sequence[RunRecord] = (),
    mfu: float | None = None,
    tokens_per_second: float | None = None,
    precision: str = "bf16",
    devices_per_node: int = DEVICES_PER_NODE,
) -> Throughput:
    """Speed of `model` on `num_devices` of `device`: given, else from recorded runs there, else assumed.

    Recorded runs: the median rate of the five pretraining runs whose N is nearest, of those that spanned nodes as this one
    does if there are any (more devices than `devices_per_node`; records do not name nodes). Raises ConfigError on a share
    outside 0..1, and on a given speed that would need an MFU above 100%.
    """
    per_token = flops_per_token(model)
    spec = find_device(device)
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError(f"mfu {mfu} must lie in 0..1 (a share, not percent): the peak of a card bounds what it can do")
    if tokens_per_second is not None:
        given = mfu_of(model, tokens_per_second, spec, num_devices=num_devices, precision=precision) if spec else None
        rate = tokens_per_second * per_token
        speed = _throughput(rate, per_token, spec, num_devices, precision, "given tokens/s", True, given)
        return replace(speed, includes_network=True)
    if mfu is not None:
        if spec is None:
            raise ConfigError(f"mfu {mfu} needs a known peak, {device!r} has none; give --tokens-per-second")
        rate = mfu * spec.peak_flops(precision) * num_devices
        return _throughput(rate, per_token, spec, num_devices, precision, f"given MFU {mfu:.0%}", False, mfu)
    wanted = num_devices > devices_per_node
    for several in (wanted, not wanted):
        recorded = _recorded_rate(model, device, [r for r in records if (r.num_devices > devices_per_node) == several])
        if recorded is not None:
            rate, n = recorded
            nodes = ", over several nodes, network included" if several else ""
            source = f"measured: median of the {n} recorded runs on {device} nearest in size{nodes}"
            speed = _throughput(rate * num_devices, per_token, spec, num_devices, precision, source, True)
            return replace(speed, includes_network=several)
    if spec is None:
        source = f"assumed: {CPU_FLOPS_PER_SECOND / 1e9:.0f} GFLOP/s; no recorded run on {device!r}"
        return _throughput(CPU_FLOPS_PER_SECOND * num_devices, per_token, None, num_devices, precision, source, False)
    share, why = _assumed_mfu(model, spec)
    return _throughput(share * spec.bf16_flops * num_devices, per_token, spec, num_devices, precision, why, False)


def _throughput(
    rate: float,
    per_token: int,
    spec: DeviceSpec | None,
    num_devices: int,
    precision: str,
    source: str,
    measured: bool,
    mfu: float | None = None,
) -> Throughput:
    peak = spec.peak_flops(precision) if spec else None
    if mfu is None and peak:
        mfu = rate / (peak * num_devices)
    return Throughput(
        tokens_per_second=rate / per_token,
        flops_per_second=rate,
        mfu=mfu,
        peak_flops_per_device=peak,
        source=source,
        measured=measured,
    )


def _recorded_rate(model: GPTConfig, device: str, records: Sequence[RunRecord]) -> tuple[float, int] | None:
    """FLOP/s per device of the recorded runs on this device nearest in N, and how many they are."""
    rates = sorted(r.train_flops / r.train_seconds / r.num_devices for r in nearest_runs(model, device, records))
    return (rates[len(rates) // 2], len(rates)) if rates else None


def nearest_runs(model: GPTConfig, device: str, records: Sequence[RunRecord]) -> list[RunRecord]:
    """The complete pretraining runs on `device` whose N is nearest to the model's, at most NEAREST_RUNS. A fine-tuning pads its
    rows and masks its targets: its seconds are no pretraining's."""
    n, spec = count_params(model).scaling, find_device(device)
    done = [r for r in records if r.kind == "base" and r.status == "complete" and r.train_seconds > 0]
    same = [r for r in done if _same_device(r.device, device, spec)]
    return sorted(same, key=lambda r: abs(math.log(r.params["scaling"] / n)))[:NEAREST_RUNS]


def _same_device(recorded: str, wanted: str, spec: DeviceSpec | None) -> bool:
    if spec is not None:
        return find_device(recorded) == spec
    return recorded == wanted or (wanted == "cpu" and _CPU_NAME.search(recorded) is not None)


def _assumed_mfu(model: GPTConfig, spec: DeviceSpec) -> tuple[float, str]:
    if spec.name.startswith("MI3"):
        return AMD_MFU, f"assumed: MFU {AMD_MFU:.1%}, as nanochat's d24 reached on an MI300X with SDPA"
    x = math.log(count_params(model).scaling)
    points = [(math.log(n), share) for n, share in H100_MFU]
    if x <= points[0][0]:
        share = points[0][1]
    elif x >= points[-1][0]:
        share = points[-1][1]
    else:
        (x0, y0), (x1, y1) = next(p for p in pairwise(points) if x <= p[1][0])
        share = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return share, f"assumed: MFU {share:.0%}, between nanochat's 41% (d12) and 50% (d24) on 8×H100"


def all_reduce_seconds(num_bytes: float, *, num_nodes: int, bandwidth_bytes: float) -> float:
    """Time of one ring all-reduce between nodes: 2(n − 1)/n passes over the slowest link. None of it overlapped."""
    return 2 * (num_nodes - 1) / num_nodes * num_bytes / bandwidth_bytes if num_nodes > 1 else 0.0
