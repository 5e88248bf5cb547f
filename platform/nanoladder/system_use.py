"""What a trial's process and its machine use: sampled between steps, every few seconds, and sent to MLflow.

Names are those of MLflow's own system metrics where it has one, so that they show on its "System metrics" tab. MLflow's sampler
itself would have every worker talk to the tracking server, which the driver alone does.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil

from nanochat_model.callbacks import Callback, StepInfo
from nanochat_model.config import TrainConfig

SAMPLE_SECONDS = 5.0  # a sample takes a fifth of a millisecond
MEGABYTE = 1e6


class SystemUse(Callback):
    """Sends {"event": "system", "step", "at_ms", "metrics"}; shorter trials than SAMPLE_SECONDS send nothing."""

    def __init__(self, send: Callable[[dict[str, Any]], None], *, seconds: float = SAMPLE_SECONDS) -> None:
        self._send, self._seconds = send, seconds
        self._process = psutil.Process()
        self._next = 0.0

    def on_start(self, config: TrainConfig, start_step: int) -> None:
        psutil.cpu_percent()  # percentages are of the time since the call before
        self._process.cpu_percent()
        self._next = time.monotonic() + self._seconds

    def on_step(self, info: StepInfo) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._seconds
            metrics = {**self._cpu(), **gpu_use()}
            self._send({"event": "system", "step": info.step, "at_ms": round(time.time() * 1000), "metrics": metrics})

    def _cpu(self) -> dict[str, float]:
        memory = psutil.virtual_memory()
        return {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
            "system/process_cpu_percentage": self._process.cpu_percent(),  # 100: one core
            "system/process_memory_usage_megabytes": self._process.memory_info().rss / MEGABYTE,
        }


def gpu_use() -> dict[str, float]:
    """Memory of this process's GPU, all its users together, and its utilization where the driver's Python package is there
    (nvidia-ml-py, amdsmi); nothing without a GPU."""
    torch = sys.modules.get("torch")  # what has not imported it uses no GPU
    if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return {}
    device = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(device)
    found = {
        f"system/gpu_{device}_memory_usage_megabytes": (total - free) / MEGABYTE,
        f"system/gpu_{device}_memory_usage_percentage": 100 * (total - free) / total,
    }
    with contextlib.suppress(ImportError, RuntimeError):
        found[f"system/gpu_{device}_utilization_percentage"] = float(torch.cuda.utilization(device))
    return found
