"""FLOPs that an isoFLOP ladder needs for a given interval: a fixed grid against one that chooses its next runs.

    python bench/adaptive_isoflop.py [--ladders 40] [--json PATH]

Runs are drawn from published surfaces with seed noise. Both ladders start from the same guess of the best sizes, which is off (by
1.6x at 1e18 FLOPs, and in its exponent), fit the same way and get their interval the same way; only the choice of runs differs.
Fixed: 5 budgets from 1e18 FLOPs up, 7 sizes within 4x of the guess; its top budget is raised until the interval is as narrow as
asked. Adaptive: the two lowest budgets of the two-decade grid, then rounds that spend half as much again as was spent, on the runs
that `analysis.suggest_runs` picks on the surface fitted so far. Interval: 90%, of D/N or of the loss at the target, from a
least-squares refit (delta method, noise from its own residuals). `cover`: how often it holds the truth, over all of a ladder's
sizes that cost at least as much as half of what the asked width needs.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import least_squares
from scipy.stats import t as student

from analysis.design import Quantity, suggest_runs
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
ROUNDS, ROUND_SHARE = 10, 0.5


@dataclass(frozen=True)
class Truth:
    theta: np.ndarray  # log E, log A, log B, alpha, beta
    noise: float
    misfit: float  # sd of an error that all runs of one budget share: where the surface's form is wrong

    def optimum(self, c: float) -> float:
        """N* at C = 6 N D."""
        _, log_a, log_b, alpha, beta = self.theta
        return math.exp((math.log(alpha / beta) + log_a - log_b + beta * math.log(c / 6)) / (alpha + beta))

    def run(self, rng: np.random.Generator, frame: pd.DataFrame) -> pd.DataFrame:
        n, d = frame["N"].to_numpy(), frame["D"].to_numpy()
        groups = np.unique(np.round(np.log10(frame["C"].to_numpy()) * 4), return_inverse=True)[1]
        shared = self.misfit * rng.normal(size=groups.max() + 1)[groups]
        loss = np.exp(log_loss(self.theta, n, d) + self.noise * rng.normal(size=n.size) + shared)
        return frame.assign(L=loss)


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
class Fit:
    theta: np.ndarray
    value: float
    half: float  # half width of the 90% interval of the log


def fit(frame: pd.DataFrame, quantity: Quantity, start: np.ndarray) -> Fit:
    """Log least squares from `start` (a surface near the truth: both ladders get the same), centred for conditioning."""
    n, d, y = (np.log(frame[k].to_numpy()) for k in ("N", "D", "L"))
    n0, d0 = n.mean(), d.mean()

    def to_raw(c: np.ndarray) -> np.ndarray:
        return np.array([c[0], c[1] + c[3] * n0, c[2] + c[4] * d0, c[3], c[4]])

    def residual(c: np.ndarray) -> np.ndarray:
        return np.logaddexp(np.logaddexp(c[0], c[1] - c[3] * (n - n0)), c[2] - c[4] * (d - d0)) - y

    def jacobian(c: np.ndarray) -> np.ndarray:
        total = residual(c) + y
        p = [np.exp(v - total) for v in (np.full_like(n, c[0]), c[1] - c[3] * (n - n0), c[2] - c[4] * (d - d0))]
        return np.column_stack([*p, -p[1] * (n - n0), -p[2] * (d - d0)])

    first = np.array([start[0], start[1] - start[3] * n0, start[2] - start[4] * d0, start[3], start[4]])
    bounds = ([-30, -30, -30, 0.02, 0.02], [5, 10, 10, 2.0, 2.0])
    found = least_squares(residual, first, jac=jacobian, bounds=bounds, x_scale=[0.1, 0.3, 0.3, 0.1, 0.1])
    df = n.size - 5
    gradient = np.array([
        (target_value(to_raw(found.x + h), quantity) - target_value(to_raw(found.x - h), quantity)) / 2e-5 for h in 1e-5 * np.eye(5)
    ])  # fmt: skip
    covariance = np.linalg.pinv(found.jac.T @ found.jac) * 2 * found.cost / df
    half = float(student.ppf((1 + LEVEL) / 2, df) * math.sqrt(max(gradient @ covariance @ gradient, 0.0)))
    return Fit(to_raw(found.x), target_value(to_raw(found.x), quantity), half)


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
        frame = truth.run(np.random.default_rng([seed, 1, i]), frame)
        path.append((float(frame["C"].sum()), fit(frame, quantity, start)))
    return path


def adaptive_path(truth: Truth, seed: int, quantity: Quantity, start: np.ndarray) -> list[tuple[float, Fit]]:
    rng = np.random.default_rng([seed, 2])
    frame = truth.run(rng, grid(truth, FLOOR * 10 ** np.linspace(0, DECADES, NUM_BUDGETS)[:2]))
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
                remaining_flops=ROUND_SHARE * spent,
                quantity=quantity,
                noise_sd=truth.noise,
            )
        except DataError:
            break
        chosen = pd.DataFrame([(r.N, r.D, r.C) for r in design.runs], columns=["N", "D", "C"])
        if chosen.empty:
            break
        frame = pd.concat([frame, truth.run(rng, chosen)], ignore_index=True)
        path.append((float(frame["C"].sum()), fit(frame, quantity, last.theta)))
    return path


def flops_to_reach(path: list[tuple[float, Fit]], half: float) -> float:
    """FLOPs at which the interval's half width falls to `half`, between the ladders on either side by a power law."""
    flops, halves = np.log([f for f, _ in path]), np.log([x.half for _, x in path])
    halves = np.minimum.accumulate(halves)
    if halves[-1] > math.log(half):
        return math.inf
    return float(np.exp(np.interp(-math.log(half), -halves, flops)))


def compare(name: str, quantity: Quantity, misfit: float, ladders: int) -> dict[str, object]:
    e, a, b, alpha, beta = SURFACES[name]
    truth = Truth(np.array([math.log(e), math.log(a), math.log(b), alpha, beta]), NOISE, misfit)
    right = target_value(truth.theta, quantity)
    paths = {"fixed": [], "adaptive": []}  # type: dict[str, list[list[tuple[float, Fit]]]]
    for seed in range(ladders):
        paths["fixed"].append(fixed_path(truth, seed, quantity, truth.theta))
        paths["adaptive"].append(adaptive_path(truth, seed, quantity, truth.theta))
    half = float(np.median([p[int(np.argmin(np.abs(REACHES - DECADES)))][1].half for p in paths["fixed"]]))
    need = {k: float(np.median([flops_to_reach(p, half) for p in v])) for k, v in paths.items()}
    cover = {
        k: float(np.mean([abs(f.value - right) <= f.half for p in v for spent, f in p if spent >= need[k] / 2]))
        for k, v in paths.items()
    }
    return {
        "surface": name, "quantity": quantity, "misfit": misfit, "half_width": half, **{f"{k}_flops": v for k, v in need.items()},
        "share": need["adaptive"] / need["fixed"], **{f"{k}_cover": v for k, v in cover.items()}, "ladders": ladders,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladders", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print("| surface | interval of | shared error | half width | fixed, FLOPs | adaptive | share | cover fixed | adaptive |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in SURFACES:
        for quantity in ("ratio", "loss"):
            for misfit in (0.0, 0.002):
                row = compare(name, quantity, misfit, args.ladders)  # type: ignore[arg-type]
                rows.append(row)
                print(
                    f"| {name} | {quantity} | {misfit:.1%} | ±{math.expm1(row['half_width']):.2%} | {row['fixed_flops']:.2e} | "  # type: ignore[arg-type]
                    f"{row['adaptive_flops']:.2e} | {row['share']:.2f} | {row['fixed_cover']:.0%} | {row['adaptive_cover']:.0%} |",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
