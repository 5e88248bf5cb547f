"""The frontier L*(C) = E + kappa C^-gamma through the lowest loss of each budget.

gamma is hardly determined by few budgets: five budgets over one decade leave E anywhere. A weak prior on log gamma keeps the fit
from running to E = 0 or to a flat line, and its width enters every interval; with many budgets the data outweigh it.
Legend: R draws, k budgets, G grid values of gamma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis.allocation.tools import as_columns, jsonable
from analysis.blas import single_blas_thread
from analysis.words import plural

# alpha beta / (alpha + beta) is 0.154 (arXiv 2203.15556), 0.178 (arXiv 2404.10102), 0.234 and 0.251 (Marin's two ladders).
PRIOR_GAMMA, PRIOR_LOG_SD = 0.18, 0.4
GAMMA_GRID = np.geomspace(0.005, 3.0, 160)
DEFAULT_SD = 0.003  # relative, of a budget's lowest loss, where nothing tells: seed noise of small models is 0.2-0.5%
NUM_DRAWS = 1000
FLAT = 1e-6  # a reducible loss below this share of E is none
MIN_BUDGETS = 3  # as many as parameters


@dataclass(frozen=True, kw_only=True)
class FrontierFit:
    """E + kappa C^-gamma. `draws` (R, 3): E, kappa0, gamma with L = E + kappa0 (C/C0)^-gamma, from a parametric bootstrap."""

    E: float
    kappa: float
    gamma: float
    C0: float
    kappa0: float  # kappa C0^-gamma: the reducible loss at C0
    n: int
    status: str
    message: str
    residual_sd: float  # of log L about the frontier
    point_sd: tuple[float, ...]  # the relative standard deviation each minimum entered with
    C_range: tuple[float, float]
    prior: tuple[float, float]
    draws: np.ndarray = field(repr=False)

    def loss(self, C: Any) -> np.ndarray:
        return np.asarray(self.E + self.kappa0 * (np.asarray(C, dtype=float) / self.C0) ** -self.gamma)

    def draw_losses(self, C: Any) -> np.ndarray:
        """Loss of every draw at C (m,): (R, m)."""
        c = np.atleast_1d(np.asarray(C, dtype=float)) / self.C0
        return np.asarray(self.draws[:, :1] + self.draws[:, 1:2] * c[None, :] ** -self.draws[:, 2:3])

    def as_dict(self) -> dict[str, Any]:
        keys = ("E", "kappa", "gamma", "C0", "kappa0", "n", "status", "message", "residual_sd", "point_sd", "C_range")
        prior = {"log_gamma_mean": math.log(self.prior[0]), "log_gamma_sd": self.prior[1]}
        intervals = {}
        if self.draws.size:
            for i, name in enumerate(("E", "kappa0", "gamma")):
                intervals[name] = np.quantile(self.draws[:, i], [0.05, 0.95])
        return jsonable(
            {"form": "L = E + kappa0 (C/C0)^-gamma", **{k: getattr(self, k) for k in keys}, "prior": prior, "intervals": intervals}
        )


def _profile(x: np.ndarray, loss: np.ndarray, sd: np.ndarray, gamma0: float, prior_sd: float) -> tuple[np.ndarray, np.ndarray]:
    """Penalised relative squared error of draws loss (R, k) on the gamma grid, with E >= 0 and kappa > 0 in closed form.

    x: log(C/C0) (k,). Returns the error (R, G) and the terms (R, G, 2).
    """
    w = 1.0 / (loss * sd) ** 2  # (R, k): relative errors
    basis = np.exp(-GAMMA_GRID[:, None] * x)  # (G, k)
    s1, sb, sbb = w.sum(1)[:, None], w @ basis.T, w @ (basis**2).T
    sl, sbl, sll = (w * loss).sum(1)[:, None], (w * loss) @ basis.T, (w * loss**2).sum(1)[:, None]
    det = s1 * sbb - sb * sb
    e = (sbb * sl - sb * sbl) / np.maximum(det, 1e-300)
    e = np.clip(e, 0.0, None)
    kappa = np.maximum((sbl - e * sb) / sbb, 0.0)
    e = np.where(kappa > 0, e, sl / s1)
    error = sll - 2 * e * sl - 2 * kappa * sbl + e * e * s1 + 2 * e * kappa * sb + kappa * kappa * sbb
    penalty = (np.log(GAMMA_GRID / gamma0) / prior_sd) ** 2
    return error + penalty, np.stack([np.broadcast_to(e, error.shape), kappa], axis=2)


def _minimise(x: np.ndarray, loss: np.ndarray, sd: np.ndarray, gamma0: float, prior_sd: float) -> np.ndarray:
    """(R, 3): E, kappa0, gamma of each draw; the grid's minimum refined by a parabola in log gamma."""
    error, terms = _profile(x, loss, sd, gamma0, prior_sd)
    best = np.clip(error.argmin(axis=1), 1, GAMMA_GRID.size - 2)
    rows = np.arange(loss.shape[0])
    left, mid, right = (error[rows, best + s] for s in (-1, 0, 1))
    curvature = left - 2 * mid + right
    step = np.where(curvature > 0, 0.5 * (left - right) / np.where(curvature > 0, curvature, 1.0), 0.0)
    step = np.clip(step, -1.0, 1.0)
    spacing = math.log(GAMMA_GRID[1] / GAMMA_GRID[0])
    gamma = GAMMA_GRID[best] * np.exp(step * spacing)
    other = best + np.where(step >= 0, 1, -1)
    share = np.abs(step)[:, None]
    mixed = (1 - share) * terms[rows, best] + share * terms[rows, other]
    return np.column_stack([mixed, gamma])


def _polish(x: np.ndarray, loss: np.ndarray, sd: np.ndarray, start: np.ndarray, gamma0: float, prior_sd: float) -> np.ndarray:
    """Gauss-Newton on (E, kappa0, log gamma) from the grid's answer, to double precision; E is held at 0 where it started there."""
    from scipy.optimize import least_squares

    def residual(theta: np.ndarray) -> np.ndarray:
        e, kappa, log_gamma = theta
        fit = e + kappa * np.exp(-math.exp(log_gamma) * x)
        return np.append((fit - loss) / (loss * sd), (log_gamma - math.log(gamma0)) / prior_sd)

    first = np.array([start[0], max(start[1], 1e-12), math.log(start[2])])
    low, high = np.array([0.0, 0.0, math.log(GAMMA_GRID[0])]), np.array([np.inf, np.inf, math.log(GAMMA_GRID[-1])])
    scale = np.array([loss.mean(), loss.mean(), 1.0])
    found = least_squares(
        residual, np.clip(first, low, high), bounds=(low, high), x_scale=scale, xtol=1e-15, ftol=1e-15, gtol=1e-15
    )
    return np.array([found.x[0], found.x[1], math.exp(found.x[2])])


@single_blas_thread
def fit_frontier(
    C: Any,
    L: Any,
    *,
    sd: Any = None,
    sd_df: int = 30,
    prior_gamma: float = PRIOR_GAMMA,
    prior_log_sd: float = PRIOR_LOG_SD,
    n_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> FrontierFit:
    """Fit through the budgets' minima. C: FLOPs (k,), L: lowest losses (k,), sd: their relative standard deviations (k,).

    sd_df: degrees of freedom behind `sd`. Fewer than three budgets give status too_few; three or four, or E at 0, are named in
    the message. The minima's scatter about the frontier widens `sd` where it is larger (never narrows it).
    """
    c_, l_ = as_columns(C=C, L=L)
    n = c_.size
    if n < MIN_BUDGETS or np.unique(np.round(np.log(c_), 6)).size < MIN_BUDGETS:
        return _too_few(n, prior_gamma, prior_log_sd)
    order = np.argsort(c_, kind="stable")
    c_, l_ = c_[order], l_[order]
    given = np.full(n, DEFAULT_SD) if sd is None else np.asarray(sd, dtype=float)[order]
    known = np.isfinite(given)
    given = np.where(known, given, np.median(given[known]) if known.any() else DEFAULT_SD)
    floor = 1e-9  # noiseless minima: a relative error far below any loss, so that weights stay finite
    point_sd = np.maximum(given, floor)
    c0 = float(np.exp(np.log(c_).mean()))
    x = np.log(c_ / c0)
    theta = _polish(x, l_, point_sd, _minimise(x, l_[None], point_sd, prior_gamma, prior_log_sd)[0], prior_gamma, prior_log_sd)
    fitted = theta[0] + theta[1] * np.exp(-theta[2] * x)
    residual = np.log(l_ / fitted)
    inflate = 1.0
    if n > MIN_BUDGETS:
        inflate = math.sqrt(max(1.0, float(((residual / point_sd) ** 2).sum()) / (n - MIN_BUDGETS)))
    rng = np.random.default_rng(seed)
    scale = np.sqrt(sd_df / rng.chisquare(sd_df, n_draws))[:, None] if sd_df > 0 else 1.0
    noise = rng.normal(size=(n_draws, n)) * point_sd * inflate * scale
    center = np.exp(rng.normal(size=n_draws) * prior_log_sd) * prior_gamma
    draws = _draws(x, fitted * np.exp(noise), point_sd * inflate, center, prior_log_sd)
    status, message = _judge(theta, n, c_)
    return FrontierFit(
        E=float(theta[0]),
        kappa=float(theta[1] * c0 ** theta[2]),
        gamma=float(theta[2]),
        C0=c0,
        kappa0=float(theta[1]),
        n=n,
        status=status,
        message=message,
        residual_sd=float(np.sqrt((residual**2).sum() / max(1, n - MIN_BUDGETS))),
        point_sd=tuple(float(v) for v in point_sd * inflate),
        C_range=(float(c_[0]), float(c_[-1])),
        prior=(prior_gamma, prior_log_sd),
        draws=draws,
    )


def _draws(x: np.ndarray, loss: np.ndarray, sd: np.ndarray, center: np.ndarray, prior_log_sd: float) -> np.ndarray:
    """Each draw has its own perturbed minima and its own prior centre (the randomised maximum-likelihood posterior sample)."""
    error, terms = _profile(x, loss, sd, 1.0, math.inf)
    error = error + (np.log(GAMMA_GRID[None] / center[:, None]) / prior_log_sd) ** 2
    best = error.argmin(axis=1)
    rows = np.arange(loss.shape[0])
    return np.column_stack([terms[rows, best], GAMMA_GRID[best]])


def _judge(theta: np.ndarray, n: int, c: np.ndarray) -> tuple[str, str]:
    decades = math.log10(c[-1] / c[0])
    if theta[1] <= FLAT * theta[0]:
        return "at_bound", "the lowest loss does not fall with compute: no frontier"
    if theta[0] <= 1e-6 * theta[1]:
        return "at_bound", "E = 0 at the best fit: the budgets do not show where the loss levels off"
    if n < 4:
        return "not_identifiable", f"{n} budgets fix three parameters and leave nothing to judge them by"
    if n < 5 or decades < 1.5:
        return (
            "converged",
            f"{n} budgets over {decades:.1f} decades: E and gamma lean on the prior (gamma 0.18, give or take a factor 1.5)",
        )
    return "converged", ""


def _too_few(n: int, prior_gamma: float, prior_log_sd: float) -> FrontierFit:
    nan = math.nan
    return FrontierFit(
        E=nan, kappa=nan, gamma=nan, C0=nan, kappa0=nan, n=n, status="too_few",
        message=f"{plural(n, 'budget')} with a minimum: the frontier has three parameters", residual_sd=nan, point_sd=(),
        C_range=(nan, nan), prior=(prior_gamma, prior_log_sd), draws=np.empty((0, 3)),
    )  # fmt: skip
