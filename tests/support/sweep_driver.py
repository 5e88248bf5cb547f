"""A sweep of the toy training as a process of its own, to be interrupted in every way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import optuna
from ray_nodes import is_alive
from toy_training import notes

from nanochat_model.config import DataConfig
from nanochat_model.record import RunRecord
from nanoladder.cells import planned_trials
from nanoladder.sweep import Sweep
from nanoladder.sweep_command import load_sweep
from nanoladder.workspace import Workspace

SUPPORT = Path(__file__).parent
SWEEP_FILE = f"""
import sys
sys.path.insert(0, {str(SUPPORT)!r})
from functools import partial
from toy_training import HORIZON, MODEL, TRAIN
from nanochat_model.config import DataConfig
from nanoladder import Cell, Grid, Sweep, execute, run_sweep

SWEEP = Sweep(
    name="toy",
    question="?",
    cells=(Cell(model=MODEL, horizon=HORIZON, overrides={{"batch_tokens": 64, "optimizer.weight_decay": 0.1}}),),
    space={{"optimizer.matrix_lr": Grid([0.001 * 1.5**i for i in range(NUM_RUNS)])}},
)

if __name__ == "__main__":
    execute.execute_sweep = partial(execute.execute_sweep, train_function=TRAIN, data=DataConfig(manifest_hash="toy"))
    run_sweep(SWEEP)
"""


class Driver:
    """`python toy.py` in a session of its own."""

    def __init__(self, folder: Path, num_runs: int) -> None:
        self.folder = folder
        self.root = folder / "runs"
        (folder / "toy.py").write_text(SWEEP_FILE.replace("NUM_RUNS", str(num_runs)))
        sweep = load_sweep(folder / "toy.py")
        assert isinstance(sweep, Sweep)
        self.expected = {t.run_id for t in planned_trials(sweep, DataConfig(manifest_hash="toy"))}

    def start(self, step_seconds: float, *options: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        env = (env or dict(os.environ)) | {"TOY_STEP_SECONDS": str(step_seconds), "PYTHONPATH": str(SUPPORT)}
        return subprocess.Popen(
            [sys.executable, "toy.py", "--storage", str(self.root), *options],
            cwd=self.folder,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def ended(self) -> set[str]:
        return {n["run_id"] for n in notes(self.root, "end")}

    def _open_runs(self) -> set[tuple[int, str]]:
        """(process, run) of what was begun and not ended there."""
        over = {(n["pid"], n["run_id"]) for n in notes(self.root, "end")}
        return {(n["pid"], n["run_id"]) for n in notes(self.root, "start")} - over

    def training(self) -> list[int]:
        """Processes in the middle of a run, as far as they are alive."""
        return [pid for pid in {pid for pid, _ in self._open_runs()} if is_alive(pid)]

    def training_runs(self, processes: Collection[int]) -> set[str]:
        """Runs that these processes are in the middle of."""
        return {run_id for pid, run_id in self._open_runs() if pid in processes}

    def trainers(self) -> list[int]:
        """Living processes that have trained anything."""
        return [pid for pid in {n["pid"] for n in notes(self.root, "start")} if is_alive(pid)]

    def states(self) -> list[str]:
        """What Optuna holds of each trial."""
        study = optuna.load_study(study_name=None, storage=Workspace(self.root).optuna_uri)  # there is only one
        return [t.state.name for t in study.trials]

    def check_it_ended_well(self) -> list[RunRecord]:
        """The records of an undisturbed sweep: each once, none failed, and Optuna agrees."""
        records = [RunRecord.load(p) for p in (self.root / "runs").glob("*/record.json")]
        assert {r.run_id for r in records} == self.expected and len(records) == len(self.expected)
        assert {r.status for r in records} == {"complete"}
        assert self.states() == ["COMPLETE"] * len(self.expected)
        return records
