"""What a trial takes, before Ray is asked for anything: seconds, backend, resources, checkpoints. Rules only.

The driver that runs a sweep, `--dry-run` and `nanoladder simulate` all decide by these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from nanochat_model.config import RuntimeConfig
from nanochat_model.record import RunRecord
from nanoladder.cells import Trial
from nanoladder.sweep import Sweep
from nanoladder.throughput import Throughput, estimate_throughput

ACTOR_SECONDS = 600.0  # longer trials go through Ray Train: its start-up of 15 s no longer counts, its recovery does
CHECKPOINT_SECONDS = 120.0  # shorter trials write no checkpoints: training them again costs less
CHECKPOINT_EVERY_SECONDS = 300.0


def trial_speed(sweep: Sweep, trial: Trial, device: str, records: Sequence[RunRecord], mfu: float | None = None) -> Throughput:
    """Speed of a trial on its devices, alone on them: by a given MFU, else from recorded runs there, else assumed."""
    return estimate_throughput(trial.config.model, device, num_devices=sweep.devices_per_trial, records=records, mfu=mfu)


def trial_seconds(sweep: Sweep, trial: Trial, speed: Throughput) -> float:
    """Seconds of training; trials that share a device share its speed."""
    return trial.config.num_tokens / speed.tokens_per_second * sweep.trials_per_device


def worker_resources(sweep: Sweep, *, uses_gpu: bool) -> dict[str, float]:
    """What each of a trial's `devices_per_trial` workers asks of Ray."""
    gpu = {"GPU": 1.0 / sweep.trials_per_device} if uses_gpu else {}
    return {"CPU": float(sweep.threads_per_trial), **gpu}


def total_need(per_worker: Mapping[str, float], num_workers: int) -> dict[str, float]:
    return {k: v * num_workers for k, v in per_worker.items()}


def choose_backend(sweep: Sweep, seconds: float) -> Literal["actor", "train"]:
    if sweep.backend != "auto":
        return sweep.backend
    return "actor" if sweep.devices_per_trial == 1 and seconds < ACTOR_SECONDS else "train"


def with_checkpoints(sweep: Sweep, runtime: RuntimeConfig, seconds: float) -> RuntimeConfig:
    """When a trial of so many seconds saves: as asked, else never for short ones and every five minutes for the others."""
    asked = runtime.keep_last == 0 or runtime.keep_steps or runtime.checkpoint_every_steps or runtime.checkpoint_every_seconds
    if asked or sweep.keep_checkpoints:
        return runtime
    if seconds < CHECKPOINT_SECONDS:
        return replace(runtime, keep_last=0)
    return replace(runtime, keep_last=1, checkpoint_every_seconds=CHECKPOINT_EVERY_SECONDS)
