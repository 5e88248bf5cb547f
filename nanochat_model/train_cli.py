"""Pretrain from a folder of token shards, without Ray: `python -m nanochat_model.train SHARDS --depth 12`.

Model, horizon, batch and learning rates are resolved by the recipe (nanochat's unless changed here); `--set key=value` replaces
any field of the resolved config afterwards.
"""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

from nanochat_model.callbacks import Callback
from nanochat_model.config import ComputeDtype, DataConfig, GPTConfig, Packing, RuntimeConfig, ScheduleKind, TrainConfig
from nanochat_model.console import Console, describe, summary
from nanochat_model.errors import ConfigError
from nanochat_model.horizon import Horizon
from nanochat_model.identity import run_id
from nanochat_model.overrides import parse_overrides
from nanochat_model.recipe import NANOCHAT, Recipe
from nanochat_model.record import RunRecord

EXAMPLES = """\
Examples:
  a small model on a CPU, 12 tokens per scaling parameter (the recipe's own horizon):
    python -m nanochat_model.train shards --depth 2 --head-dim 32 --sequence-len 256 --window-pattern L
  d12 on one GPU at a fixed compute budget, evaluated every 250 steps, saved every 1000:
    python -m nanochat_model.train shards --depth 12 --train-flops 2e18 --checkpoint-every-steps 1000
  d24 on 8 GPUs, fp8, with CORE:
    torchrun --nproc_per_node=8 -m nanochat_model.train shards --depth 24 --fp8 tensorwise \\
        --core-every-steps 2000 --core-bundle download
  another weight decay and batch, everything else by the recipe:
    python -m nanochat_model.train shards --depth 4 --batch-tokens 16384 --set optimizer.weight_decay=0.1
  go on after an interruption: the same command again; from an earlier checkpoint: --resume-from-step 1000
  a trunk, and a model of 1200 steps that decays from its checkpoint at step 1000:
    python -m nanochat_model.train shards --depth 4 --num-steps 4000 --schedule constant_then_decay --warmdown-fraction 0 \\
        --keep-steps 1000 2000 --run-dir trunk
    python -m nanochat_model.train shards --decay-from trunk@1000 --decay-steps 200 --run-dir decay
"""


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """Size and shape. The vocabulary is that of the shards."""

    depth: int = 12
    """Layers; the width follows from it unless --model-dim is given."""
    aspect_ratio: int = 64
    """Width = depth × this, rounded up to a multiple of the head dimension."""
    head_dim: int = 128
    """Width of one attention head."""
    model_dim: int = 0
    """Width; 0: from the depth."""
    num_kv_heads: int = 0
    """Key and value heads; 0: as many as query heads."""
    sequence_len: int = 2048
    """Tokens of context."""
    window_pattern: str = "SSSL"
    """Tiled over the layers: L full context, S a quarter of it; the last layer is always L."""

    def config(self, vocab_size: int) -> GPTConfig:
        common: dict[str, Any] = {
            "sequence_len": self.sequence_len,
            "vocab_size": vocab_size,
            "window_pattern": self.window_pattern,
        }
        if self.model_dim:
            heads = max(1, self.model_dim // self.head_dim)
            kv_heads = self.num_kv_heads or heads
            return GPTConfig(depth=self.depth, model_dim=self.model_dim, num_heads=heads, num_kv_heads=kv_heads, **common)
        return GPTConfig.from_depth(
            self.depth, aspect_ratio=self.aspect_ratio, head_dim=self.head_dim, num_kv_heads=self.num_kv_heads or None, **common
        )


@dataclass(frozen=True, kw_only=True)
class HorizonArgs:
    """How long to train: at most one of these; none means the recipe's tokens per parameter."""

    num_steps: int | None = None
    """Optimizer steps."""
    num_tokens: float | None = None
    """Training tokens."""
    train_flops: float | None = None
    """Training FLOPs."""
    tokens_per_param: float | None = None
    """Tokens per scaling parameter (transformer matrices + lm_head)."""

    def horizon(self) -> Horizon | None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return Horizon(**given) if given else None


@dataclass(frozen=True, kw_only=True)
class RecipeArgs:
    """Reference values, before the rules scale them to this run's batch and horizon."""

    batch_tokens: int = 0
    """Tokens a step over all ranks; 0: by the rule from the horizon."""
    matrix_lr: float = NANOCHAT.optimizer.matrix_lr
    """Of Muon."""
    embedding_lr: float = NANOCHAT.optimizer.embedding_lr
    unembedding_lr: float = NANOCHAT.optimizer.unembedding_lr
    scalar_lr: float = NANOCHAT.optimizer.scalar_lr
    weight_decay: float = NANOCHAT.weight_decay.coefficient
    """Of the matrices, at the reference batch and horizon."""
    schedule: ScheduleKind = "nanochat"
    warmup_steps: int = NANOCHAT.schedule.warmup_steps
    warmdown_fraction: float = NANOCHAT.schedule.warmdown_fraction
    """Last part of the run in which learning rates fall linearly."""
    final_lr_fraction: float = NANOCHAT.schedule.final_lr_fraction
    compute_dtype: ComputeDtype = "bfloat16"
    fp8: Literal["off", "tensorwise", "rowwise"] = "off"
    """Scaled fp8 products in training (Hopper, gfx942); evaluation never uses them."""
    eval_tokens: int = NANOCHAT.eval.num_tokens
    """Validation tokens of each evaluation."""
    eval_every: int = NANOCHAT.eval.every_steps
    """Steps between evaluations; 0: only at the end."""

    def recipe(self) -> Recipe:
        """nanochat's recipe with these reference values."""
        optimizer = replace(
            NANOCHAT.optimizer,
            matrix_lr=self.matrix_lr,
            embedding_lr=self.embedding_lr,
            unembedding_lr=self.unembedding_lr,
            scalar_lr=self.scalar_lr,
        )
        schedule = replace(
            NANOCHAT.schedule,
            kind=self.schedule,
            warmup_steps=self.warmup_steps,
            warmdown_fraction=self.warmdown_fraction,
            final_lr_fraction=self.final_lr_fraction,
        )
        rule = NANOCHAT.weight_decay
        return replace(
            NANOCHAT,
            optimizer=optimizer,
            schedule=schedule,
            weight_decay=replace(rule, coefficient=self.weight_decay or rule.coefficient),
            eval=replace(NANOCHAT.eval, num_tokens=self.eval_tokens, every_steps=self.eval_every),
            compute_dtype=self.compute_dtype,
        )

    def overrides(self) -> dict[str, Any]:
        early: dict[str, Any] = {"batch_tokens": self.batch_tokens} if self.batch_tokens else {}
        early |= {"fp8": self.fp8}
        return early if self.weight_decay else early | {"weight_decay_multiplier": 0.0}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Pretrain from a folder of token shards, in this process or under torchrun, without Ray."""

    shards: tyro.conf.Positional[str]
    """Folder of token shards (`nanoladder data` makes one)."""
    run_dir: str = ""
    """Folder of the run; default runs/<run_id>."""
    name: str = ""
    """A name for the record."""
    packing: Packing = "best_fit"
    """How documents become rows: best_fit (nanochat's, drops tokens) or keep_remainder."""
    seed: int = 0
    model: ModelArgs = field(default_factory=ModelArgs)
    horizon: HorizonArgs = field(default_factory=HorizonArgs)
    recipe: RecipeArgs = field(default_factory=RecipeArgs)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    resume: bool = True
    """Go on from the newest intact checkpoint; --no-resume sets earlier ones aside."""
    resume_from_step: int = -1
    """Go on from this checkpoint instead of the newest; newer ones are set aside."""
    horizon_change: Literal["refuse", "exact", "follow_new"] = "refuse"
    """How to treat the schedule when a run in progress is given another horizon."""
    decay_from: str = ""
    """RUN_DIR@STEP: a short decay from that checkpoint of a trunk, whose model, batch and rates it takes."""
    decay_steps: int = 0
    """With --decay-from: steps of warm-down."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Replace any field of the resolved config, e.g. --set optimizer.polar_steps=4; repeatable."""
    dry_run: bool = False
    """Print what would be trained and stop."""
    json: bool = False
    """Print the result as one JSON object on standard output; progress goes to standard error."""

    def train_config(self, data: DataConfig, vocab_size: int) -> TrainConfig:
        """The resolved config. Raises ConfigError on values that do not fit."""
        overrides = self.recipe.overrides() | parse_overrides(self.set)
        return self.recipe.recipe().resolve(
            self.model.config(vocab_size), self.horizon.horizon(), data=data, seed=self.seed, overrides=overrides
        )


def resolve_run(args: Arguments) -> tuple[TrainConfig, Path | None]:
    """What to train, and the trunk checkpoint to start from, if any. Raises ConfigError."""
    from nanochat_model.shard_set import ShardSet
    from nanochat_model.train import decay_start

    shards = ShardSet.open(args.shards)
    if not args.decay_from:
        if args.decay_steps:
            raise ConfigError(f"--decay-steps {args.decay_steps} needs --decay-from RUN_DIR@STEP")
        return args.train_config(shards.data_config(args.packing), len(shards.token_bytes)), None
    trunk, _, step = args.decay_from.rpartition("@")
    if not trunk or not step.isdigit():
        raise ConfigError(f"--decay-from {args.decay_from!r} is not of the form RUN_DIR@STEP, for example trunk@1000")
    plain = Arguments(shards=args.shards)
    if any(getattr(args, name) != getattr(plain, name) for name in ("model", "horizon", "recipe", "set", "packing", "seed")):
        raise ConfigError(
            "--decay-from takes model, batch, rates and schedule from the trunk, packing and seed as well; leave out their options"
        )
    config, start_from = decay_start(trunk, int(step), decay_steps=args.decay_steps)
    return replace(config, data=replace(config.data, path=str(shards.path))), start_from


def run(args: Arguments) -> RunRecord | None:
    """Resolve, train and return the record (None for a dry run)."""
    from nanochat_model import device as devices
    from nanochat_model.distributed import process_group
    from nanochat_model.train import pretrain, rewind

    devices.tune_process(args.runtime.num_threads)
    config, start_from = resolve_run(args)
    run_dir = Path(args.run_dir or Path("runs") / run_id(config))
    tell = partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.dry_run:
        print(jsonlib.dumps({"run_id": run_id(config), **asdict(config)}, indent=2) if args.json else describe(config))
        return None
    with process_group(args.runtime.device.replace("auto", "")) as ranks:
        callbacks: list[Callback] = []
        if ranks.is_main:
            tell(describe(config))
            device = devices.choose_device(args.runtime.device, ranks.local_rank)
            callbacks.append(Console(tell, config, args.runtime, ranks.world_size, devices.peak_flops(device)))
        if args.resume_from_step >= 0:
            rewind(run_dir, args.resume_from_step)
        record = pretrain(
            config,
            args.runtime,
            run_dir=run_dir,
            callbacks=callbacks,
            resume=args.resume,
            name=args.name,
            horizon_change=args.horizon_change,
            start_from=start_from,
        )
        if ranks.is_main:
            tell(f"{record.status}: {record.error or f'{record.val_bpb:.6f} bits per byte'}; record in {run_dir}")
            if args.json:
                print(jsonlib.dumps(summary(record, run_dir), indent=2))
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: exit status 0, 1 for a failed run, 2 for input to be mended."""
    try:
        args = tyro.cli(
            Arguments,
            args=argv,
            description=f"{__doc__}\n{EXAMPLES}",
            prog="python -m nanochat_model.train",
            config=(tyro.conf.OmitArgPrefixes,),
        )
        record = run(args)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(130)
    sys.exit(1 if record is not None and record.status == "failed" else 0)


if __name__ == "__main__":
    main()
