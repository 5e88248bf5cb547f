"""Optima of single cells and the rule that tells an optimum from the edge of its grid."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.edge import extend_grid, next_grid
from analysis.errors import DataError
from analysis.noise import SeedNoise
from analysis.valley import fit_valley, locate

UNKNOWN = (float("nan"), 0.0)


def paraboloid(lr: np.ndarray, batch: np.ndarray) -> np.ndarray:
    x, z = np.log(lr / 3e-3), np.log(batch / 5e5)
    return np.exp(0.9 + 0.02 * x**2 + 0.012 * z**2 - 0.008 * x * z)


def grid2d(lrs, batches) -> tuple[np.ndarray, np.ndarray]:
    lr, batch = np.meshgrid(lrs, batches)
    return lr.ravel(), batch.ravel()


def test_two_dimensional_vertex_is_exact_without_noise():
    lr, batch = grid2d(np.geomspace(5e-4, 2e-2, 7), np.geomspace(6e4, 4e6, 7))
    valley = fit_valley(("lr", "B"), np.column_stack([lr, batch]), paraboloid(lr, batch))
    np.testing.assert_allclose(np.exp(valley.vertex), [3e-3, 5e5], rtol=1e-6)
    assert locate(valley, "B", 1e-6, 20.0).edge == "interior"


def test_one_dimensional_vertex_is_exact_and_does_not_care_for_units():
    x = np.geomspace(0.01, 0.3, 5)
    loss = np.exp(1 + 0.03 * (np.log(x) - np.log(0.07)) ** 2)
    for unit in (1.0, 1e-6, 4096.0):
        for scale in (1.0, 0.31):
            vertex = fit_valley(("k",), x * unit, loss * scale).vertex
            np.testing.assert_allclose(np.exp(vertex[0]) / unit, 0.07, rtol=1e-9)


def test_standard_error_of_the_vertex_matches_repeated_experiments():
    """The delta method against the scatter of 400 noisy sweeps, one and two knobs."""
    rng = np.random.default_rng(0)
    noise = 0.0015
    lr, batch = grid2d(np.geomspace(1.4e-3, 6e-3, 5), np.geomspace(2e5, 1.3e6, 5))
    knobs, clean = np.column_stack([lr, batch]), paraboloid(lr, batch)
    found, told = [], []
    for _ in range(400):
        valley = fit_valley(("lr", "B"), knobs, clean * np.exp(noise * rng.standard_normal(len(clean))))
        optimum = locate(valley, "B", noise**2, 1e6)
        if optimum.edge == "interior":
            found.append(optimum.log_value)
            told.append(optimum.log_se)
    assert len(found) > 380
    assert np.std(found) == pytest.approx(np.median(told), rel=0.15)


def test_interval_of_an_interior_optimum_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    x = np.geomspace(1, 32, 6)
    inside = 0
    for _ in range(500):
        loss = np.exp(0.02 * np.log(x / 6.0) ** 2 + 0.002 * rng.standard_normal(6))
        valley = fit_valley(("k",), x, loss)
        low, high = locate(valley, "k", valley.rss / valley.df, valley.df).interval(0.9) or (0.0, np.inf)
        inside += low <= 6.0 <= high
    assert 0.86 <= inside / 500 <= 0.98  # a sweep without an interval does not exclude the truth


@pytest.mark.parametrize(
    ("optimum", "edge", "bounds"),
    [(0.1, "low", (None, 2.0)), (1.0, "low", (None, 2.0)), (5.0, "interior", (None, None)), (90.0, "high", (8.0, None))],
)
def test_argmin_on_the_boundary_is_no_optimum(optimum, edge, bounds):
    x = np.array([1.0, 2, 4, 8, 16])
    valley = fit_valley(("k",), x, np.exp(0.01 * np.log(x / optimum) ** 2))
    found = locate(valley, "k", *UNKNOWN)
    assert found.edge == edge
    told = tuple(float(np.exp(b)) if np.isfinite(b) else None for b in found.bounds)
    assert told == pytest.approx(bounds)
    assert (found.as_dict()["value"] is None) == (edge != "interior")


def test_vertex_interval_that_leaves_the_grid_is_no_optimum():
    x = np.array([1.0, 2, 4, 8, 16])
    loss = np.exp(0.01 * np.log(x / 10.5) ** 2)
    sharp = locate(fit_valley(("k",), x, loss), "k", (0.0005) ** 2, 50.0)
    vague = locate(fit_valley(("k",), x, loss), "k", (0.004) ** 2, 50.0)
    assert sharp.edge == "interior"
    assert vague.edge == "high" and vague.interval() is None


def test_curvature_that_noise_explains_is_flat():
    x = np.array([1.0, 2, 4, 8, 16])
    loss = np.exp(1e-5 * np.log(x / 4.0) ** 2)
    found = locate(fit_valley(("k",), x, loss), "k", 0.002**2, 20.0)
    assert (found.edge, found.reason) == ("flat", "the curvature's interval includes 0")


def test_far_points_do_not_bend_the_valley():
    """Losses far off the best are not quadratic; they are left out as soon as enough near ones are there."""
    x = np.geomspace(1, 1024, 11)
    loss = np.exp(0.01 * np.log(x / 20.0) ** 2) + np.where(x > 200, 0.5, 0.0)
    valley = fit_valley(("k",), x, loss)
    assert np.exp(valley.vertex[0]) == pytest.approx(20.0, rel=1e-6)
    assert not valley.used[x > 200].any()


def test_extend_grid_is_geometric_on_the_side_asked():
    assert extend_grid([1, 2, 4, 8], "high") == [16, 32]
    assert extend_grid([8, 2, 4, 1], "low") == [0.25, 0.5]
    assert extend_grid([0.0, 1.0, 3.0, 30.0], "low") == pytest.approx([1 / 9, 1 / 3])
    with pytest.raises(DataError, match="1 positive values"):
        extend_grid([0.0, 1.0], "low")
    with pytest.raises(DataError, match="'up' must be low or high"):
        extend_grid([1, 2], "up")  # type: ignore[arg-type]


def test_next_grid_extends_twice_then_stops():
    x = np.array([1.0, 2, 4, 8])
    loss = 1 + 0.01 * np.log(x / 100.0) ** 2
    first = next_grid(x, loss)
    assert first is not None and (first.side, first.values) == ("high", (16.0, 32.0))
    assert next_grid(x, loss, extensions_done=2) is None
    assert next_grid(x, 1 + 0.01 * np.log(x / 3.0) ** 2) is None
    zero_best = next_grid([0.0, *x], [0.9, 1.0, 1.1, 1.2, 1.3])
    assert zero_best is not None and zero_best.side == "low"
    diverged = next_grid(x, [1.0, np.nan, 1.1, np.inf])
    assert diverged is not None and diverged.side == "low"
    assert next_grid([1.0, 1.0], [2.0, 2.1]) is None  # one value: nothing to extend by
    score = next_grid(x, [-0.21, -0.22, -0.24, -0.25])  # a score to be made large, with its sign turned
    assert score is not None and score.side == "high"


def test_next_grid_judges_the_vertex_by_what_replicates_scatter():
    x = np.repeat([1.0, 2, 4, 8, 16], 4)
    valley, scatter = 0.004 * np.log(x / 4.3) ** 2, np.tile([1, -1, 1, -1], 5)
    assert next_grid(x, np.exp(valley + 0.002 * scatter)) is None
    assert next_grid(x, np.exp(valley + 0.03 * scatter)) is not None


def test_next_grid_with_noise_also_distrusts_a_vague_vertex():
    x = np.array([1.0, 2, 4, 8])
    loss = 1 + 0.004 * np.log(x / 3.6) ** 2
    assert next_grid(x, loss, noise=SeedNoise(sd=1e-4, df=30)) is None
    assert next_grid(x, loss, noise=SeedNoise(sd=0.02, df=30)) is not None
