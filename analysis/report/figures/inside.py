"""What happened inside one run over its steps: a line a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from analysis.report import format as fmt
from analysis.report.facts_inside import HEALTHY_RATIO
from analysis.report.figures import theme
from analysis.report.figures.marks import line

HEIGHT = 300
MOST_NAMED = 4  # layers in a legend; of more, the first and the last: the ramp and a hover tell the others
Lines = Mapping[str, Sequence[float | None]]


def inside_figures(facts: Mapping[str, Any]) -> dict[str, go.Figure | None]:
    """Six figures by name, None where a run measured nothing of the kind."""
    block = facts["inside"]
    if block.get("missing"):
        return {}
    steps = block["step"]
    units = {f"{k}, never": v for k, v in block["dead"].items()} | {f"{k}, always": v for k, v in block["saturated"].items()}
    return {
        "inside_gradient": _figure(steps, block["gradient"], "gradient norm", log=True),
        "inside_update": _figure(steps, block["update"], "update norm", log=True),
        "inside_ratio": _figure(steps, block["ratio"], "update / weight", log=True, mark=HEALTHY_RATIO),
        "inside_units": _figure(steps, units, "share of units"),
        "inside_logits": _figure(steps, block["logit"], "largest attention logit"),
        "inside_lambdas": _figure(steps, block["lambdas"], "value"),
    }


def _figure(steps: Sequence[int], lines: Lines, title: str, *, log: bool = False, mark: float | None = None) -> go.Figure | None:
    values = [v for series in lines.values() for v in series if v is not None and (v > 0 or not log)]
    if not values:
        return None
    traces: list[Any] = [_line(steps, name, series, lines, log) for name, series in lines.items()]
    if mark is not None:
        traces.append(line([steps[0], steps[-1]], [mark, mark], theme.colour("amber"), "10⁻³", width=1.5, dash="dot"))
        values.append(mark)
    y = theme.log_axis(title, values, fmt.significant, 5) if log else theme.axis(title)
    return theme.figure(traces, theme.axis("step"), y, height=HEIGHT, legend=len(traces) > 1)


def _line(steps: Sequence[int], name: str, series: Sequence[float | None], lines: Lines, log: bool) -> go.Scatter:
    """Layers take the ramp, first to last; what is no layer takes ink. Kinds of one layer differ in their dash."""
    layers = sorted({n for n in map(_layer, lines) if n is not None})
    layer = _layer(name)
    colour = theme.colour("ink") if layer is None else theme.ramp(layers.index(layer), len(layers))
    dash = "dash" if name.endswith("always") or name.startswith("x0") or name == "lm_head" else "solid"
    drawn = [v if v is None or v > 0 or not log else None for v in series]
    style = {"color": colour, "width": 1.8, "dash": dash}
    named = layer is None or len(layers) <= MOST_NAMED or layer in (layers[0], layers[-1])
    return go.Scatter(
        x=list(steps), y=drawn, mode="lines+markers", name=name.replace("_lambda/", " "), line=style, showlegend=named,
        marker={"color": colour, "size": 4}, hovertemplate="%{y:.3g} at step %{x}<extra>%{fullData.name}</extra>",
    )  # fmt: skip


def _layer(name: str) -> int | None:
    digits = "".join(c for c in name.removeprefix("x0").partition(",")[0] if c.isdigit())
    return int(digits) if digits else None
