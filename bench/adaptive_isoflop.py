"""FLOPs that an isoFLOP ladder needs for a given interval: a fixed grid against one that chooses its next runs.

    python bench/adaptive_isoflop.py [--ladders 40] [--json PATH]

Runs are drawn from published surfaces with seed noise; with a shared error, all runs of one budget (a quarter of a decade) of one
ladder miss the surface by the same amount. Both ladders start from the same guess of the best sizes, which is off (by 1.6x at 1e18
FLOPs, and in its exponent), fit the same way and get their interval the same way; only the choice of runs differs.
Fixed: 5 budgets from 1e18 FLOPs up, 7 sizes within 4x of the guess; its top budget is raised until the interval is as narrow as
asked. Adaptive: the two lowest budgets of the two-decade grid, then rounds as an adaptive sweep makes them: `round_flops` says
how much, `suggest_runs` which runs (analysis.design), on the surface fitted so far.
Intervals: 90%, of D/N or of the loss at the target, by the delta method. "plain": least squares, runs independent, noise from their
residuals. "shared": the same fit's linearisation with an error that budgets share, its size unknown (half-Cauchy prior of 0.2%).
`bound`: the least FLOPs that any choice of runs needs for the fixed grid's plain interval without a shared error, the truth known
and fractions of runs allowed (c-optimal design, Elfving 1952). `cover`: how often the interval holds the truth, over all of a
ladder's sizes that cost at least as much as half of what the asked width needs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
from scipy.optimize import brentq, least_squares, linprog
from scipy.special import stdtr
from scipy.stats import norm
from scipy.stats import t as student

from analysis.design import Quantity, round_flops, suggest_runs
from analysis.errors import DataError

# E, A, B, alpha, beta
SURFACES = {
    "Hoffmann (2203.15556)": (1.69, 406.4, 410.7, 0.34, 0.28),
    "Epoch (2404.10102)": (1.8172, 482.01, 2085.43, 0.3478, 0.3658),
    "Marin comma": (2.7009, 2.161e5, 1393.0, 0.6658, 0.3499),
}
TARGET = 1e21
FLOOR = 1e18  # the cheapest budget of either: models below it are too small to say anything
NUM_BUDGETS, NUM_SIZES, SPAN = 5, 7, 4.0
DECADES = 2.0  # of the fixed grid whose interval is asked for
GUESS_FACTOR, GUESS_SLOPE = 1.6, 0.05  # of the guess of N*, at 1e18 FLOPs and in its exponent
NOISE = 0.003  # sd of log loss between seeds
LEVEL = 0.9
REACHES = np.arange(0.75, 2.8, 0.25)  # decades of the fixed grids that are tried
ROUNDS = 10
SHARED_PRIOR = 0.002  # scale of the half-Cauchy prior of the error that the runs of a budget share
SHARED_GRID = np.concatenate([[0.0], np.geomspace(2e-4, 2e-2, 16)])
KINDS = ("plain", "shared")


@dataclass(frozen=True)
class Truth:
    theta: np.ndarray  # log E, log A, log B, alpha, beta
    noise: float
    misfit: float  # sd of an error that all runs of one budget share: where the surface's form is wrong

    def optimum(self, c: float) -> float:
        """N* at C = 6 N D."""
        _, log_a, log_b, alpha, beta = self.theta
        return math.exp((math.log(alpha / beta) + log_a - log_b + beta * math.log(c / 6)) / (alpha + beta))

    def run(self, rng: np.random.Generator, frame: pd.DataFrame, shared: dict[int, float]) -> pd.DataFrame:
        """The runs with their losses; `shared`: the errors of this ladder's budgets, extended where a budget is new."""
        n, d, bins = frame["N"].to_numpy(), frame["D"].to_numpy(), budget_of(frame["C"].to_numpy())
        for each in np.unique(bins):
            if each not in shared:
                shared[each] = self.misfit * rng.normal()
        loss = np.exp(log_loss(self.theta, n, d) + self.noise * rng.normal(size=n.size) + np.array([shared[b] for b in bins]))
        return frame.assign(L=loss)


def budget_of(c: np.ndarray) -> np.ndarray:
    """Number of the quarter of a decade of each compute."""
    return np.round(np.log10(c) * 4).astype(int)


def log_loss(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    e, a, b, alpha, beta = theta
    return np.logaddexp(np.logaddexp(e, a - alpha * np.log(n)), b - beta * np.log(d))


def target_value(theta: np.ndarray, quantity: Quantity) -> float:
    """log D/N, or log loss, of the optimum at the target."""
    truth = Truth(theta, 0.0, 0.0)
    n = truth.optimum(TARGET)
    d = TARGET / 6 / n
    return math.log(d / n) if quantity == "ratio" else float(log_loss(theta, np.array([n]), np.array([d]))[0])


@dataclass(frozen=True)
class Interval:
    value: float
    half: float  # half width of the 90% interval of the log


@dataclass(frozen=True)
class Fit:
    theta: np.ndarray
    intervals: dict[str, Interval]  # by kind


def fit(frame: pd.DataFrame, quantity: Quantity, start: np.ndarray) -> Fit:
    """Log least squares from `start` (a surface near the truth: both ladders get the same), centred for conditioning."""
    n, d, y = (np.log(frame[k].to_numpy()) for k in ("N", "D", "L"))
    n0, d0 = n.mean(), d.mean()

    def to_raw(c: np.ndarray) -> np.ndarray:
        return np.array([c[0], c[1] + c[3] * n0, c[2] + c[4] * d0, c[3], c[4]])

    def residual(c: np.ndarray) -> np.ndarray:
        return np.logaddexp(np.logaddexp(c[0], c[1] - c[3] * (n - n0)), c[2] - c[4] * (d - d0)) - y

    def derivative(c: np.ndarray) -> np.ndarray:
        return jacobian(c, n - n0, d - d0)

    first = np.array([start[0], start[1] - start[3] * n0, start[2] - start[4] * d0, start[3], start[4]])
    bounds = ([-30, -30, -30, 0.02, 0.02], [5, 10, 10, 2.0, 2.0])
    found = least_squares(residual, first, jac=derivative, bounds=bounds, x_scale=[0.1, 0.3, 0.3, 0.1, 0.1])
    jac, df = np.asarray(found.jac), n.size - 5
    gradient = target_gradient(found.x, quantity, to_raw)
    value = target_value(to_raw(found.x), quantity)
    covariance = np.linalg.pinv(jac.T @ jac) * 2 * found.cost / df
    half = float(student.ppf((1 + LEVEL) / 2, df) * math.sqrt(max(gradient @ covariance @ gradient, 0.0)))
    move, wide = shared_interval(jac, -found.fun, gradient, budget_of(frame["C"].to_numpy()))
    return Fit(to_raw(found.x), {"plain": Interval(value, half), "shared": Interval(value + move, wide)})


def jacobian(theta: np.ndarray, log_n: np.ndarray, log_d: np.ndarray) -> np.ndarray:
    """(runs, 5): derivative of log L by log E, log A, log B, alpha, beta."""
    terms = [np.full_like(log_n, theta[0]), theta[1] - theta[3] * log_n, theta[2] - theta[4] * log_d]
    total = np.logaddexp(np.logaddexp(terms[0], terms[1]), terms[2])
    p = [np.exp(t - total) for t in terms]
    return np.column_stack([*p, -p[1] * log_n, -p[2] * log_d])


def target_gradient(
    theta: np.ndarray, quantity: Quantity, to_raw: Callable[[np.ndarray], np.ndarray] = lambda theta: theta
) -> np.ndarray:
    steps = 1e-5 * np.eye(5)
    return np.array([
        (target_value(to_raw(theta + h), quantity) - target_value(to_raw(theta - h), quantity)) / 2e-5 for h in steps
    ])  # fmt: skip


def shared_interval(jac: np.ndarray, residual: np.ndarray, gradient: np.ndarray, budgets: np.ndarray) -> tuple[float, float]:
    """How far the target moves, and the half width of its interval, when budgets share an error of unknown sd tau.

    Generalised least squares on the linearised surface, V = s²·I + tau²·ZZ'; for every tau on a grid the residual likelihood
    (Harville 1974, s² at its best) times the prior weighs a t distribution of the target; the interval holds LEVEL of the mixture.
    """
    z = (budgets[:, None] == np.unique(budgets)).astype(float)
    df = len(residual) - jac.shape[1]
    size = math.sqrt(residual @ residual / df)  # tau is counted in units of the plain noise
    moves, sds, weights = [], [], []
    for tau in SHARED_GRID:
        # (I + r ZZ')^-1 = I - Z diag(r / (1 + r n)) Z' for runs that each lie in one budget
        r, counts = (tau / size) ** 2, z.sum(axis=0)
        shrink = r / (1 + r * counts)
        weighted = jac - z @ (shrink[:, None] * (z.T @ jac))
        information = jac.T @ weighted
        inverse = np.linalg.pinv(information)
        step = inverse @ (weighted.T @ residual)
        rest = residual - jac @ step
        quadratic = float(rest @ rest - shrink @ (z.T @ rest) ** 2)
        log_det = float(np.log1p(r * counts).sum() + np.linalg.slogdet(information)[1])
        weights.append(-0.5 * (log_det + df * math.log(quadratic)))
        moves.append(float(gradient @ step))
        sds.append(math.sqrt(max(float(gradient @ inverse @ gradient) * quadratic / df, 0.0)))
    share = np.exp(np.array(weights) - max(weights)) / (1 + (SHARED_GRID / SHARED_PRIOR) ** 2) * np.gradient(SHARED_GRID)
    share /= share.sum()
    centres, scale = np.array(moves), np.array(sds)
    middle = float(share @ centres)

    def missing(half: float) -> float:
        inside = stdtr(df, (middle + half - centres) / scale) - stdtr(df, (middle - half - centres) / scale)
        return float(share @ inside) - LEVEL

    most = float(50 * scale.max() + np.ptp(centres))
    return middle, float(brentq(missing, 0.0, most, xtol=1e-7 * most))


def grid(truth: Truth, budgets: np.ndarray) -> pd.DataFrame:
    rows = []
    for c in budgets:
        slope = truth.theta[4] / (truth.theta[3] + truth.theta[4]) + GUESS_SLOPE
        centre = truth.optimum(1e18) * GUESS_FACTOR * (c / 1e18) ** slope
        rows += [(n, c / 6 / n, c) for n in centre * np.geomspace(1 / SPAN, SPAN, NUM_SIZES)]
    return pd.DataFrame(rows, columns=["N", "D", "C"])


def fixed_path(truth: Truth, seed: int, quantity: Quantity, start: np.ndarray) -> list[tuple[float, Fit]]:
    path = []
    for i, reach in enumerate(REACHES):
        frame = grid(truth, FLOOR * 10 ** np.linspace(0, reach, NUM_BUDGETS))
        frame = truth.run(np.random.default_rng([seed, 1, i]), frame, {})
        path.append((float(frame["C"].sum()), fit(frame, quantity, start)))
    return path


def adaptive_path(truth: Truth, seed: int, quantity: Quantity, start: np.ndarray) -> list[tuple[float, Fit]]:
    rng, shared = np.random.default_rng([seed, 2]), {}  # type: tuple[np.random.Generator, dict[int, float]]
    frame = truth.run(rng, grid(truth, FLOOR * 10 ** np.linspace(0, DECADES, NUM_BUDGETS)[:2]), shared)
    path = [(float(frame["C"].sum()), fit(frame, quantity, start))]
    for _ in range(ROUNDS):
        spent, last = path[-1]
        surface = dict(zip(("E", "A", "B"), map(float, np.exp(last.theta[:3])), strict=True))
        surface |= {"alpha": float(last.theta[3]), "beta": float(last.theta[4])}
        try:
            design = suggest_runs(
                frame,
                surface,
                target_flops=TARGET,
                remaining_flops=round_flops(spent),
                quantity=quantity,
                noise_sd=truth.noise,
            )
        except DataError:
            break
        chosen = pd.DataFrame([(r.N, r.D, r.C) for r in design.runs], columns=["N", "D", "C"])
        if chosen.empty:
            break
        frame = pd.concat([frame, truth.run(rng, chosen, shared)], ignore_index=True)
        path.append((float(frame["C"].sum()), fit(frame, quantity, last.theta)))
    return path


def flops_to_reach(path: list[tuple[float, Fit]], kind: str, half: float) -> float:
    """FLOPs at which the interval's half width falls to `half`, between the ladders on either side by a power law."""
    flops, halves = np.log([f for f, _ in path]), np.log([x.intervals[kind].half for _, x in path])
    halves = np.minimum.accumulate(halves)
    if halves[-1] > math.log(half):
        return math.inf
    return float(np.exp(np.interp(-math.log(half), -halves, flops)))


def least_flops(truth: Truth, quantity: Quantity, half: float) -> float:
    """The bound: cells from FLOOR to a quarter of the target, sizes within SPAN of N*; n runs of cell i tell n·j j'/noise².

    The least cost of g'(Σ nᵢ jᵢjᵢ')⁻¹g·noise² = v is noise²/v · (min Σ √cᵢ·|xᵢ|)² over Σ xᵢ·jᵢ = g: a linear programme.
    """
    budgets = FLOOR * 10 ** np.arange(0, math.log10(TARGET / 4 / FLOOR), 0.125)
    cells = np.array([
        (n, c / 6 / n, c) for c in budgets for n in truth.optimum(c) * np.geomspace(1 / SPAN, SPAN, 17)
    ])  # fmt: skip
    gradient = target_gradient(truth.theta, quantity)
    rows = jacobian(truth.theta, np.log(cells[:, 0]), np.log(cells[:, 1]))
    scale, root = np.abs(rows).max(axis=0), np.sqrt(cells[:, 2] / FLOOR)
    table = (rows / scale / root[:, None]).T
    found = linprog(np.ones(2 * len(cells)), A_eq=np.hstack([table, -table]), b_eq=gradient / scale, bounds=(0, None))
    assert found.success and found.fun is not None, found.message
    sd = half / float(norm.ppf((1 + LEVEL) / 2))
    return float(FLOOR * (truth.noise * float(found.fun) / sd) ** 2)


def compare(name: str, quantity: Quantity, misfit: float, ladders: int) -> list[dict[str, Any]]:
    """A row for each kind of interval, from the same ladders."""
    e, a, b, alpha, beta = SURFACES[name]
    truth = Truth(np.array([math.log(e), math.log(a), math.log(b), alpha, beta]), NOISE, misfit)
    right = target_value(truth.theta, quantity)
    paths = {"fixed": [], "adaptive": []}  # type: dict[str, list[list[tuple[float, Fit]]]]
    for seed in range(ladders):
        paths["fixed"].append(fixed_path(truth, seed, quantity, truth.theta))
        paths["adaptive"].append(adaptive_path(truth, seed, quantity, truth.theta))
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        half = float(np.median([p[int(np.argmin(np.abs(REACHES - DECADES)))][1].intervals[kind].half for p in paths["fixed"]]))
        need = {k: float(np.median([flops_to_reach(p, kind, half) for p in v])) for k, v in paths.items()}
        cover = {
            k: float(np.mean([
                abs(f.intervals[kind].value - right) <= f.intervals[kind].half for p in v for spent, f in p if spent >= need[k] / 2
            ]))
            for k, v in paths.items()
        }  # fmt: skip
        bound = least_flops(truth, quantity, half) if kind == "plain" and not misfit else None
        rows.append({
            "surface": name, "quantity": quantity, "misfit": misfit, "interval": kind, "half_width": half,
            **{f"{k}_flops": v for k, v in need.items()}, "share": need["adaptive"] / need["fixed"],
            "bound_share": None if bound is None else bound / need["fixed"],
            **{f"{k}_cover": v for k, v in cover.items()}, "ladders": ladders,
        })  # fmt: skip
    return rows


def show(row: dict[str, Any]) -> str:
    bound = "" if row["bound_share"] is None else f"{row['bound_share']:.2f}"
    return (
        f"| {row['surface']} | {row['quantity']} | {row['misfit']:.1%} | {row['interval']} | "
        f"±{math.expm1(row['half_width']):.2%} | {row['fixed_flops']:.2e} | {row['adaptive_flops']:.2e} | {row['share']:.2f} | "
        f"{bound} | {row['fixed_cover']:.0%} | {row['adaptive_cover']:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladders", type=int, default=40)
    parser.add_argument("--quantity", choices=get_args(Quantity), help="of one only (default: both)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| surface | of | shared error | interval | half width | fixed | adaptive | share | bound | cover fixed | adaptive |")
    print("|---" * 11 + "|")
    for name in SURFACES:
        for quantity in get_args(Quantity) if args.quantity is None else (args.quantity,):
            for misfit in (0.0, 0.002):
                rows += compare(name, quantity, misfit, args.ladders)
                print("\n".join(map(show, rows[-len(KINDS) :])), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
