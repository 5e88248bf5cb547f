"""The optimum of one cell: a quadratic of log loss in one or two logarithmic knobs near the best runs, its vertex with a
standard error, and the verdict whether that vertex is an optimum at all.

Letters: n runs, k knobs (1 or 2), p coefficients (3 or 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

Edge = Literal["interior", "low", "high", "flat"]
NEAR_BEST = 0.02  # points within about 2% of the best loss (Step Law's table is reproduced with this)
WIDER = (0.03, 0.05, 0.08, 0.15, 0.3, np.inf)  # tried in turn when too few points are that near
ENOUGH_POINTS = {1: 4, 2: 10}  # distinct settings: one more than a parabola's 3, four more than a paraboloid's 6
FAR_STEPS = 1.5  # of the grid between its best value and the vertex, beyond which a parabola does not describe the valley
EDGE_LEVEL = 0.9  # of the vertex' and the curvature's interval


@dataclass(frozen=True, kw_only=True)
class Valley:
    """A quadratic fit of log loss over `axes`. Knobs are natural logarithms.

    `x` (n, k), `y` (n,) all runs, `used` (n,) those in the fit, `vertex` (k,), `jacobian` (k, p) of the vertex with respect to
    the coefficients, `unscaled` (p, p) their covariance for a residual variance of 1. vertex is NaN without enough points.
    """

    axes: tuple[str, ...]
    x: np.ndarray
    y: np.ndarray
    used: np.ndarray
    argmin: np.ndarray
    near_best: float
    beta: np.ndarray
    center: np.ndarray
    vertex: np.ndarray
    jacobian: np.ndarray
    unscaled: np.ndarray
    rss: float
    df: int


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """Where the loss is least along one knob, in natural logarithms. `bounds`: what is known when it is not interior.

    `x`, `loss`: the points to draw: all runs of a one-dimensional cell, the best run at each value of a two-dimensional one.
    """

    axis: str
    log_value: float
    log_se: float
    df: float
    edge: Edge
    reason: str
    lower_side: Literal["low", "high"]
    bounds: tuple[float, float]
    argmin: float
    num_points: int
    num_used: int
    best_loss: float
    x: tuple[float, ...]
    loss: tuple[float, ...]

    def interval(self, level: float = 0.9) -> tuple[float, float] | None:
        """Interval of the knob itself (not its logarithm); None when unknown or no optimum."""
        if self.edge != "interior" or not np.isfinite(self.log_se) or self.df <= 0:
            return None
        half = stats.t.ppf((1 + level) / 2, self.df) * self.log_se
        return float(np.exp(self.log_value - half)), float(np.exp(self.log_value + half))

    def as_dict(self, level: float = 0.9) -> dict[str, Any]:
        interval = self.interval(level)
        interior = self.edge == "interior"
        return {
            "value": float(np.exp(self.log_value)) if interior else None,
            "low": interval[0] if interval else None,
            "high": interval[1] if interval else None,
            "log_se": float(self.log_se) if np.isfinite(self.log_se) else None,
            "edge": self.edge, "reason": self.reason, "argmin": float(np.exp(self.argmin)), "n": self.num_points,
            "n_used": self.num_used, "best_loss": self.best_loss,
            "bounds": [float(np.exp(b)) if np.isfinite(b) else None for b in self.bounds],
            "x": list(self.x), "loss": list(self.loss),
        }  # fmt: skip


def fit_valley(axes: Sequence[str], knobs: np.ndarray, loss: np.ndarray) -> Valley:
    """Least squares of log loss on a full quadratic of log `knobs` (n, k), over the runs near the best.

    log L = b0 + b·u + ½ uᵀH u, u = log(knob) − centre; vertex u* = −H⁻¹b, its covariance by the delta method. Points within
    2% of the best loss are used; the margin widens in steps until there are enough of them, on both sides of the best.
    """
    x, y = np.log(np.asarray(knobs, dtype=float).reshape(len(loss), -1)), np.log(np.asarray(loss, dtype=float))
    k = x.shape[1]
    assert k == len(axes) and k in (1, 2)
    settings, inverse = np.unique(np.round(x, 9), axis=0, return_inverse=True)
    means = np.bincount(inverse.ravel(), weights=y) / np.bincount(inverse.ravel())
    best = settings[means.argmin()]
    used, near_best = _near_best(settings, means, k)
    used = used[inverse.ravel()]
    center = x[used].mean(axis=0)
    design = _design(x[used] - center)
    p = design.shape[1]
    common: dict[str, Any] = {"axes": tuple(axes), "x": x, "y": y, "used": used, "argmin": best}
    common |= {"near_best": near_best, "center": center}
    unknown: dict[str, Any] = {"vertex": np.full(k, np.nan), "jacobian": np.full((k, p), np.nan)}
    if len(np.unique(np.round(x[used], 9), axis=0)) < p or np.linalg.matrix_rank(design) < p:
        return Valley(**common, **unknown, beta=np.full(p, np.nan), unscaled=np.full((p, p), np.nan), rss=0.0, df=0)
    beta = np.linalg.lstsq(design, y[used], rcond=None)[0]
    residual = y[used] - design @ beta
    hessian, gradient = _hessian(beta, k), beta[1 : 1 + k]
    unscaled = np.linalg.inv(design.T @ design)
    rss, df = float(residual @ residual), int(used.sum() - p)
    if abs(np.linalg.det(hessian)) < 1e-300:
        return Valley(**common, **unknown, beta=beta, unscaled=unscaled, rss=rss, df=df)
    inverse_hessian = np.linalg.inv(hessian)
    vertex = -inverse_hessian @ gradient
    jacobian = np.zeros((k, p))
    jacobian[:, 1 : 1 + k] = -inverse_hessian
    for j, dh in enumerate(_hessian_derivatives(k)):
        jacobian[:, 1 + k + j] = -inverse_hessian @ dh @ vertex
    return Valley(**common, beta=beta, vertex=vertex + center, jacobian=jacobian, unscaled=unscaled, rss=rss, df=df)


def locate(valley: Valley, axis: str, variance: float, df: float, level: float = EDGE_LEVEL) -> Optimum:
    """The optimum along one axis by the edge rule, with standard errors from `variance` of log loss (NaN: unknown) on `df`."""
    a = valley.axes.index(axis)
    k = len(valley.axes)
    known = np.isfinite(variance) and df > 0
    quantile = float(stats.t.ppf((1 + level) / 2, df)) if known else 0.0
    covariance = variance * valley.unscaled if known else np.full_like(valley.unscaled, np.nan)
    grid = np.unique(np.round(valley.x[:, a], 9))
    argmin = float(valley.argmin[a])
    vertex = float(valley.vertex[a])
    se = float(np.sqrt(max(0.0, (valley.jacobian @ covariance @ valley.jacobian.T)[a, a]))) if known else float("nan")
    curvature, curvature_se = _profile_curvature(valley, a, covariance)
    edge, reason = judge(grid, argmin, vertex, se, curvature, curvature_se, quantile)
    if edge == "interior" and k == 1 and _disagree(grid, argmin, vertex, quantile * se if known else 0.0):
        edge, reason = "flat", "the best value and the parabola's vertex lie apart: the valley is no parabola"
    means = [float(np.exp(valley.y[np.abs(valley.x[:, a] - g) < 1e-8].mean())) for g in (grid[0], grid[-1])]
    best = float(np.exp(valley.y.min()))
    if edge == "interior":
        best = float(np.exp((_design((valley.vertex - valley.center)[None, :]) @ valley.beta)[0]))
    return Optimum(
        axis=axis,
        log_value=vertex if edge == "interior" else float("nan"),
        log_se=se if edge == "interior" else float("nan"),
        df=df,
        edge=edge,
        reason=reason,
        lower_side="low" if means[0] <= means[1] else "high",
        bounds=censor_bounds(grid, argmin, edge),
        argmin=argmin,
        num_points=len(valley.y),
        num_used=int(valley.used.sum()),
        best_loss=best,
        x=tuple(float(v) for v in np.exp(valley.x[:, a] if k == 1 else grid)),
        loss=tuple(float(v) for v in np.exp(valley.y if k == 1 else _profile(valley, a, grid))),
    )


def _profile(valley: Valley, axis: int, grid: np.ndarray) -> np.ndarray:
    """Least log loss at each value of one of two knobs, (g,)."""
    return np.array([valley.y[np.abs(valley.x[:, axis] - g) < 1e-8].min() for g in grid])


def judge(
    grid: np.ndarray, argmin: float, vertex: float, vertex_se: float, curvature: float, curvature_se: float, quantile: float
) -> tuple[Edge, str]:
    """The edge rule on one logarithmic axis: (verdict, the reason in words).

    An argmin on the boundary, a vertex whose interval leaves the grid, or a curvature whose interval includes 0 is not an
    optimum. `grid` (g,) sorted distinct log values that were tried; `argmin` the one of least mean loss; standard errors may be
    NaN (unknown), then only the argmin and the signs count. `quantile`: of t, for the intervals.
    """
    if len(grid) < 3:
        return "flat", "fewer than three values"
    if argmin <= grid[0] or argmin >= grid[-1]:
        low = argmin <= grid[0]
        return ("low" if low else "high"), f"the best of the grid is its {'lowest' if low else 'highest'} value"
    if not np.isfinite(vertex):
        return "flat", "too few distinct settings for a quadratic"
    half = quantile * curvature_se if np.isfinite(curvature_se) else 0.0
    if not curvature - half > 0:
        return "flat", "the curvature's interval includes 0"
    half = quantile * vertex_se if np.isfinite(vertex_se) else 0.0
    leaves_low, leaves_high = vertex - half < grid[0], vertex + half > grid[-1]
    if leaves_low and leaves_high:
        return "flat", "the vertex' interval leaves the grid at both ends"
    if leaves_low:
        return "low", "the vertex' interval leaves the grid at its low end"
    if leaves_high:
        return "high", "the vertex' interval leaves the grid at its high end"
    return "interior", ""


def censor_bounds(grid: np.ndarray, argmin: float, edge: Edge) -> tuple[float, float]:
    """What an optimum that is not interior still says, as an interval of the logarithm (±inf: open): for a loss with one
    valley it lies beyond the argmin's neighbour on the inner side. Flat says nothing."""
    i = int(np.searchsorted(grid, argmin))
    if edge == "low":
        return -np.inf, float(grid[min(i + 1, len(grid) - 1)])
    if edge == "high":
        return float(grid[max(i - 1, 0)]), np.inf
    return -np.inf, np.inf


def _design(u: np.ndarray) -> np.ndarray:
    one = np.ones(len(u))
    if u.shape[1] == 1:
        return np.column_stack([one, u[:, 0], u[:, 0] ** 2])
    return np.column_stack([one, u[:, 0], u[:, 1], u[:, 0] ** 2, u[:, 0] * u[:, 1], u[:, 1] ** 2])


def _hessian(beta: np.ndarray, k: int) -> np.ndarray:
    if k == 1:
        return np.array([[2 * beta[2]]])
    return np.array([[2 * beta[3], beta[4]], [beta[4], 2 * beta[5]]])


def _hessian_derivatives(k: int) -> list[np.ndarray]:
    if k == 1:
        return [np.array([[2.0]])]
    return [np.array(m, dtype=float) for m in ([[2, 0], [0, 0]], [[0, 1], [1, 0]], [[0, 0], [0, 2]])]


def _profile_curvature(valley: Valley, axis: int, covariance: np.ndarray) -> tuple[float, float]:
    """Curvature along one knob with the other at its best, 1/(H⁻¹)_aa, and its standard error; NaN where H has no valley.

    First order: vᵀ dH v with v the direction in which the other knob follows (1 on the knob itself, −H_ao/H_oo on the other).
    """
    k = len(valley.axes)
    if not np.isfinite(valley.beta).all():
        return float("nan"), float("nan")
    hessian = _hessian(valley.beta, k)
    v = np.ones(k)
    if k == 2:
        other = 1 - axis
        if not hessian[other, other] > 0:
            return float("nan"), float("nan")
        v[other] = -hessian[axis, other] / hessian[other, other]
    slope = np.array([v @ dh @ v for dh in _hessian_derivatives(k)])
    return float(v @ hessian @ v), float(np.sqrt(slope @ covariance[1 + k :, 1 + k :] @ slope))


def _disagree(grid: np.ndarray, argmin: float, vertex: float, half: float) -> bool:
    """Whether the vertex lies farther from the best value than its interval and one and a half steps of the grid."""
    step = float(np.median(np.diff(grid)))
    return abs(vertex - argmin) > max(half, FAR_STEPS * step)


def _near_best(settings: np.ndarray, means: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Which distinct settings (s, k) take part, and the margin that chose them."""
    enough = min(ENOUGH_POINTS[k], len(means))
    best = settings[means.argmin()]
    for margin in (NEAR_BEST, *WIDER):
        used = means <= means.min() + np.log1p(margin)
        brackets = all(
            (settings[used, a] < best[a]).any() >= (settings[:, a] < best[a]).any()
            and (settings[used, a] > best[a]).any() >= (settings[:, a] > best[a]).any()
            for a in range(k)
        )
        if used.sum() >= enough and brackets:
            break
    return used, float(margin)
