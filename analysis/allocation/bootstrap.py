"""Bootstrap of the parametric fit: all resamples at once, as case weights, each from the best start it can get.

Each resample's objective has local minima of its own. The loss of every resample at every other resample's solution is one
matrix product, so after a first pass each resample starts again from the best solution that any other has found.
Legend: R resamples, n points, K starts.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis.allocation.newton import Box, minimize
from analysis.allocation.objective import NUM_PARAMETERS, Evaluator, Problem, log_surface
from analysis.allocation.parametric import FlopsRule, ParametricFit, make_problem, surface_loss, surface_optimum, uncentre
from analysis.allocation.starts import parameter_box
from analysis.allocation.tools import as_columns, jsonable
from analysis.blas import single_blas_thread
from analysis.errors import DataError
from analysis.words import plural

NUM_PASSES = 2
PASS_ITERATIONS = 80
POOL_SIZE = 500  # solutions offered to every resample
MAX_ELEMENTS = 4_000_000  # n times resamples: a larger table gets fewer resamples…
MIN_RESAMPLES = 200  # …but at least so many
SMOOTH_POINTS = 20_000  # with so many points the objective is smooth and one pass finds the minimum
SEED = 42  # of arXiv 2404.10102's notebook
FEW_GROUPS = 12  # below this, drawing whole groups with replacement leaves resamples without any contrast


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """draws (R, 5): log A, log B, log E, alpha, beta in raw units. kind: plain, clustered or bayesian_clustered."""

    kind: str
    n_boot: int
    n_groups: int
    draws: np.ndarray = field(repr=False)

    def columns(self) -> dict[str, np.ndarray]:
        """Draws of every reported quantity, (R,) each."""
        log_a, log_b, log_e, alpha, beta = self.draws.T
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return {
                "A": np.exp(log_a), "B": np.exp(log_b), "E": np.exp(log_e), "alpha": alpha, "beta": beta,
                "a": beta / (alpha + beta),
            }  # fmt: skip

    @property
    def se(self) -> dict[str, float]:
        with np.errstate(over="ignore", invalid="ignore"):
            return {k: float(np.std(v)) for k, v in self.columns().items()}

    def intervals(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
        """Percentile intervals."""
        return {k: quantiles(v, level) for k, v in self.columns().items()}

    def optimum(self, C: Any, rule: FlopsRule | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """N*, D*, L* of every draw at C (m,): (R, m) each."""
        return surface_optimum(self.draws, C, rule or FlopsRule())

    def loss(self, N: Any, D: Any) -> np.ndarray:
        """(R, m)."""
        return surface_loss(self.draws, N, D)

    def as_dict(self) -> dict[str, Any]:
        return jsonable(
            {"kind": self.kind, "n_boot": self.n_boot, "n_groups": self.n_groups, "se": self.se, "intervals": self.intervals()}
        )


def quantiles(values: np.ndarray, level: float) -> tuple[float, float]:
    """The central `level` of the finite values; NaN where there are none."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resample_weights(n: int, n_boot: int, groups: np.ndarray | None, seed: int) -> tuple[np.ndarray, str, int]:
    """Case weights (R, n) that sum to n a row, their kind, and the number of groups.

    Rows are drawn as arXiv 2404.10102 drew them, with numpy's MT19937 and, by default, its seed: 4000 resamples of its 240 runs are
    its own resamples, and their standard errors the printed ones.

    groups (n,): labels of runs that go together (a budget, or a trunk from which several horizons branch). With fewer than 12
    groups the groups get Dirichlet(1) weights (the Bayesian bootstrap): drawn with replacement, few budgets would often all
    be the same one.
    """
    if groups is None:
        return draw_counts(n, n_boot, seed), "plain", n
    _, label = np.unique(groups, return_inverse=True)
    k = int(label.max()) + 1
    if k == n:
        return draw_counts(n, n_boot, seed), "plain", n
    if k < FEW_GROUPS:
        raw, kind = np.random.default_rng(seed).dirichlet(np.ones(k), size=n_boot) * k, "bayesian_clustered"
    else:
        raw, kind = draw_counts(k, n_boot, seed), "clustered"
    weights = raw[:, label]
    return weights * (n / weights.sum(axis=1, keepdims=True)), kind, k


def draw_counts(n: int, n_boot: int, seed: int) -> np.ndarray:
    """How often each of n things is drawn in each resample of n, (R, n)."""
    drawn = np.random.RandomState(seed).randint(0, n, size=(n_boot, n))
    drawn += np.arange(n_boot)[:, None] * n
    return np.bincount(drawn.ravel(), minlength=n_boot * n).reshape(n_boot, n).astype(float)


def huber_matrix(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """Huber term of each point under each surface theta (K, 5): (K, n)."""
    residual = log_surface(theta, problem.x, problem.y) - problem.z
    psi = np.clip(residual, -problem.delta, problem.delta)
    return np.asarray(psi * (residual - psi / 2))


def _parallel(problem: Problem, weights: np.ndarray, start: np.ndarray, box: Box, threads: int) -> tuple[np.ndarray, np.ndarray]:
    def run(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        theta, value, _ = minimize(Evaluator(problem, weights[part]), start[part], box, PASS_ITERATIONS)
        return theta, value

    parts = np.array_split(np.arange(start.shape[0]), threads)
    if threads == 1:
        return run(parts[0])
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(run, parts))
    return np.vstack([r[0] for r in results]), np.concatenate([r[1] for r in results])


@single_blas_thread
def minimize_resamples(
    problem: Problem, weights: np.ndarray, basins: np.ndarray, *, passes: int = NUM_PASSES, threads: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Fit every row of weights (R, n); `basins` (K, 5): minima of the unweighted fit. -> theta (R, 5), value (R,)."""
    box = parameter_box(problem)
    busy = weights.size // 500_000  # a thread must have enough to do to be worth starting
    threads = threads or max(1, min(4, os.cpu_count() or 1, busy))
    terms = huber_matrix(problem, basins)
    theta, value = _parallel(problem, weights, basins[np.argmin(weights @ terms.T, axis=1)], box, threads)
    for _ in range(passes - 1):
        pool = np.vstack([basins, theta[:POOL_SIZE]])
        scores = weights @ huber_matrix(problem, pool).T
        own = np.abs(scores - value[:, None]) <= 1e-9 * value[:, None]
        start = pool[np.argmin(np.where(own, np.inf, scores), axis=1)]  # not its own solution again
        new_theta, new_value = _parallel(problem, weights, start, box, threads)
        better = new_value < value
        theta[better], value[better] = new_theta[better], new_value[better]
    return theta, value


def bootstrap_parametric(
    fit: ParametricFit,
    N: Any,
    D: Any,
    L: Any,
    *,
    n_boot: int = 10_000,
    seed: int = SEED,
    groups: Any = None,
    weights: Any = None,
    passes: int = NUM_PASSES,
) -> Bootstrap:
    """Resample the runs that `fit` was fitted to, with its delta. N, D, L (n,); groups (n,): resample whole groups.

    1000 resamples leave 2% on a standard error of alpha and, its tail being heavy, up to 10% on that of B (n = 240); 10,000 leave
    3%. Tables beyond 400 runs get fewer resamples (at least 200): `n_boot` of the result says how many.
    """
    n_, d_, l_ = as_columns(N=N, D=D, L=L)
    if n_.size < NUM_PARAMETERS or not np.isfinite(fit.theta[3:]).all():
        raise DataError(f"{plural(n_.size, 'run')}: a bootstrap needs a fit of at least {NUM_PARAMETERS} runs; add runs")
    label = None if groups is None else np.asarray(groups)
    if label is not None and label.shape != n_.shape:
        raise DataError(f"groups has {label.size} values where N has {n_.size}: give one for each run")
    problem, center = make_problem(n_, d_, l_, fit.delta)
    base = np.ones_like(n_) if weights is None else np.asarray(weights, dtype=float)  # the weights the fit had
    count = max(min(n_boot, MIN_RESAMPLES), min(n_boot, MAX_ELEMENTS // n_.size))
    drawn, kind, n_groups = resample_weights(n_.size, count, label, seed)
    smooth = n_.size > SMOOTH_POINTS
    basins = fit.centred[None] if smooth or not len(fit.minima) else fit.minima
    theta, _ = minimize_resamples(problem, drawn * base, basins, passes=1 if smooth else passes)
    return Bootstrap(kind=kind, n_boot=count, n_groups=n_groups, draws=uncentre(theta, center))
