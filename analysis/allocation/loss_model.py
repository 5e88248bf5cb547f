"""Surface and frontier of one set of runs, joined into one predicted loss.

    log L(N, D) = log L*_frontier(C) + [log S(N, D) - log S*(C)],   S the parametric surface, S* its lowest value at C FLOPs.

At the compute-optimal split the bracket is 0. On public ladders the surface alone over-predicts the loss of a larger budget by
0.3-2.5%, the frontier by half of that or less; so the frontier carries the level, the surface only the shape around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.allocation.bootstrap import Bootstrap, bootstrap_parametric
from analysis.allocation.frontier import FrontierFit, fit_frontier
from analysis.allocation.isoflop import IsoflopFit, fit_isoflop
from analysis.allocation.parametric import (
    NUM_PARAMETERS,
    FlopsRule,
    ParametricFit,
    fit_flops_rule,
    fit_parametric,
    surface_loss,
    surface_optimum,
)
from analysis.allocation.tools import as_columns
from analysis.errors import DataError
from analysis.noise import SeedNoise

NUM_DRAWS = 200  # of the surface and of the frontier; enough for a standard deviation to 5%
SHAPE_DOUBT = 0.1  # of a penalty: how wrong the surface's shape off the optimum is, beyond its sampling error (held-out budgets)
TAIL = 4.0  # residuals beyond so many robust deviations count as if they lay there


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Columns of the runs that enter the allocation laws, (n,) each. C: training FLOPs; budget: NaN for runs on no isoFLOP line."""

    N: np.ndarray
    D: np.ndarray
    L: np.ndarray
    C: np.ndarray
    budget: np.ndarray

    def take(self, keep: np.ndarray) -> Runs:
        return Runs(N=self.N[keep], D=self.D[keep], L=self.L[keep], C=self.C[keep], budget=self.budget[keep])

    @property
    def budgets(self) -> np.ndarray:
        """The different budgets, ascending."""
        return np.unique(self.budget[np.isfinite(self.budget)])


def make_runs(N: object, D: object, L: object, *, budget: object = None, C: object = None) -> Runs:
    """Checked columns. Without C: the budget where there is one, else 6 N D. Without budget: no isoFLOP lines."""
    n, d, l = as_columns(N=N, D=D, L=L)
    b = np.full(n.size, np.nan) if budget is None else np.asarray(budget, dtype=float)
    c = np.full(n.size, np.nan) if C is None else np.asarray(C, dtype=float)
    for name, column in (("budget", b), ("C", c)):
        if column.shape != n.shape:
            raise DataError(f"{name} has {column.size} values where N has {n.size}: give one for each run, NaN where unknown")
    b = np.where(np.isfinite(b) & (b > 0), b, np.nan)
    c = np.where(np.isfinite(c) & (c > 0), c, np.where(np.isfinite(b), b, 6 * n * d))
    return Runs(N=n, D=d, L=l, C=c, budget=b)


@dataclass(frozen=True, kw_only=True)
class LossModel:
    """What a prediction needs, and no more: it is stored in laws.json as it stands. Draws are joint over their columns."""

    surface: np.ndarray  # (5,) log A, log B, log E, alpha, beta; NaN without a surface
    surface_status: str
    surface_draws: np.ndarray  # (R, 5)
    frontier: np.ndarray  # (3,) E, kappa0, gamma; NaN without a frontier
    C0: float
    frontier_status: str
    frontier_draws: np.ndarray  # (R, 3)
    rule: FlopsRule
    noise_sd: float  # relative, of one run's loss
    num_budgets: int  # with a minimum
    C_range: tuple[float, float]  # of all runs fitted
    ratio_range: tuple[float, float]  # D/N of all runs fitted
    tilt_sd: float = 0.0  # how wrong d log L / d log N is at equal compute, as held-out budgets showed

    @property
    def has_frontier(self) -> bool:
        return bool(np.isfinite(self.frontier).all())

    @property
    def has_surface(self) -> bool:
        return bool(np.isfinite(self.surface).all())

    def frontier_loss(self, C: np.ndarray | float) -> np.ndarray:
        """L*(C) at C (m,) or a number."""
        return _frontier_loss(self.frontier[None], np.atleast_1d(C), self.C0)[0]

    def frontier_band(self, C: np.ndarray | float) -> np.ndarray:
        """Standard deviation of log L*(C) before calibration, (m,)."""
        return np.asarray(np.log(_frontier_loss(self.frontier_draws, np.atleast_1d(C), self.C0)).std(axis=0))

    def surface_loss(self, N: float, D: float) -> float:
        return float(surface_loss(self.surface[None], N, D)[0, 0])

    def surface_best(self, C: float) -> tuple[float, float, float]:
        """N*, D*, L* of the surface."""
        n, d, l = surface_optimum(self.surface[None], C, self.rule)
        return float(n[0, 0]), float(d[0, 0]), float(l[0, 0])

    def offset(self, N: float, D: float) -> float:
        """log N/N*(C): how far a run lies from the optimum of its own compute."""
        return math.log(N / self.surface_best(float(self.rule.flops(N, D)))[0])

    def penalty(self, N: float, D: float) -> tuple[float, float]:
        """log S(N, D) - log S*(C(N, D)) and its standard deviation, without the tilt."""
        if not self.has_surface:
            return math.nan, math.nan
        C = float(self.rule.flops(N, D))
        value = math.log(self.surface_loss(N, D) / self.surface_best(C)[2])
        draws = np.log(surface_loss(self.surface_draws, N, D)[:, 0] / surface_optimum(self.surface_draws, C, self.rule)[2][:, 0])
        return value, math.hypot(robust_spread(draws), SHAPE_DOUBT * value)

    def log_loss(self, C: float, N: float | None = None, D: float | None = None) -> tuple[float, float]:
        """log of the expected loss, at the optimum of C or at (N, D), and its standard deviation before calibration."""
        level, spread = math.log(float(self.frontier_loss(C)[0])), float(self.frontier_band(C)[0])
        if N is None or D is None:
            return level, spread
        penalty, penalty_sd = self.penalty(N, D)
        return level + penalty, math.hypot(spread, penalty_sd, self.tilt_sd * self.offset(N, D))


def _frontier_loss(theta: np.ndarray, C: np.ndarray, C0: float) -> np.ndarray:
    return np.asarray(theta[:, :1] + theta[:, 1:2] * (C[None] / C0) ** -theta[:, 2:3])


def robust_spread(values: np.ndarray) -> float:
    """Half the width of the central 68.3%: the standard deviation of a normal, not moved by a few wild draws."""
    finite = values[np.isfinite(values)]
    if finite.size < 2:
        return math.nan
    low, high = np.quantile(finite, [0.15865, 0.84135])
    return float(high - low) / 2


def run_noise(fit: ParametricFit, runs: Runs) -> float:
    """Relative standard deviation of one run about the surface, tails cut at 4 robust deviations; NaN without a surface."""
    if fit.status == "too_few" or not math.isfinite(fit.residual_sd):
        return math.nan
    residual = np.log(runs.L / fit.loss(runs.N, runs.D))
    cut = TAIL * fit.residual_sd
    n = runs.N.size
    return float(np.sqrt(np.mean(np.clip(residual, -cut, cut) ** 2) * n / (n - NUM_PARAMETERS)))


@dataclass(frozen=True, kw_only=True)
class Fits:
    """The fits behind a LossModel."""

    surface: ParametricFit
    boot: Bootstrap | None
    isoflop: IsoflopFit
    frontier: FrontierFit
    model: LossModel


def fit_loss_model(
    runs: Runs, *, noise: SeedNoise | None = None, n_boot: int = NUM_DRAWS, seed: int = 0, thorough: bool = False
) -> Fits:
    """Surface with bootstrap, parabolas, frontier. noise: seed noise from replicates, if known."""
    rule = fit_flops_rule(runs.N, runs.D, runs.C)
    surface = fit_parametric(runs.N, runs.D, runs.L, thorough=thorough)
    boot = None
    if surface.status != "too_few":
        boot = bootstrap_parametric(surface, runs.N, runs.D, runs.L, n_boot=n_boot, seed=seed)
    iso = fit_isoflop(runs.N, runs.D, runs.L, runs.budget, C=runs.C, noise=noise)
    low = iso.lowest
    frontier = fit_frontier([p.C for p in low], [p.L for p in low], sd=[p.sd for p in low], sd_df=iso.lowest_df or 4, seed=seed)
    ratio = runs.D / runs.N
    model = LossModel(
        surface=surface.theta,
        surface_status=surface.status,
        surface_draws=boot.draws[:NUM_DRAWS] if boot else np.empty((0, NUM_PARAMETERS)),
        frontier=np.array([frontier.E, frontier.kappa0, frontier.gamma]),
        C0=frontier.C0,
        frontier_status=frontier.status,
        frontier_draws=frontier.draws[:NUM_DRAWS],
        rule=rule,
        noise_sd=noise.sd if noise is not None else run_noise(surface, runs),
        num_budgets=len(low),
        C_range=(float(runs.C.min()), float(runs.C.max())),
        ratio_range=(float(ratio.min()), float(ratio.max())),
    )
    return Fits(surface=surface, boot=boot, isoflop=iso, frontier=frontier, model=model)
