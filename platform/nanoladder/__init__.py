"""Sweeps, ladders, laws and launches on Ray.

The names a sweep file needs are here; each is imported when first used, so that `import nanoladder` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanochat_model.config import GPTConfig
    from nanochat_model.horizon import Horizon
    from nanochat_model.recipe import PowerRule, Recipe
    from nanoladder.ladder import Ladder, Stage
    from nanoladder.sft_sweep import SFTSweep
    from nanoladder.space import Choice, Grid, LogUniform, Times, Uniform, When
    from nanoladder.sweep import Adaptive, Cell, Sweep
    from nanoladder.sweep_command import run_sweep
    from nanoladder.workspace import Workspace

_HOME = {
    "GPTConfig": "nanochat_model.config",
    "Horizon": "nanochat_model.horizon",
    "PowerRule": "nanochat_model.recipe",
    "Recipe": "nanochat_model.recipe",
    "Ladder": "nanoladder.ladder",
    "Stage": "nanoladder.ladder",
    "SFTSweep": "nanoladder.sft_sweep",
    "Adaptive": "nanoladder.sweep",
    "Choice": "nanoladder.space",
    "Grid": "nanoladder.space",
    "LogUniform": "nanoladder.space",
    "Cell": "nanoladder.sweep",
    "Sweep": "nanoladder.sweep",
    "Times": "nanoladder.space",
    "Uniform": "nanoladder.space",
    "When": "nanoladder.space",
    "run_sweep": "nanoladder.sweep_command",
    "Workspace": "nanoladder.workspace",
}

__all__ = [
    "Adaptive", "Cell", "Choice", "GPTConfig", "Grid", "Horizon", "Ladder", "LogUniform", "PowerRule", "Recipe", "SFTSweep",
    "Stage", "Sweep", "Times", "Uniform", "When", "Workspace", "run_sweep",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'nanoladder' has no attribute {name!r}")
