"""The whole "allocation" block: small noisy ladders, gaps, conventions, large tables."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from allocation_tables import HOFFMANN, ladder, table

from analysis.allocation import (
    FlopsRule,
    bootstrap_parametric,
    fit_allocation,
    fit_parametric,
    predict_from_block,
    ratio_at,
)
from analysis.allocation.parametric import surface_optimum
from analysis.errors import DataError
from analysis.noise import SeedNoise


def frame_of(runs, **more) -> pd.DataFrame:
    columns = {"N": runs.N, "D": runs.D, "L": runs.L, "C": runs.C, "budget": runs.budget}
    return pd.DataFrame({**columns, "run_id": [f"run{i}" for i in range(runs.N.size)], **more})


def demo_ladder(seed: int = 0, noise: float = 0.005):
    """Four budgets over one decade, six sizes, one seed: the smallest ladder that still gets an interval."""
    return ladder(HOFFMANN, 10.0 ** np.linspace(17, 18, 4), sizes=6, span=3, noise=noise, seed=seed)


def test_a_demo_sized_ladder_is_honest():
    block = fit_allocation(frame_of(demo_ladder()), target_flops=1e19, n_boot=500)
    json.dumps(block, allow_nan=False)
    target = block["ratio"]
    n, d, best = (float(v[0, 0]) for v in surface_optimum(HOFFMANN[None], 1e19, FlopsRule()))
    assert target["ratio_low"] <= d / n <= target["ratio_high"] and target["ratio_high"] > 1.5 * target["ratio_low"]
    assert target["N_low"] <= n <= target["N_high"] and target["D_low"] <= d <= target["D_high"]
    prediction = block["prediction"]
    assert prediction["run_low"] < prediction["low"] < prediction["value"] < prediction["high"] < prediction["run_high"]
    assert abs(prediction["value"] / best - 1) < 0.05 and prediction["high"] / prediction["low"] > 1.02
    assert block["frontier"]["path"]["C"][-1] == pytest.approx(1e19)
    assert predict_from_block(block, target_C=1e19).value == pytest.approx(prediction["value"])
    assert len(block["held_out"]) == 1 and {"run_id", "measured", "predicted"} <= set(block["held_out_runs"][0])


def test_ratio_intervals_cover():
    """20 demo ladders: the interval of D/N at ten times their compute holds the truth in at least 13 (P = 0.6% at 85%)."""
    n, d, _ = (float(v[0, 0]) for v in surface_optimum(HOFFMANN[None], 1e19, FlopsRule()))
    hits = 0
    for seed in range(20):
        r = demo_ladder(seed)
        fit = fit_parametric(r.N, r.D, r.L, thorough=False)
        boots = [bootstrap_parametric(fit, r.N, r.D, r.L, n_boot=300, groups=g) for g in (None, r.budget)]
        ratio = ratio_at(fit, boots, 1e19)
        hits += ratio["ratio_low"] <= d / n <= ratio["ratio_high"]
    assert hits >= 13


def test_gaps_and_missing_budgets_do_not_break_it():
    runs = demo_ladder()
    frame = frame_of(runs, C_kept=1.0)
    frame.loc[0, "L"] = np.nan
    frame.loc[[5, 9], "budget"] = np.nan
    frame.loc[7, "C"] = np.nan
    block = fit_allocation(frame.drop(columns="C_kept"), n_boot=200)
    assert block["n"] == 23 and "1 run without" in block["warnings"][0]
    without = fit_allocation(frame.drop(columns=["budget", "C", "C_kept"]), n_boot=200)
    assert without["isoflop"]["budgets"] == [] and without["frontier"]["status"] == "too_few"
    assert without["prediction"]["verdict"] == "refuse" and without["prediction"]["interval"] is None
    assert without["parametric"]["status"] == "converged" and without["ratio"]["ratio_low"] < without["ratio"]["ratio_high"]


@pytest.mark.parametrize("rows", [5, 6, 8, 12])
def test_few_runs(rows):
    block = fit_allocation(frame_of(demo_ladder()).iloc[:rows], n_boot=200)
    json.dumps(block, allow_nan=False)
    assert block["prediction"]["interval"] is None and block["prediction"]["verdict"] != "ok" and block["warnings"]


def test_too_few_runs_and_missing_columns_are_refused():
    with pytest.raises(DataError, match="4 usable runs"):
        fit_allocation(frame_of(demo_ladder()).iloc[:4])
    with pytest.raises(DataError, match="column L"):
        fit_allocation(frame_of(demo_ladder()).drop(columns="L"))


def test_conventions_side_by_side():
    """With equal exponents D/N is constant when N counts what the loss sees; other counts make it drift."""
    theta = np.array([np.log(400.0), np.log(400.0), 1.69, 0.31, 0.31])
    runs = ladder(theta, 10.0 ** np.linspace(18, 20, 5), sizes=7, span=3, noise=0.0005)
    frame = frame_of(runs, N_matrices_lm_head=runs.N, N_all=runs.N + 3e4 * runs.N**0.45, N_matrices=runs.N - 20 * runs.N**0.75)
    block = fit_allocation(frame, n_boot=200)
    conventions = block["conventions"]
    assert list(conventions["by_name"]) == ["matrices_lm_head", "all", "matrices"]
    spread = {k: v["steadiness"]["spread"] for k, v in conventions["by_name"].items()}
    assert conventions["steadiest"] == "matrices_lm_head" == min(spread, key=lambda k: spread[k])
    rule = conventions["by_name"]["all"]["flops_rule"]
    assert rule["u"] > 1.01 and conventions["by_name"]["matrices_lm_head"]["flops_rule"]["u"] == pytest.approx(1, abs=0.02)
    for entry in conventions["by_name"].values():
        assert len(entry["path"]["ratio"]) == len(entry["path"]["C"]) == 25


def test_seed_noise_of_replicates_enters():
    frame = frame_of(demo_ladder())
    quiet = fit_allocation(frame, n_boot=200, noise=SeedNoise(sd=0.001, df=6))["prediction"]
    loud = fit_allocation(frame, n_boot=200, noise=SeedNoise(sd=0.05, df=6))["prediction"]
    assert loud["run_high"] / loud["run_low"] > 1.1 * quiet["run_high"] / quiet["run_low"]


def test_publishers_outliers_are_fitted_with_and_without():
    t = table("chinchilla_epoch", clean=False).rename(columns={"epoch_outlier": "outlier"})
    t["budget"] = np.nan
    block = fit_allocation(t, convention="as given", n_boot=200)
    fit, rest = block["parametric"], block["parametric"]["without_outliers"]
    assert fit["n"] == 245 and rest["flagged"] == 5 and rest["fit"]["n"] == 240
    assert fit["objective_log"] <= 1.8260105e-3 * (1 + 1e-5) and rest["fit"]["objective_log"] <= 1.0182740e-3 * (1 + 1e-5)
    assert set(fit["variants"]) == {"noise_scaled", "log_least_squares"}
