"""Rolling-origin calibration: fit the lower budgets, predict the next, and see how large the errors are in their own units.

On seven public ladders nominal 90% intervals without this covered 57% of the held-out runs. Fold k fits the k lowest budgets and
predicts budget k + 1; its errors, divided by their predicted standard deviation, should have mean square 1. The factor by which
intervals are stretched is

    t_{0.95}(df) * s,   s^2 = (nu0 + sum of the folds' mean squares) / (nu0 + folds),   df = 1.5 (nu0 + folds):

a scale estimate that leans on 1 with the weight of nu0 = 2 folds. df exceeds the number of folds because a fold's mean square is
taken over several runs. The constants lie between those that cover noisy known surfaces too often and those that cover held-out
budgets of public ladders too rarely; bench/coverage.py measures both.

Off the optimum the surface's slope at equal compute may be wrong, more than its own bootstrap says: in the points of Hoffmann's
figure models above N* lose 1-2% per e-fold of N more than the surface fitted below them has it, in every budget. So each fold also
measures the slope of its errors over log N/N*, and

    tilt_sd^2 = sum of the folds' squared slopes / (nu0 + folds)

enters the standard deviation of every later prediction as tilt_sd * |log N/N*|: nothing at the optimum, nothing where shapes hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from analysis.allocation.isoflop import fit_isoflop
from analysis.allocation.loss_model import LossModel, Runs, fit_loss_model
from analysis.allocation.tools import jsonable
from analysis.noise import SeedNoise

MIN_BUDGETS = 4  # below, no interval: there is no fold to calibrate with
FIRST_FOLD = 3  # budgets: as many as the frontier has parameters
MAX_FOLDS = 8  # the last ones
PRIOR_FOLDS = 2.0
DF_PER_FOLD = 1.5
NEAR_OPTIMUM = 0.02  # runs whose penalty is below 2% judge the prediction at the optimum
MIN_SD = 1e-9  # of a frontier without noise: rounding must not leave less
MAX_Z = 4.0  # one diverged run does not speak for the law
FOLD_RUNS = 4000  # a fold sees at most so many runs
TILT_SPAN = math.log(4.0)  # runs within 4x of N* tell the slope; farther out the surface's curvature errs besides


def stretch_factor(scale: float, df: float, level: float) -> float:
    """Half width, in standard deviations, of the central `level` of Student's t with df degrees of freedom times `scale`."""
    return float(stats.t.ppf((1 + level) / 2, df)) * scale


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """One run (or one budget's minimum) predicted from the budgets below it. low, high: 90%, None before there are folds."""

    C: float
    N: float
    D: float
    measured: float
    predicted: float
    surface: float
    sd: float  # relative, with the run's own noise, before stretching
    low: float | None
    high: float | None
    kind: str  # run or minimum
    near: bool  # within 2% of the optimum
    row: int  # position of the run in the columns given, -1 for a minimum
    offset: float = 0.0  # log N/N*
    own_sd: float = math.nan  # relative, of the run's noise and of the surface's shape as its bootstrap knows it
    tilt: float = 0.0  # the part of sd that lower budgets' slopes put there

    @property
    def z(self) -> float:
        return math.log(self.measured / self.predicted) / self.sd

    @property
    def z_level(self) -> float:
        """The same without the tilt: intervals at the optimum must hold a model's whole misfit, not only what no slope explains."""
        return math.log(self.measured / self.predicted) / math.sqrt(max(self.sd**2 - self.tilt**2, MIN_SD**2))

    def as_dict(self) -> dict[str, Any]:
        keys = ("C", "N", "D", "measured", "predicted", "surface", "low", "high", "kind", "near", "row")
        return jsonable({**{k: getattr(self, k) for k in keys}, "z": self.z})


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Folds and what follows from them."""

    mean_squares: tuple[float, ...]  # one a fold
    held_out: tuple[HeldOut, ...]
    tilt_squares: tuple[float, ...] = ()  # one a fold whose minimum is known

    @property
    def tilt_sd(self) -> float:
        return math.sqrt(sum(self.tilt_squares) / (PRIOR_FOLDS + len(self.tilt_squares)))

    @property
    def scale(self) -> float:
        return math.sqrt((PRIOR_FOLDS + sum(self.mean_squares)) / (PRIOR_FOLDS + len(self.mean_squares)))

    @property
    def df(self) -> float:
        return DF_PER_FOLD * (PRIOR_FOLDS + len(self.mean_squares))

    def stretch(self, level: float = 0.9) -> float:
        """Half width of an interval in standard deviations."""
        return stretch_factor(self.scale, self.df, level)

    def coverage(self, kind: str = "run") -> tuple[int, int]:
        """How many held-out `kind` lay in the interval they were given, and of how many."""
        judged = [h for h in self.held_out if h.kind == kind and h.low is not None and h.high is not None]
        return sum(h.low <= h.measured <= h.high for h in judged if h.low is not None and h.high is not None), len(judged)

    def as_dict(self) -> dict[str, Any]:
        runs, minima = self.coverage("run"), self.coverage("minimum")
        return jsonable(
            {
                "folds": len(self.mean_squares), "mean_squares": self.mean_squares, "scale": self.scale, "df": self.df,
                "stretch_90": self.stretch(), "covered_runs": runs, "covered_minima": minima, "tilt_sd": self.tilt_sd,
            }
        )  # fmt: skip


def calibrate(runs: Runs, *, noise: SeedNoise | None = None, seed: int = 0) -> Calibration:
    """Rolling origin over the budgets, lowest first. Runs on no isoFLOP line take part where their compute is below the budget."""
    levels, compute = runs.budgets, runs.C
    squares: list[float] = []
    tilts: list[float] = []
    held: list[HeldOut] = []
    first = max(FIRST_FOLD, levels.size - MAX_FOLDS)
    for k in range(first, levels.size):
        level = levels[k]
        below = np.flatnonzero(np.where(np.isfinite(runs.budget), runs.budget < level, compute <= levels[k - 1]))
        model = fit_loss_model(runs.take(_thin(below)), noise=noise, seed=seed).model
        if not (model.has_frontier and model.has_surface):
            continue
        so_far = Calibration(mean_squares=tuple(squares), held_out=(), tilt_squares=tuple(tilts))
        model = replace(model, tilt_sd=so_far.tilt_sd)
        stretch = so_far.stretch() if k >= MIN_BUDGETS and squares else None
        rows = np.flatnonzero(runs.budget == level)
        fold = [_predict_run(model, runs, int(i), stretch) for i in _thin(rows)]
        lowest = _predict_minimum(model, runs.take(rows), stretch, noise)
        tilts += [tilt_square(fold, math.log(low.measured / low.predicted)) for low in lowest]
        fold += lowest
        judges = [h.z_level for h in fold if h.near and math.isfinite(h.z)]
        if judges:
            squares.append(float(np.mean(np.clip(judges, -MAX_Z, MAX_Z) ** 2)))
        held += fold
    return Calibration(mean_squares=tuple(squares), held_out=tuple(held), tilt_squares=tuple(tilts))


def tilt_square(fold: list[HeldOut], level: float) -> float:
    """Squared slope of a fold's errors, less the `level` error of its minimum, over log N/N*, beyond what noise explains."""
    close = [h for h in fold if 0 < abs(h.offset) <= TILT_SPAN and math.isfinite(h.own_sd)]
    x2 = np.array([h.offset**2 for h in close])
    own = np.array([h.own_sd for h in close])
    error = np.clip([math.log(h.measured / h.predicted) - level for h in close], -MAX_Z * own, MAX_Z * own)
    weight = float((x2**2).sum())
    return max(0.0, float((x2 * (error**2 - own**2)).sum()) / weight) if weight > 0 else 0.0


def _thin(rows: np.ndarray) -> np.ndarray:
    if rows.size <= FOLD_RUNS:
        return rows
    return rows[np.linspace(0, rows.size - 1, FOLD_RUNS).round().astype(int)]


def _predict_run(model: LossModel, runs: Runs, i: int, stretch: float | None) -> HeldOut:
    N, D, C = float(runs.N[i]), float(runs.D[i]), float(runs.C[i])
    value, expected = model.log_loss(C, N, D)
    sd = math.hypot(expected, model.noise_sd)
    penalty, shape = model.penalty(N, D)
    offset = model.offset(N, D)
    low, high = _band(value, sd, stretch)
    return HeldOut(
        C=C, N=N, D=D, measured=float(runs.L[i]), predicted=math.exp(value), surface=model.surface_loss(N, D), sd=sd,
        low=low, high=high, kind="run", near=abs(penalty) < NEAR_OPTIMUM, row=i,
        offset=offset, own_sd=math.hypot(model.noise_sd, shape), tilt=model.tilt_sd * abs(offset),
    )  # fmt: skip


def _predict_minimum(model: LossModel, top: Runs, stretch: float | None, noise: SeedNoise | None) -> list[HeldOut]:
    """The lowest loss of the held-out budget against the frontier; nothing where its parabola has no minimum."""
    out = []
    for low_point in fit_isoflop(top.N, top.D, top.L, top.budget, C=top.C, noise=noise).lowest:
        value, expected = model.log_loss(low_point.C)
        own = low_point.sd if math.isfinite(low_point.sd) else model.noise_sd
        sd = math.hypot(expected, own)
        low, high = _band(value, sd, stretch)
        out.append(
            HeldOut(
                C=low_point.C,
                N=low_point.N,
                D=float(model.rule.tokens(low_point.N, low_point.C)),
                measured=low_point.L,
                predicted=math.exp(value),
                surface=model.surface_best(low_point.C)[2],
                sd=sd,
                low=low,
                high=high,
                kind="minimum",
                near=True,
                row=-1,
            )
        )
    return out


def _band(value: float, sd: float, stretch: float | None) -> tuple[float | None, float | None]:
    if stretch is None or not math.isfinite(sd):
        return None, None
    return math.exp(value - stretch * sd), math.exp(value + stretch * sd)
