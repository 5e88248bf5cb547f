"""Where a run stands: counted tokens, FLOPs and seconds, the curve so far, and what callbacks are told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from nanochat_model.callbacks import StepInfo
from nanochat_model.config import TrainConfig
from nanochat_model.counts import flops_per_token
from nanochat_model.distributed import Ranks
from nanochat_model.loop import Clock, SmoothLoss
from nanochat_model.record import Columns, CurvePoint, add_measurement
from nanochat_model.step_times import StepTimes

GIVE_UP_STEPS = 10  # consecutive non-finite steps after which a run has failed


@dataclass(kw_only=True)
class Progress:
    """Mutable state of one run; `as_loop_state` and `curve` go into each checkpoint."""

    config: TrainConfig
    clock: Clock
    num_devices: int = 1
    peak_flops: float | None = None  # of one device
    step: int = 0  # steps done
    steps_here: int = 0  # of them by this process
    curve: list[CurvePoint] = field(default_factory=list)
    smooth: SmoothLoss = field(default_factory=SmoothLoss)
    last_loss: float = math.nan
    skipped_steps: int = 0  # a value was not finite
    empty_steps: int = 0  # the batch had nothing to learn
    bad_streak: int = 0
    bad_since: int = 0  # step at which the current streak of non-finite values began
    bad_where: str = ""  # the layer it began in
    core: float | None = None
    times: StepTimes = field(default_factory=lambda: StepTimes(Ranks()))
    startup_seconds: dict[str, float] = field(default_factory=dict)  # until the first step of this process was done, by part
    diagnostics: Columns = field(default_factory=dict)
    _reported: tuple[int, float] = (0, 0.0)  # step and seconds of the previous report
    _timed_from: tuple[int, float] | None = None  # step and seconds after the first step of this process (compilation left out)

    def __post_init__(self) -> None:
        self.flops_per_token = flops_per_token(self.config.model)
        self._reported = (self.step, self.clock.seconds)

    @property
    def num_tokens(self) -> int:
        return self.step * self.config.batch_tokens

    @property
    def train_flops(self) -> float:
        return float(self.num_tokens * self.flops_per_token)

    @property
    def val_bpb(self) -> float | None:
        return self.curve[-1].val_bpb if self.curve and self.curve[-1].step == self.step else None

    def after_step(self, loss: float, *, skipped: bool, empty: bool = False) -> None:
        """`empty`: the batch had no target, so the loss before it stands and nothing is wrong."""
        self.step += 1
        self.steps_here += 1
        if not empty:
            self.last_loss = loss
        if empty:
            self.empty_steps += 1
        elif skipped:
            self.skipped_steps += 1
        else:
            self.smooth.add(loss)
            self.bad_streak = 0
        if self._timed_from is None:
            self._timed_from = (self.step, self.clock.seconds)
            self.startup_seconds["first_step"] = self.clock.seconds - self._reported[1]

    def mfu(self, tokens_per_second: float | None) -> float | None:
        """Fraction of the peak dense FLOP/s of all devices; None where the peak is unknown."""
        if self.peak_flops is None or tokens_per_second is None:
            return None
        return tokens_per_second * self.flops_per_token / (self.peak_flops * self.num_devices)

    @property
    def tokens_per_second(self) -> float | None:
        """Over this process's steps after its first one; None before there are two."""
        if self._timed_from is None or self.step <= self._timed_from[0]:
            return None
        step, seconds = self._timed_from
        return (self.step - step) * self.config.batch_tokens / max(self.clock.seconds - seconds, 1e-9)

    def point(self, val_bpb: float) -> CurvePoint:
        point = CurvePoint(
            step=self.step,
            num_tokens=self.num_tokens,
            train_flops=self.train_flops,
            seconds=self.clock.seconds,
            val_bpb=val_bpb,
            train_loss=self.smooth.value,
        )
        self.curve.append(point)
        return point

    def note_diagnostics(self, metrics: dict[str, float]) -> None:
        """Keep what was measured after the present step."""
        if metrics:
            add_measurement(self.diagnostics, self.step, metrics)

    def step_info(self, lr_multiplier: float, diagnostics: dict[str, float]) -> StepInfo:
        """What callbacks are told. Every rank must call it: the times of timed steps are gathered here."""
        step, seconds = self._reported
        now = self.clock.seconds
        rate = (self.step - step) * self.config.batch_tokens / max(now - seconds, 1e-9)
        self._reported = (self.step, now)
        self.times.gather()
        return StepInfo(
            step=self.step,
            num_steps=self.config.num_steps,
            num_tokens=self.num_tokens,
            train_flops=self.train_flops,
            seconds=now,
            train_loss=self.last_loss,
            smooth_train_loss=self.smooth.value if self.smooth.value is not None else math.nan,
            lr_multiplier=lr_multiplier,
            tokens_per_second=rate,
            mfu=self.mfu(rate),
            skipped_steps=self.skipped_steps,
            diagnostics=diagnostics,
            startup_seconds=dict(self.startup_seconds),
            step_seconds=self.times.mean,
            rank_compute_seconds=self.times.compute_by_rank,
        )

    def as_loop_state(self) -> dict[str, Any]:
        return {
            "smooth_total": self.smooth.total,
            "smooth_weight": self.smooth.weight,
            "skipped_steps": self.skipped_steps,
            "empty_steps": self.empty_steps,
            "bad_streak": self.bad_streak,
            "bad_since": self.bad_since,
            "bad_where": self.bad_where,
            "core": self.core,
            "diagnostics": self.diagnostics,
        }

    def restore(self, step: int, curve: tuple[CurvePoint, ...], loop: dict[str, Any]) -> None:
        """Continue after `step` steps. The clock is given at construction."""
        self.step = step
        self.curve = [p for p in curve if p.step <= step]
        self.smooth = SmoothLoss(total=loop.get("smooth_total", 0.0), weight=loop.get("smooth_weight", 0.0))
        self.skipped_steps = loop.get("skipped_steps", 0)
        self.empty_steps = loop.get("empty_steps", 0)
        self.bad_streak = loop.get("bad_streak", 0)
        self.bad_since = loop.get("bad_since", 0)
        self.bad_where = loop.get("bad_where", "")
        self.core = loop.get("core")
        self.diagnostics = loop.get("diagnostics", {})
        self._reported = (step, self.clock.seconds)
