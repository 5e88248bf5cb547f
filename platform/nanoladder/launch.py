"""From a plan to a run on Ray Train, and its verdict: prediction against result."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanochat_model.config import RuntimeConfig
from nanochat_model.errors import ConfigError
from nanochat_model.identity import run_id, write_atomic
from nanochat_model.record import RunRecord
from nanoladder.alerts import Alert, Limits, Watch, Webhook, read_alerts
from nanoladder.cells import Trial
from nanoladder.live_run import LiveRun
from nanoladder.outcomes import PREDICTION_FILE, PRODUCTION, prediction_facts, read_prediction, said_prediction
from nanoladder.plan import LaunchPlan, LossPrediction
from nanoladder.pool import load_record
from nanoladder.tracking import MlflowMirror
from nanoladder.trial_spec import PRETRAIN
from nanoladder.workspace import Workspace

VERDICT_FILE = "verdict.json"
ALERTS_FILE = "alerts.json"  # of every start of the run
Progress = Callable[[dict[str, Any]], None]
STEPS_PER_REPORT = 10
TICK_SECONDS = 1.0
CHECKPOINT_SECONDS = 900.0  # between checkpoints of a long run: what a crash may cost


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """How a launched run is watched. None of it changes its result."""

    address: str | None = None  # of a Ray cluster
    quiet: bool = False
    webhook: str = ""  # address that alerts are posted to
    mlflow: str | None = None  # tracking server; None: the storage root's own, "": none
    sample_every_steps: int = 0
    core_every_steps: int = 0  # 0 with a bundle: at the end only
    core_bundle: str = ""
    core_max_per_task: int = 500
    checkpoint_every_seconds: float = CHECKPOINT_SECONDS
    limits: Limits = field(default_factory=Limits)


def launch(
    plan: LaunchPlan,
    workspace: Workspace,
    options: LaunchOptions | None = None,
    *,
    progress: Progress | None = None,
    train_function: str = PRETRAIN,
) -> dict[str, Any]:
    """Run `plan` on Ray Train and return the verdict.

    The prediction is written into the run's folder before the run starts, and kept if it is there already: what was said
    first counts, of hours as of the loss. Alerts are kept there too, over all starts. Workers and nodes that die are replaced,
    and the run goes on from its newest checkpoint; so does the same launch started again. `progress` also gets the run's
    events, and alerts as {"event": "alert", …}. Raises ConfigError when the plan is blocked (by a bad law or a refused
    prediction) or has no data, and what the training raised.
    """
    options = options or LaunchOptions()
    check_launch(plan, workspace)
    folder = workspace.run_dir(run_id(plan.config))
    said = _first_said(plan, folder)
    with Observer(plan, workspace, options, progress) as observer:
        record = load_record(folder)
        if record is None or record.status != "complete":
            record = _run(plan, workspace, options, observer, train_function)
        verdict = {**judge(record, said_prediction(said)), "alerts": [a.line for a in observer.alerts]}
        verdict |= {"predicted_hours": said["hours"], "hours": record.train_seconds / 3600, "core": record.core}
        write_atomic(folder / VERDICT_FILE, json.dumps(verdict, indent=1))
        observer.finish(record, verdict)
    return verdict


def check_launch(plan: LaunchPlan, workspace: Workspace) -> None:
    """ConfigError where the plan is blocked, or its data is missing."""
    if plan.blocking:
        raise ConfigError("; ".join(plan.blocking))
    if not plan.config.data.manifest_hash:
        raise ConfigError(f"no token shards under {workspace.root}; build them with: nanoladder data --storage {workspace.root}")


def _first_said(plan: LaunchPlan, folder: Path) -> dict[str, Any]:
    """What was predicted before the run's first start; written down if this is the first."""
    path = folder / PREDICTION_FILE
    if not path.exists():
        facts = prediction_facts(plan.config, plan.prediction, plan.uses)
        write_atomic(path, json.dumps({**facts, "hours": plan.hours}, indent=1))
    return {"hours": plan.hours, **read_prediction(path)}


def _run(plan: LaunchPlan, workspace: Workspace, options: LaunchOptions, observer: Observer, train_function: str) -> RunRecord:
    from nanoladder.ray_init import ensure_ray, shutdown_ray
    from nanoladder.train_backend import run_training_on_ray_train

    on_cpu = plan.throughput.peak_flops_per_device is None
    ensure_ray(workspace, num_cpus=plan.target.num_devices if on_cpu else None, address=options.address)
    try:
        return run_training_on_ray_train(
            plan.config,
            launch_runtime(plan, options),
            workspace=workspace,
            num_workers=plan.target.num_devices,
            use_gpu=not on_cpu,
            name=PRODUCTION,
            sweep=PRODUCTION,
            stage=PRODUCTION,
            tags={"purpose": PRODUCTION},
            progress=observer.event,
            train_function=train_function,
        )
    except Exception as e:
        observer.tell(Alert(kind="failed", step=observer.watch.step, text=str(e).splitlines()[0] if str(e) else type(e).__name__))
        raise
    finally:
        shutdown_ray()


class Observer:
    """Context manager between a run's events and whoever wants to know: terminal, MLflow, webhook. Events come from one thread,
    the clock's ticks from another."""

    def __init__(self, plan: LaunchPlan, workspace: Workspace, options: LaunchOptions, progress: Progress | None = None) -> None:
        self.plan, self.options = plan, options
        self._alerts_path = workspace.run_dir(run_id(plan.config)) / ALERTS_FILE
        self.alerts = read_alerts(self._alerts_path)
        self._progress = progress
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="watch", daemon=True)
        self.live = LiveRun(plan) if not options.quiet else None
        self.watch = Watch(limits=options.limits, pauses_after=self._pauses_after)
        rid = run_id(plan.config)
        self.webhook = Webhook(options.webhook, {"run_id": rid, "name": PRODUCTION}, self._warn) if options.webhook else None
        self.trial = Trial(
            sweep=PRODUCTION, cell=PRODUCTION, candidate=0, seed=plan.config.seed, config=plan.config, run_id=rid, stage=PRODUCTION
        )
        uri = workspace.mlflow_uri if options.mlflow is None else options.mlflow
        self.mirror = MlflowMirror(uri, artifacts=workspace.root / "mlartifacts", warn=self._warn) if uri else None

    def __enter__(self) -> Observer:
        if self.live is not None:
            self.live.__enter__()
        if self.mirror is not None:
            self.mirror.on_begin(())
            self.mirror.begin_other(PRODUCTION, {})
            self.mirror.on_start(self.trial, 1)
        self._ticker.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._over.set()
        self._ticker.join()
        if self.live is not None:
            self.live.__exit__()
        if self.mirror is not None:
            self.mirror.on_end()
        if self.webhook is not None:
            self.webhook.close()

    def event(self, event: dict[str, Any]) -> None:
        with self._lock:
            found = self.watch.see(event)
        if event["event"] == "beat":
            return
        if self.live is not None:
            self.live.event(event)
        if self.mirror is not None:
            self.mirror.on_event(self.trial, event)
        if self._progress is not None:
            self._progress(event)
        for alert in found:
            self.tell(alert)

    def tell(self, alert: Alert) -> None:
        with self._lock:  # events and the clock both find alerts, each in a thread of its own
            self.alerts.append(alert)
            write_atomic(self._alerts_path, json.dumps([asdict(a) for a in self.alerts], indent=1))
        if self.live is not None:
            self.live.alert(alert)
        if self._progress is not None:
            self._progress({"event": "alert", **asdict(alert), "line": alert.line})
        if self.webhook is not None:
            self.webhook.send(alert)
        if self.mirror is not None:
            self.mirror.tag(self.trial, self._tags())

    def finish(self, record: RunRecord, verdict: dict[str, Any]) -> None:
        if self.mirror is not None:
            self.mirror.on_record(self.trial, record, True)
            self.mirror.tag(self.trial, {**self._tags(), "verdict": verdict["text"]})
        if self.live is not None:
            self.live.say(verdict["text"], "bold")

    def _tags(self) -> dict[str, str]:
        """The latest alert, and how many of each kind there were."""
        if not self.alerts:
            return {}
        counts = Counter(a.kind for a in self.alerts)
        return {"alert": self.alerts[-1].line, "alerts": ", ".join(f"{kind} {n}" for kind, n in counts.items())}

    def _tick(self) -> None:
        while not self._over.wait(TICK_SECONDS):
            with self._lock:
                found = self.watch.tick()
            for alert in found:
                self.tell(alert)

    def _pauses_after(self, step: int) -> bool:
        """Whether an evaluation, a sample or CORE may follow this step, which all take long."""
        o = self.options
        every = (self.plan.config.eval.every_steps, o.core_every_steps, o.sample_every_steps)
        near = max(1, STEPS_PER_REPORT)  # reports come every few steps: one of those in between may be followed by it
        return step >= self.plan.config.num_steps - near or any(n > 0 and (step % n == 0 or step % n >= n - near) for n in every)

    def _warn(self, text: str) -> None:
        if self.live is not None:
            self.live.say(f"warning: {text}", "yellow")
        else:
            print(f"warning: {text}", file=sys.stderr)


def launch_runtime(plan: LaunchPlan, options: LaunchOptions | None = None) -> RuntimeConfig:
    """How the plan's processes run: its micro-batch on a known card, the device's own choice on a CPU."""
    options = options or LaunchOptions()
    return RuntimeConfig(
        device="auto" if plan.memory_known else "cpu",
        micro_batch_rows=plan.micro_batch_rows if plan.memory_known else 0,
        num_threads=0 if plan.memory_known else 1,
        checkpoint_every_seconds=options.checkpoint_every_seconds,
        log_every_steps=STEPS_PER_REPORT,
        sample_every_steps=options.sample_every_steps,
        core_every_steps=options.core_every_steps,
        core_bundle=options.core_bundle,
        core_max_per_task=options.core_max_per_task,
        usual_mfu=plan.throughput.usual_mfu,
        price_per_device_hour=plan.target.price_per_device_hour or 0.0,
    )


def judge(record: RunRecord, prediction: LossPrediction | None) -> dict[str, Any]:
    """Prediction against result: inside the interval, or by how much outside, and what that says about the laws."""
    facts: dict[str, Any] = {
        "run_id": record.run_id,
        "status": record.status,
        "measured": record.val_bpb,
        "predicted": prediction.loss if prediction else None,
        "low": prediction.low if prediction else None,
        "high": prediction.high if prediction else None,
        "error": None,
        "inside": None,
    }
    if record.status != "complete" or record.val_bpb is None:
        return {**facts, "text": f"run {record.run_id} ended as {record.status}: {record.error or 'no loss was measured'}"}
    measured = f"measured {record.val_bpb:.4f} bpb"
    if prediction is None:
        return {**facts, "text": f"{measured}; nothing was predicted"}
    error = record.val_bpb / prediction.loss - 1
    text = f"predicted {prediction.loss:.4f}, {measured} ({error:+.2%})"
    inside = None
    if prediction.low is not None and prediction.high is not None:
        inside = prediction.low <= record.val_bpb <= prediction.high
        where = "inside" if inside else ("better than" if record.val_bpb < prediction.low else "worse than")
        holds = "the laws hold here" if inside else "fit the laws again with this run among the data"
        text += f"; {where} the interval [{prediction.low:.4f}, {prediction.high:.4f}]: {holds}"
    return {**facts, "error": error, "inside": inside, "text": text}
