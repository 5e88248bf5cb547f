"""One optimizer step at a time: micro-batches, their weighting, and the agreement of all ranks on what came out.

B rows, T positions. Used by pretraining and by supervised fine-tuning.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nanochat_model.distributed import Ranks
from nanochat_model.native.products import weights_stay

EMA_FACTOR = 0.9  # of the smoothed training loss, a step (nanochat base_train)
COLLECT_EVERY_STEPS = 5000  # the garbage collector is off between: its pauses cost up to 500 ms (nanochat's log)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This rank's rows of one global batch, on the host, and the number of targets other than -1 in the whole of it."""

    inputs: np.ndarray  # (B, T) int64
    targets: np.ndarray  # (B, T) int64, -1 where there is nothing to learn
    num_targets: int


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """The schedules at one step."""

    lr: float
    momentum: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """The same on every rank."""

    loss: float  # nats a token over the global batch; nan or inf where it overflowed
    skipped: bool  # nothing was updated: some rank's loss or gradient was not finite
    blamed: bool  # skipped, and not just because the fp16 loss scale was too high
    empty: bool = False  # skipped, because the batch has nothing to learn: there is no loss


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16: halved when gradients overflow, doubled after 2000 good steps (as torch.amp.GradScaler)."""

    value: float = 1.0
    dynamic: bool = False
    good_steps: int = 0
    growth_interval: int = 2000

    @classmethod
    def for_dtype(cls, compute_dtype: str) -> LossScale:
        return cls(value=2.0**16, dynamic=True) if compute_dtype == "float16" else cls()

    def as_dict(self) -> dict[str, float]:
        return {"loss_scale": self.value, "loss_scale_good_steps": self.good_steps}

    def restore(self, loop: Mapping[str, Any]) -> None:
        self.value = float(loop.get("loss_scale", self.value))
        self.good_steps = int(loop.get("loss_scale_good_steps", 0))

    def update(self, *, overflow: bool) -> None:
        if not self.dynamic:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps == self.growth_interval:
            self.value, self.good_steps = min(self.value * 2, 2.0**24), 0


class Stepper:
    """Runs forward, backward and the optimizer on global batches. The model's weights are fp32 masters; `model.loss` casts."""

    def __init__(
        self, model: Any, optimizer: Any, *, ranks: Ranks, device: torch.device, micro_batch_rows: int, loss_scale: LossScale
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.ranks = ranks
        self.device = device
        self.micro_batch_rows = micro_batch_rows
        self.loss_scale = loss_scale
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def micro_batches(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(inputs, targets) of at most `micro_batch_rows` rows each."""
        inputs, targets = self.to_device(batch.inputs), self.to_device(batch.targets)
        for start in range(0, len(inputs), self.micro_batch_rows):
            yield inputs[start : start + self.micro_batch_rows], targets[start : start + self.micro_batch_rows]

    def forward_backward(self, batch: Batch, mark: Callable[[str], None] | None = None) -> torch.Tensor:
        """Add this batch's gradients; returns this rank's part of the mean loss, a 0-d tensor.

        Each micro-batch counts by its number of targets: the sum of its losses is divided by the targets of the whole global
        batch. The optimizer averages over ranks, hence the factor world_size. `mark`, for timing, is told "forward" and "backward"
        as each of them ends.
        """
        part = torch.zeros((), device=self.device)
        factor = self.ranks.world_size * self.loss_scale.value / max(1, batch.num_targets)
        several = len(batch.inputs) > self.micro_batch_rows
        with weights_stay() if several else nullcontext():
            for inputs, targets in self.micro_batches(batch):
                loss = self.model.loss(inputs, targets, reduction="sum")
                if mark is not None:
                    mark("forward")
                (loss * factor).backward()
                part += loss.detach()
                if mark is not None:
                    mark("backward")
        return part / max(1, batch.num_targets)

    def step(self, batch: Batch, multipliers: Multipliers) -> StepOutcome:
        """Forward, backward and update; or, if a value is not finite on any rank, no update on all of them."""
        if batch.num_targets == 0:  # nothing to learn here, and the same on every rank
            return StepOutcome(loss=math.nan, skipped=True, blamed=False, empty=True)
        outcome = self.agree(self.forward_backward(batch))
        self.apply(outcome, multipliers)
        return outcome

    def apply(self, outcome: StepOutcome, multipliers: Multipliers, mark: Callable[[str], None] | None = None) -> None:
        """The optimizer's part of a step, after the ranks agreed on `outcome`. `mark`: see MuonAdamW.step."""
        if not outcome.skipped:
            if self.loss_scale.value != 1.0:
                torch._foreach_mul_(self._gradients(), 1.0 / self.loss_scale.value)
            self.optimizer.step(
                lr_multiplier=multipliers.lr,
                momentum=multipliers.momentum,
                weight_decay_multiplier=multipliers.weight_decay,
                mark=mark,
            )
        self.optimizer.zero_grad()
        self.loss_scale.update(overflow=outcome.skipped)

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def agree(self, loss_part: torch.Tensor) -> StepOutcome:
        """One small sum over ranks: the loss, and whether any rank saw a non-finite loss or gradient."""
        norm = torch.stack(torch._foreach_norm(self._gradients(), dtype=torch.float32)).sum()
        bad = ~torch.isfinite(norm + loss_part)
        report = torch.stack([loss_part.double(), bad.double()])
        if self.ranks.world_size > 1:
            dist.all_reduce(report)
        loss, num_bad = report.tolist()
        blamed = num_bad > 0 and (not math.isfinite(loss) or self.loss_scale.value <= 1.0)
        return StepOutcome(loss=loss, skipped=num_bad > 0, blamed=blamed)


def split_rows(rows_per_batch: int, ranks: Ranks) -> int:
    """The largest number of rows a rank gets of a global batch."""
    return -(-rows_per_batch // ranks.world_size)


def even_micro_batch(rows: int, at_most: int) -> int:
    """Rows a micro-batch: `rows` in as few equal parts as keep each at or under `at_most`; the parts differ by the last only."""
    parts = -(-rows // max(1, min(rows, at_most)))
    return -(-rows // parts)


class Clock:
    """Training seconds: runs during steps, stands still during evaluation and saving."""

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._device = device
        self._done = seconds
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        return self._done + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        """Waits for the device first, so that queued work is counted as training."""
        if self._since is not None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._done = self.seconds
            self._since = None


@dataclass
class SmoothLoss:
    """Debiased exponential average of the training loss; skipped steps leave it alone."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, loss: float) -> None:
        if math.isfinite(loss):
            self.total = EMA_FACTOR * self.total + (1 - EMA_FACTOR) * loss
            self.weight = EMA_FACTOR * self.weight + (1 - EMA_FACTOR)

    @property
    def value(self) -> float | None:
        return self.total / self.weight if self.weight else None


class FrozenGarbage:
    """Keeps the garbage collector out of the steps: frozen and off after the first, run again every 5000 steps.

    Nothing is collected before freezing: that alone takes some 0.2 s, as long as a small trial's evaluation."""

    def __init__(self) -> None:
        self._was_enabled = gc.isenabled()
        self._frozen = False

    def after_step(self, steps_done_here: int) -> None:
        if steps_done_here == 1:
            gc.freeze()
            gc.disable()
            self._frozen = True
        elif steps_done_here % COLLECT_EVERY_STEPS == 0:
            gc.collect()

    def restore(self) -> None:
        if self._frozen:
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()
            self._frozen = False


@contextmanager
def frozen_garbage() -> Iterator[FrozenGarbage]:
    garbage = FrozenGarbage()
    try:
        yield garbage
    finally:
        garbage.restore()
