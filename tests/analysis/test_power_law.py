"""Power laws through optima: against ordinary least squares, brute force, and repeated experiments."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.errors import DataError
from analysis.power_law import Points, extra_symbol, fit_censored, fit_line, fit_power_law


def points(x, y, se=np.nan, low=-np.inf, high=np.inf, interior=True, **more) -> Points:
    n = len(y)
    full = [np.broadcast_to(np.asarray(v, dtype=float), n).copy() for v in (se, low, high)]
    symbols = {"D": np.asarray(x, dtype=float), **{k: np.asarray(v, dtype=float) for k, v in more.items()}}
    inside = np.broadcast_to(interior, n).copy()
    return Points(symbols=symbols, value=np.asarray(y, float), se=full[0], low=full[1], high=full[2], interior=inside, df_se=9.0)


def fit(p: Points, symbols=("D",), assumed=None, **options):
    assumed = assumed if assumed is not None else {"D": 0.383, "N": -0.7}
    return fit_power_law(p, name="law", target="B", symbols=symbols, assumed=assumed, method="", source_hash="h", **options)


def test_without_standard_errors_it_is_ordinary_least_squares():
    rng = np.random.default_rng(0)
    x = rng.uniform(20, 25, 9)
    y = 0.57 * x + 0.1 * rng.standard_normal(9)
    reference = stats.linregress(x, y)
    law = fit(points(x, y))
    assert law.parameters["D"] == pytest.approx(reference.slope)
    assert law.standard_errors["D"] == pytest.approx(reference.stderr)
    half = stats.t.ppf(0.95, 7) * reference.stderr
    assert law.intervals["D"] == pytest.approx((reference.slope - half, reference.slope + half))
    assert np.log(law.parameters["k"]) == pytest.approx(reference.intercept)
    assert law.predict(D=np.exp(22.0)).value == pytest.approx(np.exp(reference.intercept + 22 * reference.slope))


def test_scatter_maximises_the_restricted_likelihood():
    """REML against a fine grid over τ², with the likelihood written out by determinants."""
    rng = np.random.default_rng(1)
    n = 12
    x, se = rng.uniform(-2, 2, n), rng.uniform(0.05, 0.4, n)
    y = 1 + 0.5 * x + rng.normal(0, 0.2, n) + rng.normal(0, se)
    design = np.column_stack([np.ones(n), x])

    def restricted(tau2: float) -> float:
        v = np.diag(se**2 + tau2)
        vi = np.linalg.inv(v)
        p = vi - vi @ design @ np.linalg.inv(design.T @ vi @ design) @ design.T @ vi
        return -0.5 * (np.linalg.slogdet(v)[1] + np.linalg.slogdet(design.T @ vi @ design)[1] + y @ p @ y)

    grid = np.linspace(0, 0.5, 20001)
    best = grid[np.argmax([restricted(t) for t in grid])]
    line = fit_line(design, y, se)
    assert line.tau**2 == pytest.approx(best, abs=5e-5)


def test_precise_points_count_more():
    x, y = np.array([0.0, 1, 2, 3]), np.array([0.0, 1.0, 2.0, 9.0])
    se = np.array([0.01, 0.01, 0.01, 8.0])
    assert fit_line(np.column_stack([np.ones(4), x]), y, se).beta[1] == pytest.approx(1.0, abs=0.02)


def test_censored_fit_is_the_maximum_of_the_likelihood():
    """Against a brute-force grid over both coefficients."""
    x = np.array([-2.0, -1, 0, 1, 2])
    y = np.array([-1.05, -0.4, 0.02, 0.55, np.nan])
    interior = np.array([True] * 4 + [False])
    p = points(x, y, se=0.1, low=[-np.inf] * 4 + [1.4], interior=interior)
    design = np.column_stack([np.ones(5), x])
    start = fit_line(design[:4], y[:4], p.se[:4])
    line = fit_censored(design, p, start)
    width = np.sqrt(start.tau**2 + 0.01)

    a, b = np.meshgrid(np.linspace(-0.3, 0.3, 401), np.linspace(0.3, 0.9, 401))
    squares = sum(((y[i] - a - b * x[i]) / width) ** 2 for i in range(4))
    values = -0.5 * squares + stats.norm.logsf((1.4 - a - b * 2.0) / width)
    i = np.unravel_index(values.argmax(), values.shape)
    np.testing.assert_allclose(line.beta, [a[i], b[i]], atol=2e-3)
    assert line.beta[1] > start.beta[1]  # the edge cell pulls the slope up

    z = (1.4 - design[4] @ line.beta) / width
    hazard = np.exp(stats.norm.logpdf(z) - stats.norm.logsf(z))
    inside = design[:4].T @ design[:4] / width**2
    information = inside + hazard * (hazard - z) / width**2 * np.outer(design[4], design[4])
    scale = max(1.0, np.trace(start.covariance @ inside) / 2)  # what the start's covariance carries for misfit
    np.testing.assert_allclose(line.covariance, scale * np.linalg.inv(information), rtol=1e-3)


def test_an_edge_cell_moves_the_law_towards_the_truth():
    """Optima beyond their grid left out bias the slope down; as censored points they repair it."""
    rng = np.random.default_rng(3)
    left_out, censored = [], []
    for _ in range(60):
        x = np.linspace(0, 4, 9)
        y = 0.6 * x + 0.25 * rng.standard_normal(9)
        edge = y > 1.9  # the grids stop there
        p = points(x, np.where(edge, np.nan, y), se=0.05, low=np.where(edge, 1.9, -np.inf), interior=~edge)
        law = fit(p)
        censored.append(law.exponents["D"])
        left_out.append(law.tests["without_edge_cells"]["exponents"]["D"] if edge.any() else law.exponents["D"])
    assert abs(np.mean(censored) - 0.6) < 0.5 * abs(np.mean(left_out) - 0.6)


def test_two_scales_fix_nothing_and_say_so():
    law = fit(points([20.0, 22.0], [10.0, 11.0], se=0.1))
    assert law.status == "too_few"
    assert law.exponents["D"] == 0.383 and law.intervals["D"] is None
    assert "kept at 0.383 (published)" in law.message
    assert law.tests["two_point_exponent"] == pytest.approx(0.5)
    middle = law.predict(D=np.exp(21.0))
    assert middle.value == pytest.approx(np.exp(10.5))
    assert middle.low is not None and middle.low < middle.value < middle.high


def test_one_scale_still_fits_the_constant():
    law = fit(points([21.0], [10.5], se=0.1))
    assert (law.status, law.n) == ("too_few", 1)
    assert law.predict(D=np.exp(21.0)).value == pytest.approx(np.exp(10.5))
    low, high = law.intervals["k"]
    assert low < law.parameters["k"] < high


def test_no_scale_at_all():
    law = fit(points([20.0, 21.0], [np.nan, np.nan], high=[10.0, 10.5], interior=False))
    assert (law.status, law.coefficient) == ("at_bound", None)
    with pytest.raises(DataError, match="has no value"):
        law.predict(D=1e9)


def test_mostly_edges_is_at_bound():
    y = np.array([10.0, 10.4, 10.8, np.nan, np.nan, np.nan, np.nan])
    interior = np.isfinite(y)
    law = fit(points(np.arange(20.0, 27.0), y, low=np.where(interior, -np.inf, 11.0), interior=interior))
    assert law.status == "at_bound" and "only 3 of 7 cells" in law.message


def test_predictors_that_move_together_are_not_identifiable():
    x = np.linspace(20, 24, 6)
    y = 0.5 * x + np.array([0.01, -0.02, 0.015, 0.0, -0.01, 0.005])
    law = fit(points(x, y, N=x - 3.0), symbols=("N", "D"))
    assert law.status == "not_identifiable"
    assert "move together (correlation 1.0000)" in law.message
    assert law.exponents["N"] == -0.7 and law.intervals["N"] is None
    still = fit(points(x, y, N=np.full(6, 18.0)), symbols=("N", "D"))
    assert still.status == "not_identifiable" and "N hardly varies" in still.message
    assert still.exponents["D"] == pytest.approx(0.5, abs=0.02)


def test_what_a_kept_exponent_explains_is_taken_from_edge_cells_too():
    """N and D move together: with N kept at -0.7 it is the fit over D alone of what the N term leaves."""
    x, interior = np.linspace(20, 24, 6), np.array([True] * 5 + [False])
    y = 0.5 * x + np.array([0.01, -0.02, 0.015, 0.0, -0.01, np.nan])
    n = x - 3.0 + np.array([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])  # but in the edge cell
    low = np.where(interior, -np.inf, 12.1)
    law = fit(points(x, y, se=0.02, low=low, interior=interior, N=n), symbols=("N", "D"))
    left = 0.7 * (n - n[:5].mean())
    alone = fit(points(x, y + left, se=0.02, low=low + left, interior=interior))
    assert law.exponents == {"N": -0.7, "D": pytest.approx(alone.exponents["D"], rel=1e-6)}
    assert law.coefficient == pytest.approx(alone.coefficient, rel=1e-6)


def test_an_exponent_that_stays_open_keeps_the_published_one():
    """Three noisy cells over a short range would give −3 as gladly as +4: the published exponent is the better bet."""
    law = fit(points([20.0, 20.4, 20.8], [10.0, 8.9, 10.9]))
    assert (law.status, law.exponents["D"], law.intervals["D"]) == ("not_identifiable", 0.383, None)
    assert "leave the exponent of D anywhere in 1.1 ±" in law.message and "kept at 0.383" in law.message


def test_law_does_not_care_for_units():
    rng = np.random.default_rng(5)
    x, y = np.linspace(20, 25, 8), rng.normal(0, 0.1, 8) + 0.4 * np.linspace(20, 25, 8)
    a, b = fit(points(x, y)), fit(points(x - np.log(1e9), y - np.log(512)))
    assert a.parameters["D"] == pytest.approx(b.parameters["D"])
    assert a.intervals["D"] == pytest.approx(b.intervals["D"])
    assert a.predict(D=1e10).low == pytest.approx(512 * b.predict(D=10.0).low)


def test_extra_term_is_found_when_it_is_there_only():
    rng = np.random.default_rng(6)
    x, n = rng.uniform(20, 25, 20), rng.uniform(17, 21, 20)
    noise = 0.1 * rng.standard_normal(20)
    there = extra_symbol(points(x, 0.57 * x - 0.3 * n + noise, N=n), ("D",), "N")
    absent = extra_symbol(points(x, 0.57 * x + noise, N=n), ("D",), "N")
    assert there["significant"] and there["exponent"] == pytest.approx(-0.3, abs=0.1)
    assert not absent["significant"]
    assert extra_symbol(points(x, x, N=np.full(20, 18.0)), ("D",), "N") is None


@pytest.mark.parametrize("cells", [4, 8])
def test_prediction_interval_covers_a_new_optimum(cells):
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(300):
        x = np.linspace(20, 24, cells)
        y = 0.5 * x + 0.15 * rng.standard_normal(cells) + 0.08 * rng.standard_normal(cells)
        told = fit(points(x, y, se=0.08)).predict(D=np.exp(26.0))
        hits += told.low <= np.exp(0.5 * 26.0 + 0.15 * rng.standard_normal()) <= told.high
    assert 0.85 <= hits / 300 <= 0.96


def test_prediction_names_the_distance_and_a_missing_symbol():
    law = fit(points([20.0, 21, 22, 23], [10.0, 10.5, 11.0, 11.4]))
    assert law.predict(D=np.exp(22.5)).extrapolation == 1.0
    assert law.predict(D=np.exp(23.0) * 40).extrapolation == pytest.approx(40.0)
    with pytest.raises(DataError, match="needs D > 0"):
        law.predict(N=1e9)
