"""How sure is the split of compute: profile likelihood over a = beta/(alpha + beta), and the fit without each budget in turn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from analysis.allocation.newton import Box, minimize
from analysis.allocation.objective import NUM_PARAMETERS, Evaluator, Problem, log_surface
from analysis.allocation.parametric import FlopsRule, ParametricFit, fit_parametric, make_problem, noise_delta
from analysis.allocation.starts import parameter_box
from analysis.allocation.tools import as_columns, jsonable
from analysis.blas import single_blas_thread

GRID = np.linspace(0.02, 0.98, 97)
SWEEP_ITERATIONS = 40  # a split that needs more has a better start coming from its neighbour, or is far from the best one


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Deviance of the best surface at each a, in units where 1 is one standard error squared. interval None: nothing excluded."""

    best: float
    interval: tuple[float, float] | None
    open_ends: tuple[bool, bool]  # the interval runs into the end of the grid
    level: float
    a: np.ndarray
    deviance: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        keep = self.deviance <= 30
        return jsonable(
            {
                "quantity": "a = beta/(alpha+beta)", "best": self.best, "interval": self.interval, "open_ends": self.open_ends,
                "level": self.level, "a": self.a[keep], "deviance": self.deviance[keep],
            }
        )  # fmt: skip


class _AtFixedSplit:
    """The objective over (a, b, e, s) with alpha = (1 - split) s, beta = split s; one split a row."""

    def __init__(self, problem: Problem, weights: np.ndarray, split: np.ndarray):
        self.inner = Evaluator(problem, weights)
        self.share = np.stack([1 - split, split], axis=1)  # (R, 2)

    def full(self, phi: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.column_stack([phi[:, :3], phi[:, 3:] * self.share[rows]])

    def __call__(self, phi: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        value, g, h = self.inner(self.full(phi, rows), rows)
        share = self.share[rows].T  # (2, R)
        reduced = np.concatenate([g[:3], (g[3:] * share).sum(axis=0)[None]])
        out = np.empty((4, 4, phi.shape[0]))
        out[:3, :3] = h[:3, :3]
        out[:3, 3] = out[3, :3] = (h[:3, 3:] * share).sum(axis=1)
        out[3, 3] = np.einsum("ir,ijr,jr->r", share, h[3:, 3:], share)
        return value, reduced, out


@single_blas_thread
def profile_exponent(fit: ParametricFit, N: Any, D: Any, L: Any, *, level: float = 0.9, weights: Any = None) -> Profile | None:
    """Profile over a of the noise-scaled Huber objective; None where n leaves no residual degree of freedom.

    The likelihood-ratio statistic of an M-estimator is twice the rise of the objective times E[psi'] / E[psi^2] (Ronchetti); it
    is held against t^2 with n - 5 degrees of freedom. Each a is reached from its neighbour's answer, from both ends.
    """
    n_, d_, l_ = as_columns(N=N, D=D, L=L)
    if n_.size <= NUM_PARAMETERS or not math.isfinite(fit.alpha):
        return None
    w = np.ones_like(n_) if weights is None else np.asarray(weights, dtype=float)
    smooth = fit_parametric(n_, d_, l_, weights=w, delta=noise_delta(fit), thorough=False)
    problem, _ = make_problem(n_, d_, l_, smooth.delta)
    grid = np.unique(np.append(GRID, np.clip(smooth.a, 0.02, 0.98)))
    objective = _AtFixedSplit(problem, w[None], grid)
    value = _sweep(objective, problem, grid, smooth)
    theta = smooth.centred[None]
    residual = log_surface(theta, problem.x, problem.y)[0] - problem.z
    psi = np.clip(residual, -problem.delta, problem.delta)
    inside, square = float((w * (np.abs(residual) <= problem.delta)).sum()), float((w * psi**2).sum())
    if square <= 0:
        return None
    deviance = 2 * (value - value.min()) * inside / square * (n_.size - NUM_PARAMETERS) / n_.size
    limit = float(stats.t.ppf((1 + level) / 2, n_.size - NUM_PARAMETERS)) ** 2
    if not np.isfinite(deviance).all():
        return None
    below = np.flatnonzero(deviance <= limit)
    low, high = _cross(grid, deviance, limit, below[0], -1), _cross(grid, deviance, limit, below[-1], 1)
    ends = (bool(below[0] == 0), bool(below[-1] == grid.size - 1))
    return Profile(
        best=float(grid[deviance.argmin()]),
        interval=None if all(ends) else (low, high),
        open_ends=ends,
        level=level,
        a=grid,
        deviance=deviance,
    )


def _sweep(objective: _AtFixedSplit, problem: Problem, grid: np.ndarray, fit: ParametricFit) -> np.ndarray:
    """Best objective at each split, (G,): from the free fit, twice from the neighbours' answers, then on from its own."""
    box = parameter_box(problem)
    bounds = Box(lower=np.append(box.lower[:3], 0.0), upper=np.append(box.upper[:3], min(box.upper[3:])))
    free = fit.centred
    phi = np.tile(np.append(free[:3], free[3] + free[4]), (grid.size, 1))
    theta, value, _ = minimize(objective, phi, bounds, SWEEP_ITERATIONS)
    for step in (1, -1, 1, -1, 0):
        start = np.roll(theta, step, axis=0)
        new, new_value, _ = minimize(objective, start, bounds, SWEEP_ITERATIONS)
        better = new_value < value
        theta[better], value[better] = new[better], new_value[better]
    return value


def _cross(grid: np.ndarray, deviance: np.ndarray, limit: float, i: int, side: int) -> float:
    """Where the deviance crosses `limit` beyond grid[i], by linear interpolation of its root."""
    j = i + side
    if not 0 <= j < grid.size:
        return float(grid[i])
    here, there = math.sqrt(max(deviance[i], 0.0)), math.sqrt(deviance[j])
    share = (math.sqrt(limit) - here) / max(there - here, 1e-12)
    return float(grid[i] + (grid[j] - grid[i]) * share)


def leave_one_budget_out(
    N: Any, D: Any, L: Any, budget: Any, *, target_C: float | None = None, rule: FlopsRule | None = None
) -> list[dict[str, Any]]:
    """The surface without each budget in turn: what hangs on a single one. budget (n,), NaN for runs that belong to none."""
    n_, d_, l_ = as_columns(N=N, D=D, L=L)
    group = np.asarray(budget, dtype=float)
    out = []
    for c in np.unique(group[np.isfinite(group)]):
        keep = group != c
        fit = fit_parametric(n_[keep], d_[keep], l_[keep], thorough=False)
        row = {"left_out": float(c), "n": fit.n, "E": fit.E, "alpha": fit.alpha, "beta": fit.beta, "a": fit.a, "status": fit.status}
        if target_C is not None and fit.status != "too_few":
            best_n, best_d, best_l = fit.optimum(target_C, rule)
            row |= {"ratio": float(best_d[0] / best_n[0]), "loss": float(best_l[0])}
        out.append(jsonable(row))
    return out
