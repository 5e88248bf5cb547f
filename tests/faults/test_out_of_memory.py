"""Out of memory: the micro-batch is halved, the losses stay, and the record says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import RUNTIME, tiny_config

from nanochat_model.config import GPTConfig
from nanochat_model.gpt import GPT
from nanochat_model.memory import estimate_memory, rows_that_fit
from nanochat_model.out_of_memory import LIMIT_FILE, halve, read_limit
from nanochat_model.record import RunRecord
from nanochat_model.train import pretrain

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device that holds two rows of training. What comes back lists the rows it was asked to hold."""
    asked: list[int] = []
    real = GPT.loss

    def loss(self: GPT, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            asked.append(len(inputs))
            if len(inputs) > 2:
                raise torch.OutOfMemoryError("this device holds two rows")
        return real(self, inputs, *args, **kwargs)

    monkeypatch.setattr(GPT, "loss", loss)
    return asked


def curve(record: RunRecord) -> list[tuple[int, float, float | None]]:
    return [(p.step, p.val_bpb, p.train_loss) for p in record.curve]


def test_half_the_micro_batch_gives_the_same_losses_and_is_recorded(tmp_path: Path, small_device: list[int]) -> None:
    config = tiny_config()
    two = pretrain(config, replace(RUNTIME, micro_batch_rows=2), run_dir=tmp_path / "two")
    small_device.clear()
    record = pretrain(config, replace(RUNTIME, micro_batch_rows=4), run_dir=tmp_path / "four")
    assert small_device[0] == 4 and set(small_device[1:]) == {2}
    assert (record.status, record.micro_batch_rows) == ("complete", 2) and record.run_id == two.run_id
    assert record.out_of_memory == ("out of memory at step 0 with a micro-batch of 4 rows: halved to 2",)
    assert curve(record) == curve(two) and two.out_of_memory == (), "the very same losses as with 2 rows from the start"
    assert RunRecord.load(tmp_path / "four") == record


def test_one_process_tries_once_more_and_the_next_goes_on_halving(tmp_path: Path, small_device: list[int]) -> None:
    config = tiny_config()
    with pytest.raises(torch.OutOfMemoryError):
        pretrain(config, replace(RUNTIME, micro_batch_rows=8), run_dir=tmp_path)
    assert small_device == [8, 4]
    failed = RunRecord.load(tmp_path)
    assert failed.status == "failed" and "two rows" in (failed.error or "") and len(failed.out_of_memory) == 2
    record = pretrain(config, replace(RUNTIME, micro_batch_rows=8), run_dir=tmp_path)
    assert (record.status, record.micro_batch_rows, len(record.out_of_memory)) == ("complete", 2, 2)


def test_when_one_row_is_too_much_the_run_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def loss(self: GPT, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tries.append(len(inputs))
        raise torch.OutOfMemoryError("nothing fits")

    monkeypatch.setattr(GPT, "loss", loss)
    with pytest.raises(torch.OutOfMemoryError):
        pretrain(tiny_config(), replace(RUNTIME, micro_batch_rows=1), run_dir=tmp_path)
    assert tries == [1] and not (tmp_path / LIMIT_FILE).exists()


TRAIN = """
import json, resource, sys
from pathlib import Path
from tiny_run import RUNTIME
from dataclasses import replace
from nanochat_model import runner
from nanochat_model.config import TrainConfig
from nanochat_model.identity import from_dict
from nanochat_model.train import pretrain
folder, rows, spare = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = from_dict(TrainConfig, json.loads(Path("config.json").read_text()))
real = runner.Runner.run

def run(self, start):
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + spare, resource.RLIM_INFINITY))  # so much it may grow, and no more
    return real(self, start)

runner.Runner.run = run
pretrain(config, replace(RUNTIME, micro_batch_rows=rows), run_dir=folder)
"""


def test_a_process_that_may_not_grow_halves_its_micro_batch(tmp_path: Path) -> None:
    """No exception is made up here: the operating system refuses the memory."""
    rows = 2048
    config = tiny_config(num_steps=2, batch_tokens=rows * 32, eval__every_steps=0)
    tokens = rows * config.model.sequence_len
    activations = estimate_memory(config.model, micro_batch_rows=rows, compute_dtype="float32", fixed_bytes=0).activations
    assert tokens == 65536 and activations > 200e6
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path / "tight"), str(rows), str(round(1.2 * activations))],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tight = RunRecord.load(tmp_path / "tight")
    assert tight.micro_batch_rows == rows // 2 and "halved to 1024" in tight.out_of_memory[0]
    free = {n: pretrain(config, replace(RUNTIME, micro_batch_rows=n), run_dir=tmp_path / str(n)) for n in (rows, rows // 2)}
    assert all(r.out_of_memory == () for r in free.values())
    assert curve(tight) == curve(free[rows // 2]), "the very same as with that micro-batch from the start"
    assert tight.val_bpb == pytest.approx(free[rows].val_bpb, rel=1e-3), "and up to rounding the same as with twice of it"


def test_the_limit_of_several_ranks_is_the_lowest(tmp_path: Path) -> None:
    assert halve(tmp_path, 8, 0) == halve(tmp_path, 8, 0), "two ranks that ran out at once halve once"
    assert len((read_limit(tmp_path) or halve(tmp_path, 8, 0)).history) == 1  # type: ignore[union-attr]
    lower = halve(tmp_path, 4, 3)
    assert lower is not None and lower.rows == 2 and len(lower.history) == 2
    assert halve(tmp_path, 1, 0) is None


def test_rows_by_arithmetic_shrink_with_the_share_of_a_card() -> None:
    d12, d24 = GPTConfig.from_depth(12), GPTConfig.from_depth(24)
    assert rows_that_fit(d12, memory_bytes=80e9, at_most=32) == 32
    assert 0 < rows_that_fit(d24, memory_bytes=80e9, at_most=32) < 32
    assert rows_that_fit(d12, memory_bytes=80e9 / 4, at_most=32) < 32
    assert rows_that_fit(d24, memory_bytes=80e9 / 16, at_most=32) == 0
