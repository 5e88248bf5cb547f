"""What a sweep would cost, before anything runs: N, D, B, steps, FLOPs, memory and hours of every trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nanochat_model.config import DataConfig
from nanochat_model.counts import count_params
from nanochat_model.errors import ConfigError
from nanochat_model.hardware import find_device
from nanochat_model.memory import choose_micro_batch_rows, estimate_memory
from nanochat_model.recipe import MAX_SHRINK
from nanochat_model.record import RunRecord
from nanoladder.cells import Trial, planned_trials
from nanoladder.pool import trial_flops
from nanoladder.space import format_values
from nanoladder.sweep import Sweep
from nanoladder.terminal import format_seconds
from nanoladder.throughput import SECONDS_PER_HOUR
from nanoladder.trial_needs import trial_seconds, trial_speed

CPU_MICRO_BATCH_TOKENS = 4096  # what a CPU likes best (a measured range; the model's own choice has the last word)


@dataclass(frozen=True, kw_only=True)
class TrialPlan:
    """One trial, or `count` alike. Memory is per device, of the micro-batch that would be taken there."""

    sweep: str
    cell: str
    values: dict[str, Any]
    count: int
    N: int  # transformer matrices + lm_head
    params: int
    D: int  # training tokens
    B: int  # batch in tokens
    num_steps: int
    train_flops: float
    lr_matrix: float
    weight_decay: float
    memory_bytes: float
    micro_batch_rows: int
    hours: float  # of one trial on its devices
    recorded: int  # of `count`
    run_ids: list[str]


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """All trials of a sweep and their sum."""

    sweep: str
    question: str
    source: str
    device: str
    speed: str  # where tokens/s come from
    trials: list[TrialPlan]
    approximate: bool  # candidates are suggested as results come in; their cells' baselines stand for them
    num_trials: int
    num_recorded: int
    train_flops: float
    device_hours: float
    notes: list[str]  # what looks wrong

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_sweep(
    sweep: Sweep,
    *,
    device: str,
    data: DataConfig | None = None,
    records: Sequence[RunRecord] = (),
    recorded: frozenset[str] = frozenset(),
) -> SweepPlan:
    """`device` names the accelerator ("h100", "cpu"); `records` tell its speed; `recorded` are run_ids that will be skipped."""
    plans: list[TrialPlan] = []
    source = ""
    for group in _grouped(planned_trials(sweep, data)):
        trial = group[0]
        speed = trial_speed(sweep, trial, device, records)
        source = speed.source
        rows, memory = _memory(sweep, trial, device)
        ids = list(dict.fromkeys(t.run_id for t in group))
        plans.append(
            TrialPlan(
                sweep=sweep.name,
                cell=trial.cell,
                values=dict(trial.values),
                count=len(group),
                N=count_params(trial.config.model).scaling,
                params=count_params(trial.config.model).total,
                D=trial.config.num_tokens,
                B=trial.config.batch_tokens,
                num_steps=trial.config.num_steps,
                train_flops=trial_flops(trial),
                lr_matrix=trial.config.optimizer.matrix_lr,
                weight_decay=trial.config.optimizer.weight_decay,
                memory_bytes=memory,
                micro_batch_rows=rows,
                hours=trial_seconds(sweep, trial, speed) / SECONDS_PER_HOUR,
                recorded=sum(i in recorded for i in ids),
                run_ids=ids,
            )
        )
    return SweepPlan(
        sweep=sweep.name,
        question=sweep.question,
        source=sweep.source,
        device=device,
        speed=source,
        trials=plans,
        approximate=any(sweep.sampler_of(c) != "grid" for c in sweep.cells),
        num_trials=sum(p.count for p in plans),
        num_recorded=sum(p.recorded for p in plans),
        train_flops=sum(p.train_flops * p.count for p in plans),
        device_hours=sum(p.hours * p.count for p in plans) * sweep.devices_per_trial / sweep.trials_per_device,
        notes=_notes(plans),
    )


def _notes(plans: Sequence[TrialPlan]) -> list[str]:
    """A cell whose weight decay eats the model: a rule far from where it was measured."""
    worst = max(plans, key=lambda p: p.lr_matrix * p.weight_decay)
    share = worst.lr_matrix * worst.weight_decay
    if share <= MAX_SHRINK:
        return []
    return [
        f"cell {worst.cell}: weight decay {worst.weight_decay:.4g} at learning rate {worst.lr_matrix:.4g} takes {share:.0%} of the "
        "weights in every step; the recipe's rules were measured far from this size: give the sweep one made for it "
        "(docs/sweeps.md), or override optimizer.weight_decay"
    ]


def _grouped(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials that differ in nothing but seed and number."""
    groups: dict[tuple[str, tuple[Any, ...]], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.cell, tuple(trial.values.items())), []).append(trial)
    return list(groups.values())


def _memory(sweep: Sweep, trial: Trial, device: str) -> tuple[int, float]:
    """Rows of the micro-batch and bytes on one device; ConfigError where it cannot fit."""
    config = trial.config
    spec = find_device(device)
    rows = max(1, config.rows_per_batch // sweep.devices_per_trial)
    if sweep.runtime.micro_batch_rows:
        micro = min(rows, sweep.runtime.micro_batch_rows)
    elif spec is None:
        micro = max(1, min(rows, CPU_MICRO_BATCH_TOKENS // config.model.sequence_len))
    else:
        micro = choose_micro_batch_rows(
            config.model,
            rows_per_device=rows,
            memory_bytes=spec.memory_bytes / sweep.trials_per_device,
            compute_dtype=config.compute_dtype,
            num_devices=sweep.devices_per_trial,
        )
    fixed = {} if spec is not None else {"fixed_bytes": 0.0}
    estimate = estimate_memory(
        config.model,
        micro_batch_rows=micro,
        compute_dtype=config.compute_dtype,
        num_devices=sweep.devices_per_trial,
        **fixed,  # type: ignore[arg-type]
    )
    room = spec.memory_bytes / sweep.trials_per_device if spec is not None else float("inf")
    if estimate.total > room:
        raise ConfigError(
            f"sweep {sweep.name}, cell {trial.cell}: a trial needs {estimate.total / 1e9:.0f} GB, its share of one {device} is "
            f"{room / 1e9:.0f} GB (trials_per_device {sweep.trials_per_device}); lower trials_per_device or the micro-batch"
        )
    return micro, estimate.total


def print_plan(plan: SweepPlan) -> None:
    """The plan as a table."""
    from nanoladder.cli.common import human, print_table

    rows = [
        (
            t.cell, format_values(t.values) or "–", str(t.count), human(t.N), human(t.D), human(t.B), f"{t.num_steps:,}",
            f"{t.train_flops:.2e}", f"{t.lr_matrix:.4g}", f"{t.weight_decay:.4g}", _bytes(t.memory_bytes),
            format_seconds(t.hours * SECONDS_PER_HOUR), f"{t.recorded}" if t.recorded else "",
        )
        for t in plan.trials
    ]  # fmt: skip
    columns = ("cell", "values", "runs", "N", "D", "B", "steps", "FLOPs", "lr", "wd", "memory", "time", "recorded")
    print_table(columns, rows, title=f"{plan.sweep}: {plan.question}", right=columns[2:])
    if plan.approximate:
        print("Candidates are suggested as results come in; each cell's baseline stands for them.")
    skipped = f", {plan.num_recorded} of them recorded already" if plan.num_recorded else ""
    print(
        f"{plan.num_trials} runs{skipped}, {plan.train_flops:.3g} FLOPs, {format_seconds(plan.device_hours * SECONDS_PER_HOUR)} of "
        f"one {plan.device} ({plan.speed})."
    )
    for note in plan.notes:
        print(f"note: {note}")


def _bytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
