"""Supervised fine-tuning on conversations: the pretraining loop with another source of batches and a warm-started optimizer.

The loss covers what the assistant says; padding and everything else has the target -1. Values are nanochat's chat_sft: learning
rates 0.8 of those the base was trained with, weight decay 0, momentum states taken over, warm-down to 0 over the last half.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nanochat_model import device as devices
from nanochat_model.callbacks import Callback, Callbacks
from nanochat_model.checkpoint import (
    CHECKPOINTS_DIR,
    CheckpointState,
    checkpoint_hash,
    find_latest,
    load_weights,
    read_optimizer_state,
    read_state,
    resolve,
)
from nanochat_model.checkpoint import tokenizer_dir as find_tokenizer
from nanochat_model.config import EvalConfig, RuntimeConfig, TrainConfig
from nanochat_model.conversations import ConversationLoader, ConversationSet, read_conversations, split_conversations
from nanochat_model.distributed import Ranks, barrier, current_ranks, on_main
from nanochat_model.errors import ConfigError
from nanochat_model.evaluate import evaluate_loss
from nanochat_model.identity import content_hash, from_dict, write_atomic
from nanochat_model.loader import rank_rows
from nanochat_model.loop import Batch
from nanochat_model.record import CurvePoint, Status
from nanochat_model.resume import Start
from nanochat_model.runner import Runner
from nanochat_model.session import Session, build_stepper
from nanochat_model.tokenizer import Tokenizer
from nanochat_model.train import DEFAULT_RUNTIME, iso_time, restore_progress, run_to_end
from nanochat_model.version import git_commit

RECORD_FILE = "sft.json"  # not record.json: a fine-tuning is no point of a scaling law
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """What determines a fine-tuning, beside base checkpoint and conversations. Everything else is the base's."""

    num_epochs: float = 1.0  # over the training conversations
    num_steps: int = 0  # instead of epochs, if over 0
    batch_tokens: int = 0  # 0: the base's
    lr_fraction: float = 0.8  # of the learning rates the base was trained with
    warmup_fraction: float = 0.0
    warmdown_fraction: float = 0.5
    final_lr_fraction: float = 0.0
    momentum_start: float = 0.85
    momentum_end: float = 0.95
    momentum_warmup_steps: int = 300
    warm_start: bool = True  # take over the base's optimizer state
    val_fraction: float = 0.1  # conversations held out, by hash
    eval_every_steps: int = 0  # 0: before and after only
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.num_epochs > 0 or self.num_steps > 0):
            raise ConfigError(f"sft.num_epochs {self.num_epochs} must be over 0 where num_steps is not given")
        for name in ("warmup_fraction", "warmdown_fraction", "final_lr_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"sft.{name} {getattr(self, name)} must lie in 0..1")
        if not 0 < self.lr_fraction < float("inf"):
            raise ConfigError(f"sft.lr_fraction {self.lr_fraction} must be positive and finite")
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"sft.val_fraction {self.val_fraction} must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class SFTRecord:
    """One finished fine-tuning (sft.json). Losses are nats a supervised token of the held-out conversations; the curve's
    val_bpb is in bits per byte of the assistant's text."""

    schema_version: int = SCHEMA_VERSION
    kind: str = "sft"
    sft_id: str
    status: Status
    name: str = ""
    config: SFTConfig
    train_config: TrainConfig  # resolved: what the loop ran
    val_loss_before: float
    val_loss_after: float | None = None
    num_conversations: int
    num_val_conversations: int
    num_truncated: int  # longer than a row, cut at the end
    num_supervised_tokens: int  # in one epoch
    num_steps: int
    skipped_steps: int  # without a supervised token, or not finite
    curve: tuple[CurvePoint, ...] = ()
    error: str | None = None
    device: str = ""
    num_devices: int = 1
    train_seconds: float = 0.0
    git_commit: str = ""
    parents: dict[str, str] = field(default_factory=dict)  # base, conversations, tokenizer -> content hash
    started_at: str = ""
    finished_at: str = ""

    def save(self, run_dir: Path) -> None:
        write_atomic(run_dir / RECORD_FILE, json.dumps(asdict(self), indent=1, allow_nan=False))

    @classmethod
    def load(cls, run_dir: str | Path) -> SFTRecord:
        """Raises ConfigError on a missing or broken file."""
        path = Path(run_dir) / RECORD_FILE
        try:
            data = json.loads(path.read_text(encoding="utf8"))
        except (OSError, ValueError) as e:
            raise ConfigError(f"{path}: not readable ({e}); delete it to fine-tune again") from None
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(f"{path}: another schema than {SCHEMA_VERSION}; use the release that wrote it")
        return from_dict(cls, data, f"{path}: ")


@dataclass(frozen=True, kw_only=True)
class _Data:
    """Conversations of one fine-tuning, rendered."""

    train: ConversationSet
    val: ConversationSet
    tokenizer: Tokenizer
    folder: Path  # of the tokenizer


def sft(
    config: SFTConfig,
    runtime: RuntimeConfig = DEFAULT_RUNTIME,
    *,
    base_checkpoint: str | Path,
    conversations: str | Path,
    run_dir: str | Path,
    callbacks: Sequence[Callback] = (),
    resume: bool = True,
    name: str = "",
) -> SFTRecord:
    """Fine-tune `base_checkpoint` (a checkpoint, run or checkpoints folder) on `conversations` (jsonl or parquet) in `run_dir`.

    A complete sft.json that is there already is returned; an interrupted run goes on. Under several ranks all call it. Raises
    ConfigError on unfit input; values that stay non-finite give a record with status "failed".
    """
    started = time.time()
    ranks, run_dir = current_ranks(), Path(run_dir)
    base = on_main(lambda: resolve(base_checkpoint))
    state = read_state(base)
    data = _read_data(config, base, state, conversations)
    parents = {"base": checkpoint_hash(base), "conversations": data.train.hash, "tokenizer": data.tokenizer.hash}
    sft_id = content_hash([asdict(config), parents])
    existing, start = on_main(lambda: _prepare(run_dir, sft_id, resume))
    if existing is not None:
        return existing
    train_config = resolve_config(config, state, data.train)
    session, loader = _build_session(train_config, runtime, ranks, data, parents)
    if start is None:
        load_weights(session.model, base)
        if config.warm_start:
            _warm_start(session.optimizer, base)
    progress = restore_progress(session, start)
    before = start.state.extra["val_loss_before"] if start else evaluate_loss(session.model, session.validation)
    calls = Callbacks(callbacks)
    extra = {"sft_id": sft_id, "sft": asdict(config), "val_loss_before": before}
    runner = Runner(session, progress, calls, run_dir=run_dir, parents=parents, kind="sft", extra=extra)
    status, reason, error = run_to_end(runner)
    record = SFTRecord(
        sft_id=sft_id,
        status=status,
        name=name,
        config=config,
        train_config=train_config,
        val_loss_before=before,
        val_loss_after=evaluate_loss(session.model, session.validation) if status == "complete" else None,
        num_conversations=len(data.train),
        num_val_conversations=len(data.val),
        num_truncated=loader.num_truncated,
        num_supervised_tokens=data.train.num_supervised_tokens,
        num_steps=progress.step,
        skipped_steps=progress.skipped_steps,
        curve=tuple(progress.curve),
        error=reason,
        device=devices.device_name(session.device),
        num_devices=ranks.world_size,
        train_seconds=progress.clock.seconds,
        git_commit=git_commit(),
        parents=parents,
        started_at=iso_time(started),
        finished_at=iso_time(time.time()),
    )
    if ranks.is_main:
        record.save(run_dir)
    if error is not None:
        raise error
    barrier()
    return record


def _warm_start(optimizer: Any, base: Path) -> None:
    state = read_optimizer_state(base)
    if state is None:
        raise ConfigError(f"{base} holds no optimizer state to start from (it was imported?); set sft.warm_start to False")
    optimizer.load_consolidated(state)


def resolve_config(config: SFTConfig, base: CheckpointState, train: ConversationSet) -> TrainConfig:
    """The loop's config: the base's model, precision and learning rates (× lr_fraction), with SFT's schedule and horizon."""
    inherited = base.config or TrainConfig(model=base.model, batch_tokens=32 * base.model.sequence_len)
    batch_tokens = config.batch_tokens or inherited.batch_tokens
    o = inherited.optimizer
    rates = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "smear_lr")
    optimizer = replace(o, weight_decay=0.0, **{r: getattr(o, r) * config.lr_fraction for r in rates})
    if config.num_steps:
        num_steps = config.num_steps
    else:
        rows = ConversationLoader(
            train, sequence_len=base.model.sequence_len, rows_per_batch=batch_tokens // base.model.sequence_len, seed=config.seed
        )
        num_steps = max(1, round(config.num_epochs * rows.rows_per_epoch / rows.rows_per_batch))
    schedule = replace(
        inherited.schedule,
        kind="nanochat",
        warmup_steps=round(config.warmup_fraction * num_steps),
        warmdown_fraction=config.warmdown_fraction,
        final_lr_fraction=config.final_lr_fraction,
        momentum_start=config.momentum_start,
        momentum_peak=config.momentum_end,
        momentum_end=config.momentum_end,
        momentum_warmup_steps=config.momentum_warmup_steps,
    )
    return replace(
        inherited,
        optimizer=optimizer,
        schedule=schedule,
        eval=EvalConfig(num_tokens=0, every_steps=config.eval_every_steps),
        batch_tokens=batch_tokens,
        num_steps=num_steps,
        seed=config.seed,
        trunk="",
    )


def _read_data(config: SFTConfig, base: Path, state: CheckpointState, conversations: str | Path) -> _Data:
    folder = find_tokenizer(base)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size != state.model.vocab_size:
        raise ConfigError(
            f"tokenizer at {folder} has {tokenizer.vocab_size} ids, the model {state.model.vocab_size}; give the model's own"
        )
    train, val = split_conversations(read_conversations(conversations), config.val_fraction)
    if not train or not val:
        raise ConfigError(
            f"{conversations}: {len(train)} conversations to train on and {len(val)} held out at val_fraction "
            f"{config.val_fraction}; give more conversations or another fraction"
        )
    return _Data(train=ConversationSet(train, tokenizer), val=ConversationSet(val, tokenizer), tokenizer=tokenizer, folder=folder)


def _prepare(run_dir: Path, sft_id: str, resume: bool) -> tuple[SFTRecord | None, Start | None]:
    """On rank 0: the complete record that is there already, or the checkpoint to go on from."""
    if not resume:
        return None, None
    if (run_dir / RECORD_FILE).is_file():
        record = SFTRecord.load(run_dir)
        if record.sft_id != sft_id:
            raise ConfigError(
                f"{run_dir / RECORD_FILE} is of another fine-tuning ({record.sft_id}, not {sft_id}); give another folder"
            )
        if record.status == "complete":
            return record, None
    path = find_latest(run_dir / CHECKPOINTS_DIR)
    if path is None:
        return None, None
    state = read_state(path)
    if state.extra.get("sft_id") != sft_id:
        raise ConfigError(f"{path} is of another run ({state.extra.get('sft_id', state.kind)}, not {sft_id}); give another folder")
    return None, Start(path=path, state=state)


def _build_session(
    config: TrainConfig, runtime: RuntimeConfig, ranks: Ranks, data: _Data, parents: dict[str, str]
) -> tuple[Session, ConversationLoader]:
    model, optimizer, stepper, device = build_stepper(config, runtime, ranks)
    rows, length = config.rows_per_batch, config.model.sequence_len
    loader = ConversationLoader(data.train, sequence_len=length, rows_per_batch=rows, seed=config.seed)
    own = slice(*rank_rows(rows, ranks.rank, ranks.world_size))

    def batch(k: int) -> Batch:
        inputs, targets = loader.batch(k)  # the whole of it: every rank must know the number of targets
        return Batch(inputs=inputs[own], targets=targets[own], num_targets=int((targets >= 0).sum()))

    session = Session(
        config=config,
        runtime=dataclasses.replace(runtime, core_bundle=""),
        ranks=ranks,
        device=device,
        model=model,
        optimizer=optimizer,
        stepper=stepper,
        batch=batch,
        validation=ConversationLoader(data.val, sequence_len=length, rows_per_batch=1).epoch(),
        token_bytes=data.tokenizer.token_bytes(),
        tokenizer_dir=data.folder,
        parents=parents,
    )
    return session, loader
