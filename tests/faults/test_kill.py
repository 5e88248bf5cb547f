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

from tiny_run import tiny_shards

from nanochat_model.checkpoint import CHECKPOINTS_DIR, all_checkpoints, find_latest, step_of
from nanochat_model.record import RunRecord

ROOT = Path(__file__).parents[2]
NUM_STEPS = 60


def command(run_dir: Path) -> list[str]:
    size = ["--depth", "2", "--model-dim", "32", "--head-dim", "16", "--sequence-len", "32", "--window-pattern", "L"]
    horizon = ["--num-steps", str(NUM_STEPS), "--batch-tokens", "256", "--eval-tokens", "1024", "--eval-every", "20"]
    runtime = ["--device", "cpu", "--num-threads", "1", "--checkpoint-every-steps", "2", "--log-every-steps", "1"]
    kind = ["--packing", "keep_remainder", "--compute-dtype", "float32", "--compile", "off"]
    return [
        sys.executable, "-m", "nanochat_model.train", tiny_shards().path, "--run-dir", run_dir, *size, *horizon, *runtime, *kind
    ]  # fmt: skip


def start(run_dir: Path) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(c) for c in command(run_dir)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def step_reported(line: str) -> int:
    """The step of a progress line, 0 for other lines."""
    match = re.match(r"step (\d+)/\d+ ", line)
    return int(match.group(1)) if match else 0


def kill_after(process: subprocess.Popen, step: int) -> None:
    """SIGKILL as soon as the process says that it did `step`."""
    assert process.stdout is not None
    for line in process.stdout:
        if step_reported(line) >= step:
            break
    time.sleep(random.random() * 0.02)  # somewhere in the next steps, perhaps inside a checkpoint
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_and_torn_runs_end_like_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = start(tmp_path / "whole")
    out, _ = undisturbed.communicate(timeout=200)
    assert undisturbed.returncode == 0, out
    expected = RunRecord.load(tmp_path / "whole")

    run_dir = tmp_path / "killed"
    for step in (7, 25):
        kill_after(start(run_dir), step)
        assert not (run_dir / "record.json").exists()
    torn = next(all_checkpoints(run_dir / CHECKPOINTS_DIR)) / "optimizer.safetensors"
    before = step_of(find_latest(run_dir / CHECKPOINTS_DIR))
    os.truncate(torn, torn.stat().st_size - 7)
    last = start(run_dir)
    out, _ = last.communicate(timeout=200)
    assert last.returncode == 0, out
    assert f"{torn.parent.name}/optimizer.safetensors" in out and "cut short" in out, out
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
