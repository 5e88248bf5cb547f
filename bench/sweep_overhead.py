"""What a trial costs beside its training: many trials of a function that sleeps, through the whole path.

Ray Tune with reused actors, Optuna, records, index and MLflow, as in a real sweep. Prints a table and writes JSON.

    python bench/sweep_overhead.py --trials 2000 --seconds 0.05
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])

from toy_training import HORIZON, MODEL, STEP_SECONDS_ENV, TRAIN, notes

from nanochat_model.config import DataConfig
from nanoladder.execute import execute_sweep
from nanoladder.listen import SweepProgress
from nanoladder.ray_init import ensure_ray, shutdown_ray
from nanoladder.space import Grid
from nanoladder.sweep import Cell, Sweep
from nanoladder.workspace import Workspace


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def summary(marks: list[tuple[float, int, float]], args: argparse.Namespace) -> dict[str, float]:
    """Rates over all trials and over the first and last quarter, and the driver's growth over the second half."""
    n = len(marks)

    def seconds_per_trial(first: int, last: int) -> float:
        return (marks[last][0] - marks[first][0]) / max(1, marks[last][1] - marks[first][1])

    skip = min(3, n // 2)
    grown_mb = marks[-1][2] - marks[n // 2][2]
    return {
        "trials": args.trials,
        "concurrent": args.concurrent,
        "trials_per_second": 1 / seconds_per_trial(skip, n - 1),
        "seconds_per_trial": seconds_per_trial(skip, n - 1),
        "seconds_per_trial_first_quarter": seconds_per_trial(skip, max(skip + 1, n // 4)),
        "seconds_per_trial_last_quarter": seconds_per_trial(3 * n // 4, n - 1),
        "driver_mb": marks[-1][2],
        "driver_kb_per_trial": grown_mb / max(1, marks[-1][1] - marks[n // 2][1]) * 1024,
    }


def ramp(root: Path) -> dict[str, float]:
    """How many processes trained, and the time between the first run of the first of them and that of the last."""
    first: dict[int, float] = {}
    for start in notes(root, "start"):
        first.setdefault(start["pid"], start["time"])
    return {"processes": len(first), "ramp_seconds": max(first.values()) - min(first.values())}


def count_mirrors(workspace: Workspace) -> tuple[int, int]:
    """Finished runs in MLflow, complete trials in Optuna: both must be all of them."""
    with sqlite3.connect(workspace.root / "mlflow.db") as db:
        where = "status = 'FINISHED' and run_uuid in (select run_uuid from tags where key = 'nanoladder.run_id')"
        (mirrored,) = db.execute(f"select count(*) from runs where {where}").fetchone()
    with sqlite3.connect(workspace.root / "optuna.db") as db:
        (told,) = db.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()
    return mirrored, told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=0.05, help="of pretended training")
    parser.add_argument("--concurrent", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ[STEP_SECONDS_ENV] = str(args.seconds / 10)
    root = Path(tempfile.mkdtemp(prefix="nanoladder-bench-"))
    marks: list[tuple[float, int, float]] = []

    def see(state: SweepProgress) -> None:
        if not marks or state.done > marks[-1][1]:
            marks.append((time.monotonic(), state.done, resident_mb()))

    knobs = {"batch_tokens": 64, "optimizer.weight_decay": 0.1}
    sweep = Sweep(
        name="overhead",
        question="What does a trial cost beside its training?",
        cells=(Cell(model=MODEL, horizon=HORIZON, overrides=knobs),),
        space={"optimizer.matrix_lr": Grid([0.001 * (1 + i) for i in range(args.trials)])},
    )
    start = time.monotonic()
    ensure_ray(num_cpus=args.concurrent)
    ray_seconds = time.monotonic() - start
    start = time.monotonic()
    execute_sweep(sweep, Workspace(root), data=DataConfig(manifest_hash="toy"), train_function=TRAIN, progress=see)
    whole = time.monotonic() - start
    shutdown_ray()
    again_start = time.monotonic()
    records = len(execute_sweep(sweep, Workspace(root), data=DataConfig(manifest_hash="toy"), train_function=TRAIN))
    again = time.monotonic() - again_start
    mirrored, told = count_mirrors(Workspace(root))
    ramps = ramp(root)
    megabytes = sum(p.stat().st_size for p in root.glob("*.db")) / 2**20
    shutil.rmtree(root)
    facts = summary(marks, args) | ramps
    facts |= {"ray_start_seconds": ray_seconds, "first_trial_seconds": marks[0][0] - start, "whole_seconds": whole}
    facts |= {"after_last_trial_seconds": start + whole - marks[-1][0], "restore_seconds": again}
    facts |= {"mlflow_runs": mirrored, "optuna_trials": told, "records": records, "store_mb": megabytes}
    for key, value in facts.items():
        print(f"{key:<28} {value:10.3f}")
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
