"""Candidates of a search with several objectives: the first against the second, the front joined by a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from analysis.report import format as fmt
from analysis.report.figures import theme


def front_figures(facts: Mapping[str, Any]) -> dict[str, go.Figure | None]:
    """One figure a sweep, by name."""
    return {f"front_{i}": front_figure(sweep) for i, sweep in enumerate(facts["fronts"].get("sweeps") or [])}


def front_figure(sweep: Mapping[str, Any]) -> go.Figure:
    """`sweep`: of the facts, with "metrics" and "points" (values, cell, on_front, one number a metric)."""
    y, x = sweep["metrics"][:2]
    traces: list[Any] = []
    cells = dict.fromkeys(p["cell"] for p in sweep["points"])
    for i, cell in enumerate(cells):
        mine = sorted((p for p in sweep["points"] if p["cell"] == cell), key=lambda p: float(p[x]))
        best = [p for p in mine if p["on_front"]]
        symbol, dash = theme.SYMBOLS[i % len(theme.SYMBOLS)], theme.DASHES[i % len(theme.DASHES)]
        traces.append(
            go.Scatter(
                x=[p[x] for p in best], y=[p[y] for p in best], mode="lines", name=f"{cell}, front", hoverinfo="skip",
                line={"color": theme.colour("accent"), "shape": "hv", "dash": dash},
            )
        )  # fmt: skip
        texts = ["<br>".join(f"{k} {fmt.significant(v) if fmt.is_number(v) else v}" for k, v in p["values"].items()) for p in mine]
        traces.append(
            go.Scatter(
                x=[p[x] for p in mine], y=[p[y] for p in mine], mode="markers", name=cell, text=texts,
                hovertemplate=f"%{{text}}<br>{x} %{{x:.4g}}<br>{y} %{{y:.4g}}<extra></extra>",
                marker={"color": theme.colour("ink"), "size": 8, "opacity": 0.75, "symbol": symbol},
            )
        )  # fmt: skip
    return theme.figure(traces, theme.axis(x), theme.axis(y))
