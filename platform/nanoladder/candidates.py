"""The candidates of a cell that are known beforehand, and when one that is suggested may be asked for. Without Optuna."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import qmc

from nanochat_model.identity import content_hash
from nanoladder.cells import candidate_values
from nanoladder.space import Choice, Dimension, Grid, LogUniform, Space, Uniform, Value, is_active, plain
from nanoladder.sweep import ADAPTIVE, Cell, Sweep


def num_awaited(sampler: str, number: int, parallel_trials: int) -> int:
    """How many of the first candidates must be done before candidate `number` may be suggested: for samplers that learn all but
    the latest `parallel_trials` − 1 before it, so that suggestions do not depend on who finishes first; none for the others."""
    return max(0, number - parallel_trials + 1) if sampler in ADAPTIVE else 0


def fixed_candidates(sweep: Sweep, cell: Cell, space: Space, sampler: str, study: str) -> list[dict[str, Value]] | None:
    """The candidates that are known beforehand: grids, and the points of qmc and random (a longer list begins with the
    shorter one). None for samplers that learn."""
    if sampler in ADAPTIVE:
        return None
    if sampler == "grid":
        candidates = candidate_values(sweep, cell)
        return candidates[: sweep.num_trials] if sweep.num_trials else candidates
    seed = int(content_hash(study)[:8], 16)
    if sampler == "qmc":  # scrambled Sobol points, drawn to the next power of two, where they are balanced
        engine = qmc.Sobol(d=len(space), scramble=True, rng=np.random.default_rng(seed))
        unit = engine.random_base2(max(1, math.ceil(math.log2(sweep.num_trials))))[: sweep.num_trials]
    else:
        unit = np.random.default_rng(seed).random((sweep.num_trials, len(space)))
    return [_point(space, row) for row in unit]


def _point(space: Space, row: Sequence[float]) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for (key, dimension), u in zip(space.items(), row, strict=True):
        if is_active(dimension, values):
            values[key] = _from_unit(plain(dimension), float(u))
    return values


def _from_unit(dimension: Dimension, u: float) -> Value:
    """The value at quantile `u` (0..1) of a dimension."""
    if isinstance(dimension, Grid):
        return dimension.values[min(int(u * len(dimension.values)), len(dimension.values) - 1)]
    if isinstance(dimension, Choice):
        return dimension.options[min(int(u * len(dimension.options)), len(dimension.options) - 1)]
    if isinstance(dimension, LogUniform):
        return math.exp(math.log(dimension.low) + u * (math.log(dimension.high) - math.log(dimension.low)))
    assert isinstance(dimension, Uniform), dimension  # a When is resolved to its dimension before
    return dimension.low + u * (dimension.high - dimension.low)
