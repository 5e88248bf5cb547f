"""A sweep whose trial, terminal or driver is killed: nothing is lost or done twice."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from ray_nodes import kill_process, session_of, wait_for
from sweep_driver import Driver
from toy_training import TRAIN, held, notes

from nanochat_model.config import DataConfig
from nanoladder.execute import execute_sweep
from nanoladder.sweep import Sweep
from nanoladder.sweep_command import load_sweep
from nanoladder.sync import sync
from nanoladder.workspace import Workspace

pytestmark = pytest.mark.seconds(60)
STEP_SECONDS = 0.05  # ten of them a run


def test_a_sweep_killed_in_every_way_ends_as_an_undisturbed_one(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    driver = Driver(tmp_path, num_runs=9)

    def start(num_cpus: int = 2) -> subprocess.Popen[str]:
        process = driver.start(STEP_SECONDS, "--num-cpus", str(num_cpus), "--mlflow", "")
        request.addfinalizer(lambda: [kill_process(pid) for pid in session_of(process.pid)])
        return process

    # kill -9 of a trial's process: that run is tried again in the same command
    with held(driver.root) as stuck:
        process = start()
        wait_for(lambda: len(stuck()) == 2)
        killed, lost = next(iter(stuck().items()))
        os.kill(killed, signal.SIGKILL)
        wait_for((driver.root / "runs" / lost / "record.json").exists)  # the driver has noticed
    wait_for(lambda: lost in driver.ended())
    # Ctrl-C, to the whole group as a terminal sends it
    with held(driver.root) as stuck:
        wait_for(stuck)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert "its process died" in out and out.count("one more try") == 1, out + err
    assert process.returncode == 130 and "the same command goes on" in err and "Traceback" not in err, err
    wait_for(lambda: not driver.trainers())
    assert "RUNNING" not in driver.states(), "what was cut off waits for the next command"

    # kill -9 of the driver: nothing of it goes on behind its back
    done = driver.ended()
    process = start()
    wait_for(lambda: driver.ended() > done)
    with held(driver.root) as stuck:
        wait_for(stuck)
        assert sync(Workspace(driver.root), mlflow_uri="").num_settled == 0, "a living sweep is left alone"
        assert "RUNNING" in driver.states()
        process.kill()
        process.communicate()
        wait_for(lambda: not driver.trainers())  # Ray's dashboard, in processes of its own, may take longer
    assert driver.ended() < driver.expected, "there is something left to do"
    assert sync(Workspace(driver.root), mlflow_uri="").num_settled > 0
    assert set(driver.states()) <= {"COMPLETE", "WAITING"}, "sync settles what the dead command left"

    process = start(num_cpus=1)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert "optuna-dashboard sqlite:///" in out and "mlflow ui" not in out, "nothing went to MLflow"
    records = driver.check_it_ended_well()
    assert sorted(r.attempts for r in records) == [1] * 8 + [2]
    assert len(notes(driver.root, "end")) == len(driver.expected), "each run was trained to its end once"

    # and once more: nothing is left to do, and no Ray is started for it
    sweep = load_sweep(tmp_path / "toy.py")
    assert isinstance(sweep, Sweep)
    options_here = {"data": DataConfig(manifest_hash="toy"), "train_function": TRAIN, "mlflow_uri": ""}
    again = execute_sweep(sweep, Workspace(driver.root), **options_here)
    assert {r.run_id for r in again} == driver.expected and len(notes(driver.root, "end")) == len(driver.expected)
