"""IsoFLOP parabolas: per budget a quadratic of the loss in log N, and a second one in log D (Approach 2, arXiv 2203.15556).

A cross-check of the surface, not a substitute: the vertex is biased where alpha != beta or where a grid sits off-centre, and its
variance is several times the surface's (arXiv 2603.22339). D* has its own parabola: it is never C / (6 N*).
Loss itself, not its logarithm, is the ordinate, as in the published exponents that this reproduces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from analysis.allocation.compute_law import ComputeLaw, fit_compute_law
from analysis.allocation.tools import as_columns, jsonable
from analysis.blas import single_blas_thread
from analysis.errors import DataError
from analysis.noise import SeedNoise
from analysis.words import plural

MIN_SIZES = 3  # different N in a budget
LOCAL_SPAN, LOCAL_MIN_RUNS = 4.0, 5  # the lowest loss is read from the runs within 4x of the vertex, if there are five
SAME_COMPUTE = 0.01  # runs whose FLOPs differ from their budget by more than 1% are moved onto it
MinimumStatus = Literal["interior", "edge", "flat", "too_few"]


@dataclass(frozen=True, kw_only=True)
class Parabola:
    """loss = c0 + c1 x + c2 x^2, x natural log of the size. `interval` of the vertex: Fieller's, in size; None if unbounded."""

    coefficients: tuple[float, float, float]
    vertex: float  # size at the minimum
    interval: tuple[float, float] | None
    minimum: float  # loss at the vertex
    minimum_sd: float  # standard deviation of that loss; NaN where nothing is left to judge it
    status: MinimumStatus
    side: Literal["low", "high"] | None  # where the optimum may lie beyond the grid

    def as_dict(self) -> dict[str, Any]:
        return jsonable({k: getattr(self, k) for k in self.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class BudgetMinimum:
    """One budget: C FLOPs, n runs, its parabolas in N and in D (None where D does not vary)."""

    C: float
    n: int
    N_range: tuple[float, float]
    in_N: Parabola | None
    in_D: Parabola | None
    message: str
    rows: tuple[int, ...]  # positions of its runs in the columns given

    @property
    def status(self) -> MinimumStatus:
        return self.in_N.status if self.in_N else "too_few"

    def as_dict(self) -> dict[str, Any]:
        n, d = self.in_N, self.in_D
        pair = (None, None)
        low, high = (n.interval or pair) if n else pair
        d_low, d_high = (d.interval or pair) if d else pair
        return jsonable(
            {
                "C": self.C, "n": self.n, "status": self.status, "message": self.message, "edge": n.side if n else None,
                "N_min": self.N_range[0], "N_max": self.N_range[1], "coefficients": n.coefficients if n else None,
                "coefficients_D": d.coefficients if d else None, "N_opt": n.vertex if n else None, "N_low": low, "N_high": high,
                "D_opt": d.vertex if d else None, "D_low": d_low, "D_high": d_high, "L_opt": n.minimum if n else None,
                "L_sd": n.minimum_sd if n else None, "rows": self.rows,
            }
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LowestLoss:
    """The loss at one budget's minimum, for the frontier. sd: relative, of that loss."""

    C: float
    N: float
    L: float
    sd: float
    n: int


@dataclass(frozen=True, kw_only=True)
class IsoflopFit:
    """All budgets, and N*(C), D*(C) fitted separately. `used`: which minima the laws rest on."""

    budgets: tuple[BudgetMinimum, ...]
    lowest: tuple[LowestLoss, ...]
    lowest_df: int  # degrees of freedom behind the sd of `lowest`
    N_law: ComputeLaw  # through every vertex inside its grid, as Approach 2 is published
    D_law: ComputeLaw
    N_interior: ComputeLaw  # without the budgets marked flat or edge
    D_interior: ComputeLaw
    used: str
    residual_sd: float  # pooled over budgets, relative to the loss
    status: str
    message: str

    def as_dict(self) -> dict[str, Any]:
        return jsonable(
            {
                "budgets": [b.as_dict() for b in self.budgets], "N": self.N_law, "D": self.D_law, "N_exponent": self.N_law.exponent,
                "D_exponent": self.D_law.exponent, "used": self.used, "residual_sd": self.residual_sd, "status": self.status,
                "message": self.message, "n": sum(b.n for b in self.budgets), "N_interior": self.N_interior,
                "D_interior": self.D_interior,
            }
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A least-squares quadratic before its error is known: x centred at `center`."""

    center: float
    beta: np.ndarray  # (3,)
    inverse: np.ndarray  # (3, 3) of X'X
    squares: float
    df: int
    low: float
    high: float


def _quadratic(size: np.ndarray, loss: np.ndarray) -> _Line | None:
    """Least squares; None with fewer than three different sizes (equal to 0.1%)."""
    x = np.log(size)
    if np.unique(np.round(x, 3)).size < MIN_SIZES:
        return None
    center = float(x.mean())
    u = x - center
    design = np.stack([np.ones_like(u), u, u * u], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    beta = np.linalg.lstsq(design, loss, rcond=None)[0]
    squares = float(((loss - design @ beta) ** 2).sum())
    return _Line(center=center, beta=beta, inverse=inverse, squares=squares, df=u.size - 3, low=float(x.min()), high=float(x.max()))


def _finish(line: _Line, sd: float, df: int, level: float) -> Parabola:
    """Vertex, Fieller interval, marks. sd: of one run's loss, df: its degrees of freedom; sd NaN: no interval is known."""
    b0, b1, b2 = line.beta
    t = float(stats.t.ppf((1 + level) / 2, df)) if df > 0 else math.nan
    curved = b2 > 0 and (not math.isfinite(sd) or b2 - t * sd * math.sqrt(line.inverse[2, 2]) > 0)
    vertex = -b1 / (2 * b2) if b2 != 0 else math.nan
    interval = _fieller(line, sd, t) if curved and math.isfinite(sd) else None
    at = np.array([1.0, vertex, vertex * vertex])
    minimum = float(line.beta @ at) if math.isfinite(vertex) else math.nan
    variance = sd * sd * float(at @ line.inverse @ at) if math.isfinite(vertex) else math.nan
    low, high = line.low - line.center, line.high - line.center
    status: MinimumStatus = "interior"
    side: Literal["low", "high"] | None = None
    if not curved:
        status = "flat"
    else:
        bounds = interval or (vertex, vertex)
        if bounds[0] < low or bounds[1] > high:
            status, side = "edge", "low" if low - bounds[0] > bounds[1] - high else "high"
    center = line.center
    return Parabola(
        coefficients=(float(b0 - b1 * center + b2 * center**2), float(b1 - 2 * b2 * center), float(b2)),
        vertex=_exp(center + vertex),
        interval=(_exp(center + interval[0]), _exp(center + interval[1])) if interval else None,
        minimum=minimum,
        minimum_sd=math.sqrt(variance) if math.isfinite(variance) else math.nan,
        status=status,
        side=side,
    )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _fieller(line: _Line, sd: float, t: float) -> tuple[float, float] | None:
    """{v : |b1 + 2 b2 v| <= t sd(b1 + 2 b2 v)}: exact under normal noise. None where it is not a bounded interval."""
    _, b1, b2 = line.beta
    v11, v12, v22 = (sd * sd * t * t * line.inverse[i, j] for i, j in ((1, 1), (1, 2), (2, 2)))
    a, half_b, c = 4 * (b2 * b2 - v22), 2 * (b1 * b2 - v12), b1 * b1 - v11
    root = half_b * half_b - a * c
    if a <= 0 or root < 0:
        return None
    return (-half_b - math.sqrt(root)) / a, (-half_b + math.sqrt(root)) / a


def move_to_budget(
    N: np.ndarray, D: np.ndarray, L: np.ndarray, budget: np.ndarray, C: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs whose compute differs from their budget, moved along the frontier: sizes by (budget/C)^(1/2), loss by its own slope.

    The slope d log L / d log C comes from the lowest loss of neighbouring budgets; a 10% difference in compute moves the loss by
    about 0.5%, as much as the noise.
    """
    ratio = budget / C
    if (np.abs(np.log(ratio)) <= SAME_COMPUTE).all():
        return N, D, L
    levels = np.unique(budget)
    if levels.size < 2:
        return N, D, L
    best = np.array([np.sort(L[budget == b])[: max(1, (budget == b).sum() // 4)].mean() for b in levels])
    slope = np.gradient(np.log(best), np.log(levels))
    shift = ratio ** slope[np.searchsorted(levels, budget)]
    return N * np.sqrt(ratio), D * np.sqrt(ratio), L * shift


@single_blas_thread
def fit_isoflop(
    N: Any, D: Any, L: Any, budget: Any, *, C: Any = None, noise: SeedNoise | None = None, level: float = 0.9
) -> IsoflopFit:
    """Parabolas per budget and the laws through their minima.

    N, D, L: (n,). budget: (n,) FLOPs of the group a run belongs to, NaN for none. C: the run's own FLOPs where they differ.
    noise: seed noise from replicates, used where the parabolas leave no residual to judge by.
    """
    n_, d_, l_ = as_columns(N=N, D=D, L=L)
    group = np.asarray(budget, dtype=float)
    if group.shape != n_.shape:
        raise DataError(f"budget has {group.size} values where N has {n_.size}: give one for each run, NaN for none")
    use = np.flatnonzero(np.isfinite(group) & (group > 0))
    sizes, tokens, loss = n_[use], d_[use], l_[use]
    if C is not None and use.size:
        c_ = np.asarray(C, dtype=float)[use]
        c_ = np.where(np.isfinite(c_) & (c_ > 0), c_, group[use])
        sizes, tokens, loss = move_to_budget(sizes, tokens, loss, group[use], c_)
    members = {float(c): np.flatnonzero(group[use] == c) for c in np.unique(group[use])}
    lines_n = {c: _quadratic(sizes[i], loss[i]) for c, i in members.items()}
    lines_d = {c: _quadratic(tokens[i], loss[i]) for c, i in members.items()}
    minima = []
    sd_n, df_n = _pooled(lines_n, members, loss, noise)
    sd_d, df_d = _pooled(lines_d, members, loss, noise)
    for c, i in members.items():
        scale = float(loss[i].mean())
        line_n, line_d = lines_n[c], lines_d[c]
        in_n = _finish(line_n, sd_n * scale, df_n, level) if line_n else None
        in_d = _finish(line_d, sd_d * scale, df_d, level) if line_d else None
        minima.append(
            BudgetMinimum(
                C=c,
                n=i.size,
                N_range=(float(sizes[i].min()), float(sizes[i].max())),
                in_N=in_n,
                in_D=in_d,
                message=_message(in_n, i.size),
                rows=tuple(int(r) for r in use[i]),
            )
        )
    lowest, df = _lowest(minima, sizes, loss, members, noise)
    return _laws(tuple(minima), lowest, df, sd_n, level)


def _lowest(
    minima: list[BudgetMinimum], sizes: np.ndarray, loss: np.ndarray, members: dict[float, np.ndarray], noise: SeedNoise | None
) -> tuple[tuple[LowestLoss, ...], int]:
    """Each budget's lowest loss from a second parabola over the runs within 4x of the vertex.

    Over a wide grid the true curve is no parabola and the vertex's loss is off by up to 0.5% (Marin's ladders, ±9x); the
    residuals of the near runs are also those that tell its error.
    """
    near: dict[float, np.ndarray] = {}
    for budget in minima:
        parabola = budget.in_N
        if parabola is None or parabola.coefficients[2] <= 0:
            continue
        rows = members[budget.C]
        low, high = budget.N_range
        vertex = min(max(parabola.vertex, low), high)
        close = rows[np.abs(np.log(sizes[rows] / vertex)) <= math.log(LOCAL_SPAN) * (1 + 1e-9)]
        near[budget.C] = close if close.size >= LOCAL_MIN_RUNS else rows
    lines = {c: _quadratic(sizes[i], loss[i]) for c, i in near.items()}
    sd, df = _pooled(lines, near, loss, noise)
    out = []
    for c, line in lines.items():
        if line is None or line.beta[2] <= 0:
            continue
        vertex = float(np.clip(-line.beta[1] / (2 * line.beta[2]), line.low - line.center, line.high - line.center))
        at = np.array([1.0, vertex, vertex * vertex])
        value = float(line.beta @ at)
        spread = sd * float(loss[near[c]].mean()) / value * math.sqrt(float(at @ line.inverse @ at))
        out.append(LowestLoss(C=c, N=_exp(vertex + line.center), L=value, sd=spread, n=near[c].size))
    return tuple(out), df


def _pooled(
    lines: dict[float, _Line | None], members: dict[float, np.ndarray], loss: np.ndarray, noise: SeedNoise | None
) -> tuple[float, int]:
    """Relative standard deviation of one run about its parabola, pooled over budgets, and its degrees of freedom."""
    squares = sum(line.squares / float(loss[members[c]].mean()) ** 2 for c, line in lines.items() if line)
    df = sum(line.df for line in lines.values() if line)
    if df > 0:
        return math.sqrt(squares / df), df
    return (noise.sd, noise.df) if noise is not None else (math.nan, 0)


def _message(parabola: Parabola | None, n: int) -> str:
    if parabola is None:
        return f"{plural(n, 'run')} of fewer than {MIN_SIZES} sizes: no parabola"
    if parabola.status == "flat":
        return "no minimum: the curvature is not distinguishable from 0; widen the sizes or add seeds"
    if parabola.status == "edge":
        direction = "smaller" if parabola.side == "low" else "larger"
        return f"the minimum, or its interval, lies outside the sizes tried: add two {direction} sizes"
    return ""


def _laws(minima: tuple[BudgetMinimum, ...], lowest: tuple[LowestLoss, ...], lowest_df: int, sd: float, level: float) -> IsoflopFit:
    """N*(C) and D*(C), once through every vertex inside its grid and once through the undoubted ones."""
    inside = [b for b in minima if b.in_N and b.in_D and b.N_range[0] <= b.in_N.vertex <= b.N_range[1]]
    inside = [b for b in inside if b.in_N and b.in_D and b.in_N.coefficients[2] > 0 and b.in_D.coefficients[2] > 0]
    sure = [b for b in inside if b.status == "interior"]

    def laws(chosen: list[BudgetMinimum]) -> tuple[ComputeLaw, ComputeLaw]:
        C = [b.C for b in chosen]
        return tuple(fit_compute_law(C, [getattr(b, k).vertex for b in chosen], level=level) for k in ("in_N", "in_D"))  # type: ignore[return-value]

    n_law, d_law = laws(inside)
    n_sure, d_sure = laws(sure)
    words = [f"budget {b.C:.3g}: {b.message}" for b in minima if b.status != "interior"]
    return IsoflopFit(
        budgets=minima,
        lowest=lowest,
        lowest_df=lowest_df,
        N_law=n_law,
        D_law=d_law,
        N_interior=n_sure,
        D_interior=d_sure,
        used=f"vertex inside the grid at {len(inside)} of {plural(len(minima), 'budget')}, beyond doubt at {len(sure)}",
        residual_sd=sd,
        status=n_law.status if len(sure) == len(inside) or len(sure) >= 3 else "at_bound",
        message="; ".join([n_law.message, *words]).strip("; "),
    )
