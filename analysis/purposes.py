"""Which runs enter which law.

Records say it themselves (the tag purpose, several separated by commas). Tables that do not are sorted by what varies inside
an (N, D) cell of each sweep. Runs of a promotion or a production never enter a law.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

LAW_PURPOSES = ("allocation", "batch_size", "learning_rate", "weight_decay")
PURPOSES = (*LAW_PURPOSES, "noise", "promotion", "production")
SAME_HORIZON = 1.05  # horizons of one cell differ by the rounding to whole steps; a sweep's own steps are larger
MIN_VALUES = 3  # of a knob in one cell, for that cell to be a sweep over it


def cell_numbers(frame: pd.DataFrame, *extra: str) -> np.ndarray:
    """(n,) number of the (N, D) cell of each run: equal N (and equal `extra` columns), D within 5% of the cell's smallest."""
    if frame.empty:
        return np.zeros(0, dtype=int)
    keys = [frame["N"].to_numpy(), *(frame[c].fillna(-1.0).to_numpy() for c in extra)]
    d = frame["D"].to_numpy()
    order = np.lexsort((d, *reversed(keys)))
    same = np.ones(len(frame) - 1, dtype=bool)
    for key in keys:
        same &= key[order][1:] == key[order][:-1]
    numbers, start, number = np.zeros(len(frame), dtype=int), d[order[0]], 0
    for i in range(1, len(order)):
        if not same[i - 1] or d[order[i]] > start * SAME_HORIZON:
            number += 1
            start = d[order[i]]
        numbers[order[i]] = number
    return numbers


def assign_purposes(frame: pd.DataFrame) -> pd.Series:
    """(n,) purposes of each run, separated by commas: its own where it has any, else what its sweep varies.

    An untagged sweep in which no knob takes three values inside a cell is one over sizes and horizons: allocation. One that
    varies a knob serves that knob's law; it serves the allocation as well when nothing else in the table does.
    """
    ours = {p: p if set(p.split(",")) & set(PURPOSES) else "" for p in frame["purpose"].unique()}  # other words are not ours
    out = frame["purpose"].map(ours)
    untagged = out == ""
    if not untagged.any():
        return out
    inferred = {sweep: _varied(part) for sweep, part in frame[untagged].groupby("sweep", sort=False)}
    elsewhere = any("allocation" in p.split(",") for p in out[~untagged]) or any(not v for v in inferred.values())
    for sweep, varied in inferred.items():
        purposes = varied or ["allocation"]
        if varied and not elsewhere:
            purposes = ["allocation", *varied]
        out[untagged & (frame["sweep"] == sweep)] = ",".join(purposes)
    return out


def select(frame: pd.DataFrame, purposes: pd.Series, *wanted: str) -> pd.DataFrame:
    """The runs that serve any of the `wanted` purposes."""
    unique = {p: bool(set(p.split(",")) & set(wanted)) for p in purposes.unique()}
    return frame[purposes.map(unique).to_numpy(dtype=bool)].reset_index(drop=True)


def _varied(part: pd.DataFrame) -> list[str]:
    known = [c for c in ("B", "lr", "weight_decay") if part[c].notna().any()]
    if not known:
        return []
    counts = part[known].groupby(cell_numbers(part)).nunique()
    swept = {c: bool((counts[c] >= MIN_VALUES).any()) for c in known}
    names = []
    if swept.get("B"):
        names.append("batch_size")
    if swept.get("lr") and (not swept.get("B") or not _tied(part, "B", "lr")):
        names.append("learning_rate")
    if swept.get("weight_decay") and not any(swept.get(k) and _tied(part, k, "weight_decay") for k in ("B", "lr")):
        names.append("weight_decay")
    return names


def _tied(part: pd.DataFrame, cause: str, effect: str) -> bool:
    """Whether `effect` takes one value for each value of `cause` in every cell: it follows by a rule."""
    return bool((part.groupby([cell_numbers(part), part[cause]])[effect].nunique() <= 1).all())


def tuned_envelope(frame: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """For the allocation: where a cell was run with several knob settings keep the one of least mean loss (all its seeds).

    Returns the runs kept and how many were set aside. A cell whose runs do not differ in B, lr or weight decay is kept whole.
    """
    knobs = frame[["B", "lr", "weight_decay"]].fillna(-1.0)
    if frame.empty or not (knobs.nunique() > 1).any():
        return frame, 0
    cell = pd.Series(cell_numbers(frame), index=frame.index)
    setting = knobs.groupby([cell, *(knobs[c] for c in knobs)], sort=False).ngroup()
    mean = frame["L"].groupby(setting).transform("mean")
    best = mean.groupby(cell).transform("min")
    keep = mean <= best
    return frame[keep].reset_index(drop=True), int((~keep).sum())
