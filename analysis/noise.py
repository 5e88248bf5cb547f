"""Seed noise: how much the loss of one run moves when only its seed changes. Relative (standard deviation of log loss), since
it is about the same share of the loss at neighbouring scales; the pooled estimate says when it is not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.words import plural

REPLICATE_KEY = ("N", "D", "B", "lr", "weight_decay", "width", "depth", "sequence_len", "variant", "comparable_hash")
LISTED_CELLS = 200
FEW_DF = 2  # below this the chi-square interval spans over a decade
HETEROGENEOUS_P = 0.01


@dataclass(frozen=True, kw_only=True)
class SeedNoise:
    """`sd`: relative standard deviation of one run's loss. `df`: runs minus cells. `low`, `high`: chi-square interval of sd."""

    sd: float
    df: int
    low: float | None = None
    high: float | None = None
    level: float = 0.9
    status: str = "converged"  # or too_few
    message: str = ""
    num_runs: int = 0
    num_cells: int = 0
    cells: tuple[dict[str, Any], ...] = ()  # the largest 200: {n, sd, loss, N, D, run_ids}

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "cells": [dict(c) for c in self.cells]}


def estimate_noise(frame: pd.DataFrame, *, level: float = 0.9) -> SeedNoise | None:
    """Pooled relative variance over groups of runs that differ in their seed only; None without any replicate.

    s² = Σ_cells Σ_i (log L_i − mean)² / Σ_cells (n − 1), and (df·s²/χ²) for its interval. Runs are grouped by the hash of
    their whole config where the table has it, else by every column that describes them (the seed column must be there).
    """
    seeded = frame[frame["seed"].notna()]
    if seeded.empty:
        return None
    has_hash = (seeded["cell"] != "").all()
    keys = [seeded["cell"]] if has_hash else [seeded[c].astype(object).fillna("") for c in REPLICATE_KEY]
    counts = seeded["seed"].groupby(keys).transform("nunique")
    repeated = seeded[counts >= 2]
    if repeated.empty:
        return None
    number = repeated["L"].groupby([k[counts >= 2] for k in keys], sort=False).ngroup().to_numpy()
    logs = np.log(repeated["L"].to_numpy())
    size = np.bincount(number)
    mean = np.bincount(number, logs) / size
    spread = np.bincount(number, (logs - mean[number]) ** 2)
    total, df = float(spread.sum()), int((size - 1).sum())
    sd = float(np.sqrt(total / df))
    low, high = (float(np.sqrt(total / stats.chi2.ppf(q, df))) for q in ((1 + level) / 2, (1 - level) / 2))
    enough = df >= FEW_DF
    message = f"{plural(len(logs), 'run')} in {plural(len(size), 'cell')}, {plural(df, 'degree')} of freedom"
    if not enough:
        message += "; one pair of seeds says little, run at least 3 seeds at one middle cell"
    first = repeated.groupby(number).first()
    listed = np.argsort(-size, kind="stable")[:LISTED_CELLS]
    cells: list[dict[str, Any]] = [
        {
            "n": int(size[i]), "sd": float(np.sqrt(spread[i] / (size[i] - 1))), "loss": float(np.exp(mean[i])),
            "N": float(first["N"][i]), "D": float(first["D"][i]),
            "run_ids": [r for r in repeated["run_id"][number == i] if r],
        }
        for i in listed
    ]  # fmt: skip
    big = [i for i in listed if size[i] >= 3 and spread[i] > 0]
    if len(big) >= 2 and stats.bartlett(*(logs[number == i] for i in big)).pvalue < HETEROGENEOUS_P:
        calm, wild = (pick((c for c in cells if c["n"] >= 3), key=lambda c: c["sd"]) for pick in (min, max))
        message += f"; it is not the same everywhere ({calm['sd']:.2%} at N={calm['N']:.3g}, {wild['sd']:.2%} at N={wild['N']:.3g})"
    return SeedNoise(
        sd=sd, df=df, low=low, high=high, level=level, status="converged" if enough else "too_few", message=message,
        num_runs=len(logs), num_cells=len(size), cells=tuple(cells),
    )  # fmt: skip


def pool_variance(*parts: tuple[float, float]) -> tuple[float, float]:
    """Pooled (variance, df) of independent estimates (variance, df); (nan, 0) when none has a degree of freedom."""
    df = sum(d for _, d in parts if d > 0)
    if df <= 0:
        return float("nan"), 0.0
    return sum(v * d for v, d in parts if d > 0) / df, df
