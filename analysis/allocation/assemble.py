"""The "allocation" block of laws.json: every allocation law of one table, with what predictions need later."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from analysis.allocation.bootstrap import SEED, Bootstrap, bootstrap_parametric
from analysis.allocation.calibrate import Calibration, calibrate
from analysis.allocation.conventions import compute_grid, isoflop_steadiness, optimum_path, steadiest
from analysis.allocation.isoflop import fit_isoflop
from analysis.allocation.loss_model import NUM_DRAWS, Fits, Runs, fit_loss_model, make_runs
from analysis.allocation.parametric import (
    FlopsRule,
    ParametricFit,
    fit_flops_rule,
    fit_parametric,
    noise_delta,
)
from analysis.allocation.predict import Predictor, make_predictor
from analysis.allocation.profile import leave_one_budget_out, profile_exponent
from analysis.allocation.tools import jsonable
from analysis.blas import single_blas_thread
from analysis.errors import DataError
from analysis.noise import SeedNoise
from analysis.words import plural, was_were

CONVENTIONS = ("matrices_lm_head", "all", "matrices")
NUM_BOOT = 10_000  # leaves 3% on the heavy-tailed standard error of B at n = 240
SIDE_BOOT = 1000  # for the conventions beside the chosen one and for clusters
OUTLIER_SDS = 5.0  # residuals beyond five robust standard deviations are named
LARGE = 20_000  # beyond, the checks beside the main fit see an even sample of the rows
MAX_HELD_OUT_RUNS = 500  # listed in the file; all of them count
LEVEL = 0.9


@single_blas_thread
def fit_allocation(
    frame: pd.DataFrame,
    *,
    convention: str = "matrices_lm_head",
    target_flops: float | None = None,
    n_boot: int = NUM_BOOT,
    seed: int = SEED,
    noise: SeedNoise | None = None,
) -> dict[str, Any]:
    """All allocation laws of the runs in `frame`, as plain JSON-ready data.

    Columns used: N in the chosen convention, D, L; C (training FLOPs), budget (NaN for none), N_<convention> for the others,
    group (trunk run), outlier, run_id, embedding_share where present. target_flops: where predictions and ratios are given (10
    times the largest compute otherwise). noise: the seed noise, where it is known. DataError where fewer than five runs are
    usable; every other shortage is a status or a warning.
    """
    usable, dropped = _usable(frame)
    runs = _runs(usable, "N")
    if runs.N.size < 5:
        raise DataError(
            f"{plural(runs.N.size, 'usable run')} for an allocation law of 5 parameters; add runs of other sizes and horizons"
        )
    if noise is not None and not (math.isfinite(noise.sd) and noise.sd > 0):
        noise = None
    target = target_flops or 10 * float(runs.C.max())
    fits = fit_loss_model(runs, noise=noise, n_boot=max(n_boot, NUM_DRAWS), seed=seed, thorough=True)
    calibration = calibrate(runs, noise=noise, seed=seed)
    predictor = make_predictor(fits.model, calibration, _embedding_share(usable))
    boots = _bootstraps(fits, runs, usable, seed)
    grid = compute_grid(float(runs.C.min()), float(runs.C.max()), target_flops)
    path = optimum_path(fits.surface, list(boots.values()), grid, fits.model.rule)
    conventions = _conventions(usable, convention, fits, path, grid, noise, seed)
    prediction = predictor.at(target_C=target).as_dict()
    block = {
        "convention": convention,
        "n": runs.N.size,
        "parametric": _parametric(fits, boots, runs, usable, target),
        "isoflop": _isoflop(fits, usable),
        "frontier": _frontier(predictor, fits, grid),
        "conventions": conventions,
        "ratio": _ratio(fits, boots, target),
        "path": path,
        "flops_rule": fits.model.rule,
        "prediction": prediction,
        "calibration": calibration,
        "held_out": [_labelled(h.as_dict(), usable) for h in calibration.held_out if h.kind == "minimum"],
        "held_out_runs": [_labelled(h.as_dict(), usable) for h in calibration.held_out if h.kind == "run"][-MAX_HELD_OUT_RUNS:],
        "predictor": predictor,
        "warnings": _warnings(fits, calibration, dropped, conventions, prediction),
    }
    return dict(jsonable(block))


def _usable(frame: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Rows with positive finite N, D and L, index reset, and how many were dropped."""
    missing = [c for c in ("N", "D", "L") if c not in frame.columns]
    if missing:
        raise DataError(f"column {missing[0]} is missing: an allocation needs N, D and L")
    ok = np.ones(len(frame), dtype=bool)
    for name in ("N", "D", "L"):
        values = pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=float)
        ok &= np.isfinite(values) & (values > 0)
    return frame[ok].reset_index(drop=True), int((~ok).sum())


def _runs(frame: pd.DataFrame, size: str) -> Runs:
    def column(name: str) -> np.ndarray | None:
        return pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=float) if name in frame.columns else None

    return make_runs(column(size), column("D"), column("L"), budget=column("budget"), C=column("C"))


def _embedding_share(frame: pd.DataFrame) -> float | None:
    """Median share of the embeddings among the ten largest models."""
    if "embedding_share" not in frame.columns:
        return None
    share = frame.sort_values("N")["embedding_share"].dropna().tail(10)
    return float(share.median()) if len(share) else None


def _bootstraps(fits: Fits, runs: Runs, frame: pd.DataFrame, seed: int) -> dict[str, Bootstrap]:
    """plain; by trunk where several runs share one; by budget where there are at least three. Clusters hold all runs."""
    if fits.boot is None:
        return {}
    out = {"plain": fits.boot}
    args = (fits.surface, runs.N, runs.D, runs.L)
    if "group" in frame.columns:
        label = frame["group"].fillna("").astype(str).to_numpy()
        label = np.where(label == "", [f"row {i}" for i in range(len(label))], label)
        if len(np.unique(label)) < len(label) and len(np.unique(label)) >= 3:
            out["by_trunk"] = bootstrap_parametric(*args, n_boot=SIDE_BOOT, seed=seed, groups=label)
    if runs.budgets.size >= 3:
        nearest = np.abs(np.log(runs.C[:, None] / runs.budgets[None])).argmin(axis=1)
        out["by_budget"] = bootstrap_parametric(*args, n_boot=SIDE_BOOT, seed=seed, groups=nearest)
    return out


def _sample(runs: Runs) -> Runs:
    if runs.N.size <= LARGE:
        return runs
    return runs.take(np.linspace(0, runs.N.size - 1, LARGE).round().astype(int))


def _parametric(fits: Fits, boots: dict[str, Bootstrap], runs: Runs, frame: pd.DataFrame, target: float) -> dict[str, Any]:
    """The surface with its doubts: other losses, outliers left out, every bootstrap, profile, one budget left out."""
    fit = fits.surface
    part = _sample(runs)
    out = fit.as_dict()
    plain = boots.get("plain")
    out["intervals"] = plain.intervals(LEVEL) if plain else {}
    out["interval_method"] = "percentiles of the plain bootstrap; the clustered ones stand beside under bootstrap"
    out["level"] = LEVEL
    out["asymptotic_se"] = out.pop("se")
    out["se"] = plain.se if plain else {}
    out["bootstrap"] = {name: boot.as_dict() for name, boot in boots.items()}
    out["domain"] = {k: (float(v.min()), float(v.max())) for k, v in (("N", runs.N), ("D", runs.D), ("C", runs.C), ("L", runs.L))}
    if fit.status == "too_few":
        return out
    smooth = fit_parametric(part.N, part.D, part.L, delta=noise_delta(fit), thorough=False)
    squares = fit_parametric(part.N, part.D, part.L, delta=math.inf, thorough=False)
    out["variants"] = {"noise_scaled": smooth.as_dict(), "log_least_squares": squares.as_dict()}
    out["without_outliers"] = _without_outliers(fit, runs, frame)
    out["profile"] = profile_exponent(fit, part.N, part.D, part.L, level=LEVEL)
    if part.budgets.size >= 3:
        out["leave_one_budget_out"] = leave_one_budget_out(
            part.N, part.D, part.L, part.budget, target_C=target, rule=fits.model.rule
        )
    return out


def _without_outliers(fit: ParametricFit, runs: Runs, frame: pd.DataFrame) -> dict[str, Any] | None:
    """The fit without the runs that their publisher flags, or else those five robust deviations off; None where there are none."""
    residual = np.log(runs.L / fit.loss(runs.N, runs.D))
    far = np.abs(residual) > OUTLIER_SDS * fit.residual_sd if math.isfinite(fit.residual_sd) else np.zeros(len(frame), bool)
    flagged = frame["outlier"].fillna(False).to_numpy(dtype=bool) if "outlier" in frame.columns else np.zeros(len(frame), bool)
    drop = flagged if flagged.any() else far
    if not drop.any() or (~drop).sum() < 6:
        return None
    rest = fit_parametric(runs.N[~drop], runs.D[~drop], runs.L[~drop], thorough=False)
    names = frame["run_id"].astype(str).to_numpy() if "run_id" in frame.columns else np.array([str(i) for i in range(len(frame))])
    return {
        "flagged": int(flagged.sum()),
        "far": int(far.sum()),
        "runs": [{"run_id": names[i], "row": int(i), "residual": residual[i]} for i in np.flatnonzero(drop)[:100]],
        "fit": rest.as_dict(),
    }


def _isoflop(fits: Fits, frame: pd.DataFrame) -> dict[str, Any]:
    out = fits.isoflop.as_dict()
    if "run_id" in frame.columns:
        ids = frame["run_id"].astype(str).to_numpy()
        for budget in out["budgets"]:
            budget["run_ids"] = [str(ids[r]) for r in budget.pop("rows")]
    return out


def _frontier(predictor: Predictor, fits: Fits, grid: np.ndarray) -> dict[str, Any]:
    """The fit, its points, and its path with the calibrated band."""
    out = fits.frontier.as_dict()
    out["points"] = [{"C": p.C, "N": p.N, "L": p.L, "sd": p.sd, "n": p.n} for p in fits.isoflop.lowest]
    m = predictor.model
    if not m.has_frontier:
        return out
    value = m.frontier_loss(grid)
    path: dict[str, Any] = {"C": grid, "L": value, "L_low": None, "L_high": None}
    stretch = predictor.stretch(LEVEL)
    if stretch is not None:
        half = stretch * m.frontier_band(grid)
        path |= {"L_low": value * np.exp(-half), "L_high": value * np.exp(half)}
    out["path"] = path
    return out


def _ratio(fits: Fits, boots: dict[str, Bootstrap], target: float) -> dict[str, Any]:
    """D/N at the target: by the surface with its interval, by the parabolas' laws beside it."""
    out = ratio_at(fits.surface, list(boots.values()), target, fits.model.rule)
    iso = fits.isoflop
    if iso.N_law.status != "too_few":
        (n, n_low, n_high), (d, d_low, d_high) = iso.N_law.at(target), iso.D_law.at(target)
        out |= {"isoflop": d / n, "isoflop_N": n, "isoflop_D": d, "isoflop_N_low": n_low, "isoflop_N_high": n_high}
        out |= {"isoflop_D_low": d_low, "isoflop_D_high": d_high}
        drift = isoflop_steadiness(iso).drift
        if drift.status == "converged":  # D/N through its own line: N* and D* err against each other
            _, out["isoflop_low"], out["isoflop_high"] = drift.at(target)
    return out


def ratio_at(fit: ParametricFit, boots: list[Bootstrap], C: float, rule: FlopsRule | None = None) -> dict[str, Any]:
    """N*, D*, D/N at C FLOPs with 90% intervals (the widest of the bootstraps'): {"C", "N", "N_low", …, "ratio", …}."""
    path = optimum_path(fit, boots, np.array([C]), rule or FlopsRule(), level=LEVEL)
    return {k: v[0] for k, v in path.items()} | {"status": fit.status, "level": LEVEL}


def _conventions(
    frame: pd.DataFrame, chosen: str, fits: Fits, path: dict[str, Any], grid: np.ndarray, noise: SeedNoise | None, seed: int
) -> dict[str, Any]:
    """Each way of counting N: its minima, exponents, path and steadiness."""
    spreads = {chosen: isoflop_steadiness(fits.isoflop)}
    own = {"path": path, "N": fits.isoflop.N_law, "D": fits.isoflop.D_law, "parametric": _short(fits.surface)}
    by_name: dict[str, Any] = {chosen: own | {"flops_rule": fits.model.rule}}
    for name in CONVENTIONS:
        column = f"N_{name}"
        if name == chosen or column not in frame.columns or not (frame[column] > 0).all():
            continue
        runs = _sample(_runs(frame, column))
        iso = fit_isoflop(runs.N, runs.D, runs.L, runs.budget, C=runs.C, noise=noise)
        rule = fit_flops_rule(runs.N, runs.D, runs.C)
        fit = fit_parametric(runs.N, runs.D, runs.L, thorough=False)
        boots = [bootstrap_parametric(fit, runs.N, runs.D, runs.L, n_boot=SIDE_BOOT, seed=seed)] if fit.status != "too_few" else []
        spreads[name] = isoflop_steadiness(iso)
        by_name[name] = {
            "path": optimum_path(fit, boots, grid, rule), "N": iso.N_law, "D": iso.D_law, "parametric": _short(fit),
            "flops_rule": rule, "minima": [{k: v for k, v in b.as_dict().items() if k != "rows"} for b in iso.budgets],
        }  # fmt: skip
    for name, spread in spreads.items():
        by_name[name]["steadiness"] = spread
    best, message = steadiest(spreads)
    return {"by_name": by_name, "steadiest": best, "message": message}


def _short(fit: ParametricFit) -> dict[str, Any]:
    keys = ("E", "A", "B", "alpha", "beta", "a", "objective_log", "status", "message")
    return {k: getattr(fit, k) for k in keys}


def _labelled(row: dict[str, Any], frame: pd.DataFrame) -> dict[str, Any]:
    index = row.pop("row")
    if index >= 0 and "run_id" in frame.columns:
        row["run_id"] = str(frame["run_id"].iloc[index])
    return row


def _warnings(
    fits: Fits, calibration: Calibration, dropped: int, conventions: dict[str, Any], prediction: dict[str, Any]
) -> list[str]:
    out = (
        [f"{plural(dropped, 'run')} without a positive finite N, D and L {was_were(dropped)} left out of the allocation"]
        if dropped
        else []
    )
    if fits.surface.status != "converged":
        out.append(f"allocation: {fits.surface.status.replace('_', ' ')}: {fits.surface.message}")
    doubtful = [b for b in fits.isoflop.budgets if b.status != "interior"]
    out += [f"budget {b.C:.3g} FLOPs ({b.status.replace('_', ' ')}): {b.message}" for b in doubtful]
    if fits.frontier.message:
        out.append(f"frontier: {fits.frontier.message}")
    hit, total = calibration.coverage("run")
    if total >= 5 and hit < 0.7 * total:
        out.append(f"only {hit} of {total} held-out runs lay in their 90% intervals: the law does not carry over to larger budgets")
    best = conventions["steadiest"]
    if best is not None and len(conventions["by_name"]) > 1 and best != next(iter(conventions["by_name"])):
        out.append(f"D/N is steadiest when N counts {best}: {conventions['message']}")
    return out + [f"prediction: {reason}" for reason in prediction["reasons"]]
