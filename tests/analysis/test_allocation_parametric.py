"""The parametric surface: published reference optima, a slow reference, units, statuses."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from allocation_tables import HOFFMANN, ladder, table
from scipy import optimize

from analysis.allocation import fit_flops_rule, fit_parametric, fit_variants, leave_one_budget_out, profile_exponent
from analysis.allocation.newton import minimize
from analysis.allocation.objective import Evaluator, Problem, values
from analysis.allocation.parametric import make_problem
from analysis.allocation.starts import parameter_box
from analysis.errors import DataError

# Best known optima of the objective sum Huber_{1e-3}(log L_hat - log L), found by exhaustive multi-start on the published tables.
REFERENCE = [
    ("chinchilla_epoch", True, 240, 1.0182740e-3, 1.8172, 477.8, 2143.4, 0.3473, 0.3672),
    ("chinchilla_epoch", False, 245, 1.8260105e-3, 1.8913, 495.7, 12846, 0.3493, 0.4530),
    ("marin_comma", False, 85, 0.5255634e-3, 2.7009, 2.161e5, 1393, 0.6658, 0.3499),
    ("marin_comma", True, 80, 0.4348425e-3, 2.6837, 5.238e5, 1415, 0.7103, 0.3490),
    ("marin_dclm", False, 85, 0.5358372e-3, 2.5880, 3.471e5, 4083, 0.6858, 0.4048),
    ("marin_dclm", True, 79, 0.3613317e-3, 2.5673, 3.321e5, 3563, 0.6825, 0.3972),
]


@pytest.mark.parametrize(("name", "clean", "n", "objective", "E", "A", "B", "alpha", "beta"), REFERENCE)
def test_reaches_the_best_known_optimum(name, clean, n, objective, E, A, B, alpha, beta):
    t = table(name, clean=clean)
    fit = fit_parametric(t["N"], t["D"], t["L"])
    assert fit.n == n and fit.status == "converged"
    assert fit.objective_log <= objective * (1 + 1e-5)
    assert (fit.alpha, fit.beta) == pytest.approx((alpha, beta), abs=1e-3)
    assert pytest.approx(E, abs=2e-3) == fit.E
    assert pytest.approx((A, B), rel=0.02) == (fit.A, fit.B)


def test_recovers_a_known_surface_exactly():
    r = ladder(HOFFMANN, 10.0 ** np.arange(17, 22), sizes=15, span=16)
    for fit in fit_variants(r.N, r.D, r.L).values():
        assert (fit.A, fit.B, fit.E, fit.alpha, fit.beta) == pytest.approx((406.4, 410.7, 1.69, 0.34, 0.28), rel=1e-7)
        assert fit.status == "converged"


@pytest.mark.parametrize("scale", [(1e-6, 1e-9, 1.0), (1e3, 1.0, 1 / math.log(2)), (7e-8, 3e11, 4.2)])
def test_units_change_only_the_constants(scale):
    t = table("marin_comma", clean=True)
    base = fit_parametric(t["N"], t["D"], t["L"])
    other = fit_parametric(t["N"] * scale[0], t["D"] * scale[1], t["L"] * scale[2])
    assert other.objective_log == pytest.approx(base.objective_log, rel=1e-9)
    assert (other.alpha, other.beta) == pytest.approx((base.alpha, base.beta), rel=1e-6)
    assert pytest.approx(base.E * scale[2], rel=1e-6) == other.E
    assert pytest.approx(base.A * scale[2] * scale[0] ** base.alpha, rel=1e-4) == other.A
    assert other.status == base.status


def test_the_order_of_the_runs_does_not_matter():
    t = table("marin_dclm", clean=False).sample(frac=1.0, random_state=3)
    assert fit_parametric(t["N"], t["D"], t["L"]).objective_log <= 0.5358372e-3 * (1 + 1e-5)


def random_problem(seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(9, 60))
    N, D = 10 ** rng.uniform(5, 8, n), 10 ** rng.uniform(7, 10, n)
    alpha, beta = rng.uniform(0.2, 0.7, 2)
    L = rng.uniform(0.5, 3) + 0.7 * (N / 1e6) ** -alpha + 0.7 * (D / 1e8) ** -beta
    L *= np.exp(10 ** rng.uniform(-3.5, -1.5) * rng.standard_t(3, n))
    return make_problem(N, D, L, 1e-3)[0]


@pytest.mark.parametrize("delta", [1e-3, 0.02, math.inf])
def test_gradient_and_hessian_against_differences(delta):
    problem = replace(random_problem(1), delta=delta)
    rng = np.random.default_rng(2)
    weights = rng.uniform(0.5, 2, (3, problem.x.size))
    theta = np.array([-1.0, -1.2, -0.4, 0.4, 0.35]) + 0.1 * rng.normal(size=(3, 5))
    value, gradient, hessian = Evaluator(problem, weights)(theta, np.arange(3))
    assert value == pytest.approx(values(problem, weights, theta), rel=1e-12)
    step = 1e-6
    for k in range(5):
        up, down = theta.copy(), theta.copy()
        up[:, k] += step
        down[:, k] -= step
        slope = (values(problem, weights, up) - values(problem, weights, down)) / (2 * step)
        assert gradient[k] == pytest.approx(slope, rel=1e-4, abs=1e-7)
        higher, lower = Evaluator(problem, weights)(up, np.arange(3))[1], Evaluator(problem, weights)(down, np.arange(3))[1]
        # Huber's second derivative jumps where a residual passes delta: such a point may lie inside the difference
        assert hessian[k] == pytest.approx((higher - lower) / (2 * step), rel=1e-3, abs=2e-3)


@pytest.mark.parametrize("seed", range(6))
def test_no_worse_than_many_slow_searches(seed):
    """scipy's BFGS from 40 random starts, the way the published fits were made, never finds a lower objective."""
    problem = random_problem(seed)
    n = np.exp(problem.x + 14)
    fit = fit_parametric(n, np.exp(problem.y + 20), np.exp(problem.z))
    rng = np.random.default_rng(seed)
    ones = np.ones((1, problem.x.size))

    def slow(theta):
        return float(values(problem, ones, theta[None])[0]) * 1e3

    starts = np.column_stack([np.log(rng.dirichlet([1, 1, 1], 40)), rng.uniform(0.05, 1.2, (40, 2))])
    best = min(optimize.minimize(slow, s, method="BFGS", options={"maxiter": 300}).fun for s in starts) / 1e3
    assert fit.objective_log <= best * (1 + 1e-5)


def test_weights_are_repeated_runs():
    t = table("marin_comma", clean=True).iloc[::3]
    count = np.random.default_rng(0).integers(1, 4, len(t))
    weighted = fit_parametric(t["N"], t["D"], t["L"], weights=count)
    long = t.loc[t.index.repeat(count)]
    repeated = fit_parametric(long["N"], long["D"], long["L"])
    assert weighted.objective_log == pytest.approx(repeated.objective_log, rel=1e-7)


def test_newton_stays_in_its_box_and_says_when_it_converged():
    problem = random_problem(4)
    box = parameter_box(problem)
    start = np.array([[5.0, 5.0, 4.0, 30.0, 30.0], [-1.0, -1.0, -1.0, 0.3, 0.3]])
    theta, value, done = minimize(Evaluator(problem, np.ones((1, problem.x.size))), start, box)
    assert (theta >= box.lower).all() and (theta <= box.upper).all()
    assert done[1] and value[1] <= values(problem, np.ones((1, problem.x.size)), start[1:])[0]


def test_outliers_move_beta_as_published():
    """arXiv 2404.10102: dropping five points moves beta from 0.453 to 0.367."""
    whole, clean = (fit_parametric(t["N"], t["D"], t["L"]) for t in (table("chinchilla_epoch", clean=c) for c in (False, True)))
    assert (round(whole.beta, 3), round(clean.beta, 3)) == (0.453, 0.367)


def test_statuses():
    r = ladder(HOFFMANN, np.array([1e18, 1e19, 1e20]), sizes=5, span=4, noise=0.003, seed=1)
    few = fit_parametric(r.N[:4], r.D[:4], r.L[:4])
    assert few.status == "too_few" and math.isnan(few.alpha) and few.as_dict()["alpha"] is None
    exact = fit_parametric(r.N[:5], r.D[:5], r.L[:5])
    assert exact.status in ("not_identifiable", "at_bound")
    no_floor = fit_parametric(r.N, r.D, 40 * r.N**-0.1 + 2e4 * r.D**-0.4)
    assert no_floor.status == "at_bound" and "E" in no_floor.message
    fixed_ratio = fit_parametric(r.N, 20 * r.N, r.L)
    assert fixed_ratio.status in ("not_identifiable", "at_bound")
    one_size = fit_parametric(np.full(15, 1e8), r.D, r.L)
    assert one_size.status in ("not_identifiable", "at_bound")


@pytest.mark.parametrize(("column", "value", "words"), [("N", -1.0, "row 2"), ("L", math.nan, "row 2"), ("D", math.inf, "row 2")])
def test_bad_values_are_named(column, value, words):
    r = ladder(HOFFMANN, np.array([1e18, 1e19]), sizes=5, span=4)
    columns = {"N": r.N.copy(), "D": r.D.copy(), "L": r.L.copy()}
    columns[column][2] = value
    with pytest.raises(DataError, match=words):
        fit_parametric(**columns)


def test_optimum_is_the_lowest_point_of_its_budget():
    t = table("marin_comma", clean=True)
    fit = fit_parametric(t["N"], t["D"], t["L"])
    rule = fit_flops_rule(t["N"].to_numpy(), t["D"].to_numpy(), t["budget"].to_numpy())
    n, d, best = (float(v[0]) for v in fit.optimum(1e20, rule))
    assert float(rule.flops(n, d)) == pytest.approx(1e20, rel=1e-9)
    sizes = n * np.geomspace(0.2, 5, 2001)
    along = fit.loss(sizes, rule.tokens(sizes, 1e20))
    assert best == pytest.approx(along.min(), rel=1e-7)
    assert n == pytest.approx(sizes[along.argmin()], rel=2e-3)


def test_profile_holds_the_truth_and_the_best_fit():
    r = ladder(HOFFMANN, 10.0 ** np.array([18, 18.7, 19.4, 20.1]), sizes=9, span=5, noise=0.004, seed=5)
    fit = fit_parametric(r.N, r.D, r.L)
    profile = profile_exponent(fit, r.N, r.D, r.L)
    assert profile is not None and profile.interval is not None
    low, high = profile.interval
    assert low < profile.best < high and low < 0.28 / 0.62 < high and 0.01 < high - low < 0.5
    at_fit = profile_exponent(fit, r.N, r.D, r.L, level=0.5)
    assert at_fit is not None and at_fit.interval is not None and at_fit.interval[1] - at_fit.interval[0] < high - low


def test_leaving_out_a_budget_moves_nothing_on_an_exact_surface():
    r = ladder(HOFFMANN, 10.0 ** np.arange(18, 22), sizes=6, span=4)
    for row in leave_one_budget_out(r.N, r.D, r.L, r.budget, target_C=1e22):
        assert row["a"] == pytest.approx(0.28 / 0.62, rel=1e-6) and row["status"] == "converged" and row["n"] == 18


def test_large_tables():
    rng = np.random.default_rng(0)
    N, D = 10 ** rng.uniform(7, 10, 20_000), 10 ** rng.uniform(9, 12, 20_000)
    L = (1.69 + 406.4 / N**0.34 + 410.7 / D**0.28) * np.exp(0.005 * rng.normal(size=N.size))
    fit = fit_parametric(N, D, L)
    assert fit.status == "converged" and (fit.alpha, fit.beta, fit.E) == pytest.approx((0.34, 0.28, 1.69), abs=4e-3)
