"""Traces that several figures use: runs with their hover text, lines of laws with bands, optima with intervals and edge marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.report import format as fmt
from analysis.report.figures.theme import faded

INTERIOR = "interior"
EDGE_SYMBOLS = {"low": "triangle-left-open", "high": "triangle-right-open", "flat": "circle-open"}
EDGE_WORDS = {
    "low": "at the low edge of its grid",
    "high": "at the high edge of its grid",
    "flat": "not resolved: the curve is flat within its noise",
    "edge": "at an edge of its grid",
    "too_few": "too few runs for a minimum",
}


def hover_texts(rows: pd.DataFrame, loss_name: str) -> list[str]:
    """One text a run: loss first, then sizes, then settings that the run has, then its name and id."""
    texts = []
    for row in rows.to_dict("records"):
        lines = [f"<b>{loss_name} {fmt.loss(row['L'])}</b>", f"N {fmt.count(row['N'])} · D {fmt.count(row['D'])}"]
        settings = [f"C {fmt.flops(row['C'])}"] if fmt.is_number(row.get("C")) else []
        for key, word in (("B", "batch"), ("lr", "lr"), ("weight_decay", "wd")):
            if fmt.is_number(row.get(key)):
                settings.append(f"{word} {fmt.count(row[key]) if key == 'B' else fmt.significant(row[key])}")
        if settings:
            lines.append(" · ".join(settings))
        label = " · ".join(str(row[key]) for key in ("name", "run_id") if row.get(key))
        texts.append("<br>".join([*lines, label] if label else lines).replace("{", "(").replace("}", ")"))
    return texts


def runs_trace(rows: pd.DataFrame, x: pd.Series | np.ndarray, y: pd.Series | np.ndarray, loss_name: str, **more: Any) -> go.Scatter:
    """Measured runs as points; a click on one leads to the run (customdata holds its id)."""
    return go.Scatter(
        x=np.asarray(x, dtype=float),
        y=np.asarray(y, dtype=float),
        mode="markers",
        customdata=rows["run_id"].tolist(),
        text=hover_texts(rows, loss_name),
        hovertemplate="%{text}<extra></extra>",
        **more,
    )


def band(
    x: Sequence[float], low: Sequence[float], high: Sequence[float], hex_colour: str, name: str = "", **more: Any
) -> go.Scatter:
    """The area between two curves; empty where an end is unknown."""
    keep = [i for i in range(len(x)) if fmt.is_number(low[i]) and fmt.is_number(high[i])]
    xs = [x[i] for i in keep] + [x[i] for i in reversed(keep)]
    ys = [high[i] for i in keep] + [low[i] for i in reversed(keep)]
    return go.Scatter(
        x=xs,
        y=ys,
        fill="toself",
        fillcolor=faded(hex_colour, 0.13),
        line={"width": 0, "color": hex_colour},
        mode="lines",
        hoverinfo="skip",
        name=name,
        **{"showlegend": bool(name), **more},
    )


def line(x: Sequence[float], y: Sequence[float], hex_colour: str, name: str = "", **more: Any) -> go.Scatter:
    style = {"color": hex_colour, "width": more.pop("width", 2.2), "dash": more.pop("dash", "solid")}
    return go.Scatter(
        x=list(x), y=list(y), mode="lines", line=style, name=name, **{"showlegend": bool(name), "hoverinfo": "skip", **more}
    )


def error_bar(values: Sequence[float], low: Sequence[Any], high: Sequence[Any], hex_colour: str) -> dict[str, Any]:
    """Asymmetric error bars; an unknown end gets none."""
    up = [h - v if fmt.is_number(h) and fmt.is_number(v) else 0.0 for v, h in zip(values, high, strict=True)]
    down = [v - l if fmt.is_number(l) and fmt.is_number(v) else 0.0 for v, l in zip(values, low, strict=True)]
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, u) for u in up],
        "arrayminus": [max(0.0, d) for d in down],
        "color": hex_colour,
        "thickness": 1.4,
        "width": 4,
    }
