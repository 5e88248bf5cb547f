"""Grids whose best value lies at their end grow there, by the rule of `analysis.edge`."""

from __future__ import annotations

from nanochat_model.errors import ConfigError
from nanoladder.cells import candidate_values, resolve_config
from nanoladder.pool import CellWork
from nanoladder.space import Value


def extend_edges(work: CellWork) -> list[dict[str, Value]]:
    """The candidates that the grid of a finished cell still needs; none once its optimum is inside or it grew twice.

    Worked out anew from the first grid and all results, so that an interrupted sweep takes the same decisions. A value that
    cannot be a config (a batch under one row) is left out.
    """
    from analysis.edge import MAX_EXTENSIONS, next_grid

    (key,) = work.study.space
    known = {c.values[key]: work.values.get(c.number) for c in work.study.candidates}
    grid: list[Value] = [v[key] for v in candidate_values(work.sweep, work.cell)]
    whole = all(isinstance(v, int) for v in grid)
    for done in range(MAX_EXTENSIONS):
        seen = [(float(v), loss) for v in grid if (loss := known.get(v)) is not None]
        sign = -1.0 if work.sweep.direction == "maximize" else 1.0
        extension = next_grid([v for v, _ in seen], [sign * loss for _, loss in seen], extensions_done=done)
        if extension is None:
            return []
        values = [round(v) if whole else v for v in extension.values]
        values = [v for v in values if _can_run(work, key, v)]
        missing = [v for v in values if v not in known]
        if missing:
            return [{key: v} for v in missing]
        grid += values
    return []


def _can_run(work: CellWork, key: str, value: Value) -> bool:
    try:
        resolve_config(work.sweep, work.cell, {key: value}, data=work.data)
    except ConfigError:
        return False
    return True
