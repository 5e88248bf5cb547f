"""Does `nanoladder simulate` say what a real sweep then takes? A small one on a local Ray of two CPUs, undisturbed and with a kill.

    python bench/simulate_check.py [--seconds 5] [--json PATH]

A first sweep of four runs tells speed, start-up and overheads. A second one, of 12 runs in three lengths, is simulated with them
and then run; a third one, alike but for its values, is simulated and run with a process killed (kill -9) in the middle of a run.
Compared: wall-clock, device-seconds of training, of lost work, utilization; as forecast, and at the mean speed that the sweep
then had (other work on the machine changes it from minute to minute).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).parent))
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])

from tiny_run import RUNTIME, tiny_shards

from nanochat_model.config import EvalConfig, GPTConfig
from nanochat_model.horizon import Horizon
from nanochat_model.recipe import Recipe
from nanochat_model.record import RunRecord
from nanochat_model.train import pretrain
from nanoladder.cells import Trial
from nanoladder.execute import execute_sweep, shards_of
from nanoladder.listen import Listener
from nanoladder.live_status import read_status
from nanoladder.ray_init import ensure_ray, shutdown_ray
from nanoladder.simulation.engine import Kill
from nanoladder.simulation.fleet import Fleet, Overheads
from nanoladder.simulation.jobs import JobMaker, beside_training, speed_spread, workers_of
from nanoladder.simulation.phases import Assumed, phases
from nanoladder.simulation.runs import Setting, simulate, simulate_once, typical
from nanoladder.space import Grid
from nanoladder.sweep import Cell, Sweep
from nanoladder.workspace import Workspace

DEVICES = 2
KILLED_RUN = 3  # the fourth that starts
MODEL = GPTConfig(depth=2, model_dim=64, num_heads=2, num_kv_heads=1, sequence_len=32, vocab_size=320, window_pattern="L")


def train(*args: Any, run_dir: str | Path, **kwargs: Any) -> RunRecord:
    """Pretraining that leaves its process id, so that it can be killed."""
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    (Path(run_dir) / "pid").write_text(str(os.getpid()))
    return pretrain(*args, run_dir=run_dir, **kwargs)


def make_sweep(name: str, steps: tuple[int, ...], decays: list[float]) -> Sweep:
    return Sweep(
        name=name,
        question="How long does it take?",
        recipe=Recipe(eval=EvalConfig(num_tokens=2048, every_steps=0), compute_dtype="float32"),
        cells=tuple(Cell(model=MODEL, horizon=Horizon(num_steps=n), overrides={"batch_tokens": 256}) for n in steps),
        space={"optimizer.weight_decay": Grid(decays)},
        packing="keep_remainder",
        backend="actor",
        device="cpu",
        runtime=replace(RUNTIME, keep_last=0),
    )


@dataclass
class Clock(Listener):
    """When runs started and ended, as the driver saw it. Kills the process of one of them on request."""

    kill_after: float | None = None
    root: Path = Path()
    starts: list[tuple[str, float]] = field(default_factory=list)
    ends: dict[str, float] = field(default_factory=dict)
    records: list[RunRecord] = field(default_factory=list)

    def on_start(self, trial: Trial, attempt: int) -> None:
        self.starts.append((trial.run_id, time.time()))
        if self.kill_after is not None and len(self.starts) == KILLED_RUN + 1:
            threading.Timer(self.kill_after, self._kill, [trial.run_id]).start()

    def _kill(self, run_id: str) -> None:
        os.kill(int((self.root / "runs" / run_id / "pid").read_text()), signal.SIGKILL)

    def on_record(self, trial: Trial, record: RunRecord, new: bool) -> None:
        self.ends[trial.run_id] = time.time()
        self.records.append(record)


def run_real(sweep: Sweep, workspace: Workspace, clock: Clock) -> dict[str, Any]:
    began = time.time()
    execute_sweep(sweep, workspace, listeners=[clock], train_function="simulate_check:train")
    wall = time.time() - began
    status = read_status(workspace.sweep_dir(sweep.name))
    assert status is not None and all(r.status == "complete" for r in clock.records)
    lost = float(status["lost_device_seconds"])
    trained, held = sum(r.train_seconds for r in clock.records), sum(r.total_seconds for r in clock.records)
    return {
        "wall_seconds": wall,
        "training_device_seconds": trained,
        "lost_device_seconds": lost,
        "utilization": (held + lost) / (DEVICES * wall),
        "first_start": clock.starts[0][1] - began,
        "second_start": clock.starts[1][1] - began,
        "imports": median(_time(r.started_at) - s for r in clock.records for i, s in clock.starts[:DEVICES] if i == r.run_id),
        "runs": [
            {"seconds": r.total_seconds, "start": _time(r.started_at) - began, "end": _time(r.finished_at) - began}
            for r in clock.records
        ],
    }


def _time(stamp: str) -> float:
    return datetime.datetime.fromisoformat(stamp).timestamp()


def measured_overheads(real: dict[str, Any]) -> Overheads:
    """Of the first sweep: processes start side by side until the second one is there; imports, from there until it trains; the
    driver's share of a trial is the time between two runs in one process."""
    runs = sorted(real["runs"], key=lambda r: r["start"])
    gaps = [min(r["start"] - e["end"] for e in runs if e["end"] <= r["start"]) for r in runs[DEVICES:]]
    return Overheads(driver=max(0.0, median(gaps)), process=real["second_start"], imports=real["imports"], command=0.0, stage=0.0)


def simulated(
    sweep: Sweep, workspace: Workspace, records: list[RunRecord], overheads: Overheads, kill_after: float | None
) -> dict[str, float]:
    fleet = Fleet(device="cpu", num_nodes=1, devices_per_node=DEVICES)
    spread, _ = speed_spread("cpu", records)
    jobs = JobMaker(fleet=fleet, overheads=overheads, records=records)
    planned = phases(sweep, Assumed(), {sweep.name: shards_of(sweep, workspace)})
    setting = Setting(
        phases=planned, fleet=fleet, workers=workers_of(sweep, fleet), overheads=overheads, jobs=jobs, spread=spread, recorded={}
    )
    if kill_after is not None:
        start = beside_training(MODEL, "cpu", records) or 0.0
        setting = replace(setting, kills=(Kill(run=KILLED_RUN, after=kill_after - start),))
    result = simulate_once(setting, typical(simulate(setting, 21)))
    d = result.device_seconds
    beside = (overheads.process + overheads.imports) * (DEVICES + (kill_after is not None)) + overheads.driver * result.runs
    return {
        "wall_seconds": result.wall_seconds,
        "training_device_seconds": d["useful"] + d["slow"],
        "lost_device_seconds": d["lost"],
        "utilization": (result.booked - d["idle"] - beside) / result.booked,
    }


def as_one(records: list[RunRecord]) -> list[RunRecord]:
    """A record with the mean speed of all, and the mean of what is not training."""
    trained, held = sum(r.train_seconds for r in records), sum(r.total_seconds for r in records)
    beside = (held - trained) / len(records)
    flops = sum(r.train_flops for r in records)
    return [replace(records[0], train_flops=flops, train_seconds=trained, total_seconds=trained + beside)]


def show(name: str, before: dict[str, float], after: dict[str, float], real: dict[str, Any]) -> None:
    for key, value in real.items():
        if key in before:
            off = [f"{x[key]:8.3f} {f'({x[key] / value - 1:+.1%})' if value else '':<9}" for x in (before, after)]
            print(f"{name:<12} {key:<26} real {value:8.3f}   forecast {off[0]} at its own speed {off[1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of the middle run, about")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="simulate-check-"))
    shutil.copytree(Path(tiny_shards().path), root / "shards")
    workspace = Workspace(root)
    ensure_ray(workspace, num_cpus=DEVICES)
    facts: dict[str, Any] = {}
    try:
        # Too short to tell a speed, but how many steps make the seconds that were asked for.
        warm = run_real(make_sweep("warm", (200,), [0.01, 0.02]), workspace, Clock())
        per_second = 200 / max(r["seconds"] for r in warm["runs"])
        middle = round(args.seconds * per_second)
        shutil.rmtree(root / "runs")
        first = run_real(make_sweep("first", (middle,), [0.01, 0.02, 0.03, 0.04]), workspace, Clock())
        overheads = measured_overheads(first)
        facts["overheads"] = {k: getattr(overheads, k) for k in ("driver", "process", "imports", "stage")}
        lengths = (middle // 2, middle, middle * 2)
        for name, kill_after, decay in (("undisturbed", None, 0.05), ("kill -9", args.seconds, 0.1)):
            sweep = make_sweep(name.replace(" ", "_"), lengths, [decay, decay + 0.01, decay + 0.02, decay + 0.03])
            clock = Clock(kill_after=kill_after, root=root)
            before = simulated(sweep, workspace, workspace.records(), overheads, kill_after)
            real = run_real(sweep, workspace, clock)
            after = simulated(sweep, workspace, as_one(clock.records), overheads, kill_after)
            facts[name] = {"forecast": before, "at_its_speed": after, "real": real}
            show(name, before, after, real)
    finally:
        shutdown_ray()
        shutil.rmtree(root, ignore_errors=True)
    print("overheads of the first sweep, seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in facts["overheads"].items()))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
