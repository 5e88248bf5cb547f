"""Run sweeps to their end: skip what is recorded, train the rest on Ray, keep index, Optuna and MLflow in step."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanochat_model.config import DataConfig, RuntimeConfig
from nanochat_model.errors import ConfigError
from nanochat_model.record import RunRecord
from nanochat_model.sft_recipe import TRAIN_FUNCTION, SFTRecipe
from nanoladder.cells import Trial, check_sweep
from nanoladder.edges import extend_edges
from nanoladder.listen import Listener, Listeners, ProgressState, SweepProgress
from nanoladder.live_status import StatusWriter
from nanoladder.node_labels import NO_LABELS, NodeLabels, coming_gpus, present_gpus, resources_of_nodes
from nanoladder.pool import CellWork, Pool, make_works, trial_tags
from nanoladder.prune import Pruner
from nanoladder.run_lock import exclusive, remove_abandoned
from nanoladder.sharing import fit_share, share_runtime
from nanoladder.stopping import StopWatch, SweepStopped
from nanoladder.study import CellStudy, open_storage
from nanoladder.sweep import Sweep
from nanoladder.sweep_index import IndexWriter
from nanoladder.throughput import Throughput
from nanoladder.trial_needs import choose_backend, total_need, trial_seconds, trial_speed, with_checkpoints, worker_resources
from nanoladder.trial_spec import PRETRAIN, TrialSpec
from nanoladder.watchdog import LOCAL_WAIT_SECONDS, check_fits, placement_wait
from nanoladder.workspace import Workspace, read_records

SPEED_RECORDS = 50  # newest records that tell this device's speed


def execute_sweep(sweep: Sweep, workspace: Workspace, **options: Any) -> list[RunRecord]:
    """`execute_sweeps` of one."""
    return execute_sweeps([sweep], workspace, **options)[0]


def execute_sweeps(
    sweeps: Sequence[Sweep],
    workspace: Workspace,
    *,
    data: DataConfig | None = None,
    progress: Callable[[SweepProgress], None] | None = None,
    listeners: Sequence[Listener] = (),
    max_concurrent: int | None = None,
    address: str | None = None,
    num_cpus: int | None = None,
    mlflow_uri: str | None = None,
    train_function: str = PRETRAIN,
) -> list[list[RunRecord]]:
    """The records of each sweep, one a run (failed ones too), in the order of cells, candidates and seeds.

    Several sweeps share one stream of trials, so that no device waits between them. Ray is started only when something is
    left to train. `data`: the shards (default: the workspace's, in each sweep's packing). `mlflow_uri`: "" for no tracking,
    default the workspace's database. Raises ConfigError, before Ray starts, for whatever cannot run, and SweepStopped when
    `nanoladder stop` ended it.
    """
    for name, given in (("max_concurrent", max_concurrent), ("num_cpus", num_cpus)):
        if given is not None and given < 1:
            raise ConfigError(f"{name} {given} must be at least 1; leave it out for as many as there are")
    twice = [s.name for i, s in enumerate(sweeps) if s.name in [t.name for t in sweeps[:i]]]
    if twice:
        raise ConfigError(f"two sweeps are named {twice[0]!r}; give each its own name")
    datas = [data if data is not None else shards_of(sweep, workspace) for sweep in sweeps]
    for sweep, own in zip(sweeps, datas, strict=True):
        check_sweep(sweep, own)
    with contextlib.ExitStack() as stack:
        for sweep in sorted(sweeps, key=lambda s: s.name):
            stack.enter_context(exclusive(workspace.sweep_dir(sweep.name), f"sweep {sweep.name}"))
        storage = open_storage(workspace.optuna_uri)
        stack.callback(storage.engine.dispose)
        works = [
            w
            for sweep, own in zip(sweeps, datas, strict=True)
            for w in make_works(sweep, lambda s, c, d: CellStudy(s, c, storage, d), own)
        ]
        for work in works:
            stack.callback(work.study.release)
        all_listeners = [*_own_listeners(works, workspace, progress, mlflow_uri), *listeners]
        listener = Listeners(all_listeners)
        listener.on_begin(sweeps)
        stack.callback(listener.on_end)
        pool = Pool(works, workspace.runs_dir, on_record=listener.on_record, extend=extend_edges)
        if not pool.done:
            _train(pool, sweeps, workspace, listener, max_concurrent, address, num_cpus, train_function)
    return [_in_order(sweep, works) for sweep in sweeps]


def shards_of(sweep: Sweep, workspace: Workspace) -> DataConfig:
    """The workspace's shards in the sweep's packing (a fine-tuning's own conversations); ConfigError where they are missing or of
    another vocabulary."""
    if isinstance(sweep.recipe, SFTRecipe):
        return sweep.recipe.data
    if not (workspace.shards_dir / "manifest.json").is_file():
        raise ConfigError(f"no token shards at {workspace.shards_dir}; build them with: {data_command(sweep, workspace)}")
    data = workspace.data_config(sweep.packing)
    for cell in sweep.cells:
        if cell.model.vocab_size != workspace.vocab_size:
            raise ConfigError(
                f"sweep {sweep.name}, cell {cell.label}: model.vocab_size {cell.model.vocab_size} is not that of the shards in "
                f"{workspace.shards_dir} ({workspace.vocab_size}); change the cell's model, or give a --storage of that "
                f"vocabulary (nanoladder data --vocab-size {cell.model.vocab_size})"
            )
    return data


def data_command(sweep: Sweep, workspace: Workspace) -> str:
    """What makes shards of the sweep's vocabulary."""
    return f"nanoladder data --storage {workspace.root} --vocab-size {sweep.cells[0].model.vocab_size}"


def _own_listeners(
    works: Sequence[CellWork], workspace: Workspace, progress: Callable[[SweepProgress], None] | None, mlflow_uri: str | None
) -> list[Listener]:
    listeners: list[Listener] = [IndexWriter(workspace, works), StatusWriter(workspace, works), Housekeeper(workspace, works)]
    uri = workspace.mlflow_uri if mlflow_uri is None else mlflow_uri
    if uri:
        from nanoladder.tracking import MlflowMirror

        listeners.append(MlflowMirror(uri, artifacts=workspace.root / "mlartifacts"))
    if any(w.sweep.pruning != "none" for w in works):
        listeners.append(Pruner(workspace, [w.sweep for w in works]))
    if workspace.remote:
        from nanoladder.remote_steering import RemoteSteering

        listeners.append(RemoteSteering(workspace))
    if progress is not None:
        listeners.append(ProgressState(report=progress, clock=time.monotonic, wanted=lambda: wanted(works)))
    return listeners


def wanted(works: Sequence[CellWork]) -> tuple[int, float]:
    """Runs of all cells and their FLOPs, those of candidates not yet known taken as their cell's baseline."""
    runs = [(w.wanted_runs(), w.flops_per_trial) for w in works]
    return sum(n for n, _ in runs), sum(n * flops for n, flops in runs)


class Housekeeper(Listener):
    """Removes the checkpoints of finished runs of sweeps that do not ask to keep them."""

    def __init__(self, workspace: Workspace, works: Sequence[CellWork]) -> None:
        self._workspace = workspace
        self._keep = {w.sweep.name: w.sweep.keep_checkpoints or bool(w.sweep.runtime.keep_steps) for w in works}

    def on_record(self, trial: Trial, record: RunRecord, new: bool) -> None:
        if new and record.status == "complete" and not self._keep[trial.sweep]:
            shutil.rmtree(self._workspace.run_dir(trial.run_id) / "checkpoints", ignore_errors=True)


def _train(
    pool: Pool,
    sweeps: Sequence[Sweep],
    workspace: Workspace,
    listener: Listener,
    max_concurrent: int | None,
    address: str | None,
    num_cpus: int | None,
    train_function: str,
) -> None:
    from nanoladder.ray_init import ensure_ray

    session = ensure_ray(workspace, num_cpus=num_cpus, address=address)
    import ray

    from nanoladder.schedule_trials import Scheduler, fit

    labels = NodeLabels(present=present_gpus(), coming=coming_gpus())
    has_gpu = session.num_gpus > 0 or bool(labels.coming)
    wait = placement_wait(started_here=session.started_here)
    maker = SpecMaker(sweeps, workspace, has_gpu=has_gpu, train_function=train_function, labels=labels, placement_seconds=wait)
    if session.started_here:
        for sweep in sweeps:
            check_fits(maker.sweep_need(sweep), ray.cluster_resources(), f"a trial of sweep {sweep.name}")
    for sweep in sweeps:
        maker.probe(sweep)
    # On a cluster that was joined, a given number of trials in flight is taken literally: nodes may yet be added for them.
    literal = max_concurrent is not None and not session.started_here
    scheduler = Scheduler(
        pool,
        maker,
        listener,
        capacity=None if literal else resources_of_nodes,
        max_concurrent=max_concurrent,
        placement_seconds=wait,
        stop=StopWatch([workspace.sweep_dir(s.name) for s in sweeps]),
    )
    scratch = workspace.root / "tune"
    remove_abandoned(scratch.glob("*"))
    mine = scratch / f"{os.getpid()}-{time.time_ns()}@{socket.gethostname()}"
    with exclusive(mine, "Tune's scratch"):
        fit(scheduler, mine)
    if scheduler.stopping is not None and not pool.done:
        names = ", ".join(s.name for s in sweeps)
        raise SweepStopped(f"{names} stopped on request by {scheduler.stopping.requested_by}; the same command goes on from here")


class SpecMaker:
    """From a trial to what its process is told: backend, devices, threads, when to save."""

    def __init__(
        self,
        sweeps: Sequence[Sweep],
        workspace: Workspace,
        *,
        has_gpu: bool,
        train_function: str = PRETRAIN,
        labels: NodeLabels = NO_LABELS,
        placement_seconds: float = LOCAL_WAIT_SECONDS,
    ) -> None:
        self._sweeps = {s.name: s for s in sweeps}
        self._workspace = workspace
        self._has_gpu = has_gpu
        self._train_function = train_function
        self._placement_seconds = placement_seconds
        self._records = recent_records(workspace)
        self._fitting_rows: dict[str, int] = {}  # of the sweeps whose trials share a device
        self._labels = {s.name: labels.selector(s.device) for s in sweeps if has_gpu}
        for sweep in sweeps:
            if sweep.device not in ("", "cpu") and not has_gpu:
                raise ConfigError(
                    f"sweep {sweep.name} is meant for {sweep.device} and this cluster has no GPU; give the --address of one that "
                    "has, or --set device=cpu to run it here all the same"
                )

    def __call__(self, trial: Trial, attempt: int) -> TrialSpec:
        sweep = self._sweeps[trial.sweep]
        speed = self._speed(sweep, trial)
        seconds = trial_seconds(sweep, trial, speed)
        return TrialSpec(
            run_id=trial.run_id,
            config=trial.config,
            runtime=replace(self._runtime(sweep, seconds), usual_mfu=speed.usual_mfu),
            run_dir=str(self._workspace.run_dir(trial.run_id)),
            name=trial.name,
            sweep=trial.sweep,
            stage=trial.stage,
            tags=trial_tags(trial),
            attempts=attempt,
            backend=choose_backend(sweep, seconds),
            num_workers=sweep.devices_per_trial,
            resources_per_worker=self._resources(sweep),
            placement_seconds=self._placement_seconds,
            train_function=TRAIN_FUNCTION if isinstance(sweep.recipe, SFTRecipe) else self._train_function,
            start_from=sweep.recipe.base_checkpoint if isinstance(sweep.recipe, SFTRecipe) else "",
            storage=self._workspace.remote,
            root=str(self._workspace.root),
            keep_checkpoints=sweep.keep_checkpoints or bool(sweep.runtime.keep_steps),
            node_labels=self._labels.get(sweep.name, {}),
        )

    def sweep_need(self, sweep: Sweep) -> dict[str, float]:
        return total_need(self._resources(sweep), sweep.devices_per_trial)

    def probe(self, sweep: Sweep) -> None:
        """Where trials share an accelerator: make sure that they fit. Raises ConfigError."""
        if sweep.trials_per_device > 1 and self._uses_gpu(sweep):
            runtime = share_runtime(sweep, sweep.runtime)
            labels = self._labels.get(sweep.name, {})
            self._fitting_rows[sweep.name] = fit_share(sweep, runtime, self._resources(sweep), labels, self._placement_seconds)

    def _uses_gpu(self, sweep: Sweep) -> bool:
        return self._has_gpu and sweep.device != "cpu"

    def _resources(self, sweep: Sweep) -> dict[str, float]:
        return worker_resources(sweep, uses_gpu=self._uses_gpu(sweep))

    def _speed(self, sweep: Sweep, trial: Trial) -> Throughput:
        device = sweep.device or ("h100" if self._uses_gpu(sweep) else "cpu")
        return trial_speed(sweep, trial, device, self._records)

    def _runtime(self, sweep: Sweep, seconds: float) -> RuntimeConfig:
        runtime = sweep.runtime
        if not self._uses_gpu(sweep):
            runtime = replace(runtime, device="cpu", num_threads=runtime.num_threads or sweep.threads_per_trial)
        elif sweep.trials_per_device > 1:
            runtime = share_runtime(sweep, replace(runtime, micro_batch_rows=self._fitting_rows[sweep.name]))
        return with_checkpoints(sweep, runtime, seconds)


def recent_records(workspace: Workspace) -> list[RunRecord]:
    """The newest readable records."""
    paths: list[Path] = sorted(workspace.record_paths(), key=lambda p: p.stat().st_mtime)[-SPEED_RECORDS:]
    return read_records(paths)[0]


def _in_order(sweep: Sweep, works: Sequence[CellWork]) -> list[RunRecord]:
    mine: Mapping[str, CellWork] = {w.cell.label: w for w in works if w.sweep.name == sweep.name}
    records: list[RunRecord] = []
    for cell in sweep.cells:
        by_candidate = mine[cell.label].records
        records += [by_candidate[c][seed] for c in sorted(by_candidate) for seed in sweep.seeds if seed in by_candidate[c]]
    return records
