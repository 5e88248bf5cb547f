"""Weighted power laws through the optima of cells, with edge cells as intervals (interval-censored regression).

Model: log y = c + Σ e·log(x/x0) + u + ε, ε ~ N(0, s²) the optimum's own standard error, u ~ N(0, τ²) the scatter of optima about
the law (REML). An optimum that is only known to lie in (lo, hi) enters with the probability of that interval.
Letters: n points, p coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize, special, stats

from analysis.law import Law, Status, unit_coefficient
from analysis.words import plural

SAME_VALUE = math.log(1.1)  # a symbol whose range is under 10% does not vary
MIN_RANGE = math.log(1.4)  # and over less than this its exponent is noise: the published one is kept
UNTOLD = 1.0  # half width of an exponent's 90% interval beyond which the published one is the better bet
COLLINEAR = 0.98  # correlation of two predictors beyond which their exponents are not told apart


@dataclass(frozen=True, kw_only=True)
class Points:
    """Optima as logarithms: `symbols[name]` (n,) logs of the predictors, `value`, `se` (n,) NaN where unknown, `low`, `high` (n,)
    bounds for the censored ones; `interior` (n,) bool."""

    symbols: dict[str, np.ndarray]
    value: np.ndarray
    se: np.ndarray
    low: np.ndarray
    high: np.ndarray
    interior: np.ndarray
    df_se: float = 0.0  # degrees of freedom behind `se`

    @property
    def bounded(self) -> np.ndarray:
        """(n,) optima that are not interior but bounded on a side."""
        return ~self.interior & (np.isfinite(self.low) | np.isfinite(self.high))


@dataclass(frozen=True, kw_only=True)
class LineFit:
    """Coefficients (p,), their covariance, scatter τ, degrees of freedom."""

    beta: np.ndarray
    covariance: np.ndarray
    tau: float
    df: float


def fit_line(design: np.ndarray, y: np.ndarray, se: np.ndarray) -> LineFit:
    """Random-effects least squares. Without standard errors this is ordinary least squares.

    τ² maximises the restricted likelihood; the covariance carries the factor max(1, RSS_w/(n − p)) (Knapp and Hartung, not let
    below 1), to be used with t on n − p. n must be at least p; with n = p there is no residual and df is 0.
    """
    n, p = design.shape
    s2 = np.where(np.isfinite(se), se, np.nanmedian(se) if np.isfinite(se).any() else 0.0) ** 2

    def weighted(tau2: float) -> tuple[np.ndarray, np.ndarray, float, float]:
        w = 1.0 / np.maximum(s2 + tau2, 1e-300)
        xtwx = design.T @ (design * w[:, None])
        beta = np.linalg.solve(xtwx, design.T @ (w * y))
        rss = float(w @ (y - design @ beta) ** 2)
        criterion = 0.5 * (rss - np.log(w).sum() + np.linalg.slogdet(xtwx)[1])
        return beta, np.linalg.inv(xtwx), rss, float(criterion)

    plain = np.linalg.lstsq(design, y, rcond=None)[0]
    mean_square = float(((y - design @ plain) ** 2).sum() / (n - p)) if n > p else 0.0
    if n == p or mean_square < 1e-24:
        tau2 = 0.0 if (s2 > 0).all() else 1e-30
        beta, inverse, _, _ = weighted(tau2)
        return LineFit(beta=beta, covariance=inverse if (s2 > 0).all() else np.zeros((p, p)), tau=0.0, df=float(n - p))
    if not (s2 > 0).any():
        tau2 = mean_square
    else:
        scale = max(mean_square, float(s2.max()))
        found = optimize.minimize_scalar(
            lambda t: weighted(math.exp(t))[3], bounds=(math.log(scale * 1e-8), math.log(scale * 1e2)), method="bounded"
        )
        tau2 = math.exp(found.x)
        if (s2 > 0).all() and weighted(0.0)[3] <= found.fun:
            tau2 = 0.0
    beta, inverse, rss, _ = weighted(tau2)
    return LineFit(beta=beta, covariance=inverse * max(1.0, rss / (n - p)), tau=math.sqrt(tau2), df=float(n - p))


def fit_censored(design: np.ndarray, points: Points, start: LineFit) -> LineFit:
    """Maximum likelihood of the coefficients with the bounded optima as intervals; τ and df are those of the interior fit.

    −log ℓ = Σ_interior (y − xβ)²/2(s² + τ²) − Σ_bounded log[Φ((hi − xβ)/τ') − Φ((lo − xβ)/τ')], τ'² = τ² + median s².
    """
    se = np.where(np.isfinite(points.se), points.se, np.nanmedian(points.se) if np.isfinite(points.se).any() else 0.0)
    middle = float(np.median(se[points.interior] ** 2))
    width = math.sqrt(max(start.tau**2 + middle, 1e-8))
    variance = np.maximum(se**2 + start.tau**2, 1e-12)
    inside, outside = points.interior, points.bounded

    def loss(beta: np.ndarray) -> float:
        line = design @ beta
        squares = 0.5 * (((points.value - line) ** 2 / variance)[inside]).sum()
        upper, lower = (points.high - line)[outside] / width, (points.low - line)[outside] / width
        return float(squares - _log_probability(lower, upper).sum())

    fatol = 1e-12 * (1.0 + abs(loss(start.beta)))  # relative: below the rounding of a large sum the search would never end
    found = optimize.minimize(loss, start.beta, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": fatol, "maxiter": 20000})
    hessian = _hessian(loss, found.x, np.sqrt(np.maximum(np.diag(start.covariance), 1e-12)))
    covariance = np.linalg.pinv(hessian)
    ratio = float(np.trace(start.covariance @ _information(design[inside], variance[inside])) / len(found.x))
    return LineFit(beta=found.x, covariance=covariance * max(1.0, ratio), tau=start.tau, df=start.df)


def _information(design: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Fisher information of the coefficients, (p, p)."""
    return design.T @ (design / variance[:, None])


def _log_probability(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """log[Φ(upper) − Φ(lower)] without cancellation: the interval is mirrored into the left tail."""
    swap = lower > 0
    a, b = np.where(swap, -upper, lower), np.where(swap, -lower, upper)
    log_b, log_a = special.log_ndtr(b), special.log_ndtr(a)
    return log_b + np.log1p(-np.exp(np.minimum(log_a - log_b, -1e-15)))


def _hessian(function: Any, at: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Central differences, (p, p)."""
    p = len(at)
    h = np.maximum(step * 0.05, 1e-6)
    out = np.zeros((p, p))
    for i in range(p):
        for j in range(i, p):
            di, dj = np.eye(p)[i] * h[i], np.eye(p)[j] * h[j]
            value = function(at + di + dj) - function(at + di - dj) - function(at - di + dj) + function(at - di - dj)
            out[i, j] = out[j, i] = value / (4 * h[i] * h[j])
    return out


def fit_power_law(
    points: Points,
    *,
    name: str,
    target: str,
    symbols: Sequence[str],
    assumed: Mapping[str, float],
    method: str,
    source_hash: str,
    cells: Sequence[dict[str, Any]] = (),
    level: float = 0.9,
) -> Law:
    """Law of `target` in `symbols` through the interior optima, edge cells as intervals.

    An exponent is fitted when its symbol varies, there are more points than coefficients, and its interval is within ±1;
    otherwise the `assumed` (published) one is kept, only the constant is fitted, and the status says so. Statuses: too_few
    (points), not_identifiable (a symbol that does not vary, two that move together, an exponent that stays open), at_bound (most
    cells at an edge), converged.
    """
    usable = points.interior | points.bounded
    form = f"{target} = k · " + " · ".join(f"{s}^e_{s}" for s in symbols)
    empty = Law(
        name=name, target=target, form=form, method=method, source_hash=source_hash, cells=tuple(cells), level=level,
        coefficient=None,
    )  # fmt: skip
    n = int(points.interior.sum())
    if n == 0:
        status: Status = "at_bound" if points.bounded.any() else "too_few"
        words = f"no optimum inside the grid in {plural(len(points.value), 'cell')}" if len(points.value) else "no cell varies it"
        return replace(empty, status=status, message=words, n=0)
    references = {s: float(np.exp(points.symbols[s][points.interior].mean())) for s in symbols}
    centred = {s: points.symbols[s] - math.log(references[s]) for s in symbols}
    free, status, doubts = _choose_free(centred, points, symbols)
    design, shifted, line = _solve(points, centred, free, assumed)
    loose = _loose(line, free)
    if loose:
        status, free = "not_identifiable", [s for s in free if s not in loose]
        doubts += [
            f"these cells leave the exponent of {s} anywhere in {value:.2g} ± {half:.2g}" for s, (value, half) in loose.items()
        ]
        design, shifted, line = _solve(points, centred, free, assumed)
    held = [s for s in symbols if s not in free]
    exponents = {s: float(line.beta[1 + free.index(s)]) if s in free else float(assumed.get(s, 0.0)) for s in symbols}
    tests: dict[str, Any] = {}
    if status == "too_few" and len(symbols) == 1 and n == 2:
        x, y = centred[symbols[0]][points.interior], points.value[points.interior]
        tests["two_point_exponent"] = float(np.diff(y)[0] / np.diff(x)[0]) if np.ptp(x) > 0 else None
    if points.bounded.any():
        alone = fit_line(design[points.interior], shifted.value[points.interior], points.se[points.interior])
        tests["without_edge_cells"] = {"exponents": {s: float(alone.beta[1 + i]) for i, s in enumerate(free)}, "n": n}
    if status != "too_few" and n < len(points.value) / 2:
        at_edge = int(points.bounded.sum())
        status = "at_bound" if at_edge >= len(points.value) - n - at_edge else "not_identifiable"
        doubts.append(
            f"only {n} of {plural(len(points.value), 'cell')} with an optimum inside the grid that stands out of the noise"
        )
    if held:
        doubts.append("exponent of " + ", ".join(f"{s} kept at {assumed.get(s, 0.0):g} (published)" for s in held))
    coefficient = math.exp(float(line.beta[0]))
    law = replace(
        empty,
        coefficient=coefficient, exponents=exponents, references=references, free=tuple(free), n=n, status=status,
        domain={s: log_range(points.symbols[s][usable]) for s in symbols},
        message="; ".join(doubts), tests=tests,
    )  # fmt: skip
    return _with_intervals(law, line, points)


def _solve(
    points: Points, centred: Mapping[str, np.ndarray], free: Sequence[str], assumed: Mapping[str, float]
) -> tuple[np.ndarray, Points, LineFit]:
    """Design (n, p), the points less what the held exponents explain, and the fit of the free ones."""
    held = (assumed.get(s, 0.0) * x for s, x in centred.items() if s not in free)
    design = np.column_stack([np.ones(len(points.value)), *(centred[s] for s in free)])
    shifted = _shift(points, sum(held, np.zeros(len(points.value))))
    return design, shifted, _fit(design, shifted)


def _loose(line: LineFit, free: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Exponents whose 90% interval is wider than ±1, with value and half width: they are not told by these cells."""
    if not (free and line.df > 0):
        return {}
    half = float(stats.t.ppf(0.95, line.df)) * np.sqrt(np.diag(line.covariance))[1:]
    return {s: (float(line.beta[1 + i]), float(half[i])) for i, s in enumerate(free) if half[i] > UNTOLD}


def log_range(logs: np.ndarray) -> tuple[float, float]:
    """Range of the values themselves."""
    return float(np.exp(logs.min())), float(np.exp(logs.max()))


def _choose_free(centred: Mapping[str, np.ndarray], points: Points, symbols: Sequence[str]) -> tuple[list[str], Status, list[str]]:
    """Which exponents the interior optima can tell, and what is in doubt."""
    inside = {s: centred[s][points.interior] for s in symbols}
    varying = [s for s in symbols if np.ptp(inside[s]) > MIN_RANGE]
    status: Status = "converged"
    doubts = []
    n = int(points.interior.sum())
    if len(varying) < len(symbols):
        still = [s for s in symbols if s not in varying]
        status, doubts = "not_identifiable", [f"{', '.join(still)} hardly varies over the cells"]
    if len(varying) == 2 and n > 2:
        r = float(np.corrcoef(inside[varying[0]], inside[varying[1]])[0, 1])
        if abs(r) > COLLINEAR:
            status, doubts = "not_identifiable", [f"{varying[0]} and {varying[1]} move together (correlation {r:.4f})"]
            varying = varying[1:]
    distinct = len(np.unique(np.round(np.column_stack([inside[s] for s in symbols]), 3), axis=0))
    if n < 3 or distinct < len(varying) + 2:
        return (
            [],
            "too_few",
            [
                f"{plural(distinct, 'distinct cell')} {'has' if distinct == 1 else 'have'} an optimum inside the grid, and "
                f"{plural(len(symbols), 'exponent')} {'needs' if len(symbols) == 1 else 'need'} {max(3, len(symbols) + 2)}"
            ],
        )
    return varying, status, doubts


def _shift(points: Points, offset: np.ndarray) -> Points:
    return Points(
        symbols=points.symbols, value=points.value - offset, se=points.se, low=points.low - offset, high=points.high - offset,
        interior=points.interior, df_se=points.df_se,
    )  # fmt: skip


def _fit(design: np.ndarray, points: Points) -> LineFit:
    inside = points.interior
    line = fit_line(design[inside], points.value[inside], points.se[inside])
    if points.bounded.any() and line.df > 0:
        return fit_censored(design, points, line)
    return line


def _with_intervals(law: Law, line: LineFit, points: Points) -> Law:
    """Parameters, standard errors and intervals; with no spare point the optimum's own error is all there is."""
    assert law.coefficient is not None
    df = line.df if line.df > 0 else points.df_se
    known = df > 0 and bool((np.diag(line.covariance) > 0).all())
    q = float(stats.t.ppf((1 + law.level) / 2, df)) if known else float("nan")
    k = unit_coefficient(law.coefficient, law.exponents, law.references)
    gradient = np.array([1.0, *(-math.log(law.references[s]) for s in law.free)])
    log_k_se = float(np.sqrt(gradient @ line.covariance @ gradient)) if known else float("nan")
    parameters, errors = {"k": k}, {"k": k * log_k_se if known else None}
    intervals: dict[str, tuple[float, float] | None] = {"k": None}
    if known and q * log_k_se < 700:
        intervals["k"] = (k * math.exp(-q * log_k_se), k * math.exp(q * log_k_se))
    for symbol, exponent in law.exponents.items():
        parameters[symbol] = exponent
        if symbol in law.free and known:
            se = float(np.sqrt(line.covariance[1 + law.free.index(symbol), 1 + law.free.index(symbol)]))
            errors[symbol], intervals[symbol] = se, (exponent - q * se, exponent + q * se)
        else:
            errors[symbol], intervals[symbol] = None, None
    return replace(
        law, parameters=parameters, standard_errors=errors, intervals=intervals, df=df, residual_sd=line.tau,
        covariance=tuple(tuple(float(v) for v in row) for row in line.covariance) if known else None,
    )  # fmt: skip


def extra_symbol(points: Points, symbols: Sequence[str], extra: str) -> dict[str, Any] | None:
    """Is an `extra` term significant? Exponent, standard error, t, p of the larger fit; None when it cannot be told."""
    inside = points.interior
    if not inside.any():
        return None
    columns = [points.symbols[s][inside] for s in (*symbols, extra)]
    design = np.column_stack([np.ones(int(inside.sum())), *(c - c.mean() for c in columns)])
    n, p = design.shape
    if n < p + 1 or np.ptp(columns[-1]) <= SAME_VALUE or np.linalg.matrix_rank(design, tol=1e-6) < p:
        return None
    line = fit_line(design, points.value[inside], points.se[inside])
    se = float(np.sqrt(line.covariance[-1, -1]))
    t = float(line.beta[-1] / se) if se > 0 else float("inf")
    p_value = float(2 * stats.t.sf(abs(t), line.df))
    exponents = {s: float(b) for s, b in zip((*symbols, extra), line.beta[1:], strict=True)}
    return {
        "exponents": exponents,
        "exponent": float(line.beta[-1]),
        "standard_error": se,
        "t": t,
        "p_value": p_value,
        "significant": p_value < 0.05,
        "n": n,
    }
