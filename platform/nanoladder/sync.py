"""Fill MLflow and Optuna from the records, which are the truth: after a tracking server was down, or for a new one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from nanochat_model.errors import ConfigError
from nanochat_model.record import RunRecord
from nanoladder.cells import Trial
from nanoladder.promote import PROMOTIONS_FILE, read_promotions
from nanoladder.run_lock import LOCK_FILE, exclusive
from nanoladder.sweep_index import INDEX_FILE, read_index
from nanoladder.workspace import Workspace

LEFT = "left"  # user attribute of an Optuna trial whose command died
OTHER_RUNS = "other-runs"  # parent in MLflow of runs that belong to no sweep


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What was looked at. `broken`: one line for each record or index that cannot be read."""

    num_runs: int
    num_sweeps: int
    num_studies: int
    num_settled: int  # trials that a dead command left as running
    broken: tuple[str, ...]


def sync(
    workspace: Workspace, *, mlflow_uri: str | None = None, optuna_uri: str | None = None, say: Callable[[str], None] | None = None
) -> SyncReport:
    """Bring MLflow and Optuna up to the records. "" leaves one out; default are the workspace's own databases.

    Runs that are there already are left as they are, and so are sweeps that a command is at work on. Raises ConfigError where
    the tracking server does not answer.
    """
    say = say or (lambda text: None)
    records, broken = workspace.read_records()
    by_id = {r.run_id: r for r in records}
    indexes: list[dict[str, Any]] = []
    for path in sorted((workspace.root / "sweeps").rglob(INDEX_FILE)):
        try:
            indexes.append(read_index(path))
        except ConfigError as e:
            broken.append(str(e))
    studies = settled = 0
    if optuna_uri != "":
        uri = optuna_uri or workspace.optuna_uri
        studies = sum(_sync_optuna(index, by_id, uri) for index in indexes)
        settled = _settle_optuna(workspace, indexes, by_id, uri, say)
    if mlflow_uri != "":
        _sync_mlflow(workspace, indexes, by_id, mlflow_uri or workspace.mlflow_uri, say)
    return SyncReport(
        num_runs=len(records), num_sweeps=len(indexes), num_studies=studies, num_settled=settled, broken=tuple(broken)
    )


def _sync_mlflow(
    workspace: Workspace, indexes: list[dict[str, Any]], records: dict[str, RunRecord], uri: str, say: Callable[[str], None]
) -> None:
    from nanoladder.mlflow_facts import TAG
    from nanoladder.tracking import MlflowWriter

    writer = MlflowWriter(uri, workspace.root / "mlartifacts")
    verdicts = _verdicts(workspace.root)
    named: set[str] = set()
    try:
        for index in indexes:
            say(f"MLflow: sweep {index['sweep']}")
            writer.begin(index["sweep"], {TAG + "question": index["question"], "mlflow.note.content": index["question"]})
            for row in index["trials"]:
                record = records.get(row["run_id"])
                if record is not None:
                    writer.record(_trial(index, row, record), record)
                    named.add(record.run_id)
            for run_id, verdict in verdicts.items():
                writer.tag(index["sweep"], run_id, {"verdict": verdict})
        for record in (r for r in records.values() if r.run_id not in named):
            sweep = record.sweep or OTHER_RUNS
            if not writer.knows(sweep):
                writer.begin(sweep, {})
            row = {"run_id": record.run_id, "cell": record.name or record.run_id, "candidate": 0, "values": {}, "seed": record.seed}
            writer.record(_trial({"sweep": sweep, "stage": record.stage}, row, record), record)
        writer.end()
    except Exception as e:
        raise ConfigError(f"MLflow at {uri} does not take the runs ({type(e).__name__}: {str(e)[:200]}); is the server up?") from e


def _trial(index: dict[str, Any], row: dict[str, Any], record: RunRecord) -> Trial:
    return Trial(
        sweep=index["sweep"],
        cell=row["cell"],
        candidate=row["candidate"],
        values=row["values"],
        seed=row["seed"],
        config=record.config,
        run_id=record.run_id,
        stage=index["stage"],
        tags={k: v for k, v in record.tags.items() if k != "sweeps"},
    )


def _verdicts(root: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in (root / "sweeps").rglob(PROMOTIONS_FILE):
        for promotion in read_promotions(path):
            found |= dict.fromkeys(promotion["run_ids"], promotion["verdict"])
    return found


def _sync_optuna(index: dict[str, Any], records: dict[str, RunRecord], uri: str) -> int:
    """Make the studies of a sweep that are missing; returns how many were made."""
    import optuna
    from optuna.distributions import json_to_distribution

    from nanoladder.study import open_storage

    storage = open_storage(uri)
    try:
        known = set(optuna.study.get_all_study_names(storage))
        made = 0
        for cell, facts in index["studies"].items():
            rows = [r for r in index["trials"] if r["cell"] == cell]
            if facts["study"] in known or not rows:
                continue
            objectives = index.get("objectives") or {index["metric"]: index["direction"]}
            study = optuna.create_study(study_name=facts["study"], storage=storage, directions=list(objectives.values()))
            distributions = {k: json_to_distribution(d) for k, d in facts["distributions"].items()}
            for number in sorted({r["candidate"] for r in rows}):
                study.add_trial(_frozen([r for r in rows if r["candidate"] == number], list(objectives), distributions, records))
            made += 1
        return made
    finally:
        storage.engine.dispose()


def _settle_optuna(
    workspace: Workspace, indexes: list[dict[str, Any]], records: dict[str, RunRecord], uri: str, say: Callable[[str], None]
) -> int:
    """End what Optuna takes for running although its sweep's command is dead (nobody holds the sweep's lock); how many trials.

    A trial whose runs are all recorded gets their outcome. Any other waits, as after a command that ended by itself: finished
    trials cannot be opened again, and the sweep's command goes on with it. So do all of a sampler that learns: it is told of
    results in their turn, or it would suggest other runs.
    """
    import optuna
    from optuna.trial import TrialState

    from nanoladder.study import open_storage

    storage = open_storage(uri)
    by_study = {facts["study"]: (index, cell) for index in indexes for cell, facts in index["studies"].items()}
    settled = 0
    try:
        for name in optuna.study.get_all_study_names(storage):
            study = optuna.load_study(study_name=name, storage=storage)
            folder = workspace.sweep_dir(study.user_attrs.get("sweep", ""))
            if not (folder / LOCK_FILE).exists() or not study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                continue
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(exclusive(folder, f"sweep {folder.name}"))
                except ConfigError as e:
                    say(f"Optuna: {e}; its study is left as it is")
                    continue
                index, cell = by_study.get(name, (None, ""))
                settled += _settle(storage, study.get_trials(deepcopy=False), index, cell, records)
    finally:
        storage.engine.dispose()
    return settled


def _settle(storage: Any, trials: Sequence[Any], index: dict[str, Any] | None, cell: str, records: dict[str, RunRecord]) -> int:
    from optuna.distributions import json_to_distribution
    from optuna.trial import TrialState

    from nanoladder.study import RETRY_OF

    running = [(n, t) for n, t in enumerate(t for t in trials if RETRY_OF not in t.user_attrs) if t.state == TrialState.RUNNING]
    for number, trial in running:
        rows = [r for r in index["trials"] if (r["cell"], r["candidate"]) == (cell, number)] if index else []
        if index and rows and {r["seed"] for r in rows} == set(index.get("seeds", ())) and not index["studies"][cell]["learns"]:
            distributions = {k: json_to_distribution(d) for k, d in index["studies"][cell]["distributions"].items()}
            objectives = list(index.get("objectives") or {index["metric"]: index["direction"]})
            told = _frozen(rows, objectives, distributions, records)
            for step, value in told.intermediate_values.items():
                storage.set_trial_intermediate_value(trial._trial_id, step, value)
            storage.set_trial_user_attr(trial._trial_id, "runs", told.user_attrs["runs"])
            storage.set_trial_state_values(trial._trial_id, told.state, told.values)
        else:
            storage.set_trial_user_attr(trial._trial_id, LEFT, "the sweep's command died while this ran; the same command goes on")
            storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    return len(running)


def _frozen(rows: list[dict[str, Any]], metrics: list[str], distributions: dict[str, Any], records: dict[str, RunRecord]) -> Any:
    """One candidate, all its seeds, as a finished Optuna trial."""
    import optuna
    from optuna.trial import TrialState

    from nanoladder.study import thin

    statuses = {r["status"] for r in rows}
    judged = statuses == {"complete"} and all(r[m] is not None for r in rows for m in metrics)  # some runs measure no CORE
    stopped = "stopped" in statuses and "failed" not in statuses
    state = TrialState.COMPLETE if judged else TrialState.PRUNED if stopped else TrialState.FAIL
    record = records.get(rows[0]["run_id"]) if len(metrics) == 1 else None  # Optuna keeps curves of one objective only
    params = rows[0]["values"]
    return optuna.trial.create_trial(
        state=state,
        params=params,
        distributions={k: d for k, d in distributions.items() if k in params},  # of a conditional space, those that apply
        values=[fmean(r[m] for r in rows) for m in metrics] if state == TrialState.COMPLETE else None,
        intermediate_values={p.step: p.val_bpb for p in thin(record.curve)} if record is not None else {},
        user_attrs={"runs": {str(r["seed"]): r["run_id"] for r in rows}},
    )
