"""What a run is, as frozen dataclasses. Needs no torch.

Shape letters used across the package: B rows, T positions, C model_dim, H heads, K kv heads, D head_dim, V vocabulary, L layers.
`TrainConfig` holds all that determines a run's result and is what `run_id` hashes; `RuntimeConfig` holds what must not
change the result (device, micro-batch, threads, how often to save).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nanochat_model.errors import ConfigError

SMEAR_CHANNELS = 24  # first channels that drive the smear gate (nanochat gpt.py)
VE_GATE_CHANNELS = 12  # first channels that drive the value-embedding gate (nanochat gpt.py)
VOCAB_MULTIPLE = 64  # embedding tables are padded to this, logits are cut back (nanochat gpt.py)
WINDOW_TILE = 128  # short windows are rounded up to a FlashAttention-3 tile (nanochat gpt.py)

ComputeDtype = Literal["bfloat16", "float32", "float16"]
Packing = Literal["best_fit", "keep_remainder"]
ScheduleKind = Literal["nanochat", "constant_then_decay"]


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Architecture of one model. `from_depth` is nanochat's size dial; small models give depth and width directly."""

    depth: int = 12
    model_dim: int = 768
    num_heads: int = 6
    num_kv_heads: int = 6
    sequence_len: int = 2048
    vocab_size: int = 32768
    window_pattern: str = "SSSL"

    def __post_init__(self) -> None:
        for name in ("depth", "model_dim", "num_heads", "num_kv_heads", "sequence_len", "vocab_size"):
            value = getattr(self, name)
            _require(value >= 1, f"model.{name} {value} must be at least 1")
        _require(
            self.model_dim % self.num_heads == 0,
            f"model.model_dim {self.model_dim} is not a multiple of num_heads {self.num_heads}; nearest: "
            f"{round_up(self.model_dim, self.num_heads)}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} (model_dim / num_heads) must be even for rotary embeddings")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}",
        )
        _require(
            self.model_dim >= SMEAR_CHANNELS,
            f"model.model_dim {self.model_dim} is under {SMEAR_CHANNELS}, the channels that the smear gate reads",
        )
        _require(
            bool(self.window_pattern) and set(self.window_pattern) <= {"S", "L"},
            f"model.window_pattern {self.window_pattern!r} may hold only S (short) and L (long), for example SSSL",
        )

    @classmethod
    def from_depth(
        cls,
        depth: int,
        *,
        aspect_ratio: int = 64,
        head_dim: int = 128,
        num_kv_heads: int | None = None,
        sequence_len: int = 2048,
        vocab_size: int = 32768,
        window_pattern: str = "SSSL",
    ) -> GPTConfig:
        """nanochat's dial: width = depth × aspect_ratio rounded up to a multiple of head_dim."""
        _require(depth >= 1, f"depth {depth} must be at least 1")
        model_dim = round_up(depth * aspect_ratio, head_dim)
        heads = model_dim // head_dim
        return cls(
            depth=depth,
            model_dim=model_dim,
            num_heads=heads,
            num_kv_heads=num_kv_heads or heads,
            sequence_len=sequence_len,
            vocab_size=vocab_size,
            window_pattern=window_pattern,
        )

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, VOCAB_MULTIPLE)

    @property
    def value_embed_layers(self) -> tuple[int, ...]:
        """Layers with a value embedding: alternating, the last always included."""
        return tuple(i for i in range(self.depth) if i % 2 == (self.depth - 1) % 2)

    @property
    def windows(self) -> tuple[int, ...]:
        """Left window of each layer in tokens: a position sees itself and `window` positions to its left."""
        short = round_up(-(-self.sequence_len // 4), WINDOW_TILE)
        sizes = [
            self.sequence_len if self.window_pattern[i % len(self.window_pattern)] == "L" else short for i in range(self.depth)
        ]
        sizes[-1] = self.sequence_len
        return tuple(sizes)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Learning rates and decay as used by this run (already scaled for its batch and horizon, before the
    1/√(model_dim/768) factor that the AdamW tables get inside the optimizer). Values: nanochat base_train and gpt.py."""

    matrix_lr: float = 0.02
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    scalar_lr: float = 0.5
    smear_lr: float = 0.2  # smear and backout; not scaled with the batch
    weight_decay: float = 0.28  # Muon matrices
    value_embedding_lr_ratio: float = 0.5  # of embedding_lr
    resid_lr_ratio: float = 0.01  # of scalar_lr
    unembedding_betas: tuple[float, float] = (0.8, 0.96)
    embedding_betas: tuple[float, float] = (0.8, 0.995)
    resid_betas: tuple[float, float] = (0.8, 0.95)
    x0_betas: tuple[float, float] = (0.96, 0.95)
    smear_betas: tuple[float, float] = (0.8, 0.95)
    unembedding_weight_decay: float = 0.01
    embedding_weight_decay: float = 0.001
    value_embedding_weight_decay: float = 0.01
    resid_weight_decay: float = 0.05
    adam_eps: float = 1e-10
    muon_beta2: float = 0.9
    polar_steps: int = 5

    def __post_init__(self) -> None:
        for name in ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "smear_lr"):
            value = getattr(self, name)
            _require(0 < value < float("inf"), f"optimizer.{name} {value} must be positive and finite")
        _require(0 <= self.weight_decay < float("inf"), f"optimizer.weight_decay {self.weight_decay} must be 0 or more")
        _require(1 <= self.polar_steps <= 5, f"optimizer.polar_steps {self.polar_steps} must lie in 1..5")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Multipliers over steps. nanochat: warm-up, constant, linear warm-down over the last `warmdown_fraction`.
    constant_then_decay: the same with a short decay, so that one trunk serves several horizons."""

    kind: ScheduleKind = "nanochat"
    warmup_steps: int = 40
    warmdown_fraction: float = 0.65
    final_lr_fraction: float = 0.05
    momentum_start: float = 0.85
    momentum_peak: float = 0.97
    momentum_end: float = 0.90
    momentum_warmup_steps: int = 400

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 0, f"schedule.warmup_steps {self.warmup_steps} must be 0 or more")
        _require(0 <= self.warmdown_fraction <= 1, f"schedule.warmdown_fraction {self.warmdown_fraction} must lie in 0..1")
        _require(0 <= self.final_lr_fraction <= 1, f"schedule.final_lr_fraction {self.final_lr_fraction} must lie in 0..1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens in which order. `path` says where the shards lie and is not part of a run's identity; the hashes are."""

    path: str = ""
    manifest_hash: str = ""
    tokenizer_hash: str = ""
    packing: Packing = "best_fit"


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation bpb: over the first `num_tokens` validation tokens, every `every_steps` steps (0: only at the end)."""

    num_tokens: int = 80 * 524288
    every_steps: int = 250


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that determines the result of one run. Hashing it (without data.path) gives `run_id`."""

    model: GPTConfig = field(default_factory=GPTConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    batch_tokens: int = 524288
    num_steps: int = 1000
    seed: int = 0
    compute_dtype: ComputeDtype = "bfloat16"
    fp8: Literal["off", "tensorwise", "rowwise"] = "off"
    trunk: str = ""  # "run_id@step" when this run decays from a stored trunk checkpoint

    def __post_init__(self) -> None:
        rows = self.batch_tokens / self.model.sequence_len
        _require(
            self.batch_tokens > 0 and rows == int(rows),
            f"batch_tokens {self.batch_tokens} is not a multiple of sequence_len {self.model.sequence_len}; nearest: "
            f"{max(1, round(rows)) * self.model.sequence_len}",
        )
        _require(self.num_steps >= 1, f"num_steps {self.num_steps} must be at least 1; lengthen the horizon or shrink the batch")

    @property
    def num_tokens(self) -> int:
        return self.batch_tokens * self.num_steps

    @property
    def rows_per_batch(self) -> int:
        return self.batch_tokens // self.model.sequence_len


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How this process runs a TrainConfig. Nothing here may change the result beyond rounding."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1
    micro_batch_rows: int = 0  # rows a forward pass on one rank; 0: chosen by the device
    memory_share: float = 1.0  # of the accelerator's memory that this process may take; the rest is other trials'
    compile: Literal["auto", "on", "off"] = "auto"
    attention: str = "auto"  # a backend's name, or auto
    num_threads: int = 0  # CPU threads; 0: as torch finds it
    checkpoint_every_steps: int = 0  # 0: only at the end
    checkpoint_every_seconds: float = 0.0  # 0: off
    keep_last: int = 2  # newest checkpoints that stay; 0: none is written at all
    keep_steps: tuple[int, ...] = ()  # steps whose checkpoint is written and never removed (a trunk's branching points)
    log_every_steps: int = 10
    core_every_steps: int = 0
    core_bundle: str = ""  # folder, zip or URL of the CORE tasks, or "download"
    core_max_per_task: int = 500  # examples a task during training; 0: all
    sample_every_steps: int = 0
    diagnostics_every_steps: int = 0
    usual_mfu: float = 0.0  # of recorded runs on this device: far below it, the likely cause is told; 0: none known
    price_per_device_hour: float = 0.0  # dollars, for the live line
