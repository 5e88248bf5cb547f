"""One setting's law (batch, learning rate, weight decay): every cell's own sweep, and the law through the cells' optima."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis.report import format as fmt
from analysis.report.figures import theme
from analysis.report.figures.marks import EDGE_SYMBOLS, EDGE_WORDS, INTERIOR, band, error_bar, line

AXES = {
    "D": ("D, training tokens", fmt.tick_count),
    "N": ("N, parameters", fmt.tick_count),
    "C": ("C, training FLOPs", fmt.tick_flops),
    "B": ("B, tokens a batch", fmt.tick_count),
    "width": ("width, model dimension", fmt.tick_count),
    "tokens_per_param": ("D/N, tokens per parameter", fmt.tick_plain),
}
SETTINGS = {
    "batch_size": ("batch, tokens", fmt.tick_count, fmt.whole),
    "learning_rate": ("learning rate of the matrices", fmt.tick_plain, fmt.significant),
    "weight_decay": ("weight decay", fmt.tick_plain, fmt.significant),
}
MOST_DRAWN_BAR = 4.0  # an interval wider than this factor runs out of the plot
MOST_EXCESS = 8.0  # per cent; points further above their cell's best are cut off


def cells_figure(block: Mapping[str, Any], setting: str, loss_name: str) -> go.Figure | None:
    """Excess loss over the cell's best run against the setting, one colour a cell, each cell's optimum on the floor."""
    cells = [c for c in block.get("cells") or [] if c.get("x") and c.get("loss")]
    if not cells:
        return None
    title, ticks, formatter = SETTINGS[setting]
    traces: list[Any] = []
    highest = 0.0
    for i, cell in enumerate(cells):
        hue = theme.ramp(i, len(cells))
        best = min(cell["loss"])
        excess = [100 * (v / best - 1) for v in cell["loss"]]
        highest = max(highest, *[e for e in excess if e <= MOST_EXCESS], 0.2)
        traces += _sweep(cell, excess, hue, formatter, loss_name)
    for i, cell in enumerate(cells):
        traces += _optimum(cell, -0.06 * highest, theme.ramp(i, len(cells)), formatter)
    xs = [v for c in cells for v in c["x"]]
    low, high = min(xs) / 1.5, max(xs) * 1.5
    xs += [min(max(place, low), high) for c in cells if (place := position(c)) is not None]
    x = theme.log_axis(title, xs, ticks, 6)
    y = theme.axis(f"{loss_name} above the cell's best, %", range=[-0.13 * highest, 1.08 * highest])
    return theme.figure(traces, x, y, height=390, legend=len(cells) <= 8)


def _sweep(cell: Mapping[str, Any], excess: Sequence[float], hue: str, formatter: fmt.Formatter, loss_name: str) -> list[Any]:
    """The cell's runs, and a line along the best run at each value (a second setting may vary too)."""
    xs = cell["x"]
    envelope = _envelope(xs, excess, both_vary=" and " in str(cell.get("how", "")))
    ids = list(cell.get("run_ids") or [])
    ids = ids if len(ids) == len(xs) else [""] * len(xs)
    texts = [
        f"<b>{loss_name} {fmt.loss(l)}</b> ({fmt.percent(e / 100, 2, True)})<br>{formatter(x)} · {cell_label(cell)}<br>{r}"
        for x, l, e, r in zip(xs, cell["loss"], excess, ids, strict=True)
    ]
    label = cell_label(cell)
    points = go.Scatter(
        x=xs, y=list(excess), mode="markers", customdata=ids, text=texts, hovertemplate="%{text}<extra></extra>",
        marker={"color": hue, "size": 6.5, "opacity": 0.9, "line": {"width": 1, "color": theme.colour("paper")}},
        showlegend=False, legendgroup=label,
    )  # fmt: skip
    return [line(list(envelope), list(envelope.values()), hue, label, width=1.6, legendgroup=label), points]


def _envelope(xs: Sequence[float], excess: Sequence[float], *, both_vary: bool) -> dict[float, float]:
    """The best run at each value; where a second setting varies as well, the lower convex hull in log x."""
    best: dict[float, float] = {}
    for x, e in zip(xs, excess, strict=True):
        best[x] = min(e, best.get(x, math.inf))
    points = sorted(best.items())
    if not both_vary:
        return dict(points)
    hull: list[tuple[float, float]] = []
    for x, e in points:
        while len(hull) > 1 and _above(hull[-2], hull[-1], (x, e)):
            hull.pop()
        hull.append((x, e))
    return dict(hull)


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or above the line from a to c, x on a log scale."""
    share = math.log(b[0] / a[0]) / math.log(c[0] / a[0])
    return b[1] >= a[1] + share * (c[1] - a[1])


def _optimum(cell: Mapping[str, Any], floor: float, hue: str, formatter: fmt.Formatter) -> list[Any]:
    place = position(cell)
    if place is None:
        return []
    edge = str(cell.get("edge") or INTERIOR)
    bars = error_bar([place], [cell.get("low")], [cell.get("high")], hue) if edge == INTERIOR else None
    return [
        go.Scatter(
            x=[place],
            y=[floor],
            mode="markers",
            error_x=bars,
            marker=_mark(edge, hue),
            hovertemplate=_optimum_text(cell, formatter) + "<extra></extra>",
            showlegend=False,
        )
    ]


def _mark(edge: str, hue: str) -> dict[str, Any]:
    if edge == INTERIOR:
        return {"symbol": "diamond", "size": 10, "color": theme.colour("paper"), "line": {"width": 2.2, "color": hue}}
    return {
        "symbol": EDGE_SYMBOLS.get(edge, "x-thin-open"),
        "size": 12,
        "color": theme.colour("amber"),
        "line": {"width": 2.2, "color": theme.colour("amber")},
    }


def _optimum_text(cell: Mapping[str, Any], formatter: fmt.Formatter) -> str:
    edge = str(cell.get("edge") or INTERIOR)
    if edge == INTERIOR:
        interval = fmt.interval(cell.get("low"), cell.get("high"), formatter)
        return f"<b>{formatter(cell['value'])}</b> ({interval})<br>{cell_label(cell)}"
    return f"<b>best run {formatter(cell['argmin'])}</b><br>{cell_label(cell)}<br>{EDGE_WORDS.get(edge, edge)}"


def position(cell: Mapping[str, Any]) -> float | None:
    """Where a cell is marked: its fitted optimum, else (edge, flat) its best run's value."""
    return next((float(cell[k]) for k in ("value", "argmin") if fmt.is_number(cell.get(k))), None)


def cell_label(cell: Mapping[str, Any]) -> str:
    parts = [f"{key} {fmt.count(cell[key], 2)}" for key in ("N", "D") if fmt.is_number(cell.get(key))]
    if fmt.is_number(cell.get("width")) and len(parts) < 2:
        parts.append(f"width {cell['width']:.0f}")
    return ", ".join(parts)


def law_figure(block: Mapping[str, Any], setting: str) -> go.Figure | None:
    """The cells' optima with intervals against the law's own variable, the fitted line with its band, published slopes.

    block["line"] holds {"symbol", "x", "y", "low", "high"} (the law evaluated where it is to be drawn); block["published"]
    holds [{"label", "exponent"}], drawn through the middle of the cells, as only their slopes can be compared.
    """
    cells, drawn = block.get("cells") or [], block.get("line")
    symbol = drawn["symbol"] if drawn else block.get("symbol") or "D"
    cells = [c for c in cells if position(c) is not None and fmt.is_number(c.get(symbol))]
    if not cells and not drawn:
        return None
    traces: list[Any] = []
    xs, ys = [c[symbol] for c in cells], [float(position(c) or 0.0) for c in cells]
    if drawn:
        xs, ys = [*xs, *drawn["x"]], [*ys, *drawn["y"]]
        if drawn.get("low"):
            traces.append(band(drawn["x"], drawn["low"], drawn["high"], theme.colour("accent")))
            ys += [v for v in [*drawn["low"], *drawn["high"]] if fmt.is_number(v) and min(ys) / 5 < v < max(ys) * 5]
        traces.append(line(drawn["x"], drawn["y"], theme.colour("accent"), "law, 90% band", width=2.4))
        traces += [_published(p, drawn["x"], drawn["y"], i) for i, p in enumerate(block.get("published") or [])]
    title, ticks, formatter = SETTINGS[setting]
    for i, cell in enumerate(cells):
        edge = str(cell.get("edge") or INTERIOR)
        hue = theme.ramp(i, len(cells))
        traces.append(
            go.Scatter(
                x=[cell[symbol]],
                y=[position(cell)],
                mode="markers",
                error_y=error_bar([cell["value"]], [cell.get("low")], [cell.get("high")], hue) if edge == INTERIOR else None,
                marker=_law_mark(edge, hue),
                hovertemplate=_optimum_text(cell, formatter) + "<extra></extra>",
                showlegend=False,
            )
        )
    if block.get("target"):
        traces.append(_target(block["target"], symbol, formatter, xs, ys))
    x_title, x_ticks = AXES.get(symbol, (symbol, fmt.tick_plain))
    x = theme.log_axis(x_title, xs, x_ticks, 5)
    return theme.figure([t for t in traces if t is not None], x, theme.log_axis(title, ys, ticks, 6), height=390)


def _law_mark(edge: str, hue: str) -> dict[str, Any]:
    if edge == INTERIOR:
        return _mark(edge, hue)
    symbol = {"low": "triangle-down-open", "high": "triangle-up-open"}.get(edge, "circle-open")
    return {**_mark(edge, hue), "symbol": symbol}


def _published(law: Mapping[str, Any], xs: Sequence[float], ys: Sequence[float], index: int) -> go.Scatter:
    logs = np.log(xs)
    middle = (logs[0] + logs[-1]) / 2
    at_middle = float(np.interp(middle, logs, np.log(ys)))
    values = np.exp(at_middle + law["exponent"] * (logs - middle))
    hue = theme.colour("faint")
    return line(list(xs), values.tolist(), hue, law["label"], dash=theme.DASHES[1 + index % 2], width=1.3)


def _target(target: Mapping[str, Any], symbol: str, formatter: fmt.Formatter, xs: list[float], ys: list[float]) -> Any:
    if not fmt.is_number(target.get(symbol)) or not fmt.is_number(target.get("value")):
        return None
    xs.append(target[symbol])
    near = (target["value"] / MOST_DRAWN_BAR, target["value"] * MOST_DRAWN_BAR)
    ends = [target[k] for k in ("low", "high") if fmt.is_number(target.get(k))]
    ys += [target["value"], *(min(max(e, near[0]), near[1]) for e in ends)]
    return go.Scatter(
        x=[target[symbol]],
        y=[target["value"]],
        mode="markers",
        error_y=error_bar([target["value"]], [target.get("low")], [target.get("high")], theme.colour("ink")),
        marker={"symbol": "star", "size": 14, "color": theme.colour("ink"), "line": {"width": 1, "color": theme.colour("paper")}},
        name="at the target",
        hovertemplate=f"<b>at the target {formatter(target['value'])}</b><extra></extra>",
        showlegend=True,
    )
