"""A pool over a storage root without Ray: a loop in its place that trains in an order of the caller's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import optuna
from toy_training import train

from nanochat_model.config import DataConfig, RuntimeConfig
from nanochat_model.record import RunRecord
from nanoladder.cells import Trial
from nanoladder.edges import extend_edges
from nanoladder.failed_record import failed_record
from nanoladder.pool import Pool, make_works
from nanoladder.study import CellStudy, open_storage
from nanoladder.sweep import Sweep
from nanoladder.trial_spec import TrialSpec

DATA = DataConfig(manifest_hash="toy")


@lru_cache
def storage_of(root: Path) -> optuna.storages.RDBStorage:
    """One connection a database: opening takes longer than a test's trials."""
    return open_storage(f"sqlite:///{root / 'optuna.db'}")


class Bench:
    """A pool over a storage root, and a loop in Ray's place that trains in an order of the caller's choice."""

    def __init__(self, root: Path, sweeps: Sequence[Sweep], train_function: Callable[..., RunRecord] = train) -> None:
        self.root = root
        self.train_function = train_function
        self.storage = storage_of(root)
        self.new: list[str] = []
        works = [w for s in sweeps for w in make_works(s, lambda s, c, d: CellStudy(s, c, self.storage, d), DATA)]
        self.works = works
        self.pool = Pool(works, root / "runs", on_record=self._seen, extend=extend_edges)
        self.trained: list[Trial] = []

    def _seen(self, trial: Trial, record: RunRecord, new: bool) -> None:
        if new:
            self.new.append(record.run_id)

    def run(self, *, parallel: int = 1, pick: Callable[[int], int] = lambda n: 0, stop_after: int = 10**9) -> None:
        flying: list[Trial] = []
        while True:
            while len(flying) < parallel and (trial := self.pool.next()) is not None:
                flying.append(trial)
            if not flying:
                assert self.pool.done
                return
            trial = flying.pop(pick(len(flying)))
            if len(self.trained) >= stop_after:
                return  # killed: nothing is told, nothing closed
            self.trained.append(trial)
            self.pool.finish(trial.run_id, self._train(trial))

    def _train(self, trial: Trial) -> RunRecord:
        run_dir, attempts = self.root / "runs" / trial.run_id, self.pool.attempts(trial.run_id)
        try:
            return self.train_function(
                trial.config, run_dir=run_dir, sweep=trial.sweep, tags={**trial.tags, "sweeps": trial.sweep}, attempts=attempts
            )
        except RuntimeError as e:
            spec = TrialSpec(
                run_id=trial.run_id, config=trial.config, runtime=RuntimeConfig(), run_dir=str(run_dir), attempts=attempts
            )
            record = failed_record(spec, str(e), seconds=1.0)
            record.save(run_dir)
            return record

    def study(self, index: int = 0) -> optuna.Study:
        return optuna.load_study(study_name=self.works[index].study.name, storage=self.storage)
