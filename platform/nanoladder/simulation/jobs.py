"""How long each run takes on a fleet: the planner's speed, the real path's checkpoints and backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from nanochat_model.config import GPTConfig, TrainConfig
from nanochat_model.errors import ConfigError
from nanochat_model.hardware import find_device
from nanochat_model.memory import estimate_memory
from nanochat_model.record import RunRecord
from nanoladder.cells import Trial
from nanoladder.simulation.fleet import Fleet, Job, Overheads, Workers
from nanoladder.sweep import Sweep
from nanoladder.throughput import Throughput, nearest_runs
from nanoladder.trial_needs import choose_backend, trial_seconds, trial_speed, with_checkpoints, worker_resources
from nanoladder.watchdog import format_resources

GPU_START_SECONDS = 30.0  # build, compile with warm caches, first step: assumed
CPU_START_SECONDS = 0.5
ASSUMED_SPREAD = 0.04  # of the logarithm of a device's speed: assumed. Same cards differed by 8% on average, 22% at most, in five
# clusters (Sinha et al., "Not All GPUs Are Created Equal", SC 2022)
MIN_SPREAD_RUNS = 8  # pairs of like runs that tell it instead
FORWARD_SHARE = 1 / 3  # of a training step's FLOPs: evaluation


def workers_of(sweep: Sweep, fleet: Fleet, *, cpus_per_node: int = 0) -> Workers:
    """How a sweep's trials lie on the fleet's nodes. ConfigError where one does not fit.

    A device that is in no table of accelerators counts CPUs. `cpus_per_node` 0: never the bottleneck of an accelerator's node.
    """
    uses_gpu = find_device(fleet.device) is not None
    device = "GPU" if uses_gpu else "CPU"
    node = {"CPU": float(cpus_per_node or math.inf), "GPU": float(fleet.devices_per_node)}
    if not uses_gpu:
        node = {"CPU": float(fleet.devices_per_node)}
    per_worker = worker_resources(sweep, uses_gpu=uses_gpu)
    workers = Workers(per_worker=per_worker, count=sweep.devices_per_trial, node=node, device=device)
    if workers.slots_per_node * fleet.num_nodes < workers.count:
        need = format_resources(workers.need)
        raise ConfigError(
            f"a trial of sweep {sweep.name} needs {need}, which {fleet.num_nodes} × {format_resources(node)} never hold; give "
            "more nodes or devices, or --set devices_per_trial or threads_per_trial"
        )
    return workers


@dataclass(kw_only=True)
class JobMaker:
    """Jobs of a sweep's trials on a device; each config is worked out once."""

    fleet: Fleet
    overheads: Overheads
    records: Sequence[RunRecord] = ()
    mfu: float | None = None
    sources: set[str] = field(default_factory=set)  # where the speeds come from
    _speeds: dict[tuple[int, GPTConfig], Throughput] = field(default_factory=dict)
    _jobs: dict[str, Job] = field(default_factory=dict)

    def job(self, sweep: Sweep, trial: Trial) -> Job:
        if trial.run_id not in self._jobs:
            self._jobs[trial.run_id] = self._make(sweep, trial)
        return self._jobs[trial.run_id]

    def _make(self, sweep: Sweep, trial: Trial) -> Job:
        speed = self._speed(sweep, trial)
        training = trial_seconds(sweep, trial, speed)
        runtime = with_checkpoints(sweep, sweep.runtime, training)
        measured = beside_training(trial.config.model, self.fleet.device, self.records)
        evaluation = 0.0 if measured is not None else _evaluation_seconds(trial.config, speed) * sweep.trials_per_device
        seconds, every = training + evaluation, math.inf
        if runtime.keep_last > 0:
            of_steps = runtime.checkpoint_every_steps * seconds / trial.config.num_steps
            every = min(runtime.checkpoint_every_seconds or math.inf, of_steps or math.inf, seconds)
        return Job(
            seconds=seconds,
            start=self._start(measured),
            own_process=choose_backend(sweep, training) == "actor",
            save_every=every,
            save_seconds=_checkpoint_bytes(trial.config) / self.overheads.checkpoint_bytes_per_second,
        )

    def _speed(self, sweep: Sweep, trial: Trial) -> Throughput:
        key = (sweep.devices_per_trial, trial.config.model)
        if key not in self._speeds:
            self._speeds[key] = trial_speed(sweep, trial, self.fleet.device, self.records, mfu=self.mfu)
            self.sources.add(self._speeds[key].source)
        return self._speeds[key]

    def _start(self, measured: float | None) -> float:
        if self.overheads.start is not None:
            return self.overheads.start
        if measured is not None:
            return measured
        return GPU_START_SECONDS if find_device(self.fleet.device) is not None else CPU_START_SECONDS


def beside_training(model: GPTConfig, device: str, records: Sequence[RunRecord]) -> float | None:
    """Seconds of a run that are not training (start, evaluation, saving): the median of the recorded runs on `device` nearest in
    size; None where there is none that ran in one piece."""
    same = [r for r in nearest_runs(model, device, records) if r.total_seconds > r.train_seconds]
    return median(r.total_seconds - r.train_seconds for r in same) if same else None


def speed_spread(device: str, records: Sequence[RunRecord]) -> tuple[float, str]:
    """Standard deviation of the logarithm of speed between runs of one model on `device`, and where it comes from."""
    rates: dict[GPTConfig, list[float]] = {}
    for r in records:
        if r in nearest_runs(r.config.model, device, [r]):
            rates.setdefault(r.config.model, []).append(math.log(r.train_flops / r.train_seconds / r.num_devices))
    df = sum(len(v) - 1 for v in rates.values())
    if df < MIN_SPREAD_RUNS:
        return ASSUMED_SPREAD, f"assumed: {ASSUMED_SPREAD:.0%} between devices"
    squares = sum((x - fmean(v)) ** 2 for v in rates.values() for x in v)
    return math.sqrt(squares / df), f"measured: {math.sqrt(squares / df):.1%} between recorded runs of one model on {device}"


def _evaluation_seconds(config: TrainConfig, speed: Throughput) -> float:
    every = config.eval.every_steps
    times = (config.num_steps - 1) // every + 1 if every > 0 else 1
    return times * config.eval.num_tokens * FORWARD_SHARE / speed.tokens_per_second


def _checkpoint_bytes(config: TrainConfig) -> float:
    memory = estimate_memory(config.model, micro_batch_rows=1, compute_dtype=config.compute_dtype)
    return memory.parameters + memory.optimizer
