"""What one process needs to train: device, model, optimizer and data, built from a config and checked against each other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat_model import device as devices
from nanochat_model.config import DataConfig, GPTConfig, RuntimeConfig, TrainConfig
from nanochat_model.distributed import Ranks
from nanochat_model.errors import ConfigError
from nanochat_model.fp8 import check_fp8
from nanochat_model.gpt import GPT, compile_training
from nanochat_model.loader import Loader
from nanochat_model.loop import Batch, LossScale, Stepper, even_micro_batch, split_rows
from nanochat_model.memory import rows_that_fit
from nanochat_model.optim import build_optimizer
from nanochat_model.shard_set import ShardSet
from nanochat_model.tokenizer import Tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(kw_only=True)
class Session:
    """One process of one run."""

    config: TrainConfig
    runtime: RuntimeConfig
    ranks: Ranks
    device: torch.device
    model: Any
    optimizer: Any
    stepper: Stepper
    batch: Callable[[int], Batch]  # this rank's rows of global batch k: a pure function of k
    validation: tuple[np.ndarray, np.ndarray]  # the same rows on every rank
    token_bytes: np.ndarray
    tokenizer_dir: Path
    parents: dict[str, str]  # content hashes of what the run is made from

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_dir)

    def close(self) -> None:
        """End the thread that reads ahead, if there is one."""
        if isinstance(self.batch, Prefetcher):
            self.batch.close()


def build_session(config: TrainConfig, runtime: RuntimeConfig, ranks: Ranks) -> Session:
    """Build everything of one pretraining run. Raises ConfigError when config, shards and device do not fit together."""
    if config.eval.num_tokens < 1:
        raise ConfigError(f"eval.num_tokens {config.eval.num_tokens} must be at least 1: a run that is not evaluated says nothing")
    shards = open_shards(config.data, config.model)
    model, optimizer, stepper, device = build_stepper(config, runtime, ranks)
    loader = Loader(
        shards,
        split="train",
        packing=config.data.packing,
        sequence_len=config.model.sequence_len,
        rows_per_batch=config.rows_per_batch,
        seed=config.seed,
    )

    def batch(k: int) -> Batch:
        inputs, targets = loader.batch(k, rank=ranks.rank, world_size=ranks.world_size)
        return Batch(inputs=inputs, targets=targets, num_targets=config.batch_tokens)  # rows are full: every target counts

    if runtime.core_bundle or runtime.sample_every_steps:
        Tokenizer.load(config.data.path)  # a broken one is told now, not at the first sample
    return Session(
        config=config,
        runtime=runtime,
        ranks=ranks,
        device=device,
        model=model,
        optimizer=optimizer,
        stepper=stepper,
        batch=Prefetcher(batch, config.num_steps) if device.type == "cuda" else batch,
        validation=loader.validation(config.eval.num_tokens),
        token_bytes=np.asarray(shards.token_bytes),
        tokenizer_dir=Path(config.data.path),
        parents={"shards": shards.manifest_hash, "tokenizer": shards.tokenizer_hash, "corpus": shards.corpus_hash},
    )


def build_stepper(config: TrainConfig, runtime: RuntimeConfig, ranks: Ranks) -> tuple[GPT, Any, Stepper, torch.device]:
    """Model (freshly initialized), optimizer and stepper on this rank's device. Raises ConfigError."""
    rows = config.rows_per_batch
    if rows < ranks.world_size:
        raise ConfigError(
            f"batch_tokens {config.batch_tokens} is {rows} rows of {config.model.sequence_len}, fewer than the {ranks.world_size} "
            "ranks; raise batch_tokens or use fewer processes"
        )
    device = devices.choose_device(runtime.device, ranks.local_rank)
    check_fp8(config.fp8, device=device, compute_dtype=config.compute_dtype, sequence_len=config.model.sequence_len)
    devices.tune_process(runtime.num_threads)
    devices.limit_memory(device, runtime.memory_share)
    model = GPT(config.model, compute_dtype=DTYPES[config.compute_dtype], attention=runtime.attention, fp8=config.fp8)
    model = model.init_weights(config.seed).to(device)
    if devices.use_compile(runtime.compile, device, config):
        compile_training(model)
    optimizer = build_optimizer(model, config.optimizer)
    stepper = Stepper(
        model,
        optimizer,
        ranks=ranks,
        device=device,
        micro_batch_rows=choose_micro_batch_rows(config, runtime, ranks, device),
        loss_scale=LossScale.for_dtype(config.compute_dtype),
    )
    return model, optimizer, stepper, device


def open_shards(data: DataConfig, model: GPTConfig) -> ShardSet:
    """The shards at `data.path`, checked to be the ones the config names and to fit the model's vocabulary. Raises ConfigError."""
    if not data.path:
        raise ConfigError("data.path is empty; give the folder of token shards (`nanoladder data` makes one)")
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


def choose_micro_batch_rows(config: TrainConfig, runtime: RuntimeConfig, ranks: Ranks, device: torch.device) -> int:
    """Rows of a forward pass on this rank: as asked, or what suits the device and, by arithmetic, fits into it; in parts as
    equal as can be. Whether it does fit, the first step shows (see out_of_memory). Raises ConfigError on a negative number."""
    if runtime.micro_batch_rows < 0:
        raise ConfigError(f"runtime.micro_batch_rows {runtime.micro_batch_rows} must be 0 (chosen by the device) or more")
    at_most = runtime.micro_batch_rows or devices.default_micro_batch_rows(config.model, device)
    memory = devices.memory_bytes(device)
    if not runtime.micro_batch_rows and memory is not None:
        room = memory * runtime.memory_share
        fitting = rows_that_fit(
            config.model, memory_bytes=room, at_most=at_most, compute_dtype=config.compute_dtype, num_devices=ranks.world_size
        )
        at_most = max(1, fitting)  # an estimate refuses nothing: the device has the last word
    return even_micro_batch(split_rows(config.rows_per_batch, ranks), at_most)


class Prefetcher:
    """Gathers the next batch in a thread while the accelerator works on this one. Asked for k, it starts on k + 1."""

    def __init__(self, batch: Callable[[int], Batch], num_steps: int) -> None:
        self._batch = batch
        self._num_steps = num_steps
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Batch]] | None = None

    def __call__(self, k: int) -> Batch:
        ready, self._next = self._next, None
        # Whatever is asked for, only the pool's thread reads: the loader keeps plans that two threads must not make at once.
        future = ready[1] if ready is not None and ready[0] == k else self._pool.submit(self._batch, k)
        result = future.result()
        if k + 1 < self._num_steps:
            self._next = (k + 1, self._pool.submit(self._batch, k + 1))
        return result

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
