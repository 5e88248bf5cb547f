"""How long to train: exactly one of tokens, steps, FLOPs, or tokens per scaling parameter."""

from __future__ import annotations

from dataclasses import dataclass

from nanochat_model.config import GPTConfig
from nanochat_model.counts import count_params, flops_per_token
from nanochat_model.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """Exactly one field is set. `num_steps` needs a batch size to become tokens; the others do not."""

    num_tokens: float | None = None
    num_steps: int | None = None
    train_flops: float | None = None
    tokens_per_param: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            raise ConfigError(
                f"horizon has {len(given)} of num_tokens, num_steps, train_flops, tokens_per_param set ({given}); give exactly one"
            )
        name, value = next(iter(given.items()))
        if not 0 < value < float("inf"):
            raise ConfigError(f"horizon.{name} {value} must be positive and finite")

    def tokens(self, model: GPTConfig, batch_tokens: int | None = None) -> float:
        """Training tokens D for `model`; raises ConfigError for a horizon in steps without a batch size."""
        if self.num_tokens is not None:
            return float(self.num_tokens)
        if self.train_flops is not None:
            return self.train_flops / flops_per_token(model)
        if self.tokens_per_param is not None:
            return self.tokens_per_param * count_params(model).scaling
        if batch_tokens is None:
            raise ConfigError(f"horizon.num_steps {self.num_steps} needs a batch size to become tokens; give batch_tokens as well")
        assert self.num_steps is not None
        return float(self.num_steps * batch_tokens)
