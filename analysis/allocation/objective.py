"""The objective of the parametric fit, for many fits at once.

Legend: R fits (starts or resamples), n points, 5 parameters in the order (a, b, e, alpha, beta) of

    log L = log(exp(a - alpha x) + exp(b - beta y) + exp(e)),   x, y, z: log N, log D, log L less their means.

Source of the form: Hoffmann et al., arXiv 2203.15556, appendix D.2 (log-sum-exp, Huber delta 1e-3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_PARAMETERS = 5
BLOCK_ELEMENTS = 16384  # rows are taken in blocks of about this many numbers, so that the temporaries stay in the cache


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Centred logs of one table. x, y, z: (n,); delta: Huber's, in units of log loss (inf: least squares)."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    delta: float


def log_surface(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Centred log loss of the surfaces theta (R, 5) at the points x, y (n,): (R, n)."""
    a, b, e, alpha, beta = (theta[:, k, None] for k in range(NUM_PARAMETERS))
    return np.logaddexp(np.logaddexp(a - alpha * x, b - beta * y), e)


def values(problem: Problem, weights: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Objective only: weights (R, n) or (1, n), theta (R, 5) -> (R,). The plain form of what `evaluate` computes."""
    residual = log_surface(theta, problem.x, problem.y) - problem.z
    psi = np.clip(residual, -problem.delta, problem.delta)
    return np.asarray((weights * psi * (residual - psi / 2)).sum(axis=1))


class Evaluator:
    """Objective, gradient and exact Hessian of `problem` under `weights`, block by block.

    weights: (R, n), one row of case weights per fit, or (1, n) shared by all fits.
    """

    def __init__(self, problem: Problem, weights: np.ndarray):
        x, y = problem.x, problem.y
        one = np.ones_like(x)
        self.problem, self.weights = problem, weights
        self.features_x = np.stack([one, x, x * x], axis=1)
        self.features_y = np.stack([one, y, y * y], axis=1)
        self.features_xy = np.stack([one, x, y, x * y], axis=1)
        self.rows_per_block = max(1, BLOCK_ELEMENTS // x.size)

    def __call__(self, theta: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """theta (R', 5) for the fits `rows` (R',) -> value (R',), gradient (5, R'), Hessian (5, 5, R')."""
        num = theta.shape[0]
        value, gradient, hessian = np.empty(num), np.empty((NUM_PARAMETERS, num)), np.empty((NUM_PARAMETERS, NUM_PARAMETERS, num))
        shared = self.weights.shape[0] == 1
        for start in range(0, num, self.rows_per_block):
            block = slice(start, start + self.rows_per_block)
            w = self.weights if shared else self.weights[rows[block]]
            self._block(theta[block], w, value[block], gradient[:, block], hessian[:, :, block])
        return value, gradient, hessian

    def _block(self, theta: np.ndarray, w: np.ndarray, value: np.ndarray, g: np.ndarray, h: np.ndarray) -> None:
        """Write value, gradient and Hessian of one block. p_k: share of term k of the loss; sum p = 1.

        d log L / d(term k) = p_k and d2 = p_j (delta_jk - p_k), so with psi = Huber', q = Huber'':
        Hessian over terms = w (q - psi) p_j p_k + delta_jk w psi p_j, and the exponents enter by the factors -x, -y.
        """
        a, b, e, alpha, beta = (theta[:, k, None] for k in range(NUM_PARAMETERS))
        p1 = np.exp((a - e) - alpha * self.problem.x)
        p2 = np.exp((b - e) - beta * self.problem.y)
        total = p1 + p2
        total += 1.0
        p3 = np.reciprocal(total)
        p1 *= p3
        p2 *= p3
        residual = np.log(total, out=total)
        residual += e
        residual -= self.problem.z
        psi = np.clip(residual, -self.problem.delta, self.problem.delta)
        s = w * psi
        t = np.where(psi == residual, w, 0.0)
        t -= s
        psi *= -0.5
        psi += residual
        np.einsum("ij,ij->i", s, psi, out=value)

        tp1, tp2, tp3 = t * p1, t * p2, t * p3
        sp1 = s * p1
        sp2 = np.multiply(s, p2, out=psi)
        s *= p3
        g1, g2 = sp1 @ self.features_x[:, :2], sp2 @ self.features_y[:, :2]
        g[0], g[1], g[2], g[3], g[4] = g1[:, 0], g2[:, 0], s.sum(axis=1), -g1[:, 1], -g2[:, 1]
        m12 = (tp1 * p2) @ self.features_xy
        m13 = (tp1 * p3) @ self.features_x[:, :2]
        m23 = (tp2 * p3) @ self.features_y[:, :2]
        tp1 *= p1
        tp1 += sp1
        m11 = tp1 @ self.features_x
        tp2 *= p2
        tp2 += sp2
        m22 = tp2 @ self.features_y
        tp3 *= p3
        tp3 += s
        h[0, 0], h[0, 3], h[3, 3] = m11[:, 0], -m11[:, 1], m11[:, 2]
        h[1, 1], h[1, 4], h[4, 4] = m22[:, 0], -m22[:, 1], m22[:, 2]
        h[0, 1], h[1, 3], h[0, 4], h[3, 4] = m12[:, 0], -m12[:, 1], -m12[:, 2], m12[:, 3]
        h[0, 2], h[2, 3] = m13[:, 0], -m13[:, 1]
        h[1, 2], h[2, 4] = m23[:, 0], -m23[:, 1]
        h[2, 2] = tp3.sum(axis=1)
        for i, j in ((0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)):
            h[j, i] = h[i, j]
