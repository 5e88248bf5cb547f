"""The front of a search with several objectives: candidates that no other beats in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from nanochat_model.identity import write_atomic

FRONT_FILE = "front.html"


def fronts(index: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Cell -> its complete candidates (candidate, values, run_ids, a mean over seeds for each objective, on_front), the best of the
    first objective first. `index`: a sweep's index with "objectives"."""
    objectives: Mapping[str, str] = index["objectives"]
    signs = {m: -1.0 if direction == "maximize" else 1.0 for m, direction in objectives.items()}
    first = next(iter(signs))
    found = {}
    for cell, points in _means(index).items():
        for p in points:
            p["on_front"] = not any(_beats(q, p, signs) for q in points)
        found[cell] = sorted(points, key=lambda p: signs[first] * p[first])
    return found


def best_candidates(index: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Cell -> its best candidate by the (first) metric, as in `fronts`; of cells in which one is complete."""
    first, direction = next(iter(index["objectives"].items()))
    pick = max if direction == "maximize" else min
    return {cell: pick(points, key=lambda p: p[first]) for cell, points in _means(index).items() if points}


def _means(index: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Cell -> its complete candidates with the mean over seeds of each objective."""
    metrics = list(index["objectives"])
    cells: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for row in index["trials"]:
        cells.setdefault(row["cell"], {}).setdefault(row["candidate"], []).append(row)
    return {
        cell: [
            {
                "candidate": number,
                "values": dict(rows[0]["values"]),
                "run_ids": [r["run_id"] for r in rows],
                **{m: fmean(r[m] for r in rows) for m in metrics},
            }
            for number, rows in candidates.items()
            if all(r["status"] == "complete" and all(r.get(m) is not None for m in metrics) for r in rows)
        ]
        for cell, candidates in cells.items()
    }


def _beats(one: Mapping[str, Any], other: Mapping[str, Any], signs: Mapping[str, float]) -> bool:
    differences = [sign * (one[m] - other[m]) for m, sign in signs.items()]
    return all(d <= 0 for d in differences) and any(d < 0 for d in differences)


def write_front(index: Mapping[str, Any], folder: Path) -> Path:
    """front.html beside the index: the first two objectives of every candidate, the front joined by a line."""
    from analysis.report.figures.front import front_figure
    from analysis.report.fronts import sweep_front

    facts = sweep_front({**{k: index[k] for k in ("sweep", "question", "objectives")}, "cells": fronts(index)})
    figure = front_figure(facts)
    figure.update_layout(title=f"{index['sweep']}: {index['question']}", margin={"t": 80})
    path = folder / FRONT_FILE
    write_atomic(path, figure.to_html(include_plotlyjs=True, full_html=True))
    return path
