"""From a base run's config to that of its fine-tuning: what `sft` runs, and the recipe of sweeps over fine-tunings. Needs no torch.

Values are nanochat's chat_sft: learning rates 0.8 of the base's, weight decay 0, warm-down to 0 over the last half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nanochat_model.config import DataConfig, EvalConfig, GPTConfig, TrainConfig
from nanochat_model.errors import ConfigError
from nanochat_model.horizon import Horizon
from nanochat_model.overrides import apply_overrides, take
from nanochat_model.recipe import Recipe

WITH_OPTIMIZER, WEIGHTS_ALONE = "sft:", "sft-weights:"  # how a config's trunk begins; the base checkpoint's hash follows
TRAIN_FUNCTION = "nanochat_model.sft:finetune"
_RATES = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "smear_lr")


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """What determines a fine-tuning, beside base checkpoint and conversations. Everything else is the base's."""

    num_epochs: float = 1.0  # passes over the mixture
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
    val_fraction: float = 0.1  # conversations held out, by hash, where no source is held out as a whole
    eval_every_steps: int = 0  # 0: before and after only
    eval_tokens: int = 0  # of the held-out conversations; 0: all
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
class SFTRecipe(Recipe):
    """Resolves fine-tunings of one base on one mixture; takes a Recipe's place in a sweep."""

    sft: SFTConfig = field(default_factory=SFTConfig)
    inherited: TrainConfig = field(default_factory=TrainConfig)  # of the base
    base_checkpoint: str = ""
    base_hash: str = ""
    data: DataConfig = field(default_factory=DataConfig)  # the prepared conversations
    rows_per_epoch: int = 1

    def resolve(
        self,
        model: GPTConfig,
        horizon: Horizon | None = None,
        *,
        data: DataConfig | None = None,
        seed: int = 0,
        overrides: Mapping[str, Any] | None = None,
    ) -> TrainConfig:
        """The base's model, precision and learning rates (× lr_fraction), with the fine-tuning's schedule and horizon.

        `model` must be the base's. `horizon`: steps or tokens in place of the config's. Overrides as in Recipe.resolve:
        `lr_multiplier` multiplies lr_fraction, `batch_tokens` changes the steps with it, the others replace fields. Raises
        ConfigError on other models, unknown keys and a weight_decay_multiplier (there is none to multiply).
        """
        if model != self.inherited.model:
            raise ConfigError("a fine-tuning keeps its base's model; leave model.* alone")
        overrides = dict(overrides or {})
        if "weight_decay_multiplier" in overrides:
            raise ConfigError("a fine-tuning has weight decay 0; give optimizer.weight_decay in place of weight_decay_multiplier")
        early = take(overrides, {"batch_tokens": 0, "lr_multiplier": 1.0, "num_steps": 0})
        batch = early.get("batch_tokens") or self.sft.batch_tokens or self.inherited.batch_tokens
        rates = self.sft.lr_fraction * early.get("lr_multiplier", 1.0)
        inherited, s = self.inherited, self.sft
        num_steps = early.get("num_steps") or self._num_steps(horizon, batch)
        config = replace(
            inherited,
            optimizer=replace(
                inherited.optimizer, weight_decay=0.0, **{r: getattr(inherited.optimizer, r) * rates for r in _RATES}
            ),
            schedule=replace(
                inherited.schedule,
                kind="nanochat",
                warmup_steps=round(s.warmup_fraction * num_steps),
                warmdown_fraction=s.warmdown_fraction,
                final_lr_fraction=s.final_lr_fraction,
                momentum_start=s.momentum_start,
                momentum_peak=s.momentum_end,
                momentum_end=s.momentum_end,
                momentum_warmup_steps=s.momentum_warmup_steps,
            ),
            data=self.data,
            eval=EvalConfig(num_tokens=s.eval_tokens, every_steps=s.eval_every_steps),
            batch_tokens=batch,
            num_steps=num_steps,
            seed=seed,
            trunk=(WITH_OPTIMIZER if s.warm_start else WEIGHTS_ALONE) + self.base_hash,
        )
        return apply_overrides(config, overrides)

    def _num_steps(self, horizon: Horizon | None, batch: int) -> int:
        if horizon is not None:
            return horizon.num_steps or max(1, round(horizon.tokens(self.inherited.model) / batch))
        if self.sft.num_steps:
            return self.sft.num_steps
        return max(1, round(self.sft.num_epochs * self.rows_per_epoch * self.inherited.model.sequence_len / batch))
