"""A sweep whose trial, terminal or driver is killed, and a production run that loses a worker: nothing is lost or done twice."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faulty_training import SMALL_AND_KILLED
from ray_nodes import kill_process, session_of, wait_for
from sweep_driver import SUPPORT, Driver
from tiny_run import RUNTIME, tiny_config
from toy_training import TRAIN, notes

from nanochat_model.config import DataConfig
from nanochat_model.train import pretrain
from nanoladder.execute import execute_sweep
from nanoladder.ray_init import ensure_ray, shutdown_ray
from nanoladder.sweep import Sweep
from nanoladder.sweep_command import load_sweep
from nanoladder.train_backend import run_training_on_ray_train
from nanoladder.workspace import Workspace

STEP_SECONDS = 0.12  # ten of them a run


@pytest.mark.timeout(900)
def test_a_sweep_killed_in_every_way_ends_as_an_undisturbed_one(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    driver = Driver(tmp_path, num_runs=9)
    options = ("--num-cpus", "2", "--mlflow", "")

    def start() -> subprocess.Popen[str]:
        process = driver.start(STEP_SECONDS, *options)
        request.addfinalizer(lambda: [kill_process(pid) for pid in session_of(process.pid)])
        return process

    # kill -9 of a trial's process: that run is tried again in the same command
    process = start()
    wait_for(driver.training)
    os.kill(driver.training()[0], signal.SIGKILL)
    wait_for(lambda: len(notes(driver.root, "start")) >= 4 and driver.training())
    # Ctrl-C, to the whole group as a terminal sends it
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert "its process died" in out and out.count("one more try") == 1, out + err
    assert process.returncode == 130 and "the same command goes on" in err and "Traceback" not in err, err
    wait_for(lambda: not driver.trainers(), 60)
    assert "RUNNING" not in driver.states(), "what was cut off waits for the next command"

    # kill -9 of the driver: nothing of it goes on behind its back
    done = driver.ended()
    process = start()
    wait_for(lambda: driver.ended() > done and driver.training())
    process.kill()
    process.communicate()
    wait_for(lambda: not driver.trainers(), 60)  # Ray's dashboard, in processes of its own, may take longer
    assert driver.ended() < driver.expected, "there is something left to do"

    process = start()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    records = driver.check_it_ended_well()
    assert sorted(r.attempts for r in records) == [1] * 8 + [2]
    assert len(notes(driver.root, "end")) == len(driver.expected), "each run was trained to its end once"

    # and once more: nothing is left to do, and no Ray is started for it
    sweep = load_sweep(tmp_path / "toy.py")
    assert isinstance(sweep, Sweep)
    options_here = {"data": DataConfig(manifest_hash="toy"), "train_function": TRAIN, "mlflow_uri": ""}
    again = execute_sweep(sweep, Workspace(driver.root), **options_here)
    assert {r.run_id for r in again} == driver.expected and len(notes(driver.root, "end")) == len(driver.expected)


@pytest.mark.timeout(600)
def test_a_production_run_outlives_a_rank_without_memory_and_a_killed_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(num_steps=40, eval__every_steps=10)
    runtime = replace(RUNTIME, checkpoint_every_steps=10)
    alone = pretrain(config, RUNTIME, run_dir=tmp_path / "alone")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]))
    events: list[dict[str, Any]] = []
    ensure_ray(num_cpus=2, object_store_bytes=100 * 2**20)
    try:
        record = run_training_on_ray_train(
            config, runtime, run_dir=tmp_path / "run", num_workers=2, progress=events.append, train_function=SMALL_AND_KILLED
        )
    finally:
        shutdown_ray()
    assert record.status == "complete" and record.val_bpb == pytest.approx(alone.val_bpb, rel=1e-4)
    assert [e["step"] for e in events if e["event"] == "start"] == [0, 0, 20], "memory ran out at once; the kill cost no step"
    assert record.micro_batch_rows == 2 and len(record.out_of_memory) == 1
    assert [p.step for p in record.curve] == [10, 20, 30, 40] and [e["event"] for e in events].count("eval") == 4
    assert (record.num_devices, record.backend, record.stage) == (2, "train", "production")
    assert list((tmp_path / "run" / "checkpoints").glob("step_*")), "a production run keeps its checkpoints"
    again = run_training_on_ray_train(config, runtime, run_dir=tmp_path / "run")
    assert again == record, "a finished run is not started again"
