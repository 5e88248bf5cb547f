"""Damped Newton with the exact Hessian, for many small problems at once, inside a box.

Huber's second derivative jumps at |r| = delta and the loss of a log-sum-exp is not convex, so a plain Newton step may go up or
nowhere. Safeguards: a modified L D L^T factorisation (pivots made positive), Levenberg-Marquardt damping, and a step is taken
only where it lowers the objective. Variables that press against a bound are frozen for the step (Bertsekas' projected Newton).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# theta (R', k) of the fits `rows` (R',) -> value (R',), gradient (k, R'), Hessian (k, k, R')
Objective = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]

MAX_ITERATIONS = 200
DAMPING_START, DAMPING_MIN, DAMPING_MAX = 1e-3, 1e-14, 1e10
TRUSTED_DAMPING = 1e-2  # a tiny step under more damping than this says nothing about convergence
RELATIVE_DECREASE = 1e-13  # a predicted decrease below this share of the objective is convergence
PIVOT_FLOOR = 1e-10  # of the largest diagonal entry, after scaling
RACE_ITERATIONS = 25  # after so many, a fit of a race drops out…
RACE_STEPS = 200.0  # …when so many steps like its next one would not bring it to the leader


@dataclass(frozen=True, kw_only=True)
class Box:
    """Bounds of the k parameters; each (k,)."""

    lower: np.ndarray
    upper: np.ndarray


def solve_modified(h: np.ndarray, g: np.ndarray) -> np.ndarray:
    """-M^-1 g with M = h where positive definite, else h with its pivots made positive. h (k, k, R), g (k, R) -> (k, R)."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.nan_to_num(_solve_modified(h, g), nan=0.0, posinf=0.0, neginf=0.0)  # no step: the damping grows and tries again


def _solve_modified(h: np.ndarray, g: np.ndarray) -> np.ndarray:
    k = g.shape[0]
    diagonal = np.abs(h[range(k), range(k)])
    scale = np.sqrt(np.maximum(diagonal, np.maximum(1e-30 * diagonal.max(axis=0), 1e-300)))  # so that no unit matters
    lower = [[np.empty(0)] * k for _ in range(k)]
    pivots: list[np.ndarray] = []
    solution: list[np.ndarray] = []
    for i in range(k):
        for j in range(i):
            entry = h[i, j] / (scale[i] * scale[j])
            for m in range(j):
                entry = entry - lower[i][m] * lower[j][m] * pivots[m]
            lower[i][j] = entry / pivots[j]
        pivot = h[i, i] / (scale[i] * scale[i])
        for m in range(i):
            pivot = pivot - lower[i][m] ** 2 * pivots[m]
        pivots.append(np.maximum(np.abs(pivot), PIVOT_FLOOR))
        rhs = -g[i] / scale[i]
        for m in range(i):
            rhs = rhs - lower[i][m] * solution[m]
        solution.append(rhs)
    out = np.empty_like(g)
    for i in range(k - 1, -1, -1):
        value = solution[i] / pivots[i]
        for m in range(i + 1, k):
            value = value - lower[m][i] * out[m]
        out[i] = value
    return out / scale


def _step(g: np.ndarray, h: np.ndarray, damping: np.ndarray, frozen: np.ndarray) -> np.ndarray:
    """The damped step (k, R); `frozen` (k, R) marks variables held at a bound."""
    m = h.copy()
    diagonal = range(g.shape[0])
    size = np.abs(h[diagonal, diagonal])
    m[diagonal, diagonal] += damping * np.maximum(size, 1e-12 * size.max(axis=0))
    if frozen.any():
        g = np.where(frozen, 0.0, g)
        m = np.where(frozen[:, None] | frozen[None, :], 0.0, m)
        m[diagonal, diagonal] = np.where(frozen, 1.0, m[diagonal, diagonal])
    return solve_modified(m, g)


def minimize(
    evaluate: Objective, start: np.ndarray, box: Box, max_iterations: int = MAX_ITERATIONS, *, race: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimise R objectives from start (R, k) -> theta (R, k), value (R,), converged (R,).

    race: all rows are starts of one and the same objective. Then a row that crawls far above the best one is given up where it is:
    on a small table a few of them, on their way to infinity, would take most of the time.
    """
    best = np.clip(start, box.lower, box.upper)
    best_value = np.empty(start.shape[0])
    done = np.zeros(start.shape[0], dtype=bool)
    rows = np.arange(start.shape[0])
    theta = best.T.copy()
    value, g, h = evaluate(theta.T, rows)
    best_value[:] = value
    damping = np.full(rows.size, DAMPING_START)
    lower, upper = box.lower[:, None], box.upper[:, None]
    for iteration in range(max_iterations):
        frozen = ((theta <= lower) & (g > 0)) | ((theta >= upper) & (g < 0))
        trial = np.clip(theta + _step(g, h, damping, frozen), lower, upper)
        move = trial - theta
        slope = -(g * move).sum(axis=0)
        predicted = slope - 0.5 * np.einsum("ir,ijr,jr->r", move, h, move)
        small = (slope <= RELATIVE_DECREASE * value) & ((damping <= TRUSTED_DAMPING) | (slope <= 0))
        finished = small | (damping >= DAMPING_MAX)
        hopeless = np.zeros_like(finished)
        if race and iteration >= RACE_ITERATIONS:
            hopeless = RACE_STEPS * np.maximum(slope, 0.0) < value - best_value.min()
        new_value, new_g, new_h = evaluate(trial.T, rows)
        better = new_value < value
        ratio = (value - new_value) / np.where(predicted > 0, predicted, np.inf)
        good = better & ((ratio > 0.5) | (predicted <= 0))
        theta = np.where(better, trial, theta)
        value = np.where(better, new_value, value)
        g = np.where(better, new_g, g)
        h = np.where(better, new_h, h)
        damping = np.where(good, np.maximum(damping / 8, DAMPING_MIN), np.where(better, damping, damping * 6))
        best[rows], best_value[rows] = theta.T, value
        done[rows] = finished
        keep = ~(finished | hopeless)
        if not keep.any():
            break
        if keep.sum() < 0.9 * keep.size:
            rows, theta, value, damping = rows[keep], theta[:, keep], value[keep], damping[keep]
            g, h = g[:, keep], h[:, :, keep]
    return best, best_value, done
