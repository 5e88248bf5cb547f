"""A quantity against compute: log y = log k + g log C, by least squares in logs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from analysis.allocation.tools import as_columns, jsonable
from analysis.words import plural


@dataclass(frozen=True, kw_only=True)
class ComputeLaw:
    """y = coefficient * C^exponent through n points. Intervals: Student's t; none (None) with two points."""

    coefficient: float
    exponent: float
    exponent_interval: tuple[float, float] | None
    level: float
    n: int
    status: str  # converged, not_identifiable (two points: no error known), too_few
    message: str
    residual_sd: float  # of log y
    log_center: float  # mean of log C
    center_value: float  # log y at log_center
    covariance: tuple[float, float]  # variances of center_value and of the exponent (independent)

    def at(self, C: float) -> tuple[float, float | None, float | None]:
        """Value and interval of the line at C."""
        u = math.log(C) - self.log_center
        middle = self.center_value + self.exponent * u
        if self.exponent_interval is None:
            return math.exp(middle), None, None
        half = stats.t.ppf((1 + self.level) / 2, self.n - 2) * math.sqrt(self.covariance[0] + self.covariance[1] * u * u)
        return math.exp(middle), math.exp(middle - half), math.exp(middle + half)

    def as_dict(self) -> dict[str, Any]:
        keys = ("coefficient", "exponent", "exponent_interval", "level", "n", "status", "message", "residual_sd")
        return jsonable({"form": "y = k C^g", **{k: getattr(self, k) for k in keys}})


def fit_compute_law(C: Any, y: Any, *, level: float = 0.9) -> ComputeLaw:
    """Least squares of log y on log C, every point alike (Approach 2 of arXiv 2203.15556). C: FLOPs (n,), y (n,) > 0."""
    c_, y_ = as_columns(C=C, y=y)
    x, z = np.log(c_), np.log(y_)
    n, nan = x.size, math.nan
    if np.unique(np.round(x, 9)).size < 2:
        return ComputeLaw(
            coefficient=nan, exponent=nan, exponent_interval=None, level=level, n=n, status="too_few",
            message=f"{plural(n, 'budget')}: a law in compute needs two, and its error three", residual_sd=nan, log_center=nan,
            center_value=nan, covariance=(nan, nan),
        )  # fmt: skip
    u = x - x.mean()
    slope = float(u @ z / (u @ u))
    residual = z - z.mean() - slope * u
    variance = float(residual @ residual / (n - 2)) if n > 2 else nan
    spread = math.sqrt(variance / float(u @ u)) if n > 2 else nan
    half = float(stats.t.ppf((1 + level) / 2, n - 2)) * spread if n > 2 else nan
    return ComputeLaw(
        coefficient=float(np.exp(z.mean() - slope * x.mean())),
        exponent=slope,
        exponent_interval=(slope - half, slope + half) if n > 2 else None,
        level=level,
        n=n,
        status="converged" if n > 2 else "not_identifiable",
        message="" if n > 2 else "two budgets fix the line and leave nothing to judge it by",
        residual_sd=math.sqrt(variance) if n > 2 else nan,
        log_center=float(x.mean()),
        center_value=float(z.mean()),
        covariance=(variance / n, spread**2),
    )
