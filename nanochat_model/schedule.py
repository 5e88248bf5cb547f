"""Multipliers over steps: learning rate, Muon's momentum, Muon's weight decay. Pure arithmetic, needs no torch.

`step` counts from 0; the last update of a run is step num_steps - 1. "nanochat" is nanochat's base_train. Under
"constant_then_decay" nothing before the decay depends on num_steps (momentum warm-up counts from step 0, weight decay stays at
its full value), so that one trunk serves several horizons by a short decay from a stored checkpoint.
"""

from __future__ import annotations

import math

from nanochat_model.config import ScheduleConfig


def decay_start(num_steps: int, schedule: ScheduleConfig) -> int:
    """First step of the warm-down; a decay run of a trunk starts from a checkpoint at or before it."""
    return num_steps - round(schedule.warmdown_fraction * num_steps)


def lr_multiplier(step: int, num_steps: int, schedule: ScheduleConfig) -> float:
    """Of all learning rates: linear warm-up, constant, linear warm-down to final_lr_fraction."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    start = decay_start(num_steps, schedule)
    if step <= start:
        return 1.0
    left = (num_steps - step) / (num_steps - start)
    return left + (1.0 - left) * schedule.final_lr_fraction


def muon_momentum(step: int, num_steps: int, schedule: ScheduleConfig) -> float:
    """Linear from momentum_start to momentum_peak over momentum_warmup_steps, then (in the warm-down) linear to momentum_end.
    As in nanochat the warm-up comes first: a run shorter than it never leaves it."""
    if step < schedule.momentum_warmup_steps:
        share = step / schedule.momentum_warmup_steps
        return (1.0 - share) * schedule.momentum_start + share * schedule.momentum_peak
    start = decay_start(num_steps, schedule)
    if step < start or start == num_steps:
        return schedule.momentum_peak
    share = (step - start) / (num_steps - start)
    return (1.0 - share) * schedule.momentum_peak + share * schedule.momentum_end


def weight_decay_multiplier(step: int, num_steps: int, schedule: ScheduleConfig) -> float:
    """Of Muon's weight decay: half a cosine from 1 to 0 over the run ("nanochat") or over the decay ("constant_then_decay")."""
    if schedule.kind == "nanochat":
        return 0.5 * (1.0 + math.cos(math.pi * step / num_steps))
    start = decay_start(num_steps, schedule)
    if step <= start:
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (step - start) / (num_steps - start)))
