"""kill -9 while training, again and again: the run ends as if nothing had happened."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import tiny_shards

from nanochat_model.checkpoint import CHECKPOINTS_DIR, all_checkpoints, find_latest, step_of
from nanochat_model.record import RunRecord
from nanochat_model.train_cli import main

ROOT = Path(__file__).parents[2]
NUM_STEPS = 60


def arguments(run_dir: Path) -> list[str]:
    size = ["--depth", "2", "--model-dim", "32", "--head-dim", "16", "--sequence-len", "32", "--window-pattern", "L"]
    horizon = ["--num-steps", str(NUM_STEPS), "--batch-tokens", "256", "--eval-tokens", "1024", "--eval-every", "20"]
    runtime = ["--device", "cpu", "--num-threads", "1", "--checkpoint-every-steps", "2", "--log-every-steps", "1"]
    kind = ["--packing", "keep_remainder", "--compute-dtype", "float32", "--compile", "off"]
    return [str(tiny_shards().path), "--run-dir", str(run_dir), *size, *horizon, *runtime, *kind]


def train(run_dir: Path) -> None:
    """The command's own main, here; it ends well."""
    with pytest.raises(SystemExit) as leave:
        main(arguments(run_dir))
    assert leave.value.code == 0


# `python -m nanochat_model.train`, which says a step and then waits for a line: it cannot run away from who kills it.
LOCKSTEP = """
import re, runpy, sys

class Lockstep:
    def __init__(self, out):
        self._out = out

    def write(self, text):
        self._out.write(text)
        if re.match(r"step \\d+/", text):
            self._out.write("\\n")
            self._out.flush()
            sys.stdin.readline()

    def __getattr__(self, name):
        return getattr(self._out, name)

sys.stdout = Lockstep(sys.stdout)
runpy.run_module("nanochat_model.train", run_name="__main__", alter_sys=True)
"""


def step_reported(line: str) -> int:
    """The step of a progress line, 0 for other lines."""
    match = re.match(r"step (\d+)/\d+ ", line)
    return int(match.group(1)) if match else 0


def train_and_kill(run_dir: Path, step: int) -> None:
    """SIGKILL just after the process did `step`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOCKSTEP, *arguments(run_dir)]
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert process.stdin is not None and process.stdout is not None
    for line in process.stdout:
        if step_reported(line):
            process.stdin.write("\n")
        if step_reported(line) >= step:
            break
    time.sleep(random.random() * 0.02)  # somewhere in the next step, perhaps inside its checkpoint
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (run_dir / "record.json").exists()


def test_killed_and_torn_runs_end_like_an_undisturbed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path / "whole")
    expected = RunRecord.load(tmp_path / "whole")

    run_dir = tmp_path / "killed"
    for step in (7, 25):
        train_and_kill(run_dir, step)
    torn = next(all_checkpoints(run_dir / CHECKPOINTS_DIR)) / "optimizer.safetensors"
    before = step_of(find_latest(run_dir / CHECKPOINTS_DIR))
    os.truncate(torn, torn.stat().st_size - 7)
    capsys.readouterr()
    train(run_dir)
    out = capsys.readouterr().out
    assert f"{torn.parent.name}/optimizer.safetensors" in caplog.text and "cut short" in caplog.text, caplog.text
    first_step = min(step for step in map(step_reported, out.splitlines()) if step > 0)
    assert first_step == before - 1, "goes on after the checkpoint before the torn one"

    record = RunRecord.load(run_dir)
    assert record.status == "complete" and record.val_bpb == expected.val_bpb
    assert [(p.step, p.val_bpb, p.train_loss) for p in record.curve] == [(p.step, p.val_bpb, p.train_loss) for p in expected.curve]
    a, b = (find_latest(d / CHECKPOINTS_DIR) for d in (run_dir, tmp_path / "whole"))
    assert a is not None and b is not None
    sums_a, sums_b = (json.loads((p / "checksums.json").read_text()) for p in (a, b))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert sums_a[name] == sums_b[name], "the very same bytes"
