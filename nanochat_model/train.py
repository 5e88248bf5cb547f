"""Pretraining: one function, one process (or one rank of several), from a TrainConfig to a RunRecord.

`python -m nanochat_model.train --help` runs it from a shell, under torchrun or alone.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nanochat_model import device as devices
from nanochat_model.callbacks import Callback, Callbacks
from nanochat_model.checkpoint import (
    CHECKPOINTS_DIR,
    all_checkpoints,
    load_weights,
    read_optimizer_state,
    read_state,
    restore_rng,
    step_dir,
    step_of,
    verify,
)
from nanochat_model.config import RuntimeConfig, TrainConfig
from nanochat_model.core_bundle import locate
from nanochat_model.counts import count_params
from nanochat_model.distributed import Ranks, barrier, current_ranks, on_main
from nanochat_model.errors import ConfigError
from nanochat_model.identity import run_id, write_atomic
from nanochat_model.loop import Clock
from nanochat_model.out_of_memory import halve, is_out_of_memory, limited, read_limit, release_memory
from nanochat_model.progress import Progress
from nanochat_model.record import RECORD_FILE, RunRecord, Status
from nanochat_model.resume import HorizonChange, Start, check_same_run, own_start, parent_hashes, trunk_start
from nanochat_model.runner import Runner, TrainingFailed
from nanochat_model.session import Session, build_session
from nanochat_model.step_times import StartupTimer, StepTimes
from nanochat_model.version import git_commit

CONFIG_FILE = "config.json"
DEFAULT_RUNTIME = RuntimeConfig()


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What a record says about a run besides its result."""

    name: str = ""
    sweep: str = ""
    stage: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    backend: str = "process"
    attempts: int = 1


def pretrain(
    config: TrainConfig,
    runtime: RuntimeConfig = DEFAULT_RUNTIME,
    *,
    run_dir: str | Path,
    callbacks: Sequence[Callback] = (),
    resume: bool = True,
    name: str = "",
    sweep: str = "",
    stage: str = "",
    tags: Mapping[str, str] | None = None,
    backend: str = "process",
    attempts: int = 1,
    horizon_change: HorizonChange = "refuse",
    start_from: str | Path | None = None,
) -> RunRecord:
    """Train `config` in `run_dir` and return its record (status complete, stopped or failed).

    A complete record that is there already is returned as it is. With `resume`, training goes on from the newest intact
    checkpoint; without, earlier checkpoints are set aside. `start_from`: the trunk checkpoint named by `config.trunk`.
    Several ranks: every rank calls this inside one process group, with the same arguments and a shared `run_dir`.
    Out of memory halves the micro-batch and tries once more (several ranks: whoever starts them again does; see out_of_memory).

    Values that stay non-finite give a record with status "failed". Raises ConfigError for input that a user can mend (no
    record is written then); any other exception is written into a failed record and raised on.
    """
    started = time.time()
    ranks = current_ranks()
    run_dir = Path(run_dir)
    labels = Labels(name=name, sweep=sweep, stage=stage, tags=dict(tags or {}), backend=backend, attempts=attempts)
    existing, start = on_main(lambda: _prepare(config, run_dir, resume, horizon_change, start_from))
    if existing is not None:
        return existing
    if runtime.core_bundle:
        on_main(lambda: locate(runtime.core_bundle))  # a wrong path is told now, not hours from now
    record, error = _attempt(config, runtime, ranks, run_dir, start, callbacks, labels, started)
    if error is not None and ranks.world_size == 1 and may_go_on(run_dir, record):
        error = None  # it holds on to the tensors of the attempt
        release_memory()
        start = own_start(config, run_dir, horizon_change) or start
        record, error = _attempt(config, runtime, ranks, run_dir, start, callbacks, labels, started)
    if error is not None:
        raise error
    return record


def _attempt(
    config: TrainConfig,
    runtime: RuntimeConfig,
    ranks: Ranks,
    run_dir: Path,
    start: Start | None,
    callbacks: Sequence[Callback],
    labels: Labels,
    started: float,
) -> tuple[RunRecord, Exception | None]:
    """Train from `start` to the end; the record, which is saved, and what ended the run before its time."""
    limit, startup = read_limit(run_dir), StartupTimer()
    session = build_session(config, limited(runtime, limit), ranks)
    progress = restore_progress(session, start)
    progress.startup_seconds = startup.built()
    parents = parent_hashes(session.parents, start)
    calls = Callbacks(callbacks)
    extra: dict[str, Any] = {}
    if start is not None and start.horizon_changes:  # the result is neither schedule's: the record says so
        extra["horizon_changes"] = list(start.horizon_changes)
        labels.tags["horizon_changes"] = "; ".join(start.horizon_changes)
    runner = Runner(session, progress, calls, run_dir=run_dir, parents=parents, extra=extra)
    status, reason, error = run_to_end(runner)
    if error is not None and is_out_of_memory(error):  # on whichever rank it happened
        limit = halve(run_dir, session.stepper.micro_batch_rows, progress.step) or limit
    record = make_record(session, progress, labels, status, reason, parents, started)
    if limit is not None:
        record = replace(record, out_of_memory=limit.history)
    if ranks.is_main:
        record.save(run_dir)
    if error is None:
        barrier()
        calls.call("on_end", record)
    return record, error


def may_go_on(run_dir: Path, record: RunRecord) -> bool:
    """Whether this attempt ran out of memory and a smaller micro-batch is left to try."""
    limit = read_limit(run_dir)
    return limit is not None and limit.rows < record.micro_batch_rows


def run_to_end(runner: Runner) -> tuple[Status, str | None, Exception | None]:
    """Status, reason, and the exception to raise once the record is written."""
    try:
        status, reason = runner.run(runner.progress.step)
        return status, reason, None
    except TrainingFailed as e:
        return "failed", str(e), None
    except Exception as e:
        return "failed", f"{type(e).__name__}: {e}", e
    finally:
        runner.session.close()


def _prepare(
    config: TrainConfig, run_dir: Path, resume: bool, horizon_change: HorizonChange, start_from: str | Path | None
) -> tuple[RunRecord | None, Start | None]:
    """On rank 0: the complete record that is there already, or where to start. Writes config.json."""
    if (run_dir / RECORD_FILE).is_file() and resume:
        record = RunRecord.load(run_dir)
        changed = check_same_run(record.config, config, 0, horizon_change, str(run_dir / RECORD_FILE))
        if record.status == "complete" and not changed:
            return record, None
    if not resume:
        set_aside(run_dir)
    start = own_start(config, run_dir, horizon_change)
    if start is None and config.trunk:
        if start_from is None:
            raise ConfigError(f"config.trunk {config.trunk!r} needs start_from, the folder of that checkpoint; or call decay_from")
        start = trunk_start(config, Path(start_from))
    write_atomic(run_dir / CONFIG_FILE, json.dumps({"run_id": run_id(config), **asdict(config)}, indent=1))
    return None, start


def rewind(run_dir: str | Path, step: int) -> None:
    """Make the checkpoint of `step` the newest: later ones and the record are set aside, not removed. Rank 0 acts.

    Raises ConfigError when there is no intact checkpoint of that step.
    """
    root = Path(run_dir) / CHECKPOINTS_DIR

    def act() -> None:
        path = step_dir(root, step)
        if not path.is_dir():
            have = ", ".join(str(step_of(p)) for p in all_checkpoints(root)) or "none"
            raise ConfigError(f"{run_dir} has no checkpoint at step {step} (it has: {have}); give one of these")
        verify(path)
        for later in [p for p in all_checkpoints(root) if step_of(p) > step]:
            _rename_aside(later)
        _rename_aside(Path(run_dir) / RECORD_FILE)

    on_main(act)


def set_aside(run_dir: Path) -> None:
    """Rename earlier checkpoints and record, so that a fresh start neither uses nor destroys them."""
    for name in (CHECKPOINTS_DIR, RECORD_FILE):
        _rename_aside(run_dir / name)


def _rename_aside(path: Path) -> None:
    if path.exists():
        n = 1
        while (aside := path.with_name(f"{path.name}.before-{n}")).exists():
            n += 1
        path.rename(aside)


def restore_progress(session: Session, start: Start | None) -> Progress:
    """Fresh weights, or those of `start`, with optimizer, RNG, loss scale, clock and curve."""
    seconds = start.state.seconds if start else 0.0
    progress = Progress(
        config=session.config,
        clock=Clock(session.device, seconds),
        num_devices=session.ranks.world_size,
        peak_flops=devices.peak_flops(session.device),
        times=StepTimes(session.ranks),
    )
    if start is not None:
        load_weights(session.model, start.path)
        load_optimizer(session.optimizer, start.path)
        session.stepper.loss_scale.restore(start.state.loop)
        restore_rng(start.state.rng)
        progress.restore(start.state.step, start.state.curve, start.state.loop)
    return progress


def load_optimizer(optimizer: Any, path: Path) -> None:
    """Load a checkpoint's optimizer state. Raises ConfigError when it holds none."""
    state = read_optimizer_state(path)
    if state is None:
        raise ConfigError(f"{path} holds no optimizer state, so training cannot go on from it; start a new run folder")
    optimizer.load_consolidated(state)


def make_record(
    session: Session,
    progress: Progress,
    labels: Labels,
    status: Status,
    reason: str | None,
    parents: dict[str, str],
    started: float,
) -> RunRecord:
    """What there is to say of a run as it stands; one that reports over 100% of its device's peak has failed."""
    config = session.config
    rate = progress.tokens_per_second
    mfu = progress.mfu(rate)
    if mfu is not None and mfu > 1:
        status, reason = "failed", f"mfu {mfu:.2f} is above 1: {progress.peak_flops:.4g} FLOP/s is not the peak of this device"
    return RunRecord(
        run_id=run_id(config),
        status=status,
        name=labels.name,
        sweep=labels.sweep,
        stage=labels.stage,
        tags=labels.tags,
        config=config,
        seed=config.seed,
        params=count_params(config.model).as_dict(),
        num_tokens=progress.num_tokens,
        flops_per_token=progress.flops_per_token,
        train_flops=progress.train_flops,
        curve=tuple(progress.curve),
        val_bpb=progress.val_bpb if status == "complete" else (progress.curve[-1].val_bpb if progress.curve else None),
        core=progress.core,
        error=reason,
        attempts=labels.attempts,
        backend=labels.backend,
        device=devices.device_name(session.device),
        num_devices=session.ranks.world_size,
        peak_flops_per_device=progress.peak_flops,
        mfu=mfu,
        tokens_per_second=rate,
        train_seconds=progress.clock.seconds,
        total_seconds=time.time() - started,
        micro_batch_rows=session.stepper.micro_batch_rows,
        peak_memory_bytes=devices.peak_memory(session.device),
        step_seconds=progress.times.mean,
        rank_compute_seconds=progress.times.compute_by_rank,
        startup_seconds=progress.startup_seconds,
        diagnostics=progress.diagnostics,
        git_commit=git_commit(),
        parents=parents,
        started_at=iso_time(started),
        finished_at=iso_time(time.time()),
    )


def iso_time(seconds: float) -> str:
    """ISO 8601 in UTC of seconds since 1970."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")


def decay_config(trunk: TrainConfig, step: int, *, decay_steps: int) -> TrainConfig:
    """The config of a short decay that branches off `trunk` after `step` steps: the same up to there, then `decay_steps` of
    warm-down. Raises ConfigError unless the trunk's schedule is constant_then_decay."""
    if trunk.schedule.kind != "constant_then_decay":
        raise ConfigError(f"schedule.kind {trunk.schedule.kind!r} cannot be branched; train the trunk with constant_then_decay")
    if decay_steps < 1:
        raise ConfigError(f"decay_steps {decay_steps} must be at least 1")
    num_steps = step + decay_steps
    schedule = replace(trunk.schedule, warmdown_fraction=decay_steps / num_steps)
    return replace(trunk, num_steps=num_steps, schedule=schedule, trunk=f"{run_id(trunk)}@{step}")


def decay_from(
    trunk_run_dir: str | Path,
    step: int,
    *,
    decay_steps: int,
    run_dir: str | Path,
    runtime: RuntimeConfig = DEFAULT_RUNTIME,
    **labels: Any,
) -> RunRecord:
    """Run a short decay from a trunk's stored checkpoint, as a run of its own whose parent is that checkpoint.

    Tokens, FLOPs, seconds and curve count from the trunk's start: they are the cost of this model. `labels`: callbacks, name,
    sweep, stage, tags … as in `pretrain`. Raises ConfigError when the trunk has no intact checkpoint at `step`.
    """
    config, path = decay_start(trunk_run_dir, step, decay_steps=decay_steps)
    return pretrain(config, runtime, run_dir=run_dir, start_from=path, **labels)


def decay_start(trunk_run_dir: str | Path, step: int, *, decay_steps: int) -> tuple[TrainConfig, Path]:
    """Config of a decay off the trunk's checkpoint at `step`, and that checkpoint's folder, verified. Raises ConfigError."""
    path = step_dir(Path(trunk_run_dir) / CHECKPOINTS_DIR, step)
    if not path.is_dir():
        have = ", ".join(str(step_of(p)) for p in all_checkpoints(path.parent)) or "none"
        raise ConfigError(
            f"trunk {trunk_run_dir} has no checkpoint at step {step} (it has: {have}); train it with runtime.keep_steps"
        )
    verify(path)
    trunk = read_state(path).config
    if trunk is None:
        raise ConfigError(f"{path} holds no training config, so nothing can decay from it")
    return decay_config(trunk, step, decay_steps=decay_steps), path


if __name__ == "__main__":
    from nanochat_model.train_cli import main

    main()
