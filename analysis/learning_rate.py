"""Learning rate: η* = k·N^a·D^b on optima inside their grids.

Published: Step Law 1.79·N^−0.713·D^0.307 (arXiv 2503.04715), DeepSeek 0.3118·C^−0.125 (arXiv 2401.02954). The D exponent
depends on how the optimum is found: quadratics on Step Law's own table give 0.208 ± 0.021.
"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from analysis.law import Law
from analysis.noise import SeedNoise
from analysis.optima import as_points, find_optima
from analysis.power_law import fit_power_law

ASSUMED = {"N": -0.713, "D": 0.307}  # Step Law
METHOD = "quadratics of log loss near each cell's best, then a joint log-linear fit in N and D over the optima"


def fit_learning_rate(frame: pd.DataFrame, *, noise: SeedNoise | None = None, level: float = 0.9, source_hash: str = "") -> Law:
    """η*(N, D) from runs that vary the learning rate inside (N, D) cells.

    Where B varies freely as well the quadratic is two-dimensional and η* is the one at the best batch; where a cell varies only
    η, it is the one at that cell's batch. Cells whose learning rate merely follows the batch tell nothing and are not used.
    """
    swept = frame[frame["lr"].notna()]
    cells = [c for c in find_optima(swept, "lr", other="B", noise=noise) if "tied" not in c.how]
    law = fit_power_law(
        as_points(cells, ("N", "D")), name="learning_rate", target="lr", symbols=("N", "D"), assumed=ASSUMED, method=METHOD,
        source_hash=source_hash, cells=[c.as_dict(level) for c in cells], level=level,
    )  # fmt: skip
    return replace(law, form="lr = k · N^a · D^b")
