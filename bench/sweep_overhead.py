"""What a trial costs beside its training: many trials of a function that sleeps, through the whole path.

Ray Tune with reused actors, Optuna, records, index and MLflow, as in a real sweep. Prints a table and writes JSON.

    python bench/sweep_overhead.py --trials 200 --seconds 0.05
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])

from toy_training import HORIZON, MODEL, STEP_SECONDS_ENV, TRAIN

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
    start = time.monotonic()
    execute_sweep(sweep, Workspace(root), data=DataConfig(manifest_hash="toy"), train_function=TRAIN)
    again = time.monotonic() - start
    shutil.rmtree(root)
    half = len(marks) // 2
    (t0, n0, _), (t1, n1, m1), (_, nh, mh) = marks[min(3, half)], marks[-1], marks[half]
    per_trial = (t1 - t0) / (n1 - n0)
    facts = {
        "trials": args.trials,
        "ray_start_seconds": ray_seconds,
        "first_trial_seconds": whole - (t1 - marks[0][0]),
        "seconds_per_trial": per_trial,
        "overhead_seconds_per_trial": per_trial * args.concurrent - args.seconds,
        "trials_per_second": 1 / per_trial,
        "driver_mb": m1,
        "driver_kb_per_trial": (m1 - mh) / max(1, n1 - nh) * 1024,
        "again_seconds": again,
    }
    for key, value in facts.items():
        print(f"{key:<28} {value:10.3f}")
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
