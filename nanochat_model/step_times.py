"""Measures where the time of a step goes: data, computation, waiting for slower ranks, communication, optimizer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from nanochat_model.distributed import Ranks, all_sum
from nanochat_model.loop import Batch, Multipliers, StepOutcome, Stepper
from nanochat_model.step_shares import PARTS

FIRST_TIMED_STEP = 3
TIMED_EVERY_STEPS = 50


class StepTimer:
    """Marks the parts of one step, each ended by waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._since = self._now()
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def mark(self, part: str) -> None:
        now = self._now()
        self.seconds[part] += now - self._since
        self._since = now

    def skip(self) -> None:
        """Leave out what happened since the last mark."""
        self._since = self._now()


def timed_step(
    stepper: Stepper,
    batch_of: Callable[[int], Batch],
    step: int,
    multipliers: Multipliers,
    before_update: Callable[[], None] | None = None,
) -> tuple[dict[str, float], StepOutcome]:
    """One training step, the same as an untimed one, and this rank's seconds in each of its PARTS ({} for a batch that holds
    nothing to learn). `wait` is the time until the slowest rank has its gradients; communication does not overlap with updates
    here. Every rank must call it. `before_update` runs between backward and update, untimed.
    """
    timer = StepTimer(stepper.device)
    batch = batch_of(step)
    timer.mark("data")
    if batch.num_targets == 0:
        return {}, stepper.step(batch, multipliers)
    loss_part = stepper.forward_backward(batch)
    timer.mark("compute")
    several = stepper.ranks.world_size > 1
    if several:
        dist.barrier()
        timer.mark("wait")
    if before_update is not None:
        before_update()
        timer.skip()
    outcome = stepper.agree(loss_part)
    timer.mark("communication" if several else "optimizer")
    stepper.apply(outcome, multipliers, timer.mark if several else None)
    timer.mark("optimizer")
    return timer.seconds, outcome


_runs = itertools.count()


class StartupTimer:
    """Made before a run is built."""

    def __init__(self) -> None:
        self._process = time.process_time() if next(_runs) == 0 else 0.0
        self._since = time.perf_counter()

    def built(self) -> dict[str, float]:
        """When it is built: `process`, CPU seconds that this process spent before its first run (interpreter, imports, whatever
        else it did; 0 for later runs), and `build`, seconds since."""
        return {"process": self._process, "build": time.perf_counter() - self._since}


class StepTimes:
    """Where the time of this run's timed steps went, rank by rank. A few steps are enough: timing one costs a barrier and some
    waiting for the device."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sum = dict.fromkeys(PARTS, 0.0)
        self._count = self._gathered = 0
        self.by_rank: tuple[dict[str, float], ...] = ()  # mean seconds of each part, as last gathered

    @staticmethod
    def due(steps_here: int) -> bool:
        """Whether to time the step after `steps_here` of this process: its third, when compilation is over, then every 50th."""
        return steps_here + 1 == FIRST_TIMED_STEP or (steps_here + 1) % TIMED_EVERY_STEPS == 0

    def add(self, seconds: Mapping[str, float]) -> None:
        """What `timed_step` measured on this rank."""
        if seconds:
            self._sum = {part: self._sum[part] + seconds[part] for part in PARTS}
            self._count += 1

    def gather(self) -> None:
        """Make `by_rank` up to date. Every rank must call it after the same steps."""
        if self._count == self._gathered:
            return
        self._gathered = self._count
        table = torch.zeros(self._ranks.world_size, len(PARTS), dtype=torch.float64)
        table[self._ranks.rank] = torch.tensor([self._sum[part] / self._count for part in PARTS])
        self.by_rank = tuple(dict(zip(PARTS, row, strict=True)) for row in all_sum(table).tolist())

    @property
    def mean(self) -> dict[str, float]:
        """Seconds of each part of a step, mean over ranks; {} before a step was timed and gathered."""
        n = len(self.by_rank)
        return {part: sum(rank[part] for rank in self.by_rank) / n for part in PARTS} if n else {}

    @property
    def compute_by_rank(self) -> tuple[float, ...]:
        return tuple(rank["compute"] for rank in self.by_rank)
