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
    from nanoladder.space import Choice, Grid, LogUniform, Uniform
    from nanoladder.sweep import Cell, Sweep
    from nanoladder.sweep_command import run_sweep
    from nanoladder.workspace import Workspace

_HOME = {
    "GPTConfig": "nanochat_model.config",
    "Horizon": "nanochat_model.horizon",
    "PowerRule": "nanochat_model.recipe",
    "Recipe": "nanochat_model.recipe",
    "Ladder": "nanoladder.ladder",
    "Stage": "nanoladder.ladder",
    "Choice": "nanoladder.space",
    "Grid": "nanoladder.space",
    "LogUniform": "nanoladder.space",
    "Cell": "nanoladder.sweep",
    "Sweep": "nanoladder.sweep",
    "Uniform": "nanoladder.space",
    "run_sweep": "nanoladder.sweep_command",
    "Workspace": "nanoladder.workspace",
}

__all__ = [
    "Cell", "Choice", "GPTConfig", "Grid", "Horizon", "Ladder", "LogUniform", "PowerRule", "Recipe", "Stage", "Sweep",
    "Uniform", "Workspace", "run_sweep",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'nanoladder' has no attribute {name!r}")
