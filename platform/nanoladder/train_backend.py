"""Runs over any number of devices through Ray Train's TorchTrainer: production, and trials of several devices."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_model.callbacks import Callback
from nanochat_model.config import RuntimeConfig, TrainConfig
from nanochat_model.errors import ConfigError
from nanochat_model.identity import run_id
from nanochat_model.record import CurvePoint, RunRecord
from nanoladder.pool import load_record
from nanoladder.run_events import Heartbeat, MoreEvents
from nanoladder.run_lock import ORPHAN_SECONDS, exclusive
from nanoladder.storage import left_record
from nanoladder.system_use import SystemUse
from nanoladder.trial_spec import PRETRAIN, Forward, TrialSpec
from nanoladder.watchdog import check_fits, not_placed, placement_wait

MAX_WORKER_FAILURES = 3  # of a production run: a node lost now and then must not end it
START_TIMEOUT_ENV = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
STEP_SECONDS = 2.0  # between the step reports that rank 0 sends
ARRIVE_SECONDS = 30.0  # how long the end of a run waits for its last reports, on a machine with much to do
Progress = Callable[[dict[str, Any]], None]


def run_training_on_ray_train(
    config: TrainConfig,
    runtime: RuntimeConfig | None = None,
    *,
    run_dir: str | Path | None = None,
    workspace: Any = None,
    num_workers: int = 1,
    threads_per_worker: int = 1,
    use_gpu: bool | None = None,
    name: str = "",
    sweep: str = "",
    stage: str = "production",
    tags: Mapping[str, str] | None = None,
    attempts: int = 1,
    callbacks: Sequence[Callback] = (),
    progress: Progress | None = None,
    max_failures: int = MAX_WORKER_FAILURES,
    placement_seconds: float | None = None,
    train_function: str = PRETRAIN,
    start_from: str = "",
) -> RunRecord:
    """Train `config` on `num_workers` Ray Train workers, one device (or `threads_per_worker` CPU threads) each.

    Started again with the same config it returns the finished record, or goes on from the newest checkpoint; a worker or
    node that dies is replaced up to `max_failures` times. `callbacks` are sent to the workers, so they must pickle.
    `progress` is called in this process with dicts: {"event": "start"|"step"|"eval", …} as StepInfo and CurvePoint, and those of
    `run_events`.
    Raises ConfigError where the cluster cannot hold the workers (naming what is missing), and what the training raised.
    """
    import ray

    from nanoladder.ray_init import ensure_ray

    rid = run_id(config)
    folder = Path(run_dir) if run_dir is not None else workspace.run_dir(rid)
    finished = load_record(folder)
    if finished is not None and finished.status == "complete":
        return finished
    session = ensure_ray(workspace, num_cpus=None if num_workers * threads_per_worker <= 1 else num_workers * threads_per_worker)
    gpu = session.num_gpus > 0 if use_gpu is None else use_gpu
    runtime = runtime or RuntimeConfig()
    spec = TrialSpec(
        run_id=rid,
        config=config,
        runtime=runtime,
        run_dir=str(folder.absolute()),
        name=name,
        sweep=sweep,
        stage=stage,
        tags=dict(tags or {}),
        attempts=attempts,
        backend="train",
        num_workers=num_workers,
        resources_per_worker={"CPU": float(threads_per_worker), **({"GPU": 1.0} if gpu else {})},
        placement_seconds=placement_seconds or placement_wait(started_here=session.started_here),
        train_function=train_function,
        start_from=start_from,
        storage=workspace.remote if workspace is not None else "",
        root=str(workspace.root) if workspace is not None else "",
    )
    if session.started_here:
        check_fits(total_resources(spec), ray.cluster_resources(), f"run {name or rid} with {num_workers} workers")
    with exclusive(folder, f"run {rid}", wait_seconds=ORPHAN_SECONDS):
        return fit_trial(spec, progress or (lambda event: None), callbacks=callbacks, max_failures=max_failures)


def total_resources(spec: TrialSpec) -> dict[str, float]:
    return {k: v * spec.num_workers for k, v in spec.resources_per_worker.items()}


def fit_trial(spec: TrialSpec, send: Progress, *, callbacks: Sequence[Callback] = (), max_failures: int = 0) -> RunRecord:
    """Run `spec` through TorchTrainer and return the record that rank 0 wrote."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    os.environ[START_TIMEOUT_ENV] = str(spec.placement_seconds)
    events = Queue(actor_options={"num_cpus": 0})
    uses_gpu = spec.resources_per_worker.get("GPU", 0) > 0
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # may return a value; the stubs lag behind
        train_loop_config={"spec": spec.to_json(), "events": events, "callbacks": tuple(callbacks)},
        torch_config=TorchConfig(backend="nccl" if uses_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=spec.num_workers,
            use_gpu=uses_gpu,
            resources_per_worker=dict(spec.resources_per_worker),
            label_selector=dict(spec.node_labels) or None,  # type: ignore[call-arg]  # Train v2 has it; the stubs lag behind
        ),
        run_config=RunConfig(
            name=f"{spec.run_id}-{spec.attempts}-{os.getpid()}",  # Train would take up a finished name where it ended
            storage_path=str(Path(spec.run_dir) / ".train"),
            failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=0),  # type: ignore[call-arg]
        ),
    )
    stop = threading.Event()
    forwarder = threading.Thread(target=_forward, args=(events, send, stop), daemon=True)
    forwarder.start()
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
    except SystemExit:  # Train's own answer to Ctrl-C
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as e:
        raise _explain(e, spec) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)  # Train leaves its handler behind
        stop.set()
        forwarder.join(timeout=ARRIVE_SECONDS)
        events.shutdown(force=True)
        _remove_scratch(Path(spec.run_dir) / ".train")
    value = result.return_value or {}  # type: ignore[attr-defined]
    if "bad_config" in value:
        raise ConfigError(value["bad_config"])
    return left_record(spec.storage, spec.root, spec.run_dir)


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Runs in every Train worker, inside its process group. A ConfigError comes back as a value: Train would retry it."""
    import ray.train
    from ray.exceptions import RayError

    rank = ray.train.get_context().get_world_rank()
    spec = TrialSpec.from_json(config["spec"])
    queue_actor = config["events"].actor
    sent: deque[Any] = deque(maxlen=1)

    def send(event: dict[str, Any]) -> None:
        sent.append(queue_actor.put_nowait.remote(event))

    own = Throttle(send) if rank == 0 else lambda event: None
    told = [Forward(own), MoreEvents(own), SystemUse(own), Heartbeat(send, rank), ReportToTrain()]
    try:
        record = spec.run([*told, *config["callbacks"]])
    except ConfigError as e:
        return {"bad_config": str(e)}
    with contextlib.suppress(RayError):  # nobody sees that the run has ended before what it told last has arrived
        ray.get(list(sent), timeout=ARRIVE_SECONDS)
    return {"status": record.status, "run_id": record.run_id}


class ReportToTrain(Callback):
    """Tells Ray Train (its dashboard and result) of every evaluation. Collective: all ranks call it."""

    def on_eval(self, point: CurvePoint) -> None:
        import ray.train

        ray.train.report({"val_bpb": point.val_bpb, "step": point.step, "num_tokens": point.num_tokens})


class Throttle:
    """Lets a step report through every STEP_SECONDS at most and the last one, all else always."""

    def __init__(self, send: Progress) -> None:
        self._send = send
        self._last = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        last = event["event"] == "step" and event["step"] == event["num_steps"]
        if event["event"] != "step" or last or now - self._last >= STEP_SECONDS:
            self._last = now if event["event"] == "step" else self._last
            self._send(event)


def _forward(events: Any, send: Progress, stop: threading.Event) -> None:
    """Pass on what the workers report until told to stop. A queue that is gone ends it: reports are for people to see."""
    from ray.exceptions import RayError
    from ray.util.queue import Empty

    while not stop.is_set():
        try:
            send(events.get(timeout=0.5))
        except Empty:
            continue
        except RayError:
            return
    try:
        while True:
            send(events.get_nowait())
    except (Empty, RayError, queue.Empty):
        return


def _explain(error: Exception, spec: TrialSpec) -> Exception:
    """The error behind Ray Train's: what is missing where workers were not placed, else what a worker raised."""
    import ray
    from ray.train import ControllerError

    cause = getattr(error, "controller_failure", None)
    if isinstance(error, ControllerError) and cause is not None and "StartupTimeout" in type(cause).__name__:
        waited = f"run {spec.name or spec.run_id} with {spec.num_workers} workers waited {spec.placement_seconds:.0f} s"
        resources = ray.cluster_resources(), ray.available_resources()
        return ConfigError(not_placed(waited, total_resources(spec), spec.node_labels, *resources))
    failures = getattr(error, "worker_failures", None) or {}
    first = next(iter(failures.values()), cause or error)
    text = "".join(traceback.format_exception_only(first)).strip()
    return RuntimeError(text.splitlines()[-1] if text else str(error))


def _remove_scratch(folder: Path) -> None:
    """Ray Train's own bookkeeping: nothing is restored from it, checkpoints lie in the run's folder."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
