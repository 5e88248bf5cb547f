"""The parametric loss surface L(N, D) = E + A / N^alpha + B / D^beta.

Fitted in log space: Huber's function of log L_hat - log L, with the three terms joined by a log-sum-exp (Hoffmann et al.,
arXiv 2203.15556, D.2). N: scaling parameters, D: training tokens, L: loss in nats or bits, C: training FLOPs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from analysis.allocation.objective import NUM_PARAMETERS, Problem, log_surface
from analysis.allocation.starts import FLOOR_E, search
from analysis.allocation.tools import as_columns, jsonable
from analysis.errors import DataError
from analysis.words import plural

Status = Literal["converged", "at_bound", "not_identifiable", "too_few"]
HUBER_DELTA = 1e-3  # Hoffmann et al., D.2; far below the usual noise of 0.3-1%, so nearly a sum of absolute values
NOISE_DELTA_FACTOR = 1.345  # Huber's 95% efficiency under normal noise
MAX_PLAUSIBLE_EXPONENT = 5.0  # published exponents lie in 0.2-0.8; beyond 5 a term only separates neighbouring sizes
NEGLIGIBLE_SHARE = 1e-6  # of the mean loss: a term this small is zero as far as the table can tell
Z90 = 1.6448536269514722
NAMES = ("log_A", "log_B", "log_E", "alpha", "beta")


@dataclass(frozen=True, kw_only=True)
class FlopsRule:
    """C = coefficient * N^exponent * D: how the FLOPs of these models depend on N as counted. 6 N D is only one rule."""

    coefficient: float = 6.0
    exponent: float = 1.0

    def flops(self, N: Any, D: Any) -> Any:
        return self.coefficient * np.asarray(N) ** self.exponent * np.asarray(D)

    def tokens(self, N: Any, C: Any) -> Any:
        return np.asarray(C) / (self.coefficient * np.asarray(N) ** self.exponent)

    def as_dict(self) -> dict[str, Any]:
        return {"form": "C = k N^u D", "k": self.coefficient, "u": self.exponent}


def fit_flops_rule(N: np.ndarray, D: np.ndarray, C: np.ndarray | None) -> FlopsRule:
    """Regress log(C/D) on log N. Without C, or with fewer than three sizes: 6 N D, or its median multiple."""
    if C is None:
        return FlopsRule()
    ok = np.isfinite(C) & (C > 0)
    if ok.sum() == 0:
        return FlopsRule()
    x, y = np.log(N[ok]), np.log(C[ok] / D[ok])
    if np.unique(np.round(x, 9)).size < 3:
        return FlopsRule(coefficient=float(np.exp(np.median(y - x))))
    slope, intercept = np.polyfit(x - x.mean(), y, 1)
    return FlopsRule(coefficient=float(np.exp(intercept - slope * x.mean())), exponent=float(slope))


@dataclass(frozen=True, kw_only=True)
class ParametricFit:
    """One fitted surface. NaN parameters where status is too_few. `se`: asymptotic (sandwich) standard errors."""

    log_A: float
    log_B: float
    log_E: float
    alpha: float
    beta: float
    objective_log: float  # sum of weighted Huber terms, natural logs
    delta: float
    n: int
    status: Status
    message: str
    residual_sd: float  # robust, of log L, corrected for the five parameters
    rmse: float  # of log L
    se: dict[str, float] = field(default_factory=dict)
    center: tuple[float, float, float] = (0.0, 0.0, 0.0)  # means of log N, log D, log L
    minima: np.ndarray = field(default_factory=lambda: np.empty((0, NUM_PARAMETERS)), repr=False, compare=False)
    minima_values: tuple[float, ...] = ()  # objectives of the distinct local minima found, best first; their parameters above

    @property
    def other_minima(self) -> int:
        """Distinct local minima within 1% of the best objective."""
        return sum(v < self.objective_log * 1.01 for v in self.minima_values[1:])

    @property
    def A(self) -> float:
        return _exp(self.log_A)

    @property
    def B(self) -> float:
        return _exp(self.log_B)

    @property
    def E(self) -> float:
        return _exp(self.log_E)

    @property
    def a(self) -> float:
        """Exponent of N*(C) where C is proportional to N D."""
        total = self.alpha + self.beta
        return self.beta / total if total > 0 else math.nan

    @property
    def ok(self) -> bool:
        return self.status == "converged"

    @property
    def theta(self) -> np.ndarray:
        """(5,): log A, log B, log E, alpha, beta in raw units."""
        return np.array([self.log_A, self.log_B, self.log_E, self.alpha, self.beta])

    @property
    def centred(self) -> np.ndarray:
        """(5,): a, b, e, alpha, beta in centred logs, as the optimizer knows them."""
        return centre(self.theta[None], self.center)[0]

    def loss(self, N: Any, D: Any) -> np.ndarray:
        """Expected loss at N, D (broadcast)."""
        return surface_loss(self.theta[None], N, D)[0]

    def optimum(self, C: Any, rule: FlopsRule | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compute-optimal N*, D*, L* at C FLOPs."""
        n, d, l = surface_optimum(self.theta[None], C, rule or FlopsRule())
        return n[0], d[0], l[0]

    def as_dict(self) -> dict[str, Any]:
        keys = ("E", "A", "B", "alpha", "beta", "a", "log_A", "log_B", "log_E", "objective_log", "delta", "n", "status", "message")
        values = {k: getattr(self, k) for k in (*keys, "residual_sd", "rmse", "se", "other_minima")}
        return jsonable({"form": "L = E + A/N^alpha + B/D^beta", **values})


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def centre(theta: np.ndarray, center: tuple[float, float, float]) -> np.ndarray:
    """Raw (R, 5) -> centred (R, 5)."""
    x, y, z = center
    out = np.array(theta, dtype=float)
    out[:, 0] -= z + out[:, 3] * x
    out[:, 1] -= z + out[:, 4] * y
    out[:, 2] -= z
    return out


def uncentre(theta: np.ndarray, center: tuple[float, float, float]) -> np.ndarray:
    """Centred (R, 5) -> raw (R, 5)."""
    x, y, z = center
    out = np.array(theta, dtype=float)
    out[:, 0] += z + out[:, 3] * x
    out[:, 1] += z + out[:, 4] * y
    out[:, 2] += z
    return out


def surface_loss(theta: np.ndarray, N: Any, D: Any) -> np.ndarray:
    """Loss of the raw surfaces theta (R, 5) at N, D (m,) or scalars: (R, m)."""
    n, d = np.broadcast_arrays(np.log(np.asarray(N, dtype=float)), np.log(np.asarray(D, dtype=float)))
    return np.exp(log_surface(theta, np.atleast_1d(n), np.atleast_1d(d)))


def surface_optimum(theta: np.ndarray, C: Any, rule: FlopsRule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N*, D*, L* of raw surfaces (R, 5) at C (m,): each (R, m).

    With C = k N^u D, setting the derivative along constant C to zero gives alpha A N^-alpha = u beta B D^-beta. A surface with
    a zero exponent has no optimum: NaN.
    """
    c = np.log(np.atleast_1d(np.asarray(C, dtype=float)) / rule.coefficient)
    log_a, log_b, _, alpha, beta = (theta[:, k, None] for k in range(NUM_PARAMETERS))
    u = rule.exponent
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        constant = np.log(alpha) + log_a - np.log(u * beta) - log_b
        log_n = (constant + beta * c) / (alpha + u * beta)
        log_d = c - u * log_n
        log_n, log_d = np.where(np.isfinite(log_n), log_n, np.nan), np.where(np.isfinite(log_d), log_d, np.nan)
        best = np.exp(log_a - alpha * log_n) + np.exp(log_b - beta * log_d) + np.exp(theta[:, 2, None])
        return np.exp(log_n), np.exp(log_d), best


def make_problem(N: np.ndarray, D: np.ndarray, L: np.ndarray, delta: float) -> tuple[Problem, tuple[float, float, float]]:
    """Centred logs of a clean table (n,), and the means taken off."""
    logs = [np.log(v) for v in (N, D, L)]
    center = (float(logs[0].mean()), float(logs[1].mean()), float(logs[2].mean()))
    x, y, z = (v - m for v, m in zip(logs, center, strict=True))
    return Problem(x=x, y=y, z=z, delta=delta), center


def robust_sd(residual: np.ndarray, num_parameters: int) -> float:
    """1.4826 times the median absolute residual, with the usual correction for fitted parameters."""
    n = residual.size
    if n <= num_parameters:
        return math.nan
    return float(1.4826 * np.median(np.abs(residual)) * math.sqrt(n / (n - num_parameters)))


def fit_parametric(
    N: Any, D: Any, L: Any, *, weights: Any = None, delta: float = HUBER_DELTA, thorough: bool = True
) -> ParametricFit:
    """Fit the surface to runs N, D, L (n,); `weights` (n,) multiply the terms of the objective (default 1).

    delta: Huber's, in log loss; math.inf gives log-least-squares. DataError for values that are not positive and finite; fewer
    than five points give status too_few with NaN parameters (a table that small is described, not fitted).
    """
    n_, d_, l_ = as_columns(N=N, D=D, L=L)
    w = np.ones_like(n_) if weights is None else np.asarray(weights, dtype=float)
    if w.shape != n_.shape or not np.isfinite(w).all() or (w < 0).any():
        raise DataError("weights: give one finite number >= 0 for each run")
    if not delta > 0:
        raise DataError(f"delta {delta}: Huber's delta must be > 0")
    if n_.size < NUM_PARAMETERS:
        return _too_few(n_.size, delta)
    problem, center = make_problem(n_, d_, l_, delta)
    theta, value = search(problem, w, thorough=thorough)
    fit = describe(problem, w, theta[0], float(value[0]), center)
    return replace(fit, minima=theta, minima_values=tuple(float(v) for v in value))


def describe(
    problem: Problem, weights: np.ndarray, theta: np.ndarray, value: float, center: tuple[float, float, float]
) -> ParametricFit:
    """The fit at a minimum theta (5,) in centred logs: residuals, standard errors, status."""
    residual = log_surface(theta[None], problem.x, problem.y)[0] - problem.z
    used = residual[weights > 0]
    sd = robust_sd(used, NUM_PARAMETERS)
    covariance = _covariance(problem, weights, theta, residual, sd, center)
    se = {name: math.sqrt(v) if v >= 0 else math.nan for name, v in zip(NAMES, np.diag(covariance), strict=True)}
    status, message = _status(problem, theta, se, used.size)
    raw = uncentre(theta[None], center)[0]
    return ParametricFit(
        log_A=float(raw[0]),
        log_B=float(raw[1]),
        log_E=float(raw[2]),
        alpha=float(raw[3]),
        beta=float(raw[4]),
        objective_log=value,
        delta=problem.delta,
        n=int(used.size),
        status=status,
        message=message,
        residual_sd=sd,
        rmse=float(np.sqrt(np.mean(used**2))),
        se=se,
        center=center,
    )


def _covariance(
    problem: Problem, weights: np.ndarray, theta: np.ndarray, residual: np.ndarray, sd: float, center: tuple[float, float, float]
) -> np.ndarray:
    """Sandwich covariance (5, 5) of log A, log B, log E, alpha, beta in raw units.

    Huber's second derivative is 1 on |r| <= delta only; where delta is below the noise, its expectation is estimated with a
    kernel of half the noise (Powell's estimator for quantile regression). Infinite where the points do not determine the
    parameters.
    """
    a, b, e, alpha, beta = theta
    total = log_surface(theta[None], problem.x, problem.y)[0]
    p1, p2, p3 = np.exp(a - alpha * problem.x - total), np.exp(b - beta * problem.y - total), np.exp(e - total)
    mean_x, mean_y, _ = center
    # Columns for the raw parameters: log A = a + alpha * mean_x + mean_z, so d/d alpha at fixed log A is -p1 (x + mean_x).
    jacobian = np.stack([p1, p2, p3, -p1 * (problem.x + mean_x), -p2 * (problem.y + mean_y)], axis=1)
    window = max(problem.delta, 0.5 * sd) if math.isfinite(sd) else problem.delta
    density = weights * (np.abs(residual) <= window) * (min(1.0, problem.delta / window) if math.isfinite(window) else 1.0)
    psi = np.clip(residual, -problem.delta, problem.delta)
    scale = np.sqrt((density[:, None] * jacobian**2).sum(axis=0))
    unknown = np.full((NUM_PARAMETERS, NUM_PARAMETERS), np.inf)
    if (scale <= 0).any() or residual.size <= NUM_PARAMETERS:
        return unknown
    unit = jacobian / scale
    bread = (unit * density[:, None]).T @ unit
    if np.linalg.cond(bread) > 1e14:
        return unknown
    inverse = np.linalg.inv(bread)
    meat = (unit * (weights * psi)[:, None]).T @ (unit * (weights * psi)[:, None])
    correction = residual.size / (residual.size - NUM_PARAMETERS)
    return np.asarray(correction * inverse @ meat @ inverse / np.outer(scale, scale))


def _status(problem: Problem, theta: np.ndarray, se: dict[str, float], n: int) -> tuple[Status, str]:
    a, b, e, alpha, beta = theta
    share = {"A/N^alpha": a - alpha * problem.x, "B/D^beta": b - beta * problem.y, "E": np.array([max(e, FLOOR_E)])}
    for name, log_term in share.items():
        if np.exp(log_term - np.mean(problem.z)).max() < NEGLIGIBLE_SHARE:
            return "at_bound", f"{name} vanishes at the best fit: the runs do not show this term; widen the range of N and D"
    for name, value in (("alpha", alpha), ("beta", beta)):
        if value > MAX_PLAUSIBLE_EXPONENT or value <= 1e-4:
            return "at_bound", f"{name} = {value:.3g} is outside (0, {MAX_PLAUSIBLE_EXPONENT:g}]: add sizes, horizons or seeds"
    if n <= NUM_PARAMETERS:
        return "not_identifiable", f"{n} runs pass exactly through {NUM_PARAMETERS} parameters: nothing is left to judge the fit"
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not value - Z90 * se[name] > 0:
            sd = f"{se[name]:.2g}" if math.isfinite(se[name]) else "infinite"
            return "not_identifiable", (
                f"{name} = {value:.3g} with standard error {sd}: its 90% interval includes 0; vary N and D apart from each other"
            )
    return "converged", ""


def _too_few(n: int, delta: float) -> ParametricFit:
    nan = math.nan
    return ParametricFit(
        log_A=nan,
        log_B=nan,
        log_E=nan,
        alpha=nan,
        beta=nan,
        objective_log=nan,
        delta=delta,
        n=n,
        status="too_few",
        message=f"{plural(n, 'run')} for {NUM_PARAMETERS} parameters: at least {NUM_PARAMETERS + 1} are needed",
        residual_sd=nan,
        rmse=nan,
    )


def noise_delta(fit: ParametricFit) -> float:
    """Huber's delta on the scale of the noise: 1.345 robust standard deviations of the residuals, never below 1e-3."""
    return max(NOISE_DELTA_FACTOR * fit.residual_sd, HUBER_DELTA) if math.isfinite(fit.residual_sd) else HUBER_DELTA


def fit_variants(N: Any, D: Any, L: Any, *, weights: Any = None) -> dict[str, ParametricFit]:
    """The same surface under three losses: `log` (delta 1e-3), `noise_scaled` (delta from the residuals), log least squares.

    delta = 1e-3 is nearly an absolute-value loss when residuals are near 0.7%; where the three disagree, the answer hangs on a
    few runs.
    """
    log = fit_parametric(N, D, L, weights=weights)
    return {
        "log": log,
        "noise_scaled": fit_parametric(N, D, L, weights=weights, delta=noise_delta(log)),
        "log_least_squares": fit_parametric(N, D, L, weights=weights, delta=math.inf),
    }
