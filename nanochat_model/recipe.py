"""How a depth and a horizon become a TrainConfig: reference values and transfer rules, each with its source and its doubt.

Batch, learning rates and weight decay are resolved from the run's own D and B, in every cell of a sweep. (nanochat's
isoFLOP sweep resolves them from N when the ratio is switched off; that defect is not repeated here.)
A fitted law replaces a rule: `replace(recipe, batch_size=PowerRule(...))`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from nanochat_model.config import DataConfig, EvalConfig, GPTConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from nanochat_model.counts import count_params
from nanochat_model.errors import ConfigError
from nanochat_model.horizon import Horizon
from nanochat_model.overrides import apply_overrides, take

D12_SCALING_PARAMS = 110_100_912  # transformer_matrices + lm_head at d12, V = 32768; checked in tests
MAX_SHRINK = 0.05  # of the weights, by decay alone, in one step at the peak rate: 20 steps then forget everything; d12 has 0.006
RESOLVE_KEYS = {"batch_tokens": 0, "lr_multiplier": 1.0, "weight_decay_multiplier": 1.0}


@dataclass(frozen=True, kw_only=True)
class PowerRule:
    """value = coefficient · Π (x / reference_x)^exponent over the symbols N (scaling parameters), D (tokens),
    B (batch in tokens), width (model_dim), lr (matrix learning rate)."""

    coefficient: float
    exponents: Mapping[str, float] = field(default_factory=dict)
    references: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    status: Literal["measured", "assumed", "fitted"] = "assumed"

    def __post_init__(self) -> None:
        unknown = set(self.exponents) - {"N", "D", "B", "width", "lr"}
        if unknown:
            raise ConfigError(f"rule uses unknown symbol {sorted(unknown)}; known: N, D, B, width, lr")
        if not self.coefficient >= 0:
            raise ConfigError(f"rule coefficient {self.coefficient} must be 0 or more")

    def __call__(self, **values: float) -> float:
        if self.coefficient == 0:
            return 0.0
        log_value = math.log(self.coefficient)
        for symbol, exponent in self.exponents.items():
            log_value += exponent * math.log(values[symbol] / self.references.get(symbol, 1.0))
        return math.exp(log_value)


NANOCHAT_D_REF = 12.0 * D12_SCALING_PARAMS
NANOCHAT_BATCH = PowerRule(
    coefficient=2.0**19,
    exponents={"D": 0.383},
    references={"D": NANOCHAT_D_REF},
    source="B_ref measured at d12 by nanochat; exponent of arXiv 2505.13738",
    status="assumed",
)
NANOCHAT_LR = PowerRule(
    coefficient=1.0,
    exponents={"B": 0.5},
    references={"B": 2.0**19},
    source="multiplier of all learning rates: square root of the batch, AdamW's rule; assumed for Muon (nanochat base_train)",
    status="assumed",
)
NANOCHAT_WEIGHT_DECAY = PowerRule(
    coefficient=0.28,
    exponents={"B": 0.5, "D": -1.0},
    references={"B": 2.0**19, "D": NANOCHAT_D_REF},
    source="constant AdamW timescale, arXiv 2405.13698; assumed for Muon (nanochat base_train)",
    status="assumed",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Reference values and transfer rules. The defaults are nanochat's (commit 92d63d4)."""

    name: str = "nanochat"
    tokens_per_param: float = 12.0  # fitted by nanochat in 2026; 10.5 on an earlier architecture
    batch_size: PowerRule = NANOCHAT_BATCH
    lr_multiplier: PowerRule = NANOCHAT_LR
    weight_decay: PowerRule = NANOCHAT_WEIGHT_DECAY
    batch_rounding: Literal["power_of_two", "row"] = "power_of_two"
    min_batch_tokens: int = 0  # floor for tiny horizons; 0: one row
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    compute_dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"

    def resolve(
        self,
        model: GPTConfig,
        horizon: Horizon | None = None,
        *,
        data: DataConfig | None = None,
        seed: int = 0,
        overrides: Mapping[str, Any] | None = None,
    ) -> TrainConfig:
        """The TrainConfig of `model` at `horizon` (default: `tokens_per_param` of this recipe).

        `overrides` are dotted keys. Three act before the rules: `batch_tokens` (learning rates and decay follow it by their
        rules), `lr_multiplier` and `weight_decay_multiplier` (on top of the rules). All others replace a field of the result,
        for example `optimizer.weight_decay`. Raises ConfigError on an unknown key (naming the nearest), on a batch that does
        not divide, and on a horizon shorter than one step.
        """
        overrides = dict(overrides or {})
        early = take(overrides, RESOLVE_KEYS)
        horizon = horizon or Horizon(tokens_per_param=self.tokens_per_param)
        scaling = float(count_params(model).scaling)
        batch = early.get("batch_tokens", 0)
        if not batch:
            if horizon.num_steps is not None:
                batch = self._batch_for_steps(model, scaling, horizon.num_steps)
            else:
                batch = self._round_batch(self.batch_size(N=scaling, D=horizon.tokens(model), width=model.model_dim), model)
        tokens = horizon.tokens(model, batch)
        steps = horizon.num_steps or max(1, _whole_steps(horizon, tokens / batch))
        symbols = {"N": scaling, "D": tokens, "B": float(batch), "width": float(model.model_dim)}
        scale = self.lr_multiplier(**symbols) * early.get("lr_multiplier", 1.0)
        decay = self.weight_decay(**symbols, lr=self.optimizer.matrix_lr * scale)
        optimizer = replace(
            self.optimizer,
            matrix_lr=self.optimizer.matrix_lr * scale,
            embedding_lr=self.optimizer.embedding_lr * scale,
            unembedding_lr=self.optimizer.unembedding_lr * scale,
            scalar_lr=self.optimizer.scalar_lr * scale,
            weight_decay=decay * early.get("weight_decay_multiplier", 1.0),
        )
        config = TrainConfig(
            model=model,
            optimizer=optimizer,
            schedule=self.schedule,
            data=data or DataConfig(),
            eval=self.eval,
            batch_tokens=batch,
            num_steps=steps,
            seed=seed,
            compute_dtype=self.compute_dtype,
        )
        return apply_overrides(config, overrides)

    def _round_batch(self, batch: float, model: GPTConfig) -> int:
        row = model.sequence_len
        floor = max(row, self.min_batch_tokens)
        if self.batch_rounding == "power_of_two":
            rounded = 2 ** round(math.log2(max(batch, 1.0)))
            return max(floor, rounded if rounded % row == 0 else round(rounded / row) * row)
        return max(floor, round(batch / row) * row)

    def _batch_for_steps(self, model: GPTConfig, scaling: float, steps: int) -> int:
        """Batch of a horizon in steps: D = steps · B and B = rule(D) solved by iteration (a contraction: exponent < 1)."""
        batch = float(model.sequence_len)
        for _ in range(100):
            batch = self.batch_size(N=scaling, D=steps * batch, width=model.model_dim)
        return self._round_batch(batch, model)


def erasing_decay(config: TrainConfig) -> str:
    """What to say where learning rate × weight decay would leave nothing of the weights; "" where it would not. The product is
    some 14 divided by the number of steps by nanochat's rules, at any size: runs of under 280 steps have it."""
    shrink = config.optimizer.matrix_lr * config.optimizer.weight_decay
    if shrink <= MAX_SHRINK:
        return ""
    return (
        f"learning rate × weight decay is {shrink:.2g} a step, the weights would be gone in a few: {config.num_steps:,} steps on "
        f"{config.num_tokens:.3g} tokens are far from where this rule holds; set optimizer.weight_decay, or start from a recipe or "
        "run of this scale"
    )


def _whole_steps(horizon: Horizon, steps: float) -> int:
    """nanochat floors a horizon given by ratio and rounds one given in FLOPs."""
    return int(steps) if horizon.tokens_per_param is not None else round(steps)


NANOCHAT = Recipe()
