"""What every figure shares: the palette, log axes with readable ticks, legends, hover. Plain plotly figures in light colours.

The page swaps each colour for its dark twin (`dark_twins`), so a figure is built once and also looks right in a notebook.
Colour has one job each: ink for measurements, one accent for what the laws say, a ramp from amber to indigo for budgets
(low to high), amber and red for warnings only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from analysis.report import format as fmt

# name: (light, dark)
PALETTE = {
    "ink": ("#1d2327", "#e9e7e2"),
    "soft": ("#59636b", "#a5adb3"),
    "faint": ("#9aa3a9", "#6f787f"),
    "grid": ("#eceae5", "#2a2f33"),
    "line": ("#d9d6cf", "#3a4146"),
    "paper": ("#fffffe", "#191d20"),
    "accent": ("#0b6e75", "#56c2c4"),
    "amber": ("#a06400", "#e5b04c"),
    "red": ("#b3362b", "#f08d80"),
}
# Anchors of the budget ramp, low to high compute, in sRGB; interpolated in OKLab so that steps look even.
RAMP_LIGHT = ("#c79a1e", "#d06f35", "#bd4a6a", "#843f96", "#3c46a8")
RAMP_DARK = ("#ecca62", "#f3a272", "#ee88a6", "#c596ea", "#93a5fb")
RAMP_STEPS = 48
FONT = 'Inter, ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
DASHES = ("solid", "dash", "dot")
SYMBOLS = ("circle", "diamond", "square")


def colour(name: str) -> str:
    return PALETTE[name][0]


def faded(hex_colour: str, alpha: float) -> str:
    """The colour with an opacity, as plotly writes it."""
    r, g, b = (int(hex_colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha:g})"


def _ramp(anchors: Sequence[str]) -> list[str]:
    labs = [_to_oklab(a) for a in anchors]
    result = []
    for i in range(RAMP_STEPS):
        position = i / (RAMP_STEPS - 1) * (len(labs) - 1)
        k = min(int(position), len(labs) - 2)
        f = position - k
        result.append(_from_oklab([(1 - f) * a + f * b for a, b in zip(labs[k], labs[k + 1], strict=True)]))
    return result


def _to_oklab(hex_colour: str) -> list[float]:
    """Björn Ottosson's OKLab (https://bottosson.github.io/posts/oklab/)."""
    srgb = [int(hex_colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in srgb]
    long = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)
    mid = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    short = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return [
        0.2104542553 * long + 0.7936177850 * mid - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * mid + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * mid - 0.8086757660 * short,
    ]


def _from_oklab(lab: Sequence[float]) -> str:
    light, a, b = lab
    long = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3
    mid = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (light - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * mid + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * mid - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * mid + 1.7076147010 * short,
    )
    channels = []
    for c in linear:
        c = min(1.0, max(0.0, c))
        channels.append(round(255 * (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055)))
    return "#" + "".join(f"{c:02x}" for c in channels)


_LIGHT, _DARK = _ramp(RAMP_LIGHT), _ramp(RAMP_DARK)


def ramp(index: int, size: int) -> str:
    """The colour of budget (or cell) `index` of `size`, low to high. One alone takes the ramp's middle."""
    t = 0.5 if size <= 1 else index / (size - 1)
    return _LIGHT[round(t * (RAMP_STEPS - 1))]


def dark_twins() -> dict[str, str]:
    """Light colour -> dark colour, for every colour a figure may hold."""
    twins = dict(PALETTE.values())
    return {**twins, **dict(zip(_LIGHT, _DARK, strict=True))}


def padded(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """A log range widened by `share` of its length (at least by 8%) on both sides."""
    ratio = max(1.08, (high / low) ** share)
    return low / ratio, high * ratio


def log_axis(
    title: str, values: Sequence[float], formatter: fmt.Formatter, most: int = 6, *, exact: bool = False, **more: Any
) -> dict[str, Any]:
    """A log axis that fits `values` (positive), with its ticks labelled in the units' own way. `exact`: no padding."""
    usable = [v for v in values if v > 0 and math.isfinite(v)] or [1.0]
    low, high = min(usable), max(usable)
    low, high = (low, high) if exact and low < high else padded(low, high)
    positions, labels = fmt.log_ticks(low, high, formatter, most)
    return {
        **axis(title),
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickmode": "array",
        "tickvals": positions,
        "ticktext": labels,
        **more,
    }


def loss_axis(title: str, low: float, high: float, **more: Any) -> dict[str, Any]:
    """A linear axis of losses over low..high with a little room, as many decimals on every tick."""
    pad = 0.05 * max(high - low, 1e-3 * abs(low))
    decimals = max(1, math.ceil(-math.log10((high - low + 2 * pad) / 6)))
    return axis(title, range=[low - pad, high + pad], tickformat=f".{decimals}f", **more)


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": title, "standoff": 10, "font": {"size": 12.5, "color": colour("soft")}},
        "gridcolor": colour("grid"),
        "linecolor": colour("line"),
        "zeroline": False,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": colour("line"),
        "tickfont": {"size": 12, "color": colour("soft")},
        "automargin": True,
        **more,
    }


def figure(
    traces: Sequence[Any], x: dict[str, Any], y: dict[str, Any], *, height: int = 400, legend: bool = True, **more: Any
) -> go.Figure:
    """A figure in the report's style. `legend` puts one line of keys above the plot."""
    layout = {
        "height": height,
        "margin": {"l": 62, "r": 18, "t": 44 if legend else 14, "b": 52},
        "font": {"family": FONT, "size": 12.5, "color": colour("ink")},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": x,
        "yaxis": y,
        "showlegend": legend,
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "xanchor": "left",
            "yanchor": "bottom",
            "font": {"size": 12, "color": colour("soft")},
            "itemsizing": "constant",
        },
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": colour("paper"),
            "bordercolor": colour("line"),
            "font": {"family": FONT, "size": 12.5, "color": colour("ink")},
            "align": "left",
        },
        "dragmode": "zoom",
        "template": "none",
        **more,
    }
    return go.Figure(data=list(traces), layout=layout)
