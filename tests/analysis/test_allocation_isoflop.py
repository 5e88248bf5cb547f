"""IsoFLOP parabolas, the laws through their minima, and the conventions of N: published exponents and edge marks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from allocation_tables import HOFFMANN, ladder, table

from analysis.allocation import fit_compute_law, fit_isoflop, ratio_steadiness, steadiest
from analysis.errors import DataError
from analysis.noise import SeedNoise

# nanochat, January 2026: optima of four budgets (really 1e18, 2.15e18, 4.64e18, 1e19), N in millions, D in billions, exponents.
NANOCHAT_C = np.array([1e18, 2.15e18, 4.64e18, 1e19])
NANOCHAT = {
    "matrices_lm_head": ([110.678, 167.797, 250.651, 381.758], [1.2415, 1.7853, 2.6422, 3.8069], 0.54, 0.49),
    "all": ([416.320, 560.240, 741.495, 988.644], [1.2322, 1.7637, 2.6299, 3.8848], 0.37, 0.50),
    "matrices": ([80.260, 131.489, 220.985, 401.214], [1.3156, 1.8641, 2.5953, 3.3287], 0.70, 0.41),
}


@pytest.mark.parametrize("name", NANOCHAT)
def test_nanochats_six_exponents(name):
    N, D, a, b = NANOCHAT[name]
    assert round(fit_compute_law(NANOCHAT_C, N).exponent, 2) == a
    assert round(fit_compute_law(NANOCHAT_C, D).exponent, 2) == b


def test_nanochats_steadiest_convention():
    found = {name: ratio_steadiness(NANOCHAT_C, np.array(N) * 1e6, np.array(D) * 1e9) for name, (N, D, _, _) in NANOCHAT.items()}
    assert [round(r, 1) for r in found["matrices_lm_head"].ratio] == [11.2, 10.6, 10.5, 10.0]
    best, text = steadiest(found)
    assert best == "matrices_lm_head" and "1.12x" in text
    assert found["matrices"].drift.exponent == pytest.approx(0.41 - 0.70, abs=0.01)


@pytest.mark.parametrize(("name", "a", "b"), [("marin_comma", 0.405, 0.572), ("marin_dclm", 0.424, 0.552)])
def test_marins_exponents(name, a, b):
    t = table(name, clean=False)
    fit = fit_isoflop(t["N"], t["D"], t["L"], t["budget"])
    assert (round(fit.N_law.exponent, 3), round(fit.D_law.exponent, 3)) == (a, b)
    lowest = fit.budgets[0]
    assert lowest.C == 3e18 and lowest.status == "flat"  # five runs: their curvature is not sure, and the law without it differs
    assert fit.N_interior.n == fit.N_law.n - 1 and abs(fit.N_interior.exponent - a) > 0.01


def test_bias_of_parabolas_on_wide_grids():
    """arXiv 2603.22339: grids of +-16x recover the exponent and put D* 5.1% low."""
    r = ladder(HOFFMANN, 10.0 ** np.arange(17, 22), sizes=15, span=16)
    law = fit_isoflop(r.N, r.D, r.L, r.budget).D_law
    assert law.exponent == pytest.approx(0.548387, abs=5e-7)
    assert math.log10(law.coefficient) == pytest.approx(-0.578092, abs=5e-7)


def test_tokens_have_their_own_parabola():
    """With C = 3 N D the tokens at the optimum are twice what C / (6 N) says."""
    r = ladder(HOFFMANN, 10.0 ** np.arange(18, 22), sizes=9, span=4)
    fit = fit_isoflop(r.N, r.D, r.L, r.budget / 2)
    for budget in fit.budgets:
        assert budget.in_N and budget.in_D
        assert budget.in_D.vertex / (budget.C / (6 * budget.in_N.vertex)) == pytest.approx(2.0, rel=0.02)


def test_fieller_interval_covers_the_vertex():
    """300 noisy grids of a true parabola: a 90% interval holds the vertex 85-95% of the time (binomial, 3 standard deviations)."""
    rng = np.random.default_rng(0)
    x = np.log(1e8) + np.linspace(-1.2, 1.2, 7)
    hits = 0
    for _ in range(300):
        loss = 3 + 0.08 * (x - np.log(1.2e8)) ** 2 + 0.004 * rng.normal(size=7)
        parabola = fit_isoflop(np.exp(x), 1e18 / np.exp(x), loss, np.full(7, 1e18)).budgets[0].in_N
        assert parabola is not None and parabola.interval is not None
        hits += parabola.interval[0] <= 1.2e8 <= parabola.interval[1]
    assert 254 <= hits <= 286


@pytest.mark.parametrize(("off", "side"), [(6.0, "low"), (1 / 6.0, "high")])
def test_a_minimum_outside_its_grid_is_marked(off, side):
    r = ladder(HOFFMANN, 10.0 ** np.arange(18, 22), sizes=7, span=3, noise=0.0005, seed=1, off_centre=off)
    fit = fit_isoflop(r.N, r.D, r.L, r.budget)
    assert {b.status for b in fit.budgets} == {"edge"} and {b.in_N.side for b in fit.budgets if b.in_N} == {side}
    assert fit.N_law.status == "too_few" and "add two" in fit.message


def test_no_curvature_is_flat_and_few_sizes_are_too_few():
    rng = np.random.default_rng(0)
    N = np.geomspace(1e8, 1e9, 6)
    flat = fit_isoflop(N, 1e18 / N, 3 + 0.01 * rng.normal(size=6), np.full(6, 1e18))
    assert flat.budgets[0].status == "flat"
    two = fit_isoflop(N[:2], 1e18 / N[:2], [3.0, 3.1], [1e18, 1e18])
    assert two.budgets[0].status == "too_few" and two.N_law.status == "too_few" and two.as_dict()["N_exponent"] is None


def test_seed_noise_judges_where_three_sizes_leave_nothing_and_is_trusted_as_far_as_it_goes():
    """Three runs fix a parabola: its interval then is the seed noise's, by t with as many degrees of freedom as that has."""
    r = ladder(HOFFMANN, 10.0 ** np.arange(18, 21), sizes=3, span=4)
    assert math.isnan(fit_isoflop(r.N, r.D, r.L, r.budget).lowest[0].sd)

    def width(df: int) -> float:
        fit = fit_isoflop(r.N, r.D, r.L, r.budget, noise=SeedNoise(sd=1e-4, df=df))
        assert fit.lowest_df == df and fit.residual_sd == 1e-4
        low, high = fit.budgets[0].in_N.interval
        return math.log(high / low)

    assert width(2) / width(1000) == pytest.approx(2.920 / 1.646, rel=0.02)


def test_runs_off_their_budget_are_moved_onto_it():
    r = ladder(HOFFMANN, 10.0 ** np.array([18, 19, 20, 21]), sizes=9, span=4)
    rng = np.random.default_rng(1)
    drift = np.exp(rng.uniform(-0.08, 0.08, r.N.size))
    D = r.D * drift
    L = 1.69 + 406.4 / r.N**0.34 + 410.7 / D**0.28
    plain = fit_isoflop(r.N, D, L, r.budget)
    moved = fit_isoflop(r.N, D, L, r.budget, C=r.C * drift)
    assert moved.residual_sd < 0.5 * plain.residual_sd
    true = fit_isoflop(r.N, r.D, r.L, r.budget)
    assert pytest.approx(true.lowest[1].L, rel=5e-4) == moved.lowest[1].L


def test_units_do_not_matter():
    t = table("marin_dclm", clean=True)
    one = fit_isoflop(t["N"], t["D"], t["L"], t["budget"])
    two = fit_isoflop(t["N"] * 1e-6, t["D"] * 1e-9, t["L"] / math.log(2), t["budget"] * 1e-18)
    assert two.N_law.exponent == pytest.approx(one.N_law.exponent, rel=1e-9)
    assert [b.status for b in one.budgets] == [b.status for b in two.budgets]


def test_a_law_says_what_it_rests_on():
    assert fit_compute_law([1e18], [1e8]).status == "too_few"
    two = fit_compute_law([1e18, 1e19], [1e8, 3e8])
    assert two.status == "not_identifiable" and two.exponent_interval is None and two.at(1e20)[1] is None
    five = fit_compute_law(10.0 ** np.arange(18, 23), 3.0 * 10.0 ** (0.5 * np.arange(18, 23)))
    assert five.exponent == pytest.approx(0.5) and five.at(1e24)[0] == pytest.approx(3e12)
    with pytest.raises(DataError, match="budget"):
        fit_isoflop([1e8, 2e8], [1e9, 1e9], [3.0, 3.1], [1e18])
