"""N*, D* and D/N against compute: the surface's path with its band, the parabolas' minima, the three conventions of N."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from analysis.report import format as fmt
from analysis.report.figures import theme
from analysis.report.figures.marks import band, error_bar, line

BAR_ROOM = 1.5  # how far beyond the minima their bars may widen an axis
QUANTITIES = {
    "N": ("N*, parameters", fmt.tick_count),
    "D": ("D*, training tokens", fmt.tick_count),
    "ratio": ("D*/N*, tokens per parameter", fmt.tick_plain),
}


def allocation_figure(facts: Mapping[str, Any], quantity: str) -> go.Figure | None:
    """`quantity`: N, D or ratio. The chosen convention in the accent with its band, the others in grey, dashed and dotted."""
    conventions = facts["conventions"].get("by_name") or {}
    chosen = facts["convention"]
    names = [chosen] * (chosen in conventions) + [c for c in conventions if c != chosen]
    traces: list[Any] = []
    xs: list[float] = []
    ys: list[float] = []
    for i, name in enumerate(names):
        block, main = conventions[name], name == chosen
        hue = theme.colour("accent") if main else theme.colour("soft") if i < 2 else theme.colour("faint")
        traces += _path(block, quantity, hue, theme.DASHES[i % 3], main, xs, ys)
        traces += _points(block, quantity, hue, theme.SYMBOLS[i % 3], main, xs, ys)
    target = facts["verdict"]["recommended"]
    if fmt.is_number(target.get("C")) and fmt.is_number(target.get(quantity)):
        xs.append(target["C"])
        ys.append(target[quantity])
        traces.append(_target(target, quantity))
    if not xs:
        return None
    title, formatter = QUANTITIES[quantity]
    x = theme.log_axis("C, training FLOPs", xs, fmt.tick_flops, 4)
    return theme.figure(traces, x, theme.log_axis(title, ys, formatter, 6), height=350, legend=False)


def _path(block: Mapping[str, Any], quantity: str, hue: str, dash: str, main: bool, xs: list[float], ys: list[float]) -> list[Any]:
    path = block.get("path")
    if not path or not path.get(quantity):
        return []
    xs += path["C"]
    ys += [v for v in path[quantity] if fmt.is_number(v)]
    traces = [line(path["C"], path[quantity], hue, dash=dash, width=2.4 if main else 1.5)]
    low, high = path.get(f"{quantity}_low"), path.get(f"{quantity}_high")
    if main and low and high:
        traces.insert(0, band(path["C"], low, high, hue))
        ys += [v for v in [*low, *high] if fmt.is_number(v)]
    return traces


def _points(
    block: Mapping[str, Any], quantity: str, hue: str, symbol: str, main: bool, xs: list[float], ys: list[float]
) -> list[Any]:
    minima = [m for m in block.get("minima") or [] if fmt.is_number(m.get(f"{quantity}_opt"))]
    if not minima:
        return []
    values = [m[f"{quantity}_opt"] for m in minima]
    xs += [m["C"] for m in minima]
    ys += values
    formatter = fmt.significant if quantity == "ratio" else fmt.count
    low, high = [m.get(f"{quantity}_low") for m in minima], [m.get(f"{quantity}_high") for m in minima]
    if main:  # room for the bars, but a wild one does not press the rest together
        ys += [min(max(v, min(values) / BAR_ROOM), max(values) * BAR_ROOM) for v in (*low, *high) if fmt.is_number(v)]
    inside = [m.get("status") == "interior" for m in minima]
    texts = [
        f"<b>{formatter(v)}</b> ({fmt.interval(a, b, formatter)})<br>{block['label']}, {fmt.flops(m['C'])} FLOPs"
        + ("" if ok else "<br>not an interior minimum")
        for v, a, b, m, ok in zip(values, low, high, minima, inside, strict=True)
    ]
    return [
        go.Scatter(
            x=[m["C"] for m in minima],
            y=values,
            mode="markers",
            error_y=error_bar(values, low, high, hue) if main else None,
            marker={
                "symbol": [symbol if ok else f"{symbol}-open" for ok in inside],
                "color": hue,
                "size": 8 if main else 6,
                "opacity": 1 if main else 0.8,
                "line": {"width": 1.4, "color": hue},
            },
            text=texts,
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
        )
    ]


def _target(target: Mapping[str, Any], quantity: str) -> go.Scatter:
    formatter = fmt.significant if quantity == "ratio" else fmt.count
    value = target[quantity]
    return go.Scatter(
        x=[target["C"]],
        y=[value],
        mode="markers",
        error_y=error_bar([value], [target.get(f"{quantity}_low")], [target.get(f"{quantity}_high")], theme.colour("ink")),
        marker={"symbol": "star", "size": 14, "color": theme.colour("ink"), "line": {"width": 1, "color": theme.colour("paper")}},
        hovertemplate=f"<b>target: {formatter(value)}</b><br>{fmt.flops(target['C'])} FLOPs<extra></extra>",
        showlegend=False,
    )
