"""Real training that breaks, with a traceback, where the weight decay is too high."""

from __future__ import annotations

from typing import Any

from nanochat_model.config import RuntimeConfig, TrainConfig
from nanochat_model.record import RunRecord
from nanochat_model.train import pretrain

TRAIN = "breaking_training:train"
BAD_DECAY = 0.5


def train(config: TrainConfig, runtime: RuntimeConfig, **options: Any) -> RunRecord:
    if config.optimizer.weight_decay > BAD_DECAY:
        raise RuntimeError("weight decay beyond all bounds")
    return pretrain(config, runtime, **options)
