"""The batched bootstrap: as good as a careful fit of every resample, and Epoch's standard errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from allocation_tables import HOFFMANN, ladder, table

from analysis.allocation import bootstrap_parametric, fit_parametric
from analysis.allocation.bootstrap import minimize_resamples, resample_weights
from analysis.allocation.parametric import make_problem
from analysis.allocation.starts import search
from analysis.errors import DataError


@pytest.fixture(scope="module")
def epoch():
    t = table("chinchilla_epoch", clean=True)
    return t["N"].to_numpy(), t["D"].to_numpy(), t["L"].to_numpy()


def test_every_resample_is_as_good_as_a_careful_fit(epoch):
    problem, _ = make_problem(*epoch, 1e-3)
    ones = np.ones(problem.x.size)
    basins, _ = search(problem, ones)
    weights, _, _ = resample_weights(problem.x.size, 200, None, 4)
    _, value = minimize_resamples(problem, weights, basins)
    careful = np.array([search(problem, weights[i])[1][0] for i in range(0, 200, 25)])
    assert (value[::25] <= careful * (1 + 1e-6)).all()


def test_standard_errors_of_the_published_refit(epoch):
    """arXiv 2404.10102 prints A 124.5, B 1293, E 0.0257, alpha 0.0154, beta 0.0206, a 0.020 from 4000 resamples of the 240 runs.
    The default seed draws the same 4000 first, and then all its digits come back; 72,000 resamples of other seeds give A 121,
    B 1330, E 0.0252, alpha 0.0151, beta 0.0201, a 0.0195: B's tail is heavy."""
    fit = fit_parametric(*epoch)
    boot = bootstrap_parametric(fit, *epoch)
    assert boot.kind == "plain" and boot.n_boot == 10_000
    printed = {"A": 124.5, "B": 1293.0, "E": 0.0257, "alpha": 0.0154, "beta": 0.0206, "a": 0.020}
    assert boot.se == pytest.approx(printed, rel=0.05)
    first = replace(boot, n_boot=4000, draws=boot.draws[:4000]).se
    digits = {"A": 1, "B": 0, "E": 4, "alpha": 4, "beta": 4, "a": 3}
    assert {k: round(first[k], digits[k]) for k in printed} == printed
    low, high = boot.intervals()["alpha"]
    assert low < fit.alpha < high and high - low == pytest.approx(2 * 1.645 * boot.se["alpha"], rel=0.15)


def test_groups_are_drawn_whole():
    labels = np.repeat(np.arange(20), 3)
    weights, kind, groups = resample_weights(60, 50, labels, 0)
    assert (kind, groups) == ("clustered", 20)
    assert np.ptp(weights.reshape(50, 20, 3), axis=2).max() == 0 and weights.sum(axis=1) == pytest.approx(60)
    few, kind, groups = resample_weights(60, 50, labels // 5, 0)
    assert (kind, groups) == ("bayesian_clustered", 4)
    assert few.min() > 0 and few.sum(axis=1) == pytest.approx(60)
    alone, kind, _ = resample_weights(60, 5, np.arange(60), 0)
    assert kind == "plain" and (alone == alone.round()).all()


def test_shared_trunks_widen_the_interval():
    """Runs that share a trunk share its luck: resampling them one by one pretends to three times the evidence."""
    r = ladder(HOFFMANN, 10.0 ** np.linspace(18, 21, 16), sizes=5, span=4)
    rng = np.random.default_rng(2)
    group = np.repeat(np.arange(r.N.size), 3)
    luck = np.exp(0.01 * rng.normal(size=r.N.size))[group]
    N, D = r.N[group], r.D[group] * np.tile([0.5, 1.0, 2.0], r.N.size)
    L = (1.69 + 406.4 / N**0.34 + 410.7 / D**0.28) * luck
    fit = fit_parametric(N, D, L)
    plain = bootstrap_parametric(fit, N, D, L, n_boot=600)
    clustered = bootstrap_parametric(fit, N, D, L, n_boot=600, groups=group)
    assert clustered.kind == "clustered" and clustered.n_groups == 80
    assert clustered.se["alpha"] > 1.2 * plain.se["alpha"]


def test_same_seed_same_draws(epoch):
    fit = fit_parametric(*epoch, thorough=False)
    one, two, other = (bootstrap_parametric(fit, *epoch, n_boot=100, seed=s).draws for s in (3, 3, 4))
    assert (one == two).all() and not (one == other).all()


def test_a_large_table_gets_fewer_resamples_but_enough():
    rng = np.random.default_rng(0)
    N, D = 10 ** rng.uniform(7, 10, 30_000), 10 ** rng.uniform(9, 12, 30_000)
    L = (1.69 + 406.4 / N**0.34 + 410.7 / D**0.28) * np.exp(0.005 * rng.normal(size=N.size))
    boot = bootstrap_parametric(fit_parametric(N, D, L, thorough=False), N, D, L)
    assert boot.n_boot == 200 and abs(np.median(boot.columns()["alpha"]) - 0.34) < 4 * boot.se["alpha"]


def test_refuses_too_few_runs_and_wrong_groups(epoch):
    n, d, l = epoch
    fit = fit_parametric(n[:4], d[:4], l[:4])
    with pytest.raises(DataError, match="at least 5"):
        bootstrap_parametric(fit, n[:4], d[:4], l[:4])
    with pytest.raises(DataError, match="groups"):
        bootstrap_parametric(fit_parametric(n, d, l, thorough=False), n, d, l, groups=[1, 2])
