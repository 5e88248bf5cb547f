"""What the nodes did, hour by hour, as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_model.identity import write_atomic
from nanoladder.simulation.engine import Bar
from nanoladder.simulation.fleet import Fleet, Workers
from nanoladder.simulation.runs import HOUR, Simulated
from nanoladder.simulation.summary import KIND_LABELS

COLOURS = {
    "useful": "#2f7ed8",
    "slow": "#f2b134",
    "start": "#8d99ae",
    "save": "#5fb49c",
    "lost": "#d1495b",
    "down": "#3d3d3d",
    "idle": "#eeeeee",
}
BINS = 240
ROW_PIXELS = 22
TITLES = ("devices", "nodes (of a run first what counts, then what slow devices, checkpoints and failures added)")


def write_figure(simulated: Simulated, fleet: Fleet, workers: Workers, title: str, path: Path) -> None:
    """Devices by what they do over time, and below it every slot of every node with its runs and failures. `simulated`: with
    its bars."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.04, row_heights=[0.3, 0.7], subplot_titles=TITLES)
    edges = np.linspace(0.0, simulated.wall_seconds, BINS + 1)
    shares = devices_by_kind(simulated.bars, edges, fleet, workers)
    for kind, label in KIND_LABELS.items():
        style = {"name": label, "legendgroup": kind, "showlegend": True}
        line: dict[str, Any] = {"width": 0, "color": COLOURS[kind]}
        middles = (edges[:-1] + edges[1:]) / 2 / HOUR
        figure.add_scatter(x=middles, y=shares[kind], stackgroup="all", mode="lines", line=line, fillcolor=COLOURS[kind], **style)
        _add_bars(figure, [b for b in simulated.bars if b.kind == kind], kind, label, simulated.wall_seconds, workers)
    shown = [(at, node) for at, node in simulated.node_failures if at <= simulated.wall_seconds]
    figure.add_scatter(
        x=[at / HOUR for at, _ in shown],
        y=[node + 0.5 for _, node in shown],
        text=[f"node {node} fails at {at / HOUR:.2f} h" for at, node in shown],
        hoverinfo="text",
        mode="markers",
        marker={"symbol": "x", "size": 9, "color": "#d1495b", "line": {"width": 1, "color": "white"}},
        name="a node fails",
        row=2,
        col=1,
    )
    nodes = list(range(fleet.num_nodes))
    figure.update_yaxes(
        tickvals=[n + 0.5 for n in nodes], ticktext=[f"node {n}" for n in nodes], autorange="reversed", row=2, col=1
    )
    figure.update_xaxes(title="hours", range=[0, simulated.wall_seconds / HOUR], row=2, col=1)
    height = 420 + ROW_PIXELS * max(8, fleet.num_nodes)
    figure.update_layout(title=title, template="simple_white", barmode="overlay", height=height, bargap=0)
    write_atomic(path, figure.to_html(include_plotlyjs=True, full_html=True))


def devices_by_kind(bars: Sequence[Bar], edges: np.ndarray, fleet: Fleet, workers: Workers) -> dict[str, np.ndarray]:
    """Kind -> (bins,) mean number of devices in each bin between `edges` (bins + 1,), seconds. What nothing held is idle."""
    found = {kind: np.zeros(len(edges) - 1) for kind in KIND_LABELS}
    widths = np.diff(edges)
    for bar in bars:
        devices = fleet.devices_per_node if bar.slot < 0 else workers.devices_per_slot
        inside = np.clip(np.minimum(edges[1:], bar.end) - np.maximum(edges[:-1], bar.start), 0.0, None)
        found[bar.kind] += devices * inside / widths
    found["idle"] = np.clip(fleet.num_devices - sum(found.values()), 0.0, None)
    return found


def _add_bars(figure: Any, bars: Sequence[Bar], kind: str, label: str, wall: float, workers: Workers) -> None:
    if not bars:
        return
    height = 1.0 / workers.slots_per_node
    ends = [min(b.end, wall) for b in bars]
    figure.add_bar(
        base=[b.start / HOUR for b in bars],
        x=[(end - b.start) / HOUR for b, end in zip(bars, ends, strict=True)],
        y=[b.node + (0.5 if b.slot < 0 else (b.slot + 0.5) * height) for b in bars],
        width=[0.98 if b.slot < 0 else 0.9 * height for b in bars],
        orientation="h",
        marker={"color": COLOURS[kind], "line": {"width": 0}},
        text=[f"{b.name}<br>{label}, {(e - b.start) / 60:.1f} min" for b, e in zip(bars, ends, strict=True)],
        textposition="none",
        hoverinfo="text",
        legendgroup=kind,
        showlegend=False,
        row=2,
        col=1,
    )
