"""A function of pretrain's signature that trains nothing: its loss is a formula of the config, its time what it is told.

Tests of sweeps use it where the training itself does not matter. Every start and end is noted in a log beside the runs
folder, so that tests see what ran, where, how often, and whether it ended.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_model.callbacks import Callback, Callbacks, StepInfo
from nanochat_model.config import GPTConfig, RuntimeConfig, TrainConfig
from nanochat_model.counts import count_params, flops_per_token
from nanochat_model.errors import ConfigError
from nanochat_model.horizon import Horizon
from nanochat_model.identity import run_id
from nanochat_model.record import CurvePoint, RunRecord

TRAIN = "toy_training:train"
STEP_SECONDS_ENV = "TOY_STEP_SECONDS"  # of one of the ten steps
HOLD = "hold"  # a file beside the runs folder
MODEL = GPTConfig(depth=2, model_dim=32, num_heads=2, num_kv_heads=1, sequence_len=32, vocab_size=64, window_pattern="L")
HORIZON = Horizon(num_steps=10)
BAD_DECAY = 0.5  # above: the run fails
BEST_LR = 0.01


def toy_loss(config: TrainConfig) -> float:
    """A valley in log learning rate, a little weight decay, a little seed noise."""
    lr = math.log2(config.optimizer.matrix_lr / BEST_LR) if config.optimizer.matrix_lr != BEST_LR else 0.0
    noise = 1e-3 * math.sin(12.9898 * (config.seed + 1))
    return 1.0 + 0.01 * lr**2 + 0.2 * config.optimizer.weight_decay + noise


def train(
    config: TrainConfig,
    runtime: RuntimeConfig = RuntimeConfig(),  # noqa: B008
    *,
    run_dir: str | Path,
    callbacks: Sequence[Callback] = (),
    name: str = "",
    sweep: str = "",
    stage: str = "",
    tags: Mapping[str, str] | None = None,
    backend: str = "process",
    attempts: int = 1,
    **_: Any,
) -> RunRecord:
    run_dir = Path(run_dir)
    note(run_dir, "start", config)
    if config.optimizer.scalar_lr > 100:
        raise ConfigError("scalar_lr over 100 is not what anybody wants; lower it")
    if config.optimizer.weight_decay > BAD_DECAY and not (run_dir / "mended").exists():
        raise RuntimeError("weight decay beyond all bounds")
    calls = Callbacks(callbacks)
    calls.call("on_start", config, 0)
    per_token = flops_per_token(config.model)
    curve: list[CurvePoint] = []
    loss = toy_loss(config)
    started = time.time()
    for step in range(1, 11):
        time.sleep(float(os.environ.get(STEP_SECONDS_ENV, "0.005")))
        hold(run_dir, config)
        tokens = config.batch_tokens * step
        seconds = time.time() - started
        info = StepInfo(
            step=step, num_steps=10, num_tokens=tokens, train_flops=float(per_token * tokens), seconds=seconds, train_loss=loss,
            smooth_train_loss=loss, lr_multiplier=1.0, tokens_per_second=1.0, mfu=None,
        )  # fmt: skip
        calls.call("on_step", info)
        if calls.stop_reason:
            break
        bpb = loss * (1 + 0.1 * (10 - step))
        curve.append(CurvePoint(step=step, num_tokens=tokens, train_flops=float(per_token * tokens), seconds=seconds, val_bpb=bpb))
        calls.call("on_eval", curve[-1])
    stamp = lambda t: datetime.datetime.fromtimestamp(t, datetime.UTC).isoformat(timespec="milliseconds")  # noqa: E731
    record = RunRecord(
        run_id=run_id(config), status="stopped" if calls.stop_reason else "complete", name=name, sweep=sweep, stage=stage,
        tags=dict(tags or {}), config=config, seed=config.seed, params=count_params(config.model).as_dict(),
        num_tokens=curve[-1].num_tokens if curve else 0, flops_per_token=per_token,
        train_flops=curve[-1].train_flops if curve else 0.0, curve=tuple(curve), val_bpb=curve[-1].val_bpb if curve else None,
        error=calls.stop_reason, attempts=attempts, backend=backend, device="toy", train_seconds=time.time() - started,
        started_at=stamp(started), finished_at=stamp(time.time()),
    )  # fmt: skip
    record.save(run_dir)
    note(run_dir, "end", config)
    calls.call("on_end", record)
    return record


def hold(run_dir: Path, config: TrainConfig) -> None:
    """Stay here as long as `held` says."""
    path = run_dir.parent.parent / HOLD
    if path.exists():
        note(run_dir, "held", config)
        while path.exists():
            time.sleep(0.02)


class Held:
    """The runs that stay in the middle: called, it says which do, and in which processes."""

    def __init__(self, root: Path) -> None:
        self._root, self._since = root, time.time()
        root.mkdir(parents=True, exist_ok=True)
        (root / HOLD).touch()

    def __call__(self) -> dict[int, str]:
        return {n["pid"]: n["run_id"] for n in notes(self._root, "held") if n["time"] >= self._since}

    def let_go(self) -> None:
        (self._root / HOLD).unlink(missing_ok=True)


@contextlib.contextmanager
def held(root: Path) -> Iterator[Held]:
    """While inside, and until they are let go, the runs under a storage root stay in the middle."""
    stuck = Held(root)
    try:
        yield stuck
    finally:
        stuck.let_go()


def note(run_dir: Path, what: str, config: TrainConfig) -> None:
    facts = {"what": what, "run_id": run_id(config), "pid": os.getpid(), "time": time.time()}
    line = json.dumps({**facts, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")})
    log = run_dir.parent.parent / "toy.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as f:
        f.write(line + "\n")


def notes(root: Path, what: str) -> list[dict[str, Any]]:
    """What the trainings under a storage root noted."""
    log = root / "toy.log"
    text = log.read_text() if log.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # what comes after is just being written
    return [line for line in map(json.loads, whole.splitlines()) if line["what"] == what]
