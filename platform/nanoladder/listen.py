"""What happens in a sweep, told to whoever wants to know: the terminal, MLflow, the sweep's index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_model.record import RunRecord
from nanoladder.cells import Trial
from nanoladder.pool import metric_of, trial_flops
from nanoladder.sweep import Sweep


class Listener:
    """All methods do nothing; override what is needed. Called in the driver, from one thread."""

    def on_begin(self, sweeps: Sequence[Sweep]) -> None:
        """Before the first record is looked at."""

    def on_start(self, trial: Trial, attempt: int) -> None:
        """A run has been given to a device."""

    def on_event(self, trial: Trial, event: dict[str, Any]) -> None:
        """From a running run: {"event": "start" | "step" | "eval", …}."""

    def on_failure(self, trial: Trial, error: str, traceback: str, retry: bool) -> None:
        """A run failed; `retry`: it will be tried once more."""

    def on_record(self, trial: Trial, record: RunRecord, new: bool) -> None:
        """A run of a sweep is recorded. `new`: by this command, for the first of the sweeps that wanted it."""

    def on_tick(self) -> None:
        """Many times a second while trials run: return at once."""

    def on_stopping(self) -> None:
        """The command was asked to end: no further run is given out."""

    def on_pause(self, trial: Trial) -> None:
        """A run has ended for that reason, and is not done."""

    def on_end(self) -> None:
        """After the last record, also when the sweep was interrupted or broke."""


class Listeners(Listener):
    """Several listeners as one."""

    def __init__(self, listeners: Iterable[Listener]) -> None:
        self._all = tuple(listeners)

    def on_begin(self, sweeps: Sequence[Sweep]) -> None:
        for each in self._all:
            each.on_begin(sweeps)

    def on_start(self, trial: Trial, attempt: int) -> None:
        for each in self._all:
            each.on_start(trial, attempt)

    def on_event(self, trial: Trial, event: dict[str, Any]) -> None:
        for each in self._all:
            each.on_event(trial, event)

    def on_failure(self, trial: Trial, error: str, traceback: str, retry: bool) -> None:
        for each in self._all:
            each.on_failure(trial, error, traceback, retry)

    def on_record(self, trial: Trial, record: RunRecord, new: bool) -> None:
        for each in self._all:
            each.on_record(trial, record, new)

    def on_tick(self) -> None:
        for each in self._all:
            each.on_tick()

    def on_stopping(self) -> None:
        for each in self._all:
            each.on_stopping()

    def on_pause(self, trial: Trial) -> None:
        for each in self._all:
            each.on_pause(trial)

    def on_end(self) -> None:
        for each in self._all:
            each.on_end()


@dataclass(frozen=True, kw_only=True)
class SweepProgress:
    """How far a command is, over all its sweeps. FLOPs of recorded runs count as done."""

    done: int
    total: int
    running: int
    failed: int
    skipped: int  # recorded before this command
    best: RunRecord | None
    last: RunRecord | None
    flops_done: float
    flops_total: float
    seconds: float
    eta_seconds: float | None  # from the FLOPs that this command has trained so far; None before the first


@dataclass
class ProgressState(Listener):
    """Counts. `report` is called after every change."""

    report: Callable[[SweepProgress], None]
    clock: Callable[[], float]
    wanted: Callable[[], tuple[int, float]]  # runs and FLOPs of all sweeps, which may grow
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    started: float = 0.0
    done: int = 0
    failed: int = 0
    skipped: int = 0
    flops_done: float = 0.0
    flops_trained: float = 0.0
    running: dict[str, float] = field(default_factory=dict)  # run_id -> FLOPs done
    best: RunRecord | None = None
    last: RunRecord | None = None

    def on_begin(self, sweeps: Sequence[Sweep]) -> None:
        self.sweeps = {s.name: s for s in sweeps}
        self.started = self.clock()

    def on_start(self, trial: Trial, attempt: int) -> None:
        self.running[trial.run_id] = 0.0
        self._changed()

    def on_event(self, trial: Trial, event: dict[str, Any]) -> None:
        if "train_flops" in event:
            self.running[trial.run_id] = float(event["train_flops"])
            self._changed()

    def on_failure(self, trial: Trial, error: str, traceback: str, retry: bool) -> None:
        self.running.pop(trial.run_id, None)
        self._changed()

    def on_pause(self, trial: Trial) -> None:
        self.running.pop(trial.run_id, None)
        self._changed()

    def on_record(self, trial: Trial, record: RunRecord, new: bool) -> None:
        self.running.pop(trial.run_id, None)
        flops = trial_flops(trial)
        self.done += 1
        self.failed += record.status == "failed"
        self.flops_done += flops
        if new:
            self.flops_trained += flops
            self.last = record
        else:
            self.skipped += 1
        self._keep_best(self.sweeps[trial.sweep], record)
        self._changed()

    def _keep_best(self, sweep: Sweep, record: RunRecord) -> None:
        value = metric_of(sweep, record)
        if record.status != "complete" or value is None:
            return
        best = metric_of(sweep, self.best) if self.best is not None else None
        if best is None or (value > best if sweep.direction == "maximize" else value < best):
            self.best = record

    def snapshot(self) -> SweepProgress:
        total, flops_total = self.wanted()
        seconds = self.clock() - self.started
        trained = self.flops_trained + sum(self.running.values())
        left = max(0.0, flops_total - self.flops_done - sum(self.running.values()))
        return SweepProgress(
            done=self.done,
            total=max(total, self.done),
            running=len(self.running),
            failed=self.failed,
            skipped=self.skipped,
            best=self.best,
            last=self.last,
            flops_done=self.flops_done + sum(self.running.values()),
            flops_total=flops_total,
            seconds=seconds,
            eta_seconds=left / trained * seconds if trained > 0 else None,
        )

    def _changed(self) -> None:
        self.report(self.snapshot())
