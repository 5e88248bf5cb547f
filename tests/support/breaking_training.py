"""Real training that breaks, with a traceback, where the weight decay is too high, and otherwise takes as long as it is told."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from nanochat_model.callbacks import Callback, StepInfo
from nanochat_model.config import RuntimeConfig, TrainConfig
from nanochat_model.record import RunRecord
from nanochat_model.train import pretrain

TRAIN = "breaking_training:train"
BAD_DECAY = 0.5
PAUSE_ENV = "PAUSE_SECONDS"  # after each step that is reported


class Pause(Callback):
    def on_step(self, info: StepInfo) -> None:
        time.sleep(float(os.environ.get(PAUSE_ENV, "0")))


def paused(config: TrainConfig, runtime: RuntimeConfig, callbacks: Sequence[Callback] = (), **options: Any) -> RunRecord:
    return pretrain(config, runtime, callbacks=(Pause(), *callbacks), **options)


def train(config: TrainConfig, *args: Any, **options: Any) -> RunRecord:
    if config.optimizer.weight_decay > BAD_DECAY:
        raise RuntimeError("weight decay beyond all bounds")
    return paused(config, *args, **options)
