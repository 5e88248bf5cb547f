"""Supervised fine-tuning: the pretraining loop with conversations for batches and a base checkpoint to start from.

The loss covers what the assistant says; padding and everything else has the target -1. Values are nanochat's chat_sft: learning
rates 0.8 of those the base was trained with, weight decay 0, momentum states taken over, warm-down to 0 over the last half.

A fine-tuning is a run like any other: its TrainConfig holds all that determines it (the conversations by data.manifest_hash, the
base by trunk), `finetune` has pretrain's signature, and its record.json says kind "sft". `sft` makes that config from a base
checkpoint, conversations and an SFTConfig.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nanochat_model.callbacks import Callback, Callbacks
from nanochat_model.checkpoint import CheckpointState, checkpoint_hash, load_weights, read_optimizer_state, read_state, resolve
from nanochat_model.checkpoint import tokenizer_dir as find_tokenizer
from nanochat_model.config import RuntimeConfig, TrainConfig
from nanochat_model.conversation_set import ConversationLoader
from nanochat_model.distributed import Ranks, barrier, current_ranks, on_main
from nanochat_model.errors import ConfigError
from nanochat_model.evaluate import evaluate_loss
from nanochat_model.identity import from_dict, run_id, write_atomic
from nanochat_model.interop import inherited_config
from nanochat_model.loader import rank_rows
from nanochat_model.loop import Batch
from nanochat_model.mixture import Source, parse_sources
from nanochat_model.out_of_memory import halve, is_out_of_memory, limited, read_limit, release_memory
from nanochat_model.record import RECORD_FILE, RunRecord, Status
from nanochat_model.resume import Start, own_start
from nanochat_model.runner import Runner
from nanochat_model.session import Prefetcher, Session, build_stepper
from nanochat_model.sft_data import Report, SFTData, SourceCounts, prepare
from nanochat_model.sft_recipe import WEIGHTS_ALONE, WITH_OPTIMIZER, SFTConfig, SFTRecipe
from nanochat_model.step_times import StartupTimer
from nanochat_model.tokenizer import Tokenizer
from nanochat_model.train import (
    CONFIG_FILE,
    DEFAULT_RUNTIME,
    Labels,
    make_record,
    may_go_on,
    restore_progress,
    run_to_end,
    set_aside,
)

FACTS_FILE = "sft.json"  # beside record.json: what only a fine-tuning has
SCHEMA_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class SFTRecord:
    """What sft.json says beyond the run's record.json. Losses are nats a supervised token of the held-out conversations; the
    record's val_bpb is in bits per byte of the assistant's text."""

    schema_version: int = SCHEMA_VERSION
    run_id: str
    status: Status
    name: str = ""
    train_config: TrainConfig
    val_loss_before: float
    val_loss_after: float | None = None
    num_conversations: int  # of one pass over the mixture, repeats counted
    num_val_conversations: int
    num_truncated: int  # longer than a row, cut at the end
    num_supervised_tokens: int  # in one pass
    num_steps: int
    skipped_steps: int  # without a supervised token, or not finite
    sources: tuple[SourceCounts, ...] = ()
    error: str | None = None
    parents: dict[str, str] = field(default_factory=dict)  # base, conversations, tokenizer -> content hash

    def save(self, run_dir: Path) -> None:
        write_atomic(run_dir / FACTS_FILE, json.dumps(asdict(self), indent=1, allow_nan=False))

    @classmethod
    def load(cls, run_dir: str | Path) -> SFTRecord:
        """Raises ConfigError on a missing or broken file."""
        path = Path(run_dir) / FACTS_FILE
        try:
            data = json.loads(path.read_text(encoding="utf8"))
        except (OSError, ValueError) as e:
            raise ConfigError(f"{path}: not readable ({e}); delete it and {RECORD_FILE} to fine-tune again") from None
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(f"{path}: another schema than {SCHEMA_VERSION}; use the release that wrote it")
        return from_dict(cls, data, f"{path}: ")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A fine-tuning that is ready to run: `finetune(plan.config, …, start_from=plan.base)`."""

    recipe: SFTRecipe
    base: Path
    data: SFTData

    @property
    def config(self) -> TrainConfig:
        return self.recipe.resolve(self.recipe.inherited.model, seed=self.recipe.sft.seed)


def sft(
    config: SFTConfig,
    runtime: RuntimeConfig = DEFAULT_RUNTIME,
    *,
    base_checkpoint: str | Path,
    conversations: str | Path | Sequence[str | Source],
    run_dir: str | Path,
    tasks_dir: str | Path = "",
    data_root: str | Path = "",
    callbacks: Sequence[Callback] = (),
    resume: bool = True,
    report: Report | None = None,
    **labels: Any,
) -> SFTRecord:
    """Fine-tune `base_checkpoint` (a checkpoint, run or checkpoints folder) in `run_dir`.

    `conversations`: a path, or sources (see mixture.Source.parse: datasets of `tasks_dir` or paths, each "NAME=EPOCHS"). They are
    rendered into `data_root` (default: a folder of the run). A complete record that is there already is returned; an interrupted
    run goes on to the same bits. Under several ranks all call it. `labels`: name, sweep, stage, tags as in pretrain. Raises
    ConfigError on unfit input; values that stay non-finite give a record with status "failed".
    """
    root = data_root or Path(run_dir) / "conversations"
    plan = plan_sft(config, base_checkpoint, conversations, root, tasks_dir=tasks_dir, report=report)
    finetune(plan.config, runtime, run_dir=run_dir, start_from=plan.base, callbacks=callbacks, resume=resume, **labels)
    return SFTRecord.load(run_dir)


def plan_sft(
    config: SFTConfig,
    base_checkpoint: str | Path,
    conversations: str | Path | Sequence[str | Source],
    data_root: str | Path,
    *,
    tasks_dir: str | Path = "",
    report: Report | None = None,
) -> Plan:
    """Prepare the conversations and resolve the run's config. Under several ranks all call it and rank 0 does the work."""
    given = [str(conversations)] if isinstance(conversations, str | Path) else conversations
    sources = parse_sources(given)

    def work() -> tuple[SFTRecipe, Path]:
        base = resolve(base_checkpoint)
        tokenizer = _tokenizer(base, read_state(base))
        data = prepare(
            sources, tokenizer, data_root, tasks_dir=tasks_dir, val_fraction=config.val_fraction, seed=config.seed, report=report
        )
        return sft_recipe(config, base, data), base

    recipe, base = on_main(work)
    return Plan(recipe=recipe, base=base, data=SFTData.open(recipe.data.path, Tokenizer.load(find_tokenizer(base))))


def finetune(
    config: TrainConfig,
    runtime: RuntimeConfig = DEFAULT_RUNTIME,
    *,
    run_dir: str | Path,
    start_from: str | Path,
    callbacks: Sequence[Callback] = (),
    resume: bool = True,
    name: str = "",
    sweep: str = "",
    stage: str = "sft",
    tags: Mapping[str, str] | None = None,
    backend: str = "process",
    attempts: int = 1,
) -> RunRecord:
    """Run a resolved fine-tuning: pretrain's signature and behaviour, `start_from` being the base checkpoint that
    `config.trunk` names and `config.data.path` a folder of prepared conversations."""
    started = time.time()
    ranks, run_dir = current_ranks(), Path(run_dir)
    existing, start, base = on_main(lambda: _prepare_run(config, run_dir, resume, start_from))
    if existing is not None:
        return existing
    tokenizer = _tokenizer(base, read_state(base))
    data = SFTData.open(config.data.path, tokenizer)
    if data.hash != config.data.manifest_hash:
        raise ConfigError(f"conversations at {config.data.path} are {data.hash}, the config says {config.data.manifest_hash}")
    labels = Labels(name=name, sweep=sweep, stage=stage, tags=dict(tags or {}), backend=backend, attempts=attempts)
    task = _Task(config=config, base=base, data=data, tokenizer=tokenizer, run_dir=run_dir, labels=labels, started=started)
    record, error = _attempt(task, runtime, ranks, start, callbacks)
    if error is not None and ranks.world_size == 1 and may_go_on(run_dir, record):
        error = None  # it holds on to the tensors of the attempt
        release_memory()
        record, error = _attempt(task, runtime, ranks, own_start(config, run_dir, "refuse") or start, callbacks)
    if error is not None:
        raise error
    return record


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What an attempt needs, whichever it is."""

    config: TrainConfig
    base: Path
    data: SFTData
    tokenizer: Tokenizer
    run_dir: Path
    labels: Labels
    started: float


def _attempt(
    task: _Task, runtime: RuntimeConfig, ranks: Ranks, start: Start | None, callbacks: Sequence[Callback]
) -> tuple[RunRecord, Exception | None]:
    """Train from `start` to the end; the record, which is saved, and what ended the run before its time."""
    limit, startup = read_limit(task.run_dir), StartupTimer()
    session, loader = _build_session(task, limited(runtime, limit), ranks)
    if start is None:
        load_weights(session.model, task.base)
        if task.config.trunk.startswith(WITH_OPTIMIZER):
            _warm_start(session.optimizer, task.base)
    progress = restore_progress(session, start)
    progress.startup_seconds = startup.built()
    before = start.state.extra["val_loss_before"] if start else evaluate_loss(session.model, session.validation)
    calls = Callbacks(callbacks)
    extra = {"val_loss_before": before}
    runner = Runner(session, progress, calls, run_dir=task.run_dir, parents=session.parents, kind="sft", extra=extra)
    status, reason, error = run_to_end(runner)
    if error is not None and is_out_of_memory(error):
        limit = halve(task.run_dir, session.stepper.micro_batch_rows, progress.step) or limit
    record = make_record(session, progress, task.labels, status, reason, session.parents, task.started)
    record = replace(record, kind="sft", out_of_memory=limit.history if limit is not None else ())
    after = evaluate_loss(session.model, session.validation) if record.status == "complete" else None
    facts = SFTRecord(
        run_id=record.run_id,
        status=record.status,
        name=record.name,
        train_config=task.config,
        val_loss_before=before,
        val_loss_after=after,
        num_conversations=len(task.data.train),
        num_val_conversations=len(task.data.val),
        num_truncated=loader.num_truncated,
        num_supervised_tokens=task.data.train.num_supervised_tokens,
        num_steps=progress.step,
        skipped_steps=progress.skipped_steps + progress.empty_steps,
        sources=task.data.sources,
        error=record.error,
        parents=session.parents,
    )
    if ranks.is_main:
        facts.save(task.run_dir)  # first: a record that is there has its facts beside it
        record.save(task.run_dir)
    if error is None:
        barrier()
        calls.call("on_end", record)
    return record, error


def _warm_start(optimizer: Any, base: Path) -> None:
    state = read_optimizer_state(base)
    if state is None:
        raise ConfigError(f"{base} holds no optimizer state to start from (it was imported?); set sft.warm_start to False")
    optimizer.load_consolidated(state)


def sft_recipe(config: SFTConfig, base: Path, data: SFTData) -> SFTRecipe:
    """The recipe that resolves fine-tunings of the checkpoint at `base` on `data`."""
    state = read_state(base)
    inherited = state.config or inherited_config(state)
    length = state.model.sequence_len
    loader = ConversationLoader(data.train, sequence_len=length, rows_per_batch=1, seed=config.seed)
    return SFTRecipe(
        name="sft",
        sft=config,
        inherited=inherited,
        base_checkpoint=str(base.absolute()),
        base_hash=checkpoint_hash(base),
        data=data.data_config,
        rows_per_epoch=loader.rows_per_epoch,
    )


def _tokenizer(base: Path, state: CheckpointState) -> Tokenizer:
    folder = find_tokenizer(base)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size != state.model.vocab_size:
        raise ConfigError(
            f"tokenizer at {folder} has {tokenizer.vocab_size} ids, the model {state.model.vocab_size}; give the model's own"
        )
    return tokenizer


def _prepare_run(
    config: TrainConfig, run_dir: Path, resume: bool, start_from: str | Path
) -> tuple[RunRecord | None, Start | None, Path]:
    """On rank 0: the complete record that is there already, the checkpoint to go on from, and the base. Writes config.json."""
    base = resolve(start_from)
    found = checkpoint_hash(base)
    if config.trunk not in (WITH_OPTIMIZER + found, WEIGHTS_ALONE + found):
        raise ConfigError(f"{base} is checkpoint {found}, but config.trunk says {config.trunk!r}; give the base it was made for")
    if resume and (run_dir / RECORD_FILE).is_file():
        record = RunRecord.load(run_dir)
        if record.run_id != run_id(config):
            raise ConfigError(
                f"{run_dir / RECORD_FILE} is of another run ({record.run_id}, not {run_id(config)}); give another folder"
            )
        if record.status == "complete":
            return record, None, base
    if not resume:
        set_aside(run_dir)
    start = own_start(config, run_dir, "refuse")
    write_atomic(run_dir / CONFIG_FILE, json.dumps({"run_id": run_id(config), **asdict(config)}, indent=1))
    return None, start, base


def _build_session(task: _Task, runtime: RuntimeConfig, ranks: Ranks) -> tuple[Session, ConversationLoader]:
    config, data = task.config, task.data
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
        batch=Prefetcher(batch, config.num_steps) if device.type == "cuda" else batch,
        validation=ConversationLoader(data.val, sequence_len=length, rows_per_batch=1).epoch(-(-config.eval.num_tokens // length)),
        token_bytes=task.tokenizer.token_bytes(),
        tokenizer_dir=find_tokenizer(task.base),
        parents={"base": checkpoint_hash(task.base), "conversations": data.hash, "tokenizer": data.tokenizer_hash},
    )
    return session, loader
