"""Training functions of launched runs in which something goes wrong once."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanochat_model.callbacks import Callback, StepInfo
from nanochat_model.config import RuntimeConfig, TrainConfig
from nanochat_model.distributed import current_ranks
from nanochat_model.record import RunRecord
from nanochat_model.train import pretrain

KILLED_ONCE = "launch_jobs:pretrain_killed_once"
KILL_STEP = 20


class KillOnce(Callback):
    """kill -9 of the last rank's process, once in a run's life."""

    def __init__(self, run_dir: Path) -> None:
        self._marker = run_dir / "killed"

    def on_checkpoint(self, path: Path, step: int) -> None:
        ranks = current_ranks()
        if step == KILL_STEP and ranks.rank == ranks.world_size - 1 and not self._marker.exists():
            self._marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step(self, info: StepInfo) -> None:
        """Nothing; steps go on until the checkpoint."""


def pretrain_killed_once(
    config: TrainConfig, runtime: RuntimeConfig, *, run_dir: str, callbacks: Sequence[Callback] = (), **labels: Any
) -> RunRecord:
    runtime = replace(runtime, checkpoint_every_steps=10, compile="off")
    return pretrain(config, runtime, run_dir=run_dir, callbacks=(*callbacks, KillOnce(Path(run_dir))), **labels)
