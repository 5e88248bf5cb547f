"""What a trial's process is told, as plain JSON, and how it is run there. The same for both backends."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nanochat_model.callbacks import Callback, StepInfo, StopTraining
from nanochat_model.config import RuntimeConfig, TrainConfig
from nanochat_model.identity import from_dict
from nanochat_model.record import CurvePoint, RunRecord

if TYPE_CHECKING:
    from nanoladder.run_mirror import RunMirror

PRETRAIN = "nanochat_model.train:pretrain"
STOP_FILE = "stop"  # in a run's folder: ask it to stop at its next report


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One run to be trained somewhere."""

    run_id: str
    config: TrainConfig
    runtime: RuntimeConfig
    run_dir: str
    name: str = ""
    sweep: str = ""
    stage: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    attempts: int = 1
    backend: Literal["actor", "train"] = "actor"
    num_workers: int = 1
    resources_per_worker: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    node_labels: dict[str, str] = field(default_factory=dict)  # what its nodes must carry, say {"gpu": "h100"}
    placement_seconds: float = 60.0
    train_function: str = PRETRAIN  # module:function of pretrain's signature
    start_from: str = ""  # a checkpoint, for a function that starts from one
    storage: str = ""  # URL of the storage root; "": `root` itself, which all nodes share
    root: str = ""  # the storage root on this machine, or its working copy
    keep_checkpoints: bool = True  # of a finished run

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrialSpec:
        return from_dict(cls, json.loads(text), "trial spec: ")

    def run(self, callbacks: Sequence[Callback] = ()) -> RunRecord:
        """Train in this process, on this rank, and return the record."""
        module, _, function = self.train_function.partition(":")
        train: Callable[..., RunRecord] = getattr(importlib.import_module(module), function)
        mirror = self._mirror()
        if mirror is not None:
            mirror.fetch(self.config)
            callbacks = (*callbacks, mirror)
        with self._requests():
            record = train(
                self.config,
                self.runtime,
                run_dir=self.run_dir,
                callbacks=(*callbacks, *self._metrics(), StopOnRequest(Path(self.run_dir))),
                name=self.name,
                sweep=self.sweep,
                stage=self.stage,
                tags=self.tags,
                backend=self.backend,
                attempts=self.attempts,
                **({"start_from": self.start_from} if self.start_from else {}),
            )
        if mirror is not None:
            mirror.finish(record)
        return record

    def _requests(self) -> contextlib.AbstractContextManager[None]:
        """What brings requests to end from a URL; its nodes share no folder. One rank is enough: the loop stops all of them."""
        if not self.storage:
            return contextlib.nullcontext()
        from nanochat_model.distributed import current_ranks
        from nanoladder.remote_steering import heed_remote_stop

        if not current_ranks().is_main:
            return contextlib.nullcontext()
        return heed_remote_stop(self.storage, Path(self.root), Path(self.run_dir))

    def _metrics(self) -> list[Callback]:
        """What shows this run on Ray's dashboard; nothing in a process without Ray."""
        import ray

        if not ray.is_initialized():
            return []
        from nanoladder.ray_metrics import RayMetrics

        return [RayMetrics(sweep=self.sweep, stage=self.stage, trial=self.name or self.run_id)]

    def _mirror(self) -> RunMirror | None:
        if not self.storage:
            return None
        from nanoladder.run_mirror import RunMirror

        return RunMirror(self.storage, Path(self.root), Path(self.run_dir), keep_checkpoints=self.keep_checkpoints)


class StopOnRequest(Callback):
    """Ends a run, with a record that says so, when a file named `stop` appears in its folder. Its text is the reason."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / STOP_FILE

    def on_step(self, info: StepInfo) -> None:
        try:
            reason = self._path.read_text(encoding="utf8").strip()
        except FileNotFoundError:
            return
        self._path.unlink(missing_ok=True)  # another rank may have done it
        raise StopTraining(reason or "stopped on request")


class Forward(Callback):
    """Passes what the loop says to `send` as plain dicts: the latest step and every evaluation."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send = send

    def on_start(self, config: TrainConfig, start_step: int) -> None:
        self._send({"event": "start", "step": start_step, "num_steps": config.num_steps})

    def on_step(self, info: StepInfo) -> None:
        self._send({"event": "step", **asdict(info)})

    def on_eval(self, point: CurvePoint) -> None:
        self._send({"event": "eval", **asdict(point)})
