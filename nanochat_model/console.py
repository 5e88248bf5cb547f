"""What a pretraining run from the shell says: lines of progress, what a config means, and the result as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanochat_model.callbacks import Callback, StepInfo
from nanochat_model.config import RuntimeConfig, TrainConfig
from nanochat_model.counts import count_params, flops_per_token
from nanochat_model.identity import run_id
from nanochat_model.recipe import erasing_decay
from nanochat_model.record import CurvePoint, RunRecord
from nanochat_model.step_shares import describe_startup, describe_times

Tell = Callable[[str], object]  # takes a line


class Console(Callback):
    """One line a report, by `tell`."""

    def __init__(self, tell: Tell, config: TrainConfig, runtime: RuntimeConfig, num_devices: int, peak_flops: float | None) -> None:
        self._tell = tell
        self._runtime = runtime
        self._num_devices = num_devices
        self._peak = "peak unknown" if peak_flops is None else f"{peak_flops / 1e12:.0f} TFLOP/s peak"
        self._batch_tokens = config.batch_tokens
        self._startup: dict[str, float] = {}
        self._times: dict[str, float] = {}

    def on_step(self, info: StepInfo) -> None:
        if info.startup_seconds != self._startup:
            self._startup = info.startup_seconds
            self._tell(describe_startup(info.startup_seconds))
        left = (info.num_steps - info.step) * self._batch_tokens / max(info.tokens_per_second, 1e-9)
        parts = [
            f"step {info.step}/{info.num_steps} ({100 * info.step / info.num_steps:.1f}%)",
            f"loss {info.smooth_train_loss:.4f}",
            f"lr ×{info.lr_multiplier:.3f}",
            f"{info.tokens_per_second:,.0f} tok/s",
            "mfu unknown" if info.mfu is None else f"mfu {info.mfu:.1%} of {self._peak}",
            f"{info.seconds / 60:.1f} min, {left / 60:.1f} left",
        ]
        if self._runtime.price_per_device_hour:
            parts.append(f"${info.seconds / 3600 * self._runtime.price_per_device_hour * self._num_devices:.2f}")
        if info.skipped_steps:
            parts.append(f"{info.skipped_steps} steps skipped")
        self._tell(" | ".join(parts))
        if _moved(self._times, info.step_seconds):
            self._times = info.step_seconds
            self._tell(f"  a step: {describe_times(info.step_seconds, info.rank_compute_seconds)}")
        for line in describe_diagnostics(info.diagnostics):
            self._tell(line)

    def on_eval(self, point: CurvePoint) -> None:
        self._tell(f"step {point.step}: validation {point.val_bpb:.6f} bits per byte")

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self._tell(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    def on_sample(self, step: int, texts: Sequence[str]) -> None:
        for text in texts:
            self._tell(f"step {step} sample: {text!r}")

    def on_checkpoint(self, path: Path, step: int) -> None:
        self._tell(f"step {step}: saved {path}")


def _moved(told: Mapping[str, float], seconds: Mapping[str, float]) -> bool:
    """Whether any part's share of a step is over 5 points from what was told."""
    before, now = sum(told.values()), sum(seconds.values())
    return now > 0 and (not before or any(abs(told[part] / before - s / now) > 0.05 for part, s in seconds.items()))


def describe_diagnostics(metrics: Mapping[str, float]) -> list[str]:
    """The range of each kind of diagnostic over layers, a line each."""
    lines: list[str] = []
    kinds: dict[str, list[tuple[float, str]]] = {}
    for key, value in metrics.items():
        kind, _, where = key.partition("/")
        if math.isfinite(value):
            kinds.setdefault(kind, []).append((value, where))
    for kind, values in kinds.items():
        (low, at_low), (high, at_high) = min(values), max(values)
        lines.append(f"  {kind}: {low:.3g} {at_low} … {high:.3g} {at_high}" if len(values) > 1 else f"  {kind}: {low:.3g}")
    return lines


def describe(config: TrainConfig) -> str:
    """What a config means, in a few lines, and what is wrong with it."""
    counts, per_token, problem = count_params(config.model), flops_per_token(config.model), erasing_decay(config)
    return "\n".join(
        [
            f"run {run_id(config)}: depth {config.model.depth}, width {config.model.model_dim}, {counts.total:,} parameters, "
            f"{counts.scaling:,} of them scaling parameters",
            f"{config.num_tokens:,} tokens in {config.num_steps:,} steps of {config.batch_tokens:,} "
            f"({config.num_tokens / counts.scaling:.1f} a scaling parameter), {config.num_tokens * per_token:.3g} FLOPs",
            f"matrix_lr {config.optimizer.matrix_lr:.4g}, weight_decay {config.optimizer.weight_decay:.4g}, {config.compute_dtype}",
            *([f"warning: {problem}"] if problem else []),
        ]
    )


def summary(record: RunRecord, run_dir: Path) -> dict[str, Any]:
    """A record without its config, curve and diagnostics, which are in the run's folder, and where its newest checkpoint lies."""
    from nanochat_model.checkpoint import CHECKPOINTS_DIR, all_checkpoints

    newest = next(all_checkpoints(run_dir / CHECKPOINTS_DIR), None)
    left_out = ("config", "curve", "diagnostics")
    facts = {k: v for k, v in asdict(record).items() if k not in left_out}
    return {**facts, "run_dir": str(run_dir), "checkpoint": None if newest is None else str(newest)}
