"""A training function to which two things happen: its second rank has little memory, and that rank's process is killed once."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanochat_model.callbacks import Callback
from nanochat_model.config import RuntimeConfig, TrainConfig
from nanochat_model.distributed import current_ranks
from nanochat_model.gpt import GPT
from nanochat_model.record import RunRecord
from nanochat_model.train import pretrain

SMALL_AND_KILLED = "faulty_training:train"
MAX_ROWS = 2  # of the second rank's device, which is given twice as many
KILL_STEP = 20


class KillOnce(Callback):
    """kill -9 of the process after the checkpoint of KILL_STEP, once in a run's life."""

    def __init__(self, run_dir: Path) -> None:
        self._marker = run_dir / "killed"

    def on_checkpoint(self, path: Path, step: int) -> None:
        if current_ranks().rank == 1 and step == KILL_STEP and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    config: TrainConfig, runtime: RuntimeConfig, *, run_dir: str, callbacks: Sequence[Callback] = (), **labels: Any
) -> RunRecord:
    real = GPT.loss

    def loss(self: GPT, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and current_ranks().rank == 1 and len(inputs) > MAX_ROWS:
            raise torch.OutOfMemoryError(f"this device holds {MAX_ROWS} rows")
        return real(self, inputs, *args, **kwargs)

    GPT.loss = loss  # type: ignore[method-assign]  # in a worker's process, which ends with the run
    runtime = replace(runtime, checkpoint_every_steps=10, micro_batch_rows=2 * MAX_ROWS, compile="off")
    return pretrain(config, runtime, run_dir=run_dir, callbacks=(*callbacks, KillOnce(Path(run_dir))), **labels)
