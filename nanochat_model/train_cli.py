"""Pretrain from a folder of token shards, without Ray: `python -m nanochat_model.train SHARDS --depth 12`.

Model, horizon, batch and learning rates are resolved by the recipe (nanochat's unless changed here); `--set key=value` replaces
any field of the resolved config afterwards.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from nanochat_model.callbacks import Callback, StepInfo
from nanochat_model.config import ComputeDtype, DataConfig, GPTConfig, Packing, RuntimeConfig, ScheduleKind, TrainConfig
from nanochat_model.counts import count_params, flops_per_token
from nanochat_model.errors import ConfigError
from nanochat_model.horizon import Horizon
from nanochat_model.identity import run_id
from nanochat_model.recipe import NANOCHAT, Recipe
from nanochat_model.record import CurvePoint, RunRecord
from nanochat_model.step_shares import describe_startup, describe_times

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
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Replace any field of the resolved config, e.g. --set optimizer.polar_steps=4; repeatable."""
    dry_run: bool = False
    """Print what would be trained and stop."""

    def train_config(self, data: DataConfig, vocab_size: int) -> TrainConfig:
        """The resolved config. Raises ConfigError on values that do not fit."""
        overrides = self.recipe.overrides() | parse_assignments(self.set)
        return self.recipe.recipe().resolve(
            self.model.config(vocab_size), self.horizon.horizon(), data=data, seed=self.seed, overrides=overrides
        )


def parse_assignments(texts: Sequence[str]) -> dict[str, str]:
    """`key=value` texts as a dict. Raises ConfigError on a text without "="."""
    pairs: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {text!r} is not of the form key=value")
        pairs[key] = value
    return pairs


class Console(Callback):
    """One line a report on standard output."""

    def __init__(self, config: TrainConfig, runtime: RuntimeConfig, num_devices: int, peak_flops: float | None) -> None:
        self._runtime = runtime
        self._num_devices = num_devices
        self._peak = "peak unknown" if peak_flops is None else f"{peak_flops / 1e12:.0f} TFLOP/s peak"
        self._batch_tokens = config.batch_tokens
        self._startup: dict[str, float] = {}
        self._times: dict[str, float] = {}

    def on_step(self, info: StepInfo) -> None:
        if info.startup_seconds != self._startup:
            self._startup = info.startup_seconds
            print(describe_startup(info.startup_seconds), flush=True)
        left = (info.num_steps - info.step) * self._batch_tokens / max(info.tokens_per_second, 1e-9)
        parts = [
            f"step {info.step}/{info.num_steps} ({100 * info.step / info.num_steps:.1f}%)",
            f"loss {info.smooth_train_loss:.4f}",
            f"lr ×{info.lr_multiplier:.3f}",
            f"{info.tokens_per_second:,.0f} tok/s",
            "mfu unknown" if info.mfu is None else f"mfu {info.mfu:.1%} of {self._peak}",
            f"{info.seconds / 60:.1f} min, {left / 60:.1f} left",
        ]
        if self._runtime.price_per_device_hour:
            parts.append(f"${info.seconds / 3600 * self._runtime.price_per_device_hour * self._num_devices:.2f}")
        if info.skipped_steps:
            parts.append(f"{info.skipped_steps} steps skipped")
        print(" | ".join(parts), flush=True)
        if _moved(self._times, info.step_seconds):
            self._times = info.step_seconds
            print(f"  a step: {describe_times(info.step_seconds, info.rank_compute_seconds)}", flush=True)
        if info.diagnostics:
            print_diagnostics(info.diagnostics)

    def on_eval(self, point: CurvePoint) -> None:
        print(f"step {point.step}: validation {point.val_bpb:.6f} bits per byte", flush=True)

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        print(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()), flush=True)

    def on_sample(self, step: int, texts: Sequence[str]) -> None:
        for text in texts:
            print(f"step {step} sample: {text!r}", flush=True)

    def on_checkpoint(self, path: Path, step: int) -> None:
        print(f"step {step}: saved {path}", flush=True)


def _moved(told: Mapping[str, float], seconds: Mapping[str, float]) -> bool:
    """Whether any part's share of a step is over 5 points from what was told."""
    before, now = sum(told.values()), sum(seconds.values())
    return now > 0 and (not before or any(abs(told[part] / before - s / now) > 0.05 for part, s in seconds.items()))


def print_diagnostics(metrics: Mapping[str, float]) -> None:
    """The range of each kind of diagnostic over layers, a line each."""
    kinds: dict[str, list[tuple[float, str]]] = {}
    for key, value in metrics.items():
        kind, _, where = key.partition("/")
        if math.isfinite(value):
            kinds.setdefault(kind, []).append((value, where))
    for kind, values in kinds.items():
        (low, at_low), (high, at_high) = min(values), max(values)
        print(f"  {kind}: {low:.3g} {at_low} … {high:.3g} {at_high}" if len(values) > 1 else f"  {kind}: {low:.3g}")


def describe(config: TrainConfig) -> str:
    """What a config means, in a few lines."""
    counts, per_token = count_params(config.model), flops_per_token(config.model)
    return "\n".join(
        [
            f"run {run_id(config)}: depth {config.model.depth}, width {config.model.model_dim}, {counts.total:,} parameters, "
            f"{counts.scaling:,} of them scaling parameters",
            f"{config.num_tokens:,} tokens in {config.num_steps:,} steps of {config.batch_tokens:,} "
            f"({config.num_tokens / counts.scaling:.1f} a scaling parameter), {config.num_tokens * per_token:.3g} FLOPs",
            f"matrix_lr {config.optimizer.matrix_lr:.4g}, weight_decay {config.optimizer.weight_decay:.4g}, {config.compute_dtype}",
        ]
    )


def run(args: Arguments) -> RunRecord | None:
    """Resolve, train and return the record (None for a dry run)."""
    from nanochat_model import device as devices
    from nanochat_model.distributed import process_group
    from nanochat_model.shard_set import ShardSet
    from nanochat_model.train import pretrain, rewind

    devices.tune_process(args.runtime.num_threads)
    shards = ShardSet.open(args.shards)
    config = args.train_config(shards.data_config(args.packing), len(shards.token_bytes))
    run_dir = Path(args.run_dir or Path("runs") / run_id(config))
    if args.dry_run:
        print(describe(config))
        return None
    with process_group(args.runtime.device.replace("auto", "")) as ranks:
        callbacks: list[Callback] = []
        if ranks.is_main:
            print(describe(config), flush=True)
            device = devices.choose_device(args.runtime.device, ranks.local_rank)
            callbacks.append(Console(config, args.runtime, ranks.world_size, devices.peak_flops(device)))
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
        )
        if ranks.is_main:
            print(f"{record.status}: {record.error or f'{record.val_bpb:.6f} bits per byte'}; record in {run_dir}", flush=True)
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
