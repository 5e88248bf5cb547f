"""Where the time of a step goes: data, computation, waiting for slower ranks, communication, optimizer; and what to do about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from nanochat_model.loop import Batch, Multipliers, StepOutcome, Stepper

FAR_BELOW = 0.8  # of the recorded runs' MFU; seeds, batches and hosts of one device spread over some percent
LOW_MFU = 0.40  # under this a GPU run is told why; nanochat reaches 41% at d12 on H100s
SMALL_MICRO_BATCH_TOKENS = 16384  # below it matmuls of a small model do not fill a GPU
PARTS = ("data", "compute", "wait", "communication", "optimizer")


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
    """One training step, the same as an untimed one, with the seconds of its parts as `step_seconds/<part>`.

    `communication` is measured apart, by summing a copy of the gradients over the ranks: what the optimizer would spend if
    nothing overlapped. With several ranks also the slowest and fastest rank's `compute_max`, `compute_min`, `slowest_rank`.
    Every rank must call it. `before_update` runs between backward and update, untimed.
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
        copy = torch.cat([p.grad.flatten() for p in stepper.model.parameters() if p.grad is not None])
        timer.skip()
        dist.all_reduce(copy)
        timer.mark("communication")
        del copy
    if before_update is not None:
        before_update()
        timer.skip()
    outcome = stepper.agree(loss_part)
    stepper.apply(outcome, multipliers)
    timer.mark("optimizer")
    metrics = {f"step_seconds/{part}": seconds for part, seconds in timer.seconds.items()}
    if several:
        by_rank: list[float] = [0.0] * stepper.ranks.world_size
        dist.all_gather_object(by_rank, timer.seconds["compute"])
        metrics |= {
            "step_seconds/compute_max": max(by_rank),
            "step_seconds/compute_min": min(by_rank),
            "step_seconds/slowest_rank": float(by_rank.index(max(by_rank))),
        }
    return metrics, outcome


def is_low(mfu: float, usual_mfu: float) -> bool:
    """Whether an MFU calls for an explanation: under 40%, or far below that of recorded runs on this device (0: none known)."""
    return mfu < LOW_MFU or mfu < FAR_BELOW * usual_mfu


def likely_cause(
    metrics: Mapping[str, float],
    *,
    micro_batch_tokens: int,
    attention: str,
    windowed: bool,
    mfu: float = 0.0,
    usual_mfu: float = 0.0,
) -> str:
    """The most likely reason for a low MFU, from `timed_step`'s metrics, with the remedy, in one line. `usual_mfu`: of recorded
    runs on this device, 0 where none is known."""
    total = sum(metrics.get(f"step_seconds/{part}", 0.0) for part in PARTS)
    if total <= 0:
        return "no step was measured"

    def share(part: str) -> float:
        return metrics.get(f"step_seconds/{part}", 0.0) / total

    slow, fast = metrics.get("step_seconds/compute_max", 0.0), metrics.get("step_seconds/compute_min", 0.0)
    if share("data") > 0.1:
        return f"waiting for data takes {share('data'):.0%} of a step; put the shards on a local disk"
    if slow > 1.15 * fast > 0:
        rank = int(metrics.get("step_seconds/slowest_rank", -1))
        return f"rank {rank} needs {slow:.3g} s for what the fastest does in {fast:.3g} s, and all wait for it; look at that device"
    if share("communication") > 0.2:
        return f"communication takes {share('communication'):.0%} of a step; raise the batch, or use fewer or closer devices"
    if windowed and attention == "sdpa":
        return "attention falls back to sdpa, which has no windows; install a kernel that has them, or use window_pattern L"
    if share("optimizer") > 0.25:
        return f"the optimizer takes {share('optimizer'):.0%} of a step; the batch is small for this model, raise batch_tokens"
    if micro_batch_tokens < SMALL_MICRO_BATCH_TOKENS:
        return f"a micro-batch of {micro_batch_tokens} tokens is too small to fill the device; raise micro_batch_rows"
    if mfu < FAR_BELOW * usual_mfu:
        return (
            f"recorded runs on this device reach {usual_mfu:.0%}, and no part of the step stands out; look at its clock, its "
            "temperature and other programs on it"
        )
    return f"none stands out: {share('compute'):.0%} of a step is computation; the model may be too narrow for this device"
