"""Seed noise, the promotion test and compute multipliers: checked by repeating the experiment on known truths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from synthetic_ladder import DEMO, write_ladder

from analysis.compare import compare_recipes, compare_runs, frontier_slope, promotion_test
from analysis.errors import DataError
from analysis.noise import SeedNoise, estimate_noise
from analysis.report.facts_runs import promotion_facts
from analysis.stage_ranks import stage_ranks
from analysis.table import load_records, table_from_frame


def seeded(losses: list[list[float]], **columns) -> pd.DataFrame:
    rows = [{"N": 1e8 * (i + 1), "D": 1e9, "L": loss, "seed": s} for i, cell in enumerate(losses) for s, loss in enumerate(cell)]
    return table_from_frame(pd.DataFrame(rows).assign(**columns), source="t").frame


def test_noise_is_the_pooled_relative_variance():
    cells = [[2.0, 2.02, 1.99], [3.0, 3.01]]
    logs = [np.log(c) for c in cells]
    expected = np.sqrt(sum(((g - g.mean()) ** 2).sum() for g in logs) / 3)
    noise = estimate_noise(seeded(cells))
    assert (noise.sd, noise.df, len(noise.cells)) == (pytest.approx(expected), 3, 2)
    assert noise.low == pytest.approx(expected * np.sqrt(3 / stats.chi2.ppf(0.95, 3)))
    assert noise.high == pytest.approx(expected * np.sqrt(3 / stats.chi2.ppf(0.05, 3)))
    assert noise.status == "converged" and noise.message == "5 runs in 2 cells, 3 degrees of freedom"


def test_noise_needs_seeds():
    assert estimate_noise(seeded([[2.0], [3.0]])) is None
    assert estimate_noise(seeded([[2.0, 2.1]]).assign(seed=np.nan)) is None
    single = estimate_noise(seeded([[2.0, 2.1]]))
    assert (single.status, single.df) == ("too_few", 1) and "run at least 3 seeds" in single.message


def test_noise_is_recovered_from_records(tmp_path):
    write_ladder(tmp_path, replace(DEMO, noise=0.004, seed_replicates=12, weight_decay_cells=0, batch_cells=0))
    noise = estimate_noise(load_records(tmp_path).frame, level=0.99)
    assert noise.df in (11, 12)  # the middle cell may be one of the isoFLOP runs
    assert noise.low < 0.004 < noise.high


def test_noise_that_differs_between_cells_is_said():
    rng = np.random.default_rng(0)
    quiet, loud = 2 * np.exp(0.0005 * rng.standard_normal(8)), 3 * np.exp(0.02 * rng.standard_normal(8))
    assert "not the same everywhere" in estimate_noise(seeded([list(quiet), list(loud)])).message
    alike = [list(2 * np.exp(0.0005 * rng.standard_normal(8))) for _ in range(2)]
    assert "not the same everywhere" not in estimate_noise(seeded(alike)).message


def test_paired_test_is_the_t_test():
    b, c = {0: 1.00, 1: 1.006, 2: 0.998, 3: 1.002}, {0: 0.995, 1: 0.999, 2: 0.992, 3: 0.999}
    verdict = promotion_test(b, c)
    reference = stats.ttest_rel([np.log(b[s]) for s in b], [np.log(c[s]) for s in b], alternative="greater")
    assert verdict.p_value == pytest.approx(reference.pvalue)
    assert (verdict.verdict, verdict.num_pairs, verdict.runs_to_decide) == ("adopt", 4, None)
    assert verdict.posterior == pytest.approx(1 - reference.pvalue)
    worse = promotion_test(c, b)
    assert worse.verdict == "reject" and worse.gain == pytest.approx(-verdict.gain)


def test_no_seeds_decide_nothing():
    verdict = promotion_test({0: 1.0}, {0: 0.9})
    assert (verdict.verdict, verdict.p_value, verdict.low) == ("undecided", None, None)
    assert "at least 3 seeds" in verdict.message
    known = promotion_test({0: 1.0}, {0: 0.99}, noise=SeedNoise(sd=0.002, df=6))
    assert known.verdict == "adopt"


def test_undecided_says_how_many_runs_would_decide_and_they_do():
    noise = SeedNoise(sd=0.002, df=10)
    verdict = promotion_test({0: 1.0, 1: 1.0}, {0: 0.998, 1: 0.998}, noise=noise)
    assert verdict.verdict == "undecided"
    n = verdict.runs_to_decide
    wiggle = 0.0027 * np.resize([1, -1], n) * (n - 1) ** 0.5 / n**0.5  # the same variance of a pair's difference
    enough = promotion_test(dict.fromkeys(range(n), 1.0), {s: 0.998 * np.exp(w) for s, w in enumerate(wiggle)}, noise=noise)
    assert enough.verdict == "adopt"
    tiny = promotion_test({0: 1.0, 1: 1.001}, {0: 1.0, 1: 1.001 - 1e-7}, noise=noise)
    assert tiny.runs_to_decide is None and "too small a gain" in tiny.message


def test_false_promotions_are_as_rare_as_alpha_says():
    """No true gain: at most 5% (and not far below: the test is not blunt) of 2000 candidates are adopted."""
    rng = np.random.default_rng(0)
    adopted = 0
    for _ in range(2000):
        b, c = 0.003 * rng.standard_normal((2, 3))
        noise = SeedNoise(sd=0.003 * np.sqrt(rng.chisquare(4) / 4), df=4)
        adopted += promotion_test(dict(enumerate(np.exp(b))), dict(enumerate(np.exp(c))), noise=noise).verdict == "adopt"
    assert 0.035 <= adopted / 2000 <= 0.065


def test_interval_of_the_gain_covers_it():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        shared = 0.002 * rng.standard_normal(3)  # what a seed does to both recipes
        b, c = shared + 0.003 * rng.standard_normal(3), shared - 0.004 + 0.003 * rng.standard_normal(3)
        verdict = promotion_test(dict(enumerate(np.exp(b))), dict(enumerate(np.exp(c))))
        covered += verdict.low <= 0.004 <= verdict.high
    assert 0.87 <= covered / 1000 <= 0.93


def test_seeds_without_a_partner_and_several_candidates():
    b, c = {0: 1.0, 1: 1.004, 2: 0.997}, {7: 0.99, 8: 0.988, 9: 0.993}
    verdict = promotion_test(b, c)
    reference = stats.ttest_ind(np.log(list(b.values())), np.log(list(c.values())), alternative="greater")
    assert verdict.num_pairs == 0 and verdict.p_value == pytest.approx(reference.pvalue)
    assert promotion_test(b, c, num_candidates=1).verdict == "adopt"
    assert promotion_test(b, c, num_candidates=1000).verdict == "undecided"
    assert promotion_test(b, c, min_gain=0.05).verdict == "reject"


def test_losses_that_cannot_be_compared():
    with pytest.raises(DataError, match="candidate has no run"):
        promotion_test({0: 1.0}, {})
    with pytest.raises(DataError, match="baseline loss nan"):
        promotion_test({0: np.nan}, {0: 1.0})


def curve(final_flops: float, *, gain: float = 0.0, seconds_per_flop: float = 1e-15, points: int = 10) -> np.ndarray:
    """A run on the frontier L = C^−0.05, `gain` of log loss below it."""
    flops = final_flops * np.arange(1, points + 1) / points
    loss = np.exp(-0.05 * np.log(flops) - gain)
    return np.column_stack([np.arange(1, points + 1) * 100, flops / 6e8, flops, flops * seconds_per_flop, loss])


def test_compute_multiplier_of_a_known_gain():
    """1% of log loss at elasticity 0.05 is e^0.2 = 1.22x of compute."""
    base = {s: curve(1e18) * [1, 1, 1, 1, np.exp(1e-4 * s)] for s in range(3)}
    better = {s: curve(1e18, gain=0.01) * [1, 1, 1, 1, np.exp(1e-4 * s)] for s in range(3)}
    result = compare_recipes(base, better, slope=(0.05, 0.002), noise=SeedNoise(sd=0.0005, df=8))
    se = np.sqrt(2 * 0.0005**2 * 8 / (2 + 8) / 3)  # three equal pairs (df 2) pooled with the known noise (df 8)
    half, half_log = stats.t.ppf(0.95, 10) * np.array([se, np.hypot(se / 0.05, 0.01 * 0.002 / 0.05**2)])
    for axis in result.axes.values():
        assert axis.multiplier == pytest.approx(np.exp(0.2), rel=1e-6)
        assert (axis.multiplier_low, axis.multiplier_high) == pytest.approx(np.exp([0.2 - half_log, 0.2 + half_log]), rel=1e-4)
        assert axis.gain == pytest.approx(0.01) and axis.verdict == "better"
        assert (axis.low, axis.high) == pytest.approx((0.01 - half, 0.01 + half), rel=1e-4)
        assert axis.reach == pytest.approx(np.exp(0.2), rel=1e-3), "between two points of a power law"
    assert result.summary.startswith("a gain on every axis")


def test_gain_in_steps_that_wall_clock_eats():
    """0.5% better a step but 1.3x slower: a gain on two axes, a loss on the third, said as exactly that."""
    base, slow = {0: curve(1e18)}, {0: curve(1e18, gain=0.005, seconds_per_flop=1.3e-15)}
    result = compare_recipes(base, slow, slope=(0.05, 0.001), noise=SeedNoise(sd=0.0004, df=20))
    assert [a.verdict for a in result.axes.values()] == ["better", "better", "worse"]
    assert result.axes["seconds"].multiplier == pytest.approx(np.exp(0.1) / 1.3, rel=1e-6)
    assert result.axes["seconds"].gain == pytest.approx(0.005 - 0.05 * np.log(1.3))
    assert "a gain on steps and flops only, a loss on seconds" in result.summary


def test_slope_from_the_curves_when_no_frontier_is_given():
    base = {0: curve(1e18), 1: curve(1e18)}
    result = compare_recipes(base, {0: curve(1e18, gain=0.01), 1: curve(1e18, gain=0.01)}, noise=SeedNoise(sd=0.001, df=5))
    assert result.axes["flops"].slope == pytest.approx(0.05, rel=1e-6)
    assert "own curves" in result.axes["flops"].slope_source
    with pytest.raises(DataError, match="do not fall"):
        compare_recipes({0: curve(1e18)[::-1] * [1, 1, 1, 1, 1]}, base)


def test_slope_of_a_frontier_is_its_log_derivative():
    frontier = {"E": 1.6, "kappa0": 0.9, "C0": 1e18, "gamma": 0.15, "intervals": {"gamma": [0.12, 0.18]}}

    def log_loss(log_c: float) -> float:
        return float(np.log(1.6 + 0.9 * (np.exp(log_c) / 1e18) ** -0.15))

    x = np.log(3e19)
    slope, error = frontier_slope(frontier, 3e19)
    assert slope == pytest.approx(-(log_loss(x + 1e-5) - log_loss(x - 1e-5)) / 2e-5, rel=1e-6)
    assert error == pytest.approx(slope * 0.06 / (2 * 1.645) / 0.15, rel=1e-3)
    with pytest.raises(DataError, match="no frontier was fitted"):
        frontier_slope({}, 1e18)


def test_comparing_runs_of_a_table(tmp_path):
    write_ladder(tmp_path, replace(DEMO, weight_decay_cells=0, batch_cells=0, seed_replicates=4))
    table = load_records(tmp_path)
    seeds = table.frame[table.frame["sweep"] == "seeds"]["run_id"].tolist()
    result = compare_runs(table, seeds[:2], seeds[2:4], noise=estimate_noise(table.frame))
    assert set(result.axes) == {"steps", "flops", "seconds"} and result.num_pairs == 0
    assert all(a.low < 0 < a.high for a in result.axes.values())
    with pytest.raises(DataError, match="is not among the"):
        compare_runs(table, ["nope"], seeds)
    other = replace(table, frame=table.frame.assign(comparable_hash=np.where(table.frame["run_id"] == seeds[0], "feed", "beef")))
    with pytest.raises(DataError, match="2 kinds that are not comparable"):
        compare_runs(other, seeds[:1], seeds[1:2])
    assert compare_runs(other, seeds[:1], seeds[1:2], force=["feed", "beef"]).axes["flops"].verdict == "undecided"


def test_stages_that_rank_changes_differently_are_shown():
    gains = {"a": (0.03, 0.02, 0.01), "b": (0.02, 0.03, -0.01)}
    rows = [
        {"ladder": "l", "change": change, "stage": stage, "gain": gain, "verdict": "adopt" if gain > 0 else "reject"}
        for stage, column in gains.items()
        for change, gain in zip("xyz", column, strict=True)
    ]
    assert stage_ranks(rows) == [{"ladder": "l", "stages": ["a", "b"], "n": 3, "spearman": pytest.approx(0.5)}]
    text = promotion_facts(rows)["text"]
    assert "Won at a smaller stage and hurts at the latest: z." in text
    assert "The gains of 3 changes at a and b correlate in rank by +0.50." in text
    assert stage_ranks([{**r, "gain": None} if r["change"] == "x" else r for r in rows]) == [], "two say nothing"
    assert stage_ranks([{**r, "ladder": r["stage"]} for r in rows]) == [], "stages of different ladders have nothing to do"
    assert stage_ranks([{**r, "gain": 0.0} if r["stage"] == "b" else r for r in rows])[0]["spearman"] is None
