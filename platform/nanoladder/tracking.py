"""MLflow mirrors the records for people to look at. It never stops, slows or loses a run.

One thread of the driver talks to it, through a queue; when it does not answer, the mirror falls behind and says so once. The
same command again, or `sync`, fills what is missing, because every run is found again by its tags.

A sweep is a parent run, a trial a child run. Curves lie on three axes: `val_bpb` with the training step as step and the
training time as time stamp; `by_gflops/val_bpb` with training GFLOPs as step; `by_milliseconds/val_bpb` with training
milliseconds as step. `train_flops`, `train_seconds` and `num_tokens` at the same steps serve as x axes in MLflow's charts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanochat_model.record import CurvePoint, RunRecord
from nanoladder.cells import Trial, flatten
from nanoladder.listen import Listener
from nanoladder.mlflow_facts import (
    NOT_PARAMS,
    TAG,
    diagnostic_metrics,
    final_metrics,
    milliseconds,
    point_metrics,
    record_tags,
    sweep_tags,
)
from nanoladder.pool import trial_tags
from nanoladder.run_lock import making_databases
from nanoladder.space import format_values
from nanoladder.sweep import Sweep

EXPERIMENT = "nanoladder"
FLUSH_SECONDS = 3.0  # between two batches of a running trial's metrics; a run that ends sooner is written at once, whole
GIVE_UP_SECONDS = 30.0  # without an answer, how long nothing is sent
CLOSE_SECONDS = 300.0  # how long the end of a command waits for a mirror that gets on; a dead server is given up long before
MAX_QUEUED = 50_000
SQLITE = "sqlite:///"
BATCH = 900  # metrics a call; MLflow takes at most 1000
SETTINGS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_DISABLE_TELEMETRY": "true"}
TERMINAL = ("FINISHED", "FAILED", "KILLED")
log = logging.getLogger(__name__)

Warn = Callable[[str], None]


class MlflowMirror(Listener):
    """Listens to sweeps and passes on what it hears. Each call returns at once."""

    def __init__(self, uri: str, *, artifacts: Path, warn: Warn | None = None, close_seconds: float = CLOSE_SECONDS) -> None:
        self.uri = uri
        self._warn = warn or log.warning
        self._close_seconds = close_seconds
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(MAX_QUEUED)
        self._writer = MlflowWriter(uri, artifacts)
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._silent_until = 0.0
        self.missed = 0  # calls that did not get through

    def on_begin(self, sweeps: Sequence[Sweep]) -> None:
        self._thread.start()
        for sweep in sweeps:
            self._put("begin", sweep.name, sweep_tags(sweep))

    def on_start(self, trial: Trial, attempt: int) -> None:
        self._put("start", trial, attempt)

    def on_event(self, trial: Trial, event: dict[str, Any]) -> None:
        if event["event"] == "eval":
            self._put("points", trial, [CurvePoint(**{k: v for k, v in event.items() if k != "event"})])
        elif event["event"] == "system":
            self._put("system", trial, event)

    def on_record(self, trial: Trial, record: RunRecord, new: bool) -> None:
        self._put("record", trial, record)

    def on_pause(self, trial: Trial) -> None:
        self._put("pause", trial)

    def begin_other(self, name: str, tags: dict[str, str]) -> None:
        """Runs that belong to no sweep, under a parent of this name."""
        self._put("begin", name, tags)

    def tag(self, trial: Trial, tags: dict[str, str]) -> None:
        self._put("tag", trial.sweep, trial.run_id, tags)

    def on_end(self) -> None:
        if not self._thread.is_alive():
            return
        self._put("end")
        self._queue.put(None)
        self._thread.join(self._close_seconds)
        if self._thread.is_alive() or self.missed:
            self._warn(f"MLflow at {self.uri} is behind the records; `nanoladder sync` (or the same command again) fills it")

    def _put(self, method: str, *args: Any) -> None:
        try:
            self._queue.put_nowait((method, args))
        except queue.Full:
            self.missed += 1

    def _work(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=FLUSH_SECONDS)
            except queue.Empty:
                item = ("announce", ())
            if item is None:
                return
            if time.monotonic() < self._silent_until:
                self.missed += item[0] != "announce"
                continue
            try:
                getattr(self._writer, item[0])(*item[1])
                self._writer.announce()
            except Exception as e:  # whatever a tracking server does, runs go on
                if not self.missed:
                    self._warn(f"MLflow at {self.uri} does not take what is sent ({_first_line(e)}); the sweep goes on without it")
                self.missed += 1
                self._silent_until = time.monotonic() + GIVE_UP_SECONDS


class MlflowWriter:
    """Writes sweeps and trials into MLflow; used from one thread. Finds what is there, and completes it."""

    def __init__(self, uri: str, artifacts: Path) -> None:
        self._uri, self._artifacts = uri, artifacts
        self._client: Any = None
        self._experiment = ""
        self._parents: dict[str, str] = {}
        self._children: dict[tuple[str, str], _Child] = {}
        self._started: dict[tuple[str, str], tuple[Trial, int, float]] = {}  # runs that MLflow has not been told of yet

    @property
    def client(self) -> Any:
        if self._client is None:
            own = self._uri.removeprefix(SQLITE) if self._uri.startswith(SQLITE) else ""
            with making_databases(Path(own).parent) if own else contextlib.nullcontext():
                client = connect(self._uri)
                self._experiment = find_or_create_experiment(client, self._artifacts)
            self._client = client
        return self._client

    def begin(self, sweep: str, tags: dict[str, str]) -> None:
        """Find or create the parent run of a sweep, and find its children."""
        client = self.client
        found = _search(client, self._experiment, f"tags.`{TAG}sweep` = '{sweep}'")
        for run in found:
            run_id = run.data.tags.get(TAG + "run_id")
            if run_id:
                done = run.info.status in TERMINAL  # else it was cut off while being written
                child = _Child(run.info.run_id, run.data.tags.get(TAG + "finished_at", "") if done else "")
                child.last_step = int(run.data.tags.get(TAG + "last_step", "-1"))
                child.failed = TAG + "error" in run.data.tags
                self._children[(sweep, run_id)] = child
            elif TAG + "kind" in run.data.tags:
                self._parents[sweep] = run.info.run_id
        if sweep not in self._parents:
            self._parents[sweep] = client.create_run(
                self._experiment, run_name=sweep, tags={TAG + "kind": "sweep", TAG + "sweep": sweep, **tags}
            ).info.run_id
        else:
            client.update_run(self._parents[sweep], status="RUNNING")

    def start(self, trial: Trial, attempt: int) -> None:
        """A run begins. MLflow hears of it when it has lasted a few seconds: shorter ones cost three calls in place of eight."""
        self._started[(trial.sweep, trial.run_id)] = (trial, attempt, time.monotonic())

    def announce(self) -> None:
        """Show the runs that have been going on for a few seconds."""
        now = time.monotonic()
        for key, (trial, attempt, since) in list(self._started.items()):
            if now - since < FLUSH_SECONDS:
                return  # the later ones are younger
            child = self._child(trial)
            child.flushed = now
            self.client.update_run(child.id, status="RUNNING")
            child.running = True
            self.client.set_tag(child.id, TAG + "attempts", str(attempt))
            del self._started[key]

    def pause(self, trial: Trial) -> None:
        """A run was ended before it was done; when it is taken up again, `announce` says so."""
        self._started.pop((trial.sweep, trial.run_id), None)
        child = self._children.get((trial.sweep, trial.run_id))
        if child is not None and child.running:
            self.client.set_terminated(child.id, status="KILLED")
            child.running = False

    def points(self, trial: Trial, points: Sequence[CurvePoint]) -> None:
        """Points of a running trial, kept until a few seconds' worth is there."""
        if (trial.sweep, trial.run_id) not in self._children:
            return  # young: its record, or the next points, will bring them
        child = self._child(trial)
        child.waiting += [p for p in points if p.step > child.last_step]
        if child.waiting and time.monotonic() - child.flushed > FLUSH_SECONDS:
            child.started_ms = child.started_ms or round((time.time() - child.waiting[-1].seconds) * 1000)
            self._flush(child, child.started_ms)

    def system(self, trial: Trial, sample: dict[str, Any]) -> None:
        """What a running trial uses; not in its record, so only MLflow has it."""
        child = self._children.get((trial.sweep, trial.run_id))
        if child is not None:
            from mlflow.entities import Metric

            at, step = sample["at_ms"], sample["step"]
            self.client.log_batch(child.id, metrics=[Metric(k, float(v), at, step) for k, v in sample["metrics"].items()])

    def record(self, trial: Trial, record: RunRecord) -> None:
        """Complete a trial's run from its record; nothing is sent where MLflow has it already."""
        self._started.pop((trial.sweep, trial.run_id), None)
        child = self._child(trial, milliseconds(record.started_at))
        if child.finished_at and child.finished_at == record.finished_at:
            return
        client = self.client
        from mlflow.entities import Metric, Param, RunTag

        now = milliseconds(record.finished_at)
        started_ms = child.started_ms or milliseconds(record.started_at)
        last_step = record.curve[-1].step if record.curve else 0
        metrics = [m for p in record.curve if p.step > child.last_step for m in point_metrics(p, started_ms)]
        metrics += [Metric(k, float(v), now, last_step) for k, v in final_metrics(record).items()]
        metrics += diagnostic_metrics(record, now, after_step=child.last_step if child.finished_at else -1)
        params = [Param(k, str(v)) for k, v in flatten(record.config).items() if k not in NOT_PARAMS]
        tags = [RunTag(k, v) for k, v in {**record_tags(trial, record), TAG + "last_step": str(last_step)}.items()]
        for start in range(0, len(metrics) - BATCH, BATCH):
            client.log_batch(child.id, metrics=metrics[start : start + BATCH])
        rest = metrics[(len(metrics) - 1) // BATCH * BATCH :]
        client.log_batch(child.id, metrics=rest, params=params[:100], tags=tags)  # tags last: they say that all is there
        child.waiting, child.last_step = [], last_step
        if child.failed and record.status == "complete":
            client.delete_tag(child.id, TAG + "error")
        child.failed = record.status == "failed"
        status = {"complete": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}[record.status]
        client.set_terminated(child.id, status=status, end_time=now)
        child.finished_at, child.running = record.finished_at, False

    def tag(self, sweep: str, run_id: str, tags: dict[str, str]) -> None:
        """Tags of a child run, such as a verdict; without such a child nothing happens."""
        child = self._children.get((sweep, run_id))
        for key, value in tags.items():
            if child is not None:
                self.client.set_tag(child.id, TAG + key, value)

    def knows(self, sweep: str) -> bool:
        return sweep in self._parents

    def end(self) -> None:
        for child in self._children.values():
            if child.running:  # the command was interrupted
                self.client.set_terminated(child.id, status="KILLED")
                child.running = False
        for parent in self._parents.values():
            self.client.set_terminated(parent)

    def _child(self, trial: Trial, started_ms: int | None = None) -> _Child:
        key = (trial.sweep, trial.run_id)
        if key not in self._children:
            tags = {"mlflow.parentRunId": self._parents[trial.sweep], TAG + "sweep": trial.sweep, TAG + "run_id": trial.run_id}
            tags |= {TAG + k: v for k, v in trial_tags(trial).items()}
            name = f"{trial.cell} {format_values(trial.values)} s{trial.seed}".replace("  ", " ")
            run = self.client.create_run(self._experiment, start_time=started_ms, run_name=name, tags=tags)
            self._children[key] = _Child(run.info.run_id)
        return self._children[key]

    def _flush(self, child: _Child, started_ms: int) -> None:
        metrics = [m for p in child.waiting for m in point_metrics(p, started_ms)]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(child.id, metrics=metrics[start : start + BATCH])
        if child.waiting:
            child.last_step = max(p.step for p in child.waiting)
            self.client.set_tag(child.id, TAG + "last_step", str(child.last_step))
        child.waiting = []
        child.flushed = time.monotonic()


class _Child:
    """A trial's run in MLflow."""

    __slots__ = ("failed", "finished_at", "flushed", "id", "last_step", "running", "started_ms", "waiting")

    def __init__(self, id: str, finished_at: str = "") -> None:
        self.id = id
        self.finished_at = finished_at
        self.waiting: list[CurvePoint] = []
        self.failed = False
        self.running = False  # MLflow was told so by this command
        self.last_step = -1  # up to here MLflow has the curve
        self.flushed = 0.0
        self.started_ms = 0  # from which its points count their time; 0: none was sent while it ran


def connect(uri: str) -> Any:
    """A client of the tracking store at `uri`; few and short attempts, so that a dead server costs little."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if uri.startswith(SQLITE):
        Path(uri.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    if uri.startswith(SQLITE):
        _do_not_wait_for_the_disk(client)
    return client


def _do_not_wait_for_the_disk(client: Any) -> None:
    """A commit takes 1 ms in place of 5 to 20; what a power cut may break is made again from the records by `sync`."""
    import sqlalchemy

    engine = client._tracking_client.store.engine
    if not sqlalchemy.event.contains(engine, "connect", _relax):  # MLflow shares the engines of one process
        sqlalchemy.event.listen(engine, "connect", _relax)
        engine.dispose()  # connections that are open already are opened anew


def _relax(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA synchronous=OFF")


def find_or_create_experiment(client: Any, artifacts: Path) -> str:
    """The experiment's id. A database of our own keeps artifacts beside it, not in the current folder."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    local = client.tracking_uri.startswith("sqlite")
    return str(client.create_experiment(EXPERIMENT, artifact_location=artifacts.absolute().as_uri() if local else None))


def _search(client: Any, experiment: str, where: str) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment], filter_string=where, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
