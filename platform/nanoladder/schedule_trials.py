"""Ray Tune drives the pool: a searcher that hands out its runs, callbacks that take the results back.

Tune places trials, keeps actors alive between them and notices when one dies. What to run, what to skip and what to try
again is the pool's business, so nothing depends on Tune's own snapshots.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from nanochat_model.errors import ConfigError
from nanochat_model.identity import write_atomic
from nanochat_model.record import RunRecord
from nanoladder.actor_backend import SPEC, TrialActor
from nanoladder.cells import Trial
from nanoladder.failed_record import failed_record
from nanoladder.handout import Room
from nanoladder.listen import Listener
from nanoladder.node_labels import resources_of_nodes
from nanoladder.pool import Pool
from nanoladder.stopping import PAUSED, StopRequest, StopWatch, is_paused
from nanoladder.storage import find_record, left_record
from nanoladder.trial_needs import total_need
from nanoladder.trial_spec import STOP_FILE, TrialSpec
from nanoladder.watchdog import PlacementWatch

MakeSpec = Callable[[Trial, int], TrialSpec]
Capacity = Callable[[Mapping[str, str]], Mapping[str, float]]  # labels -> resources of all nodes that carry them


class NothingRuns(Exception):
    """An end was asked for, and what Tune has in hand waits for a place: there is nothing to wait for."""


@dataclass
class Assignment:
    """A run that Tune has in hand."""

    trial: Trial
    spec: TrialSpec
    need: Mapping[str, float]
    given_at: float = field(default_factory=time.time)
    started: bool = False  # its process runs
    heard: bool = False  # something was reported from there

    @property
    def trains(self) -> bool:
        """Not merely waits: a process that drives Ray Train is there before its workers have found a place."""
        return self.started and (self.heard or self.spec.backend == "actor")


class Scheduler:
    """Between Tune and the pool. Runs are given out only while the cluster has room for all their workers."""

    def __init__(
        self,
        pool: Pool,
        make_spec: MakeSpec,
        listener: Listener,
        *,
        capacity: Capacity | None,
        max_concurrent: int | None,
        placement_seconds: float,
        stop: StopWatch | None = None,
    ) -> None:
        self._pool, self._make_spec, self._listener = pool, make_spec, listener
        self._capacity, self._room = capacity, Room(max_concurrent)
        self._placement_seconds = placement_seconds
        self._stop = stop
        self.stopping: StopRequest | None = None
        self._held: Trial | None = None
        self._watch: PlacementWatch | None = None
        self.assigned: dict[str, Assignment] = {}
        self.fatal: ConfigError | None = None

    def suggest(self, tune_id: str) -> dict[str, Any] | str | None:
        if self.fatal is not None or self.stopping is not None:
            return Searcher.FINISHED
        if self._room.full:
            return None
        try:
            trial = self._held or self._pool.next()
        except ConfigError as e:  # a suggestion that cannot be a config, or a broken record
            self.fatal = e
            return Searcher.FINISHED
        if trial is None:
            return Searcher.FINISHED if self._pool.done else None
        spec = self._make_spec(trial, self._pool.attempts(trial.run_id))
        need = total_need(spec.resources_per_worker, spec.num_workers)
        room = self._capacity(spec.node_labels) if self._capacity is not None else None
        if not self._room.fits(need, room, spec.node_labels):
            self._held = trial
            return None
        self._held = None
        (Path(spec.run_dir) / STOP_FILE).unlink(missing_ok=True)  # a request that came too late for an earlier attempt
        self._room.take(need, spec.node_labels)
        self.assigned[tune_id] = Assignment(trial=trial, spec=spec, need=need)
        return {SPEC: spec.to_json()}

    def started(self, tune_id: str) -> None:
        assignment = self.assigned[tune_id]
        assignment.started = True
        self._watch = None
        self._listener.on_start(assignment.trial, assignment.spec.attempts)

    def _take_back(self, tune_id: str) -> Assignment | None:
        assignment = self.assigned.pop(tune_id, None)
        if assignment is not None:
            self._room.give_back(assignment.need, assignment.spec.node_labels)
        return assignment

    def result(self, tune_id: str, result: Mapping[str, Any]) -> None:
        assignment = self.assigned.get(tune_id)
        if assignment is None:
            return
        for event in result.get("events", ()):
            assignment.heard = True
            self._listener.on_event(assignment.trial, event)

    def complete(self, tune_id: str, result: Mapping[str, Any]) -> None:
        """A trial ended as Tune sees it; its result says how the run ended."""
        assignment = self._take_back(tune_id)
        if assignment is None:
            return
        if result.get("status") == "bad_config":
            self.fatal = self.fatal or ConfigError(f"{assignment.trial.name}: {result['error']}")
            return
        if result.get("status") in ("complete", "stopped"):
            try:
                record = left_record(assignment.spec.storage, assignment.spec.root, assignment.spec.run_dir)
            except ConfigError as e:
                self.fatal = self.fatal or e
                return
            if is_paused(record):
                self._pool.put_back(assignment.trial.run_id)
                self._listener.on_pause(assignment.trial)
            else:
                self._finish(assignment, record)
        else:
            error = result.get("error") or "the trial ended without a result"
            self._failed(assignment, error, result.get("traceback", ""))

    def died(self, tune_id: str, error: str) -> None:
        """The actor is gone: killed, out of memory, or its node lost."""
        assignment = self._take_back(tune_id)
        if assignment is not None:
            self._failed(assignment, error, "")

    def _failed(self, assignment: Assignment, error: str, traceback: str) -> None:
        record = find_record(assignment.spec.storage, assignment.spec.root, assignment.spec.run_dir)
        fresh = record is not None and record.status == "failed" and record.attempts == assignment.spec.attempts
        if record is None or (record.status != "complete" and not fresh):
            record = failed_record(assignment.spec, error, seconds=time.time() - assignment.given_at)
            record.save(assignment.spec.run_dir)
        self._finish(assignment, record, error, traceback)

    def _finish(self, assignment: Assignment, record: RunRecord, error: str = "", traceback: str = "") -> None:
        retry = self._pool.finish(assignment.trial.run_id, record)
        if record.status == "failed":
            self._listener.on_failure(assignment.trial, error or record.error or "failed", traceback, retry)

    def tick(self) -> None:
        """Called all the time: raises what must end the sweep."""
        if self.fatal is not None:
            raise self.fatal
        self._listener.on_tick()
        self._heed_stop()
        waiting = [a for a in self.assigned.values() if not a.started]
        if waiting and self._watch is None:
            first = waiting[0]
            self._watch = PlacementWatch(first.need, first.spec.node_labels, f"trial {first.trial.name}", self._placement_seconds)
        if self._watch is not None:
            running = sum(a.started for a in self.assigned.values())
            self._watch.look(running=running, pending=len(waiting), have=resources_of_nodes, free=ray.available_resources)
        if self.stopping is not None and self.assigned and not any(a.trains for a in self.assigned.values()):
            raise NothingRuns

    def _heed_stop(self) -> None:
        """Once somebody asked for an end: give nothing out any more, and let trials that save checkpoints save one and end."""
        request = self._stop.poll() if self._stop is not None else None
        if request is None or (self.stopping is not None and self.stopping.now >= request.now):
            return
        if self.stopping is None:
            self._listener.on_stopping()
        self.stopping = request
        for assignment in self.assigned.values():
            if request.now or assignment.spec.runtime.keep_last > 0 or not assignment.started:
                write_atomic(Path(assignment.spec.run_dir) / STOP_FILE, PAUSED)


class PoolSearcher(Searcher):
    """Tune's view of the scheduler's suggestions."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._scheduler = scheduler

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        return self._scheduler.suggest(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The callbacks below say it with more detail."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher and callbacks into a snapshot that nobody reads."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Records are what a sweep resumes from."""

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("sweeps resume from their records, never from Tune's snapshot")


class PoolCallback(tune.Callback):
    """Tune's events to the scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.raised: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        try:
            self._scheduler.tick()
        except (ConfigError, NothingRuns) as e:
            self.raised = e  # Tune wraps what callbacks raise
            raise

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._scheduler.started(trial.trial_id)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        self._scheduler.result(trial.trial_id, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._scheduler.complete(trial.trial_id, trial.last_result or {})
        _forget(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._scheduler.died(trial.trial_id, _death(trial))
        _forget(trial)


def _death(trial: Any) -> str:
    """One line on why an actor is gone."""
    error = trial.get_error()
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    if error is not None and "Actor" in type(error).__name__:
        cause = next((line for line in lines if "SIGKILL" in line or "OOM" in line or "exit" in line.lower()), "")
        return f"its process died. {cause}".strip()
    return lines[-1] if lines else "its process died"


def _forget(trial: Any) -> None:
    """Drop what a finished trial keeps in the driver (its config and results): 20,000 of them must fit."""
    trial.run_metadata.last_result = {}
    trial.config = {}
    trial.evaluated_params = {}


def fit(scheduler: Scheduler, folder: Path) -> None:
    """Run the pool dry through Ray Tune. `folder` is scratch for Tune's files and is removed."""
    callback = PoolCallback(scheduler)
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a failed trial is reported once, by us
    try:
        tuner = tune.Tuner(
            TrialActor,
            tune_config=tune.TuneConfig(search_alg=PoolSearcher(scheduler), num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(folder),
                verbose=0,
                callbacks=[callback],
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False, checkpoint_frequency=0),
            ),
        )
        tuner.fit()
    except Exception as e:
        if callback.raised is None:
            raise RuntimeError(f"Ray Tune stopped: {e}") from e
        if not isinstance(callback.raised, NothingRuns):
            raise callback.raised from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if scheduler.fatal is not None:
        raise scheduler.fatal
