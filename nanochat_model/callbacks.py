"""The seam through which trackers, tuners and tests enter the training loop. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_model.config import TrainConfig
from nanochat_model.record import CurvePoint, RunRecord


class StopTraining(Exception):
    """Raised by a callback to end a run early; its record then has the status "stopped" and this reason as `error`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What the loop knows after a step. The loss is that of the global batch, so every rank gets the same."""

    step: int  # steps done, so 1 after the first
    num_steps: int
    num_tokens: int
    train_flops: float
    seconds: float  # of training so far, evaluation and saving left out
    train_loss: float  # nats a token, mean over this step's global batch; of a skipped step as it came out, perhaps not finite
    smooth_train_loss: float  # debiased exponential average, factor 0.9 a step
    lr_multiplier: float
    tokens_per_second: float  # since the previous report
    mfu: float | None  # fraction of the named peak; None where the peak is unknown
    skipped_steps: int = 0  # so far, because of non-finite values
    diagnostics: dict[str, float] = field(default_factory=dict)  # filled every diagnostics_every_steps
    startup_seconds: dict[str, float] = field(default_factory=dict)  # as in RunRecord, and the next two as well
    step_seconds: dict[str, float] = field(default_factory=dict)
    rank_compute_seconds: tuple[float, ...] = ()


class Callback:
    """All methods do nothing; override what is needed. Called on every rank, outside the timed part of the step.

    Any of them may raise StopTraining; every rank then stops at the same step. Other exceptions fail the run.
    """

    def on_start(self, config: TrainConfig, start_step: int) -> None:
        """Before the first step; `start_step` > 0 when the run resumes or decays from a trunk."""

    def on_step(self, info: StepInfo) -> None:
        """Every `runtime.log_every_steps` steps and after the last."""

    def on_eval(self, point: CurvePoint) -> None:
        """After each evaluation of the validation set."""

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Further numbers now and then: CORE and its tasks."""

    def on_sample(self, step: int, texts: Sequence[str]) -> None:
        """Sampled continuations (`runtime.sample_every_steps`); rank 0 only."""

    def on_checkpoint(self, path: Path, step: int) -> None:
        """After a checkpoint is complete on disk."""

    def on_end(self, record: RunRecord) -> None:
        """After the record is written, whatever its status."""


class Callbacks:
    """Calls each callback in order. A StopTraining is noted in `stop_reason` and raised by nobody: the loop agrees on it
    with the other ranks first."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = tuple(callbacks)
        self.stop_reason: str | None = None

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def call(self, method: str, *args: Any) -> None:
        for callback in self._callbacks:
            try:
                getattr(callback, method)(*args)
            except StopTraining as stop:
                self.stop_reason = self.stop_reason or stop.reason or "a callback stopped the run"
