"""What each process of a multi-rank test does."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from tiny_run import RUNTIME

from nanochat_model import evaluate, runner
from nanochat_model.callbacks import Callback, StepInfo, StopTraining
from nanochat_model.config import TrainConfig
from nanochat_model.distributed import current_ranks, on_main, process_group
from nanochat_model.errors import ConfigError
from nanochat_model.loader import Loader
from nanochat_model.loop import Stepper
from nanochat_model.session import build_session
from nanochat_model.sft import SFTConfig, sft
from nanochat_model.step_times import FIRST_TIMED_STEP
from nanochat_model.train import pretrain

LAG_SECONDS = 0.5  # more than a busy machine makes any other rank wait


class Losses(Callback):
    def __init__(self, stop_at: int = -1) -> None:
        self.losses: list[float] = []
        self.skipped = 0
        self.stop_at = stop_at

    def on_step(self, info: StepInfo) -> None:
        self.losses.append(info.train_loss)
        self.skipped = info.skipped_steps
        if info.step == self.stop_at:
            raise StopTraining("this rank has had enough")


def train(config: TrainConfig, run_dir: Path, *, stop_at: int = -1, **runtime: Any) -> dict[str, Any]:
    losses = Losses(stop_at)
    record = pretrain(config, dataclasses.replace(RUNTIME, **runtime), run_dir=run_dir, callbacks=[losses])
    return {"losses": losses.losses, "val_bpb": record.val_bpb, "status": record.status, "skipped": losses.skipped,
            "error": record.error, "num_tokens": record.num_tokens, "num_devices": record.num_devices,
            "step_seconds": record.step_seconds, "rank_compute_seconds": record.rank_compute_seconds}  # fmt: skip


def poisoned(config: TrainConfig, run_dir: Path, rank: int, last_rank: int, lasting: bool) -> dict[str, Any]:
    """A non-finite loss on one rank only, once or from then on; that rank is also slow in the step that is timed."""
    real, count = Stepper.forward_backward, [0]

    def spoil(self: Stepper, batch: Any) -> torch.Tensor:
        count[0] += 1
        time.sleep(LAG_SECONDS if rank == last_rank and count[0] == FIRST_TIMED_STEP else 0.0)
        bad = rank == last_rank and (count[0] >= 4 if lasting else count[0] == 4)
        if bad and lasting:
            with torch.no_grad():
                self.model.transformer["h"][1].mlp.c_fc.weight[0, 0] = math.nan
        part = real(self, batch)
        return part * math.nan if bad else part

    Stepper.forward_backward = spoil  # type: ignore[method-assign]
    try:
        return train(config, run_dir)
    finally:
        Stepper.forward_backward = real  # type: ignore[method-assign]


def full_disk(config: TrainConfig, run_dir: Path) -> str:
    """What every rank is told when rank 0 cannot write the checkpoint of step 4, and where the next attempt starts."""
    real = runner.save_checkpoint

    def fail(root: Path, state: Any, *args: Any, **options: Any) -> Path:
        if state.step == 4:
            raise OSError("no space left on device")
        return real(root, state, *args, **options)

    runner.save_checkpoint = fail  # type: ignore[assignment]
    try:
        train(config, run_dir, checkpoint_every_steps=2)
    except OSError as e:
        runner.save_checkpoint = real
        return f"{e}; {len(train(config, run_dir)['losses'])} steps were left"
    finally:
        runner.save_checkpoint = real
    return "nothing"


def run_rank(environment: dict[str, str], config: TrainConfig, folder: Path) -> None:
    """Be one rank, as torchrun's variables in `environment` say, and write rank<r>.json."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with process_group("cpu") as ranks:
        last = ranks.world_size - 1
        tokens: dict[int, list[list[int]]] = {}
        real = Loader.batch

        def spy(self: Loader, k: int, rank: int = 0, world_size: int = 1) -> Any:
            inputs, targets = real(self, k, rank, world_size)
            tokens.setdefault(k, inputs.tolist())
            return inputs, targets

        Loader.batch = spy  # type: ignore[method-assign]
        results: dict[str, Any] = {"whole": train(config, folder / "whole", checkpoint_every_steps=6, diagnostics_every_steps=5)}
        results["fresh_bpb"] = fresh_bpb(config)
        results["tokens"] = [tokens[k] for k in range(config.num_steps)]
        tokens.clear()
        results["resumed"] = train(config, folder / "resumed")  # from a checkpoint that another world size left there
        results["resumed_tokens"] = dict(tokens)
        on_main(lambda: shutil.copytree(folder / "whole/checkpoints/step_000006", folder / "again/checkpoints/step_000006"))
        results["again"] = train(config, folder / "again")
        short = dataclasses.replace(config, num_steps=6)
        results["skip"] = poisoned(short, folder / "skip", ranks.rank, last, lasting=False)
        results["lasting"] = poisoned(dataclasses.replace(config, num_steps=30), folder / "lasting", ranks.rank, last, lasting=True)
        results["stopped"] = train(config, folder / "stopped", stop_at=5 if ranks.rank == last else -1)
        results["sft"] = tune(folder)
        results["full_disk"] = full_disk(short, folder / "full_disk")
        try:
            train(dataclasses.replace(config, batch_tokens=config.model.sequence_len), folder / "small")
        except ConfigError as e:
            results["too_few_rows"] = str(e)
        try:
            on_main(lambda: 1 // 0)
        except ZeroDivisionError:
            results["error_everywhere"] = True
        (folder / f"rank{ranks.rank}.json").write_text(json.dumps(results))


def fresh_bpb(config: TrainConfig) -> float:
    """Validation of untrained weights, in as many chunks as make every rank work."""
    evaluate.CHUNK_TOKENS["cpu"] = 4 * config.model.sequence_len
    session = build_session(config, RUNTIME, current_ranks())
    return evaluate.evaluate_bpb(session.model, session.validation, session.token_bytes)


def tune(folder: Path) -> list[float]:
    """A short fine-tuning of the run in folder/base on folder/chat.jsonl."""
    losses = Losses()
    config = SFTConfig(num_steps=4, val_fraction=0.3)
    record = sft(config, RUNTIME, base_checkpoint=folder / "base", conversations=folder / "chat.jsonl",
                 run_dir=folder / f"sft{current_ranks().world_size}", callbacks=[losses])  # fmt: skip
    assert record.val_loss_after is not None
    return [*losses.losses, record.val_loss_before, record.val_loss_after]
