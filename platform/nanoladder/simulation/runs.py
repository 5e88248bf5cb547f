"""One sweep on one fleet, simulated many times: each seed draws its own failures and its own slow devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nanochat_model.errors import ConfigError
from nanochat_model.record import RunRecord
from nanoladder.cells import Trial
from nanoladder.edges import extend_edges
from nanoladder.pool import Pool
from nanoladder.simulation.engine import KINDS, Bar, Engine, Kill
from nanoladder.simulation.fleet import Fleet, Overheads, Workers
from nanoladder.simulation.jobs import JobMaker
from nanoladder.simulation.phases import Phase

MAX_COMMANDS = 20  # a run fails for good after two tries in a command; the command is then given again, so often
LEVEL = 0.9  # of the intervals over seeds
HOUR = 3600.0


class MemoryRecords:
    """The records of a simulated storage root."""

    def __init__(self, known: Mapping[str, RunRecord]) -> None:
        self.by_id = dict(known)

    def load(self, run_id: str) -> RunRecord | None:
        return self.by_id.get(run_id)

    def save(self, record: RunRecord) -> None:
        self.by_id[record.run_id] = record


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that the seeds of a simulation share."""

    phases: Sequence[Phase]
    fleet: Fleet
    workers: Workers
    overheads: Overheads
    jobs: JobMaker
    spread: float
    recorded: Mapping[str, RunRecord]
    max_concurrent: int | None = None
    kills: tuple[Kill, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One simulated sweep. Device-seconds by kind: see `engine.KINDS`."""

    seed: int
    wall_seconds: float
    device_seconds: Mapping[str, float]
    runs: int  # trained by this sweep
    node_failures: tuple[tuple[float, int], ...]  # second, node
    failed_attempts: int
    commands: int  # the first, and again after runs had failed twice
    unfinished: int  # runs that had not completed when the commands were given up
    longest_seconds: float  # training of the longest run: no fleet is faster
    bars: tuple[Bar, ...] = ()

    @property
    def booked(self) -> float:
        return sum(self.device_seconds.values())

    def facts(self, price: float | None) -> dict[str, float]:
        """What intervals are given of. Hours, device-hours, shares of what is booked, dollars."""
        d = self.device_seconds
        busy = self.booked - d["idle"] - d["down"]
        hours = {f"{kind}_device_hours": d[kind] / HOUR for kind in KINDS}
        facts = {
            "wall_hours": self.wall_seconds / HOUR,
            "longest_run_hours": self.longest_seconds / HOUR,
            "booked_device_hours": self.booked / HOUR,
            "busy_device_hours": busy / HOUR,
            "utilization": busy / self.booked if self.booked else 0.0,
            "training_share": (d["useful"] + d["slow"]) / self.booked if self.booked else 0.0,
            "failure_device_hours": (d["lost"] + d["down"]) / HOUR,
            "straggler_device_hours": d["slow"] / HOUR,
            **hours,
            "node_failures": float(len(self.node_failures)),
            "failed_attempts": float(self.failed_attempts),
            "commands": float(self.commands),
            "unfinished": float(self.unfinished),
        }
        return facts if price is None else {**facts, "dollars": self.booked / HOUR * price}


def simulate_once(setting: Setting, seed: int, *, keep_bars: bool = False) -> Simulated:
    """The sweep from its first command to the one that leaves nothing failed."""
    records = MemoryRecords(setting.recorded)
    engine = Engine(
        setting.fleet,
        setting.workers,
        setting.overheads,
        spread=setting.spread,
        seed=seed,
        max_concurrent=setting.max_concurrent,
        kills=setting.kills,
        keep_bars=keep_bars,
    )
    trained: dict[str, float] = {}  # run_id -> seconds of training
    commands, failed = 0, True
    while failed and commands < MAX_COMMANDS:
        commands += 1
        engine.wait(setting.overheads.command)
        for phase in setting.phases:
            _run_phase(phase, setting, engine, records, trained)
        failed = any(r.status == "failed" for r in (records.by_id[i] for i in trained))
    return Simulated(
        seed=seed,
        wall_seconds=engine.now,
        device_seconds=dict(engine.seconds),
        runs=len(trained),
        node_failures=tuple(engine.node_failures),
        failed_attempts=engine.failed_attempts,
        commands=commands,
        unfinished=sum(records.by_id[i].status == "failed" for i in trained),
        longest_seconds=max(trained.values(), default=0.0),
        bars=tuple(engine.bars or ()),
    )


def _run_phase(phase: Phase, setting: Setting, engine: Engine, records: MemoryRecords, trained: dict[str, float]) -> None:
    pool = Pool(phase.works(), records, extend=extend_edges, make=phase.make)
    if pool.done:
        return

    def finish(trial: Trial, completed: bool) -> None:
        record = phase.record(trial)
        if not completed:
            attempts = pool.attempts(trial.run_id)
            record = replace(record, status="failed", val_bpb=None, core=None, error="its node was lost", attempts=attempts)
        records.save(record)
        trained[trial.run_id] = setting.jobs.job(phase.sweep, trial).seconds
        pool.finish(trial.run_id, record)

    engine.wait(setting.overheads.stage)
    engine.run(pool, lambda trial: setting.jobs.job(phase.sweep, trial), finish)


def simulate(setting: Setting, num_seeds: int, *, progress: Callable[[Sequence[int]], Any] = iter) -> list[Simulated]:
    """One Simulated a seed. `progress` goes through the seeds and may show how far they are."""
    if num_seeds < 1:
        raise ConfigError(f"seeds {num_seeds} must be at least 1; 20 give an interval")
    return [simulate_once(setting, seed) for seed in progress(range(num_seeds))]


def intervals(simulated: Sequence[Simulated], price: float | None) -> dict[str, dict[str, float]]:
    """Name -> median and the central 90% over seeds, of `Simulated.facts`."""
    rows = [s.facts(price) for s in simulated]
    levels = ((1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2)
    quantiles = {name: np.quantile([row[name] for row in rows], levels) for name in rows[0]}
    return {name: dict(zip(("low", "median", "high"), map(float, q), strict=True)) for name, q in quantiles.items()}


def typical(simulated: Sequence[Simulated]) -> int:
    """The seed whose sweep takes the median time."""
    ordered = sorted(simulated, key=lambda s: s.wall_seconds)
    return ordered[len(ordered) // 2].seed
