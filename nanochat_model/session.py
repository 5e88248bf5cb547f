"""What one process needs to train: device, model, optimizer and data, built from a config and checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat_model import device as devices
from nanochat_model.config import DataConfig, GPTConfig, RuntimeConfig, TrainConfig
from nanochat_model.distributed import Ranks
from nanochat_model.errors import ConfigError
from nanochat_model.gpt import GPT, compile_training
from nanochat_model.loader import Loader
from nanochat_model.loop import Batch, LossScale, Stepper, even_micro_batch, split_rows
from nanochat_model.optim import build_optimizer
from nanochat_model.shard_set import ShardSet

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(kw_only=True)
class Session:
    """One process of one run."""

    config: TrainConfig
    runtime: RuntimeConfig
    ranks: Ranks
    device: torch.device
    shards: ShardSet
    loader: Loader
    validation: tuple[np.ndarray, np.ndarray]
    token_bytes: np.ndarray
    model: Any
    optimizer: Any
    stepper: Stepper

    def batch(self, step: int) -> Batch:
        """This rank's rows of global batch `step`. Pretraining rows are full, so every target counts."""
        inputs, targets = self.loader.batch(step, rank=self.ranks.rank, world_size=self.ranks.world_size)
        return Batch(inputs=inputs, targets=targets, num_targets=self.config.batch_tokens)

    def tokenizer(self) -> Any:
        """The tokenizer that lies beside the shards."""
        return self.shards.tokenizer


def build_session(config: TrainConfig, runtime: RuntimeConfig, ranks: Ranks) -> Session:
    """Build everything of one run. Raises ConfigError when config, shards and device do not fit together."""
    rows = config.rows_per_batch
    if rows < ranks.world_size:
        raise ConfigError(
            f"batch_tokens {config.batch_tokens} is {rows} rows of {config.model.sequence_len}, fewer than the {ranks.world_size} "
            "ranks; raise batch_tokens or use fewer processes"
        )
    device = devices.choose_device(runtime.device, ranks.local_rank)
    devices.tune_process(runtime.num_threads)
    shards = open_shards(config.data, config.model)
    loader = Loader(
        shards,
        split="train",
        packing=config.data.packing,
        sequence_len=config.model.sequence_len,
        rows_per_batch=rows,
        seed=config.seed,
    )
    model = build_model(config, runtime, device)
    optimizer = build_optimizer(model, config.optimizer)
    stepper = Stepper(
        model,
        optimizer,
        ranks=ranks,
        device=device,
        micro_batch_rows=choose_micro_batch_rows(config.model, runtime, split_rows(rows, ranks), device),
        loss_scale=LossScale.for_dtype(config.compute_dtype),
    )
    return Session(
        config=config,
        runtime=runtime,
        ranks=ranks,
        device=device,
        shards=shards,
        loader=loader,
        validation=loader.validation(config.eval.num_tokens),
        token_bytes=np.asarray(shards.token_bytes),
        model=model,
        optimizer=optimizer,
        stepper=stepper,
    )


def build_model(config: TrainConfig, runtime: RuntimeConfig, device: torch.device) -> GPT:
    """Freshly initialized model of `config` on `device`, its training path compiled where that pays."""
    model = GPT(config.model, compute_dtype=DTYPES[config.compute_dtype], attention=runtime.attention, fp8=config.fp8)
    model = model.init_weights(config.seed).to(device)
    if devices.use_compile(runtime.compile, device, config):
        compile_training(model)
    return model


def open_shards(data: DataConfig, model: GPTConfig) -> ShardSet:
    """The shards at `data.path`, checked to be the ones the config names and to fit the model's vocabulary."""
    if not data.path:
        raise ConfigError("data.path is empty; give the folder of token shards (nanoladder data, tokenizer and shards make one)")
    shards = ShardSet.open(Path(data.path))
    for name in ("manifest_hash", "tokenizer_hash"):
        expected, found = getattr(data, name), getattr(shards, name)
        if expected and expected != found:
            raise ConfigError(
                f"shards at {data.path} have {name} {found}, the config says {expected}; give the shards it was made for"
            )
    vocab_size = len(shards.token_bytes)
    if vocab_size != model.vocab_size:
        raise ConfigError(
            f"model.vocab_size {model.vocab_size} differs from the {vocab_size} of the shards' tokenizer; set "
            f"model.vocab_size={vocab_size}"
        )
    return shards


def choose_micro_batch_rows(model: GPTConfig, runtime: RuntimeConfig, rows: int, device: torch.device) -> int:
    """Rows of a forward pass on this rank: as asked, or what suits the device, in parts as equal as can be."""
    if runtime.micro_batch_rows < 0:
        raise ConfigError(f"runtime.micro_batch_rows {runtime.micro_batch_rows} must be 0 (chosen by the device) or more")
    return even_micro_batch(rows, runtime.micro_batch_rows or devices.default_micro_batch_rows(model, device))
