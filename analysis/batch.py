"""Critical batch: B* = k·D^γ through the optima of (N, D) cells, and whether an N term is needed besides.

Published: γ = 0.383 (arXiv 2505.13738, the exponent of nanochat's rule), 0.571 (Step Law, arXiv 2503.04715: B = 0.58·D^0.571),
DeepSeek B = 0.292·C^0.327 (arXiv 2401.02954). They disagree by more than their errors: the exponent depends on the recipe.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.law import Law
from analysis.noise import SeedNoise
from analysis.optima import CellOptimum, as_points, find_optima
from analysis.power_law import Points, extra_symbol, fit_line, fit_power_law

ASSUMED = {"D": 0.383}  # arXiv 2505.13738
METHOD = "quadratics of log loss near each cell's best, then a weighted power law over the cells' optima"


def fit_batch_size(frame: pd.DataFrame, *, noise: SeedNoise | None = None, level: float = 0.9, source_hash: str = "") -> Law:
    """B*(D) from runs that vary the batch (and, freely or by a rule, the learning rate) inside (N, D) cells.

    `frame`: standard columns N, D, B, L, lr. The law's tests hold the N term (`N_term`) and the noisier exponent through the
    cells' argmins (`argmin`).
    """
    cells = find_optima(frame, "B", other="lr", noise=noise)
    points = as_points(cells, ("N", "D"))
    law = fit_power_law(
        points, name="batch_size", target="B", symbols=("D",), assumed=ASSUMED, method=METHOD, source_hash=source_hash,
        cells=[c.as_dict(level) for c in cells], level=level,
    )  # fmt: skip
    tests = {**law.tests, "N_term": extra_symbol(points, ("D",), "N"), "argmin": _argmin_exponent(cells, points)}
    message = law.message
    if tests["N_term"] is not None and tests["N_term"]["significant"]:
        extra = f"an N term is significant: exponent {tests['N_term']['exponent']:.2f}, p = {tests['N_term']['p_value']:.2g}"
        message = "; ".join(filter(None, [message, extra]))
    return replace(law, form="B = k · D^gamma", tests=tests, message=message)


def _argmin_exponent(cells: list[CellOptimum], points: Points) -> dict[str, Any] | None:
    logs = points.symbols["D"]
    if len(cells) < 3 or np.ptp(logs) == 0:
        return None
    values = np.array([c.optimum.argmin for c in cells])
    line = fit_line(np.column_stack([np.ones(len(logs)), logs - logs.mean()]), values, np.full(len(logs), np.nan))
    return {"exponent": float(line.beta[1]), "standard_error": float(np.sqrt(line.covariance[1, 1])), "n": len(cells)}
