"""A real small sweep is looked at and stopped from another machine; its own command then ends it as if nothing had been."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from breaking_training import PAUSE_ENV
from local_s3 import local_s3
from ray_nodes import wait_for
from rich.console import Console
from tiny_run import tiny_shards

from nanochat_model.checkpoint import CHECKPOINTS_DIR, find_latest, step_of
from nanochat_model.record import RunRecord
from nanoladder.cli import run
from nanoladder.live_status import STATUS_FILE
from nanoladder.status_view import read_statuses, render
from nanoladder.stopping import PAUSED, StopRequest, StopWatch, request_stop
from nanoladder.storage import Remote, local_folder
from nanoladder.tracking import EXPERIMENT, connect
from nanoladder.workspace import Workspace

pytestmark = pytest.mark.seconds(60)
SUPPORT = Path(__file__).parents[1] / "support"
NUM_STEPS = 300
STEP_SECONDS = 0.5  # until it is stopped: minutes, however fast the machine is
SWEEP_FILE = f"""
import sys
sys.path.insert(0, {str(SUPPORT)!r})
from functools import partial
from breaking_training import TRAIN
from tiny_run import RUNTIME
from dataclasses import replace
from nanochat_model.config import EvalConfig
from nanoladder import Cell, GPTConfig, Grid, Horizon, Recipe, Sweep, execute, run_sweep

MODEL = GPTConfig(depth=2, model_dim=32, num_heads=2, num_kv_heads=1, sequence_len=32, vocab_size=320, window_pattern="L")
SWEEP = Sweep(
    name="steered",
    question="?",
    stage="d2",
    recipe=Recipe(eval=EvalConfig(num_tokens=2048, every_steps=100), compute_dtype="float32"),
    cells=(Cell(model=MODEL, horizon=Horizon(num_steps={NUM_STEPS}), overrides={{"batch_tokens": 256}}),),
    space={{"optimizer.weight_decay": Grid([0.8, 0.9, 0.05])}},
    packing="keep_remainder",
    backend="actor",
    runtime=replace(RUNTIME, keep_last=1, checkpoint_every_steps=10**6),
)

if __name__ == "__main__":
    execute.execute_sweep = partial(execute.execute_sweep, train_function=TRAIN)
    run_sweep(SWEEP)
"""


class Driver:
    """`python steered.py` in a session of its own, with its working copy of the storage in a folder of its own."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.root = folder / "one" / local_folder(url).name
        shutil.copytree(Path(tiny_shards().path), self.root / "shards")
        (folder / "steered.py").write_text(SWEEP_FILE)
        self.process: subprocess.Popen[str] | None = None

    def start(self, step_seconds: float) -> subprocess.Popen[str]:
        env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "NANOLADDER_STORAGE")}
        env |= {"PYTHONPATH": str(SUPPORT), "NANOLADDER_LOCAL": str(self.folder / "one"), PAUSE_ENV: str(step_seconds)}
        command = [sys.executable, "steered.py", "--storage", self.url, "--num-cpus", "1"]
        self.process = subprocess.Popen(
            command, cwd=self.folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        return self.process

    def status(self) -> dict[str, Any]:
        """As another machine sees it."""
        return read_statuses(Workspace(self.url), "steered")[0]

    def told(self) -> tuple[list[str], list[str]]:
        """The states of the trials in Optuna and in MLflow."""
        workspace = Workspace(self.root)
        study = optuna.load_study(study_name=None, storage=workspace.optuna_uri)
        client = connect(workspace.mlflow_uri)
        runs = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
        return sorted(t.state.name for t in study.trials), sorted(
            r.info.status for r in runs if "mlflow.parentRunId" in r.data.tags
        )


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    with local_s3() as s3:
        driver = Driver(tmp_path, f"{s3}/steered")
        monkeypatch.setenv("NANOLADDER_LOCAL", str(tmp_path / "two"))
        yield driver
    if driver.process is not None and driver.process.poll() is None:
        driver.process.kill()
        driver.process.communicate()


def test_a_sweep_is_watched_stopped_and_goes_on(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    storage = ["--storage", driver.url]
    process = driver.start(STEP_SECONDS)
    wait_for(lambda: list(driver.root.glob("runs/*/config.json")), 240)  # the third run trains, the others have failed
    wait_for(lambda: read_statuses(Workspace(driver.url)), every=0.5)
    wait_for(lambda: (s := driver.status())["failed"] == 2 and s["running"], every=0.5)

    assert run(["status", "steered", *storage, "--price", "2", "--json"]) == 0
    (status,) = json.loads(capsys.readouterr().out)["sweeps"]
    assert (status["state"], status["stage"], status["done"], status["total"], status["failed"]) == ("running", "d2", 2, 3, 2)
    assert status["cost_dollars"] == pytest.approx(2 * status["device_hours"]) and status["device_hours"] > 0
    assert status["eta_seconds"] is None or status["eta_seconds"] > 0
    assert {f["error"] for f in status["failures"]} == {"RuntimeError: weight decay beyond all bounds"}
    assert run(["status", *storage]) == 0
    shown = capsys.readouterr().out
    assert "steered" in shown and "2/3" in shown and "weight decay beyond all bounds" in shown and f"/{NUM_STEPS}" in shown

    assert run(["stop", "steered", *storage, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "ended": True, "sweeps": [{"sweep": "steered", "state": "stopped", "done": 2, "total": 3, "failed": 2}]
    }  # fmt: skip
    out, err = process.communicate(timeout=300)
    assert process.returncode == 3 and "stopped on request" in err, out + err
    assert "Traceback" not in err and out.count("Traceback") == 1, "a traceback once, though four attempts failed alike"
    assert [line.split()[0] for line in out.splitlines() if line.startswith("failed")] == ["failed"] * 4
    (paused,) = (r for r in Workspace(driver.root).records() if r.status == "stopped")
    latest = find_latest(driver.root / "runs" / paused.run_id / CHECKPOINTS_DIR)
    assert [name for name in Remote(driver.url).listing() if CHECKPOINTS_DIR in name], "what is to go on is kept, here and there"
    assert paused.error == PAUSED and latest is not None and 0 < step_of(latest) < NUM_STEPS

    assert driver.told() == (["FAIL", "FAIL", "WAITING"], ["FAILED", "FAILED", "KILLED"]), "nobody believes that it runs"

    assert run(["stop", "steered", *storage]) == 2
    assert "nothing of steered is running: steered (stopped on request)" in capsys.readouterr().err

    process = driver.start(0.0)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1 and "3 runs, 2 failed" in out, out + err
    record = RunRecord.load(driver.root / "runs" / paused.run_id)
    assert (record.status, record.attempts) == ("complete", 1)
    assert driver.status()["state"] == "finished" and driver.status()["best"]["run_id"] == record.run_id
    assert [p.step for p in record.curve] == [100, 200, 300]
    assert driver.told() == (["COMPLETE", "FAIL", "FAIL"], ["FAILED", "FAILED", "FINISHED"])
    assert find_latest(driver.root / "runs" / paused.run_id / CHECKPOINTS_DIR) is None, "a finished trial keeps no checkpoint"
    assert not [name for name in Remote(driver.url).listing() if CHECKPOINTS_DIR in name], "nor does the URL"


def test_a_driver_that_died_is_told_from_one_that_lives(tmp_path: Path) -> None:
    folder = tmp_path / "sweeps" / "s"
    folder.mkdir(parents=True)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    facts = {
        "schema_version": 1, "sweep": "s", "stage": "", "question": "?", "metric": "val_bpb", "direction": "minimize", "host": "",
        "state": "running", "pid": child.pid, "job_id": "", "started_at": "2026-01-01T00:00:00+00:00", "total": 3, "done": 1,
        "updated_at": "2026-01-01T00:00:00+00:00", "skipped": 0, "failed": 0, "flops_done": 1, "flops_total": 3, "running": [],
        "eta_seconds": 5.0, "devices_per_trial": 1, "device_seconds": 7200.0, "lost_device_seconds": 1800.0, "best": None,
        "failures": [],
    }  # fmt: skip
    (folder / STATUS_FILE).write_text(json.dumps(facts))
    (status,) = read_statuses(Workspace(tmp_path), price=4.0)
    assert status["state"] == "lost" and (status["device_hours"], status["cost_dollars"]) == (2.5, 10.0)
    best = {"cell": "d12w128-1.5e+06tok", "values": {"weight_decay_multiplier": 0.25, "lr_multiplier": 2.0}, "value": 1.23456}
    shown = {}
    for width in (80, 200):
        console = Console(width=width, file=io.StringIO())
        console.print(
            render([{**status, "best": best, "sweep": "demo_promotion/small", "stage": "small"}], detail=True, width=width)
        )
        shown[width] = console.file.getvalue()
        words = shown[width].split()
        assert {"demo_promotion/small", "lost", "1.2346", "d12w128-1.5e+06tok", "lr_multiplier=2"} <= {*words}, "none is broken"
        assert "the driver died; its command goes on" in shown[width]
    assert "\nbest of demo_promotion/small: 1.2346 d12w128" in shown[80] and "best of" not in shown[200]
    (folder / STATUS_FILE).write_text("{")
    assert run(["status", "--storage", str(tmp_path)]) == 2
    assert run(["status", "nobody", "--storage", str(tmp_path / "empty")]) == 2


def test_a_request_is_seen_once_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoladder.stopping.POLL_SECONDS", 0.0)
    request_stop(tmp_path / "a", now=True)
    watch = StopWatch([tmp_path / "a", tmp_path / "b"])
    assert watch.poll() is None, "a request of before is not for this command"
    request_stop(tmp_path / "b")
    request_stop(tmp_path / "a", now=True)
    found = watch.poll()
    assert found is not None and found.now and found.requested_by.startswith("process ")
    (tmp_path / "a" / "stop.json").write_text("{")
    assert StopRequest.read(tmp_path / "a") == StopRequest(now=False, requested_at="", requested_by="")
