"""Searches whose best value lies at the end of a grid or range grow there, by the rule of `analysis.edge`.

Everything is worked out anew from the first candidates and all results, so that an interrupted sweep takes the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nanochat_model.errors import ConfigError
from nanoladder.cells import candidate_values, resolve_config
from nanoladder.pool import CellWork
from nanoladder.space import Grid, LogUniform, Uniform, Value, enumerate_space

RANGE_EDGE = 0.1  # the best value in this outer share of a range counts as at its edge
RANGE_GROWTH = 1 / 3  # of the range's width: what two points more are to a grid of seven
MAX_EXTENSIONS = 2


def extend_edges(work: CellWork) -> None:
    """Give a cell whose candidates are all done further ones where its best value lies at an edge, at most twice a side."""
    if any(isinstance(d, Grid) for d in work.study.space.values()):
        work.study.extend(_further_points(work))
    else:
        _widen(work)


# --- grids ---


def _further_points(work: CellWork) -> list[dict[str, Value]]:
    """What the grid of a finished cell still lacks; nothing once its optimum is inside or it grew twice.

    With several dimensions each is looked at along its profile, the best over all others at every value, and what is missing
    of the larger grid is run whole. A value that cannot be a config (a batch under one row) is left out.
    """
    from analysis.edge import next_grid

    losses = {tuple(c.values.items()): work.values.get(c.number) for c in work.study.candidates}
    grid: dict[str, list[Value]] = {k: [] for k in work.study.space}
    for point in candidate_values(work.sweep, work.cell):
        for key, value in point.items():
            if value not in grid[key]:
                grid[key].append(value)
    for done in range(MAX_EXTENSIONS):
        grown = {k: list(v) for k, v in grid.items()}
        for key, values in grid.items():
            seen = _profile(losses, grid, key, -1.0 if work.sweep.direction == "maximize" else 1.0)
            extension = next_grid([v for v, _ in seen], [loss for _, loss in seen], extensions_done=done)
            if extension is not None:
                whole = all(isinstance(v, int) for v in values)
                more = [round(v) if whole else v for v in extension.values]
                grown[key] += [v for v in more if v not in values and _can_run(work, key, v)]
        if grown == grid:
            return []
        missing = [p for p in enumerate_space({k: Grid(v) for k, v in grown.items()}) if tuple(p.items()) not in losses]  # type: ignore[arg-type]
        if missing:
            return missing
        grid = grown
    return []


def _profile(
    losses: Mapping[tuple[tuple[str, Value], ...], float | None], grid: Mapping[str, Sequence[Value]], key: str, sign: float
) -> list[tuple[float, float]]:
    """(value of `key`, best loss over all other keys) on a grid, losses that are missing left out."""
    best: dict[float, float] = {}
    for point, loss in losses.items():
        values = dict(point)
        if loss is not None and all(values[k] in grid[k] for k in grid):
            at = float(values[key])
            best[at] = min(best.get(at, math.inf), sign * loss)
    return sorted(best.items())


def _can_run(work: CellWork, key: str, value: Value) -> bool:
    try:
        resolve_config(work.sweep, work.cell, {key: value}, data=work.data)
    except ConfigError:
        return False
    return True


# --- ranges ---


def _widen(work: CellWork) -> None:
    """Widen the ranges on the side where the best of the candidates so far lies in the outer tenth, and search on there."""
    ranges = {k: d for k, d in work.study.space.items() if isinstance(d, Uniform | LogUniform)}
    more = max(1, round(work.sweep.num_trials * RANGE_GROWTH))
    for done in range(MAX_EXTENSIONS):
        count = work.sweep.num_trials + done * more
        best = _best_values(work, count)
        grown = {k: _grow(d, float(best[k])) for k, d in ranges.items()} if best else ranges
        if grown == ranges:
            return
        ranges = grown
        if len(work.study.candidates) <= count:
            work.study.widen(ranges, (done + 1) * more)
            return


def _best_values(work: CellWork, count: int) -> dict[str, Value] | None:
    """Values of the best of the first `count` candidates."""
    sign = -1.0 if work.sweep.direction == "maximize" else 1.0
    known = [(sign * v, c.number) for c in work.study.candidates[:count] if (v := work.values.get(c.number)) is not None]
    return work.study.candidates[min(known)[1]].values if known else None


def _grow(dimension: Uniform | LogUniform, best: float) -> Uniform | LogUniform:
    log = isinstance(dimension, LogUniform)
    low, high, at = (math.log(v) if log else v for v in (dimension.low, dimension.high, best))
    width = high - low
    if at < low + RANGE_EDGE * width:
        low -= RANGE_GROWTH * width
    elif at > high - RANGE_EDGE * width:
        high += RANGE_GROWTH * width
    else:
        return dimension
    return LogUniform(math.exp(low), math.exp(high)) if log else Uniform(low, high)
