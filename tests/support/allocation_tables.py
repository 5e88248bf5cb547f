"""Published tables and known surfaces for the tests of the allocation laws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from analysis.allocation import FlopsRule, Runs
from analysis.allocation.parametric import surface_loss, surface_optimum

DATA = Path(__file__).parent.parent / "data"
# Synthetic surface of arXiv 2603.22339 (Hoffmann's constants): log A, log B, log E, alpha, beta.
HOFFMANN = np.array([np.log(406.4), np.log(410.7), np.log(1.69), 0.34, 0.28])


def table(name: str, *, clean: bool) -> pd.DataFrame:
    """A published table; `clean` leaves out what its publisher flags."""
    frame = pd.read_csv(DATA / f"{name}.csv")
    flag = next(c for c in frame.columns if c.endswith("outlier"))
    return frame[~frame[flag]] if clean else frame


def ladder(
    theta: np.ndarray, budgets: np.ndarray, *, sizes: int, span: float, noise: float = 0.0, seed: int = 0, off_centre: float = 1.0
) -> Runs:
    """isoFLOP runs on a known surface (C = 6 N D): `sizes` geometric sizes within a factor `span` of N* at each budget."""
    C = np.repeat(budgets, sizes)
    best = surface_optimum(theta[None], C, FlopsRule())[0][0]
    N = best * off_centre * np.tile(np.geomspace(1 / span, span, sizes), len(budgets))
    D = C / (6 * N)
    rng = np.random.default_rng(seed)
    L = surface_loss(theta[None], N, D)[0] * np.exp(noise * rng.normal(size=C.size))
    return Runs(N=N, D=D, L=L, C=C, budget=C)
