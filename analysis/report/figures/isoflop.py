"""Loss against model size at equal compute: runs, fitted parabolas, their minima with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.report import format as fmt
from analysis.report.figures import theme
from analysis.report.figures.marks import EDGE_WORDS, error_bar, line, runs_trace


def isoflop_figure(facts: Mapping[str, Any], runs: pd.DataFrame) -> go.Figure | None:
    """Needs facts["isoflop"]["budgets"]; `runs` are the drawn runs that belong to a budget. None where there is none."""
    budgets = facts["isoflop"].get("budgets") or []
    runs = runs[runs["budget"].notna()]
    if not budgets or runs.empty:
        return None
    name, traces = facts["loss_name"], []
    for i, budget in enumerate(budgets):
        hue = theme.ramp(i, len(budgets))
        rows = runs[np.isclose(runs["budget"], budget["C"], rtol=1e-6)]
        label = fmt.scientific(budget["C"], 2)
        traces.append(_parabola(budget, rows, hue, label))
        marker = {"color": hue, "size": 7, "opacity": 0.92, "line": {"width": 1, "color": theme.colour("paper")}}
        traces.append(runs_trace(rows, rows["N"], rows["L"], name, marker=marker, legendgroup=label, showlegend=False))
    traces += [_path(facts)] if facts["parametric"].get("path") else []
    traces += [t for i, b in enumerate(budgets) if (t := _minimum(b, theme.ramp(i, len(budgets)), name)) is not None]
    key = {"symbol": "diamond", "size": 11, "color": theme.colour("paper"), "line": {"width": 2, "color": theme.colour("soft")}}
    traces.append(go.Scatter(x=[None], y=[None], mode="markers", marker=key, name="minimum, 90% interval"))
    sizes = [*runs["N"], *(b[k] for b in budgets for k in ("N_low", "N_high") if fmt.is_number(b.get(k)))]
    low, high = float(runs["N"].min()) / 1.6, float(runs["N"].max()) * 1.6
    x = theme.log_axis(f"N, parameters ({facts['convention_label']})", [min(max(s, low), high) for s in sizes], fmt.tick_count, 7)
    y = theme.loss_axis(name, float(runs["L"].min()), float(runs["L"].max()))
    return theme.figure([t for t in traces if t is not None], x, y, height=470)


def _parabola(budget: Mapping[str, Any], rows: pd.DataFrame, hue: str, label: str) -> go.Scatter:
    coefficients = budget.get("coefficients")
    if not coefficients or rows.empty:
        return line([None], [None], hue, label, legendgroup=label)  # type: ignore[list-item]
    log_n = np.linspace(np.log(rows["N"].min()), np.log(rows["N"].max()), 60)
    loss = coefficients[0] + coefficients[1] * log_n + coefficients[2] * log_n**2
    return line(np.exp(log_n).tolist(), loss.tolist(), hue, label, legendgroup=label, width=2)


def _minimum(budget: Mapping[str, Any], hue: str, loss_name: str) -> go.Scatter | None:
    if not fmt.is_number(budget.get("N_opt")) or not fmt.is_number(budget.get("L_opt")):
        return None
    interior = budget.get("status") == "interior"
    what = "minimum" if interior else EDGE_WORDS.get(str(budget.get("side") or budget.get("status")), "no minimum")
    lines = [
        f"<b>{what}</b>, {fmt.flops(budget['C'])} FLOPs",
        f"N* {fmt.count(budget['N_opt'])} ({fmt.interval(budget.get('N_low'), budget.get('N_high'), fmt.count)})",
        f"D* {fmt.count(budget.get('D_opt'))} · {loss_name} {fmt.loss(budget['L_opt'])} · {fmt.plural(budget['n'], 'run')}",
    ]
    return go.Scatter(
        x=[budget["N_opt"]],
        y=[budget["L_opt"]],
        mode="markers",
        error_x=error_bar([budget["N_opt"]], [budget.get("N_low")], [budget.get("N_high")], hue) if interior else None,
        marker={
            "symbol": "diamond" if interior else "x-thin-open",
            "size": 12 if interior else 13,
            "color": theme.colour("paper") if interior else theme.colour("amber"),
            "line": {"width": 2.4, "color": hue if interior else theme.colour("amber")},
        },
        hovertemplate="<br>".join(lines) + "<extra></extra>",
        showlegend=False,
    )


def _path(facts: Mapping[str, Any]) -> go.Scatter:
    """The compute-optimal path of the fitted surface, through (or past) the parabolas' minima."""
    path = facts["parametric"]["path"]
    return line(path["N"], path["L"], theme.colour("accent"), "surface's optimum", dash="dot", width=2)
