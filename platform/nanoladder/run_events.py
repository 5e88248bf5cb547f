"""What the workers of a run on Ray Train tell the launching process besides steps and evaluations."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanochat_model.callbacks import Callback, StepInfo
from nanochat_model.config import TrainConfig
from nanochat_model.record import RunRecord

BEAT_SECONDS = 5.0
Send = Callable[[dict[str, Any]], None]


class MoreEvents(Callback):
    """CORE and other numbers, sampled texts, and finished checkpoints, as plain dicts."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self._send({"event": "metrics", "step": step, "metrics": metrics})

    def on_sample(self, step: int, texts: Sequence[str]) -> None:
        self._send({"event": "sample", "step": step, "texts": list(texts)})

    def on_checkpoint(self, path: Path, step: int) -> None:
        self._send({"event": "checkpoint", "step": step, "path": str(path)})


class Heartbeat(Callback):
    """Tells every few seconds, from a thread of its own, that this rank's process runs: {"event": "beat", "rank", "host", "pid",
    "step"}. A rank whose process is stopped or gone is silent, one that waits for another is not."""

    def __init__(self, send: Send, rank: int, *, seconds: float = BEAT_SECONDS) -> None:
        self._send, self._seconds = send, seconds
        self._facts = {"event": "beat", "rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._step = 0
        self._over = threading.Event()

    def on_start(self, config: TrainConfig, start_step: int) -> None:
        self._step = start_step
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def on_step(self, info: StepInfo) -> None:
        self._step = info.step

    def on_end(self, record: RunRecord) -> None:
        self._over.set()

    def _beat(self) -> None:
        while True:
            self._send({**self._facts, "step": self._step})
            if self._over.wait(self._seconds):
                return
