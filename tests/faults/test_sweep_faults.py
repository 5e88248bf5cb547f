"""A sweep that is interrupted by Ctrl-C, by the death of its driver, of a trial's process: the same command ends it right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import optuna
import pytest
from tiny_run import RUNTIME, tiny_config
from toy_training import notes

from nanochat_model.config import DataConfig
from nanochat_model.record import RunRecord
from nanochat_model.train import pretrain
from nanoladder.cells import planned_trials
from nanoladder.sweep_command import load_sweep
from nanoladder.workspace import Workspace

SUPPORT = Path(__file__).parents[1] / "support"
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
    space={{"optimizer.matrix_lr": Grid([0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16])}},
)

if __name__ == "__main__":
    execute.execute_sweep = partial(execute.execute_sweep, train_function=TRAIN, data=DataConfig(manifest_hash="toy"))
    run_sweep(SWEEP)
"""


class Driver:
    """`python toy.py` in a session of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "runs"
        (folder / "toy.py").write_text(SWEEP_FILE)

    def start(self, step_seconds: float) -> subprocess.Popen[str]:
        env = os.environ | {"TOY_STEP_SECONDS": str(step_seconds), "PYTHONPATH": str(SUPPORT)}
        command = [sys.executable, "toy.py", "--storage", str(self.root), "--num-cpus", "2", "--mlflow", ""]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=heed_interrupts,
        )

    def ended(self) -> set[str]:
        return {n["run_id"] for n in notes(self.root, "end")}

    def training(self) -> list[int]:
        """Processes in the middle of a run, as far as they are alive."""
        last = {n["pid"]: "start" for n in notes(self.root, "start")}
        open_runs = {(n["pid"], n["run_id"]) for n in notes(self.root, "start")} - {
            (n["pid"], n["run_id"]) for n in notes(self.root, "end")
        }
        return [pid for pid in last if any(p == pid for p, _ in open_runs) and is_alive(pid)]


def heed_interrupts() -> None:
    """A shell that starts the tests in the background has SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(what: Callable[[], object], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    yield Driver(tmp_path)


@pytest.mark.timeout(900)
def test_a_sweep_interrupted_in_every_way_ends_as_an_undisturbed_one(driver: Driver) -> None:
    sweep = load_sweep_of(driver)
    expected = {t.run_id for t in planned_trials(sweep, DataConfig(manifest_hash="toy"))}  # type: ignore[arg-type]

    # Ctrl-C, to the whole group as a terminal sends it
    process = driver.start(step_seconds=0.12)
    wait_for(lambda: driver.ended() and driver.training())
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130 and "the same command goes on" in err and "Traceback" not in err
    wait_for(lambda: not driver.training(), 60)

    # kill -9 of the driver: no orphan may go on
    done = driver.ended()
    process = driver.start(step_seconds=0.12)
    wait_for(lambda: driver.ended() > done and driver.training())
    process.kill()
    process.communicate()
    wait_for(lambda: not driver.training(), 60)
    time.sleep(1)
    done = driver.ended()
    assert done < expected, "there is something left to do"
    time.sleep(2)
    assert driver.ended() == done, "nobody trains on behind the driver's back"

    # kill -9 of a trial's process: that run is tried again in the same command
    process = driver.start(step_seconds=0.12)
    wait_for(lambda: len(driver.training()) > 0 and driver.ended() >= done)
    victim = driver.training()[0]
    os.kill(victim, signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert "its process died" in out and out.count("one more try") == 1

    records = [RunRecord.load(p) for p in (driver.root / "runs").glob("*/record.json")]
    assert {r.run_id for r in records} == expected and len(records) == len(expected)
    assert {r.status for r in records} == {"complete"} and sorted(r.attempts for r in records) == [1] * 6 + [2]
    assert len(notes(driver.root, "end")) == len(expected), "each run was trained to its end once"
    study = optuna.load_study(study_name=None, storage=Workspace(driver.root).optuna_uri)  # there is only one
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * len(expected)

    # and once more: nothing is left to do
    process = driver.start(step_seconds=0.12)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and len(notes(driver.root, "end")) == len(expected)
    assert "7 runs were recorded already" in out


def load_sweep_of(driver: Driver) -> object:
    return load_sweep(driver.folder / "toy.py")


LAUNCH = f"""
import os, sys
sys.path.insert(0, {str(SUPPORT)!r})
from dataclasses import replace
from tiny_run import RUNTIME
from nanochat_model.identity import from_dict
from nanochat_model.config import TrainConfig
from nanoladder.ray_init import ensure_ray, shutdown_ray
from nanoladder.train_backend import run_training_on_ray_train
import json
config = from_dict(TrainConfig, json.loads(open("config.json").read()))
ensure_ray(num_cpus=2)
runtime = replace(RUNTIME, checkpoint_every_steps=10)
events = []
record = run_training_on_ray_train(config, runtime, run_dir="run", num_workers=2, progress=lambda e: events.append(e["event"]))
print("ended", record.status, record.val_bpb, events.count("start"), events.count("eval"))
shutdown_ray()
assert run_training_on_ray_train(config, runtime, run_dir="run") == record, "a finished run is not started again"
"""


@pytest.mark.timeout(600)
def test_a_worker_of_ray_train_that_is_killed_is_replaced_and_nothing_changes(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = tiny_config(num_steps=400, eval__every_steps=100)
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    (tmp_path / "launch.py").write_text(LAUNCH)
    alone = pretrain(config, RUNTIME, run_dir=tmp_path / "alone")
    process = subprocess.Popen(
        [sys.executable, "launch.py"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    request.addfinalizer(lambda: process.poll() is None and os.killpg(process.pid, signal.SIGKILL))
    checkpoints = tmp_path / "run" / "checkpoints"
    wait_for(lambda: checkpoints.is_dir() and len(list(checkpoints.glob("step_*"))) >= 2)
    victim = next(pid for pid in session_of(process.pid) if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(victim, signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    status, bpb, starts, evals = out.splitlines()[-1].split()[1:]
    assert status == "complete" and float(bpb) == pytest.approx(alone.val_bpb, rel=1e-4)
    assert (int(starts), int(evals)) == (2, len(alone.curve)), "the second worker group went on from a checkpoint"
    record = RunRecord.load(tmp_path / "run")
    assert (record.num_devices, record.backend, record.stage, len(record.curve)) == (2, "train", "production", len(alone.curve))
    assert list(checkpoints.glob("step_*")), "a production run keeps its checkpoints"


def session_of(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == leader:
                found.append(int(entry.name))
    return found
