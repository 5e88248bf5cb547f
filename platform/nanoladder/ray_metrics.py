"""What a trial does, as Ray metrics: on the dashboard, in Grafana, or wherever Prometheus is asked.

Ray exports them from every node as `ray_nanoladder_…`; docs/cluster.md says how to look at them.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from pathlib import Path
from typing import Any

from nanochat_model.callbacks import Callback, StepInfo
from nanochat_model.record import CurvePoint, RunRecord

TAGS = ("sweep", "stage", "trial", "rank")
GAUGES = {
    "nanoladder_tokens_per_second": "Training tokens a second, of all ranks of a trial",
    "nanoladder_mfu": "Share of the devices' peak FLOP/s that a trial uses",
    "nanoladder_train_loss": "Smoothed training loss, nats a token",
    "nanoladder_val_bpb": "Validation loss, bits a byte",
    "nanoladder_progress": "Share of a trial's steps that are done",
    "nanoladder_memory_bytes": "Peak device memory of a rank; of a CPU rank what its process holds now",
}


@functools.cache
def _gauges() -> dict[str, Any]:
    """Made once a process: Ray refuses twins."""
    from ray.util.metrics import Gauge

    return {name: Gauge(name, description=text, tag_keys=TAGS) for name, text in GAUGES.items()}


class RayMetrics(Callback):
    """Sets the gauges of one trial; rank 0 those of the trial, every rank its own memory."""

    def __init__(self, *, sweep: str, stage: str, trial: str) -> None:
        self._names = {"sweep": plain(sweep) or "none", "stage": plain(stage) or "none", "trial": plain(trial)}
        self._rank: int | None = None

    def on_step(self, info: StepInfo) -> None:
        self._set("nanoladder_memory_bytes", memory_bytes(), every_rank=True)
        self._set("nanoladder_tokens_per_second", info.tokens_per_second)
        self._set("nanoladder_mfu", info.mfu)
        self._set("nanoladder_train_loss", info.smooth_train_loss)
        self._set("nanoladder_progress", info.step / max(1, info.num_steps))

    def on_eval(self, point: CurvePoint) -> None:
        self._set("nanoladder_val_bpb", point.val_bpb)

    def on_end(self, record: RunRecord) -> None:
        """A gauge keeps its last value: what is a rate or a holding ends with the trial."""
        self._set("nanoladder_tokens_per_second", 0.0)
        self._set("nanoladder_memory_bytes", 0.0, every_rank=True)

    def _set(self, name: str, value: float | None, *, every_rank: bool = False) -> None:
        if self._rank is None:
            self._rank = own_rank()
        if value is not None and math.isfinite(value) and (every_rank or self._rank == 0):
            _gauges()[name].set(float(value), tags={**self._names, "rank": str(self._rank)})


def plain(name: str) -> str:
    """Ray's tags are ASCII."""
    return name.replace(" · ", " | ").encode("ascii", "replace").decode("ascii")


def own_rank() -> int:
    """This process's rank; 0 in one that trains without torch, whose import takes seconds."""
    if "torch" not in sys.modules:
        return 0
    from nanochat_model.distributed import current_ranks

    return current_ranks().rank


def memory_bytes() -> float:
    """Peak bytes of this process on its GPU; without one, what it holds now (NaN where the system does not say)."""
    torch = sys.modules.get("torch")  # what has not imported it holds no memory of a GPU
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated())
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return math.nan
    return float(pages * os.sysconf("SC_PAGE_SIZE"))
