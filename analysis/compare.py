"""Is a recipe better? Paired seeds against noise, and the compute multiplier along steps, FLOPs and seconds.

Gains are relative: log(baseline loss) − log(candidate loss), positive when the candidate is better. 0.01 is 1%.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from analysis.errors import DataError
from analysis.noise import SeedNoise, pool_variance
from analysis.table import RunTable
from analysis.words import plural

Verdict = Literal["adopt", "reject", "undecided"]
AXES = {"steps": 0, "tokens": 1, "flops": 2, "seconds": 3}  # column of a curve
LOSS_COLUMN = 4
MAX_RUNS_TO_DECIDE = 1000  # beyond this the gain is too small to be worth deciding


@dataclass(frozen=True, kw_only=True)
class PromotionVerdict:
    """`gain` with its interval (level 1 − 2α), `p_value` of the one-sided test that the gain exceeds `min_gain`, `posterior`
    probability that it does, and, when undecided, how many paired seeds in all would decide if the gain is what it seems."""

    verdict: Verdict
    gain: float
    low: float | None
    high: float | None
    p_value: float | None
    posterior: float | None
    num_pairs: int
    num_runs: tuple[int, int]
    runs_to_decide: int | None
    message: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class AxisComparison:
    """One axis. `multiplier`: the baseline's cost over the candidate's at equal loss (1.2: 1.2x less for the same loss).
    `gain`: relative loss gain at equal cost. `reach`: baseline's end over the point where the candidate's curve first
    reaches the baseline's final loss; null when it never does."""

    axis: str
    gain: float
    low: float | None
    high: float | None
    multiplier: float
    multiplier_low: float | None
    multiplier_high: float | None
    p_value: float | None
    slope: float
    slope_source: str
    reach: float | None
    verdict: Literal["better", "worse", "undecided"]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two recipes on every axis, and the sentence that says what was gained and where."""

    axes: dict[str, AxisComparison]
    num_pairs: int
    summary: str

    def as_dict(self) -> dict[str, Any]:
        return {"axes": {k: v.as_dict() for k, v in self.axes.items()}, "num_pairs": self.num_pairs, "summary": self.summary}


@dataclass(frozen=True, kw_only=True)
class _Difference:
    mean: float
    se: float
    df: float
    num_pairs: int
    single_variance: float  # of one pair's difference


def promotion_test(
    baseline: Mapping[int, float],
    candidate: Mapping[int, float],
    *,
    noise: SeedNoise | None = None,
    alpha: float = 0.05,
    min_gain: float = 0.0,
    num_candidates: int = 1,
) -> PromotionVerdict:
    """Does the candidate's gain exceed seed noise? `baseline`, `candidate`: final loss by seed; common seeds are paired.

    t-test on the mean log difference; its variance pools the pairs' own with twice the known seed `noise` (seeds taken as
    independent: pairing can only make that too wide). adopt when P(gain > min_gain) is at least 1 − α/num_candidates, reject
    when it is at most α, else undecided. One run a side without `noise` is undecided. DataError on losses that are not
    positive and finite, or an empty side.
    """
    difference = _difference(baseline, candidate, noise)
    runs = (len(baseline), len(candidate))
    pairs = difference.num_pairs
    seeds = f"{pairs} paired seed{'s' * (pairs > 1)}" if pairs else f"{runs[0]} against {runs[1]} runs, no common seed"
    gain = difference.mean
    if not (difference.df > 0 and difference.se > 0):
        if difference.df > 0 and abs(gain - min_gain) > 0:  # identical replicates: no noise at all
            sure: Verdict = "adopt" if gain > min_gain else "reject"
            p = 0.0 if gain > min_gain else 1.0
            return _promotion(
                sure, gain, gain, gain, p, difference, runs, None, f"{sure}: {_words(gain)}, {seeds}, no noise at all"
            )
        text = f"undecided: {_words(gain)}, but {seeds} and no noise estimate; run at least 3 seeds of each"
        return _promotion("undecided", gain, None, None, None, difference, runs, 3, text)
    strict = alpha / num_candidates
    t = (gain - min_gain) / difference.se
    p_value = float(stats.t.sf(t, difference.df))
    half = float(stats.t.ppf(1 - alpha, difference.df)) * difference.se
    verdict: Verdict = "adopt" if p_value <= strict else "reject" if p_value >= 1 - alpha else "undecided"
    more = _runs_to_decide(gain - min_gain, difference, strict) if verdict == "undecided" else None
    span = f"{1 - 2 * alpha:.0%} interval of the gain {gain - half:+.2%} to {gain + half:+.2%}"
    text = f"{verdict}: {_words(gain)} ({span}), {seeds}, p = {p_value:.3g}"
    if verdict == "undecided":
        text += f"; {more} paired seeds would decide" if more else "; too small a gain to decide with any sensible number of runs"
    return _promotion(verdict, gain, gain - half, gain + half, p_value, difference, runs, more, text)


def compare_recipes(
    baseline: Mapping[int, np.ndarray],
    candidate: Mapping[int, np.ndarray],
    *,
    noise: SeedNoise | None = None,
    slope: tuple[float, float] | None = None,
    axes: Sequence[str] = ("steps", "flops", "seconds"),
    alpha: float = 0.05,
) -> Comparison:
    """Two recipes along each axis, from stored curves by seed: arrays (points, 5) of step, tokens, FLOPs, seconds, loss.

    Only final losses enter the gain (inside a learning-rate decay a curve misranks). With s the elasticity of final loss
    against compute, s = −d log L / d log C, log multiplier = (log L_b − log L_c)/s − log(x_c/x_b) and the gain at equal cost is
    s times that. `slope`: (s, its standard error) from a fitted frontier; without it s is taken from horizons of the runs given
    or, failing that, from the later half of the baseline's curves, which is too steep and makes multipliers cautious.
    """
    ends_b, ends_c = _ends(baseline, "baseline"), _ends(candidate, "candidate")
    difference = _difference({s: e[LOSS_COLUMN] for s, e in ends_b.items()}, {s: e[LOSS_COLUMN] for s, e in ends_c.items()}, noise)
    s, s_se, source = _slope(baseline, slope)
    found = {}
    for axis in axes:
        if axis not in AXES:
            raise DataError(f"axis {axis!r} is unknown; known: {', '.join(AXES)}")
        found[axis] = _along(axis, candidate, ends_b, ends_c, difference, (s, s_se, source), alpha)
    return Comparison(axes=found, num_pairs=difference.num_pairs, summary=_summary(found))


def compare_runs(
    table: RunTable, baseline: Sequence[str], candidate: Sequence[str], *, force: Sequence[str] = (), **options: Any
) -> Comparison:
    """`compare_recipes` on run ids of a table. Refuses runs that are not comparable unless `force` names their hashes."""
    frame = table.frame.set_index("run_id")
    missing = [r for r in (*baseline, *candidate) if r not in frame.index]
    if missing:
        raise DataError(f"run {missing[0]!r} is not among the {len(table)} usable runs of {table.source}")
    chosen = table.frame["run_id"].isin([*baseline, *candidate])
    table.keep(chosen, "not compared").only_comparable(force)
    sides = []
    for runs in (baseline, candidate):
        bare = [r for r in runs if len(table.curves.get(r, ())) == 0]
        if bare:
            raise DataError(f"run {bare[0]!r} has no stored curve; compare final losses with promotion_test instead")
        seeds = {int(frame["seed"][r]): table.curves[r] for r in runs}
        if len(seeds) < len(runs):
            raise DataError(
                f"{plural(len(runs), 'run')} have {plural(len(seeds), 'seed')} between them; give one run a seed on each side"
            )
        sides.append(seeds)
    return compare_recipes(sides[0], sides[1], **options)


def frontier_slope(frontier: Mapping[str, Any], flops: float) -> tuple[float, float]:
    """(s, standard error): s = −d log L/d log C = γ·r/(E + r) with r = κ0·(C/C0)^−γ, at `flops`, from the allocation's frontier
    block. The error is that of γ's interval. DataError when no frontier was fitted."""
    if not frontier or frontier.get("gamma") is None:
        raise DataError("no frontier was fitted; compare without a slope, or run at least three budgets")
    falling = frontier["kappa0"] * (flops / frontier["C0"]) ** -frontier["gamma"]
    s = frontier["gamma"] * falling / (frontier["E"] + falling)
    interval = (frontier.get("intervals") or {}).get("gamma")
    relative = (interval[1] - interval[0]) / (2 * stats.norm.ppf(0.95)) / frontier["gamma"] if interval else 0.0
    return float(s), float(s * relative)


def _difference(baseline: Mapping[int, float], candidate: Mapping[int, float], noise: SeedNoise | None) -> _Difference:
    logs = []
    for name, side in (("baseline", baseline), ("candidate", candidate)):
        if not side:
            raise DataError(f"the {name} has no run; give at least one loss by seed")
        bad = [v for v in side.values() if not (np.isfinite(v) and v > 0)]
        if bad:
            raise DataError(f"{name} loss {bad[0]} is not positive and finite; leave failed runs out")
        logs.append({seed: float(np.log(v)) for seed, v in side.items()})
    b, c = logs
    common = sorted(set(b) & set(c))
    known = (2 * noise.sd**2, float(noise.df)) if noise is not None and noise.df > 0 else (float("nan"), 0.0)
    if common:
        d = np.array([b[s] - c[s] for s in common])
        own = (float(d.var(ddof=1)), float(len(d) - 1)) if len(d) > 1 else (float("nan"), 0.0)
        variance, df = pool_variance(own, known)
        return _Difference(
            mean=float(d.mean()), se=float(np.sqrt(variance / len(d))), df=df, num_pairs=len(d), single_variance=float(variance)
        )
    sides = [np.array(list(x.values())) for x in (b, c)]
    parts = [(2 * float(x.var(ddof=1)), float(len(x) - 1)) for x in sides if len(x) > 1]
    variance, df = pool_variance(*parts, known)
    se = float(np.sqrt(variance / 2 * (1 / len(sides[0]) + 1 / len(sides[1]))))
    mean = float(sides[0].mean() - sides[1].mean())
    return _Difference(mean=mean, se=se, df=df, num_pairs=0, single_variance=float(variance))


def _promotion(
    verdict: Verdict, gain: float, low: float | None, high: float | None, p_value: float | None, difference: _Difference,
    runs: tuple[int, int], more: int | None, message: str,
) -> PromotionVerdict:  # fmt: skip
    posterior = None if p_value is None else 1 - p_value
    return PromotionVerdict(
        verdict=verdict, gain=gain, low=low, high=high, p_value=p_value, posterior=posterior, num_pairs=difference.num_pairs,
        num_runs=runs, runs_to_decide=more, message=message,
    )  # fmt: skip


def _words(gain: float) -> str:
    return f"loss {abs(gain):.2%} {'lower' if gain >= 0 else 'higher'}"


def _runs_to_decide(gain: float, difference: _Difference, alpha: float) -> int | None:
    """Smallest number of pairs for which a gain of this size has p ≤ α, with the present variance; None beyond 1000."""
    if gain == 0:
        return None
    known_df = difference.df - max(difference.num_pairs - 1, 0)
    n = np.arange(max(2, difference.num_pairs + 1), MAX_RUNS_TO_DECIDE + 1)
    enough = abs(gain) / np.sqrt(difference.single_variance / n) >= stats.t.ppf(1 - alpha, np.maximum(1.0, n - 1 + known_df))
    return int(n[enough.argmax()]) if enough.any() else None


def _ends(curves: Mapping[int, np.ndarray], name: str) -> dict[int, np.ndarray]:
    out = {}
    for seed, curve in curves.items():
        curve = np.asarray(curve, dtype=float)
        if curve.ndim != 2 or curve.shape[1] != 5 or len(curve) == 0:
            raise DataError(
                f"curve of {name} seed {seed} has shape {curve.shape}; expected (points, 5): step, tokens, FLOPs, seconds, loss"
            )
        out[seed] = curve[-1]
    return out


def _slope(baseline: Mapping[int, np.ndarray], slope: tuple[float, float] | None) -> tuple[float, float, str]:
    if slope is not None:
        if not slope[0] > 0:
            raise DataError(f"slope {slope[0]} must be positive: the loss falls with compute")
        return slope[0], slope[1], "fitted frontier"
    slopes = []
    for curve in baseline.values():
        late = curve[curve[:, 1] >= curve[-1, 1] / 2]
        if len(late) >= 2 and late[-1, 1] > late[0, 1]:
            slopes.append(-np.log(late[-1, LOSS_COLUMN] / late[0, LOSS_COLUMN]) / np.log(late[-1, 1] / late[0, 1]))
    value = float(np.mean(slopes)) if slopes else float("nan")
    if not value > 0:
        raise DataError("the baseline's curves do not fall over their later half; give the slope of a fitted frontier")
    spread = float(np.std(slopes, ddof=1) / np.sqrt(len(slopes))) if len(slopes) > 1 else 0.0
    return value, spread, "later half of the baseline's own curves: too steep, so the multiplier is cautious"


def _along(
    axis: str,
    candidate: Mapping[int, np.ndarray],
    ends_b: Mapping[int, np.ndarray],
    ends_c: Mapping[int, np.ndarray],
    difference: _Difference,
    slope: tuple[float, float, str],
    alpha: float,
) -> AxisComparison:
    column = AXES[axis]
    xs = [np.array([e[column] for e in ends.values()]) for ends in (ends_b, ends_c)]
    if not all((x > 0).all() for x in xs):
        raise DataError(f"a curve ends at {axis} 0; it cannot be compared along {axis}")
    s, s_se, source = slope
    x_b, x_c = (float(np.exp(np.log(x).mean())) for x in xs)
    log_multiplier = difference.mean / s - np.log(x_c / x_b)
    gain = s * log_multiplier
    low = high = m_low = m_high = p_value = None
    verdict: Literal["better", "worse", "undecided"] = "undecided"
    if difference.df > 0 and difference.se > 0:
        cost_variance = sum(float(np.log(x).var(ddof=1)) / len(x) for x in xs if len(x) > 1)
        se_gain = float(np.sqrt(difference.se**2 + s**2 * cost_variance + (s_se * np.log(x_c / x_b)) ** 2))
        se_log = float(np.sqrt((difference.se / s) ** 2 + cost_variance + (difference.mean * s_se / s**2) ** 2))
        q = float(stats.t.ppf(1 - alpha, difference.df))
        low, high = gain - q * se_gain, gain + q * se_gain
        m_low, m_high = (float(np.exp(log_multiplier + sign * q * se_log)) for sign in (-1, 1))
        p_value = float(stats.t.sf(gain / se_gain, difference.df))
        verdict = "better" if p_value <= alpha else "worse" if p_value >= 1 - alpha else "undecided"
    return AxisComparison(
        axis=axis, gain=float(gain), low=low, high=high, multiplier=float(np.exp(log_multiplier)), multiplier_low=m_low,
        multiplier_high=m_high, p_value=p_value, slope=s, slope_source=source, verdict=verdict,
        reach=_reach(candidate, column, float(np.exp(np.mean([np.log(e[LOSS_COLUMN]) for e in ends_b.values()]))), x_b),
    )  # fmt: skip


def _reach(candidate: Mapping[int, np.ndarray], column: int, target: float, x_b: float) -> float | None:
    """Baseline's cost over the candidate's cost at the first crossing of `target`, interpolated in log cost; median of seeds."""
    found = []
    for curve in candidate.values():
        loss = np.minimum.accumulate(curve[:, LOSS_COLUMN])
        x = curve[:, column]
        below = np.flatnonzero((loss <= target) & (x > 0))
        if len(below) == 0:
            return None
        i = int(below[0])
        at = x[i]
        if i > 0 and x[i - 1] > 0 and loss[i - 1] > loss[i]:
            share = (np.log(loss[i - 1]) - np.log(target)) / (np.log(loss[i - 1]) - np.log(loss[i]))
            at = float(np.exp(np.log(x[i - 1]) + share * (np.log(x[i]) - np.log(x[i - 1]))))
        found.append(x_b / at)
    return float(np.median(found))


def _summary(axes: Mapping[str, AxisComparison]) -> str:
    better = [a for a, c in axes.items() if c.verdict == "better"]
    worse = [a for a, c in axes.items() if c.verdict == "worse"]
    if not better and not worse:
        return "no axis shows a gain or a loss beyond the noise"
    parts = [f"{c.multiplier:.2f}x on {a} ({c.gain:+.2%})" for a, c in axes.items() if a in better + worse]
    if better and len(better) == len(axes):
        head = "a gain on every axis"
    elif worse and len(worse) == len(axes):
        head = "a loss on every axis"
    else:
        head = f"a gain on {' and '.join(better)} only" if better else f"a loss on {' and '.join(worse)}, no gain"
        if better and worse:
            head += f", a loss on {' and '.join(worse)}"
    return f"{head}: {', '.join(parts)}"
