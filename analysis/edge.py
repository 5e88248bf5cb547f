"""Optima at the edge of a grid: told apart, extended by two geometric points at most twice, then treated as censored.

The rule: an argmin on the boundary, a vertex whose interval leaves the grid, or a curvature whose interval includes 0 is not an
optimum. What is known then is one-sided: for a loss with one valley, the optimum lies beyond the argmin's inner neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from analysis.errors import DataError
from analysis.noise import SeedNoise, pool_variance
from analysis.valley import fit_valley, locate

Side = Literal["low", "high"]
MAX_EXTENSIONS = 2
POINTS_PER_EXTENSION = 2


@dataclass(frozen=True, kw_only=True)
class Extension:
    """Grid values to run next, on which side, and why."""

    values: tuple[float, ...]
    side: Side
    reason: str


def extend_grid(values: Sequence[float], side: Side, count: int = POINTS_PER_EXTENSION) -> list[float]:
    """`count` new geometric points beyond the lowest or highest of `values`, in ascending order.

    The ratio is that of the two outermost values on that side. Zeros (a weight decay of 0) are set aside: they have no place on
    a logarithmic grid. DataError with fewer than two positive values.
    """
    grid = np.unique([v for v in values if v > 0])
    if len(grid) < 2:
        raise DataError(f"a grid of {len(grid)} positive values has no ratio to extend by; give at least two")
    if side not in ("low", "high"):
        raise DataError(f"side {side!r} must be low or high")
    ratio = float(grid[1] / grid[0] if side == "low" else grid[-1] / grid[-2])
    steps = range(count, 0, -1) if side == "low" else range(1, count + 1)
    return [float(grid[0] / ratio**k) if side == "low" else float(grid[-1] * ratio**k) for k in steps]


def next_grid(
    values: Sequence[float], losses: Sequence[float], *, extensions_done: int = 0, noise: SeedNoise | None = None
) -> Extension | None:
    """What to run next for a sweep over one knob, or None when its optimum is inside or it was extended twice already.

    `values`, `losses` (n,): the knob and the loss of every run (repeat a value for replicates), or another metric to be made
    small; where it is not positive its own value takes the place of the logarithm. `noise`: the seed noise, with which the
    vertex' and the curvature's interval count as well; without it and without spare points only the argmin does.
    """
    if extensions_done >= MAX_EXTENSIONS:
        return None
    x, y = np.asarray(values, dtype=float), np.asarray(losses, dtype=float)
    good = np.isfinite(x) & np.isfinite(y) & (x >= 0)
    x, y = x[good], y[good]
    if (y <= 0).any():
        y = np.exp(y - y.max())
    if len(np.unique(x[x > 0])) < 2:
        return None
    if (x == 0).any() and y[x == 0].mean() < min(y[x == v].mean() for v in np.unique(x[x > 0])):
        return Extension(values=tuple(extend_grid(x.tolist(), "low")), side="low", reason="the best value is 0, below the grid")
    valley = fit_valley(("knob",), x[x > 0], y[x > 0])
    known = (float("nan"), 0.0) if noise is None else (noise.sd**2, float(noise.df))
    spare = (valley.rss / valley.df, float(valley.df)) if valley.df >= 2 else (float("nan"), 0.0)
    optimum = locate(valley, "knob", *pool_variance(known, spare))
    if optimum.edge == "interior":
        return None
    side: Side = optimum.lower_side if optimum.edge == "flat" else optimum.edge
    return Extension(values=tuple(extend_grid(x.tolist(), side)), side=side, reason=optimum.reason)
