"""The fitted surface L(N, D) as contour lines with the runs on it, and what it leaves unexplained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.report import format as fmt
from analysis.report.figures import theme
from analysis.report.figures.marks import band, line, runs_trace

Fit = Mapping[str, Any]


def surface_loss(fit: Fit, n: Any, d: Any) -> Any:
    """L(N, D) = E + A/N^alpha + B/D^beta (N scaling parameters, D tokens, L in the unit of the data), from the logarithms of E, A
    and B where the fit has them: those of a handful of runs may be beyond a double."""
    terms = [fit[f"log_{k}"] if fmt.is_number(fit.get(f"log_{k}")) else math.log(fit[k]) for k in ("E", "A", "B")]
    with np.errstate(over="ignore"):
        return np.exp(terms[0]) + np.exp(terms[1] - fit["alpha"] * np.log(n)) + np.exp(terms[2] - fit["beta"] * np.log(d))


def surface_figure(facts: Mapping[str, Any], runs: pd.DataFrame) -> go.Figure | None:
    """Contours of equal loss over N and D; the runs, coloured by budget; the compute-optimal path."""
    fit = facts["parametric"]
    if not fmt.is_number(fit.get("E")) or runs.empty:
        return None
    x_low, x_high = theme.padded(runs["N"].min(), runs["N"].max(), 0.1)
    y_low, y_high = theme.padded(runs["D"].min(), runs["D"].max(), 0.1)
    traces: list[Any] = _contours(fit, (x_low, x_high), (y_low, y_high), facts["loss_name"])
    for hue, label, rows in by_budget(facts, runs):
        marker = {"color": hue, "size": 7, "line": {"width": 1, "color": theme.colour("paper")}}
        traces.append(runs_trace(rows, rows["N"], rows["D"], facts["loss_name"], marker=marker, name=label, showlegend=False))
    path = fit.get("path")
    if path:
        traces.append(line(path["N"], path["D"], theme.colour("accent"), "compute-optimal path", width=2.4))
    x = theme.log_axis(f"N, parameters ({facts['convention_label']})", [x_low, x_high], fmt.tick_count, 5, exact=True)
    y = theme.log_axis("D, training tokens", [y_low, y_high], fmt.tick_count, 6, exact=True)
    return theme.figure(traces, x, y, height=430)


def _contours(fit: Fit, x_range: tuple[float, float], y_range: tuple[float, float], loss_name: str) -> list[Any]:
    """Lines of equal loss: for each level and N, D solves the surface. About ten round levels, labelled where there is room."""
    corners = [float(surface_loss(fit, n, d)) for n in x_range for d in y_range]
    middle = float(surface_loss(fit, np.sqrt(np.prod(x_range)), np.sqrt(np.prod(y_range))))
    levels = fmt.linear_ticks(min(corners), min(max(corners), middle + 3 * (middle - min(corners))), 14)
    n = np.exp(np.linspace(np.log(x_range[0]), np.log(x_range[1]), 160))
    traces = []
    for level in levels:
        rest = level - fit["E"] - fit["A"] / n ** fit["alpha"]
        with np.errstate(divide="ignore", invalid="ignore"):
            d = np.where(rest > 0, (fit["B"] / np.where(rest > 0, rest, 1.0)) ** (1 / fit["beta"]), np.nan)
        inside = np.isfinite(d) & (d >= y_range[0]) & (d <= y_range[1])
        if inside.sum() < 8:
            continue
        xs, ys = n[inside], d[inside]
        at = int(0.82 * (len(xs) - 1))
        text = [""] * len(xs)
        text[at] = fmt.significant(level, 3)
        traces.append(
            go.Scatter(
                x=xs, y=ys, mode="lines+text", text=text, textposition="top center",
                textfont={"size": 10.5, "color": theme.colour("faint")}, line={"width": 1, "color": theme.colour("line")},
                showlegend=False, hoverinfo="skip",
            )
        )  # fmt: skip
    if traces:
        traces[0].update(name=f"equal {loss_name}", showlegend=True)
    return traces


def residual_figure(facts: Mapping[str, Any], runs: pd.DataFrame) -> go.Figure | None:
    """(measured - fitted) / fitted in per cent against compute, with the band of the seed noise where it is known."""
    fit = facts["parametric"]
    if not fmt.is_number(fit.get("E")) or runs.empty:
        return None
    on_compute = runs["C"].notna().all()
    column, title, formatter = (
        ("C", "C, training FLOPs", fmt.tick_flops) if on_compute else ("D", "D, training tokens", fmt.tick_count)
    )
    x_low, x_high = theme.padded(runs[column].min(), runs[column].max(), 0.1)
    traces: list[Any] = [line([x_low, x_high], [0, 0], theme.colour("faint"), width=1)]
    sigma = facts["noise"].get("sigma")
    if fmt.is_number(sigma):
        wide = [2 * 100 * sigma] * 2
        traces.append(band([x_low, x_high], [-w for w in wide], wide, theme.colour("soft"), "± 2σ of seeds"))
    values = []
    for hue, label, rows in by_budget(facts, runs):
        fitted = surface_loss(fit, rows["N"].to_numpy(), rows["D"].to_numpy())
        residual = 100 * (rows["L"].to_numpy() / fitted - 1)
        values += residual.tolist()
        marker = {"color": hue, "size": 7, "line": {"width": 1, "color": theme.colour("paper")}}
        traces.append(runs_trace(rows, rows[column], residual, facts["loss_name"], marker=marker, name=label, showlegend=False))
    reach = 1.15 * max(0.05, float(np.quantile(np.abs(values), 0.995)), 200 * sigma if fmt.is_number(sigma) else 0.0)
    x = theme.log_axis(title, [x_low, x_high], formatter, 5, exact=True)
    return theme.figure(traces, x, theme.axis("residual, % of the fitted loss", range=[-reach, reach]), height=430)


def by_budget(facts: Mapping[str, Any], runs: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """(colour, label, rows) of each budget, then of the runs that belong to none of the laws' budgets, in grey."""
    budgets = facts["budgets"]
    groups = []
    left = np.ones(len(runs), dtype=bool)
    for i, budget in enumerate(budgets):
        mine = np.isclose(runs["budget"], budget, rtol=1e-6)
        rows, left = runs[mine], left & ~mine
        if len(rows):
            groups.append((theme.ramp(i, len(budgets)), fmt.scientific(budget, 2), rows))
    rest = runs[left]
    return [*groups, (theme.colour("soft"), "no budget", rest)] if len(rest) else groups
