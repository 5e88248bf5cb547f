"""sweeps/<name>/status.json: how far a sweep is, written by its driver every few seconds, read by `nanoladder status`.

It is for people to look at: nothing resumes from it. Device-seconds count training, evaluation and saving of recorded runs, of
running ones, and of attempts that failed.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_model.identity import write_atomic
from nanochat_model.record import RunRecord
from nanoladder.cells import Trial
from nanoladder.facts_file import SCHEMA_VERSION, read_facts
from nanoladder.job_context import JOB_CONFIG_ENV
from nanoladder.listen import Listener
from nanoladder.pool import CellWork, trial_flops
from nanoladder.sweep import Sweep
from nanoladder.workspace import Workspace

STATUS_FILE = "status.json"
WRITE_SECONDS = 2.0  # between two writes while something changes
HEARTBEAT_SECONDS = 10.0  # between two writes at most
SILENT_SECONDS = 60.0  # without a write: the driver on another machine is gone, or its storage is
KEPT_FAILURES = 20
ALIVE = ("running", "stopping")


@dataclass
class _Live:
    """One sweep at work."""

    sweep: Sweep
    works: list[CellWork]
    lost_device_seconds: float = 0.0  # of failed attempts, also those of earlier commands
    device_seconds: float = 0.0  # of recorded runs
    done: int = 0
    skipped: int = 0
    failed: int = 0
    flops_done: float = 0.0
    flops_trained: float = 0.0
    running: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def devices_per_trial(self) -> float:
        return self.sweep.devices_per_trial / self.sweep.trials_per_device


class StatusWriter(Listener):
    """Keeps the status file of each sweep of a command."""

    def __init__(self, workspace: Workspace, works: Sequence[CellWork]) -> None:
        self._workspace, self._works = workspace, works
        self._live: dict[str, _Live] = {}
        self._started = time.time()
        self._written = self._changed = 0.0
        self._stopping = False

    def on_begin(self, sweeps: Sequence[Sweep]) -> None:
        for sweep in sweeps:
            live = _Live(sweep=sweep, works=[w for w in self._works if w.sweep.name == sweep.name])
            before = read_status(self._workspace.sweep_dir(sweep.name))
            live.lost_device_seconds = float((before or {}).get("lost_device_seconds", 0.0))
            self._live[sweep.name] = live
        self._write("running")

    def on_start(self, trial: Trial, attempt: int) -> None:
        self._live[trial.sweep].running[trial.run_id] = {
            "name": trial.name,
            "run_id": trial.run_id,
            "attempt": attempt,
            "started_at": time.time(),
            "step": 0,
            "num_steps": trial.config.num_steps,
            "val_bpb": None,
            "tokens_per_second": None,
            "mfu": None,
            "train_flops": 0.0,
        }
        self._changed = time.monotonic()

    def on_event(self, trial: Trial, event: dict[str, Any]) -> None:
        row = self._live[trial.sweep].running.get(trial.run_id)
        if row is not None:
            row |= {k: event[k] for k in ("step", "val_bpb", "tokens_per_second", "mfu", "train_flops") if k in event}
            self._changed = time.monotonic()

    def on_failure(self, trial: Trial, error: str, traceback: str, retry: bool) -> None:
        live = self._live[trial.sweep]
        live.lost_device_seconds += self._end(live, trial)
        live.failures.append({"name": trial.name, "run_id": trial.run_id, "error": error, "retried": retry, "at": _now()})
        del live.failures[:-KEPT_FAILURES]

    def on_pause(self, trial: Trial) -> None:
        self._end(self._live[trial.sweep], trial)

    def on_record(self, trial: Trial, record: RunRecord, new: bool) -> None:
        live = self._live[trial.sweep]
        held = self._end(live, trial)
        live.done += 1
        live.skipped += not new
        live.failed += record.status == "failed"
        live.flops_done += trial_flops(trial)
        live.flops_trained += trial_flops(trial) if new else 0.0
        if record.status == "failed":
            live.lost_device_seconds += held
        else:
            live.device_seconds += record_seconds(record) * record.num_devices / live.sweep.trials_per_device

    def _end(self, live: _Live, trial: Trial) -> float:
        """Device-seconds of a trial that runs no more."""
        self._changed = time.monotonic()
        row = live.running.pop(trial.run_id, None)
        return (time.time() - row["started_at"]) * live.devices_per_trial if row is not None else 0.0

    def on_stopping(self) -> None:
        self._stopping = True
        self._write("stopping")

    def on_tick(self) -> None:
        age = time.monotonic() - self._written
        if age > HEARTBEAT_SECONDS or (age > WRITE_SECONDS and self._changed > self._written):
            self._write("stopping" if self._stopping else "running")

    def on_end(self) -> None:
        for name, live in self._live.items():
            live.running.clear()
            complete = live.done >= sum(w.wanted_runs() for w in live.works)
            state = "finished" if complete else "stopped" if self._stopping else "interrupted"
            self._write_one(name, live, state)

    def _write(self, state: str) -> None:
        for name, live in self._live.items():
            self._write_one(name, live, state)
        self._written = time.monotonic()

    def _write_one(self, name: str, live: _Live, state: str) -> None:
        sweep = live.sweep
        runs = [(w.wanted_runs(), w.flops_per_trial) for w in live.works]
        total, flops_total = sum(n for n, _ in runs), sum(n * f for n, f in runs)
        now_flops = sum(row["train_flops"] for row in live.running.values())
        trained, left = live.flops_trained + now_flops, max(0.0, flops_total - live.flops_done - now_flops)
        facts = {
            "schema_version": SCHEMA_VERSION,
            "sweep": name,
            "stage": sweep.stage,
            "question": sweep.question,
            "metric": sweep.metric,
            "direction": sweep.direction,
            "state": state,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "job_id": job_id(),
            "started_at": _iso(self._started),
            "updated_at": _now(),
            "total": max(total, live.done),
            "done": live.done,
            "skipped": live.skipped,
            "failed": live.failed,
            "flops_done": live.flops_done + now_flops,
            "flops_total": flops_total,
            "eta_seconds": left / trained * (time.time() - self._started) if trained > 0 else None,
            "devices_per_trial": live.devices_per_trial,
            "device_seconds": live.device_seconds,
            "lost_device_seconds": live.lost_device_seconds,
            "best": _best(live),
            "running": list(live.running.values()),
            "failures": live.failures,
        }
        write_atomic(self._workspace.sweep_dir(name) / STATUS_FILE, json.dumps(facts, indent=1))


def _best(live: _Live) -> dict[str, Any] | None:
    """The best candidate whose runs are all done, by the mean over its seeds."""
    sign = -1.0 if live.sweep.direction == "maximize" else 1.0
    found = [(sign * v, n, c) for n, w in enumerate(live.works) for c, v in w.values.items() if v is not None]
    if not found:
        return None
    value, number, candidate = min(found)
    work = live.works[number]
    runs, values = work.records[candidate], work.study.candidates[candidate].values
    return {"value": sign * value, "cell": work.cell.label, "values": dict(values), "run_id": runs[min(runs)].run_id}


def record_seconds(record: RunRecord) -> float:
    """How long a run held its devices: of its last process, or of training alone where that is more (it was resumed)."""
    return max(record.total_seconds, record.train_seconds)


def job_id() -> str:
    """The id of the Ray job that this process is the driver of, "" where it is none."""
    config = os.environ.get(JOB_CONFIG_ENV)
    return str((json.loads(config).get("metadata") or {}).get("job_submission_id", "")) if config else ""


def read_status(sweep_dir: Path) -> dict[str, Any] | None:
    """The status of a sweep, None where it has never run. `state` is "lost" where its driver died without a word."""
    path = sweep_dir / STATUS_FILE
    if not path.exists():
        return None
    status = read_facts(path, "status", "run the sweep's command again")
    if status["state"] in ALIVE and not driver_lives(status):
        status["state"] = "lost"
    return status


def driver_lives(status: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a status still runs: asked of this machine, or judged by its last sign of life."""
    if status["host"] == socket.gethostname():
        return _alive(int(status["pid"]))
    age = time.time() - datetime.datetime.fromisoformat(status["updated_at"]).timestamp()
    return age < SILENT_SECONDS


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _now() -> str:
    return _iso(time.time())


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")
