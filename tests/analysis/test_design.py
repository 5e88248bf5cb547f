"""The next runs: they shrink the target's interval, on the fitted surface and in a real refit."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from analysis.design import round_flops, suggest_runs
from analysis.errors import DataError

SURFACE = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}  # Hoffmann et al., arXiv 2203.15556


def optimal_size(flops: float) -> float:
    a, b = SURFACE["alpha"], SURFACE["beta"]
    return (a * SURFACE["A"] / (b * SURFACE["B"])) ** (1 / (a + b)) * (flops / 6) ** (b / (a + b))


def ladder(budgets, factors=(0.4, 0.63, 1.0, 1.6, 2.5)) -> pd.DataFrame:
    rows = [(optimal_size(c) * f, c / 6 / (optimal_size(c) * f), c) for c in budgets for f in factors]
    return pd.DataFrame(rows, columns=["N", "D", "C"])


DONE = ladder([1e18, 3e18])


@pytest.mark.parametrize("quantity", ["ratio", "loss"])
def test_design_stays_within_its_means_and_helps(quantity):
    design = suggest_runs(DONE, SURFACE, target_flops=1e21, remaining_flops=6e19, quantity=quantity, noise_sd=0.002)
    assert 0 < design.flops <= 6e19 * (1 + 1e-9)
    assert all(r.C <= 2.7e19 * (1 + 1e-9) for r in design.runs)  # never more than 45% of it in one run
    steps = np.array([6 * math.log10(r.C / 1e18) for r in design.runs])
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-6)  # on the budgets that later rounds use too
    sds = [design.sd_before, *(r.sd_after for r in design.runs)]
    assert all(a > b for a, b in pairwise(sds))
    assert design.sd_after < 0.85 * design.sd_before
    assert len({(r.N, r.C) for r in design.runs}) == len(design.runs)
    for r in design.runs:
        assert pytest.approx(r.C / (6 * r.N)) == r.D
        assert 1 / 4.001 <= r.N / optimal_size(r.C) <= 4.001


def test_more_money_buys_a_narrower_interval():
    told = [suggest_runs(DONE, SURFACE, target_flops=1e21, remaining_flops=f, quantity="loss").sd_after for f in (1e19, 1e20, 5e20)]
    assert told[0] > told[1] > told[2]


def test_no_run_comes_near_the_target():
    design = suggest_runs(DONE, SURFACE, target_flops=2e19, remaining_flops=1e21, quantity="loss")
    assert 1e18 < max(r.C for r in design.runs) <= 5e18


def linear_sds(runs: pd.DataFrame, target: float, quantity: str, noise: float = 0.003, shared: float = 0.0) -> tuple[float, float]:
    """sd of the target after a least-squares refit of all five parameters that takes the runs as independent: what it would
    claim, and what it is where the runs of a quarter of a decade share an error besides. Written out afresh, by differences."""
    theta = np.array([SURFACE["E"], math.log(SURFACE["A"]), math.log(SURFACE["B"]), SURFACE["alpha"], SURFACE["beta"]])

    def losses(t: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        return np.log(t[0] + np.exp(t[1]) / n ** t[3] + np.exp(t[2]) / d ** t[4])

    def wanted(t: np.ndarray) -> float:
        g = (t[3] * np.exp(t[1]) / (t[4] * np.exp(t[2]))) ** (1 / (t[3] + t[4]))
        n = g * (target / 6) ** (t[4] / (t[3] + t[4]))
        return math.log(target / 6 / n / n) if quantity == "ratio" else float(losses(t, n, target / 6 / n))

    n, d, c = (runs[k].to_numpy() for k in ("N", "D", "C"))
    steps = 1e-5 * np.eye(5)
    jacobian = np.column_stack([(losses(theta + s, n, d) - losses(theta - s, n, d)) / 2e-5 for s in steps])
    gradient = np.array([(wanted(theta + s) - wanted(theta - s)) / 2e-5 for s in steps])
    influence = jacobian @ np.linalg.inv(jacobian.T @ jacobian) @ gradient
    bins = np.round(4 * np.log10(c))
    together = sum(float(influence[bins == each].sum()) ** 2 for each in np.unique(bins))
    claimed = noise**2 * float(influence @ influence)
    return math.sqrt(claimed), math.sqrt(claimed + shared**2 * together)


def test_design_beats_a_fixed_grid_at_half_the_cost():
    """The same interval of D/N at 1e21 FLOPs for at most half the FLOPs of a centred fixed grid, by an ordinary refit."""
    grid = ladder([1e19, 3e19], (0.25, 0.4, 0.63, 1.0, 1.6, 2.5, 4.0))
    after_grid, _ = linear_sds(pd.concat([DONE, grid]), 1e21, "ratio")
    half = 0.5 * grid["C"].sum()
    design = suggest_runs(DONE, SURFACE, target_flops=1e21, remaining_flops=half, quantity="ratio", max_runs=40)
    chosen = pd.DataFrame([{"N": r.N, "D": r.D, "C": r.C} for r in design.runs])
    assert design.flops <= half * (1 + 1e-9)
    assert linear_sds(pd.concat([DONE, chosen]), 1e21, "ratio")[0] <= after_grid


@pytest.mark.parametrize("quantity", ["ratio", "loss"])
def test_rounds_beat_the_whole_grid_at_half_its_cost(quantity):
    """From two budgets up: the interval of five budgets over two decades for at most half its FLOPs, and no larger an
    error where budgets share one."""
    guess = 1.6 * np.geomspace(1 / 4, 4, 7)  # as good as N* is known before anything was run
    grid = ladder(1e18 * 10 ** np.linspace(0, 2, 5), guess)
    claimed, real = linear_sds(grid, 1e21, quantity, shared=0.002)
    total = 0.5 * grid["C"].sum()
    runs = ladder(1e18 * 10 ** np.array([0, 0.5]), guess)
    while total - (spent := runs["C"].sum()) > 0.02 * total:
        flops = round_flops(spent, total - spent)
        design = suggest_runs(runs, SURFACE, target_flops=1e21, remaining_flops=flops, quantity=quantity, noise_sd=0.003)
        runs = pd.concat([runs, pd.DataFrame([(r.N, r.D, r.C) for r in design.runs], columns=["N", "D", "C"])], ignore_index=True)
    assert runs["C"].sum() <= total * (1 + 1e-9)
    after, real_after = linear_sds(runs, 1e21, quantity, shared=0.002)
    assert after <= claimed
    assert real_after <= real


def test_rounds_grow_and_the_last_takes_what_is_left():
    assert round_flops(1e19) == round_flops(1e19, 1e21) == pytest.approx(5e18)
    assert round_flops(1e19, 7e18) == 7e18 and round_flops(1e19, 3e18) == 3e18


def test_design_does_not_care_for_units():
    a = suggest_runs(DONE, SURFACE, target_flops=1e21, remaining_flops=6e19)
    scaled = DONE.assign(N=DONE["N"] / 1e6, D=DONE["D"] / 1e9)
    rescaled = {**SURFACE, "A": SURFACE["A"] * 1e6 ** -SURFACE["alpha"], "B": SURFACE["B"] * 1e9 ** -SURFACE["beta"]}
    b = suggest_runs(scaled, rescaled, target_flops=1e21, remaining_flops=6e19)
    assert b.sd_after == pytest.approx(a.sd_after, rel=1e-6)
    np.testing.assert_allclose([r.N * 1e6 for r in b.runs], [r.N for r in a.runs])


def test_sizes_that_can_be_built_are_respected():
    sizes = [6e7, 1.1e8, 2.35e8, 4.35e8]
    design = suggest_runs(DONE, SURFACE, target_flops=1e21, remaining_flops=6e19, sizes=sizes)
    assert {r.N for r in design.runs} <= set(sizes) and design.runs


def test_requests_that_make_no_sense():
    with pytest.raises(DataError, match="must be positive"):
        suggest_runs(DONE, SURFACE, target_flops=1e21, remaining_flops=0)
    with pytest.raises(DataError, match="no alpha"):
        suggest_runs(DONE, {**SURFACE, "alpha": 0.0}, target_flops=1e21, remaining_flops=1e19)
    with pytest.raises(DataError, match="no run fits"):
        suggest_runs(DONE, SURFACE, target_flops=1e21, remaining_flops=1e19, sizes=[1e13])
