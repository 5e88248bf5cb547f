"""Which runs share a compute budget, when the table does not say so plainly."""

from __future__ import annotations

from typing import Literal

import numpy as np

from analysis.words import plural

GAP = 1.25  # a step larger than this in sorted compute starts a new budget (published ladders step by 1.7x or more)
MAX_SPREAD = 2.0  # a group wider than this is no budget: the runs are not on isoFLOP lines
MIN_RUNS = 3  # a parabola needs three sizes
WINDOW = 1.2  # where compute is spread evenly, a budget is a window this wide…
PEAK_RUNS = 6  # …that holds at least this many runs…
PEAK_SIGMAS = 2.5  # …and so many Poisson standard deviations more than its two neighbour windows
PEAK_SHARE = 0.5  # peaks that hold fewer of the runs than this are chance, not a ladder


def assign_budgets(compute: np.ndarray, given: np.ndarray | None = None) -> tuple[np.ndarray, str]:
    """Budget of every run, NaN where it belongs to none, and a sentence that says how they were found.

    `compute`: training FLOPs of each run (n,), any unit. `given`: a budget column (n,) or None. A given column whose values
    repeat is taken as it stands. Otherwise the values (or `compute`) are grouped by gaps in their logarithm: a step over
    25% starts a new group. A group wider than a factor 2 is no isoFLOP line: in it only density peaks (20% windows, clearly
    denser than their neighbours) count as budgets and the rest gets NaN. A budget is its group's geometric mean.
    """
    values = np.asarray(compute if given is None else given, dtype=float)
    finite = np.isfinite(values) & (values > 0)
    out = np.full(len(values), np.nan)
    if not finite.any():
        return out, "no compute column: no budgets"
    if given is not None and len(np.unique(values[finite])) <= max(1, finite.sum() // MIN_RUNS):
        out[finite] = values[finite]
        return out, f"{plural(len(np.unique(values[finite])), 'budget')} as given"
    where = np.flatnonzero(finite)
    order = where[np.argsort(values[where], kind="stable")]
    logs = np.log(values[order])
    breaks = np.flatnonzero(np.diff(logs) > np.log(GAP)) + 1
    groups = np.split(np.arange(len(order)), breaks)
    wide = [g for g in groups if logs[g[-1]] - logs[g[0]] > np.log(MAX_SPREAD)]
    narrow = [g for g in groups if len(g) >= MIN_RUNS and logs[g[-1]] - logs[g[0]] <= np.log(MAX_SPREAD)]
    peaks = [p + g[0] for g in wide for p in _density_peaks(logs[g])]
    for group in narrow + peaks:
        out[order[group]] = np.exp(logs[group].mean())
    what = "compute" if given is None else "the budget column, in which nearly every run has its own value"
    text = f"{plural(len(narrow), 'budget')} grouped by gaps over {GAP}x in {what}"
    if wide:
        loose = sum(map(len, wide)) - sum(map(len, peaks))
        text += f"; {plural(len(peaks), 'density peak')} in runs spread evenly over compute ({plural(loose, 'run')} in none)"
    return out, text


def _density_peaks(logs: np.ndarray) -> list[np.ndarray]:
    """Index ranges of the densest windows of sorted log compute, greedily, each clearly denser than its neighbours."""
    width, free, peaks = np.log(WINDOW), np.ones(len(logs), dtype=bool), []

    def at(x: np.ndarray, side: Literal["left", "right"]) -> np.ndarray:
        return np.asarray(np.searchsorted(logs, x, side=side))

    start, end = np.arange(len(logs)), at(logs + width, "right")
    counts = end - start
    beside = (at(logs, "left") - at(logs - width, "left") + at(logs + 2 * width, "right") - end) / 2
    tall = (counts >= PEAK_RUNS) & (counts >= beside + PEAK_SIGMAS * np.sqrt(beside + 1))
    for s in np.flatnonzero(tall)[np.argsort(-counts[tall], kind="stable")]:
        if free[s : end[s]].all():
            peaks.append(np.arange(s, end[s]))
            free[at(logs[s] - width / 2, "left") : at(logs[s] + 1.5 * width, "right")] = False
    return peaks if sum(map(len, peaks)) >= PEAK_SHARE * len(logs) else []
