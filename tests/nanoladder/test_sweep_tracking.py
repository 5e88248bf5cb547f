"""MLflow that is dead, slow or empty: no run is held up, none is lost, and `sync` fills what is missing."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial
from toy_sweep import CELL
from toy_training import train

from nanochat_model.config import DataConfig
from nanochat_model.errors import ConfigError
from nanochat_model.record import RunRecord
from nanoladder.cells import planned_trials
from nanoladder.listen import Listener, Listeners
from nanoladder.pool import Pool, make_works
from nanoladder.ray_metrics import memory_bytes
from nanoladder.run_lock import exclusive
from nanoladder.space import Choice, Grid, LogUniform
from nanoladder.study import CellStudy, open_storage
from nanoladder.sweep import Sweep
from nanoladder.sweep_index import IndexWriter, read_index
from nanoladder.sync import _frozen, sync
from nanoladder.system_use import SystemUse
from nanoladder.tracking import MlflowMirror, MlflowWriter, connect
from nanoladder.workspace import Workspace

GRID = Sweep(name="grid", question="?", cells=(CELL,), seeds=(0, 1), space={"optimizer.matrix_lr": Grid([0.01, 0.02])})
SPACE = {"optimizer.matrix_lr": LogUniform(1e-3, 1e-1), "schedule.kind": Choice(["nanochat", "constant_then_decay"])}
TPE = Sweep(name="tpe", question="?", cells=(CELL,), sampler="tpe", num_trials=3, space=SPACE)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_STEP_SECONDS", "0")


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def run(workspace: Workspace, sweep: Sweep, mirror: Listener) -> float:
    """A sweep without Ray; the seconds that its listeners took, their end left out."""
    storage = open_storage(workspace.optuna_uri)
    works = make_works(sweep, lambda s, c, d: CellStudy(s, c, storage, d), DataConfig(manifest_hash="toy"))
    listener = Listeners([IndexWriter(workspace, works), mirror])
    spent, start = 0.0, time.monotonic()
    listener.on_begin([sweep])
    pool = Pool(works, workspace.runs_dir, on_record=listener.on_record)
    while (trial := pool.next()) is not None:
        record = train(trial.config, run_dir=workspace.run_dir(trial.run_id), sweep=sweep.name, tags=dict(trial.tags))
        start = time.monotonic()
        listener.on_start(trial, 1)
        for point in record.curve:
            listener.on_event(trial, {"event": "eval", **vars(point)})
        pool.finish(trial.run_id, record)
        spent += time.monotonic() - start
    listener.on_end()
    storage.engine.dispose()
    return spent


def children(workspace: Workspace, sweep: str) -> list[object]:
    client = connect(workspace.mlflow_uri)
    experiment = client.get_experiment_by_name("nanoladder")
    where = f"tags.`nanoladder.sweep` = '{sweep}'"
    found = client.search_runs([experiment.experiment_id], filter_string=where) if experiment else []
    return [r for r in found if "mlflow.parentRunId" in r.data.tags]


def test_a_server_that_is_down_loses_nothing_and_sync_fills_it_in(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    said: list[str] = []
    with socket.socket() as deaf:  # bound, so that nobody else gets the port, and not listening
        deaf.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        run(workspace, GRID, MlflowMirror(dead, artifacts=tmp_path, warn=said.append))
    assert len(list(workspace.record_paths())) == 4
    assert len(said) == 2 and "does not take" in said[0] and "nanoladder sync" in said[1]

    report = sync(workspace)
    assert (report.num_runs, report.num_sweeps, report.broken) == (4, 1, ())
    found = children(workspace, "grid")
    assert len(found) == 4 and {r.info.status for r in found} == {"FINISHED"}  # type: ignore[attr-defined]
    before = {r.info.run_id for r in found}  # type: ignore[attr-defined]
    sync(workspace)
    assert {r.info.run_id for r in children(workspace, "grid")} == before, "a second sync adds nothing"  # type: ignore[attr-defined]


def test_a_server_that_never_answers_does_not_hold_up_a_run(
    tmp_path: Path, silent_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "300")  # a single call that waited would take as long
    said: list[str] = []
    mirror = MlflowMirror(silent_server, artifacts=tmp_path, warn=said.append, close_seconds=0.5)
    start = time.monotonic()
    spent = run(Workspace(tmp_path), GRID, mirror)
    assert spent < 150, "listeners must return at once"
    assert time.monotonic() - start < 250 and any("behind the records" in s for s in said)


def test_optuna_is_made_again_from_records(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for sweep in (GRID, TPE):
        run(workspace, sweep, MlflowMirror(workspace.mlflow_uri, artifacts=tmp_path))
    names = optuna.study.get_all_study_names(workspace.optuna_uri)
    old = {n: optuna.load_study(study_name=n, storage=workspace.optuna_uri).trials for n in names}
    (tmp_path / "optuna.db").unlink()
    assert sync(workspace, mlflow_uri="").num_studies == 2
    for name, trials in old.items():
        new = optuna.load_study(study_name=name, storage=workspace.optuna_uri).trials
        assert [(t.params, t.value, t.state, t.intermediate_values) for t in new] == [
            (t.params, t.value, t.state, t.intermediate_values) for t in trials
        ]
    before = {r.info.run_id for r in children(workspace, "grid")}  # type: ignore[attr-defined]
    run(workspace, GRID, MlflowMirror(workspace.mlflow_uri, artifacts=tmp_path))
    assert {r.info.run_id for r in children(workspace, "grid")} == before  # type: ignore[attr-defined]


def test_runs_without_the_metric_are_told_as_failed() -> None:
    """As the command that ran them does: a fine-tuning measures no CORE."""
    rows = [{"run_id": "r", "seed": seed, "values": {}, "status": "complete", "core": None} for seed in (0, 1)]
    assert _frozen(rows, ["core"], {}, {}).state.name == "FAIL"
    assert _frozen([{**r, "core": 0.25} for r in rows], ["core"], {}, {}).value == 0.25
    assert _frozen([rows[0], {**rows[1], "status": "stopped"}], ["core"], {}, {}).state.name == "PRUNED"


def test_trials_of_a_dead_command_are_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(tmp_path)
    names = {}
    for sweep in (GRID, TPE):
        with monkeypatch.context() as dying:
            dying.setattr(CellStudy, "finish", lambda *args, **kwargs: None)  # killed between the record and telling Optuna
            run(workspace, sweep, Listener())
        names[sweep.name] = read_index(workspace.sweep_dir(sweep.name))["studies"][CELL.label]["study"]

    def trials(sweep: Sweep) -> list[FrozenTrial]:
        return optuna.load_study(study_name=names[sweep.name], storage=workspace.optuna_uri).trials

    assert {t.state.name for s in (GRID, TPE) for t in trials(s)} == {"RUNNING"}
    said: list[str] = []
    with exclusive(workspace.sweep_dir("grid"), "sweep grid"), exclusive(workspace.sweep_dir("tpe"), "sweep tpe"):
        assert sync(workspace, mlflow_uri="", say=said.append).num_settled == 0
    assert len(said) == 2 and all("is being worked on" in text for text in said)
    records = {p.parent.name: RunRecord.load(p) for p in workspace.record_paths()}
    assert sync(workspace, mlflow_uri="").num_settled == 2 + 3
    done = trials(GRID)
    assert [t.state.name for t in done] == ["COMPLETE"] * 2
    for trial in done:
        assert trial.value == pytest.approx(fmean(records[r].val_bpb for r in trial.user_attrs["runs"].values()))
    assert [(t.state.name, "command died" in t.user_attrs["left"]) for t in trials(TPE)] == [("WAITING", True)] * 3
    for sweep in (GRID, TPE):
        run(workspace, sweep, Listener())
    assert [t.state.name for s in (GRID, TPE) for t in trials(s)] == ["COMPLETE"] * 5
    assert len(list(workspace.record_paths())) == 4 + 3 and sync(workspace, mlflow_uri="").num_settled == 0


def test_commands_that_start_at_once_make_one_database(tmp_path: Path) -> None:
    """Without taking turns all but one fail on tables that exist already."""
    workspace, ready, failed = Workspace(tmp_path), threading.Barrier(3), []

    def start(name: str) -> None:
        ready.wait()
        try:
            open_storage(workspace.optuna_uri).engine.dispose()
            MlflowWriter(workspace.mlflow_uri, tmp_path / "mlartifacts").begin(name, {})
        except Exception as e:
            failed.append(f"{name}: {e}")

    threads = [threading.Thread(target=start, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(connect(workspace.mlflow_uri).search_experiments()) == 2, "ours and MLflow's default"


def test_what_a_trial_uses_is_shown_and_a_paused_one_is_not_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoladder.tracking.FLUSH_SECONDS", 0.0)
    samples: list[dict[str, Any]] = []
    use = SystemUse(samples.append, seconds=0.0)
    trial = planned_trials(GRID, DataConfig(manifest_hash="toy"))[0]
    train(trial.config, run_dir=tmp_path / "run", callbacks=[use])
    assert [s["step"] for s in samples] == list(range(1, 11))
    last = samples[-1]["metrics"]
    assert last["system/process_memory_usage_megabytes"] == pytest.approx(memory_bytes() / 1e6, rel=0.2)
    assert 0 <= last["system/cpu_utilization_percentage"] <= 100 and last["system/process_cpu_percentage"] >= 0
    never: list[dict[str, Any]] = []
    train(trial.config, run_dir=tmp_path / "short", callbacks=[SystemUse(never.append)])
    assert not never, "a short trial sends nothing"

    workspace = Workspace(tmp_path)
    writer = MlflowWriter(workspace.mlflow_uri, tmp_path)
    writer.begin("grid", {})
    writer.start(trial, 1)
    writer.announce()
    writer.system(trial, samples[-1])
    (child,) = children(workspace, "grid")
    assert child.info.status == "RUNNING"  # type: ignore[attr-defined]
    assert child.data.metrics["system/process_cpu_percentage"] == last["system/process_cpu_percentage"]  # type: ignore[attr-defined]
    writer.pause(trial)
    (child,) = children(workspace, "grid")
    assert child.info.status == "KILLED"  # type: ignore[attr-defined]
    writer.start(trial, 1)
    writer.announce()
    writer.end()
    (child,) = children(workspace, "grid")
    assert child.info.status == "KILLED", "the command ended while it ran"  # type: ignore[attr-defined]

    inside = {"step": [5, 10], "gradient_norm/h.0.mlp.c_fc": [0.25, None]}
    record = replace(RunRecord.load(tmp_path / "run"), diagnostics=inside, step_seconds={"compute": 2.0})
    writer.record(trial, record)
    (child,) = children(workspace, "grid")
    found = child.data.metrics  # type: ignore[attr-defined]
    assert found["diagnostics/gradient_norm/h.0.mlp.c_fc"] == 0.25 and found["step_seconds/compute"] == 2.0


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(ConfigError, match="has no locks"), exclusive(tmp_path / "run", "a run"):
        pass


def test_broken_records_and_runs_without_a_sweep_are_named_and_kept(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    run(workspace, replace(GRID, seeds=(0,)), MlflowMirror("", artifacts=tmp_path, warn=lambda text: None))
    first, second = workspace.record_paths()
    second.write_text(second.read_text()[:200])
    (tmp_path / "sweeps" / "grid" / "index.json").unlink()
    report = sync(workspace)
    assert report.num_runs == 1 and len(report.broken) == 1 and str(second) in report.broken[0]
    (child,) = children(workspace, "grid")
    assert child.data.tags["nanoladder.run_id"] == first.parent.name  # type: ignore[attr-defined]
