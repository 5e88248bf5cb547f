"""The model and everything one process needs to train, evaluate and talk to it.

Never imports Ray, Optuna, MLflow or `analysis`. Modules that describe or count (`config`, `counts`, `recipe`,
`record`, `identity`) need no torch either; torch enters with the first module that computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanochat_model.config import DataConfig, EvalConfig, GPTConfig, OptimizerConfig, RuntimeConfig, ScheduleConfig, TrainConfig
from nanochat_model.counts import ParamCounts, count_params, flops_per_token
from nanochat_model.errors import ConfigError
from nanochat_model.horizon import Horizon
from nanochat_model.recipe import PowerRule, Recipe
from nanochat_model.record import RunRecord

if TYPE_CHECKING:
    from nanochat_model.gpt import GPT

__all__ = [
    "ConfigError", "DataConfig", "EvalConfig", "GPTConfig", "Horizon", "OptimizerConfig", "ParamCounts", "PowerRule",
    "Recipe", "RunRecord", "RuntimeConfig", "ScheduleConfig", "TrainConfig", "count_params", "flops_per_token", "load",
]  # fmt: skip


def load(path: str, device: str = "cpu", dtype: Any = None) -> GPT:
    """Load a trained model from a checkpoint folder (ours or an imported one).

    Returns the model; called on token ids of shape (B, T) it returns float32 logits of shape (B, T, V).
    `dtype` is the compute dtype (default float32). Raises ConfigError on a missing or corrupt checkpoint.
    """
    from nanochat_model.checkpoint import load_model  # torch is heavy: only callers of load() pay for it

    return load_model(path, device=device, dtype=dtype)
