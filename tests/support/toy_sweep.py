"""A sweep of the toy training: one cell with every knob set, to be varied."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from toy_training import HORIZON, MODEL

from nanoladder.sweep import Cell, Sweep

KNOBS = {"batch_tokens": 64, "optimizer.matrix_lr": 0.02, "optimizer.weight_decay": 0.1}
CELL = Cell(model=MODEL, horizon=HORIZON, overrides=KNOBS)


def make_sweep(**fields: Any) -> Sweep:
    return replace(Sweep(name="toy", question="?", cells=(CELL,)), **fields)


def run_ids(root: Path) -> set[str]:
    """Runs with a record under a storage root."""
    return {p.parent.name for p in (root / "runs").glob("*/record.json")}
