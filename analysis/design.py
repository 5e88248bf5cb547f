"""Which runs next? Those that shrink the target's interval most per FLOP.

The surface log L(N, D) is linearised about the present fit; runs update a Gaussian over its five parameters (Kalman). Every budget
carries an error of its own that all its runs share and that grows with the distance to the target: it stands for the surface's
misfit and keeps the design from buying hundreds of the cheapest run.
Letters: s states = 5 parameters + budgets, m candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from analysis.errors import DataError
from analysis.law import Law
from analysis.words import plural

PRIOR_SD = np.array([0.7, 0.7, 0.7, 0.15, 0.15])  # of log E, log A/N0^α, log B/D0^β, α, β about the present fit
MISFIT_PER_DECADE = 0.002  # relative loss; surfaces fitted to public ladders missed held-out top budgets by 0.3–2.5%
DEFAULT_NOISE = 0.002  # relative seed noise when nothing was replicated
SPAN = 4.0  # sizes reach from N*/4 to 4·N* at each budget
OFF_CENTRE_MISFIT = 0.004  # relative loss at the ends of that span, on top of the seed noise: far from N* the surface fits worse
MAX_SHARE = 0.45  # of the remaining FLOPs in one run: two runs of half of it leave nothing for the cheap ones that go with them
MAX_TARGET_SHARE = 0.25  # …and of the target's: a ladder that needs dearer runs predicts nothing that it has not paid for
SIZES, BUDGETS_PER_DECADE = 13, 6
MAX_RUNS = 40
WORTH = 0.0002  # a run that lowers the variance by less than this share is not worth planning
ROUND_SHARE = 0.5  # of what was spent so far, in one round
Quantity = Literal["loss", "ratio"]


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run to do: N parameters, D tokens, C FLOPs, B batch in tokens (null without a batch law), and the standard
    deviation of the target once this run and those before it are in."""

    N: float
    D: float
    C: float
    B: float | None
    sd_after: float


@dataclass(frozen=True, kw_only=True)
class Design:
    """Runs in the order in which they pay most. `sd_before`, `sd_after`: of the target's log loss or log D/N."""

    quantity: Quantity
    target_flops: float
    runs: tuple[PlannedRun, ...]
    sd_before: float
    sd_after: float
    flops: float
    message: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def suggest_runs(
    frame: pd.DataFrame,
    surface: Mapping[str, float],
    *,
    target_flops: float,
    remaining_flops: float,
    quantity: Quantity = "ratio",
    noise_sd: float | None = None,
    batch_law: Law | None = None,
    sizes: Sequence[float] | None = None,
    max_runs: int = MAX_RUNS,
) -> Design:
    """The next runs for a budget of `remaining_flops`, given the runs so far (`frame`: N, D, C) and the fitted `surface`
    (E, A, B, alpha, beta).

    `quantity`: what is wanted at `target_flops`: "ratio" (log of the optimal D/N) or "loss" (log of the loss at the optimum).
    `sizes`: the N that can be built; without them 13 geometric sizes over ±4x about N*(C) at each budget. Budgets are the
    cheapest one seen times powers of 10^(1/6), so that those of later rounds meet those of earlier ones; no run takes more
    than 45% of `remaining_flops` or a quarter of `target_flops`. Two greedy orders are tried, by gain per FLOP and by gain,
    and the better one returned. DataError when nothing affordable helps.
    """
    if not (remaining_flops > 0 and target_flops > 0):
        raise DataError(f"remaining_flops {remaining_flops} and target_flops {target_flops} must be positive")
    missing = [k for k in ("E", "A", "B", "alpha", "beta") if not surface.get(k)]
    if missing:
        raise DataError(f"the surface has no {missing[0]}; fit the allocation first (at least six runs)")
    model = _Surface(frame, surface)
    noise = noise_sd if noise_sd is not None else DEFAULT_NOISE
    candidates = model.candidates(min(MAX_SHARE * remaining_flops, MAX_TARGET_SHARE * target_flops), sizes)
    if not len(candidates):
        raise DataError(
            f"no run fits into {remaining_flops:.3g} FLOPs at the sizes given; raise the budget or allow smaller models"
        )
    state = _State(model, frame, candidates, target_flops, noise, model.target_gradient(target_flops, quantity))
    plans = [state.greedy(remaining_flops, per_flop, max_runs) for per_flop in (True, False)]
    chosen, sds = min(plans, key=lambda plan: plan[1][-1])
    runs = tuple(_planned(candidates[i], sd, batch_law) for i, sd in zip(chosen, sds[1:], strict=True))
    spent = float(sum(r.C for r in runs))
    what = "log D/N" if quantity == "ratio" else "log loss"
    message = f"{plural(len(runs), 'run')} for {spent:.3g} of {remaining_flops:.3g} FLOPs: the sd of {what} at {target_flops:.3g} "
    message += f"FLOPs goes from {sds[0]:.3g} to {sds[-1]:.3g}"
    return Design(
        quantity=quantity, target_flops=target_flops, runs=runs, sd_before=sds[0], sd_after=sds[-1], flops=spent, message=message
    )


def round_flops(spent: float, left: float = math.inf) -> float:
    """FLOPs of the next round when `spent` are spent and `left` may still be: late choices know more, so rounds grow with what
    was spent; what would be left over for less than half a round more goes into this one."""
    usual = ROUND_SHARE * spent
    return left if left < 1.5 * usual else usual


def _planned(candidate: np.ndarray, sd: float, batch_law: Law | None) -> PlannedRun:
    n, d, c = (float(v) for v in candidate)
    batch = None if batch_law is None or not batch_law.usable else batch_law.predict(N=n, D=d).value
    return PlannedRun(N=n, D=d, C=c, B=batch, sd_after=sd)


class _Surface:
    """log L = log(E + a·(N/N0)^−α + b·(D/D0)^−β) about the present fit; θ = (log E, log a, log b, α, β)."""

    def __init__(self, frame: pd.DataFrame, surface: Mapping[str, float]) -> None:
        n, d = frame["N"].to_numpy(dtype=float), frame["D"].to_numpy(dtype=float)
        c = frame["C"].to_numpy(dtype=float)
        self.n0, self.d0 = float(np.exp(np.log(n).mean())), float(np.exp(np.log(d).mean()))
        slope, level = (
            np.polyfit(np.log(n), np.log(c / (n * d)), 1) if np.ptp(np.log(n)) > 0.1 else (0.0, math.log(np.median(c / (n * d))))
        )
        self.flops_slope, self.flops_level = float(slope), float(level)  # log C/(N·D) drifts with N (attention, embeddings)
        alpha, beta = surface["alpha"], surface["beta"]
        a, b = surface["A"] * self.n0**-alpha, surface["B"] * self.d0**-beta
        self.theta = np.array([math.log(surface["E"]), math.log(a), math.log(b), alpha, beta])
        self.smallest = float(c.min())

    def tokens(self, n: np.ndarray, c: np.ndarray) -> np.ndarray:
        """D of a run of C FLOPs at size N, by the table's own FLOPs per N·D."""
        return c / (n * np.exp(self.flops_level + self.flops_slope * np.log(n)))

    def log_loss(self, theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        terms = [np.full_like(n, theta[0]), theta[1] - theta[3] * np.log(n / self.n0), theta[2] - theta[4] * np.log(d / self.d0)]
        return np.logaddexp(np.logaddexp(terms[0], terms[1]), terms[2])

    def jacobian(self, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        """(runs, 5): derivative of log L by θ."""
        total = self.log_loss(self.theta, n, d)
        log_n, log_d = np.log(n / self.n0), np.log(d / self.d0)
        shares = [
            np.exp(t - total) for t in (self.theta[0], self.theta[1] - self.theta[3] * log_n, self.theta[2] - self.theta[4] * log_d)
        ]
        return np.column_stack([*shares, -shares[1] * log_n, -shares[2] * log_d])

    def optimum(self, c: np.ndarray, theta: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """N*, D* at C FLOPs: α·a·N^−α = (1 + slope)·β·b·D^−β on C = N·D·exp(level + slope·log N), linear in log N."""
        _, log_a, log_b, alpha, beta = self.theta if theta is None else theta
        steep = beta * (1 + self.flops_slope)
        right = log_b + math.log(steep) - beta * (np.log(c) - self.flops_level - math.log(self.d0))
        n = np.exp((log_a + math.log(alpha) + alpha * math.log(self.n0) - right) / (alpha + steep))
        return n, self.tokens(n, c)

    def target_gradient(self, c: float, quantity: Quantity) -> np.ndarray:
        """(5,): derivative of the target by θ; for the loss the optimum itself may stay put (its slope is 0 there)."""
        at = np.array([c])
        if quantity == "loss":
            return np.asarray(self.jacobian(*self.optimum(at))[0])
        out = np.zeros(5)
        for i in range(1, 5):
            ends = []
            for sign in (1, -1):
                moved = self.theta.copy()
                moved[i] += sign * 1e-4
                n, d = self.optimum(at, moved)
                ends.append(float(np.log(d[0] / n[0])))
            out[i] = (ends[0] - ends[1]) / 2e-4
        return out

    def budget_index(self, c: np.ndarray) -> np.ndarray:
        """(n,) number of the budget, from 0, that each compute is nearest to."""
        return np.unique(np.round(np.log10(c / self.smallest) * BUDGETS_PER_DECADE), return_inverse=True)[1]

    def candidates(self, most: float, sizes: Sequence[float] | None) -> np.ndarray:
        """(m, 3): N, D, C of affordable runs, from the smallest compute seen to `most`."""
        steps = math.floor(math.log10(most / self.smallest) * BUDGETS_PER_DECADE + 1e-9)
        budgets = self.smallest * 10 ** (np.arange(steps, -1, -1) / BUDGETS_PER_DECADE) if steps >= 0 else np.array([most])
        rows = []
        for c in budgets:
            best = float(self.optimum(np.array([c]))[0][0])
            if sizes is None:
                ns = best * np.geomspace(1 / SPAN, SPAN, SIZES)
            else:
                ns = np.array([n for n in sizes if best / SPAN <= n <= best * SPAN])
            rows += [(n, d, c) for n, d in zip(ns, self.tokens(ns, np.full(len(ns), c)), strict=True)]
        return np.array(rows, dtype=float).reshape(len(rows), 3)


class _State:
    """Gaussian over the parameters and the budgets' own errors, updated by runs."""

    def __init__(
        self, model: _Surface, frame: pd.DataFrame, candidates: np.ndarray, target: float, noise: float, gradient: np.ndarray
    ) -> None:
        done = frame[["N", "D", "C"]].to_numpy(dtype=float)
        runs = np.vstack([done, candidates])
        groups = model.budget_index(runs[:, 2])
        centre = np.array([np.exp(np.log(runs[groups == g, 2]).mean()) for g in range(groups.max() + 1)])
        misfit = np.maximum(MISFIT_PER_DECADE * np.abs(np.log10(target / centre)), 1e-5)
        rows = np.zeros((len(runs), 5 + len(centre)))
        rows[:, :5] = model.jacobian(runs[:, 0], runs[:, 1])
        rows[np.arange(len(runs)), 5 + groups] = 1.0
        self.covariance = np.diag(np.concatenate([PRIOR_SD, misfit]) ** 2)
        off = np.log(runs[:, 0] / model.optimum(runs[:, 2])[0]) / math.log(SPAN)
        noises = noise**2 + (OFF_CENTRE_MISFIT * off**2) ** 2
        self.noises = noises[len(done) :]
        self.gradient = np.concatenate([gradient, np.zeros(len(centre))])
        self.rows, self.cost = rows[len(done) :], candidates[:, 2]
        seen = rows[: len(done)]
        information = np.linalg.inv(self.covariance) + seen.T @ (seen / noises[: len(done), None])
        self.covariance = np.linalg.inv(information)

    def greedy(self, flops: float, per_flop: bool, max_runs: int) -> tuple[list[int], list[float]]:
        """Indices of the candidates taken in turn, and the target's sd before and after each."""
        covariance = self.covariance.copy()
        chosen: list[int] = []
        variance = float(self.gradient @ covariance @ self.gradient)
        sds = [math.sqrt(variance)]
        while len(chosen) < max_runs:
            lifted = self.rows @ covariance
            total = np.einsum("ms,ms->m", lifted, self.rows) + self.noises
            gain = (lifted @ self.gradient) ** 2 / total
            gain[(self.cost > flops * (1 + 1e-9)) | (gain < WORTH * variance)] = 0.0
            gain[chosen] = 0.0  # the same run again would be found done
            if not (gain > 0).any():
                break
            i = int(np.argmax(gain / self.cost if per_flop else gain))
            covariance -= np.outer(lifted[i], lifted[i]) / total[i]
            variance = float(self.gradient @ covariance @ self.gradient)
            flops -= float(self.cost[i])
            chosen.append(i)
            sds.append(math.sqrt(max(variance, 0.0)))
        return chosen, sds
