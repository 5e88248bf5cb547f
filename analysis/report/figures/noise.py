"""Seed noise: how far replicates of one configuration lie from their mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from analysis.report import format as fmt
from analysis.report.figures import theme
from analysis.report.figures.marks import band, line

MOST_GROUPS = 24


def noise_figure(facts: Mapping[str, Any]) -> go.Figure | None:
    """Each group of replicates on its own line: deviation from the group's mean in per cent, with ±σ over all groups."""
    groups = (facts["noise"].get("groups") or [])[:MOST_GROUPS]
    groups = [g for g in groups if len(g.get("loss") or []) > 1]
    if not groups:
        return None
    positions = list(range(len(groups), 0, -1))
    traces: list[Any] = []
    sigma = facts["noise"].get("sigma")
    ends = [0.4, len(groups) + 0.6]
    if fmt.is_number(sigma):
        traces.append(_vertical_band(100 * sigma, ends))
    traces.append(line([0, 0], ends, theme.colour("faint"), width=1))
    reach = 100 * sigma if fmt.is_number(sigma) else 0.01
    for position, group in zip(positions, groups, strict=True):
        mean = sum(group["loss"]) / len(group["loss"])
        deviations = [100 * (value / mean - 1) for value in group["loss"]]
        reach = max(reach, *map(abs, deviations))
        ids = list(group.get("run_ids") or [""] * len(deviations))
        texts = [f"<b>{facts['loss_name']} {fmt.loss(v)}</b><br>{r}" for v, r in zip(group["loss"], ids, strict=True)]
        traces.append(
            go.Scatter(
                x=deviations, y=[position] * len(deviations), mode="markers", customdata=ids, text=texts, showlegend=False,
                hovertemplate="%{text}<extra></extra>", marker={"color": theme.colour("ink"), "size": 8, "opacity": 0.75},
            )
        )  # fmt: skip
    reach *= 1.2
    labels = [str(g["label"]) for g in groups]
    y = theme.axis("", tickmode="array", tickvals=positions, ticktext=labels, range=ends, ticks="", showgrid=False)
    x = theme.axis("deviation from the group's mean, %", range=[-reach, reach])
    return theme.figure(traces, x, y, height=max(210, 120 + 30 * len(groups)))


def _vertical_band(sigma: float, ends: list[float]) -> go.Scatter:
    xs = [-sigma, sigma, sigma, -sigma]
    trace = band([0.0], [0.0], [0.0], theme.colour("accent"), "± σ")
    trace.update(x=xs, y=[ends[0], ends[0], ends[1], ends[1]])
    return trace
