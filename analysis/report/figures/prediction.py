"""Predicted against measured loss: the frontier with its band, the runs held out, the production run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from analysis.report import format as fmt
from analysis.report.figures import theme
from analysis.report.figures.marks import band, error_bar, line


def frontier_figure(facts: Mapping[str, Any]) -> go.Figure | None:
    """Best loss against compute: each budget's minimum, L*(C) = E + kappa·C^-gamma with its band, target, production."""
    frontier, name = facts["frontier"], facts["loss_name"]
    path, points = frontier.get("path"), frontier.get("points") or []
    if not path and not points:
        return None
    traces: list[Any] = []
    xs, ys = [p["C"] for p in points], [p["L"] for p in points]
    if path:
        xs, ys = [*xs, *path["C"]], [*ys, *path["L"]]
        if path.get("L_low"):
            traces.append(band(path["C"], path["L_low"], path["L_high"], theme.colour("accent")))
            ys += [v for k in ("L_low", "L_high") for v in path[k] if fmt.is_number(v)]
        traces.append(line(path["C"], path["L"], theme.colour("accent"), "frontier, 90% band", width=2.4))
    surface = facts["parametric"].get("path")
    if surface:
        traces.append(line(surface["C"], surface["L"], theme.colour("soft"), "surface's optimum", dash="dash", width=1.5))
    for i, point in enumerate(points):
        text = f"<b>minimum {fmt.loss(point['L'])}</b><br>{fmt.flops(point['C'])} FLOPs"
        hue = theme.ramp(i, len(points))
        marker = {"symbol": "diamond", "size": 10, "color": theme.colour("paper"), "line": {"width": 2.2, "color": hue}}
        traces.append(
            go.Scatter(
                x=[point["C"]], y=[point["L"]], mode="markers", marker=marker, hovertemplate=text + "<extra></extra>",
                error_y=error_bar([point["L"]], [point.get("low")], [point.get("high")], hue), showlegend=False,
            )
        )  # fmt: skip
    if not fmt.is_number(facts["production"].get("predicted")):
        traces += _predicted(facts["prediction"], "prediction", xs, ys)
    traces += _measured(facts["production"], xs, ys)
    x = theme.log_axis("C, training FLOPs", xs, fmt.tick_flops, 6)
    return theme.figure(traces, x, theme.loss_axis(name, min(ys), max(ys)), height=430)


def _predicted(prediction: Mapping[str, Any], label: str, xs: list[float], ys: list[float]) -> list[Any]:
    if not fmt.is_number(prediction.get("C")) or not fmt.is_number(prediction.get("value")):
        return []
    xs.append(prediction["C"])
    ys += [v for v in (prediction["value"], prediction.get("low"), prediction.get("high")) if fmt.is_number(v)]
    value, low, high = prediction["value"], prediction.get("low"), prediction.get("high")
    text = f"<b>predicted {fmt.loss(value)}</b> ({fmt.interval(low, high, fmt.loss)})<br>{fmt.flops(prediction['C'])} FLOPs"
    marker = {"symbol": "line-ew-open", "size": 16, "color": theme.colour("accent"), "line": {"width": 2.4}}
    return [
        go.Scatter(
            x=[prediction["C"]], y=[value], mode="markers", marker=marker, hovertemplate=text + "<extra></extra>", name=label,
            error_y={**error_bar([value], [low], [high], theme.colour("accent")), "thickness": 2.2, "width": 6},
        )
    ]  # fmt: skip


def _measured(production: Mapping[str, Any], xs: list[float], ys: list[float]) -> list[Any]:
    traces = []
    if fmt.is_number(production.get("predicted")):
        as_prediction = {**production, "value": production["predicted"]}
        traces += _predicted(as_prediction, "production, predicted", xs, ys)
    if fmt.is_number(production.get("measured")) and fmt.is_number(production.get("C")):
        xs.append(production["C"])
        ys.append(production["measured"])
        text = f"<b>measured {fmt.loss(production['measured'])}</b><br>{production.get('name', '')} {production.get('run_id', '')}"
        marker = {"symbol": "star", "size": 15, "color": theme.colour("ink"), "line": {"width": 1, "color": theme.colour("paper")}}
        traces.append(
            go.Scatter(
                x=[production["C"]], y=[production["measured"]], mode="markers", marker=marker, name="production, measured",
                customdata=[production.get("run_id") or ""], hovertemplate=text + "<extra></extra>",
            )
        )  # fmt: skip
    return traces


def error_figure(facts: Mapping[str, Any]) -> go.Figure | None:
    """Measured minus predicted, in per cent, one line a prediction; bars are the intervals stated beforehand."""
    rows = facts["held_out"].get("rows") or []
    if not rows:
        return None
    labels, errors, low, high, texts, symbols = [], [], [], [], [], []
    for row in rows:
        scale = 100 / row["predicted"]
        labels.append(row["label"])
        errors.append((row["measured"] - row["predicted"]) * scale)
        low.append((row["low"] - row["predicted"]) * scale if fmt.is_number(row.get("low")) else None)
        high.append((row["high"] - row["predicted"]) * scale if fmt.is_number(row.get("high")) else None)
        texts.append(
            f"<b>measured {fmt.loss(row['measured'])}</b>, predicted {fmt.loss(row['predicted'])}"
            f"<br>{fmt.interval(row.get('low'), row.get('high'), fmt.loss)}"
        )
        symbols.append("star" if row.get("production") else "circle")
    positions = list(range(len(rows), 0, -1))
    single = [(100 * e, p) for row, p in zip(rows, positions, strict=True) for e in row.get("run_errors") or []]
    zero = [0.0] * len(rows)
    bars = error_bar(zero, low, high, theme.colour("accent"))
    centre = {"symbol": "line-ns-open", "size": 10, "color": theme.colour("accent")}
    marks = {"symbol": symbols, "size": [14 if s == "star" else 9 for s in symbols], "color": theme.colour("ink"), "opacity": 1}
    few = {"symbol": "circle-open", "size": 6, "color": theme.colour("faint"), "opacity": 0.8}
    traces = [
        go.Scatter(
            x=[e for e, _ in single], y=[p for _, p in single], mode="markers", marker=few, name="its single runs",
            hovertemplate="%{x:.2f}%<extra></extra>", showlegend=bool(single),
        ),
        go.Scatter(
            x=zero, y=positions, mode="markers", marker=centre, error_x={**bars, "thickness": 2.2, "width": 5},
            name="predicted, interval", hoverinfo="skip",
        ),
        go.Scatter(
            x=errors, y=positions, mode="markers", marker=marks, name="measured", text=texts,
            hovertemplate="%{text}<extra></extra>",
        ),
    ]  # fmt: skip
    y = theme.axis("", tickmode="array", tickvals=positions, ticktext=labels, range=[0.4, len(rows) + 0.6], ticks="")
    x = theme.axis("measured − predicted, %", zeroline=True, zerolinecolor=theme.colour("line"))
    return theme.figure(traces, x, y, height=max(240, 110 + 34 * len(rows)))
