"""Every cell's own optimum: runs grouped by (N, D), quadratics near the best, edges told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.noise import SeedNoise, pool_variance
from analysis.power_law import Points
from analysis.purposes import cell_numbers
from analysis.valley import Optimum, Valley, fit_valley, locate

OWN_DF = (
    3  # a cell with this many spare points is judged by its own residuals (misfit differs between cells), others by pooled ones
)
ENOUGH_DF = 10  # pooled spare points beyond which the seed noise is no longer needed beside them
LABELS = ("N", "D", "width", "B", "lr", "weight_decay")


@dataclass(frozen=True, kw_only=True)
class CellOptimum:
    """One cell: what is held (geometric means), the optimum along one knob, and the runs behind it."""

    held: dict[str, float]
    optimum: Optimum
    run_ids: tuple[str, ...]
    how: str

    def as_dict(self, level: float = 0.9) -> dict[str, Any]:
        return {**self.held, **self.optimum.as_dict(level), "run_ids": list(self.run_ids), "how": self.how}


@dataclass(frozen=True, kw_only=True)
class _Group:
    frame: pd.DataFrame
    axes: tuple[str, ...]
    valley: Valley
    how: str


def find_optima(
    frame: pd.DataFrame, axis: str, *, other: str | None = None, hold: Sequence[str] = (), noise: SeedNoise | None = None
) -> list[CellOptimum]:
    """Optimum along `axis` (B, lr or weight_decay) in every (N, D) cell with at least three of its values.

    `other`: a second knob; where both vary freely the quadratic is two-dimensional. `hold`: knobs that must be equal inside a
    cell. Standard errors come from the cell's own residuals (3 spare points or more), else from all cells' pooled residuals
    and the seed noise.
    """
    usable = frame[(frame[axis] > 0) & np.isfinite(frame[axis])].reset_index(drop=True)
    numbers = cell_numbers(usable, *hold)
    large = np.bincount(numbers)[numbers] >= 3 if len(numbers) else np.zeros(0, dtype=bool)
    usable, numbers = usable[large], numbers[large]
    groups = []
    for _, cell in usable.groupby(numbers, sort=True):
        if cell[axis].nunique() >= 3:
            groups.append(_fit_group(cell.reset_index(drop=True), axis, other))
    pooled = _pooled([g.valley for g in groups], noise)
    out = []
    for group in groups:
        valley = group.valley
        own = (valley.rss / valley.df, float(valley.df)) if valley.df >= OWN_DF else pooled
        optimum = locate(valley, axis, *own)
        held = {c: _middle(group.frame[c]) for c in LABELS if c != axis and group.frame[c].notna().any()}
        if other is not None and len(group.axes) == 2:
            held.pop(other, None)
        ids = tuple(r for r in group.frame["run_id"] if r)
        out.append(CellOptimum(held=held, optimum=optimum, run_ids=ids, how=group.how))
    return out


def as_points(cells: Sequence[CellOptimum], symbols: Sequence[str]) -> Points:
    """Logarithms for the power-law fit; a symbol that a cell does not know is NaN."""
    optima = [c.optimum for c in cells]
    return Points(
        symbols={s: np.log([c.held.get(s, np.nan) for c in cells]) for s in symbols},
        value=np.array([o.log_value for o in optima], dtype=float),
        se=np.array([o.log_se for o in optima], dtype=float),
        low=np.array([o.bounds[0] for o in optima], dtype=float),
        high=np.array([o.bounds[1] for o in optima], dtype=float),
        interior=np.array([o.edge == "interior" for o in optima], dtype=bool),
        df_se=max((o.df for o in optima), default=0.0),
    )


def _middle(values: pd.Series) -> float:
    known = values[values > 0]
    return float(np.exp(np.log(known).mean())) if len(known) else float("nan")


def _fit_group(cell: pd.DataFrame, axis: str, other: str | None) -> _Group:
    cell = _one_decay(cell, axis)
    if other is not None and _free(cell, axis, other):
        axes = (axis, other)
        valley = fit_valley(axes, cell[list(axes)].to_numpy(), cell["L"].to_numpy())
        if np.isfinite(valley.vertex).all():
            return _Group(frame=cell, axes=axes, valley=valley, how=f"quadratic in log {other} and log {axis}")
        best = cell.loc[cell.groupby(axis)["L"].idxmin()].reset_index(drop=True)
        valley = fit_valley((axis,), best[[axis]].to_numpy(), best["L"].to_numpy())
        return _Group(frame=cell, axes=(axis,), valley=valley, how=f"quadratic in log {axis} through the best of each")
    valley = fit_valley((axis,), cell[[axis]].to_numpy(), cell["L"].to_numpy())
    tied = other is not None and cell[other].nunique() > 1
    return _Group(
        frame=cell, axes=(axis,), valley=valley, how=f"quadratic in log {axis}" + (f", {other} tied to it" if tied else "")
    )


def _free(cell: pd.DataFrame, axis: str, other: str) -> bool:
    """Whether the two knobs vary beside each other: neither is constant nor a function of the other."""
    if cell[other].isna().any() or cell[other].nunique() < 2:
        return False
    return any(bool((cell.groupby(x)[y].nunique() > 1).any()) for x, y in ((axis, other), (other, axis)))


def _one_decay(cell: pd.DataFrame, axis: str) -> pd.DataFrame:
    """Where weight decay varies besides, at equal (B, lr), keep the decay with the most runs: one slice of the sweep."""
    if axis == "weight_decay" or cell["weight_decay"].isna().any():
        return cell
    if not (cell.groupby(["B", "lr"], dropna=False)["weight_decay"].nunique() > 1).any():
        return cell
    return cell[cell["weight_decay"] == cell["weight_decay"].mode().iloc[0]].reset_index(drop=True)


def _pooled(valleys: Sequence[Valley], noise: SeedNoise | None) -> tuple[float, float]:
    """Variance of log loss about the quadratics, over all cells; seed noise joins in while spare points are few."""
    df = sum(v.df for v in valleys)
    own = (sum(v.rss for v in valleys) / df, float(df)) if df > 0 else (float("nan"), 0.0)
    if df >= ENOUGH_DF or noise is None:
        return own
    return pool_variance(own, (noise.sd**2, float(noise.df)))
