"""Three ways of counting N side by side: which one keeps D/N steady over compute, so that one ratio serves every size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.allocation.bootstrap import Bootstrap, quantiles
from analysis.allocation.compute_law import ComputeLaw, fit_compute_law
from analysis.allocation.isoflop import IsoflopFit
from analysis.allocation.parametric import FlopsRule, ParametricFit
from analysis.allocation.tools import as_columns, jsonable
from analysis.words import plural

PATH_POINTS = 25
TIE = 1.05  # two spreads within 5% of each other are no difference


@dataclass(frozen=True, kw_only=True)
class Steadiness:
    """D/N at the minima over budgets. spread: largest over smallest; drift: exponent of D/N in compute, with its interval."""

    ratio: tuple[float, ...]
    spread: float
    drift: ComputeLaw

    def as_dict(self) -> dict[str, Any]:
        return jsonable(
            {
                "ratio": self.ratio,
                "spread": self.spread,
                "drift": self.drift.exponent,
                "drift_interval": self.drift.exponent_interval,
            }
        )


def ratio_steadiness(C: Any, N: Any, D: Any, *, level: float = 0.9) -> Steadiness:
    """From the optima of the budgets: C FLOPs, N*, D*, (k,) each."""
    c, n, d = as_columns(C=C, N=N, D=D)
    ratio = d / n
    spread = float(ratio.max() / ratio.min()) if ratio.size else math.nan
    return Steadiness(ratio=tuple(float(r) for r in ratio), spread=spread, drift=fit_compute_law(c, ratio, level=level))


def isoflop_steadiness(fit: IsoflopFit) -> Steadiness:
    """Steadiness over the budgets that have both minima."""
    both = [(b.C, b.in_N.vertex, b.in_D.vertex) for b in fit.budgets if b.in_N and b.in_D and b.status == "interior"]
    usable = [row for row in both if all(math.isfinite(v) and v > 0 for v in row)]
    columns = np.array(usable).reshape(-1, 3).T
    return ratio_steadiness(*columns)


def steadiest(by_name: Mapping[str, Steadiness]) -> tuple[str | None, str]:
    """Name of the convention whose D/N spreads least over budgets, and a sentence that says by how much."""
    known = sorted((s.spread, name) for name, s in by_name.items() if math.isfinite(s.spread) and len(s.ratio) >= 2)
    if not known:
        return None, "fewer than two budgets have a minimum: no convention can be called steadier"
    words = [f"{name.replace('_', ' + ', 1) if name.count('_') > 1 else name} {spread:.2f}x" for spread, name in known]
    best = known[0][1]
    if len(known) == 1:
        return best, f"over {plural(len(by_name[best].ratio), 'budget')} D/N varies {known[0][0]:.2f}x"
    tie = known[1][0] <= known[0][0] * TIE
    text = f"D/N varies over {len(by_name[best].ratio)} budgets by: {', '.join(words)}"
    return best, text + ("; the first two do not differ" if tie else "")


def optimum_path(
    fit: ParametricFit, boots: list[Bootstrap], C: np.ndarray, rule: FlopsRule, *, level: float = 0.9
) -> dict[str, Any]:
    """N*, D*, D/N along compute C (m,) with intervals: the widest of the given bootstraps'. Nulls where there is no optimum."""
    out: dict[str, Any] = {"C": C}
    n, d, _ = fit.optimum(C, rule)
    bands: dict[str, list[list[tuple[float, float]]]] = {"N": [], "D": [], "ratio": []}
    for boot in boots:
        bn, bd, _ = boot.optimum(C, rule)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            for name, draws in (("N", bn), ("D", bd), ("ratio", bd / bn)):
                bands[name].append([quantiles(draws[:, i], level) for i in range(C.size)])
    for name, value in (("N", n), ("D", d), ("ratio", d / n)):
        out[name] = value
        if bands[name]:
            edges = np.array(bands[name])  # (boots, m, 2)
            out[f"{name}_low"], out[f"{name}_high"] = edges[:, :, 0].min(axis=0), edges[:, :, 1].max(axis=0)
    return dict(jsonable(out))


def compute_grid(low: float, high: float, target: float | None) -> np.ndarray:
    """25 geometric points from the lowest compute to the target, or to ten times the highest."""
    end = max(high, target) if target is not None else 10 * high
    return np.geomspace(low, end, PATH_POINTS)
