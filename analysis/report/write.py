"""Write the report: facts, a drawable sample of the runs, one HTML file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from analysis.errors import DataError
from analysis.files import write_atomic
from analysis.purposes import assign_purposes, select, tuned_envelope
from analysis.report.facts import DEFAULT_TITLE, report_facts
from analysis.report.html import render
from analysis.table import RunTable

MOST_DRAWN = 2000  # points in one figure: beyond this a browser is slow and nobody sees more
RUN_TAG = "nanoladder.run_id"  # the MLflow tag that holds our run id


def write_report(
    laws: Any,
    table: RunTable,
    path: str | Path,
    *,
    production: Mapping[str, Any] | None = None,
    promotions: Sequence[Mapping[str, Any]] | None = None,
    fronts: Sequence[Mapping[str, Any]] | None = None,
    mlflow_uri: str | None = None,
    mlflow_store: str | None = None,
    title: str = DEFAULT_TITLE,
) -> Path:
    """Write one self-contained HTML file to `path` (atomically) and return it.

    `laws`: Laws, or its dict, fitted to `table`. `production`: {"name", "run_id", "N", "D", "C", "predicted", "low", "high",
    "surface", "measured" (None before it ran), "seconds", "predicted_at"}, any of them missing. `promotions`: [{"change",
    "stage", "verdict": adopt|reject|undecided, "n_seeds", "axes": {"steps"|"flops"|"seconds": {"gain" (share of the loss,
    positive is better), "low", "high", "p_value"}}, "reason"}]. `fronts`: of searches with several objectives, [{"sweep",
    "question", "objectives": {metric: "minimize" or "maximize"}, "cells": {cell: [{"values", "on_front", a number for each
    metric}]}}]. `mlflow_uri`: see `run_url`;
    `mlflow_store`: the store from which this machine would serve that page, for a note that says how. Raises DataError for an
    address that cannot be linked to and for a path that cannot be written.
    """
    link = run_url(mlflow_uri)
    facts = report_facts(laws, table, production, promotions, fronts=fronts, title=title)
    drawn, of = drawn_runs(table)
    if len(drawn) < of:
        facts["source"]["notes"].append(f"figures draw {len(drawn):,} of {of:,} runs, evenly chosen; every fit uses all of them")
        facts["source"]["text"] += f" Figures draw {len(drawn):,} of {of:,} runs; every fit uses all of them."
    if link is not None and mlflow_store:
        facts["source"]["notes"].append(
            f"runs link to {mlflow_uri}, which `mlflow ui --backend-store-uri {mlflow_store}` serves on this machine"
        )
    if mlflow_uri and link is None:
        facts["source"]["notes"].append(f"MLflow store: {mlflow_uri} (`mlflow ui --backend-store-uri {mlflow_uri}` shows it)")
    path = Path(path)
    write_atomic(path, render(facts, drawn, run_url=link))
    return path


def run_url(mlflow_uri: str | None) -> str | None:
    """The address of one run, with {run_id} in it, or None where the URI is no web address (a sqlite file, a folder).

    Takes a template with {run_id}, or an experiment's page of MLflow (http://host:5000/#/experiments/1), whose search for the
    tag nanoladder.run_id then finds the run. DataError for a web address without an experiment.
    """
    if not mlflow_uri or not re.match(r"https?://", mlflow_uri):
        return None
    if "{run_id}" in mlflow_uri:
        return mlflow_uri
    if not re.search(r"/experiments/[^/]+/?$", mlflow_uri):
        raise DataError(
            f"mlflow_uri {mlflow_uri!r} names no experiment; give its page, as in http://127.0.0.1:5000/#/experiments/1, "
            "or an address with {run_id} in it"
        )
    found = quote(f"tags.`{RUN_TAG}` = '", safe="")
    return f"{mlflow_uri.rstrip('/')}/runs?searchFilter={found}{{run_id}}{quote(chr(39), safe='')}"


def drawn_runs(table: RunTable, most: int = MOST_DRAWN, seed: int = 0) -> tuple[pd.DataFrame, int]:
    """The runs that the allocation figures draw, and how many there are: all up to `most`, else an even choice over N in every
    budget, which always holds each budget's best run. run_id falls back on the row's label."""
    frame = table.frame
    frame, _ = tuned_envelope(select(frame, assign_purposes(frame), "allocation"))
    frame = frame.assign(run_id=frame["run_id"].where(frame["run_id"] != "", frame["row"]))
    if len(frame) <= most:
        return frame, len(frame)
    rng = np.random.default_rng(seed)
    budgets = frame["budget"].fillna(-1.0)
    share = most / len(frame)
    keep: list[np.ndarray] = []
    for _, rows in frame.groupby(budgets, sort=True):
        size = min(len(rows), max(1, round(share * len(rows))))
        by_size = rows.index.to_numpy()[np.argsort(rows["N"].to_numpy() * (1 + 1e-9 * rng.random(len(rows))), kind="stable")]
        even = by_size[np.linspace(0, len(rows) - 1, size).round().astype(int)]
        keep.append(np.union1d(even, [rows["L"].idxmin()]))
    return frame.loc[np.sort(np.concatenate(keep))], len(frame)
